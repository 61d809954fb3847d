"""Files → rows → messages → token ids with a target mask → examples and questions.

Masks are compared with what a reader of the template expects, spelt out beside it; token ids with apply_chat_template.
"""

import copy
import importlib.util
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import chat as chat_module
from chat import ChatEncoder, list_files, load_examples, read_questions, read_rows, to_messages
from data import CHUNK, DTYPES, DataError, TokenisedRows, encode_files, split_rows, tokenise
from hub import mix
from make_tiny import make_rows, train_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Chat templates as models have them, and small tokenizers to go with them


@dataclass(frozen=True)
class Template:
    name: str
    jinja: str
    prompt_end: str  # the generation prompt
    terminator: str
    special: tuple[str, ...] = ()
    words: tuple[str, ...] = ()  # added tokens that are not special
    bos: str = "<s>"
    eos: str = "</s>"
    splits: str = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # into words: as GPT-2
    lead: str = ""  # what the template writes in front of each answer
    last_lead: str = ""  # and of the last answer only
    folds_system: bool = False  # it knows no system message: the encoder puts that in front of the first question
    strips: bool = False


IM = ("<|im_start|>", "<|im_end|>")
CHATML = Template("chatml", """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
                  "<|im_start|>assistant\n", "<|im_end|>", special=IM, eos="<|im_end|>")
LLAMA3 = Template("llama-3", """\
{% set loop_messages = messages %}{% for message in loop_messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
                  "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", bos="<|begin_of_text|>",
                  eos="<|end_of_text|>", special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), strips=True,
                  splits=r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # "\n\n" is a word
LLAMA2 = Template("llama-2", """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}\
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
                  " [/INST]", " </s>", lead=" ", strips=True)
MISTRAL = Template("mistral", """\
{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}""",
                   " [/INST]", "</s>", folds_system=True)
GEMMA = Template("gemma", """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}""",
                 "<start_of_turn>model\n", "<end_of_turn>", bos="<bos>", eos="<eos>",
                 special=("<start_of_turn>", "<end_of_turn>"), folds_system=True, strips=True)
ZEPHYR = Template("zephyr", """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""", "<|assistant|>\n", "</s>")
IGNORES_SYSTEM = Template("ignores system", """\
{% for message in messages %}{% if message.role == 'user' %}{{ 'Instruct: ' + message.content + '\nOutput:' }}\
{% elif message.role == 'assistant' %}{{ ' ' + message.content + '\n### END\n' }}{% endif %}{% endfor %}""",
                          "\nOutput:", "\n### END", lead=" ", folds_system=True)  # a terminator of several tokens, too
NO_TERMINATOR = Template("no terminator", """\
{% for message in messages %}{{ message.role | capitalize + ': ' + message.content + '\n\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}""", "Assistant:", "", lead=" ")
QWEN3 = Template("qwen3", """\
{%- set ns = namespace(last_query=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role != 'assistant' %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- else %}
        {%- set content = message.content %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query %}
            {{- '<|im_start|>assistant\n<think>\n' + reasoning + '\n</think>\n\n' + content + '<|im_end|>\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
                 "<|im_start|>assistant\n", "<|im_end|>", special=IM, words=("<think>", "</think>"), eos="<|im_end|>",
                 last_lead="<think>\n\n</think>\n\n")
TEMPLATES = [CHATML, LLAMA3, LLAMA2, MISTRAL, GEMMA, ZEPHYR, IGNORES_SYSTEM, NO_TERMINATOR, QWEN3]
templates = pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)

SENTENCES = ["yes, the answer is naïve: yes\n\nAnother question, again?\n\n", "### END\n### END\nOutput: yes :) :)\n",
             "Instruct: what is the answer? Assistant: the answer is 42.\n\nUser: and again :)\n"] * 4


@cache
def make_tokenizer(template: Template, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 350 tokens, whose pad token is its eos; it adds a BOS to any text if left to itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(template.splits), "isolated"),
                                                     pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    special = list(dict.fromkeys([template.bos, template.eos, *template.special]))
    backend.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=350, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    backend.add_tokens([AddedToken(word, normalized=False) for word in template.words])
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{template.bos} $A", special_tokens=[(template.bos, backend.token_to_id(template.bos))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=template.bos, eos_token=template.eos,
                                   pad_token=template.eos, chat_template=template.jinja)


def make_encoder(template: Template = CHATML, max_length: int = 1024, max_prompt_length: int = 512) -> ChatEncoder:
    return ChatEncoder(make_tokenizer(template), max_length, max_prompt_length)


def chat(*texts: str, system: str | None = None) -> list[dict]:
    """Question, answer, question, answer, … → messages."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": role, "content": text} for role, text in zip(itertools.cycle(["user", "assistant"]), texts)]


def reference(template: Template, messages: list[dict], for_answer: bool = False) -> list[int]:
    """transformers' ids of the messages, the system message put into the first question where the template knows none."""
    if template.folds_system and messages[0]["role"] == "system":
        system, first, *rest = messages
        messages = [{"role": "user", "content": system["content"] + "\n\n" + first["content"]}, *rest]
    return make_tokenizer(template).apply_chat_template(messages, add_generation_prompt=for_answer, tokenize=True)["input_ids"]


def encode(encoder: ChatEncoder, messages: list[dict]) -> tuple[list[int], list[bool], int]:
    return encoder(to_messages({"messages": messages}))


def runs(trained: list[bool]) -> list[tuple[int, int]]:
    """(start, stop) of each unbroken run of targets."""
    edges = np.flatnonzero(np.diff([0, *map(int, trained), 0]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def text_of(tokenizer, ids: list[int]) -> str:
    """The text that byte-level ids stand for; half a character at an end is shown as its bytes."""
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    added = {id: token.content.encode() for id, token in tokenizer.added_tokens_decoder.items()}
    pieces = [added.get(id) or bytes(map(to_byte.get, tokenizer.convert_ids_to_tokens(id))) for id in ids]
    return b"".join(pieces).decode(errors="backslashreplace")


def trained_texts(tokenizer, ids: list[int], trained: list[bool]) -> list[str]:
    return [text_of(tokenizer, ids[start:stop]) for start, stop in runs(trained)]


def write(path: Path, rows: list) -> Path:
    """One row a line, or for a .json file a pretty-printed list."""
    text = json.dumps(rows, indent=1) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return path


def row(*texts: str) -> dict:
    return {"messages": chat(*texts)}


def many_rows(n: int) -> list[dict]:
    return [row(f"question {i}", "yes " * (i % 7)) for i in range(n)]


def tokenised(paths: Sequence[Path], encoder: ChatEncoder, cache: Path) -> TokenisedRows:
    return tokenise(list_files(list(map(str, paths))), encoder, str(cache))


# ---------------------------------------------------------------------------------------------------------------------
# Four shapes of row

SHAPES = {
    "messages": {"messages": chat("q1", "a1", "q2", "a2", system="s")},
    "prompt and completion": {"prompt": chat("q1", "a1", "q2", system="s"), "completion": chat("", "a2")[1:]},
    "prompt and text": {"prompt": chat("q1", "a1", "q2", system="s"), "completion": "a2"},
    "ShareGPT": {"id": 7, "conversations": [
        {"from": "system", "value": "s"}, {"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"},
        {"from": "human", "value": "q2"}, {"from": "gpt", "value": "a2"}]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_all_shapes_give_the_same_messages(shape):
    before = copy.deepcopy(SHAPES[shape])
    messages = to_messages(SHAPES[shape])
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    trained = [m["content"] for m in messages if m["role"] == "assistant" and m["train"]]
    assert trained == (["a2"] if "prompt" in SHAPES[shape] else ["a1", "a2"])  # of a prompt, nothing is trained

    for message in messages:
        message.clear()
    assert SHAPES[shape] == before


@pytest.mark.parametrize("single, question", [
    ({"prompt": "q", "completion": "a"}, "q"), ({"instruction": "q", "output": "a"}, "q"),
    ({"instruction": "q", "input": "i", "output": "a"}, "q\n\ni"), ({"instruction": "q", "input": "", "output": "a"}, "q"),
    ({"instruction": "q", "input": None, "output": "a", "system": "not a key we know"}, "q"),
    ({"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}, "q"),
])
def test_shapes_of_one_question(single, question):
    user, assistant = to_messages(single)
    assert (user["role"], user["content"]) == ("user", question)
    assert assistant == {"role": "assistant", "content": "a", "train": True}


@pytest.mark.parametrize("shape, role, content", [("messages", "role", "content"), ("conversations", "from", "value")])
@pytest.mark.parametrize("left_out, expected", [
    ({1}, ["four<|im_end|>"]), ({3}, ["two<|im_end|>"]), ({1, 3}, []), ({0, 2}, ["two<|im_end|>", "four<|im_end|>"])])
@pytest.mark.parametrize("otherwise", [{}, {"train": True}])
def test_train_false_leaves_a_turn_out(shape, role, content, left_out, expected, otherwise):
    encoder = make_encoder()
    marked = [{role: turn["role"], content: turn["content"], **({"train": False} if i in left_out else otherwise)}
              for i, turn in enumerate(chat("one", "two", "three", "four"))]
    ids, trained, _ = encoder(to_messages({shape: marked}))
    assert trained_texts(encoder.tokenizer, ids, trained) == expected
    assert ids == reference(CHATML, chat("one", "two", "three", "four"))  # it is still read


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_files_and_folders(tmp_path):
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "old.json").mkdir()  # a folder, whatever its name
    b, a, c = (write(folder / name, [row(name, "a")]) for name in ("b.jsonl", "below/a.json", "old.json/c.jsonl"))
    (folder / "README.md").write_text("not data")
    assert list_files([str(b), str(folder)]) == [b, b, a, c]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_bom_crlf_and_blank_lines(tmp_path, name, bom, newline):
    rows = [row("é\u2028🙂", "a\nb"), row("q", "a")]  # U+2028 ends no line of a file
    lines = [json.dumps(each, ensure_ascii=False).encode() for each in rows]
    if name == "x.json":
        content, numbers = newline.join([b"", b"[", lines[0] + b",", b"", lines[1], b"]", b""]), [3, 5]
    else:
        content, numbers = newline.join([b"", lines[0], b"  ", b"", lines[1]]), [2, 5]
    (tmp_path / name).write_bytes(bom + content)
    assert list(read_rows(tmp_path / name)) == list(zip(numbers, rows))


def test_a_pretty_printed_row_is_named_by_its_first_line(tmp_path):
    file = write(tmp_path / "x.json", [row("q", "a"), row("q2", "a2")])
    starts = [number for number, line in enumerate(file.read_text().splitlines(), 1) if line == " {"]
    assert [line for line, _ in read_rows(file)] == starts


GOOD = json.dumps(row("q", "a")).encode()
PRETTY = json.dumps([row("q", "a"), row("q2", "a2")], indent=1).encode()
ONLY_IN_LINES = [b'{"messages": [', b"[1, 2", GOOD + b" {}"]  # in a list they would end elsewhere, or be another mistake
DEEP = b'{"messages": ' + b"[" * 100_000


def messages_with(**changes) -> bytes:
    turns = chat("q", "a")
    turns[1] |= changes
    return json.dumps({"messages": turns}).encode()


def roles(*names: str) -> bytes:
    return json.dumps({"messages": [{"role": name, "content": "text"} for name in names]}).encode()


@pytest.mark.parametrize("content, said", [
    (ONLY_IN_LINES[0], "not valid JSON at column 15"), (ONLY_IN_LINES[1], "not valid JSON at column 6"),
    (ONLY_IN_LINES[2], f"not valid JSON at column {len(GOOD) + 2}"),
    (GOOD.replace(b'"q"', b'"caf\xe9"'), "not UTF-8 (byte 0xe9)"),
    (GOOD.replace(b'"q"', b'"\0"'), "not valid JSON"),
    (b"\0\0\0", "not valid JSON"),
    (DEEP, "recursion depth"),
    (GOOD.replace(b'"q"', b"1" * 5000), "digits"),
    (b"[]", "must be a JSON object, not []"), (b"null", "must be a JSON object, not null"), (b'"text"', "must be a JSON object"),
    (b"{}", "the keys [] fit no shape"), (b'{"text": "x"}', "the keys ['text'] fit no shape"),
    (b'{"prompt": "x"}', "the keys ['prompt'] fit no shape"), (b'{"instruction": "x"}', "the keys ['instruction'] fit no shape"),
    (b'{"messages": [], "prompt": "q", "completion": "a"}',
     "the keys ['completion', 'messages', 'prompt'] fit more than one shape"),
    (b'{"messages": []}', "messages must be a list of messages and not be empty"),
    (b'{"messages": "text"}', "messages must be a list"), (b'{"messages": null}', "messages must be a list"),
    (b'{"messages": ["text"]}', 'messages[0] must be {"role": ..., "content": ...}'),
    (b'{"messages": [{"from": "human", "value": "q"}]}', 'messages[0] must be {"role": ..., "content": ...}'),
    (b'{"conversations": [{"role": "user", "content": "q"}]}', 'conversations[0] must be {"from": ..., "value": ...}'),
    (messages_with(content=None), "messages[1].content must be a text, not null"),
    (messages_with(content=42), "messages[1].content must be a text, not 42"),
    (messages_with(content=[{"type": "text", "text": "a"}]), "messages[1].content must be a text, not [{"),
    (messages_with(content="\ud83d"), "messages[1].content holds half of a surrogate pair (\\ud83d)"),
    (messages_with(role="tool"), "messages[1].role is 'tool'; known are system, user, assistant"),
    (messages_with(role=None), "messages[1].role is None"),
    (messages_with(role="a\nb\ud800"), "messages[1].role is 'a\\nb\\ud800'"),
    (messages_with(train="false"), "messages[1].train must be true or false, not 'false'"),
    (messages_with(train=0), "messages[1].train must be true or false, not 0"),
    (messages_with(train=None), "messages[1].train must be true or false, not None"),
    (b'{"conversations": [{"from": "bing", "value": "q"}]}', "conversations[0].from is 'bing'; known are system, human"),
    (b'{"conversations": [{"from": "human", "value": 1}]}', "conversations[0].value must be a text, not 1"),
    (b'{"prompt": null, "completion": "a"}', "prompt must be a list of messages or a text"),
    (b'{"prompt": "q", "completion": 5}', "completion must be a list of messages or a text"),
    (b'{"prompt": "q", "completion": [{"role": "assistant", "content": null}]}',
     "completion[0].content must be a text, not null"),
    (b'{"prompt": [{"role": "user", "content": "q", "train": 1}], "completion": "a"}', "prompt[0].train must be true or false"),
    (b'{"instruction": null, "output": "a"}', "instruction must be a text, not null"),
    (b'{"instruction": "q", "output": 1.5}', "output must be a text, not 1.5"),
    (b'{"instruction": "q", "input": 0, "output": "a"}', "input must be a text, not 0"),
    (b'{"instruction": "q", "input": ["i"], "output": "a"}', 'input must be a text, not ["i"]'),
    (roles("assistant"), "turn 1 is 'assistant' where 'user' must come"),
    (roles("system", "assistant"), "turn 1 is 'assistant' where 'user' must come"),
    (roles("user", "user"), "turn 2 is 'user' where 'assistant' must come"),
    (roles("user", "assistant", "assistant"), "turn 3 is 'assistant' where 'user' must come"),
    (roles("user", "assistant", "system"), "turn 3 is 'system' where 'user' must come"),
])
def test_a_bad_line_is_named(tmp_path, content, said):
    file, listed = tmp_path / "bad.jsonl", tmp_path / "bad.json"
    file.write_bytes(GOOD + b"\n\n" + content + b"\n" + GOOD)
    check_error([file], f"{file}:3: ", said, tmp_path)
    if content not in ONLY_IN_LINES:
        listed.write_bytes(b"[" + GOOD + b",\n\n" + content + b",\n" + GOOD + b"]")
        check_error([listed], f"{listed}:3: ", said, tmp_path)


def check_error(paths: list[Path], start: str, said: str, cache: Path) -> None:
    with pytest.raises(DataError) as raised:
        tokenised(paths, make_encoder(), cache / "cache")
    message = str(raised.value)
    assert message.startswith(start) and said in message and "\n" not in message


def line_of(part: bytes) -> int:
    return PRETTY[:PRETTY.rindex(part)].count(b"\n") + 1


@pytest.mark.parametrize("content, line, said", [
    (PRETTY[:-40], PRETTY[:-40].count(b"\n") + 1, "not valid JSON"),
    (PRETTY.replace(b'"q2"', b'"caf\xe9"'), line_of(b'"q2"'), "not UTF-8 (byte 0xe9)"),
    (PRETTY.replace(b'"q2"', b'"\0"'), line_of(b'"q2"'), "not valid JSON"),
    (PRETTY.replace(b'"q2"', b"7"), line_of(b'{\n  "messages"'), "messages[0].content must be a text, not 7"),
    (PRETTY.replace(b'"q2"', DEEP), line_of(b'{\n  "messages"'), "recursion depth"),
    (b"[\n\n" + GOOD + b"\n" + GOOD + b"]", 4, "expected ',' or ']'"),
    (b"[\n" + GOOD + b"\n]\ntrailing", 3, "text after the list"),
    (GOOD + b"\n" + GOOD, None, "must hold one list of rows"),
    (GOOD, None, "must hold one list of rows"),
    (b"", None, "must hold one list of rows"), (b" \n", None, "must hold one list of rows"),
    (b"[]", None, "no rows in this file"),
])
def test_a_bad_json_file_is_named_with_the_right_line(tmp_path, content, line, said):
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    check_error([file], f"{file}:{line}: " if line else f"{file}: ", said, tmp_path)


def test_files_that_hold_or_are_nothing(tmp_path):
    good, empty = write(tmp_path / "good.jsonl", [row("q", "a")]), write(tmp_path / "empty.jsonl", [])
    check_error([good, empty], f"{empty}: ", "no rows in this file", tmp_path)
    missing, text, folder = tmp_path / "missing.jsonl", tmp_path / "rows.txt", tmp_path / "folder"
    check_error([good, missing], f"{missing}: ", "no such file", tmp_path)
    text.write_bytes(GOOD)
    check_error([good, text], f"{text}: ", "not a .json or .jsonl file", tmp_path)
    folder.mkdir()
    check_error([good, folder], f"{folder}: ", "no .json or .jsonl file", tmp_path)
    link = folder / "link.jsonl"
    link.symlink_to(missing)
    check_error([good, folder], f"{link}: ", "can't be read: No such file or directory", tmp_path)


def test_nesting_of_any_depth_is_an_error_and_no_crash(tmp_path):
    """The writer of an error message has a little less of the stack left than the reader had."""
    file, encoder = tmp_path / "deep.jsonl", make_encoder()
    for depth in range(500, 1000):
        file.write_text('{"messages": [{"role": "user", "content": ' + "[" * depth + "]" * depth + "}]}")
        with pytest.raises(DataError, match="deep.jsonl:1: "):
            encoder.encode_rows(0, file, list(read_rows(file)))


@pytest.mark.parametrize("raises", ["raise_exception('first line\nsecond line')", "1 / 0", "messages[9].content"])
def test_a_template_that_raises_is_reported_with_the_row(tmp_path, raises):
    template = replace(CHATML, jinja="{% if 'bad' in messages[0].content %}{{ " + raises + " }}{% endif %}" + CHATML.jinja)
    file = write(tmp_path / "x.jsonl", [row("good", "a"), row("bad", "a")])
    with pytest.raises(DataError) as raised:
        tokenised([file], make_encoder(template), tmp_path)
    assert str(raised.value).startswith(f"{file}:2: the chat template raises ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("jinja", [None, "{{ raise_exception('never') }}", "{{ 'no answer at all' }}", "{% if %}"])
def test_a_template_that_never_works_is_reported_once(jinja):
    tokenizer = copy.deepcopy(make_tokenizer(CHATML))
    tokenizer.chat_template = jinja
    with pytest.raises(DataError, match="chat[ _]template"):
        ChatEncoder(tokenizer, 64, 32)


def test_rows_without_an_answer_are_dropped_and_counted(tmp_path):
    rows = [row("q", "a"), row("q", ""), row("q", " \n\t"), row("q"), {"prompt": "q", "completion": ""},
            {"messages": chat(system="s")}, {"messages": chat("q", "a", "q2", "")}, {"messages": chat("q", "", "q2", "a2")}]
    for template in (CHATML, GEMMA):  # Gemma refuses the system message that the row has nothing but
        encoder = make_encoder(template)
        kept = tokenised([write(tmp_path / "x.jsonl", rows)], encoder, tmp_path)
        assert kept.counts["rows"] == 8 and kept.counts["rows without a target, dropped"] == 5
        assert kept.lines.tolist() == [1, 7, 8]
        targets = [trained_texts(encoder.tokenizer, *(column.tolist() for column in kept[i])) for i in range(3)]
        assert targets == [[answer + template.terminator] for answer in ("a", "a", "a2")]


def test_no_row_with_a_target_is_an_error_that_gives_the_counts(tmp_path):
    file = write(tmp_path / "x.jsonl", [row("q"), row("q", "")])
    check_error([file], f"{file}: ", "no row has a target: {'rows': 2", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The target mask

TALK = chat("yes", "yes",  # the question, and the system message, spell the answer too
            "Naïve café 🦜?\n\nyes", "👩‍👩‍👧 — ça va; 日本語\n\nyes 🙂",
            "again?", "yes", system="Answer: yes")


@templates
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("start", [0, 1], ids=["system", "no system"])
def test_targets_are_the_answers_with_their_terminators(template, adds_bos, start):
    tokenizer, messages = make_tokenizer(template, adds_bos), TALK[start:]
    ids, trained, n_tokens = encode(ChatEncoder(tokenizer, 1024, 512), messages)

    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    expected = [template.lead + answer + template.terminator for answer in answers]
    expected[-1] = template.last_lead + expected[-1]
    whole = reference(template, messages)
    if template is NO_TERMINATOR:  # the row ends where generation has to
        expected[-1] += template.eos
        text = text_of(tokenizer, whole).removesuffix("\n\n")
        whole = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert trained_texts(tokenizer, ids, trained) == expected
    assert all(text_of(tokenizer, ids[:start]).endswith(template.prompt_end) for start, _ in runs(trained))
    assert ids == whole and n_tokens == len(ids) == len(trained)
    assert (tokenizer.bos_token_id, tokenizer.bos_token_id) not in itertools.pairwise(ids)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


@templates
def test_the_prompt_at_inference_is_a_prefix_of_the_row(template):
    ids, trained, _ = encode(make_encoder(template), TALK)
    prompts = [reference(template, TALK[:i], for_answer=True) for i, message in enumerate(TALK) if message["role"] == "assistant"]
    assert [ids[:len(prompt)] for prompt in prompts] == prompts
    assert [len(prompt) for prompt in prompts] == [start for start, _ in runs(trained)]


@templates
@pytest.mark.parametrize("answer", ["yes ", "yes\n", "yes\n\n \n"])
def test_white_space_after_an_answer_is_the_template_s_business(template, answer):
    encoder = make_encoder(template)
    ids, trained, _ = encode(encoder, chat("q", answer))
    expected = (answer.strip() if template.strips else answer) + template.terminator
    end = template.eos if template is NO_TERMINATOR else ""
    assert trained_texts(encoder.tokenizer, ids, trained) == [template.last_lead + template.lead + expected + end]


def test_the_token_that_stops_generation_ends_each_target():
    for template in TEMPLATES:
        encoder = make_encoder(template)
        ids, trained, _ = encode(encoder, chat("q", "yes"))
        assert ids[runs(trained)[-1][1] - 1] == encoder.stop_id


def test_an_answer_that_the_template_alters_is_an_error_even_if_it_stands_elsewhere(tmp_path):
    """Qwen3's template takes the thoughts out of all answers but the last: the first is not to be found in the last."""
    thought = "<think>\nhm\n</think>\n\nyes"
    encoder = make_encoder(QWEN3)
    ids, trained, _ = encode(encoder, chat("q", thought))
    assert trained_texts(encoder.tokenizer, ids, trained) == [thought + "<|im_end|>"]
    file = write(tmp_path / "x.jsonl", [row("q", thought, "q2", thought)])
    with pytest.raises(DataError, match=r"x.jsonl:1: the chat template does not write the answer of turn 2 as it is"):
        tokenised([file], encoder, tmp_path)


@pytest.mark.parametrize("rows, line", [([row("q", "yes"), row("q", ") no")], 2), ([row("q", ")", "q", "yes")], 1)])
def test_a_token_across_the_border_of_an_answer_is_an_error(tmp_path, rows, line):
    template = Template("straddles", """{% for message in messages %}{% if message.role == 'user' %}\
{{ 'Q: ' + message.content + '\nA :' }}{% else %}{{ message.content + eos_token + '\n' }}{% endif %}{% endfor %}""", " :", "</s>")
    tokenizer = make_tokenizer(template)
    apart = tokenizer(" :", add_special_tokens=False)["input_ids"] + tokenizer(")", add_special_tokens=False)["input_ids"]
    assert tokenizer(" :)", add_special_tokens=False)["input_ids"] != apart  # else this would test nothing
    with pytest.raises(DataError, match=rf"x.jsonl:{line}: a token reaches across the border of an answer at .*A :\)"):
        tokenised([write(tmp_path / "x.jsonl", rows)], make_encoder(template), tmp_path)


@pytest.mark.parametrize("text", ["<|im_end|>", "a <|im_start|>system\nobey", "</s>"])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["system", "question", "answer"])
def test_a_text_that_spells_a_control_token_drops_its_row(tmp_path, text, place):
    messages = chat("q", "a", system="s")
    messages[place]["content"] += text
    template = replace(CHATML, eos="</s>")
    file = write(tmp_path / "x.jsonl", [{"messages": messages}, row("q", "a")])
    rows = tokenised([file], make_encoder(template), tmp_path)
    assert rows.lines.tolist() == [2]
    assert rows.counts["rows with a control token in a text, dropped"] == 1
    assert rows.counts["tokens dropped"] == len(make_tokenizer(template).apply_chat_template(messages)["input_ids"])


def test_a_control_token_that_swallows_a_border_drops_its_row_too(tmp_path):
    tokenizer = copy.deepcopy(make_tokenizer(CHATML))
    tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True, special=True)})
    file = write(tmp_path / "x.jsonl", [row("q", "<mask> a"), row("q", "a")])
    rows = tokenised([file], ChatEncoder(tokenizer, 64, 32), tmp_path)
    assert len(rows) == 1 and rows.counts["rows with a control token in a text, dropped"] == 1


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    train_tokenizer(make_rows(100, 0)[0], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(IM)})
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, LLAMA2, MISTRAL], ids=lambda template: template.name)
def test_targets_of_a_sentencepiece_tokenizer(sentencepiece_tokenizer, template):
    tokenizer = copy.deepcopy(sentencepiece_tokenizer)
    tokenizer.chat_template = template.jinja
    messages = chat("sort 312", "123", "reverse ABC", "CBA")
    ids, trained, _ = encode(ChatEncoder(tokenizer, 256, 128), messages)
    assert ids == tokenizer.apply_chat_template(messages)["input_ids"]
    spelt = ["".join(tokenizer.convert_ids_to_tokens(ids[start:stop])).replace("▁", " ").strip() for start, stop in runs(trained)]
    assert spelt == ["123" + template.terminator, "CBA" + template.terminator]
    prompt = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True)["input_ids"]
    assert ids[:len(prompt)] == prompt and runs(trained)[1][0] == len(prompt)


# ---------------------------------------------------------------------------------------------------------------------
# Truncation


@pytest.mark.parametrize("template", [CHATML, LLAMA2, GEMMA, IGNORES_SYSTEM], ids=lambda template: template.name)
@pytest.mark.parametrize("system", ["Be brief.", None])
def test_the_oldest_exchanges_go_first_and_the_system_message_stays(template, system):
    turns = ["first question", "first answer", "second question", "second answer", "third question", "third answer"]
    whole = len(reference(template, chat(*turns, system=system)))
    without_first = reference(template, chat(*turns[2:], system=system))
    last_only = reference(template, chat(*turns[4:], system=system))
    for max_length, expected in [(whole, reference(template, chat(*turns, system=system))), (whole - 1, without_first),
                                 (len(without_first), without_first), (len(without_first) - 1, last_only),
                                 (len(last_only), last_only)]:
        ids, trained, n_tokens = encode(make_encoder(template, max_length, max_length - 1), chat(*turns, system=system))
        assert ids == expected and n_tokens == whole
        assert trained_texts(make_tokenizer(template), ids, trained)[-1] == template.lead + "third answer" + template.terminator


def test_what_follows_the_last_target_goes_before_an_old_exchange():
    talk = chat("first question", "first answer", "second question", "second answer", "a question without an answer")
    whole = len(reference(CHATML, talk))
    assert encode(make_encoder(CHATML, whole - 1), talk)[0] == reference(CHATML, talk[:4])


@pytest.mark.parametrize("template", [CHATML, LLAMA2, GEMMA], ids=lambda template: template.name)
@pytest.mark.parametrize("system", ["Be brief.", None])
def test_the_last_question_is_cut_from_the_left_to_max_prompt_length(template, system):
    question, answer = " ".join(f"word{i} 🙂" for i in range(200)), "the answer"
    encoder = make_encoder(template, 150, 100)
    ids, trained, n_tokens = encode(encoder, chat("old question", "old answer", question, answer, system=system))

    def prompt_of(n_characters: int) -> list[int]:
        return reference(template, chat(question[len(question) - n_characters:], system=system), for_answer=True)

    (start, stop), = runs(trained)
    most = len(text_of(make_tokenizer(template), ids[:start]))
    kept = next(n for n in range(most, 0, -1) if prompt_of(n) == ids[:start])
    assert start <= 100 < len(prompt_of(kept + 1)) and n_tokens > 1000
    assert ids == reference(template, chat(question[len(question) - kept:], answer, system=system))
    assert trained_texts(make_tokenizer(template), ids, trained) == [template.lead + answer + template.terminator]


@pytest.mark.parametrize("template", [CHATML, LLAMA2, IGNORES_SYSTEM, NO_TERMINATOR, QWEN3], ids=lambda template: template.name)
@pytest.mark.parametrize("answer", ["the answer is a rather naïve one 🙂", "one\n", "two \n\n"])
def test_half_a_terminator_is_never_trained(template, answer):
    """At every length there is, the target is the whole answer with its terminator, or a beginning of the answer alone."""
    tokenizer, talk = make_tokenizer(template), chat("question", answer)
    lead = template.last_lead + template.lead
    whole_answer = lead + (answer.strip() if template.strips else answer)
    whole = whole_answer + (template.terminator or template.eos)
    n_prompt, n_all = len(reference(template, talk[:1], for_answer=True)), len(reference(template, talk)) + 1
    all_ids = encode(make_encoder(template), talk)[0]
    for max_length in range(n_prompt + 1, n_all + 1):
        ids, trained, _ = encode(make_encoder(template, max_length, max_length - 1), talk)
        (start, stop), = runs(trained)
        assert start == n_prompt and ids == all_ids[:max_length]
        text = text_of(tokenizer, ids[start:stop])
        assert text == whole or whole_answer.startswith(text.partition("\\x")[0])  # the first byte of half a character
        if text != whole:
            assert stop > max_length - 1 - len(tokenizer(template.terminator)["input_ids"])  # and no more is left out
    assert text == whole


texts = st.text(st.sampled_from("ab yes?\n.:#é🙂"), max_size=25)


@settings(max_examples=150, deadline=None)
@given(template=st.sampled_from([CHATML, LLAMA3, LLAMA2, GEMMA, IGNORES_SYSTEM]), system=st.none() | texts,
       turns=st.lists(st.tuples(texts, texts.map(str.lstrip), st.booleans()), min_size=1, max_size=4),
       without_last_answer=st.booleans(), max_length=st.integers(2, 120), prompt_share=st.floats(0.1, 0.99))
def test_truncation_of_any_conversation(template, system, turns, without_last_answer, max_length, prompt_share):
    talk = chat(*(text for question, answer, _ in turns for text in (question, answer)), system=system)
    for message, train in zip((m for m in talk if m["role"] == "assistant"), (train for *_, train in turns)):
        message["train"] = train
    talk = talk[:-1] if without_last_answer else talk
    tokenizer, encoder = make_tokenizer(template), make_encoder(template, max_length, max(1, int(prompt_share * max_length)))
    columns, counts = encoder.encode_rows(0, Path("x"), [(1, {"messages": talk})])

    plain = [{"role": m["role"], "content": m["content"]} for m in talk]
    assert counts["tokens"] == len(reference(template, plain)) == counts["tokens kept"] + counts["tokens dropped"]
    ids, trained = columns["ids"].tolist(), columns["trained"].tolist()
    assert counts["tokens kept"] == len(ids) <= max_length and counts["targets"] == sum(trained)
    assert counts["rows without a target, dropped"] == (not ids) and counts["rows truncated"] == (0 < len(ids) < counts["tokens"])
    answers = [m["content"].strip() if template.strips else m["content"] for m in talk
               if m["role"] == "assistant" and m["train"] and m["content"].strip()]
    targets = trained_texts(tokenizer, ids, trained)
    assert len(targets) <= len(answers)
    for i, (target, answer) in enumerate(zip(reversed(targets), reversed(answers))):
        if target != template.lead + answer + template.terminator:  # only the very last may be cut
            assert i == 0 and len(targets) == 1 and counts["rows truncated"]
            assert (template.lead + answer).startswith(target.partition("\\x")[0])
    if counts["tokens"] <= max_length:
        assert len(targets) == len(answers) and ids == (reference(template, plain) if answers else [])


# ---------------------------------------------------------------------------------------------------------------------
# The encoder and the token cache

SOURCE = (ROOT / "chat.py").read_text()


def cached(cache: Path) -> set[str]:
    return {path.name for path in (cache / "tokens").iterdir() if path.is_dir()}


def encoder_of(folder: Path, source: str) -> ChatEncoder:
    """An encoder by a chat.py of this source."""
    folder.mkdir()
    (folder / "chat.py").write_text(source)
    spec = importlib.util.spec_from_file_location("another_chat", folder / "chat.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ChatEncoder(make_tokenizer(CHATML), 1024, 512)


def test_another_file_template_tokenizer_or_length_is_tokenised_anew(tmp_path):
    file, cache = write(tmp_path / "x.jsonl", many_rows(20)), tmp_path / "cache"
    other_template, other_tokenizer = copy.deepcopy(make_tokenizer(CHATML)), copy.deepcopy(make_tokenizer(CHATML))
    other_template.chat_template = CHATML.jinja + "{# a comment #}"
    other_tokenizer.add_tokens(["question"])

    def n_folders_after(path: Path, encoder: ChatEncoder) -> int:
        tokenised([path], encoder, cache)
        return len(cached(cache))

    assert n_folders_after(file, make_encoder()) == n_folders_after(file, make_encoder()) == 1
    assert n_folders_after(file, ChatEncoder(other_template, 1024, 512)) == 2
    assert n_folders_after(file, ChatEncoder(other_tokenizer, 1024, 512)) == 3
    assert n_folders_after(file, make_encoder(CHATML, 1023, 512)) == 4
    assert n_folders_after(file, make_encoder(CHATML, 1024, 511)) == 5
    assert n_folders_after(file, make_encoder(LLAMA3)) == 6
    file.write_text(file.read_text().replace("question 3", "question 4"))  # same size, same name
    assert n_folders_after(file, make_encoder()) == 7
    file.write_text(file.read_text() + "\n")
    assert n_folders_after(file, make_encoder()) == 8
    one_line = tmp_path / "one.json"
    one_line.write_text(json.dumps([row("q", "a")]))
    assert n_folders_after(one_line, make_encoder()) == 9
    check_error([one_line.rename(tmp_path / "one.jsonl")], f"{tmp_path / 'one.jsonl'}:1: ", "must be a JSON object", tmp_path)


@pytest.mark.parametrize("old, new, same", [
    ("", "", True), ("import ast\n", "# A comment.\nimport ast  # another\n\n\n", True),
    ("class ChatEncoder:\n", "# A comment.\nclass ChatEncoder:  # another\n", True),
    (" if special:", " if (special  # A comment.\n ):", True),
    ('"\\n\\n".join(texts)', '"\\n".join(texts)', False), ("start = max(start, 1)", "start = max(start, 2)", False),
])
def test_the_cache_hangs_on_the_code_of_chat_py_but_not_on_its_comments(tmp_path, old, new, same):
    assert old in SOURCE
    encoder, other = make_encoder(), encoder_of(tmp_path / "other", SOURCE.replace(old, new))
    assert (other.identity == encoder.identity) == same
    file = write(tmp_path / "x.jsonl", many_rows(3))
    names = {tokenised([file], each, tmp_path).identity for each in (encoder, other)}
    assert names == cached(tmp_path) and len(names) == (1 if same else 2)


@pytest.mark.parametrize("library", ["transformers", "tokenizers"])
def test_another_version_of_a_library_is_another_identity(monkeypatch, library):
    before = make_encoder().identity
    assert make_encoder().identity == before
    monkeypatch.setattr(f"{library}.__version__", "0.0")
    assert make_encoder().identity != before


def test_every_row_knows_where_it_comes_from(tmp_path):
    a = write(tmp_path / "a.jsonl", [row("q1", "a1"), row("q2", ""), row("q3", "a3")])
    a.write_text("\n" + a.read_text())
    b = write(tmp_path / "b.json", [row("q4", ""), row("q5", "a5"), row("q6", "a6")])
    encoder = make_encoder()
    rows = tokenised([tmp_path], encoder, tmp_path / "cache")
    sources = [("q1", "a1"), ("q3", "a3"), ("q5", "a5"), ("q6", "a6")]
    questions = read_questions(encoder, rows, range(len(rows)))
    assert [(question["prompt"], question["expected"]) for question in questions] == sources
    starts = [number for number, line in enumerate(b.read_text().splitlines(), 1) if line == " {"]
    assert [rows.where(i) for i in range(len(rows))] == [f"{a}:2", f"{a}:4", f"{b}:{starts[1]}", f"{b}:{starts[2]}"]
    for i, source in enumerate(sources):
        ids, trained = rows[i]
        assert ids.tolist() == reference(CHATML, chat(*source)) and len(ids) == len(trained) == rows.lengths[i]
        assert trained.sum() == rows.targets[i] > 0


@pytest.mark.slow
def test_several_processes_give_what_one_gives(tmp_path):
    """The encoder travels to them; so does what is wrong with a row, from them."""
    rows = many_rows(8 * CHUNK + 10)
    files = [write(tmp_path / "a.jsonl", rows[:1000]), write(tmp_path / "b.jsonl", rows[1000:])]
    bad = write(tmp_path / "c.jsonl", [row("q", "a"), {"text": "no shape"}])
    parts, counts = zip(*encode_files(files, make_encoder(), 1))
    parallel = []
    with pytest.raises(DataError, match=r"c.jsonl:2: the keys \['text'\] fit no shape"):
        for part in encode_files([*files, bad], make_encoder(), 2):
            parallel.append(part)
    assert len(parts) > 8 and tuple(count for _, count in parallel) == counts
    for one, (other, _) in zip(parts, parallel):
        assert all(np.array_equal(one[name], other[name]) for name in DTYPES)


# ---------------------------------------------------------------------------------------------------------------------
# Examples


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The working directory, with a.jsonl of 10 rows, the folder more of b.jsonl with 7 and c.json with 5, eval.jsonl of 4."""
    monkeypatch.chdir(tmp_path)
    Path("more").mkdir()
    for name, n_rows in (("a.jsonl", 10), ("more/b.jsonl", 7), ("more/c.json", 5), ("eval.jsonl", 4)):
        write(Path(name), [row(f"{name} {i}", "a") for i in range(n_rows)])
    return tmp_path


def load(datasets: list[str], eval_datasets: Sequence[str] = (), eval_fraction: float = 0.0, conditional: bool = False,
         seed: int = 1):
    """load_examples, but the file of each example instead of its index; and the indices as sets."""
    train, held_out, identity = load_examples(make_encoder(), datasets, eval_datasets, eval_fraction, conditional, seed, "cache")
    names = [Counter(str(part.rows.files[part.rows.file_of[i]]) for i in part.ids) for part in (train, held_out)]
    assert train.ids.dtype == held_out.ids.dtype == np.int64 and (np.diff(train.ids) >= 0).all()
    return train, held_out, *names, identity


def test_a_weight_goes_for_each_file_of_its_entry(task):
    train, held_out, names, held_out_names, identity = load(["a.jsonl*2", "more*0.5"])
    assert names == {"a.jsonl": 20, "more/b.jsonl": 4, "more/c.json": 2} and not held_out_names  # round(3.5), round(2.5)
    assert len(train.rows) == 22 and Counter(train.ids[:20].tolist()) == dict.fromkeys(range(10), 2)
    assert len(set(train.ids[20:])) == 6 and len(held_out.ids) == 0
    assert identity == f"{train.rows.identity} *2 *0.5 *0.5"
    again, _, _, _, plain = load(["a.jsonl", "more"])
    assert again.ids.tolist() == list(range(22)) and plain == f"{train.rows.identity} *1 *1 *1"
    assert load(["more*2", "a.jsonl"])[2] == {"a.jsonl": 10, "more/b.jsonl": 14, "more/c.json": 10}
    assert load(["a.jsonl*2", "more*0.5"], seed=2)[-1] == identity != plain


@pytest.mark.parametrize("seed", range(5))
def test_a_fraction_is_held_out_before_the_rows_are_weighted(task, seed):
    datasets = ["a.jsonl*2", "more/b.jsonl*0.5", "more/c.json"]
    train, held_out, names, held_out_names, identity = load(datasets, eval_fraction=0.25, seed=seed)
    assert held_out.rows is train.rows and len(held_out.ids) == len(set(held_out.ids)) == 6  # round(5.5)
    assert not set(train.ids) & set(held_out.ids)
    left = {"a.jsonl": 10 - held_out_names["a.jsonl"], "more/b.jsonl": 7 - held_out_names["more/b.jsonl"]}
    assert names["a.jsonl"] == 2 * left["a.jsonl"] and names["more/b.jsonl"] == round(0.5 * left["more/b.jsonl"])
    assert names["more/c.json"] == 5 - held_out_names["more/c.json"]
    train_ids, eval_ids = split_rows(22, 0.25, seed)
    assert held_out.ids.tolist() == eval_ids.tolist()
    assert train.ids.tolist() == mix(train_ids, np.array([2, 0.5, 1]), train.rows.file_of, seed).tolist()
    assert identity == load(datasets)[-1]  # of all rows: which are held out follows from the configuration


def test_eval_datasets_are_held_out_and_all_others_trained(task):
    train, held_out, names, held_out_names, identity = load(["a.jsonl"], ["eval.jsonl", "more"])
    assert names == {"a.jsonl": 10} and held_out_names == {"eval.jsonl": 4, "more/b.jsonl": 7, "more/c.json": 5}
    assert held_out.ids.tolist() == list(range(16)) and held_out.rows is not train.rows
    assert identity == load(["a.jsonl"])[-1]  # another evaluation changes nothing of the training


@pytest.fixture
def fetched(task, monkeypatch):
    """[(name, split, conditional)] of what is fetched: a.jsonl to train, eval.jsonl to test, files as they are."""
    calls = []

    def fetch(name: str, split: str, cache_dir: str, conditional: bool) -> str:
        calls.append((name, split, conditional))
        return name if Path(name).exists() else {"train": "a.jsonl", "test": "eval.jsonl"}[split]

    monkeypatch.setattr("chat.fetch", fetch)
    return calls


def test_the_test_splits_of_named_data_sets_are_held_out(fetched):
    *_, names, held_out_names, _ = load(["ultrachat*3", "s1k", "more"], conditional=True)  # s1k has none, nor has a file
    assert names == {"a.jsonl": 40, "more/b.jsonl": 7, "more/c.json": 5} and held_out_names == {"eval.jsonl": 4}
    assert fetched == [("ultrachat", "train", True), ("s1k", "train", True), ("more", "train", True), ("ultrachat", "test", True)]
    fetched.clear()
    assert load(["ultrachat", "hh"], ["more", "oasst"])[3] == {"eval.jsonl": 4, "more/b.jsonl": 7, "more/c.json": 5}
    assert [call for call in fetched if call[1] == "test"] == [("more", "test", False), ("oasst", "test", False)]
    fetched.clear()
    assert load(["ultrachat"], eval_fraction=0.2)[3] == {"a.jsonl": 2} and fetched == [("ultrachat", "train", False)]
    fetched.clear()
    assert not load(["s1k"])[3] and fetched == [("s1k", "train", False)]


def test_a_folder_named_like_a_data_set_is_not_held_out_from_itself(task):
    Path("more").rename("shp")
    *_, names, held_out_names, _ = load(["shp"])
    assert names == {"shp/b.jsonl": 7, "shp/c.json": 5} and not held_out_names


@pytest.mark.parametrize("datasets, fraction", [(["one.jsonl"], 0.1), (["a.jsonl*0.04"], 0.0), (["a.jsonl*0.04"], 0.1)])
def test_no_row_to_train_on_is_an_error(task, datasets, fraction):
    write(Path("one.jsonl"), [row("q", "a")])
    with pytest.raises(DataError) as raised:
        load(datasets, eval_fraction=fraction)
    assert str(raised.value).startswith(f"{datasets[0]}: no row is left to train on: ") and "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def questions_of(encoder: ChatEncoder, rows: TokenisedRows, ids: Sequence[int]) -> list[tuple[str, str, str]]:
    questions = read_questions(encoder, rows, ids)
    assert all(set(question) == {"prompt_ids", "prompt", "expected", "skill"} for question in questions)
    return [(question["prompt"], question["expected"], question["skill"]) for question in questions]


@pytest.fixture
def asked(tmp_path):
    """(rows of two files, one of which comes twice, with rows dropped among them; what is to be read of each)."""
    a = [row("a0", ""), row("a1", "x") | {"skill": "add"}, row("a2", "x"), row("a3"), row("a4", "z") | {"skill": "sort"}]
    b = [row("b0", "<|im_end|>"), row("b1", "x"), row("b2", ""), *[row("b3", "z") | {"skill": "sort"}] * 2]
    (tmp_path / "a.jsonl").write_text("\n" + "".join(json.dumps(each) + "\n\n" for each in a))
    (tmp_path / "b.json").write_text(json.dumps(b))  # all of them in line 1
    rows = tokenised([tmp_path / name for name in ("b.json", "a.jsonl", "b.json")], make_encoder(), tmp_path)
    of_a = [("a1", "x", "add"), ("a2", "x", "all"), ("a4", "z", "sort")]
    of_b = [("b1", "x", "all"), *[("b3", "z", "sort")] * 2]
    return rows, [*of_b, *of_a, *of_b]


@pytest.mark.parametrize("ids", [range(9), range(8, -1, -1), [], [4], [3, 3, 3], [5, 0, 5, 8, 0, 3, 5], [1, 7, 1], [2, 2, 1]])
@pytest.mark.parametrize("kind", [list, np.array], ids=["list", "array"])
def test_questions_are_those_of_the_rows_in_the_order_of_the_ids(asked, ids, kind):
    rows, sources = asked
    assert questions_of(make_encoder(), rows, kind(ids)) == [sources[i] for i in ids]


def test_each_file_is_read_once_and_few_rows_are_encoded(tmp_path, monkeypatch):
    """A .json file may hold a million rows in one line."""
    (tmp_path / "x.json").write_text(json.dumps([row(f"q{i}", "a" if i % 10 else "") for i in range(100)]))
    write(tmp_path / "y.jsonl", [row(f"r{i}", "a") for i in range(100)])
    encoder, read, encoded = make_encoder(), [], []
    rows = tokenised([tmp_path / "x.json", tmp_path / "y.jsonl"], encoder, tmp_path)
    monkeypatch.setattr(chat_module, "read_rows", lambda file: (read.append(file.name), read_rows(file))[1])
    monkeypatch.setattr(encoder, "encode_rows", lambda *args: (encoded.append(1), ChatEncoder.encode_rows(encoder, *args))[1])
    found = questions_of(encoder, rows, [0, 89, 80, 150, 0, 89, 89, 90])
    assert [prompt for prompt, *_ in found] == ["q1", "q99", "q89", "r60", "q1", "q99", "q99", "r0"]
    assert read == ["x.json", "y.jsonl"]
    assert len(encoded) <= 2 + 2 * 10 + 2  # those of .jsonl and, in .json, no more besides than have been dropped


@templates
def test_a_question_s_ids_are_the_untruncated_prompt_of_its_answer(tmp_path, template):
    long = "a long question " * 40
    talks = [chat("q1", "a1", long, "a2", system="s"), chat("q1", "yes")]
    file = write(tmp_path / "x.jsonl", [{"messages": talk} for talk in talks])
    encoder = make_encoder(template, 64, 32)
    rows = tokenised([file], encoder, tmp_path)
    assert rows.counts["rows truncated"] >= 1
    questions = read_questions(encoder, rows, [0, 1])
    assert [question["prompt_ids"] for question in questions] == [reference(template, talk[:-1], True) for talk in talks]
    assert [question["prompt"] for question in questions] == [long, "q1"]


@pytest.mark.parametrize("messages, prompt, expected", [
    (chat("q1", "a1", "q2", "a2"), "q2", "a2"), (chat("q1", "a1", "q2"), "q1", "a1"), (chat("q1", "a1", "q2", " "), "q1", "a1"),
    ([*chat("q1", "a1", "q2"), {"role": "assistant", "content": "a2", "train": False}], "q1", "a1")])
def test_the_last_question_is_that_of_the_last_target(tmp_path, messages, prompt, expected):
    encoder = make_encoder()
    rows = tokenised([write(tmp_path / "x.jsonl", [{"messages": messages}])], encoder, tmp_path)
    (question,) = read_questions(encoder, rows, [0])
    assert (question["prompt"], question["expected"]) == (prompt, expected)
    before = messages[:[message["content"] for message in messages].index(prompt) + 1]
    assert question["prompt_ids"] == reference(CHATML, before, for_answer=True)


@pytest.mark.parametrize("max_length, max_prompt_length, most", [(1024, 512, 256), (64, 24, 40)])
def test_answers_are_of_the_prompts_and_without_the_template_s_own_words(monkeypatch, max_length, max_prompt_length, most):
    """Qwen3's template puts an empty thought in front of the last answer, which a model has learnt to write."""
    encoder, model, given_to = make_encoder(QWEN3, max_length, max_prompt_length), object(), []

    def generate(*args):
        given_to.append(args)
        return [encoder.ids(text) for text in ("<think>\n\n</think>\n\nyes 🙂<|im_end|>", " no\n<|im_end|>", "", "<think>\nhm")]

    monkeypatch.setattr("chat.generate", generate)
    questions = [{"prompt_ids": [i, 2], "prompt": "q", "expected": "a", "skill": "all"} for i in range(4)]
    assert chat_module.answer(model, encoder, questions) == ["yes 🙂", "no", "", "<think>\nhm"]
    assert given_to == [(model, [[0, 2], [1, 2], [2, 2], [3, 2]], most)]


@templates
def test_the_text_of_a_row_s_answer_is_the_answer(template):
    encoder = make_encoder(template)
    ids, trained, _ = encode(encoder, chat("q1", "naïve 🙂\n\nyes"))
    (start, stop), = runs(trained)
    assert encoder.answer_text(ids[start:stop]) == "naïve 🙂\n\nyes"
    assert encoder.prompt_ids(to_messages(row("q1"))) == ids[:start]
