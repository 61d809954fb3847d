"""Token ids on the disk → batches: the token cache, packing, SFTDataLoader. It knows nothing of chats or files of rows."""

import contextlib
import copy
import fcntl
import hashlib
import heapq
import json
import math
import multiprocessing
import os
import shutil
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from script import RunError, timed

IGNORE = -100  # the label of a token that is not a target, as in torch's cross-entropy


class DataError(RunError, ValueError):
    """A file or a row that can't be used: one line that names the file, the line and the key."""


# ---------------------------------------------------------------------------------------------------------------------
# The token cache: tokenised once, memory-mapped by every rank and by later runs

# A column each. A document has in the first so many entries as tokens, and in the others one: its length and targets, the file,
# line and number in its file of the row that it comes from, and which of the row's answers it ends with
PER_TOKEN = {"ids": np.int32, "trained": np.bool_}
PER_DOCUMENT = {name: np.int32 for name in ("lengths", "targets", "files", "lines", "rows", "answers")}
DTYPES = PER_TOKEN | PER_DOCUMENT
CHUNK = 256  # rows given to a worker at a time
BYTES_FOR_WORKERS = 1 << 26  # starting more processes takes seconds; one tokenises by all cores too


class TokenisedRows:
    """Examples on the disk: `rows[i]` → its documents, each a tuple of PER_TOKEN's columns as numpy arrays of equal length.

    An example is one document, or what is trained together: of a preference, the chosen and the rejected answer in theirs.
    lengths, targets   (examples, documents of each) int32
    columns            {name: (examples, documents of each)} of what else a batch is to tell of its documents: any further column
                       of PER_DOCUMENT, and what a script computes
    """

    def __init__(self, folder: Path, files: list[Path], n_documents: int = 1):
        self.folder, self.files, self.n_documents = folder, files, n_documents
        self.passed_over = []  # what lies beside the files and is none, as far as is known
        self.counts, self.places = json.loads((folder / "counts.json").read_text())
        self.identity = folder.name  # a hash of all that the tokens follow from
        column = {name: np.memmap(folder / f"{name}.bin", dtype, "r") for name, dtype in DTYPES.items()}
        self.tokens = [column[name] for name in PER_TOKEN]
        of_documents = {name: column[name].reshape(-1, n_documents) for name in PER_DOCUMENT}
        self.lengths, self.targets = of_documents["lengths"], of_documents["targets"]
        self.lines, self.file_of, self.row_of, self.answers = (of_documents[name][:, 0]
                                                               for name in ("lines", "files", "rows", "answers"))
        self.offsets = np.memmap(folder / "offsets.bin", np.int64, "r")
        self.columns = {name: of_documents[name] for name in [*PER_DOCUMENT][6:]}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> list[tuple[np.ndarray, ...]]:
        borders = self.offsets[i * self.n_documents:(i + 1) * self.n_documents + 1].tolist()
        return [tuple(column[start:stop] for column in self.tokens) for start, stop in pairwise(borders)]

    def row_numbers(self) -> np.ndarray:
        """Returns for each example, (n,) int64, the row that it comes from, counted from 0 over all files."""
        is_next = (np.diff(self.file_of) != 0) | (np.diff(self.row_of) != 0)
        return np.cumsum(np.append([0], is_next))

    def counted(self, kind: str) -> dict[str, int]:
        """Returns what is counted under names that begin with "kind: ", without that, the most frequent first."""
        counts = {name.removeprefix(f"{kind}: "): n for name, n in self.counts.items() if name.startswith(f"{kind}: ")}
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def check_bad_rows(self, most: float) -> None:
        """Raises DataError where more than this fraction of the rows is bad."""
        reasons, n_rows = self.counted("bad"), self.counts["rows"]
        n_bad = sum(reasons.values())
        if n_bad > most * n_rows:
            lines = [f"{n_bad:,} of {n_rows:,} rows can't be used, more than max_bad_rows={most:g} of them:"]
            lines += [f"{self.place(f'bad: {reason}')}: {reason} ({n:,} row{'s' * (n > 1)})"
                      for reason, n in islice(reasons.items(), 8)]
            lines += [f"and {len(reasons) - 8} more reasons"] if len(reasons) > 8 else []
            raise DataError("\n".join(lines))

    def place(self, name: str) -> str:
        """Returns file:line of the first of what is counted under this name."""
        file, line = self.places[name]
        return f"{self.files[file]}:{line}"

    def where(self, i: int) -> str:
        return f"{self.files[self.file_of[i]]}:{self.lines[i]}"


class Examples(NamedTuple):
    rows: TokenisedRows
    ids: np.ndarray  # (n,) int64: which of them, in order; one may come more than once

    @property
    def longest(self) -> int:
        """The tokens of their longest document, 0 if there are none."""
        return int(self.rows.lengths[self.ids].max(initial=0))


@timed("data")
def tokenise(files: list[Path], encoder, cache_dir: str) -> TokenisedRows:
    """Tokenises the files, or maps what an earlier run or another rank has tokenised. Raises DataError.

    The encoder reads a file, encodes rows, to examples of n_documents documents, and names by its `identity` all that this
    follows from. With the files' contents that is the cache's name, so a stale one can't be picked up. It is built under another
    name and renamed when whole, so a killed build is never taken for one. Ranks wait for each other on a file lock, outside any
    collective, whose timeout a large data set would run into.
    """
    files = [*map(Path, files)]
    name, n_bytes = name_cache(files, encoder)
    folder = Path(cache_dir) / "tokens" / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                partial = folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
                try:
                    build(partial, files, encoder, n_bytes)
                    if name_cache(files, encoder)[0] != name:
                        raise DataError(f"{', '.join(map(str, files))}: changed while being read; start again once that is over")
                    partial.rename(folder)
                finally:  # the files may be mended next, and then have another name
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{folder}: the token cache can't be written: {error.strerror}") from error
    return TokenisedRows(folder, files, encoder.n_documents)


def name_cache(files: list[Path], encoder) -> tuple[str, int]:
    """Returns (a hash of all that the tokens follow from, the files' bytes)."""
    identity, n_bytes = hashlib.sha256(f"{encoder.identity} {DTYPES}".encode()), 0
    for file in files:
        content = hashlib.sha256("".join(file.suffixes[-2:]).encode())
        try:
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    content.update(block)
                    n_bytes += len(block)
        except OSError as error:
            raise DataError(f"{file}: can't be read: {error.strerror}") from error
        identity.update(content.digest())
    return identity.hexdigest()[:32], n_bytes


def build(folder: Path, files: list[Path], encoder, n_bytes: int) -> None:
    """Writes one flat file a column into a new folder."""
    folder.mkdir()
    counts, places, position = Counter(), {}, 0
    n_workers = len(os.sched_getaffinity(0)) if n_bytes >= BYTES_FOR_WORKERS else 1
    with contextlib.ExitStack() as stack:
        out = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in (*DTYPES, "offsets")}
        bar = stack.enter_context(tqdm(desc="tokenising", unit=" rows", unit_scale=True, delay=2))
        stack.enter_context(redrawn(bar))
        out["offsets"].write(np.int64(0).tobytes())
        for columns, chunk_counts, chunk_places in encode_files(files, encoder, n_workers):
            columns["offsets"] = position + np.cumsum(columns["lengths"], dtype=np.int64)
            position += int(columns["lengths"].sum())
            for name, values in columns.items():
                out[name].write(values.tobytes())
            counts.update(chunk_counts)
            places = chunk_places | places
            bar.update(chunk_counts["rows"])
        for stream in out.values():
            stream.flush()
            os.fsync(stream.fileno())
    if not counts["targets"]:
        first = {name: f" ({files[file]}:{line})" for name, (file, line) in places.items()}
        told = "; ".join(f"{count:,} {name}{first.get(name, '')}" for name, count in counts.most_common(6))
        raise DataError(f"{', '.join(map(str, files))}: no row has a target: {told}")
    (folder / "counts.json").write_text(json.dumps([counts, places]))


@contextlib.contextmanager
def redrawn(bar: tqdm) -> Iterator[None]:
    """Moves the bar's clock while it has nothing new to count: of a book in a single row the tokenizer takes a minute."""
    done = threading.Event()

    def redraw() -> None:
        while not done.wait(2):
            bar.delay = 0  # once it is shown its line is to be ended, however soon the bar is closed
            bar.refresh()

    thread = threading.Thread(target=redraw, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def read_chunks(files: list[Path], encoder) -> Iterator[tuple[int, Path, int, list]]:
    for index, file in enumerate(files):
        rows, first = encoder.read(file), 0
        while chunk := list(islice(rows, CHUNK)):
            yield index, file, first, chunk
            first += len(chunk)
        if not first:
            raise DataError(f"{file}: no rows in this file")


def encode_files(files: list[Path], encoder, n_workers: int) -> Iterator[tuple[dict, Counter, dict]]:
    """Yields what encode_rows returns in the order of the files, by several processes if asked."""
    if n_workers == 1:
        for chunk in read_chunks(files, encoder):
            yield encoder.encode_rows(*chunk)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has threads can hang
    with ProcessPoolExecutor(n_workers, spawn, initializer=receive_encoder, initargs=(encoder,)) as pool:
        under_way = deque()  # bounded, so that memory does not grow with the files
        for chunk in read_chunks(files, encoder):
            under_way.append(pool.submit(encode_in_worker, *chunk))
            if len(under_way) > 2 * n_workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


worker_encoder = None  # a worker's own copy: sending it along with every chunk would take longer than the chunk


def receive_encoder(encoder) -> None:
    global worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    worker_encoder = encoder
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this worker when its parent is gone, which can't end it where it is killed itself, as by torchrun."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_in_worker(*chunk) -> tuple[dict, Counter, dict]:
    return worker_encoder.encode_rows(*chunk)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def split_rows(row_numbers: np.ndarray, eval_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of (training, held-out) examples: rows are drawn at random, at least one if a fraction is asked.

    row_numbers (n,) integer: the row of each example, from 0 without a gap, in order; all of a row are on one side.
    """
    n_rows = int(row_numbers[-1]) + 1
    order = np.random.default_rng([seed, 0x5EED]).permutation(n_rows)
    held_out = np.zeros(n_rows, bool)
    held_out[order[:max(1, round(eval_fraction * n_rows)) if eval_fraction else 0]] = True
    return np.flatnonzero(~held_out[row_numbers]), np.flatnonzero(held_out[row_numbers])


def mix(ids: np.ndarray, file_weights: np.ndarray, file_of: np.ndarray, seed: int) -> np.ndarray:
    """Returns the rows of an epoch, sorted: each of `ids` floor(weight) times, and a random fraction of them once more.

    ids (n,) integer rows; file_weights (files,) above 0; file_of (all rows,) the file of each. Of a file with k of the ids
    there are exactly floor(w) k + round((w - floor(w)) k). Which come once more follows from seed and file alone.
    """
    files, mixed = file_of[ids], []
    for file, weight in enumerate(file_weights):
        rows, whole = ids[files == file], math.floor(weight)
        n_more = round((weight - whole) * len(rows))
        mixed += [rows.repeat(whole), np.random.default_rng([seed, 0x313, file]).permutation(rows)[:n_more]]
    return np.sort(np.concatenate(mixed))


def pack(lengths: np.ndarray, capacity: int, multiple: int) -> list[list[int]]:
    """Assigns documents of these lengths to bins, none of more than `capacity` tokens unless a single document is.

    There are as few bins as hold them in some multiple of `multiple`, and their token counts are nearly equal: the
    longest document comes first, and each goes to the bin with the fewest tokens (Graham 1969, at most 4/3 of the best).
    """
    n_bins = max(1, math.ceil(lengths.sum() / capacity / multiple)) * multiple
    while True:
        bins = [[] for _ in range(n_bins)]
        heap = [(0, i) for i in range(n_bins)]  # (tokens, bin)
        for document in np.argsort(-lengths, kind="stable").tolist():
            tokens, i = heap[0]
            bins[i].append(document)
            heapq.heapreplace(heap, (tokens + int(lengths[document]), i))
        if all(len(bins[i]) <= 1 or tokens <= capacity for tokens, i in heap):
            return bins
        n_bins += multiple


def batch_by_length(lengths: np.ndarray, capacity: int, multiple: int) -> list[list[int]]:
    """Assigns rows to bins of like length, none of more than `capacity` tokens with its padding unless of a single row.

    Each is a run of neighbours by length, padded to its longest row; there are as few as hold them in some multiple of
    `multiple`.
    """
    by_length = np.argsort(lengths, kind="stable")
    n_bins = multiple
    while True:
        bins = np.array_split(by_length, n_bins)
        if all(len(rows) <= 1 or len(rows) * lengths[rows[-1]] <= capacity for rows in bins):
            return [rows.tolist() for rows in bins]
        n_bins += multiple


def shuffled(positions: np.ndarray, n: int, seed: list[int]) -> np.ndarray:
    """Returns what stands at these positions, int64 in [0, n), of a random order of 0 … n - 1, without making the whole of it.

    A Feistel network (Luby & Rackoff 1988) permutes the numbers of 2k bits, whatever its round function. A number that comes
    out at n or above goes in again until it is below, which permutes 0 … n - 1 ("cycle walking", Black & Rogaway 2002).
    """
    half = np.uint64(max(1, math.ceil((n - 1).bit_length() / 2)))
    low_half = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(seed).generate_state(8, np.uint64)
    values, walking = positions.astype(np.uint64), np.ones(len(positions), bool)
    while walking.any():
        left, right = values[walking] >> half, values[walking] & low_half
        for key in keys:
            mixed = right + key  # the finalizer of SplitMix64 (Steele et al. 2014)
            mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ (mixed ^ mixed >> np.uint64(31)) & low_half
        values[walking] = left << half | right
        walking = values >= n
    return values.astype(np.int64)


def step_seed(seed: int, step: int, rank: int) -> int:
    """What a step draws at random follows from these alone, so that a resumed run draws it too."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


class SFTDataLoader:
    """Iterates over the microbatches of one rank; every rank has as many of them, in each step.

    The rows come in epochs, each in a new order that seed and epoch give whatever the number of ranks (or in the given
    order where seed is None), one epoch after the other without a gap. A step takes the next batch_size rows, and only the
    very last step may have fewer. They are shared out over ranks and microbatches so that none exceeds `microbatch_tokens`,
    there are at least `accumulation` microbatches, and token counts are balanced. A rank for which no row is left gets one
    token without a target: the others' collectives wait for its forward.

    A batch holds (B rows, T tokens, N targets)
        target_combined_input_ids        (B, T) int64
        target_combined_attention_mask   (B, T) int64, 1 on tokens and 0 on padding, by length: pad_id may be a real token
        target_labels                    (B, T) int64, the ids where they are targets and IGNORE elsewhere
        target_positions                 (N,) int64, the positions in the flattened labels of the N targets
        predicting_positions             (N,) int64, the positions in the flattened ids whose hidden states predict them
        target_documents                 (N,) int64, which document each target is of, from 0
        position_ids                     (B, T) int64, from 0 in each document
        document_ends                    (documents + 1,) int32, if packed: 0, and where each document ends; else None
        longest                          tokens of the longest document
        n_documents                      documents in this microbatch, those of an example one after the other
        examples                         (examples,) int64, which of the rows they are
        n_microbatches                   of this rank, and of each, in this step
        global_target_count              targets in the whole step, over all ranks and microbatches
        global_token_count               tokens in the whole step
        global_squared_lengths           sum of the rows' squared lengths in the whole step: what attention costs
        n_examples                       examples in the whole step
    and by its name (documents,) of each of rows.columns, and (N,) at the targets of any further column of PER_TOKEN.
    Packed, B is 1 and the documents stand one after the other; otherwise they are padded on the right to the longest.

    `share_context`, of examples of several documents that have the same ids before their targets, packs these once: what stands
    behind them in the example's first document. Of the others only the targets follow, and the batch has besides
        key_ends                         (documents + 1,) int32: what each document attends to, its context and itself, one after
        key_positions                    (keys,) int64: the other; from 0, and where each document's end; and where each key is
    """

    def __init__(self, rows: TokenisedRows, ids: np.ndarray, n_examples: int, seed: int | None = None, accumulation: int = 1, *,
                 batch_size: int, pad_id: int, packing: bool, microbatch_tokens: int, rank: int = 0, world_size: int = 1,
                 share_context: bool = False):
        self.rows, self.ids, self.batch_size, self.n_examples, self.seed = rows, ids, batch_size, n_examples, seed
        self.pad_id, self.packing, self.microbatch_tokens, self.accumulation = pad_id, packing, microbatch_tokens, accumulation
        self.rank, self.world_size, self.share_context = rank, world_size, share_context and packing

    def __iter__(self) -> Iterator[dict]:
        for first in range(0, self.n_examples, self.batch_size):
            yield from self.microbatches(first)

    def microbatches(self, first: int) -> Iterator[dict]:
        """Yields those of the step whose first row is at `first` in the endless sequence of epochs."""
        step_rows, rows, multiple = self.rows_of_step(first), self.rows, self.world_size * self.accumulation
        lengths, targets = rows.lengths[step_rows].astype(np.int64), rows.targets[step_rows]
        shared = (lengths - targets) * (self.share_context and np.arange(rows.n_documents) > 0)  # with the example's first
        if self.packing:
            bins = pack((lengths - shared).sum(1), self.microbatch_tokens, multiple)
        else:
            bins = batch_by_length(lengths.max(1), self.microbatch_tokens // rows.n_documents, multiple)
        mine = bins[self.rank::self.world_size]
        counts = {"global_target_count": int(targets.sum()), "global_token_count": int((lengths - shared).sum()),
                  "n_examples": len(step_rows), "n_microbatches": len(mine),
                  "global_squared_lengths": int((lengths ** 2 - shared ** 2).sum())}
        nothing = (np.array([self.pad_id]), *(np.zeros(1, dtype) for dtype in [*PER_TOKEN.values()][1:]))
        for members in mine:
            examples = step_rows[members]
            documents = [document for i in examples for document in rows[i]]
            columns = {name: torch.from_numpy(column[examples].flatten()) for name, column in rows.columns.items()}
            batch = collate_padded(documents or [nothing], self.pad_id) if not self.packing else \
                collate_packed(documents or [nothing], self.pad_id, shared[members].flatten() if documents else None)
            yield {**batch, **columns, **counts, "n_documents": len(documents), "examples": torch.from_numpy(examples)}

    def rows_of_step(self, first: int) -> np.ndarray:
        """Returns the step's rows, (at most batch_size,) int64."""
        epochs, positions = np.divmod(np.arange(first, min(first + self.batch_size, self.n_examples)), len(self.ids))
        if self.seed is None:
            return self.ids[positions]
        return self.ids[np.concatenate([shuffled(positions[epochs == epoch], len(self.ids), [self.seed, epoch])
                                        for epoch in np.unique(epochs).tolist()])]

    def rows_seen(self) -> np.ndarray:
        """Returns which of the rows it comes by, sorted, each once."""
        positions = np.arange(min(self.n_examples, len(self.ids)))
        return np.unique(self.ids[positions if self.seed is None else shuffled(positions, len(self.ids), [self.seed, 0])])

    def over(self, rows: TokenisedRows, ids: np.ndarray) -> "SFTDataLoader":
        """Returns one of the same layout, which goes once through these rows, in order."""
        other = copy.copy(self)
        other.rows, other.ids, other.n_examples, other.seed, other.accumulation = rows, ids, len(ids), None, 1
        return other

    def row_names(self, first: int) -> str:
        """Returns file:line of each of the step's rows."""
        return ", ".join(sorted(map(self.rows.where, self.rows_of_step(first))))


def collate_packed(documents: list[tuple[np.ndarray, ...]], pad_id: int, shared: np.ndarray | None = None) -> dict:
    """Documents, tuples of PER_TOKEN's columns → one row of them all, one after the other.

    shared (documents,): how many first tokens of each are left out, which are those of the last document of which none are.
    """
    lengths = np.array([len(ids) for ids, *_ in documents])
    shared = np.zeros_like(lengths) if shared is None else shared
    ends = np.concatenate([[0], (lengths - shared).cumsum()])
    columns = [np.concatenate([part[left_out:] for part, left_out in zip(column, shared)])[None] for column in zip(*documents)]
    numbers = np.arange(len(documents)).repeat(lengths - shared)
    positions = np.arange(ends[-1]) - ends[:-1].repeat(lengths - shared) + shared.repeat(lengths - shared)
    batch = as_batch(columns, np.ones((1, ends[-1])), positions[None], numbers, lengths.max(), ends)
    if not shared.any():
        return batch
    firsts = ends[:-1][np.maximum.accumulate(np.where(shared, 0, np.arange(len(documents))))]  # where the shared ones begin
    keys = [np.r_[first:first + n, start:end] for first, n, start, end in zip(firsts, shared, ends, ends[1:])]
    predicting = np.arange(-1, ends[-1] - 1)
    predicting[ends[:-1][shared > 0]] = (firsts + shared - 1)[shared > 0]
    batch["predicting_positions"] = torch.from_numpy(predicting)[batch["target_positions"]]
    return batch | {"key_ends": torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)),
                    "key_positions": torch.from_numpy(np.concatenate(keys))}


def collate_padded(documents: list[tuple[np.ndarray, ...]], pad_id: int) -> dict:
    """Documents, tuples of PER_TOKEN's columns → a row of a batch each, padded on the right."""
    lengths = np.array([len(ids) for ids, *_ in documents])
    longest = lengths.max()
    fillers = [pad_id, *[0] * (len(PER_TOKEN) - 1)]
    columns = [np.stack([np.pad(part, (0, longest - len(part)), constant_values=filler) for part in column])
               for column, filler in zip(zip(*documents), fillers)]
    mask, positions = np.arange(longest) < lengths[:, None], np.arange(longest)[None].repeat(len(documents), 0)
    return as_batch(columns, mask, positions, np.arange(len(documents)).repeat(longest), longest, None)


def as_batch(columns, mask, positions, documents, longest, ends) -> dict:
    ids, trained, *others = columns
    targets = np.flatnonzero(trained)
    batch = {"target_combined_input_ids": ids, "target_combined_attention_mask": mask,
             "target_labels": np.where(trained, ids, IGNORE), "target_positions": targets,
             "predicting_positions": targets - 1, "target_documents": documents[targets], "position_ids": positions}
    batch = {key: torch.from_numpy(array.astype(np.int64)) for key, array in batch.items()}
    batch |= {name: torch.from_numpy(column.flatten()[targets]) for name, column in zip([*PER_TOKEN][2:], others)}
    return batch | {"document_ends": None if ends is None else torch.from_numpy(ends.astype(np.int32)), "longest": int(longest)}


def to_device(batch: dict, device: torch.device) -> dict:
    """Copies the tensors; to a GPU from pinned memory, so that the host need not wait."""
    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    return {key: copy(value) if torch.is_tensor(value) else value for key, value in batch.items()}
