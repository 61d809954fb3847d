"""LoRA: every number and file against the peft package, naive losses, one process against two.

Under torchrun this file is also the worker of its sharded tests:
    torchrun --nproc_per_node=2 tests/test_lora.py FOLDER    # trains each of JOBS, and RUNS by sft.py
"""

import json
import math
import os
import re
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from conftest import run_well
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

import sft
from chat import ChatEncoder
from checkpoint import save_checkpoint
from configs.base import load_config
from data import IGNORE, SFTDataLoader, collate_packed, collate_padded, tokenise
from export import save_model, write_gathered
from fsdp_utils import ModelError, clip_gradients, end_process, init_processes, make_mesh, shard_model
from logps import target_logps
from lora import NEW_ROWS, LoRALinear, add_lora, draw_kept, load_adapter, merge_in_place, merge_lora, save_adapter
from make_tiny import train_tokenizer
from model_utils import load_model, load_tokenizer
from rows import list_files
from sft import get_batch_metrics, make_optimizer
from trial import enable_packing

VOCABULARY = 128
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}
KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "phi", "phi3", "olmo2", "mixtral"]
R, ALPHA = 4, 10.0
ALL_LINEAR = {"lora_r": R, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": "all-linear"}
PEFT_ALL_LINEAR = {"r": R, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
              pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")]


# ---------------------------------------------------------------------------------------------------------------------
# Tiny models, and PEFT's twin of one of ours


def make_base(kind: str = "llama", dtype: torch.dtype = torch.float32, **changes):
    """The same model each time it is called; no weight, bias or norm of it is a zero or a one."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.7 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else parameter + 0.2 * noise)
    model.target_logps = partial(target_logps, model)
    model.uses_own_logits = False
    return model.to(dtype)


def disturb(parameters: dict[str, torch.Tensor], part: str = ".lora_B.") -> None:
    """Moves the weights of this name, as training might; A and B alike stay far from symmetric."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(parameters):
            if part in name:
                parameters[name].add_(0.02 * torch.randn(parameters[name].shape, generator=generator))


def make_lora(kind: str = "llama", dtype: torch.dtype = torch.float32, base: dict | None = None, **changes):
    """A base with adapters whose B is not zero."""
    model = make_base(kind, dtype, **base or {})
    torch.manual_seed(2)
    add_lora(model, **ALL_LINEAR | changes)
    disturb(adapters(model))
    return model


def make_peft(base, **changes):
    return peft.get_peft_model(base, peft.LoraConfig(**PEFT_ALL_LINEAR | changes))


def make_twin(model, base, **changes):
    """PEFT's model on `base`, with model's A and B."""
    twin = make_peft(base, **changes)
    own, its = adapters(model), adapters(twin)
    assert own and own.keys() == its.keys()
    with torch.no_grad():
        for name in own:
            its[name].copy_(own[name])
    return twin


def adapters(model) -> dict[str, nn.Parameter]:
    """A and B of a model of ours or of PEFT's, by their names here."""
    return {name.removeprefix("base_model.model.").replace(".default", ""): parameter
            for name, parameter in model.named_parameters() if ".lora_" in name}


def adapted(model) -> set[str]:
    """The names of the linear layers that have an adapter."""
    return {name.removeprefix("base_model.model.") for name, module in model.named_modules()
            if isinstance(module, (LoRALinear, peft.tuners.lora.Linear))}


@torch.no_grad()
def logits_of(model, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """In eval mode, on every id of the vocabulary."""
    ids = torch.arange(vocabulary)[None].repeat(2, 1)
    ids[1] = ids[1, torch.randperm(vocabulary, generator=torch.Generator().manual_seed(3))]
    was_training = model.training
    logits = model.eval()(input_ids=ids).logits
    model.train(was_training)
    return logits


def make_documents(n: int = 6) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, trained) of unequal lengths, like a TokenisedRows."""
    rng = np.random.default_rng(4)
    rows = [(rng.integers(3, VOCABULARY, length), rng.random(length) < 0.5) for length in rng.integers(6, 24, n)]
    for _, trained in rows:
        trained[0], trained[-1] = False, True
    return rows


def our_loss(model, rows, collate=collate_packed) -> torch.Tensor:
    batch = collate(rows, 0) | {"n_documents": len(rows), "global_token_count": sum(len(ids) for ids, _ in rows)}
    return get_batch_metrics(model, batch, "train", len(batch["target_positions"]))[0]


def naive_loss(model, rows) -> torch.Tensor:
    """Mean NLL of the targets, from the whole logits of a row at a time."""
    total, count = 0.0, 0
    for ids, trained in rows:
        ids, trained = torch.from_numpy(ids.astype(np.int64))[None], torch.from_numpy(trained.astype(bool))
        logits, labels = model(input_ids=ids).logits[0, :-1], ids[0].where(trained, IGNORE)[1:]
        total = total + nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        count += int(trained.sum())
    return total / count


def naive_training(model, trained: dict[str, nn.Parameter], batches: list[list], max_norm: float,
                   learning_rates: list[float]) -> list[dict]:
    """A plain loop over PEFT's model in one process."""
    optimizer = torch.optim.AdamW(trained.values(), **ADAMW)
    steps = []
    for rows, lr in zip(batches, learning_rates, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        loss = naive_loss(model, rows)
        loss.backward()
        grads = {name: parameter.grad.clone() for name, parameter in trained.items()}
        norm = nn.utils.clip_grad_norm_(trained.values(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"loss": loss.detach(), "grads": grads, "norm": norm, "after": values(trained)})
    return steps


def gradients(loss: torch.Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))


LOGITS = 2e-6  # what fp32's rounding makes of a forward through two layers, as a part of the largest element
GRADIENT = 5e-6  # and of a gradient
STEP = 1e-3  # the learning rate, so about what a step of AdamW moves each weight by
STEPS = 2e-3  # of which a few steps may be off by this part: 2e-6
ADAMW = {"lr": STEP, "betas": (0.9, 0.999), "eps": 1e-5, "weight_decay": 0.05}


def close(actual, expected, tolerance: float = LOGITS, of: float | None = None) -> None:
    """Each tensor is off by no more than this part of its largest element, or of `of`."""
    if not isinstance(expected, dict):
        actual, expected = {"": actual}, {"": expected}
    assert actual.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        bound = tolerance * (tensor.abs().max().item() if of is None else of)
        off = (actual[name] - tensor).abs().max().item()
        assert off <= bound, f"{name} is off by {off}, more than {bound}"


def equal(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def values(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def load_peft(base, folder: Path, **options):
    """PeftModel.from_pretrained, where it is an error and no warning that a key is missing or left over."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        return peft.PeftModel.from_pretrained(base, str(folder), **options)


# ---------------------------------------------------------------------------------------------------------------------
# The layer


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind, base, dtype", [
    ("llama", {}, torch.float32), ("qwen2", {"tie_word_embeddings": True}, torch.float32), ("gpt_neox", {}, torch.float32),
    ("gpt_neox", {}, torch.float64)])  # which hides nothing behind its rounding
def test_forward_loss_gradients_and_five_steps_are_pefts(kind, base, dtype, rslora):
    model = make_lora(kind, base=base, use_rslora=rslora).to(dtype)
    twin = make_twin(model, make_base(kind, **base), use_rslora=rslora).to(dtype)
    exact = dtype == torch.float64
    close(logits_of(model), logits_of(twin), 1e-14 if exact else LOGITS)
    assert (logits_of(model) - logits_of(make_base(kind, **base))).abs().max() > 0.1

    rows, (own, its) = make_documents(), (adapters(model), adapters(twin))
    assert enable_packing(model, torch.device("cpu"))
    optimizer = make_optimizer(model, **ADAMW)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(own)
    steps = naive_training(twin, its, [rows] * 5, 0.5, [STEP] * 5)
    start = values(own)
    for step in steps:
        loss = our_loss(model, rows)
        loss.backward()
        close(loss, step["loss"], 1e-14 if exact else LOGITS)
        close({name: parameter.grad for name, parameter in own.items()}, step["grads"], 1e-12 if exact else GRADIENT)
        assert all(grad.abs().max() > 1e-4 for grad in step["grads"].values())
        nn.utils.clip_grad_norm_(own.values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        close(values(own), step["after"], 1e-9 if exact else STEPS, of=STEP)
    assert all((own[name] - start[name]).abs().max() > 1e-3 for name in own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_adapter_changes_nothing(kind, training):
    base, model = make_base(kind), make_base(kind)
    add_lora(model, **ALL_LINEAR | {"lora_dropout": 0.5})
    b = {name: parameter for name, parameter in adapters(model).items() if ".lora_B." in name}
    assert b and all((parameter == 0).all() for parameter in b.values())
    ids = torch.arange(VOCABULARY)[None]
    equal(model.train(training)(input_ids=ids).logits.detach(), base.train(training)(input_ids=ids).logits.detach())


def test_a_starts_as_pefts():
    base = {"hidden_size": 64, "intermediate_size": 192}
    torch.manual_seed(5)
    own, its = make_lora(base=base, lora_r=64), make_peft(make_base(**base), r=64)
    for name, a in adapters(own).items():
        if ".lora_A." not in name:
            continue
        bound = 1 / math.sqrt(a.shape[1])  # Kaiming-uniform with a = sqrt(5)
        assert 0.995 * bound < a.abs().max() <= bound
        assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert a.mean().item() == pytest.approx(0, abs=4 * bound / math.sqrt(3 * a.numel()))
        both = [x.detach().flatten().sort().values for x in (a, adapters(its)[name])]
        grid = torch.cat(both)
        below = [torch.searchsorted(x, grid, right=True) / len(x) for x in both]
        assert (below[0] - below[1]).abs().max() < 1.95 * math.sqrt(2 / a.numel())  # Kolmogorov-Smirnov, p = 0.001
    drawn = [a.flatten()[:8].tolist() for name, a in adapters(own).items() if ".lora_A." in name]
    assert len({tuple(numbers) for numbers in drawn}) == len(drawn)  # no two layers start alike


class SameDropout(nn.Dropout):
    """PEFT's dropout with our draws."""

    def forward(self, x):
        return x * draw_kept(x, self.p) / (1 - self.p)


def test_dropout_is_pefts():
    model = make_lora(lora_dropout=0.3)
    twin, ids = make_twin(model, make_base(), lora_dropout=0.3), torch.arange(VOCABULARY)[None]
    for module in twin.modules():
        if type(module) is nn.Dropout and module.p:
            module.__class__ = SameDropout
    outputs, grads = [], []
    for each in (model, twin):
        torch.manual_seed(6)
        outputs.append(each.train()(input_ids=ids).logits)
        grads.append(gradients(outputs[-1].square().mean(), adapters(each)))
    close(outputs[0], outputs[1])
    close(grads[0], grads[1], GRADIENT)
    assert (outputs[0] - model(input_ids=ids).logits).abs().max() > 0.1  # another mask each time


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
def test_dropout_keeps_each_number_alike(p):
    n = 2**20 + 3
    torch.manual_seed(8)
    kept, again = draw_kept(torch.empty(n), p), draw_kept(torch.empty(n), p)
    torch.manual_seed(8)
    equal(draw_kept(torch.empty(n), p), kept)
    deviation = math.sqrt(p * (1 - p))
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=4 * deviation / math.sqrt(n))
    centred = (kept.double() - kept.double().mean()) / deviation
    for part in (centred[i::4] for i in range(4)):  # which come from the same 64 bits
        assert abs(part.mean().item()) < 4 / math.sqrt(len(part))
    for lag in (1, 2, 3, 4, 64):  # nor does one tell of another
        assert abs((centred[lag:] * centred[:-lag]).mean().item()) < 4.5 / math.sqrt(n)
    assert abs((centred * (again.double() - again.double().mean())).mean().item() / deviation) < 4.5 / math.sqrt(n)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 1, 7)])
def test_dropout_has_the_shape_of_what_it_drops(shape):
    assert (draw_kept(torch.empty(shape), 0.5).shape, draw_kept(torch.empty(shape), 0.5).dtype) == (shape, torch.bool)


def test_no_dropout_in_eval():
    model, plain = make_lora(lora_dropout=0.3), make_lora()
    equal(logits_of(model), logits_of(model))
    equal(logits_of(model), logits_of(plain))


def test_activation_checkpointing_draws_the_same_dropout_again():
    rows, grads = make_documents(), []
    for checkpointing in (False, True):
        model = make_lora(lora_dropout=0.3).train()
        if checkpointing:
            for block in model.model.layers:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        torch.manual_seed(7)
        grads.append(gradients(our_loss(model, rows, collate_padded), adapters(model)))
    equal(*grads)
    assert all(grad.abs().max() > 0 for grad in grads[0].values())


class NewShapes(TorchDispatchMode):
    """The shapes of all tensors that are made, but for views of `known`."""

    def __init__(self, known: torch.Tensor):
        super().__init__()
        self.known, self.shapes = known.untyped_storage().data_ptr(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.known:
                self.shapes.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("base", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("kind", ["llama", "phi", "gemma2"])  # a bias of the head, a softcap
@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_head_costs_no_gradient(kind, base, frozen):
    model, rows = make_lora(kind, base=base), make_documents()
    twin = make_twin(model, make_base(kind, **base))
    head = model.get_output_embeddings().weight.requires_grad_(not frozen)
    with NewShapes(head) as made:
        loss = our_loss(model, rows, collate_padded)
        loss.backward()
    assert (head.grad is None) == frozen
    assert (tuple(head.shape) in made.shapes) == (not frozen)
    expected = gradients(naive_loss(twin, rows), adapters(twin))
    close({name: parameter.grad for name, parameter in adapters(model).items()}, expected, GRADIENT)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} - adapters(model).keys() == (
        set() if frozen else {name for name, parameter in model.named_parameters() if parameter is head})


# ---------------------------------------------------------------------------------------------------------------------
# Which layers


@pytest.mark.parametrize("kind", KINDS)  # of Mixtral, PEFT also adapts the experts and the router, which are no nn.Linear
def test_all_linear_is_pefts(kind):
    model, base = make_lora(kind), make_base(kind)
    linears = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    head = {name for name, module in base.named_modules() if module is base.get_output_embeddings()}
    assert adapted(model) == adapted(make_peft(base)) == linears - head
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == adapters(model).keys()


@pytest.mark.parametrize("kind, targets", [
    ("llama", ["q_proj"]), ("llama", ["q_proj", "v_proj", "down_proj"]), ("llama", ["self_attn.q_proj", "layers.1.mlp.up_proj"]),
    ("llama", ["model.layers.0.self_attn.k_proj"]), ("qwen2", ["o_proj", "model.layers.1.self_attn.o_proj"]),
    ("gpt_neox", ["dense"]), ("gpt_neox", ["attention.dense", "dense_4h_to_h"]), ("phi", ["dense", "fc2"]),
    ("phi3", ["qkv_proj"]), ("mixtral", ["q_proj", "o_proj"])])
def test_names_choose_as_pefts(kind, targets):
    model = make_lora(kind, target_modules=targets)
    assert adapted(model) == adapted(make_peft(make_base(kind), target_modules=targets))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == adapters(model).keys()


def test_a_single_name_is_a_list_of_one():
    assert adapted(make_lora(target_modules="v_proj")) == adapted(make_lora(target_modules=["v_proj"]))


@pytest.mark.parametrize("targets, named", [(["proj"], "proj"), (["q_proj", "c_attn"], "c_attn"), (["_proj"], "_proj"),
                                            (["layers.2.self_attn.q_proj"], "layers.2.self_attn.q_proj"),
                                            (["self_attn"], "self_attn"), (["embed_tokens"], "embed_tokens")])
def test_an_unmatched_target_lists_what_there_is(targets, named):
    model = make_base()
    with pytest.raises(ModelError) as error:
        add_lora(model, **ALL_LINEAR | {"target_modules": targets})
    line = str(error.value)
    assert repr(named) in line and "\n" not in line
    assert all(name in line for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    assert not adapted(model)  # nothing was done by halves
    equal(logits_of(model), logits_of(make_base()))


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_the_head_is_no_target(targets):
    with pytest.raises(ModelError, match="'lm_head'"):
        add_lora(make_base(), **ALL_LINEAR | {"target_modules": targets})


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn"], ["c_attn", "c_fc"]])
def test_gpt2_is_refused_for_its_conv1d(targets):
    with pytest.raises(ModelError, match="Conv1D") as error:
        add_lora(make_base("gpt2"), **ALL_LINEAR | {"target_modules": targets})
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Files that PEFT reads, files that PEFT wrote


@pytest.mark.parametrize("kind, targets", [
    *((kind, "all-linear") for kind in KINDS), ("llama", ["q_proj", "v_proj"]), ("qwen2", "o_proj"),
    ("llama", ["layers.0.self_attn.q_proj", "down_proj"]), ("mixtral", ["q_proj", "model.layers.1.self_attn.k_proj"])])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_ours(tmp_path, kind, targets, rslora):
    model = make_lora(kind, target_modules=targets, use_rslora=rslora, lora_dropout=0.25)
    save_adapter(tmp_path / "ours", model, model.state_dict())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]

    loaded = load_peft(make_base(kind), tmp_path / "ours")
    close(logits_of(loaded), logits_of(model))
    equal(values(adapters(loaded)), values(adapters(model)))
    loaded.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    equal(ours, theirs)
    with safe_open(tmp_path / "ours" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}

    config = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert isinstance(config, peft.LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora, config.bias) == (R, ALPHA, 0.25, rslora, "none")
    assert (config.task_type, config.modules_to_save, config.use_dora) == ("CAUSAL_LM", None, False)
    config.save_pretrained(tmp_path / "ours")  # over ours, as PEFT writes it
    again = make_base(kind)
    load_adapter(again, str(tmp_path / "ours"), 0.0)
    equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("changes", [
    {}, {"target_modules": ["q_proj", "v_proj"]}, {"use_rslora": True, "r": 7},
    {"target_modules": r".*layers\.0\..*(q|down)_proj"}, {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    {"exclude_modules": ["down_proj"]}, {"lora_alpha": 3, "r": 2},
    {"init_lora_weights": "gaussian"}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_ours_loads_pefts(tmp_path, kind, changes):
    theirs = make_peft(make_base(kind), **changes)
    disturb(adapters(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    model = make_base(kind)
    load_adapter(model, str(tmp_path / "theirs"), 0.0)
    close(logits_of(model), logits_of(theirs))
    assert adapted(model) == adapted(theirs)
    equal(values(adapters(model)), values(adapters(theirs)))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == adapters(model).keys()

    save_adapter(tmp_path / "ours", model, model.state_dict())  # and back
    close(logits_of(load_peft(make_base(kind), tmp_path / "ours")), logits_of(theirs))
    ours, written = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    equal(ours, written)


def test_a_loaded_adapter_takes_the_dropout_it_is_given(tmp_path):
    theirs = make_peft(make_base(), lora_dropout=0.5)
    theirs.save_pretrained(tmp_path)
    model = make_base()
    load_adapter(model, str(tmp_path), 0.125)
    assert {module.dropout.p for module in model.modules() if isinstance(module, LoRALinear)} == {0.125}
    assert model.lora_config["lora_dropout"] == 0.125


def test_our_own_adapter_comes_back_as_it_was(tmp_path):
    model, again = make_lora(), make_base()
    save_adapter(tmp_path / "one", model, model.state_dict())
    load_adapter(again, str(tmp_path / "one"), 0.0)
    save_adapter(tmp_path / "two", again, again.state_dict())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def changed_config(**changes):
    def change(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text()) | changes
        (folder / "adapter_config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "GONE"}))
    return change


def changed_weights(function):
    def change(folder: Path) -> None:
        save_file(function(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return change


def written_by_peft(base: dict | None = None, kind: str = "llama", **changes):
    def change(folder: Path) -> None:
        make_peft(make_base(kind, **base or {}), **changes).save_pretrained(folder)
    return change


MISFITS = {
    "no folder": shutil.rmtree,
    "no config": lambda folder: (folder / "adapter_config.json").unlink(),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "empty config": lambda folder: (folder / "adapter_config.json").write_text(""),
    "config cut short": lambda folder: os.truncate(folder / "adapter_config.json", 40),
    "config not UTF-8": lambda folder: (folder / "adapter_config.json").write_bytes(b'{"r": "\xff"}'),
    "config no object": lambda folder: (folder / "adapter_config.json").write_text("[1, 2]"),
    "config without a rank": changed_config(r="GONE"),
    "config without alpha": changed_config(lora_alpha="GONE"),
    "config with another rank": changed_config(r=8),
    "rank 0": changed_config(r=0),
    "rank no number": changed_config(r="four"),
    "alpha no number": changed_config(lora_alpha="ten"),
    "not LoRA": changed_config(peft_type="LOHA"),
    "no type": changed_config(peft_type="GONE"),
    "weights cut short": lambda folder: os.truncate(folder / "adapter_model.safetensors", 3000),
    "weights empty": lambda folder: os.truncate(folder / "adapter_model.safetensors", 0),
    "no tensors": changed_weights(lambda weights: {}),
    "an A without its B": changed_weights(lambda weights: {
        name: tensor for name, tensor in weights.items() if not name.endswith("layers.0.self_attn.q_proj.lora_B.weight")}),
    "a B without its A": changed_weights(lambda weights: {
        name: tensor for name, tensor in weights.items() if not name.endswith("layers.0.self_attn.q_proj.lora_A.weight")}),
    "a tensor too many": changed_weights(lambda weights: weights | {"base_model.model.model.norm.weight": torch.ones(32)}),
    "a B of another shape": changed_weights(lambda weights: {
        name: tensor[:-1].clone() if "layers.1.mlp.up_proj.lora_B" in name else tensor for name, tensor in weights.items()}),
    "an A with infinity": changed_weights(lambda weights: weights | {
        name: tensor / 0 for name, tensor in weights.items() if "layers.1.mlp.up_proj.lora_A" in name}),
    "a wider model's": written_by_peft({"hidden_size": 64}),
    "a deeper model's": written_by_peft({"num_hidden_layers": 3}),
    "another architecture's": written_by_peft(kind="gpt_neox"),
    "Mixtral's experts": written_by_peft(kind="mixtral"),
    "DoRA": written_by_peft(use_dora=True),
    "bias all": written_by_peft(kind="qwen2", bias="all"),
    "bias lora_only": written_by_peft(bias="lora_only"),
    "a bias of B's": written_by_peft(lora_bias=True),
    "rank_pattern": written_by_peft(rank_pattern={"q_proj": 2}),
    "alpha_pattern": written_by_peft(alpha_pattern={"q_proj": 2}),
    "trained norms": written_by_peft(modules_to_save=["norm"]),
    "embedding LoRA": written_by_peft(target_modules=["q_proj", "embed_tokens"]),
    "trainable tokens": written_by_peft(trainable_token_indices=[3, 4]),
    "an activated LoRA": written_by_peft(alora_invocation_tokens=[3, 4]),
    "PiSSA, which changes the base": written_by_peft(init_lora_weights="pissa"),
    "OLoRA, which changes the base": written_by_peft(init_lora_weights="olora"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's on what it writes there
@pytest.mark.parametrize("misfit", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_in_a_line(tmp_path, misfit):
    model = make_lora()
    folder = tmp_path / "adapter"
    save_adapter(folder, model, model.state_dict())
    load_adapter(make_base(), str(folder), 0.0)  # as it is, it fits
    MISFITS[misfit](folder)
    with pytest.raises(ModelError) as error:
        load_adapter(make_base("qwen2" if misfit == "bias all" else "llama"), str(folder), 0.0)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Merging


@pytest.mark.parametrize("kind, base", [("llama", {}), ("qwen2", {}), ("qwen2", {"tie_word_embeddings": True}), ("gpt_neox", {}),
                                        ("phi", {}), ("gemma2", {}), ("mixtral", {})])
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_is_base_and_adapter(tmp_path, kind, base, rslora):
    model, plain = make_lora(kind, base=base, use_rslora=rslora), make_base(kind, **base)
    before = values(model.state_dict())
    merged = merge_lora(model, model.state_dict())
    equal(values(model.state_dict()), before)  # the model itself is left as it was
    assert merged.keys() == plain.state_dict().keys()
    save_model(tmp_path, model, [merged])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    close(logits_of(loaded), logits_of(model), 1e-5)
    targets = {f"{name}.weight" for name in adapted(model)}
    if kind != "mixtral":  # of which PEFT adapts more
        theirs = make_twin(model, make_base(kind, **base), use_rslora=rslora).merge_and_unload()
        close(values(loaded.state_dict()), values(theirs.state_dict()))
    others = plain.state_dict().keys() - targets
    equal({name: loaded.state_dict()[name] for name in others}, {name: plain.state_dict()[name] for name in others})
    assert any(name.endswith(".bias") for name in others) == (kind in ("qwen2", "gpt_neox", "phi"))

    head, embeddings = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    tied = plain.config.tie_word_embeddings
    assert (head is embeddings) == tied
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len([name for name in file.keys() if tuple(file.get_slice(name).get_shape()) == tuple(head.shape)]) == 2 - tied


@pytest.mark.parametrize("kind, base", [("llama", {}), ("qwen2", {"tie_word_embeddings": True})])
def test_merged_in_place_a_model_needs_its_adapter_no_more(kind, base):
    model = make_lora(kind, base=base)
    expected, merged = logits_of(model), merge_lora(model, model.state_dict())
    merge_in_place(model)
    close(logits_of(model), expected, 1e-5)
    equal({name: model.state_dict()[name] for name in merged}, merged)
    alone = logits_of(model)
    disturb(adapters(model))
    equal(logits_of(model), alone)


def test_a_bf16_base_is_merged_in_fp32_and_rounded_once(capsys):
    model = make_lora(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in adapters(model).values()} == {torch.float32}
    state = model.state_dict()
    merged = merge_lora(model, state)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    naive_is_worse = False
    for name in adapted(model):
        w, a, b = (state[f"{name}.{part}"] for part in ("weight", "lora_A.weight", "lora_B.weight"))
        exact = w.double() + ALPHA / R * (b.double() @ a.double())
        half_a_step = torch.exp2(exact.abs().log2().floor() - 8)  # bf16 has 8 bits of mantissa, the first of them implied
        error = (merged[f"{name}.weight"].double() - exact).abs()
        assert (error <= half_a_step * (1 + 1e-3)).all()  # but for what fp32 itself loses
        assert (merged[f"{name}.weight"] == exact.to(torch.bfloat16)).double().mean() > 0.999
        twice = w + (ALPHA / R * (b @ a)).to(torch.bfloat16)
        naive_is_worse |= bool(((twice.double() - exact).abs() > half_a_step * (1 + 1e-3)).any())
    assert naive_is_worse  # so the bound above can tell

    rounded = {name: tensor.float() for name, tensor in make_base(dtype=torch.bfloat16).state_dict().items()}
    base, adapter, single = make_base(), make_base(), make_base()
    adapter.load_state_dict(rounded)
    single.load_state_dict({name: tensor.float() for name, tensor in merged.items()})
    gap = (logits_of(single) - logits_of(make_twin(model, adapter))).abs().max().item()
    adapter = make_base()
    adapter.load_state_dict(rounded)
    base_gap = (logits_of(base) - logits_of(adapter)).abs().max().item()
    with capsys.disabled():
        print(f"\nmerged into bf16: logits off by at most {gap:.4f}, where rounding the base to bf16 makes {base_gap:.4f}")
    assert 0 < gap < 1.5 * base_gap


# ---------------------------------------------------------------------------------------------------------------------
# A world: data, a tokenizer, base models in folders


CHANGES = {"llama": {}, "tied": {"tie_word_embeddings": True}, "phi": {}, "gpt_neox": {}, "qwen2": {"tie_word_embeddings": True}}
CHATML = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ROWS = [{"prompt": prompt, "completion": completion} for prompt, completion in (
    ("add 12 and 13", "25"), ("reverse GNK", "KNG"), ("sort 93821", "12389"), ("count B in BBBBA", "4"),
    ("day after 24 february", "25 february"), ("replace C by Y in CBD", "YBD"), ("double each letter of ZMW", "ZZMMWW"),
    ("last letter of BXXCV", "V"), ("add 20 and 0", "20"), ("reverse VISSBX", "XBSSIV"), ("sort 2984", "2489"),
    ("count B in ABBBBB", "5"), ("day after 18 october", "19 october"), ("replace B by X in BBBD", "XXXD"),
    ("double each letter of MCTW", "MMCCTTWW"), ("last letter of VXY", "Y"), ("add 17 and 12", "29"),
    ("reverse NGFRV", "VRFGN"), ("sort 546997", "456799"), ("count A in ABB", "1"), ("day after 1 april", "2 april"),
    ("replace A by Y in BEAA", "BEYY"), ("double each letter of BOX", "BBOOXX"), ("last letter of PBDEVDC", "C"))]
N_NEW = 5  # tokens that the tokenizer has and the models in */new do not


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with train.jsonl, a tokenizer, and models in full/KIND and, with fewer tokens than the tokenizer, new/KIND."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    train_tokenizer(ROWS, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"chat_template": CHATML, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(folder), str(folder))
    for kind, changes in CHANGES.items():
        for name, size in (("full", len(tokenizer)), ("new", len(tokenizer) - N_NEW)):
            base = make_base("llama" if kind == "tied" else kind, **changes, vocab_size=size)
            base.save_pretrained(folder / name / kind)
            tokenizer.save_pretrained(folder / name / kind)
    return folder


def load_new(world: Path, kind: str, name: str = "new"):
    tokenizer = load_tokenizer(str(world), str(world))
    return load_model(str(world / name / kind), None, tokenizer, [tokenizer.eos_token_id], str(world))


def resized_for_peft(world: Path, kind: str):
    """The base with rows for the new tokens, by transformers; the mean of the old ones, as here."""
    base = AutoModelForCausalLM.from_pretrained(world / "new" / kind)
    old_size = base.get_input_embeddings().num_embeddings
    base.resize_token_embeddings(old_size + N_NEW, pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        for tensor in {*base.get_input_embeddings().parameters(), *base.get_output_embeddings().parameters()}:
            tensor[old_size:] = tensor[:old_size].mean(0)
    return base


def whole_layers(kind: str) -> list[str]:
    """The names of the weights that have a row for each token."""
    embeddings = "gpt_neox.embed_in" if kind == "gpt_neox" else "model.embed_tokens"
    return [f"{embeddings}.weight"] + ([] if CHANGES[kind] else ["lm_head.weight"]) + (["lm_head.bias"] if kind == "phi" else [])


def new_rows(kind: str) -> list[str]:
    return [name.replace("weight", NEW_ROWS) for name in whole_layers(kind) if name.endswith("weight")]


def peft_with_new_rows(world: Path, kind: str):
    """(PEFT's model, {our name: its parameter} of what it trains), which has the new tokens' rows beside LoRA."""
    base = resized_for_peft(world, kind)
    size = base.get_input_embeddings().num_embeddings
    old_size = AutoConfig.from_pretrained(world / "new" / kind).vocab_size
    rows = {name.rsplit(".", 3)[-3]: list(range(old_size, size)) for name in new_rows(kind)}
    theirs = make_peft(base, trainable_token_indices=rows)
    parameters = {name.removeprefix("base_model.model.").replace(".default", ""): parameter
                  for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    return theirs, parameters


with_new_tokens = pytest.mark.parametrize("kind", [kind for kind in CHANGES if kind != "phi"])


def test_beside_a_bias_of_the_head_new_tokens_train_embeddings_and_head_whole(tmp_path, world):
    """PEFT's rows of tokens would leave the bias out."""
    model = load_new(world, "phi")
    add_lora(model, **ALL_LINEAR, n_new_rows=model.n_new_rows)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() - adapters(model).keys() == set(whole_layers("phi"))
    disturb(trained, "")
    save_adapter(tmp_path / "adapter", model, model.state_dict())
    vocabulary = model.get_input_embeddings().num_embeddings
    theirs = load_peft(resized_for_peft(world, "phi"), tmp_path / "adapter")
    close(logits_of(theirs, vocabulary), logits_of(model, vocabulary))


@with_new_tokens
def test_new_tokens_train_their_rows_alone(tmp_path, world, kind):
    model, plain = load_new(world, kind), load_new(world, kind)
    vocabulary = model.get_input_embeddings().num_embeddings
    assert vocabulary % 64 == 0 and 0 < model.n_new_rows < 64 + N_NEW and not load_new(world, kind, "full").n_new_rows
    add_lora(model, **ALL_LINEAR, n_new_rows=model.n_new_rows)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() - adapters(model).keys() == set(new_rows(kind))
    assert {len(trained[name]) for name in new_rows(kind)} == {model.n_new_rows}
    close(logits_of(plain, vocabulary), logits_of(resized_for_peft(world, kind), vocabulary))
    equal(logits_of(model, vocabulary), logits_of(plain, vocabulary))
    disturb(trained, "")
    expected = logits_of(model, vocabulary)
    assert (expected - logits_of(plain, vocabulary)).abs().max() > 0.1

    save_adapter(tmp_path / "adapter", model, model.state_dict())
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.") for name in stored} == trained.keys()
    close(logits_of(load_peft(resized_for_peft(world, kind), tmp_path / "adapter"), vocabulary), expected)

    again = load_new(world, kind)
    load_adapter(again, str(tmp_path / "adapter"), 0.0, again.n_new_rows)
    equal(values(again.state_dict()), values(model.state_dict()))
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trained.keys()

    tied = bool(CHANGES[kind])
    save_model(tmp_path / "merged", model, [merge_lora(model, model.state_dict())])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    close(logits_of(merged, vocabulary), expected, 1e-5)
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    merge_in_place(model)
    close(logits_of(model, vocabulary), expected, 1e-5)
    assert type(model.get_input_embeddings()) is type(plain.get_input_embeddings())


@with_new_tokens
def test_new_rows_have_the_gradients_that_pefts_have(world, kind):
    model = load_new(world, kind)
    torch.manual_seed(8)
    add_lora(model, **ALL_LINEAR, n_new_rows=model.n_new_rows)
    theirs, its = peft_with_new_rows(world, kind)
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    disturb(own, "")
    assert own.keys() == its.keys()
    with torch.no_grad():
        for name in own:
            its[name].copy_(own[name])
    ids = torch.arange(model.get_input_embeddings().num_embeddings)[None]
    for each in (model, theirs):
        logps = each.eval()(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, :-1]
        logps.gather(1, ids[0, 1:, None]).sum().backward()
    close({name: parameter.grad for name, parameter in own.items()}, {name: its[name].grad for name in own}, GRADIENT)


def test_rows_of_old_tokens_are_not_trained_alone(tmp_path, world):
    theirs = make_peft(resized_for_peft(world, "llama"), trainable_token_indices=[3, 4])
    theirs.save_pretrained(tmp_path)
    model = load_new(world, "llama")
    with pytest.raises(ModelError, match=r"it trains the tokens \[3, 4\]; only those that are new"):
        load_adapter(model, str(tmp_path), 0.0, model.n_new_rows)


@with_new_tokens
def test_pefts_rows_of_the_tokens_alone_load_here(tmp_path, world, kind):
    """Of a base that was resized to the tokenizer's size, to no multiple of 64."""
    base = AutoModelForCausalLM.from_pretrained(world / "new" / kind)
    old_size = base.get_input_embeddings().num_embeddings
    base.resize_token_embeddings(old_size + N_NEW, mean_resizing=False)
    rows = {name.rsplit(".", 3)[-3]: list(range(old_size, old_size + N_NEW)) for name in new_rows(kind)}
    theirs = make_peft(base, trainable_token_indices=rows)
    disturb({name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}, "")
    theirs.save_pretrained(tmp_path)
    model = load_new(world, kind)
    load_adapter(model, str(tmp_path), 0.0, model.n_new_rows)
    own, its = logits_of(model, old_size + N_NEW), logits_of(theirs, old_size + N_NEW)
    close(own[..., :its.shape[-1]], its)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@with_new_tokens
@pytest.mark.parametrize("embeddings", ["auto", False])  # PEFT's default writes them three times over
def test_new_tokens_of_pefts_load_here(tmp_path, world, kind, embeddings):
    modules = sorted({name.rsplit(".", 2)[-2] for name in whole_layers(kind)})
    theirs = make_peft(resized_for_peft(world, kind), modules_to_save=modules, ensure_weight_tying=bool(CHANGES[kind]))
    disturb({name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}, "")
    theirs.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    model = load_new(world, kind)
    load_adapter(model, str(tmp_path), 0.0, model.n_new_rows)
    vocabulary = model.get_input_embeddings().num_embeddings
    close(logits_of(model, vocabulary), logits_of(theirs, vocabulary))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_head_that_peft_trained_apart_from_the_embeddings_is_refused(tmp_path, world):
    theirs = make_peft(resized_for_peft(world, "tied"), modules_to_save=["embed_tokens", "lm_head"])
    disturb(dict(theirs.named_parameters()), "lm_head.modules_to_save")
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ModelError, match=re.escape(str(tmp_path))):
        load_adapter(load_new(world, "tied"), str(tmp_path), 0.0, load_new(world, "tied").n_new_rows)


def test_an_adapter_with_embeddings_needs_their_size(tmp_path, world):
    make_peft(resized_for_peft(world, "llama"), modules_to_save=["embed_tokens", "lm_head"]).save_pretrained(
        tmp_path, save_embedding_layers=False)
    smaller = AutoModelForCausalLM.from_pretrained(world / "new" / "llama")
    with pytest.raises(ModelError, match=re.escape(str(tmp_path))):
        load_adapter(smaller, str(tmp_path), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes against PEFT in one


N_STEPS, BATCH_SIZE, SEED = 3, 8, 1
JOBS = {  # base, adapter (B zero, or not), and how it is trained
    "plain": {"base": "full/llama", "fresh": True},
    "checkpointed": {"base": "full/llama", "fresh": True, "checkpointing": True},
    "padded": {"base": "full/qwen2", "fresh": False, "packing": False},
    "new tokens": {"base": "new/tied", "fresh": False, "checkpointing": True},
    "untied new tokens": {"base": "new/llama", "fresh": False, "checkpointing": False},
    "bf16": {"base": "full/llama", "fresh": True, "dtype": "bfloat16"},
    "bf16 new tokens": {"base": "new/tied", "fresh": False, "dtype": "bfloat16", "checkpointing": True},
}
RUNS = {  # and what sft.py is told of each, beside what all have: 4 steps of full/llama, a checkpoint after each second one
    "whole": "model.use_peft=true", "continued": "model.load_lora_from={}/of rank 3",
    "resumed": "model.from_checkpoint={}/runs/whole/checkpoints/step-2",
}


def worker(folder: Path) -> None:
    """Trains each job of JOBS as sft.main does, writes what came out to FOLDER/JOB/; and each of RUNS, to FOLDER/runs/RUN/."""
    rank, world_size, device = init_processes()
    tokenizer = load_tokenizer(str(folder), str(folder))
    encoder = ChatEncoder(tokenizer, 64, 32)
    rows = tokenise(list_files([str(folder / "train.jsonl")]), encoder, str(folder))
    for name, job in JOBS.items():
        dtype = getattr(torch, job.get("dtype", "float32"))
        model = load_model(str(folder / job["base"]), None, tokenizer, encoder.stop_ids, str(folder), dtype)
        load_adapter(model, str(folder / name / "start"), 0.0, model.n_new_rows)
        shard_model(model, make_mesh(device), "target_logps", dtype=dtype, recompute=job.get("checkpointing", False))
        named = dict(model.named_parameters())  # before a forward, which leaves the root's parameters gathered
        kinds = {key: (isinstance(parameter, DTensor), str(parameter.dtype), parameter.requires_grad)
                 for key, parameter in named.items()}
        trained = {key: parameter for key, parameter in named.items() if parameter.requires_grad}
        optimizer = make_optimizer(model, **ADAMW)
        packing = job.get("packing", True)
        assert not packing or enable_packing(model, device)
        loader = SFTDataLoader(rows, np.arange(len(rows)), N_STEPS * BATCH_SIZE, SEED, accumulation=2, batch_size=BATCH_SIZE,
                               pad_id=tokenizer.pad_token_id, packing=packing, microbatch_tokens=64, rank=rank,
                               world_size=world_size)
        steps = []
        model.train()
        for first in range(0, N_STEPS * BATCH_SIZE, BATCH_SIZE):
            losses = 0.0
            for batch in loader.microbatches(first):
                loss, _ = get_batch_metrics(model, batch, "train", batch["global_target_count"])
                loss.backward()
                losses += loss.detach()
            with_gradient = {key for key, parameter in named.items() if parameter.grad is not None}
            grads = {key: parameter.grad.full_tensor() for key, parameter in trained.items()}
            norm = clip_gradients(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            after = {key: parameter.detach().full_tensor().clone() for key, parameter in trained.items()}
            dist.all_reduce(losses)
            steps.append({"loss": losses, "grads": grads, "norm": norm, "after": after, "with_gradient": with_gradient})

        def write_adapter(parts, target=folder / name / "adapter", model=model) -> None:
            (weights,) = parts
            save_adapter(target, model, weights)
            (target / "gathered.json").write_text(json.dumps([*weights]))

        def write_whole(parts, target=folder / name / "whole", model=model) -> None:
            (weights,) = parts
            save_model(target, model, [merge_lora(model, weights)])
            base = {key: tensor for key, tensor in weights.items() if ".lora_" not in key and NEW_ROWS not in key}
            torch.save(base, target / "base.pt")

        write_gathered(model, write_adapter, trained_only=True)
        write_gathered(model, write_whole)
        save_checkpoint(folder / name / "checkpoint", model, optimizer, {})
        if rank == 0:
            torch.save({"kinds": kinds, "steps": steps}, folder / name / "result.pt")

    sft.init_processes = lambda timeout_minutes: (rank, world_size, device)  # these are running already
    for name, option in RUNS.items():
        sft.main(load_config(arguments(folder, name, option.format(folder)), world_size))
    dist.barrier()
    end_process()


def arguments(folder: Path, name: str, *options: str) -> list[str]:
    return ["--config", str(folder / "config.py"), f"datasets=[{folder / 'train.jsonl'}]", f"exp_name={name}",
            f"cache_dir={folder / 'runs'}", f"model.name_or_path={folder / 'full' / 'llama'}", "n_examples=32",
            f"model.batch_size={BATCH_SIZE}", f"seed={SEED}", f"lr={STEP}", "weight_decay=0.05", "eps=1e-5",
            "eval_every=16", "save_every=16",
            "intermediate_checkpoints=true", "model.use_peft=true", "model.max_length=64", "model.max_prompt_length=32",
            "model.peft.lora_r=4", "model.peft.lora_alpha=10", "model.peft.lora_dropout=0", *options]


def peft_from(world: Path, base: str, adapter: Path, trainable: bool = False):
    """PEFT's model of a base in the world and an adapter's folder."""
    name, _, kind = base.partition("/")
    plain = resized_for_peft(world, kind) if name == "new" else AutoModelForCausalLM.from_pretrained(world / base)
    return load_peft(plain, adapter, is_trainable=trainable)


@pytest.fixture(scope="module")
def trained(world) -> Path:
    for name, job in JOBS.items():
        kind = job["base"].rpartition("/")[2]
        model = load_new(world, kind, job["base"].partition("/")[0])
        torch.manual_seed(8)
        add_lora(model, **ALL_LINEAR, n_new_rows=model.n_new_rows)
        if not job["fresh"]:
            disturb({key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}, "")
        (world / name).mkdir()
        save_adapter(world / name / "start", model, model.state_dict())
    theirs = make_peft(AutoModelForCausalLM.from_pretrained(world / "full" / "llama"), r=3, lora_alpha=9,
                       target_modules=["q_proj", "down_proj"])
    disturb(adapters(theirs))
    theirs.save_pretrained(world / "of rank 3")
    (world / "config.py").write_text("from configs.base import Config\n\nconfig = Config()\n")
    run_well(Path(__file__), world, n_processes=2)
    return world


def result(trained: Path, name: str) -> dict:
    return torch.load(trained / name / "result.pt", weights_only=True)


def step_rows(world: Path, n_steps: int) -> list[list]:
    """The rows of each step of a run."""
    tokenizer = load_tokenizer(str(world), str(world))
    rows = tokenise(list_files([str(world / "train.jsonl")]), ChatEncoder(tokenizer, 64, 32), str(world))
    loader = SFTDataLoader(rows, np.arange(len(rows)), n_steps * BATCH_SIZE, SEED, batch_size=BATCH_SIZE, pad_id=0,
                           packing=False, microbatch_tokens=64)
    return [[rows[i][0] for i in loader.rows_of_step(k * BATCH_SIZE)] for k in range(n_steps)]


def peft_training(world: Path, name: str) -> list[dict]:
    base = JOBS[name]["base"]
    if base.startswith("new/"):
        model, trained = peft_with_new_rows(world, base[4:])
    else:
        model = make_peft(AutoModelForCausalLM.from_pretrained(world / base))
        trained = adapters(model)
    start = load_file(world / name / "start" / "adapter_model.safetensors")
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(start[f"base_model.model.{key}"])
    return naive_training(model, trained, step_rows(world, N_STEPS), 0.5, [STEP] * N_STEPS)


def trained_names(world: Path, name: str) -> set[str]:
    stored = load_file(world / name / "start" / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model.") for key in stored}


FP32_JOBS = [name for name, job in JOBS.items() if "dtype" not in job]


@pytest.mark.slow
@pytest.mark.parametrize("name", FP32_JOBS)
def test_two_processes_train_as_peft_in_one(trained, name):
    ours, theirs = result(trained, name)["steps"], peft_training(trained, name)
    assert len(ours) == len(theirs) == N_STEPS
    for step, (own, its) in enumerate(zip(ours, theirs)):
        close(own["loss"], its["loss"])
        close(own["norm"], its["norm"])
        close(own["grads"], its["grads"], GRADIENT if step == 0 else 4 * GRADIENT)  # of weights that are a little off
        close(own["after"], its["after"], STEPS, of=STEP)
        for key, grad in its["grads"].items():
            moved = ".lora_A." not in key or step or not JOBS[name]["fresh"]  # while B is zero, A has no gradient
            assert (grad.abs().max() > 1e-4) == bool(moved), (key, step)
        assert its["norm"] > 0.5  # so clipping counts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "checkpointed", "bf16"])
def test_every_b_leaves_zero_in_one_step(trained, name):
    assert JOBS[name]["fresh"]  # decay does not move a zero
    start = load_file(trained / name / "start" / "adapter_model.safetensors")
    after = {key: tensor for key, tensor in result(trained, name)["steps"][0]["after"].items() if ".lora_B." in key}
    assert len(after) == 14
    for key, tensor in after.items():
        assert (start[f"base_model.model.{key}"] == 0).all()
        assert (tensor != 0).double().mean() > 0.99, key


@pytest.mark.slow
def test_activation_checkpointing_changes_no_gradient(trained):
    for plain, checkpointed in zip(result(trained, "plain")["steps"], result(trained, "checkpointed")["steps"], strict=True):
        for key in ("loss", "grads", "after"):
            equal(checkpointed[key], plain[key])


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_the_base_is_left_as_it_was_to_the_bit(trained, name):
    base = JOBS[name]["base"]
    whole = torch.load(trained / name / "whole" / "base.pt", weights_only=True)
    kind = base.partition("/")[2]
    model = resized_for_peft(trained, kind) if base.startswith("new/") else AutoModelForCausalLM.from_pretrained(trained / base)
    expected = {key: tensor.to(getattr(torch, JOBS[name].get("dtype", "float32"))) for key, tensor in model.state_dict().items()}
    if base.startswith("new/"):
        for key in (*whole_layers(kind), "lm_head.weight"):
            whole.pop(key, None), expected.pop(key, None)
    elif model.config.tie_word_embeddings:
        del expected["lm_head.weight"]  # written once
    equal({key: whole[key] for key in expected}, expected)
    assert whole.keys() == expected.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_only_what_is_trained_has_gradients_and_optimizer_state(trained, name):
    kinds, steps, expected = *result(trained, name).values(), trained_names(trained, name)
    assert {key for key, (_, _, requires_grad) in kinds.items() if requires_grad} == expected
    assert all(sharded for sharded, _, _ in kinds.values())
    assert {dtype for _, dtype, requires_grad in kinds.values() if requires_grad} == {"torch.float32"}
    assert {dtype for _, dtype, requires_grad in kinds.values() if not requires_grad} == {
        f"torch.{JOBS[name].get('dtype', 'float32')}"}
    for step in steps:
        assert step["with_gradient"] == expected
        assert {grad.dtype for grad in step["grads"].values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_checkpoint_holds_what_is_trained_and_its_adam_state_alone(trained, name):
    expected, dtypes = trained_names(trained, name), set()
    held = set()
    for file in (trained / name / "checkpoint").glob("*.safetensors"):
        tensors = load_file(file)
        held |= tensors.keys()
        dtypes |= {tensor.dtype for tensor in tensors.values()}
    assert held == expected | {f"state.{key}.{part}" for key in expected for part in ("step", "exp_avg", "exp_avg_sq")}
    assert dtypes == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_the_adapter_is_gathered_alone(trained, name):
    folder = trained / name / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "gathered.json"]
    assert set(json.loads((folder / "gathered.json").read_text())) == trained_names(trained, name)  # nothing frozen was
    stored = load_file(folder / "adapter_model.safetensors")
    after = result(trained, name)["steps"][-1]["after"]
    equal({key.removeprefix("base_model.model."): tensor for key, tensor in stored.items()}, after)


@pytest.mark.slow
@pytest.mark.parametrize("name", FP32_JOBS)
def test_merged_from_shards_is_base_and_adapter_in_peft(trained, name):
    merged = AutoModelForCausalLM.from_pretrained(trained / name / "whole")
    size = merged.get_input_embeddings().num_embeddings
    adapter = peft_from(trained, JOBS[name]["base"], trained / name / "adapter")
    close(logits_of(merged, size), logits_of(adapter, size), 1e-5)
    head = merged.get_output_embeddings().weight
    with safe_open(trained / name / "whole" / "model.safetensors", "pt") as file:
        shapes = [tuple(file.get_slice(key).get_shape()) for key in file.keys()]
    assert shapes.count(tuple(head.shape)) == (1 if head is merged.get_input_embeddings().weight else 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "bf16 new tokens"])
def test_a_bf16_base_trains_as_an_fp32_one_up_to_its_rounding(trained, name):
    for own, its in zip(result(trained, name)["steps"], peft_training(trained, name), strict=True):
        assert own["loss"].item() == pytest.approx(its["loss"].item(), rel=0.01)
        for key, grad in its["grads"].items():
            assert (own["grads"][key] - grad).norm() <= 0.1 * grad.norm(), key


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs of sft.py


@pytest.fixture(scope="module")
def run(trained) -> Path:
    return trained / "runs" / "whole"


@pytest.mark.slow
def test_step_n_holds_the_adapter_and_no_weights(world, run):
    files = {str(path.relative_to(run / "step-2")) for path in (run / "step-2").rglob("*")}
    assert {"adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= files
    assert {file for file in files if file.endswith((".safetensors", ".bin"))} == {"adapter/adapter_model.safetensors"}
    peft_from(world, "full/llama", run / "step-2" / "adapter")
    keys = load_file(run / "step-2" / "adapter" / "adapter_model.safetensors").keys()
    assert len(keys) == 28
    assert all(re.fullmatch(r"base_model\.model\.model\.layers\.[01]\..*_proj\.lora_[AB]\.weight", key) for key in keys)


@pytest.mark.slow
def test_final_is_the_base_and_its_adapter_in_peft(world, run):
    final = AutoModelForCausalLM.from_pretrained(run / "FINAL")
    size = final.get_input_embeddings().num_embeddings
    adapter = peft_from(world, "full/llama", run / "FINAL" / "adapter")
    close(logits_of(final, size), logits_of(adapter, size), 1e-5)
    base = AutoModelForCausalLM.from_pretrained(world / "full" / "llama")
    assert (logits_of(final, size) - logits_of(base, size)).abs().max() > 0.01  # it did train
    assert not [name for name in final.state_dict() if "lora" in name]


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_bits(run):
    resumed = run.with_name("resumed")
    lines, whole = ((each / "metrics.jsonl").read_text().splitlines() for each in (resumed, run))
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[:2] == whole[:2]  # tokens a second and all: these steps were not trained again
    for name in ("adapter/adapter_model.safetensors", "model.safetensors"):
        assert (resumed / "FINAL" / name).read_bytes() == (run / "FINAL" / name).read_bytes(), name
    first = load_file(run / "step-2" / "adapter" / "adapter_model.safetensors")
    last = load_file(run / "FINAL" / "adapter" / "adapter_model.safetensors")
    assert all((first[key] != last[key]).any() for key in last)


@pytest.mark.slow
def test_a_run_goes_on_from_pefts_adapter_as_peft_would(world, run):
    run = run.with_name("continued")
    config = peft.PeftConfig.from_pretrained(run / "FINAL" / "adapter")
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 9, {"q_proj", "down_proj"})  # not 4, and all-linear

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    model = peft_from(world, "full/llama", world / "of rank 3", trainable=True)
    steps = naive_training(model, adapters(model), step_rows(world, 4), 1.0, [record["lr"] for record in records])
    for record, step in zip(records, steps, strict=True):
        assert record["loss/train"] == pytest.approx(step["loss"].item(), abs=1e-6)
        assert record["grad_norm"] == pytest.approx(step["norm"].item(), rel=GRADIENT)
    stored = load_file(run / "FINAL" / "adapter" / "adapter_model.safetensors")
    close({key.removeprefix("base_model.model."): tensor for key, tensor in stored.items()}, steps[-1]["after"], STEPS, of=STEP)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
