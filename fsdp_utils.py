"""Processes, sharding, clipping, checkpoints: what parallelism adds from outside to a model that knows nothing of it."""

import atexit
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


class ShardingError(ValueError):
    """A model that can't be sharded."""


class CheckpointError(Exception):
    """What can't be written or read, in one line; raised on all ranks alike."""


def init_processes(timeout_minutes: float = 30) -> tuple[int, int, torch.device]:
    """Joins torchrun's processes, or makes a group of one without it. Returns (rank, world size, device).

    A rank that waits for another longer than the timeout ends with an error.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    rank, world_size, store = 0, 1, dist.HashStore()
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
            # torchrun's store still holds the addresses of the processes that it has restarted. (Agents on several machines
            # count their restarts apart, and need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 to do so.)
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return dist.get_rank(), dist.get_world_size(), device


def end_process(error: str | None = None) -> NoReturn:
    """Ends this process, with code 0, or with an error's line and code 1; whatever is open for writing must be closed.

    Python is not torn down: caches of FSDP2's and DTensor's keep gloo's threads beyond destroy_process_group, and a thread that
    lets go of its last collective's tensors just then aborts the process, once in hundreds of runs.
    """
    if error:
        print(error, file=sys.stderr)
    else:
        dist.destroy_process_group()
    atexit._run_exitfuncs()  # W&B's, logging's, multiprocessing's: all but the tearing down
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if error else 0)


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """Returns the model's decoder blocks: of the outermost ModuleLists the one with the most parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if not outermost:
        raise ShardingError(f"{type(model).__name__}: no list of blocks (nn.ModuleList) is found to shard by")
    return max(outermost, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


def shard_model(model: nn.Module, device: torch.device, *methods: str, dtype: torch.dtype = torch.float32,
                recompute: bool = False, compile: bool = False, cpu_offload: bool = False, replicas: int = 1) -> None:
    """Shards each block and then the rest, in place: FSDP2 gathers one block at a time, computes, and frees it.

    With `replicas` the ranks fall into so many groups of neighbours; each group shards the model among its own, and gradients
    are summed over the groups too (HSDP: a group is a machine, between which no weights need to travel).

    `methods` are the names of those that compute with the weights, as forward does. `recompute` keeps only each block's input
    for the backward, which computes the rest again (activation checkpointing, Chen et al. 2016). `compile` compiles each block
    by itself: the blocks are alike, so that it takes no longer than compiling one. `cpu_offload` keeps shards, gradients and
    optimizer in the host's memory. Parameters on the meta device get memory, a block at a time, and load_shards fills it.

    The blocks compute in `dtype`, to which weights are rounded as they are gathered. The shards stay as they are, and
    gradients are reduced in fp32, so that what is trained in fp32 has an optimizer in fp32.
    Gradients are summed over the ranks, not averaged: the loss is divided by the global target count already.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    sizes = ({"replicate": replicas} if replicas > 1 else {}) | {"shard": dist.get_world_size() // replicas}
    mesh = dist.init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    blocks = find_blocks(model)
    for module in (*blocks, model):
        if compile and module is not model:  # the forward, not the block: the hooks of sharding stay outside
            module.forward = torch.compile(module.forward)
        if recompute and module is not model:
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
        allocate(module, device)
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for module in (model, *blocks) if dist.get_world_size() > 1 else ():  # alone, FSDP2 would divide each gradient by it
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that scales too
    for method in methods:
        register_fsdp_forward_method(model, method)
    unsharded = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not unsharded, f"not sharded, so never reduced: {unsharded}"


def allocate(module: nn.Module, device: torch.device) -> None:
    """Gives memory, not yet filled, to the parameters on the meta device; tied ones stay tied."""
    made = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                setattr(owner, name, made[parameter])


@torch.no_grad()
def load_shards(model: nn.Module, weights: dict[str, tuple[str, str]]) -> None:
    """Fills weights from {name: (safetensors file, its name there)}, of which each rank reads its own slices only."""
    state = model.state_dict()
    bar = tqdm(total=len(weights), desc="loading", unit=" weights", disable=not weights or os.environ.get("RANK", "0") != "0")
    for file in sorted({file for file, _ in weights.values()}):
        with safe_open(file, "pt") as tensors:
            for name, written in ((name, place[1]) for name, place in weights.items() if place[0] == file):
                bar.update()
                source, target = tensors.get_slice(written), state[name]
                start, stop = 0, len(target)
                if isinstance(target, DTensor):  # sharded by its first dimension as torch.chunk does, over the mesh's last
                    mesh = target.device_mesh
                    start = mesh.get_local_rank(mesh.ndim - 1) * math.ceil(len(target) / mesh.size(mesh.ndim - 1))
                    target = target.to_local()
                    stop = start + len(target)
                if start < stop:
                    target.copy_(source[start:stop])
    bar.close()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales the gradients so that their norm over all ranks is at most max_norm; returns the norm before, on all ranks."""
    return nn.utils.clip_grad_norm_(parameters, max_norm).full_tensor()


def all_reduce_means(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """Adds up each key's [sum, count] over the ranks, in one collective, and divides. All ranks must hold the same keys."""
    total = torch.stack(list(sums.values()))
    dist.all_reduce(total)
    return dict(zip(sums, (total[:, 0] / total[:, 1]).tolist()))  # waits for the device, once


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: every rank writes its own shards as safetensors, and any number of ranks goes on from them

MANIFEST = "checkpoint.json"  # lists each file's size and checksum; written last, it is what makes a folder a checkpoint


def together(work: Callable) -> list:
    """Runs work() on every rank; returns their results on all, or raises CheckpointError on all if it failed on one."""
    result = error = None
    try:
        result = work()
    except CheckpointException as failed:
        error = "; ".join(str(cause) for cause, _ in failed.failures.values())
    except (OSError, ValueError, SafetensorError) as cause:
        error = str(cause) or type(cause).__name__
    results = [None] * dist.get_world_size()
    dist.all_gather_object(results, (result, error))
    if errors := [" ".join(error.split()) for _, error in results if error]:
        raise CheckpointError(errors[0])
    return [result for result, _ in results]


def on_first_rank(work: Callable) -> None:
    """Runs work() on rank 0 while the others wait; raises CheckpointError on all if it failed."""
    together(work if dist.get_rank() == 0 else lambda: None)


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What a step changes, by name: trained weights and the optimizer's state, not copied, so that loading fills them."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in trained}
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    return weights | {name: value for name, value in state.items() if torch.is_tensor(value)}


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, *copies: Path) -> None:
    """Writes what a step changes, `state`, which must be JSON, and copies of files. All ranks must call it.

    The folder appears whole or not at all: it is written under another name, forced to the disk, and renamed when every
    rank is done. Raises CheckpointError on all ranks, and leaves nothing behind, where one of them can't write.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    partial = folder.with_name(f"{folder.name}.partial")

    def begin() -> None:
        make_anew(partial)
        for file in copies:
            shutil.copy(file, partial)

    def write() -> None:
        tensors, file_of, size = training_state(model, optimizer), {}, 0
        for name, tensor in tensors.items():  # a file is made in memory before it is written: 1 GB at a time
            file_of[name] = size // 2 ** 30 + 1
            size += tensor.nbytes // world_size
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(partial), file_of, save_distributed=True))

    def digest() -> dict:
        return {file.name: [file.stat().st_size, checksum(file)] for file in sorted(partial.iterdir())[rank::world_size]}

    def publish() -> None:
        manifest = state | {"world_size": world_size, "files": dict(sorted(files.items()))}
        (partial / MANIFEST).write_text(json.dumps(manifest | {"sha256": checksum(manifest)}, indent=2))
        replace(folder, partial)

    try:
        on_first_rank(begin)
        together(write)
        files = {name: facts for part in together(digest) for name, facts in part.items()}
        on_first_rank(publish)
    except CheckpointError as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{folder}: can't be written: {error}") from error


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fills model and optimizer with what save_checkpoint wrote, on any number of processes. All ranks must call it."""
    def load() -> None:
        tensors, reader = training_state(model, optimizer), HuggingFaceStorageReader(str(folder))
        if others := reader.read_metadata().state_dict_metadata.keys() - tensors.keys():
            raise ValueError(f"it holds {min(others)}, which the model has not")
        dcp.load(tensors, storage_reader=reader)

    try:
        together(load)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: does not fit the model: {error}") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run's folder, or of its FINAL, or the folder itself, the one with the most steps last."""
    steps = [path for path in folder.glob("checkpoints/step-*") if not path.suffix]  # neither .partial nor .old
    others = [path for path in (folder / "FINAL/checkpoint", folder / "checkpoint", folder) if (path / MANIFEST).is_file()]
    return [*others, *sorted(steps, key=step_of)]


def step_of(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def prune_checkpoints(newest: Path, keep_last: int) -> None:
    """Removes what lies beside a checkpoint just written, but for the keep_last - 1 before it."""
    if dist.get_rank() == 0:
        others = [path for path in newest.parent.iterdir() if path != newest]
        kept = sorted((path for path in others if (path / MANIFEST).is_file()), key=step_of, reverse=True)[:keep_last - 1]
        for path in others:
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(folders: list[Path], warn: Callable[[str], None]) -> tuple[Path, dict] | None:
    """Returns the last of the checkpoints that is whole, and its state; warns of each after it. All ranks must call it."""
    for folder in reversed(folders):
        damaged = {name for names in together(functools.partial(damaged_files, folder)) for name in names}
        if not damaged:
            return folder, read_manifest(folder)
        warn(f"warning: {folder}: this checkpoint is damaged ({', '.join(sorted(damaged))}) and not used")
    return None


def damaged_files(folder: Path) -> list[str]:
    """Returns those of the checkpoint's files that are not as they were written; each rank looks through its share of them."""
    try:
        files = sorted(read_manifest(folder)["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [MANIFEST]
    return [name for name, facts in files[dist.get_rank()::dist.get_world_size()] if not is_whole(folder / name, *facts)]


def read_manifest(folder: Path) -> dict:
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest.pop("sha256") != checksum(manifest):
        raise ValueError(f"{folder / MANIFEST} is damaged")
    return manifest


def is_whole(file: Path, size: int, expected: str) -> bool:
    try:
        return file.stat().st_size == size and checksum(file) == expected
    except OSError:
        return False


def checksum(content: Path | dict) -> str:
    if isinstance(content, dict):
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    with open(content, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_anew(folder: Path) -> None:
    """Makes an empty folder, also where a killed run has left one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def replace(folder: Path, partial: Path) -> None:
    """Renames a folder when all in it is on the disk. One that bears the name already is removed after that."""
    for path in (*partial.rglob("*"), partial):
        sync(path)
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(folder: Path):
    """Makes the folder; returns an open file that keeps other runs out of it until it is closed or this process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(f"{folder}: another run is writing there; wait for it to end or choose another exp_name") from error
    except OSError as error:
        raise CheckpointError(f"{folder}: can't be written to: {error.strerror}") from error
    return file


def write_gathered(model: nn.Module, write: Callable[[Iterator[dict]], None], limit: float = math.inf,
                   trained_only: bool = False) -> None:
    """Calls write(gather_in_parts(...)) on rank 0. All ranks must call it; raises CheckpointError on all where it fails."""
    parts = gather_in_parts(model, limit, trained_only)

    def work() -> None:
        try:
            if dist.get_rank() == 0:
                write(parts)
        finally:
            for _ in parts:  # gathering takes all ranks, also where rank 0 can't write
                pass

    together(work)


def gather_in_parts(model: nn.Module, limit: float, trained_only: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the whole state dict, tied weights once, in parts on the CPU of rank 0; {} on the others. All must take all.

    A part is whole blocks of at most `limit` bytes together, or one that has more.
    """
    blocks = next(name for name, module in model.named_modules() if module is find_blocks(model))
    own = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(own)
    wanted = [(name, tensor) for name, tensor in model.state_dict().items()
              if name not in tied and (own.get(name) or not trained_only)]

    def block_of(item) -> str:
        block = re.match(rf"{re.escape(blocks)}\.\d+\.", item[0])
        return block[0] if block else ""

    part, size = {}, 0
    bar = tqdm(total=len(wanted), desc="gathering", unit=" weights", leave=False, disable=dist.get_rank() > 0)
    for _, group in itertools.groupby(wanted, block_of):
        group = list(group)
        more = sum(tensor.nbytes for _, tensor in group)
        if size and size + more > limit:
            yield part
            part, size = {}, 0
        size += more
        for name, tensor in group:
            if isinstance(tensor, DTensor):
                tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()
            if dist.get_rank() == 0:
                part[name] = tensor.cpu()
            bar.update()
    bar.close()
    yield part
