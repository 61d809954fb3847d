"""What a run writes and shows: records, the bar, trackers, the lines at its start and at its end; what FLOPs a step needs."""

import dataclasses
import io
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import process_of_one, write_model
from forked import run_forked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_logps import make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import log
from chat import ChatEncoder, load_examples
from configs.base import Config, WandbConfig
from fsdp_utils import end_process, init_processes, say
from log import Log, count_flops, describe_data, describe_run, describe_start, explain, is_right, plot, show_answers, show_example
from logps import target_logps
from model_utils import load_model, load_tokenizer
from script import timed
from trial import whole_batch

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
    return tokenizer, load_model(str(folder / "model"), None, tokenizer, encoder.stop_ids, ""), train, held_out


def test_a_run_begins_with_what_it_trains_on_what(started, group, tmp_path):
    tokenizer, model, train, held_out = started
    assert (len(train.ids), len(held_out.ids)) == (7, 3)
    # 3i letters are asked, beside five tokens of the template and three of the answer
    assert describe_data(tokenizer, train, held_out, tmp_path).split("\n") == [
        "data: 10 rows → 10 examples, 245 tokens, of which 30 are targets",
        f"--- an example, in words, {train.rows.files[0]}:1; what is trained is marked",
        "<|user|>", "ABC", "<|assistant|>", "⟦DE</s>⟧", "---"]
    lines = describe_run(14, 4, 2, 3, model, True, None).split("\n")
    assert lines == ["eval: 2 of 3 held-out examples", "model: 0.0M parameters, 0.0M trained, on 1 x cpu",
                     "steps: 4, of 14 examples, packed"]
    assert describe_run(14, 4, 2, 3, model, False, Path("run/checkpoints/step-2")).split("\n") == [
        *lines[:-1], "steps: 4, of 14 examples, padded", "resumed from run/checkpoints/step-2"]


def test_the_parts_of_the_start_add_up_to_it(monkeypatch):
    monkeypatch.setattr("script.PARTS", parts := {})
    monkeypatch.setattr("log.PARTS", parts)

    @timed("model")
    def fill() -> str:
        return "filled"

    for _ in range(2):
        assert fill() == "filled"
    assert [*parts] == ["imports", "model"] and 0 < parts["model"] < parts["imports"]
    before = dict(parts)
    with timed("trial"):
        pass
    assert [*parts.items()][:2] == [*before.items()] and parts["trial"] > 0  # those before it stay as they are
    parts |= {"model": 3.21, "data": 0.04, "trial": 1.5, "imports": 0.7}
    whole, told = re.fullmatch(r"start: (\S+) s: (.*)", describe_start()).groups()
    told = {name: float(seconds) for name, seconds in (part.split() for part in told.split(", "))}
    assert [*told] == ["imports", "model", "trial", "other"] and [*told.values()][:3] == [0.7, 3.2, 1.5]
    assert sum(told.values()) == pytest.approx(float(whole), abs=0.05 * (len(told) + 1) + 1e-9)  # each is rounded


def test_where_nothing_is_held_out_a_line_says_what_would(started, group):
    _, model, *_ = started
    lines = describe_run(14, 4, 0, 0, model, True, None).split("\n")
    assert [line for line in lines if "held" in line or line.startswith("eval")] == [
        "eval: nothing is held out; eval_fraction=0.05 would hold out a twentieth of the rows, eval_datasets=[FILE] a file"]


def test_what_is_trained_is_counted_apart(group):
    model = torch.nn.Sequential(torch.nn.Linear(2000, 2000, bias=False), torch.nn.Linear(1000, 300, bias=False))
    model[0].weight.requires_grad_(False)
    assert "model: 4.3M parameters, 0.3M trained, on 1 x cpu\n" in describe_run(1, 1, 0, 0, model, True, None)


# A thought, between Y and Z, is written in the last answer alone; each capital and each role is a token
FORGETFUL = """\
{%- for message in messages %}{{ '<|' + message.role + '|>' }}\
{%- if message.reasoning_content and loop.last %}{{ 'Y' + message.reasoning_content + 'Z' }}{% endif %}{{ message.content }}\
{%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
ASKED = {"role": "user", "content": "A"}
ROWS = [
    {"prompt": "A", "completion": "BB", "source": "x"},
    {"prompt": "A", "completion": 5}, {"prompt": "A"}, {"prompt": "A", "completion": "B", "chosen": "C"},
    {"prompt": "A", "completion": "B", "images": ["x"]}, {"prompt": "A"},
    {"prompt": "A</s>", "completion": "B"}, {"prompt": "A", "completion": " "}, {"prompt": "A", "completion": ""},
    {"messages": [ASKED, {"role": "assistant", "content": "B", "thinking": "CC"}, ASKED,
                  {"role": "assistant", "content": "E", "thinking": "FF"}]},
    {"text": "A" * 40},
    {"prompt": "A", "completion": "B" * 40},
    {"messages": [{"role": "assistant", "content": "A"}, ASKED, {"role": "assistant", "content": "C", "mood": "good"}]}]
NO_SHAPE = ("the keys ['prompt'] fit no shape of row; known are messages, prompt + completion, instruction (+ input) + output, "
            "conversations, text")


def test_what_became_of_each_row_is_said_and_kept(started, group, tmp_path):
    (tmp_path / "forgetful.jinja").write_text(FORGETFUL)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name in ("notes.txt", "old.parquet"):
        (tmp_path / "set" / name).touch()
    (tmp_path / "eval.csv").write_text("prompt,completion,id\nA,B,7\n")
    tokenizer = load_tokenizer(started[0].name_or_path, "", chat_template=str(tmp_path / "forgetful.jinja"))
    train, held_out, _ = load_examples(ChatEncoder(tokenizer, 24, 16), [str(tmp_path / "set")], [str(tmp_path / "eval.csv")],
                                       0, False, 1, str(tmp_path), max_bad_rows=0.5)
    file = str(tmp_path / "set/rows.jsonl")
    # The tokens of the rows 1, 10 (an example, and another), 11 (two pieces), 12 (cut), 13, and then the targets
    assert (6 + (9 + 14) + (24 + 19) + 24 + 5, 3 + 12 + (23 + 18) + 21 + 2) == (101, 79)
    assert describe_data(tokenizer, train, held_out, tmp_path).replace(file, "FILE").split("\n") == [
        "data: 13 rows → 7 examples, 101 tokens, of which 79 are targets",
        "  an answer that the template writes otherwise once another follows is an example of its own: 1.1 times the tokens; "
        "last_answer_only=true or a switch of the template (model.template_kwargs) may spare them",
        "  split: 1 the template writes an answer otherwise once another follows (FILE:10); 1 a text is long (FILE:11)",
        "  dropped: 2 nothing to train (FILE:8); 1 a text spells a control token (FILE:7)",
        f"  bad: 2 {NO_SHAPE} (FILE:3); 1 completion must be a text, not 5 (FILE:2); "
        "1 chosen can't be trained on: preferences are for dpo.py (FILE:4); and 1 more reasons",
        "  too long: 1 examples; 20 tokens are dropped",
        "  left out: 1 answers before the first question",
        "  keys that nothing reads: messages[].mood, source",
        "  files passed over: notes.txt, old.parquet",
        "--- an example, in words, FILE:1; what is trained is marked", "<|user|>A<|assistant|>⟦BB</s>⟧", "---",
        "--- an example, with a thought, FILE:10; what is trained is marked",
        "<|user|>A<|assistant|>B</s><|user|>A<|assistant|>⟦YFFZE</s>⟧", "---",
        "--- an example, a text, FILE:11; what is trained is marked", f"A⟦{'A' * 17}</s>⟧", "---"]

    report = json.loads((tmp_path / "data.json").read_text())
    assert report["eval"] == {
        "files": [str(tmp_path / "eval.csv")], "passed over": [],
        "counts": {"rows": 1, "examples": 1, "tokens": 5, "tokens kept": 5, "targets": 2, "unread: id": 1, "shown: in words": 1},
        "first": dict.fromkeys(["unread: id", "shown: in words"], str(tmp_path / "eval.csv") + ":2")}
    bad = {NO_SHAPE: (2, 3), "completion must be a text, not 5": (1, 2),
           "chosen can't be trained on: preferences are for dpo.py": (1, 4),
           "images can't be trained on: only text is trained here": (1, 5)}
    assert report["train"] == {
        "files": [file], "passed over": [str(tmp_path / "set" / name) for name in ("notes.txt", "old.parquet")],
        "counts": {
            "rows": 13, "examples": 7, "tokens": 121, "tokens kept": 101, "tokens dropped": 20, "targets": 79,
            "examples truncated": 1, "tokens more by splitting": 9, "answers before the first question, left out": 1,
            "dropped: nothing to train": 2, "dropped: a text spells a control token": 1, "split: a text is long": 1,
            "split: the template writes an answer otherwise once another follows": 1, "unread: source": 1,
            "unread: messages[].mood": 1, "shown: in words": 3, "shown: with a thought": 1, "shown: a text": 1,
            **{f"bad: {reason}": count for reason, (count, _) in bad.items()}},
        "first": {
            **{name: f"{file}:{line}" for name, line in {
                "unread: source": 1, "shown: in words": 1, "dropped: a text spells a control token": 7,
                "dropped: nothing to train": 8, "shown: with a thought": 10, "shown: a text": 11, "split: a text is long": 11,
                "split: the template writes an answer otherwise once another follows": 10, "unread: messages[].mood": 13,
                "answers before the first question, left out": 13}.items()},
            **{f"bad: {reason}": f"{file}:{line}" for reason, (_, line) in bad.items()}}}


def test_of_many_reasons_keys_and_files_the_first_are_said(started, group, tmp_path):
    """The folder's one file of rows has twelve keys that nothing reads, and lies beside ten files without rows."""
    rows = [{"prompt": "A", "completion": "B", **{f"key{i:02}": 1 for i in range(12)}}]
    (tmp_path / "set").mkdir()
    (tmp_path / "set/rows.json").write_text(json.dumps(rows))
    for i in range(10):
        (tmp_path / f"set/{i}.txt").touch()
    train, held_out, _ = load_examples(ChatEncoder(started[0], 24, 16), [str(tmp_path / "set")], [], 0, False, 1, str(tmp_path))
    assert describe_data(started[0], train, held_out, tmp_path).split("\n")[1:3] == [
        "  keys that nothing reads: key00, key01, key02, key03, key04, key05, key06, key07 and 4 more",
        "  files passed over: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 5.txt, 6.txt, 7.txt and 2 more"]


def test_a_template_s_tokens_that_the_tokenizer_lacks_are_said(started, group, tmp_path):
    _, _, train, held_out = started
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|><start_of_turn><|user|>' + m.content + '<|im_end|>' + eos_token }}{% endfor %}")
    tokenizer = load_tokenizer(str(train.rows.files[0].parent / "model"), "", chat_template=str(tmp_path / "own.jinja"))
    assert describe_data(tokenizer, train, held_out, tmp_path).split("\n")[1] == (
        "  the chat template writes <start_of_turn>, <|im_end|>, <|im_start|> as text: none is one token of this tokenizer")


def test_an_example_s_targets_are_marked_in_green_or_in_brackets(started, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    tokenizer, *_ = started
    ids = np.array(tokenizer("ABCDEF", add_special_tokens=False)["input_ids"])
    trained, begin, end = np.array([0, 1, 1, 0, 0, 1], bool), "--- an example, x.jsonl:3; what is trained is marked\n", "\n---"
    assert show_example(tokenizer, ids, trained, "x.jsonl:3") == f"{begin}A⟦BC⟧DE⟦F⟧{end}"
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert show_example(tokenizer, ids, trained, "x.jsonl:3") == f"{begin}A\033[32mBC\033[0mDE\033[32mF\033[0m{end}"


@pytest.mark.parametrize("n_asked, n_answers, shown", [
    (10, 1, "A" * 10 + "⟦B⟧"), (11, 1, "AAAAA […] AAAAA⟦B⟧"), (1, 3, "A⟦B⟧A⟦B⟧A⟦B⟧"), (1, 4, "A⟦B⟧A […] ⟦B⟧A⟦B⟧")])
def test_of_a_long_example_the_middle_is_left_out(started, n_asked, n_answers, shown):
    tokenizer, *_ = started
    ids = np.array(tokenizer(("A" * n_asked + "B") * n_answers, add_special_tokens=False)["input_ids"])
    trained = ids == tokenizer.convert_tokens_to_ids("B")
    assert show_example(tokenizer, ids, trained, "x", longest=10).split("\n")[1:] == [shown, "---"]


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


def test_accuracy_and_margin_are_told_where_the_records_hold_them(make_log, capsys):
    log = make_log()
    log.add_evaluation(0, 0, {"loss/eval": math.log(2), "margin/eval": 0.0, "accuracy/eval": 0.0, "logps/eval/chosen": -1.0})
    assert capsys.readouterr().out.endswith("step 0: held-out loss 0.6931, accuracy 0 %, margin 0.00\n")
    take_step(log, 1, 4, means={"loss/train": 0.5, "margin/train": 1.0, "accuracy/train": 0.5})
    log.add_evaluation(1, 4, {"loss/eval": 0.25, "margin/eval": math.nan, "accuracy/eval": 0.996})
    lines = log.summary([], {}, Path("FINAL")).split("\n")
    assert lines[2:5] == ["loss/eval 0.6931 → 0.2500", "accuracy/eval 0 → 100 %", "margin/eval 0.00 → not finite"]
    rewards = {"loss/eval": 0.25, "margin/eval": 3.214, "accuracy/eval": 0.5}
    log.add_evaluation(2, 8, rewards)
    assert log.summary([], {}, Path("FINAL")).split("\n")[3:5] == ["accuracy/eval 0 → 50 %", "margin/eval 0.00 → 3.21"]


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


ERRORS = {  # name → (what is raised, what is said of it, seconds for others to speak before)
    "a GPU's memory": (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
                       "rank 3: out of memory: CUDA out of memory. Tried to allocate 2 GiB; python will_it_fit.py", 0),
    "the host's memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
                          "rank 3: out of memory: ", 0),
    "another rank's end": (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"),
                           "rank 3: another rank has ended, or has not answered for 7 minutes: [gloo/", 10),
    "a time-out": (dist.DistNetworkError("no answer"), "rank 3: another rank has ended", 10),
    "a fault of ours": (KeyError("x"), "Traceback (most recent call last):", 0)}


@pytest.mark.parametrize("name", ERRORS)
def test_what_no_code_foresees_is_told_in_a_line_where_that_tells_enough(monkeypatch, name):
    monkeypatch.setenv("RANK", "3")
    error, says, wait = ERRORS[name]
    try:
        raise error
    except Exception as caught:
        text, seconds = explain(caught, 7)
    assert text.startswith(says) and seconds == wait and (text.count("\n") == 0) == (name != "a fault of ours")


def test_names_that_no_screen_can_show_are_spelt(started, group, tmp_path, capsys):
    """A key that is half of a surrogate pair, one that a terminal would obey, and files whose names are no UTF-8."""
    folder, row = tmp_path / "set", {"prompt": "A", "completion": "B", "\ud83d": 1, "\x1b[31mred": 1}
    folder.mkdir()
    for name in (b"\xff.jsonl", b"\xfe.txt"):
        (folder / os.fsdecode(name)).write_text(json.dumps(row) + "\n")
    train, held_out, _ = load_examples(ChatEncoder(started[0], 24, 16), [str(folder)], [], 0, False, 1, str(tmp_path))
    say(describe_data(started[0], train, held_out, tmp_path))
    lines = capsys.readouterr().out.split("\n")
    assert lines[1:4] == [r"  keys that nothing reads: \ud83d, \x1b[31mred", r"  files passed over: \udcfe.txt",
                          rf"--- an example, in words, {folder}/\udcff.jsonl:1; what is trained is marked"]
    assert json.loads((tmp_path / "data.json").read_text())["train"]["files"] == [str(folder / "\udcff.jsonl")]
