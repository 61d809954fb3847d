"""The log-prob kernel, attention over packed documents, loading: against naive code in fp64, transformers, one process.

Under torchrun this file is also the worker of its sharded tests:
    torchrun --nproc_per_node=2 tests/test_model_utils.py FOLDER    # writes the gradients of each of JOBS
"""

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
from conftest import ROOT, run_well, write_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, GPTJForCausalLM, PreTrainedTokenizerFast

import model_utils
from data import IGNORE, ChatEncoder, collate_packed, collate_padded
from fsdp_utils import init_processes, shard_model
from model_utils import (
    ModelError,
    check_head,
    document_attention,
    enable_packing,
    linear_logps,
    load_model,
    load_tokenizer,
    target_logps,
)
from sft import get_batch_logps

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


# ---------------------------------------------------------------------------------------------------------------------
# The log-prob kernel


def naive_logps(hidden, weight, labels, bias=None, scale=1.0, softcap=None):
    """The lines of linear_logps' docstring."""
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def make_problem(dtype, rows=50, vocabulary=97, width=16, size=1.0, ids=None, bias=False, device="cpu"):
    """({"hidden", "weight" and perhaps "bias"}, labels); logits are about sqrt(width) * size large."""
    generator = torch.Generator().manual_seed(rows)
    shapes = {"hidden": (rows, width), "weight": (vocabulary, width)} | ({"bias": (vocabulary,)} if bias else {})
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["hidden"] *= size
    ids = torch.tensor(ids or range(vocabulary))
    labels = ids[torch.randint(len(ids), (rows,), generator=generator)]
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}, labels.to(device)


def outcome(logps_of, tensors, labels, trained, upstream, **options) -> dict[str, torch.Tensor]:
    """The logps and the gradients of those trained; `upstream` is a number, c * logps.sum(), or a weight for each token."""
    leaves = {name: tensor.detach().clone().requires_grad_(name in trained) for name, tensor in tensors.items()}
    logps = logps_of(leaves["hidden"], leaves["weight"], labels, leaves.get("bias"), **options)
    assert logps.requires_grad == any(leaf.requires_grad for leaf in leaves.values())
    if logps.requires_grad:
        (upstream * logps.sum() if isinstance(upstream, float) else (upstream.to(logps.dtype) * logps).sum()).backward()
    return {"logps": logps.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


# Roundings of a result that are allowed beside 1.5 times the naive error, which is 0 where the naive lines were lucky, and in
# fp64 always: they are the reference. There huge logits and a softcap, 1 - tanh², lose five digits.
ROUNDINGS = {torch.float64: 1e5, torch.float32: 2, torch.bfloat16: 0.5}


def assert_as_exact_as_naive(tensors, labels, trained, upstream, options, **of_the_kernel) -> None:
    """The kernel's error in the logps and in each gradient is no greater than the naive lines' own in that dtype."""
    in_fp64 = {name: tensor.double() for name, tensor in tensors.items()}
    exact = outcome(naive_logps, in_fp64, labels, trained, upstream, **options)
    naive = outcome(naive_logps, tensors, labels, trained, upstream, **options)
    kernel = outcome(linear_logps, tensors, labels, trained, upstream, **options, **of_the_kernel)
    assert kernel.keys() == naive.keys()
    for name, result in kernel.items():
        assert (result.dtype, result.shape) == (naive[name].dtype, naive[name].shape)
        error, naive_error = ((each[name].double() - exact[name]).norm().item() for each in (kernel, naive))
        rounding = torch.finfo(result.dtype).eps * exact[name].norm().item()
        assert error <= 1.5 * naive_error + ROUNDINGS[result.dtype] * rounding, name  # which no NaN is


HEADS = {"plain": {}, "bias": {"bias": True}, "scale": {"scale": 0.3}, "softcap": {"softcap": 2.0},
         "all": {"bias": True, "scale": 3.0, "softcap": 5.0}}
PROBLEMS = {"uneven chunks": {}, "whole chunks": {"rows": 49}, "less than a chunk": {"rows": 5}, "one token": {"rows": 1},
            "no token": {"rows": 0}, "one label": {"ids": [3]}, "first and last ids": {"ids": [0, 96]},
            "huge logits": {"size": 1e4}, "tiny logits": {"size": 1e-4},
            "many chunks": {"rows": 700, "ids": [3], "size": 0.1}}  # whose sum in bf16 would stand out
PER_TOKEN, UNIFORM = False, True
EVERYTHING = ("hidden", "weight", "bias")
MODES = [(EVERYTHING, UNIFORM), (EVERYTHING, PER_TOKEN), (("hidden",), PER_TOKEN), (("hidden",), UNIFORM),
         (("weight", "bias"), UNIFORM), (("weight", "bias"), PER_TOKEN), (("bias",), PER_TOKEN), ((), UNIFORM), ((), PER_TOKEN)]
modes = pytest.mark.parametrize("trained, uniform", MODES, ids=lambda mode: {True: "uniform", False: "per token"}.get(mode)
                                if isinstance(mode, bool) else " ".join(mode) or "nothing")


def upstream_of(labels, uniform) -> float | torch.Tensor:
    return -1 / 77 if uniform else -0.5 - torch.rand(len(labels), generator=torch.Generator().manual_seed(9)).to(labels.device)


@pytest.fixture
def chunks_of_7(monkeypatch):
    monkeypatch.setattr(model_utils, "chunk_rows", lambda hidden, vocabulary: 7)


@modes
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_is_as_exact_as_the_naive_lines(chunks_of_7, dtype, problem, trained, uniform):
    for head in HEADS.values():
        options = dict(head)
        tensors, labels = make_problem(dtype, bias=options.pop("bias", False), **PROBLEMS[problem])
        assert_as_exact_as_naive(tensors, labels, trained, upstream_of(labels, uniform), options, uniform=uniform)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("uniform", [True, False])
def test_kernel_in_chunks_of_its_own_size(dtype, uniform):
    tensors, labels = make_problem(dtype, rows=600, vocabulary=40_000, width=8)
    assert 256 <= model_utils.chunk_rows(tensors["hidden"], 40_000) < 600
    assert_as_exact_as_naive(tensors, labels, EVERYTHING, upstream_of(labels, uniform), {}, uniform=uniform)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uniform", [True, False])
def test_kernel_as_it_is_written_for_the_compiler(chunks_of_7, dtype, head, uniform):
    options = dict(HEADS[head])
    tensors, labels = make_problem(dtype, bias=options.pop("bias", False))
    with torch.compiler.set_stance("force_eager"):  # the same lines, uncompiled: that takes no C++ compiler and no minute
        assert_as_exact_as_naive(tensors, labels, EVERYTHING, upstream_of(labels, uniform), options, uniform=uniform, fuse=True)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("wanted", [True, False])
def test_kernel_takes_logits_by_rows_and_by_columns(head, wanted):
    options = {"scale": 1.0, "softcap": None, "bias": None} | HEADS[head]
    options["bias"] = torch.randn(97).double() if options["bias"] else None
    logits, labels = 3 * torch.randn(11, 97).double(), torch.randint(97, (11, 1))
    expected = model_utils.differentiate_functionally(logits, label=labels, g=None, wanted=wanted, **options)
    assert (expected[1] is not None) == wanted
    for z in (logits.clone(), logits.T.contiguous().T):
        logps, minus_dz = model_utils.differentiate_in_place(z, label=labels, g=None, wanted=wanted, **options)
        torch.testing.assert_close(logps, expected[0], rtol=1e-12, atol=1e-14)
        if wanted:
            torch.testing.assert_close(minus_dz, expected[1], rtol=1e-12, atol=1e-14)
            assert minus_dz.data_ptr() == z.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("fuse", [False, True])
def test_kernel_on_a_gpu(fuse):
    """Each entry of the weight's gradient is a sum over 8192 rows, several chunks of them: in bf16 that would not be exact."""
    for head, uniform in itertools.product(HEADS.values(), [True, False]):
        options = dict(head)
        tensors, labels = make_problem(torch.bfloat16, 8192, 32_000, 64, 0.3, bias=options.pop("bias", False), device="cuda")
        assert model_utils.chunk_rows(tensors["hidden"], 32_000) < 8192
        assert_as_exact_as_naive(tensors, labels, EVERYTHING, upstream_of(labels, uniform), options, uniform=uniform, fuse=fuse)


@pytest.mark.parametrize("trained", [("hidden",), EVERYTHING], ids=["frozen head", "trained head"])
def test_kernel_passes_gradcheck(chunks_of_7, trained):
    tensors, labels = make_problem(torch.float64, rows=9, vocabulary=11, width=5, bias=True)
    leaves = [tensor.requires_grad_(name in trained) for name, tensor in tensors.items()]
    assert torch.autograd.gradcheck(lambda hidden, weight, bias: linear_logps(hidden, weight, labels, bias, 1.5, 3.0), leaves)


def test_kernel_without_grad_is_the_same(chunks_of_7):
    tensors, labels = make_problem(torch.float64)
    hidden, weight = (tensor.requires_grad_() for tensor in tensors.values())
    with torch.no_grad():
        logps = linear_logps(hidden, weight, labels, uniform=True)
    assert not logps.requires_grad
    torch.testing.assert_close(logps, naive_logps(hidden.detach(), weight.detach(), labels), rtol=1e-13, atol=0)


def test_uniform_promise_is_checked(chunks_of_7):
    tensors, labels = make_problem(torch.float64)
    tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()
    logps = linear_logps(**tensors, labels=labels, uniform=True)
    with pytest.raises(RuntimeError, match="write logps.mean\\(\\) as logps.sum\\(\\) / n, and set uniform=False"):
        (logps * torch.linspace(1, 2, len(logps))).sum().backward()


def test_uniform_gradients_are_good_for_one_backward(chunks_of_7):
    tensors, labels = make_problem(torch.float64)
    tensors["hidden"].requires_grad_()
    loss = linear_logps(**tensors, labels=labels, uniform=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("uniform", [True, False])
def test_kernel_refuses_a_second_derivative(trained, uniform):
    tensors, labels = make_problem(torch.float64)
    leaves = [tensors[name].requires_grad_() for name in trained]
    with pytest.raises(RuntimeError):  # better than a wrong one
        grads = torch.autograd.grad(linear_logps(**tensors, labels=labels, uniform=uniform).sum(), leaves, create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()


@pytest.mark.parametrize("uniform", [True, False])
def test_gradient_of_tied_weights_is_the_sum_of_both_uses(chunks_of_7, uniform):
    (_, weight), labels = make_problem(torch.float64)[0].values(), torch.arange(50)
    grads = []
    for logps_of in (naive_logps, functools.partial(linear_logps, uniform=uniform)):
        embeddings = weight.clone().requires_grad_()
        logps_of(torch.tanh(embeddings[labels.flip(0)]), embeddings, labels).sum().backward()
        grads.append(embeddings.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-13)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that a tensor has which is made under it."""
    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **keywords or {})
        self.size = max([self.size, *(each.numel() for each in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(each))])
        return out


@modes
def test_no_tensor_is_larger_than_a_chunk_of_logits(chunks_of_7, trained, uniform):
    tensors, labels = make_problem(torch.float32, width=4, bias=True)
    with LargestTensor() as largest:
        outcome(linear_logps, tensors, labels, trained, upstream_of(labels, uniform), softcap=2.0, uniform=uniform)
    assert largest.size == 7 * 97


MEASURE = """
import re, sys, torch
from pathlib import Path
from model_utils import linear_logps
def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
def run(rows, vocabulary):
    hidden, weight = torch.randn(rows, 64).requires_grad_(), torch.randn(vocabulary, 64).requires_grad_()
    labels = torch.arange(rows) % vocabulary
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now (man 5 proc)
    before = resident("VmRSS")
    logps = linear_logps(hidden, weight, labels, uniform=sys.argv[1] == "uniform")
    (logps.sum() if sys.argv[1] == "uniform" else (logps * torch.rand(rows)).sum()).backward()
    return resident("VmHWM") - before
run(8, 64)  # what is loaded at the first call is not the kernel's
print(run(2048, 131_072))
"""


def can_reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not can_reset_peak(), reason="/proc/self/clear_refs can't be written, so the peak can't be measured")
@pytest.mark.parametrize("mode", ["uniform", "per token"])
def test_memory_is_that_of_a_chunk(mode):
    """The whole logits would be 2048 * 131072 * 4 = 1.07 GB, and with their gradient twice that."""
    extra = int(run_well("-c", MEASURE, mode, cwd=ROOT))
    rows = model_utils.chunk_rows(torch.empty(2048, 64), 131_072)
    chunk, gradients = 4 * rows * 131_072, 4 * 64 * (131_072 + 2048)
    assert extra <= gradients + 1.5 * chunk + (16 << 20)  # one buffer, not two


# ---------------------------------------------------------------------------------------------------------------------
# Tiny models, their documents one by one with eager attention and whole logits, and the same in batches


SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SLIDING, WIDER = 5, 30  # windows below the longest document; the wider one is above the rows that enable_packing tries
PACKABLE = {
    "llama": {}, "tied llama": {"tie_word_embeddings": True}, "qwen2": {}, "qwen3": {"head_dim": 24},
    "gemma2": {"head_dim": 16, "sliding_window": SLIDING, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": SLIDING, "sliding_window_pattern": 2},
    "mistral": {"sliding_window": SLIDING}, "wider mistral": {"sliding_window": WIDER}, "phi3": {"sliding_window": WIDER},
    "olmo2": {}, "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.3}, "mixtral": EXPERTS, "gpt_neox": {}, "gpt2": {"n_inner": 96}, "gptj": {"rotary_dim": 8},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32},
}
UNPACKABLE = {
    "mamba": {"state_size": 8}, "bloom": {}, "lfm2": {"layer_types": ["conv", "full_attention"]},  # states, ALiBi, convolutions
    "gpt_oss": EXPERTS | {"sliding_window": SLIDING, "layer_types": ["sliding_attention", "full_attention"]},  # sinks
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32, "use_sliding_window": True, "sliding_window": WIDER,
                            "layer_types": ["sliding_attention"] * 2},  # only its mask knows of the window
    "phimoe": EXPERTS | {"sliding_window": WIDER},
}
if not GPTJForCausalLM._supports_attention_backend:  # transformers 5.17
    UNPACKABLE["gptj"] = PACKABLE.pop("gptj")
LENGTHS = [7, 1, 60, 2, 11, 1]


def make_model(kind: str, **changes):
    """The same weights each time it is called; no weight, bias or norm of it is a zero or a one."""
    config = SMALL | (PACKABLE | UNPACKABLE)[kind] | changes
    # transformers 5.17's sdpa leaves the softcap out
    attention = config.pop("attn_implementation", "eager" if "attn_logit_softcapping" in config else None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.split()[-1], **config), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.15 * noise if parameter.ndim > 1 else parameter + 0.2 * noise)
    model.target_logps = functools.partial(target_logps, model)
    return model.eval()


def make_documents(lengths=LENGTHS) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, trained) of these lengths, like rows of the loader."""
    rng = np.random.default_rng(0)
    return [(rng.integers(3, 128, length), (np.arange(length) > 0) & (rng.random(length) < 0.7)) for length in lengths]


def results(model, logps: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """logps and the gradients of their sum over 100; leaves the model without gradients."""
    (logps.sum() / 100).backward()
    grads = {name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
             for name, parameter in model.named_parameters()}
    model.zero_grad()
    return logps.detach(), grads


def one_by_one(model, documents) -> torch.Tensor:
    """The log-probs of all targets by the definition."""
    logps = []
    for ids, trained in documents:
        labels = torch.from_numpy(np.where(trained, ids, IGNORE))[None]
        logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits
        logps.append(get_batch_logps(logits, labels)[labels[:, 1:] != IGNORE])
    return torch.cat(logps)


def in_a_batch(model, documents, collate) -> torch.Tensor:
    batch = collate(documents, 0)
    return model.target_logps(batch["target_combined_input_ids"], batch["target_labels"], batch["target_positions"],
                              batch["target_combined_attention_mask"], batch["position_ids"], batch["document_ends"],
                              batch["longest"])


def assert_same(actual, expected, logp_error=1e-5, grad_error=2e-6) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=logp_error)
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=grad_error)


@pytest.mark.parametrize("kind", PACKABLE | UNPACKABLE)
def test_batches_equal_the_documents_one_by_one(kind):
    documents, reference, model = make_documents(), make_model(kind, attn_implementation="eager"), make_model(kind)
    expected = results(reference, one_by_one(reference, documents))
    own_attention = model.config._attn_implementation
    why_not = enable_packing(model, CPU)
    if not why_not:
        assert_same(results(model, in_a_batch(model, documents, collate_packed)), expected)
        model.set_attn_implementation(own_attention)
    assert model.config._attn_implementation == own_attention
    assert_same(results(model, in_a_batch(model, documents, collate_padded)), expected)
    assert bool(why_not) == (kind in UNPACKABLE)
    assert not why_not or why_not.startswith(type(model).__name__) and "\n" not in why_not


@pytest.mark.parametrize("kind, implementation", [("llama", "eager"), ("llama", "sdpa"), ("lfm2", "eager"), ("bloom", "eager")])
@pytest.mark.parametrize("training", [True, False])
def test_enable_packing_changes_nothing_else(kind, implementation, training):
    model, untouched = (make_model(kind, attn_implementation=implementation).train(training) for _ in range(2))
    why_not = enable_packing(model, CPU)
    assert model.config._attn_implementation == (implementation if why_not else "documents")
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), untouched.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in PACKABLE if kind != "mixtral"])  # there tokens share the experts' matmuls
def test_no_document_sees_another(kind):
    model = make_model(kind)
    assert enable_packing(model, CPU) == ""
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
    assert enable_packing(model, CPU) == enable_packing(reference, CPU) == ""
    without = in_a_batch(reference.train(), documents, collate_packed)
    assert torch.equal(in_a_batch(model.eval(), documents, collate_packed), without)
    torch.manual_seed(1)
    dropped, other = (in_a_batch(model.train(), documents, collate_packed) for _ in range(2))
    torch.manual_seed(1)
    again = in_a_batch(model, documents, collate_packed)
    assert torch.equal(again, dropped)
    assert not any(torch.isclose(a, b).all() for a, b in itertools.combinations((without, dropped, other), 2))


def test_blocks_are_not_compiled_anew_for_other_documents():
    model = make_model("llama")
    assert enable_packing(model, CPU) == ""
    batches = [make_documents(lengths) for lengths in ([7, 5], [4, 9, 8], [30], [2, 1, 6, 3, 5])]
    expected = [results(model, in_a_batch(model, documents, collate_packed)) for documents in batches]
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, backend="eager")  # what is traced, without a C++ compiler
    for i, documents in enumerate(batches):  # the second shows which sizes differ
        with torch.compiler.set_stance("fail_on_recompile" if i >= 2 else "default"):
            assert_same(results(model, in_a_batch(model, documents, collate_packed)), expected[i])


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


JOBS = {  # kind of model, and the documents of each rank
    "untied": ("llama", [[0, 1, 2], [3, 4, 5]]), "tied": ("tied llama", [[2], [0, 1, 3, 4, 5]]),
    "a rank without a target": ("tied llama", [[0, 2, 3, 4], [1]]), "bias and softcap": ("gemma2", [[4, 5], [0, 1, 2, 3]]),
}


def worker(folder: Path) -> None:
    rank, _, device = init_processes()
    for name, (kind, shares) in JOBS.items():
        model = make_model(kind)
        shard_model(model, device, "target_logps")
        parameters = dict(model.named_parameters())
        assert enable_packing(model, device) == ""
        logps = in_a_batch(model, [make_documents()[i] for i in shares[rank]], collate_packed)
        (logps.sum() / 100).backward()
        grads = {key: parameter.grad.full_tensor() for key, parameter in parameters.items()}
        everyone = [None, None]
        dist.all_gather_object(everyone, logps.detach())
        if rank == 0:
            torch.save((torch.cat(everyone), grads), folder / f"{name}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_well(__file__, folder, n_processes=2)
    return folder


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_have_the_gradient_of_one(sharded, job):
    kind, shares = JOBS[job]
    reference = make_model(kind, attn_implementation="eager")
    documents = [make_documents()[i] for share in shares for i in share]
    expected = results(reference, one_by_one(reference, documents))
    assert_same(torch.load(sharded / f"{job}.pt"), expected, logp_error=1e-5, grad_error=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


WORDS = ["user", "assistant", "q", "a", "\n", "<tool>"]


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
def test_a_tokenizer_without_template_gets_chatml(tmp_path, adds_bos):
    before, tokenizer = make_tokenizer(tmp_path, adds_bos), load_tokenizer(str(tmp_path), "")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": True}]
    ids, trained, _ = ChatEncoder(tokenizer, 64, 32)(messages)
    pieces = ["<s>"] * adds_bos + ["<|im_start|>", "user", "\n", "q", "<|im_end|>", "\n",
                                   "<|im_start|>", "assistant", "\n", "a", "<|im_end|>", "\n"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert [piece for piece, is_target in zip(pieces, trained) if is_target] == ["a", "<|im_end|>"]
    assert tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False) == "".join(pieces[:-3])
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")] == [len(before), len(before) + 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nq\nassistant\na\n"
    assert {*before.all_special_tokens, "<|im_start|>", "<|im_end|>"} == set(tokenizer.all_special_tokens)


def test_a_tokenizer_keeps_its_template_and_pad_token(tmp_path):
    before = make_tokenizer(tmp_path, chat_template="{{ messages[0].content }}", pad_token="<unk>")
    tokenizer = load_tokenizer(str(tmp_path), "")
    assert (len(tokenizer), tokenizer.chat_template, tokenizer.pad_token) == (len(before), before.chat_template, "<unk>")


@pytest.mark.parametrize("eos, pad", [("</s>", "</s>"), (None, "<unk>")])
def test_pad_token_is_eos_or_else_the_first(tmp_path, eos, pad):
    make_tokenizer(tmp_path, eos_token=eos)
    assert load_tokenizer(str(tmp_path), "").pad_token == pad


def make_folder(folder: Path, dtype=torch.float32, eos=2, **changes):
    """Writes a model and the tokenizer, of one token less than ChatML's; returns both as they are loaded by transformers."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL | {"vocab_size": 9} | changes), dtype=dtype)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return model, load_tokenizer(str(folder), "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_loaded_in_fp32_with_rows_for_new_tokens(tmp_path, dtype, tied):
    before, tokenizer = make_folder(tmp_path, dtype, tie_word_embeddings=tied)
    model = load_model(str(tmp_path), None, tokenizer, None, "")
    assert (len(tokenizer), model.config.vocab_size, model.has_new_tokens) == (11, 11, True)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embeddings is head) == tied
    for layer, old in ((embeddings, before.get_input_embeddings()), (head, before.get_output_embeddings())):
        assert torch.equal(layer[:9], old.weight.float())
        torch.testing.assert_close(layer[9:], old.weight.double().mean(0).float().repeat(2, 1), rtol=0, atol=1e-8)
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32
        assert name in ("model.embed_tokens.weight", "lm_head.weight") or torch.equal(weight, before.state_dict()[name].float())


def test_padded_embeddings_stay_as_they_are(tmp_path):
    before, tokenizer = make_folder(tmp_path, vocab_size=16)
    model = load_model(str(tmp_path), None, tokenizer, None, "", dtype=torch.bfloat16)
    assert not model.has_new_tokens and model.dtype == torch.bfloat16
    assert torch.equal(model.get_output_embeddings().weight, before.get_output_embeddings().weight.bfloat16())


@pytest.mark.parametrize("eos, stop, stops", [
    (2, 10, [2, 10]), (2, 2, [2]), ([2, 5], 3, [2, 3, 5]), (2, None, [2]), (None, 4, [4])])
def test_the_stop_id_joins_those_of_the_model(tmp_path, eos, stop, stops):
    _, tokenizer = make_folder(tmp_path, eos=eos, eos_token_id=eos)
    generation = load_model(str(tmp_path), None, tokenizer, stop, "").generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (stops, tokenizer.pad_token_id)


def test_a_model_with_switched_off_sampling_settings_can_be_saved(tmp_path):
    _, tokenizer = make_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.6, "do_sample": False}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs.generation_config.pad_token_id = 1  # it objects only to what has been changed, as we change the stop ids
    with pytest.raises(ValueError, match="temperature"):
        theirs.save_pretrained(tmp_path / "theirs")
    load_model(str(tmp_path), None, tokenizer, None, "").save_pretrained(tmp_path / "ours")


NEW = {"model_type": "llama"} | {key: SMALL[key] for key in SMALL if key != "vocab_size" and not key.endswith("token_id")}


def test_random_init_is_a_new_model_of_the_tokenizers_vocabulary(tmp_path):
    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), "")
    loaded = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loaded.append(load_model("not/read", NEW, tokenizer, 10, "").state_dict())
    torch.testing.assert_close(loaded[0], loaded[1], rtol=0, atol=0)
    assert not torch.equal(loaded[0]["lm_head.weight"], loaded[2]["lm_head.weight"])
    model = load_model("not/read", NEW, tokenizer, 10, "")
    assert {key: getattr(model.config, key) for key in NEW} == NEW
    assert model.config.vocab_size == len(tokenizer) and model.dtype == torch.float32
    assert (model.config.bos_token_id, model.config.pad_token_id) == (tokenizer.bos_token_id, tokenizer.pad_token_id)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 10]
    assert load_model("", NEW | {"vocab_size": 64}, tokenizer, None, "").get_input_embeddings().num_embeddings == 64
    assert load_model("", NEW | {"vocab_size": 4}, tokenizer, None, "").get_input_embeddings().num_embeddings == len(tokenizer)


WRONG = {"no type": ("model_type", None), "unknown type": ("model_type", "llama7"), "no language model": ("model_type", "vit"),
         "text for a number": ("hidden_size", "big"), "heads that do not divide the width": ("num_attention_heads", 5),
         "unknown activation": ("hidden_act", "relux"), "misspelt key": ("num_hidden_layer", 2)}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_random_init_is_one_line(tmp_path, wrong):
    make_tokenizer(tmp_path)
    key, value = WRONG[wrong]
    random_init = {name: each for name, each in (NEW | {key: value}).items() if each is not None}
    with pytest.raises(ModelError, match="model.random_init") as raised:
        load_model("", random_init, load_tokenizer(str(tmp_path), ""), None, "")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize("random_init", [
    {"model_type": "hyperclovax", "logits_scaling": 0.5}, {"model_type": "modernbert-decoder"},
    {"model_type": "recurrent_gemma", "logits_soft_cap": 2.0, "lru_width": 64},
    {"model_type": "llama4_text", "num_local_experts": 2, "intermediate_size_mlp": 96},
], ids=lambda random_init: random_init["model_type"])
def test_a_head_that_is_not_known_is_refused_or_comes_out_right(tmp_path, random_init):
    make_tokenizer(tmp_path)
    try:
        model = load_model("", NEW | {"vocab_size": 128} | random_init, load_tokenizer(str(tmp_path), ""), None, "").eval()
        check_head(model, CPU)
    except ModelError:
        return
    documents = make_documents([9])
    torch.testing.assert_close(in_a_batch(model, documents, collate_padded), one_by_one(model, documents), rtol=0, atol=1e-5)


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
        load_model(str(tmp_path / "model"), None, tokenizer, None, str(tmp_path / "cache"))
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


if __name__ == "__main__":
    worker(Path(sys.argv[1]))


# ---------------------------------------------------------------------------------------------------------------------
# What a step needs


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_are_those_of_the_matmuls_that_run(frozen):
    """Of the body and, on the targets alone, of the head; attention's, which torch counts without its mask, stand apart."""
    model = make_model("llama")
    if frozen:
        model.requires_grad_(False).enable_input_require_grads()
    ids, targets = torch.arange(24)[None], torch.tensor([3, 7, 8])
    with FlopCounterMode(display=False) as counter:
        target_logps(model, ids, ids, targets).sum().backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    per_token, per_target, per_squared_length = model_utils.count_flops(model)
    assert sum(count for op, count in counts.items() if "mm" in op and "bmm" not in op) == 24 * per_token + 3 * per_target
    assert per_squared_length == 6 * 2 * 64  # layers, width


def test_a_model_without_attention_has_no_flops_of_it():
    config = AutoConfig.for_model("mamba", hidden_size=64, num_hidden_layers=2, vocab_size=128)
    per_token, _, per_squared_length = model_utils.count_flops(AutoModelForCausalLM.from_config(config))
    assert per_token > 0 and per_squared_length == 0


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
        load_model(str(tmp_path / "model"), None, load_tokenizer(str(tmp_path / "model"), ""), None, "", sliced=True)


def test_the_softcap_of_gemma_2_s_scores_is_in_the_loaded_model(tmp_path):
    write_model(tmp_path / "model")  # for its tokenizer
    model, ids = make_model("gemma2", vocab_size=256), torch.arange(24)[None]
    model.save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    loaded = load_model(path, None, load_tokenizer(path, ""), None, "").eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    loaded.config.attn_logit_softcapping = None
    for layer in loaded.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (loaded(ids).logits - model(ids).logits).abs().max() > 1e-3  # it matters here
