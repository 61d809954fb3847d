"""NF4: codes and numbers against bitsandbytes, to the bit; runs against LoRA on the dequantised base, to the bit."""

import json
import math
import re
import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_model
from forked import run_script, run_well
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from lora import LoRALinear, QuantisedLinear
from nf4 import BLOCK, FrozenProduct, dequantise, encode, pairs_of_values, quantise

DTYPES = [torch.float32, torch.bfloat16]
PAIRS = pairs_of_values()


def make_weight(n_rows: int = 48, n_columns: int = 256, dtype: torch.dtype = torch.float32, spread: float = 0.0) -> torch.Tensor:
    """Rows of a normal distribution, the scales of which differ by e to the power of spread, as one deviation."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp(spread * torch.randn(n_rows, 1, generator=generator)) / math.sqrt(n_columns)
    return (torch.randn(n_rows, n_columns, generator=generator) * scales).to(dtype)


def unpack(weight: torch.Tensor) -> torch.Tensor:
    return dequantise(quantise(weight), PAIRS, torch.float32)


def row_errors(made: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (made.float() - weight.float()).norm(dim=1) / weight.float().norm(dim=1)


def bnb_unpack(weight: torch.Tensor) -> torch.Tensor:
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True))


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_level_is_bitsandbytes_to_the_bit(dtype):
    weight = make_weight(dtype=dtype)
    weight[0, :16] = (PAIRS[:16, 1] + PAIRS[1:17, 1]).to(dtype) / 2  # on the borders and near them
    weight[0, 16] = 1
    codes, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    blocks = weight.float().view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    own = encode(blocks, largest).flatten()
    assert torch.equal(largest, state.absmax)
    assert torch.equal(own[::2] << 4 | own[1::2], codes.flatten())
    made = (PAIRS[codes.flatten().int()].view(-1, BLOCK) * largest[:, None]).view(weight.shape).to(dtype)
    assert torch.equal(made, bnb.dequantize_4bit(codes, state))


def test_of_the_scales_tried_each_block_has_the_best():
    """In fp64, a block at a time, and in the form that is in a file."""
    weight, values = make_weight(6, 256, spread=1.0), torch.tensor(PAIRS[:16, 1].tolist(), dtype=torch.float64)
    made, packed = unpack(weight).double(), quantise(weight)
    for row, made_row, steps in zip(weight.double(), made, packed[:, 128:132]):
        step = row.abs().max() / 255
        for block, made_block, taken in zip(row.split(BLOCK), made_row.split(BLOCK), steps.tolist()):
            errors = {}
            for more in range(0, 49, 8):
                tried = min(255, max(1, round((block.abs().max() / step + more).item())))
                nearest = (block[:, None] / (tried * step) - values).abs().argmin(1)
                errors[tried] = (values[nearest] * tried * step - block).square().sum().item()
            assert errors[taken] == pytest.approx(min(errors.values()), rel=1e-5)
            assert (made_block - block).square().sum().item() == pytest.approx(errors[taken], rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_is_quantised_as_it_is_in_the_whole(dtype):
    weight = make_weight(dtype=dtype, spread=1.0)
    packed = quantise(weight)
    assert packed.dtype == torch.uint8 and packed.shape == (48, 256 // 2 + 256 // 64 + 4)
    for rows in (slice(0, 1), slice(5, 17), slice(40, 48)):
        assert torch.equal(quantise(weight[rows]), packed[rows])
        assert torch.equal(dequantise(packed[rows], PAIRS, dtype), dequantise(packed, PAIRS, dtype)[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_no_larger_than_bitsandbytes(dtype):
    for spread in (0.0, 1.0):  # where rows differ in scale, its mean over the whole tensor fits none of them
        weight = make_weight(256, 512, dtype, spread)
        own, its = row_errors(unpack(weight), weight), row_errors(bnb_unpack(weight), weight)
        assert (own < 1.01 * its).all() and own.mean() < 0.98 * its.mean()


def test_zeros_stay_zeros_and_what_is_tiny_or_large_stays_finite():
    weight = make_weight(6)
    weight[0], weight[1, :64], weight[2, 5] = 0, 0, 0
    weight[3], weight[4] = weight[3] * 1e-38, weight[4] * 1e36
    made = unpack(weight)
    assert made.isfinite().all() and (made[weight == 0] == 0).all()
    assert row_errors(made[4:5] / 1e36, weight[4:5] / 1e36) < 0.11


# ---------------------------------------------------------------------------------------------------------------------
# The product


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (2, 9), (1, 3, 2)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_product_and_gradient_are_autograd_s_on_the_dequantised_weight(dtype, shape, with_bias):
    packed, bias = quantise(make_weight(dtype=dtype)), torch.randn(48, dtype=dtype) if with_bias else None
    x = torch.randn(*shape, 256, dtype=dtype, requires_grad=True)
    own, expected = FrozenProduct.apply(x, packed, bias, PAIRS), F.linear(x, dequantise(packed, PAIRS, dtype), bias)
    grad = torch.randn_like(own)
    assert torch.equal(own, expected)
    assert torch.equal(torch.autograd.grad(own, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


def test_kept_for_the_backward_are_the_bytes_alone():
    kept, packed = [], quantise(make_weight())
    x = torch.randn(5, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        FrozenProduct.apply(x, packed, None, PAIRS)
    assert {tensor.data_ptr() for tensor in kept} <= {packed.data_ptr(), PAIRS.data_ptr()}


# ---------------------------------------------------------------------------------------------------------------------
# Runs

SFT = ROOT / "sft.py"
CONFIG = """
from configs.base import Config, ModelConfig, PeftConfig

config = Config(datasets=["train.jsonl"], eval_datasets=["eval.jsonl"], cache_dir="runs", n_examples=30, lr=1e-2, eval_every=15,
                save_every=10, keep_last=3, export_dtype="bfloat16",
                model=ModelConfig(name_or_path="model", batch_size=8, gradient_accumulation_steps=2, max_length=96, use_peft=True,
                                  peft=PeftConfig(lora_r=4, lora_alpha=8, lora_dropout=0.0)))
"""
PACKED, RESUMED = "model.peft.quantise=true", "model.from_checkpoint=runs/two/checkpoints/step-2"
LINEARS = r"model\.layers\.\d+\.\w+\.\w+_proj\.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base in bf16, and the same with the linears' weights as they are after quantising, in fp32; rows to train on."""
    folder = tmp_path_factory.mktemp("nf4")
    write_model(folder / "model", dtype=torch.bfloat16, hidden_size=64, intermediate_size=192)
    write_model(folder / "dequantised", hidden_size=64, intermediate_size=192)
    weights = load_file(folder / "model/model.safetensors")
    made = {name: unpack(tensor) if re.fullmatch(LINEARS, name) else tensor.float() for name, tensor in weights.items()}
    assert sum(not torch.equal(made[name], weights[name].float()) for name in made) == 14
    save_file(made, folder / "dequantised/model.safetensors", metadata={"format": "pt"})
    (folder / "config.py").write_text(CONFIG)
    for name, n in (("train", 19), ("eval", 5)):
        rows = [{"prompt": "ABCDEFGH"[i % 7:], "completion": "HGFEDCBA"[:2 + i * 5 % 6]} for i in range(n)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder: Path, name: str, *argv, n_processes: int = 0) -> Path:
    printed = run_well(SFT, "--config", "config.py", *argv, f"exp_name={name}", n_processes=n_processes, cwd=folder, timeout=400)
    (folder / "runs" / name / "printed").write_text(printed)
    return folder / "runs" / name


@pytest.fixture(scope="module")
def one(folder) -> Path:
    return run(folder, "one", PACKED)


@pytest.fixture(scope="module")
def two(folder) -> Path:
    return run(folder, "two", PACKED, n_processes=2)


def numbers(run: Path) -> list[dict]:
    """What a run has logged that does not depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not re.search("second|memory", key)} for line in lines]


def final(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "FINAL/model.safetensors") | load_file(run / "FINAL/adapter/adapter_model.safetensors")


def assert_close(run: Path, other: Path) -> None:
    own, its = numbers(run), numbers(other)
    assert len(own) == len(its) > 4
    for line, expected in zip(own, its):
        assert line == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.slow
def test_a_run_is_lora_on_the_dequantised_base_to_the_bit(folder, one):
    plain = run(folder, "plain", "model.name_or_path=dequantised")
    assert numbers(one) == numbers(plain)
    own, expected = final(one), final(plain)
    assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
    base = load_file(folder / "model/model.safetensors")
    assert all(own[name].dtype == torch.bfloat16 for name in base)
    assert {name for name in base if not torch.equal(own[name], base[name])} == {
        name for name in base if re.fullmatch(LINEARS, name)}


@pytest.mark.slow
def test_what_is_quantised_and_what_is_trained_is_told(one):
    printed = (one / "printed").read_text()
    said = "quantised: 14 linear layers; not so: model.embed_tokens.weight, lm_head.weight, and what has one dimension"
    assert printed.count(said) == 1
    base = load_file(one.parent.parent / "model/model.safetensors")
    n_adapter = sum(tensor.numel() for tensor in load_file(one / "FINAL/adapter/adapter_model.safetensors").values())
    n = sum(tensor.numel() for tensor in base.values()) + n_adapter
    assert f"model: {n / 1e6:.1f}M parameters, {n_adapter / 1e6:.1f}M trained" in printed


@pytest.mark.slow
def test_two_ranks_are_one(one, two):
    assert_close(two, one)


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_in_which_no_packed_weight_is(folder, two):
    again = run(folder, "again", PACKED, RESUMED, n_processes=2)
    assert numbers(again) == numbers(two)
    assert all(torch.equal(tensor, final(two)[name]) for name, tensor in final(again).items())
    assert_close(run(folder, "alone", PACKED, RESUMED), two)
    for file in (two / "checkpoints/step-2").glob("*.safetensors"):
        tensors = load_file(file)
        assert tensors and all("lora" in name and tensor.dtype == torch.float32 for name, tensor in tensors.items())


@pytest.mark.slow
def test_another_base_is_refused(folder, two):
    argv = [PACKED, RESUMED, "model.name_or_path=dequantised", "exp_name=other"]
    done = run_script(SFT, "--config", "config.py", *argv, cwd=folder)
    assert done.returncode and "model.safetensors" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_recomputed_padded_of_some_layers_it_is_the_same(folder):
    argv = ["model.activation_checkpointing=true", "model.packing=false", "model.peft.target_modules=[q_proj,down_proj]"]
    plain = run(folder, "some-plain", *argv, "model.name_or_path=dequantised")
    assert numbers(run(folder, "some", PACKED, *argv)) == numbers(plain)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler, which torch.compile needs on a CPU")
def test_a_compiled_run_is_the_same(folder):
    argv = [PACKED, "n_examples=8", "model.gradient_accumulation_steps=1", "warmup=0", "n_eval_examples=0"]  # compiled once
    compiled = run(folder, "compiled", *argv, "model.compile=true", "model.activation_checkpointing=true")
    for line, expected in zip(numbers(compiled), numbers(run(folder, "eager", *argv)), strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_a_new_model_s_weights_are_quantised_too(folder):
    described = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                 "num_attention_heads": 4}
    argv = [PACKED, "model.random_init=" + json.dumps(described), "n_examples=8"]
    assert numbers(run(folder, "new", *argv, n_processes=2))[-1]["loss/eval"] == pytest.approx(
        numbers(run(folder, "new-alone", *argv))[-1]["loss/eval"], rel=1e-6)
    said = "quantised: 12 linear layers; not so: model.embed_tokens.weight, model.layers.*.mlp.down_proj.weight, lm_head.weight"
    assert said in (folder / "runs/new/printed").read_text()


@pytest.mark.slow
def test_of_a_mixture_what_is_no_expert_is_quantised(folder):
    """Each process loads all of it, since its experts are one tensor in the model, and each by itself in the files."""
    config = MixtralConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=256,
                           num_key_value_heads=2, num_local_experts=2, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for base in ("mixture", "plain-mixture"):  # the second with the linears' weights as they are after quantising
        shutil.copytree(folder / "model", folder / base)
        model.save_pretrained(folder / base)
        for linear in (module for name, module in model.named_modules() if name.endswith("_proj")):
            linear.weight.data = unpack(linear.weight.data)
    argv = ["n_examples=16", "export_dtype=float32"]
    own = run(folder, "of-mixture", PACKED, *argv, "model.name_or_path=mixture")
    plain = run(folder, "of-plain-mixture", *argv, "model.name_or_path=plain-mixture")
    assert numbers(own) == numbers(plain) and final(own).keys() == final(plain).keys()
    assert all(torch.equal(tensor, final(plain)[name]) for name, tensor in final(own).items())
    two = run(folder, "of-mixture-on-2", PACKED, *argv, "model.name_or_path=mixture", n_processes=2)
    assert numbers(two)[-1]["loss/eval"] == pytest.approx(numbers(own)[-1]["loss/eval"], rel=1e-6)
    assert "quantised: 8 linear layers; not so: model.embed_tokens.weight, model.layers.*.mlp.gate.weight, " \
           "model.layers.*.mlp.experts.gate_up_proj" in (own / "printed").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def write_nan(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][-1, -1] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return f"{name} holds values that are not finite"


@pytest.mark.slow
def test_an_error_is_one_line(folder, tmp_path):
    write_model(tmp_path / "narrow", intermediate_size=96)
    write_model(tmp_path / "wild", hidden_size=64, intermediate_size=192)
    for argv, said in [
            (["model.use_peft=false"], "model.peft.quantise=true needs model.use_peft=true"),
            ([f"model.name_or_path={tmp_path}/narrow", "model.peft.target_modules=[q_proj]"], "multiple of 64 inputs"),
            ([f"model.name_or_path={tmp_path}/wild"], write_nan(tmp_path / "wild"))]:
        done = run_script(SFT, "--config", "config.py", PACKED, *argv, "exp_name=broken", cwd=folder)
        assert done.returncode == 1 and said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
        assert done.stderr.count(said) == 1


def test_a_model_that_casts_to_a_weight_s_dtype_is_told():
    linear = QuantisedLinear(torch.nn.Linear(64, 8), PAIRS)
    for layer in (linear, LoRALinear(linear, 2, 4, 0.0)):
        with pytest.raises(TypeError, match="casts to a weight's dtype, which is torch.uint8 where the weight is packed"):
            layer(torch.ones(3, 64).to(layer.weight.dtype))
