"""An encoder of lines of numbers, for the token cache, which knows nothing of chats; as a script, a process that fills one.

It imports little, for processes that are started by the dozen.
"""

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from data import DTYPES, DataError, tokenise


class LineEncoder:
    """"3 4 7" → the ids 3, 4, 7, of which the odd ones are targets; "3 4 | 5 7" → two examples; "bad idea" → a bad row."""

    n_documents = 1

    def __init__(self, identity: str = "lines"):
        self.identity, self.rows_left, self.victim = identity, 0, 0

    @staticmethod
    def read(file: Path) -> Iterator[tuple[int, str]]:
        with open(file) as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())

    def kill_at(self, row: int) -> "LineEncoder":
        """Kills this process at the row; where others encode, it is the first of them that comes so far."""
        self.rows_left, self.victim = row, os.getpid()
        return self

    def encode_rows(self, file_index: int, file: Path, first: int, rows: list[tuple[int, str]]) -> tuple[dict, Counter, dict]:
        columns, counts, places = {name: [] for name in DTYPES}, Counter(rows=len(rows)), {}
        for number, (line, text) in enumerate(rows, first):
            self.rows_left -= 1
            if not self.rows_left:
                os.kill(self.victim, signal.SIGKILL)
            if text.startswith("bad "):
                name = f"bad: {text[4:].strip()}"
                counts[name] += 1
                places.setdefault(name, [file_index, line])
                continue
            try:
                documents = [list(map(int, part.split())) for part in text.split("|")]
            except ValueError as error:
                raise DataError(f"{file}:{line}: not a line of numbers") from error
            for i, ids in enumerate(documents, -len(documents)):
                trained = [id % 2 == 1 for id in ids]
                if any(trained):
                    counts["targets"] += sum(trained)
                    columns["ids"] += ids
                    columns["trained"] += trained
                    for name, value in (("lengths", len(ids)), ("targets", sum(trained)), ("files", file_index), ("lines", line),
                                        ("rows", number), ("answers", i)):
                        columns[name].append(value)
        return {name: np.array(values, DTYPES[name]) for name, values in columns.items()}, counts, places


if __name__ == "__main__":
    file, cache, rows_left, data.BYTES_FOR_WORKERS = *sys.argv[1:4], int(sys.argv[4])
    encoder = LineEncoder()
    if rows_left:
        encoder.kill_at(int(rows_left))
    print("ready", flush=True)
    sys.stdin.readline()
    print(len(tokenise([Path(file)], encoder, cache)))
