"""Supervised fine-tuning of a Hugging Face causal language model: the schedule, the loss, the loop.

    torchrun --nproc_per_node=4 sft.py --config configs/llama.py datasets=[chats.jsonl] exp_name=llama3-8B-sft
    python sft.py --help    # every key of the configuration
"""

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from configs.base import Config, ConfigError, changes, load_config, usage


def fail(error: Exception, end: Callable[[str], NoReturn] = sys.exit) -> NoReturn:
    """Ends this process with one line. The first rank of a machine says it, and torchrun ends the others, who find it too."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(60)
    end(f"sft.py: {error}")


if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt key answer at once
    if {"--help", "-h"} & set(sys.argv):
        sys.exit(print(usage()))
    try:
        config = load_config(sys.argv[1:], int(os.environ.get("WORLD_SIZE", 1)))
    except ConfigError as error:
        fail(error)

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tokenizers import AddedToken
from torch import nn
from tqdm import tqdm

from data import (
    IGNORE,
    ChatEncoder,
    DataError,
    SFTDataLoader,
    TokenisedRows,
    list_files,
    pad_left,
    split_rows,
    to_messages,
    tokenise,
)
from fsdp_utils import (
    CheckpointError,
    ShardingError,
    all_reduce_means,
    clip_gradients,
    end_process,
    find_checkpoint,
    init_processes,
    list_checkpoints,
    load_checkpoint,
    load_shards,
    lock,
    make_anew,
    on_first_rank,
    prune_checkpoints,
    replace,
    save_checkpoint,
    shard_model,
    write_gathered,
)
from hub import CONTROL_TOKENS, SOURCES, HubError, fetch, mix, parse_weight
from model_utils import (
    ModelError,
    add_lora,
    balance_weight,
    check_head,
    compute_dtype,
    count_flops,
    enable_packing,
    load_adapter,
    load_model,
    load_tokenizer,
    merge_lora,
    save_adapter,
    save_model,
)

# ---------------------------------------------------------------------------------------------------------------------
# The algorithm: what a fork changes


def get_lr(step: int, total_steps: int, warmup: float, peak: float) -> float:
    """The learning rate of step 1, 2, … total_steps: linear to `peak` over the first `warmup` of them, then cosine to 0.

    A pure function of the step, so nothing has to be restored. Loshchilov & Hutter 2017 (SGDR), eq. 5, with one period.
    """
    warmup_steps = max(1, min(round(warmup * total_steps), total_steps - 1))  # the last step is left to the cosine
    if step <= warmup_steps:
        return peak * (step / warmup_steps)  # exactly the peak at its end
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def get_batch_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns log p(token | the tokens before it), (B, T - 1) fp32: of labels[:, 1:], and 0 where that is IGNORE.

    The definition, from whole logits. Training computes the same numbers by model.target_logps, which makes no logits.
    logits (B, T, V) of any float type; labels (B, T) int64, not shifted, IGNORE (-100) where a token is no target.
    """
    logits, labels = logits[:, :-1].float(), labels[:, 1:]  # the logits at a token predict the next one
    targets = labels != IGNORE
    logps = logits.log_softmax(-1).gather(-1, labels.where(targets, 0).unsqueeze(-1)).squeeze(-1)
    return logps.where(targets, 0.0)


def get_batch_metrics(model: nn.Module, batch: dict, mode: str, global_target_count: int) -> tuple[torch.Tensor, dict]:
    """Returns (loss, metrics) of a microbatch.

    The loss is this microbatch's share of the step's: its NLL over the targets of the *whole* step, all ranks and
    microbatches. So gradients are summed, never averaged, and come out the same however the step is cut up.
    Where the configuration of a mixture of experts sets output_router_logits, router_aux_loss_coef times the load balancing
    loss is added, the mean of the documents' weighted by their tokens.
    Metrics are [sum, count] pairs, float64, to be summed over microbatches and ranks before they are divided:
        loss/{mode}   NLL per target, in nats
        logps/{mode}  log-probability of all targets of an example together
        balance/{mode}  that load balancing loss, of a token
    """
    arguments = (batch["target_combined_input_ids"], batch["target_labels"], batch["target_positions"],
                 batch["target_combined_attention_mask"], batch["position_ids"], batch["document_ends"], batch["longest"])
    weight = balance_weight(model)
    logps, balance = model.target_logps(*arguments, balance=True) if weight else (model.target_logps(*arguments), None)
    nll = -logps.sum()
    metrics = {f"loss/{mode}": (nll, len(logps)), f"logps/{mode}": (-nll, batch["n_documents"])}
    loss = nll / global_target_count
    if weight:
        real = min(1, batch["n_documents"])  # a rank without a row computes one token for company
        metrics[f"balance/{mode}"] = (real * balance, real * int(batch["target_combined_attention_mask"].sum()))
        loss = loss + weight * real * balance / batch["global_token_count"]
    metrics = {key: torch.stack([total.detach().double(), total.new_tensor(count, dtype=torch.float64)])
               for key, (total, count) in metrics.items()}
    return loss, metrics


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); norms and biases, which have one dimension, do not decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": config.weight_decay},
              {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr,
                             betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


# ---------------------------------------------------------------------------------------------------------------------
# The run


STATE = ("step", "counter", "skipped_steps", "skipped_in_a_row")  # what a checkpoint says of the run, all 0 at its start


class TrainingError(Exception):
    """A run that can't go on, in one line."""


def main(config: Config) -> None:
    run_dir = Path(config.cache_dir, config.exp_name)
    if os.environ.get("RANK", "0") == "0":
        locked = lock(run_dir)  # noqa: F841 (it is held for as long as there is this variable)
    tokenizer = load_tokenizer(config.model.tokenizer_name_or_path or config.model.name_or_path, config.cache_dir)
    if config.conditional:  # a token each, but not special ones, of which a text must not hold any
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in CONTROL_TOKENS])
    encoder = ChatEncoder(tokenizer, config.model.max_length, config.model.max_prompt_length)
    # Before the processes join: a large data set may take longer to fetch and tokenise than a collective may take.
    entries = [parse_weight(entry) for entry in config.datasets]
    paths = [fetch(name, "train", config.cache_dir, config.conditional) for name, _ in entries]
    rows = tokenise(paths, encoder, config.cache_dir)
    train_ids, eval_ids = split_rows(len(rows), config.eval_fraction, config.seed)
    weights = np.repeat([weight for _, weight in entries], [len(list_files([path])) for path in paths])
    train_ids = mix(train_ids, weights, rows.file_of, config.seed)  # after the split: no held-out row is trained on
    eval_rows = rows
    named = [name for name, _ in entries if name in SOURCES and "test" in SOURCES[name].splits]
    if eval_entries := config.eval_datasets or ([] if config.eval_fraction else named):
        paths = [fetch(name, "test", config.cache_dir, config.conditional) for name in eval_entries]
        eval_rows = tokenise(paths, encoder, config.cache_dir)
        eval_ids = np.arange(len(eval_rows))
    data = " ".join([rows.identity, *(f"*{weight:g}" for weight in weights)])  # what a resumed run must find again
    n_held_out, eval_ids = len(eval_ids), eval_ids[:config.n_eval_examples]
    n_examples = config.n_examples or config.n_epochs * len(train_ids)

    rank, world_size, device = init_processes(config.timeout_minutes)
    if rank:
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
    start, state = find_start(config, run_dir, data, n_examples)
    step, counter, skipped, skipped_in_a_row = (state[key] for key in STATE)
    if start and counter == n_examples and is_final(run_dir / "FINAL", counter):
        return print(f"finished already: {run_dir / 'FINAL'}; delete {run_dir} to train it anew") if rank == 0 else None
    torch.manual_seed(config.seed)
    model = make_model(config, tokenizer, encoder.stop_id, device)
    shard_model(model, device, "target_logps", dtype=compute_dtype(device), recompute=config.model.activation_checkpointing,
                compile=config.model.compile, cpu_offload=config.model.cpu_offload, replicas=config.model.replicas)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    load_shards(model, {name: place for name, place in model.weight_files.items() if not (start and name in trained)})
    optimizer = make_optimizer(model, config)
    if start:
        load_checkpoint(start, model, optimizer)

    check_head(model, device)  # after the optimizer is made: a forward leaves some weights gathered
    own_attention = model.config._attn_implementation
    why_not = enable_packing(model, device) if config.model.packing else "model.packing=false"
    deal = {"batch_size": config.model.batch_size, "pad_id": tokenizer.pad_token_id, "packing": not why_not,
            "microbatch_tokens": max(config.model.microbatch_tokens, config.model.max_length), "rank": rank,
            "world_size": world_size}
    loader = SFTDataLoader(rows, train_ids, n_examples=n_examples, seed=config.seed, start=counter,
                           accumulation=config.model.gradient_accumulation_steps, **deal)
    eval_loader = SFTDataLoader(eval_rows, eval_ids, n_examples=len(eval_ids), seed=None, **deal)
    n_steps = step + loader.n_steps
    if rank == 0:
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        n_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        print(show_example(tokenizer, *rows[train_ids[0]]))
        print(f"train: {describe(rows.counts)}; {n_examples} examples = {n_steps} steps of {config.model.batch_size}")
        print(f"eval: {len(eval_ids)} of {n_held_out} held-out rows; model: {n_parameters / 1e6:.1f}M parameters, "
              f"{n_trained / 1e6:.1f}M trained, on {world_size} x {device.type}")
        print("batches: " + (f"padded, since {why_not}" if why_not else "packed"))
        if start:
            print(f"resumed after step {step} from {start}")
    log = Log(config, run_dir, start, step, n_steps, rank, device, count_flops(model))
    answers = {}  # "before" and "after" → graded answers to held-out prompts

    def evaluate(when: str | None = None) -> None:
        if not len(eval_ids):
            return
        with log.pause("evaluating"):
            log.add({"step": step, "counter": counter, **eval_metrics(model, eval_loader, device)})
            if when and config.n_eval_answers:
                packed_attention = model.config._attn_implementation
                model.set_attn_implementation(own_attention)  # the packed one knows no cache
                answers[when] = answer_prompts(model, encoder, eval_rows, eval_ids[:config.n_eval_answers], device)
                model.set_attn_implementation(packed_attention)

    def evaluate_if_due() -> None:
        if 0 < step < n_steps and is_due(config.eval_every):
            evaluate()
            if config.intermediate_checkpoints:
                export(f"step-{step}", whole=not config.model.use_peft)

    def is_due(every: int) -> bool:
        return counter // every > (counter - config.model.batch_size) // every

    def save(latest: Path | None) -> Path | None:
        """Writes a checkpoint and returns it, or, where it can't be written and the run is to go on, the one before it."""
        folder = run_dir / "checkpoints" / f"step-{step}"
        state = dict(zip(STATE, (step, counter, skipped, skipped_in_a_row)))
        try:
            with log.pause("saving"):
                save_checkpoint(folder, model, optimizer, {**state, "config": dataclasses.asdict(config), "data": data},
                                run_dir / "metrics.jsonl")
        except CheckpointError as error:
            if config.stop_if_save_fails:
                raise CheckpointError(f"{error}; the last whole checkpoint: {latest}") from error
            log.say(f"warning: {error}; the run goes on")
            return latest
        prune_checkpoints(folder, config.keep_last)
        return folder

    def export(name: str, whole: bool, checkpoint: Path | None = None) -> None:
        scheduler = {"step": step, "total_steps": n_steps, "warmup": config.warmup, "lr": config.lr}
        texts = {"metrics.json": log.last, "scheduler.json": scheduler, "sft_config.json": dataclasses.asdict(config)}
        with log.pause("exporting"):
            export_model(run_dir / name, model, tokenizer, texts, config.model.use_peft, whole, checkpoint)

    model.train()
    if start:
        evaluate_if_due()  # a checkpoint is written before the evaluation at its step
    elif config.do_first_eval:
        evaluate("before")
    latest, sums = start, Counter()
    with contextlib.closing(log), caught_signals() as signals:
        for batch in loader:
            if not sums:  # what a step draws at random follows from seed, step and rank, so that a resumed run draws it too
                torch.manual_seed(int(np.random.SeedSequence([config.seed, step, rank]).generate_state(1, np.uint64)[0]))
            batch = to_device(batch, device)
            loss, metrics = get_batch_metrics(model, batch, "train", batch["global_target_count"])
            loss.backward()
            sums.update(metrics)
            if not batch["ends_step"]:
                continue
            step, counter = step + 1, counter + batch["n_examples"]
            lr = get_lr(step, n_steps, config.warmup, config.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            grad_norm = clip_gradients(model.parameters(), config.model.max_grad_norm).item()
            sums["signals"] = torch.tensor([len(signals), 1], dtype=torch.float64, device=device)
            means = all_reduce_means(sums)
            sums.clear()
            stop = means.pop("signals") > 0 and step < n_steps
            if math.isfinite(grad_norm) and math.isfinite(means["loss/train"]):  # the same on every rank
                optimizer.step()
                skipped_in_a_row = 0
            else:
                skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            optimizer.zero_grad()
            record = {"step": step, "counter": counter, "lr": lr, "grad_norm": grad_norm, **means, "skipped_steps": skipped}
            log.add_step(record, batch)
            if skipped_in_a_row == config.max_skipped_steps:
                places = [rows.where(row) for row in loader.rows_at(counter - batch["n_examples"], counter)]
                raise TrainingError(f"step {step}: the loss or the gradient is not finite, {skipped_in_a_row} steps in a row; "
                                    f"the last good checkpoint: {latest}; the step's rows: {', '.join(sorted(places))}")
            if stop or step == n_steps or is_due(config.save_every):
                latest = save(latest)
            if stop:
                return log.say(f"stopped by a signal after step {step}; the same command goes on from {latest}")
            evaluate_if_due()
        evaluate("after")
        export("FINAL", whole=True, checkpoint=latest if latest and latest.name == f"step-{step}" else None)
    if rank == 0:
        print(log.summary())
        if answers:
            print(show_answers(answers))
        print(f"saved to {run_dir / 'FINAL'}: AutoModelForCausalLM.from_pretrained({str(run_dir / 'FINAL')!r})")


def find_start(config: Config, run_dir: Path, data: str, n_examples: int) -> tuple[Path | None, dict]:
    """Returns the checkpoint to go on from and its state: the run's own, or else model.from_checkpoint's; or (None, zeros).

    All ranks must call it. Raises CheckpointError where it does not belong to this run.
    """
    def warn(text: str) -> None:
        if dist.get_rank() == 0:
            print(text, file=sys.stderr)

    given, own = config.model.from_checkpoint, list_checkpoints(run_dir)
    if given and own and Path(given).resolve().is_relative_to(run_dir.resolve()):
        raise CheckpointError(f"model.from_checkpoint={given} is this run's own, which goes on from its last one by itself; "
                              "to go back to an earlier one delete those after it")
    candidates = own or (list_checkpoints(Path(given)) if given else [])
    found = find_checkpoint(candidates, warn)
    if not found:
        if given or own:
            raise CheckpointError(f"{run_dir if own else given}: there is no whole checkpoint" +
                                  ("; delete the folder to begin anew" if own else ""))
        return None, dict.fromkeys(STATE, 0)
    folder, state = found
    different = changes(state["config"], config)
    if state["data"] != data:
        different.append("the rows: other files or weights, or tokenised by another tokenizer or version")
    if different and not config.allow_changes:
        raise CheckpointError(f"{folder}: this run began differently: {'; '.join(different)}. Go back to that, choose another "
                              "exp_name, or set allow_changes=true")
    if state["counter"] > n_examples:
        raise CheckpointError(f"{folder}: {state['counter']} examples are trained already, more than the {n_examples} asked for")
    return folder, state


def is_final(folder: Path, counter: int) -> bool:
    try:
        return json.loads((folder / "metrics.json").read_text())["counter"] == counter
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Yields a list to which SIGTERM and SIGINT are added, instead of ending the process."""
    caught, numbers = [], (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def export_model(folder: Path, model, tokenizer, texts: dict[str, dict], adapter: bool, whole: bool,
                 checkpoint: Path | None) -> None:
    """Writes a folder for transformers and PEFT: the adapter, if there is one, the whole model, if asked, the tokenizer, texts
    as JSON, and a checkpoint. All ranks must call it; raises CheckpointError on all."""
    partial = folder.with_name(f"{folder.name}.partial")

    def finish() -> None:
        tokenizer.save_pretrained(partial)
        for file, content in texts.items():
            (partial / file).write_text(json.dumps(content, indent=2))
        if checkpoint:
            shutil.copytree(checkpoint, partial / "checkpoint", copy_function=link_or_copy)
        replace(folder, partial)

    try:
        on_first_rank(lambda: make_anew(partial))
        if adapter:
            write_gathered(model, lambda parts: save_adapter(partial / "adapter", model, next(parts)), trained_only=True)
        if whole:
            write_gathered(model, lambda parts: save_model(partial, model, (merge_lora(model, part) for part in parts)), 5e9)
        on_first_rank(finish)
    except CheckpointError as error:
        on_first_rank(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise CheckpointError(f"{folder}: can't be written: {error}") from error


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)  # takes no room, and lasts when the source is deleted
    except OSError:
        shutil.copy2(source, target)


def make_model(config: Config, tokenizer, stop_id: int, device: torch.device):
    """Returns the model to train, before it is sharded and filled, with adapters where they are what is trained."""
    wanted, peft = config.model, config.model.peft
    # A frozen base is kept in the precision it computes in; what is trained is fp32 in any case.
    dtype = compute_dtype(device) if wanted.use_peft else torch.float32
    model = load_model(wanted.load_from or wanted.name_or_path, None if wanted.load_from else wanted.random_init, tokenizer,
                       stop_id, config.cache_dir, dtype, fuse=wanted.compile and device.type == "cuda", sliced=True)
    if wanted.use_peft:
        if wanted.load_lora_from:
            load_adapter(wanted.load_lora_from, model, peft.lora_dropout, model.has_new_tokens)
        else:
            add_lora(model, peft.lora_r, peft.lora_alpha, peft.lora_dropout, peft.target_modules, peft.use_rslora,
                     model.has_new_tokens)
    return model


def to_device(batch: dict, device: torch.device) -> dict:
    return {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()}


@torch.no_grad()
def eval_metrics(model: nn.Module, loader: SFTDataLoader, device: torch.device) -> dict[str, float]:
    """Returns the exact mean of each metric over the loader's rows, on every rank."""
    model.eval()
    sums = Counter()
    with tqdm(total=loader.n_examples, desc="evaluating", unit=" rows", leave=False, disable=dist.get_rank() > 0) as bar:
        for batch in loader:
            _, metrics = get_batch_metrics(model, to_device(batch, device), "eval", batch["global_target_count"])
            sums.update(metrics)
            bar.update(batch["n_examples"] * batch["ends_step"])
    model.train()
    return all_reduce_means(sums)


# ---------------------------------------------------------------------------------------------------------------------
# What is logged and shown


class WandbTracker:
    """Weights & Biases, which sends from a process of its own; where its server does not answer it logs to the disk."""

    def __init__(self, config: Config, run_dir: Path):
        import wandb
        settings = {"project": config.wandb.project, "name": config.exp_name, "dir": run_dir, "resume": "allow",
                    "config": dataclasses.asdict(config), "id": hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]}
        try:
            self.run = wandb.init(**settings, settings=wandb.Settings(init_timeout=15))
        except wandb.Error as error:
            print(f"warning: W&B can't be reached, so it logs to {run_dir}/wandb, for `wandb sync`: {error}", file=sys.stderr)
            wandb.teardown()  # else the id is taken by the attempt
            self.run = wandb.init(**settings, mode="offline")

    def log(self, record: dict) -> None:
        self.run.log(record, step=record["counter"])

    def close(self) -> None:
        self.run.finish()


class TensorBoardTracker:
    def __init__(self, config: Config, run_dir: Path):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(run_dir / "tensorboard")

    def log(self, record: dict) -> None:
        for key, value in record.items():
            if value is not None:
                self.writer.add_scalar(key, value, record["counter"])

    def close(self) -> None:
        self.writer.close()


class Log:
    """metrics.jsonl, the progress bar and the trackers that are asked for, written by rank 0."""

    def __init__(self, config: Config, run_dir: Path, start: Path | None, step: int, n_steps: int, rank: int,
                 device: torch.device, flops: tuple[float, float, float]):
        self.rank, self.device, self.records, self.last = rank, device, [], {}
        self.flops, self.peak_flops = flops, peak_flops(device)
        self.clock = self.started = time.perf_counter()
        if rank == 0:
            lines = (start / "metrics.jsonl").read_text() if start else ""  # what came after it is trained and logged again
            (run_dir / "metrics.jsonl").write_text(lines)
            for line in lines.splitlines():
                self.records.append(json.loads(line))
                self.last |= self.records[-1]
            self.file = open(run_dir / "metrics.jsonl", "a")
            self.bar = tqdm(total=n_steps, initial=step, unit="step", desc="training")
            wanted = {WandbTracker: config.wandb.enabled, TensorBoardTracker: config.tensorboard}
            self.trackers = [tracker(config, run_dir) for tracker in wanted if wanted[tracker]]

    def add_step(self, record: dict, batch: dict) -> None:
        """batch: the step's last, for the counts of the whole step."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        record |= {"target_fraction": batch["global_target_count"] / batch["global_token_count"],
                   "tokens_per_second": batch["global_token_count"] / seconds,
                   "examples_per_second": batch["n_examples"] / seconds,
                   "peak_memory_gb": peak_memory(self.device) / 1e9}
        if self.peak_flops:
            counts = batch["global_token_count"], batch["global_target_count"], batch["global_squared_lengths"]
            needed = sum(count * flops for count, flops in zip(counts, self.flops))
            record["mfu"] = needed / seconds / (dist.get_world_size() * self.peak_flops)
        self.write(record)
        if self.rank == 0:
            speed = f"{record['tokens_per_second']:,.0f} tokens/s"
            self.bar.set_postfix_str(f"loss {record['loss/train']:.3f}, {speed}", refresh=False)
            self.bar.update()

    def add(self, record: dict) -> None:
        """Writes an evaluation."""
        self.write(record)
        self.say(f"step {record['step']}: held-out loss {record['loss/eval']:.4f}")

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Says on the progress bar what is done between two steps, and keeps its time out of the second's."""
        if self.rank == 0:
            self.bar.set_description(what)
        try:
            yield
        finally:  # a run may go on where it can't save
            if self.rank == 0:
                self.bar.set_description("training")
            self.clock = time.perf_counter()

    def say(self, text: str) -> None:
        if self.rank == 0:
            self.bar.write(text)

    def write(self, record: dict) -> None:
        record = {key: value if math.isfinite(value) else None for key, value in record.items()}  # JSON has no other number
        self.last |= record
        self.records.append(record)
        if self.rank == 0:
            print(json.dumps(record), file=self.file, flush=True)
            for tracker in self.trackers:
                tracker.log(record)

    def close(self) -> None:
        if self.rank == 0:
            self.bar.close()
            self.file.close()
            for tracker in self.trackers:
                tracker.close()

    def summary(self) -> str:
        steps = [record for record in self.records if record.get("loss/train") is not None]
        evals = [record["loss/eval"] for record in self.records if "loss/eval" in record]
        lines = [f"{self.last['step']} steps, {time.perf_counter() - self.started:.0f} s since the start, "
                 f"peak memory {self.last.get('peak_memory_gb', 0):.1f} GB"]
        if steps:
            lines += [f"loss/train {steps[0]['loss/train']:.4f} → {steps[-1]['loss/train']:.4f}",
                      plot([record["loss/train"] for record in steps])]
        if evals:
            lines.append(f"loss/eval {evals[0]:.4f} → {evals[-1]:.4f}")
        return "\n".join(lines)


def peak_memory(device: torch.device) -> int:
    """Returns bytes: the most the device's tensors have held at once, or on a CPU the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device) -> float | None:
    """Returns the device's dense bf16 FLOP/s as its maker states them, None where this table does not know it."""
    peaks = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12, "L40S": 362e12}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in peaks.items() if key in name), None)


def plot(values: list[float], width: int = 72, height: int = 10) -> str:
    """Draws a curve in text; each column is the mean of its share of the values."""
    columns = [float(np.mean(part)) for part in np.array_split(values, min(width, len(values)))]
    low, high = min(columns), max(columns)
    rows = [round((value - low) / ((high - low) or 1) * (height - 1)) for value in columns]
    lines = []
    for row in reversed(range(height)):
        label = {height - 1: f"{high:.3f}", 0: f"{low:.3f}"}.get(row, "")
        lines.append(f"{label:>8} │" + "".join("•" if at == row else " " for at in rows))
    return "\n".join([*lines, " " * 9 + "└" + "─" * len(columns)])


def describe(counts: dict) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def show_example(tokenizer, ids: np.ndarray, trained: np.ndarray) -> str:
    """Returns the row's text with its targets in green, or in ⟦brackets⟧ where the output is not a terminal."""
    before, after = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    parts = []
    for is_target, group in itertools.groupby(zip(ids.tolist(), trained.tolist()), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group])
        parts.append(f"{before}{text}{after}" if is_target else text)
    return "--- an example; what is trained is marked\n" + "".join(parts) + "\n---"


@torch.no_grad()
def answer_prompts(model: nn.Module, encoder: ChatEncoder, rows: TokenisedRows, indices: np.ndarray,
                   device: torch.device) -> list[dict]:
    """Answers the last question of each row greedily; returns [{"skill", "prompt", "expected", "answer"}] on every rank.

    A row of the files may name its "skill", by which the answers are then scored.
    """
    tokenizer, rank, world_size = encoder.tokenizer, dist.get_rank(), dist.get_world_size()
    results, prompts = [], []
    for index in indices[rank::world_size]:
        row = rows.source(index)
        *conversation, last = to_messages(row)
        prompts.append(encoder.ids(encoder.render(encoder.fold_system(conversation), for_answer=True)))
        results.append({"skill": row.get("skill", "all"), "prompt": conversation[-1]["content"], "expected": last["content"]})
    ids, mask = pad_left(prompts or [[tokenizer.pad_token_id]], tokenizer.pad_token_id)
    model.eval()  # a rank that has finished goes on with the others: generate gathers the weights for every token
    output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=False, temperature=None,
                            top_p=None, top_k=None, synced_gpus=world_size > 1,
                            max_new_tokens=min(256, encoder.max_length - encoder.max_prompt_length))
    model.train()
    for result, generated in zip(results, output[:, ids.shape[1]:]):
        result["answer"] = tokenizer.decode(generated, skip_special_tokens=True)
    everyone = [None] * world_size
    dist.all_gather_object(everyone, results)
    return [result for results in everyone for result in results]


def show_answers(answers: dict[str, list[dict]], n_samples: int = 8) -> str:
    """Returns a few of the last answers, and the part that is exactly right by skill, before and after."""
    lines = ["--- held-out prompts, answered after training"]
    samples = {result["skill"]: result for result in reversed(answers["after"])}
    for result in [*samples.values()][:n_samples] if len(samples) > 1 else answers["after"][:n_samples]:
        sign = "✓" if is_right(result) else f"✗ (expected {result['expected']!r})"
        lines.append(f"{result['prompt']} → {result['answer']} {sign}")
    lines.append(f"--- exactly right, in %{'':9}" + "".join(f"{when:>8}" for when in answers))
    for skill in [*sorted(samples), "all"] if "all" not in samples else ["all"]:
        rights = [[is_right(result) for result in results if skill in (result["skill"], "all")] for results in answers.values()]
        lines.append(f"{skill:<30}" + "".join(f"{100 * sum(right) / len(right):8.0f}" for right in rights))
    return "\n".join(lines)


def is_right(result: dict) -> bool:
    return result["answer"].strip() == result["expected"].strip()


if __name__ == "__main__":
    try:
        main(config)
    except (DataError, HubError, ModelError, ShardingError, CheckpointError, TrainingError) as error:
        fail(error, end_process)
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        end_process(f"sft.py: rank {os.environ.get('RANK', 0)}: another rank has ended, or has not answered for "
                    f"{config.timeout_minutes} minutes: {' '.join(str(error).split())[:200]}")
    end_process()
