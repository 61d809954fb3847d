"""Kills runs where it hurts and starts the same commands again: do they end in the bits of a run that nobody disturbed?

    python benchmarks/kill.py --kills 50                                  # all variants and aims, each at least once
    python benchmarks/kill.py --kills 8 --variants lora --aims final      # these alone
    python benchmarks/kill.py --ends 300                                  # exit codes alone, while others keep the cores busy

A tiny Llama with dropout trains on 2 processes and writes a checkpoint after every step. At a moment of what it does on the disk
(watched.py), or at random, a rank is killed by SIGKILL, which none can catch, and the other with it; or if one alone is the aim,
the other is ended later, as by torchrun, or left to fail. In the end all that the run has left is compared with what an
undisturbed one has: weights, optimizer, exports, token cache, and metrics.jsonl but for its clocks. A line a run says what was
on the disk at the kill; the exit code is 1 where anything differs or is left over.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.forked import Forked
from benchmarks.watched import Moment, run_watched
from make_tiny import make_pairs, make_rows, train_tokenizer

CONFIG = """
from configs.base import {kind}, ModelConfig, PeftConfig

config = {kind}(datasets=["{train}.jsonl"], eval_datasets=["{test}.jsonl"], cache_dir="runs", exp_name="run", lr=3e-3,
                save_every=32, eval_every=10**6, timeout_minutes=0.5, model=ModelConfig(
                    tokenizer_name_or_path=".", max_length=96, max_prompt_length=48, peft=PeftConfig(lora_r=4), random_init={{
                    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
                    "num_attention_heads": 4, "max_position_embeddings": 96, "attention_dropout": 0.1}}))
"""
VARIANTS = {
    "full": [], "lora": ["model.use_peft=true"], "recomputed": ["model.activation_checkpointing=true"],
    "padded": ["model.packing=false"], "evaluated": ["eval_every=32"],
    "exported": ["intermediate_checkpoints=true", "eval_every=64"], "two-epochs": ["n_epochs=2", "keep_last=1"],
    "weighted": ["datasets=[train.jsonl*0.5,more.jsonl*2.25]"], "conditional": ["datasets=[ultrabin]", "conditional=true"],
    "accumulated": ["model.gradient_accumulation_steps=2", "model.microbatch_tokens=128"],
    "qlora": ["model.use_peft=true", "model.peft.quantise=true"],
    "dpo": ["dpo.py"], "dpo-lora": ["dpo.py", "model.use_peft=true", "n_epochs=2"]}
RUN, STEP = "runs/run", r"runs/run/checkpoints/step-\d+"
AIMS = {  # patterns of what the killed rank is about to do, as watched.py words it; of a resume, for the first time
    "random": [""], "one-rank": ["", ".*", "record "],
    "before-manifest": [rf"make {STEP}.partial", rf"write {STEP}.partial/metrics", rf"read {STEP}.partial/rank",
                        rf"write {STEP}.partial/checkpoint.json"],
    "after-manifest": [rf"open {STEP}.partial/checkpoint.json", rf"rename {STEP}.partial", rf"open {RUN}/checkpoints$",
                       rf"remove {STEP}/", rf"remove {STEP}$"],
    "final": [rf"({verbs}) {RUN}/(FINAL|step)" for verbs in ("make|write|link", "open", "rename")] + [f"open {RUN}$"],
    "tokens": ["(make|write) runs/tokens", "rename runs/tokens"],
    "metrics": [f"(write|record) {RUN}/metrics", f"write {RUN}/data"],
    "resume": [f"read {RUN}/checkpoints/.*json$", f"read {RUN}/checkpoints/.*rank", f"write {RUN}/metrics", f"record {RUN}"]}
CLOCKS = ("tokens_per_second", "examples_per_second", "peak_memory_gb")
OF_CLOCKS = ("files", "sha256")  # a checkpoint's checksums, of metrics.jsonl too; the files themselves are compared
ITS_OWN = ("lock", "files.json")  # which process it was; checksums again


# ---------------------------------------------------------------------------------------------------------------------
# From outside


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


def kill_family(pid: int) -> None:
    for member in family(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def kill(ranks: Forked, seconds: float, alone: bool, rng: random.Random) -> bool:
    """Kills all ranks, or `alone` one of them, after so long or when one has killed itself. Returns whether any was.

    Where it is one alone, the other is ended by SIGTERM soon, or left to end with an error.
    """
    processes = ranks.processes
    if ranks.wait(seconds) is None:
        for process in [rng.choice(processes)] if alone else processes:
            process.kill()
        ranks.wait(60)
    if ranks.poll() == 0:
        return False
    assert -signal.SIGKILL in [process.exitcode for process in processes], f"a rank fails: {ranks.read()}"
    for process in processes:
        if alone:
            process.join(0.5 * rng.random())
            if rng.random() < 0.7:
                process.terminate()
            process.join(120)  # torch tries twice to reach a rank 0 that is gone
            assert process.exitcode is not None, f"a rank goes on without the other: {ranks.read()}"
        process.kill()
        process.join()
    return True


def on_disk(run: Path) -> tuple[int, str]:
    """Returns (the step of the last whole checkpoint, what is there)."""
    steps = [int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/checkpoint.json") if not path.parent.suffix]
    others = [path.name for path in sorted(run.parent.rglob("*")) if path.suffix in (".partial", ".old")]
    return max(steps, default=0), " ".join([f"step-{max(steps)}" if steps else "no checkpoint", *others,
                                            *["FINAL"] * (run / "FINAL").exists()])


def content_of(file: Path) -> list | bytes:
    """Returns what of a file must be the same in each run: all but what depends on the machine's mood."""
    if file.name not in ("metrics.jsonl", "metrics.json", "checkpoint.json"):
        return file.read_bytes()
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS + OF_CLOCKS} for line in lines]


def read_records(run: Path) -> list[dict]:
    return content_of(run / "metrics.jsonl")


def differences(folder: Path, other: Path) -> list[str]:
    """Returns what below the folders only one of them has, or is not the same."""
    one, two = ({str(path.relative_to(root)): path for path in root.rglob("*")} for root in (folder, other))
    changed = [name for name in one.keys() & two.keys()
               if one[name].is_file() and one[name].name not in ITS_OWN and content_of(one[name]) != content_of(two[name])]
    return sorted(one.keys() ^ two.keys()) + sorted(changed)


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark


def write_data(folder: Path, n_rows: int) -> None:
    folder.mkdir()
    train, test = make_rows(n_rows, 16)
    train_tokenizer(train, folder)
    more = make_rows(n_rows // 4, 0, seed=1)[0]
    # What hub.py keeps of a data set of comparisons
    answers = [{"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": token + answer}]}
               for row in train[:n_rows // 2] for token, answer in (("<|good|>", row["completion"]), ("<|bad|>", "X"))]
    files = {"train": train, "test": test, "more": more, "runs/datasets/ultrabin-train-conditional": answers,
             "pairs": make_pairs(train), "test-pairs": make_pairs(test)}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sft.py").write_text(CONFIG.format(kind="Config", train="train", test="test"))
    (folder / "dpo.py").write_text(CONFIG.format(kind="DPOConfig", train="pairs", test="test-pairs"))


class Reference(NamedTuple):
    """An undisturbed run of a variant: where it is, how long it took, and what each rank did."""

    folder: Path
    seconds: float
    events: tuple[list[str], ...]


def run_undisturbed(data: Path, variant: str) -> Reference:
    folder, started = shutil.copytree(data, data.with_name(variant)), time.perf_counter()
    with Forked(2, run_watched, folder, VARIANTS[variant], None) as ranks:
        _, stderr = ranks.communicate()
    if ranks.returncode:
        sys.exit(f"{variant}: the undisturbed run fails: {stderr}")
    seconds = time.perf_counter() - started
    return Reference(folder, seconds, tuple((folder / f"events-{rank}").read_text().splitlines() for rank in (0, 1)))


def choose(aim: str, reference: Reference, rng: random.Random) -> Moment | None:
    """Returns a moment of the undisturbed run that fits the aim, each pattern and each rank being as likely; None: any time."""
    if aim == "resume":
        return Moment(rng.choice(AIMS[aim]), torn=rng.random() < 0.5)
    counts = {(pattern, rank): sum(bool(re.match(pattern, event)) for event in reference.events[rank])
              for pattern in AIMS[aim] for rank in (0, 1)}
    pattern, rank = place = rng.choice([place for place, count in counts.items() if count])
    if not pattern:
        return None
    ranks = (0, 1) if aim == "tokens" else (rank,)  # of which either tokenises
    return Moment(pattern, rng.randint(1, counts[place]), ranks, rng.random() < 0.5)


def disturb(folder: Path, variant: str, aim: str, reference: Reference, rng: random.Random) -> tuple[int, list[str], list[str]]:
    """Runs, kills, and starts again until the end. Returns (kills, what happened, what differs from the undisturbed run)."""
    moments = [choose(aim, reference, rng)]
    if aim == "resume":  # of a run that has checkpoints by then
        moments.insert(0, Moment("record ", rng.randint(4, reference.events[0].count(f"record {RUN}/metrics.jsonl"))))
    elif rng.random() < 0.2:
        moments.append(None)
    kills, told, step = 0, [], 0
    for moment in moments:
        seconds = rng.uniform(0, reference.seconds)
        with Forked(2, run_watched, folder, VARIANTS[variant], moment) as ranks:
            if not kill(ranks, 120 if moment else seconds, aim == "one-rank", rng):
                told.append("ended before that")
                break
            done = re.search("^rank ., (before|within): .*$", ranks.read()[1], re.M)
        kills += 1
        step, there = on_disk(folder / RUN)
        told.append(f"{done[0] if done else f'after {seconds:.1f} s'} ({there})")
    with Forked(2, run_watched, folder, VARIANTS[variant], None) as ranks:
        stdout, stderr = ranks.communicate()
    if ranks.returncode:
        return kills, told, [f"exit code {ranks.returncode}: {stderr[-2000:]}"]
    resumed = re.search(r"resumed from .*step-(\d+)$", stdout, re.M)
    finished = "finished already" in stdout
    told.append("finished already" if finished else f"resumed from {resumed[1]}" if resumed else "began anew")
    lost = not finished and int(resumed[1] if resumed else 0) != step
    return kills, told, ["the step resumed from"] * lost + differences(folder / "runs", reference.folder / "runs")


def kill_runs(folder: Path, plan: list[tuple[str, str]], references: dict[str, Reference], rng: random.Random) -> int:
    """Kills a run of each (variant, aim); returns how many differ from the undisturbed ones."""
    kills, n_runs, n_different = Counter(), 0, 0
    for variant, aim in plan:
        n_kills = 0
        while not n_kills:  # a random moment may come too late
            run = shutil.copytree(folder / "data", folder / "killed")
            n_kills, told, different = disturb(run, variant, aim, references[variant], rng)
            shutil.rmtree(run)
            n_runs, n_different, kills[aim] = n_runs + 1, n_different + bool(different), kills[aim] + n_kills
            outcome = f"DIFFERENT: {'; '.join(different)}" if different else "same bits"
            print(f"{variant:<12} {aim:<16} {' | '.join(told)} | {outcome}", flush=True)
    of_each = ", ".join(f"{n} {aim}" for aim, n in kills.items())
    print(f"{n_runs} runs, {kills.total()} kills ({of_each}), {n_different} different")
    return n_different


def burn() -> None:
    while True:
        pass


def end_runs(folder: Path, n_ends: int, rng: random.Random) -> int:
    """Lets short runs come to their end in three ways, on 1 and 2 ranks, on busy cores; returns how many fail."""
    codes = Counter()
    with contextlib.ExitStack() as stack:
        for _ in os.sched_getaffinity(0):
            stack.enter_context(Forked(0, burn))
        for i in range(n_ends):
            n, way = 1 + i % 2, ("first end", "finished already", "SIGTERM")[i // 2 % 3]
            run = folder / f"{n}"
            if way != "finished already":
                shutil.rmtree(run, ignore_errors=True)
                shutil.copytree(folder / "data", run)
            moment = Moment("record ", rng.randint(1, 3), (rng.randrange(n),), number=signal.SIGTERM)
            with Forked(n, run_watched, run, ["n_examples=128"], moment if way == "SIGTERM" else None) as ranks:
                stdout, stderr = ranks.communicate()
            codes[f"{way}, {n} rank{'s' * (n > 1)}, code {ranks.returncode}"] += 1
            said = {"first end": "saved to", "finished already": way, "SIGTERM": "stopped by a signal"}[way] in stdout
            if ranks.returncode or not said:
                print(f"{way}: {stdout[-1000:]} {stderr[-3000:]}", flush=True)
                codes["failed"] += 1
    print("\n".join(f"{count:4} x {name}" for name, count in sorted(codes.items())))
    return codes["failed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="runs that are killed, some of them twice")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--aims", nargs="+", choices=AIMS, default=[*AIMS])
    parser.add_argument("--rows", type=int, default=384, help="rows of an epoch, of 1/32 as many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ends", type=int, help="let so many runs end, and kill none")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    variants, aims = ([names[i % len(names)] for i in range(args.kills)] for names in (args.variants, args.aims))
    rng.shuffle(aims)
    with tempfile.TemporaryDirectory() as folder, Forked(0, os.getpid) as first:
        first.communicate()  # everything is imported now
        folder = Path(folder)
        write_data(folder / "data", args.rows)
        if args.ends:
            sys.exit(bool(end_runs(folder, args.ends, rng)))
        references = {variant: run_undisturbed(folder / "data", variant) for variant in dict.fromkeys(variants)}
        sys.exit(bool(kill_runs(folder, [*zip(variants, aims)], references, rng)))


if __name__ == "__main__":
    main()
