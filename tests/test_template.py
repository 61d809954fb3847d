"""Chat templates of many habits, and what the context and the target of an answer are with each: written out by hand.

An example is written as its text with its targets in «»: each is what the model must write behind what an engine feeds.
Rows go through ChatEncoder.encode_rows, with a small tokenizer trained on the spot, and are decoded again.
"""

import copy
import io
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from chat import ChatEncoder
from data import DataError
from model_utils import load_tokenizer
from rows import to_conversation

# ---------------------------------------------------------------------------------------------------------------------
# Rows, tokenizers, and what is compared


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def ask(text: str) -> dict:
    return {"role": "user", "content": text}


def reply(text: str = "", thought: str = "", calls: Sequence[dict] = (), **more) -> dict:
    return {"role": "assistant", "content": text, **({"reasoning_content": thought} if thought else {}),
            **({"tool_calls": list(calls)} if calls else {}), **more}


def call(port: str, id: str = "abcd12345", name: str = "tide") -> dict:
    return {"type": "function", "id": id, "function": {"name": name, "arguments": {"port": port}}}


def result(text: str, id: str = "abcd12345", name: str = "tide") -> dict:
    return {"role": "tool", "content": text, "tool_call_id": id, "name": name}


TIDE, WIND = [{"type": "function", "function": {"name": name, "description": f"The {name} at a port", "parameters": {
    "type": "object", "properties": {"port": {"type": "string", "description": "its name"}}, "required": ["port"]}}}
    for name in ("tide", "wind")]


def each(templates: Iterable["Template"]):
    return pytest.mark.parametrize("template", [*templates], ids=lambda template: template.name)


def joined(text: str) -> str:
    """A template without the line breaks that make it readable here."""
    return "".join(line.strip() for line in text.splitlines())


@dataclass(frozen=True)
class Template:
    name: str
    jinja: str
    control: str  # its control tokens
    eos: str
    ends: str  # what answers end with
    thoughts: str = ""  # where it reads thoughts: "content", or a message's key
    tools: bool = False
    folds_system: bool = False  # it knows no system message: that goes with the first question
    kwargs: str = "{}"


WORDS = ["user\n", "assistant\n\n", "system\n\n", "model\n", "\n   return x\n\n", "one two three\n\n\n", "Tide at Kiel: 2 m\n",
         "<think>\n\n</think>\n\n", "hm\n</think>\n\nyes", ": yes : no", "tide wind port Kiel {\"port\": \"Kiel\"}"]


@cache
def make_tokenizer(template: Template) -> PreTrainedTokenizerFast:
    """A byte-level BPE, whose words are GPT-2's, in which runs of white space and words with a space are tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(WORDS * 4, trainers.BpeTrainer(
        vocab_size=350, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                for token in dict.fromkeys(["<bos>", template.eos, *template.control.split()])])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=template.eos, pad_token=template.eos,
                                   chat_template=template.jinja)


@cache
def make_encoder(template: Template, max_length: int = 4096, **options) -> ChatEncoder:
    kwargs = json.loads(template.kwargs) | json.loads(options.pop("kwargs", "{}"))
    return ChatEncoder(make_tokenizer(template), max_length, max_length // 2, template_kwargs=kwargs,
                       **{"date": "2031-05-06"} | options)


def encode(encoder: ChatEncoder, row: dict) -> tuple[list[tuple[list[int], list[bool]]], dict]:
    """A row → (its examples, the counts that are not 0). What is always so is checked on the way."""
    columns, counts, _ = encoder.encode_rows(0, Path("rows.jsonl"), 0, [(1, copy.deepcopy(row))])
    stops = list(itertools.accumulate(columns["lengths"].tolist(), initial=0))
    ids, trained = columns["ids"].tolist(), columns["trained"].tolist()
    examples = [(ids[start:stop], trained[start:stop]) for start, stop in itertools.pairwise(stops)]
    assert len(ids) == len(trained) == stops[-1] and columns["targets"].sum() == sum(trained) == counts["targets"]
    assert counts["tokens"] == sum(trained) + trained.count(False) + counts["tokens dropped"]
    assert all(any(on) for _, on in examples) and counts["examples"] == len(examples)
    return examples, {name: n for name, n in counts.items() if n}


def spans(trained: list[bool]) -> list[tuple[int, int]]:
    """(start, stop) of each unbroken run of targets."""
    edges = [i for i, (a, b) in enumerate(itertools.pairwise([False, *map(bool, trained), False])) if a != b]
    return list(zip(edges[::2], edges[1::2]))


def pairs(encoder: ChatEncoder, examples: list[tuple[list[int], list[bool]]]) -> list[tuple[str, str]]:
    """Examples → (context, target) of each of their targets."""
    decode = encoder.tokenizer.decode
    return [(decode(ids[:start]), decode(ids[start:stop])) for ids, on in examples for start, stop in spans(on)]


def marked(encoder: ChatEncoder, examples: list[tuple[list[int], list[bool]]]) -> list[str]:
    """The text of each example, its targets in «»."""
    texts = []
    for ids, on in examples:
        text, position = "", 0
        for start, stop in spans(on):
            text += encoder.tokenizer.decode(ids[position:start]) + "«" + encoder.tokenizer.decode(ids[start:stop]) + "»"
            position = stop
        texts.append(text + encoder.tokenizer.decode(ids[position:]))
    return texts


def as_row(messages: list[dict]) -> dict:
    return {"messages": messages, "tools": [TIDE, WIND]} if any("tool_calls" in message for message in messages) else {
        "messages": messages}


def check(template: Template, messages: list[dict] | dict, *expected: str, **options) -> dict:
    """The row becomes the expected examples, token for token; returns the counts."""
    encoder = make_encoder(template, **options)
    examples, counts = encode(encoder, messages if isinstance(messages, dict) else as_row(messages))
    assert marked(encoder, examples) == [*expected], counts
    ids_of = lambda text: encoder.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    is_merged = "answers in the tokens that they were written in" in counts
    for ids, on in examples:
        for start, _ in spans(on)[:1 if is_merged else None]:
            assert ids[:start] == ids_of(encoder.tokenizer.decode(ids[:start]))
    assert not [name for name in counts if name.startswith(("bad", "dropped", "unread"))]
    return counts


def refusal(template: Template, row: list[dict] | dict, **options) -> str:
    """Why the row, of which nothing is left, is a bad one."""
    examples, counts = encode(make_encoder(template, **options), row if isinstance(row, dict) else as_row(row))
    assert examples == [] and counts.pop("rows") == 1
    (reason, n), = counts.items()
    assert n == 1
    return reason


# ---------------------------------------------------------------------------------------------------------------------
# Kinds: templates each of which has one habit

OPENS = "{% set opens = {'system': '<|sys|>', 'user': '<|ask|>', 'assistant': '<|reply|>', 'tool': '<|tool|>'} %}"
PROMPT = "{% if add_generation_prompt %}<|reply|>{% endif %}"
CONTROL = "<|sys|> <|ask|> <|reply|> <|tool|> <|stop|> <|over|> <|say|> <|call|>"
ONE, TWO = [ask("Red: what?"), reply("Red: a colour")], [ask("One?"), reply("eins"), ask("Two?"), reply("zwei")]
THINKS = [ask("One?"), reply("<think>\nhm\n</think>\n\neins"), ask("Two?"), reply("<think>\nho\n</think>\n\nzwei")]


def kind(name: str, jinja: str, ends: str = "<|stop|>", eos: str = "<|stop|>", **more) -> Template:
    return Template(name, joined(OPENS + jinja), CONTROL, eos, ends, **more)


ALWAYS_ASKS = kind("the next header stands behind every rendering", r"""
    {% for m in messages %}{{ opens[m.role] }}{{ m.content }}<|stop|>{% endfor %}<|reply|>""")
ALWAYS_ASKS_IN_TEXT = kind("the same in plain text", r"""
    {% for m in messages %}{{ {'user': 'Pupil', 'assistant': 'Master', 'system': 'Rule'}[m.role] }}: {{ m.content }}<|stop|>
    {{ '\n' }}{% endfor %}Master:""")
TWO_ENDS = kind("the end of the text behind the end of the last turn", r"""
    {% for m in messages %}{{ opens[m.role] }}{{ m.content }}<|over|>{{ '\n' }}{% endfor %}
    {% if add_generation_prompt %}<|reply|>{% else %}<|stop|>{% endif %}""", "<|over|>")
BETWEEN = kind("an end only between turns", r"""
    {% for m in messages %}{% if not loop.first %}<|stop|>{{ '\n' }}{% endif %}{{ opens[m.role] }}{{ m.content }}{% endfor %}
    {% if add_generation_prompt %}<|stop|>{{ '\n' }}<|reply|>{% endif %}""")
BETWEEN_NOT_EOS = kind("an end only between turns, which is not the eos", r"""
    {% for m in messages %}{% if not loop.first %}<|over|>{% endif %}{{ opens[m.role] }}{{ m.content }}{% endfor %}
    {% if add_generation_prompt %}<|over|><|reply|>{% endif %}""", "<|over|>")
EMPTY_THOUGHT_LAST = kind("an empty thought before the last answer", r"""
    {% for m in messages %}{{ opens[m.role] }}{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}
    {% endif %}
    {{ m.content }}<|stop|>{% endfor %}""" + PROMPT)
OPENED_THEN_DROPPED = kind("the prompt opens a thought, and no rendering holds one", r"""
    {% for m in messages %}{{ opens[m.role] }}{{ m.content.split('</think>')[-1].lstrip('\n') }}<|stop|>{% endfor %}
    {% if add_generation_prompt %}<|reply|>{{ '<think>\n' }}{% endif %}""", thoughts="content")
OPENS_EMPTY_THOUGHT = kind("the prompt is the beginning of the empty thought before each answer", r"""
    {% for m in messages %}{{ opens[m.role] }}{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n' }}{% endif %}
    {{ m.content }}<|stop|>{% endfor %}{% if add_generation_prompt %}<|reply|>{{ '<think>\n' }}{% endif %}""")
CLOSED_LAST = kind("an empty thought in the prompt, and before the last answer", r"""
    {% for m in messages %}{{ opens[m.role] }}{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}
    {% endif %}
    {{ m.content }}<|stop|>{% endfor %}{% if add_generation_prompt %}<|reply|>{{ '<think>\n\n</think>\n\n' }}{% endif %}""")
DROPS_THOUGHTS = kind("thoughts are cut out of all answers but the last", r"""
    {% for m in messages %}{{ opens[m.role] }}
    {% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endif %}<|stop|>{% endfor %}
    """ + PROMPT, thoughts="content")
SYSTEM_LAST = kind("the system text goes with the last question", r"""
    {% if messages[0].role == 'system' %}{% set rule, turns = messages[0].content + '\n', messages[1:] %}
    {% else %}{% set rule, turns = '', messages %}{% endif %}
    {% for m in turns %}{{ opens[m.role] }}{% if loop.last and m.role == 'user' %}{{ rule }}{% endif %}{{ m.content }}
    {% if m.role == 'assistant' %}<|stop|>{% endif %}{% endfor %}""" + PROMPT)
ROLE_LINES = kind("headers are lines of text", r"""
    {% for m in messages %}<|say|>{{ m.role }}{{ '\n' }}{{ m.content }}<|stop|>{{ '\n' }}{% endfor %}
    {% if add_generation_prompt %}<|say|>assistant{{ '\n' }}{% endif %}""")
TWO_NEWLINES = kind("headers end with two newlines", r"""
    {% for m in messages %}<|say|>{{ m.role }}{{ '\n\n' }}{{ m.content }}<|stop|>{% endfor %}
    {% if add_generation_prompt %}<|say|>assistant{{ '\n\n' }}{% endif %}""")
COLON_SPACE = kind("headers end with a space", r"""
    {% for m in messages %}{{ m.role + ': ' + m.content }}<|stop|>{{ '\n' }}{% endfor %}
    {% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}""")
LAST_ENDS_OTHERWISE = kind("the last answer ends otherwise than those before", r"""
    {% for m in messages %}{{ opens[m.role] }}{{ m.content }}
    {% if loop.last and m.role == 'assistant' %}<|stop|>{% else %}<|over|>{% endif %}{% endfor %}""" + PROMPT)
ALWAYS_EMPTY_THOUGHT = kind("an empty thought before each answer, whatever it holds", r"""
    {% for m in messages %}{{ opens[m.role] }}{% if m.role == 'assistant' %}{{ '<think>\n</think>\n' }}{% endif %}
    {{ m.content }}<|stop|>{% endfor %}""" + PROMPT, thoughts="content")
ALWAYS_OPENS = kind("a thought is opened before each answer, and never closed", r"""
    {% for m in messages %}{{ opens[m.role] }}{% if m.role == 'assistant' %}{{ '<think>\n' }}{% endif %}
    {{ m.content }}<|stop|>{% endfor %}{% if add_generation_prompt %}<|reply|>{{ '<think>\n' }}{% endif %}""", thoughts="content")
ALWAYS_CLOSED = kind("thinking is over before each answer", r"""
    {% for m in messages %}{{ opens[m.role] }}{% if m.role == 'assistant' %}</think>{% endif %}
    {{ m.content }}<|stop|>{% endfor %}{% if add_generation_prompt %}<|reply|></think>{% endif %}""")
KEEPS_BEHIND_QUESTION = kind("thoughts are kept behind the last question, and dropped before", r"""
    {% set at = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set at.asked = loop.index0 %}{% endif %}
    {% endfor %}{% if tools %}<|sys|>{% for t in tools %}{{ t.function.name }},{% endfor %}<|stop|>{% endif %}
    {% for m in messages %}{{ opens[m.role] }}
    {% if m.reasoning_content and loop.index0 > at.asked %}<think>{{ m.reasoning_content }}</think>{{ '\n' }}{% endif %}
    {{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}
    <|stop|>{% endfor %}""" + PROMPT, thoughts="reasoning_content", tools=True)
THOUGHT_IS_A_TURN = kind("a thought is a turn of its own, which ends as past answers do", r"""
    {% for m in messages %}{% if m.role == 'assistant' %}
    {% if loop.last and m.thinking %}<|reply|>mind<|say|>{{ m.thinking }}<|over|>{% endif %}
    <|reply|>loud<|say|>{{ m.content }}{% if loop.last %}<|stop|>{% else %}<|over|>{% endif %}
    {% else %}{{ opens[m.role] }}{{ m.content }}<|over|>{% endif %}{% endfor %}""" + PROMPT, thoughts="thinking")
OPENER_ENDS = kind("nothing ends an answer but the opener of what follows", r"""
    {% for m in messages %}{{ opens[m.role] }}{{ '\n' }}{{ m.content }}{% endfor %}
    {% if add_generation_prompt %}<|reply|>{{ '\n' }}{% endif %}""", "<|ask|>")
FORGETS_PLANS = kind("the thoughts before calls are forgotten once an answer in words stands behind", r"""
    {% set at = namespace(done=-1) %}
    {% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}{% set at.done = loop.index0 %}{% endif %}
    {% endfor %}
    {% if tools %}<|sys|>{% for t in tools %}{{ t.function.name }},{% endfor %}<|over|>{% endif %}
    {% for m in messages %}{% if m.tool_calls %}
    {% if m.reasoning_content and loop.index0 > at.done %}<|reply|>plan {{ m.reasoning_content }}<|over|>{% endif %}
    <|reply|>call {{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments | tojson }}<|call|>
    {% elif m.role == 'assistant' %}<|reply|>say {{ m.content }}{% if loop.last %}<|stop|>{% else %}<|over|>{% endif %}
    {% else %}{{ opens[m.role] }}{{ m.content }}<|over|>{% endif %}{% endfor %}""" + PROMPT, "<|call|> <|stop|>", tools=True)
CALLS_ARE_CLOSED = kind("a control token closes each call inside an answer", r"""
    {% if tools %}<|sys|>{% for t in tools %}{{ t.function.name }},{% endfor %}<|over|>{% endif %}
    {% for m in messages %}{{ opens[m.role] }}{{ m.content }}{% for c in m.tool_calls or [] %}
    <|call|>{{ c.function.name }} {{ c.function.arguments | tojson }}<|say|>{% endfor %}<|over|>{{ '\n' }}
    {% endfor %}""" + PROMPT,
    "<|over|>", tools=True)
OPENER_ENDS_CALLS = kind("the opener of a result ends a call, of a question an answer", r"""
    {% set at = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set at.asked = loop.index0 %}{% endif %}
    {% endfor %}{% if tools %}<|sys|>{% for t in tools %}{{ t.function.name }},{% endfor %}{% endif %}
    {% for m in messages %}{{ opens[m.role] }}
    {% if m.reasoning_content and loop.index0 > at.asked %}({{ m.reasoning_content }}){% endif %}{{ m.content }}
    {% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments | tojson }}){% endfor %}{% endfor %}
    """ + PROMPT, "<|ask|> <|tool|>", tools=True)
OPENS_LINE = kind("a newline ends the opened thought, and begins what closes it", r"""
    {% for m in messages %}{{ opens[m.role] }}{% if m.role == 'assistant' %}
    {{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content }}<|stop|>{% endfor %}
    {% if add_generation_prompt %}<|reply|>{{ '<think>\n' }}{% endif %}""", thoughts="reasoning_content")
OPENS_OTHERWISE = kind("a thought stands in another place than the one that the prompt opens", r"""
    {% for m in messages %}{{ opens[m.role] }}{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
    {{ m.content }}<|stop|>{% endfor %}{% if add_generation_prompt %}<|reply|>{{ '\n<think>\n' }}{% endif %}""")
JOINS_TURNS = kind("messages of one role are one turn", r"""
    {% set at = namespace(role='') %}{% for m in messages %}{% if m.role != at.role %}
    {% if at.role %}<|stop|>{{ '\n' }}{% endif %}{{ opens[m.role] }}{% endif %}{{ m.content }}{% set at.role = m.role %}
    {% endfor %}
    <|stop|>{{ '\n' }}""" + PROMPT)
HINT = kind("a hint stands behind the last question only", r"""
    {% set at = namespace(asked=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set at.asked = loop.index0 %}{% endif %}
    {% endfor %}{% for m in messages %}{{ opens[m.role] }}{{ m.content }}{% if loop.index0 == at.asked %} (think!){% endif %}
    <|stop|>{% endfor %}""" + PROMPT)
ITEMS = kind("arguments are an object and content a text", r"""
    {% if tools %}<|sys|>{% for t in tools %}{{ t.function.name }},{% endfor %}<|stop|>{% endif %}
    {% for m in messages %}{{ opens[m.role] + m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}:
    {% for key, value in c.function.arguments.items() %}{{ key }}={{ value }};{% endfor %}{% endfor %}<|stop|>{% endfor %}
    """ + PROMPT, tools=True)
PARTS = kind("content is a list of parts", r"""
    {% for m in messages %}{{ opens[m.role] }}{% for part in m.content %}{{ part['text'] }}{% endfor %}<|stop|>{% endfor %}
    """ + PROMPT)

# ---------------------------------------------------------------------------------------------------------------------
# Families: the habits of well-known models' templates, each in a few lines

NAMES = "{% for t in tools %}{{ t.function.name }};{% endfor %}"
CHATML = Template("chatml", joined(r"""
    {% if tools %}<|im_start|>system{{ '\n' }}Tools: """ + NAMES + r"""<|im_end|>{{ '\n' }}{% endif %}
    {% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}{{ '\n' }}
    {% if m.role == 'tool' %}<result>{{ m.content }}</result>{% else %}{{ m.content }}{% endif %}
    {% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>{{ '\n' }}{% endfor %}
    {% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"""),
    "<|im_start|> <|im_end|>", "<|im_end|>", "<|im_end|>", tools=True)
LLAMA3 = Template("llama 3", joined(r"""
    {% if messages[0].role == 'system' %}{% set rule, turns = messages[0].content | trim, messages[1:] %}
    {% else %}{% set rule, turns = '', messages %}{% endif %}
    {{ bos_token }}<|start_header_id|>system<|end_header_id|>{{ '\n\nIt is ' + strftime_now('%d %b %Y') + '.\n' }}
    {% if tools %}Functions: """ + NAMES + r"""{{ '\n' }}{% endif %}{{ rule }}<|eot_id|>
    {% for m in turns %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>{{ '\n\n' }}
    {% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}
    {{ '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}{{ m.tool_calls[0].function.arguments | tojson }}}
    {% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}
    {% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}"""),
    "<|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|>", "<|end_of_text|>", "<|eot_id|>", tools=True)
GEMMA = Template("gemma", joined(r"""
    {{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('a system role is not for this model') }}{% endif %}
    {% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}
    {% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}{{ '\n' + m.content | trim }}<end_of_turn>
    {{ '\n' }}
    {% endfor %}{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}"""),
    "<start_of_turn> <end_of_turn>", "<eos>", "<end_of_turn>", folds_system=True)
MISTRAL = Template("mistral", joined(r"""
    {% if messages[0].role == 'system' %}{% set rule, turns = messages[0].content + '\n\n', messages[1:] %}
    {% else %}{% set rule, turns = '', messages %}{% endif %}{{ bos_token }}
    {% set at = namespace(asked=0) %}{% for m in turns %}{% if m.role == 'user' %}{% set at.asked = loop.index0 %}{% endif %}
    {% endfor %}{% for m in turns %}{% if m.role == 'user' %}
    {% if tools and loop.index0 == at.asked %}[AVAILABLE_TOOLS]""" + NAMES + r"""[/AVAILABLE_TOOLS]{% endif %}
    [INST]{% if loop.last %}{{ rule }}{% endif %}{{ m.content }}[/INST]
    {% elif m.tool_calls %}[TOOL_CALLS]{% for c in m.tool_calls %}
    {% if c.id | length != 9 %}{{ raise_exception('an id has nine characters') }}{% endif %}
    {{ c.function | tojson }}#{{ c.id }}{% endfor %}{{ eos_token }}
    {% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.tool_call_id }}: {{ m.content }}[/TOOL_RESULTS]
    {% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"""),
    "[INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]", "</s>", "</s>", tools=True)
QWEN3 = Template("qwen 3", joined(r"""
    {% set at = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set at.asked = loop.index0 %}{% endif %}
    {% endfor %}{% if tools %}<|im_start|>system{{ '\n' }}""" + NAMES + r"""<|im_end|>{{ '\n' }}{% endif %}
    {% for m in messages %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}
    {% set before = m.content.split('</think>')[0] if '</think>' in m.content else '' %}
    {% set thought = m.reasoning_content or before.split('<think>')[-1] %}
    <|im_start|>{{ 'user' if m.role == 'tool' else m.role }}{{ '\n' }}
    {% if m.role == 'assistant' %}{% if loop.index0 > at.asked and (loop.last or thought) %}
    {{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ text }}
    {% for c in m.tool_calls or [] %}{% if text or not loop.first %}{{ '\n' }}{% endif %}<call>{{ c.function.name }}
    {{ c.function.arguments | tojson }}</call>{% endfor %}
    {% elif m.role == 'tool' %}<result>{{ m.content }}</result>{% else %}{{ m.content }}{% endif %}<|im_end|>{{ '\n' }}
    {% endfor %}
    {% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}
    {% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""),
    "<|im_start|> <|im_end|>", "<|im_end|>", "<|im_end|>", thoughts="reasoning_content", tools=True)
R1 = Template("deepseek r1", joined(r"""
    {{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<|User|>
    {{ m.content }}
    {% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}
    {% if add_generation_prompt %}<|Assistant|><think>{{ '\n' }}{% endif %}"""),
    "<|User|> <|Assistant|>", "<|end_of_sentence|>", "<|end_of_sentence|>", thoughts="content")
GLM = Template("glm", joined(r"""
    {% set at = namespace(asked=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set at.asked = loop.index0 %}{% endif %}
    {% endfor %}[gMASK]<sop>{% if tools %}<|system|>{{ '\n' }}""" + NAMES + r"""{% endif %}
    {% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>
    {% if m.reasoning_content and loop.index0 > at.asked %}{{ '\n<think>' + m.reasoning_content | trim + '</think>' }}
    {% else %}{{ '\n<think></think>' }}{% endif %}{% if m.content | trim %}{{ '\n' + m.content | trim }}{% endif %}
    {% for c in m.tool_calls or [] %}{{ '\n' }}<call>{{ c.function.name }}{{ '\n' }}
    {% for key, value in c.function.arguments.items() %}
    {{ key }}={{ value }}{{ '\n' }}{% endfor %}</call>{% endfor %}
    {% elif m.role == 'tool' %}<|observation|>{{ '\n' + m.content }}{% else %}<|{{ m.role }}|>{{ '\n' + m.content }}{% endif %}
    {% endfor %}{% if add_generation_prompt %}<|assistant|>
    {% if enable_thinking is defined and not enable_thinking %}{{ '\n<think></think>' }}{% endif %}{% endif %}"""),
    "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>", "<|endoftext|>", "<|observation|> <|user|>",
    thoughts="reasoning_content", tools=True)
GPT_OSS = Template("gpt-oss", joined(r"""
    <|start|>system<|message|>Today: {{ strftime_now('%Y-%m-%d') }}<|end|>
    {% if messages[0].role in ('system', 'developer') %}{% set rule, turns = messages[0].content, messages[1:] %}
    {% else %}{% set rule, turns = '', messages %}{% endif %}
    {% if rule or tools %}<|start|>developer<|message|>{{ rule }}{% if tools %}
    {{ '\n' }}""" + NAMES + r"""{% endif %}<|end|>{% endif %}
    {% set at = namespace(done=-1, name='') %}
    {% for m in turns %}{% if m.role == 'assistant' and 'tool_calls' not in m %}{% set at.done = loop.index0 %}{% endif %}
    {% endfor %}
    {% for m in turns %}{% if 'tool_calls' in m %}{% set at.name = m.tool_calls[0].function.name %}
    {% if m.thinking and loop.index0 > at.done %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>
    {% endif %}
    <|start|>assistant to={{ at.name }}<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}
    <|call|>
    {% elif m.role == 'tool' %}<|start|>{{ at.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>
    {% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>
    {% elif loop.last and not add_generation_prompt %}
    {% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}
    <|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>
    {% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}
    {% if add_generation_prompt %}<|start|>assistant{% endif %}"""),
    "<|start|> <|end|> <|message|> <|channel|> <|call|> <|return|>", "<|return|>", "<|call|> <|return|>",
    thoughts="thinking", tools=True)
COHERE = Template("cohere", joined(r"""
    {{ bos_token }}{% if tools %}<|START|><|SYSTEM|>""" + NAMES + r"""<|END_OF_TURN|>{% endif %}
    {% for m in messages %}<|START|>{% if m.role == 'assistant' %}<|CHATBOT|>
    {% if m.reasoning_content %}<|START_THINKING|>{{ m.reasoning_content }}<|END_THINKING|>{% endif %}
    {% if m.tool_calls %}<|START_ACTION|>{% for c in m.tool_calls %}{{ c.function | tojson }}{{ '\n' }}{% endfor %}<|END_ACTION|>
    {% else %}<|START_TEXT|>{{ m.content }}<|END_TEXT|>{% endif %}
    {% elif m.role == 'tool' %}<|SYSTEM|>{{ m.tool_call_id }}: {{ m.content }}
    {% else %}<|{{ m.role | upper }}|><|START_TEXT|>{{ m.content }}<|END_TEXT|>{% endif %}<|END_OF_TURN|>{% endfor %}
    {% if add_generation_prompt %}<|START|><|CHATBOT|><|START_THINKING|>{% if not reasoning %}<|END_THINKING|>{% endif %}
    {% endif %}"""),
    "<|START|> <|SYSTEM|> <|USER|> <|CHATBOT|> <|START_THINKING|> <|END_THINKING|> <|START_TEXT|> <|END_TEXT|> <|START_ACTION|> "
    "<|END_ACTION|> <|END_OF_TURN|>", "<|END_OF_TURN|>", "<|END_OF_TURN|>", tools=True)
COHERE_THINKS = replace(COHERE, name="cohere that thinks", thoughts="reasoning_content", kwargs='{"reasoning": true}')
TEMPLATES = [value for value in list(globals().values()) if isinstance(value, Template)]


# ---------------------------------------------------------------------------------------------------------------------
# Points 1 to 3, kind by kind and family by family

SAME = [ask("yes"), reply("yes"), ask("yes"), reply("yes")]
CASES = [
    (ALWAYS_ASKS, ONE, ["<|ask|>Red: what?<|stop|><|reply|>«Red: a colour<|stop|>»"]),
    (ALWAYS_ASKS, SAME, ["<|ask|>yes<|stop|><|reply|>«yes<|stop|>»<|ask|>yes<|stop|><|reply|>«yes<|stop|>»"]),
    (ALWAYS_ASKS_IN_TEXT, [system("Be kind."), *ONE],
     ["Rule: Be kind.<|stop|>\nPupil: Red: what?<|stop|>\nMaster:« Red: a colour<|stop|>»"]),
    (ALWAYS_ASKS_IN_TEXT, TWO,
     ["Pupil: One?<|stop|>\nMaster:« eins<|stop|>»\nPupil: Two?<|stop|>\nMaster:« zwei<|stop|>»"]),
    (TWO_ENDS, TWO, ["<|ask|>One?<|over|>\n<|reply|>«eins<|over|>»\n<|ask|>Two?<|over|>\n<|reply|>«zwei<|over|>»"]),
    (BETWEEN, TWO, ["<|ask|>One?<|stop|>\n<|reply|>«eins<|stop|>»\n<|ask|>Two?<|stop|>\n<|reply|>«zwei<|stop|>»"]),
    (BETWEEN_NOT_EOS, TWO, ["<|ask|>One?<|over|><|reply|>«eins<|over|>»<|ask|>Two?<|over|><|reply|>«zwei<|over|>»"]),
    (EMPTY_THOUGHT_LAST, TWO, [
        "<|ask|>One?<|stop|><|reply|>«<think>\n\n</think>\n\neins<|stop|>»",
        "<|ask|>One?<|stop|><|reply|>eins<|stop|><|ask|>Two?<|stop|><|reply|>«<think>\n\n</think>\n\nzwei<|stop|>»"]),
    (OPENED_THEN_DROPPED, ONE, ["<|ask|>Red: what?<|stop|><|reply|><think>\n«\n</think>\n\nRed: a colour<|stop|>»"]),
    (OPENED_THEN_DROPPED, THINKS, [
        "<|ask|>One?<|stop|><|reply|><think>\n«hm\n</think>\n\neins<|stop|>»",
        "<|ask|>One?<|stop|><|reply|>eins<|stop|><|ask|>Two?<|stop|><|reply|><think>\n«ho\n</think>\n\nzwei<|stop|>»"]),
    (OPENS_EMPTY_THOUGHT, TWO, [
        "<|ask|>One?<|stop|><|reply|><think>\n«\n</think>\neins<|stop|>»<|ask|>Two?<|stop|><|reply|><think>\n"
        "«\n</think>\nzwei<|stop|>»"]),
    (CLOSED_LAST, TWO, [
        "<|ask|>One?<|stop|><|reply|><think>\n\n</think>\n\n«eins<|stop|>»",
        "<|ask|>One?<|stop|><|reply|>eins<|stop|><|ask|>Two?<|stop|><|reply|><think>\n\n</think>\n\n«zwei<|stop|>»"]),
    (DROPS_THOUGHTS, THINKS, [
        "<|ask|>One?<|stop|><|reply|>«<think>\nhm\n</think>\n\neins<|stop|>»",
        "<|ask|>One?<|stop|><|reply|>eins<|stop|><|ask|>Two?<|stop|><|reply|>«<think>\nho\n</think>\n\nzwei<|stop|>»"]),
    (DROPS_THOUGHTS, TWO, ["<|ask|>One?<|stop|><|reply|>«eins<|stop|>»<|ask|>Two?<|stop|><|reply|>«zwei<|stop|>»"]),
    (SYSTEM_LAST, [system("Be kind."), *TWO], [
        "<|ask|>Be kind.\nOne?<|reply|>«eins<|stop|>»",
        "<|ask|>One?<|reply|>eins<|stop|><|ask|>Be kind.\nTwo?<|reply|>«zwei<|stop|>»"]),
    (SYSTEM_LAST, TWO, ["<|ask|>One?<|reply|>«eins<|stop|>»<|ask|>Two?<|reply|>«zwei<|stop|>»"]),
    (ROLE_LINES, TWO, ["<|say|>user\nOne?<|stop|>\n<|say|>assistant\n«eins<|stop|>»\n<|say|>user\nTwo?<|stop|>\n"
                       "<|say|>assistant\n«zwei<|stop|>»"]),
    (TWO_NEWLINES, ONE, ["<|say|>user\n\nRed: what?<|stop|><|say|>assistant\n\n«Red: a colour<|stop|>»"]),
    (COLON_SPACE, TWO, ["user: One?<|stop|>\nassistant: «eins<|stop|>»\nuser: Two?<|stop|>\nassistant: «zwei<|stop|>»"]),
    (LAST_ENDS_OTHERWISE, TWO, [
        "<|ask|>One?<|over|><|reply|>«eins<|stop|>»",
        "<|ask|>One?<|over|><|reply|>eins<|over|><|ask|>Two?<|over|><|reply|>«zwei<|stop|>»"]),
    (ALWAYS_EMPTY_THOUGHT, ONE, ["<|ask|>Red: what?<|stop|><|reply|>«<think>\n</think>\nRed: a colour<|stop|>»"]),
    (ALWAYS_EMPTY_THOUGHT, THINKS[:2], ["<|ask|>One?<|stop|><|reply|>«<think>\nhm\n</think>\n\neins<|stop|>»"]),
    (ALWAYS_OPENS, ONE, ["<|ask|>Red: what?<|stop|><|reply|><think>\n«\n</think>\n\nRed: a colour<|stop|>»"]),
    (ALWAYS_OPENS, THINKS[:2], ["<|ask|>One?<|stop|><|reply|><think>\n«hm\n</think>\n\neins<|stop|>»"]),
    (ALWAYS_CLOSED, TWO, [
        "<|ask|>One?<|stop|><|reply|></think>«eins<|stop|>»<|ask|>Two?<|stop|><|reply|></think>«zwei<|stop|>»"]),
    (KEEPS_BEHIND_QUESTION, [ask("One?"), reply("eins", "a"), reply("zwei", "b"),
                             ask("Two?"), reply("drei", "c"), reply("vier", "d")], [
        "<|ask|>One?<|stop|><|reply|>«<think>a</think>\neins<|stop|>»<|reply|>«<think>b</think>\nzwei<|stop|>»",
        "<|ask|>One?<|stop|><|reply|>eins<|stop|><|reply|>zwei<|stop|><|ask|>Two?<|stop|><|reply|>"
        "«<think>c</think>\ndrei<|stop|>»<|reply|>«<think>d</think>\nvier<|stop|>»"]),
    (THOUGHT_IS_A_TURN, [ask("One?"), reply("eins", "hm"), ask("Two?"), reply("zwei", "ho")], [
        "<|ask|>One?<|over|><|reply|>«mind<|say|>hm<|over|><|reply|>loud<|say|>eins<|stop|>»",
        "<|ask|>One?<|over|><|reply|>loud<|say|>eins<|over|><|ask|>Two?<|over|><|reply|>"
        "«mind<|say|>ho<|over|><|reply|>loud<|say|>zwei<|stop|>»"]),
    (OPENER_ENDS, TWO, ["<|ask|>\nOne?<|reply|>\n«eins<|ask|>»\nTwo?<|reply|>\n«zwei<|ask|>»"]),
    (FORGETS_PLANS, [ask("Tide?"), reply(thought="ab", calls=[call("Kiel")]), result("2"),
                     reply(thought="cd", calls=[call("Bonn")]), result("none"), reply("2 m")], [
        "<|sys|>tide,wind,<|over|><|ask|>Tide?<|over|><|reply|>«plan ab<|over|><|reply|>call tide {\"port\": \"Kiel\"}<|call|>»"
        "<|tool|>2<|over|><|reply|>«plan cd<|over|><|reply|>call tide {\"port\": \"Bonn\"}<|call|>»<|tool|>none<|over|>"
        "<|reply|>«say 2 m<|stop|>»"]),
    (FORGETS_PLANS, [ask("Tide?"), reply(thought="ab", calls=[call("Kiel")]), result("2"), reply("2 m"),
                     ask("Wind?"), reply(calls=[call("Kiel", name="wind")])], [
        "<|sys|>tide,wind,<|over|><|ask|>Tide?<|over|><|reply|>«plan ab<|over|><|reply|>call tide {\"port\": \"Kiel\"}<|call|>»"
        "<|tool|>2<|over|><|reply|>«say 2 m<|stop|>»",
        "<|sys|>tide,wind,<|over|><|ask|>Tide?<|over|><|reply|>call tide {\"port\": \"Kiel\"}<|call|><|tool|>2<|over|>"
        "<|reply|>say 2 m<|over|>"
        "<|ask|>Wind?<|over|><|reply|>«call wind {\"port\": \"Kiel\"}<|call|>»"]),
    (CALLS_ARE_CLOSED, [ask("Tide?"), reply("Both:", calls=[call("Kiel"), call("Bonn", "efgh12345", "wind")]), result("2 m"),
                        result("4", "efgh12345", "wind"), reply("So.")], [
        "<|sys|>tide,wind,<|over|><|ask|>Tide?<|over|>\n<|reply|>«Both:<|call|>tide {\"port\": \"Kiel\"}<|say|>"
        "<|call|>wind {\"port\": \"Bonn\"}<|say|><|over|>»\n<|tool|>2 m<|over|>\n<|tool|>4<|over|>\n<|reply|>«So.<|over|>»"]),
    (OPENER_ENDS_CALLS, [ask("Tide?"), reply(thought="Kiel", calls=[call("Kiel")]), result("2"), reply("2", thought="so 2")], [
        "<|sys|>tide,wind,<|ask|>Tide?<|reply|>«(Kiel)(tide {\"port\": \"Kiel\"})<|tool|>»2<|reply|>«(so 2)2<|ask|>»"]),
    (OPENER_ENDS_CALLS, [ask("Tide?"), reply("Wait", calls=[call("Kiel")])], [
        "<|sys|>tide,wind,<|ask|>Tide?<|reply|>«Wait(tide {\"port\": \"Kiel\"})<|tool|>»"]),
    (OPENS_LINE, TWO, [
        "<|ask|>One?<|stop|><|reply|><think>\n«\n</think>\n\neins<|stop|>»<|ask|>Two?<|stop|><|reply|><think>\n"
        "«\n</think>\n\nzwei<|stop|>»"]),
    (OPENS_OTHERWISE, TWO, [
        "<|ask|>One?<|stop|><|reply|>\n<think>\n«\n</think>\n\neins<|stop|>»",
        "<|ask|>One?<|stop|><|reply|><think>\n\n</think>\n\neins<|stop|><|ask|>Two?<|stop|><|reply|>\n<think>\n"
        "«\n</think>\n\nzwei<|stop|>»"]),
    (JOINS_TURNS, [ask("One?"), reply("eins"), reply("zwei"), ask("Two?"), reply("drei")], [
        "<|ask|>One?<|stop|>\n<|reply|>«eins<|stop|>»\n<|reply|>«zwei<|stop|>»",
        "<|ask|>One?<|stop|>\n<|reply|>einszwei<|stop|>\n<|ask|>Two?<|stop|>\n<|reply|>«drei<|stop|>»"]),
    (HINT, TWO, [
        "<|ask|>One? (think!)<|stop|><|reply|>«eins<|stop|>»",
        "<|ask|>One?<|stop|><|reply|>eins<|stop|><|ask|>Two? (think!)<|stop|><|reply|>«zwei<|stop|>»"]),
    (ITEMS, [ask("Tide?"), {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "id": "x", "function": {"name": "tide", "arguments": "{\"port\": \"Kiel\"}"}}]},
        result("2 m", "x"), reply("So.")],
     ["<|sys|>tide,wind,<|stop|><|ask|>Tide?<|stop|><|reply|>«tide:port=Kiel;<|stop|>»<|tool|>2 m<|stop|><|reply|>«So."
      "<|stop|>»"]),
    (PARTS, [system("Be kind."), *TWO], [
        "<|sys|>Be kind.<|stop|><|ask|>One?<|stop|><|reply|>«eins<|stop|>»<|ask|>Two?<|stop|><|reply|>«zwei<|stop|>»"]),

    (CHATML, [system("Be kind."), *TWO], [
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n«eins<|im_end|>»\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n«zwei<|im_end|>»"]),
    (CHATML, [ask("Tide?"), reply("Look:", calls=[call("Kiel")]), result("2 m"), reply("2 m.")], [
        "<|im_start|>system\nTools: tide;wind;<|im_end|>\n<|im_start|>user\nTide?<|im_end|>\n<|im_start|>assistant\n"
        "«Look:<call>{\"name\": \"tide\", \"arguments\": {\"port\": \"Kiel\"}}</call><|im_end|>»\n"
        "<|im_start|>user\n<result>2 m</result><|im_end|>\n<|im_start|>assistant\n«2 m.<|im_end|>»"]),
    (LLAMA3, [system(" Be kind. "), ask(" One? "), reply(" eins\n"), ask("Two?"), reply("zwei")], [
        "<bos><|start_header_id|>system<|end_header_id|>\n\nIt is 06 May 2031.\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«eins"
        "<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "«zwei<|eot_id|>»"]),
    (LLAMA3, [ask("Tide?"), reply(calls=[call("Kiel")]), result("2 m"), reply("2 m.")], [
        "<bos><|start_header_id|>system<|end_header_id|>\n\nIt is 06 May 2031.\nFunctions: tide;wind;\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nTide?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "«{\"name\": \"tide\", \"parameters\": {\"port\": \"Kiel\"}}<|eot_id|>»"
        "<|start_header_id|>ipython<|end_header_id|>\n\n2 m<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "«2 m.<|eot_id|>»"]),
    (GEMMA, [system("Be kind."), *TWO], [
        "<bos><start_of_turn>user\nBe kind.\n\nOne?<end_of_turn>\n<start_of_turn>model\n«eins<end_of_turn>»\n"
        "<start_of_turn>user\nTwo?<end_of_turn>\n<start_of_turn>model\n«zwei<end_of_turn>»"]),
    (MISTRAL, TWO, ["<bos>[INST]One?[/INST]« eins</s>»[INST]Two?[/INST]« zwei</s>»"]),
    (MISTRAL, [system("Be kind."), *TWO], [
        "<bos>[INST]Be kind.\n\nOne?[/INST]« eins</s>»",
        "<bos>[INST]One?[/INST] eins</s>[INST]Be kind.\n\nTwo?[/INST]« zwei</s>»"]),
    (MISTRAL, [ask("Hi"), reply("Hi!"), ask("Tide?"), reply(calls=[call("Kiel", "qwert6789")]), result("2 m", "qwert6789"),
               reply("2 m.")], [
        "<bos>[AVAILABLE_TOOLS]tide;wind;[/AVAILABLE_TOOLS][INST]Hi[/INST]« Hi!</s>»",
        "<bos>[INST]Hi[/INST] Hi!</s>[AVAILABLE_TOOLS]tide;wind;[/AVAILABLE_TOOLS][INST]Tide?[/INST]"
        "«[TOOL_CALLS]{\"name\": \"tide\", \"arguments\": {\"port\": \"Kiel\"}}#qwert6789</s>»"
        "[TOOL_RESULTS]qwert6789: 2 m[/TOOL_RESULTS]« 2 m.</s>»"]),
    # The system text stands in the first answer's context and in no other: that is what an engine feeds
    (MISTRAL, [system("Be kind."), ask("Tide?"), reply(calls=[call("Kiel")]), result("2 m"), reply("2 m.")], [
        "<bos>[AVAILABLE_TOOLS]tide;wind;[/AVAILABLE_TOOLS][INST]Be kind.\n\nTide?[/INST]"
        "«[TOOL_CALLS]{\"name\": \"tide\", \"arguments\": {\"port\": \"Kiel\"}}#abcd12345</s>»",
        "<bos>[AVAILABLE_TOOLS]tide;wind;[/AVAILABLE_TOOLS][INST]Tide?[/INST]"
        "[TOOL_CALLS]{\"name\": \"tide\", \"arguments\": {\"port\": \"Kiel\"}}#abcd12345</s>"
        "[TOOL_RESULTS]abcd12345: 2 m[/TOOL_RESULTS]« 2 m.</s>»"]),
    (QWEN3, TWO, [
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\neins<|im_end|>»",
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\neins<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n\n</think>\n\nzwei<|im_end|>»"]),
    (QWEN3, [ask("Hi"), reply("Hi!", "greet"), ask("Tide?"), reply("Wait", "look", [call("Kiel")]), result("2 m"),
             reply("2 m.", "so")], [
        "<|im_start|>system\ntide;wind;<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\ngreet\n</think>\n\nHi!<|im_end|>»",
        "<|im_start|>system\ntide;wind;<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"
        "<|im_start|>user\nTide?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\nlook\n</think>\n\nWait\n<call>tide{\"port\": \"Kiel\"}</call><|im_end|>»\n"
        "<|im_start|>user\n<result>2 m</result><|im_end|>\n<|im_start|>assistant\n«<think>\nso\n</think>\n\n2 m.<|im_end|>»"]),
    (R1, [system("Be kind."), *TWO[:2]], [
        "<bos>Be kind.<|User|>One?<|Assistant|><think>\n«\n</think>\n\neins<|end_of_sentence|>»"]),
    (R1, THINKS, [
        "<bos><|User|>One?<|Assistant|><think>\n«hm\n</think>\n\neins<|end_of_sentence|>»",
        "<bos><|User|>One?<|Assistant|>\n\neins<|end_of_sentence|><|User|>Two?<|Assistant|><think>\n"
        "«ho\n</think>\n\nzwei<|end_of_sentence|>»"]),
    (GLM, [system("Be kind."), *TWO], [
        "[gMASK]<sop><|system|>\nBe kind.<|user|>\nOne?<|assistant|>«\n<think></think>\neins<|user|>»\nTwo?<|assistant|>"
        "«\n<think></think>\nzwei<|user|>»"]),
    (GLM, [ask("Tide?"), reply("Wait", "look", [call("Kiel")]), result("2 m"), reply("2 m.", "so"),
           ask("And?"), reply("End", "hm")], [
        "[gMASK]<sop><|system|>\ntide;wind;<|user|>\nTide?<|assistant|>"
        "«\n<think>look</think>\nWait\n<call>tide\nport=Kiel\n</call><|observation|>»\n2 m<|assistant|>"
        "«\n<think>so</think>\n2 m.<|user|>»",
        "[gMASK]<sop><|system|>\ntide;wind;<|user|>\nTide?<|assistant|>\n<think></think>\nWait\n<call>tide\nport=Kiel\n</call>"
        "<|observation|>\n2 m<|assistant|>\n<think></think>\n2 m.<|user|>\nAnd?<|assistant|>«\n<think>hm</think>\nEnd<|user|>»"]),
    (GPT_OSS, [system("Be kind."), ask("One?"), reply("eins", "hm"), ask("Two?"), reply("zwei")], [
        "<|start|>system<|message|>Today: 2031-05-06<|end|><|start|>developer<|message|>Be kind.<|end|><|start|>user"
        "<|message|>One?"
        "<|end|><|start|>assistant«<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>"
        "eins<|return|>»",
        "<|start|>system<|message|>Today: 2031-05-06<|end|><|start|>developer<|message|>Be kind.<|end|><|start|>user"
        "<|message|>One?"
        "<|end|><|start|>assistant<|channel|>final<|message|>eins<|end|><|start|>user<|message|>Two?<|end|><|start|>assistant"
        "«<|channel|>final<|message|>zwei<|return|>»"]),
    (GPT_OSS, [ask("Tide?"), reply(thought="look", calls=[call("Kiel")]), result("2 m"), reply(calls=[call("Bonn")]),
               result("none"), reply("2 m.", "so")], [
        "<|start|>system<|message|>Today: 2031-05-06<|end|><|start|>developer<|message|>\ntide;wind;<|end|>"
        "<|start|>user<|message|>Tide?<|end|><|start|>assistant"
        "«<|channel|>analysis<|message|>look<|end|><|start|>assistant to=tide<|channel|>commentary json<|message|>"
        "{\"port\": \"Kiel\"}<|call|>»<|start|>tide to=assistant<|channel|>commentary<|message|>\"2 m\"<|end|><|start|>assistant"
        "« to=tide<|channel|>commentary json<|message|>{\"port\": \"Bonn\"}<|call|>»"
        "<|start|>tide to=assistant<|channel|>commentary<|message|>\"none\"<|end|><|start|>assistant"
        "«<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>2 m.<|return|>»"]),
    (COHERE, [system("Be kind."), *TWO], [
        "<bos><|START|><|SYSTEM|><|START_TEXT|>Be kind.<|END_TEXT|><|END_OF_TURN|><|START|><|USER|><|START_TEXT|>One?<|END_TEXT|>"
        "<|END_OF_TURN|><|START|><|CHATBOT|><|START_THINKING|><|END_THINKING|>«<|START_TEXT|>eins<|END_TEXT|><|END_OF_TURN|>»",
        "<bos><|START|><|SYSTEM|><|START_TEXT|>Be kind.<|END_TEXT|><|END_OF_TURN|><|START|><|USER|><|START_TEXT|>One?<|END_TEXT|>"
        "<|END_OF_TURN|><|START|><|CHATBOT|><|START_TEXT|>eins<|END_TEXT|><|END_OF_TURN|><|START|><|USER|><|START_TEXT|>Two?"
        "<|END_TEXT|><|END_OF_TURN|><|START|><|CHATBOT|><|START_THINKING|><|END_THINKING|>"
        "«<|START_TEXT|>zwei<|END_TEXT|><|END_OF_TURN|>»"]),
    (COHERE, [ask("Tide?"), reply(calls=[call("Kiel")])], [
        "<bos><|START|><|SYSTEM|>tide;wind;<|END_OF_TURN|><|START|><|USER|><|START_TEXT|>Tide?<|END_TEXT|><|END_OF_TURN|>"
        "<|START|>"
        "<|CHATBOT|><|START_THINKING|><|END_THINKING|>«"
        "<|START_ACTION|>{\"name\": \"tide\", \"arguments\": {\"port\": \"Kiel\"}}\n"
        "<|END_ACTION|><|END_OF_TURN|>»"]),
    (COHERE_THINKS, [ask("Tide?"), reply(thought="look", calls=[call("Kiel")]), result("2 m"), reply("2 m.", "so")], [
        "<bos><|START|><|SYSTEM|>tide;wind;<|END_OF_TURN|><|START|><|USER|><|START_TEXT|>Tide?<|END_TEXT|><|END_OF_TURN|>"
        "<|START|>"
        "<|CHATBOT|><|START_THINKING|>«look<|END_THINKING|>"
        "<|START_ACTION|>{\"name\": \"tide\", \"arguments\": {\"port\": \"Kiel\"}}\n"
        "<|END_ACTION|><|END_OF_TURN|>»<|START|><|SYSTEM|>abcd12345: 2 m<|END_OF_TURN|><|START|><|CHATBOT|><|START_THINKING|>"
        "«so<|END_THINKING|><|START_TEXT|>2 m.<|END_TEXT|><|END_OF_TURN|>»"]),
    # What the prompt has opened is closed where there is no thought, once, and before whatever begins the answer
    (COHERE_THINKS, ONE, [
        "<bos><|START|><|USER|><|START_TEXT|>Red: what?<|END_TEXT|><|END_OF_TURN|><|START|><|CHATBOT|><|START_THINKING|>"
        "«<|END_THINKING|><|START_TEXT|>Red: a colour<|END_TEXT|><|END_OF_TURN|>»"]),
    (COHERE_THINKS, [ask("Tide?"), reply(calls=[call("Kiel")])], [
        "<bos><|START|><|SYSTEM|>tide;wind;<|END_OF_TURN|><|START|><|USER|><|START_TEXT|>Tide?<|END_TEXT|><|END_OF_TURN|>"
        "<|START|>"
        "<|CHATBOT|><|START_THINKING|>«<|END_THINKING|>"
        "<|START_ACTION|>{\"name\": \"tide\", \"arguments\": {\"port\": \"Kiel\"}}\n"
        "<|END_ACTION|><|END_OF_TURN|>»"])]


@pytest.mark.parametrize("template, messages, expected", CASES, ids=[f"{case[0].name}-{i}" for i, case in enumerate(CASES)])
def test_context_and_target_of_each_answer(template, messages, expected):
    check(template, messages, *expected)


@each(TEMPLATES)
def test_every_template_has_a_case_and_its_ends_are_known(template):
    encoder = make_encoder(template)
    assert any(case[0] is template for case in CASES)
    assert sorted(encoder.stop_ids) == sorted(encoder.tokenizer.convert_tokens_to_ids(template.ends.split()))


# ---------------------------------------------------------------------------------------------------------------------
# Point 1: as few sequences as hold every target in its context; borders of tokens


def test_an_agents_steps_behind_one_question_are_one_sequence_and_two_questions_are_two():
    steps = [[reply(thought=f"t{i}", calls=[call(f"P{i}")]), result(f"r{i}")] for i in range(30)]
    messages = [ask("Go"), *sum(steps, []), reply("Done", "end")]
    begin = "<|im_start|>system\ntide;wind;<|im_end|>\n<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n"
    behind, bare = begin, begin
    for i in range(30):
        said = f'<call>tide{{"port": "P{i}"}}</call><|im_end|>'
        asked = f"\n<|im_start|>user\n<result>r{i}</result><|im_end|>\n<|im_start|>assistant\n"
        behind, bare = behind + f"«<think>\nt{i}\n</think>\n\n{said}»{asked}", bare + said + asked
    first = behind + "«<think>\nend\n</think>\n\nDone<|im_end|>»"
    assert first.count("«") == 31
    counts = check(QWEN3, messages, first)
    assert counts["examples"] == 1 and "tokens more by splitting" not in counts
    last = "\n<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nNo<|im_end|>»"
    counts = check(QWEN3, [*messages, ask("More?"), reply("No")], first, bare + "Done<|im_end|>" + last)
    assert counts["tokens more by splitting"] == len(make_tokenizer(QWEN3)(first.replace("«", "").replace("»", ""))["input_ids"])
    assert counts["split: the template writes an answer otherwise once another follows"] == counts["rows"] == 1


def test_an_answer_that_history_rewrites_stands_with_those_that_share_its_sequence():
    """The second answer's context holds the first without its thought, the last one's holds both without, the third as it is."""
    check(KEEPS_BEHIND_QUESTION,
          [ask("1"), reply("a", "x"), ask("2"), reply("b", "y"), ask("3"), reply("c"), ask("4"), reply("d")],
          "<|ask|>1<|stop|><|reply|>«<think>x</think>\na<|stop|>»",
          "<|ask|>1<|stop|><|reply|>a<|stop|><|ask|>2<|stop|><|reply|>«<think>y</think>\nb<|stop|>»",
          "<|ask|>1<|stop|><|reply|>a<|stop|><|ask|>2<|stop|><|reply|>b<|stop|><|ask|>3<|stop|><|reply|>«c<|stop|>»"
          "<|ask|>4<|stop|>"
          "<|reply|>«d<|stop|>»")


def test_only_the_last_answer_is_trained_where_that_is_wanted():
    last = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\neins<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n" \
        "<|im_start|>assistant\n«<think>\n\n</think>\n\nzwei<|im_end|>»"
    assert check(QWEN3, TWO, last, last_answer_only=True)["examples"] == 1
    check(CHATML, TWO, last.replace("<think>\n\n</think>\n\n", ""), last_answer_only=True)


def test_each_of_a_rows_sequences_has_a_length_of_its_own():
    first = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\neins<|im_end|>»"
    second = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\neins<|im_end|>\n" \
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nzwei<|im_end|>»"
    n = len(make_tokenizer(QWEN3)(second.replace("«", "").replace("»", ""))["input_ids"])
    assert "examples truncated" not in check(QWEN3, TWO, first, second, max_length=n)
    counts = check(QWEN3, TWO, first, second[second.index("<|im_start|>user\nTwo"):], max_length=n - 1)
    assert counts["examples truncated"] == 1
    assert counts["tokens dropped"] == len(make_tokenizer(QWEN3)(second[:second.index("<|im_start|>user\nTwo")])["input_ids"])


def test_what_is_left_of_a_long_row_may_be_what_the_template_refuses():
    shy = kind("a question has words", r"""
        {% for m in messages %}{% if m.content | length < 3 %}{{ raise_exception('say more') }}{% endif %}
        {{ opens[m.role] }}{{ m.content }}<|stop|>{% endfor %}""" + PROMPT)
    row = [ask("Q" * 30), reply("eins")]
    check(shy, row, "<|ask|>" + "Q" * 30 + "<|stop|><|reply|>«eins<|stop|>»")
    assert refusal(shy, row, max_length=10) == "bad: the chat template raises TemplateError: say more"


def test_an_empty_question_is_no_hindrance_where_the_template_writes_the_prompt_otherwise_once_answered():
    check(MISTRAL, [system("Be kind."), ask(""), reply("eins")], "<bos>[INST]Be kind.\n\n[/INST]« eins</s>»")


BORDERS = [
    (ROLE_LINES, "   return x", "<|say|>user\nGo<|stop|>\n<|say|>assistant\n", "   return x<|stop|>", True),
    (ROLE_LINES, "\n\nyes", "<|say|>user\nGo<|stop|>\n<|say|>assistant\n", "\n\nyes<|stop|>", True),
    (ROLE_LINES, "yes", "<|say|>user\nGo<|stop|>\n<|say|>assistant\n", "yes<|stop|>", False),
    (TWO_NEWLINES, "\nyes", "<|say|>user\n\nGo<|stop|><|say|>assistant\n\n", "\nyes<|stop|>", False),
    (TWO_NEWLINES, "yes", "<|say|>user\n\nGo<|stop|><|say|>assistant\n\n", "yes<|stop|>", True),
    (COLON_SPACE, "two", "user: Go<|stop|>\nassistant: ", "two<|stop|>", True),
    (COLON_SPACE, " two", "user: Go<|stop|>\nassistant: ", " two<|stop|>", False),
    (ALWAYS_ASKS_IN_TEXT, "two", "Pupil: Go<|stop|>\nMaster:", " two<|stop|>", False),
    (OPENS_LINE, "yes", "<|ask|>Go<|stop|><|reply|><think>\n", "\n</think>\n\nyes<|stop|>", True),
    (LLAMA3, "yes", "<bos><|start_header_id|>system<|end_header_id|>\n\nIt is 06 May 2031.\n<|eot_id|><|start_header_id|>user"
     "<|end_header_id|>\n\nGo<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "yes<|eot_id|>", True)]


@pytest.mark.parametrize("template, answer, context, target, merges", BORDERS, ids=[f"{b[0].name}-{b[1]!r}" for b in BORDERS])
def test_a_targets_ids_are_those_of_its_text_alone(template, answer, context, target, merges):
    ids_of = lambda text: make_tokenizer(template)(text)["input_ids"]  # noqa: E731
    ((ids, trained),), _ = encode(make_encoder(template), as_row([ask("Go"), reply(answer)]))
    assert ids == ids_of(context) + ids_of(target)
    assert trained == [False] * len(ids_of(context)) + [True] * len(ids_of(target))
    assert (ids != ids_of(context + target)) is merges  # a token of the whole text would reach across


def test_an_earlier_answer_stands_as_the_model_wrote_it_though_history_would_merge_its_border():
    ids_of = lambda text: make_tokenizer(OPENS_LINE)(text)["input_ids"]  # noqa: E731
    ((ids, trained),), counts = encode(make_encoder(OPENS_LINE), as_row(TWO))
    parts = [ids_of("<|ask|>One?<|stop|><|reply|><think>\n"), ids_of("\n</think>\n\neins<|stop|>"),
             ids_of("<|ask|>Two?<|stop|><|reply|><think>\n"), ids_of("\n</think>\n\nzwei<|stop|>")]
    assert ids == sum(parts, []) and ids[:-len(parts[-1])] != ids_of("".join(map(make_tokenizer(OPENS_LINE).decode, parts[:-1])))
    assert trained == [on for part, is_target in zip(parts, (False, True, False, True)) for on in [is_target] * len(part)]
    assert counts["answers in the tokens that they were written in"] == 1
    counts = check(ROLE_LINES, TWO, "<|say|>user\nOne?<|stop|>\n<|say|>assistant\n«eins<|stop|>»\n<|say|>user\nTwo?<|stop|>\n"
                                    "<|say|>assistant\n«zwei<|stop|>»")
    assert "answers in the tokens that they were written in" not in counts


# ---------------------------------------------------------------------------------------------------------------------
# Point 2: ends

TEXT_ALONE = kind("text alone ends a turn", r"""
    {% for m in messages %}{{ m.role | upper }}:{{ ' ' + m.content + '\n\n' }}{% endfor %}
    {% if add_generation_prompt %}ASSISTANT:{% endif %}""")


def test_an_answer_that_only_text_ends_gets_the_eos_and_history_stands_as_it_is():
    check(TEXT_ALONE, TWO, "USER: One?\n\nASSISTANT:« eins<|stop|>»",
          "USER: One?\n\nASSISTANT: eins\n\nUSER: Two?\n\nASSISTANT:« zwei<|stop|>»")


def test_a_token_behind_the_end_is_not_trained():
    twice = kind("two ends behind each answer", "{% for m in messages %}{{ opens[m.role] }}{{ m.content }}<|over|>"
                 "{% if m.role == 'assistant' %}<|stop|>{% endif %}{% endfor %}" + PROMPT, "<|over|>")
    check(twice, TWO, "<|ask|>One?<|over|><|reply|>«eins<|over|>»<|stop|><|ask|>Two?<|over|><|reply|>«zwei<|over|>»")
    assert make_encoder(twice).stop_ids == make_tokenizer(twice).convert_tokens_to_ids(["<|over|>"])


def test_a_token_that_closes_the_words_within_a_turn_does_not_end_it():
    closes = kind("a token closes the words, another ends the turn", r"""
        {% for m in messages %}{{ opens[m.role] }}<|say|>{{ m.content }}<|over|>{{ '\n' }}<|stop|>{% endfor %}""" + PROMPT)
    check(closes, TWO, "<|ask|><|say|>One?<|over|>\n<|stop|><|reply|>«<|say|>eins<|over|>\n<|stop|>»"
          "<|ask|><|say|>Two?<|over|>\n<|stop|><|reply|>«<|say|>zwei<|over|>\n<|stop|>»")


def test_words_that_the_template_also_writes_end_no_answer():
    check(TEXT_ALONE, [ask("USER: a\n\nASSISTANT: b"), reply("ASSISTANT: b\n\nUSER: a")],
          "USER: USER: a\n\nASSISTANT: b\n\nASSISTANT:« ASSISTANT: b\n\nUSER: a<|stop|>»")


# ---------------------------------------------------------------------------------------------------------------------
# Point 3: thoughts


@each(template for template in TEMPLATES if template.thoughts)
def test_a_thought_is_the_same_under_every_name(template):
    written = [encode(make_encoder(template), as_row([ask("One?"), answer, ask("Two?"), answer]))[0]
               for answer in (reply("eins", "hm"), reply("eins", reasoning="hm"), reply("eins", thinking="hm"),
                              reply("<think>\nhm\n</think>\n\neins"),
                              reply([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "eins"}]))]
    texts = marked(make_encoder(template), written[0])
    assert "".join(texts).count("hm") >= 2 and sum(text.count("«") for text in texts) == 2
    assert all(examples == written[0] for examples in written)


@each(template for template in TEMPLATES if template.thoughts)
def test_a_thought_in_the_words_of_question_and_answer_is_not_taken_for_them(template):
    encoder = make_encoder(template)
    (_, target), = pairs(encoder, encode(encoder, as_row([ask("Kiel"), reply("Kiel", "Kiel Kiel")]))[0])
    assert target.count("Kiel") == 3 and target.count(encoder.template.closer) <= 1
    assert encoder.read_answer(encoder.tokenizer(target)["input_ids"]) == "Kiel"


def test_an_answer_is_read_whole_though_it_holds_what_closes_thoughts():
    ids_of = lambda text: make_tokenizer(OPENER_ENDS_CALLS)(text)["input_ids"]  # noqa: E731
    read = make_encoder(OPENER_ENDS_CALLS).read_answer
    assert read(ids_of("eins) or zwei)<|ask|>")) == "eins) or zwei)" and read(ids_of("(hm)eins)<|ask|>")) == "eins)"


def test_a_thought_that_can_not_be_written_makes_a_bad_row():
    assert refusal(CHATML, [ask("One?"), reply("eins", "hm")]) == \
        "bad: messages[1].reasoning_content: the chat template does not write it"
    assert refusal(FORGETS_PLANS, [ask("One?"), reply("eins", "hm")]) == \
        "bad: messages[1].reasoning_content: the chat template does not write it"
    check(CHATML, THINKS[:2],
          "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n«<think>\nhm\n</think>\n\neins<|im_end|>»")


@each([CLOSED_LAST, ALWAYS_CLOSED, COHERE])
def test_a_row_that_thinks_where_the_prompt_closes_thinking_is_bad_and_the_switch_is_named(template):
    assert refusal(template, [ask("One?"), reply("eins", "hm")]) == \
        "bad: messages[1] has a thought, but the prompt closes thinking: a switch of the template may open it, as " \
        'model.template_kwargs={"enable_thinking": true} does in some'


# ---------------------------------------------------------------------------------------------------------------------
# Point 4: tools


@each(template for template in TEMPLATES if template.tools)
def test_calls_are_the_same_in_every_form_and_results_are_never_trained(template):
    tools, arguments = [TIDE, WIND], "{\"port\": \"Kiel\"}"
    rows = [
        {"messages": [ask("Tide?"), reply(calls=[call("Kiel", "call00001")]), result("2 m high", "call00001"), reply("So.")]},
        {"messages": [ask("Tide?"), {"role": "assistant", "content": None, "tool_calls": [
            {"function": {"name": "tide", "arguments": arguments}}]}, {"role": "tool", "content": "2 m high"}, reply("So.")]},
        {"messages": [ask("Tide?"), {"role": "assistant", "function_call": {"name": "tide", "arguments": arguments}},
                      {"role": "function", "name": "tide", "content": "2 m high"}, reply("So.")]},
        {"conversations": [{"from": "human", "value": "Tide?"},
                           {"from": "function_call", "value": "{\"name\": \"tide\", \"arguments\": {\"port\": \"Kiel\"}}"},
                           {"from": "observation", "value": "2 m high"}, {"from": "gpt", "value": "So."}]}]
    encoder = make_encoder(template)
    first, *others = [encode(encoder, row | {"tools": given})[0]
                      for row, given in zip(rows, (tools, tools, json.dumps(tools), tools))]
    targets = [target for _, target in pairs(encoder, first)]
    assert len(targets) == 2 and "tide" in targets[0] and "Kiel" in targets[0] and "So." in targets[1]
    assert not any("2 m high" in target for target in targets) and others == [first] * 3


def test_arguments_stay_text_where_the_template_fails_on_an_object():
    text = kind("arguments are text", r"""
        {% if tools %}<|sys|>{% for t in tools %}{{ t.function.name }},{% endfor %}{% endif %}
        {% for m in messages %}{{ opens[m.role] }}{{ m.content }}{% for c in m.tool_calls or [] %}
        {{ c.function.name + '=' + c.function.arguments + ';' }}{% endfor %}<|stop|>{% endfor %}""" + PROMPT)
    expected = "<|sys|>tide,wind,<|ask|>Tide?<|stop|><|reply|>«tide={\"port\": \"Kiel\"};<|stop|>»"
    check(text, [ask("Tide?"), reply(calls=[call("Kiel")])], expected)
    check(text, [ask("Tide?"), reply(calls=[{"function": {"name": "tide", "arguments": "{\"port\": \"Kiel\"}"}}])], expected)


def test_tools_calls_and_results_that_are_not_written_make_a_bad_row_that_names_them():
    called = [ask("Tide?"), reply(calls=[call("Kiel")]), result("2 m"), reply("So.")]
    assert refusal(GEMMA, {"messages": TWO, "tools": [TIDE]}) == "bad: tools[0]: the chat template does not write the tool 'tide'"
    assert refusal(ALWAYS_ASKS, called) == "bad: messages[1].tool_calls: the chat template does not write them"
    written = "{{ opens[m.role] + m.content }}"
    deaf = replace(ITEMS, name="deaf", jinja=ITEMS.jinja.replace(written, "{% if m.role != 'tool' %}" + written + "{% endif %}"))
    assert deaf.jinja != ITEMS.jinja
    assert refusal(deaf, called) == "bad: messages[2]: the chat template leaves out a message of the role 'tool' here"
    assert refusal(LLAMA3, [ask("Tide?"), reply(calls=[call("Kiel"), call("Bonn", "efgh12345")])]) == \
        "bad: the chat template raises TemplateError: one call at a time"
    one = replace(ITEMS, name="one call", jinja=ITEMS.jinja.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"))
    assert refusal(one, [ask("Tide?"), reply(calls=[call("Kiel"), call("Kiel", "efgh12345", "wind")])]) == \
        "bad: messages[1].tool_calls: the chat template does not write 'wind'"


def test_calls_without_an_id_get_one_that_their_results_name():
    bare = [{"type": "function", "function": {"name": name, "arguments": {"port": "Kiel"}}} for name in ("tide", "wind")]
    results = [{"role": "tool", "content": text} for text in ("2 m", "4")]
    check(MISTRAL, [ask("Go"), reply(calls=bare), *results, reply("So.")],
          "<bos>[AVAILABLE_TOOLS]tide;wind;[/AVAILABLE_TOOLS][INST]Go[/INST]«[TOOL_CALLS]"
          "{\"name\": \"tide\", \"arguments\": {\"port\": \"Kiel\"}}#call00001"
          "{\"name\": \"wind\", \"arguments\": {\"port\": \"Kiel\"}}#call00002</s>»"
          "[TOOL_RESULTS]call00001: 2 m[/TOOL_RESULTS][TOOL_RESULTS]call00002: 4[/TOOL_RESULTS]« So.</s>»")
    assert refusal(MISTRAL, [ask("Go"), reply(calls=[call("Kiel", "short")])]) == \
        "bad: the chat template raises TemplateError: an id has nine characters"


def test_a_tokenizer_may_have_a_template_of_its_own_for_tools():
    tokenizer = copy.deepcopy(make_tokenizer(CHATML))
    tokenizer.chat_template = {"default": ROLE_LINES.jinja.replace("<|say|>", "<|im_start|>").replace("<|stop|>", "<|im_end|>"),
                               "tool_use": CHATML.jinja}
    encoder = ChatEncoder(tokenizer, 512, 256)
    assert pairs(encoder, encode(encoder, as_row(TWO[:2]))[0]) == [
        ("<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n", "eins<|im_end|>")]
    assert pairs(encoder, encode(encoder, as_row([ask("Tide?"), reply(calls=[call("Kiel")])]))[0]) == [
        ("<|im_start|>system\nTools: tide;wind;<|im_end|>\n<|im_start|>user\nTide?<|im_end|>\n<|im_start|>assistant\n",
         "<call>{\"name\": \"tide\", \"arguments\": {\"port\": \"Kiel\"}}</call><|im_end|>")]


# ---------------------------------------------------------------------------------------------------------------------
# Point 6: the order of roles is the template's business


def test_what_the_template_renders_is_taken():
    head = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>"
    check(CHATML, [ask("One?"), ask("Two?"), reply("zwei")],
          head + "user\nTwo?<|im_end|>\n<|im_start|>assistant\n«zwei<|im_end|>»")
    check(CHATML, [ask("One?"), reply("eins"), reply("zwei")],
          head + "assistant\n«eins<|im_end|>»\n<|im_start|>assistant\n«zwei<|im_end|>»")
    check(CHATML, [ask("One?"), system("Be kind."), reply("eins"), ask("More?")],
          head + "system\nBe kind.<|im_end|>\n<|im_start|>assistant\n«eins<|im_end|>»")


def test_what_the_template_refuses_is_a_bad_row():
    for messages in ([ask("One?"), ask("Two?"), reply("zwei")], [ask("One?"), reply("eins"), reply("zwei")]):
        assert refusal(GEMMA, messages) == "bad: the chat template raises TemplateError: roles must take turns"
    assert refusal(GEMMA, [ask("One?"), system("Be kind."), reply("eins")]) == \
        "bad: the chat template raises TemplateError: roles must take turns"


def test_answers_before_the_first_question_are_left_out_and_counted():
    counts = check(CHATML, [system("Be kind."), reply("Welcome!"), reply("Hello!"), *TWO[:2]],
                   "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
                   "<|im_start|>assistant\n«eins<|im_end|>»")
    assert counts["answers before the first question, left out"] == 2


def test_a_system_text_that_the_template_loses_goes_with_the_first_question():
    loses = kind("a system text is lost", r"""
        {% for m in messages if m.role != 'system' %}{{ opens[m.role] }}{{ m.content }}<|stop|>{% endfor %}""" + PROMPT)
    check(loses, [system("Be kind."), *TWO], "<|ask|>Be kind.\n\nOne?<|stop|><|reply|>«eins<|stop|>»<|ask|>Two?<|stop|>"
          "<|reply|>«zwei<|stop|>»")
    assert refusal(loses, [*TWO[:3], system("Be kind."), reply("zwei")]) == \
        "bad: messages[3]: the chat template leaves out a message of the role 'system' here"


def test_a_developer_is_the_system_where_the_template_knows_none():
    developer = {"role": "developer", "content": "Be kind."}
    encoder = make_encoder(CHATML)
    assert encode(encoder, as_row([developer, *TWO])) == encode(encoder, as_row([system("Be kind."), *TWO]))
    opens = OPENS.replace("'system'", "'developer': '<|tool|>', 'system'")
    knows = kind("developer", opens + ALWAYS_ASKS.jinja.removeprefix(OPENS))
    check(knows, [developer, *ONE], "<|tool|>Be kind.<|stop|><|ask|>Red: what?<|stop|><|reply|>«Red: a colour<|stop|>»")


# ---------------------------------------------------------------------------------------------------------------------
# Point 11: the template's switches, the date, and templates that no row can be encoded with


def prompt_of(template: Template, messages: list[dict], **options) -> str:
    encoder = make_encoder(template, **options)
    return encoder.tokenizer.decode(encoder.prompt_ids(to_conversation({"messages": messages}, answered=False)))


def test_the_templates_switches_go_to_every_rendering():
    closed = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    check(QWEN3, TWO, closed + "«eins<|im_end|>»", "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\neins<|im_end|>\n"
          "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n«zwei<|im_end|>»",
          kwargs='{"enable_thinking": false}')
    assert prompt_of(QWEN3, TWO[:1], kwargs='{"enable_thinking": false}') == closed
    assert prompt_of(QWEN3, TWO[:1]) == "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    assert refusal(QWEN3, THINKS, kwargs='{"enable_thinking": false}').startswith(
        "bad: messages[1] has a thought, but the prompt closes thinking")
    check(GLM, ONE, "[gMASK]<sop><|user|>\nRed: what?<|assistant|>\n<think></think>«\nRed: a colour<|user|>»",
          kwargs='{"enable_thinking": false}')


@pytest.mark.parametrize("template, written", [(LLAMA3, "It is 31 Dec 1999.\n"), (GPT_OSS, "Today: 1999-12-31<|end|>")],
                         ids=lambda value: getattr(value, "name", ""))
def test_every_rendering_has_the_date_of_the_runs_first_start(template, written):
    encoder = make_encoder(template, date="1999-12-31")
    examples = encode(encoder, as_row([*TWO, ask("Three?"), reply("drei")]))[0]
    assert all(context.count(written) == 1 for context, _ in pairs(encoder, examples)) and len(pairs(encoder, examples)) == 3
    assert written in prompt_of(template, TWO[:1], date="1999-12-31")


@pytest.mark.slow
def test_what_rows_are_encoded_with_names_the_token_cache():
    for template, dated in ((LLAMA3, True), (GPT_OSS, True), (CHATML, False)):
        assert (make_encoder(template, date="1999-12-31").identity != make_encoder(template, date="1999-12-30").identity) is dated
    encoders = [make_encoder(QWEN3), make_encoder(QWEN3, kwargs='{"enable_thinking": false}'),
                make_encoder(QWEN3, kwargs='{"enable_thinking": true}'), make_encoder(QWEN3, last_answer_only=True),
                make_encoder(CHATML), make_encoder(QWEN3, max_length=100)]
    assert len({encoder.identity for encoder in encoders}) == len(encoders)
    assert ChatEncoder(make_tokenizer(QWEN3), 4096, 2048, date="2031-05-06").identity == encoders[0].identity


@pytest.mark.parametrize("jinja, reason", [
    ("{% for m in messages %}{{ m.content }", "the chat template raises TemplateSyntaxError"),
    ("{{ raise_exception('not for chats') }}", "the chat template raises TemplateError: not for chats"),
    ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "the chat template does not write the answer")])
def test_a_template_that_no_row_can_be_encoded_with_is_said_at_the_start(jinja, reason):
    with pytest.raises(DataError) as caught:
        make_encoder(kind("useless", jinja))
    assert reason in str(caught.value)


def test_a_template_of_text_alone_needs_an_eos():
    tokenizer = copy.deepcopy(make_tokenizer(TEXT_ALONE))
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither the chat template nor an eos_token ends an answer"):
        ChatEncoder(tokenizer, 512, 256)


def test_a_template_of_ones_own_is_read_from_its_file(tmp_path):
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    (tmp_path / "own.jinja").write_text(TEXT_ALONE.jinja, encoding="utf-8")
    encoder = ChatEncoder(load_tokenizer(str(tmp_path / "model"), "", chat_template=str(tmp_path / "own.jinja")), 512, 256)
    assert marked(encoder, encode(encoder, as_row(ONE))[0]) == ["USER: Red: what?\n\nASSISTANT:« Red: a colour<|im_end|>»"]


# ---------------------------------------------------------------------------------------------------------------------
# Point 12: the plain template of a tokenizer that brings none

BARE = Template("bare", "", "", "</s>", "</s>")


@pytest.mark.parametrize("bos", ["", "<bos>"])
def test_a_tokenizer_without_a_template_gets_roles_in_text_and_no_new_token(tmp_path, bos):
    tokenizer = copy.deepcopy(make_tokenizer(BARE))
    tokenizer.chat_template = None
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), "")
    assert loaded.get_vocab() == make_tokenizer(BARE).get_vocab()
    encoder = ChatEncoder(loaded, 512, 256)
    assert encoder.stop_ids == [loaded.eos_token_id] == loaded.convert_tokens_to_ids(["</s>"])
    examples, counts = encode(encoder, as_row([system("Be kind."), *TWO]))
    assert marked(encoder, examples) == [
        bos + "<|system|>\nBe kind.\n<|user|>\nOne?\n<|assistant|>\n«eins</s>»\n<|user|>\nTwo?\n<|assistant|>\n«zwei</s>»"]
    assert pairs(encoder, encode(encoder, as_row(THINKS[:2]))[0]) == [
        (bos + "<|user|>\nOne?\n<|assistant|>\n", "<think>\nhm\n</think>\n\neins</s>")]


# ---------------------------------------------------------------------------------------------------------------------
# Point 13: control tokens

SPELLS = "a <|im_end|> b"


@pytest.mark.parametrize("row", [
    as_row([system(SPELLS), *TWO]), as_row([ask(SPELLS), reply("eins")]), as_row([ask("One?"), reply(SPELLS)]),
    as_row([ask("One?"), reply("eins", SPELLS)]), as_row([ask("One?"), reply(calls=[call(SPELLS)])]),
    as_row([ask("One?"), reply(calls=[call("Kiel")]), result(SPELLS), reply("So.")]),
    {"messages": TWO, "tools": [TIDE | {"function": TIDE["function"] | {"description": SPELLS}}]},
    {"messages": [*TWO, ask(SPELLS)]}, {"prompt": "One?", "completion": SPELLS}, {"text": SPELLS}], ids=lambda row: str(row)[:60])
def test_a_row_that_spells_a_control_token_is_skipped_and_counted(row):
    assert refusal(QWEN3, row) == "dropped: a text spells a control token"
    spelt = json.loads(json.dumps(row).replace("<|im_end|>", "<|im-end|>"))
    assert encode(make_encoder(QWEN3), spelt)[1]["examples"] >= 1


def test_a_token_without_the_flag_of_a_control_token_is_text():
    check(CHATML, [ask("</think> or <think>?"), reply("</think>")],
          "<|im_start|>user\n</think> or <think>?<|im_end|>\n<|im_start|>assistant\n«</think><|im_end|>»")
    ids = encode(make_encoder(CHATML), as_row([ask("One?"), reply("</think>")]))[0][0][0]
    assert ids[-2] == make_tokenizer(CHATML).convert_tokens_to_ids("</think>")


@pytest.mark.slow
def test_user_defined_symbols_of_a_sentencepiece_model_are_text(tmp_path):
    sentences = [" ".join(words) for words in itertools.permutations(("one", "two", "three", "tide", "wind"))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=(model := io.BytesIO()), vocab_size=300, byte_fallback=True,
        user_defined_symbols=["[tab]"], control_symbols=["[go]"], minloglevel=2, hard_vocab_limit=False, pad_id=3)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    encoder = ChatEncoder(load_tokenizer(str(tmp_path), ""), 512, 256)
    assert {"<s>", "</s>"} <= set(encoder.template.control_tokens) and "[tab]" not in encoder.template.control_tokens
    (ids, trained), = encode(encoder, as_row([ask("one"), reply("two[tab]three")]))[0]
    written = [token for token, on in zip(encoder.tokenizer.convert_ids_to_tokens(ids), trained) if on]
    assert "[tab]" in written and written[-1] == "</s>" and "two" in "".join(written)
    assert encode(encoder, as_row([ask("one"), reply("two</s>")]))[1]["dropped: a text spells a control token"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# The principle, on conversations that nobody has thought of

PIECES = ["a", " b", "Kiel", "\n", "\n\n", "  ", "\t", "é", "日本", "👩‍👩‍👧", "\u2028", "\xa0", "{", "\"", "(", ":", "user",
          "assistant\n", "Master:", "zq", "<", "</", "[INST", "<|x|>", "\\n", "0"]
SPEAKS_BEFORE_CALLS = (CHATML, QWEN3, CALLS_ARE_CLOSED, KEEPS_BEHIND_QUESTION, ITEMS)
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=6).map("".join)
WORDED = TEXTS.map(lambda text: text if text.strip() else text + "x")


@st.composite
def conversations(draw, template: Template) -> list[dict]:
    """System or none, one to four exchanges, with thoughts, and with calls and their results, where the template has them.

    No text spells a control token.
    """
    thought = st.just("") | WORDED if template.thoughts else st.just("")
    messages = [system(draw(WORDED))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append(ask(draw(WORDED)))
        for number in range(draw(st.integers(0, 2)) if template.tools else 0):
            id = f"id{len(messages):07}"
            words = draw(st.just("") | WORDED) if template in SPEAKS_BEFORE_CALLS else ""
            messages.append(reply(words, draw(thought), [call(draw(TEXTS), id, ("tide", "wind")[number])]))
            messages.append(result(draw(WORDED), id, ("tide", "wind")[number]))
        messages.append(reply(draw(WORDED), draw(thought)))
    assume(not make_encoder(template).template.control.search(json.dumps(messages, ensure_ascii=False)))  # such a row is dropped
    return messages


def as_engines_feed(template: Template, messages: list[dict]) -> list[dict]:
    """Messages as one writes them for this template."""
    messages = copy.deepcopy(messages)
    for message in messages:
        if thought := message.pop("reasoning_content", ""):
            if template.thoughts == "content":
                message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
            else:
                message[template.thoughts] = thought
    if template.folds_system and messages[0]["role"] == "system":
        rule, question = messages[0]["content"], messages[1]["content"]
        messages[:2] = [ask(rule + "\n\n" + question)]
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages] \
        if template is PARTS else messages


def contexts_of(template: Template, messages: list[dict]) -> list[str]:
    """What transformers feeds before each answer."""
    jinja = template.jinja
    for form, date in (("%d %b %Y", "06 May 2031"), ("%Y-%m-%d", "2031-05-06")):
        jinja = jinja.replace(f"strftime_now('{form}')", f"'{date}'")
    fed, tools = as_engines_feed(template, messages), as_row(messages).get("tools")
    return [make_tokenizer(template).apply_chat_template(
        fed[:i], tools=tools, chat_template=jinja, tokenize=False, add_generation_prompt=True, **json.loads(template.kwargs))
        for i, message in enumerate(fed) if message["role"] == "assistant"]


def squash(text: str) -> str:
    return "".join(text.split())


def check_written(template: Template, encoder: ChatEncoder, answer: dict, target: str) -> None:
    """The target is the answer: its thought, its words, its call, and one end."""
    assert target.endswith(tuple(template.ends.split()))
    if "tool_calls" in answer:
        call, = answer["tool_calls"]
        assert squash(answer["content"]) in squash(target) and call["function"]["name"] in target
        assert json.dumps(call["function"]["arguments"]["port"], ensure_ascii=False)[1:-1] in target or \
            call["function"]["arguments"]["port"] in target
    else:
        assert encoder.read_answer(encoder.tokenizer(target)["input_ids"]) == answer["content"].strip()
    assert squash(answer.get("reasoning_content", "")) in squash(target)


@pytest.mark.slow
@each(TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_answer_is_a_target_once_behind_what_an_engine_feeds(template, data):
    messages = data.draw(conversations(template))
    encoder, ids_of = make_encoder(template), lambda text: make_tokenizer(template)(text)["input_ids"]
    examples, counts = encode(encoder, as_row(messages))
    assert not [name for name in counts if name.startswith(("bad", "dropped"))], counts
    answers = [message for message in messages if message["role"] == "assistant"]
    answer_after = dict(zip(contexts_of(template, messages), answers, strict=True))
    found = pairs(encoder, examples)
    assert sorted(context for context, _ in found) == sorted(answer_after) and len(answer_after) == len(answers)
    for context, target in found:
        check_written(template, encoder, answer_after[context], target)
    is_merged = "answers in the tokens that they were written in" in counts
    for ids, on in examples:
        for i, (start, stop) in enumerate(spans(on)):
            assert ids[start:stop] == ids_of(encoder.tokenizer.decode(ids[start:stop]))
            assert ids[:start] == ids_of(encoder.tokenizer.decode(ids[:start])) or i and is_merged
        assert len(ids) == spans(on)[-1][1]  # nothing behind the last target
    assert encoder.prompt_ids(to_conversation(as_row(messages) | {"messages": messages[:-1]}, answered=False)) == \
        ids_of(contexts_of(template, messages)[-1])


@pytest.mark.slow
@each(TEMPLATES)
@settings(max_examples=20, deadline=None)
@given(data=st.data(), max_length=st.integers(8, 100))
def test_what_is_too_long_loses_context_first_and_never_teaches_to_stop_early(template, data, max_length):
    messages = data.draw(conversations(template))
    whole, encoder = make_encoder(template), make_encoder(template, max_length=max_length)
    targets = [target for _, target in pairs(whole, encode(whole, as_row(messages))[0])]
    examples, counts = encode(encoder, as_row(messages))
    assert sum(len(ids) for ids, _ in examples) == counts.get("tokens kept", 0)
    for ids, on in examples:
        assert len(ids) <= max_length and not on[0]
        for start, stop in spans(on):
            text = encoder.tokenizer.decode(ids[start:stop])
            if text not in targets:
                assert stop in (max_length - 1, max_length) and stop >= len(ids) - 1
                assert not text.endswith(tuple(template.ends.split()))


# ---------------------------------------------------------------------------------------------------------------------
# transformers' own mask, {% generation %}, which TRL trains with: the same, or other for a reason that is named

MARKED_CHATML = replace(CHATML, name="marked chatml", jinja=joined(r"""
    {% if tools %}<|im_start|>system{{ '\n' }}""" + NAMES + r"""<|im_end|>{{ '\n' }}{% endif %}
    {% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}{{ '\n' }}
    {% if m.role == 'assistant' %}{% generation %}{{ m.content }}
    {% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>{% endgeneration %}
    {% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}
    {% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"""))
MARKED_LLAMA3 = replace(LLAMA3, name="marked llama 3", tools=False, jinja=joined(r"""
    {{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\n' }}
    {% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}
    {% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}
    {% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n' }}{% endif %}"""))
MARKED_GEMMA = replace(GEMMA, name="marked gemma", folds_system=False, jinja=joined(r"""
    {{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}{{ '\n' }}
    {% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<end_of_turn>{% endgeneration %}
    {% else %}{{ m.content | trim }}<end_of_turn>{% endif %}{{ '\n' }}{% endfor %}
    {% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}"""))
MARKED_MISTRAL = replace(MISTRAL, name="marked mistral", tools=False, jinja=joined(r"""
    {{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
    {% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}{% else %}[INST]{{ m.content }}[/INST]{% endif %}
    {% endfor %}"""))


def theirs(template: Template, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """A row's ids and mask, as transformers gives them."""
    row = as_row(messages)
    both = make_tokenizer(template).apply_chat_template(
        as_engines_feed(template, messages), tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=True,
        **json.loads(template.kwargs))
    return both["input_ids"], list(map(bool, both["assistant_masks"]))


@pytest.mark.slow
@each([MARKED_CHATML, MARKED_LLAMA3, MARKED_GEMMA, MARKED_MISTRAL])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_mask_is_transformers_own_but_for_tokens_that_reach_across_a_border(template, data):
    """Point 1: an engine tokenises what it feeds apart from what the model writes. Behind the last end nothing is written."""
    messages = data.draw(conversations(template))
    encoder, ids_of = make_encoder(template), lambda text: make_tokenizer(template)(text)["input_ids"]
    ((ids, trained),), _ = encode(encoder, as_row(messages))
    their_ids, mask = theirs(template, messages)
    decode = encoder.tokenizer.decode
    whole, text = decode(their_ids), decode(ids)
    assert whole.startswith(text) and whole[len(text):].strip() == ""
    across = [i for i, (context, target) in enumerate(pairs(encoder, [(ids, trained)]))
              if ids_of(context + target)[:len(ids_of(context))] != ids_of(context)]
    if not across:
        assert their_ids[:len(ids)] == ids and mask == trained + [False] * (len(mask) - len(trained))
    else:
        assert their_ids[:len(ids)] != ids


DIFFERENCES = [
    ("2: the newline behind the end is not written by a model", CHATML, r"""
     {% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}
     <|im_end|>
     {{ '\n' }}{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}
     {% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}""", TWO,
     ["<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n«eins<|im_end|>»\n<|im_start|>user\nTwo?<|im_end|>\n"
      "<|im_start|>assistant\n«zwei<|im_end|>»"],
     "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n«eins<|im_end|>\n»<|im_start|>user\nTwo?<|im_end|>\n"
     "<|im_start|>assistant\n«zwei<|im_end|>\n»"),
    ("2: nor a second end", CHATML, r"""
     {% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}
     <|im_end|>
     {% if loop.last %}</s>{% endif %}{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}
     {% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}""", TWO[:2],
     ["<|im_start|>user\nOne?<|im_end|><|im_start|>assistant\n«eins<|im_end|>»"],
     "<|im_start|>user\nOne?<|im_end|><|im_start|>assistant\n«eins<|im_end|></s>»"),
    ("2: the opener of the next turn ends an answer where nothing else does, the last one too", GLM, r"""
     {% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}
     {% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}""", TWO,
     ["<|user|>One?<|assistant|>«eins<|user|>»Two?<|assistant|>«zwei<|user|>»"],
     "<|user|>One?<|assistant|>«eins»<|user|>Two?<|assistant|>«zwei»"),
    ("2: an answer ends with what ends the last one", CHATML, r"""
     {% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}
     {% if loop.last %}</s>{% else %}<|im_end|>{% endif %}{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}
     {% endfor %}
     {% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}""", TWO,
     ["<|im_start|>user\nOne?<|im_end|><|im_start|>assistant\n«eins</s>»",
      "<|im_start|>user\nOne?<|im_end|><|im_start|>assistant\neins<|im_end|><|im_start|>user\nTwo?<|im_end|>"
      "<|im_start|>assistant\n"
      "«zwei</s>»"],
     "<|im_start|>user\nOne?<|im_end|><|im_start|>assistant\n«eins<|im_end|>»<|im_start|>user\nTwo?<|im_end|>"
     "<|im_start|>assistant\n"
     "«zwei</s>»"),
    ("3: what the prompt has opened is not opened again", R1, r"""
     {% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>{% generation %}
     {{ '<think>' + (m.reasoning_content or '') + '</think>' + m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}
     {% if add_generation_prompt %}<|Assistant|><think>{% endif %}""", [ask("One?"), reply("eins", "hm")],
     ["<|User|>One?<|Assistant|><think>«hm</think>eins<|end_of_sentence|>»"],
     "<|User|>One?<|Assistant|>«<think>hm</think>eins<|end_of_sentence|>»"),
    ("3: an empty thought that the prompt has closed is not written again", QWEN3, r"""
     {% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{% if m.role == 'assistant' %}{% generation %}
     {{ '<think>\n\n</think>\n\n' + m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}
     {% endfor %}
     {% if add_generation_prompt %}<|im_start|>assistant{{ '\n<think>\n\n</think>\n\n' }}{% endif %}""", TWO[:2],
     ["<|im_start|>user\nOne?<|im_end|><|im_start|>assistant\n<think>\n\n</think>\n\n«eins<|im_end|>»"],
     "<|im_start|>user\nOne?<|im_end|><|im_start|>assistant\n«<think>\n\n</think>\n\neins<|im_end|>»"),
    ("1: a thought that history drops is trained in a sequence of its own", QWEN3, r"""
     {% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{% if m.role == 'assistant' %}{% generation %}
     {% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>
     {% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}
     {% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}""",
     [ask("One?"), reply("eins", "hm"), ask("Two?"), reply("zwei", "ho")],
     ["<|im_start|>user\nOne?<|im_end|><|im_start|>assistant\n«<think>hm</think>eins<|im_end|>»",
      "<|im_start|>user\nOne?<|im_end|><|im_start|>assistant\neins<|im_end|><|im_start|>user\nTwo?<|im_end|>"
      "<|im_start|>assistant\n"
      "«<think>ho</think>zwei<|im_end|>»"],
     "<|im_start|>user\nOne?<|im_end|><|im_start|>assistant\n«eins<|im_end|>»<|im_start|>user\nTwo?<|im_end|>"
     "<|im_start|>assistant\n"
     "«<think>ho</think>zwei<|im_end|>»")]


@pytest.mark.parametrize("reason, family, jinja, messages, ours, their", DIFFERENCES, ids=[case[0] for case in DIFFERENCES])
def test_where_the_mask_is_other_than_transformers_own(reason, family, jinja, messages, ours, their):
    template = replace(family, name=reason, jinja=joined(jinja), control=family.control + " </s>", thoughts="reasoning_content")
    check(template, messages, *ours)
    assert marked(make_encoder(template), [theirs(template, messages)]) == [their]


def test_a_last_answer_that_others_of_its_row_leave_out_is_the_only_one_trained_as_transformers_can_not():
    """Point 5: the mask follows the row, too."""
    messages = [TWO[0], TWO[1] | {"train": False}, *TWO[2:]]
    check(MARKED_MISTRAL, messages, "<bos>[INST]One?[/INST] eins</s>[INST]Two?[/INST]« zwei</s>»")
    assert marked(make_encoder(MARKED_MISTRAL), [theirs(MARKED_MISTRAL, TWO)]) == [
        "<bos>[INST]One?[/INST]« eins</s>»[INST]Two?[/INST]« zwei</s>»"]
