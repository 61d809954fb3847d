"""Conversations → token ids and which of them are targets; data sets → examples; held-out questions and their answers.

A target is what the model has to write at inference, after the ids that it is given at inference. The ids of an answer are those
of its context, which is what an engine feeds, followed by those of what template.py says the model must write then. A row is
as few examples as hold each of its targets in its context: most often one.
"""

import ast
import bisect
import functools
import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import transformers

from data import DTYPES, PER_DOCUMENT, DataError, Examples, TokenisedRows, mix, split_rows, tokenise
from hub import SOURCES, fetch, parse_weight
from model_utils import generate
from rows import Conversation, list_files, only_conversation, passed_over, read_rows
from script import one_line
from template import ChatTemplate


class Answer(NamedTuple):
    context: str  # what an engine feeds before it
    target: str  # what the model must write then
    index: int  # of its message


def is_target(message: dict) -> bool:
    return message["role"] == "assistant" and message["train"] and bool(
        message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


def group_answers(answers: list[Answer]) -> list[list[Answer]]:
    """Shares answers out over as few sequences as hold each target behind its context.

    A sequence is the context and the target of its last answer. The row's last answer has one, which holds all targets that
    stand in it in place; so has the last of those left out; and so on.
    """
    groups = []
    while answers:
        whole, position, group, left_out = answers[-1].context + answers[-1].target, 0, [], []
        for answer in answers:
            begins = len(answer.context)
            stands = begins >= position and whole.startswith(answer.context) and whole.startswith(answer.target, begins)
            (group if stands else left_out).append(answer)
            position = begins + len(answer.target) if stands else position
        groups.insert(0, group)
        answers = left_out
    return groups


class Plan(NamedTuple):
    """What a conversation is to become: documents, one for each group of its answers; or those that a text is."""

    messages: list[dict]
    tools: list[dict]
    groups: list[list[Answer]]
    pieces: list["Document"]
    columns: dict[str, float]  # of each of its documents


class Document(NamedTuple):
    ids: list[int]
    trained: list[bool]
    n_tokens: int  # before truncation
    answer: int  # the message that its last target is, counted from the row's last, -1; or 0 of a text
    n_merged: int = 0  # targets whose first token another tokenisation of the same text would merge with the context's last


class ChatEncoder:
    """Rows → examples: of each document the token ids, at most max_length of them, and which of them are targets."""

    read = staticmethod(read_rows)  # for the token cache, which knows neither files nor rows

    def __init__(self, tokenizer, max_length: int, max_prompt_length: int, last_answer_only: bool = False,
                 template_kwargs: dict | None = None, date: str = "",
                 read_row: Callable[[object], list[Conversation]] = only_conversation, n_documents: int = 1):
        """template_kwargs and date are ChatTemplate's. Raises DataError where the template can't be used at all.

        read_row, of rows.py, returns the n_documents conversations that a row is; an example has a document of each.
        """
        self.tokenizer, self.max_length, self.max_prompt_length = tokenizer, max_length, max_prompt_length
        self.last_answer_only, self.read_row, self.n_documents = last_answer_only, read_row, n_documents
        try:
            self.template = ChatTemplate(tokenizer, date, template_kwargs or {})
        except ValueError as error:
            raise DataError(f"{getattr(tokenizer, 'template_source', tokenizer.name_or_path)}: {error}") from error
        # Behind a control token a text has the ids that it has there in a longer one, whatever a tokenizer does at a beginning
        self.anchor = next((token for token in [tokenizer.eos_token, *self.template.control_tokens]
                            if token and len(self.ids([token])[0]) == 1), "")
        self.ids_of, self.cuts = {}, True
        whole = "".join(f"{token} a\nb{token}c {token}\n" for token in self.template.control_tokens[:100])
        self.cuts = self.tokens(whole) == self.ids([whole])[0]

    @functools.cached_property
    def identity(self) -> str:
        """A hash of all that an encoded row follows from but itself: this code, tokenizer, template, lengths."""
        files = dict.fromkeys((__file__, *(sys.modules[it].__file__ for it in ("rows", "template", self.read_row.__module__))))
        code, tokenizer = [ast.dump(ast.parse(Path(file).read_text())) for file in files], self.tokenizer
        unnamed = repr(tokenizer).replace(repr(tokenizer.name_or_path), "")  # it may have moved
        parts = [*code, transformers.__version__, tokenizers.__version__, unnamed, self.template.identity,
                 json.dumps(tokenizer.get_vocab(), sort_keys=True), self.max_length, self.max_prompt_length,
                 self.last_answer_only, self.read_row.__qualname__]
        parts += [tokenizer.backend_tokenizer.to_str()] if tokenizer.is_fast else []
        return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer in words and an answer that is a call: generation is over where one comes."""
        return sorted({self.ids([end])[0][-1] for end in self.template.ends})

    # -----------------------------------------------------------------------------------------------------------------
    # Texts → ids

    def ids(self, texts: list[str]) -> list[list[int]]:
        """What the tokenizer makes of texts, on all cores; the template itself writes any BOS."""
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def units(self, text: str) -> list[str]:
        """A text cut before each control token, where this tokenizer's tokens never reach across one."""
        starts = [0, *(token.start() for token in self.template.control.finditer(text) if token.start())] if self.cuts else [0]
        return [text[start:stop] for start, stop in itertools.pairwise([*starts, len(text)])]

    def learn_units(self, texts: Iterable[str]) -> None:
        """Tokenises the texts' units, each but once, and all at once."""
        units = dict.fromkeys(unit for text in texts for unit in self.units(text))
        if new := [unit for unit in units if unit not in self.ids_of]:
            self.ids_of.update(zip(new, self.ids(new)))

    def tokens(self, text: str) -> list[int]:
        self.learn_units([text])
        return [token for unit in self.units(text) for token in self.ids_of[unit]]

    def cut(self, group: list[Answer]) -> Iterator[tuple[str, str, Answer]]:
        """Yields for each target of a sequence: the text between the last one and it; the last unit of that; its answer."""
        position = 0
        for answer in group:
            piece = (self.anchor if position else "") + group[-1].context[position:len(answer.context)]
            yield piece, self.units(piece)[-1], answer
            position = len(answer.context) + len(answer.target)

    def encode_group(self, group: list[Answer]) -> tuple[list[int], list[bool], int]:
        """A sequence → (ids, which of them are targets, n_merged).

        A target's ids are those that follow its context's where both are tokenised together, unless a token would reach across
        the border: the model writes the target alone.
        """
        ids, trained, apart = [], [], []
        for piece, header, answer in self.cut(group):
            ids += self.tokens(piece)[bool(apart and self.anchor):]
            before, both = self.tokens(header), self.tokens(header + answer.target)
            apart.append(both[:len(before)] != before)
            written = self.tokens(self.anchor + answer.target)[bool(self.anchor):] if apart[-1] else both[len(before):]
            trained += [False] * (len(ids) - len(trained)) + [True] * len(written)
            ids += written
        return ids, trained, sum(apart[:-1])

    # -----------------------------------------------------------------------------------------------------------------
    # Rows → examples

    def find_answers(self, messages: list[dict], tools: list[dict], indices: Sequence[int]) -> list[list[Answer]]:
        """Prepared messages → their answers, in groups. Raises ValueError."""
        answers = [Answer(*self.template.pair(messages, tools, i), i) for i in indices]
        if answers:
            self.template.check_written(messages[:answers[-1].index], tools, answers[-1].context)
        return group_answers(answers)

    def prepare(self, row: Conversation) -> tuple[list[dict], list[int]]:
        """A row → (messages as the template reads them, which of them are to be trained)."""
        messages = self.template.prepare(row.messages)
        targets = [i for i, message in enumerate(messages) if is_target(message)]
        for message in messages:
            del message["train"]
        return messages, targets[-1:] if self.last_answer_only else targets

    def plan(self, row: Conversation) -> Plan:
        if row.text is not None:
            return Plan([], [], [], self.from_text(row.text), row.columns)
        messages, indices = self.prepare(row)
        return Plan(messages, row.tools, self.find_answers(messages, row.tools, indices), [], row.columns)

    def carry_out(self, plans: list[Plan]) -> list[tuple[Document, ...]]:
        """The plans of a row's conversations → its examples, of each of which they have a document.

        Those of several conversations are cut alike: by the longest of them, so that they keep the same context.
        """
        lengths = [sum(len(self.encode_group(group)[0]) for group in plan.groups) if len(plans) > 1 else 0 for plan in plans]
        examples = [*zip(*([*plan.pieces, *(document for group in plan.groups for document in self.from_group(
            plan.messages, plan.tools, group, max(lengths) - length))] for plan, length in zip(plans, lengths)))]
        for example in examples if len(plans) > 1 else ():
            if len({tuple(it.ids[:np.flatnonzero(it.trained)[0]]) for it in example if any(it.trained)}) > 1:
                raise ValueError("what is asked comes out differently before each of its answers")
        return examples

    def from_group(self, messages: list[dict], tools: list[dict], group: list[Answer], n_more: int = 0) -> list[Document]:
        """A sequence → the document that it is; or what is left of it where it, and n_more tokens, are too long.

        It loses its oldest exchanges, then the beginning of its last question (down to max_prompt_length tokens of prompt),
        then the end of its answer.
        """
        encoded = self.encode_group(group)
        if len(encoded[0]) + n_more <= self.max_length:
            return [self.truncate(encoded, len(encoded[0]), group[-1].index - len(messages))]
        last = group[-1].index
        n_head = next(i for i, message in enumerate(messages) if message["role"] not in ("system", "developer"))
        head, starts = messages[:n_head], [i for i in range(n_head, last) if messages[i]["role"] == "user"
                                           and (i == n_head or messages[i - 1]["role"] != "user")] or [n_head]

        def fits(start: int) -> bool:
            context = self.template.render([*head, *messages[start:last]], tools, for_answer=True)
            return len(self.tokens(context + group[-1].target)) + n_more <= self.max_length

        n_lost = bisect.bisect_left(starts, True, key=fits)
        start = starts[min(n_lost, len(starts) - 1)]
        kept = [*head, *messages[start:last + 1]]
        indices = [answer.index - start + n_head for answer in group if answer.index >= start]
        if n_lost == len(starts):
            kept = self.shorten_question(kept, tools, n_head, indices)
        documents, n_tokens = [], len(encoded[0])
        for part in self.find_answers(kept, tools, indices):
            short = self.encode_group(part)
            n_tokens = n_tokens if part[-1].index == indices[-1] else len(short[0])
            documents.append(self.truncate(short, n_tokens, part[-1].index - len(kept) - (len(messages) - 1 - last)))
        return documents

    def shorten_question(self, messages: list[dict], tools: list[dict], i: int, indices: list[int]) -> list[dict]:
        """Cuts the beginning of messages[i], if need be, so that the first answer's prompt fits max_prompt_length."""
        text = messages[i]["content"]

        def cut(n_kept: int) -> list[dict]:
            return [*messages[:i], {**messages[i], "content": text[len(text) - n_kept:]}, *messages[i + 1:]]

        def is_too_long(n_kept: int) -> bool:
            prompt = self.template.render(cut(n_kept)[:indices[0]], tools, for_answer=True)
            return len(self.tokens(prompt)) > self.max_prompt_length

        if not is_too_long(len(text)):
            return messages
        most = min(len(text), self.max_prompt_length * max(map(len, self.tokenizer.get_vocab())))
        return cut(max(0, bisect.bisect_left(range(most + 1), True, key=is_too_long) - 1))

    def truncate(self, encoded: tuple[list[int], list[bool], int], n_tokens: int, answer: int) -> Document:
        ids, trained, n_merged = encoded
        trained[:1] = [False]  # nothing comes before the first token to predict it from
        # An answer's end, its last token, goes with what is cut off: the model must not learn to stop there
        return Document(ids[:self.max_length], trained[:self.max_length], n_tokens, answer, n_merged)

    def from_text(self, text: str) -> list[Document]:
        """A text → pieces, each of which begins with the token before it; all others are targets, the end token too."""
        ids = [*self.text_ids(text), self.tokenizer.eos_token_id]
        pieces = [ids[start:start + self.max_length] for start in range(0, len(ids) - 1, self.max_length - 1)]
        return [Document(piece, [False] + [True] * (len(piece) - 1), len(piece), 0) for piece in pieces if text]

    def text_ids(self, text: str) -> list[int]:
        """The ids of a text that stands alone: behind the token that begins texts, or that ends the one before."""
        first, end = self.tokenizer("a")["input_ids"][0], self.tokenizer.eos_token_id
        if end is None:
            raise ValueError("text: the tokenizer has no eos_token to end it with")
        return [first if first == self.tokenizer.bos_token_id else end, *self.ids([text])[0]]

    def encode_rows(self, file_index: int, file: Path, first: int, rows: list[tuple[int, object]]) -> tuple[dict, Counter, dict]:
        """[(line number, row)], of which one is the file's `first` → (a column by each name of DTYPES, of the examples; counts;
        where the first of what is counted under a name is, [file_index, line])."""
        counts, places, plans = Counter(), {}, []

        def count(name: str, line: int, n: int = 1) -> None:
            counts[name] += n
            places.setdefault(name, [file_index, line])

        for number, (line, row) in enumerate(rows, first):
            counts["rows"] += 1
            try:
                conversations = self.read_row(row)
                for key in sorted(set().union(*(conversation.unread for conversation in conversations))):
                    count(f"unread: {one_line(key)}", line)
                if any(self.template.control.search(words_of(it)) for it in conversations):  # it would become that token
                    count("dropped: a text spells a control token", line)
                    continue
                if left_out := conversations[0].n_left_out:
                    count("answers before the first question, left out", line, left_out)
                plans.append((number, line, [self.plan(conversation) for conversation in conversations]))
            except (ValueError, RecursionError) as error:  # the latter on showing a value that is nested deeply
                count(f"bad: {one_line(error)}", line)

        columns = {name: [] for name in DTYPES}
        self.ids_of.clear()
        self.learn_units(text for *_, row_plans in plans for plan in row_plans for group in plan.groups
                         for piece, header, it in self.cut(group) for text in (piece, header + it.target))
        for number, line, (plan, *others) in plans:
            try:
                examples = self.carry_out([plan, *others])
            except ValueError as error:  # what is left of a long one, too, must be what the template can write
                count(f"bad: {one_line(error)}", line)
                continue
            examples = [example for example in examples if self.count_example(example, counts)]
            if not examples:
                count("dropped: nothing to train", line)
            elif len(examples) > 1:
                reason = "the template writes an answer otherwise once another follows" if plan.groups else "a text is long"
                count(f"split: {reason}", line)
                if plan.groups:
                    counts["tokens more by splitting"] += sum(document.n_tokens for document, in examples[:-1])
            if examples:
                count(f"shown: {self.kind_of(plan.messages)}", line)
            for document, its_plan in zip(itertools.chain(*examples), itertools.cycle([plan, *others])):
                columns["ids"] += document.ids
                columns["trained"] += document.trained
                values = {"lengths": len(document.ids), "targets": np.count_nonzero(document.trained), "files": file_index,
                          "lines": line, "rows": number, "answers": document.answer, **its_plan.columns}
                for name in PER_DOCUMENT:
                    columns[name].append(values[name])
        return {name: np.array(values, DTYPES[name]) for name, values in columns.items()}, counts, places

    def kind_of(self, messages: list[dict]) -> str:
        """What a row of these messages is an example of."""
        answers = [message for message in messages if message["role"] == "assistant"]
        if any(message.get("tool_calls") for message in answers):
            return "with a call"
        return "with a thought" if any(self.template.split_thought(message)[0] for message in answers) else \
            "in words" if messages else "a text"

    def count_example(self, example: tuple[Document, ...], counts: Counter) -> bool:
        """Counts it; returns whether it is kept: each of its documents has a target, and is another one."""
        kept = all(any(it.trained) for it in example) and len({tuple(it.ids) for it in example}) == len(example)
        sums = Counter()
        for document in example:
            n_kept = len(document.ids) if kept else 0
            sums.update({"tokens": document.n_tokens, "tokens kept": n_kept, "tokens dropped": document.n_tokens - n_kept,
                         "targets": np.count_nonzero(document.trained) if kept else 0,
                         "answers in the tokens that they were written in": document.n_merged})
        sums.update({"examples": kept, "examples truncated": kept and any(it.n_tokens > len(it.ids) for it in example)})
        counts.update({name: int(n) for name, n in sums.items() if n})
        return kept

    # -----------------------------------------------------------------------------------------------------------------
    # What is asked and answered

    def prompt_ids(self, row: Conversation) -> list[int]:
        """A row without the answer to its last question → the ids that training would have put before it. Raises ValueError."""
        if row.text is not None:
            return self.text_ids(row.text)
        messages, _ = self.prepare(row)
        context = self.template.render(messages, row.tools, for_answer=True)
        self.template.check_written(messages, row.tools, context)
        return self.tokens(context)

    def read_answer(self, ids: list[int]) -> str:
        """Ids of an answer → its words, without its thought and without what the template writes around them."""
        return self.template.read_answer(self.tokenizer.decode(ids))


def words_of(row: Conversation) -> str:
    """All text of a row that the template may write."""
    if row.text is not None:
        return row.text
    parts = [text for message in row.messages for text in (message["content"], message.get("reasoning_content", ""))]
    calls = [message[key] for message in row.messages for key in ("tool_calls", "name", "tool_call_id") if key in message]
    return "\n".join([*parts, json.dumps([calls, row.tools], ensure_ascii=False)] if calls or row.tools else parts)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets → examples


def load_examples(encoder: ChatEncoder, datasets: Sequence[str], eval_datasets: Sequence[str], eval_fraction: float,
                  form: str, seed: int, cache_dir: str, max_bad_rows: float = 0.01) -> tuple[Examples, Examples, str]:
    """Returns (training, held-out examples, what identifies the former: rows and weights). Raises DataError, HubError.

    Held out are `eval_datasets`, or a fraction of the rows, or else the test splits of the data sets that have a name. All
    examples of a row are on one side. `form` is fetch's.
    """
    entries = [parse_weight(entry) for entry in datasets]
    paths = [fetch(name, "train", cache_dir, form) for name, _ in entries]
    files = [list_files([path]) for path in paths]
    named = [name for (name, _), path in zip(entries, paths)
             if path != name and name in SOURCES and "test" in SOURCES[name].splits]
    others = eval_datasets or ([] if eval_fraction else named)
    eval_files = list_files([fetch(name, "test", cache_dir, form) for name in others])

    rows = tokenise(sum(files, []), encoder, cache_dir)
    rows.check_bad_rows(max_bad_rows)
    train_ids, eval_ids = split_rows(rows.row_numbers(), eval_fraction, seed)
    weights = np.repeat([weight for _, weight in entries], [*map(len, files)])
    rows.passed_over = passed_over(paths)
    train = Examples(rows, mix(train_ids, weights, rows.file_of, seed))  # after the split: no held-out row is trained on
    if not len(train.ids):
        raise DataError(f"{', '.join(datasets)}: no row is left to train on: of {len(rows)}, {len(eval_ids)} are held out, and a "
                        "weight below 1 leaves some out too")
    held_out = Examples(rows, eval_ids)
    if others:
        eval_rows = tokenise(eval_files, encoder, cache_dir)
        eval_rows.check_bad_rows(max_bad_rows)
        held_out = Examples(eval_rows, np.arange(len(eval_rows)))
    return train, held_out, " ".join([rows.identity, *(f"*{weight:g}" for weight in weights)])


def read_questions(encoder: ChatEncoder, rows: TokenisedRows, ids: Sequence[int]) -> list[dict]:
    """Examples → [{"prompt_ids", "prompt", "expected", "skill"}] of their last targets, in order; a text asks nothing.

    A row may name its "skill", by which answers are then scored; it is read, like the question's words, from its file.
    """
    questions = {}
    for file, group in itertools.groupby(sorted(i for i in {*map(int, ids)} if rows.answers[i]), lambda i: rows.file_of[i]):
        wanted = {}
        for i in group:
            wanted.setdefault(int(rows.row_of[i]), []).append(i)
        for number, (_, row) in enumerate(itertools.islice(encoder.read(rows.files[file]), max(wanted) + 1)):
            for i in wanted.get(number, ()):
                tokens, trained, *_ = rows[i][0]
                stop = np.flatnonzero(trained)[-1] + 1
                start = np.flatnonzero(~trained[:stop])[-1] + 1  # the first token is never a target
                asked = [message["content"] for message in encoder.read_row(row)[0].messages[:rows.answers[i]]
                         if message["role"] == "user"]
                questions[i] = {"prompt_ids": tokens[:start].tolist(), "prompt": asked[-1] if asked else "",
                                "expected": encoder.read_answer(tokens[start:stop].tolist()),
                                "skill": row.get("skill", "all") if isinstance(row, dict) else "all"}
    return [questions[i] for i in ids if i in questions]


def answer(model, encoder: ChatEncoder, questions: list[dict]) -> list[str]:
    """Answers read_questions' greedily; on every rank, and all must call it."""
    max_new_tokens = min(256, encoder.max_length - encoder.max_prompt_length)
    prompts = [question["prompt_ids"] for question in questions]
    return [encoder.read_answer(ids) for ids in generate(model, prompts, max_new_tokens)]
