"""Files → rows → conversations: what people's rows are called, in one table of aliases.

A file is .jsonl (a row a line), .json (a list of rows, one row, or in truth a row a line) or .csv (with a header), each also
with .gz behind it. What a row is, its keys say; it is one of
    messages       {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}, or that list
    an exchange    {"instruction": "...", "input": "...", "output": "..."}, or by other names {"prompt": ..., "completion": ...}
    a text         {"text": "..."}, of which every token is trained
"""

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data import DataError

# Each list of a row's keys that mean the same, which a row may have one of
MESSAGES = ("messages", "conversations", "conversation")
QUESTION = ("instruction", "question", "query", "prompt", "inputs")
INPUT = ("input", "context")
ANSWER = ("output", "response", "answer", "completion", "targets")
SYSTEM, TOOLS = ("system", "system_prompt"), ("tools", "functions")
CHOSEN, REJECTED = ("chosen", "chosen_response"), ("rejected", "rejected_response")
# and of a message's
ROLE, CONTENT, THOUGHT = ("role", "from"), ("content", "value", "text"), ("reasoning_content", "reasoning", "thinking")
ARGUMENTS = ("arguments", "parameters")  # of a call
# Each key that says how much a message counts in the loss, the product of all, with what it may be
WEIGHTS = {**dict.fromkeys(("train", "loss"), ("true or false", lambda value: isinstance(value, bool))),
           "weight": ("1 or 0", lambda value: value in (1, 0) and not isinstance(value, bool))}
ROLES = {**{role: role for role in ("system", "developer", "user", "assistant", "tool", "function_call", "tool_call")},
         **dict.fromkeys(("human", "prompter"), "user"), **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
         **dict.fromkeys(("function", "observation", "ipython", "function_response", "tool_response"), "tool")}
TEXT_PARTS, THOUGHT_PARTS = ("text", "input_text", "output_text"), ("thinking", "reasoning")
# What is no mere note, but would be lost where it is not read
OTHER_MEANINGS = {
    **dict.fromkeys((*CHOSEN, *REJECTED), "preferences are for dpo.py"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text is trained here"),
    **dict.fromkeys(("label", "kto_tag"), "judged answers are for KTO, not for supervised training"),
    "loss_weight": "an answer is trained or not: weight 1 or 0, or train true or false, in its message"}


class Conversation(NamedTuple):
    """What a row says. A message is {"role", "content": text, "train": 1 or 0} and, where the row has them, reasoning_content
    (text), tool_calls ([{"type", "id", "function": {"name", "arguments"}}]), tool_call_id and name."""

    messages: list[dict]
    tools: list[dict]  # {"type": "function", "function": {"name", ...}} each
    text: str | None  # of a row that is a text; it has no messages then
    unread: set[str]  # keys that mean nothing here
    n_left_out: int  # answers before the first question
    columns: dict[str, float]  # {} but in forks: the document's value of each column that is added to data.PER_DOCUMENT


# ---------------------------------------------------------------------------------------------------------------------
# Files → rows

SUFFIXES = (".jsonl", ".json", ".csv")
NAMES = "a .jsonl, .json or .csv file, or one of them with .gz behind it"


def kind_of(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix


def list_files(paths: list[str]) -> list[Path]:
    """Returns the files of rows that the paths name; a folder stands for all those below it, sorted. Raises DataError."""
    files, errors = [], []
    for path in map(Path, paths):
        found = [file for file in below(path) if holds_rows(file)] if path.is_dir() else [path]
        if not found:
            errors.append(f"{path}: this folder does not hold {NAMES}")
        for file in found:
            if not file.exists():
                errors.append(f"{file}: {'a link to nothing' if file.is_symlink() else 'no such file'}")
            elif kind_of(file) not in SUFFIXES:
                errors.append(f"{file}: not {NAMES}")
            elif not file.is_file():
                errors.append(f"{file}: not a regular file, but a pipe or a device, which can't be read twice")
        files += found
    if errors:
        raise DataError("\n".join(errors))
    return files


def passed_over(paths: list[str]) -> list[Path]:
    """Returns what is below the folders among the paths, and is left out by list_files."""
    return [file for path in map(Path, paths) if path.is_dir() for file in below(path) if not holds_rows(file)]


def holds_rows(file: Path) -> bool:
    """Whether this, below a folder, is taken for rows by its name; a link to what is gone is rows that are missing."""
    return kind_of(file) in SUFFIXES and (file.is_file() or not file.exists())


def below(folder: Path) -> list[Path]:
    """Returns all that is below the folder, sorted, but for folders; a link to one is returned and not followed.

    Raises DataError.
    """
    def fail(error: OSError) -> None:  # os.walk would go on
        raise error

    try:
        paths = [Path(root, name) for root, folders, files in os.walk(folder, onerror=fail) for name in folders + files]
        return sorted(path for path in paths if path.is_symlink() or not path.is_dir())
    except OSError as error:
        raise DataError(f"{error.filename}: can't be read: {error.strerror}") from error


def read_rows(file: Path) -> Iterator[tuple[int, object]]:
    """Yields (line number, row). Raises DataError where the file is damaged."""
    line, kind, table = 1, kind_of(file), None
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            if kind == ".json":
                yield from read_values(stream.read().decode("utf-8-sig"))
                return
            if kind == ".csv":
                csv.field_size_limit(sys.maxsize)
                table = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
                header, line = next(filter(None, table), []), table.line_num + 1
                if twice := [name for i, name in enumerate(header) if name and name in header[:i]]:
                    raise csv.Error(f"the header has {twice[0]!r} twice")
                for cells in table:
                    if len(cells) > len(header):
                        raise csv.Error("more cells than the header has")
                    if cells:  # no blank line
                        yield line, {key: cell for key, cell in zip(header, cells) if cell or key in ANSWER}
                    line = table.line_num + 1
                return
            for line, raw in enumerate(stream, 1):  # noqa: B007 (the except clauses name it)
                if text := raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip():
                    yield line, parse(json.loads, text)
    except UnicodeDecodeError as error:
        line = (table.line_num + 1 if table else line) + error.object.count(b"\n", 0, error.start)
        raise DataError(f"{file}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        line = error.lineno if kind == ".json" else line
        is_open = kind == ".jsonl" and line == 1 and error.pos == len(error.doc)
        hint = "; a row is one line of a .jsonl file: where it goes on, or is in a list, name the file .json" if is_open else ""
        raise DataError(f"{file}:{line}: not valid JSON at column {error.colno}: {error.msg}{hint}") from error
    except csv.Error as error:
        raise DataError(f"{file}:{line}: not valid CSV: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: can't be read: {getattr(error, 'strerror', None) or error}") from error


def read_values(text: str) -> Iterator[tuple[int, object]]:
    """Yields (line number, row) of a list of rows, one at a time, so that each can be named by its line; or of rows without a
    list around them. A list of which each is a message is one row."""
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    position, line, counted = space.match(text).end(), 1, 0
    opened = text[position:position + 1] == "["
    if opened:
        first = space.match(text, position + 1).end()
        opened = text[first:first + 1] != "{" or not is_message(parse(decode, text, first)[0])
        position = first if opened else position
    while position < len(text) and not (opened and text[position] == "]"):
        line, counted = line + text.count("\n", counted, position), position
        row, position = parse(decode, text, position)
        yield line, row
        position = space.match(text, position).end()
        if opened and text[position:position + 1] == ",":
            position = space.match(text, position + 1).end()
        elif opened and text[position:position + 1] != "]":
            raise json.JSONDecodeError("expected ',' or ']' after a row", text, position)
    if opened and text[position:position + 1] != "]":
        raise json.JSONDecodeError("expected ']' at the end of the list of rows", text, position)
    if opened and text[position + 1:].strip():
        raise json.JSONDecodeError("text after the list of rows", text, position + 1)


def is_message(value: dict) -> bool:
    """Whether this is a message and not a row."""
    roles = [value[key] for key in ROLE if isinstance(value.get(key), str)]
    return any(role in ROLES for role in roles) and not any(key in value for key in MESSAGES + ANSWER)


def parse(decode, text: str, *position: int):
    """Returns decode(text, *position); whatever else stops the decoder is raised as a JSONDecodeError too."""
    try:
        return decode(text, *position)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise json.JSONDecodeError(str(error), text, *(position or [0])) from error


# ---------------------------------------------------------------------------------------------------------------------
# Rows → conversations. All raise ValueError, which names the key.


def to_conversation(row: object, answered: bool = True) -> Conversation:
    """Returns what the row says; unless it must be `answered`, the answer to its last question may be missing."""
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {shown(row)}")
    rest = {key: value for key, value in row.items() if value is not None}
    rest.pop("skill", None)  # by which answers are scored: chat.read_questions
    refuse_other_meanings(rest)
    asks = [key for key in QUESTION + INPUT if key in rest]
    shapes = {"messages": any(key in rest for key in MESSAGES),
              "exchange": asks and (any(key in rest for key in ANSWER) or not answered and not any(map(rest.get, MESSAGES)))}
    shape = [name for name, fits in shapes.items() if fits] or ["text"] * ("text" in rest)
    if len(shape) != 1:
        raise ValueError(f"the keys {sorted(row)} fit {'no' if not shape else 'more than one'} shape of row; known are messages, "
                         "prompt + completion, instruction (+ input) + output, conversations, text")
    if shape == ["text"]:
        return Conversation([], [], as_text(rest.pop("text"), "text"), set(rest), 0, {})

    unread, system = set(), take(rest, SYSTEM)
    if shape == ["messages"]:
        key, value = take_named(rest, MESSAGES)
        messages = as_messages(value, key, unread)
    else:
        messages = as_exchange(rest, unread, answered)
    if system:
        messages.insert(0, {"role": "system", "content": as_text(system, "system"), "train": False})
    tools = as_tools(take(rest, TOOLS))
    name_calls(messages)
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    before = [message for message in messages[:first] if message["role"] in ("system", "developer")]
    n_left_out = sum(message["role"] == "assistant" for message in messages[:first])
    return Conversation(before + messages[first:], tools, None, unread | set(rest), n_left_out, {})


def only_conversation(row: object) -> list[Conversation]:
    return [to_conversation(row)]


def to_pair(row: object) -> list[Conversation]:
    """A preference → [the conversation with the chosen answer, the one with the rejected]; only these two are trained.

    {"chosen", "rejected"} are conversations; or answers, texts or messages, to what the row asks by the keys of an exchange, of
    which a conversation may begin with the same question. HALOs says {"output_A", "output_B", "label": is A chosen}.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {shown(row)}")
    rest = {key: value for key, value in row.items() if value is not None}
    if {"output_A", "output_B", "label"} <= rest.keys():
        answers, label = [rest.pop("output_A"), rest.pop("output_B")], rest.pop("label")
        if label not in (0, 1):
            raise ValueError(f"label must be 1 where output_A is chosen, or 0, not {shown(label)}")
        rest["chosen"], rest["rejected"] = answers if label else reversed(answers)
    keys, answers = sorted(rest), (take_named(rest, CHOSEN), take_named(rest, REJECTED))
    if not all(key for key, _ in answers):
        raise ValueError(f"the keys {keys} are no pair: chosen and rejected are, with a prompt or as messages")
    beside = {name: rest.pop(name) for name in MESSAGES if name in rest}  # the chosen conversation, most often
    pair = [with_answer(rest, key, answer) for key, answer in answers]
    for (key, _), conversation in zip(answers, pair):
        conversation.unread.update(beside)
        if not conversation.messages or conversation.messages[-1]["role"] != "assistant":
            raise ValueError(f"{key} must end with an answer")
        for message in conversation.messages[:-1]:
            message["train"] = 0
    if pair[0].messages[:-1] != pair[1].messages[:-1]:
        raise ValueError(f"{answers[0][0]} and {answers[1][0]} must answer the same messages")
    return pair


def with_answer(rest: dict, key: str, answer: object) -> Conversation:
    """What a row asks, if it does, and one of its answers, under `key` → the conversation."""
    asks = any(name in rest for name in QUESTION + INPUT)
    whole = isinstance(answer, list) and any(isinstance(it, dict) and ROLES.get(take(dict(it), ROLE)) == "user" for it in answer)
    if not whole and not asks:
        raise ValueError(f"{key} must be messages that begin with a question, or the row needs a prompt")
    if not whole:
        return to_conversation({**rest, "completion": answer})
    unasked = {name: rest[name] for name in rest if not asks or name not in QUESTION + INPUT}
    conversation = to_conversation({**unasked, "messages": answer})
    asked = to_conversation(rest, answered=False).messages if asks else []
    said, wanted = ([message["content"] for message in messages if message["role"] != "system"]
                    for messages in (conversation.messages, asked))
    if said[:len(wanted)] != wanted:
        raise ValueError(f"{key} must begin with the messages that the row asks, or be the answer to them")
    return conversation


def take_named(rest: dict, names: tuple[str, ...]) -> tuple[str, object]:
    """Takes out of a row or a message what stands there under one of the names: (its name, it), or ("", None)."""
    present = [name for name in names if name in rest]
    if len(present) > 1:
        raise ValueError(f"{present[0]} and {present[1]} mean the same; only one of them can be read")
    return (present[0], rest.pop(present[0])) if present else ("", None)


def take(rest: dict, names: tuple[str, ...]) -> object:
    return take_named(rest, names)[1]


def refuse_other_meanings(rest: dict, where: str = "") -> None:
    for key in [key for key in rest if key in OTHER_MEANINGS]:
        if rest[key] not in ([], "", {}):
            raise ValueError(f"{where}{key} can't be trained on: {OTHER_MEANINGS[key]}")
        del rest[key]  # a column that this row has nothing in


def as_exchange(rest: dict, unread: set[str], answered: bool) -> list[dict]:
    (question_key, question), (input_key, more), (answer_key, answer) = (
        take_named(rest, names) for names in (QUESTION, INPUT, ANSWER))
    history = from_json(rest.pop("history", None) or [], "history")
    if not isinstance(history, list):
        raise ValueError(f"history must be a list of [question, answer], not {shown(history)}")
    if question is None and isinstance(more, list):
        question_key, question, more = input_key, more, None
    if isinstance(question, list):
        messages = as_messages(question, question_key, unread)
    else:
        parts = [as_text(part, key) for part, key in ((question, question_key), (more, input_key)) if part is not None]
        messages = [{"role": "user", "content": "\n\n".join(filter(None, parts))}]
    for i, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"history[{i}] must be [question, answer], not {shown(turn)}")
    past = [{"role": role, "content": as_text(text, f"history[{i}]")}
            for i, turn in enumerate(history) for role, text in zip(("user", "assistant"), turn)]
    messages = [{**message, "train": False} for message in past + messages]
    if not answer_key:
        return messages
    if isinstance(answer, (list, dict)):
        return messages + as_messages(answer if isinstance(answer, list) else [answer], answer_key, unread)
    return [*messages, {"role": "assistant", "content": as_text(answer, answer_key), "train": True}]


def as_messages(value: object, key: str, unread: set[str]) -> list[dict]:
    value = from_json(value, key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} must be a list of messages and not be empty")
    return [as_message(message, f"{key}[{i}]", unread) for i, message in enumerate(value)]


def as_message(message: object, where: str, unread: set[str]) -> dict:
    rest = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    if not any(key in rest for key in ROLE):
        raise ValueError(f'{where} must be {{"role": ..., "content": ...}}')
    refuse_other_meanings(rest, f"{where}.")
    role = take(rest, ROLE)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{where}.role is {shown(role)}; known are {', '.join(ROLES)}")
    role, content, thought = ROLES[role], take(rest, CONTENT), take(rest, THOUGHT)
    result = {"role": "assistant" if role.endswith("_call") else role, "content": "", "train": take_weight(rest, where)}
    calls = rest.pop("tool_calls", None) or [rest.pop("function_call", None)]
    if role.endswith("_call"):
        calls, content = from_json(content, f"{where}.content"), ""
    if calls := [call for call in (calls if isinstance(calls, list) else [calls]) if call]:
        result["tool_calls"] = [as_call(call, f"{where}.tool_calls[{i}]", unread) for i, call in enumerate(calls)]
    if isinstance(content, list):
        content, thought = join_parts(content, thought, f"{where}.content")
    if role == "tool" and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    if thought:
        result["reasoning_content"] = as_text(thought, f"{where}.reasoning_content")
    if content is not None or not (calls or thought):
        result["content"] = as_text(content, f"{where}.content")
    for key in ("tool_call_id", "name"):
        if key in rest:
            result[key] = as_text(rest.pop(key), f"{where}.{key}")
    unread.update(f"{where.partition('[')[0]}[].{key}" for key in rest)
    return result


def take_weight(rest: dict, where: str) -> float:
    """Takes out of a message how much it counts in the loss: 1 if it is to be trained, 0 if not."""
    weight = 1
    for key in [key for key in WEIGHTS if key in rest]:
        value, (known, is_known) = rest.pop(key), WEIGHTS[key]
        if not is_known(value):
            raise ValueError(f"{where}.{key} must be {known}, not {shown(value)}")
        weight *= value
    return weight


def join_parts(parts: list, thought: object, where: str) -> tuple[str, object]:
    """A content in parts → (its text, its thought)."""
    texts, thoughts = [], []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS:
            texts.append(as_text(part.get("text"), f"{where}[{i}].text"))
        elif kind in THOUGHT_PARTS:
            thoughts.append(as_text(part.get(kind), f"{where}[{i}].{kind}"))
        else:
            raise ValueError(f"{where}[{i}] is a part of type {shown(kind)}; only text can be read")
    return "".join(texts), "".join(thoughts) or thought


def as_call(call: object, where: str, unread: set[str]) -> dict:
    """{"name", "arguments"}, alone or as a "function", its arguments an object or JSON text → OpenAI's form."""
    call = from_json(call, where)
    function = function_of(call, where, '{"function": {"name": ..., "arguments": ...}}')
    rest = {key: value for key, value in function.items() if value is not None}
    written = take(rest, ARGUMENTS) or {}
    try:
        arguments = from_json(written, where)
    except ValueError:
        arguments = written  # no JSON: it is what the model wrote
    unread.update(f"{where.partition('[')[0]}[].tool_calls[].{key}" for key in rest if key not in ("name", "type", "id"))
    result = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {**result, "id": call["id"]} if isinstance(call.get("id"), str) else result


def function_of(value: object, where: str, form: str) -> dict:
    """Returns the function that a call or a tool names, which may stand alone."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} must be {form}, not {shown(value)}")
    check_characters(json.dumps(function, ensure_ascii=False), where)
    return function


def as_tools(value: object) -> list[dict]:
    tools = from_json(value or [], "tools")
    tools = [from_json(tool, f"tools[{i}]") for i, tool in enumerate(tools if isinstance(tools, list) else [tools])]
    for i, tool in enumerate(tools):
        function_of(tool, f"tools[{i}]", '{"type": "function", "function": {"name": ..., ...}}')
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def name_calls(messages: list[dict]) -> None:
    """Gives calls and results that have no id one each, in order; some templates write them, and take nine characters only."""
    waiting, n_calls = [], 0
    for message in messages:
        for call in message.get("tool_calls", ()):
            n_calls += 1
            call.setdefault("id", f"call{n_calls:05}")
            waiting.append(call)
        if message["role"] == "tool" and waiting:
            by_id = [call for call in waiting if call["id"] == message.get("tool_call_id")]
            by_name = [call for call in waiting if call["function"]["name"] == message.get("name")]
            call = [*by_id, *by_name, *waiting][0]
            waiting.remove(call)
            if "tool_call_id" not in message:
                message |= {"tool_call_id": call["id"], "name": message.get("name", call["function"]["name"])}


def from_json(value: object, where: str) -> object:
    """Returns what the value says if it is JSON text, as in columns of a table, or else the value."""
    if not isinstance(value, str):
        return value
    try:
        return parse(json.loads, value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} must be JSON, not {shown(value)}") from error


def as_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a text, not {shown(value)}")
    check_characters(value, where)
    return value


def check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}): not a character") from error


def shown(value: object) -> str:
    return json.dumps(value)[:40]
