"""Rows of conversations → messages → token ids and which of them are targets, by the tokenizer's chat template.

A row is a JSON object in one of four shapes, recognised by its keys:
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"prompt": "..." or [messages], "completion": "..." or [messages]}
    {"instruction": "...", "input": "..." (optional), "output": "..."}                              (Alpaca)
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]}    (ShareGPT)
`"train": false` in a message leaves that assistant turn out of the loss.
"""

import ast
import functools
import hashlib
import itertools
import json
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import transformers

from data import DTYPES, DataError, Examples, TokenisedRows, split_rows, tokenise
from hub import SOURCES, fetch, mix, parse_weight
from model_utils import generate

# ---------------------------------------------------------------------------------------------------------------------
# Files → rows → messages


def list_files(paths: list[str]) -> list[Path]:
    """Returns the .json and .jsonl files that the paths name; a folder stands for all those below it, sorted."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix in (".json", ".jsonl") and not file.is_dir())
            if not found:
                raise DataError(f"{path}: no .json or .jsonl file in this folder")
            files += found
        elif not path.is_file():
            raise DataError(f"{path}: no such file")
        elif path.suffix not in (".json", ".jsonl"):
            raise DataError(f"{path}: not a .json or .jsonl file")
        else:
            files.append(path)
    return files


def read_rows(file: Path) -> Iterator[tuple[int, object]]:
    """Yields (line number, row) of a .jsonl file, or of a .json file, which holds one list of rows."""
    line = 1
    try:
        if file.suffix == ".json":
            yield from read_list(file.read_bytes().decode("utf-8-sig"), file)
            return
        with open(file, "rb") as lines:
            for line, raw in enumerate(lines, 1):  # noqa: B007 (the except clauses name it)
                if text := raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip():
                    yield line, parse(json.loads, text)
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start) if file.suffix == ".json" else 0
        raise DataError(f"{file}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        line = error.lineno if file.suffix == ".json" else line
        raise DataError(f"{file}:{line}: not valid JSON at column {error.colno}: {error.msg}") from error
    except OSError as error:
        raise DataError(f"{file}: can't be read: {error.strerror}") from error


def read_list(text: str, file: Path) -> Iterator[tuple[int, object]]:
    """Yields (line number, row) of `[row, row, ...]`, one at a time, so that each can be named by its line."""
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    position = space.match(text).end()
    if text[position:position + 1] != "[":
        raise DataError(f"{file}: a .json file must hold one list of rows, [{{...}}, {{...}}]; one row a line is .jsonl")
    position = space.match(text, position + 1).end()
    line, counted = 1, 0
    while text[position:position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        row, position = parse(decode, text, position)
        yield line, row
        position = space.match(text, position).end()
        if text[position:position + 1] == ",":
            position = space.match(text, position + 1).end()
        elif text[position:position + 1] != "]":
            raise json.JSONDecodeError("expected ',' or ']' after a row", text, position)
    if text[position + 1:].strip():
        raise json.JSONDecodeError("text after the list of rows", text, position + 1)


def parse(decode, text: str, *position: int):
    """Returns decode(text, *position); whatever else stops the decoder is raised as a JSONDecodeError too."""
    try:
        return decode(text, *position)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise json.JSONDecodeError(str(error), text, *(position or [0])) from error


SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def to_messages(row: object) -> list[dict]:
    """A row of any of the four shapes → new [{"role", "content", "train"}]. Raises ValueError, which names the key."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {json.dumps(row)[:40]}")
    shapes = [("messages",), ("prompt", "completion"), ("instruction", "output"), ("conversations",)]
    matching = [shape for shape in shapes if all(key in row for key in shape)]
    if len(matching) != 1:
        raise ValueError(f"the keys {sorted(row)} fit {'no' if not matching else 'more than one'} shape of row; known are "
                         "messages, prompt + completion, instruction (+ input) + output, conversations")
    match matching[0]:
        case ("messages",):
            messages = as_messages(row["messages"], "messages")
        case ("prompt", "completion"):
            prompt = as_messages(row["prompt"], "prompt", text_role="user")
            completion = as_messages(row["completion"], "completion", text_role="assistant")
            messages = [{**message, "train": False} for message in prompt] + completion
        case ("instruction", "output"):
            question = check_text(row["instruction"], "instruction")
            if row.get("input") not in (None, ""):
                question += "\n\n" + check_text(row["input"], "input")
            messages = [as_message("user", question, "instruction"), as_message("assistant", row["output"], "output")]
        case ("conversations",):
            messages = as_messages(row["conversations"], "conversations", "from", "value", roles=SHAREGPT_ROLES)

    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise ValueError(f"turn {i + 1} is {message['role']!r} where {expected!r} must come: "
                             "an optional system message, then user and assistant in turn")
    return messages


def as_messages(value: object, key: str, role_key="role", text_key="content", text_role="", roles=None) -> list[dict]:
    if text_role and isinstance(value, str):
        return [as_message(text_role, value, key)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} must be a list of messages{' or a text' if text_role else ''} and not be empty")
    roles = roles or {role: role for role in ("system", "user", "assistant")}
    messages = []
    for i, message in enumerate(value):
        where = f"{key}[{i}]"
        if not isinstance(message, dict) or role_key not in message or text_key not in message:
            raise ValueError(f'{where} must be {{"{role_key}": ..., "{text_key}": ...}}')
        if not isinstance(message[role_key], str) or message[role_key] not in roles:
            raise ValueError(f"{where}.{role_key} is {message[role_key]!r}; known are {', '.join(roles)}")
        messages.append(as_message(roles[message[role_key]], message[text_key], f"{where}.{text_key}",
                                   message.get("train", True)))
    return messages


def as_message(role: str, content: object, key: str, train: object = True) -> dict:
    if not isinstance(train, bool):
        raise ValueError(f"{key.rpartition('.')[0]}.train must be true or false, not {train!r}")
    return {"role": role, "content": check_text(content, key), "train": train}


def check_text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text, not {json.dumps(value)[:40]}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key} holds half of a surrogate pair (\\u{ord(value[error.start]):04x}): not a character") from error
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Messages → token ids and a target mask


class ChatEncoder:
    """Conversations → token ids and which of them are targets, through the tokenizer's chat template.

    Targets are what the model has to write after the generation prompt: each trained assistant turn with its terminator,
    and nothing else. Both borders of a turn are asserted to be borders of tokens too: the ids of the text up to there are
    a prefix of the ids of the whole, so that at inference the model sees the very ids it was trained on.
    """

    read = staticmethod(read_rows)  # for the token cache, which knows neither files nor rows

    def __init__(self, tokenizer, max_length: int, max_prompt_length: int):
        self.tokenizer, self.max_length, self.max_prompt_length = tokenizer, max_length, max_prompt_length
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special = re.compile("|".join(map(re.escape, sorted(special | set(tokenizer.all_special_tokens)))) or "(?!)")
        question, answer = {"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}
        try:
            prompt = self.render([question], for_answer=True)
            before, written, after = self.render([question, answer]).rpartition("ANSWER")
        except ValueError as error:
            raise DataError(f"{tokenizer.name_or_path}: {error}") from error
        if not written:
            raise DataError(f"{tokenizer.name_or_path}: the chat template does not write the answer")
        self.lead = before.removeprefix(prompt)  # what it writes in front of the last answer, such as an empty thought
        self.template_terminator = after.rstrip()  # without the white space that leads over to the next turn
        self.terminator = self.template_terminator or tokenizer.eos_token
        if not self.terminator:
            raise DataError(f"{tokenizer.name_or_path}: neither the chat template nor an eos_token ends an answer")
        *_, last_id = self.ids(self.terminator)
        self.stop_id = last_id  # generation is over where this token comes
        try:
            self.renders_system = "SYSTEM" in self.render([{"role": "system", "content": "SYSTEM"},
                                                           {"role": "user", "content": "QUESTION"}])
        except ValueError:
            self.renders_system = False

    @functools.cached_property
    def identity(self) -> str:
        """A hash of all that an encoded row follows from but itself: the code of this file, tokenizer, template, lengths."""
        code, tokenizer = ast.dump(ast.parse(Path(__file__).read_text())), self.tokenizer
        parts = [code, transformers.__version__, tokenizers.__version__, repr(tokenizer), tokenizer.chat_template,
                 json.dumps(tokenizer.get_vocab(), sort_keys=True), self.max_length, self.max_prompt_length]
        parts += [tokenizer.backend_tokenizer.to_str()] if tokenizer.is_fast else []
        return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template itself writes any BOS

    def render(self, messages: list[dict], for_answer: bool = False) -> str:
        """Messages → text; `for_answer` ends it with the generation prompt."""
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=for_answer)
        except Exception as error:  # a template is a program: it can raise anything
            raise ValueError(f"the chat template raises {type(error).__name__}: {' '.join(str(error).split())}") from error

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """Messages of which a question is the last → the ids that its answer follows. Raises ValueError."""
        return self.ids(self.render(self.fold_system(messages), for_answer=True))

    def answer_text(self, ids: list[int]) -> str:
        """Ids of an answer → its text, without what the template writes around each, such as an empty thought."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return text.removeprefix(self.lead.strip()).removesuffix(self.terminator.strip()).strip()

    def fold_system(self, messages: list[dict]) -> list[dict]:
        """Puts a system message in front of the first question where the template would lose or refuse it."""
        if self.renders_system or messages[0]["role"] != "system":
            return messages
        texts = [message["content"] for message in messages[:2]]
        return [{"role": "user", "content": "\n\n".join(texts), "train": False}, *messages[2:]]

    def __call__(self, messages: list[dict]) -> tuple[list[int], list[bool], int]:
        """[{"role", "content", "train"}] → (ids, trained, tokens before truncation); at most max_length ids.

        A row that is too long loses its oldest exchanges, then the beginning of its last question (down to
        max_prompt_length tokens of prompt), then the end of its answer. Raises ValueError where the template and the
        tokenizer leave no clean border between a prompt and its answer.
        """
        ids, spans = self.encode(messages)
        n_tokens = len(ids)
        if n_tokens > self.max_length and spans:
            head = messages[:1] if messages[0]["role"] == "system" else []
            last = max(i for i, message in enumerate(messages) if is_target(message))
            turns = messages[len(head):last + 1]  # nothing after the last target bears on it
            ids, spans = self.encode(head + turns)
            while len(ids) > self.max_length and len(turns) > 2:
                turns = turns[2:]
                ids, spans = self.encode(head + turns)
            if len(ids) > self.max_length and spans[-1][0] > self.max_prompt_length:
                ids, spans = self.encode([*head, self.shorten(head, turns[0]), turns[1]])
        trained = [False] * len(ids)
        for start, stop in spans:
            start = max(start, 1)  # nothing comes before the first token to predict it from
            if stop > self.max_length:  # the terminator goes with the end of the answer: half of one is no target
                stop = min(stop - len(self.ids(self.terminator)), self.max_length)
            trained[start:stop] = [True] * (stop - start)
        return ids[:self.max_length], trained[:self.max_length], n_tokens

    def encode(self, messages: list[dict]) -> tuple[list[int], list[tuple[int, int]]]:
        """Messages → (ids, [(start, stop)] of the targets), untruncated."""
        messages = self.fold_system(messages)
        text, borders = self.render(messages), []
        for i, message in enumerate(messages):
            if not is_target(message):
                continue
            prompt = self.render(messages[:i], for_answer=True)
            if not text.startswith(prompt):
                raise ValueError(f"the chat template writes the prompt of turn {i + 1} otherwise once its answer follows")
            content = message["content"]
            for answer in (self.lead + content, self.lead + content.strip(), content, content.strip()):  # templates may strip
                if text.startswith(answer + self.template_terminator, len(prompt)):
                    break
            else:
                raise ValueError(f"the chat template does not write the answer of turn {i + 1} as it is")
            stop = len(prompt + answer + self.template_terminator)
            if not self.template_terminator and i == len(messages) - 1:
                text = text[:stop] + self.terminator
                stop = len(text)
            borders.append((len(prompt), stop))

        ids, spans = self.ids(text), []
        for border in borders:
            prefixes = [self.ids(text[:end]) for end in border]
            for prefix, end in zip(prefixes, border):
                if ids[:len(prefix)] != prefix:
                    raise ValueError(f"a token reaches across the border of an answer at {text[max(0, end - 20):end + 20]!r}")
            spans.append((len(prefixes[0]), len(prefixes[1])))
        return ids, spans

    def shorten(self, head: list[dict], question: dict) -> dict:
        """Cuts the question's beginning, by as little as makes the prompt fit max_prompt_length tokens (if anything does)."""
        text = question["content"]
        longest = max(map(len, self.tokenizer.get_vocab()))
        fits, too_long = 0, min(len(text), self.max_prompt_length * longest) + 1
        while too_long - fits > 1:  # bisect the number of characters kept
            kept = (fits + too_long) // 2
            prompt = self.render(self.fold_system([*head, {**question, "content": text[len(text) - kept:]}]), for_answer=True)
            fits, too_long = (kept, too_long) if len(self.ids(prompt)) <= self.max_prompt_length else (fits, kept)
        return {**question, "content": text[len(text) - fits:]}

    def encode_rows(self, file_index: int, file: Path, rows: list[tuple[int, object]]) -> tuple[dict, Counter]:
        """[(line number, row)] → (a column by each name of DTYPES, of the rows that have a target; counts). Raises DataError."""
        columns, counts = {name: [] for name in DTYPES}, Counter()
        for line, row in rows:
            try:
                messages = to_messages(row)
                special = any(self.special.search(message["content"]) for message in messages)
                if special:  # a text that spells a control token would become one
                    ids, trained, n_tokens = [], [], len(self.ids(self.render(self.fold_system(messages))))
                else:
                    ids, trained, n_tokens = self(messages)
            except (ValueError, RecursionError) as error:  # the latter on showing a value that is nested deeply
                raise DataError(f"{file}:{line}: {error}") from error
            counts.update({"rows": 1, "tokens": n_tokens})
            if special:
                counts.update({"rows with a control token in a text, dropped": 1, "tokens dropped": n_tokens})
            elif not any(trained):
                counts.update({"rows without a target, dropped": 1, "tokens dropped": n_tokens})
            else:
                if len(ids) < n_tokens:
                    counts.update({"rows truncated": 1, "tokens dropped": n_tokens - len(ids)})
                counts.update({"tokens kept": len(ids), "targets": sum(trained)})
                columns["ids"] += ids
                columns["trained"] += trained
                for name, value in (("lengths", len(ids)), ("targets", sum(trained)), ("files", file_index), ("lines", line)):
                    columns[name].append(value)
        return {name: np.array(values, DTYPES[name]) for name, values in columns.items()}, counts


def is_target(message: dict) -> bool:
    return message["role"] == "assistant" and message["train"] and bool(message["content"].strip())


# ---------------------------------------------------------------------------------------------------------------------
# Data sets → examples


def load_examples(encoder: ChatEncoder, datasets: Sequence[str], eval_datasets: Sequence[str], eval_fraction: float,
                  conditional: bool, seed: int, cache_dir: str) -> tuple[Examples, Examples, str]:
    """Returns (training, held-out examples, what identifies the former: rows and weights). Raises DataError, HubError.

    Held out are `eval_datasets`, or a fraction of the rows, or else the test splits of the data sets that have a name.
    """
    entries = [parse_weight(entry) for entry in datasets]
    paths = [fetch(name, "train", cache_dir, conditional) for name, _ in entries]
    files = [list_files([path]) for path in paths]
    rows = tokenise(sum(files, []), encoder, cache_dir)
    train_ids, eval_ids = split_rows(len(rows), eval_fraction, seed)
    weights = np.repeat([weight for _, weight in entries], [*map(len, files)])
    train = Examples(rows, mix(train_ids, weights, rows.file_of, seed))  # after the split: no held-out row is trained on
    if not len(train.ids):
        raise DataError(f"{', '.join(datasets)}: no row is left to train on: of {len(rows)}, {len(eval_ids)} are held out, and a "
                        "weight below 1 leaves some out too")
    held_out = Examples(rows, eval_ids)
    named = [name for (name, _), path in zip(entries, paths)
             if path != name and name in SOURCES and "test" in SOURCES[name].splits]
    if others := eval_datasets or ([] if eval_fraction else named):
        eval_rows = tokenise(list_files([fetch(name, "test", cache_dir, conditional) for name in others]), encoder, cache_dir)
        held_out = Examples(eval_rows, np.arange(len(eval_rows)))
    return train, held_out, " ".join([rows.identity, *(f"*{weight:g}" for weight in weights)])


def read_questions(encoder: ChatEncoder, rows: TokenisedRows, ids: Sequence[int]) -> list[dict]:
    """Rows → [{"prompt_ids", "prompt", "expected", "skill"}] of their last targets, in order, read from their files.

    A row may name its "skill", by which answers are then scored; the prompt's ids are not truncated.
    """
    questions = {}
    for file, group in itertools.groupby(sorted(set(ids)), lambda i: rows.file_of[i]):  # rows are in the order of the files
        wanted, path, first = deque(group), rows.files[file], np.searchsorted(rows.file_of, file)
        for most, (line, row) in enumerate(read_rows(path), first):  # its index in `rows`, had none before it been dropped
            if most < wanted[0] or line != rows.lines[wanted[0]]:
                continue
            columns, _ = encoder.encode_rows(file, path, [(line, row)])
            if np.array_equal(columns["ids"], rows[wanted[0]][0]):  # a line of a .json file may hold several rows
                messages = to_messages(row)
                end = max(i for i, message in enumerate(messages) if is_target(message))
                questions[wanted.popleft()] = {
                    "prompt_ids": encoder.prompt_ids(messages[:end]), "prompt": messages[end - 1]["content"],
                    "expected": messages[end]["content"], "skill": row.get("skill", "all")}
                if not wanted:
                    break
    return [questions[i] for i in ids]


def answer(model, encoder: ChatEncoder, questions: list[dict]) -> list[str]:
    """Answers read_questions' greedily; on every rank, and all must call it."""
    max_new_tokens = min(256, encoder.max_length - encoder.max_prompt_length)
    prompts = [question["prompt_ids"] for question in questions]
    return [encoder.answer_text(ids) for ids in generate(model, prompts, max_new_tokens)]
