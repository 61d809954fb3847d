"""Sharding, gradients, clipping and checkpoints on 1, 2 and 4 processes, against plain transformers on one row at a time."""

import contextlib
import functools
import hashlib
import json
import math
import os
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, process_of_one, run_script, store_rows, write_model
from forked import run_ranks, whole
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoint import CheckpointError, load_checkpoint, save_checkpoint, written_whole
from configs.base import ModelConfig
from data import IGNORE, SFTDataLoader, TokenisedRows, shuffled
from export import save_model, write_gathered
from fsdp_utils import (
    ModelError,
    accumulate,
    all_reduce_means,
    clip_gradients,
    end_process,
    failing_together,
    find_blocks,
    init_processes,
    make_mesh,
    shard_model,
    with_inputs_on_host,
)
from model_utils import load_tokenizer, load_weights
from sft import get_batch_metrics, make_model, make_optimizer
from trial import enable_packing

WORLD_SIZES = [1, 2, 4]
N_ROWS, BATCH = 19, 16  # a step of 16 rows, and one of 3: less than 4 ranks have
MAX_NORM = 0.05
CASES = {f"{name}, {cut}": {"packing": name == "packed", **options} for name in ("packed", "padded")
         for cut, options in {"whole": {}, "accumulated": {"accumulation": 4}, "few tokens": {"microbatch_tokens": 70}}.items()}
CASES |= {"packed, recomputed": {"recompute": True, "microbatch_tokens": 70},
          "padded, recomputed": {"recompute": True, "packing": False},
          "packed, inputs on the host": {"recompute": True, "inputs_on_host": True},
          "packed, replicated": {"replicas": 2, "microbatch_tokens": 70}, "packed, offloaded": {"offload": True},
          "packed, tied": {"kind": "tied"}, "padded, tied": {"kind": "tied", "packing": False}}
IN_BF16 = {"packed, bf16": {"dtype": torch.bfloat16}, "padded, bf16": {"dtype": torch.bfloat16, "packing": False}}
worlds = pytest.mark.parametrize("world", [pytest.param(world, marks=pytest.mark.slow) for world in WORLD_SIZES])
cases, kinds = pytest.mark.parametrize("case", CASES), pytest.mark.parametrize("kind", ["untied", "tied"])


# ---------------------------------------------------------------------------------------------------------------------
# What the processes are given


def make_documents() -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, trained): rows of 3 to 80 tokens with 1 to 60 targets; the pad token, 2, is a target too."""
    rng, documents = np.random.default_rng(5), []
    for i, length in enumerate([80, 3, 70, 4, *rng.integers(5, 40, N_ROWS - 4)]):
        ids, trained = rng.integers(3, 256, length), np.zeros(length, bool)
        n_targets = 1 if i % 3 == 0 else min(length - 1, 60)
        trained[length - n_targets:] = True
        ids[-1] = 2
        documents.append((ids, trained))
    return documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All that the processes need, and once they have run, all that they have written."""
    folder = tmp_path_factory.mktemp("fsdp")
    for kind, dtype in (("untied", torch.float32), ("tied", torch.bfloat16)):
        write_model(folder / kind, tied=kind == "tied", dtype=dtype)
    store_rows(folder / "rows", make_documents())
    for n_processes in (2, 4, 0):  # the checkpoint of 2 is read by all; a process that is no rank makes a group of one
        run_ranks(n_processes, work, folder)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[int, dict]:
    return {world: torch.load(folder / f"{world}-ranks.pt", weights_only=True) for world in WORLD_SIZES}


# ---------------------------------------------------------------------------------------------------------------------
# What each process does, as sft.main does it


def work(folder: Path) -> None:
    rank, world_size, device = init_processes()
    rows, tokenizer = TokenisedRows(folder / "rows", []), load_tokenizer(str(folder / "untied"), "")
    numbers = {"a": torch.tensor([float(rank), 1.0]), "b": torch.tensor([10.0 ** rank, 0.5])}
    results = {"process": [rank, world_size, device.type], "means": all_reduce_means(numbers)}
    results |= {"failing": fail_in_turns(rank, world_size), "written": write_in_turns(folder, rank, world_size)}
    for name, case in (CASES | IN_BF16).items():
        model, _, calls = start(folder, tokenizer, **case)
        results[name] = [*steps(model, calls, rows, rank, world_size, **case)]
    for kind in ("untied", "tied"):
        results[f"saved, {kind}"], results[f"loaded, {kind}"] = save_and_load(folder, tokenizer, kind, rows, rank, world_size)
    if rank == 0:
        torch.save(results, folder / f"{world_size}-ranks.pt")
    end_process()


FAILURES = {  # name → (what one rank raises, what all of them say)
    "OSError": (lambda: OSError(28, "No space left on device", "a/file"), "[Errno 28] No space left on device: 'a/file'"),
    "ValueError": (lambda: ValueError("a value that is wrong"), "a value that is wrong"),
    "SafetensorError": (lambda: SafetensorError("a damaged file"), "a damaged file"),
    "its own class": (lambda: ModelError("a model that is wrong"), "a model that is wrong"),
    "CheckpointException": (lambda: CheckpointException("not this", {0: (OSError("full"), None), 1: (OSError("full"), None),
                                                                     2: (ValueError("cut"), None)}), "full; cut"),
    "of two lines": (lambda: ValueError("an error\n  of two lines\n"), "an error of two lines"),
    "without a text": (lambda: OSError(), "OSError")}


def outcomes(context, block=lambda _: None) -> list:
    """Enters the context manager and calls the block in it; returns each rank's [class, text] of what is raised, or None."""
    mine, ranks = None, [None] * dist.get_world_size()
    try:
        with context as given:
            block(given)
    except Exception as error:
        mine = [type(error).__name__, str(error)]
    dist.all_gather_object(ranks, mine)
    return ranks


def fail_in_turns(rank: int, world_size: int) -> dict:
    """{(failure, the rank that fails, what is being done): outcomes}"""
    def fail(_, error: Exception | None):
        if error:
            raise error

    results = {}
    for name, (make, _) in FAILURES.items():
        for failing in {0, world_size - 1}:
            for what in ("", "what is done"):
                block = functools.partial(fail, error=make() if rank == failing else None)
                results[name, failing, what] = outcomes(failing_together(ModelError, what), block)
    results["all"] = outcomes(failing_together(ModelError), functools.partial(fail, error=OSError(f"of rank {rank}")))
    results["none"] = outcomes(failing_together(ModelError, "what is done"))
    return results


KILLED = ["target/old", "target.old/older", "target.partial/stale"]  # what a run may leave that is killed while it writes
WRITTEN = {  # name → (the files that are there before, the rank that fails or None, when, what all of them say)
    "for the first time": ([], None, "", ""),
    "again": (["target/old"], None, "", ""),
    "after a run that was killed": (KILLED, None, "", ""),
    "the first rank fails": (["target/old"], 0, "writing", "no room"),
    "the last rank fails": (["target/old"], -1, "writing", "no room"),
    "the last rank fails, where nothing was": ([], -1, "writing", "no room"),
    "the last rank fails, after a run that was killed": (KILLED, -1, "writing", "no room"),
    "all are told so already": (["target/old"], -1, "writing together", "no room"),
    "a file is in the way": (["target.partial", "target.old"], None, "", ""),
    "it can't be renamed": (["target/old"], 0, "renaming", "no room")}


def write_in_turns(folder: Path, rank: int, world_size: int) -> dict[str, tuple]:
    """{case: what write_one returns}"""
    before = Path.cwd()
    results = {name: write_one(folder / f"{world_size}-ranks-written" / name, rank, world_size, *case)
               for name, case in WRITTEN.items()}
    os.chdir(before)
    return results


def write_one(room: Path, rank: int, world_size: int, files: list[str], failing: int | None, when: str, text: str) -> tuple:
    """Returns (outcomes, {each path in target: its text} while it is written, {each path of all: its text} afterwards)."""
    if rank == 0:
        room.mkdir(parents=True)
        for file in map(room.joinpath, files):
            file.parent.mkdir(exist_ok=True)
            file.write_text("as before")
    dist.barrier()
    os.chdir(room)
    fails, during = failing is not None and rank == failing % world_size, {}

    def write(partial: Path) -> None:
        during.update(read_texts(Path("target")))
        time.sleep(0.05 * (rank == world_size - 1))
        (partial / f"of-rank-{rank}").write_text("new")
        with failing_together(CheckpointError) if when == "writing together" else contextlib.nullcontext():
            if fails and when.startswith("writing"):
                raise OSError(text)

    with mock.patch("checkpoint.replace", side_effect=OSError(text)) if when == "renaming" else contextlib.nullcontext():
        errors = outcomes(written_whole(Path("target")), write)
    return errors, during, read_texts(Path("."))


def read_texts(folder: Path) -> dict[str, str | None]:
    """{each path below the folder: its text, or None where it is a folder}"""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_text() for path in sorted(folder.rglob("*"))}


def start(folder: Path, tokenizer, kind: str = "untied", packing: bool = True, recompute: bool = False,
          resume: Path | None = None, replicas: int = 1, dtype: torch.dtype = torch.float32, offload: bool = False,
          inputs_on_host: bool = False, **_):
    """Returns (the sharded model, its optimizer, a counter of how often each block is computed)."""
    device = torch.device("cpu")
    model = make_model(ModelConfig(name_or_path=str(folder / kind)), tokenizer, [2], "", device)
    calls = Counter()
    for i, block in enumerate(find_blocks(model)):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: calls.update([i]))  # recomputing stops before its end
    mesh = make_mesh(device, min(replicas, dist.get_world_size()))
    shard_model(model, mesh, "target_logps", dtype=dtype, recompute=recompute, inputs_on_host=inputs_on_host, offload=offload)
    load_weights(model, frozen_only=bool(resume))
    optimizer = make_optimizer(model, 1e-2, (0.9, 0.999), 1e-5, 0.01)
    load_checkpoint(resume, model, optimizer)
    assert not packing or enable_packing(model, device)
    assert model.training
    return model, optimizer, calls


def steps(model, calls, rows, rank, world_size, packing=True, accumulation=1, microbatch_tokens=8192, **_):
    """Yields a dict of each step: its gradients, and all that is logged of it."""
    loader = SFTDataLoader(rows, np.arange(N_ROWS), N_ROWS, 1, accumulation, batch_size=BATCH, pad_id=2, packing=packing,
                           microbatch_tokens=microbatch_tokens, rank=rank, world_size=world_size)
    for first in range(0, N_ROWS, BATCH):
        sums, n_microbatches, n_empty = {}, 0, 0
        for i, batch in enumerate(loader.microbatches(first), 1):
            model.set_requires_all_reduce(i == batch["n_microbatches"])
            calls.clear()
            loss, metrics = get_batch_metrics(model, batch, "train", batch["global_target_count"])
            loss.backward()
            accumulate(sums, metrics)
            n_microbatches, n_empty = n_microbatches + 1, n_empty + (batch["n_documents"] == 0)
        parameters = dict(model.named_parameters())
        results = {"norm": clip_gradients(model.parameters(), 1e9), "gradients": whole_gradients(parameters)}
        results |= {"norm again": clip_gradients(model.parameters(), MAX_NORM), "clipped": whole_gradients(parameters)}
        results |= all_reduce_means(sums)
        counts = torch.tensor([n_microbatches, -n_microbatches, n_empty])
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        yield results | {"microbatches": counts.tolist(), "calls": dict(calls)}
        model.zero_grad()


def whole_gradients(parameters: dict) -> dict[str, torch.Tensor]:
    return whole({name: parameter.grad for name, parameter in parameters.items()})


def facts(model, optimizer) -> dict[str, dict]:
    """{parameter: its whole value, Adam's whole state of it, and whether all of that is sharded fp32}"""
    own = dict(model.named_parameters())
    tensors = {"value": own} | {key: {name: optimizer.state[parameter][key] for name, parameter in own.items()}
                                for key in ("exp_avg", "exp_avg_sq")}
    wholes = {key: whole(values) for key, values in tensors.items()}
    return {name: {"sharded": isinstance(parameter, DTensor) and parameter.placements[0].is_shard(),
                   "trained": parameter.requires_grad,
                   "dtypes": {str(values[name].dtype) for values in tensors.values()} == {"torch.float32"},
                   "local": parameter.to_local().numel(),
                   "step": float(optimizer.state[parameter]["step"]), **{key: values[name] for key, values in wholes.items()}}
            for name, parameter in own.items()}


def save_and_load(folder: Path, tokenizer, kind: str, rows, rank: int, world_size: int) -> tuple[dict, dict]:
    """Trains a step and saves it; then a new model and optimizer take over what 2 ranks have saved, maybe elsewhere."""
    model, optimizer, calls = start(folder, tokenizer, kind)
    next(steps(model, calls, rows, rank, world_size))
    optimizer.step()
    saved = facts(model, optimizer)

    target = folder / f"{world_size}-ranks-{kind}" / "checkpoints" / "step-1"
    note = folder / f"{world_size}-ranks-{kind}.json"
    if rank == 0:
        note.write_text('"written by the caller"')
        for old in (target, target.with_name(f"{target.name}.partial")):
            old.mkdir(parents=True)
            (old / "stray").write_text("of an earlier run")
    dist.barrier()
    save_checkpoint(target, model, optimizer, {"counter": 16}, note)
    assert (target / "checkpoint.json").exists()  # on every rank, once it returns
    exported = folder / f"{world_size}-ranks-{kind}-whole"
    write_gathered(model, lambda parts: save_model(exported, model, parts), limit=1000 if kind == "tied" else math.inf)

    model, optimizer, _ = start(folder, tokenizer, kind, packing=False, resume=folder / f"2-ranks-{kind}/checkpoints/step-1")
    return saved, facts(model, optimizer)


# ---------------------------------------------------------------------------------------------------------------------
# The reference: plain transformers, one process, one row at a time without padding


def naive_gradient(folder: Path, documents: list, dtype: torch.dtype = torch.float32) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    nll, count = 0.0, 0
    for ids, trained in documents:
        ids, trained = torch.as_tensor(ids).long(), torch.as_tensor(trained)
        labels = ids.masked_fill(~trained, IGNORE)
        logits = model(input_ids=ids[None]).logits[0].float()
        nll = nll + F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")
        count += int(trained.sum())
    (nll / count).backward()
    result = {"gradients": {name: parameter.grad.clone() for name, parameter in model.named_parameters()},
              "loss/train": nll.item() / count, "logps/train": -nll.item() / len(documents)}
    result["norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    return result | {"clipped": {name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, list[dict]]:
    """{kind, or untied in bf16: [of each step]}; which rows a step has is test_data.py's to check."""
    order, documents = shuffled(np.arange(N_ROWS), N_ROWS, [1, 0]), make_documents()
    parts = [[documents[i] for i in order[:BATCH]], [documents[i] for i in order[BATCH:]]]
    bf16 = [naive_gradient(folder / "untied", part, torch.bfloat16) for part in parts]
    return {kind: [naive_gradient(folder / kind, part) for part in parts] for kind in ("untied", "tied")} | {"bf16": bf16}


def check_gradients(actual: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    """Equal to 1e-6 of each parameter's norm, or of a tenth of the largest one's where a parameter has next to none."""
    assert actual.keys() == reference.keys()
    least = 0.1 * max(gradient.norm() for gradient in reference.values())
    for name, gradient in reference.items():
        assert actual[name].shape == gradient.shape
        assert (actual[name] - gradient).norm() <= 1e-6 * max(gradient.norm(), least), name


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@worlds
@cases
def test_gradient_is_that_of_the_naive_loss(results, expected, world, case):
    own, its = results[world][case], expected[CASES[case].get("kind", "untied")]
    assert len(own) == len(its) == 2
    for step, reference in zip(own, its):
        check_gradients(step["gradients"], reference["gradients"])


@worlds
@pytest.mark.parametrize("case", IN_BF16)
def test_gradient_in_bf16_is_no_further_from_the_true_one_than_transformers_own(results, expected, world, case):
    true, naive = expected["untied"][0]["gradients"], expected["bf16"][0]["gradients"]
    ours = results[world][case][0]["gradients"]
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())

    def distance(gradients: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum((gradients[name] - gradient).square().sum().item() for name, gradient in true.items()))

    assert 1e-4 * distance({name: 0.0 for name in true}) < distance(ours) < distance(naive)  # not in fp32 by mistake


@worlds
@cases
def test_logged_norm_and_loss_are_the_whole_step_s(results, expected, world, case):
    for step, reference in zip(results[world][case], expected[CASES[case].get("kind", "untied")]):
        assert step["norm"].item() == pytest.approx(reference["norm"].item(), rel=1e-6)
        assert step["norm again"].item() == pytest.approx(step["norm"].item(), rel=1e-6)  # 1e9 has not clipped it
        assert step["loss/train"] == pytest.approx(reference["loss/train"], rel=1e-6)
        assert step["logps/train"] == pytest.approx(reference["logps/train"], rel=1e-6)


@worlds
@cases
def test_clipping_scales_the_gradients(results, expected, world, case):
    for step, reference in zip(results[world][case], expected[CASES[case].get("kind", "untied")]):
        assert reference["norm"] > 2 * MAX_NORM
        check_gradients(step["clipped"], reference["clipped"])
        norm = torch.stack([gradient.square().sum() for gradient in step["clipped"].values()]).sum().sqrt()
        assert norm.item() == pytest.approx(MAX_NORM, rel=1e-4)  # torch adds 1e-6 to what it divides by


@pytest.mark.slow
def test_the_cases_differ_in_what_they_compute(results):
    for world in WORLD_SIZES:
        microbatches = {case: [step["microbatches"] for step in results[world][case]] for case in CASES}
        assert all(most == -minus_least for steps in microbatches.values() for most, minus_least, _ in steps)  # on all ranks
        for kind in ("packed", "padded"):
            assert [most for most, *_ in microbatches[f"{kind}, whole"]] == [1, 1]
            assert [most for most, *_ in microbatches[f"{kind}, accumulated"]] == [4, 4]
            assert microbatches[f"{kind}, few tokens"][0][0] > 1
        calls = [results[world][case][0]["calls"] for case in ("packed, few tokens", "packed, recomputed")]
        assert calls == [{0: 1, 1: 1}, {0: 2, 1: 2}]  # each block once in the forward, and once more in the backward
    for kind in ("packed", "padded"):  # in a step of 3 rows one of 4 ranks has none, and 4 * 4 groups are mostly empty
        assert results[4][f"{kind}, whole"][1]["microbatches"][2] == 1
        assert results[4][f"{kind}, accumulated"][1]["microbatches"][2] >= 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(),
                                                                                        reason="no GPU to copy from"))])
def test_inputs_that_wait_on_the_host_change_no_bit(device):
    torch.manual_seed(0)
    blocks, x = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)]).to(device), torch.randn(512, 64, device=device)
    found = []
    for wrap in (lambda forward: forward, with_inputs_on_host):
        y = x.clone().requires_grad_()
        torch.manual_seed(1)
        for block in blocks:
            forward = functools.partial(checkpoint, lambda x, scale, block=block: nn.functional.dropout(block(x) * scale).tanh(),
                                        use_reentrant=False)
            y = wrap(forward)(y, scale=x)
        found.append(torch.autograd.grad(y.sum(), [*blocks.parameters()]))
    assert all(torch.equal(one, other) and one.any() for one, other in zip(*found, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Failing together, and what is written meanwhile


@worlds
@pytest.mark.parametrize("failure", FAILURES)
def test_what_one_rank_raises_all_raise(results, world, failure):
    outcomes, text = results[world]["failing"], FAILURES[failure][1]
    for rank in {0, world - 1}:
        assert outcomes[failure, rank, ""] == [["ModelError", text]] * world
        assert outcomes[failure, rank, "what is done"] == [["ModelError", f"what is done: {text}"]] * world


@worlds
def test_of_several_ranks_errors_the_first_is_raised_and_of_none_none(results, world):
    assert results[world]["failing"]["all"] == [["ModelError", "of rank 0"]] * world
    assert results[world]["failing"]["none"] == [None] * world


def test_an_error_that_is_not_foreseen_is_not_disguised():
    with process_of_one():
        init_processes()
        with pytest.raises(KeyError, match="^'a fault'$"), failing_together(ModelError, "what is done"):
            raise KeyError("a fault")


@worlds
@pytest.mark.parametrize("case", WRITTEN)
def test_a_folder_is_written_whole_or_not_at_all(results, world, case):
    files, failing, when, text = WRITTEN[case]
    errors, during, after = results[world]["written"][case]
    before = {file: "as before" for file in files}
    before |= {folder: None for file in files for folder in [str(Path(file).parent)] if folder != "."}
    if failing is None:
        new = {f"target/of-rank-{rank}": "new" for rank in range(world)} | {"target": None}
        assert errors == [None] * world and after == new
    else:
        assert errors == [["CheckpointError", f"target: can't be written: {text}"]] * world
        assert after == {path: text for path, text in before.items() if not path.startswith("target.partial")}
    assert during == {Path(file).name: text for file, text in before.items() if file.startswith("target/")}  # as long as it takes


# ---------------------------------------------------------------------------------------------------------------------
# Sharding


@worlds
def test_every_process_knows_its_place_and_means_go_over_all(results, world):
    assert results[world]["process"] == [0, world, "cpu"]
    assert results[world]["means"] == {"a": sum(range(world)) / world, "b": float("1" * world) / (0.5 * world)}


ENDING = """
import atexit, os


class Global:
    def __del__(self, write=os.write):
        write(2, b"<torn down>")


kept = Global()
atexit.register(os.write, 2, b"<handlers ran>")  # the first to be registered is the last to run
from fsdp_utils import end_process, init_processes

if not os.fork():
    end_process(1)
print("code", os.waitstatus_to_exitcode(os.wait()[1]))
init_processes()
end_process()
"""


@pytest.mark.slow
def test_a_process_ends_without_tearing_python_down():
    done = run_script("-c", ENDING, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "code 1\n", "<handlers ran><handlers ran>")


@worlds
@kinds
def test_weights_and_adam_are_sharded_and_fp32(results, world, kind):
    """The tied model lies in bf16 on the disk."""
    parameters = results[world][f"saved, {kind}"]
    assert ("lm_head.weight" in parameters) == (kind == "untied") and "model.layers.1.self_attn.q_proj.bias" in parameters
    for name, parameter in parameters.items():
        assert parameter["sharded"] and parameter["trained"] and parameter["dtypes"], name
        assert parameter["local"] * world == parameter["value"].numel(), name  # all sizes are multiples of 4


TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 32}
FAMILIES = {"llama": (TINY, "model.layers"), "gpt_neox": (TINY, "gpt_neox.layers"),
            "gpt2": ({"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 32}, "transformer.h"),
            "mixtral": (TINY | {"num_local_experts": 5, "num_key_value_heads": 2}, "model.layers"),
            "qwen2_moe": (TINY | {"num_experts": 5, "moe_intermediate_size": 32, "num_experts_per_tok": 2}, "model.layers")}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_the_decoder_layers(family):
    options, name = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    assert find_blocks(model) is model.get_submodule(name) and len(find_blocks(model)) == 3


class Experts(nn.Module):
    """A block with more lists in it than the model has blocks, and a smaller list beside them."""

    def __init__(self):
        super().__init__()
        self.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
        self.h = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(8))}) for _ in range(2))
        self.h_norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))  # its name begins as the blocks' does


def test_blocks_are_neither_experts_nor_a_smaller_list():
    model = Experts()
    assert find_blocks(model) is model.h


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))])
def test_a_model_without_a_list_of_blocks_is_an_error_that_names_it(model):
    with pytest.raises(ModelError, match=f"^{type(model).__name__}: no blocks "):
        find_blocks(model)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@worlds
@kinds
def test_exported_weights_are_the_trained_ones_bit_for_bit(folder, results, world, kind):
    trained, start = results[world][f"saved, {kind}"], AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
    exported = folder / f"{world}-ranks-{kind}-whole"
    model, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info  # no key is missing, left over, or of another shape
    parameters = dict(model.named_parameters())
    assert parameters.keys() == trained.keys()
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, trained[name]["value"]), name
        assert not torch.equal(parameter, start.get_parameter(name)), name  # a step was made
    files = sorted(exported.glob("*.safetensors"))
    names = [name for file in files for name in safe_open(file, "pt").keys()]
    assert sorted(names) == sorted(trained)  # tied weights are written once
    if kind == "tied":  # by blocks, as they are larger than the limit
        blocks = [{name.partition(".layers.")[2][:1] for name in safe_open(file, "pt").keys()} for file in files]
        assert blocks == [{""}, {"0"}, {"1"}, {""}]
        assert [file.name for file in files] == [f"model-{i:05}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    else:
        assert [file.name for file in files] == ["model.safetensors"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "tied")


@worlds
@kinds
def test_a_checkpoint_replaces_what_was_there(folder, results, world, kind):
    saved = folder / f"{world}-ranks-{kind}/checkpoints/step-1"
    names = [f"rank-{rank:05}-00000.safetensors" for rank in range(world)]
    assert sorted(path.name for path in saved.iterdir()) == sorted([f"{world}-ranks-{kind}.json", "checkpoint.json", *names])
    assert [path.name for path in saved.parent.iterdir()] == ["step-1"]
    manifest = json.loads((saved / "checkpoint.json").read_text())
    assert manifest["counter"] == 16 and manifest["world_size"] == world
    for name, (size, digest) in manifest["files"].items():
        assert (size, digest) == ((saved / name).stat().st_size, hashlib.sha256((saved / name).read_bytes()).hexdigest())
    assert manifest["files"].keys() == {path.name for path in saved.iterdir()} - {"checkpoint.json"}


@worlds
@kinds
def test_a_checkpoint_holds_each_number_once(folder, results, world, kind):
    """No rank writes what another one writes too."""
    trained = results[world][f"saved, {kind}"]
    sizes = Counter()
    for file in (folder / f"{world}-ranks-{kind}/checkpoints/step-1").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                sizes[name] += math.prod(tensors.get_slice(name).get_shape())
    expected = {name: entry["value"].numel() for name, entry in trained.items()}
    expected |= {f"state.{name}.{key}": n for name, n in expected.items() for key in ("exp_avg", "exp_avg_sq")} | {
        f"state.{name}.step": 1 for name in expected}
    assert sizes == expected


@worlds
@kinds
def test_any_number_of_ranks_goes_on_from_a_checkpoint_of_two(results, world, kind):
    saved, loaded = results[2][f"saved, {kind}"], results[world][f"loaded, {kind}"]
    assert saved.keys() == loaded.keys()
    for name, entry in saved.items():
        for key in ("value", "exp_avg", "exp_avg_sq"):
            assert torch.equal(loaded[name][key], entry[key]), (name, key)
        assert loaded[name]["step"] == 1 and loaded[name]["sharded"] and loaded[name]["dtypes"]
