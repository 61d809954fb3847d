"""All that only a GPU can tell, in one command of under seven minutes: the kernel, whole steps, bf16, storage, a resumed run.

    python benchmarks/gpu.py                          # one GPU of 80 GB; no network and no model files
    python benchmarks/gpu.py --parts steps resume
    python benchmarks/gpu.py --device cpu --small     # does each part run at all?

The weights are random, of Llama-3-8B's shape cut to --layers, the documents as long as chats are. Each part, and each way of
taking steps, has a process of its own, which prints its rows as they come; one that fails or takes too long is named, and the
next one starts. All import their libraries at the start, at once, so that this counts for none of them.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from kill import ROOT, family

if "--task" in sys.argv:  # the process that starts the parts needs none of these, nor the time to import them
    import numpy as np
    import torch
    import torch.distributed as dist
    import transformers
    from common import describe_machine, peak_extra_memory, time_interleaved
    from logp_kernel import candidates

    import sft
    from configs.base import Config, ModelConfig
    from data import DTYPES, SFTDataLoader, TokenisedRows
    from fsdp_utils import (
        all_reduce_means,
        clip_gradients,
        init_processes,
        load_checkpoint,
        load_shards,
        save_checkpoint,
        shard_model,
        training_state,
    )
    from make_tiny import make_rows, train_tokenizer
    from model_utils import compute_dtype, count_flops, enable_packing, linear_logps, load_tokenizer

PARTS = {"kernel": 90, "steps": 120, "bf16": 75, "storage": 150, "resume": 150}  # seconds, of steps for each way
WAYS = {"full, packed": {}, "full, packed, checkpointing": {"activation_checkpointing": True},
        "full, packed, compiled": {"compile": True}, "full, padded": {"packing": False},
        "LoRA r 64, packed": {"use_peft": True}, "LoRA r 64, packed, compiled": {"use_peft": True, "compile": True}}
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


def make_documents(folder: Path, n: int, vocabulary: int, longest: int) -> "TokenisedRows":
    """Random documents as the token cache holds them: log-normal lengths, of a mean of a quarter of the longest, the last 60 %
    of each targets. Small ids come more often than large ones, so that there is something to learn."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(longest / 4) - 0.32, 0.8, n).astype(int).clip(min=8, max=longest)
    trained = [np.arange(length) >= round(0.4 * length) for length in lengths]
    columns = {"ids": vocabulary * rng.random(lengths.sum()) ** 3, "trained": np.concatenate(trained), "lengths": lengths,
               "targets": [on.sum() for on in trained], "lines": lengths, "files": lengths}
    folder.mkdir(parents=True)
    for name, dtype in DTYPES.items():
        np.asarray(columns[name], dtype).tofile(folder / f"{name}.bin")
    np.cumsum([0, *lengths], dtype=np.int64).tofile(folder / "offsets.bin")
    (folder / "counts.json").write_text("{}")
    return TokenisedRows(folder, [])


def make_run(args, device, shape: dict, n_steps: int, rows: int, dtype, lr: float = 2e-5, **settings):
    """Returns (model, optimizer, loader, tokenizer) as sft.main makes them, but the random weights on the device itself."""
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    train_tokenizer(make_rows(200, 1)[0], folder)
    tokenizer = load_tokenizer(str(folder), str(folder))
    longest = 128 if args.small else 2048
    config = Config(lr=lr, model=ModelConfig(random_init=shape | (SMALL if args.small else {}), batch_size=rows,
                                             max_length=longest, microbatch_tokens=4 * longest, **settings))
    wanted = config.model
    documents = make_documents(folder / "rows", rows * n_steps, wanted.random_init["vocab_size"], longest)
    torch.manual_seed(config.seed)
    with device:
        model = sft.make_model(config, tokenizer, None, device)
    shard_model(model, device, "target_logps", dtype=dtype, recompute=wanted.activation_checkpointing, compile=wanted.compile)
    load_shards(model, model.weight_files)
    optimizer = sft.make_optimizer(model, config)
    why_not = enable_packing(model, device) if wanted.packing else "model.packing=false"
    assert not (wanted.packing and why_not), why_not
    loader = SFTDataLoader(documents, np.arange(len(documents)), rows, n_examples=len(documents), seed=1,
                           pad_id=tokenizer.pad_token_id, packing=not why_not, microbatch_tokens=wanted.microbatch_tokens)
    model.train()
    return model, optimizer, loader, tokenizer


def train(model, optimizer, loader, device) -> Iterator[tuple[float, dict]]:
    """Takes steps as sft.main does; yields (loss, the last microbatch) after each."""
    sums = Counter()
    for batch in loader:
        batch = sft.to_device(batch, device)
        loss, metrics = sft.get_batch_metrics(model, batch, "train", batch["global_target_count"])
        loss.backward()
        sums.update(metrics)
        if batch["ends_step"]:
            clip_gradients(model.parameters(), 1.0).item()
            means = all_reduce_means(sums)
            sums.clear()
            optimizer.step()
            optimizer.zero_grad()
            yield means["loss/train"], batch


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


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


def time_kernel(args) -> None:
    n, h, v = (256, 64, 1000) if args.small else (8192, 4096, 128256)
    dtype = compute_dtype(torch.device(args.device))
    hidden = torch.randn(n, h, device=args.device, dtype=dtype, requires_grad=True)
    weight = (0.02 * torch.randn(v, h, device=args.device)).to(dtype).requires_grad_()
    labels = torch.randint(v, (n,), device=args.device)

    def fused():
        hidden.grad = weight.grad = None
        (-linear_logps(hidden, weight, labels, uniform=True, fuse=True).sum()).backward()

    runs = candidates(hidden, weight, labels) | {"linear_logps, uniform, fused": fused}
    extra, gradients = {}, (hidden.numel() + weight.numel()) * hidden.element_size()
    for name, run in [*runs.items()]:
        try:
            run()  # compiles
            hidden.grad = weight.grad = None
            extra[name] = peak_extra_memory(run, args.device) - (0 if "limit" in name else gradients)
        except Exception as error:  # one of torch's own may not take the shape
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
            del runs[name]
    seconds = time_interleaved(runs, 9, args.device)
    limit = seconds["three matmuls (the limit)"]
    print(f"N {n}, H {h}, V {v}: the limit is {limit * 1e3:.2f} ms = {6 * n * h * v / limit / 1e12:.3g} TFLOP/s")
    show("forward + backward", "ms", "time / limit", "extra MB")
    for name in runs:
        show(name, f"{seconds[name] * 1e3:.2f}", f"{seconds[name] / limit:.2f}", f"{extra[name] / 1e6:.0f}")


def time_steps(args, way: str) -> None:
    started = time.perf_counter()
    _, _, device = init_processes()
    shape = LLAMA | {"num_hidden_layers": args.layers}
    model, optimizer, loader, _ = make_run(args, device, shape, 9, 30, compute_dtype(device), **WAYS[way])
    flops, peak = count_flops(model), sft.peak_flops(device)
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
    show(way, f"{speed:,.0f}", f"{done / peak:.3f}" if peak else "-", f"{sft.peak_memory(device) / 1e9:.1f}", f"{to_first:.1f}",
         f"{duration:.0f}", f"{max(rates, key=lambda rate: rate[2])[2]:.0f}")
    if wanted:
        print(f"  {sum(places.values())} waits for the GPU in a step of {way}:", flush=True)
        for place, count in places.most_common():
            print(f"  {count:4} at {place}", flush=True)


def compare_bf16(args) -> None:
    _, _, device = init_processes()
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer, loader, _ = make_run(args, device, SMOLLM2, 20, 8, dtype, lr=1e-3)
        losses[dtype] = [loss for loss, _ in train(model, optimizer, loader, device)]
        del model, optimizer
    show("loss of SmolLM2's shape, at step", "fp32", "bf16", "difference")
    fp32, bf16 = losses.values()
    for step in (1, 5, 10, 20):
        show(step, *(f"{value:.5f}" for value in (fp32[step - 1], bf16[step - 1], bf16[step - 1] - fp32[step - 1])))
    step = max(range(20), key=lambda i: abs(fp32[i] - bf16[i]))
    print(f"greatest difference {abs(fp32[step] - bf16[step]):.5f} at step {step + 1}")


def time_storage(args) -> None:
    _, _, device = init_processes()
    model, optimizer, loader, tokenizer = make_run(args, device, LLAMA | {"num_hidden_layers": 2}, 1, 8, compute_dtype(device))
    [*train(model, optimizer, loader, device)]  # fills the optimizer's state
    size = sum(tensor.nbytes for tensor in training_state(model, optimizer).values())
    file, checkpoint, final = (Path(args.folder, name) for name in ("bare", "step-1", "FINAL"))
    show(f"storage, {args.folder}", "GB", "s", "GB/s")

    def timed(name: str, work, folder: Path) -> None:
        for path in [folder, *folder.rglob("*")] if folder.exists() else []:
            with open(path, "rb") if path.is_file() else contextlib.nullcontext() as stream:  # read from the disk, not memory
                if stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        seconds = time.perf_counter() - started
        moved = sum(path.stat().st_size for path in [folder, *folder.rglob("*")] if path.is_file()) / 1e9
        show(name, f"{moved:.3f}", f"{seconds:.2f}", f"{moved / seconds:.2f}")

    def write() -> None:
        block = os.urandom(1 << 26)
        with open(file, "wb") as stream:
            for start in range(0, size, len(block)):
                stream.write(memoryview(block)[:size - start])
            stream.flush()
            os.fsync(stream.fileno())

    def read() -> None:
        block = bytearray(1 << 26)
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(block):
                pass

    timed("bare write", write, file)
    timed("bare read", read, file)
    file.unlink()
    timed("save_checkpoint", lambda: save_checkpoint(checkpoint, model, optimizer, {"step": 1}), checkpoint)
    timed("load_checkpoint", lambda: load_checkpoint(checkpoint, model, optimizer), checkpoint)
    timed("export_model", lambda: sft.export_model(final, model, tokenizer, {}, False, True, None), final)


def resume(args) -> None:
    folder = Path(args.folder, "resume")
    folder.mkdir()
    subprocess.run([sys.executable, ROOT / "make_tiny.py"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", ROOT / "sft.py", "--config",
               ROOT / "configs/tiny.py", "n_examples=3840", "save_every=1280", "n_eval_answers=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the two runs go side by side

    def start(name: str) -> subprocess.Popen:
        with open(folder / f"{name}.log", "a") as log:
            return subprocess.Popen([*command, f"exp_name={name}"], cwd=folder, env=environment, stdout=log, stderr=log)

    def losses(name: str) -> list[float]:
        metrics = folder / ".cache" / name / "metrics.jsonl"
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []  # the last may be half written
        return [record["loss/train"] for record in map(json.loads, lines) if "loss/train" in record]

    undisturbed, killed = start("undisturbed"), start("killed")
    while killed.poll() is None and len(losses("killed")) < 14:  # checkpoints are written after steps 10, 20 and 30
        time.sleep(0.002)
    for member in family(killed.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    killed.wait()
    reached = len(losses("killed"))
    codes = start("killed").wait(), undisturbed.wait()
    for name, code in zip(("killed", "undisturbed"), codes):
        if code:
            raise RuntimeError(f"{name} ended with {code}: {(folder / f'{name}.log').read_text()[-1500:]}")
    said = [line for line in (folder / "killed.log").read_text().splitlines() if line.startswith("resumed after")]
    print(f"killed at step {reached} of 30;", said[-1].rpartition(" from ")[0] if said else "not resumed: the kill came too late",
          flush=True)
    a, b = (torch.tensor(losses(name), dtype=torch.float64) for name in ("undisturbed", "killed"))
    files = [folder / ".cache" / name / "FINAL/model.safetensors" for name in ("undisturbed", "killed")]
    first, second = (file.read_bytes() for file in files)
    if first == second and torch.equal(a, b):
        return print(f"same bits: FINAL/model.safetensors ({len(first):,} bytes) and the losses of {len(a)} steps")
    from safetensors.torch import load_file
    weights = [load_file(file) for file in files]
    greatest = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    print(f"NOT the same bits: the weights differ by up to {greatest:.3g}, the losses by up to "
          f"{(a - b).abs().max().item() if len(a) == len(b) else f'{len(a)} against {len(b)} steps'}")


def work(args) -> None:
    """The process of one part: waits, with its libraries imported, for its turn."""
    turn = sys.stdin.readline()
    if not turn:
        return
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        if turn.strip() == "first":
            print(describe_machine(args.device, compute_dtype(torch.device(args.device))), flush=True)
        if args.task in WAYS:
            time_steps(args, args.task)
        else:
            {"kernel": time_kernel, "bf16": compare_bf16, "storage": time_storage, "resume": resume}[args.task](args)
        sys.stdout.flush()
    except Exception as error:
        traceback.print_exc()
        print(f"{args.task}: FAILED: {type(error).__name__}: {' '.join(str(error).split())[:600]}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=[*WAYS], help="of taking steps")
    parser.add_argument("--layers", type=int, default=8, help="of the model that takes steps")
    parser.add_argument("--minutes", type=float, default=7, help="what has not begun by then is left out")
    parser.add_argument("--folder", help="where to write; a temporary one in it is removed at the end")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        return work(args)

    end = time.monotonic() + 60 * args.minutes
    tasks = [(part, task) for part in PARTS if part in args.parts for task in (args.ways if part == "steps" else [part])]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ  # eight layers nearly fill 80 GB
    environment |= {"HF_HUB_OFFLINE": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {})
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        workers = []
        try:
            for i, (part, task) in enumerate(tasks):
                folder = Path(root, str(i))
                folder.mkdir()
                command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder, "--task", task]
                workers.append((part, task, folder, subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, text=True,
                    stderr=None if os.environ.get("VERBOSE") else open(folder / "stderr", "w"))))
            before, turn = None, "first"
            for part, task, folder, worker in workers:
                left, started = end - time.monotonic(), time.monotonic()
                if left < 10:
                    print(f"{task}: SKIPPED, the {args.minutes:g} minutes are over", flush=True)
                    continue
                if part != before:
                    print(f"\n--- {part}, {60 * args.minutes - left:.0f} s after the start", flush=True)
                    if part == "steps":
                        show("step", "tokens/s", "MFU", "peak GB", "s to first", "ms, median", "ms, slowest")
                before = part
                try:
                    worker.communicate(f"{turn}\n", timeout=min(PARTS[part], left))
                    turn = "next"
                    if worker.returncode:
                        errors = (folder / "stderr").read_text()[-600:] if (folder / "stderr").exists() else ""
                        print(f"{task}: FAILED with exit code {worker.returncode}: {' '.join(errors.split())}", flush=True)
                except subprocess.TimeoutExpired:
                    end_family(worker)
                    print(f"{task}: STOPPED after {time.monotonic() - started:.0f} s", flush=True)
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            for *_, worker in workers:
                end_family(worker)
    print(f"\ndone after {time.monotonic() - end + 60 * args.minutes:.0f} s", flush=True)


def end_family(worker: subprocess.Popen) -> None:
    """Ends a part's process, where it still runs, with all that it has started."""
    if worker.poll() is None:
        for member in family(worker.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        worker.wait()


if __name__ == "__main__":
    main()
