"""A chat template as an engine uses it: what it feeds the model before an answer, and what the model has to write then.

Nothing of a template is believed: what ends a turn, what closes a thought, whether tools are written, is learnt by rendering
made-up messages and looking where their words come out.
"""

import datetime
import functools
import itertools
import json
import os
import re
from typing import NamedTuple

from jinja2.meta import find_undeclared_variables
from transformers.utils.chat_template_utils import _compile_jinja_template

from rows import THOUGHT as THOUGHT_KEYS

# Made-up words, which stand in no template
QUESTION, ANSWER, THOUGHT, NEXT, NAME, KEY, VALUE = [
    f"zq{word}qz" for word in ("question", "answer", "thought", "next", "name", "key", "value")]
SAID = (THOUGHT, ANSWER, NAME, KEY, VALUE)  # those of an answer
TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
# What a thought stands between where it is part of the content; a template may have other tags of its own
OPENER, CLOSER = "<think>", "</think>"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: object) -> dict:
    return {"type": "function", "id": "call00001", "function": {"name": name, "arguments": arguments}}


TOOLS = [{"type": "function", "function": {"name": NAME, "description": NAME, "parameters": {
    "type": "object", "properties": {KEY: {"type": "string", "description": KEY}}, "required": [KEY]}}}]


def squash(text: str) -> str:
    """The text without white space, which templates strip and add."""
    return "".join(text.split())


def on_date(template: str, date: str) -> str:
    """The template with `date`, YYYY-MM-DD, wherever it asks for today's: a run that goes on tomorrow must get the same rows."""
    if not date:
        return template
    day = datetime.date.fromisoformat(date)
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda match: json.dumps(day.strftime(match[2])), template)


class Ending(NamedTuple):
    tail: str  # what the template writes behind the words of the last answer
    end: str  # what the model has to write there: the beginning of the tail, or what would be written before another turn


class ChatTemplate:
    """The tokenizer's chat template. Its methods take messages and tools as rows.py gives them, after `prepare`."""

    def __init__(self, tokenizer, date: str = "", kwargs: dict | None = None):
        """`kwargs` are the template's own switches, `date` what it takes for today (YYYY-MM-DD), if it asks.

        Raises ValueError where no answer can be rendered.
        """
        self.tokenizer, self.kwargs = tokenizer, dict(kwargs or {})
        self.templates = {with_tools: on_date(tokenizer.get_chat_template(tools=TOOLS if with_tools else None), date)
                          for with_tools in (False, True)}
        self.source = "".join(self.templates.values())
        self.identity = json.dumps([self.kwargs, self.source], sort_keys=True)
        if self.kwargs:
            parsed = [_compile_jinja_template(text).environment.parse(text) for text in self.templates.values()]
            if unread := self.kwargs.keys() - set().union(*map(find_undeclared_variables, parsed)):
                raise ValueError(f"model.template_kwargs: the template reads no {', '.join(sorted(unread))}")
        # A token is a control token by its flag: sentencepiece's user-defined symbols pass for special ones, but are text.
        flags = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        named = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.sep_token, tokenizer.cls_token]
        self.control_tokens = sorted({*(token for token, special in flags.items() if special),
                                      *(token for token in named if token and flags.get(token, True))})
        self.control = re.compile("|".join(map(re.escape, sorted(self.control_tokens, key=len, reverse=True))) or "(?!)")
        self.learn()

    def render(self, messages: list[dict], tools: list[dict] = (), for_answer: bool = False) -> str:
        """Messages → text; `for_answer` ends it with the generation prompt. Raises ValueError."""
        messages = self.fold_system(messages)
        if self.in_parts:
            messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        try:
            # tokenizer.apply_chat_template, but for what that does to each message anew on every call: rows.py has done it once
            template = _compile_jinja_template(self.templates[bool(tools)])
            return template.render(messages=messages, tools=tools or None, documents=None, add_generation_prompt=for_answer,
                                   **{**self.tokenizer.special_tokens_map, **self.kwargs})
        except Exception as error:  # a template is a program: it can raise anything
            raise ValueError(f"the chat template raises {type(error).__name__}: {' '.join(str(error).split())}") from error

    def attempt(self, messages: list[dict], tools: list[dict] = (), for_answer: bool = False) -> str:
        """render, but "" where it can't."""
        try:
            return self.render(messages, tools, for_answer)
        except ValueError:
            return ""

    # -----------------------------------------------------------------------------------------------------------------
    # What is learnt of the template

    def learn(self) -> None:
        asked, answered = [user(QUESTION)], [user(QUESTION), assistant(ANSWER)]
        self.arguments_as_text, self.writes_system = False, True
        for self.in_parts, tools in itertools.product((False, True), ([], TOOLS)):  # some take content as parts, some need tools
            if ANSWER in (whole := self.attempt(answered, tools)):
                break
        else:
            self.in_parts = False
            self.render(answered)  # says what is wrong
            raise ValueError("the chat template does not write the answer")
        prompt = self.attempt(asked, tools, for_answer=True)
        self.lead = whole.rpartition(ANSWER)[0].removeprefix(prompt) if whole.startswith(prompt) else ""
        self.learn_ends(whole, self.attempt([*answered, user(NEXT)], tools))
        self.learn_thoughts(prompt, tools)
        self.learn_calls()
        self.writes_system = NEXT in self.attempt([{"role": "system", "content": NEXT}, *asked], tools, for_answer=True)

    def learn_ends(self, whole: str, history: str) -> None:
        """How an answer in words ends, from `whole`, a question and its answer, and `history`, which another question follows."""
        self.gap = history.rpartition(ANSWER)[2].partition(NEXT)[0] if NEXT in history else ""
        behind_question = whole.partition(QUESTION)[2].partition(ANSWER)[0]
        ends_question = self.control.search(behind_question)
        # An answer may be closed by a token that does not end the turn, but what ends a question does
        self.turn_ends = {ends_question[0]} if ends_question else set()
        eos = self.tokenizer.eos_token
        if eos and eos in self.gap:
            first = self.control.search(self.gap)
            behind_first = squash(self.gap[first.end():].partition(eos)[0]) if first[0] != eos else ""
            self.turn_ends = {eos} if behind_first or eos in behind_question else self.turn_ends | {eos}
        tail = whole.rpartition(ANSWER)[2]
        self.in_words = Ending(tail, self.end_of(tail, self.gap))
        self.known_ends = {self.last_control(self.in_words.end), self.last_control(self.end_of("", self.gap))} - {""}

    def end_of(self, tail: str, gap: str) -> str:
        """What ends an answer in words behind which the template writes `tail`, or `gap` if a question follows."""
        for text in (tail, gap):
            tokens = [*self.control.finditer(text)]
            token = next((token for token in tokens if token[0] in self.turn_ends), tokens[0] if tokens else None)
            if token:
                return text[:token.end()] if text.startswith(tail) else token[0]
        if not self.tokenizer.eos_token:
            raise ValueError("neither the chat template nor an eos_token ends an answer")
        return self.tokenizer.eos_token

    @property
    def ends(self) -> set[str]:
        """What ends an answer in words, and an answer that is a call."""
        return {ending.end for ending in (self.in_words, self.in_calls) if ending}

    def last_control(self, text: str) -> str:
        return ([""] + self.control.findall(text))[-1]

    def learn_thoughts(self, prompt: str, tools: list[dict]) -> None:
        """Under which key the template reads thoughts, and what it writes around them."""
        self.thought_key, self.opening, self.closing = "", "", ""
        for key in THOUGHT_KEYS:
            said = self.attempt([user(QUESTION), assistant(ANSWER, **{key: THOUGHT})], tools)
            called = self.attempt([user(QUESTION), assistant("", tool_calls=[call(NAME, {})], **{key: THOUGHT})], TOOLS)
            if THOUGHT in said or THOUGHT in called:
                self.thought_key = key
                if THOUGHT in said:
                    before, _, after = said.partition(THOUGHT)
                    self.opening, self.closing = before.removeprefix(prompt), after.rpartition(ANSWER)[0]
                break
        tags = re.search(r"<(\|?)/[^<>\s]+>|\[/[^\[\]\s]+\]|<\|\w*END_\w+\|>", self.closing)
        self.closer = tags[0] if tags else CLOSER
        self.opener = self.closer.replace("/", "", 1).replace("END_", "START_") if tags else OPENER
        self.has_tags = bool(tags) or not self.thought_key and (self.opener in self.source or self.closer in self.source)
        opener, closer = re.escape(self.opener), re.escape(self.closer)
        self.opened, self.closed = re.compile(rf"{opener}(\s*)\Z"), re.compile(rf"({opener}\s*)?{closer}\s*\Z")
        self.empty_thought = re.compile(rf"\s*({opener}\s*)?{closer}\s*")
        self.in_content = re.compile(rf"\s*(?:{opener}|{OPENER})(.*?)(?:{closer}|{CLOSER})(.*)", re.DOTALL)

    def learn_calls(self) -> None:
        """Whether the template writes calls, and how an answer ends that is one."""
        self.in_calls = None
        result = {"role": "tool", "content": NEXT, "name": NAME, "tool_call_id": "call00001"}
        for arguments in ({KEY: VALUE}, json.dumps({KEY: VALUE})):
            messages = [user(QUESTION), assistant("", tool_calls=[call(NAME, arguments)])]
            if VALUE in (whole := self.attempt(messages, TOOLS)):
                history = self.attempt([*messages, result], TOOLS, for_answer=True)
                gap = self.behind_words(history.rpartition(NEXT)[0]) if NEXT in history else ""
                self.in_calls = self.ending_of_call(self.behind_words(whole), gap)
                self.arguments_as_text = isinstance(arguments, str)
                return

    def behind_words(self, text: str) -> str:
        """What follows the last of an answer's made-up words."""
        end = max((text.rfind(word) + len(word) for word in SAID if word in text), default=len(text))
        return text[end:]

    def ending_of_call(self, tail: str, gap: str) -> Ending:
        """A call may be closed by a control token that ends nothing: the turn's end is what ends an answer in words, if it is
        there; else the last control token; else the first that a result behind the call brings."""
        if tokens := [*self.control.finditer(tail)]:
            begins = tokens[0].start()  # what stands before it belongs to the call
            known, later = (next((token for token in self.control.finditer(text) if token[0] in self.known_ends), None)
                            for text in (tail, gap))
            if not known and later and gap.startswith(tail):
                return Ending(tail[begins:], gap[begins:later.end()])
            return Ending(tail[begins:], tail[begins:(known or tokens[-1]).end()])
        token = self.control.search(gap)
        if token:
            return Ending("", gap[len(tail):token.end()] if gap.startswith(tail) else token[0])
        return Ending("", self.last_control(self.in_words.end))

    # -----------------------------------------------------------------------------------------------------------------
    # Messages as the template reads them

    def prepare(self, messages: list[dict]) -> list[dict]:
        """Messages as rows.py gives them → as many, as this template reads them.

        A developer is the system where the template knows none; a thought is under the key that the template reads, or in the
        content.
        """
        prepared = [dict(message) for message in messages]
        for message in prepared:
            if message["role"] == "developer" and "developer" not in self.source:
                message["role"] = "system"
            if message["role"] == "assistant":
                self.place_thought(message)
            if "tool_calls" in message:
                message["tool_calls"] = [self.in_form(each) for each in message["tool_calls"]]
        return prepared

    def in_form(self, call: dict) -> dict:
        """The call with its arguments as the template takes them: an object, or where it fails on that, JSON text."""
        function = call["function"]
        if not self.arguments_as_text or isinstance(function["arguments"], str):
            return call
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    def fold_system(self, messages: list[dict]) -> list[dict]:
        """Puts a system message that the template would lose or refuse in front of the first question."""
        if self.writes_system or [message["role"] for message in messages[:2]] != ["system", "user"]:
            return messages
        system, question, *rest = messages
        return [{**question, "content": system["content"] + "\n\n" + question["content"]}, *rest]

    def place_thought(self, message: dict) -> None:
        thought, content = self.split_thought(message)
        if thought and self.thought_key:
            message.pop("reasoning_content", None)
            message |= {self.thought_key: thought, "content": content}
        elif thought and "reasoning_content" in message and self.has_tags:
            del message["reasoning_content"]
            message["content"] = f"{self.opener}\n{thought}\n{self.closer}\n\n{content}"

    def split_thought(self, message: dict) -> tuple[str, str]:
        """A message's (thought or "", content without it)."""
        content = message["content"]
        for key in THOUGHT_KEYS:
            if message.get(key):
                return message[key], content
        if match := self.in_content.match(content):
            if match[1].strip():
                return match[1].strip("\n"), match[2].lstrip("\n")
        return "", content

    def check_written(self, messages: list[dict], tools: list[dict], context: str) -> None:
        """Raises ValueError where the template leaves out a message of the prepared ones, whose context this is, or a tool."""
        for i, tool in enumerate(tools):
            if tool["function"]["name"] not in context:
                raise ValueError(f"tools[{i}]: the chat template does not write the tool {tool['function']['name']!r}")
        shape = tuple((message["role"], bool(message["content"]), len(message.get("tool_calls", ()))) for message in messages)
        if lost := self.left_out(shape, bool(tools)):
            i = lost - 1
            raise ValueError(f"messages[{i}]: the chat template leaves out a message of the role {messages[i]['role']!r} here")

    @functools.lru_cache(10_000)  # noqa: B019 (there is one template a process)
    def left_out(self, shape: tuple, with_tools: bool) -> int:
        """Which message, counted from 1, no context holds of made-up ones of this shape; an answer may be left out."""
        words, messages = [f"zq{i}qz" for i in range(len(shape))], []
        for word, (role, has_content, n_calls) in zip(words, shape):
            message = {"role": role, "content": word if has_content else ""}
            if n_calls:
                message["tool_calls"] = [self.in_form(call(NAME, {KEY: VALUE}))] * n_calls
            messages.append(message | ({"tool_call_id": "call00001", "name": NAME} if role == "tool" else {}))
        before = [len(shape), *(i for i, (role, *_) in enumerate(shape) if role == "assistant")]  # a habit may hide it from some
        contexts = (self.attempt(messages[:i], TOOLS if with_tools else [], for_answer=True) for i in before)
        if not (text := next(contexts)):
            return 0
        lost = {word: i for i, (word, (role, has_content, _)) in enumerate(zip(words, shape), 1)
                if has_content and role != "assistant" and word not in text}
        while lost and (text := next(contexts, None)) is not None:
            lost = {word: i for word, i in lost.items() if word not in text}
        return next(iter(lost.values()), 0)

    # -----------------------------------------------------------------------------------------------------------------
    # The principle

    def pair(self, messages: list[dict], tools: list[dict], i: int) -> tuple[str, str]:
        """Prepared messages → (context, target) of answer i: what an engine feeds, and what the model has to write then.

        Raises ValueError where the template does not write all of the answer, or it can't be told where it begins or ends.
        """
        context = self.render(messages[:i], tools, for_answer=True)
        rendering = self.render(messages[:i + 1], tools)
        begins = len(context) if rendering.startswith(context) else self.locate(messages, tools, i, rendering, context)
        words, end = self.split_end(messages, tools, i, rendering[begins:])
        return context, self.put_thought_right(words, context, messages[i], i) + end

    def thought_state(self, context: str) -> tuple[str, int]:
        """How a context ends: in an "opened" or a "closed" thought, and where that begins; or ("", its end)."""
        for state, pattern in (("opened", self.opened), ("closed", self.closed)):
            if match := pattern.search(context, max(0, len(context) - 100)):
                return state, match.start()
        return "", len(context)

    def marked(self, messages: list[dict], i: int) -> list[dict]:
        """messages[:i + 1] with made-up words for those of answer i."""
        message = dict(messages[i])
        for key, word in (("content", ANSWER), (self.thought_key, THOUGHT)):
            if message.get(key):
                message[key] = word
        if "tool_calls" in message:
            made_up = self.in_form(call(NAME, {KEY: VALUE}))
            message["tool_calls"] = [made_up | {"id": each.get("id")} for each in message["tool_calls"]]
        return [*messages[:i], message]

    def locate(self, messages: list[dict], tools: list[dict], i: int, rendering: str, context: str) -> int:
        """Where the rendering goes on behind the answer's own header, which is not where the context ends."""
        marked = self.render(self.marked(messages, i), tools)
        found = [marked.find(word) for word in SAID if word in marked]
        if not found:
            raise ValueError(f"messages[{i}]: the chat template does not write it")
        before, history = marked[:min(found)], self.attempt(messages[:i], tools)
        if history and context.startswith(history) and context != history:
            prompt = context[len(history):]
        else:  # the template writes the header whether asked for or not, or none at all
            asked = self.attempt([*messages[:i - 1], {**messages[i - 1], "content": NEXT}], tools, for_answer=True)
            prompt = asked.rpartition(NEXT)[2] if NEXT in asked else ""
        shared = len(os.path.commonprefix([context, before]))  # up to what the prompt has opened behind the header
        for unit in itertools.chain(*(pattern.finditer(text) for pattern in (self.control, TAG) for text in (before, context))):
            if unit.start() < shared < unit.end():  # what is a token or a tag is not half shared
                shared = unit.start()
        if rendering.startswith(before):
            if shared == len(before) or prompt and shared > len(context) - len(prompt):
                return shared
            if prompt and (position := before.rfind(prompt)) >= 0:
                return position + len(prompt)
        raise ValueError(f"messages[{i}]: the chat template writes the prompt otherwise once the answer follows, and where the "
                         "answer begins can't be told")

    def split_end(self, messages: list[dict], tools: list[dict], i: int, body: str) -> tuple[str, str]:
        """What the template writes behind the header → (the answer's words, what ends them)."""
        is_call = "tool_calls" in messages[i]
        ending = self.in_calls if is_call else self.in_words
        if is_call and not ending:
            raise ValueError(f"messages[{i}].tool_calls: the chat template does not write them")
        if not body.endswith(ending.tail):  # what stands behind an answer may depend on what stands before it
            tail = self.behind_words(self.render(self.marked(messages, i), tools))
            ending = self.ending_of_call(tail, "") if is_call else Ending(tail, self.end_of(tail, self.gap))
            if not body.endswith(ending.tail):
                raise ValueError(f"messages[{i}]: where the answer ends can't be told from what the chat template writes")
        return body[:len(body) - len(ending.tail)], ending.end

    def put_thought_right(self, words: str, context: str, message: dict, i: int) -> str:
        """The words of an answer, with its thought once: neither opened again nor left open, neither lost nor doubled."""
        thought, content = self.split_thought(message)
        state, position = self.thought_state(context)
        if state == "closed" and thought:
            raise ValueError(f"messages[{i}] has a thought, but the prompt closes thinking: a switch of the template may open "
                             'it, as model.template_kwargs={"enable_thinking": true} does in some')
        if state == "opened":
            space = context[position + len(self.opener):]
            words = self.without_opener(words, space)
            if not thought and not words.lstrip().startswith(self.closer):
                closing = self.closing or f"{space and chr(10)}{self.closer}\n\n"
                header = closing.partition(self.closer)[2].strip()  # of an answer in words, which has it without a thought too
                words = (closing.partition(header)[0] if header and ("tool_calls" in message or words.startswith(header))
                         else closing) + words
        elif (empty := self.empty_thought.match(words)) and (state == "closed" or thought):
            words = words[empty.end():]
        if thought and not self.holds_thought(words, thought, state):
            if "tool_calls" in message or not (self.has_tags or self.in_content.match(message["content"])):
                raise ValueError(f"messages[{i}].reasoning_content: the chat template does not write it")
            words = message["content"]  # put right from the message itself
            if not self.in_content.match(words):
                words = f"{self.opener}\n{thought}\n{self.closer}\n\n{content}"
            if state == "opened":
                words = self.without_opener(words, space)
        names = [each["function"]["name"] for each in message.get("tool_calls", ())]
        if lost := [name for name in names if name not in words]:
            raise ValueError(f"messages[{i}].tool_calls: the chat template does not write {lost[0]!r}")
        is_whole = content in words if names else words.endswith(content)
        if not is_whole and not (squash(content) in squash(words) if names else squash(words).endswith(squash(content))):
            raise ValueError(f"messages[{i}].content: the chat template does not write it as it is")
        return words

    def without_opener(self, words: str, space: str) -> str:
        """The words without the opening of a thought that the context, with `space` behind it, has opened already."""
        if words.lstrip().startswith(self.opener):
            return words.lstrip().removeprefix(self.opener).removeprefix(space)
        return words

    def holds_thought(self, words: str, thought: str, state: str) -> bool:
        if state == "opened":
            return squash(words).startswith(squash(thought))
        return squash(thought) in squash(words)

    def read_answer(self, text: str) -> str:
        """What a model has written behind a context → the answer's words."""
        is_opened = text.strip().startswith(self.opening.strip())  # where no tag says so, mere words may close a thought
        for closing in (self.closing.strip() if self.has_tags or is_opened else "", self.closer):
            if closing and closing in text:
                text = text.partition(closing)[2]
        return self.control.sub("", text.strip().removeprefix(self.lead.strip())).strip()
