"""Rows of conversations → token ids with a target mask → batches. Plain files in, plain tensors out.

A row is a JSON object in one of four shapes, recognised by its keys:
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"prompt": "..." or [messages], "completion": "..." or [messages]}
    {"instruction": "...", "input": "..." (optional), "output": "..."}                              (Alpaca)
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]}    (ShareGPT)
`"train": false` in a message leaves that assistant turn out of the loss.
"""

import contextlib
import fcntl
import functools
import hashlib
import heapq
import json
import math
import multiprocessing
import os
import re
import shutil
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tqdm import tqdm

IGNORE = -100  # the label of a token that is not a target, as in torch's cross-entropy


class DataError(ValueError):
    """A file or a row that can't be used: one line that names the file, the line and the key."""


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

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template itself writes any BOS

    def render(self, messages: list[dict], for_answer: bool = False) -> str:
        """Messages → text; `for_answer` ends it with the generation prompt."""
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=for_answer)
        except Exception as error:  # a template is a program: it can raise anything
            raise ValueError(f"the chat template raises {type(error).__name__}: {' '.join(str(error).split())}") from error

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


def is_target(message: dict) -> bool:
    return message["role"] == "assistant" and message["train"] and bool(message["content"].strip())


def encode_rows(encoder: ChatEncoder, file_index: int, file: Path, rows: list[tuple[int, object]]) -> tuple[dict, Counter]:
    """[(line number, row)] → (a column by each name of DTYPES, of the rows that have a target; counts). Raises DataError."""
    columns, counts = {name: [] for name in DTYPES}, Counter()
    for line, row in rows:
        try:
            messages = to_messages(row)
            special = any(encoder.special.search(message["content"]) for message in messages)
            if special:  # a text that spells a control token would become one
                ids, trained, n_tokens = [], [], len(encoder.ids(encoder.render(encoder.fold_system(messages))))
            else:
                ids, trained, n_tokens = encoder(messages)
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


# ---------------------------------------------------------------------------------------------------------------------
# The token cache: tokenised once, memory-mapped by every rank and by later runs

DTYPES = {"ids": np.int32, "trained": np.bool_, "lengths": np.int32, "targets": np.int32, "lines": np.int32, "files": np.int32}
CHUNK = 256  # rows given to a worker at a time


class TokenisedRows:
    """Rows with at least one target, on disk: `rows[i]` → (ids, trained) as numpy arrays of equal length."""

    def __init__(self, folder: Path, files: list[Path]):
        self.files, self.counts = files, json.loads((folder / "counts.json").read_text())
        self.identity = folder.name  # a hash of all that the tokens follow from
        column = {name: np.memmap(folder / f"{name}.bin", dtype, "r") for name, dtype in DTYPES.items()}
        self.ids, self.trained, self.lengths, self.targets = (column[n] for n in ("ids", "trained", "lengths", "targets"))
        self.lines, self.file_of = column["lines"], column["files"]
        self.offsets = np.memmap(folder / "offsets.bin", np.int64, "r")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        start, stop = self.offsets[i], self.offsets[i + 1]
        return self.ids[start:stop], self.trained[start:stop]

    def where(self, i: int) -> str:
        return f"{self.files[self.file_of[i]]}:{self.lines[i]}"

    def source(self, i: int) -> dict:
        """Reads row i as it stands in its file."""
        return next(row for line, row in read_rows(self.files[self.file_of[i]]) if line == self.lines[i])


def tokenise(paths: list[str], encoder: ChatEncoder, cache_dir: str) -> TokenisedRows:
    """Tokenises the files, or maps what an earlier run or another rank has tokenised. Raises DataError.

    The cache is named by everything that its content follows from, so a stale one can't be picked up. It is built under
    another name and renamed when whole, so a killed build is never taken for one. Ranks wait for each other on a file
    lock, outside any collective, whose timeout a large data set would run into.
    """
    files, tokenizer = list_files(paths), encoder.tokenizer
    identity, n_lines = hashlib.sha256(), 0
    for part in (Path(__file__).read_text(), transformers.__version__, tokenizers.__version__,
                 repr(tokenizer), json.dumps(tokenizer.get_vocab(), sort_keys=True), tokenizer.chat_template,
                 encoder.max_length, encoder.max_prompt_length):
        identity.update(hashlib.sha256(str(part).encode()).digest())
    if tokenizer.is_fast:
        identity.update(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).digest())
    for file in files:
        content = hashlib.sha256(file.suffix.encode())
        try:
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    content.update(block)
                    n_lines += block.count(b"\n")
        except OSError as error:
            raise DataError(f"{file}: can't be read: {error.strerror}") from error
        identity.update(content.digest())
    folder = Path(cache_dir) / "tokens" / identity.hexdigest()[:32]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                build(folder, files, encoder, n_lines)
    except OSError as error:
        raise DataError(f"{folder}: the token cache can't be written: {error.strerror}") from error
    return TokenisedRows(folder, files)


def build(folder: Path, files: list[Path], encoder: ChatEncoder, n_lines: int) -> None:
    """Writes one flat file a column into `folder`."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    partial.mkdir()
    counts, position = Counter(), 0
    n_workers = len(os.sched_getaffinity(0)) if n_lines >= 16 * CHUNK else 1  # starting more takes seconds
    with contextlib.ExitStack() as stack:
        out = {name: stack.enter_context(open(partial / f"{name}.bin", "wb")) for name in (*DTYPES, "offsets")}
        bar = stack.enter_context(tqdm(desc="tokenising", unit=" rows", unit_scale=True, total=n_lines, disable=n_workers == 1))
        out["offsets"].write(np.int64(0).tobytes())
        for columns, chunk_counts in encode_files(files, encoder, n_workers):
            columns["offsets"] = position + np.cumsum(columns["lengths"], dtype=np.int64)
            position += int(columns["lengths"].sum())
            for name, values in columns.items():
                out[name].write(values.tobytes())
            counts.update(chunk_counts)
            bar.update(chunk_counts["rows"])
        for stream in out.values():
            stream.flush()
            os.fsync(stream.fileno())
    if not counts["targets"]:
        raise DataError(f"{', '.join(map(str, files))}: no row has a target: {dict(counts)}")
    (partial / "counts.json").write_text(json.dumps(counts))
    partial.rename(folder)


def read_chunks(files: list[Path]) -> Iterator[tuple[int, Path, list]]:
    for index, file in enumerate(files):
        rows = read_rows(file)
        chunk = list(islice(rows, CHUNK))
        if not chunk:
            raise DataError(f"{file}: no rows in this file")
        while chunk:
            yield index, file, chunk
            chunk = list(islice(rows, CHUNK))


def encode_files(files: list[Path], encoder: ChatEncoder, n_workers: int) -> Iterator[tuple[dict, Counter]]:
    """Yields encode_rows' (columns, counts) in the order of the files, by several processes if asked."""
    if n_workers == 1:
        for index, file, rows in read_chunks(files):
            yield encode_rows(encoder, index, file, rows)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has threads can hang
    with ProcessPoolExecutor(n_workers, spawn, initializer=receive_encoder, initargs=(encoder,)) as pool:
        under_way = deque()  # bounded, so that memory does not grow with the files
        for chunk in read_chunks(files):
            under_way.append(pool.submit(encode_in_worker, *chunk))
            if len(under_way) > 2 * n_workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


worker_encoder = None  # a worker's own copy: sending it along with every chunk would take longer than the chunk


def receive_encoder(encoder: ChatEncoder) -> None:
    global worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    worker_encoder = encoder
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this worker when its parent is gone, which can't end it where it is killed itself, as by torchrun."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_in_worker(*chunk) -> tuple[dict, Counter]:
    return encode_rows(worker_encoder, *chunk)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def split_rows(n_rows: int, eval_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of (training, held-out) rows, the latter drawn at random, at least one if a fraction is asked."""
    order = np.random.default_rng([seed, 0x5EED]).permutation(n_rows)
    n_eval = max(1, round(eval_fraction * n_rows)) if eval_fraction else 0
    return np.sort(order[n_eval:]), np.sort(order[:n_eval])


def pack(lengths: np.ndarray, capacity: int, multiple: int) -> list[list[int]]:
    """Deals documents of these lengths into groups, none of more than `capacity` tokens unless a single document is.

    There are as few groups as hold them in some multiple of `multiple`, and their token counts are nearly equal: the
    longest document comes first, and each goes to the group with the fewest tokens (Graham 1969, at most 4/3 of the best).
    """
    n_groups = max(1, math.ceil(lengths.sum() / capacity / multiple)) * multiple
    while True:
        groups = [[] for _ in range(n_groups)]
        heap = [(0, i) for i in range(n_groups)]  # (tokens, group)
        for document in np.argsort(-lengths, kind="stable").tolist():
            tokens, i = heap[0]
            groups[i].append(document)
            heapq.heapreplace(heap, (tokens + int(lengths[document]), i))
        if all(len(groups[i]) <= 1 or tokens <= capacity for tokens, i in heap):
            return groups
        n_groups += multiple


def batch_by_length(lengths: np.ndarray, capacity: int, multiple: int) -> list[list[int]]:
    """Deals rows into groups of like length, none of more than `capacity` tokens with its padding unless of a single row.

    Each is a run of neighbours by length, padded to its longest row; there are as few as hold them in some multiple of
    `multiple`.
    """
    by_length = np.argsort(lengths, kind="stable")
    n_groups = multiple
    while True:
        groups = np.array_split(by_length, n_groups)
        if all(len(group) <= 1 or len(group) * lengths[group[-1]] <= capacity for group in groups):
            return [group.tolist() for group in groups]
        n_groups += multiple


class SFTDataLoader:
    """Iterates over the microbatches of one rank; every rank has as many of them, in each step.

    The rows come in epochs, each in a new order that seed and epoch give whatever the number of ranks (or in the given
    order where seed is None), one epoch after the other without a gap. Step k takes the batch_size rows from
    k * batch_size on, and only the very last step may have fewer. A step's rows are dealt over ranks and microbatches so
    that none exceeds `microbatch_tokens`, there are at least `accumulation` microbatches, and token counts are balanced.
    A rank for which no row is left gets one token without a target: the others' collectives wait for its forward.

    A batch holds (B rows, T tokens)
        target_combined_input_ids        (B, T) int64
        target_combined_attention_mask   (B, T) int64, 1 on tokens and 0 on padding, by length: pad_id may be a real token
        target_labels                    (B, T) int64, the ids where they are targets and IGNORE elsewhere
        target_positions                 (N,) int64, the places in the flattened labels of the N targets
        position_ids                     (B, T) int64, from 0 in each document
        document_ends                    (documents + 1,) int32, if packed: 0, and where each document ends; else None
        longest                          tokens of the longest document
        n_documents                      rows in this microbatch
        global_target_count              targets in the whole step, over all ranks and microbatches
        global_token_count               tokens in the whole step
        global_squared_lengths           sum of the rows' squared lengths in the whole step: what attention costs
        n_examples                       rows in the whole step
        ends_step                        whether this is the rank's last microbatch of the step
    Packed, B is 1 and the rows stand one after the other; otherwise they are padded on the right to the longest.
    """

    def __init__(self, rows: TokenisedRows, indices: np.ndarray, batch_size: int, n_examples: int, seed: int | None,
                 pad_id: int, packing: bool, microbatch_tokens: int, accumulation: int = 1, rank: int = 0,
                 world_size: int = 1, start: int = 0):
        self.rows, self.indices, self.batch_size, self.n_examples, self.seed = rows, indices, batch_size, n_examples, seed
        self.pad_id, self.packing, self.microbatch_tokens, self.accumulation = pad_id, packing, microbatch_tokens, accumulation
        self.rank, self.world_size = rank, world_size
        self.start = start  # examples to skip, which costs nothing
        self.n_steps = math.ceil((n_examples - start) / batch_size)

    def __iter__(self) -> Iterator[dict]:
        return prefetch(self.batches())

    def batches(self) -> Iterator[dict]:
        for first in range(self.start, self.n_examples, self.batch_size):
            step_rows = self.rows_at(first, min(first + self.batch_size, self.n_examples))
            lengths = self.rows.lengths[step_rows]
            counts = {"global_target_count": int(self.rows.targets[step_rows].sum()),
                      "global_token_count": int(lengths.sum()), "n_examples": len(step_rows),
                      "global_squared_lengths": int(np.square(lengths, dtype=np.int64).sum())}
            deal, collate = (pack, collate_packed) if self.packing else (batch_by_length, collate_padded)
            groups = deal(lengths, self.microbatch_tokens, self.world_size * self.accumulation)
            mine = groups[self.rank::self.world_size]
            for i, group in enumerate(mine):
                rows = [self.rows[row] for row in step_rows[group]] or [(np.array([self.pad_id]), np.array([False]))]
                yield {**collate(rows, self.pad_id), **counts, "n_documents": len(group), "ends_step": i == len(mine) - 1}

    def rows_at(self, start: int, stop: int) -> np.ndarray:
        """Returns the rows at places start … stop - 1 of the endless sequence of epochs."""
        n = len(self.indices)
        epochs = range(start // n, (stop - 1) // n + 1)
        order = np.concatenate([epoch_order(n, self.seed, epoch) for epoch in epochs])
        return self.indices[order[start - epochs[0] * n:stop - epochs[0] * n]]


@functools.lru_cache(maxsize=2)  # a step may reach over the end of an epoch
def epoch_order(n: int, seed: int | None, epoch: int) -> np.ndarray:
    return np.arange(n) if seed is None else np.random.default_rng([seed, epoch]).permutation(n)


def collate_packed(rows: list[tuple[np.ndarray, np.ndarray]], pad_id: int) -> dict:
    """Rows of (ids, trained) → one row of them all, one after the other."""
    ids = np.concatenate([ids for ids, _ in rows]).astype(np.int64)
    trained = np.concatenate([trained for _, trained in rows])
    lengths = np.array([len(ids) for ids, _ in rows])
    ends = np.concatenate([[0], lengths.cumsum()])
    positions = np.arange(len(ids)) - ends[:-1].repeat(lengths)
    return as_batch(ids[None], trained[None], np.ones((1, len(ids))), positions[None], lengths.max(), ends)


def collate_padded(rows: list[tuple[np.ndarray, np.ndarray]], pad_id: int) -> dict:
    """Rows of (ids, trained) → a row of a batch each, padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids = np.stack([np.pad(ids, (0, longest - len(ids)), constant_values=pad_id) for ids, _ in rows])
    trained = np.stack([np.pad(trained, (0, longest - len(trained))) for _, trained in rows])
    mask = np.stack([np.arange(longest) < len(ids) for ids, _ in rows])
    return as_batch(ids, trained, mask, np.arange(longest)[None].repeat(len(rows), 0), longest, None)


def pad_left(prompts: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts to be answered → (ids, mask), (B, T) int64: they end together, so that their answers begin together."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    return ids, torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])


def as_batch(ids, trained, mask, positions, longest, ends) -> dict:
    batch = {"target_combined_input_ids": ids, "target_combined_attention_mask": mask,
             "target_labels": np.where(trained, ids, IGNORE), "target_positions": np.flatnonzero(trained),
             "position_ids": positions}
    batch = {key: torch.from_numpy(array.astype(np.int64)) for key, array in batch.items()}
    return batch | {"document_ends": None if ends is None else torch.from_numpy(ends.astype(np.int32)), "longest": int(longest)}


def prefetch(batches: Iterator[dict]) -> Iterator[dict]:
    """Makes the next batch in a thread, in memory that a GPU copies from without waiting, while this one is computed."""
    def make() -> dict | None:
        batch = next(batches, None)
        if batch and torch.cuda.is_available():
            batch = {key: value.pin_memory() if torch.is_tensor(value) else value for key, value in batch.items()}
        return batch

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(make)
        while batch := ahead.result():
            ahead = thread.submit(make)
            yield batch
