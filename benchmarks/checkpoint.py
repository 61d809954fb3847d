"""How fast checkpoints are written, verified and loaded, of what the disk can do.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --processes 1 2

A random Llama with AdamW's state is saved by save_checkpoint, which ends when all is on the disk with its checksums; verified by
find_checkpoint, and filled by load_checkpoint, as a run does that goes on. Beside it as many processes write and read as many
bytes in the same folder, each a file of its own in blocks of 64 MB, and force what they have written to the disk. All reading is
from the disk, not from the page cache. The goal is 0.7 of the bare speed. The ways take turns; the median counts.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from common import bare_read, bare_write, describe_machine, forget, print_table, resident
from memory import Peak
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoint import find_checkpoint, load_checkpoint, save_checkpoint, training_state
from fsdp_utils import end_process, gather_all, init_processes, make_mesh, shard_model
from sft import make_optimizer

SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000}
GOALS = {"bare write": "bare write", "save_checkpoint": "bare write", "bare read": "bare read", "find_checkpoint": "bare read",
         "load_checkpoint": "bare read"}  # each way and the one that it is measured against


def make_state(n_layers: int, device: torch.device, offload: bool):
    """Returns (model, optimizer) after a step of random gradients."""
    config = AutoConfig.for_model("llama", num_hidden_layers=n_layers, **SHAPE)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    shard_model(model, make_mesh(device), offload=offload)
    optimizer = make_optimizer(model, 1e-4, (0.9, 0.999), 1e-8, 0.01)
    for parameter in model.parameters():
        parameter.grad = DTensor.from_local(torch.randn_like(parameter.to_local()), parameter.device_mesh, parameter.placements,
                                             shape=parameter.shape, stride=parameter.stride())
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def work(args) -> None:
    rank, _, device = init_processes()
    torch.manual_seed(rank)
    model, optimizer = make_state(args.layers, device, args.offload)
    bare, checkpoint = args.folder / "bare", args.folder / "step-1"
    mine = sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
               for tensor in training_state(model, optimizer).values())

    def timed(run: Callable) -> tuple[float, float]:
        """Returns the seconds until all ranks are done, and the most memory, in bytes, that this one took for it."""
        if rank == 0:
            bare.mkdir(parents=True, exist_ok=True)
            forget(args.folder)
        dist.barrier()
        before, started = resident("RssAnon"), time.perf_counter()
        with Peak() as peak:
            run()
            dist.barrier()
        return time.perf_counter() - started, peak.anonymous - before

    ways = {"bare write": lambda: bare_write(bare / f"{rank}.bin", mine),
            "save_checkpoint": lambda: save_checkpoint(checkpoint, model, optimizer, {"step": 1}),
            "bare read": lambda: bare_read(bare / f"{rank}.bin"),
            "find_checkpoint": lambda: find_checkpoint([checkpoint]),
            "load_checkpoint": lambda: load_checkpoint(checkpoint, model, optimizer)}
    seconds, memory = {name: [] for name in ways}, {}
    for i in range(args.repeats + 1):  # the first round warms up
        for name, run in ways.items():
            if i:
                seconds[name].append(timed(run)[0])
            else:
                memory[name] = max(gather_all(timed(run)[1]))
        if rank == 0:
            shutil.rmtree(bare)
            shutil.rmtree(checkpoint)
        dist.barrier()
    size = sum(gather_all(mine))
    if rank == 0:
        print(json.dumps([size, seconds, memory]))
    end_process()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=10, help="of the model: each is 0.18 GB of state, beside 0.8 GB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--offload", action="store_true", help="as model.cpu_offload=true")
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk in question; all is removed again")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args)
    print(describe_machine("cuda" if torch.cuda.is_available() else "cpu", torch.float32))
    for n in args.processes:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            done = subprocess.run([*torchrun, *sys.argv, "--folder", folder, "--work"], stdout=subprocess.PIPE, check=True)
        size, seconds, memory = json.loads(done.stdout.splitlines()[-1])
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        print(f"{n} processes, {size / 1e9:.2f} GB of state")
        table = [[name, *(f"{number:.2f}" for number in (
            medians[name], min(values), max(values), size / medians[name] / 1e9, medians[GOALS[name]] / medians[name],
            memory[name] / 1e9))] for name, values in seconds.items()]
        print_table(["", "s", "fastest", "slowest", "GB/s", "of the bare speed", "memory a process, GB"], table)


if __name__ == "__main__":
    main()
