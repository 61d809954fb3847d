"""FINAL is the base's folder with other weights: read alike by transformers 4 and 5, its other files the base's bytes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import process_of_one, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.base import Config, ModelConfig, PeftConfig
from export import export_model
from fsdp_utils import init_processes, make_mesh, shard_model
from lora import NEW_ROWS, LoRALinear
from make_tiny import make_rows, train_tokenizer
from model_utils import load_model, load_tokenizer, load_weights
from nf4 import dequantise, pairs_of_values
from nf4 import quantise as quantise_rows
from sft import make_model

pytestmark = pytest.mark.slow
FOUR = ["transformers==4.57.6", "tokenizers==0.22.1", "huggingface_hub==0.36.0", "peft==0.13.2"]
KINDS = ["llama3", "llama2", "qwen2", "mistral", "gemma2", "neox"]

WRITE_BASES = """
import json, shutil, sys
from pathlib import Path
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPTNeoXConfig, LlamaConfig, MistralConfig,
                          Qwen2Config, __version__)
assert __version__.startswith("4.57")
tokenizer, out = map(Path, sys.argv[1:])
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=256,
             max_position_embeddings=256, bos_token_id=1, eos_token_id=2)
scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
configs = {"llama3": LlamaConfig(**sizes, num_key_value_heads=2, rope_theta=5e5, rope_scaling=scaled),
           "llama2": LlamaConfig(**sizes), "qwen2": Qwen2Config(**sizes, num_key_value_heads=2, rope_theta=1e6),
           "mistral": MistralConfig(**sizes, num_key_value_heads=2, rope_theta=1e6, head_dim=8),
           "gemma2": Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8),
           "neox": GPTNeoXConfig(**sizes, rotary_pct=0.25)}
for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(out / name)
    for file in tokenizer.iterdir():
        shutil.copy(file, out / name)
    if name != "llama2":  # which has a tokenizer.model alone
        AutoTokenizer.from_pretrained(out / name).save_pretrained(out / name)
"""
READ_ADAPTER = """
import json, sys
import torch
from peft import PeftModel, __version__
from transformers import AutoModelForCausalLM
assert __version__ == sys.argv[3]
logits = []
for folder, adapter in ((sys.argv[1], sys.argv[2] + "/adapter"), (sys.argv[2], None)):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.no_grad():
        logits.append(model.eval()(torch.arange(200)[None]).logits)
print(json.dumps([(logits[0] - logits[1]).abs().max().item(), logits[1].abs().max().item()]))
"""
READ = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(torch.arange(200)[None]).logits[0, -1]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "add 1 and 2"}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer.convert_tokens_to_ids(["</s>", "A"])
    print(json.dumps([logits.tolist(), text, ids, model.generation_config.eos_token_id]))
"""


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Runs a script by transformers 4, beside today's torch; returns what it printed."""
    folder = tmp_path_factory.mktemp("four")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *FOUR], check=True)

    def run(script: str, *arguments) -> str:
        done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(folder)})
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="module")
def bases(four, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    (folder / "tokenizer").mkdir()
    train_tokenizer(make_rows(200, 1)[0], folder / "tokenizer")
    four(WRITE_BASES, folder / "tokenizer", folder)
    return folder


def export(base: Path, folder: Path, export_dtype: str = "", **settings) -> None:
    """A folder as a run leaves it whose every trained weight has moved."""
    config = Config(exp_name="x", cache_dir=str(folder.parent), export_dtype=export_dtype,
                    model=ModelConfig(name_or_path=str(base), **settings))
    with process_of_one():
        *_, device = init_processes(1)
        tokenizer = load_tokenizer(str(base), "", chat_template=config.model.chat_template)
        model = make_model(config.model, tokenizer, [tokenizer.eos_token_id], "", device)
        shard_model(model, make_mesh(device), "target_logps", dtype=torch.float32)
        load_weights(model)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.to_local().add_(0.01 * torch.randn_like(parameter.to_local()))
        export_model(folder, model, tokenizer, 1, {"step": 1}, dataclasses.asdict(config), merged=True)


@pytest.fixture(scope="module")
def finals(bases, tmp_path_factory):
    folder, umask = tmp_path_factory.mktemp("finals"), os.umask(0o022)
    for kind in KINDS:
        export(bases / kind, folder / kind)
    os.umask(umask)
    return folder


def test_transformers_4_and_5_read_the_same(four, finals):
    old = [json.loads(line) for line in four(READ, *(finals / kind for kind in KINDS)).splitlines()]
    script = subprocess.run([sys.executable, "-c", READ, *(str(finals / kind) for kind in KINDS)], capture_output=True, text=True)
    new = [json.loads(line) for line in script.stdout.splitlines()]
    assert len(old) == len(new) == len(KINDS)
    for kind, (logits, *facts), (other_logits, *other_facts) in zip(KINDS, old, new):
        assert facts == other_facts, kind
        assert max(abs(a - b) for a, b in zip(logits, other_logits)) == 0.0, kind
        assert facts[0].removeprefix("<s>") == "<|user|>\nadd 1 and 2\n<|assistant|>\n"


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_run_did_not_change_is_the_base_s(bases, finals, kind):
    base, final = bases / kind, finals / kind
    own = {"metrics.json", "scheduler.json", "sft_config.json", "files.json", "chat_template.jinja"}
    assert {file.name for file in final.iterdir()} == {file.name for file in base.iterdir()} | own
    for file in base.iterdir():
        if file.name not in ("model.safetensors", "tokenizer_config.json"):
            assert (final / file.name).read_bytes() == file.read_bytes(), file
    before, after = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (base, final))
    assert after == before | {"chat_template": (final / "chat_template.jinja").read_text()}  # the run's: the base had none
    before, after = (load_file(folder / "model.safetensors") for folder in (base, final))
    assert {name: tensor.dtype for name, tensor in before.items()} == {name: tensor.dtype for name, tensor in after.items()}
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {oct(file.stat().st_mode & 0o777) for file in final.iterdir()} == {"0o644"}


def test_only_the_keys_that_a_run_changes_are_changed(bases, tmp_path):
    base, final = tmp_path / "base", tmp_path / "final"
    subprocess.run(["cp", "-r", bases / "llama3", base], check=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"of_its_own": [1]}))
    (base / "generation_config.json").write_text('{"eos_token_id": [7], "temperature": 0.6}')
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}")
    export(base, final, chat_template=str(template), export_dtype="float32")
    assert json.loads((final / "config.json").read_text()) == config | {"of_its_own": [1], "dtype": "float32"}
    assert json.loads((final / "generation_config.json").read_text()) == {"eos_token_id": [2, 7], "temperature": 0.6}
    assert json.loads((final / "tokenizer_config.json").read_text())["chat_template"] == template.read_text()
    assert {tensor.dtype for tensor in load_file(final / "model.safetensors").values()} == {torch.float32}


def test_a_lora_run_s_final_has_the_base_s_files_too(bases, tmp_path):
    export(bases / "qwen2", tmp_path / "final", use_peft=True)
    assert (tmp_path / "final/config.json").read_bytes() == (bases / "qwen2/config.json").read_bytes()
    assert {tensor.dtype for tensor in load_file(tmp_path / "final/model.safetensors").values()} == {torch.bfloat16}
    assert (tmp_path / "final/adapter/adapter_model.safetensors").stat().st_mode & 0o077
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert AutoTokenizer.from_pretrained(tmp_path / "final").chat_template


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_of_a_frozen_base_held_in_bf16_the_files_own_numbers_are_kept(tmp_path, dtype, quantise):
    """As on a GPU; three tokens are new, for which the model grows."""
    write_model(tmp_path / "base", hidden_size=64, dtype=dtype)
    settings = ModelConfig(name_or_path=str(tmp_path / "base"), use_peft=True, peft=PeftConfig(lora_r=4, quantise=quantise))
    with process_of_one():
        *_, device = init_processes(1)
        tokenizer = load_tokenizer(settings.name_or_path, "", ("<|a|>", "<|b|>", "<|c|>"))
        model = make_model(settings, tokenizer, [2], "", device,
                           load=lambda *given, **options: load_model(*given[:5], torch.bfloat16, **options))
        shard_model(model, make_mesh(device), "target_logps", dtype=torch.bfloat16)
        load_weights(model)
        torch.manual_seed(1)
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.data.to_local().normal_(std=0.1)
        state = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        export_model(tmp_path / "final", model, tokenizer, 1, {"step": 1},
                     dataclasses.asdict(Config(exp_name="x", cache_dir=str(tmp_path), model=settings)), merged=True)
    base, final = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "final"))
    assert base.keys() == final.keys() and {tensor.dtype for tensor in final.values()} == {dtype}
    for name, tensor in base.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in state:
            a, b = (state[f"{layer}.lora_{part}.weight"] for part in "AB")
            w = dequantise(quantise_rows(tensor), pairs_of_values(), torch.bfloat16) if quantise else tensor
            expected = torch.addmm(w.float(), b, a, alpha=model.get_submodule(layer).scaling).to(dtype)
        elif f"{layer}.{NEW_ROWS}" in state:
            expected = torch.cat([tensor, state[f"{layer}.{NEW_ROWS}"].to(dtype)])
        else:
            expected = tensor
        assert torch.equal(final[name], expected), name


def test_peft_0_13_and_today_s_read_the_adapter(four, bases, tmp_path):
    export(bases / "llama3", tmp_path / "final", export_dtype="float32", use_peft=True)
    here = subprocess.run([sys.executable, "-c", READ_ADAPTER, bases / "llama3", tmp_path / "final", peft.__version__],
                          capture_output=True, text=True, check=True).stdout
    for printed in (four(READ_ADAPTER, bases / "llama3", tmp_path / "final", "0.13.2"), here):
        difference, largest = json.loads(printed)
        assert difference < 1e-5 * largest
