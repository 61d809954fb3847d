"""Runs that are killed, stopped, starved or given bad numbers: what is left of them, and where the same command ends."""

import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, launch, run_script, run_well, write_model
from safetensors.torch import load_file, save_file

from benchmarks.kill import family, read_records
from fsdp_utils import lock

SFT = ROOT / "sft.py"
CONFIG = """
from configs.base import Config, ModelConfig

config = Config(datasets=["train.jsonl"], cache_dir="runs", lr=1e-2, weight_decay=0.1, seed=7, n_epochs=3, save_every=16,
                model=ModelConfig(name_or_path="model", batch_size=8, max_length=96, max_prompt_length=48))
"""
N_ROWS = 40  # 5 steps an epoch, 15 in all, a checkpoint at each second one


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_model(folder / "model")
    rows = [{"prompt": "AB" * (i % 7 + 1), "completion": "CD" * (i % 5 + 1)} for i in range(N_ROWS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.py").write_text(CONFIG)
    return folder


def command(name: str, *overrides: str) -> list:
    return [SFT, "--config", "config.py", f"exp_name={name}", *overrides]


@pytest.fixture(scope="module")
def straight(folder) -> Path:
    run_well(*command("straight"), n_processes=2, cwd=folder)
    return folder / "runs/straight"


def assert_same(run: Path, other: Path) -> None:
    assert read_records(run) == read_records(other)
    assert (run / "FINAL/model.safetensors").read_bytes() == (other / "FINAL/model.safetensors").read_bytes()


class Running:
    """A command under torchrun, watched while it runs; it is killed with all its processes if it is left alive."""

    def __init__(self, folder: Path, *argv, torchrun: tuple = ("--standalone", "--nproc_per_node=2")):
        self.run = folder / "runs" / next(part.partition("=")[2] for part in map(str, argv) if part.startswith("exp_name="))
        self.process = launch(argv, torchrun, cwd=folder)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in family(self.process.pid) if self.process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)

    def wait_for_step(self, step: int) -> None:
        metrics = self.run / "metrics.jsonl"
        self.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= step)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def pid_of(self, rank: int) -> int:
        for pid in family(self.process.pid)[1:]:
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
        raise AssertionError(f"no rank {rank}")

    def end(self, timeout: float = 120) -> tuple[int, str, str]:
        stdout, stderr = self.process.communicate(timeout=timeout)
        return self.process.returncode, stdout, stderr


# ---------------------------------------------------------------------------------------------------------------------
# Killed and stopped


@pytest.mark.parametrize("seed", [1])
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(seed):
    assert "bit for bit" in run_well(ROOT / "benchmarks/kill.py", "--kills", 2, "--seed", seed, timeout=400)


@pytest.mark.parametrize("rank, number", [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_a_signal_to_one_rank_stops_all_at_a_checkpoint(folder, straight, rank, number):
    name = f"stopped-{rank}"
    with Running(folder, *command(name)) as running:
        running.wait_for_step(3)
        os.kill(running.pid_of(rank), number)
        code, stdout, stderr = running.end()
    assert code == 0, stderr
    step = read_records(running.run)[-1]["step"]
    assert 3 <= step < 15 and not (running.run / "FINAL").exists()
    assert f"stopped by a signal after step {step}; the same command goes on from runs/{name}/checkpoints/step-{step}" in stdout
    assert f"resumed after step {step} from runs/{name}/checkpoints/step-{step}" in run_well(
        *command(name), n_processes=2, cwd=folder)
    assert_same(running.run, straight)


ENDING = """
import atexit, os, runpy, sys


class Global:
    def __del__(self, write=os.write):
        write(2, b"<torn down>")


kept = Global()
atexit.register(os.write, 2, b"<handlers ran>")  # the first to be registered is the last to run
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name, override, code, says", [
    ("ended", "seed=7", 0, "saved to runs/ended/FINAL"), ("straight", "seed=7", 0, "finished already"),
    ("straight", "model.batch_size=4", 1, "began differently: model.batch_size")], ids=["end", "finished", "error"])
def test_a_run_ends_without_tearing_python_down(folder, straight, name, override, code, says):
    """A gloo thread that lets go of a collective's tensors meanwhile would abort it, once in hundreds of runs."""
    (folder / "ending.py").write_text(ENDING)
    done = run_script("ending.py", *command(name, override), n_processes=2, cwd=folder)
    assert done.returncode == code and says in done.stdout + done.stderr, done.stderr
    assert done.stderr.count("<handlers ran>") == (1 if code else 2)  # where one fails torchrun ends the other
    assert "<torn down>" not in done.stderr


def test_torchrun_restarts_a_run_whose_worker_is_killed(folder, straight):
    with Running(folder, *command("restarted"), torchrun=("--standalone", "--nproc_per_node=2", "--max-restarts=3")) as running:
        running.wait_for_step(5)
        os.kill(running.pid_of(1), signal.SIGKILL)
        code, stdout, stderr = running.end()
    assert code == 0, stderr
    assert "resumed after step" in stdout
    assert_same(running.run, straight)


def test_a_rank_that_is_stuck_ends_the_run_with_a_line(folder):
    with Running(folder, *command("stuck", "timeout_minutes=0.1")) as running:
        running.wait_for_step(2)
        first, stuck = running.pid_of(0), running.pid_of(1)
        os.kill(stuck, signal.SIGSTOP)
        running.wait_until(lambda: first not in family(running.process.pid))
        os.kill(stuck, signal.SIGKILL)  # torchrun would do so half a minute later
        code, _, stderr = running.end()
    assert code == 1
    (line,) = [line for line in stderr.splitlines() if line.startswith("sft.py: ")]
    assert line.startswith("sft.py: rank 0: another rank has ended, or has not answered for 0.1 minutes")


def test_two_agents_train_as_one(folder, straight):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ("--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=x",
                "--local-addr=127.0.0.1")
    with Running(folder, *command("two-agents"), torchrun=torchrun) as one, \
            Running(folder, *command("two-agents"), torchrun=torchrun) as other:
        assert [running.end()[0] for running in (one, other)] == [0, 0]
    assert_same(one.run, straight)


def test_a_finished_run_is_left_alone_and_goes_on_if_asked_for_more(folder, straight):
    run = folder / "runs/finished"
    shutil.copytree(straight, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "lock"}
    assert "finished already: runs/finished/FINAL" in run_well(*command("finished"), n_processes=2, cwd=folder)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "lock"} == before
    shutil.rmtree(run / "checkpoints")  # FINAL has one too
    assert "resumed after step 15 from runs/finished/FINAL/checkpoint" in run_well(
        *command("finished", "n_epochs=4"), n_processes=2, cwd=folder)
    records = read_records(run)
    assert [record["step"] for record in records] == [*range(1, 21)] and records[:15] == read_records(straight)
    assert json.loads((run / "FINAL/metrics.json").read_text())["counter"] == 4 * N_ROWS
    assert not [path for path in run.rglob("*") if path.suffix in (".partial", ".old")]


def test_final_is_written_anew_where_it_is_missing(folder, straight):
    run = folder / "runs/exported"
    shutil.copytree(straight, run, ignore=shutil.ignore_patterns("FINAL"))
    (run / "FINAL.partial").mkdir()
    run_well(*command("exported"), n_processes=2, cwd=folder)
    assert_same(run, straight)


# ---------------------------------------------------------------------------------------------------------------------
# Refused


@pytest.fixture(scope="module")
def refused(folder, straight) -> dict:
    changed = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    changed[3]["completion"] += "E"
    (folder / "changed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    shutil.copytree(straight, folder / "runs/damaged", ignore=shutil.ignore_patterns("FINAL"))
    for file in (folder / "runs/damaged").rglob("shard-00001*"):
        file.write_bytes(b"")
    shutil.copytree(straight, folder / "runs/rewound")
    (folder / "a file").write_text("")
    locked = lock(folder / "runs/locked")
    done = {name: run_script(*command(*argv), cwd=folder) for name, (argv, _) in REFUSED.items()}  # not at once: they lock
    locked.close()
    return done


REFUSED = {  # name → (the name of the run and overrides, parts of the line)
    "another rate": (["straight", "lr=2e-2"], ["checkpoints/step-15: this run began differently: lr: 0.01 then, 0.02 now. Go"]),
    "two keys": (["straight", "model.batch_size=4", "warmup=0.5"], ["warmup: 0.1 then, 0.5 now; model.batch_size: 8 then, 4"]),
    "other rows": (["straight", "datasets=[changed.jsonl]"], ["differently: the rows: other files"]),
    "another model": (["straight", "model.random_init={\"model_type\": \"llama\"}"], ["model.random_init: None then, "]),
    "fewer epochs": (["straight", "n_epochs=2"], ["120 examples are trained already, more than the 80 asked for"]),
    "no whole checkpoint": (["damaged"], ["runs/damaged: there is no whole checkpoint; delete the folder to begin anew"]),
    "a second run": (["locked"], ["runs/locked: another run is writing there; wait for it to end or choose another exp_name"]),
    "its own checkpoint": (["rewound", "model.from_checkpoint=runs/rewound/checkpoints/step-14"], ["is this run's own"]),
    "not a checkpoint": (["new", "model.from_checkpoint=model"], ["model: there is no whole checkpoint"]),
    "nowhere to write": (["new", "cache_dir=a file"], ["a file/new: can't be written to: Not a directory"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_t_be_resumed_is_refused_in_one_line(refused, name):
    _, parts = REFUSED[name]
    assert refused[name].returncode == 1
    *warnings, line = refused[name].stderr.splitlines()
    assert line.startswith("sft.py: ") and all(part in line for part in parts)
    assert all(warning.startswith("warning: ") for warning in warnings) and bool(warnings) == (name == "no whole checkpoint")


def test_a_refused_run_leaves_everything_as_it_was(refused, straight):
    assert (straight / "FINAL/model.safetensors").exists() and len(read_records(straight)) == 15
    assert {path.name for path in (straight / "checkpoints").iterdir()} == {"step-14", "step-15"}


def test_a_change_is_allowed_where_it_is_asked_for(folder, straight):
    run = folder / "runs/allowed"
    shutil.copytree(straight, run, ignore=shutil.ignore_patterns("FINAL", "step-15"))
    run_well(*command("allowed", "lr=2e-2", "allow_changes=true"), n_processes=2, cwd=folder)
    own, its = read_records(run), read_records(straight)
    assert own[:14] == its[:14] and own[14]["counter"] == its[14]["counter"] and own[14]["loss/train"] == its[14]["loss/train"]


# ---------------------------------------------------------------------------------------------------------------------
# A full disk


def test_a_checkpoint_that_can_t_be_written_leaves_the_one_before_it(folder, straight):
    """The largest file that a process may write is set too small for a checkpoint, once one is there."""
    run = folder / "runs/full"
    shutil.copytree(straight, run, ignore=shutil.ignore_patterns("FINAL", "step-15"))
    limit = max(file.stat().st_size for file in (straight / "checkpoints/step-15").iterdir()) - 1
    for stops in (True, False):
        with Running(folder, *command("full", f"stop_if_save_fails={stops}".lower())) as running:
            resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (limit, limit))  # its children inherit it
            code, stdout, stderr = running.end()
        assert not [path for path in run.rglob("*") if path.suffix == ".partial"]
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-14"}
        said = [line for line in (stdout + stderr).splitlines() if "step-15: can't be written: " in line]
        assert len(said) == 1 and "File too large" in said[0]
        if stops:
            assert code == 1 and said[0].startswith("sft.py: runs/full/checkpoints/step-15: can't be written: ")
            assert said[0].endswith("the last whole checkpoint: runs/full/checkpoints/step-14") and not (run / "FINAL").exists()
        else:  # FINAL is smaller than a checkpoint
            assert code == 0 and said[0].startswith("warning: ") and said[0].endswith("the run goes on")
            assert (run / "FINAL/model.safetensors").exists() and not (run / "FINAL/checkpoint").exists()
    run_well(*command("full"), n_processes=2, cwd=folder)
    assert_same(run, straight)


def test_a_full_disk_is_said_in_one_line(folder, straight, tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted here: {mounted.stderr.strip()}")
    try:
        (tmp_path / "runs").mkdir()
        (folder / "small").symlink_to(tmp_path / "runs")
        done = run_script(*command("small", "cache_dir=small", "save_every=8"), n_processes=2, cwd=folder)
        assert done.returncode == 1
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("sft.py: ")]
        assert "No space left on device" in line and "can't be written" in line
        whole = [path for path in (tmp_path / "runs/small/checkpoints").glob("*")]
        assert all(path.suffix == "" and (path / "checkpoint.json").exists() for path in whole)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Bad numbers


@pytest.fixture(scope="module")
def bad(folder) -> Path:
    """The model, but for one token: where it is read, the loss is not a number. Every 20th row holds it."""
    shutil.copytree(folder / "model", folder / "bad")
    weights = load_file(folder / "model/model.safetensors")
    from transformers import AutoTokenizer
    token = AutoTokenizer.from_pretrained(folder / "model").convert_tokens_to_ids("X")
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, folder / "bad/model.safetensors", metadata={"format": "pt"})
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row in rows[::20]:
        row["prompt"] += "X"
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


BAD = ["model.name_or_path=bad", "datasets=[bad.jsonl]", "n_epochs=2"]


def test_a_step_of_bad_numbers_is_skipped_on_all_ranks_and_counted(bad, straight):
    run_well(*command("skipping", *BAD), n_processes=2, cwd=bad)
    records = read_records(bad / "runs/skipping")
    skipped = [record["loss/train"] is None for record in records]
    assert 2 <= sum(skipped) <= 4 and not all(skipped)  # two rows an epoch, in one step or in two
    assert [record["skipped_steps"] for record in records] == [sum(skipped[:i + 1]) for i in range(10)]
    for record, bad_one in zip(records, skipped):
        assert (record["grad_norm"] is None) == bad_one and (bad_one or record["loss/train"] > 0)
    weights = load_file(bad / "runs/skipping/FINAL/model.safetensors")
    finite = {name: tensor.isfinite().float().mean() for name, tensor in weights.items()}
    assert {name for name, part in finite.items() if part < 1} == {"model.embed_tokens.weight"}  # in the one row, as before
    assert weights["model.embed_tokens.weight"].isnan().any(1).sum() == 1
    state = [load_file(file) for file in (bad / "runs/skipping/FINAL/checkpoint").glob("*.safetensors")]
    steps = {tensor.item() for shard in state for name, tensor in shard.items() if name.endswith(".step")}
    assert steps == {10 - sum(skipped)}  # as often AdamW was called


def test_too_many_bad_steps_end_the_run_and_name_the_rows(bad):
    done = run_script(*command("failing", *BAD, "max_skipped_steps=1", "save_every=8"), n_processes=2, cwd=bad)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("sft.py: ")]
    step = read_records(bad / "runs/failing")[-1]["step"]
    latest = f"runs/failing/checkpoints/step-{step - 1}" if step > 1 else "None"
    assert f"step {step}: the loss or the gradient is not finite, 1 steps in a row; the last good checkpoint: {latest}" in line
    places = line.partition("the step's rows: ")[2].split(", ")
    assert len(set(places)) == 8 and {"bad.jsonl:1", "bad.jsonl:21"} & set(places)
