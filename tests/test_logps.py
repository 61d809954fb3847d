"""Log-probabilities of targets, from the kernel to a model's batch: against naive code in fp64, whole logits, transformers."""

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, process_of_one, run_well
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from data import IGNORE, collate_packed, collate_padded
from fsdp_utils import ModelError, init_processes
from logps import balance_loss, chunk_rows, differentiate_functionally, differentiate_in_place, linear_logps, target_logps
from sft import get_batch_logps
from trial import check_head, enable_packing, whole_batch

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
    monkeypatch.setattr("logps.chunk_rows", lambda hidden, vocabulary: 7)


@modes
@pytest.mark.parametrize("problem", [pytest.param(name, marks=[pytest.mark.slow] * (name == "many chunks")) for name in PROBLEMS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_is_as_exact_as_the_naive_lines(chunks_of_7, dtype, problem, trained, uniform):
    for head in HEADS.values():
        options = dict(head)
        tensors, labels = make_problem(dtype, bias=options.pop("bias", False), **PROBLEMS[problem])
        assert_as_exact_as_naive(tensors, labels, trained, upstream_of(labels, uniform), options, uniform=uniform)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("uniform", [True, False])
def test_kernel_in_chunks_of_its_own_size(dtype, uniform):
    tensors, labels = make_problem(dtype, rows=600, vocabulary=40_000, width=8)
    assert 256 <= chunk_rows(tensors["hidden"], 40_000) < 600
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
    expected = differentiate_functionally(logits, label=labels, g=None, wanted=wanted, **options)
    assert (expected[1] is not None) == wanted
    for z in (logits.clone(), logits.T.contiguous().T):
        logps, minus_dz = differentiate_in_place(z, label=labels, g=None, wanted=wanted, **options)
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
        assert chunk_rows(tensors["hidden"], 32_000) < 8192
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
import os, re, torch
from pathlib import Path
from logps import linear_logps
def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
def run(rows, vocabulary, uniform):
    hidden, weight = torch.randn(rows, 64).requires_grad_(), torch.randn(vocabulary, 64).requires_grad_()
    labels = torch.arange(rows) % vocabulary
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now (man 5 proc)
    before = resident("VmRSS")
    logps = linear_logps(hidden, weight, labels, uniform=uniform)
    (logps.sum() if uniform else (logps * torch.rand(rows)).sum()).backward()
    return resident("VmHWM") - before
for uniform in (True, False):
    if not os.fork():  # what one leaves to the allocator is not the other's
        run(8, 64, uniform)  # what is loaded at the first call is not the kernel's
        print(run(1024, 131_072, uniform), flush=True)
        os._exit(0)
    os.wait()
"""


def can_reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not can_reset_peak(), reason="/proc/self/clear_refs can't be written, so the peak can't be measured")
def test_memory_is_that_of_a_chunk():
    """The whole logits would be 1024 * 131072 * 4 = 0.54 GB, and with their gradient twice that."""
    rows = chunk_rows(torch.empty(1024, 64), 131_072)
    chunk, gradients = 4 * rows * 131_072, 4 * 64 * (131_072 + 1024)
    uniform, per_token = map(int, run_well("-c", MEASURE, cwd=ROOT).split())
    assert max(uniform, per_token) <= gradients + 1.5 * chunk + (16 << 20)  # one buffer, not two


# ---------------------------------------------------------------------------------------------------------------------
# Tiny models, their documents one by one with eager attention and whole logits, and the same in a batch


SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SLIDING, WIDER = 5, 30  # windows below the longest document; the wider one is above the rows that enable_packing tries
KINDS = {
    "llama": {}, "tied llama": {"tie_word_embeddings": True}, "qwen2": {}, "qwen3": {"head_dim": 24},
    "gemma2": {"head_dim": 16, "sliding_window": SLIDING, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": SLIDING, "sliding_window_pattern": 2},
    "mistral": {"sliding_window": SLIDING}, "wider mistral": {"sliding_window": WIDER}, "phi3": {"sliding_window": WIDER},
    "olmo2": {}, "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.3}, "mixtral": EXPERTS, "gpt_neox": {}, "gpt2": {"n_inner": 96}, "gptj": {"rotary_dim": 8},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32},
    "mamba": {"state_size": 8}, "bloom": {}, "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gpt_oss": EXPERTS | {"sliding_window": SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32, "use_sliding_window": True, "sliding_window": WIDER,
                            "layer_types": ["sliding_attention"] * 2},
    "phimoe": EXPERTS | {"sliding_window": WIDER},
}
LENGTHS = [7, 1, 60, 2, 11, 1]


def make_model(kind: str, **changes):
    """The same weights each time it is called; no weight, bias or norm of it is a zero or a one."""
    config = SMALL | KINDS.get(kind, {}) | changes
    # transformers 5.17's sdpa leaves the softcap out
    attention = config.pop("attn_implementation", "eager" if "attn_logit_softcapping" in config else None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.split()[-1], **config), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.15 * noise if parameter.ndim > 1 else parameter + 0.2 * noise)
    model.target_logps, model.own_attention = functools.partial(target_logps, model), model.config._attn_implementation
    model.uses_own_logits = False
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


@functools.cache
def expected_results(kind: str) -> tuple[torch.Tensor, dict]:
    model = make_model(kind, attn_implementation="eager")
    return results(model, one_by_one(model, make_documents()))


def in_a_batch(model, documents, collate) -> torch.Tensor:
    logps, balance = model.target_logps(collate(documents, 0) | {"n_documents": len(documents)})
    assert balance == 0.0
    return logps


def assert_same(actual, expected, logp_error=1e-5, grad_error=2e-6) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=logp_error)
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=grad_error)


@pytest.mark.parametrize("kind", KINDS)  # packed, in test_model_utils.py
def test_a_padded_batch_equals_the_documents_one_by_one(kind):
    model = make_model(kind)
    assert_same(results(model, in_a_batch(model, make_documents(), collate_padded)), expected_results(kind))


@pytest.mark.parametrize("ends", [(), (60,), (1, 3, 60), (59, 60), tuple(range(1, 61))], ids=lambda ends: f"{len(ends)} ends")
def test_a_whole_batch_is_a_collated_one_of_which_all_are_targets(ends):
    ids, lengths = np.arange(60) % 7, np.diff([0, *(ends or [60])])
    documents = [(part, np.arange(len(part)) > 0) for part in np.split(ids, lengths.cumsum()[:-1])]
    collated = (collate_packed if len(documents) > 1 else collate_padded)(documents, 0) | {"n_documents": len(documents)}
    batch = whole_batch(torch.from_numpy(ids)[None], *ends)
    assert batch.keys() == collated.keys()
    labels = batch.pop("target_labels"), collated.pop("target_labels")  # which need not say what is no target
    torch.testing.assert_close(*(each.flatten()[collated["target_positions"]] for each in labels), rtol=0, atol=0)
    assert labels[0].dtype == labels[1].dtype and labels[0].shape == labels[1].shape
    for key, value in collated.items():
        if torch.is_tensor(value):
            torch.testing.assert_close(batch[key], value, rtol=0, atol=0)  # and of the same type
        else:
            assert (batch[key], type(batch[key])) == (value, type(value)), key


# ---------------------------------------------------------------------------------------------------------------------
# The load balancing loss


@pytest.mark.parametrize("lengths", [[9], [1, 1], [7, 1, 60, 2, 11, 1]], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_balance_loss_is_transformers_of_each_document(lengths, top_k):
    router_logits = (2 * torch.randn(3, sum(lengths), 5, generator=torch.Generator().manual_seed(1))).requires_grad_()
    loss = balance_loss(router_logits, top_k, torch.tensor(lengths))
    parts = router_logits.split(lengths, dim=1)
    expected = sum(length * load_balancing_loss_func(tuple(part), 5, top_k) for length, part in zip(lengths, parts))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(each, router_logits)[0] for each in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
def test_a_batch_has_the_balance_loss_of_its_documents(collate):
    model = make_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.3)
    documents = make_documents()
    alone = [model(input_ids=torch.from_numpy(ids)[None], output_router_logits=True).aux_loss * len(ids) for ids, _ in documents]
    assert collate is collate_padded or enable_packing(model, CPU)
    batch = collate(documents, 0)
    logps, balance = model.target_logps(batch | {"n_documents": len(documents)})
    torch.testing.assert_close(balance, 0.3 * sum(alone), rtol=1e-6, atol=0)
    assert model.target_logps(batch | {"n_documents": 0})[1] == 0.0  # a rank that has nothing to do
    model.config.output_router_logits = False
    without, none = model.target_logps(batch | {"n_documents": len(documents)})
    assert none == 0.0 and torch.equal(without, logps)


# ---------------------------------------------------------------------------------------------------------------------
# Heads


@pytest.mark.parametrize("training", [True, False])
def test_heads_of_all_kinds_here_are_known(training):
    for kind in KINDS:
        model = make_model(kind).train(training)
        check_head(model, CPU)
        assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("kind, options", [
    ("hyperclovax", {"logits_scaling": 0.5}),  # it multiplies by what Granite divides by
    ("modernbert-decoder", {}), ("recurrent_gemma", {"logits_soft_cap": 2.0, "lru_width": 64})],
    ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("training", [True, False])
def test_a_head_that_does_more_has_its_own_logits_taken(capsys, kind, options, training):
    model, documents = make_model(kind, **options).train(training), make_documents([9])
    with process_of_one():
        init_processes(1)
        check_head(model, CPU)
        check_head(model, CPU)
    assert capsys.readouterr().out == (f"whole logits: {type(model).__name__} makes them from its hidden states in a way of its "
                                       "own; this takes more memory\n")  # once
    assert model.training == training and model.uses_own_logits
    torch.testing.assert_close(in_a_batch(model, documents, collate_padded), one_by_one(model, documents), rtol=0, atol=1e-5)


def test_a_head_that_reads_llama_4_s_body_is_known():
    model = make_model("llama4_text", num_local_experts=2, intermediate_size_mlp=96)
    check_head(model, CPU)
    assert not model.uses_own_logits


def test_a_model_whose_tokens_see_later_ones_is_refused():
    model = make_model("bert", is_decoder=False)
    with pytest.raises(ModelError, match="^BertLMHeadModel: its logits depend on later tokens: no causal language model$"):
        check_head(model, CPU)
