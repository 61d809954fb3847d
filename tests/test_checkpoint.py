"""Runs that are killed, stopped, starved or given bad numbers: what is left of them, and where the same command ends."""

import atexit
import contextlib
import datetime
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import ROOT, launch, process_of_one, write_model
from forked import Forked, run_file, run_forked, run_ranks, run_script, run_well
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

import checkpoint
import sft
from benchmarks.kill import AIMS, differences, family, kill_family, kill_runs, read_records, run_undisturbed, write_data
from checkpoint import (
    CheckpointError,
    checksum,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    lock,
    prune_checkpoints,
    save_checkpoint,
    started,
    training_state,
)
from configs.base import ModelConfig, load_config
from fsdp_utils import end_process, init_processes, make_mesh, shard_model
from model_utils import load_tokenizer
from sft import make_model, make_optimizer

pytestmark = pytest.mark.slow
SFT = ROOT / "sft.py"
CONFIG = """
from configs.base import Config, ModelConfig

config = Config(datasets=["train.jsonl"], eval_datasets=["test.jsonl"], cache_dir="runs", lr=1e-2, weight_decay=0.1, seed=7,
                n_epochs=3, save_every=16, eval_every=56,
                model=ModelConfig(name_or_path="model", batch_size=8, max_length=96, max_prompt_length=48))
"""
N_ROWS = 40  # 5 steps an epoch, 15 in all, a checkpoint at each second one, an evaluation at each seventh, and both at the end


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_model(folder / "model")
    rows = [{"prompt": "AB" * (i % 7 + 1), "completion": "CD" * (i % 5 + 1)} for i in range(N_ROWS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    (folder / "config.py").write_text(CONFIG)
    return folder


def command(name: str, *overrides: str) -> list:
    return [SFT, "--config", "config.py", f"exp_name={name}", *overrides]


@pytest.fixture(scope="module")
def straight(folder) -> Path:
    run_well(*command("straight"), n_processes=2, cwd=folder)
    records = read_records(folder / "runs/straight")
    assert [record["step"] for record in records if "loss/train" in record] == [*range(1, 16)]
    assert [record["step"] for record in records if "loss/eval" in record] == [0, 7, 14, 15]
    return folder / "runs/straight"


def copy_of(straight: Path, name: str, *ignored: str) -> Path:
    return shutil.copytree(straight, straight.with_name(name), ignore=shutil.ignore_patterns(*ignored))


def assert_same(run: Path, other: Path) -> None:
    assert read_records(run) == read_records(other)
    assert (run / "FINAL/model.safetensors").read_bytes() == (other / "FINAL/model.safetensors").read_bytes()


@contextlib.contextmanager
def torchrun(folder: Path, *argv, options: tuple = ("--standalone", "--nproc_per_node=2")) -> Iterator[subprocess.Popen]:
    """A command under torchrun, which is killed with all its processes if it is left alive."""
    process = launch(argv, options, cwd=folder)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_family(process.pid)


def pid_of(rank: int, process: subprocess.Popen) -> int:
    for pid in family(process.pid)[1:]:
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no rank {rank}")


def wait_for_step(step: int, process: subprocess.Popen | Forked, run: Path) -> None:
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("loss/train") < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Killed and stopped


def ask_for_days(folder: Path) -> None:
    """Each rank in a time zone of its own, of two in which it is never the same day."""
    rank, *_ = init_processes()
    os.environ["TZ"] = ("UTC-14", "UTC+12")[rank % 2]
    time.tzset()
    days = []
    for i in range(50):
        dist.barrier()
        days.append(started(folder / f"run-{i}"))
    (folder / f"days-{rank}.json").write_text(json.dumps([datetime.date.today().isoformat(), days]))
    end_process()


def test_processes_that_start_at_once_agree_on_the_day(tmp_path):
    run_ranks(4, ask_for_days, tmp_path)
    (one, days), (other, _), *_ = parts = [json.loads((tmp_path / f"days-{rank}.json").read_text()) for rank in range(4)]
    assert one != other and {*days} <= {one, other} and all(part == days for _, part in parts)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.glob("run-*/*")} == {f"run-{i}/first_day" for i in range(50)}


def test_a_run_that_goes_on_keeps_the_day_of_its_first_start(tmp_path):
    assert started(tmp_path / "runs/new") == datetime.date.today().isoformat()
    (tmp_path / "first_day").write_text("2020-02-29")
    (tmp_path / "first_day.host.1").touch()  # by a process that was killed
    assert started(tmp_path) == "2020-02-29" and {path.name for path in tmp_path.iterdir()} == {"first_day", "runs"}
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/run: can't be written to: Not a directory$"):
        started(tmp_path / "file/run")


def test_runs_killed_at_each_aim_end_in_the_same_bits():
    variants = ["exported", "qlora", "two-epochs", "dpo-lora"]  # the benchmark has all of them
    told = run_well(ROOT / "benchmarks/kill.py", "--kills", len(AIMS), "--rows", 96, "--variants", *variants, timeout=600)
    *lines, summary = told.splitlines()
    assert {line.split()[0] for line in lines} == {*variants} and {line.split()[1] for line in lines} == {*AIMS}
    assert all("same bits" in line for line in lines) and summary.endswith(" 0 different")


def test_a_killed_run_that_differs_by_a_bit_is_told(tmp_path, capsys):
    write_data(tmp_path / "data", 64)
    reference = run_undisturbed(tmp_path / "data", "full")
    plan = [("full", "metrics")]
    assert kill_runs(tmp_path, plan, {"full": reference}, random.Random(0)) == 0
    flip(reference.folder / "runs/run/FINAL/model.safetensors", -1)
    assert kill_runs(tmp_path, plan, {"full": reference}, random.Random(0)) == 1
    assert "DIFFERENT: run/FINAL/model.safetensors\n" in capsys.readouterr().out


OTHERWISE = {"data.json": Path.unlink, "FINAL.old": Path.mkdir, "checkpoints/step-13.partial": Path.mkdir,
             "metrics.jsonl": lambda file: file.open("a").write('{"step": 16}'),
             "FINAL/checkpoint/rank-00001-00000.safetensors": lambda file: flip(file, -1)}


@pytest.mark.parametrize("name", OTHERWISE)
def test_whatever_a_killed_run_leaves_otherwise_is_a_difference(straight, name):
    run = copy_of(straight, f"other {Path(name).name}")
    assert differences(run, straight) == []
    OTHERWISE[name](run / name)
    assert differences(run, straight) == [name]


@pytest.mark.parametrize("rank, number", [(1, signal.SIGTERM), (0, signal.SIGINT), (0, signal.SIGHUP)])
def test_a_signal_to_one_rank_stops_all_at_a_checkpoint(folder, straight, rank, number):
    name = f"stopped-{rank}-{number}"
    run = folder / "runs" / name
    with Forked(2, run_file, command(name), folder) as ranks:
        wait_for_step(3, ranks, run)
        os.kill(ranks.processes[rank].pid, number)
        stdout, stderr = ranks.communicate()
    assert ranks.returncode == 0, stderr
    step = read_records(run)[-1]["step"]
    assert 3 <= step < 15 and not (run / "FINAL").exists()
    assert f"stopped by a signal after step {step}; the same command goes on from runs/{name}/checkpoints/step-{step}" in stdout
    assert f"resumed from runs/{name}/checkpoints/step-{step}\n" in run_well(*command(name), n_processes=2, cwd=folder)
    assert_same(run, straight)


def test_what_a_kill_has_kept_a_run_from_removing_goes_at_the_next_start(folder, straight):
    run = copy_of(straight, "unpruned")
    for name in ("step-12", "step-13", "step-15.partial"):
        shutil.copytree(run / "checkpoints/step-14", run / "checkpoints" / name)
    (run / "checkpoints/step-12/checkpoint.json").unlink()
    shutil.copytree(run / "FINAL", run / "FINAL.old")
    assert "finished already" in run_well(*command("unpruned"), n_processes=2, cwd=folder)
    assert differences(run, straight) == []


def signalled_in_a_step(folder: Path, name: str, number: int, after: int, times: int = 1) -> None:
    """A run of four microbatches a step, which sends itself a signal, on rank 1 alone, before its `after`th microbatch."""
    sys.argv = ["sft.py"]
    os.chdir(folder)
    counts, compute = Counter(), sft.get_batch_metrics

    def counted(model, batch, mode, n):
        counts[torch.is_grad_enabled()] += 1
        if torch.is_grad_enabled() and counts[True] == after and os.environ["RANK"] == "1":
            for _ in range(times):
                os.kill(os.getpid(), number)
        return compute(model, batch, mode, n)

    sft.get_batch_metrics = counted
    overrides = ["model.gradient_accumulation_steps=4", "n_epochs=1", "save_every=1000", f"exp_name={name}"]
    sft.main(load_config(["--config", "config.py", *overrides], 2))
    Path(f"{name}-{os.environ['RANK']}").write_text(str(counts[True]))
    end_process()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_step_is_left_early_where_a_signal_comes(folder, number):
    """A step may take longer than torchrun waits: what is computed of it is dropped, and the step before it saved."""
    run_ranks(2, signalled_in_a_step, folder, f"within-{number}", number, 10)
    assert [(folder / f"within-{number}-{rank}").read_text() for rank in (0, 1)] == ["10", "10"]  # the third step's second
    run = folder / "runs" / f"within-{number}"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"] and read_records(run)[-1]["step"] == 2
    for name in (run.name, "undisturbed"):
        run_ranks(2, signalled_in_a_step, folder, name, number, 0)
    assert_same(run, folder / "runs/undisturbed")


def test_a_second_ctrl_c_ends_at_once(folder):
    done = run_forked(2, signalled_in_a_step, folder, "twice", signal.SIGINT, 10, 2)
    assert done.returncode == -signal.SIGINT and not [*folder.glob("runs/twice/checkpoints/*")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_first_step_ends_with_a_line(folder, number):
    """It comes while torch is imported, or thereafter."""
    process = launch(command("early"), cwd=folder)
    while b"libtorch" not in Path(f"/proc/{process.pid}/maps").read_bytes():
        assert process.poll() is None
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stderr.split("\n") == ["", f"sft.py: ended by {number.name} before its first step", ""]
    assert not (folder / "runs/early").exists()


def test_workers_whose_torchrun_is_gone_save_and_end(folder, straight):
    run = folder / "runs/orphaned"
    with torchrun(folder, *command("orphaned")) as process:
        wait_for_step(3, process, run)
        workers = family(process.pid)[1:]
        process.kill()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert (run / "FINAL").exists() or (run / f"checkpoints/step-{read_records(run)[-1]['step']}/checkpoint.json").exists()
    run_well(*command("orphaned"), n_processes=2, cwd=folder)
    assert_same(run, straight)


LOST = {"start": ["FINAL", "checkpoints"], "middle": ["FINAL", "step-15"], "middle, in the old format": ["FINAL", "step-15"],
        "end": ["FINAL"]}


@pytest.mark.parametrize("at", LOST)
def test_a_run_goes_on_with_the_evaluation_that_is_due(folder, straight, at):
    """A checkpoint is written before its step's evaluation, and at the end before FINAL too."""
    run = copy_of(straight, f"from the {at}", *LOST[at])
    (run / "FINAL.partial").mkdir()
    if at == "middle, in the old format":
        file = run / "checkpoints/step-14/checkpoint.json"
        manifest = json.loads(file.read_text())
        manifest["skipped_in_a_row"] = manifest.pop("consecutive_skips")
        del manifest["sha256"]
        file.write_text(json.dumps(manifest | {"sha256": checksum(manifest)}))
    run_well(*command(run.name), n_processes=2, cwd=folder)
    assert_same(run, straight)
    assert not [path for path in run.rglob("*") if path.suffix in (".partial", ".old")]


def test_final_is_written_anew_where_there_is_nothing_to_evaluate(folder, straight):
    run = copy_of(straight, "unevaluated", "FINAL")
    run_well(*command("unevaluated", "eval_datasets=[]"), n_processes=2, cwd=folder)
    assert read_records(run) == read_records(straight)[:-1]
    assert (run / "FINAL/model.safetensors").read_bytes() == (straight / "FINAL/model.safetensors").read_bytes()


def run_to_its_end(argv: list, cwd: Path) -> None:
    atexit.register(os.write, 2, b"<handlers ran>")
    try:
        run_file(argv, cwd)
    finally:
        os.write(2, b"<torn down>")  # by now it would be


@pytest.mark.parametrize("name, override, code, says", [
    ("ended", "seed=7", 0, "saved to runs/ended/FINAL"), ("straight", "seed=7", 0, "finished already"),
    ("straight", "model.batch_size=4", 1, "began differently: model.batch_size")], ids=["end", "finished", "error"])
def test_a_run_ends_without_tearing_python_down(folder, straight, name, override, code, says):
    """A gloo thread that lets go of a collective's tensors meanwhile would abort it, once in hundreds of runs."""
    done = run_forked(2, run_to_its_end, command(name, override), folder)
    assert done.returncode == code and says in done.stdout + done.stderr, done.stderr
    assert done.stderr.count("<handlers ran>") == (1 if code else 2)  # where one fails the other is ended
    assert "<torn down>" not in done.stderr


def test_torchrun_restarts_a_run_whose_worker_is_killed(folder, straight):
    run = folder / "runs/restarted"
    options = ("--standalone", "--nproc_per_node=2", "--max-restarts=3")
    with torchrun(folder, *command("restarted"), options=options) as process:
        wait_for_step(5, process, run)
        os.kill(pid_of(1, process), signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "resumed from runs/restarted/checkpoints/step-" in stdout
    assert_same(run, straight)


def test_a_rank_that_is_stuck_ends_the_run_with_a_line(folder):
    with Forked(2, run_file, command("stuck", "timeout_minutes=0.1"), folder) as ranks:
        wait_for_step(2, ranks, folder / "runs/stuck")
        first, stuck = ranks.processes
        os.kill(stuck.pid, signal.SIGSTOP)
        assert connection.wait([first.sentinel], 60)
        stuck.kill()  # as torchrun does, half a minute later
        _, stderr = ranks.communicate()
    assert ranks.returncode == 1
    (line,) = [line for line in stderr.splitlines() if line.startswith("sft.py: ")]
    assert line.startswith("sft.py: rank 0: another rank has ended, or has not answered for 0.1 minutes")


def test_two_agents_train_as_one(folder, straight):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=x",
               "--local-addr=127.0.0.1")
    with torchrun(folder, *command("two-agents"), options=options) as one, \
            torchrun(folder, *command("two-agents"), options=options) as other:
        for process in (one, other):
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
    assert_same(folder / "runs/two-agents", straight)


def test_a_finished_run_is_left_alone_and_goes_on_if_asked_for_more(folder, straight):
    run = copy_of(straight, "finished")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "lock"}
    assert "finished already: runs/finished/FINAL" in run_well(*command("finished"), n_processes=2, cwd=folder)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "lock"} == before
    shutil.rmtree(run / "checkpoints")  # FINAL has one too
    said = run_well(*command("finished", "n_epochs=4"), n_processes=2, cwd=folder)
    assert "resumed from runs/finished/FINAL/checkpoint\n" in said
    records, its = read_records(run), read_records(straight)
    assert records[:len(its) - 1] == its[:-1]  # all but the evaluation that was its last, and is none of the longer run's
    assert [record["step"] for record in records[len(its) - 1:]] == [*range(16, 21), 20]
    assert json.loads((run / "FINAL/metrics.json").read_text())["counter"] == 4 * N_ROWS
    assert not [path for path in run.rglob("*") if path.suffix in (".partial", ".old")]


def put_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def put_file(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("no folder")


FINALS = {"metrics.json cut": lambda final: cut(final / "metrics.json"),
          "metrics.json empty": lambda final: (final / "metrics.json").write_text(""),
          "metrics.json of no keys": lambda final: (final / "metrics.json").write_text("{}"),
          "metrics.json a list": lambda final: (final / "metrics.json").write_text("[]"),
          "metrics.json a folder": lambda final: put_folder(final / "metrics.json"),
          "files.json of brackets": lambda final: (final / "files.json").write_text("[" * 100_000),
          "no weights": lambda final: (final / "model.safetensors").unlink(),
          "weights cut": lambda final: cut(final / "model.safetensors"),
          "weights of zeros": lambda final: zero(final / "model.safetensors"),
          "no tokenizer": lambda final: (final / "tokenizer.model").unlink(), "a file": put_file, "gone": shutil.rmtree}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("damage", FINALS)
def test_final_is_written_anew_where_it_is_not_whole(folder, straight, damage):
    run = copy_of(straight, f"FINAL, {damage}")
    FINALS[damage](run / "FINAL")
    said = run_well(*command(run.name), n_processes=2, cwd=folder)
    assert "finished already" not in said and f"resumed from runs/{run.name}/checkpoints/step-15\n" in said
    assert_same(run, straight)
    assert {path.name for path in run.iterdir()} == {path.name for path in straight.iterdir()}
    assert "finished already" in run_well(*command(run.name), n_processes=2, cwd=folder)


STRAYS = {"step-15.partial a file": lambda run: put_file(run / "checkpoints/step-15.partial"),
          "FINAL.partial a file": lambda run: put_file(run / "FINAL.partial"),
          "FINAL.old a file": lambda run: put_file(run / "FINAL.old"),
          "step-15 a file": lambda run: put_file(run / "checkpoints/step-15"),
          "step-99 a file": lambda run: put_file(run / "checkpoints/step-99"),
          "step-15 an empty folder": lambda run: put_folder(run / "checkpoints/step-15"),
          "other weights": lambda run: save_file({"a": torch.ones(3)}, run / "checkpoints/step-14/junk.safetensors"),
          "no safetensors": lambda run: (run / "checkpoints/step-14/junk.safetensors").write_text("junk")}


@pytest.mark.parametrize("stray", STRAYS)
def test_what_lies_in_the_way_does_not_stop_a_run(folder, straight, stray):
    run = copy_of(straight, f"with {stray}", "FINAL", "step-15")
    STRAYS[stray](run)
    run_well(*command(run.name), n_processes=2, cwd=folder)
    assert_same(run, straight)
    assert [*map(str, find_paths(run))] == [*map(str, find_paths(straight))]


def find_paths(run: Path) -> list[Path]:
    return sorted(path.relative_to(run) for path in run.rglob("*") if path.name != "junk.safetensors")


IN_PLACE_OF = {"metrics.jsonl": "Is a directory: 'runs/{run}/metrics.jsonl'",
               "data.json": "Is a directory: 'runs/{run}/data.json'",
               "lock": "runs/{run}: can't be written to: Is a directory",
               "first_day": "runs/{run}: can't be written to: Is a directory"}


@pytest.mark.parametrize("name", IN_PLACE_OF)
def test_a_folder_in_a_file_s_place_is_told_in_a_line(folder, straight, name):
    run = copy_of(straight, f"{name} a folder", "FINAL")
    put_folder(run / name)
    done = run_script(*command(run.name), n_processes=2, cwd=folder)
    line, *_ = [line for line in done.stderr.splitlines() if line.startswith("sft.py: ")]  # the other rank may speak 10 s later
    assert done.returncode == 1 and IN_PLACE_OF[name].format(run=run.name) in line
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Found


@pytest.fixture
def saved(straight, tmp_path):
    """A copy of two checkpoints of two ranks."""
    shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    with process_of_one():
        init_processes()
        yield tmp_path


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


FILES = ["checkpoint.json", "metrics.jsonl", "rank-00000-00000.safetensors", "rank-00001-00000.safetensors"]
DAMAGES = {"a bit": lambda file: flip(file, file.stat().st_size // 2), "the last bit": lambda file: flip(file, -2),
           "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]), "longer": lambda file: file.open("a").write("0"),
           "empty": lambda file: file.write_bytes(b""), "gone": lambda file: file.unlink(),
           "a folder": lambda file: (file.unlink(), file.mkdir()), "brackets": lambda file: file.write_text("[" * 100_000)}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(saved, capsys, file, damage):
    DAMAGES[damage](saved / "checkpoints/step-15" / file)
    found, state = find_checkpoint(list_checkpoints(saved))
    assert found == saved / "checkpoints/step-14" and state["counter"] == 14 * 8
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning == f"warning: {saved / 'checkpoints/step-15'}: this checkpoint is damaged ({file}) and not used"


def test_of_whole_checkpoints_the_one_with_the_most_steps_is_found(saved, capsys):
    for name in ("step-16.partial", "step-16.old"):
        shutil.copytree(saved / "checkpoints/step-15", saved / "checkpoints" / name)
    (saved / "checkpoints/step-14").rename(saved / "checkpoints/step-9")  # by number, not by the alphabet
    found, _ = find_checkpoint(list_checkpoints(saved))
    assert found.name == "step-15"
    shutil.copytree(saved / "checkpoints/step-15", saved / "FINAL/checkpoint")
    shutil.rmtree(saved / "checkpoints")
    for folder in (saved, saved / "FINAL", saved / "FINAL/checkpoint"):
        assert find_checkpoint(list_checkpoints(folder))[0] == saved / "FINAL/checkpoint"
    (saved / "FINAL/checkpoint/checkpoint.json").unlink()
    assert list_checkpoints(saved) == [] and find_checkpoint([]) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("keep_last, kept", [(1, {"step-8"}), (2, {"step-8", "step-15"}), (3, {"step-8", "step-14", "step-15"})])
def test_pruning_keeps_the_newest_whatever_it_is_called(saved, keep_last, kept):
    shutil.copytree(saved / "checkpoints/step-14", saved / "checkpoints/step-8")
    shutil.copytree(saved / "checkpoints/step-14", saved / "checkpoints/step-16.partial")
    (saved / "checkpoints/step-16.partial/checkpoint.json").unlink()
    prune_checkpoints(saved / "checkpoints/step-8", keep_last)
    assert {path.name for path in (saved / "checkpoints").iterdir()} == kept


OTHERS = {  # name → (what is another's, what is said of it)
    "of fewer layers": ({"num_hidden_layers": 1}, "it holds model.layers.1.input_layernorm.weight, which the model has not"),
    "of more layers": ({"num_hidden_layers": 3}, "Missing key in checkpoint state_dict: model.layers.2.input_layernorm.weight."),
    "wider": ({"intermediate_size": 128}, "Size mismatch between saved torch.Size([32, 64]) and current: torch.Size([32, 128]) "
                                          "for model.layers.0.mlp.down_proj.weight"),
    "tied": ({"tie_word_embeddings": True}, "it holds lm_head.weight, which the model has not")}


def load_into_others(folder: Path, saved: Path, errors: Path) -> None:
    rank, _, device = init_processes()
    config = json.loads((folder / "model/config.json").read_text())
    known = {key: config[key] for key in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "attention_bias",
                                          "num_attention_heads", "num_key_value_heads", "vocab_size")}
    tokenizer, texts = load_tokenizer(str(folder / "model"), ""), {}
    for name, (changes, _) in ({"the same": ({}, "")} | OTHERS).items():
        model = make_model(ModelConfig(random_init=known | changes), tokenizer, [2], "", device)
        shard_model(model, make_mesh(device), "target_logps")
        optimizer = make_optimizer(model, 1e-2, (0.9, 0.999), 1e-5, 0.01)
        try:
            load_checkpoint(saved, model, optimizer)
        except CheckpointError as error:
            texts[name] = str(error)
    (errors / f"{rank}.json").write_text(json.dumps(texts))
    end_process()


def test_a_checkpoint_of_another_model_is_refused(folder, straight, tmp_path):
    run_ranks(2, load_into_others, folder, straight / "checkpoints/step-15", tmp_path)
    texts, its = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert texts == its and texts.keys() == OTHERS.keys()
    for name, (_, says) in OTHERS.items():
        assert texts[name] == f"{straight}/checkpoints/step-15: does not fit the model: {says}"


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_many_files(folder: Path) -> None:
    """What 2 x 2 ranks save, in files of a few shards: by save_checkpoint, by torch alone, and where one of them can't write."""
    os.umask(0o027)
    rank, _, device = init_processes()
    checkpoint.FILE_SIZE = 4000
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))
    model.model.layers[1].odd = nn.Parameter(torch.randn(1, 3).bfloat16())  # of which the second shard is empty
    shard_model(model, make_mesh(device, replicas=2))
    optimizer = make_optimizer(model, 1e-2, (0.9, 0.999), 1e-5, 0.01)
    torch.manual_seed(rank % 2)  # a shard has a replica on another rank
    for parameter in model.parameters():
        gradient = torch.randn_like(parameter.to_local())
        parameter.grad = DTensor.from_local(gradient, parameter.device_mesh, parameter.placements, shape=parameter.shape,
                                            stride=parameter.stride())
    optimizer.step()
    state = training_state(model, optimizer)
    locals_ = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
    saved = {name: tensor.detach().clone() for name, tensor in locals_.items()}
    save_checkpoint(folder / "ours", model, optimizer, {"step": 1})
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder / "torch"), save_distributed=True))
    if rank == 0:
        manifest = {"files": {file.name: [] for file in (folder / "torch").iterdir()}}
        (folder / "torch/checkpoint.json").write_text(json.dumps(manifest | {"sha256": checksum(manifest)}))
    dist.barrier()
    for name in ("ours", "torch"):
        for tensor in locals_.values():
            tensor.detach().fill_(7)
        load_checkpoint(folder / name, model, optimizer)
        assert saved.keys() == training_state(model, optimizer).keys()
        for key, tensor in locals_.items():
            assert tensor.dtype == saved[key].dtype and torch.equal(tensor, saved[key]), (name, key)

    limit = max(file.stat().st_size for file in (folder / "ours").glob("rank-00001-*")) - 1
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError, match="full: can't be written: .*File too large") as error:
        save_checkpoint(folder / "full", model, optimizer, {"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (folder / f"error-{rank}").write_text(str(error.value))
    end_process()


TINY = {"hidden_size": 16, "intermediate_size": 33, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 51}


def shards_in(folder: Path) -> dict[tuple, torch.Tensor]:
    """{(name, where it begins): shard}, each of which must be there once, the empty ones aside."""
    shards = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            begins = json.loads(tensors.metadata()["DCP_SHARDING_INFO"])
            for name in tensors.keys():
                place = name, *begins[name]["saved_offsets"]
                assert place not in shards or not tensors.get_tensor(name).numel()
                shards[place] = tensors.get_tensor(name)
    return shards


def test_many_files_hold_what_torch_s_own_writer_writes(tmp_path):
    """Also what is uneven, empty, bf16 or a scalar; and either is loaded. A rank's full disk is an error on all."""
    run_ranks(4, write_many_files, tmp_path)
    own, its = shards_in(tmp_path / "ours"), shards_in(tmp_path / "torch")
    assert own.keys() == its.keys() and all(own[key].dtype == its[key].dtype and torch.equal(own[key], its[key]) for key in its)
    assert {tensor.dtype for tensor in own.values()} == {torch.float32, torch.bfloat16}
    for rank in range(4):
        files = [*tmp_path.glob(f"ours/rank-0000{rank}-*.safetensors")]
        assert len(files) > 2 and {file.stat().st_mode & 0o777 for file in files} == {0o640}
    assert len({(tmp_path / f"error-{rank}").read_text() for rank in range(4)}) == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("full")]


# ---------------------------------------------------------------------------------------------------------------------
# Refused


@pytest.fixture(scope="module")
def refused(folder, straight) -> dict:
    changed = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    changed[3]["completion"] += "E"
    (folder / "changed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    for file in copy_of(straight, "damaged", "FINAL").rglob("rank-00000-*"):
        file.write_bytes(b"")
    copy_of(straight, "rewound")
    (folder / "a file").write_text("")
    locked = lock(folder / "runs/locked")
    write_others(folder)
    done = {name: run_script(*command(*argv), cwd=folder) for name, (argv, _) in REFUSED.items()}  # not at once: they lock
    locked.close()
    return done


def write_others(folder: Path) -> None:
    """Two LoRA runs that are done, and their base with a bit of a weight changed, in its place and elsewhere; a tokenizer."""
    shutil.copytree(folder / "model", folder / "base")
    shutil.copytree(folder / "model", folder / "other")
    run_well(*command("lora", "model.name_or_path=base", "model.use_peft=true", "n_epochs=1"), cwd=folder)
    for base in ("base", "other"):
        shutil.copytree(folder / "runs/lora", folder / f"runs/lora on {base}")
    retold = json.loads((folder / "model/tokenizer_config.json").read_text()) | {"model_max_length": 77}
    shutil.copytree(folder / "model", folder / "retold")
    (folder / "retold/tokenizer_config.json").write_text(json.dumps(retold))
    flip(folder / "base/model.safetensors", -2)
    flip(folder / "other/model.safetensors", -2)


REFUSED = {  # name → (the name of the run and overrides, parts of the line)
    "another rate": (["straight", "lr=2e-2"], ["checkpoints/step-15: this run began differently: lr: 0.01 then, 0.02 now. Go"]),
    "two keys": (["straight", "model.batch_size=4", "warmup=0.5"], ["warmup: 0.1 then, 0.5 now; model.batch_size: 8 then, 4"]),
    "another base under the same name": (["lora on base", "model.name_or_path=base", "model.use_peft=true"],
                                         ["began differently: model.safetensors: 143,", " bytes of ", " then, 143,", " now. Go"]),
    "another base": (["lora on other", "model.name_or_path=other", "model.use_peft=true"],
                     ["differently: model.name_or_path: 'base' then, 'other' now; model.safetensors: 143,"]),
    "another tokenizer": (["straight", "model.tokenizer_name_or_path=retold"],
                          ["differently: model.tokenizer_name_or_path: '' then, 'retold' now; tokenizer_config.json: "]),
    "other rows": (["straight", "datasets=[changed.jsonl]"],
                   ["differently: datasets: ['train.jsonl'] then, ['changed.jsonl'] now; the rows: other files"]),
    "another model": (["straight", "model.random_init={\"model_type\": \"llama\"}"], ["model.random_init: None then, "]),
    "fewer epochs": (["straight", "n_epochs=2"], ["120 examples are trained already, more than the 80 asked for"]),
    "no whole checkpoint": (["damaged"], ["runs/damaged: there is no whole checkpoint; delete the folder to begin anew"]),
    "a second run": (["locked"], ["runs/locked: another run is writing there: PID ", " saves and ends by `kill PID`; or choose"]),
    "its own checkpoint": (["rewound", "model.from_checkpoint=runs/rewound/checkpoints/step-14"], ["is this run's own"]),
    "not a checkpoint": (["new", "model.from_checkpoint=model"],
                         ["model.from_checkpoint=model: this folder holds no checkpoint.json"]),
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
    assert (straight / "FINAL/model.safetensors").exists() and len(read_records(straight)) == 15 + 4
    assert {path.name for path in (straight / "checkpoints").iterdir()} == {"step-14", "step-15"}


def test_a_base_that_has_moved_is_the_same(folder, straight):
    shutil.copytree(folder / "model", folder / "moved")
    assert "finished already" in run_well(*command("straight", "model.name_or_path=moved"), n_processes=2, cwd=folder)


def test_a_base_is_told_by_its_name_where_an_older_checkpoint_knows_no_more(folder, straight):
    run = copy_of(straight, "of old", "FINAL", "step-14")
    file = run / "checkpoints/step-15/checkpoint.json"
    manifest = json.loads(file.read_text())
    del manifest["base"], manifest["sha256"]
    file.write_text(json.dumps(manifest | {"sha256": checksum(manifest)}))
    done = run_script(*command("of old", "model.name_or_path=moved"), cwd=folder)
    assert done.returncode == 1 and "began differently: model.name_or_path: 'model' then, 'moved' now. Go back" in done.stderr
    assert "resumed from runs/of old/checkpoints/step-15\n" in run_well(*command("of old"), n_processes=2, cwd=folder)


def test_a_change_is_allowed_where_it_is_asked_for(folder, straight):
    run = copy_of(straight, "allowed", "FINAL", "step-15")
    run_well(*command("allowed", "lr=2e-2", "allow_changes=true"), n_processes=2, cwd=folder)
    (*own, step, _), (*its, its_step, _) = read_records(run), read_records(straight)
    assert own == its and step["counter"] == its_step["counter"] and step["loss/train"] == its_step["loss/train"]


# ---------------------------------------------------------------------------------------------------------------------
# A full disk


def test_a_checkpoint_that_can_t_be_written_leaves_the_one_before_it(folder, straight):
    """The largest file that a process may write is set too small for a checkpoint, once one is there."""
    run = copy_of(straight, "full", "FINAL", "step-15")
    limit = max(file.stat().st_size for file in (straight / "checkpoints/step-15").iterdir()) - 1
    for stops in (True, False):
        with Forked(2, run_file, command("full", f"stop_if_save_fails={stops}".lower()), folder) as ranks:
            for process in ranks.processes:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
            stdout, stderr = ranks.communicate()
        code = ranks.returncode
        assert not [path for path in run.rglob("*") if path.suffix == ".partial"]
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-14"}
        said = [line for line in (stdout + stderr).splitlines() if "step-15: can't be written: " in line]
        assert len(said) == 1 and said[0].count("File too large") == 1
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
        assert line.count("No space left on device") == 1 and "can't be written" in line
        whole = [path for path in (tmp_path / "runs/small/checkpoints").glob("*")]
        assert all(path.suffix == "" and (path / "checkpoint.json").exists() for path in whole)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Bad numbers


@pytest.fixture(scope="module")
def bad(folder) -> Path:
    """The model, but for one token: where it is read, the gradient is not a number. Every 20th row holds it."""
    shutil.copytree(folder / "model", folder / "bad")
    weights = load_file(folder / "model/model.safetensors")
    from transformers import AutoTokenizer
    token = AutoTokenizer.from_pretrained(folder / "model").convert_tokens_to_ids("X")
    weights["model.embed_tokens.weight"][token] = 3e38  # of which the square is none
    save_file(weights, folder / "bad/model.safetensors", metadata={"format": "pt"})
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row in rows[::20]:
        row["prompt"] += "X"
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


BAD = ["model.name_or_path=bad", "datasets=[bad.jsonl]", "n_epochs=2"]


def test_a_step_of_bad_numbers_is_skipped_on_all_ranks_and_counted(bad, straight):
    run_well(*command("skipping", *BAD), n_processes=2, cwd=bad)
    records = [record for record in read_records(bad / "runs/skipping") if "loss/train" in record]
    skipped = [record["grad_norm"] is None for record in records]
    assert 2 <= sum(skipped) <= 4 and not all(skipped)  # two rows an epoch, in one step or in two
    assert [record["skipped_steps"] for record in records] == [sum(skipped[:i + 1]) for i in range(10)]
    assert all(record["loss/train"] > 0 for record in records)
    weights = load_file(bad / "runs/skipping/FINAL/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert (weights["model.embed_tokens.weight"] > 1e38).any(1).sum() == 1
    state = [load_file(file) for file in (bad / "runs/skipping/FINAL/checkpoint").glob("*.safetensors")]
    steps = {tensor.item() for shard in state for name, tensor in shard.items() if name.endswith(".step")}
    assert steps == {10 - sum(skipped)}  # as often AdamW was called


def test_too_many_bad_steps_end_the_run_and_name_the_rows(bad):
    done = run_script(*command("failing", *BAD, "max_skipped_steps=1", "save_every=8"), n_processes=2, cwd=bad)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("sft.py: ")]
    step = read_records(bad / "runs/failing")[-1]["step"]
    latest = f"runs/failing/checkpoints/step-{step - 1}" if step > 1 else "None"
    assert f"step {step}: the loss or the gradient is not finite, 1 consecutive steps; the last good checkpoint: {latest}" in line
    places = line.partition("the step's rows: ")[2].split(", ")
    assert len(set(places)) == 8 and {"bad.jsonl:1", "bad.jsonl:21"} & set(places)


def find_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("save_every, says", [(8, "step 15: the loss is not finite after it, and nothing is saved"), (
    1000, "step 17: the loss or the gradient is not finite, 2 consecutive steps")])
def test_of_a_run_whose_weights_explode_the_last_good_checkpoint_survives(folder, straight, save_every, says):
    """A step of a rate of 1e30 leaves weights that are finite, and of which no loss is."""
    run = copy_of(straight, f"exploding-{save_every}", "FINAL", "step-15")
    done = run_script(*command(run.name, "lr=1e30", f"save_every={save_every}", "n_epochs=6", "allow_changes=true", "keep_last=1",
                               "max_skipped_steps=2", "eval_every=1000"), n_processes=2, cwd=folder)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("sft.py: ")]
    assert done.returncode == 1 and line.startswith(f"sft.py: {says}")
    assert f"checkpoint: runs/{run.name}/checkpoints/step-14" in line
    assert find_names(run / "checkpoints") == {"step-14"}
    run_well(*command(run.name), n_processes=2, cwd=folder)
    assert_same(run, straight)


def test_while_steps_are_skipped_nothing_is_saved_nor_pruned(bad):
    """A signal comes while they are, and the run is resumed: it goes on from before them, to the same end."""
    run_well(*command("undisturbed, bad", *BAD, "save_every=8"), n_processes=2, cwd=bad)
    records = [record for record in read_records(bad / "runs/undisturbed, bad") if "loss/train" in record]
    first = next(record["step"] for record in records if record["grad_norm"] is None)
    run_ranks(2, stopped_after, bad, "stopped, bad", first)
    assert find_names(bad / "runs/stopped, bad/checkpoints") == {f"step-{n}" for n in (first - 2, first - 1) if n > 0}
    run_well(*command("stopped, bad", *BAD, "save_every=8"), n_processes=2, cwd=bad)
    assert_same(bad / "runs/stopped, bad", bad / "runs/undisturbed, bad")


def stopped_after(folder: Path, name: str, step: int) -> None:
    sys.argv = ["sft.py"]
    os.chdir(folder)
    add_step = sft.Log.add_step

    def add_and_stop(log, n, *facts):
        add_step(log, n, *facts)
        if n == step:
            os.kill(os.getpid(), signal.SIGTERM)

    sft.Log.add_step = add_and_stop
    sft.main(load_config(["--config", "config.py", f"exp_name={name}", "save_every=8", *BAD], 2))
    end_process()


def save_what_is_not_finite(folder: Path) -> None:
    """One value of one rank's: of weights, or of a moment; and a checkpoint that holds such, of which the other rank knows."""
    rank, _, device = init_processes()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))
    shard_model(model, make_mesh(device))
    optimizer = make_optimizer(model, 1e-2, (0.9, 0.999), 1e-5, 0.01)
    for name in ("lm_head.weight", "state.lm_head.weight.exp_avg_sq"):
        tensor = training_state(model, optimizer)[name].to_local()
        if rank == 1:
            tensor[-1, -1] = torch.inf
        with pytest.raises(CheckpointError, match=f"step-1: can't be written: {name} is not finite$"):
            save_checkpoint(folder / "step-1", model, optimizer, {})
        dist.barrier()
        assert not [*folder.iterdir()]
        dist.barrier()
        checkpoint.check_finite, check = lambda tensors: None, checkpoint.check_finite
        save_checkpoint(folder / "step-1", model, optimizer, {})
        checkpoint.check_finite = check
        with pytest.raises(CheckpointError, match=f"step-1: delete it, to go on from the one before: {name} is not finite$"):
            load_checkpoint(folder / "step-1", model, optimizer)
        tensor.fill_(0)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder / "step-1")
        dist.barrier()
    end_process()


def test_what_is_not_finite_is_neither_saved_nor_resumed(tmp_path):
    run_ranks(2, save_what_is_not_finite, tmp_path)
