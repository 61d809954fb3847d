"""Supervised fine-tuning of a Hugging Face causal language model: the schedule, the loss, the loop.

    torchrun --nproc_per_node=4 sft.py --config configs/llama.py
    python sft.py --help    # every key of the configuration
"""

from configs.base import Config, read_command_line
from hub import CONTROL_TOKENS, check_access

if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt key answer at once
    config = read_command_line(check_access)

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from chat import ChatEncoder, answer, load_examples, read_questions
from checkpoint import catch_signals, find_start, is_done, load_checkpoint, lock, save_latest, started
from data import IGNORE, SFTDataLoader, step_seed, to_device
from export import export_model
from fsdp_utils import accumulate, all_reduce_means, clip_gradients, init_processes, make_mesh, say, shard_model
from log import Log, count_flops, describe_data, describe_run, describe_start, run
from model_utils import check_model, compute_dtype, fingerprints, load_tokenizer, load_weights, make_model
from trial import check_gradients, in_mode, try_model

# ---------------------------------------------------------------------------------------------------------------------
# The algorithm: what a fork changes


def get_lr(step: int, total_steps: int, warmup: float, peak: float) -> float:
    """The learning rate of step 1, 2, … total_steps: linear to `peak` over the first `warmup` of them, then cosine to 0.

    A pure function of the step, so nothing has to be restored. Loshchilov & Hutter 2017 (SGDR), eq. 5, with one period.
    """
    warmup_steps = max(1, min(round(warmup * total_steps), total_steps - 1))  # the last step is no part of them
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
    Of a mixture of experts it takes the load balancing loss that its configuration asks for, the mean over the step's tokens.
    Metrics are [sum, count] pairs, (2,) float64, to be summed over microbatches and ranks before they are divided:
        loss/{mode}   NLL per target, in nats
        logps/{mode}  log-probability of all targets of an example together
    """
    logps, balance = model.target_logps(batch)
    nll = -logps.sum()
    metrics = {f"loss/{mode}": (nll, len(logps)), f"logps/{mode}": (-nll, batch["n_documents"])}
    metrics = {key: torch.stack([total.detach().double(), torch.full_like(total, count, dtype=torch.float64)])
               for key, (total, count) in metrics.items()}  # filled on the device: the host need not wait
    return nll / global_target_count + balance / batch["global_token_count"], metrics


def make_optimizer(model: nn.Module, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); norms and biases, which have one dimension, do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
              {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps, fused=True)


@torch.no_grad()
def eval_metrics(model: nn.Module, batches: Iterable[dict], device: torch.device) -> dict[str, float]:
    """Returns the exact mean of each metric over the microbatches' rows, on every rank."""
    sums = {}
    with in_mode(model, training=False):
        for batch in tqdm(batches, "evaluating", unit=" microbatches", leave=False, disable=dist.get_rank() > 0):
            accumulate(sums, get_batch_metrics(model, to_device(batch, device), "eval", batch["global_target_count"])[1])
    return all_reduce_means(sums)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def make_encoder(config: Config, run_dir: Path) -> ChatEncoder:
    model, more_tokens = config.model, CONTROL_TOKENS if config.conditional else ()
    name = model.tokenizer_name_or_path or model.name_or_path
    tokenizer = load_tokenizer(name, config.cache_dir, more_tokens, model.chat_template)
    check_model(dataclasses.asdict(model), tokenizer, config.cache_dir)  # before anything is made
    return ChatEncoder(tokenizer, model.max_length, model.max_prompt_length, config.last_answer_only, model.template_kwargs,
                       started(run_dir))


def make_model_and_optimizer(config: Config, encoder: ChatEncoder, longest: int, device: torch.device, latest: Path | None):
    """Returns both, sharded, as they were at the checkpoint, or as the run begins; and whether rows are packed."""
    torch.manual_seed(config.seed)
    model = make_model(config.model, encoder.tokenizer, encoder.stop_ids, config.cache_dir, device)
    shard_model(model, make_mesh(device, config.model.replicas), "target_logps", dtype=compute_dtype(device),
                recompute=config.model.activation_checkpointing, inputs_on_host=config.model.activation_offload,
                compile=config.model.compile, offload=config.model.cpu_offload)
    load_weights(model, frozen_only=bool(latest))
    check_gradients(model, device, filled=config.model.use_peft or not latest)
    optimizer = make_optimizer(model, config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay)
    load_checkpoint(latest, model, optimizer)  # if there is one
    packing = try_model(model, device, longest, config.model.packing)
    return model, optimizer, packing


def main(config: Config) -> None:
    run_dir, settings, batch_size = Path(config.cache_dir, config.exp_name), dataclasses.asdict(config), config.model.batch_size
    encoder = make_encoder(config, run_dir)
    locked = lock(run_dir) if os.environ.get("RANK", "0") == "0" else None  # noqa: F841 (it is held as long as it has a name)
    # Before the processes join: a large data set may take longer to fetch and tokenise than a collective may take.
    train, held_out, data_id = load_examples(encoder, config.datasets, config.eval_datasets, config.eval_fraction,
                                             "conditional" * config.conditional, config.seed, config.cache_dir,
                                             config.max_bad_rows)
    n_examples, eval_ids = config.n_examples or config.n_epochs * len(train.ids), held_out.ids[:config.n_eval_examples]
    questions = read_questions(encoder, held_out.rows, eval_ids[:config.n_eval_answers])
    facts = {"config": settings, "data": data_id, "base": fingerprints(settings["model"], config.cache_dir)}
    rank, world_size, device = init_processes(config.timeout_minutes)
    latest, at = find_start(run_dir, config.model.from_checkpoint, facts, n_examples, config.allow_changes, config.keep_last)
    if at.counter == n_examples and is_done(run_dir / "FINAL", at.counter):
        return say(f"finished already: {run_dir / 'FINAL'}; delete {run_dir} to train it anew")
    model, optimizer, packing = make_model_and_optimizer(config, encoder, max(train.longest, held_out.longest), device, latest)
    loader = SFTDataLoader(*train, n_examples, config.seed, config.model.gradient_accumulation_steps, batch_size=batch_size,
                           pad_id=encoder.tokenizer.pad_token_id, packing=packing, rank=rank,
                           world_size=world_size, microbatch_tokens=max(config.model.microbatch_tokens, config.model.max_length))
    eval_loader = loader.over(held_out.rows, eval_ids)
    n_steps = at.step + math.ceil((n_examples - at.counter) / batch_size)
    say(describe_data(encoder.tokenizer, train, held_out, run_dir),
        describe_run(n_examples, n_steps, len(eval_ids), len(held_out.ids), model, packing, latest), describe_start())
    log = Log(run_dir, latest, at.counter, n_examples, device, count_flops(model), settings)
    answers, first, last, must_end = {}, at.step, None, catch_signals()
    with contextlib.closing(log):
        while True:  # saving and evaluating stand at the top, so that start, middle, end and resume are one case
            stop = at.step < n_steps and must_end()
            if at.step > first and at.may_be_saved(n_examples) and (stop or at.is_due(config.save_every, n_examples, batch_size)):
                with log.pause("saving"):
                    if last is not None:  # its first microbatch: of the others some may be empty, on every rank
                        at.check_loss(eval_metrics(model, [next(loader.microbatches(last))], device)["loss/eval"], latest)
                    latest = save_latest(run_dir, vars(at) | facts, model, optimizer, latest, config.keep_last,
                                         config.stop_if_save_fails)
            if stop:
                return say(f"stopped by a signal after step {at.step}; the same command goes on from {latest or 'the start'}")
            if at.is_due(config.eval_every, n_examples, batch_size):
                with log.pause("evaluating"):
                    if len(eval_ids) and (at.step or config.do_first_eval):
                        log.add_evaluation(at.step, at.counter, eval_metrics(model, eval_loader, device))
                        if at.step in (0, n_steps):
                            answers[at.step] = answer(model, encoder, questions)
                    if config.intermediate_checkpoints and 0 < at.step < n_steps:
                        export_model(run_dir / f"step-{at.step}", model, encoder.tokenizer, n_steps, log.last, settings)
            if at.step == n_steps:
                break
            torch.manual_seed(step_seed(config.seed, at.step, rank))
            sums, lr = {}, get_lr(at.step + 1, n_steps, config.warmup, config.lr)
            for i, batch in enumerate(loader.microbatches(at.counter), 1):
                if stop := i > 1 and must_end():
                    break
                model.set_requires_all_reduce(i == batch["n_microbatches"])  # over replicas gradients are summed once a step
                loss, metrics = get_batch_metrics(model, to_device(batch, device), "train", batch["global_target_count"])
                loss.backward()
                accumulate(sums, metrics)
                log.add_microbatch(batch)
            if stop:  # a step may take longer than there is time: what is computed of it is dropped
                optimizer.zero_grad()
                continue
            for group in optimizer.param_groups:
                group["lr"] = lr
            grad_norm = clip_gradients(model.parameters(), config.model.max_grad_norm).item()
            means = all_reduce_means(sums)
            skipped = not (math.isfinite(grad_norm) and math.isfinite(means["loss/train"]))  # the same on every rank
            if not skipped:
                optimizer.step()
                last = at.counter
            optimizer.zero_grad()
            at.advance(batch["n_examples"], skipped)
            log.add_step(at.step, at.counter, at.skipped_steps, lr, grad_norm, means, batch)
            at.check_skips(config.max_skipped_steps, latest, loader, batch["n_examples"])
        export_model(run_dir / "FINAL", model, encoder.tokenizer, n_steps, log.last, settings, merged=True, checkpoint=latest)
    say(log.summary(questions, answers, run_dir / "FINAL"))


if __name__ == "__main__":
    run(main, config)
