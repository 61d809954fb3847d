"""Each supported family of models: two steps on 2 processes, the export and its reload, against plain transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from conftest import store_rows
from forked import run_ranks, whole
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from chat import ChatEncoder
from configs.base import ModelConfig
from data import IGNORE, SFTDataLoader, TokenisedRows
from export import save_model, write_gathered
from fsdp_utils import all_reduce_means, clip_gradients, end_process, init_processes, make_mesh, shard_model
from make_tiny import make_rows, train_tokenizer
from model_utils import load_tokenizer, load_weights
from sft import get_batch_metrics, make_model, make_optimizer
from trial import check_head, enable_packing

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64}
GEMMA = TINY | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}  # its first layer is windowed, its second not
LLAMA_3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
FAMILIES = {  # what sets each apart from the others; windows are shorter than most documents
    "Llama 2": ("llama", TINY | {"num_key_value_heads": 4}),
    "Llama 3": ("llama", TINY | {"rope_parameters": LLAMA_3_ROPE}),
    "Mistral": ("mistral", TINY | {"sliding_window": 8}),
    "Qwen 2": ("qwen2", TINY | {"tie_word_embeddings": True}),  # as its models of up to 1.5B
    "Qwen 2.5": ("qwen2", TINY | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "Qwen 3": ("qwen3", TINY | {"head_dim": 16}),
    "Gemma 2": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "Gemma 3": ("gemma3_text", GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    "GPT-NeoX (Pythia)": ("gpt_neox", TINY),
    "Phi-3": ("phi3", TINY | {"sliding_window": 8}),
    "OLMo 2": ("olmo2", TINY),
    "SmolLM3": ("smollm3", TINY | {"no_rope_layers": [1, 0]}),
    "GPT-2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
                       "attn_pdrop": 0.0}),
    "Mixtral": ("mixtral", TINY | {"num_local_experts": 4}),
    "Qwen 2 MoE": ("qwen2_moe", TINY | EXPERTS),
    "Mixtral, balanced": ("mixtral", TINY | {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}),
    "gpt-oss, with sinks": ("gpt_oss", TINY | {
        "head_dim": 16, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"]}),
    "HyperCLOVA X, by its own logits": ("hyperclovax", TINY | {"logits_scaling": 0.5}),
    "Qwen 2 MoE, balanced": ("qwen2_moe", TINY | EXPERTS | {"output_router_logits": True, "router_aux_loss_coef": 0.5}),
}
LENGTHS, BATCH, VOCABULARY = [40, 3, 17, 5, 29, 12, 9, 33, 4, 21], 6, 256  # a step of 6 rows, and one of 4
PROBE = torch.arange(3, 27)[None]  # ids to compare logits of
families = pytest.mark.parametrize("family", [pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES])


# ---------------------------------------------------------------------------------------------------------------------
# What the processes are given


def make_documents() -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, trained): from one target, the last token, to all but the first."""
    rng, documents = np.random.default_rng(7), []
    for i, length in enumerate(LENGTHS):
        documents.append((rng.integers(3, VOCABULARY, length), np.arange(length) >= (length - 1, length // 2, 1)[i % 3]))
    return documents


def write_random_model(folder: Path, model_type: str, options: dict) -> None:
    """None of its weights, norms and biases is a one or a zero."""
    torch.manual_seed(3)
    special = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options, **special))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All that the processes need, and what they have written."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "tokenizer").mkdir()
    train_tokenizer(make_rows(200, 1)[0], folder / "tokenizer")
    for family, (model_type, options) in FAMILIES.items():
        write_random_model(folder / family, model_type, options)
    store_rows(folder / "rows", make_documents())
    run_ranks(2, work, folder)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[str, dict]:
    return torch.load(folder / "results.pt", weights_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# What each process does, as sft.main does it


def work(folder: Path) -> None:
    rank, world_size, device = init_processes()
    rows, tokenizer = TokenisedRows(folder / "rows", []), load_tokenizer(str(folder / "tokenizer"), "")
    results = {family: train(folder, family, rows, tokenizer, rank, world_size, device) for family in FAMILIES}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    end_process()


def train(folder: Path, family: str, rows, tokenizer, rank: int, world_size: int, device: torch.device) -> dict:
    model = make_model(ModelConfig(name_or_path=str(folder / family)), tokenizer, [2], "", device)
    shard_model(model, make_mesh(device), "target_logps")
    load_weights(model)
    optimizer = make_optimizer(model, 1e-2, (0.9, 0.999), 1e-5, 0.01)
    check_head(model, device)
    packing = enable_packing(model, device)
    result = {"sliced": bool(model.weight_files), "packed": packing, "steps": []}
    loader = SFTDataLoader(rows, np.arange(len(rows)), len(rows), batch_size=BATCH, pad_id=2, packing=packing,
                           microbatch_tokens=8192, rank=rank, world_size=world_size)
    for batch in loader:
        weights = whole_weights(model)
        loss, metrics = get_batch_metrics(model, batch, "train", batch["global_target_count"])
        loss.backward()
        norm = clip_gradients(model.parameters(), 1e9)
        gradients = whole({name: parameter.grad for name, parameter in model.named_parameters()})
        loss = all_reduce_means(metrics)["loss/train"]
        result["steps"].append({"weights": weights, "gradients": gradients, "norm": norm, "loss": loss})
        optimizer.step()
        optimizer.zero_grad()
    write_gathered(model, lambda parts: save_model(folder / f"{family}-trained", model, parts))
    model.set_attn_implementation(model.own_attention)  # the packed one must be told where documents end
    with torch.no_grad():
        logits = model.eval()(input_ids=PROBE).logits
    return result | {"weights": whole_weights(model), "logits": logits}


def whole_weights(model) -> dict[str, torch.Tensor]:
    own, state = dict(model.named_parameters()), model.state_dict()  # which shards again what a forward has gathered
    return whole({name: state[name] for name in own})


# ---------------------------------------------------------------------------------------------------------------------
# The reference: plain transformers, one process, one row at a time without padding, its own eager attention


def naive_step(folder: Path, weights: dict[str, torch.Tensor], documents: list) -> tuple[float, dict[str, torch.Tensor]]:
    """Returns (loss, gradients) of the model in the folder with these weights: sum of NLL / count of targets.

    The gradients of a balanced mixture of experts are also those of transformers' auxiliary loss, the mean over all tokens of
    what it is of their row.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    loss, count, balance = 0.0, sum(int(trained.sum()) for _, trained in documents), 0.0
    for ids, trained in documents:
        ids, trained = torch.as_tensor(ids), torch.as_tensor(trained)
        output, labels = model(input_ids=ids[None]), ids.where(trained, IGNORE)[1:]
        loss = loss + F.cross_entropy(output.logits[0, :-1], labels, ignore_index=IGNORE, reduction="sum")
        if getattr(model.config, "output_router_logits", False):
            balance = balance + model.config.router_aux_loss_coef * output.aux_loss * len(ids)
    (loss / count + balance / sum(len(ids) for ids, _ in documents)).backward()
    return loss.item() / count, {name: parameter.grad for name, parameter in model.named_parameters()}


def load_whole(folder: Path):
    """from_pretrained, where no weight may be missing, left over or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # transformers 5.17's sdpa leaves the softcap out
    return model.eval()


def names_in(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys()}


@families
def test_weights_are_read_by_slices_unless_they_are_cut_otherwise_in_the_file(folder, results, family):
    """transformers fuses the matrices of a mixture's experts; GPT-NeoX's head has another name there, which is no obstacle."""
    alike = names_in(folder / family) == dict(load_whole(folder / family).named_parameters()).keys()
    fused = family.startswith(("Mixtral", "Qwen 2 MoE"))
    assert results[family]["sliced"] == (not fused)
    assert alike == (not fused and family != "GPT-NeoX (Pythia)")


@families
def test_every_family_is_packed(results, family):
    assert results[family]["packed"] is True


@families
def test_loss_and_gradients_are_those_of_transformers_row_by_row(folder, results, family):
    documents, steps = make_documents(), results[family]["steps"]
    assert len(steps) == 2
    start = dict(load_whole(folder / family).named_parameters())
    assert start.keys() == steps[0]["weights"].keys()
    for name, weight in start.items():
        assert torch.equal(steps[0]["weights"][name], weight), name  # it began with what is in the file
    for step, part in zip(steps, (documents[:BATCH], documents[BATCH:])):
        loss, gradients = naive_step(folder / family, step["weights"], part)
        assert step["loss"] == pytest.approx(loss, rel=1e-6)
        assert step["gradients"].keys() == gradients.keys()
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        assert step["norm"].item() == pytest.approx(norm.item(), rel=1e-5)
        for name, gradient in gradients.items():  # one that is next to nothing is measured by the largest
            error = (step["gradients"][name] - gradient).norm()
            assert error <= 1e-5 * max(gradient.norm(), 0.01 * norm), (name, error / gradient.norm())


@families
def test_the_export_is_the_trained_model_in_the_family_s_own_format(folder, results, family):
    result, start = results[family], load_whole(folder / family)
    exported = load_whole(folder / f"{family}-trained")
    assert type(exported) is type(start)
    assert names_in(folder / f"{family}-trained") == names_in(folder / family)
    parameters = dict(exported.named_parameters())
    assert parameters.keys() == result["weights"].keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, result["weights"][name]), name
        assert not torch.equal(parameter, start.get_parameter(name)), name  # both steps were made
    with torch.no_grad():
        torch.testing.assert_close(exported(input_ids=PROBE).logits, result["logits"], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# A tokenizer that is a sentencepiece model alone


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_tokenizer_of_sentencepiece_alone(tmp_path, adds_bos):
    rows, _ = make_rows(200, 1)
    train_tokenizer(rows, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": adds_bos}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(str(tmp_path), "")
    assert len(tokenizer) == reference.vocab_size()  # no token is added
    for row in rows[:50]:
        text = f"{row['prompt']} {row['completion']}"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == reference.encode(text) and reference.unk_id() not in ids
        assert tokenizer.decode(ids) == text

    row = {"prompt": "reverse ABC", "completion": "CBA"}
    columns, _, _ = ChatEncoder(tokenizer, 64, 48).encode_rows(0, Path("x"), 0, [(1, row)])
    ids = columns["ids"].tolist()
    bos = "<s>" if adds_bos else ""
    assert tokenizer.decode(ids) == bos + "<|user|>\nreverse ABC\n<|assistant|>\nCBA</s>"
    assert tokenizer.decode([token for token, target in zip(ids, columns["trained"]) if target]) == "CBA</s>"

    tokenizer.save_pretrained(tmp_path / "FINAL")  # as a run does
    again = load_tokenizer(str(tmp_path / "FINAL"), "")
    assert len(again) == len(tokenizer)
    same, _, _ = ChatEncoder(again, 64, 48).encode_rows(0, Path("x"), 0, [(1, row)])
    assert all((same[name] == columns[name]).all() for name in columns) and len(same["ids"]) == len(ids)
