"""What is tried of a model before a run: positions, padding, gradients; heads are in test_logps, packing in test_model_utils."""

import functools
import re

import pytest
import torch
from conftest import ROOT, process_of_one, run_script
from transformers import AutoConfig, AutoModelForCausalLM

from fsdp_utils import ModelError, init_processes, make_mesh, shard_model
from logps import target_logps
from lora import LoRALinear, add_lora, name_targets
from trial import check_gradients, check_padding, check_positions, try_model

CPU = torch.device("cpu")
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 64, "max_position_embeddings": 32}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "short_factor": [1.0] * 4,
             "long_factor": [2.0] * 4}


def make_model(model_type: str, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).eval()
    model.target_logps, model.own_attention = functools.partial(target_logps, model), model.config._attn_implementation
    model.uses_own_logits = False
    return model


@pytest.fixture
def group():
    with process_of_one():
        init_processes(1)
        yield


@pytest.mark.parametrize("rope, border", [(LONG_ROPE, 16), ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 32)])
def test_rows_that_would_turn_the_positions_of_others_are_refused(rope, border):
    model = make_model("llama", **TINY, rope_parameters=rope)
    check_positions(model, CPU, border)
    with pytest.raises(ModelError, match=rf"^rows are up to {border + 1} .*{rope['rope_type']} RoPE.*model.max_length={border}$"):
        check_positions(model, CPU, border + 1)
    ids = torch.arange(2 * border)[None]  # as they do: the first logits depend on how long the longest row is
    assert not torch.allclose(model(input_ids=ids).logits[:, :4], model(input_ids=ids[:, :4]).logits, atol=1e-5)


@pytest.mark.parametrize("model_type, options, most", [
    ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 64}, 32),
    ("opt", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
             "max_position_embeddings": 32, "word_embed_proj_dim": 32}, 32),
    ("roberta", TINY | {"is_decoder": True, "pad_token_id": 1}, 30)])
def test_rows_longer_than_a_table_of_positions_are_refused(model_type, options, most):
    model = make_model(model_type, **options)
    check_positions(model, CPU, most)
    model(input_ids=torch.full((1, most), 5))
    with pytest.raises(IndexError if model_type != "roberta" else (IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 5))
    with pytest.raises(ModelError, match=f"^rows are up to {most + 1} tokens long, for which .* no positions: model.max_length="):
        check_positions(model, CPU, most + 1)


def test_a_table_of_positions_too_short_for_the_trial_is_a_line(group):
    """A GPU would be lost where an embedding has no such row."""
    options = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    check_gradients(make_model("gpt2", n_positions=32, **options), CPU)
    with pytest.raises(ModelError, match="^GPT2LMHeadModel has 16 positions, too few for a chat: 32 are needed at least$"):
        check_gradients(make_model("gpt2", n_positions=16, **options), CPU)


def test_rows_longer_than_a_rotating_model_was_made_for_are_said_once(capsys, group):
    model = make_model("llama", **TINY)
    check_positions(model, CPU, 32)
    assert not capsys.readouterr().out
    check_positions(model, CPU, 33)
    assert capsys.readouterr().out == "rows are up to 33 tokens long: LlamaForCausalLM was made for 32\n"


def test_a_model_that_padding_changes_is_refused(group):
    model = make_model("llama", **TINY)
    check_padding(model, CPU)
    own = model.model.forward
    model.model.forward = lambda input_ids, inputs_embeds=None, **kwargs: own(
        inputs_embeds=model.model.embed_tokens(input_ids) * input_ids.shape[1], **kwargs)
    with pytest.raises(ModelError, match="^LlamaForCausalLM: padding changes its numbers, and its rows can't be packed$"):
        check_padding(model, CPU)
    with pytest.raises(ModelError, match="padding changes its numbers"):
        try_model(model, CPU, 8, packing=False)


def test_adapters_that_no_gradient_reaches_are_frozen_and_named(capsys, group):
    """BART's decoder alone has no encoder to attend to."""
    model = make_model("bart", d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=48, vocab_size=64,
                       max_position_embeddings=64)
    add_lora(model, 2, 4, 0.0, "all-linear")
    with torch.no_grad():
        for layer in (layer for layer in model.modules() if isinstance(layer, LoRALinear)):
            layer.lora_B.weight.normal_()
    shard_model(model, make_mesh(CPU), "target_logps")
    check_gradients(model, CPU)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    frozen = {name for name, layer in layers.items() if not layer.lora_A.weight.requires_grad}
    assert frozen == {name for name in layers if "encoder_attn" in name}
    assert all(not model.get_submodule(name).lora_B.weight.full_tensor().any() for name in frozen)
    assert capsys.readouterr().out.startswith("no gradient reaches 16 of 40 weights, which stay as they are; the first is ")
    assert all(parameter.grad is None for parameter in model.parameters())
    adapted = sorted(layers.keys() - frozen)
    assert name_targets(model, adapted)["target_modules"] == adapted  # the attention to the encoder has the same last names


@pytest.mark.slow
def test_types_of_each_special_path_equal_transformers_or_are_refused_by_reason(tmp_path):
    """The quick part of the sweep over all types: benchmarks/all_types.py."""
    types = {"gemma4_text": "packed", "gpt_oss": "packed", "bert": "packed, whole logits", "llama4": "padded",
             "mllama": "packed", "deepseek_v3": "packed", "zamba": "padded", "mamba": "padded", "reformer": "refused"}
    done = run_script(ROOT / "benchmarks/all_types.py", *types, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = {line.split(" | ")[0]: line for line in done.stdout.splitlines() if line.split(" | ")[0] in types}
    assert lines.keys() == types.keys() and "CRASH" not in done.stdout and "WRONG" not in done.stdout
    for name, how in types.items():
        assert f" | {how}" in lines[name].partition(" (")[0], lines[name]
    for line in (line for name, line in lines.items() if types[name] != "refused"):
        assert "lora: exact" in line and re.search(r"qlora: \d+ packed", line) and "export: exact" in line
