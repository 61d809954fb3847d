"""Peak host memory of each process while a model is loaded and while FINAL is written.

    python benchmarks/memory.py --model SMOLLM2_FOLDER --processes 2
    python benchmarks/memory.py --model SMOLLM2_FOLDER --processes 2 --quantise    # LoRA over frozen linears in 4 bits

The goal is 1.3 x (model bytes / processes) + 0.5 GB a process, the libraries' own memory included. What counts is anonymous
memory, which the process holds: file pages that are mapped while weights are read (shown apart) can be dropped at any time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from common import describe_machine, print_table, resident

from configs.base import ModelConfig, PeftConfig
from export import save_model, write_gathered
from fsdp_utils import end_process, gather_all, init_processes, make_mesh, shard_model
from lora import merge_lora
from model_utils import load_tokenizer, load_weights
from sft import make_model


class Peak:
    """The most memory seen in a block of code, which it samples every millisecond."""

    def __enter__(self):
        self.anonymous = self.mapped = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.001):
            self.anonymous = max(self.anonymous, resident("RssAnon"))
            self.mapped = max(self.mapped, resident("RssFile"))

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


def work(args) -> None:
    rank, world_size, device = init_processes()
    tokenizer = load_tokenizer(args.model, ".cache")
    with Peak() as loading:
        wanted = ModelConfig(name_or_path=args.model, use_peft=args.quantise, peft=PeftConfig(quantise=args.quantise))
        model = make_model(wanted, tokenizer, [], ".cache", device)
        shard_model(model, make_mesh(device), "target_logps")
        load_weights(model)
    with tempfile.TemporaryDirectory() as folder, Peak() as writing:
        write_gathered(model, lambda parts: save_model(Path(folder), model, (merge_lora(model, part) for part in parts)),
                       args.part_bytes)
    facts = [loading.anonymous, loading.mapped, writing.anonymous, sum(p.nbytes for p in model.parameters())]
    everyone = gather_all(facts)
    if rank == 0:
        print(json.dumps(everyone))
    end_process()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quantise", action="store_true", help="QLoRA")
    parser.add_argument("--part-bytes", type=float, default=100e6, help="FINAL is gathered and written in parts of this size")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args)
    print(describe_machine("cpu", torch.float32))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]
    done = subprocess.run([*torchrun, *sys.argv, "--work"], stdout=subprocess.PIPE, text=True, check=True)
    table = []
    for rank, (*measured, size) in enumerate(json.loads(done.stdout.splitlines()[-1])):
        goal = 1.3 * size / args.processes + 0.5e9
        table.append([f"rank {rank}", *(f"{number / 1e9:.2f}" for number in (*measured, goal))])
    print(f"{args.model}: {size / 1e9:.2f} GB of weights in memory, {args.processes} processes")
    print_table(["GB", "loading", "file pages mapped", "writing FINAL", "goal"], table)


if __name__ == "__main__":
    main()
