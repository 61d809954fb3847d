"""Real tokens a second and peak memory of a whole training step, against how it is commonly done and against the limit.

    python benchmarks/throughput.py --model SMOLLM2_FOLDER --data chats.jsonl                            # CPU, fp32
    python benchmarks/throughput.py --model MODEL_FOLDER --data chats.jsonl --max-length 4096 --device cuda

Each way to train runs in a process of its own, so that its peak memory is its own; they take turns, step by step, on the
same rows. A step begins with making its batch, but for the limit's. A real token is one that is not padding. What is compared:
    ours             this project's step: packed rows, the fused log-prob kernel, FSDP2, clipping, AdamW
    ours, compiled   the same with model.compile
    ours, LoRA       ours with adapters on all linears (r 64)
    ours, QLoRA      the same over frozen linears in 4 bits
    PEFT's LoRA      ours, LoRA, but with the peft package's layer
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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from common import describe_machine, print_table, resident

import sft
from chat import ChatEncoder
from configs.base import ModelConfig, PeftConfig
from data import SFTDataLoader, to_device, tokenise
from fsdp_utils import clip_gradients, end_process, init_processes, make_mesh, shard_model
from model_utils import compute_dtype, load_model, load_tokenizer, load_weights
from rows import list_files, read_rows, to_conversation
from trial import enable_packing

WAYS = ("ours", "ours, compiled", "ours, LoRA", "ours, QLoRA", "PEFT's LoRA", "padded", "TRL", "TRL, no checkpointing",
        "the limit")


def load_rows(args):
    tokenizer = load_tokenizer(args.model, ".cache")
    encoder = ChatEncoder(tokenizer, args.max_length, args.max_length // 2)
    return tokenizer, encoder, tokenise(list_files([args.data]), encoder, ".cache")


def make_loader(args, tokenizer, rows, packing: bool) -> SFTDataLoader:
    return SFTDataLoader(rows, np.arange(len(rows)), args.batch_size * args.steps, batch_size=args.batch_size,
                         pad_id=tokenizer.pad_token_id, packing=packing,
                         microbatch_tokens=max(args.microbatch_tokens, args.max_length))


def make_ours(args, device, adapters: str | None = None):
    """Returns step(i), which trains on the batch of step i."""
    tokenizer, encoder, rows = load_rows(args)
    config = ModelConfig(name_or_path=args.model, use_peft=adapters in ("ours", "quantised"), compile=args.compile,
                         peft=PeftConfig(quantise=adapters == "quantised"))
    dtype = compute_dtype(device)
    if adapters == "PEFT's":
        import peft
        model = load_model(args.model, None, tokenizer, encoder.stop_ids, ".cache", dtype, args.compile and device.type == "cuda")
        settings = {key: getattr(config.peft, key) for key in ("lora_alpha", "lora_dropout", "target_modules")}
        model = peft.get_peft_model(model, peft.LoraConfig(r=config.peft.lora_r, task_type="CAUSAL_LM", **settings))
        model = model.get_base_model()
    else:
        model = sft.make_model(config, tokenizer, encoder.stop_ids, ".cache", device)
    shard_model(model, make_mesh(device), "target_logps", dtype=dtype, recompute=args.checkpointing, compile=args.compile)
    load_weights(model)
    optimizer = sft.make_optimizer(model, 2e-5, (0.9, 0.999), 1e-5, 0.01)
    loader = make_loader(args, tokenizer, rows, enable_packing(model, device))
    model.train()

    def step(i: int) -> None:
        for batch in loader.microbatches(i * args.batch_size):
            loss, _ = sft.get_batch_metrics(model, to_device(batch, device), "train", batch["global_target_count"])
            loss.backward()
        clip_gradients(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return step


def make_padded(args, device):
    tokenizer, encoder, rows = load_rows(args)
    model = load_model(args.model, None, tokenizer, encoder.stop_ids, ".cache").to(device).train()
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

    def step(i: int) -> None:
        indices = range(i * args.batch_size, (i + 1) * args.batch_size)
        n_targets = int(rows.targets[list(indices)].sum())
        for start in range(0, args.batch_size, args.rows):
            part = [rows[index][0] for index in indices[start:start + args.rows]]
            ids, labels = torch.full((2, len(part), args.max_length), tokenizer.pad_token_id)
            labels.fill_(-100)
            mask = torch.zeros_like(ids)
            for row, (row_ids, trained) in enumerate(part):
                n = len(row_ids)
                ids[row, :n], mask[row, :n] = torch.from_numpy(row_ids.astype(np.int64)), 1
                labels[row, :n] = torch.from_numpy(np.where(trained, row_ids, -100).astype(np.int64))
            with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext():
                logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, :-1]
            targets = labels[:, 1:].to(device)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / n_targets
            loss.backward()
            del logits, loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def make_limit(args, device):
    tokenizer, encoder, rows = load_rows(args)
    model = load_model(args.model, None, tokenizer, encoder.stop_ids, ".cache", compute_dtype(device)).to(device)
    loader = make_loader(args, tokenizer, rows, enable_packing(model, device))
    batches = [[*loader.microbatches(i * args.batch_size)] for i in range(args.steps)]
    weight = model.get_output_embeddings().weight
    grad_weight = torch.empty_like(weight)

    def step(i: int) -> None:
        for batch in batches[i]:
            batch = to_device(batch, device)
            ends, longest = batch["document_ends"], batch["longest"]
            hidden = model.base_model(
                input_ids=batch["target_combined_input_ids"], position_ids=batch["position_ids"], use_cache=False,
                cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest).last_hidden_state
            with torch.no_grad():
                needed = hidden.flatten(0, 1)[batch["predicting_positions"]]
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
    lines = dict(read_rows(Path(args.data)))
    chats = [[{key: message[key] for key in ("role", "content")} for message in to_conversation(lines[line]).messages]
             for line in rows.lines[:args.batch_size * args.steps].tolist()]
    sources = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]
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
    adapters = {"ours, LoRA": "ours", "ours, QLoRA": "quantised", "PEFT's LoRA": "PEFT's"}.get(args.way)
    makers = {"padded": make_padded, "the limit": make_limit}
    args.compile |= args.way == "ours, compiled"
    _, _, device = init_processes()
    step = makers.get(args.way, functools.partial(make_ours, adapters=adapters))(args, device)
    for i in range(args.steps):
        began()
        step(i)
        ended()
    end_process()


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
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {})
    workers = {way: subprocess.Popen([sys.executable, *sys.argv, "--way", way], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     stderr=None if os.environ.get("VERBOSE") else subprocess.DEVNULL, text=True,
                                     env=environment) for way in ways}
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
