"""Sharding, gradients, clipping and checkpoints on 1, 2 and 4 processes, against plain transformers on one row at a time.

Under torchrun this file is also the worker whose results the tests read:
    torchrun --nproc_per_node=2 tests/test_fsdp_utils.py FOLDER    # writes FOLDER/2-ranks.pt and FOLDER/2-ranks-…/
"""

import hashlib
import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import process_of_one, run_well, store_rows, write_model
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from configs.base import Config, ModelConfig
from data import IGNORE, SFTDataLoader, TokenisedRows
from fsdp_utils import (
    CheckpointError,
    ShardingError,
    all_reduce_means,
    clip_gradients,
    find_blocks,
    find_checkpoint,
    init_processes,
    list_checkpoints,
    load_checkpoint,
    load_shards,
    prune_checkpoints,
    save_checkpoint,
    shard_model,
    write_gathered,
)
from model_utils import enable_packing, load_tokenizer, save_model
from sft import get_batch_metrics, make_model, make_optimizer

WORLD_SIZES = [1, 2, 4]
N_ROWS, BATCH = 19, 16  # a step of 16 rows, and one of 3: less than 4 ranks have
MAX_NORM = 0.05
CASES = {f"{name}, {cut}": {"packing": name == "packed", **options} for name in ("packed", "padded")
         for cut, options in {"whole": {}, "accumulated": {"accumulation": 4}, "few tokens": {"microbatch_tokens": 70}}.items()}
CASES |= {"packed, recomputed": {"recompute": True, "microbatch_tokens": 70},
          "padded, recomputed": {"recompute": True, "packing": False},
          "packed, replicated": {"replicas": 2, "microbatch_tokens": 70}, "packed, offloaded": {"cpu_offload": True},
          "packed, tied": {"kind": "tied"}, "padded, tied": {"kind": "tied", "packing": False}}
IN_BF16 = {"packed, bf16": {"dtype": torch.bfloat16}, "padded, bf16": {"dtype": torch.bfloat16, "packing": False}}
worlds, cases = pytest.mark.parametrize("world", WORLD_SIZES), pytest.mark.parametrize("case", CASES)
kinds = pytest.mark.parametrize("kind", ["untied", "tied"])


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
    for n_processes in (2, 4):  # the checkpoint of 2 is read by all
        run_well(__file__, folder, n_processes=n_processes)
    with process_of_one():
        work(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[int, dict]:
    return {world: torch.load(folder / f"{world}-ranks.pt", weights_only=True) for world in WORLD_SIZES}


# ---------------------------------------------------------------------------------------------------------------------
# What each process does, as sft.main does it


def work(folder: Path) -> None:
    rank, world_size, device = init_processes()
    rows = TokenisedRows(folder / "rows", [])
    numbers = {"a": torch.tensor([float(rank), 1.0]), "b": torch.tensor([10.0 ** rank, 0.5])}
    results = {"process": [rank, world_size, device.type], "means": all_reduce_means(numbers)}
    for name, case in (CASES | IN_BF16).items():
        model, _, calls = start(folder, **case)
        results[name] = [*steps(model, calls, rows, rank, world_size, **case)]
    for kind in ("untied", "tied"):
        results[f"saved, {kind}"], results[f"loaded, {kind}"] = save_and_load(folder, kind, rows, rank, world_size)
    if rank == 0:
        torch.save(results, folder / f"{world_size}-ranks.pt")
    dist.destroy_process_group()


def start(folder: Path, kind: str = "untied", packing: bool = True, recompute: bool = False,
          resume: Path | None = None, replicas: int = 1, cpu_offload: bool = False, dtype: torch.dtype = torch.float32, **_):
    """Returns (the sharded model, its optimizer, a counter of how often each block is computed)."""
    config = Config(model=ModelConfig(name_or_path=str(folder / kind)))
    device = torch.device("cpu")
    model = make_model(config, load_tokenizer(str(folder / "untied"), ""), 2, device)
    calls = Counter()
    for i, block in enumerate(find_blocks(model)):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: calls.update([i]))  # recomputing stops before its end
    shard_model(model, device, "target_logps", dtype=dtype, recompute=recompute, cpu_offload=cpu_offload,
                replicas=min(replicas, dist.get_world_size()))
    load_shards(model, model.weight_files)
    optimizer = make_optimizer(model, Config(lr=1e-2))
    if resume:
        load_checkpoint(resume, model, optimizer)
    assert not packing or enable_packing(model, device) == ""
    return model.train(), optimizer, calls


def steps(model, calls, rows, rank, world_size, packing=True, accumulation=1, microbatch_tokens=8192, **_):
    """Yields a dict of each step: its gradients, and all that is logged of it."""
    loader = SFTDataLoader(rows, np.arange(N_ROWS), batch_size=BATCH, n_examples=N_ROWS, seed=1, pad_id=2, packing=packing,
                           microbatch_tokens=microbatch_tokens, accumulation=accumulation, rank=rank, world_size=world_size)
    sums, n_microbatches, n_empty = Counter(), 0, 0
    for batch in loader:
        calls.clear()
        loss, metrics = get_batch_metrics(model, batch, "train", batch["global_target_count"])
        loss.backward()
        sums.update(metrics)
        n_microbatches, n_empty = n_microbatches + 1, n_empty + (batch["n_documents"] == 0)
        if not batch["ends_step"]:
            continue
        parameters = dict(model.named_parameters())
        results = {"norm": clip_gradients(model.parameters(), 1e9), "gradients": whole_gradients(parameters)}
        results |= {"norm again": clip_gradients(model.parameters(), MAX_NORM), "clipped": whole_gradients(parameters)}
        results |= all_reduce_means(sums)
        counts = torch.tensor([n_microbatches, -n_microbatches, n_empty])
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        yield results | {"microbatches": counts.tolist(), "calls": dict(calls)}
        model.zero_grad()
        sums, n_microbatches, n_empty = Counter(), 0, 0


def whole_gradients(parameters: dict) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.full_tensor().clone() for name, parameter in parameters.items()}


def facts(model, optimizer) -> dict[str, dict]:
    """{parameter: its whole value, Adam's whole state of it, and whether all of that is sharded fp32}"""
    return {name: {"value": parameter.detach().full_tensor().clone(),
                   "sharded": isinstance(parameter, DTensor) and parameter.placements[0].is_shard(),
                   "trained": parameter.requires_grad,
                   "dtypes": {str(tensor.dtype) for tensor in (parameter, optimizer.state[parameter]["exp_avg"],
                                                               optimizer.state[parameter]["exp_avg_sq"])} == {"torch.float32"},
                   "local": parameter.to_local().numel(),
                   "step": float(optimizer.state[parameter]["step"]),
                   "exp_avg": optimizer.state[parameter]["exp_avg"].full_tensor(),
                   "exp_avg_sq": optimizer.state[parameter]["exp_avg_sq"].full_tensor()}
            for name, parameter in model.named_parameters()}


def save_and_load(folder: Path, kind: str, rows, rank: int, world_size: int) -> tuple[dict, dict]:
    """Trains a step and saves it; then a new model and optimizer take over what 2 ranks have saved, maybe elsewhere."""
    model, optimizer, calls = start(folder, kind)
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
    whole = folder / f"{world_size}-ranks-{kind}-whole"
    write_gathered(model, lambda parts: save_model(whole, model, parts), limit=1000 if kind == "tied" else math.inf)

    model, optimizer, _ = start(folder, kind, packing=False, resume=folder / f"2-ranks-{kind}/checkpoints/step-1")
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
    """{kind, or untied in bf16: [of each step]}; which rows a step has is test_sft.py's to check."""
    order, documents = np.random.default_rng([1, 0]).permutation(N_ROWS), make_documents()
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


# ---------------------------------------------------------------------------------------------------------------------
# Sharding


@worlds
def test_every_process_knows_its_place_and_means_go_over_all(results, world):
    assert results[world]["process"] == [0, world, "cpu"]
    assert results[world]["means"] == {"a": sum(range(world)) / world, "b": float("1" * world) / (0.5 * world)}


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
    with pytest.raises(ShardingError, match=f"^{type(model).__name__}: no list of blocks"):
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
    names = [f"shard-{rank:05}-model-00001-of-00001.safetensors" for rank in range(1, world + 1)]
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


@pytest.fixture
def saved(folder, results, tmp_path):
    """A copy of a checkpoint of two ranks, as the last but one of two."""
    for step in (8, 10):
        shutil.copytree(folder / "2-ranks-untied/checkpoints/step-1", tmp_path / f"checkpoints/step-{step}")
    with process_of_one():
        init_processes()
        yield tmp_path


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


FILES = ["checkpoint.json", "2-ranks-untied.json", *(f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2))]
DAMAGES = {"a bit": lambda file: flip(file, file.stat().st_size // 2), "the last bit": lambda file: flip(file, -2),
           "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]), "longer": lambda file: file.open("a").write("0"),
           "empty": lambda file: file.write_bytes(b""), "gone": lambda file: file.unlink(),
           "a folder": lambda file: (file.unlink(), file.mkdir())}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(saved, file, damage):
    DAMAGES[damage](saved / "checkpoints/step-10" / file)
    warnings = []
    found, state = find_checkpoint(list_checkpoints(saved), warnings.append)
    assert found == saved / "checkpoints/step-8" and state["counter"] == 16
    (warning,) = warnings
    assert str(saved / "checkpoints/step-10") in warning and file in warning


def test_of_whole_checkpoints_the_one_with_the_most_steps_is_found(saved):
    for name in ("step-12.partial", "step-12.old"):
        shutil.copytree(saved / "checkpoints/step-10", saved / "checkpoints" / name)
    found, _ = find_checkpoint(list_checkpoints(saved), pytest.fail)
    assert found.name == "step-10"
    shutil.copytree(saved / "checkpoints/step-10", saved / "FINAL/checkpoint")
    shutil.rmtree(saved / "checkpoints")
    assert find_checkpoint(list_checkpoints(saved), pytest.fail)[0] == saved / "FINAL/checkpoint"
    assert find_checkpoint(list_checkpoints(saved / "FINAL"), pytest.fail)[0] == saved / "FINAL/checkpoint"
    assert find_checkpoint(list_checkpoints(saved / "FINAL/checkpoint"), pytest.fail)[0] == saved / "FINAL/checkpoint"
    (saved / "FINAL/checkpoint/checkpoint.json").unlink()
    assert list_checkpoints(saved) == [] and find_checkpoint([], pytest.fail) is None


@pytest.mark.parametrize("keep_last, kept", [(1, {"step-8"}), (2, {"step-8", "step-10"}), (3, {"step-8", "step-9", "step-10"})])
def test_pruning_keeps_the_newest_whatever_it_is_called(saved, keep_last, kept):
    shutil.copytree(saved / "checkpoints/step-8", saved / "checkpoints/step-9")
    shutil.copytree(saved / "checkpoints/step-8", saved / "checkpoints/step-11.partial")
    (saved / "checkpoints/step-11.partial/checkpoint.json").unlink()
    prune_checkpoints(saved / "checkpoints/step-8", keep_last)
    assert {path.name for path in (saved / "checkpoints").iterdir()} == kept


def test_a_checkpoint_of_another_model_is_refused(saved, folder):
    model, optimizer, _ = start(folder, "tied")
    with pytest.raises(CheckpointError, match="step-8: does not fit the model"):
        load_checkpoint(saved / "checkpoints/step-8", model, optimizer)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
