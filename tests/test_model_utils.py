"""The model as transformers has it: tokenizers, weights, packing, generation, against naive code, transformers, one process.

Under torchrun this file is also the worker of its tests with two processes:
    torchrun --nproc_per_node=2 tests/test_model_utils.py FOLDER    # writes FOLDER/JOB.pt and what each rank has answered
"""

import dataclasses
import functools
import itertools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import process_of_one, run_well, write_model
from safetensors.torch import load_file, save_file
from test_logps import (
    CPU,
    KINDS,
    SMALL,
    assert_same,
    expected_results,
    in_a_batch,
    make_documents,
    make_model,
    one_by_one,
    results,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTJForCausalLM, PreTrainedTokenizerFast, pipeline
from transformers.generation.streamers import BaseStreamer

from attention import document_attention
from chat import ChatEncoder
from configs.base import ModelConfig
from data import collate_packed, collate_padded
from fsdp_utils import ModelError, end_process, init_processes, make_mesh, shard_model
from model_utils import check_model, generate, load_model, load_tokenizer, load_weights
from trial import can_share_context, enable_packing


@pytest.fixture(scope="module")
def alone():
    """A group of one process."""
    with process_of_one():
        init_processes()
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Loading


WORDS = ["<|user|>", "<|assistant|>", "q", "a", "\n", "<tool>"]


def make_tokenizer(folder: Path, adds_bos=False, **options):
    """Writes and returns a tokenizer of words; it has no chat template unless it is given one."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}, "<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("\n", "isolated"), decoders.Fuse()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    options = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<tool>"]} | options
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_tokenizer_without_template_gets_a_plain_one_without_a_new_token(tmp_path, adds_bos):
    before, tokenizer = make_tokenizer(tmp_path, adds_bos), load_tokenizer(str(tmp_path), "")
    assert len(tokenizer) == len(before) == 9 and tokenizer.all_special_tokens == before.all_special_tokens
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    encoder = ChatEncoder(tokenizer, 64, 32)
    columns, _, _ = encoder.encode_rows(0, Path("x"), 0, [(1, {"messages": 2 * messages})])
    pieces = ["<s>"] * adds_bos + 2 * ["<|user|>", "\n", "q", "\n", "<|assistant|>", "\n", "a", "</s>", "\n"][:-1]
    pieces.insert(8 + adds_bos, "\n")  # behind the first answer alone
    assert tokenizer.convert_ids_to_tokens(columns["ids"].tolist()) == pieces
    assert [piece for piece, is_target in zip(pieces, columns["trained"]) if is_target] == 2 * ["a", "</s>"]
    assert encoder.stop_ids == [tokenizer.eos_token_id]
    for own in (tokenizer, again := save_and_load(tokenizer, tmp_path / "FINAL")):
        prompt = own.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        assert prompt == "<s>" * adds_bos + "<|user|>\nq\n<|assistant|>\n"
        assert own.apply_chat_template(messages, tokenize=False) == prompt + "a</s>\n"
    assert len(again) == 9


def save_and_load(tokenizer, folder: Path):
    """As transformers alone loads what a run has saved."""
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_transformers_own_pipeline_stops_where_the_plain_template_ends_an_answer(tmp_path):
    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), "")
    model = load_model("", NEW | {"num_hidden_layers": 1, "tie_word_embeddings": False}, tokenizer, [tokenizer.eos_token_id], "")
    a, end = tokenizer.convert_tokens_to_ids(["a", "</s>"])
    with torch.no_grad():  # what comes next follows from the last token alone: of a new line "a", of "a" the end, of that "q"
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        width = model.config.hidden_size
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), width))
        follows = {tokenizer.convert_tokens_to_ids("\n"): a, a: end, end: tokenizer.convert_tokens_to_ids("q")}
        model.lm_head.weight.zero_()
        for before, after in follows.items():
            model.lm_head.weight[after, before] = 5
    model.save_pretrained(tmp_path / "FINAL")
    tokenizer.save_pretrained(tmp_path / "FINAL")
    answer = pipeline("text-generation", model=str(tmp_path / "FINAL"))([{"role": "user", "content": "q"}], max_new_tokens=8)
    assert answer[0]["generated_text"][-1] == {"role": "assistant", "content": "a"}


def test_a_template_s_file_goes_before_the_tokenizer_s_own(tmp_path):
    make_tokenizer(tmp_path, chat_template="{{ messages[0].content }}")
    (tmp_path / "mine.jinja").write_text("{{ 'é' + messages[0].content }}\n", encoding="utf-8")
    tokenizer = load_tokenizer(str(tmp_path), "", chat_template=str(tmp_path / "mine.jinja"))
    for own in (tokenizer, save_and_load(tokenizer, tmp_path / "FINAL")):
        assert own.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False) == "éq"


def test_a_tokenizer_with_neither_a_template_nor_an_end_is_told_of_the_key(tmp_path):
    make_tokenizer(tmp_path, eos_token=None)
    with pytest.raises(ModelError, match="neither a chat template nor an eos_token .* model.chat_template=FILE$"):
        load_tokenizer(str(tmp_path), "")


def test_a_tokenizer_keeps_its_template_and_pad_token(tmp_path):
    before = make_tokenizer(tmp_path, chat_template="{{ messages[0].content }}", pad_token="<unk>")
    tokenizer = load_tokenizer(str(tmp_path), "")
    assert (len(tokenizer), tokenizer.chat_template, tokenizer.pad_token) == (len(before), before.chat_template, "<unk>")


@pytest.mark.parametrize("eos, pad", [("</s>", "</s>"), (None, "<unk>")])
def test_pad_token_is_eos_or_else_the_first(tmp_path, eos, pad):
    make_tokenizer(tmp_path, eos_token=eos, chat_template="{{ messages[0].content }}")
    assert load_tokenizer(str(tmp_path), "").pad_token == pad


def make_folder(folder: Path, dtype=torch.float32, eos=2, more_tokens=(), **changes):
    """Writes a model and the tokenizer; returns both as they are loaded by transformers, and with more tokens."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL | {"vocab_size": 9} | changes), dtype=dtype)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return model, load_tokenizer(str(folder), "", more_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_loaded_in_fp32_with_rows_for_new_tokens(tmp_path, dtype, tied):
    before, tokenizer = make_folder(tmp_path, dtype, more_tokens=["<|good|>", "<|bad|>"], tie_word_embeddings=tied)
    model = load_model(str(tmp_path), None, tokenizer, [], "")
    assert (len(tokenizer), model.config.vocab_size, model.n_new_rows) == (11, 64, 55)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embeddings is head) == tied
    for layer, old in ((embeddings, before.get_input_embeddings()), (head, before.get_output_embeddings())):
        assert torch.equal(layer[:9], old.weight.float())
        torch.testing.assert_close(layer[9:], old.weight.double().mean(0).float().repeat(55, 1), rtol=0, atol=1e-8)
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32
        assert name in ("model.embed_tokens.weight", "lm_head.weight") or torch.equal(weight, before.state_dict()[name].float())


def test_padded_embeddings_stay_as_they_are(tmp_path):
    before, tokenizer = make_folder(tmp_path, more_tokens=["<|good|>"], vocab_size=16)
    model = load_model(str(tmp_path), None, tokenizer, [], "", dtype=torch.bfloat16)
    assert not model.n_new_rows and model.dtype == torch.bfloat16
    assert torch.equal(model.get_output_embeddings().weight, before.get_output_embeddings().weight.bfloat16())


@pytest.mark.parametrize("eos, own, stops", [
    (2, [10], [2, 10]), (2, [2], [2]), ([2, 5], [5, 3, 4], [2, 3, 4, 5]), (2, [], [2]), (None, [4], [4])])
def test_the_stop_ids_join_those_of_the_model(tmp_path, eos, own, stops):
    _, tokenizer = make_folder(tmp_path, eos=eos, eos_token_id=eos)
    generation = load_model(str(tmp_path), None, tokenizer, own, "").generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (stops, tokenizer.pad_token_id)


def test_a_model_with_switched_off_sampling_settings_can_be_saved(tmp_path):
    _, tokenizer = make_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.6, "do_sample": False}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs.generation_config.pad_token_id = 1  # it objects only to what has been changed, as we change the stop ids
    with pytest.raises(ValueError, match="temperature"):
        theirs.save_pretrained(tmp_path / "theirs")
    load_model(str(tmp_path), None, tokenizer, [], "").save_pretrained(tmp_path / "ours")


NEW = {"model_type": "llama"} | {key: SMALL[key] for key in SMALL if key != "vocab_size" and not key.endswith("token_id")}


def test_random_init_is_a_new_model_of_the_tokenizers_vocabulary(tmp_path):
    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), "")
    loaded = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loaded.append(load_model("not/read", NEW, tokenizer, [10], "").state_dict())
    torch.testing.assert_close(loaded[0], loaded[1], rtol=0, atol=0)
    assert not torch.equal(loaded[0]["lm_head.weight"], loaded[2]["lm_head.weight"])
    model = load_model("not/read", NEW, tokenizer, [10], "")
    assert {key: getattr(model.config, key) for key in NEW} == NEW
    assert model.config.vocab_size == len(tokenizer) and model.dtype == torch.float32
    assert (model.config.bos_token_id, model.config.pad_token_id) == (tokenizer.bos_token_id, tokenizer.pad_token_id)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 10]
    assert load_model("", NEW | {"vocab_size": 64}, tokenizer, [], "").get_input_embeddings().num_embeddings == 64
    with pytest.raises(ModelError, match=f"^model.random_init: vocab_size=4 is less than .* {len(tokenizer)} tokens$"):
        load_model("", NEW | {"vocab_size": 4}, tokenizer, [], "")


WRONG = {"no type": ("model_type", None), "unknown type": ("model_type", "llama7"), "no language model": ("model_type", "vit"),
         "text for a number": ("hidden_size", "big"), "heads that do not divide the width": ("num_attention_heads", 5),
         "unknown activation": ("hidden_act", "relux"), "misspelt key": ("num_hidden_layer", 2)}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_random_init_is_one_line(tmp_path, wrong):
    make_tokenizer(tmp_path)
    key, value = WRONG[wrong]
    random_init = {name: each for name, each in (NEW | {key: value}).items() if each is not None}
    with pytest.raises(ModelError, match="model.random_init") as raised:
        load_model("", random_init, load_tokenizer(str(tmp_path), ""), [], "")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_the_softcap_of_gemma_2_s_scores_is_in_the_loaded_model(tmp_path):
    write_model(tmp_path / "model")  # for its tokenizer
    model, ids = make_model("gemma2", vocab_size=256), torch.arange(24)[None]
    model.save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    loaded = load_model(path, None, load_tokenizer(path, ""), [], "").eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    loaded.config.attn_logit_softcapping = None
    for layer in loaded.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (loaded(ids).logits - model(ids).logits).abs().max() > 1e-3  # it matters here


def as_pickle(folder):
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_config(**changes):
    def write(folder):
        for file in folder.glob("*config.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return write


def as_remote_code(folder):
    (folder / "code.py").write_text(f"open({str(folder / 'was run')!r}, 'w')\n")
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Slow", "code.Fast"]}
    with_config(auto_map=names, model_type="nobody_knows", tokenizer_class="NobodyKnows")(folder)


BROKEN = {
    "missing": shutil.rmtree, "empty": lambda folder: [file.unlink() for file in folder.iterdir()], "pickle": as_pickle,
    "no weights": lambda folder: (folder / "model.safetensors").unlink(), "remote code": as_remote_code,
    "truncated": lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8]),
    "other shapes": with_config(intermediate_size=64), "a missing layer": with_config(num_hidden_layers=3),
    "an unknown type": with_config(model_type="nobody_knows"), "no JSON": lambda folder: (folder / "config.json").write_text("{"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_folder_that_holds_no_model_is_named_in_one_line(tmp_path, broken):
    _, tokenizer = make_folder(tmp_path / "model")
    BROKEN[broken](tmp_path / "model")
    with pytest.raises(ModelError, match=re.escape(str(tmp_path / "model"))) as raised:
        load_model(str(tmp_path / "model"), None, tokenizer, [], str(tmp_path / "cache"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "model" / "was run").exists()


@pytest.mark.parametrize("broken", ["missing", "empty", "remote code"])
def test_a_folder_that_holds_no_tokenizer_is_named_in_one_line(tmp_path, broken):
    make_folder(tmp_path / "model")
    BROKEN[broken](tmp_path / "model")
    with pytest.raises(ModelError, match=re.escape(str(tmp_path / "model"))) as raised:
        load_tokenizer(str(tmp_path / "model"), str(tmp_path / "cache"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "model" / "was run").exists()


ADAPTED = dataclasses.asdict(ModelConfig(use_peft=True))


@pytest.mark.parametrize("target", ["q_proj", "all-linear", ["k_proj", "layers.1.mlp.up_proj"]])
def test_lora_targets_that_the_model_has_are_taken_by_its_configuration_alone(tmp_path, target):
    make_folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    targets = ADAPTED["peft"] | {"target_modules": target}
    check_model(ADAPTED | {"name_or_path": str(tmp_path / "model"), "peft": targets}, None, "")


def test_a_wrong_lora_target_is_found_in_the_model_that_is_trained(tmp_path):
    make_folder(tmp_path / "model")
    make_model("phi3").save_pretrained(tmp_path / "other")  # it has a qkv_proj, and no q_proj
    wrong = ADAPTED | {"name_or_path": str(tmp_path / "model"), "peft": ADAPTED["peft"] | {"target_modules": ["qkv_proj"]}}
    with pytest.raises(ModelError, match="no linear layer is named 'qkv_proj'; there are down_proj, .*q_proj, .*v_proj$"):
        check_model(wrong, None, "")
    check_model(wrong | {"load_from": str(tmp_path / "other")}, None, "")
    for change in ({"use_peft": False}, {"load_lora_from": "its/own"}):
        check_model(wrong | change, None, "")
    check_model(wrong | {"random_init": {"model_type": "phi3"}}, load_tokenizer(str(tmp_path / "model"), ""), "")
    with pytest.raises(ModelError, match="nowhere: no causal language model can be loaded: .") as raised:
        check_model(wrong | {"name_or_path": str(tmp_path / "nowhere")}, None, "")
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------------------------------------------
# Slices: weights that are read when the model is sharded


def make_slices(folder: Path, dtype=torch.float32, tied=False, size: str = "1GB"):
    """Writes a model, in files of this size at most, and a tokenizer. Returns (model, tokenizer)."""
    model = make_model("qwen2", vocab_size=127, tie_word_embeddings=tied).to(dtype)  # 127 rows, which no number of ranks shares
    model.save_pretrained(folder, max_shard_size=size)
    make_tokenizer(folder)
    return model, load_tokenizer(str(folder), "")


def whole(model) -> dict[str, torch.Tensor]:
    return {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("written, read, tied, size, n_files", [
    (torch.float32, torch.float32, False, "1GB", 1), (torch.float32, torch.float32, True, "50KB", None),
    *((written, read, True, "1GB", 1) for written in (torch.float32, torch.bfloat16, torch.float16)
      for read in (torch.float32, torch.bfloat16)), (torch.bfloat16, torch.float32, False, "50KB", None)])
def test_slices_are_the_weights_in_the_files(alone, tmp_path, written, read, tied, size, n_files):
    before, tokenizer = make_slices(tmp_path, written, tied, size)
    files = {file.name for file in tmp_path.glob("*.safetensors")}
    assert len(files) == n_files or n_files is None and len(files) > 2
    model = load_model(str(tmp_path), None, tokenizer, [], "", read, sliced=True)
    assert {Path(file).name for file, _ in model.weight_files.values()} == files
    assert all(parameter.is_meta for parameter in model.parameters() if parameter.ndim > 1)
    shard_model(model, make_mesh(CPU), dtype=read)
    load_weights(model)
    torch.testing.assert_close(whole(model), {name: tensor.to(read) for name, tensor in before.state_dict().items()},
                               rtol=0, atol=0)
    with torch.no_grad():
        ids = torch.arange(3, 40)[None]
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=read)
        assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)  # so the buffers are right, too


def test_frozen_slices_alone_are_read_where_a_checkpoint_has_the_others(alone, tmp_path):
    before, tokenizer = make_slices(tmp_path)
    model = load_model(str(tmp_path), None, tokenizer, [], "", sliced=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj" in name or "embed_tokens" in name)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    shard_model(model, make_mesh(CPU))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    load_weights(model, frozen_only=True)
    for name, tensor in whole(model).items():
        assert torch.equal(tensor, torch.full_like(tensor, 7.0) if name in trained else before.state_dict()[name]), name
    assert len(trained) == 5


def test_files_that_are_not_the_model_s_are_not_read(alone, tmp_path):
    before, tokenizer = make_slices(tmp_path, size="50KB")
    others = {name: torch.zeros_like(tensor) for name, tensor in before.state_dict().items()}
    for name in ("consolidated", "model-00000-of-00001", "model.fp16", "zeros"):
        save_file(others, tmp_path / f"{name}.safetensors")
    model = load_model(str(tmp_path), None, tokenizer, [], "", sliced=True)
    shard_model(model, make_mesh(CPU))
    load_weights(model)
    torch.testing.assert_close(whole(model), dict(before.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("change, said", [
    ({"strange": torch.zeros(2)}, "1 weights are not this model's, the first is strange"),
    ({"model.norm.weight": None}, "1 weights are missing, the first is model.norm.weight"),
    ({"model.norm.weight": torch.zeros(3)}, r"model.norm.weight has the shape \[3\], the model's is \[32\]"),
    ({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}, "model.norm.weight is I8: quantised")])
def test_weights_that_are_not_the_model_s_are_named(tmp_path, change, said):
    write_model(tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors") | change
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=said):
        load_model(str(tmp_path / "model"), None, load_tokenizer(str(tmp_path / "model"), ""), [], "", sliced=True)


# ---------------------------------------------------------------------------------------------------------------------
# Packed documents


UNPACKABLE = {"mamba", "bloom", "lfm2",  # states, ALiBi, convolutions
              "qwen2_moe", "phimoe"}  # sinks; and where only the mask knows of the window
UNPACKABLE |= set() if GPTJForCausalLM._supports_attention_backend else {"gptj"}  # transformers 5.17


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_come_out_as_one_by_one_or_are_not_packed(alone, capsys, kind):
    documents, model = make_documents(), make_model(kind)
    padded = results(model, in_a_batch(model, documents, collate_padded))
    packed = enable_packing(model, CPU)
    said = capsys.readouterr().out
    assert packed == (kind not in UNPACKABLE)
    if packed:
        assert said == "" and model.config._attn_implementation == "documents"
        assert_same(results(model, in_a_batch(model, documents, collate_packed)), expected_results(kind))
        model.set_attn_implementation(model.own_attention)
    else:
        assert said.startswith(f"not packed: {type(model).__name__} ") and said.count("\n") == 1
    assert model.config._attn_implementation == model.own_attention
    again = results(model, in_a_batch(model, documents, collate_padded))
    torch.testing.assert_close(again, padded, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNPACKABLE])
def test_answers_to_one_context_come_out_as_if_each_had_its_own(alone, capsys, kind):
    """Also where windows are shorter than the context, or reach from an answer into it."""
    rng, documents, shared = np.random.default_rng(3), [], []
    for n_context, *n_answers in ((20, 9, 1, 14), (1, 3, 5), (6, 2, 2)):
        context = rng.integers(8, 60, n_context)
        for n, n_shared in zip(n_answers, (0, n_context, n_context)):
            ids = np.concatenate([context, rng.integers(8, 60, n)])
            documents.append((ids, np.arange(len(ids)) >= n_context))
            shared.append(n_shared)
    model = make_model(kind)
    assert enable_packing(model, CPU)
    expected = results(model, in_a_batch(model, documents, collate_packed))
    assert can_share_context(model, CPU) and not capsys.readouterr().out
    found = results(model, in_a_batch(model, documents, functools.partial(collate_packed, shared=np.array(shared))))
    assert_same(found, expected)


@pytest.mark.parametrize("kind, implementation", [("llama", "eager"), ("llama", "sdpa"), ("lfm2", "eager"), ("bloom", "eager")])
@pytest.mark.parametrize("training", [True, False])
def test_enable_packing_changes_nothing_else(alone, kind, implementation, training):
    model, untouched = (make_model(kind, attn_implementation=implementation).train(training) for _ in range(2))
    packed = enable_packing(model, CPU)
    assert model.config._attn_implementation == ("documents" if packed else implementation)
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), untouched.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - UNPACKABLE - {"mixtral"}))  # there tokens share the experts' matmuls
def test_no_document_sees_another(kind):
    model = make_model(kind)
    assert enable_packing(model, CPU)
    documents = make_documents()
    with torch.no_grad():
        before = in_a_batch(model, documents, collate_packed)
        owners = torch.tensor([i for i, (_, trained) in enumerate(documents) for _ in range(trained.sum())])
        for i, (ids, trained) in enumerate(documents):
            others = [*documents[:i], ((ids - 3 + 1) % 125 + 3, trained), *documents[i + 1:]]
            changed = in_a_batch(model, others, collate_packed) != before
            assert not changed[owners != i].any()
            assert changed[owners == i].all() or not trained.any()


# ---------------------------------------------------------------------------------------------------------------------
# Attention over packed documents


def naive_attention(query, key, value, lengths, scaling, sliding_window, softcap) -> torch.Tensor:
    """softmax over a (T, T) mask that is causal and block-diagonal."""
    owners, places = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), torch.arange(sum(lengths))
    distance = places[:, None] - places
    mask = (owners[:, None] == owners) & (distance >= 0) & (distance < (sliding_window or len(places)))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return torch.einsum("bhqk,bhkd->bqhd", scores.masked_fill(~mask, -math.inf).softmax(-1), value)


def attend(query, key, value, lengths, **options) -> torch.Tensor:
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    out, probabilities = document_attention(torch.nn.Module(), query, key, value, None, cu_seq_lens_q=ends,
                                            cu_seq_lens_k=ends, max_length_q=max(lengths), max_length_k=max(lengths), **options)
    assert probabilities is None
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("sliding_window", [None, 1, 5, 11, 100])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_document_attention_equals_a_masked_softmax(kv_heads, sliding_window, softcap):
    generator, lengths = torch.Generator().manual_seed(0), [1, 11, 2, 12, 1]
    inputs = [torch.randn(1, heads, sum(lengths), width, generator=generator, dtype=torch.float64, requires_grad=True)
              for heads, width in ((4, 8), (kv_heads, 8), (kv_heads, 6))]  # the values' width is their own affair
    upstream = torch.randn(1, sum(lengths), 4, 6, generator=generator, dtype=torch.float64)
    options = {"scaling": 0.6, "sliding_window": sliding_window, "softcap": softcap}
    outs = attend(*inputs, lengths, **options), naive_attention(*inputs, lengths, **options)
    grads = [torch.autograd.grad(out, inputs, upstream) for out in outs]
    error = 1e-6 if softcap else 1e-14  # Gemma 2's own softmax is fp32, too
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=error)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=10 * error)


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("sliding_window", [None, 1])
def test_dropout_of_attention_drops_probabilities(softcap, sliding_window):
    """A document of one token attends to itself with probability 1: what comes out is its value / (1 - rate), or nothing."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 1000, 8).unbind()
    options = {"scaling": 1.0, "softcap": softcap, "sliding_window": sliding_window, "dropout": 0.25}
    out, value = attend(query, key, value, [1] * 1000, **options), value.transpose(1, 2)
    kept = (out != 0).all(-1)
    torch.testing.assert_close(out, kept[..., None] * value / 0.75, rtol=1e-6, atol=0)
    assert abs(kept.float().mean() - 0.75) < 6 * math.sqrt(0.25 * 0.75 / kept.numel())  # six standard deviations


@pytest.mark.parametrize("kind, rate", [("llama", "attention_dropout"), ("gemma2", "attention_dropout"), ("gpt2", "attn_pdrop")])
def test_attention_drops_out_in_training_only(kind, rate):
    others = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}  # GPT-2's, not of attention
    documents, model, reference = make_documents(), *(make_model(kind, **others | {rate: p}) for p in (0.5, 0.0))
    assert enable_packing(model, CPU) and enable_packing(reference, CPU)
    without = in_a_batch(reference.train(), documents, collate_packed)
    assert torch.equal(in_a_batch(model.eval(), documents, collate_packed), without)
    torch.manual_seed(1)
    dropped, other = (in_a_batch(model.train(), documents, collate_packed) for _ in range(2))
    torch.manual_seed(1)
    again = in_a_batch(model, documents, collate_packed)
    assert torch.equal(again, dropped)
    assert not any(torch.isclose(a, b).all() for a, b in itertools.combinations((without, dropped, other), 2))


@pytest.mark.slow
def test_blocks_are_compiled_twice_and_neither_for_other_documents_nor_for_answers():
    model, _ = make_talker()
    assert enable_packing(model, CPU)
    rng = np.random.default_rng(0)
    batches = [make_documents(lengths) for lengths in ([7, 5], [4, 9, 8], [30], [2, 1, 6, 3, 5])]
    batches += [make_documents(rng.integers(2, 30, rng.integers(1, 6)).tolist()) for _ in range(16)]
    expected = [results(model, in_a_batch(model, documents, collate_packed)) for documents in batches]
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, backend="eager")  # what is traced, without a C++ compiler
    for i, documents in enumerate(batches):  # the second shows which sizes differ
        with torch.compiler.set_stance("fail_on_recompile" if i >= 2 else "default"):
            assert_same(results(model, in_a_batch(model, documents, collate_packed)), expected[i])
            generate(model, [[3, 4, 5], [6]], 1 + i % 3)


# ---------------------------------------------------------------------------------------------------------------------
# Generation


PROMPTS = [ids.tolist() for ids in np.split(np.random.default_rng(5).integers(3, 128, 46), [4, 13, 14, 29, 35, 37])]
LENGTH = 10  # tokens of an answer at most


def theirs(model, prompt: list[int], **settings) -> list[int]:
    """The answer by transformers alone, to one prompt without padding, with the token that ends it."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": LENGTH, "pad_token_id": 0} | settings
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt):].tolist()


def cut(answer: list[int], stops: list[int]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in stops, answer))


@functools.cache
def expected_answers(kind: str, **changes) -> tuple[list[int], list[list[int]]]:
    """Returns (ids that end an answer, answers to PROMPTS by transformers), all of them different, some of which end early."""
    model = make_model(kind, **changes)
    whole = [theirs(model, prompt, eos_token_id=None) for prompt in PROMPTS]
    ended = {stop: [tuple(cut(answer, [2, stop])) for answer in whole] for stop in range(3, 128)}
    stop = max(ended, key=lambda stop: (len(set(ended[stop])), len(set(map(len, ended[stop])))))
    answers = [cut(theirs(model, prompt, eos_token_id=[2, stop]), [2, stop]) for prompt in PROMPTS]
    assert len(set(map(tuple, answers))) == len(PROMPTS) and min(map(len, answers)) < max(map(len, answers)) == LENGTH
    return [2, stop], answers


def make_talker(kind: str = "llama", **changes):
    """Returns a model with such stop ids, and those answers."""
    model, (stops, answers) = make_model(kind, **changes), expected_answers(kind, **changes)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [*stops], 0
    return model, answers


@pytest.mark.parametrize("kind, batch_size", [
    ("llama", 1), ("llama", 2), ("llama", 64), ("gemma2", 3), ("mistral", 3), ("gpt2", 3), ("mamba", 3), ("bloom", 3),
    ("lfm2", 3)])
def test_greedy_answers_are_those_of_transformers_one_by_one_in_the_order_of_the_prompts(kind, batch_size):
    model, expected = make_talker(kind, tie_word_embeddings=False)  # tied, some would say the same token again and again
    assert generate(model, PROMPTS, LENGTH, batch_size) == expected


def test_a_mixture_whose_balancing_loss_is_trained_answers_too():
    model, expected = make_talker("mixtral", output_router_logits=True)
    assert generate(model, PROMPTS, LENGTH, 3) == expected
    assert model.config.output_router_logits


def test_answers_have_at_most_as_many_tokens_as_are_asked_for():
    model, expected = make_talker()
    for n in (1, 3):
        assert generate(model, PROMPTS, n) == [answer[:n] for answer in expected]
    assert generate(model, [], LENGTH) == []
    assert [] in expected  # where the first token ends it


def test_the_model_s_own_settings_neither_apply_nor_are_lost():
    model, expected = make_talker()
    model.generation_config.update(repetition_penalty=3.0, no_repeat_ngram_size=1, temperature=3.0, top_k=5, do_sample=True,
                                   min_new_tokens=LENGTH, max_length=3)
    own, content = model.generation_config, model.generation_config.to_dict()
    by_them = [theirs(model, prompt) for prompt in PROMPTS]
    assert all(cut(penalised, own.eos_token_id) != plain for penalised, plain in zip(by_them, expected))
    assert generate(model, PROMPTS, LENGTH) == expected
    assert model.generation_config is own and own.to_dict() == content
    assert [theirs(model, prompt) for prompt in PROMPTS] == by_them


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (2.0, 0.5)])
def test_drawn_answers_are_those_that_transformers_draws(temperature, top_p):
    model, greedy = make_talker()
    stops, drawn = model.generation_config.eos_token_id, []
    for prompt in PROMPTS:
        torch.manual_seed(3)
        [answer] = generate(model, [prompt], LENGTH, 1, temperature, top_p)
        torch.manual_seed(3)
        assert answer == cut(theirs(model, prompt, do_sample=True, temperature=temperature, top_p=top_p, top_k=0), stops)
        drawn.append(answer)
    assert drawn != greedy


class Collected(BaseStreamer):
    """Takes the tokens one by one, and the ctrl-C of whoever reads along."""

    def __init__(self, n_taken: int | None = None):
        self.tokens, self.n_taken = [], n_taken

    def put(self, value):
        self.tokens += value.flatten().tolist()
        if len(self.tokens) == self.n_taken:
            raise KeyboardInterrupt

    def end(self):
        self.tokens.append("end")


def test_a_streamer_is_told_each_token():
    (model, expected), streamer = make_talker(), Collected()
    i = max(range(len(PROMPTS)), key=lambda i: len(expected[i]))
    assert generate(model, [PROMPTS[i]], LENGTH, streamer=streamer) == [expected[i]]
    assert streamer.tokens == [*PROMPTS[i], *expected[i], "end"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("interrupted", [True, False])
def test_generating_leaves_the_model_as_it_was(training, packed, interrupted):
    model, expected = make_talker(attention_dropout=0.5)
    assert not packed or enable_packing(model, CPU)
    own, content, attention = model.generation_config, model.generation_config.to_dict(), model.config._attn_implementation
    assert attention == ("documents" if packed else "sdpa")
    model.train(training)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            generate(model, PROMPTS[1:2], LENGTH, streamer=Collected(len(PROMPTS[1]) + 2))
    else:
        assert generate(model, PROMPTS, LENGTH) == expected  # without dropout, and not by the packed attention
    assert {module.training for module in model.modules()} == {training}
    assert model.generation_config is own and own.to_dict() == content
    assert model.config._attn_implementation == attention
    documents, reference = make_documents(), make_model("llama")
    logps = in_a_batch(model.eval(), documents, collate_packed if packed else collate_padded)
    torch.testing.assert_close(logps, one_by_one(reference, documents), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


JOBS = {  # kind of model, and the documents of each rank
    "untied": ("llama", [[0, 1, 2], [3, 4, 5]]), "tied": ("tied llama", [[2], [0, 1, 3, 4, 5]]),
    "a rank without a target": ("tied llama", [[0, 2, 3, 4], [1]]), "bias and softcap": ("gemma2", [[4, 5], [0, 1, 2, 3]]),
}
ROUNDS = [(7, 64), (7, 1), (3, 1), (1, 2), (0, 2)]  # prompts and the batch size: one more than the ranks share, one in all, none


def worker(folder: Path) -> None:
    rank, _, device = init_processes()
    mesh, answers = make_mesh(device), {}
    for name, (kind, shares) in JOBS.items():
        model, _ = make_talker(kind)
        shard_model(model, mesh, "target_logps")
        parameters = dict(model.named_parameters())
        assert enable_packing(model, device)
        answers[name] = [generate(model, PROMPTS[:n], LENGTH, batch_size) for n, batch_size in ROUNDS]
        logps = in_a_batch(model, [make_documents()[i] for i in shares[rank]], collate_packed)
        (logps.sum() / 100).backward()
        grads = {key: parameter.grad.full_tensor() for key, parameter in parameters.items()}
        everyone = [None, None]
        dist.all_gather_object(everyone, logps.detach())
        if rank == 0:
            torch.save((torch.cat(everyone), grads), folder / f"{name}.pt")
    model = load_model(str(folder / "model"), None, load_tokenizer(str(folder / "model"), ""), [], "", sliced=True)
    shard_model(model, mesh, "target_logps")
    load_weights(model)
    loaded = whole(model)
    if rank == 0:
        torch.save(loaded, folder / "loaded.pt")
    (folder / f"answers-{rank}.json").write_text(json.dumps(answers))
    dist.barrier()
    end_process()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    make_slices(folder / "model", size="50KB")
    run_well(__file__, folder, n_processes=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_two_processes_have_the_gradient_of_one(sharded, job):
    kind, shares = JOBS[job]
    reference = make_model(kind, attn_implementation="eager")
    documents = [make_documents()[i] for share in shares for i in share]
    expected = results(reference, one_by_one(reference, documents))
    assert_same(torch.load(sharded / f"{job}.pt"), expected, logp_error=1e-5, grad_error=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_each_of_two_processes_has_the_answers_of_one(sharded, job):
    _, expected = expected_answers(JOBS[job][0])
    for rank in range(2):
        assert json.loads((sharded / f"answers-{rank}.json").read_text())[job] == [expected[:n] for n, _ in ROUNDS]


@pytest.mark.slow
def test_two_processes_read_the_slices_of_one_model(sharded):
    expected = AutoModelForCausalLM.from_pretrained(sharded / "model").state_dict()
    torch.testing.assert_close(torch.load(sharded / "loaded.pt"), dict(expected), rtol=0, atol=0)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
