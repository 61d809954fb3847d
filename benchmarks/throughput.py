"""Real tokens a second and peak memory of a whole training step, against how it is commonly done and against the limit.

    python benchmarks/throughput.py --model SMOLLM2_FOLDER --data chats.jsonl                            # CPU, fp32
    python benchmarks/throughput.py --model MODEL_FOLDER --data chats.jsonl --max-length 4096 --device cuda

Each way to train runs in a process of its own, so that its peak memory is its own; they take turns, step by step, on the
same rows. A real token is one that is not padding. What is compared:
    ours             this project's step: packed rows, the fused log-prob kernel, FSDP2, clipping, AdamW
    ours, compiled   the same with model.compile
    ours, LoRA       ours with adapters on all linears (r 64)
    PEFT's LoRA      the same, but with the peft package's layer
    padded           every row padded to max_length, whole logits, F.cross_entropy, AdamW: transformers as most begin with it
    TRL              its SFTTrainer as it comes, with the same batch and the loss on the answers, if trl is installed;
                     it comes with activation checkpointing
    TRL, no checkpointing
    the limit        the body's forward and backward on the packed rows, and the head's three matmuls on the targets alone
"""

import argparse
import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from common import describe_machine, print_table, resident

import sft
from configs.base import Config, ModelConfig
from data import ChatEncoder, SFTDataLoader, tokenise
from fsdp_utils import clip_gradients, init_processes, load_shards, shard_model
from model_utils import compute_dtype, enable_packing, load_model, load_tokenizer

WAYS = ("ours", "ours, compiled", "ours, LoRA", "PEFT's LoRA", "padded", "TRL", "TRL, no checkpointing", "the limit")


def load_rows(args):
    tokenizer = load_tokenizer(args.model, ".cache")
    encoder = ChatEncoder(tokenizer, args.max_length, args.max_length // 2)
    return tokenizer, encoder, tokenise([args.data], encoder, ".cache")


def load_batches(args, tokenizer, rows, packing: bool) -> list[list[dict]]:
    """Returns the microbatches of each step."""
    loader = SFTDataLoader(rows, np.arange(len(rows)), args.batch_size, args.batch_size * args.steps, None,
                           tokenizer.pad_token_id, packing, max(args.microbatch_tokens, args.max_length))
    steps = [[]]
    for batch in loader.batches():
        steps[-1].append(batch)
        if batch["ends_step"]:
            steps.append([])
    return steps[:-1]


def make_ours(args, adapters: str | None = None):
    """Returns step(i), which trains on the batch of step i."""
    _, _, device = init_processes()
    tokenizer, encoder, rows = load_rows(args)
    config = Config(lr=2e-5, model=ModelConfig(name_or_path=args.model, use_peft=adapters == "ours", compile=args.compile))
    if adapters == "PEFT's":
        import peft
        model = load_model(args.model, None, tokenizer, encoder.stop_id, ".cache", compute_dtype(device))
        settings = {key: getattr(config.model.peft, key) for key in ("lora_alpha", "lora_dropout", "target_modules")}
        model = peft.get_peft_model(model, peft.LoraConfig(r=config.model.peft.lora_r, task_type="CAUSAL_LM", **settings))
        model = model.get_base_model()
    else:
        model = sft.make_model(config, tokenizer, encoder.stop_id, device)
    shard_model(model, device, "target_logps", dtype=compute_dtype(device), recompute=args.checkpointing, compile=args.compile)
    load_shards(model, model.weight_files)
    optimizer = sft.make_optimizer(model, config)
    why_not = enable_packing(model, device)
    model.train()
    batches = load_batches(args, tokenizer, rows, packing=not why_not)

    def step(i: int) -> None:
        for batch in batches[i]:
            loss, _ = sft.get_batch_metrics(model, sft.to_device(batch, device), "train", batch["global_target_count"])
            loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def make_padded(args):
    tokenizer, encoder, rows = load_rows(args)
    model = load_model(args.model, None, tokenizer, encoder.stop_id, ".cache").to(args.device).train()
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

    def step(i: int) -> None:
        indices = range(i * args.batch_size, (i + 1) * args.batch_size)
        n_targets = int(rows.targets[list(indices)].sum())
        for start in range(0, args.batch_size, args.rows):
            part = [rows[index] for index in indices[start:start + args.rows]]
            ids, labels = torch.full((2, len(part), args.max_length), tokenizer.pad_token_id)
            labels.fill_(-100)
            mask = torch.zeros_like(ids)
            for row, (row_ids, trained) in enumerate(part):
                n = len(row_ids)
                ids[row, :n], mask[row, :n] = torch.from_numpy(row_ids.astype(np.int64)), 1
                labels[row, :n] = torch.from_numpy(np.where(trained, row_ids, -100).astype(np.int64))
            with torch.autocast("cuda", torch.bfloat16) if args.device == "cuda" else contextlib.nullcontext():
                logits = model(input_ids=ids.to(args.device), attention_mask=mask.to(args.device)).logits[:, :-1]
            targets = labels[:, 1:].to(args.device)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / n_targets
            loss.backward()
            del logits, loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def make_limit(args):
    tokenizer, encoder, rows = load_rows(args)
    device = torch.device(args.device)
    model = load_model(args.model, None, tokenizer, encoder.stop_id, ".cache", compute_dtype(device)).to(device)
    why_not = enable_packing(model, device)
    weight = model.get_output_embeddings().weight
    batches = load_batches(args, tokenizer, rows, packing=not why_not)
    grad_weight = torch.empty_like(weight)

    def step(i: int) -> None:
        for batch in batches[i]:
            batch = sft.to_device(batch, device)
            ends, longest = batch["document_ends"], batch["longest"]
            hidden = model.base_model(
                input_ids=batch["target_combined_input_ids"], position_ids=batch["position_ids"], use_cache=False,
                cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest).last_hidden_state
            with torch.no_grad():
                needed = hidden.flatten(0, 1)[batch["target_positions"] - 1]
                for rows_ in needed.split(1024):
                    logits = rows_ @ weight.T
                    torch.mm(logits, weight)
                    torch.mm(logits.T, rows_, out=grad_weight)
            hidden.backward(hidden.detach())
        model.zero_grad()
    return step


def run_trl(args, step_began, step_ended) -> None:
    import datasets
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            step_began()

        def on_step_end(self, *_, **__):
            step_ended()

    tokenizer, _, rows = load_rows(args)
    sources = [rows.source(i) for i in range(args.batch_size * args.steps)]
    sources = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in sources]
    per_forward = min(args.batch_size, args.rows)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, per_device_train_batch_size=per_forward, max_steps=args.steps, max_length=args.max_length,
            gradient_accumulation_steps=args.batch_size // per_forward, gradient_checkpointing=args.way == "TRL",
            bf16=args.device == "cuda", use_cpu=args.device == "cpu", train_sampling_strategy="sequential",
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
        trainer = SFTTrainer(args.model, train_dataset=datasets.Dataset.from_list(sources), processing_class=tokenizer,
                             args=settings)
        trainer.add_callback(Turns())
        trainer.train()


def work(args) -> None:
    """The process of one way: for each line it is sent, it takes a step and answers with the seconds it took."""
    transformers.utils.logging.set_verbosity_error()
    turns = {}

    def began():
        assert sys.stdin.readline(), "the benchmark is over"
        turns["started"] = time.perf_counter()

    def ended():
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - turns["started"]
        peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else resident("VmHWM")
        ctypes.CDLL(None).malloc_trim(0)  # while it waits a process holds what it needs, and no freed memory
        print(json.dumps({"seconds": seconds, "peak": peak}), file=answers, flush=True)

    answers, sys.stdout = sys.stdout, sys.stderr
    if args.way.startswith("TRL"):
        return run_trl(args, began, ended)
    adapters = {"ours, LoRA": "ours", "PEFT's LoRA": "PEFT's"}.get(args.way)
    makers = {"padded": make_padded, "the limit": make_limit}
    args.compile |= args.way == "ours, compiled"
    step = makers.get(args.way, functools.partial(make_ours, adapters=adapters))(args)
    for i in range(args.steps):
        began()
        step(i)
        ended()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--data", required=True, help="a .jsonl of conversations")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16, help="rows a step")
    parser.add_argument("--microbatch-tokens", type=int, default=4096, help="tokens a forward of what packs, at most")
    parser.add_argument("--rows", type=int, default=8, help="rows a forward of what pads; transformers' own default")
    parser.add_argument("--steps", type=int, default=5, help="the first two warm up")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="in all of ours, with PEFT's layer too")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        return work(args)

    needs = {"TRL": "trl", "TRL, no checkpointing": "trl", "PEFT's LoRA": "peft"}
    ways = [way for way in args.ways if importlib.util.find_spec(needs.get(way, "torch"))]
    *_, rows = load_rows(args)
    lengths = rows.lengths[:args.batch_size * args.steps].reshape(args.steps, args.batch_size).sum(1)
    targets = rows.targets[:args.batch_size * args.steps].sum()
    print(describe_machine(args.device, compute_dtype(torch.device(args.device))))
    print(f"{args.model}: {args.batch_size} rows a step, max_length {args.max_length}, {lengths.mean():.0f} real tokens a step, "
          f"{targets / lengths.sum():.0%} of them targets")
    workers = {way: subprocess.Popen([sys.executable, *sys.argv, "--way", way], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     stderr=None if os.environ.get("VERBOSE") else subprocess.DEVNULL, text=True) for way in ways}
    speed, peak = {way: [] for way in ways}, {}
    for n_tokens in lengths.tolist():
        for way, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline() or sys.exit(f"{way} failed; VERBOSE=1 shows why"))
            speed[way].append(n_tokens / answer["seconds"])
            peak[way] = answer["peak"]
    median = {way: statistics.median(values[2:]) for way, values in speed.items()}
    table = [[way, f"{median[way]:,.0f}", *(f"{median[way] / median[other]:.2f}" if other in median else "" for other in
                                           ("padded", "TRL", "the limit")), f"{peak[way] / 1e9:.2f}"] for way in ways]
    print_table(["whole step", "real tokens/s", "x padded", "x TRL", "of the limit", "peak memory, GB"], table)


if __name__ == "__main__":
    main()
