"""Conversations → token ids and which of them are targets → examples, the token cache, questions and answers.

Targets are compared with what a reader of the template expects, spelt out beside it; ids with what transformers makes of the
context, apply_chat_template with the generation prompt, and of the target alone.
"""

import copy
import dataclasses
import importlib.util
import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import ROOT, process_of_one
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import chat as chat_module
import rows as rows_module
import template as template_module
from chat import ChatEncoder, load_examples, read_questions
from data import (
    CHUNK,
    DTYPES,
    IGNORE,
    PER_DOCUMENT,
    DataError,
    SFTDataLoader,
    TokenisedRows,
    encode_files,
    mix,
    split_rows,
    tokenise,
)
from fsdp_utils import init_processes
from log import describe_data
from make_tiny import CAPITALS, DIGITS, make_rows, train_tokenizer
from model_utils import load_tokenizer
from rows import list_files, read_rows, to_conversation, to_pair

# ---------------------------------------------------------------------------------------------------------------------
# Chat templates as models have them, and small tokenizers to go with them


@dataclass(frozen=True)
class Template:
    name: str
    jinja: str
    prompt_end: str  # the generation prompt
    end: str  # what ends an answer
    special: tuple[str, ...] = ()
    words: tuple[str, ...] = ()  # added tokens that are not special
    bos: str = "<s>"
    eos: str = "</s>"
    splits: str = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # into words: as GPT-2
    lead: str = ""  # what the template writes in front of the last answer
    rewrites: bool = False  # an answer is written otherwise once another follows: each is an example of its own
    folds_system: bool = False  # it knows no system message: the encoder puts that in front of the first question
    strips: bool = False

    def target(self, answer: str) -> str:
        return self.lead + (answer.strip() if self.strips else answer) + self.end


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
                          "\nOutput:", "</s>", lead=" ", folds_system=True, rewrites=True)  # no engine stops at "### END"
NO_TERMINATOR = Template("no terminator", """\
{% for message in messages %}{{ message.role | capitalize + ': ' + message.content + '\n\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}""", "Assistant:", "</s>", lead=" ", rewrites=True)
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
                 lead="<think>\n\n</think>\n\n", rewrites=True)
AGENT = Template("agent", """\
{%- set ns = namespace(last_query=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\nTools: ' }}{%- for tool in tools %}{{- tool.function.name + '; ' }}{%- endfor %}
{{- '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.reasoning_content and loop.index0 > ns.last_query %}
        {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
    {%- endif %}
    {{- message.content }}
    {%- for call in message.tool_calls %}
        {{- '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
                 "<|im_start|>assistant\n", "<|im_end|>", special=IM, words=("<think>", "</think>"), eos="<|im_end|>")
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


def make_encoder(template: Template = CHATML, max_length: int = 1024, max_prompt_length: int = 512, **options) -> ChatEncoder:
    return ChatEncoder(make_tokenizer(template), max_length, max_prompt_length, **options)


def chat(*texts: str, system: str | None = None) -> list[dict]:
    """Question, answer, question, answer, … → messages."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": role, "content": text} for role, text in zip(itertools.cycle(["user", "assistant"]), texts)]


def row(*texts: str) -> dict:
    return {"messages": chat(*texts)}


def context_of(template: Template, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
    """transformers' ids of the messages and the generation prompt, the system message put into the first question where the
    template knows none."""
    if template.folds_system and messages[0]["role"] == "system":
        system, first, *rest = messages
        messages = [{"role": "user", "content": system["content"] + "\n\n" + first["content"]}, *rest]
    return make_tokenizer(template).apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"]


def ids_of(template: Template, text: str) -> list[int]:
    return make_tokenizer(template)(text, add_special_tokens=False)["input_ids"]


def sequence_of(template: Template, messages: list[dict]) -> list[int]:
    """The ids of an example whose last target is the last message."""
    return context_of(template, messages[:-1]) + ids_of(template, template.target(messages[-1]["content"]))


class Encoded(NamedTuple):
    ids: list[int]
    trained: list[bool]
    answer: int


def encode_all(encoder: ChatEncoder, *rows: object) -> tuple[list[Encoded], Counter, dict]:
    """(the examples, counts, places) of rows in the lines 1, 2, …"""
    columns, counts, places = encoder.encode_rows(0, Path("x"), 0, list(enumerate(rows, 1)))
    assert {name: column.dtype for name, column in columns.items()} == {name: np.dtype(kind) for name, kind in DTYPES.items()}
    ends = [0, *np.cumsum(columns["lengths"]).tolist()]
    assert ends[-1] == len(columns["ids"]) == len(columns["trained"])
    examples = [Encoded(columns["ids"][start:stop].tolist(), columns["trained"][start:stop].tolist(), answer)
                for start, stop, answer in zip(ends, ends[1:], columns["answers"].tolist())]
    assert columns["targets"].tolist() == [sum(example.trained) for example in examples]
    return examples, counts, places


def encode(encoder: ChatEncoder, messages: list[dict], tools: Sequence[dict] = ()) -> list[Encoded]:
    examples, counts, _ = encode_all(encoder, {"messages": messages, "tools": [*tools]})
    assert not [name for name in counts if name.startswith("bad: ")]
    return examples


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


def targets_of(encoder: ChatEncoder, example: Encoded) -> list[str]:
    return [text_of(encoder.tokenizer, example.ids[start:stop]) for start, stop in runs(example.trained)]


def write(path: Path, rows: list) -> Path:
    """One row a line, or for a .json file a pretty-printed list."""
    text = json.dumps(rows, indent=1) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return path


def many_rows(n: int) -> list[dict]:
    return [row(f"question {i}", "yes " * (i % 7)) for i in range(n)]


def tokenised(paths: Sequence[Path], encoder: ChatEncoder, cache: Path) -> TokenisedRows:
    return tokenise(list_files(list(map(str, paths))), encoder, str(cache))


# ---------------------------------------------------------------------------------------------------------------------
# Texts → ids

AWKWARD = ["", " ", "  a", "\n", "\n\n a \n", " yes", "yes ", "a\u2028b\u00a0c", "naïve 🙂👩‍👩‍👧 日本語", "e\u0301 é", "\t:)\r\n",
           "<", "<|", "▁a ▁"]
pieces = st.text(st.sampled_from("ab yes?\n.:#é🙂<|▁"), max_size=8) | st.sampled_from(AWKWARD)


@settings(max_examples=200, deadline=None)
@given(template=st.sampled_from([CHATML, LLAMA3, LLAMA2, GEMMA, QWEN3]), texts=st.lists(pieces, min_size=1, max_size=6),
       tokens=st.lists(st.integers(0, 4), min_size=6, max_size=6))
def test_a_text_cut_at_its_control_tokens_has_the_tokens_of_the_whole(template, texts, tokens):
    encoder = make_encoder(template)
    names = [template.bos, template.eos, *template.special, *template.words]
    text = "".join(text + names[token % len(names)] for text, token in zip(texts, tokens)) + texts[0]
    assert encoder.cuts and encoder.tokens(text) == ids_of(template, text)
    inside = [unit for unit in encoder.units(text) if unit.startswith((template.bos, template.eos, *template.special))]
    assert "".join(encoder.units(text)) == text
    assert len(inside) == sum(names[token % len(names)] not in template.words for token, _ in zip(tokens, texts))


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("behind", ["", " ", "\n", "a"])
def test_the_same_for_sentencepiece(sentencepiece_encoder, text, behind):
    tokenizer = sentencepiece_encoder.tokenizer
    for whole in (text, f"<s>{text}</s>{behind}<|im_start|>{text}</s>", f"{text}<|im_end|>{behind}\n<|im_start|>{behind}{text}"):
        assert sentencepiece_encoder.tokens(whole) == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_whose_control_tokens_swallow_spaces_is_given_whole_texts():
    tokenizer = copy.deepcopy(make_tokenizer(CHATML))
    tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True, special=True)})
    encoder, text = ChatEncoder(tokenizer, 64, 32), "a <mask> b<|im_end|>\n <mask>"
    assert not encoder.cuts and encoder.units(text) == [text]
    assert encoder.tokens(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------------------------------------------------------------
# Targets

TALK = chat("yes", "yes",  # the question, and the system message, spell the answer too
            "Naïve café 🦜?\n\nyes", "👩‍👩‍👧 — ça va; 日本語\n\nyes 🙂",
            "again?", "yes", system="Answer: yes")


@templates
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("start", [0, 1], ids=["system", "no system"])
def test_targets_are_the_answers_with_their_ends_behind_what_an_engine_feeds(template, adds_bos, start):
    tokenizer, messages = make_tokenizer(template, adds_bos), TALK[start:]
    encoder = ChatEncoder(tokenizer, 1024, 512)
    examples, counts, _ = encode_all(encoder, {"messages": messages})
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    groups = [[i] for i in answers] if template.rewrites else [answers]
    assert len(examples) == len(groups)
    for example, group in zip(examples, groups):
        assert targets_of(encoder, example) == [template.target(messages[i]["content"]) for i in group]
        assert example.ids == sequence_of(template, messages[:group[-1] + 1]) and len(example.ids) == len(example.trained)
        assert example.answer == group[-1] - len(messages)
        assert runs(example.trained)[-1][1] == len(example.ids)  # nothing stands behind the last target
        contexts = [context_of(template, messages[:i]) for i in group]
        assert [example.ids[:len(context)] for context in contexts] == contexts
        assert [len(context) for context in contexts] == [start for start, _ in runs(example.trained)]
        assert text_of(tokenizer, contexts[0]).endswith(template.prompt_end)
        assert (tokenizer.bos_token_id, tokenizer.bos_token_id) not in itertools.pairwise(example.ids)
    assert counts["tokens"] == counts["tokens kept"] == sum(len(example.ids) for example in examples)
    assert counts["targets"] == sum(sum(example.trained) for example in examples)
    assert counts["examples"] == len(groups) and not counts["tokens dropped"] and not counts["examples truncated"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


@templates
@pytest.mark.parametrize("answer", ["yes ", "yes\n", "yes\n\n \n", " yes", "\n yes", "\n\n\nyes"])
def test_white_space_around_an_answer_is_the_template_s_business(template, answer):
    encoder = make_encoder(template)
    (example,) = encode(encoder, chat("q", answer))
    assert targets_of(encoder, example) == [template.target(answer)]
    assert example.ids == sequence_of(template, chat("q", answer))


def test_a_token_that_stops_generation_ends_each_target():
    for template in TEMPLATES:
        encoder = make_encoder(template)
        (example,) = encode(encoder, chat("q", "yes"))
        assert [example.ids[-1]] == encoder.stop_ids == [make_tokenizer(template).convert_tokens_to_ids(template.end.strip())]


@pytest.mark.parametrize("shape, role, content", [("messages", "role", "content"), ("conversations", "from", "value")])
@pytest.mark.parametrize("left_out, expected", [({1}, [3]), ({3}, [1]), ({1, 3}, []), ({0, 2}, [1, 3])])
@pytest.mark.parametrize("mark, otherwise", [
    ({"train": False}, {}), ({"train": False}, {"train": True}), ({"weight": 0}, {"weight": 1})])
def test_an_answer_that_is_left_out_is_still_read(shape, role, content, left_out, expected, mark, otherwise):
    encoder, talk = make_encoder(), chat("one", "two", "three", "four")
    marked = [{role: turn["role"], content: turn["content"], **(mark if i in left_out else otherwise)}
              for i, turn in enumerate(talk)]
    examples, counts, _ = encode_all(encoder, {shape: marked})
    texts = [talk[i]["content"] + "<|im_end|>" for i in expected]
    assert [targets_of(encoder, example) for example in examples] == [texts] * bool(expected)
    assert [example.ids for example in examples] == [sequence_of(CHATML, talk[:i + 1]) for i in expected[-1:]]
    assert counts["dropped: nothing to train"] == (not expected)


@templates
def test_of_last_answers_only_the_last_is_trained_in_one_example(template):
    encoder = make_encoder(template, last_answer_only=True)
    (example,) = encode(encoder, TALK)
    assert targets_of(encoder, example) == [template.target("yes")] and example.answer == -1
    assert example.ids == sequence_of(template, TALK)
    (example,) = encode(encoder, [*TALK[:-1], {**TALK[-1], "train": False}])  # the last of those that are trained
    assert targets_of(encoder, example) == [template.target(TALK[4]["content"])] and example.answer == -3
    assert example.ids == sequence_of(template, TALK[:5])


STRADDLES = Template("straddles", """{% for message in messages %}{% if message.role == 'user' %}\
{{ 'Q: ' + message.content + '\nA :' }}{% else %}{{ message.content + eos_token + '\n' }}{% endif %}{% endfor %}""", " :", "</s>")


@pytest.mark.parametrize("answers, n_merged", [
    (["yes"], 0), ([")"], 0), ([")", "yes"], 1), (["yes", ")"], 0), ([")", ") no", ")"], 2)])
def test_a_target_is_tokenised_apart_from_its_context_as_the_model_writes_it(answers, n_merged):
    """Anew, " :" and ")" would be one token. Of the last answer, whose text is not history, there is nothing to tell."""
    encoder = make_encoder(STRADDLES)
    assert ids_of(STRADDLES, " :)")[0] not in ids_of(STRADDLES, " :") + ids_of(STRADDLES, ")")
    examples, counts, _ = encode_all(encoder, row(*(text for answer in answers for text in ("q", answer))))
    (example,), expected = examples, []
    for answer in answers:
        expected += ids_of(STRADDLES, "\n" * bool(expected) + "Q: q\nA :") + ids_of(STRADDLES, answer + "</s>")
    assert example.ids == expected and targets_of(encoder, example) == [answer + "</s>" for answer in answers]
    assert counts["answers in the tokens that they were written in"] == n_merged


BARE = Template("bare", """{% for message in messages %}{{ message.content }}\
{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}""", "", "</s>")


@pytest.mark.parametrize("question", ["", "again?"])
def test_where_nothing_comes_before_an_answer_its_first_token_is_no_target(question):
    (example,) = encode(make_encoder(BARE), chat(question, "yes yes"))
    n_before, answer = len(ids_of(BARE, question)), ids_of(BARE, "yes yes</s>")
    assert example.ids == ids_of(BARE, question) + answer and len(answer) > 2
    assert example.trained == [False] * max(1, n_before) + [True] * (len(example.ids) - max(1, n_before))


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    train_tokenizer(make_rows(100, 0)[0], folder)
    return folder


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(IM)})
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece_encoder(sentencepiece_tokenizer):
    tokenizer = copy.deepcopy(sentencepiece_tokenizer)
    tokenizer.chat_template = CHATML.jinja
    return ChatEncoder(tokenizer, 256, 128)


@pytest.mark.parametrize("template", [CHATML, LLAMA2, MISTRAL], ids=lambda template: template.name)
def test_targets_of_a_sentencepiece_tokenizer(sentencepiece_tokenizer, template):
    tokenizer = copy.deepcopy(sentencepiece_tokenizer)
    tokenizer.chat_template = template.jinja
    messages = chat("sort 312", "123", "reverse ABC", "CBA")
    ((ids, trained, _),) = encode(ChatEncoder(tokenizer, 256, 128), messages)
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    assert ids == whole[:len(ids)] and not tokenizer.decode(whole[len(ids):]).strip()
    spelt = ["".join(tokenizer.convert_ids_to_tokens(ids[start:stop])).replace("▁", " ").strip() for start, stop in runs(trained)]
    assert spelt == ["123" + template.end, "CBA" + template.end]
    contexts = [tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)["input_ids"] for i in (1, 3)]
    assert [ids[:start] for start, _ in runs(trained)] == contexts


@pytest.mark.parametrize("jinja", [None, CHATML.jinja, LLAMA2.jinja], ids=["plain", "ChatML", "Llama 2"])
def test_user_defined_symbols_of_sentencepiece_are_text(tiny_folder, tmp_path, jinja):
    """transformers lists them among the special tokens."""
    if jinja:
        (tmp_path / "own.jinja").write_text(jinja)
    tokenizer = load_tokenizer(str(tiny_folder), str(tmp_path), chat_template=jinja and str(tmp_path / "own.jinja"))
    assert {*CAPITALS, *DIGITS, "\n", "<|user|>"} <= {*tokenizer.all_special_tokens}
    encoder = ChatEncoder(tokenizer, 128, 64)
    written = [row("reverse AB\n<|user|>", "BA 12"), {"text": "A1\n"}, row("q", "</s>"), {"text": "<s>"}]
    (said, text), counts, places = encode_all(encoder, *written)
    assert tokenizer.decode([token for token, on in zip(said.ids, said.trained) if on]).replace(" ", "") == "BA12</s>"
    assert tokenizer.convert_ids_to_tokens(text.ids)[-4:] == ["A", "1", "\n", "</s>"] and text.trained[-4:] == [True] * 4
    assert counts["dropped: a text spells a control token"] == 2 and places["dropped: a text spells a control token"] == [0, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Rows that become several examples; tools and thoughts


def test_an_answer_that_the_template_rewrites_is_an_example_of_its_own():
    talk = chat("q1", "a1", "q2", "a2", "q3", "a3")
    encoder = make_encoder(QWEN3)
    examples, counts, places = encode_all(encoder, row("q", "a"), {"messages": talk})
    assert [example.ids for example in examples[1:]] == [sequence_of(QWEN3, talk[:i]) for i in (2, 4, 6)]
    targets = [QWEN3.target(answer) for answer in ("a", "a1", "a2", "a3")]
    assert [targets_of(encoder, example) for example in examples] == [[target] for target in targets]
    assert [example.answer for example in examples] == [-1, -5, -3, -1]
    name = "split: the template writes an answer otherwise once another follows"
    assert counts[name] == 1 and places[name] == [0, 2] and counts["rows"] == 2 and counts["examples"] == 4
    assert counts["tokens more by splitting"] == len(examples[1].ids) + len(examples[2].ids)
    assert not counts["dropped: nothing to train"] and not counts["examples truncated"]


TOOL = {"type": "function", "function": {"name": "weather", "description": "of a town", "parameters": {
    "type": "object", "properties": {"town": {"type": "string"}}}}}


def episode(town: str, sky: str) -> list[dict]:
    """A question, a thought and a call, its result, a thought and an answer."""
    return [{"role": "user", "content": f"{town}?"},
            {"role": "assistant", "content": "Look:", "reasoning_content": f"ask {town}",
             "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"town": town}}}]},
            {"role": "tool", "content": f"{sky} today"},
            {"role": "assistant", "content": f"{sky}.", "reasoning_content": f"so {sky}"}]


def ask(town: str) -> str:
    return f"<|im_start|>user\n{town}?<|im_end|>\n<|im_start|>assistant\n"


def see(sky: str) -> str:
    return f"\n<|im_start|>tool\n{sky} today<|im_end|>\n<|im_start|>assistant\n"


def use(town: str) -> str:
    return f'Look:<call>weather {{"town": "{town}"}}</call><|im_end|>'


TOOLS_TEXT = "<|im_start|>system\nTools: weather; <|im_end|>\n"
TWO_EPISODES = [*episode("Rome", "Sun"), *episode("Oslo", "Snow")]
FIRST = [(TOOLS_TEXT + ask("Rome"), False), ("<think>\nask Rome\n</think>\n\n" + use("Rome"), True), (see("Sun"), False),
         ("<think>\nso Sun\n</think>\n\nSun.<|im_end|>", True)]
SECOND = [(TOOLS_TEXT + ask("Rome") + use("Rome") + see("Sun") + "Sun.<|im_end|>\n" + ask("Oslo"), False),
          ("<think>\nask Oslo\n</think>\n\n" + use("Oslo"), True), (see("Snow"), False),
          ("<think>\nso Snow\n</think>\n\nSnow.<|im_end|>", True)]


def marked_text(tokenizer, example: Encoded) -> list[tuple[str, bool]]:
    """[(text, whether it is trained)] of an example's stretches."""
    return [(text_of(tokenizer, [id for id, _ in group]), on)
            for on, group in itertools.groupby(zip(example.ids, example.trained), key=lambda pair: pair[1])]


def test_calls_and_thoughts_are_trained_and_each_episode_with_thoughts_is_one_example():
    encoder = make_encoder(AGENT)
    examples = encode(encoder, TWO_EPISODES, [TOOL])
    assert [marked_text(encoder.tokenizer, example) for example in examples] == [FIRST, SECOND]
    assert [example.answer for example in examples] == [-5, -1]
    for example in examples:
        assert example.ids == [token for text, _ in marked_text(encoder.tokenizer, example) for token in ids_of(AGENT, text)]


def test_questions_of_rows_with_tools_and_thoughts(tmp_path):
    encoder = make_encoder(AGENT)
    rows = tokenised([write(tmp_path / "x.jsonl", [row("q", "a"), {"messages": TWO_EPISODES, "tools": [TOOL]},
                                                   {"messages": episode("Rome", "Sun")[:2], "tools": [TOOL], "skill": "call"}])],
                     encoder, tmp_path)
    assert rows.row_of.tolist() == [0, 1, 1, 2] and rows.answers.tolist() == [-1, -5, -1, -1]
    questions = read_questions(encoder, rows, [3, 1, 2])
    prompts = [text_of(encoder.tokenizer, question["prompt_ids"]) for question in questions]
    assert prompts == ["".join(text for text, _ in stretches) for stretches in (FIRST[:1], FIRST[:-1], SECOND[:-1])]
    assert [question["prompt"] for question in questions] == ["Rome?", "Rome?", "Oslo?"]
    assert [question["expected"] for question in questions] == [use("Rome").removesuffix("<|im_end|>"), "Sun.", "Snow."]
    assert [question["skill"] for question in questions] == ["call", "all", "all"]
    unanswered = [to_conversation({"messages": messages, "tools": [TOOL]}, answered=False)
                  for messages in (TWO_EPISODES[:1], TWO_EPISODES[:3], TWO_EPISODES[:7])]
    assert [encoder.prompt_ids(each) for each in unanswered] == [question["prompt_ids"] for question in questions]
    assert [context_of(AGENT, each.messages, [TOOL]) for each in unanswered] == [question["prompt_ids"] for question in questions]


@pytest.mark.parametrize("template, messages, tools, said", [
    (CHATML, chat("q", "a"), [TOOL], "tools[0]: the chat template does not write the tool 'weather'"),
    (CHATML, episode("Rome", "Sun")[:2], [], "messages[1].tool_calls: the chat template does not write them"),
    (LLAMA3, [*chat("q"), {**chat("", "a")[1], "reasoning_content": "hm"}], [],
     "messages[1].reasoning_content: the chat template does not write it"),
])
def test_what_the_template_does_not_write_makes_a_bad_row(template, messages, tools, said):
    examples, counts, places = encode_all(make_encoder(template), row("q", "a"), {"messages": messages, "tools": tools})
    assert len(examples) == 1 and {name: count for name, count in counts.items() if "bad" in name} == {f"bad: {said}": 1}
    assert places[f"bad: {said}"] == [0, 2]


def documents_of(loader: SFTDataLoader) -> list[tuple[list[int], list[int]]]:
    """[(ids, labels)] of all documents that a rank is given, fillers aside."""
    found = []
    for batch in loader:
        ids, labels = batch["target_combined_input_ids"], batch["target_labels"]
        if batch["document_ends"] is None:
            lengths = batch["target_combined_attention_mask"].sum(1).tolist()
            parts = [(ids[i, :n].tolist(), labels[i, :n].tolist()) for i, n in enumerate(lengths)]
        else:
            parts = [(ids[0, start:stop].tolist(), labels[0, start:stop].tolist())
                     for start, stop in itertools.pairwise(batch["document_ends"].tolist())]
        found += parts if batch["n_documents"] else []
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_examples_of_a_row_are_batched_like_any_others(tmp_path, packing, world_size):
    encoder = make_encoder(AGENT)
    written = [row("q1", "a1", "q2", "a2"), {"messages": TWO_EPISODES, "tools": [TOOL]}, {"text": "yes and no"},
               {"messages": [*TWO_EPISODES, *episode("Bonn", "Rain")], "tools": [TOOL]}]
    rows = tokenised([write(tmp_path / "x.jsonl", written)], encoder, tmp_path)
    assert rows.row_of.tolist() == [0, 1, 1, 2, 3, 3, 3]
    found = sum((documents_of(SFTDataLoader(rows, np.arange(7), 14, 5, batch_size=3, pad_id=0, packing=packing, rank=rank,
                                            microbatch_tokens=300, world_size=world_size)) for rank in range(world_size)), [])
    expected = [(example.ids, [id if on else IGNORE for id, on in zip(example.ids, example.trained)])
                for example in encode_all(encoder, *written)[0]]
    assert sorted(found) == sorted(2 * expected)


# ---------------------------------------------------------------------------------------------------------------------
# Texts that are trained whole

LONG = "Naïve café 🦜? yes: the answer\n\n is :) 42. " * 3


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("max_length", [2, 3, 7, 50, *range(72, 82), 1000])
def test_of_a_long_text_every_token_is_a_target_once(adds_bos, max_length):
    tokenizer = make_tokenizer(LLAMA2, adds_bos)
    examples, counts, places = encode_all(ChatEncoder(tokenizer, max_length, 1), row("q", "a"), {"text": LONG})
    pieces = [example for example in examples if example.answer == 0]
    tokens = [*tokenizer(LONG, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert [id for piece in pieces for id, on in zip(piece.ids, piece.trained) if on] == tokens and len(tokens) == 76
    before = [tokenizer.bos_token_id if adds_bos else tokenizer.eos_token_id, *tokens]
    assert [piece.ids[0] for piece in pieces] == before[:-1:max_length - 1]
    assert all(piece.trained == [False] + [True] * (len(piece.ids) - 1) and piece.answer == 0 for piece in pieces)
    assert {len(piece.ids) for piece in pieces[:-1]} <= {max_length} and 2 <= len(pieces[-1].ids) <= max_length
    assert counts["split: a text is long"] == (len(pieces) > 1) and not counts["tokens more by splitting"]
    assert len(pieces) == 1 or places["split: a text is long"] == [0, 2]


def test_a_text_that_is_empty_or_spells_a_control_token_is_dropped():
    examples, counts, places = encode_all(make_encoder(), {"text": ""}, {"text": "a<|im_end|>"}, {"text": " "})
    (space,) = examples
    assert text_of(make_tokenizer(CHATML), space.ids) == "<s> <|im_end|>"
    assert places == {"dropped: nothing to train": [0, 1], "dropped: a text spells a control token": [0, 2],
                      "shown: a text": [0, 3]}
    assert counts["dropped: nothing to train"] == counts["dropped: a text spells a control token"] == 1


def test_a_text_without_an_end_token_to_write_is_a_bad_row():
    tokenizer = copy.deepcopy(make_tokenizer(CHATML))
    tokenizer.pad_token, tokenizer.eos_token = "<s>", None
    _, counts, _ = encode_all(ChatEncoder(tokenizer, 64, 32), {"text": "a"})
    assert counts["bad: text: the tokenizer has no eos_token to end it with"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Truncation


@pytest.mark.parametrize("template", [CHATML, LLAMA2, GEMMA], ids=lambda template: template.name)
@pytest.mark.parametrize("system", ["Be brief.", None])
def test_the_oldest_exchanges_go_first_and_the_system_message_stays(template, system):
    turns = ["first question", "first answer", "second question", "second answer", "third question", "third answer"]
    whole, without_first, last_only = (sequence_of(template, chat(*turns[start:], system=system)) for start in (0, 2, 4))
    for max_length, expected, n_targets in [(len(whole), whole, 3), (len(whole) - 1, without_first, 2),
                                            (len(without_first), without_first, 2), (len(without_first) - 1, last_only, 1),
                                            (len(last_only), last_only, 1)]:
        encoder = make_encoder(template, max_length, max_length - 1)
        examples, counts, _ = encode_all(encoder, {"messages": chat(*turns, system=system)})
        ((ids, trained, answer),) = examples
        assert ids == expected and counts["tokens"] == len(whole) and answer == -1
        assert targets_of(encoder, examples[0]) == [template.target(text) for text in turns[1::2][-n_targets:]]
        assert counts["tokens dropped"] == len(whole) - len(expected) and counts["examples truncated"] == (n_targets < 3)


@pytest.mark.parametrize("template", [IGNORES_SYSTEM, QWEN3], ids=lambda template: template.name)
def test_each_example_of_a_row_loses_its_own_oldest_exchanges(template):
    talk = chat("first question", "first answer", "second question", "second answer", "third question", "third answer")
    sequences = [sequence_of(template, talk[:i]) for i in (2, 4, 6)]
    for max_length in range(len(sequences[0]), len(sequences[2]) + 1):
        encoder = make_encoder(template, max_length, max_length - 1)
        examples, counts, _ = encode_all(encoder, {"messages": talk})
        for i, example in enumerate(examples):
            first = next(first for first in range(i + 1) if first == i or
                         len(sequence_of(template, talk[2 * first:2 * i + 2])) <= max_length)
            assert example.ids == sequence_of(template, talk[2 * first:2 * i + 2])[:max_length] and example.answer == 2 * i - 5
        assert len(examples) == 3 and counts["tokens"] == sum(map(len, sequences))
        assert counts["examples truncated"] == sum(len(sequence) > max_length for sequence in sequences)


def test_consecutive_questions_are_of_one_exchange():
    talk = [*chat("first question", "first answer", "a question"), *chat("and more of it", "second answer")]
    expected = sequence_of(CHATML, talk[2:])
    for max_length in (len(expected), len(expected) - 1):
        (example,) = encode(make_encoder(CHATML, max_length, max_length - 1), talk)
        assert example.ids == expected[:max_length]


def test_what_follows_the_last_target_is_in_no_example():
    talk = chat("first question", "first answer", "second question", "second answer", "a question without an answer")
    expected = sequence_of(CHATML, talk[:4])
    for messages in (talk, [*talk, {"role": "assistant", "content": "untrained", "train": False}]):
        for max_length in (len(expected), 1024):
            examples, counts, _ = encode_all(make_encoder(CHATML, max_length), {"messages": messages})
            assert [example.ids for example in examples] == [expected] and examples[0].answer == 3 - len(messages)
            assert counts["tokens"] == len(expected) and not counts["examples truncated"]


@pytest.mark.parametrize("template", [CHATML, LLAMA2, GEMMA, QWEN3], ids=lambda template: template.name)
@pytest.mark.parametrize("system", ["Be brief.", None])
def test_the_last_question_is_cut_from_the_left_to_max_prompt_length(template, system):
    question, answer = " ".join(f"word{i} 🙂" for i in range(200)), "the answer"
    encoder = make_encoder(template, 150, 100)
    examples, counts, _ = encode_all(encoder, {"messages": chat("old question", "old answer", question, answer, system=system)})
    ids, trained, index = examples[-1]

    def prompt_of(n_characters: int) -> list[int]:
        return context_of(template, chat(question[len(question) - n_characters:], system=system))

    (start, stop), = runs(trained)
    most = len(text_of(make_tokenizer(template), ids[:start]))
    kept = next(n for n in range(most, 0, -1) if prompt_of(n) == ids[:start])
    assert start <= 100 < len(prompt_of(kept + 1)) and counts["tokens"] > 1000 and index == -1
    assert ids == sequence_of(template, chat(question[len(question) - kept:], answer, system=system))
    assert targets_of(encoder, examples[-1]) == [template.target(answer)]


@pytest.mark.parametrize("template", [CHATML, LLAMA2, IGNORES_SYSTEM, NO_TERMINATOR, QWEN3], ids=lambda template: template.name)
@pytest.mark.parametrize("answer", ["the answer is a rather naïve one 🙂", "one\n", "two \n\n"])
def test_an_answer_that_is_cut_does_not_end(template, answer):
    """At every length there is, the target is the whole answer with its end, or a beginning without the token that stops."""
    talk = chat("question", answer)
    n_prompt, whole = len(context_of(template, talk[:1])), sequence_of(template, talk)
    for max_length in range(n_prompt + 1, len(whole) + 1):
        (example,) = encode(make_encoder(template, max_length, max_length - 1), talk)
        assert example.ids == whole[:max_length] and example.trained == [False] * n_prompt + [True] * (max_length - n_prompt)
    assert example.ids[-1] in make_encoder(template).stop_ids and not {*whole[n_prompt:-1]} & {*make_encoder(template).stop_ids}
    examples, counts, _ = encode_all(make_encoder(template, n_prompt, n_prompt - 1), {"messages": talk})
    assert len(examples) == counts["examples truncated"] == (counts["tokens kept"] > 0)


def test_an_episode_that_is_too_long_keeps_its_beginning_and_its_whole_answers():
    encoder = make_encoder(AGENT)
    (whole,) = encode(encoder, TWO_EPISODES[:4], [TOOL])
    (first, second) = runs(whole.trained)
    for max_length in range(first[1], len(whole.ids)):
        shorter = make_encoder(AGENT, max_length, first[0])
        ((ids, trained, answer),), counts, _ = encode_all(shorter, {"messages": TWO_EPISODES[:4], "tools": [TOOL]})
        assert ids == whole.ids[:max_length] and trained == whole.trained[:max_length] and answer == -1
        assert counts["tokens dropped"] == len(whole.ids) - max_length


texts = st.text(st.sampled_from("ab yes?\n.:#é🙂"), max_size=25)


@settings(max_examples=200, deadline=None)
@given(template=st.sampled_from([CHATML, LLAMA3, LLAMA2, GEMMA, IGNORES_SYSTEM, QWEN3]), system=st.none() | texts,
       turns=st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=4),
       without_last_answer=st.booleans(), max_length=st.integers(2, 120), prompt_share=st.floats(0.1, 0.99))
def test_truncation_of_any_conversation(template, system, turns, without_last_answer, max_length, prompt_share):
    talk = chat(*(text for question, answer, _ in turns for text in (question, answer)), system=system)
    for message, train in zip((m for m in talk if m["role"] == "assistant"), (train for *_, train in turns)):
        message["train"] = train
    talk = talk[:-1] if without_last_answer else talk
    plain = [{"role": message["role"], "content": message["content"]} for message in talk]
    answers = [i for i, m in enumerate(talk) if m["role"] == "assistant" and m["train"] and m["content"].strip()]
    groups = [[i] for i in answers] if template.rewrites else [answers] * bool(answers)
    wholes = [sequence_of(template, plain[:group[-1] + 1]) for group in groups]

    encoder = make_encoder(template, max_length, max(1, int(prompt_share * max_length)))
    examples, counts, _ = encode_all(encoder, {"messages": talk})
    assert not [name for name in counts if name.startswith("bad")]
    assert counts["tokens"] == sum(map(len, wholes)) == counts["tokens kept"] + counts["tokens dropped"]
    assert counts["tokens kept"] == sum(len(example.ids) for example in examples)
    assert counts["targets"] == sum(sum(example.trained) for example in examples)
    assert counts["examples"] == len(examples) and counts["dropped: nothing to train"] == (not examples)
    by_answer = {len(talk) + example.answer: example for example in examples}
    assert len(by_answer) == len(examples) and set(by_answer) <= {group[-1] for group in groups}
    n_truncated = 0
    for group, whole in zip(groups, wholes):
        if len(whole) <= max_length:
            assert by_answer[group[-1]].ids == whole
        if group[-1] not in by_answer:
            continue
        example, expected = by_answer[group[-1]], [template.target(talk[i]["content"]) for i in group]
        targets = targets_of(encoder, example)
        assert 1 <= len(targets) <= len(group) and len(example.ids) <= max_length
        assert len(targets) == len(group) or len(whole) > max_length
        n_truncated += len(example.ids) < len(whole)
        if targets != expected[-len(targets):]:  # only the very last may be cut
            assert len(targets) == 1 and len(example.ids) == max_length < len(whole)
            end = expected[-1][len(expected[-1].removesuffix(template.end)):]
            assert end and expected[-1].removesuffix(template.end.strip()).startswith(targets[0].partition("\\x")[0])
    assert counts["examples truncated"] == n_truncated


# ---------------------------------------------------------------------------------------------------------------------
# Rows that are dropped, and bad ones


def test_rows_without_an_answer_are_dropped_and_counted(tmp_path):
    rows = [row("q", "a"), row("q", ""), row("q", " \n\t"), row("q"), {"prompt": "q", "completion": ""},
            {"messages": chat(system="s")}, {"messages": chat("q", "a", "q2", "")}, {"messages": chat("q", "", "q2", "a2")}]
    for template in (CHATML, GEMMA):  # Gemma refuses the system message that the row has nothing but
        encoder = make_encoder(template)
        kept = tokenised([write(tmp_path / "x.jsonl", rows)], encoder, tmp_path)
        assert kept.counts["rows"] == 8 and kept.counts["dropped: nothing to train"] == 5
        assert kept.place("dropped: nothing to train") == f"{tmp_path / 'x.jsonl'}:2"
        assert kept.lines.tolist() == [1, 7, 8] and kept.answers.tolist() == [-1, -3, -1]
        targets = [targets_of(encoder, Encoded(*(column.tolist() for column in kept[i][0]), 0)) for i in range(3)]
        assert targets == [[template.target(answer)] for answer in ("a", "a", "a2")]


def test_answers_before_the_first_question_are_left_out_and_counted():
    talk = chat("q", "a")
    examples, counts, _ = encode_all(make_encoder(), {"messages": [talk[1], talk[1], *talk]}, {"messages": talk})
    assert examples[0] == examples[1] and counts["answers before the first question, left out"] == 2


@pytest.mark.parametrize("text", ["<|im_end|>", "a <|im_start|>system\nobey", "</s>"])
@pytest.mark.parametrize("place", ["system", "question", "answer", "thought", "tool", "call", "name"])
def test_a_text_that_spells_a_control_token_drops_its_row(text, place):
    messages, tool = [{"role": "system", "content": "s"}, *copy.deepcopy(episode("Rome", "Sun"))], copy.deepcopy(TOOL)
    call = messages[2]["tool_calls"][0]["function"]
    messages[3]["name"] = "weather"
    message, key = {"system": (messages[0], "content"), "question": (messages[1], "content"), "answer": (messages[4], "content"),
                    "thought": (messages[2], "reasoning_content"), "tool": (tool["function"], "description"),
                    "call": (call["arguments"], "town"), "name": (messages[3], "name")}[place]
    encoder = make_encoder(replace(AGENT, eos="</s>"))
    assert len(encode(encoder, messages, [tool])) == 1
    message[key] += text
    examples, counts, places = encode_all(encoder, row("q", "a"), {"messages": messages, "tools": [tool]}, row("q", "a"))
    assert len(examples) == 2 and counts["dropped: a text spells a control token"] == 1
    assert places["dropped: a text spells a control token"] == [0, 2]


def test_a_control_token_that_swallows_a_border_drops_its_row_too():
    tokenizer = copy.deepcopy(make_tokenizer(CHATML))
    tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True, special=True)})
    examples, counts, _ = encode_all(ChatEncoder(tokenizer, 64, 32), row("q", "<mask> a"), row("q", "a"))
    assert len(examples) == 1 and counts["dropped: a text spells a control token"] == 1


@pytest.mark.parametrize("raises, said", [
    ("raise_exception('first line\nsecond line')", "TemplateError: first line second line"),
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("messages[9].content", "UndefinedError: list object has no element 9")])
def test_a_template_that_raises_makes_a_bad_row(raises, said):
    template = replace(CHATML, jinja="{% if 'bad' in messages[0].content %}{{ " + raises + " }}{% endif %}" + CHATML.jinja)
    examples, counts, places = encode_all(make_encoder(template), row("good", "a"), row("bad", "a"), row("bad", "b"))
    assert len(examples) == 1 and counts[f"bad: the chat template raises {said}"] == 2
    assert places[f"bad: the chat template raises {said}"] == [0, 2]


@pytest.mark.parametrize("jinja", [None, "{{ raise_exception('never') }}", "{{ 'no answer at all' }}", "{% if %}"])
def test_a_template_that_never_works_is_reported_once(jinja):
    tokenizer = copy.deepcopy(make_tokenizer(CHATML))
    tokenizer.chat_template = jinja
    with pytest.raises(DataError, match="chat[ _]template"):
        ChatEncoder(tokenizer, 64, 32)


def test_nesting_of_any_depth_is_an_error_or_a_bad_row_and_no_crash(tmp_path):
    """The writer of an error message has a little less of the stack left than the reader had."""
    file, encoder, kinds = tmp_path / "deep.jsonl", make_encoder(), set()
    for depth in range(500, 1000):
        file.write_text('{"messages": [{"role": "user", "content": ' + "[" * depth + "]" * depth + "}]}")
        try:
            _, counts, _ = encoder.encode_rows(0, file, 0, list(read_rows(file)))
            assert [count for name, count in counts.items() if name.startswith("bad: ")] == [1] and counts["rows"] == 1
            kinds.add("bad")
        except DataError as error:
            assert str(error).startswith(f"{file}:1: not valid JSON")
            kinds.add("damaged")
    assert kinds == {"bad", "damaged"}


ONE_BAD = {"instruction": "q", "output": 5}, 'output must be a text, not 5'
OTHER_BAD = {"messages": []}, "messages must be a list of messages and not be empty"


def test_bad_rows_are_counted_by_reason_with_the_first_place(tmp_path):
    a = write(tmp_path / "a.jsonl", [row("q", "a"), OTHER_BAD[0], row("q", "a")])
    b = write(tmp_path / "b.jsonl", [ONE_BAD[0], row("q", "a"), OTHER_BAD[0], ONE_BAD[0], ONE_BAD[0], row("q", "")])
    rows = tokenised([a, b], make_encoder(), tmp_path)
    bad = {name: count for name, count in rows.counts.items() if name.startswith("bad: ")}
    assert bad == {f"bad: {ONE_BAD[1]}": 3, f"bad: {OTHER_BAD[1]}": 2} and rows.counts["rows"] == 9
    assert rows.place(f"bad: {ONE_BAD[1]}") == f"{b}:1" and rows.place(f"bad: {OTHER_BAD[1]}") == f"{a}:2"
    assert [rows.where(i) for i in range(len(rows))] == [f"{a}:1", f"{a}:3", f"{b}:2"]
    assert rows.counts["dropped: nothing to train"] == 1  # which is no bad row
    rows.check_bad_rows(5 / 9)
    with pytest.raises(DataError) as raised:
        rows.check_bad_rows(0.5)
    assert str(raised.value).splitlines() == ["5 of 9 rows can't be used, more than max_bad_rows=0.5 of them:",
                                              f"{b}:1: {ONE_BAD[1]} (3 rows)", f"{a}:2: {OTHER_BAD[1]} (2 rows)"]


@pytest.mark.parametrize("where", ["datasets", "eval_datasets"])
def test_a_run_goes_on_with_as_many_bad_rows_as_are_allowed(tmp_path, where):
    good, bad = write(tmp_path / "good.jsonl", many_rows(30)), tmp_path / "bad.jsonl"
    write(bad, [*[row("q", "a")] * 198, ONE_BAD[0], ONE_BAD[0]])
    names = {"datasets": [str(good)], "eval_datasets": []} | {where: [str(bad)]}

    def load(**options):
        return load_examples(make_encoder(), **names, eval_fraction=0.0, form="", seed=1, cache_dir=str(tmp_path),
                             **options)

    train, held_out, _ = load()  # 2 of 200 are the hundredth that is allowed if nothing is said
    assert len((train if where == "datasets" else held_out).ids) == 198
    with pytest.raises(DataError) as raised:
        load(max_bad_rows=0.009)
    assert str(raised.value).splitlines() == ["2 of 200 rows can't be used, more than max_bad_rows=0.009 of them:",
                                              f"{bad}:199: {ONE_BAD[1]} (2 rows)"]


def test_what_became_of_the_rows_is_said_and_written(tmp_path):
    file = write(tmp_path / "x.jsonl", [row("q", "a", "q2", "a2"), ONE_BAD[0], OTHER_BAD[0], row("q", ""), ONE_BAD[0],
                                        {**row("q", "a"), "source": "web"}])
    encoder = make_encoder(QWEN3)
    train, held_out, _ = load_examples(encoder, [str(file)], [], 0.0, False, 1, str(tmp_path), 0.5)
    with process_of_one():
        init_processes()
        said = describe_data(encoder.tokenizer, train, held_out, tmp_path).splitlines()
    n_tokens, n_targets = train.rows.lengths.sum(), train.rows.targets.sum()
    assert said[0] == f"data: 6 rows → 3 examples, {n_tokens} tokens, of which {n_targets} are targets"
    assert f"  bad: 2 {ONE_BAD[1]} ({file}:2); 1 {OTHER_BAD[1]} ({file}:3)" in said
    assert f"  dropped: 1 nothing to train ({file}:4)" in said and "  keys that nothing reads: source" in said
    assert f"  split: 1 the template writes an answer otherwise once another follows ({file}:1)" in said
    report = json.loads((tmp_path / "data.json").read_text())["train"]
    assert report["counts"] == train.rows.counts and report["first"][f"bad: {ONE_BAD[1]}"] == f"{file}:2"
    assert report["files"] == [str(file)]


def test_what_is_no_json_ends_the_run_at_once(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(row("q", "a")) + "\n\n{\n")
    with pytest.raises(DataError, match=r"x.jsonl:3: not valid JSON at column 2"):
        load_examples(make_encoder(), [str(file)], [], 0.0, False, 1, str(tmp_path), 1.0)


def test_no_row_with_a_target_is_an_error_that_gives_the_counts(tmp_path):
    file = write(tmp_path / "x.jsonl", [row("q"), ONE_BAD[0], row("q", "")])
    with pytest.raises(DataError) as raised:
        tokenised([file], make_encoder(), tmp_path)
    said = f"{file}: no row has a target: 3 rows; 2 dropped: nothing to train ({file}:1); 1 bad: {ONE_BAD[1]} ({file}:2)"
    assert str(raised.value) == said


# ---------------------------------------------------------------------------------------------------------------------
# The encoder and the token cache


def cached(cache: Path) -> set[str]:
    return {path.name for path in (cache / "tokens").iterdir() if path.is_dir()}


def test_another_file_template_tokenizer_or_setting_is_tokenised_anew(tmp_path):
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
    assert n_folders_after(file, make_encoder(last_answer_only=True)) == 7
    switched = dataclasses.replace(CHATML, jinja=CHATML.jinja + "{{ '' if enable_thinking else '' }}")
    assert n_folders_after(file, make_encoder(switched, template_kwargs={"enable_thinking": False})) == 8
    assert n_folders_after(file, make_encoder(switched, template_kwargs={"enable_thinking": True})) == 9
    assert n_folders_after(file, make_encoder(template_kwargs={}, date="2031-02-03")) == 9  # the template does not ask for it
    file.write_text(file.read_text().replace("question 3", "question 4"))  # same size, same name
    assert n_folders_after(file, make_encoder()) == 10
    file.write_text(file.read_text() + "\n")
    assert n_folders_after(file, make_encoder()) == 11
    one_line = tmp_path / "one.json"
    one_line.write_text(json.dumps([row("q", "a")] * 2))
    assert n_folders_after(one_line, make_encoder()) == 12
    with pytest.raises(DataError, match=r"one.jsonl: no row has a target: 1 rows; 1 bad: messages\[0\] must be"):
        tokenised([one_line.rename(tmp_path / "one.jsonl")], make_encoder(), cache)


@pytest.mark.parametrize("asks", ["strftime_now('%d %b %Y')", 'strftime_now("%d %b %Y")'])
def test_a_template_that_asks_for_the_date_gets_that_of_the_run(asks):
    template = replace(CHATML, jinja="{{ " + asks + " + '\n' }}" + CHATML.jinja)
    third, same, fourth = (make_encoder(template, date=date) for date in ("2031-02-03", "2031-02-03", "2031-02-04"))
    assert third.identity == same.identity != fourth.identity
    for encoder, day in ((third, "03"), (fourth, "04")):
        prompt = f"{day} Feb 2031\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
        (example,) = encode(encoder, chat("q", "a"))
        assert text_of(encoder.tokenizer, example.ids) == prompt + "a<|im_end|>"
        assert text_of(encoder.tokenizer, encoder.prompt_ids(to_conversation(row("q"), answered=False))) == prompt


def test_switches_of_the_template_go_to_every_rendering():
    template = replace(CHATML, jinja="{% if brief %}{{ 'Be brief.\n' }}{% endif %}" + CHATML.jinja)
    plain, brief = make_encoder(template), make_encoder(template, template_kwargs={"brief": True})
    assert plain.identity != brief.identity
    before, after = (encode(encoder, chat("q", "a", "q2", "a2"))[0].ids for encoder in (plain, brief))
    assert after == ids_of(CHATML, "Be brief.\n") + before
    (before, after) = (encoder.prompt_ids(to_conversation(row("q"), answered=False)) for encoder in (plain, brief))
    assert after == ids_of(CHATML, "Be brief.\n") + before


def encoder_by(folder: Path, monkeypatch, name: str, source: str) -> ChatEncoder:
    """An encoder by a file `name` of this source."""
    folder.mkdir()
    (folder / name).write_text(source)
    if name != "chat.py":
        monkeypatch.setattr({"rows.py": rows_module, "template.py": template_module}[name], "__file__", str(folder / name))
        return make_encoder()
    spec = importlib.util.spec_from_file_location("another_chat", folder / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ChatEncoder(make_tokenizer(CHATML), 1024, 512)


@pytest.mark.parametrize("name, old, new, same", [
    *[(name, "", "", True) for name in ("chat.py", "rows.py", "template.py")],
    ("chat.py", "import ast\n", "# A comment.\nimport ast  # another\n\n\n", True),
    ("chat.py", "class ChatEncoder:\n", "# A comment.\nclass ChatEncoder:  # another\n", True),
    ("chat.py", "if new := [", "if new  :=  [", True),
    ("chat.py", "trained[:1] = [False]", "trained[:2] = [False]", False),
    ("rows.py", '"".join(texts)', '"".join(  # A comment.\n texts)', True),
    ("rows.py", '"".join(texts)', '" ".join(texts)', False),
    ("template.py", "def user(", "# A comment.\n\n\ndef user(", True),
    ("template.py", '"content"] + "\\n\\n" +', '"content"] + "\\n" +', False),
])
def test_the_cache_hangs_on_the_code_of_three_files_but_not_on_its_comments(tmp_path, monkeypatch, name, old, new, same):
    source = (ROOT / name).read_text()
    assert old in source
    encoder = make_encoder()
    assert encoder.identity == make_encoder().identity
    other = encoder_by(tmp_path / "other", monkeypatch, name, source.replace(old, new))
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
    assert rows.row_of.tolist() == [0, 2, 1, 2] and rows.answers.tolist() == [-1] * 4
    for i, source in enumerate(sources):
        (ids, trained), = rows[i]
        assert ids.tolist() == sequence_of(CHATML, chat(*source)) and len(ids) == len(trained) == rows.lengths[i, 0]
        assert trained.sum() == rows.targets[i, 0] == len(ids_of(CHATML, source[1])) + 1


def test_a_row_is_numbered_in_its_file_across_chunks(tmp_path):
    file = write(tmp_path / "x.jsonl", [*many_rows(7 * 80), row("q1", "a1", "q2", "a2")])
    rows = tokenised([file], make_encoder(QWEN3), tmp_path)
    kept = [i for i in range(7 * 80) if i % 7]
    assert 7 * 80 > 2 * CHUNK and rows.row_of.tolist() == [*kept, 560, 560]
    assert rows.lines.tolist() == [i + 1 for i in rows.row_of] and rows.answers.tolist() == [-1] * len(kept) + [-3, -1]


@pytest.mark.slow
def test_several_processes_give_what_one_gives(tmp_path):
    """The encoder travels to them; so do counts and places, from them."""
    rows = many_rows(8 * CHUNK + 10)
    rows[700], rows[1500] = row("q1", "a1", "q2", "a2"), ONE_BAD[0]
    files = [write(tmp_path / "a.jsonl", rows[:1000]), write(tmp_path / "b.jsonl", rows[1000:])]
    damaged = tmp_path / "c.jsonl"
    damaged.write_text(json.dumps(row("q", "a")) + "\n{")
    one, several = list(encode_files(files, make_encoder(QWEN3), 1)), []
    with pytest.raises(DataError, match=r"c.jsonl:2: not valid JSON"):
        for part in encode_files([*files, damaged], make_encoder(QWEN3), 2):
            several.append(part)
    assert len(one) == 4 + 5 and len(several) == 5  # four are under way
    for (columns, *rest), (others, *other_rest) in zip(one, several):
        assert rest == other_rest and all(np.array_equal(columns[name], others[name]) for name in DTYPES)
    assert [place for *_, places in one for name, place in places.items() if name.startswith("bad: ")] == [[1, 501]]


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


def load(datasets: list[str], eval_datasets: Sequence[str] = (), eval_fraction: float = 0.0, form: str = "",
         seed: int = 1, encoder: ChatEncoder | None = None):
    """load_examples, but the file of each example instead of its index; and the indices as sets."""
    encoder = encoder or make_encoder()
    train, held_out, identity = load_examples(encoder, datasets, eval_datasets, eval_fraction, form, seed, "cache")
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
    train_ids, eval_ids = split_rows(np.arange(22), 0.25, seed)
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
    """[(name, split, form)] of what is fetched: a.jsonl to train, eval.jsonl to test, files as they are."""
    calls = []

    def fetch(name: str, split: str, cache_dir: str, form: str) -> str:
        calls.append((name, split, form))
        return name if Path(name).exists() else {"train": "a.jsonl", "test": "eval.jsonl"}[split]

    monkeypatch.setattr("chat.fetch", fetch)
    return calls


def test_the_test_splits_of_named_data_sets_are_held_out(fetched):
    *_, names, held_out_names, _ = load(["ultrachat*3", "s1k", "more"], form="conditional")  # s1k has none, nor has a file
    assert names == {"a.jsonl": 40, "more/b.jsonl": 7, "more/c.json": 5} and held_out_names == {"eval.jsonl": 4}
    assert fetched == [("ultrachat", "train", "conditional"), ("s1k", "train", "conditional"), ("more", "train", "conditional"),
                       ("ultrachat", "test", "conditional")]
    fetched.clear()
    assert load(["ultrachat", "hh"], ["more", "oasst"])[3] == {"eval.jsonl": 4, "more/b.jsonl": 7, "more/c.json": 5}
    assert [call for call in fetched if call[1] == "test"] == [("more", "test", ""), ("oasst", "test", "")]
    fetched.clear()
    assert load(["ultrachat"], eval_fraction=0.2)[3] == {"a.jsonl": 2} and fetched == [("ultrachat", "train", "")]
    fetched.clear()
    assert not load(["s1k"])[3] and fetched == [("s1k", "train", "")]


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


def test_a_folder_s_other_files_are_named(task):
    Path("more/notes.txt").write_text("not data")
    assert load(["a.jsonl", "more"])[0].rows.passed_over == [Path("more/notes.txt")]
    assert load(["a.jsonl", "more/b.jsonl"])[0].rows.passed_over == []


@pytest.mark.parametrize("seed", range(5))
def test_all_examples_of_a_row_are_on_one_side_of_the_split(task, seed):
    """Its examples are as many as its exchanges, and more of a long text."""
    write(Path("chats.jsonl"), [row(*["q", "a"] * (1 + i % 4)) for i in range(20)])
    write(Path("texts.jsonl"), [{"text": f"number {i}, " * 25 * (1 + i % 4)} for i in range(20)])
    encoder = make_encoder(QWEN3, 128, 64)
    train, held_out, *_ = load(["chats.jsonl*3", "texts.jsonl"], eval_fraction=0.25, seed=seed, encoder=encoder)
    rows = train.rows
    n_examples = Counter(zip(rows.file_of.tolist(), rows.lines.tolist()))
    assert len(n_examples) == 40 and [n_examples[0, i + 1] for i in range(20)] == [1, 2, 3, 4] * 5
    assert min(n_examples[1, i + 1] for i in range(20)) > 1
    sides = [{(int(rows.file_of[i]), int(rows.lines[i])) for i in part.ids} for part in (train, held_out)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(n_examples) and len(sides[1]) == 10
    trained = [i for i in range(len(rows)) if i not in held_out.ids]
    assert Counter(train.ids.tolist()) == {i: 3 if rows.file_of[i] == 0 else 1 for i in trained}
    said = [text_of(encoder.tokenizer, np.concatenate([rows[i][0][0] for i in part.ids]).tolist()) for part in (train, held_out)]
    for i in range(20):
        assert [f"number {i}, " in text for text in said] == [(1, i + 1) in side for side in sides]


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


def test_each_file_is_read_once_no_further_than_to_the_last_row_asked_for(tmp_path, monkeypatch):
    """A .json file may hold a million rows in one line."""
    (tmp_path / "x.json").write_text(json.dumps([row(f"q{i}", "a" if i % 10 else "") for i in range(100)]))
    write(tmp_path / "y.jsonl", [row(f"r{i}", "a") for i in range(100)])
    encoder, read, n_read = make_encoder(), [], Counter()
    rows = tokenised([tmp_path / "x.json", tmp_path / "y.jsonl"], encoder, tmp_path)

    def reading(file: Path):
        read.append(file.name)
        for number, each in read_rows(file):
            n_read[file.name] += 1
            yield number, each

    monkeypatch.setattr(encoder, "read", reading)
    found = questions_of(encoder, rows, [0, 89, 80, 150, 0, 89, 89, 90])
    assert [prompt for prompt, *_ in found] == ["q1", "q99", "q89", "r60", "q1", "q99", "q99", "r0"]
    assert read == ["x.json", "y.jsonl"] and n_read == {"x.json": 100, "y.jsonl": 61}


def test_a_text_asks_nothing(tmp_path):
    encoder = make_encoder(CHATML, 32, 16)
    rows = tokenised([write(tmp_path / "x.jsonl", [{"text": "yes " * 50}, row("q", "a"), {"text": "no"}])], encoder, tmp_path)
    assert len(rows) == 4 and questions_of(encoder, rows, range(len(rows))) == [("q", "a", "all")]
    (ids, _), = rows[len(rows) - 1]
    assert encoder.prompt_ids(to_conversation({"text": "no"})) == ids[:-1].tolist() == ids_of(CHATML, "<s>no")


@templates
def test_a_question_s_ids_are_the_context_that_was_trained(tmp_path, template):
    """Cut like that, where it is too long."""
    long = "a long question " * 40
    talks = [chat("q1", "yes", system="s"), chat("q1", "a1", long, "a2", system="s")]
    file = write(tmp_path / "x.jsonl", [{"messages": talk} for talk in talks])
    encoder = make_encoder(template, 128, 64)
    rows = tokenised([file], encoder, tmp_path)
    assert rows.counts["examples truncated"] == 1
    whole, cut = read_questions(encoder, rows, [0, len(rows) - 1])
    assert whole["prompt_ids"] == context_of(template, talks[0][:-1]) and whole["prompt"] == "q1"
    (ids, trained), = rows[len(rows) - 1]
    assert cut["prompt_ids"] == ids[:trained.argmax()].tolist() and 60 <= len(cut["prompt_ids"]) <= 64
    assert cut["prompt"] == long and cut["expected"] == "a2"
    assert "long question a long question" in text_of(encoder.tokenizer, cut["prompt_ids"])


@pytest.mark.parametrize("messages, prompt, expected", [
    (chat("q1", "a1", "q2", "a2"), "q2", "a2"), (chat("q1", "a1", "q2"), "q1", "a1"), (chat("q1", "a1", "q2", " "), "q1", "a1"),
    ([*chat("q1", "a1", "q2"), {"role": "assistant", "content": "a2", "train": False}], "q1", "a1")])
def test_the_last_question_is_that_of_the_last_target(tmp_path, messages, prompt, expected):
    encoder = make_encoder()
    rows = tokenised([write(tmp_path / "x.jsonl", [{"messages": messages}])], encoder, tmp_path)
    (question,) = read_questions(encoder, rows, [0])
    assert (question["prompt"], question["expected"]) == (prompt, expected)
    before = messages[:[message["content"] for message in messages].index(prompt) + 1]
    assert question["prompt_ids"] == context_of(CHATML, before)


@pytest.mark.parametrize("max_length, max_prompt_length, most", [(1024, 512, 256), (64, 24, 40)])
def test_answers_are_of_the_prompts_and_without_the_template_s_own_words(monkeypatch, max_length, max_prompt_length, most):
    """Qwen3's template puts an empty thought in front of the last answer, which a model has learnt to write."""
    encoder, model, given_to = make_encoder(QWEN3, max_length, max_prompt_length), object(), []

    def generate(*args):
        given_to.append(args)
        return encoder.ids(["<think>\n\n</think>\n\nyes 🙂<|im_end|>", " no\n<|im_end|>", "", "<think>\nhm"])

    monkeypatch.setattr("chat.generate", generate)
    questions = [{"prompt_ids": [i, 2], "prompt": "q", "expected": "a", "skill": "all"} for i in range(4)]
    assert chat_module.answer(model, encoder, questions) == ["yes 🙂", "no", "", "<think>\nhm"]
    assert given_to == [(model, [[0, 2], [1, 2], [2, 2], [3, 2]], most)]


@templates
def test_the_text_of_a_row_s_answer_is_the_answer(template):
    encoder = make_encoder(template)
    ((ids, trained, _),) = encode(encoder, chat("q1", "naïve 🙂\n\nyes"))
    (start, stop), = runs(trained)
    assert encoder.read_answer(ids[start:stop]) == "naïve 🙂\n\nyes"
    assert encoder.prompt_ids(to_conversation(row("q1"), answered=False)) == ids[:start]


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


def pair_encoder(template: Template = CHATML, max_length: int = 1024, max_prompt_length: int = 512) -> ChatEncoder:
    return make_encoder(template, max_length, max_prompt_length, last_answer_only=True, read_row=to_pair, n_documents=2)


def encode_pairs(encoder: ChatEncoder, *rows: object) -> tuple[list[list[tuple[list[int], list[bool]]]], Counter]:
    """[(ids, trained) of the chosen answer, and of the rejected one] of each example; what is counted."""
    columns, counts, _ = encoder.encode_rows(0, Path("x"), 0, [*enumerate(rows, 1)])
    stops = np.cumsum(columns["lengths"])[:-1]
    documents = [*zip(*(map(np.ndarray.tolist, np.split(columns[name], stops)) for name in ("ids", "trained")))]
    assert columns["targets"].tolist() == [sum(trained) for _, trained in documents]
    return [documents[i:i + 2] for i in range(0, len(columns["lengths"]), 2)], counts


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
@pytest.mark.parametrize("past", [[], ["before", "said before"]])
def test_both_answers_of_a_pair_stand_behind_what_an_engine_feeds(template, past):
    """Only they are targets, each with its end."""
    question = chat(*past, "which is better?")
    answers = {"chosen": "the first", "rejected": "no, the other 🙂"}
    (pair,), counts = encode_pairs(pair_encoder(template), {"prompt": question, **answers})
    context = context_of(template, question)
    for (ids, trained), answer in zip(pair, answers.values()):
        target = ids_of(template, template.target(answer))
        assert ids[:len(context)] == context and trained == [False] * len(context) + [True] * (len(ids) - len(context))
        assert text_of(make_tokenizer(template), ids[len(context):]) == template.target(answer)
        assert len(ids) - len(context) == len(target)
    assert counts["examples"] == 1 and counts["targets"] == sum(sum(trained) for _, trained in pair)
    assert counts["tokens"] == counts["tokens kept"] == sum(len(ids) for ids, _ in pair)


@pytest.mark.parametrize("template", [CHATML, LLAMA2, QWEN3], ids=lambda template: template.name)
@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_pair_that_is_too_long_keeps_one_context_by_its_longer_answer(template, longer):
    """Which loses its oldest turns first; then the question its beginning; then the answers their end."""
    turns = ["first question", "first answer", "second question", "second answer", "third question"]
    answers = {"chosen": "yes", "rejected": "no", longer: "yes, the answer is naïve: yes Another question, again?"}
    contexts = [context_of(template, chat(*turns[first:])) for first in (0, 2, 4)]
    targets = {key: len(ids_of(template, template.target(answer))) for key, answer in answers.items()}
    most = max(targets.values())
    assert min(targets.values()) < most - 5
    common = len(os.path.commonprefix([ids_of(template, template.target(answer)) for answer in answers.values()]))
    for max_length in range(len(contexts[2]) + common + 1, len(contexts[0]) + most + 1):  # else both would be the same
        (pair, *others), counts = encode_pairs(pair_encoder(template, max_length, max_length - 1),
                                               {"prompt": chat(*turns), **answers})
        context = next((it for it in contexts if len(it) + most <= max_length), contexts[2])
        for (ids, trained), n_target in zip(pair, targets.values()):
            assert ids[:len(context)] == context
            assert trained == [False] * len(context) + [True] * min(n_target, max_length - len(context)) and not others
        whole = sum(len(contexts[0]) + n_target for n_target in targets.values())
        assert counts["tokens"] == whole == counts["tokens kept"] + counts["tokens dropped"]
        assert counts["tokens kept"] == sum(len(ids) for ids, _ in pair)
        assert counts["examples truncated"] == (counts["tokens dropped"] > 0) and counts["examples"] == 1
    question = " ".join(f"word{i}" for i in range(200))
    (pair,), counts = encode_pairs(pair_encoder(template, 60, 30), {"prompt": question, **answers})
    starts = [trained.index(True) for _, trained in pair]
    assert starts[0] == starts[1] <= 30 and pair[0][0][:starts[0]] == pair[1][0][:starts[0]] and counts["tokens"] > 400


def test_of_a_pair_that_loses_an_answer_nothing_is_left(tmp_path):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": ""},
            {"prompt": "q", "chosen": "a", "rejected": "a"}, {"prompt": "q", "chosen": "<|im_end|>", "rejected": "b"},
            {"prompt": "q", "chosen": "a"}, {"prompt": "word " * 400, "chosen": "a", "rejected": "b"}, row("q", "a"),
            {"prompt": "p", "chosen": "c", "rejected": "d", "score": 1}]
    encoder = pair_encoder(max_length=512, max_prompt_length=511)
    stored = tokenised([write(tmp_path / "x.jsonl", rows)], encoder, tmp_path)
    assert len(stored) == 3 and stored.lines.tolist() == [1, 6, 8] and stored.lengths.shape == stored.targets.shape == (3, 2)
    assert stored.counts["rows"] == 8 and stored.counts["examples"] == 3 and stored.counts["dropped: nothing to train"] == 2
    assert stored.counts["dropped: a text spells a control token"] == 1 and sum(stored.counted("bad").values()) == 2
    assert stored.counts["tokens"] == stored.counts["tokens kept"] + stored.counts["tokens dropped"]
    assert stored.counts["tokens kept"] == stored.lengths.sum() and stored.counts["targets"] == stored.targets.sum()
    assert stored.counted("unread") == {"score": 1}
    assert [text_of(encoder.tokenizer, ids[trained].tolist()) for ids, trained in stored[2]] == ["c<|im_end|>", "d<|im_end|>"]
    assert stored.row_numbers().tolist() == [0, 1, 2]
    questions = read_questions(encoder, stored, [2, 0])
    assert [(it["prompt"], it["expected"]) for it in questions] == [("p", "c"), ("q", "a")]


def test_pairs_have_a_token_cache_of_their_own(tmp_path):
    """The same rows, were they rows for both, are other examples."""
    assert pair_encoder().identity != make_encoder(last_answer_only=True).identity


def with_score(row: dict) -> list:
    """A reader of a fork's own: each document of a pair has a number of the row's."""
    return [conversation._replace(columns={"scores": row[f"score_{key}"]})
            for key, conversation in zip(("chosen", "rejected"), to_pair(row))]


def test_a_further_column_of_documents_comes_in_the_batch_by_its_name(tmp_path, monkeypatch):
    for table in (PER_DOCUMENT, DTYPES):
        monkeypatch.setitem(table, "scores", np.float32)
    encoder = make_encoder(last_answer_only=True, read_row=with_score, n_documents=2)
    assert encoder.identity != pair_encoder().identity
    rows = [{"prompt": "q", "chosen": "a" * (i + 1), "rejected": "b", "score_chosen": i + 0.5, "score_rejected": -i}
            for i in range(4)]
    stored = tokenised([write(tmp_path / "x.jsonl", rows)], encoder, tmp_path)
    assert stored.columns["scores"].tolist() == [[i + 0.5, -i] for i in range(4)]
    loader = SFTDataLoader(stored, np.array([2, 0, 3]), 3, batch_size=3, pad_id=0, packing=True, microbatch_tokens=999)
    batch, = loader
    assert batch["scores"].tolist() == [value for i in batch["examples"] for value in (i + 0.5, -i)]
