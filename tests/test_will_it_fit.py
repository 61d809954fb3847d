"""The forecast against what real steps take, counted by the allocator of the CPU."""

import multiprocessing
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, run_script, run_well, store_rows
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import sft
import will_it_fit
from configs.base import Config, DPOConfig, ModelConfig, PeftConfig
from data import SFTDataLoader, to_device
from fsdp_utils import clip_gradients, make_mesh, shard_model
from trial import enable_packing
from will_it_fit import SCRIPTS, NoTokenizer, forecast, make_batches

LLAMA = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 256, "tie_word_embeddings": False}
BLOCK = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384 + 2 * 128  # parameters
WAYS = {"full": {}, "recomputed": {"activation_checkpointing": True}, "LoRA": {"use_peft": True},
        "QLoRA": {"use_peft": True, "peft": PeftConfig(quantise=True)}, "several microbatches": {"microbatch_tokens": 256}}


def make_config(kind: type[Config] = Config, **settings) -> Config:
    wanted = {"max_length": 128, "max_prompt_length": 64, "microbatch_tokens": 512, "batch_size": 8} | settings
    return kind(exp_name="x", model=ModelConfig(random_init=LLAMA, tokenizer_name_or_path="none", **wanted))


def held(tensors) -> int:
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


def take_steps(n_ranks: int, config: Config) -> int:
    """Returns the most bytes that tensors hold in a second step on one of n_ranks; torch's profiler hears of it by the allocator.

    The tensors are real. What is sent is not: it arrives at once, where a rank that waits for another holds it a while longer.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n_ranks)
    device = torch.device("cpu")
    model = sft.make_model(config.model, NoTokenizer(), [2], ".cache", device)
    shard_model(model, make_mesh(device), "target_logps", recompute=config.model.activation_checkpointing)
    _, make_optimizer, get_batch_metrics = SCRIPTS[type(config)]
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.999), 1e-8, 0.0)
    packing = config.model.packing and enable_packing(model, device)

    def step() -> None:
        for batch in make_batches(config, n_ranks, packing):
            get_batch_metrics(model, to_device(batch, device), "train", config)[0].backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    before = held(model.parameters()) + held(model.buffers()) + held(states)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    dist.destroy_process_group()
    return before + most


@pytest.fixture(scope="module")
def process():
    """One that has never pretended to have a GPU."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        yield process


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Config, DPOConfig])
def test_a_step_takes_what_is_foretold(process, kind, way, n_ranks):
    config = make_config(kind, **WAYS[way])
    taken = process.apply(take_steps, (n_ranks, config))
    foretold = forecast(config, n_ranks, torch.device("cpu")).peaks["a step"]
    assert foretold / 1.001 <= taken <= 1.001 * foretold


def test_what_stays_from_step_to_step_is_the_sum_of_its_parts():
    n = 2 * 4096 * 128 + 2 * BLOCK + 128
    for n_ranks in (1, 4):
        told = forecast(make_config(), n_ranks)
        assert told.n_parameters == n and told.checkpoint == 12 * n
        assert told.parts["optimizer"] == pytest.approx(8 * n / n_ranks, rel=1e-3)
        assert told.parts["weights"] == pytest.approx(4 * n / n_ranks, rel=1e-3)
    squares = 6 * 128 * 128 ** 2 * 2
    body = 6 * 2 * (BLOCK - 2 * 128)
    assert told.flops == 8 * (128 * (body + 6 * 4096 * 128 / 2) + squares)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("settings, n_ranks, n_pairs, n_microbatches", [
    ({}, 2, 2, 2), ({"microbatch_tokens": 2048}, 2, 4, 1), ({"microbatch_tokens": 767}, 2, 2, 2),
    ({"microbatch_tokens": 128}, 2, 1, 2), ({"microbatch_tokens": 2048, "gradient_accumulation_steps": 2}, 2, 2, 2)])
def test_a_microbatch_of_pairs_is_as_large_as_the_loader_makes_it(tmp_path, packing, settings, n_ranks, n_pairs, n_microbatches):
    config = make_config(DPOConfig, packing=packing, **settings)
    foretold = make_batches(config, n_ranks, packing)
    assert len(foretold) == n_microbatches and {batch["n_examples"] for batch in foretold} == {n_pairs}
    rows = store_rows(tmp_path / "rows", 16 * [(np.zeros(128, int), np.arange(128) >= 64)], n_documents=2)
    loader = SFTDataLoader(rows, np.arange(8), 8, accumulation=config.model.gradient_accumulation_steps, batch_size=8, pad_id=0,
                           packing=packing, microbatch_tokens=max(config.model.microbatch_tokens, 128), world_size=n_ranks)
    made = max(loader, key=lambda batch: batch["n_documents"])
    for key in ("target_combined_input_ids", "target_positions", "target_documents"):
        assert foretold[0][key].shape == made[key].shape


def test_a_step_of_pairs_computes_two_documents_each():
    assert forecast(make_config(DPOConfig), 2).flops == 2 * forecast(make_config(), 2).flops


def test_answers_new_tokens_and_offloading_are_seen():
    plain = forecast(make_config(), 2)
    config = make_config()
    config.n_eval_answers = 4
    assert forecast(config, 2).peaks["answers"] > 0 and "answers" not in plain.peaks
    offloaded = forecast(make_config(cpu_offload=True), 2)
    assert offloaded.peaks["a step"] < plain.peaks["a step"] and offloaded.host > plain.host


def write_config(folder: Path, kind: str) -> Path:
    (folder / "config.py").write_text(
        f"from configs.base import {kind}, ModelConfig\nconfig = {kind}(exp_name='x', datasets=['d'], "
        f"model=ModelConfig(tokenizer_name_or_path='none', random_init={LLAMA}))\n")
    return folder / "config.py"


def test_the_command_tells_what_fits_and_what_would_make_it_fit(tmp_path):
    file = write_config(tmp_path, "Config")
    said = run_well(ROOT / "will_it_fit.py", "--config", file, "--gpus", 2, "--gib", 0.1, cwd=tmp_path)
    assert "24/40/48/80/141" in said and "32 rows of 2,048 tokens needs" in said
    assert re.search(r"^  model.activation_checkpointing=true: 1.\d GiB$", said, re.MULTILINE)
    assert re.search(r"^  --gpus 4: 1.\d GiB$", said, re.MULTILINE)
    assert len(re.findall(r": \d\.\d GiB$", said, re.MULTILINE)) == len(will_it_fit.REMEDIES) + 2  # none of them fails
    failed = run_script(ROOT / "will_it_fit.py", "--config", file, "--gpus", 3, cwd=tmp_path)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "model.batch_size=32" in failed.stderr


def test_the_command_takes_what_dpo_takes(tmp_path):
    said = run_well(ROOT / "will_it_fit.py", "--config", write_config(tmp_path, "DPOConfig"), "--gpus", 2, cwd=tmp_path)
    assert "24/40/48/80/141" in said and "32 rows of 4,096 tokens needs" in said


@pytest.mark.parametrize("argv, said", [
    (["--gpus", "x"], "argument --gpus: invalid int value: 'x'"), (["--gpus", "0"], "--gpus and --gib must be above 0"),
    (["--gib", "nan"], "--gpus and --gib must be above 0"), ([], "--config is required: a file such as configs/tiny.py")])
def test_what_is_wrong_with_the_arguments_is_one_line(monkeypatch, capfd, argv, said):
    monkeypatch.setattr(sys, "argv", ["will_it_fit.py", *argv])
    with pytest.raises(SystemExit) as error:
        will_it_fit.main()
    assert error.value.code == 1 and capfd.readouterr() == ("", f"will_it_fit.py: {said}\n")
