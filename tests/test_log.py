"""What a run writes and shows: records, the bar, trackers, the lines at its start and at its end; what FLOPs a step needs."""

import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import process_of_one, write_model
from forked import run_forked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_logps import make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import log
from chat import ChatEncoder, load_examples
from configs.base import Config, WandbConfig
from fsdp_utils import end_process, init_processes
from log import Log, count_flops, describe_run, is_right, plot, show_answers, show_example
from logps import target_logps, whole_batch
from model_utils import load_model, load_tokenizer

CPU, SETTINGS = torch.device("cpu"), dataclasses.asdict(Config(exp_name="a"))
MEANS = {"loss/train": 2.5, "logps/train": -30.0}


@pytest.fixture(scope="module")
def group():
    with process_of_one():
        yield init_processes()


@pytest.fixture
def make_log(group, tmp_path):
    """Makes Logs that are closed at the end, in tmp_path."""
    made = []

    def make(counter: int = 0, n_examples: int = 100, resumed_from: Path | None = None) -> Log:
        made.append(Log(tmp_path, resumed_from, counter, n_examples, CPU, (600.0, 400.0, 10.0), SETTINGS))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def clock(monkeypatch):
    """A clock for log.py that stands still; it is moved on by clock.seconds += 1."""
    class Clock:
        seconds = 1000.0

        def perf_counter(self) -> float:
            return self.seconds

    clock = Clock()
    monkeypatch.setattr(log, "time", clock)
    return clock


def counts(n_examples: int, n_microbatches: int = 1) -> dict:
    """What a batch of SFTDataLoader tells of its step."""
    return {"n_examples": n_examples, "n_microbatches": n_microbatches, "global_target_count": 100, "global_token_count": 400,
            "global_squared_lengths": 5000}


def take_step(log: Log, step: int, counter: int, n_examples: int = 4, means: dict = MEANS, **options) -> None:
    log.add_step(step, counter, options.get("skipped", 0), 1e-3, options.get("grad_norm", 0.5), means, counts(n_examples))


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# The bar


@pytest.mark.parametrize("n_examples, n_microbatches, expected", [
    (10, 1, [10]), (10, 4, [2, 5, 7, 10]), (3, 8, [0, 0, 1, 1, 1, 2, 2, 3]), (128, 64, [*range(2, 129, 2)])])
@pytest.mark.parametrize("before", [0, 40])
def test_the_bar_moves_within_a_step_of_many_microbatches(make_log, n_examples, n_microbatches, expected, before):
    log, shown = make_log(before, 1000), []
    for step in (1, 2):
        for _ in range(n_microbatches):
            log.add_microbatch(counts(n_examples, n_microbatches))
            shown.append(log.bar.n)
        take_step(log, step, before + step * n_examples, n_examples)
        assert log.bar.n == before + step * n_examples
    assert shown == [before + n for n in [*expected, *(n_examples + n for n in expected)]]


def test_the_bar_is_full_after_a_last_step_of_fewer_examples(make_log):
    log = make_log(n_examples=13)
    for step, (n_examples, n_microbatches) in enumerate([(5, 2), (5, 4), (3, 2)], 1):
        for _ in range(n_microbatches):
            log.add_microbatch(counts(n_examples, n_microbatches))
        take_step(log, step, min(13, 5 * step), n_examples)
    assert log.bar.n == log.bar.total == 13


def test_the_bar_shows_the_step_and_what_is_done_between_two(make_log, capfd):
    log = make_log()
    take_step(log, 7, 28)
    assert log.bar.desc == "training"
    with log.pause("saving"):
        assert log.bar.desc == "saving: "
    with pytest.raises(OSError), log.pause("saving"):
        raise OSError
    assert log.bar.desc == "training: "
    said = capfd.readouterr().err
    assert "saving: " in said and "step 7, loss 2.500, lr 1.0e-03, grad norm 0.50, " in said


def test_what_is_said_goes_above_the_bar_to_the_standard_output(make_log, capfd):
    log = make_log()
    log.add_evaluation(3, 12, {"loss/eval": 1.23456, "logps/eval": -9.0})
    assert capfd.readouterr().out == "step 3: held-out loss 1.2346\n"


# ---------------------------------------------------------------------------------------------------------------------
# The records


def test_a_step_s_record_has_its_speed_without_the_pauses_before_it(make_log, clock, tmp_path):
    log = make_log()
    clock.seconds += 2
    take_step(log, 1, 4)
    with log.pause("evaluating"):
        clock.seconds += 50
    clock.seconds += 0.5
    take_step(log, 2, 8, grad_norm=0.25, skipped=1)
    first, second = read(tmp_path)
    assert first == {"step": 1, "counter": 4, "lr": 1e-3, "grad_norm": 0.5, **MEANS, "skipped_steps": 0, "target_fraction": 0.25,
                     "tokens_per_second": 200.0, "examples_per_second": 2.0, "peak_memory_gb": first["peak_memory_gb"]}
    assert 0.1 < first["peak_memory_gb"] < 100
    assert (second["tokens_per_second"], second["examples_per_second"]) == (800.0, 8.0)
    assert (second["skipped_steps"], second["grad_norm"]) == (1, 0.25)


def test_the_part_of_the_device_s_flops_that_a_step_needed(make_log, clock, tmp_path):
    assert log.peak_flops(CPU) is None
    its = make_log()
    its.peak_flops = 1e6  # a device in log.py's table has that
    clock.seconds += 2
    take_step(its, 1, 4)
    (record,) = read(tmp_path)
    assert record["mfu"] == pytest.approx((400 * 600 + 100 * 400 + 5000 * 10) / 2 / 1e6, rel=1e-12)


def test_a_number_that_json_has_not_is_null_and_the_last_values_are_kept(make_log, tmp_path):
    log = make_log()
    log.add_evaluation(0, 0, {"loss/eval": 3.0, "logps/eval": -9.0})
    take_step(log, 1, 4, means={"loss/train": math.nan, "logps/train": -math.inf}, grad_norm=math.inf)
    evaluation, step = read(tmp_path)
    assert evaluation == {"step": 0, "counter": 0, "loss/eval": 3.0, "logps/eval": -9.0}
    assert (step["loss/train"], step["logps/train"], step["grad_norm"]) == (None, None, None)
    assert log.last == evaluation | step and log.last["loss/eval"] == 3.0 and log.last["step"] == 1


def test_a_resumed_run_s_records_go_on_from_those_of_its_checkpoint(make_log, tmp_path):
    first, checkpoint = make_log(), tmp_path / "checkpoint"
    take_step(first, 1, 4)
    first.close()
    checkpoint.mkdir()
    (checkpoint / "metrics.jsonl").write_text((tmp_path / "metrics.jsonl").read_text())
    (tmp_path / "metrics.jsonl").write_text((tmp_path / "metrics.jsonl").read_text() * 2 + "{half")  # trained after it
    log = make_log(4, resumed_from=checkpoint)
    assert log.bar.n == 4 and read(tmp_path) == read(checkpoint) == log.records and log.last == read(checkpoint)[-1]
    take_step(log, 2, 8)
    assert [record["step"] for record in read(tmp_path)] == [1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Trackers


def log_some(folder: Path) -> None:
    _, _, device = init_processes()
    settings = dataclasses.asdict(Config(exp_name="a", tensorboard=True, wandb=WandbConfig(enabled=True, project="tracked")))
    log = Log(folder, None, 0, 8, device, (1.0, 1.0, 1.0), settings)
    log.add_evaluation(0, 0, {"loss/eval": 3.5})
    for step, loss in enumerate([3.0, math.nan, 1.5], 1):
        take_step(log, step, 4 * step, means={"loss/train": loss})
    log.close()
    end_process()


@pytest.mark.slow
def test_trackers_get_every_record(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = run_forked(0, log_some, tmp_path)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert all(word in file.read_bytes() for word in (b"loss/train", b"loss/eval", b"grad_norm", b"tracked"))
    accumulator, records = EventAccumulator(str(tmp_path / "tensorboard")), read(tmp_path)
    accumulator.Reload()
    assert [record.get("loss/train", record.get("loss/eval")) for record in records] == [3.5, 3.0, None, 1.5]
    for key in ("loss/train", "grad_norm", "loss/eval", "lr", "tokens_per_second"):
        assert [(event.step, event.value) for event in accumulator.Scalars(key)] == [
            (record["counter"], pytest.approx(record[key], rel=1e-6)) for record in records if record.get(key) is not None], key


# ---------------------------------------------------------------------------------------------------------------------
# What a run begins with


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """(tokenizer, model, training, held-out examples) of a little model and ten rows, three of which are held out."""
    folder = tmp_path_factory.mktemp("log")
    write_model(folder / "model")
    rows = [{"prompt": "ABC" * i, "completion": "DE"} for i in range(1, 11)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(str(folder / "model"), "")
    encoder = ChatEncoder(tokenizer, 64, 32)
    train, held_out, _ = load_examples(encoder, [str(folder / "rows.jsonl")], [], 0.3, False, 1, str(folder))
    return tokenizer, load_model(str(folder / "model"), None, tokenizer, encoder.stop_id, ""), train, held_out


def test_a_run_begins_with_what_it_trains_on_what(started, group):
    tokenizer, model, train, held_out = started
    assert (len(train.ids), len(held_out.ids)) == (7, 3)
    lines = describe_run(tokenizer, train, 14, 4, 2, 3, model, True, None).split("\n")
    n_tokens, n_targets = sum(train.rows.lengths), sum(train.rows.targets)
    assert lines[-4:] == [f"train: 10 rows; {n_tokens} tokens; {n_tokens} tokens kept; {n_targets} targets",
                          "eval: 2 of 3 held-out rows", "model: 0.0M parameters, 0.0M trained, on 1 x cpu",
                          "steps: 4, of 14 examples, packed"]
    example = tokenizer.decode(train.rows[train.ids[0]][0])
    assert "\n".join(lines[:-4]).replace("⟦", "").replace("⟧", "") == f"--- an example; what is trained is marked\n{example}\n---"
    resumed = describe_run(tokenizer, train, 14, 4, 2, 3, model, False, Path("run/checkpoints/step-2")).split("\n")
    assert resumed[:-2] == lines[:-1] and resumed[-2:] == ["steps: 4, of 14 examples, padded",
                                                          "resumed from run/checkpoints/step-2"]


def test_where_nothing_is_held_out_a_line_says_what_would(started, group):
    tokenizer, model, train, _ = started
    lines = describe_run(tokenizer, train, 14, 4, 0, 0, model, True, None).split("\n")
    assert [line for line in lines if "held" in line or line.startswith("eval")] == [
        "eval: nothing is held out; eval_fraction=0.05 would hold out a twentieth of the rows, eval_datasets=[FILE] a file"]


def test_what_is_trained_is_counted_apart(started, group):
    tokenizer, _, train, _ = started
    model = torch.nn.Sequential(torch.nn.Linear(2000, 2000, bias=False), torch.nn.Linear(1000, 300, bias=False))
    model[0].weight.requires_grad_(False)
    assert "model: 4.3M parameters, 0.3M trained, on 1 x cpu\n" in describe_run(tokenizer, train, 1, 1, 0, 0, model, True, None)


def test_an_example_s_targets_are_marked_in_green_or_in_brackets(started, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    tokenizer, *_ = started
    ids = np.array(tokenizer("ABCDEF", add_special_tokens=False)["input_ids"])
    trained, begin, end = np.array([0, 1, 1, 0, 0, 1], bool), "--- an example; what is trained is marked\n", "\n---"
    assert show_example(tokenizer, ids, trained) == f"{begin}A⟦BC⟧DE⟦F⟧{end}"
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert show_example(tokenizer, ids, trained) == f"{begin}A\033[32mBC\033[0mDE\033[32mF\033[0m{end}"


# ---------------------------------------------------------------------------------------------------------------------
# What a run ends with


def test_a_summary_ends_with_how_to_talk_to_the_model(make_log, clock):
    log, final = make_log(), Path("runs/a/FINAL")
    log.add_evaluation(0, 0, {"loss/eval": 4.0})
    clock.seconds += 81
    for step in range(1, 10):
        clock.seconds += 1
        take_step(log, step, 4 * step, means={"loss/train": 10.0 - step})
    log.add_evaluation(9, 36, {"loss/eval": 3.25})
    first, *middle, last = log.summary([], {}, final).split("\n")
    assert first.startswith("9 steps, 90 s since the start, peak memory ") and first.endswith(" GB")
    assert middle == ["loss/train 9.0000 → 1.0000", "loss/eval 4.0000 → 3.2500"]  # too few steps for a curve
    assert last == "saved to runs/a/FINAL; to talk to it: python generate.py runs/a/FINAL"
    for step, loss in ((10, math.nan), (11, 0.5)):  # the first is skipped
        clock.seconds += 1
        take_step(log, step, 4 * step, means={"loss/train": loss})
    questions = [{"skill": "all", "prompt": "add 1", "expected": "2"}]
    lines = log.summary(questions, {11: ["2"]}, final).split("\n")
    assert lines[1] == "loss/train 9.0000 → 0.5000" and lines[2:13] == plot([*range(9, 0, -1), 0.5]).split("\n")
    assert lines[13:] == ["loss/eval 4.0000 → 3.2500", *show_answers(questions, {11: ["2"]}).split("\n"), last]


def test_a_run_without_evaluations_or_finite_losses_has_a_summary(make_log):
    log = make_log()
    for step in (1, 2):
        take_step(log, step, 4 * step, means={"loss/train": math.nan})
    first, last = log.summary([], {}, Path("FINAL")).split("\n")
    assert first.startswith("2 steps, ") and last.startswith("saved to FINAL; ")


SKILLS = ["add", "add", "sort", "add"]
QUESTIONS = [{"skill": skill, "prompt": f"{skill} {i}", "expected": "1"} for i, skill in enumerate(SKILLS)]
ANSWERS = {0: ["2", "3", "1", ""], 40: ["1", "11", "1", "1"]}


def test_answers_are_graded_by_skill_one_of_each_is_shown_and_the_columns_are_aligned():
    assert show_answers(QUESTIONS, ANSWERS).split("\n") == [
        "--- held-out prompts, answered after step 40",
        "add 0 → 1 ✓", "sort 2 → 1 ✓",
        "--- exactly right, in %           step 0   step 40",
        "add                                    0        67",
        "sort                                 100       100",
        "all                                   25        75"]


def test_answers_without_skills_are_graded_together_and_the_first_are_shown():
    questions = [question | {"skill": "all"} for question in QUESTIONS]
    assert show_answers(questions, {40: ANSWERS[40]}, n_samples=2).split("\n") == [
        "--- held-out prompts, answered after step 40", "add 0 → 1 ✓", "add 1 → 11 ✗ (expected '1')",
        "--- exactly right, in %          step 40", "all                                   75"]


@pytest.mark.parametrize("text, right", [("5", True), (" 5\n", True), ("", False), ("55", False), ("5.", False), ("5 5", False)])
def test_an_answer_is_right_if_it_is_the_expected_one_but_for_space_around_it(text, right):
    assert is_right({"expected": "5"}, text) == is_right({"expected": "\n5 "}, text) == right


def test_a_curve_is_drawn_from_its_highest_to_its_lowest_value():
    assert plot([3.0, 1.0, 2.0], height=3).splitlines() == ["   3.000 │•  ", "         │  •", "   1.000 │ • ", "         └───"]
    assert plot([5.0, 3.0, 1.0, 1.0], width=2, height=2).splitlines()[:2] == ["   4.000 │• ", "   1.000 │ •"]
    assert plot([2.0] * 2, height=2).splitlines()[:2] == ["   2.000 │  ", "   2.000 │••"]


# ---------------------------------------------------------------------------------------------------------------------
# What a step needs


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_are_those_of_the_matmuls_that_run(frozen):
    """Of the body and, on the targets alone, of the head; attention's, which torch counts without its mask, stand apart."""
    model = make_model("llama")
    if frozen:
        model.requires_grad_(False).enable_input_require_grads()
    targets = torch.tensor([3, 7, 8])
    batch = whole_batch(torch.arange(24)[None]) | {"target_positions": targets, "predicting_positions": targets - 1}
    with FlopCounterMode(display=False) as counter:
        target_logps(model, batch)[0].sum().backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    per_token, per_target, per_squared_length = count_flops(model)
    assert sum(count for op, count in counts.items() if "mm" in op and "bmm" not in op) == 24 * per_token + 3 * per_target
    assert per_squared_length == 6 * 2 * 64  # layers, width


def test_a_model_without_attention_has_no_flops_of_it():
    config = AutoConfig.for_model("mamba", hidden_size=64, num_hidden_layers=2, vocab_size=128)
    per_token, _, per_squared_length = count_flops(AutoModelForCausalLM.from_config(config))
    assert per_token > 0 and per_squared_length == 0
