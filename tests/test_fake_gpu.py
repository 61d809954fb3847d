"""Every branch that a GPU takes, on GPUs that are not there: nothing raises, the host does not wait, what is sent is as told."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import store_rows

import dpo
import sft
import trial
from checkpoint import training_state
from configs.base import Config, DPOConfig, ModelConfig, PeftConfig
from data import SFTDataLoader, collate_packed, collate_padded, to_device
from fake_gpu import DEVICE, fake_gpu
from fsdp_utils import (
    accumulate,
    all_reduce_means,
    clip_gradients,
    find_blocks,
    gather_in_parts,
    make_mesh,
    on_any_rank,
    shard_model,
)
from model_utils import compute_dtype, generate
from will_it_fit import NoTokenizer

LLAMA = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128, "tie_word_embeddings": False}
GEMMA = LLAMA | {"model_type": "gemma2", "head_dim": 32, "sliding_window": 16}
MIXTURE = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}


class Tokenizer(NoTokenizer):
    eos_token_id = 2  # other than what is answered, which is all zeros


def make_run(n_ranks: int, shape: dict = LLAMA, **settings):
    """Returns (model, optimizer, packing) as sft.main makes them, having tried what it tries."""
    config = Config(model=ModelConfig(random_init=shape, **settings))
    wanted = config.model
    with DEVICE:
        model = sft.make_model(wanted, Tokenizer(), [2], ".cache", DEVICE)
    shard_model(model, make_mesh(DEVICE, wanted.replicas), "target_logps", dtype=compute_dtype(DEVICE),
                recompute=wanted.activation_checkpointing, inputs_on_host=wanted.activation_offload, offload=wanted.cpu_offload)
    trial.check_gradients(model, DEVICE)
    optimizer = sft.make_optimizer(model, 1e-3, (0.9, 0.999), 1e-8, 0.1)
    return model, optimizer, trial.try_model(model, DEVICE, 64, wanted.packing)


def make_batch(packing: bool) -> dict:
    rows = [(np.random.default_rng(n).integers(3, 256, n), np.arange(n) >= 5) for n in (16, 9, 30)]
    return {**(collate_packed if packing else collate_padded)(rows, 0), "n_documents": 3, "global_token_count": 55}


def make_pairs(packing: bool) -> dict:
    rows = [(np.random.default_rng(n).integers(3, 256, n), np.arange(n) >= 5) for n in (16, 9, 30, 12)]
    return {**(collate_packed if packing else collate_padded)(rows, 0), "n_documents": 4, "n_examples": 2,
            "global_token_count": 67, "reference": torch.zeros(4), "n_targets": torch.tensor([11, 4, 25, 7], dtype=torch.int32)}


def loss_of_rows(model, mode: str, packing: bool):
    return sft.get_batch_metrics(model, to_device(make_batch(packing), DEVICE), mode, 40)


def loss_of_pairs(model, mode: str, packing: bool):
    return dpo.get_batch_metrics(model, to_device(make_pairs(packing), DEVICE), mode, DPOConfig())


def take_step(gpu, model, optimizer, packing: bool, get_loss=loss_of_rows) -> tuple[list, Counter, list]:
    """Takes a step of two microbatches as main does; returns (waits of each, waits of the rest, collectives)."""
    sums, waits = {}, []
    gpu.collectives.clear()
    for last in (False, True):
        gpu.waits.clear()
        assert not on_any_rank(False)  # is to end
        model.set_requires_all_reduce(last)
        loss, metrics = get_loss(model, "train", packing)
        loss.backward()
        accumulate(sums, metrics)
        waits.append(Counter(gpu.waits))
    gpu.waits.clear()
    clip_gradients(model.parameters(), 1.0).item()
    all_reduce_means(sums)
    optimizer.step()
    optimizer.zero_grad()
    return waits, Counter(gpu.waits), list(gpu.collectives)


WAYS = {"full": {}, "recomputed": {"activation_checkpointing": True}, "LoRA": {"use_peft": True}, "padded": {"packing": False},
        "inputs on the host": {"activation_checkpointing": True, "activation_offload": True},
        "offloaded": {"cpu_offload": True},
        "QLoRA, offloaded": {"use_peft": True, "peft": PeftConfig(quantise=True), "cpu_offload": True},
        "Gemma 2, its scores by hand": {"shape": GEMMA}, "a mixture": {"shape": MIXTURE}}
WAITING = {"offloaded": "a gradient is waited for before the optimizer takes it up, on the host",
           "QLoRA, offloaded": "likewise",
           "Gemma 2, its scores by hand": "documents are attended to one after the other",
           "a mixture": "transformers' experts ask how many tokens each has"}


@pytest.mark.parametrize("way, n_ranks, get_loss", [
    *((way, 4, loss_of_rows) for way in WAYS), *((way, 1, loss_of_rows) for way in ("full", "LoRA")), ("full", 8, loss_of_rows),
    *((way, 4, loss_of_pairs) for way in ("full", "LoRA", "padded", "a mixture"))])
def test_a_run_raises_nothing_and_waits_once_a_step_for_the_norm_and_once_for_the_log(way, n_ranks, get_loss):
    with fake_gpu(n_ranks) as gpu:
        model, optimizer, packing = make_run(n_ranks, **WAYS[way])
        assert packing == (way != "padded")
        for _ in range(2):  # the second has what the first has made
            in_microbatches, in_rest, _ = take_step(gpu, model, optimizer, packing, get_loss)
        if way not in WAITING:
            assert in_microbatches == [{}, {}]
            assert in_rest.total() == 2
        get_loss(model.eval(), "eval", packing)
        assert [len(answer) for answer in generate(model, [[3, 4, 5], [6]], 4)][:2] == [4, 4]
        tensors = training_state(model, optimizer)
        assert all(tensor.is_cuda != way.endswith("offloaded") for name, tensor in tensors.items() if not name.endswith("step"))
        parts = [*gather_in_parts(model, 1e5)]
        assert all(tensor.device.type == "cpu" for part in parts for tensor in part.values())
        assert sum(map(len, parts)) == len({*map(id, model.parameters())})


def test_each_block_s_input_waits_on_the_host_and_nothing_else():
    held = []
    for on_host in (False, True):
        with fake_gpu(2) as gpu:
            model, _, packing = make_run(2, activation_checkpointing=True, activation_offload=on_host)
            before = gpu.here.held.total(), gpu.host.held.total()
            loss, _ = loss_of_rows(model, "train", packing)
            held.append([memory.held.total() - was for memory, was in zip((gpu.here, gpu.host), before)])
            loss.backward()
            assert gpu.host.held.total() == before[1]
    inputs = 2 * 55 * 128 * 2  # of 2 blocks, bf16
    (here, host), (here_now, host_now) = held
    assert (here - here_now, host_now - host) == (inputs, inputs)


def test_what_is_sent_in_a_step_is_what_the_page_tells():
    """docs/one_process_to_four.md, for a model whose head is not its embedding, on 4 GPUs: bf16 is gathered, fp32 reduced."""
    with fake_gpu(4) as gpu:
        model, optimizer, _ = make_run(4)
        block = sum(parameter.numel() for parameter in find_blocks(model)[0].parameters())
        rest = sum(parameter.numel() for parameter in model.parameters()) - 2 * block
        take_step(gpu, model, optimizer, True)
        _, _, heard = take_step(gpu, model, optimizer, True)
    weights = [("gather", 2 * rest)] + 2 * [("gather", 2 * block)]
    back = 2 * [("gather", 2 * block)]
    assert Counter(heard) == Counter(2 * (weights + back + 2 * [("reduce", 4 * block)] + [("reduce", 4 * rest)])
                                     + [("all-reduce", 4 * 21), ("all-reduce", 2 * 16)] + 2 * [("all-reduce", 8)])


def test_over_replicas_gradients_are_reduced_within_and_summed_between_once_a_step():
    with fake_gpu(8) as gpu:
        model, optimizer, _ = make_run(8, replicas=2)
        take_step(gpu, model, optimizer, True)
        waits, rest, heard = take_step(gpu, model, optimizer, True)
    assert waits == [{}, {}] and rest.total() == 2
    kinds = Counter(kind for kind, _ in heard)
    assert kinds["reduce"] == 2 * 3 and kinds["gather"] == 2 * 5
    assert kinds["all-reduce"] == 3 + 2 + 2  # the gradients of the step, the norm, the log; whether to end, twice


WAITS = {"item": lambda loss: loss.item(), "bool": lambda loss: bool(loss > 3), "tolist": lambda loss: loss.expand(2).tolist(),
         "cpu": lambda loss: loss.cpu(), "to": lambda loss: loss.to("cpu"), "nonzero": lambda loss: (loss > 0).nonzero(),
         "a mask": lambda loss: loss.expand(4)[torch.arange(4, device=DEVICE) > 1],
         "tensor": lambda loss: torch.tensor([1.0, 2.0], device=DEVICE), "new_tensor": lambda loss: loss.new_tensor(3),
         "synchronize": lambda loss: torch.cuda.synchronize()}


@pytest.mark.parametrize("kind", WAITS)
def test_a_wait_is_heard(kind):
    with fake_gpu(4) as gpu:
        model, optimizer, packing = make_run(4)
        loss, _ = sft.get_batch_metrics(model, to_device(make_batch(packing), DEVICE), "train", 40)
        gpu.waits.clear()
        WAITS[kind](loss)
        assert gpu.waits == {f"test_fake_gpu.py:{WAITS[kind].__code__.co_firstlineno}": 1}


@pytest.mark.parametrize("other, dtype", [(0, torch.float32), (0.0, torch.float32), (None, torch.int64)])
def test_a_number_is_chosen_as_a_tensor_is(other, dtype):
    with fake_gpu(1):
        x = torch.ones(3, device=DEVICE, requires_grad=True)
        out = torch.where(x > 0, 1, 0) if other is None else torch.where(x > 0, x, other)
        assert out.dtype == dtype and out.is_cuda and out.shape == (3,)
        torch.nn.functional.logsigmoid(x).sum().backward()  # whose decomposition chooses between numbers
        assert x.grad.is_cuda


def test_the_reference_is_computed_without_a_wait_but_for_its_sum_at_the_end(tmp_path):
    rows = store_rows(tmp_path / "rows", [(np.arange(3, 3 + n), np.arange(n) >= 5) for n in (16, 9, 30, 12, 8, 8)], n_documents=2)
    with fake_gpu(4) as gpu:
        model, _, packing = make_run(4)
        loader = SFTDataLoader(rows, np.arange(3), 3, batch_size=4, pad_id=0, packing=packing, microbatch_tokens=64, world_size=4)
        gpu.waits.clear()
        logps = dpo.reference_logps(model, loader, DEVICE)
        assert logps.shape == (3, 2) and gpu.waits == {}


def test_tensors_hold_what_they_would():
    with fake_gpu(1) as gpu:
        gpu.here.start_anew()
        a = torch.empty(1000, device=DEVICE)
        with_view = a[10:].view(-1)
        b = a + 1
        assert gpu.here.peak == 8000 and gpu.here.held.total() == 8000
        del a, b
        assert gpu.here.held.total() == 4000  # the view's
        del with_view
        on_host = torch.empty(10)
        assert gpu.here.held.total() == 0 and gpu.here.peak == 8000 and gpu.host.held.total() == 40
        del on_host
