"""Answers of generate.py against transformers, one prompt at a time without padding, and PEFT's merge."""

import dataclasses
import itertools
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess

import peft
import pytest
import torch
from conftest import ROOT, run_script, write_model
from forked import run_file, run_forked
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat import ChatEncoder
from configs.base import Config, ModelConfig
from lora import add_lora, save_adapter
from model_utils import load_model, load_tokenizer

SCRIPT = str(ROOT / "generate.py")
QUESTIONS = ["add 2 and 3", "reverse ABCDEFG", "sort 52431", "last letter of HELLOWORLD", "day after 3 may",
             "double each letter of Q"]
LENGTH = 24  # tokens of an answer at most
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """base/ as write_model makes it; model/ with its chat template, as sft.py writes FINAL, which ends some of the answers."""
    folder = tmp_path_factory.mktemp("generate")
    write_model(folder / "base")
    tokenizer = load_tokenizer(str(folder / "base"), str(folder))
    [stop] = ChatEncoder(tokenizer, 128, 64).stop_ids
    model = load_model(str(folder / "base"), None, tokenizer, [stop], str(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that what it answers depends on what it is asked
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    ids = reference(folder / "model", user(QUESTIONS[0]), stops=[])[0]
    late = next(token for i, token in enumerate(ids) if i >= 5 and token not in ids[:i])
    with torch.no_grad():  # a token that the model writes late, and the one that ends an answer, change places
        rows = model.get_output_embeddings().weight
        rows[[late, stop]] = rows[[stop, late]]
    model.save_pretrained(folder / "model")
    return folder


def user(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def reference(folder: Path, asked: list[dict] | str, stops: list[int] | None = None, template: dict | None = None,
              **sampling) -> tuple[list[int], str]:
    """The ids, with the token that ends them, and the text of an answer by transformers alone: to messages, or what follows a
    text. The template gets what it is called with beside the messages."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    if isinstance(asked, str):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(asked, add_special_tokens=False)["input_ids"]]])
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True,
                                               **(template or {}))
    if stops is None:
        stops = [tokenizer.eos_token_id]
    model.generation_config.eos_token_id = stops or None
    sampling = {"do_sample": True, "top_k": 0, **sampling} if sampling else {"do_sample": False}
    output = model.generate(**prompt, max_new_tokens=LENGTH, pad_token_id=0, **sampling)
    ids = output[0, prompt["input_ids"].shape[1]:].tolist()
    return ids, tokenizer.decode(ids, skip_special_tokens=True).strip()


def run(*argv) -> None:
    """Runs the script in this process, which has imported what takes long."""
    before, sys.argv = sys.argv, [SCRIPT, *map(str, argv)]
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    finally:
        sys.argv = before


def write_rows(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def answers(folder: Path, tmp_path: Path, rows: list, *options) -> list[dict]:
    file = write_rows(tmp_path / "prompts.jsonl", rows)
    run(folder, "--prompts", file, "--out", tmp_path / "answers.json", "--max-new-tokens", LENGTH, *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.json", "prompts.jsonl"]  # nothing else is left behind
    return json.loads((tmp_path / "answers.json").read_text())


def outputs(*args) -> list[str]:
    return [record["output"] for record in answers(*args)]


# ---------------------------------------------------------------------------------------------------------------------
# Greedy answers


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_batched_answers_are_those_of_transformers_one_by_one(world, tmp_path, batch_size):
    expected = [reference(world / "model", user(question)) for question in QUESTIONS]
    lengths = [len(ids) for ids, _ in expected]
    assert min(lengths) < max(lengths) and len({text for _, text in expected}) == len(QUESTIONS)
    assert outputs(world / "model", tmp_path, [{"prompt": question} for question in QUESTIONS], "--batch-size", batch_size) == [
        text for _, text in expected]


def test_an_answer_ends_before_the_terminator(world, tmp_path, capsys):
    whole = reference(world / "model", user(QUESTIONS[0]), stops=[])[0]
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    n_kept = whole.index(tokenizer.eos_token_id)
    assert n_kept >= 5
    assert outputs(world / "model", tmp_path, [{"prompt": QUESTIONS[0]}]) == [tokenizer.decode(whole[:n_kept]).strip()]
    assert "1 answers, 0 of them cut off after 24 tokens" in capsys.readouterr().out


def test_an_answer_ends_before_what_the_generation_config_names(world, tmp_path):
    """Even a token of plain text; the penalties and the sampling that it names beside are not for a greedy answer."""
    folder, out = tmp_path / "model", tmp_path / "out"
    out.mkdir()
    tokenizer, model = (kind.from_pretrained(world / "model") for kind in (AutoTokenizer, AutoModelForCausalLM))
    whole = [reference(world / "model", user(question))[0] for question in QUESTIONS]
    stop = whole[0][3]
    expected = [list(itertools.takewhile(lambda token: token not in (stop, tokenizer.eos_token_id), ids)) for ids in whole]
    model.generation_config.update(eos_token_id=[stop], repetition_penalty=5.0, temperature=3.0, do_sample=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert any(len(set(ids)) < len(ids) for ids in expected)  # a token that comes twice, which the penalty would prevent
    assert outputs(folder, out, [{"prompt": question} for question in QUESTIONS]) == [
        tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected]


def test_a_model_without_a_chat_template_gets_the_one_it_is_trained_with(world, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    assert not tokenizer.chat_template
    [output] = outputs(world / "base", tmp_path, [{"prompt": QUESTIONS[1]}])
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    prompt = tokenizer(f"<|user|>\n{QUESTIONS[1]}\n<|assistant|>\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=LENGTH)[0]
    assert output == tokenizer.decode(ids[prompt.shape[1]:], skip_special_tokens=True).strip() != ""


def test_the_template_s_empty_thought_is_no_part_of_an_answer(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "('0\\n\\n' if loop.last and message['role'] == 'assistant' else '') + message['content']")
    encoder = ChatEncoder(tokenizer, 128, 64)
    assert encoder.template.lead == "0\n\n"
    for text, shown in (("0\n\nABC", "ABC"), ("ABC", "ABC"), ("0", ""), ("A0", "A0")):
        assert encoder.read_answer(encoder.tokens(text)) == shown


# ---------------------------------------------------------------------------------------------------------------------
# The file of prompts, the file of answers


def test_the_answers_are_in_the_prompts_order_with_alpaca_eval_s_keys(world, tmp_path):
    rows = [{"prompt": "sort 1"}, {"prompt": "reverse ABCDEFGHIJ"}, {"prompt": "sort 21"}]
    records = answers(world / "model", tmp_path, rows, "--batch-size", 2)
    assert len(records) == len(rows)
    for i, row in enumerate(rows):
        assert records[i] == {
            "instruction": row["prompt"], "output": reference(world / "model", user(row["prompt"]))[1],
            "generator": str(world / "model"), "dataset": "prompts", "prompt_id": i, "sample_id": 0, "type": "sample"}


def test_every_shape_of_a_row_asks_its_last_question(world, tmp_path):
    question, sharegpt = {"role": "user", "content": "add 2\n\n3"}, {"from": "human", "value": "add 2\n\n3"}
    same = [
        {"prompt": "add 2\n\n3"},
        {"prompt": [question]},
        {"prompt": "add 2\n\n3", "completion": "5"},
        {"prompt": [question], "completion": [{"role": "assistant", "content": "5"}]},
        {"instruction": "add 2\n\n3"},
        {"instruction": "add 2", "input": "3"},
        {"instruction": "add 2", "input": "3", "output": "5"},
        {"messages": [question]},
        {"messages": [question, {"role": "assistant", "content": "5"}], "prompt": "as some data sets have beside them"},
        {"conversations": [sharegpt]},
        {"conversations": [sharegpt, {"from": "gpt", "value": "5"}]},
    ]
    history = [{"role": "system", "content": "BE"}, *user("sort 21"), {"role": "assistant", "content": "12"}, question]
    longer = [{"messages": history}, {"prompt": history, "completion": "5"}, {"prompt": history}]
    records = answers(world / "model", tmp_path, same + longer)
    assert {record["instruction"] for record in records} == {"add 2\n\n3"}
    one, other = (reference(world / "model", messages)[1] for messages in ([question], history))
    assert one != other
    assert [record["output"] for record in records] == [one] * len(same) + [other] * len(longer)


# Tools by their names, thoughts, calls and results; a switch changes what the answer follows
AGENT = """\
{%- for tool in tools or [] %}{{ 'last ' + tool.function.name + '\n' }}{% endfor %}\
{%- for message in messages %}{{ '<|' + message.role + '|>\n' }}\
{%- if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n' }}{% endif %}{{ message.content }}\
{%- for call in message.tool_calls or [] %}{{ ' ' + call.function.name + ' ' + (call.function.arguments | tojson) }}{% endfor %}\
{%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|assistant|>\n' + ('day after ' if hurried else '') }}{% endif %}"""


@pytest.fixture(scope="module")
def agent(world) -> Path:
    shutil.copytree(world / "model", world / "agent")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.chat_template = AGENT
    tokenizer.save_pretrained(world / "agent")
    return world / "agent"


def test_tools_calls_results_thoughts_and_the_system_column_are_part_of_the_prompt(agent, tmp_path):
    tool = {"type": "function", "function": {"name": "reverse", "description": "reverse a word", "parameters": {}}}
    call = {"type": "function", "function": {"name": "reverse", "arguments": {"a": 1}}}
    asked = [{"role": "system", "content": "B"}, *user("sort 21"),
             {"role": "assistant", "content": "", "reasoning_content": "add A", "tool_calls": [call]},
             {"role": "tool", "content": "12"}]
    rows = [
        {"messages": asked, "tools": [tool]},
        {"messages": [*asked, {"role": "assistant", "content": "C"}], "tools": json.dumps([tool])},
        {"system": "B", "tools": [tool["function"]], "conversations": [
            {"from": "human", "value": "sort 21"},
            {"from": "function_call", "value": '{"name": "reverse", "arguments": {"a": 1}}', "thinking": "add A"},
            {"from": "observation", "value": "12"}, {"from": "gpt", "value": "C"}]}]
    expected = reference(agent, asked, template={"tools": [tool]})[1]
    without_thought = [*asked[:2], {**asked[2], "reasoning_content": ""}, asked[3]]
    less = [(asked, []), (asked[1:], [tool]), (asked[:2], [tool]), (without_thought, [tool])]
    assert expected not in [reference(agent, messages, template={"tools": tools})[1] for messages, tools in less]
    records = answers(agent, tmp_path, rows)
    assert [(record["instruction"], record["output"]) for record in records] == 3 * [("12", expected)]


def test_a_text_is_gone_on_with_as_training_has_read_it(world, tmp_path):
    """Behind the token that ends texts, without any header."""
    records = answers(world / "model", tmp_path, [{"text": "sort 21"}, {"prompt": "sort 21"}])
    expected = [reference(world / "model", asked)[1] for asked in ("sort 21", user("sort 21"))]
    assert expected[0] != expected[1] and [record["output"] for record in records] == expected
    assert [record["instruction"] for record in records] == ["sort 21", "sort 21"]


def test_the_template_s_switches_are_those_that_the_model_was_trained_with(agent, tmp_path):
    final, out = tmp_path / "FINAL", tmp_path / "out"
    shutil.copytree(agent, final)
    out.mkdir()
    hurried = Config(model=ModelConfig(template_kwargs={"hurried": True}))
    (final / "sft_config.json").write_text(json.dumps(dataclasses.asdict(hurried)))
    expected = reference(agent, user("sort 21"), template={"hurried": True})[1]
    assert expected != reference(agent, user("sort 21"))[1]
    assert outputs(final, out, [{"prompt": "sort 21"}]) == [expected]
    (final / "sft_config.json").write_text(json.dumps(dataclasses.asdict(Config())))
    assert outputs(final, out, [{"prompt": "sort 21"}]) == [reference(agent, user("sort 21"))[1]]


def test_an_adapter_s_switches_are_kept_in_the_folder_around_it(agent, tmp_path):
    step, out = tmp_path / "step-2", tmp_path / "out"
    step.mkdir()
    out.mkdir()
    write_adapter(agent.parent, step / "adapter", "ours")
    config = Config(model=ModelConfig(template_kwargs={"hurried": True}))
    (step / "sft_config.json").write_text(json.dumps(dataclasses.asdict(config)))
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(agent), step / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(agent).save_pretrained(tmp_path / "merged")
    expected = reference(tmp_path / "merged", user("sort 21"), template={"hurried": True})[1]
    assert expected != reference(tmp_path / "merged", user("sort 21"))[1]
    for folder in (step, step / "adapter"):
        assert outputs(folder, out, [{"prompt": "sort 21"}], "--base", agent) == [expected]


def test_the_system_message_is_for_prompts_that_have_none(world, tmp_path):
    own, given = ([{"role": "system", "content": text}, *user("sort 21")] for text in ("B", "A"))
    expected = [reference(world / "model", messages)[1] for messages in (given, own)]
    assert expected[0] != expected[1]
    assert outputs(world / "model", tmp_path, [{"prompt": "sort 21"}, {"messages": own}], "--system", "A") == expected
    developer = [{"role": "developer", "content": "B"}, *user("sort 21")]
    rows = [{"prompt": "sort 21", "system": "B"}, {"messages": developer}]
    assert outputs(world / "model", tmp_path, rows, "--system", "A") == 2 * expected[1:]


def test_a_folder_of_files_names_the_file_of_each_answer(world, tmp_path):
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "b.jsonl", [{"prompt": "sort 1"}])
    (tmp_path / "set" / "a.json").write_text('[{"prompt": "sort 2"}, {"prompt": "sort é"}]')
    run(world / "model", "--prompts", tmp_path / "set", "--out", tmp_path / "out.json", "--max-new-tokens", 2)
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert [(record["dataset"], record["instruction"], record["prompt_id"]) for record in json.loads(text)] == [
        ("a", "sort 2", 0), ("a", "sort é", 1), ("b", "sort 1", 2)]
    assert "sort é" in text


def test_a_control_token_in_a_prompt_is_warned_of(world, tmp_path, capsys):
    outputs(world / "model", tmp_path, [{"prompt": "sort 1"}, {"prompt": "sort </s> 2"}])
    [warning] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warning.startswith(f"warning: {tmp_path / 'prompts.jsonl'}:2: '</s>'")


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_samples_are_those_of_transformers_from_the_same_seed(world, tmp_path):
    torch.manual_seed(5)
    expected = reference(world / "model", user("sort 21"), temperature=1.7, top_p=0.9)[1]
    assert expected != reference(world / "model", user("sort 21"))[1]
    options = ["--temperature", 1.7, "--top-p", 0.9, "--seed", 5]
    assert outputs(world / "model", tmp_path, [{"prompt": "sort 21"}], *options) == [expected]


def test_a_seed_gives_the_same_samples_again_and_another_gives_others(world, tmp_path):
    rows = [{"prompt": question} for question in QUESTIONS[3:6]]
    first, again, other = (answers(world / "model", tmp_path, rows, "--temperature", 2, "--n-samples", 4, "--batch-size", 5,
                                   "--seed", seed) for seed in (1, 1, 2))
    assert first == again
    assert [(record["prompt_id"], record["sample_id"]) for record in first] == [(i, k) for i in range(3) for k in range(4)]
    assert len({record["output"] for record in first}) == 12
    assert not {record["output"] for record in first} & {record["output"] for record in other}


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def write_adapter(world: Path, folder: Path, kind: str) -> None:
    """An adapter for world/model, by sft.py's functions or by PEFT, far enough from zero to change the answers."""
    base = str(world / "model")
    if kind == "ours":
        tokenizer = load_tokenizer(base, str(world))
        model = load_model(base, None, tokenizer, [], str(world))
        torch.manual_seed(4)
        add_lora(model, 4, 8.0, 0.0, "all-linear", use_rslora=True)
    else:
        torch.manual_seed(4)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if kind == "ours":
        save_adapter(folder, model, model.state_dict())
    else:
        model.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["ours", "peft"])
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_an_adapter_answers_as_peft_s_merged_model(world, tmp_path, kind):
    step, out = tmp_path / "step-2", tmp_path / "out"  # what sft.py writes at step 2 has no weights but the adapter's
    step.mkdir()
    out.mkdir()
    write_adapter(world, step / "adapter", kind)
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "model"), step / "adapter")
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.save_pretrained(tmp_path / "merged")
    rows = [{"prompt": question} for question in QUESTIONS]
    expected = [reference(tmp_path / "merged", user(question))[1] for question in QUESTIONS]
    assert not set(expected) & set(outputs(world / "model", out, rows))
    assert outputs(step / "adapter", out, rows) == expected  # with the base's tokenizer
    tokenizer.chat_template = "sort 4" + tokenizer.chat_template  # another one than the base's
    tokenizer.save_pretrained(step)
    tokenizer.save_pretrained(tmp_path / "merged")
    expected = [reference(tmp_path / "merged", user(question))[1] for question in QUESTIONS]
    assert outputs(step, out, rows) == outputs(step / "adapter", out, rows) == expected

    config = json.loads((step / "adapter" / "adapter_config.json").read_text())
    (step / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "moved"}))
    assert outputs(step, out, rows, "--base", world / "model") == expected


def test_a_folder_with_weights_and_an_adapter_is_a_model(world, tmp_path):
    final, out = tmp_path / "FINAL", tmp_path / "out"
    out.mkdir()
    AutoModelForCausalLM.from_pretrained(world / "model").save_pretrained(final)
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(final)
    write_adapter(world, final / "adapter", "ours")
    assert outputs(final, out, [{"prompt": "sort 21"}]) == [reference(world / "model", user("sort 21"))[1]]


# ---------------------------------------------------------------------------------------------------------------------
# The chat


def run_typed(argv: list, file: Path) -> None:
    sys.stdin = open(file)
    run_file(argv)


def chat(folder: Path, tmp_path: Path, typed: bytes, *options) -> CompletedProcess:
    """The script in a process of its own, on what is typed."""
    (tmp_path / "typed").write_bytes(typed)
    return run_forked(0, run_typed, [SCRIPT, folder, *options], tmp_path / "typed")


@slow
def test_a_chat_answers_line_by_line_until_an_empty_one(world, tmp_path):
    beginning = [{"role": "system", "content": "BE"}]
    messages, expected = beginning, []
    for question in (*QUESTIONS[:2], "/reset", QUESTIONS[1]):
        if question == "/reset":
            messages = beginning
            continue
        expected.append(reference(world / "model", messages + user(question))[1])
        messages = [*messages, *user(question), {"role": "assistant", "content": expected[-1]}]
    assert expected[1] != expected[2]
    typed = "\n".join([*QUESTIONS[:2], "A" * 300, "/reset", QUESTIONS[1], "", "not asked"]).encode()
    done = chat(world / "model", tmp_path, typed, "--system", "BE", "--max-new-tokens", LENGTH)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == "\n".join(expected).split()
    [refused] = [line for line in done.stderr.splitlines() if "begins a new one" in line]
    assert refused.startswith("this chat: the prompt's ") and "are more than the 128 that the model takes" in refused


@slow
def test_a_chat_ends_with_its_input(world, tmp_path):
    done = chat(world / "model", tmp_path, b"sort 21\nsort \xff", "--max-new-tokens", 3, "--temperature", 1)
    assert done.returncode == 0 and done.stdout.count("\n") >= 2, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Errors

GOOD = '{"prompt": "sort 1"}'
ROWS = {  # rows of a file → what is said of its line 2
    "no json": (f"{GOOD}\nsort 2", "not valid JSON at column 1"),
    "no shape": (f'{GOOD}\n{{"words": "sort 2"}}', "the keys ['words'] fit no shape of row"),
    "no object": (f"{GOOD}\n1", "a row must be a JSON object, not 1"),
    "no text": (f'{GOOD}\n{{"prompt": 3}}', "prompt must be a text, not 3"),
    "no question": (f'{GOOD}\n{{"messages": [{{"role": "assistant", "content": "A"}}]}}', "the user asks nothing in this row"),
    "no tools": (f'{GOOD}\n{{"prompt": "sort 2", "tools": [{{"name": "add"}}]}}',
                 "tools[0]: the chat template does not write the tool 'add'"),
    "too long": (f'{GOOD}\n{{"prompt": "{"A" * 100}"}}', "the prompt's 1"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_named_and_the_answers_of_before_are_kept(world, tmp_path, capfd, name):
    text, message = ROWS[name]
    (tmp_path / "prompts.jsonl").write_text(text)
    (tmp_path / "answers.json").write_text("of before")
    (line,) = refusal(capfd, world / "model", "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "answers.json")
    assert line.startswith(f"{tmp_path / 'prompts.jsonl'}:2: {message}")
    assert (tmp_path / "answers.json").read_text() == "of before" and len([*tmp_path.iterdir()]) == 2


def refusal(capfd, *argv) -> list[str]:
    """The lines of the error with which the script ends."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as error:
        run(*argv)
    out, text = capfd.readouterr()
    assert (error.value.code, out) == (1, "") and text.startswith("generate.py: ")
    return text.removeprefix("generate.py: ").splitlines()


FILES = ["--prompts", "{folder}/good.jsonl", "--out", "{folder}/answers.json"]
ERRORS = {
    "no model": ([], "FOLDER"),
    "nothing there": (["{folder}/none"], "{folder}/none: no tokenizer can be loaded"),
    "out missing": (["{model}", "--prompts", "{folder}/good.jsonl"], "--prompts and --out need each other"),
    "no such file": (["{model}", "--prompts", "{folder}/none.jsonl", "--out", "x"], "{folder}/none.jsonl: no such file"),
    "no rows": (["{model}", "--prompts", "{folder}/empty.jsonl", "--out", "x"], "{folder}/empty.jsonl: no rows in this file"),
    "nowhere to write": (["{model}", *FILES[:3], "{folder}/none/answers.json"], "there is no folder {folder}/none"),
    "a folder to write to": (["{model}", *FILES[:3], "{folder}/adapter"], "--out {folder}/adapter: this is a folder"),
    "no number": (["{model}", *FILES, "--seed", "x"], "argument --seed: invalid int value: 'x'"),
    "seed": (["{model}", *FILES, "--seed", str(2 ** 70)], "--seed must be from 0 to 2**63 - 1"),
    "seed below 0": (["{model}", *FILES, "--seed", "-1"], "--seed must be from 0 to 2**63 - 1"),
    "too many samples": (["{model}", *FILES, "--temperature", "1", "--n-samples", "9" * 30], "and at most a million"),
    "system": (["{model}", *FILES, "--system", "\udcff"], "--system must be UTF-8"),
    "samples of greedy": (["{model}", *FILES, "--n-samples", "2"], "need a --temperature above 0"),
    "no samples": (["{model}", *FILES, "--n-samples", "0"], "must be at least 1"),
    "no tokens": (["{model}", *FILES, "--max-new-tokens", "0"], "must be at least 1"),
    **{f"temperature {value}": (["{model}", *FILES, "--temperature", value], "--temperature must be 0, which is greedy, or from")
       for value in ("nan", "inf", "-1", "1e-300", "1e-4", "1e300")},
    "top-p": (["{model}", *FILES, "--temperature", "1", "--top-p", "1.5"], "--top-p must be above 0, and at most 1"),
    "misspelt": (["{model}", "--sytem", "A"], "unrecognized arguments: --sytem A"),
    "base of no adapter": (["{model}", *FILES, "--base", "{model}"], "{model}: this is no adapter"),
    "adapter without a base": (["{folder}", *FILES], "{folder}/adapter: adapter_config.json names no base_model_name_or_path"),
    "adapter of nothing": (["{folder}", *FILES, "--base", "{model}"], "{folder}/adapter: no adapter can be loaded"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line(world, tmp_path, capfd, name):
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    argv, message = ERRORS[name]
    (line,) = refusal(capfd, *(part.format(folder=tmp_path, model=world / "model") for part in argv))
    assert message.format(folder=tmp_path, model=world / "model") in line


def test_all_that_is_wrong_is_said_at_once(world, tmp_path, capfd):
    assert refusal(capfd, world / "model", "--prompts", "x", "--out", tmp_path, "--seed", "-1", "--top-p", "nan", "--n-samples",
                   "0") == [
        f"--out {tmp_path}: this is a folder",
        "--n-samples, --batch-size and --max-new-tokens must be at least 1, and at most a million",
        "--top-p must be above 0, and at most 1",
        "--top-p and --n-samples need a --temperature above 0: greedily there is one answer",
        "--seed must be from 0 to 2**63 - 1"]
    good, long = {"prompt": "sort 1"}, {"prompt": "A" * 200}
    for bad, said in (({"prompt": 5}, "prompt must be a text, not 5"), (long, "the prompt's 205 tokens and --max-new-tokens 24")):
        file = write_rows(tmp_path / "prompts.jsonl", [bad, good, *[bad] * 8])
        lines = refusal(capfd, world / "model", "--prompts", file, "--out", tmp_path / "out.json", "--max-new-tokens", LENGTH)
        assert len(lines) == 9 and lines[-1] == "and 1 more"
        assert all(line.startswith(f"{file}:{i}: {said}") for i, line in zip([1, *range(3, 10)], lines))


def test_what_lies_where_the_answers_go_is_kept(world, tmp_path, capfd):
    file, pipe = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "sort 1"}]), tmp_path / "pipe"
    os.mkfifo(pipe)
    for out, said in ((file, "these are the prompts"), (pipe, "this is a pipe or a device, which a file must not replace")):
        assert refusal(capfd, world / "model", "--prompts", file, "--out", out) == [f"--out {out}: {said}"]
    assert file.read_text() == json.dumps({"prompt": "sort 1"}) + "\n" and pipe.is_fifo()


def test_a_chat_without_an_input_is_refused(world, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it where it is closed
    (line,) = refusal(capfd, world / "model")
    assert line.startswith("the standard input is closed")


@pytest.mark.parametrize("config", ["[]", '{"model_type": "llama", "hidden_size": "x"}', '{"model_type": "nonsense"}', "{", "5"])
def test_a_model_that_is_none_is_one_line(world, tmp_path, capfd, config):
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(config)
    (line,) = refusal(capfd, tmp_path / "model", "--prompts", write_rows(tmp_path / "p.jsonl", [{"prompt": "A"}]), "--out",
                      tmp_path / "out.json")
    assert line.startswith((f"{tmp_path}/model: no tokenizer can be loaded: ", f"{tmp_path}/model: no causal language model"))


@slow
def test_an_error_s_exit_code_is_1_and_it_is_all_that_is_printed(world, tmp_path):
    done = chat(world / "none", tmp_path, b"")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"generate.py: {world}/none: no tokenizer can be loaded: ")


def test_help_needs_no_model():
    done = run_script(SCRIPT, "--help")
    assert done.returncode == 0 and "--max-new-tokens" in done.stdout and done.stderr == ""
