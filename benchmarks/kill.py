"""Kills a run again and again, at random moments, and starts the same command again: does it end in the same bits?

    python benchmarks/kill.py --kills 50

A tiny Llama with dropout trains on 2 processes and writes a checkpoint after every step, so that many kills fall into one.
Every process of the run is killed by SIGKILL, which none can catch. At the end the weights and metrics.jsonl are compared with
those of a run that nobody disturbed; the exit code is 1 where they differ.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from make_tiny import make_rows, train_tokenizer

CONFIG = """
from configs.base import Config, ModelConfig

config = Config(datasets=["train.jsonl"], eval_datasets=["test.jsonl"], cache_dir="runs", n_epochs=2, lr=3e-3, eval_every=64,
                save_every=32, keep_last=2,
                model=ModelConfig(tokenizer_name_or_path=".", max_length=96, max_prompt_length=48, random_init={
                    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
                    "num_attention_heads": 4, "max_position_embeddings": 96, "attention_dropout": 0.1}))
"""
CLOCKS = ("tokens_per_second", "examples_per_second", "peak_memory_gb")


def start(folder: Path, name: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "sft.py", "--config",
               "config.py", f"exp_name={name}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=open(folder / "stderr", "w"))


def family(pid: int) -> list[int]:
    """Returns the process and all that descend from it: torchrun's workers have process groups of their own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def read_records(run: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl without what depends on the machine's mood."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]


def kill_family(pid: int) -> None:
    for member in family(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def last_step(run: Path) -> int:
    """Returns the last one whose checkpoint is written or being written."""
    return max((int(path.stem.split("-")[1]) for path in run.glob("checkpoints/step-*")), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=384, help="rows of an epoch; there are two of 1/32 as many steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        train, test = make_rows(args.rows, 16)
        for name, rows in (("train", train), ("test", test)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        train_tokenizer(train, folder)
        (folder / "config.py").write_text(CONFIG)

        process, started = start(folder, "undisturbed"), time.perf_counter()
        while not [*folder.glob("runs/undisturbed/checkpoints/step-*")] and process.poll() is None:
            time.sleep(0.05)
        before_training = time.perf_counter() - started
        if process.wait():
            sys.exit((folder / "stderr").read_text())
        training = time.perf_counter() - started - before_training
        run, kills, while_saving, steps, n_steps = folder / "runs/killed", 0, 0, [], 2 * args.rows // 32
        while True:
            process = start(folder, "killed")
            early = rng.random() < 0.2
            step = rng.randint(last_step(run) + 1, n_steps + 1)  # or beyond the last: it gets through
            while not early and last_step(run) < step and process.poll() is None:
                time.sleep(0.01)
            moment = rng.uniform(0, before_training if early else training / n_steps)
            try:
                process.wait(timeout=moment if kills < args.kills else None)
            except subprocess.TimeoutExpired:
                kill_family(process.pid)
                process.wait()
                kills += 1
                while_saving += bool([*run.glob("**/*.partial")])
                steps.append(last_step(run))
                continue
            if process.returncode:
                sys.exit((folder / "stderr").read_text())
            if kills >= args.kills:
                break
            finished = run.rename(run.with_name(f"killed-{len([*run.parent.iterdir()])}"))  # it got through: begin anew
            check(folder, finished)
        check(folder, run)
        print(f"{kills} kills, {while_saving} of them while a checkpoint was written; the last step on the disk at each: {steps}")
        print("weights and metrics.jsonl are the undisturbed run's, bit for bit")


def check(folder: Path, run: Path) -> None:
    other = folder / "runs/undisturbed"
    weights, other_weights = ((path / "FINAL/model.safetensors").read_bytes() for path in (run, other))
    differ = {"weights": weights != other_weights, "metrics": read_records(run) != read_records(other)}
    if any(differ.values()):
        sys.exit(f"{run.name} differs from the undisturbed run: {differ}")


if __name__ == "__main__":
    main()
