"""Whole or absent: the checkpoints that a run leaves on the disk, and which of them may be resumed."""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from configs.base import Config, changes
from fsdp_utils import failing_together, gather_all, is_finite, on_any_rank, say
from model_utils import fingerprint
from script import PARENT, RunError, handle_signals, timed


class CheckpointError(RunError):
    """What can't be written, read or resumed, in one line; raised on all ranks alike."""


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `folder` after the block, when all ranks are done and it is on the disk.

    Where a rank fails, CheckpointError is raised on all, nothing is left behind, and what was in the place stays there.
    """
    partial, first = folder.with_name(f"{folder.name}.partial"), dist.get_rank() == 0
    try:
        with failing_together(CheckpointError):
            if first:
                remove(partial)  # left by a run that was killed
                partial.mkdir(parents=True)
        with failing_together(CheckpointError):
            yield partial
        with failing_together(CheckpointError):
            if first:
                replace(folder, partial)
    except CheckpointError as error:
        if first:
            remove(partial)
        raise CheckpointError(f"{folder}: can't be written: {error}") from error


def replace(folder: Path, partial: Path) -> None:
    """Renames a folder when all in it is on the disk. One that bears the name already is removed after that.

    Its files get the modes that the umask has given the folder: safetensors writes for the owner alone.
    """
    for path in (*partial.rglob("*"), partial):
        if path.is_file():
            path.chmod(partial.stat().st_mode & 0o666)
        sync(path)
    old = folder.with_name(f"{folder.name}.old")
    remove(old)
    if os.path.lexists(folder):
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    remove(old)


def remove(path: Path) -> None:
    """Removes a folder, a file or a link, as far as it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def kept(file: Path, make: Callable[..., torch.Tensor], *args) -> np.ndarray:
    """Returns the array that the file holds, or where it is not there, make(*args), which it holds from then on, whole.

    All ranks must call it, and make(*args) must be the same on all.
    """
    if on_any_rank(file.exists()):
        return np.load(file, mmap_mode="r")
    array, partial = make(*args).cpu().numpy(), file.with_suffix(".partial.npy")
    with failing_together(CheckpointError, f"{file}: can't be written"):
        if dist.get_rank() == 0:
            np.save(partial, array)
            sync(partial)
            partial.replace(file)
    return array


def lock(folder: Path):
    """Makes the folder; returns an open file that keeps other runs out of it until it is closed or this process ends."""
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise CheckpointError(f"{folder}: another run is writing there: {file.read().strip()} saves and ends by `kill PID`; or "
                              "choose another exp_name") from error
    except OSError as error:
        raise CheckpointError(f"{folder}: can't be written to: {error.strerror}") from error
    file.truncate(0)
    print(f"PID {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file


def started(run_dir: Path) -> str:
    """Returns the day on which the run was first started, YYYY-MM-DD: a template may write it, and rows must stay the same.

    All processes may call it at once; the first one's day is everyone's.
    """
    file, own = run_dir / "first_day", run_dir / f"first_day.{socket.gethostname()}.{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        own.write_text(datetime.date.today().isoformat())
        with contextlib.suppress(FileExistsError, FileNotFoundError):  # the day is there, and `own` may be removed by another
            os.link(own, file)
        for path in run_dir.glob("first_day.*"):  # a run that was killed here has left one too
            path.unlink(missing_ok=True)
        return datetime.date.fromisoformat(file.read_text()).isoformat()
    except OSError as error:
        raise CheckpointError(f"{run_dir}: can't be written to: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: is no day, YYYY-MM-DD: write that of the run's first start there") from error


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: every rank writes its own shards as safetensors, and any number of ranks goes on from them

MANIFEST = "checkpoint.json"  # lists each file's size and checksum; written last, it is what makes a folder a checkpoint
FILES = "files.json"  # FINAL's own, with each file's fingerprint
DAMAGE = OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError  # what a file that is not as it was may raise
FILE_SIZE = 2 ** 28  # bytes, after which a rank begins another file
N_FILES = 4  # are written or read at once: the disk works while checksums are made. Of a GPU's, so many are in the host's memory


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What a step changes, by name: trained weights and the optimizer's state, not copied, so that loading fills them."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in trained}
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    return weights | {name: value for name, value in state.items() if torch.is_tensor(value)}


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Raises CheckpointError where this rank's part of one is not finite: no step could be good from there on."""
    for name, tensor in tensors.items():
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not is_finite(tensor):
            raise CheckpointError(f"{name} is not finite")


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, *copies: Path) -> None:
    """Writes what a step changes, `state`, which must be JSON, and copies of files; whole or not at all. All ranks must call it.

    Raises CheckpointError on all ranks where one of them can't write.
    """
    rank = dist.get_rank()
    with written_whole(folder) as partial:
        tensors = training_state(model, optimizer)
        with failing_together(CheckpointError):
            check_finite(tensors)
            for file in copies if rank == 0 else ():
                shutil.copy(file, partial)
            mine = {file.name: facts_of(file) for file in partial.iterdir()} if rank == 0 else {}
        writer = ShardWriter(str(partial), save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
        files = {name: facts for share in gather_all(mine | writer.files) for name, facts in share.items()}
        if rank == 0:
            manifest = state | {"world_size": dist.get_world_size(), "files": dict(sorted(files.items()))}
            (partial / MANIFEST).write_text(json.dumps(manifest | {"sha256": checksum(manifest)}, indent=2))


class ShardWriter(HuggingFaceStorageWriter):
    """Writes what torch's own does, but straight from the tensors, where that one makes each file in memory first, and in
    threads that raise what fails in them. `files` is {name: [size, checksum]} of this rank's, which are on the disk then.
    """

    def write_data(self, plan, planner):
        files, size = [], FILE_SIZE
        for item in plan.items:
            if size >= FILE_SIZE:
                files, size = [*files, {}], 0
            shard = planner.resolve_data(item).detach()
            files[-1][item.index.fqn] = shard, list(item.tensor_data.chunk.offsets)
            size += shard.nbytes
        paths = [Path(self.path, f"rank-{dist.get_rank():05}-{i:05}.safetensors") for i in range(len(files))]
        with ThreadPoolExecutor(N_FILES) as pool:
            self.files = {path.name: facts for path, facts in zip(paths, pool.map(write_shards, paths, files))}
        return super().write_data(dataclasses.replace(plan, items=[]), planner)  # which has nothing left to write


def write_shards(file: Path, shards: dict[str, tuple[torch.Tensor, list[int]]]) -> list:
    """Writes {name: (shard, where in the whole tensor it begins)} to the disk; returns [size, checksum]."""
    begins = {name: {"saved_offsets": begin} for name, (_, begin) in shards.items()}
    save_file({name: shard for name, (shard, _) in shards.items()}, file, {"DCP_SHARDING_INFO": json.dumps(begins)})
    sync(file)
    return facts_of(file)


@timed("checkpoint")
def load_checkpoint(folder: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fills model and optimizer with what save_checkpoint wrote, on any number of processes, or does nothing without a folder.

    All ranks must call it.
    """
    if not folder:
        return
    with failing_together(CheckpointError, f"{folder}: does not fit the model"):
        tensors, reader = training_state(model, optimizer), HuggingFaceStorageReader(str(folder), thread_count=N_FILES)
        files = [str(folder / name) for name in read_manifest(folder)["files"]]
        reader.fs.ls = lambda _: files  # it would read whatever lies beside them too
        if others := reader.read_metadata().state_dict_metadata.keys() - tensors.keys():
            raise ValueError(f"it holds {min(others)}, which the model has not")
        dcp.load(tensors, storage_reader=reader)
    with failing_together(CheckpointError, f"{folder}: delete it, to go on from the one before"):
        check_finite(tensors)


@dataclasses.dataclass
class Progress:
    """How far the run is: what a checkpoint says of it besides weights and optimizer."""

    step: int = 0
    counter: int = 0  # examples seen
    skipped_steps: int = 0
    consecutive_skips: int = 0

    def is_due(self, every: int | None, n_examples: int, batch_size: int) -> bool:
        """Whether it is the end, or the last step, or the start, has reached a multiple of `every`, or a tenth of the run's."""
        every = every or max(batch_size, n_examples // 10)
        return self.counter == n_examples or self.counter // every > (self.counter - batch_size) // every

    def may_be_saved(self, n_examples: int) -> bool:
        """Not while steps are skipped: the checkpoint before them is the one to go back to. What they leave at the end is it."""
        return not self.consecutive_skips or self.counter == n_examples

    def advance(self, n_examples: int, skipped: bool) -> None:
        self.step, self.counter, self.skipped_steps = self.step + 1, self.counter + n_examples, self.skipped_steps + skipped
        self.consecutive_skips = self.consecutive_skips + 1 if skipped else 0

    def check_skips(self, most: int, latest: Path | None, loader, n_examples: int) -> None:
        """Raises RunError after the `most`th consecutive skipped step, of n_examples of the loader's."""
        if self.consecutive_skips == most:
            raise RunError(f"step {self.step}: the loss or the gradient is not finite, {most} consecutive steps; the last good "
                           f"checkpoint: {latest}; the step's rows: {loader.row_names(self.counter - n_examples)}")

    def check_loss(self, loss: float, latest: Path | None) -> None:
        """Raises RunError where the loss after the last good step is not finite: what gives it is never saved."""
        if not math.isfinite(loss):
            raise RunError(f"step {self.step}: the loss is not finite after it, and nothing is saved: is lr too high? The last "
                           f"good checkpoint: {latest}")


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run's folder, or of its FINAL, or the folder itself, the one with the most steps last."""
    steps = [path for path in folder.glob("checkpoints/step-*") if not path.suffix]  # neither .partial nor .old
    others = [path for path in (folder / "FINAL/checkpoint", folder / "checkpoint", folder) if (path / MANIFEST).is_file()]
    return [*others, *sorted(steps, key=step_of)]


def step_of(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def save_latest(run_dir: Path, state: dict, model: nn.Module, optimizer: torch.optim.Optimizer, latest: Path | None,
                keep_last: int, stop_if_it_fails: bool) -> Path | None:
    """Saves a run's checkpoint, if it is not there yet, and removes all before it but keep_last - 1. Returns it.

    Where it can't be written CheckpointError is raised, or if the run is to go on, a warning is printed and `latest` returned.
    """
    folder = run_dir / "checkpoints" / f"step-{state['step']}"
    if folder == latest:
        return latest
    try:
        save_checkpoint(folder, model, optimizer, state, run_dir / "metrics.jsonl")
    except CheckpointError as error:
        if stop_if_it_fails:
            raise CheckpointError(f"{error}; the last whole checkpoint: {latest}") from error
        say(f"warning: {error}; the run goes on")
        return latest
    prune_checkpoints(folder, keep_last)
    return folder


def prune_checkpoints(newest: Path, keep_last: int) -> None:
    """Removes what lies beside a checkpoint just written, but for the keep_last - 1 before it."""
    if dist.get_rank() == 0:
        others = [path for path in newest.parent.iterdir() if path != newest]
        kept = sorted((path for path in others if (path / MANIFEST).is_file()), key=step_of, reverse=True)[:keep_last - 1]
        for path in others:
            if path not in kept:
                remove(path)


def find_checkpoint(folders: list[Path]) -> tuple[Path, dict] | None:
    """Returns the last of the checkpoints that is whole, and its state; warns of each after it. All ranks must call it."""
    for folder in reversed(folders):
        damaged = {name for share in gather_all(damaged_files(folder)) for name in share}
        if not damaged:
            return folder, read_manifest(folder)
        if dist.get_rank() == 0:
            print(f"warning: {folder}: this checkpoint is damaged ({', '.join(sorted(damaged))}) and not used", file=sys.stderr)
    return None


def damaged_files(folder: Path) -> list[str]:
    """Returns those of the checkpoint's files that are not as they were written; each rank looks through its share of them."""
    try:
        files = sorted(read_manifest(folder)["files"].items())
    except DAMAGE:
        return [MANIFEST]
    files = files[dist.get_rank()::dist.get_world_size()]
    with ThreadPoolExecutor(N_FILES) as pool:
        whole = pool.map(lambda item: is_whole(folder / item[0], item[1]), files)
        return [name for (name, _), as_it_was in zip(files, whole) if not as_it_was]


def read_manifest(folder: Path) -> dict:
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest.pop("sha256") != checksum(manifest):
        raise ValueError(f"{folder / MANIFEST} is damaged")
    return manifest


def is_whole(file: Path, facts: list) -> bool:
    try:
        return facts_of(file) == facts
    except OSError:
        return False


def facts_of(file: Path) -> list:
    return [file.stat().st_size, checksum(file)]


def checksum(content: Path | dict) -> str:
    if isinstance(content, dict):
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    with open(content, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


@timed("checkpoint")
def find_start(run_dir: Path, from_checkpoint: str, facts: dict, n_examples: int, allow_changes: bool, keep_last: int,
               kind: type = Config) -> tuple[Path | None, Progress]:
    """Returns the checkpoint to go on from and how far it is: the run's own, or else the one given; or None and a start.

    All ranks must call it. Raises CheckpointError where there is none that is whole, or where it does not belong to this run,
    whose `facts` are those that its checkpoints hold: the configuration, which is of this kind, what identifies the rows, and the
    base's fingerprints.
    """
    own = list_checkpoints(run_dir)
    if from_checkpoint and own and Path(from_checkpoint).resolve().is_relative_to(run_dir.resolve()):
        raise CheckpointError(f"model.from_checkpoint={from_checkpoint} is this run's own, which goes on from its last one by "
                              "itself; to go back to an earlier one delete those after it")
    found = find_checkpoint(own or (list_checkpoints(Path(from_checkpoint)) if from_checkpoint else []))
    if not found:
        if own or from_checkpoint:
            raise CheckpointError(f"{run_dir if own else from_checkpoint}: there is no whole checkpoint" +
                                  ("; delete the folder to begin anew" if own else ""))
        return None, Progress()
    folder, state = found
    then, now = state.get("base", facts["base"]), facts["base"]
    contents = [f"{file}: {then.get(file)} then, {now.get(file)} now" for file in sorted({*then, *now})
                if then.get(file) != now.get(file)]
    if state["data"] != facts["data"]:
        contents.append("the rows: other files or weights, or tokenised by another tokenizer or version")
    moved = bool(contents) or "base" not in state  # an older version's checkpoint tells the base by its name alone
    different = changes(state["config"], facts["config"], moved, kind) + contents
    if different and not allow_changes:
        raise CheckpointError(f"{folder}: this run began differently: {'; '.join(different)}. Go back to that, choose another "
                              "exp_name, or set allow_changes=true")
    if state["counter"] > n_examples:
        raise CheckpointError(f"{folder}: {state['counter']} examples are trained already, more than the {n_examples} asked for")
    remove_leftovers(run_dir, folder, keep_last)
    return folder, Progress(**{item.name: state.get(item.name, 0) for item in dataclasses.fields(Progress)})


def remove_leftovers(run_dir: Path, newest: Path, keep_last: int) -> None:
    """Removes what a kill has kept the run from removing: beside its newest checkpoint, and the FINAL before this one."""
    if newest.parent == run_dir / "checkpoints" and newest == list_checkpoints(run_dir)[-1]:  # and not one before a damaged one
        prune_checkpoints(newest, keep_last)
    if dist.get_rank() == 0 and (run_dir / "FINAL").exists():
        remove(run_dir / "FINAL.old")


def is_done(final: Path, counter: int) -> bool:
    """Whether FINAL is there, of so many examples, and each of its files is as it was written, as far as a few slices tell."""
    try:
        files = json.loads((final / FILES).read_text())
        return (json.loads((final / "metrics.json").read_text())["counter"] == counter
                and all(fingerprint(final / name) == its for name, its in files.items()))
    except DAMAGE:
        return False


def catch_signals() -> Callable[[], bool]:
    """Returns what tells, on all ranks alike, whether one of them is to end: by SIGTERM, SIGHUP or ctrl-C, which from now on end
    no process at once, but for a ctrl-C after them, or since torchrun, which has started it, is gone. All ranks must call that.
    """
    caught, orphaned = [], "TORCHELASTIC_RUN_ID" in os.environ

    def catch(number, _) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    handle_signals(catch)
    return lambda: on_any_rank(bool(caught) or orphaned and os.getppid() != PARENT)
