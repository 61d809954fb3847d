"""All that only a GPU can tell, in one command of under seven minutes: the kernel, whole steps, bf16, storage, a resumed run.

    python benchmarks/gpu.py                          # one GPU of 80 GB; no network and no model files
    python benchmarks/gpu.py --parts steps resume
    python benchmarks/gpu.py --device cpu --small     # does each part run at all?

The weights are random, of Llama-3-8B's shape cut to --layers, the documents as long as chats are. Each part, and each way of
taking steps, has a process of its own, forked from one that has imported everything, so that this counts for none of them.
It prints its rows as they come; one that fails or takes too long is named, and the next one starts. VERBOSE=1 shows the rest.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # eight layers nearly fill 80 GB

import numpy as np
import torch
import transformers
from common import bare_read, bare_write, describe_machine, forget
from kill import ROOT, kill_family
from logp_kernel import compare
from safetensors.torch import load_file

import sft
from checkpoint import load_checkpoint, save_checkpoint, training_state
from configs.base import Config, ModelConfig, PeftConfig
from data import SFTDataLoader, to_device
from export import export_model
from fsdp_utils import accumulate, all_reduce_means, clip_gradients, end_process, init_processes, make_mesh, shard_model
from log import count_flops, peak_flops, peak_memory
from make_tiny import make_rows, train_tokenizer
from model_utils import compute_dtype, load_tokenizer
from trial import enable_packing
from will_it_fit import forecast

PARTS = {"kernel": 90, "steps": 120, "bf16": 75, "storage": 150, "resume": 150}  # seconds on a GPU, of steps for each way
WAYS = {"full, packed": {}, "full, packed, checkpointing": {"activation_checkpointing": True},
        "the same, inputs on the host": {"activation_checkpointing": True, "activation_offload": True},
        "full, packed, compiled": {"compile": True}, "full, padded": {"packing": False},
        "LoRA r 64, packed": {"use_peft": True}, "LoRA r 64, packed, compiled": {"use_peft": True, "compile": True},
        "QLoRA r 64, packed": {"use_peft": True, "peft": PeftConfig(quantise=True)},
        "QLoRA r 64, packed, compiled": {"use_peft": True, "peft": PeftConfig(quantise=True), "compile": True}}
LLAMA = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192}
SMOLLM2 = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
           "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 100000.0,
           "max_position_embeddings": 8192, "tie_word_embeddings": True}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
         "num_hidden_layers": 2}


def show(*cells) -> None:
    first, *others = map(str, cells)
    print(f"| {first:<32} | " + " | ".join(f"{cell:>12}" for cell in others) + " |", flush=True)


class Documents:
    """Random ones, in the place of TokenisedRows: log-normal lengths, of a mean of a quarter of the longest, the last 60 % of
    each targets. Small ids come more often than large ones, so that there is something to learn."""

    def __init__(self, n: int, vocabulary: int, longest: int):
        rng = np.random.default_rng(0)
        self.n_documents, self.columns = 1, {}
        self.lengths = rng.lognormal(np.log(longest / 4) - 0.32, 0.8, (n, 1)).astype(int).clip(min=8, max=longest)
        self.targets = self.lengths - np.round(0.4 * self.lengths).astype(int)
        self.ids = [(vocabulary * rng.random(length) ** 3).astype(np.int32) for length in self.lengths[:, 0]]

    def __getitem__(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(self.ids[i], np.arange(self.lengths[i, 0]) >= self.lengths[i] - self.targets[i])]


def make_config(args, shape: dict, rows: int, lr: float = 2e-5, **settings) -> Config:
    longest = 128 if args.small else 2048
    return Config(lr=lr, model=ModelConfig(random_init=shape | (SMALL if args.small else {}), batch_size=rows,
                                           max_length=longest, microbatch_tokens=4 * longest, **settings))


def make_run(args, device, config: Config, n_steps: int, dtype):
    """Returns (model, optimizer, loader, tokenizer) as sft.main makes them, but the random weights on the device itself."""
    train_tokenizer(make_rows(200, 1)[0], args.folder)
    tokenizer, wanted = load_tokenizer(str(args.folder), str(args.folder)), config.model
    torch.manual_seed(config.seed)
    with device:
        model = sft.make_model(wanted, tokenizer, [], str(args.folder), device)
    shard_model(model, make_mesh(device), "target_logps", dtype=dtype, recompute=wanted.activation_checkpointing,
                inputs_on_host=wanted.activation_offload, compile=wanted.compile)
    optimizer = sft.make_optimizer(model, config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay)
    assert not wanted.packing or enable_packing(model, device)
    n_rows = wanted.batch_size * n_steps
    documents = Documents(n_rows, wanted.random_init["vocab_size"], wanted.max_length)
    loader = SFTDataLoader(documents, np.arange(n_rows), n_rows, config.seed, batch_size=wanted.batch_size,
                           pad_id=tokenizer.pad_token_id, packing=wanted.packing, microbatch_tokens=wanted.microbatch_tokens)
    return model, optimizer, loader, tokenizer


def train(model, optimizer, loader, device) -> Iterator[tuple[float, dict]]:
    """Takes steps as sft.main does; yields (loss, the last microbatch) after each."""
    for first in range(0, loader.n_examples, loader.batch_size):
        sums = {}
        for batch in loader.microbatches(first):
            batch = to_device(batch, device)
            loss, metrics = sft.get_batch_metrics(model, batch, "train", batch["global_target_count"])
            loss.backward()
            accumulate(sums, metrics)
        clip_gradients(model.parameters(), 1.0).item()
        means = all_reduce_means(sums)
        optimizer.step()
        optimizer.zero_grad()
        yield means["loss/train"], batch


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def time_kernel(args, device) -> None:
    compare(*((256, 64, 1000) if args.small else (8192, 4096, 128256)), args.device, compute_dtype(device), repeats=9)


@contextlib.contextmanager
def counted_waits():
    """Yields a counter of the places at which the host waits for the GPU: the innermost line, and ours that it came from."""
    def note(message, category, filename, lineno, file=None, line=None):
        if "synchronizing" in str(message):
            ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_stack()
                    if frame.filename.startswith(str(ROOT)) and frame.filename != __file__]
            places[f"{'/'.join(Path(filename).parts[-3:])}:{lineno}" + (f", from {ours[-1]}" if ours else "")] += 1

    places = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def steps_config(args, way: str) -> Config:
    return make_config(args, LLAMA | {"num_hidden_layers": args.layers}, 30, **WAYS[way])


def foretell(args, way: str, result) -> None:
    """Puts the GB of a step's peak memory, as will_it_fit.py has it, or "-"; in a process that has not touched a GPU."""
    told = "-"
    try:
        peaks = forecast(steps_config(args, way), 1, torch.device("cuda:0" if args.device == "cuda" else "cpu")).peaks
        told = f"{peaks['a step'] / 1e9:.1f}"
    finally:
        result.put(told)


def time_steps(args, device, way: str, foretold) -> None:
    started = time.perf_counter()
    model, optimizer, loader, _ = make_run(args, device, steps_config(args, way), 9, compute_dtype(device))
    flops, peak = count_flops(model), peak_flops(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = train(model, optimizer, loader, device)
    next(steps)
    synchronize(device)
    to_first = time.perf_counter() - started
    next(steps), next(steps)
    wanted = way == [*WAYS][0] and device.type == "cuda"
    with counted_waits() if wanted else contextlib.nullcontext({}) as places:
        next(steps)
    synchronize(device)
    rates, started = [], time.perf_counter()
    for _, batch in steps:
        synchronize(device)
        seconds, started = time.perf_counter() - started, time.perf_counter()
        needed = sum(batch[key] * cost for key, cost in
                     zip(("global_token_count", "global_target_count", "global_squared_lengths"), flops))
        rates.append((batch["global_token_count"] / seconds, needed / seconds, seconds * 1e3))
    speed, done, duration = map(statistics.median, zip(*rates))  # of five; one may compile anew
    show(way, f"{speed:,.0f}", f"{done / peak:.3f}" if peak else "-", f"{peak_memory(device) / 1e9:.1f}",
         foretold.get(), f"{to_first:.1f}", f"{duration:.0f}", f"{max(rates, key=lambda rate: rate[2])[2]:.0f}")
    if wanted:
        print(f"  {sum(places.values())} waits for the GPU in a step of {way}:", flush=True)
        for place, count in places.most_common():
            print(f"  {count:4} at {place}", flush=True)


def compare_bf16(args, device) -> None:
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer, loader, _ = make_run(args, device, make_config(args, SMOLLM2, 8, 1e-3), 20, dtype)
        losses[dtype] = [loss for loss, _ in train(model, optimizer, loader, device)]
        del model, optimizer
    show("loss of SmolLM2's shape, at step", "fp32", "bf16", "difference")
    fp32, bf16 = losses.values()
    for step in (1, 5, 10, 20):
        show(step, *(f"{value:.5f}" for value in (fp32[step - 1], bf16[step - 1], bf16[step - 1] - fp32[step - 1])))
    step = max(range(20), key=lambda i: abs(fp32[i] - bf16[i]))
    print(f"greatest difference {abs(fp32[step] - bf16[step]):.5f} at step {step + 1}", flush=True)


def time_storage(args, device) -> None:
    config = make_config(args, LLAMA | {"num_hidden_layers": 2}, 8)
    model, optimizer, loader, tokenizer = make_run(args, device, config, 1, compute_dtype(device))
    [*train(model, optimizer, loader, device)]  # fills the optimizer's state
    size = sum(tensor.nbytes for tensor in training_state(model, optimizer).values())
    bare, checkpoint, final = (args.folder / name for name in ("bare", "step-1", "FINAL"))
    bare.mkdir()

    def timed(name: str, work: Callable, folder: Path) -> None:
        forget(folder)
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        seconds = time.perf_counter() - started
        moved = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
        show(name, f"{moved:.3f}", f"{seconds:.2f}", f"{moved / seconds:.2f}")

    show(f"storage, {args.folder}", "GB", "s", "GB/s")
    timed("bare write", lambda: bare_write(bare / "file", size), bare)
    timed("bare read", lambda: bare_read(bare / "file"), bare)
    shutil.rmtree(bare)
    timed("save_checkpoint", lambda: save_checkpoint(checkpoint, model, optimizer, {"step": 1}), checkpoint)
    timed("load_checkpoint", lambda: load_checkpoint(checkpoint, model, optimizer), checkpoint)
    settings = dataclasses.asdict(Config(model=ModelConfig(random_init=LLAMA, tokenizer_name_or_path=str(args.folder))))
    timed("export_model", lambda: export_model(final, model, tokenizer, 1, {"step": 1}, settings), final)


def resume(args, device) -> None:
    subprocess.run([sys.executable, ROOT / "make_tiny.py"], cwd=args.folder, check=True, stdout=subprocess.DEVNULL)
    rows = 32 if args.small else 128
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", ROOT / "sft.py", "--config",
               ROOT / "configs/tiny.py", f"model.batch_size={rows}", f"n_examples={30 * rows}", f"save_every={10 * rows}",
               "n_eval_answers=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the two runs go side by side

    def start(name: str) -> subprocess.Popen:
        with open(args.folder / f"{name}.log", "a") as log:
            return subprocess.Popen([*command, f"exp_name={name}"], cwd=args.folder, env=environment, stdout=log, stderr=log)

    def losses(name: str) -> list[float]:
        metrics = args.folder / ".cache" / name / "metrics.jsonl"
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []  # the last may be half written
        return [record["loss/train"] for record in map(json.loads, lines) if "loss/train" in record]

    undisturbed, killed = start("undisturbed"), start("killed")
    while killed.poll() is None and len(losses("killed")) < 14:  # checkpoints are written after steps 10, 20 and 30
        time.sleep(0.002)
    kill_family(killed.pid)
    killed.wait()
    reached = len(losses("killed"))
    codes = {"killed": start("killed").wait(), "undisturbed": undisturbed.wait()}
    for name in (name for name, code in codes.items() if code):
        raise RuntimeError(f"{name} ended with {codes[name]}: {(args.folder / f'{name}.log').read_text()[-1500:]}")
    said = [line for line in (args.folder / "killed.log").read_text().splitlines() if line.startswith("resumed from")]
    print(f"killed at step {reached} of 30;", said[-1] if said else "not resumed: the kill came too late", flush=True)
    first, second = (args.folder / ".cache" / name / "FINAL/model.safetensors" for name in codes)
    a, b = map(losses, codes)
    if first.read_bytes() == second.read_bytes() and a == b:
        return print(f"same bits: FINAL/model.safetensors ({first.stat().st_size:,} bytes) and the losses of {len(a)} steps")
    first, second = load_file(first), load_file(second)
    greatest = max((first[name] - second[name]).abs().max().item() for name in first)
    print(f"NOT the same bits: the weights differ by up to {greatest:.3g}, the losses by up to "
          f"{max(abs(x - y) for x, y in zip(a, b)):.3g}, of {len(a)} and {len(b)} steps")


# ---------------------------------------------------------------------------------------------------------------------
# Their processes


def work(args, task: str, is_first: bool) -> None:
    """The process of one part, or of one way of taking steps."""
    if not os.environ.get("VERBOSE"):
        os.dup2(os.open(args.folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    foretold = multiprocessing.SimpleQueue()
    if task in WAYS:
        multiprocessing.Process(target=foretell, args=(args, task, foretold)).start()
    _, _, device = init_processes()
    if is_first:
        print(describe_machine(args.device, compute_dtype(device)), flush=True)
    parts = {"kernel": time_kernel, "bf16": compare_bf16, "storage": time_storage, "resume": resume}
    parts[task](args, device) if task in parts else time_steps(args, device, task, foretold)
    end_process()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=[*WAYS], help="of taking steps")
    parser.add_argument("--layers", type=int, default=8, help="of the model that takes steps")
    parser.add_argument("--minutes", type=float, default=7, help="what has not begun by then is left out")
    parser.add_argument("--folder", help="where to write; all is removed again")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    assert not torch.cuda.is_initialized(), "a process that is forked from one that uses a GPU can't use it"

    begin, parent = time.monotonic(), args.folder
    tasks = [(part, task) for part in PARTS if part in args.parts for task in (args.ways if part == "steps" else [part])]
    for i, (part, task) in enumerate(tasks):
        started = time.monotonic()
        left = begin + 60 * args.minutes - started
        if left < 10:
            print(f"{task}: SKIPPED, the {args.minutes:g} minutes are over", flush=True)
            continue
        if part not in dict(tasks[:i]):
            print(f"\n--- {part}, {started - begin:.0f} s after the start", flush=True)
            if part == "steps":
                show("step", "tokens/s", "MFU", "peak GB", "foretold", "s to first", "ms, median", "ms, slowest")
        args.folder = Path(tempfile.mkdtemp(dir=parent))
        worker = multiprocessing.get_context("fork").Process(target=work, args=(args, task, i == 0))
        try:
            worker.start()
            worker.join(min(PARTS[part], left) if args.device == "cuda" else left)
            if worker.is_alive():
                print(f"{task}: STOPPED after {time.monotonic() - started:.0f} s", flush=True)
            elif worker.exitcode:
                errors = (args.folder / "stderr").read_text()[-600:] if (args.folder / "stderr").exists() else ""
                print(f"{task}: FAILED with exit code {worker.exitcode}: {' '.join(errors.split())}", flush=True)
        finally:
            if worker.is_alive():
                kill_family(worker.pid)
                worker.join()
            shutil.rmtree(args.folder, ignore_errors=True)
    print(f"\ndone after {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
