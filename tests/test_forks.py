"""The rungs of docs/fork_it.md: each patch applies to today's tree, is short, and trains by its formula, written out in fp64."""

import ast
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_model
from forked import run_forked
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.forked import run_file
from chat import ChatEncoder
from data import SFTDataLoader, step_seed, tokenise
from model_utils import load_tokenizer
from rows import to_pair

LINES = {"wsd": 15, "neftune": 25, "weight": 20, "orpo": 60, "muon": 40}  # changed ones, at most
PAGE = ROOT / "docs/fork_it.md"
PEAK, BATCH, SEED = 1e-2, 8, 7
CONFIG = f"""
from configs.base import Config, ModelConfig

config = Config(datasets=["train.jsonl"], eval_datasets=["train.jsonl"], cache_dir="runs", lr={PEAK}, warmup=0.25, seed={SEED},
                eps=1e-5, weight_decay=0.0, eval_every=10 ** 6, save_every={BATCH}, keep_last=9,
                model=ModelConfig(name_or_path="model", batch_size={BATCH}, max_length=96, max_prompt_length=48))
"""


def patch_of(name: str) -> Path:
    return ROOT / "docs/forks" / f"{name}.patch"


def exchange(question: str, answer: str, **more) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]


ROWS = [{"messages": exchange(question, answer)} for question, answer in [
    ("reverse ABC", "CBA"), ("sort 321", "123"), ("add 2 and 3", "5"), ("last letter of ABCDEFGH", "H"), ("count A in ABA", "2"),
    ("double each letter of XYZ", "XXYYZZ"), ("first letter of QRS", "Q"), ("replace B by Y in DFFCF", "DFFCF DFFCF DFFCF")]]


@pytest.fixture(scope="module")
def fork_of(tmp_path_factory) -> Callable[[str], Path]:
    """name → a copy of the project with that patch applied, in which there are a model and rows."""
    forks, folder = {}, tmp_path_factory.mktemp("forks")
    write_model(folder / "model")

    def fork_of(name: str) -> Path:
        if name not in forks:
            tree = folder / name
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "benchmarks", "docs"))
            done = subprocess.run(["git", "apply", patch_of(name)], cwd=tree, capture_output=True, text=True)
            assert done.returncode == 0, (f"the rung {name!r} no longer applies to this tree; commit, and make it anew:\n"
                                          f"    python docs/forks/remake.py {name}\n{done.stderr}")
            shutil.copytree(folder / "model", tree / "model")
            (tree / "config.py").write_text(CONFIG)
            write_rows(tree, ROWS)
            forks[name] = tree
        return forks[name]

    return fork_of


def write_rows(tree: Path, rows: list[dict]) -> None:
    (tree / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_here(argv: list, tree: Path) -> None:
    """Runs a script of the fork in a process that may have imported the project's own modules."""
    for name in [name for name in sys.modules if (tree / f"{name.replace('.', '/')}.py").exists()] + ["configs"]:
        sys.modules.pop(name, None)
    run_file(argv, tree)


def run(tree: Path, name: str, *argv, n_processes: int = 0) -> tuple[list[dict], list[dict]]:
    """sft.py of the fork, which must succeed; returns the (steps, evaluations) that it has logged."""
    done = run_forked(n_processes, run_here, [tree / "sft.py", "--config", "config.py", f"exp_name={name}", *argv], tree)
    assert done.returncode == 0, done.stderr[-5000:]
    lines = [json.loads(line) for line in (tree / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/train" in line], [line for line in lines if "loss/eval" in line]


def weights_of(tree: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(tree / "runs" / name / "FINAL/model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# The reference: plain transformers in fp64, a document at a time


def tokenised(tree: Path, **options):
    return tokenise([tree / "train.jsonl"], ChatEncoder(load_tokenizer(str(tree / "model"), ""), 96, 48, **options),
                    str(tree / "reference"))


def logps_of(model, ids, trained, noise: torch.Tensor | float = 0.0) -> torch.Tensor:
    """log p of the targets of a document, with noise (T, d) on its embeddings."""
    ids, trained = torch.as_tensor(np.array(ids)).long(), torch.as_tensor(np.array(trained))
    logits = model(inputs_embeds=(model.get_input_embeddings()(ids) + noise)[None]).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)[trained[1:]]


class Reference:
    """loss(model, step) trained on for as many steps as there are learning rates."""

    def __init__(self, tree: Path, loss: Callable, lrs: list[float], make_optimizer: Callable | None = None):
        self.model = AutoModelForCausalLM.from_pretrained(tree / "model", dtype=torch.float64)
        make_optimizer = make_optimizer or (lambda model: torch.optim.AdamW(model.parameters(), eps=1e-5, weight_decay=0.0))
        optimizer, self.losses, self.norms = make_optimizer(self.model), [], []
        self.start = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        for step, lr in enumerate(lrs):
            value = loss(self.model, step)
            value.backward()
            self.losses.append(value.item())
            self.norms.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item())
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

    def check(self, steps: list[dict], final: dict[str, torch.Tensor]) -> None:
        assert [step["loss/train"] for step in steps] == pytest.approx(self.losses, rel=2e-6)
        assert [step["grad_norm"] for step in steps] == pytest.approx(self.norms, rel=2e-5)
        for name, weight in self.model.named_parameters():
            moved = (weight - self.start[name]).norm()
            assert moved > 1e-3 and (final[name] - weight).norm() < 1e-4 * moved, name


def mean_nll(model, documents: list) -> torch.Tensor:
    logps = torch.cat([logps_of(model, *document) for document in documents])
    return -logps.mean()


LRS = [PEAK, PEAK * (1 + math.cos(math.pi / 3)) / 2, PEAK * (1 + math.cos(2 * math.pi / 3)) / 2, 0.0]  # of four steps, cosine


# ---------------------------------------------------------------------------------------------------------------------
# The patches


@pytest.mark.parametrize("name", LINES)
def test_the_patch_applies_and_is_short(fork_of, name):
    fork_of(name)
    counts = subprocess.run(["git", "apply", "--numstat", patch_of(name)], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [line.split() for line in counts.stdout.splitlines()]
    n = sum(int(added) + int(deleted) for added, deleted, _ in files)
    assert n <= LINES[name]
    assert re.search(rf"^## .*\n+[^#]*?`docs/forks/{name}\.patch`[^#]*?\b{n} changed lines", PAGE.read_text(), re.MULTILINE), n
    for _, _, file in files:
        tree = ast.parse((fork_of(name) / file).read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        assert not [it.name for it in functions if it.end_lineno - it.lineno >= (75 if it.name == "main" else 60)]
        assert max(map(len, (fork_of(name) / file).read_text().splitlines())) <= 130


def test_there_is_a_test_of_each():
    assert {file.stem for file in (ROOT / "docs/forks").glob("*.patch")} == LINES.keys()


# ---------------------------------------------------------------------------------------------------------------------
# wsd


@pytest.mark.parametrize("steps, warmup, decay, table", [
    (10, 0.2, 0.3, [1 / 2, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3, 0]),
    (8, 0.25, 0.5, [1 / 2, 1, 1, 1, 3 / 4, 1 / 2, 1 / 4, 0]),
    (5, 0.0, 0.0, [1, 1, 1, 1, 0]),
    (4, 0.5, 0.9, [1 / 2, 1, 1 / 2, 0]),  # no longer than there are steps left
    (3, 0.1, 0.9, [1, 1 / 2, 0]), (2, 0.1, 0.2, [1, 0]), (1, 0.1, 0.2, [1])])
def test_wsd_is_as_worked_out_by_hand(fork_of, steps, warmup, decay, table):
    functions = [node for node in ast.parse((fork_of("wsd") / "sft.py").read_text()).body
                 if isinstance(node, ast.FunctionDef) and node.name == "get_lr"]
    names = {"math": math}
    exec(compile(ast.Module(functions, []), "get_lr", "exec"), names)
    lrs = [names["get_lr"](step, steps, warmup, 3e-4, decay) for step in range(1, steps + 1)]
    assert lrs == pytest.approx([3e-4 * part for part in table], rel=1e-12, abs=1e-18)
    assert max(lrs) == 3e-4  # to the bit


@pytest.mark.slow
def test_wsd_trains(fork_of):
    tree, table = fork_of("wsd"), [PEAK / 2, PEAK, PEAK, PEAK, PEAK * 3 / 4, PEAK / 2, PEAK / 4, 0]
    steps, _ = run(tree, "straight", "n_epochs=8", "decay=0.5")
    assert [step["lr"] for step in steps] == pytest.approx(table, rel=1e-12)
    rows = tokenised(tree)
    documents = [rows[i][0] for i in range(len(rows))]
    Reference(tree, lambda model, _: mean_nll(model, documents), table).check(steps, weights_of(tree, "straight"))


# ---------------------------------------------------------------------------------------------------------------------
# neftune

ALPHA = 20.0


def noisy_nll(rows, packing: bool, dtype=torch.float64) -> Callable:
    """The mean NLL of a step in which the noise is drawn as the run draws it: a microbatch after the other."""
    def loss(model, step: int) -> torch.Tensor:
        loader = SFTDataLoader(rows, np.arange(len(rows)), 8 * BATCH, SEED, 2, batch_size=BATCH, pad_id=2, packing=packing,
                               microbatch_tokens=8192)
        torch.manual_seed(step_seed(SEED, step, 0))
        logps = []
        for batch in loader.microbatches(BATCH * step):
            ids, ends = batch["target_combined_input_ids"], batch["document_ends"]
            noise = torch.empty(*ids.shape, model.config.hidden_size).uniform_(-1, 1).to(torch.float64)
            targets = batch["target_labels"] != -100
            places = [(0, *pair) for pair in zip(ends[:-1].tolist(), ends[1:].tolist())] if packing else \
                [(i, 0, n) for i, n in enumerate(batch["target_combined_attention_mask"].sum(1).tolist())]
            for i, start, stop in places:
                size = ALPHA / math.sqrt((stop - start) * model.config.hidden_size)
                own, on = ids[i, start:stop].numpy(), targets[i, start:stop].numpy()
                logps.append(logps_of(model, own, on, size * noise[i, start:stop]))
        return -torch.cat(logps).mean()
    return loss


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_neftune_s_noise_is_that_of_its_formula_and_none_in_evaluation(fork_of, packing):
    tree = fork_of("neftune")
    rows = tokenised(tree)
    documents = [rows[i][0] for i in range(len(rows))]
    (steps, (before, after)) = run(tree, f"{packing}", "n_epochs=4", f"neftune_alpha={ALPHA}", f"model.packing={packing}",
                                   "model.gradient_accumulation_steps=2")
    reference = Reference(tree, noisy_nll(rows, packing), LRS)
    reference.check(steps, weights_of(tree, f"{packing}"))
    with torch.no_grad():
        silent = mean_nll(AutoModelForCausalLM.from_pretrained(tree / "model", dtype=torch.float64), documents).item()
        assert before["loss/eval"] == pytest.approx(silent, rel=1e-6)
        assert after["loss/eval"] == pytest.approx(mean_nll(reference.model, documents).item(), rel=1e-5)
    assert abs(steps[0]["loss/train"] - silent) > 0.01


@pytest.mark.slow
def test_a_resumed_run_draws_the_noise_that_the_straight_one_drew(fork_of):
    tree, argv = fork_of("neftune"), ("n_epochs=4", f"neftune_alpha={ALPHA}")
    for name, more in (("straight", ()), ("resumed", ["model.from_checkpoint=runs/straight/checkpoints/step-2"])):
        run(tree, name, *argv, *more, n_processes=2)
    own, its = weights_of(tree, "resumed"), weights_of(tree, "straight")
    assert own.keys() == its.keys() and all(torch.equal(own[name], its[name]) for name in its)


# ---------------------------------------------------------------------------------------------------------------------
# weight

WEIGHTED = [  # (the weights of what is trained, row)
    ([0.5], {"messages": exchange("reverse ABC", "CBA", weight=0.5)}),
    ([2, 0.25], {"messages": exchange("sort 321", "123", weight=2) + exchange("add 2 and 3", "5", weight=0.25)}),
    ([1.5], {"messages": exchange("last letter of AB", "B", weight=0) + exchange("first letter of AB", "A", weight=1.5)}),
    ([3], {"messages": exchange("count A in ABA", "2", weight=0.5, train=False)
           + exchange("sort 21", "12", weight=3, train=True)}),
    ([1], {"prompt": "double each letter of XYZ", "completion": "XXYYZZ"}),
    ([1], {"text": "ABC DEF"}),
    ([0.75], {"messages": exchange("reverse " + "QRST " * 24, "TSRQ", weight=4) + exchange("sort 54321", "12345", weight=0.75)}),
    ([0.125, 1], {"messages": exchange("reverse XY", "YX", weight=0.125) + exchange("sort 9", "9")})]


@pytest.mark.slow
@pytest.mark.parametrize("n_processes, argv", [(2, []), (0, ["model.packing=false", "model.gradient_accumulation_steps=4"])],
                         ids=["2 processes, packed", "1, padded"])
def test_an_answer_weighs_in_the_loss_as_its_message_says(fork_of, n_processes, argv):
    tree, name = fork_of("weight"), f"run-{n_processes}"
    write_rows(tree, [row for _, row in WEIGHTED])
    plain = [row if "messages" not in row else {"messages": [
        {**message, "weight": float(message.get("weight", 1) > 0)} for message in row["messages"]]} for _, row in WEIGHTED]
    (tree / "plain").mkdir(exist_ok=True)
    write_rows(tree / "plain", plain)
    encoder = ChatEncoder(load_tokenizer(str(tree / "model"), ""), 96, 48)
    rows = tokenise([tree / "plain/train.jsonl"], encoder, str(tree / "plain"))
    assert rows.counts["examples"] == len(WEIGHTED) and rows.counts["examples truncated"] == 1  # which loses its first exchange
    documents = []
    for i, (weights, _) in enumerate(WEIGHTED):
        ids, trained = rows[i][0]
        starts = np.flatnonzero(np.diff(np.concatenate([[False], trained]).astype(int)) == 1)
        assert len(starts) == len(weights)
        per_token = np.array(weights)[np.searchsorted(starts, np.flatnonzero(trained), "right") - 1]
        documents.append((ids, trained, torch.tensor(per_token, dtype=torch.float64)))

    def loss(model, step: int) -> torch.Tensor:
        """The sum of weight * NLL over the number of targets, whatever they weigh."""
        terms = [-weights * logps_of(model, ids, trained) for ids, trained, weights in documents]
        return torch.cat(terms).sum() / sum(int(trained.sum()) for _, trained, _ in documents)

    steps, evaluations = run(tree, name, "n_epochs=4", *argv, n_processes=n_processes)
    reference = Reference(tree, loss, LRS)
    reference.check(steps, weights_of(tree, name))
    assert evaluations[0]["loss/eval"] == pytest.approx(reference.losses[0], rel=1e-6)


@pytest.mark.parametrize("weight", [-0.5, True, "1", float("nan"), float("inf"), 1001, [1]])
def test_a_weight_that_is_no_number_is_refused(fork_of, weight):
    spec = importlib.util.spec_from_file_location("forked_rows", fork_of("weight") / "rows.py")
    rows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rows)
    with pytest.raises(ValueError, match=r"^messages\[1\]\.weight must be a number from 0 to 1000, not "):
        rows.to_conversation({"messages": exchange("q", "a", weight=weight)})
    assert rows.to_conversation({"messages": exchange("q", "a", weight=0.5)}).messages[1]["train"] == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# orpo

PAIRS = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in [
    ("reverse ABC", "CBA", "ABC"), ("sort 321", "123", "3"), ("add 2 and 3", "5", "23 23 23"),
    ("last letter of ABCD", "D", "A"), ("count A in ABA", "2", "1"), ("double each letter of XY", "XXYY", "XY"),
    ("sort 21", "12", "21 21"), ("first of AB", "A", "B")]]


@pytest.mark.slow
@pytest.mark.parametrize("n_processes, packing", [(2, True), (0, False)], ids=["2 processes, packed", "1, padded"])
def test_orpo_is_the_paper_s(fork_of, n_processes, packing):
    tree, name, weight = fork_of("orpo"), f"run-{n_processes}", 0.7
    write_rows(tree, PAIRS)
    rows, accuracies, nlls = tokenised(tree, read_row=to_pair, n_documents=2), [], []

    def loss(model, step: int) -> torch.Tensor:
        """Hong et al. 2024, with the probabilities themselves, of which fp64 holds enough digits."""
        losses, parts = [], []
        for i in range(len(rows)):
            chosen, rejected = (logps_of(model, *document).mean().exp() for document in rows[i])  # eq. 3
            ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))  # eq. 4 and 5
            losses.append(-chosen.log() - weight * ratio.log().sigmoid().log())  # eq. 6 and 7
            parts.append((float(ratio > 1), -chosen.log().item()))
        for means, values in zip((accuracies, nlls), zip(*parts)):
            means.append(sum(values) / len(PAIRS))
        return sum(losses) / len(PAIRS)

    steps, evaluations = run(tree, name, "n_epochs=4", f"odds_weight={weight}", f"model.packing={packing}",
                             "model.gradient_accumulation_steps=2", n_processes=n_processes)
    reference = Reference(tree, loss, LRS)
    reference.check(steps, weights_of(tree, name))
    assert [step["nll/train"] for step in steps] == pytest.approx(nlls, rel=2e-6)
    assert [step["accuracy/train"] for step in steps] == pytest.approx(accuracies)
    assert evaluations[0]["loss/eval"] == pytest.approx(reference.losses[0], rel=1e-6)
    assert evaluations[1]["loss/eval"] < reference.losses[0] - 0.1


# ---------------------------------------------------------------------------------------------------------------------
# muon

MUON = ("weight_decay=0.1", "n_epochs=4")


class Muon:
    """Jordan et al. 2024, by its singular values: the iteration's polynomial is applied to each. Scale of Liu et al. 2025."""

    def __init__(self, model):
        named = dict(model.named_parameters())
        self.inner = [weight for name, weight in named.items() if ".layers." in name and weight.ndim == 2]
        assert len(self.inner) == 2 * 7
        rest = [weight for weight in named.values() if all(weight is not other for other in self.inner)]
        groups = [{"params": [weight for weight in rest if weight.ndim == n], "weight_decay": decay}
                  for n, decay in ((2, 0.1), (1, 0.0))]
        self.adamw = torch.optim.AdamW(groups, eps=1e-5)
        self.param_groups, self.means = self.adamw.param_groups, [torch.zeros_like(weight) for weight in self.inner]

    @torch.no_grad()
    def step(self) -> None:
        lr = self.param_groups[0]["lr"]
        for weight, mean in zip(self.inner, self.means):
            mean.copy_(0.95 * mean + weight.grad)
            u, s, v = torch.linalg.svd(weight.grad + 0.95 * mean, full_matrices=False)
            s /= s.square().sum().sqrt() + 1e-7
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
            weight -= lr * 0.1 * weight + lr * 0.2 * math.sqrt(max(weight.shape)) * u @ s.diag() @ v
        self.adamw.step()

    def zero_grad(self) -> None:
        self.adamw.zero_grad()
        for weight in self.inner:
            weight.grad = None


@pytest.fixture(scope="module")
def muon(fork_of) -> tuple[Path, dict]:
    tree = fork_of("muon")
    return tree, {n: run(tree, f"run-{n}", *MUON, n_processes=n) for n in (0, 2)}


@pytest.mark.slow
def test_muon_is_the_reference_algorithm(muon):
    tree, runs = muon
    rows = tokenised(tree)
    documents = [rows[i][0] for i in range(len(rows))]
    reference = Reference(tree, lambda model, _: mean_nll(model, documents), LRS, Muon)
    for n, (steps, _) in runs.items():
        reference.check(steps, weights_of(tree, f"run-{n}"))


@pytest.mark.slow
def test_muon_makes_the_same_step_on_one_rank_and_on_two(muon):
    tree, _ = muon
    start, one, two = load_file(tree / "model/model.safetensors"), weights_of(tree, "run-0"), weights_of(tree, "run-2")
    for name in start:
        assert (one[name] - two[name]).norm() < 1e-5 * (one[name] - start[name]).norm(), name


@pytest.mark.slow
def test_muon_s_momentum_is_in_the_checkpoint(muon):
    tree, _ = muon
    run(tree, "resumed", *MUON, "model.from_checkpoint=runs/run-2/checkpoints/step-2", n_processes=2)
    own, its = weights_of(tree, "resumed"), weights_of(tree, "run-2")
    assert own.keys() == its.keys() and all(torch.equal(own[name], its[name]) for name in its)
