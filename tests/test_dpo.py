"""dpo.py: its loss against formulas, its runs against plain transformers in fp64 and TRL's trainer, resumed against straight."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import launch, write_model
from forked import run_script, run_well
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dpo
from configs.base import DPOConfig
from data import shuffled
from model_utils import load_tokenizer

PAIRS = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in [
    ("reverse ABC", "CBA", "ABC"), ("sort 321", "123", "3"), ("larger of 2 and 3", "3", "23 23 23"),
    ("last letter of ABCD", "D", "A"), ("first letter of ABA", "A", "B"), ("double each letter of XY", "XXYY", "XY"),
    ("sort 41", "14", "1414"), ("reverse XYZZY", "YZZYX", "X"), ("first letter of Q", "Q", "QQQ"),
    ("larger of 4 and 7", "7", "4"), ("replace A by X in ABBA", "XBBX", "ABBA"), ("last letter of OK", "K", "O")]]
BETA, LR, BATCH, SEED = 0.3, 1e-3, 4, 1
KEYS = ["--config", str(Path(dpo.__file__).parent / "configs/dpo_llama.py"), "model.name_or_path=model", "datasets=[pairs.jsonl]",
        "eval_datasets=[pairs.jsonl]", "n_epochs=2", f"model.batch_size={BATCH}", f"beta={BETA}", f"lr={LR}", f"seed={SEED}",
        "model.max_length=64", "model.max_prompt_length=48", "model.microbatch_tokens=64", "model.compile=false",
        "model.activation_checkpointing=false", "export_dtype=float32"]
N_STEPS = 2 * len(PAIRS) // BATCH


# ---------------------------------------------------------------------------------------------------------------------
# The loss of a pair


def pairs_of_logps(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(n)
    policy, reference = (torch.from_numpy(rng.normal(-20, 5, (n, 2))) for _ in range(2))
    return policy, reference, torch.from_numpy(rng.integers(1, 9, (n, 2)))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_the_paper(smoothing):
    policy, reference, lengths = pairs_of_logps(7)
    losses, margins = dpo.preference_loss(policy, reference, lengths, BETA, smoothing)
    for i in range(7):
        (a, b), (c, d) = policy[i].tolist(), reference[i].tolist()
        sure = 1 / (1 + math.exp(-BETA * ((a - c) - (b - d))))  # Bradley & Terry's probability that the chosen one is better
        assert margins[i].item() == pytest.approx(math.log(sure / (1 - sure)), rel=1e-9)
        assert losses[i].item() == pytest.approx(-(1 - smoothing) * math.log(sure) - smoothing * math.log(1 - sure), rel=1e-9)


def test_the_loss_of_ipo_is_that_of_the_paper():
    policy, reference, lengths = pairs_of_logps(7)
    losses, _ = dpo.preference_loss(policy, reference, lengths, BETA, loss="ipo")
    for i in range(7):
        h = sum(sign * (policy[i, j] - reference[i, j]).item() / lengths[i, j].item() for j, sign in ((0, 1), (1, -1)))
        assert losses[i].item() == pytest.approx((h - 1 / (2 * BETA)) ** 2, rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"loss": "ipo"}])
def test_the_gradient_of_the_loss_is_the_finite_difference(options):
    policy, reference, lengths = pairs_of_logps(5)
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda policy: dpo.preference_loss(policy, reference, lengths, BETA, **options)[0], (policy,))


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    write_model(folder / "model")
    write_model(folder / "other", tied=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return folder


def train(folder: Path, name: str, *argv: str, n_processes: int = 0) -> Path:
    run_well(Path(dpo.__file__), *KEYS, f"exp_name={name}", *argv, n_processes=n_processes, cwd=folder, timeout=240)
    return folder / ".cache" / name


def records(run: Path) -> tuple[list[dict], list[dict]]:
    """The records of (steps, evaluations)."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/train" in line], [line for line in lines if "loss/eval" in line]


def ids_of(tokenizer, pair: dict) -> tuple[list[int], list[int], list[int]]:
    """(what is fed, what must be written of the chosen, and of the rejected answer)"""
    messages = [{"role": "user", "content": pair["prompt"]}]
    fed = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    written = [[*tokenizer(pair[key], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
               for key in ("chosen", "rejected")]
    return tokenizer(fed, add_special_tokens=False)["input_ids"], *written


@pytest.fixture(scope="module")
def sequence(folder) -> list[tuple[list[int], list[int], list[int]]]:
    """ids_of the pairs in the order in which a run comes by them."""
    tokenizer = load_tokenizer(str(folder / "model"), str(folder / ".cache"))
    orders = [shuffled(np.arange(len(PAIRS)), len(PAIRS), [SEED, epoch]) for epoch in range(2)]
    return [ids_of(tokenizer, PAIRS[i]) for i in np.concatenate(orders)]


def train_naively(folder: Path, sequence: list, loss: str = "sigmoid", smoothing: float = 0.0) -> tuple[list[dict], dict]:
    """In fp64, an answer at a time, with a second model → (what each step logs, the weights)."""
    model, reference = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval() for _ in range(2))
    optimizer, steps = dpo.make_optimizer(model, LR, (0.9, 0.999), 1e-8, 0.01), []

    def logp(model, before: list[int], answer: list[int]) -> torch.Tensor:
        logps = model(torch.tensor([before + answer])).logits[0].log_softmax(-1)
        return logps[range(len(before) - 1, len(before) + len(answer) - 1), answer].sum()

    for step in range(N_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = dpo.get_lr(step + 1, N_STEPS, 0.1, LR)
        losses, margins = [], []
        for before, *answers in sequence[step * BATCH:(step + 1) * BATCH]:
            ratios = [logp(model, before, answer) - logp(reference, before, answer).detach() for answer in answers]
            margins.append(BETA * (ratios[0] - ratios[1]))
            if loss == "ipo":
                losses.append((ratios[0] / len(answers[0]) - ratios[1] / len(answers[1]) - 1 / (2 * BETA)) ** 2)
            else:
                sure = torch.sigmoid(margins[-1])
                losses.append(-(1 - smoothing) * sure.log() - smoothing * (1 - sure).log())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps.append({"loss/train": torch.stack(losses).mean().item(), "margin/train": torch.stack(margins).mean().item(),
                      "accuracy/train": np.mean([margin.item() > 0 for margin in margins]), "grad_norm": norm.item()})
    return steps, model.state_dict()


def check_run(run: Path, steps: list[dict], weights: dict) -> None:
    ours, _ = records(run)
    assert len(ours) == N_STEPS
    for step, (record, expected) in enumerate(zip(ours, steps)):
        for key, value in expected.items():
            if key != "accuracy/train" or step:  # before the first step every margin is a rounding
                assert record[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (step, key)
    found = load_file(run / "FINAL/model.safetensors")
    for name, weight in found.items():
        torch.testing.assert_close(weight.double(), weights[name].double(), rtol=0, atol=5e-5)  # of updates of 3e-3


@pytest.fixture(scope="module")
def straight(folder) -> Path:
    return train(folder, "straight", "save_every=4", "keep_last=9", "n_eval_answers=4", n_processes=2)


@pytest.fixture(scope="module")
def padded(folder, straight) -> Path:
    return train(folder, "padded", "model.packing=false", "model.gradient_accumulation_steps=2")


@pytest.mark.slow
def test_a_run_is_that_of_plain_transformers_in_fp64(folder, straight, padded, sequence):
    """On two ranks, packed, and on one, padded, in two microbatches and more."""
    steps, weights = train_naively(folder, sequence)
    assert steps[-1]["margin/train"] > 0.1
    check_run(straight, steps, weights)
    check_run(padded, steps, weights)


@pytest.mark.slow
@pytest.mark.parametrize("name, keys, options", [("ipo", ["loss=ipo"], {"loss": "ipo"}),
                                                 ("smoothed", ["label_smoothing=0.2"], {"smoothing": 0.2})])
def test_another_loss_too(folder, sequence, name, keys, options):
    check_run(train(folder, name, *keys, n_processes=2), *train_naively(folder, sequence, **options))


@pytest.mark.slow
def test_what_is_held_out_has_the_means_over_all_pairs(folder, straight, padded):
    tokenizer, weights = load_tokenizer(str(folder / "model"), str(folder / ".cache")), {}
    for name in ("model", ".cache/straight/FINAL"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64).eval()
        rows = []
        for before, *answers in (ids_of(tokenizer, pair) for pair in PAIRS):
            for answer in answers:
                logps = model(torch.tensor([before + answer])).logits[0].log_softmax(-1)
                rows.append(logps[range(len(before) - 1, len(before) + len(answer) - 1), answer].sum().item())
        weights[name] = np.reshape(rows, (-1, 2))
    reference, policy = weights.values()
    rewards = BETA * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    expected = {"loss/eval": np.log1p(np.exp(-margins)).mean(), "margin/eval": margins.mean(),
                "accuracy/eval": (margins > 0).mean(), "reward/eval/chosen": rewards[:, 0].mean(),
                "reward/eval/rejected": rewards[:, 1].mean(),
                "logps/eval/chosen": policy[:, 0].mean(), "logps/eval/rejected": policy[:, 1].mean()}
    first, last = (records(straight)[1][i] for i in (0, -1))
    assert first["loss/eval"] == pytest.approx(math.log(2), rel=1e-6) and first["margin/eval"] == pytest.approx(0, abs=1e-5)
    assert {key: last[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert 0 < expected["accuracy/eval"] and expected["loss/eval"] < math.log(2) - 0.05


def train_by_trl(folder: Path, sequence: list, adapter: Path | None = None) -> tuple[list[dict], dict]:
    """TRL's DPOTrainer on the same ids in the same order → (what each step logs, the weights of the merged model)."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # it is tokenised

        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    tokenizer = load_tokenizer(str(folder / "model"), str(folder / ".cache"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    reference = None if adapter else AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    optimizer = dpo.make_optimizer(model, LR, (0.9, 0.999), 1e-8, 0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: dpo.get_lr(min(step + 1, N_STEPS), N_STEPS, 0.1, 1.0))
    rows = Dataset.from_list([dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids)) for ids in sequence])
    args = trl.DPOConfig(output_dir=str(folder / "trl"), beta=BETA, per_device_train_batch_size=BATCH, max_steps=N_STEPS,
                         bf16=False, logging_steps=1, max_length=None, use_cpu=True, report_to=[],
                         save_strategy="no", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False)
    trainer = Trainer(model, reference, args, train_dataset=rows, processing_class=tokenizer, optimizers=(optimizer, schedule))
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train()
    steps = [{"loss/train": record["loss"], "margin/train": record["rewards/margins"], "grad_norm": record["grad_norm"],
              "logps/train/chosen": record["logps/chosen"], "logps/train/rejected": record["logps/rejected"]}
             for record in trainer.state.log_history if "loss" in record]
    model = trainer.model.merge_and_unload() if adapter else trainer.model
    return steps, model.state_dict()


@pytest.mark.slow
def test_a_run_is_trl_s(folder, straight, padded, sequence):
    steps, weights = train_by_trl(folder, sequence)
    check_run(straight, steps, weights)
    check_run(padded, steps, weights)


@pytest.mark.slow
@pytest.mark.parametrize("n_processes", [0, 2])
def test_a_run_of_adapters_is_trl_s(folder, sequence, n_processes):
    """From an adapter that adds nothing yet, as one that is made anew; the reference of TRL is a copy of it."""
    peft, adapter = pytest.importorskip("peft"), folder / "adapter"
    if not adapter.exists():
        torch.manual_seed(5)
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")).save_pretrained(adapter)
    run = train(folder, f"lora-{n_processes}", "model.use_peft=true", "model.load_lora_from=adapter", "model.peft.lora_dropout=0",
                n_processes=n_processes)
    check_run(run, *train_by_trl(folder, sequence, adapter))


# ---------------------------------------------------------------------------------------------------------------------
# Resumed runs


def references(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in (folder / ".cache/tokens").rglob("reference-*")}


def test_a_quantised_base_is_its_own_reference(folder):
    argv = ["model.use_peft=true", "model.peft.lora_r=4"]
    for name, more in (("as-it-is", []), ("quantised", ["model.peft.quantise=true"])):  # in one cache
        _, evals = records(train(folder, name, *argv, *more))
        assert evals[0]["loss/eval"] == pytest.approx(math.log(2), abs=1e-6) and abs(evals[0]["margin/eval"]) < 1e-5


def cut(run: Path, name: str, step: int) -> Path:
    """A copy of a run that was stopped after this step."""
    copy = run.with_name(name)
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("FINAL"))
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return copy


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(folder, straight):
    """Also where the reference has to be computed anew: by the weights as they were before the first step."""
    keys, expected = ["save_every=4", "keep_last=9", "n_eval_answers=4"], (straight / "FINAL/model.safetensors").read_bytes()
    before = references(folder)
    assert before and not [file for file in before if "partial" in file.name]
    cut(straight, "resumed", 3)
    assert (train(folder, "resumed", *keys, n_processes=2) / "FINAL/model.safetensors").read_bytes() == expected
    assert references(folder) == before  # read, not made
    for file in before:
        file.unlink()
    cut(straight, "anew", 3)
    assert (train(folder, "anew", *keys, n_processes=2) / "FINAL/model.safetensors").read_bytes() == expected
    assert references(folder) and references(folder).keys() <= before.keys()


@pytest.mark.slow
def test_a_run_resumed_on_another_number_of_ranks_ends_close_by(folder, straight):
    cut(straight, "fewer", 3)
    run = train(folder, "fewer", "save_every=4", "keep_last=9", "n_eval_answers=4")
    expected = load_file(straight / "FINAL/model.safetensors")
    for name, weight in load_file(run / "FINAL/model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_signal_saves_and_ends_and_the_same_command_goes_on(folder, straight):
    argv = [Path(dpo.__file__), *KEYS, "exp_name=stopped", "save_every=4", "keep_last=9", "n_eval_answers=4"]
    process = launch(argv, ("--standalone", "--nproc_per_node=2"), folder)
    metrics = folder / ".cache/stopped/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and "loss/train" in metrics.read_text()):
        os.sched_yield()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    run = train(folder, "stopped", *argv[len(KEYS) + 2:], n_processes=2)
    assert (run / "FINAL/model.safetensors").read_bytes() == (straight / "FINAL/model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("script, name, keys, told", [
    ("dpo.py", "straight", ["beta=0.4"], "beta: 0.3 then, 0.4 now"),
    ("dpo.py", "straight", ["model.name_or_path=other"], "config.json: "),
    ("sft.py", "straight", [], "the file must set `config = Config(...)`"),
    ("dpo.py", "unknown", ["loss=kto"], "loss=kto must be sigmoid or ipo"),
    ("dpo.py", "by_name", ["datasets=[ultrachat]"], "ultrachat")])
def test_what_would_be_another_run_is_refused_in_a_line(folder, straight, script, name, keys, told):
    done = run_script(Path(dpo.__file__).with_name(script), *[key for key in KEYS if key.split("=")[0] not in
                      {it.split("=")[0] for it in keys}], f"exp_name={name}", *keys, cwd=folder)
    assert done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr


def test_a_loss_of_pairs_that_weigh_differently_needs_the_kernel_s_other_way(folder):
    """A batch without targets, as a rank gets that no row is left for, has a loss of 0 and no rows."""
    config = DPOConfig()
    batch = {"n_documents": 0, "target_documents": torch.zeros(0, dtype=torch.int64), "reference": torch.zeros(0),
             "n_targets": torch.zeros(0, dtype=torch.int32), "n_examples": 3, "global_token_count": 5}

    class NoTargets(torch.nn.Module):
        def target_logps(self, batch, uniform):
            assert not uniform
            return torch.zeros(0, requires_grad=True), 0.0

    loss, metrics = dpo.get_batch_metrics(NoTargets(), batch, "train", config)
    assert loss.item() == 0 and all(pair.tolist() == [0, 0] for pair in metrics.values())
