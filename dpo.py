"""Direct preference optimisation of a Hugging Face causal language model, from where SFT has ended: the loss, the loop.

    torchrun --nproc_per_node=4 dpo.py --config configs/dpo_llama.py datasets=[ultrabin]
    python dpo.py --help    # every key of the configuration

A row is a pair: what is asked, a chosen answer and a rejected one. Rafailov et al. 2023, "Direct Preference Optimization".
"""

from configs.base import DPOConfig, read_command_line
from hub import check_access

if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt key answer at once
    config = read_command_line(check_access, DPOConfig)

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import tqdm

from chat import ChatEncoder, answer, load_examples, read_questions
from checkpoint import catch_signals, checksum, find_start, is_done, kept, load_checkpoint, lock, save_latest, started
from data import SFTDataLoader, step_seed, to_device
from export import export_model
from fsdp_utils import accumulate, all_reduce_means, clip_gradients, init_processes, make_mesh, say, shard_model
from log import Log, count_flops, describe_data, describe_run, describe_start, run
from model_utils import check_model, compute_dtype, fingerprints, load_tokenizer, load_weights, make_model
from rows import to_pair
from trial import can_share_context, check_gradients, in_mode, try_model

# ---------------------------------------------------------------------------------------------------------------------
# The algorithm: what a fork changes


def get_lr(step: int, total_steps: int, warmup: float, peak: float) -> float:
    """The learning rate of step 1, 2, … total_steps: linear to `peak` over the first `warmup` of them, then cosine to 0."""
    warmup_steps = max(1, min(round(warmup * total_steps), total_steps - 1))
    if step <= warmup_steps:
        return peak * (step / warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))))


def preference_loss(policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor, beta: float,
                    label_smoothing: float = 0.0, loss: str = "sigmoid") -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (losses, margins), (P,), of P pairs: a margin is the chosen answer's reward less the rejected one's.

    policy, reference (P, 2) are log p(answer) of the chosen and the rejected one, lengths (P, 2) their tokens. An answer's reward
    is beta * log(policy / reference), Rafailov et al. 2023, section 4. The loss is one of
        sigmoid  -log sigmoid(margin), eq. 7; where a part `label_smoothing` of the pairs may be mixed up, with so much of the
                 loss of the pair turned round, and so much less of its own (Mitchell 2023, "conservative DPO")
        ipo      (h - 1 / (2 beta))², Azar et al. 2023, eq. 17; h is the difference of log(policy / reference) per token
    """
    ratios = policy - reference
    margins = beta * (ratios[:, 0] - ratios[:, 1])
    if loss == "ipo":
        per_token = ratios / lengths
        return (per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)).square(), margins
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins), margins


def answer_logps(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Returns (log p(answer | what is asked) of each pair's chosen and rejected one, (P, 2) fp32; target_logps' second)."""
    logps, balance = model.target_logps(batch, uniform=False)  # each answer weighs otherwise in the loss
    sums = logps.new_zeros(batch["n_documents"]).index_add(0, batch["target_documents"], logps)
    return sums.view(batch["n_documents"] // 2, 2), balance


def get_batch_metrics(model: nn.Module, batch: dict, mode: str, config: DPOConfig) -> tuple[torch.Tensor, dict]:
    """Returns (loss, metrics) of a microbatch of pairs.

    The loss is this microbatch's share of the step's: its pairs' losses over the pairs of the *whole* step, all ranks and
    microbatches. So gradients are summed, never averaged, and come out the same however the step is cut up.
    Metrics are [sum, count] pairs, (2,) float64, to be summed over microbatches and ranks before they are divided:
        loss/{mode}, margin/{mode}, accuracy/{mode}   means over pairs; the last is how many margins are above 0
        reward/{mode}/chosen, logps/{mode}/chosen     means over the chosen answers; and likewise of the rejected ones
    """
    policy, balance = answer_logps(model, batch)
    reference, lengths = batch["reference"].view_as(policy), batch["n_targets"].view_as(policy)
    losses, margins = preference_loss(policy, reference, lengths, config.beta, config.label_smoothing, config.loss)
    rewards = config.beta * (policy - reference)
    values = {f"loss/{mode}": losses, f"margin/{mode}": margins, f"accuracy/{mode}": margins > 0,
              f"reward/{mode}/chosen": rewards[:, 0], f"reward/{mode}/rejected": rewards[:, 1],
              f"logps/{mode}/chosen": policy[:, 0], f"logps/{mode}/rejected": policy[:, 1]}
    sums = {key: value.detach().double().sum() for key, value in values.items()}
    metrics = {key: torch.stack([total, torch.full_like(total, len(policy))]) for key, total in sums.items()}
    return losses.sum() / batch["n_examples"] + balance / batch["global_token_count"], metrics


def make_optimizer(model: nn.Module, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); norms and biases, which have one dimension, do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
              {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps, fused=True)


@torch.no_grad()
def eval_metrics(model: nn.Module, batches: Iterable[dict], device: torch.device, config: DPOConfig) -> dict[str, float]:
    """Returns the exact mean of each metric over the microbatches' pairs, on every rank."""
    sums = {}
    with in_mode(model, training=False):
        for batch in tqdm(batches, "evaluating", unit=" microbatches", leave=False, disable=dist.get_rank() > 0):
            accumulate(sums, get_batch_metrics(model, to_device(batch, device), "eval", config)[1])
    return all_reduce_means(sums)


# ---------------------------------------------------------------------------------------------------------------------
# The reference: the model as it was before training


@torch.no_grad()
def reference_logps(model: nn.Module, loader: SFTDataLoader, device: torch.device) -> torch.Tensor:
    """Returns (examples, 2) fp32: answer_logps of those rows that the loader comes by, in their places, on every rank."""
    logps = torch.zeros(len(loader.rows), 2, device=device)
    with in_mode(model, training=False):
        for batch in tqdm(loader, "reference", unit=" microbatches", leave=False, disable=dist.get_rank() > 0):
            batch = to_device(batch, device)
            logps[batch["examples"]] = answer_logps(model, batch)[0]
    dist.all_reduce(logps)
    return logps


def add_reference(model: nn.Module, loaders: list[SFTDataLoader], config: DPOConfig, base: dict, device: torch.device) -> None:
    """Has the loaders' batches hold, (documents,) each, reference_logps as "reference", and "n_targets".

    Called before the first step, so that no second model is held, nor run in each step. (With LoRA this is the model without its
    adapters, which add nothing at the start.) They are kept beside the rows' tokens, named by all that they follow from, such as
    the fingerprints of the `base`: a run that is resumed finds them, or makes them anew before its checkpoint is loaded.
    """
    wanted, made_of = {}, [base, config.model.random_init, config.seed, config.model.use_peft, config.model.peft.quantise]
    for loader in loaders:
        wanted[loader.rows] = np.union1d(wanted.get(loader.rows, []), loader.rows_seen()).astype(np.int64)
    for rows, ids in wanted.items():  # once, where the held-out rows are of the same files
        versions = [str(compute_dtype(device)), torch.__version__, transformers.__version__]
        name = checksum({"model": made_of, "ids": ids.tolist(), "versions": versions})
        logps = kept(rows.folder / f"reference-{name[:16]}.npy", reference_logps, model, loaders[0].over(rows, ids), device)
        rows.columns |= {"reference": logps, "n_targets": rows.targets}


# ---------------------------------------------------------------------------------------------------------------------
# The run


def make_encoder(config: DPOConfig, run_dir: Path) -> ChatEncoder:
    model = config.model
    tokenizer = load_tokenizer(model.tokenizer_name_or_path or model.name_or_path, config.cache_dir, (), model.chat_template)
    check_model(dataclasses.asdict(model), tokenizer, config.cache_dir)  # before anything is made
    return ChatEncoder(tokenizer, model.max_length, model.max_prompt_length, config.last_answer_only, model.template_kwargs,
                       started(run_dir), read_row=to_pair, n_documents=2)


def make_model_and_optimizer(config: DPOConfig, encoder: ChatEncoder, longest: int, device: torch.device):
    """Returns both, sharded, as the run begins; whether rows are packed, and whether a pair's answers share what is asked."""
    torch.manual_seed(config.seed)
    model = make_model(config.model, encoder.tokenizer, encoder.stop_ids, config.cache_dir, device)
    shard_model(model, make_mesh(device, config.model.replicas), "target_logps", dtype=compute_dtype(device),
                recompute=config.model.activation_checkpointing, inputs_on_host=config.model.activation_offload,
                compile=config.model.compile, offload=config.model.cpu_offload)
    load_weights(model)
    check_gradients(model, device)
    optimizer = make_optimizer(model, config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay)
    packing = try_model(model, device, longest, config.model.packing)
    return model, optimizer, packing, packing and can_share_context(model, device)


def main(config: DPOConfig) -> None:
    run_dir, settings, batch_size = Path(config.cache_dir, config.exp_name), dataclasses.asdict(config), config.model.batch_size
    encoder = make_encoder(config, run_dir)
    locked = lock(run_dir) if os.environ.get("RANK", "0") == "0" else None  # noqa: F841 (it is held as long as it has a name)
    # Before the processes join: a large data set may take longer to fetch and tokenise than a collective may take.
    train, held_out, data_id = load_examples(encoder, config.datasets, config.eval_datasets, config.eval_fraction, "pairs",
                                             config.seed, config.cache_dir, config.max_bad_rows)
    n_examples, eval_ids = config.n_examples or config.n_epochs * len(train.ids), held_out.ids[:config.n_eval_examples]
    questions = read_questions(encoder, held_out.rows, eval_ids[:config.n_eval_answers])
    facts = {"config": settings, "data": data_id, "base": fingerprints(settings["model"], config.cache_dir)}
    rank, world_size, device = init_processes(config.timeout_minutes)
    latest, at = find_start(run_dir, config.model.from_checkpoint, facts, n_examples, config.allow_changes, config.keep_last,
                            DPOConfig)
    if at.counter == n_examples and is_done(run_dir / "FINAL", at.counter):
        return say(f"finished already: {run_dir / 'FINAL'}; delete {run_dir} to train it anew")
    model, optimizer, packing, share = make_model_and_optimizer(config, encoder, max(train.longest, held_out.longest), device)
    loader = SFTDataLoader(*train, n_examples, config.seed, config.model.gradient_accumulation_steps, batch_size=batch_size,
                           pad_id=encoder.tokenizer.pad_token_id, packing=packing, share_context=share, rank=rank,
                           world_size=world_size, microbatch_tokens=max(config.model.microbatch_tokens, config.model.max_length))
    eval_loader = loader.over(held_out.rows, eval_ids)
    n_steps = at.step + math.ceil((n_examples - at.counter) / batch_size)
    say(describe_data(encoder.tokenizer, train, held_out, run_dir),
        describe_run(n_examples, n_steps, len(eval_ids), len(held_out.ids), model, packing, latest), describe_start())
    add_reference(model, [loader, eval_loader], config, facts["base"], device)
    load_checkpoint(latest, model, optimizer)  # if there is one
    log = Log(run_dir, latest, at.counter, n_examples, device, count_flops(model), settings)
    answers, first, last, must_end = {}, at.step, None, catch_signals()
    with contextlib.closing(log):
        while True:  # saving and evaluating stand at the top, so that start, middle, end and resume are one case
            stop = at.step < n_steps and must_end()
            if at.step > first and at.may_be_saved(n_examples) and (stop or at.is_due(config.save_every, n_examples, batch_size)):
                with log.pause("saving"):
                    if last is not None:  # its first microbatch: of the others some may be empty, on every rank
                        at.check_loss(eval_metrics(model, [next(loader.microbatches(last))], device, config)["loss/eval"], latest)
                    latest = save_latest(run_dir, vars(at) | facts, model, optimizer, latest, config.keep_last,
                                         config.stop_if_save_fails)
            if stop:
                return say(f"stopped by a signal after step {at.step}; the same command goes on from {latest or 'the start'}")
            if at.is_due(config.eval_every, n_examples, batch_size):
                with log.pause("evaluating"):
                    if len(eval_ids) and (at.step or config.do_first_eval):
                        log.add_evaluation(at.step, at.counter, eval_metrics(model, eval_loader, device, config))
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
                loss, metrics = get_batch_metrics(model, to_device(batch, device), "train", config)
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
