"""The token cache, the order of the rows, and batches. What is cached here are lines of numbers, by an encoder of them."""

import contextlib
import importlib.util
import io
import itertools
import math
import os
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, store_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from line_encoder import LineEncoder

import data
from data import (
    CHUNK,
    DTYPES,
    IGNORE,
    DataError,
    SFTDataLoader,
    TokenisedRows,
    batch_by_length,
    encode_files,
    pack,
    shuffled,
    split_rows,
    to_device,
    tokenise,
)

# ---------------------------------------------------------------------------------------------------------------------
# The token cache


def write_lines(file: Path, n_rows: int) -> Path:
    """Rows of 1 to 7 numbers, of which those of one number have no target and are dropped."""
    file.write_text("".join(f"{2 * i}{' 4 5'[:2 * (i % 3)]}{' 7' * (i % 5)}\n" for i in range(n_rows)))
    return file


def left(cache: Path) -> list[Path]:
    """What the cache holds, but for its locks."""
    return [path for path in (cache / "tokens").iterdir() if path.suffix != ".lock"]


def snapshot(cache: Path) -> dict[str, dict[str, bytes]]:
    """Content of each whole folder of a cache."""
    folders = [path for path in (cache / "tokens").iterdir() if path.is_dir()]
    assert not [folder for folder in folders if folder.suffix]
    return {folder.name: {file.name: file.read_bytes() for file in sorted(folder.iterdir())} for folder in folders}


def cached(files: list[Path], cache: Path, encoder: LineEncoder | None = None) -> TokenisedRows:
    return tokenise(files, encoder or LineEncoder(), str(cache))


def test_rows_are_those_of_the_lines(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("\n2 3\n4 4\n\n5 6 7\n")
    b.write_text("9\n")
    rows = cached([a, b, a], tmp_path)
    inside = [([2, 3], [False, True]), ([5, 6, 7], [True, False, True])]
    expected = [*inside, ([9], [True]), *inside]
    assert len(rows) == 5 and [tuple(column.tolist() for column in rows[i][0]) for i in range(5)] == expected
    assert rows.lengths.tolist() == [[2], [3], [1], [2], [3]] and rows.targets.tolist() == [[1], [2], [1], [1], [2]]
    assert [rows.where(i) for i in range(5)] == [f"{a}:2", f"{a}:5", f"{b}:1", f"{a}:2", f"{a}:5"]
    assert rows.counts == {"rows": 7, "targets": 7} and rows.file_of.tolist() == [0, 0, 1, 2, 2]
    assert rows.row_of.tolist() == [0, 2, 0, 0, 2] and rows.answers.tolist() == [-1] * 5  # the row of evens counts too
    assert rows.row_numbers().tolist() == [0, 1, 2, 3, 4]


def test_a_row_may_become_several_examples(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("2 3 | 4 | 5\n\n9\n")
    b.write_text("9 | 1 1\n")
    rows = cached([a, b, b], tmp_path)
    assert [rows[i][0][0].tolist() for i in range(len(rows))] == [[2, 3], [5], [9], *[[9], [1, 1]] * 2]
    assert rows.row_of.tolist() == [0, 0, 1, 0, 0, 0, 0] and rows.row_numbers().tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert rows.answers.tolist() == [-3, -1, -1, *[-2, -1] * 2]
    assert [rows.where(i) for i in range(7)] == [*[f"{a}:1"] * 2, f"{a}:3", *[f"{b}:1"] * 4]


def test_bad_rows_are_counted_by_reason_with_the_first_place_up_to_a_limit(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("1\n\n" * 2 * CHUNK + "bad smell\n1\nbad idea\n")
    b.write_text("bad idea\n" + "1\n" * 2 * CHUNK + "bad idea\n")
    rows = cached([a, b], tmp_path)
    assert rows.counts == {"rows": 4 * CHUNK + 5, "targets": 4 * CHUNK + 1, "bad: smell": 1, "bad: idea": 3}
    assert rows.places == {"bad: smell": [0, 4 * CHUNK + 1], "bad: idea": [0, 4 * CHUNK + 3]}
    assert rows.place("bad: idea") == f"{a}:1027" and len(rows) == 1025
    rows.check_bad_rows(4 / 1029)
    for most, said in ((3.99 / 1029, "0.00387755"), (0.0, "0")):
        with pytest.raises(DataError) as raised:
            rows.check_bad_rows(most)
        assert str(raised.value).splitlines() == [f"4 of 1,029 rows can't be used, more than max_bad_rows={said} of them:",
                                                  f"{a}:1027: idea (3 rows)", f"{a}:1025: smell (1 row)"]


def test_of_many_reasons_the_most_frequent_are_named(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("1\n" + "".join(f"bad {i}\n" * i for i in range(1, 12)))
    with pytest.raises(DataError) as raised:
        cached([file], tmp_path).check_bad_rows(0.5)
    lines = str(raised.value).splitlines()
    assert lines[0] == "66 of 67 rows can't be used, more than max_bad_rows=0.5 of them:" and lines[-1] == "and 3 more reasons"
    assert lines[1:-1] == [f"{file}:{2 + i * (i - 1) // 2}: {i} ({i} rows)" for i in range(11, 3, -1)]


class Disturbed(LineEncoder):
    """While the file is read, another process writes to it."""

    added = "8 9\n"

    def read(self, file: Path):
        for number, line in super().read(file):
            yield number, line
            if number == 2:
                with open(file, "a") as stream:
                    stream.write(self.added)


def test_a_file_that_changes_while_it_is_tokenised_leaves_no_cache(tmp_path):
    a, b = write_lines(tmp_path / "a.txt", 20), tmp_path / "b.txt"
    b.write_text("1\n")
    with pytest.raises(DataError) as raised:
        cached([b, a], tmp_path, Disturbed())
    assert str(raised.value) == f"{b}, {a}: changed while being read; start again once that is over"
    assert a.read_text().endswith(Disturbed.added) and not left(tmp_path)
    undisturbed = Disturbed()
    undisturbed.added = ""
    again = cached([b, a], tmp_path, undisturbed)
    assert again[len(again) - 1][0][0].tolist() == [8, 9] and snapshot_names(tmp_path) == [again.identity]


def test_a_second_call_maps_what_the_first_has_built(tmp_path):
    file = write_lines(tmp_path / "x.txt", 20)
    first = cached([file], tmp_path)
    (folder,) = [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]

    def state():
        return [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder, *sorted(folder.iterdir()))]

    before = state()
    second = cached([file], tmp_path)
    assert state() == before and second.counts == first.counts and second.identity == first.identity == folder.name
    assert all(np.array_equal(second[i], first[i]) for i in range(len(first)))
    moved = file.rename(tmp_path / "moved.txt")
    assert cached([moved], tmp_path).where(0) == f"{moved}:2" and state() == before


def test_the_cache_is_named_by_the_encoder_and_the_contents_of_the_files(tmp_path):
    a, b = write_lines(tmp_path / "a.txt", 20), write_lines(tmp_path / "b.txt", 30)
    names = []

    def name_of(*args) -> str:
        names.append(cached(*args).identity)
        return names[-1]

    first = name_of([a, b], tmp_path)
    assert len({first, name_of([b, a], tmp_path), name_of([a], tmp_path), name_of([a, b, b], tmp_path),
                name_of([a, b], tmp_path, LineEncoder("others"))}) == 5
    a.write_text(a.read_text().replace("14 4 7", "14 4 9"))  # same size, same name
    second = name_of([a, b], tmp_path)
    a.write_text(a.read_text() + "\n")
    third = name_of([a, b], tmp_path)
    fourth = name_of([a.rename(tmp_path / "a.json"), b], tmp_path)  # it may be read otherwise
    assert len({first, second, third, fourth}) == 4 and len(set(names)) == 8
    assert set(names) == set(snapshot(tmp_path))


def test_the_cache_does_not_hang_on_the_text_of_data_py(tmp_path):
    (tmp_path / "data.py").write_text((ROOT / "data.py").read_text() + "\n\ndef another(thing):\n    return thing\n")
    spec = importlib.util.spec_from_file_location("another_data", tmp_path / "data.py")
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    file = write_lines(tmp_path / "x.txt", 20)
    assert cached([file], tmp_path).identity == other.tokenise([file], LineEncoder(), str(tmp_path)).identity
    assert len(snapshot(tmp_path)) == 1


def test_what_a_killed_build_has_left_is_not_used(tmp_path):
    file = write_lines(tmp_path / "x.txt", 20)
    cached([file], tmp_path / "clean")
    clean = snapshot(tmp_path / "clean")
    (name,) = clean
    partial = tmp_path / "killed/tokens" / f"{name}.partial"
    partial.mkdir(parents=True)
    for column, content in clean[name].items():
        (partial / column).write_bytes(content[:len(content) // 2])
    (partial / "stray").write_text("x")
    cached([file], tmp_path / "killed")
    assert snapshot(tmp_path / "killed") == clean


def test_what_can_t_be_cached_is_one_line(tmp_path):
    file, empty, evens, words, bad = (tmp_path / f"{name}.txt" for name in ("x", "empty", "evens", "words", "bad"))
    for path, text in ((file, "1\n"), (empty, "\n"), (evens, "2\n4 6\n"), (words, "1\n\n2 two\n"), (bad, "2\n\nbad taste\n")):
        path.write_text(text)
    (tmp_path / "in_the_way").write_text("")
    for files, cache, said in [
            ([file, empty], "cache", f"{empty}: no rows in this file"),
            ([file, words], "cache", f"{words}:3: not a line of numbers"),
            ([evens], "cache", f"{evens}: no row has a target: 2 rows"),
            ([evens, bad], "cache", f"{evens}, {bad}: no row has a target: 4 rows; 1 bad: taste ({bad}:3)"),
            ([file, tmp_path], "cache", f"{tmp_path}: can't be read: Is a directory"),
            ([tmp_path / "none"], "cache", f"{tmp_path / 'none'}: can't be read: No such file or directory"),
            ([file], "in_the_way", "the token cache can't be written: Not a directory")]:
        with pytest.raises(DataError) as raised:
            cached(files, tmp_path / cache)
        assert str(raised.value).endswith(said) and (cache == "in_the_way" or str(raised.value) == said)
    assert not left(tmp_path / "cache")


class Screen(io.StringIO):
    """A terminal that tells when something is drawn on it."""

    def __init__(self):
        super().__init__()
        self.drawn = threading.Event()

    def write(self, text: str) -> int:
        if "tokenising" in text:
            self.drawn.set()
        return super().write(text)


class Slow(LineEncoder):
    """Takes for its first rows as long as the screen takes to show that something goes on, and then fails if it is to."""

    screen, fails = None, False

    def encode_rows(self, *chunk):
        assert self.screen.drawn.wait(60)
        if self.fails:
            raise DataError("a bad row")
        return super().encode_rows(*chunk)


@pytest.mark.parametrize("fails", [False, True])
def test_the_bar_moves_within_a_row_and_its_line_is_ended(tmp_path, monkeypatch, fails):
    encoder, screen = Slow(), Screen()
    encoder.screen, encoder.fails = screen, fails
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(DataError) if fails else contextlib.nullcontext():
        cached([write_lines(tmp_path / "x.txt", 20)], tmp_path, encoder)
    text = screen.getvalue()
    assert text.startswith("\rtokenising: 0.00 rows [00:0") and text.endswith("\n")
    assert ("20.0 rows" in text) != fails


def snapshot_names(cache: Path) -> list[str]:
    return [path.name for path in (cache / "tokens").iterdir() if path.is_dir() and not path.suffix]


def child(file: Path, cache: Path, killed_at_row: int | str = "", bytes_for_workers: int = data.BYTES_FOR_WORKERS):
    """Starts a process of its own that fills the cache once it is sent a line; it says when it waits for that."""
    argv = [ROOT / "tests/line_encoder.py", file, cache, killed_at_row, bytes_for_workers]
    return subprocess.Popen([sys.executable, *map(str, argv)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})


@pytest.mark.slow
@pytest.mark.parametrize("bytes_for_workers", [10 ** 6, 0], ids=["one process", "several"])
def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(tmp_path, one_process, bytes_for_workers):
    file = write_lines(tmp_path / "x.txt", 16 * CHUNK)
    killed = child(file, tmp_path / "cache", 300, bytes_for_workers)
    killed.communicate("go\n", timeout=60)  # until nobody can write to its output: its workers are gone too
    assert killed.returncode == -9
    (partial,) = [path for path in (tmp_path / "cache/tokens").iterdir() if path.is_dir()]
    assert partial.suffix == ".partial"
    for folder in ("cache", "clean"):
        cached([file], tmp_path / folder)
    assert snapshot(tmp_path / "cache") == snapshot(tmp_path / "clean")
    assert partial.stem in snapshot(tmp_path / "cache")


@pytest.mark.slow
def test_builds_at_once_by_several_processes_end_in_the_cache_of_one_build_by_one(tmp_path, one_process):
    file = write_lines(tmp_path / "x.txt", 16 * CHUNK)
    racers = [child(file, tmp_path / "raced", "", 0) for _ in range(2)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2  # all have imported what they need: now they go
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    alone = cached([file], tmp_path / "alone")
    assert [racer.communicate(timeout=60)[0] for racer in racers] == [f"{len(alone)}\n"] * 2
    assert snapshot(tmp_path / "raced") == snapshot(tmp_path / "alone")


def test_the_cache_holds_the_chunks_one_after_the_other(tmp_path, one_process):
    files = [write_lines(tmp_path / "a.txt", 1000), write_lines(tmp_path / "b.txt", 16 * CHUNK)]
    parts, counts, _ = zip(*encode_files(files, LineEncoder(), 1))
    assert len(parts) == 4 + 16  # none has rows of two files
    whole = cached(files, tmp_path)
    assert whole.counts == dict(sum(counts, Counter())) and whole.offsets.tolist() == [0, *np.cumsum(whole.lengths)]
    for column, name in ((whole.tokens[0], "ids"), (whole.tokens[1], "trained"), (whole.lines, "lines"), (whole.file_of, "files"),
                         (whole.lengths[:, 0], "lengths"), (whole.targets[:, 0], "targets"), (whole.row_of, "rows"),
                         (whole.answers, "answers")):
        assert column.dtype == DTYPES[name] and np.array_equal(column, np.concatenate([part[name] for part in parts]))


@pytest.mark.parametrize("more, n_workers", [(0, 3), (1, 1)])
def test_more_processes_are_for_many_bytes(tmp_path, monkeypatch, more, n_workers):
    files, asked = [write_lines(tmp_path / name, 20) for name in ("a.txt", "b.txt")], []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(data, "BYTES_FOR_WORKERS", sum(file.stat().st_size for file in files) + more)
    monkeypatch.setattr(data, "encode_files", lambda *args: (asked.append(args[2]), encode_files(*args[:2], 1))[1])
    cached(files, tmp_path)
    assert asked == [n_workers]


# ---------------------------------------------------------------------------------------------------------------------
# The order of the rows

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 64, 65, 100, 1000, 4096, 4097, 65_537]


def order(n: int, *seed: int) -> list[int]:
    return shuffled(np.arange(n), n, list(seed)).tolist()


def by_the_book(position: int, n: int, seed: list[int]) -> int:
    """The Feistel network with cycle walking in plain integers: halves of bits, SplitMix64's finalizer as the round function."""
    bits = 1
    while 4 ** bits < n:
        bits += 1
    keys = np.random.SeedSequence(seed).generate_state(8, np.uint64).tolist()
    while True:
        left, right = divmod(position, 2 ** bits)
        for key in keys:
            mixed = (right + key) % 2 ** 64
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2 ** 64
            left, right = right, left ^ (mixed ^ mixed >> 31) % 2 ** bits
        position = left * 2 ** bits + right
        if position < n:
            return position


@pytest.mark.parametrize("n", SIZES)
def test_an_order_has_every_row_once(n):
    for seed in ([0, 0], [1, 0], [1, 1], [2 ** 40, 3]):
        rows = shuffled(np.arange(n), n, seed)
        assert rows.dtype == np.int64 and np.array_equal(np.sort(rows), np.arange(n))


@pytest.mark.parametrize("n", [*SIZES[:-1], 20_000_000, 2 ** 33])
def test_an_order_is_as_by_the_book(n):
    positions = np.unique(np.linspace(0, n - 1, 50).astype(np.int64))
    for seed in ([1, 0], [7, 2]):
        assert shuffled(positions, n, seed).tolist() == [by_the_book(position, n, seed) for position in positions.tolist()]


def test_an_order_stays_what_it_is():
    """Or a run could not be resumed by the next version of the code."""
    assert order(10, 1, 0) == [0, 7, 4, 6, 2, 3, 1, 9, 5, 8]
    assert shuffled(np.array([0, 9_999_999, 19_999_999]), 20_000_000, [1, 2]).tolist() == [
        325216, 12654908, 6924026]


@pytest.mark.parametrize("n", [1, 5, 100, 4097])
def test_any_slice_is_that_of_the_whole_order(n):
    whole, rng = np.array(order(n, 3, 1)), np.random.default_rng(n)
    for start, stop in [(0, n), (0, 0), (n - 1, n), *np.sort(rng.integers(0, n + 1, (20, 2))).tolist()]:
        assert np.array_equal(shuffled(np.arange(start, stop), n, [3, 1]), whole[start:stop])
    anywhere = rng.integers(0, n, 50)
    assert np.array_equal(shuffled(anywhere, n, [3, 1]), whole[anywhere])


def test_orders_differ_by_seed_and_epoch():
    orders = {seed: order(100, *seed) for seed in itertools.product(range(6), range(6))}
    assert len(set(map(tuple, orders.values()))) == 36
    assert list(range(100)) not in orders.values()
    for (_, one), (_, other) in itertools.combinations(orders.items(), 2):
        assert sum(a == b for a, b in zip(one, other)) < 10  # by chance one, and 10 in one of ten million pairs


@pytest.mark.parametrize("n, n_orders, mean", [(2, 2, 250), (3, 6, 250), (4, 24, 100), (5, 120, 20)])
def test_all_orders_are_as_frequent(n, n_orders, mean):
    """Within five standard deviations, of counts that are close to Poisson's."""
    counts = Counter(tuple(order(n, seed, 1)) for seed in range(mean * n_orders))
    assert set(counts) == set(itertools.permutations(range(n)))
    assert abs(np.array([*counts.values()]) - mean).max() < 5 * math.sqrt(mean)


@pytest.mark.parametrize("n", [7, 13, 16])
def test_every_row_comes_as_often_at_each_position_and_after_each_other(n):
    n_seeds = 200 * n
    orders = np.array([order(n, seed, 0) for seed in range(n_seeds)])
    at, after = np.zeros((n, n)), np.zeros((n, n))
    for position in range(n):
        np.add.at(at, (position, orders[:, position]), 1)
        if position:
            np.add.at(after, (orders[:, position - 1], orders[:, position]), 1)
    assert abs(at - 200).max() < 5 * math.sqrt(200)
    pairs = after[~np.eye(n, dtype=bool)]
    assert not after.diagonal().any() and abs(pairs - 200).max() < 5 * math.sqrt(200)


def test_a_long_order_looks_like_any_other():
    n = 100_000
    rows = shuffled(np.arange(n), n, [1, 0])
    positions = np.arange(n)
    for other in (positions, np.roll(rows, 1), shuffled(positions, n, [1, 1]), shuffled(positions, n, [2, 0])):
        assert abs(np.corrcoef(rows, other)[0, 1]) < 4 / math.sqrt(n)
    assert (rows == positions).sum() < 8 and (np.diff(rows) == 1).sum() < 8  # by chance one
    low_bits = np.bincount(rows[:n // 2] % 16, minlength=16)
    assert abs(low_bits - n / 32).max() < 4 * math.sqrt(n / 32)


class Ids:
    """Stands for an array of n ids, each its own index, of which no more than `most` may be asked for at once."""

    def __init__(self, n: int, most: int):
        self.n, self.most = n, most

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        assert len(positions) <= self.most
        return positions


class Counted(np.ndarray):
    """Counts the numbers that arithmetic on it makes."""

    made = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        result = getattr(ufunc, method)(*[np.asarray(each) for each in inputs], **options)
        Counted.made += np.size(result)
        return result.view(Counted)


@pytest.mark.parametrize("seed", [1, None])
def test_a_step_costs_no_more_where_there_are_many_rows(monkeypatch, seed):
    """In memory and in numbers computed; for each epoch, cycle walking takes at most four rounds on average."""
    batch_size, given_to = 512, []

    def counted(positions: np.ndarray, n: int, seed: list[int]) -> np.ndarray:
        given_to.append(len(positions))
        return np.asarray(shuffled(positions.view(Counted), n, seed))

    def cost_of(n: int) -> tuple[float, int]:
        """(numbers computed, most bytes at once) of a step, the mean and the maximum over 10 of them."""
        Counted.made, peaks = 0, []
        loader = SFTDataLoader(None, Ids(n, batch_size), 10 ** 12, seed, batch_size=batch_size, pad_id=PAD, packing=True,
                               microbatch_tokens=1)
        for step in range(10):
            given_to.clear()
            tracemalloc.start()
            rows = loader.rows_of_step(step * 7919 * batch_size)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert len(rows) == batch_size and 0 <= rows.min() and rows.max() < n
            assert sum(given_to) == (0 if seed is None else batch_size) and len(given_to) <= 2
        return Counted.made / 10, max(peaks)

    monkeypatch.setattr(data, "shuffled", counted)
    once, memory = cost_of(4 ** 10)  # a power of four is its own domain: no number goes in again
    assert once <= 100 * batch_size and (once > 0) == (seed is not None)
    for n in (10_000, 20_000_000, 4 ** 10 + 1):
        numbers, peak = cost_of(n)
        assert once <= numbers <= 4.5 * once  # what is done is looked at each time
        assert peak <= 1.2 * memory <= 30 * 8 * batch_size


# ---------------------------------------------------------------------------------------------------------------------
# Batches. These need no processes: a loader is told its rank.

BATCH, SEED, PAD = 6, 4, 9
WORLD_SIZES = [1, 2, 3, 4]
QUICK = {1, 2, 5, 6, 7, 12, 13, 24}  # those about a multiple of the batch, and a few
sizes = pytest.mark.parametrize("n", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow)
                                      for n in range(1, 2 * 2 * BATCH + 2)])
layouts = pytest.mark.parametrize("packing, accumulation, microbatch_tokens",
                                  [*itertools.product([True, False], [1, 2], [10 ** 6, 25])])


def make_documents(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, trained): document i begins with 1000 + i, has 2 to 30 tokens, and the pad token among them, last if i is even."""
    rng, documents = np.random.default_rng(n), []
    for i in range(n):
        length = rng.integers(2, 31)
        ids, trained = rng.integers(0, 20, length), rng.random(length) < 0.5
        ids[0], trained[0], trained[-1] = 1000 + i, False, True
        ids[-1] = PAD if i % 2 == 0 else ids[-1]
        documents.append((ids, trained))
    return documents


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """n → rows on the disk, twice n of them, and the ids of every other one."""
    folder, made = tmp_path_factory.mktemp("rows"), {}

    def rows_of(n: int):
        if n not in made:
            made[n] = store_rows(folder / str(n), make_documents(2 * n)), np.arange(0, 2 * n, 2)
        return made[n]
    return rows_of


def loaders(rows, ids, world_size: int, n_examples: int, seed: int | None = SEED, packing=True, microbatch_tokens=10 ** 6,
            **options) -> list[SFTDataLoader]:
    return [SFTDataLoader(rows, ids, n_examples, seed, **{"batch_size": BATCH, **options}, pad_id=PAD, packing=packing,
                          microbatch_tokens=microbatch_tokens, rank=rank, world_size=world_size) for rank in range(world_size)]


def sequence_of(rows, ids, n_examples: int, seed: int | None = SEED) -> list[int]:
    """The rows of all steps in their order, which is that of one step of all examples."""
    return loaders(rows, ids, 1, n_examples, seed, batch_size=n_examples)[0].rows_of_step(0).tolist()


def by_step(loader: SFTDataLoader) -> list[list[dict]]:
    """[the microbatches of each step] of one rank, each of which says how many there are."""
    steps, batches = [], iter(loader)
    for batch in batches:
        steps.append([batch, *itertools.islice(batches, batch["n_microbatches"] - 1)])
        assert {batch["n_microbatches"] for batch in steps[-1]} == {len(steps[-1])}
    return steps


def documents_in(batch: dict) -> list[tuple[list[int], list[int], list[int]]]:
    """[(ids, labels, position ids)] of a microbatch, by its document_ends or by its mask."""
    columns = [batch[key] for key in ("target_combined_input_ids", "target_labels", "position_ids")]
    if batch["document_ends"] is not None:
        pairs = itertools.pairwise(batch["document_ends"].tolist())
        return [tuple(column[0, start:stop].tolist() for column in columns) for start, stop in pairs]
    lengths = batch["target_combined_attention_mask"].sum(1).tolist()
    return [tuple(column[row, :length].tolist() for column in columns) for row, length in enumerate(lengths)]


def rows_in(batch: dict) -> list[int]:
    """Which rows a microbatch holds; a filler, one pad token, is none."""
    found = [ids[0] - 1000 for ids, _, _ in documents_in(batch) if ids != [PAD]]
    assert len(found) == batch["n_documents"]
    return found


def rows_by_step(ranks: list[list[list[dict]]]) -> list[list[int]]:
    """The steps of each rank → the rows of each step, over all ranks, sorted."""
    return [sorted(row for batches in of_ranks for batch in batches for row in rows_in(batch))
            for of_ranks in zip(*ranks, strict=True)]


@sizes
def test_every_example_comes_once_an_epoch_each_time_in_a_new_order(stored, n):
    rows, ids = stored(n)
    sequence = sequence_of(rows, ids, 3 * n)
    epochs = [sequence[i * n:(i + 1) * n] for i in range(3)]
    assert all(sorted(epoch) == ids.tolist() for epoch in epochs)
    if n > 5:
        assert len({*map(tuple, epochs), tuple(ids)}) == 4
        assert sequence_of(rows, ids, n, seed=SEED + 1) not in epochs
    steps = rows_by_step([by_step(*loaders(rows, ids, 1, n_examples=3 * n))])
    ends = [*range(0, 3 * n, BATCH), 3 * n]
    assert steps == [sorted(sequence[start:stop]) for start, stop in itertools.pairwise(ends)]
    assert len(steps) == math.ceil(3 * n / BATCH)
    assert [len(step) for step in steps[:-1]] == [BATCH] * (len(steps) - 1) and 1 <= len(steps[-1]) <= BATCH


@sizes
@pytest.mark.parametrize("seed", [SEED, None])
def test_a_step_may_begin_anywhere_in_the_sequence_of_epochs(stored, n, seed):
    """As one does where a run of other n_examples goes on."""
    (loader,), sequence = loaders(*stored(n), 1, 3 * n, seed), sequence_of(*stored(n), 3 * n, seed)
    for first in range(3 * n):
        assert loader.rows_of_step(first).tolist() == sequence[first:first + BATCH]
        assert sorted(sum(map(rows_in, loader.microbatches(first)), [])) == sorted(sequence[first:first + BATCH])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("microbatch_tokens", [7, 10 ** 6])
def test_examples_of_one_row_are_documents_of_their_own(tmp_path, packing, world_size, microbatch_tokens):
    """The same on one rank and two, packed and padded; a step counts examples, not rows."""
    lines = tmp_path / "x.txt"
    lines.write_text("20 3 5 | 20 3 6 8 7 | 20 1\n21 9\n22 5 6 | 24 | 22 5 6 2 1\n")
    documents = [([20, 3, 5], [3, 5]), ([20, 3, 6, 8, 7], [3, 7]), ([20, 1], [1]), ([21, 9], [21, 9]), ([22, 5, 6], [5]),
                 ([22, 5, 6, 2, 1], [5, 1])]  # (ids, those that are targets)
    rows = cached([lines], tmp_path)
    steps, counts = [], set()
    for loader in loaders(rows, np.arange(6), world_size, 6, None, packing, microbatch_tokens, batch_size=4):
        for i, step in enumerate(by_step(loader)):
            steps += [(i, document) for batch in step if batch["n_documents"] for document in documents_in(batch)]
            counts |= {(i, *(batch[f"{name}_count"] for name in ("global_token", "global_target")), batch["n_examples"])
                       for batch in step}
    expected = [(i // 4, (ids, [id if id in targets else IGNORE for id in ids], [*range(len(ids))]))
                for i, (ids, targets) in enumerate(documents)]
    assert sorted(steps) == sorted(expected) and counts == {(0, 12, 7, 4), (1, 8, 3, 2)}


def test_a_step_names_its_rows(tmp_path):
    lines = [tmp_path / "a.txt", tmp_path / "b.txt"]
    lines[0].write_text("1\n\n1\n")
    lines[1].write_text("1\n")
    (loader,) = loaders(cached(lines, tmp_path), np.array([2, 1, 1]), 1, 5, seed=None, batch_size=3)
    assert loader.row_names(0) == f"{lines[0]}:3, {lines[0]}:3, {lines[1]}:1"
    assert loader.row_names(3) == f"{lines[0]}:3, {lines[1]}:1"


@sizes
def test_the_order_is_the_same_on_every_rank_of_any_number(stored, n):
    sequence = sequence_of(*stored(n), 3 * n)
    for loader in [loader for world_size in WORLD_SIZES for loader in loaders(*stored(n), world_size, 3 * n)]:
        assert sum((loader.rows_of_step(first).tolist() for first in range(0, 3 * n, BATCH)), []) == sequence


@sizes
@layouts
def test_a_step_has_the_same_rows_on_any_number_of_ranks_and_as_many_microbatches_on_each(
        stored, n, packing, accumulation, microbatch_tokens):
    n_examples = 2 * n - n % 2
    sequence = sequence_of(*stored(n), n_examples)
    expected = [sorted(sequence[first:first + BATCH]) for first in range(0, n_examples, BATCH)]
    for world_size in WORLD_SIZES:
        ranks = [by_step(loader) for loader in loaders(*stored(n), world_size, n_examples, packing=packing,
                                                       accumulation=accumulation, microbatch_tokens=microbatch_tokens)]
        assert rows_by_step(ranks) == expected
        counts = [list(map(len, steps)) for steps in ranks]
        assert all(each == counts[0] for each in counts) and min(counts[0]) >= accumulation
        assert all(count % accumulation == 0 for count in counts[0])
        if microbatch_tokens == 10 ** 6:
            assert set(counts[0]) == {accumulation}


@sizes
def test_the_microbatches_of_any_step_are_those_of_the_whole(stored, n):
    for world_size, seed in itertools.product((1, 2), (SEED, None)):
        for loader in loaders(*stored(n), world_size, 3 * n, seed):
            whole = by_step(loader)
            assert same(whole, [list(loader.microbatches(first)) for first in range(0, 3 * n, BATCH)])
            assert same(whole, by_step(loader))  # nothing is left of the first time


def same(a, b) -> bool:
    """Whether two trees of lists and dicts of tensors and numbers are equal."""
    if isinstance(a, (list, dict)):
        keys = a if isinstance(a, dict) else range(len(a))
        return len(a) == len(b) and all(same(a[key], b[key]) for key in keys)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@layouts
@pytest.mark.parametrize("n, world_size", [(1, 3), (7, 2), (13, 1), (20, 3)])
def test_batches_hold_their_rows_and_nothing_else(stored, n, world_size, packing, accumulation, microbatch_tokens):
    documents, n_seen = make_documents(2 * n), 0
    for loader in loaders(*stored(n), world_size, 2 * n, packing=packing, accumulation=accumulation,
                          microbatch_tokens=microbatch_tokens):
        for batch in loader:
            ids, labels, mask = (batch[f"target_{key}"] for key in ("combined_input_ids", "labels", "combined_attention_mask"))
            assert all(batch[key].dtype == torch.int64 for key in ("position_ids", "target_positions", "predicting_positions"))
            assert ids.dtype == labels.dtype == mask.dtype == torch.int64 and ids.shape == labels.shape == mask.shape
            assert torch.equal(batch["target_positions"], (labels.flatten() != IGNORE).nonzero().flatten())
            assert torch.equal(batch["predicting_positions"], batch["target_positions"] - 1)
            assert (batch["position_ids"].flatten()[batch["target_positions"]] > 0).all()  # so these are of the same document
            inside = documents_in(batch)
            for row, (its_ids, its_labels, positions) in zip(rows_in(batch), inside):
                expected, trained = documents[row]
                assert its_ids == expected.tolist() and positions == list(range(len(expected)))
                assert its_labels == [id if on else IGNORE for id, on in zip(expected, trained)]
                n_seen += 1
            if not batch["n_documents"]:
                assert ids.tolist() == [[PAD]] and labels.tolist() == [[IGNORE]] and batch["position_ids"].tolist() == [[0]]
            assert batch["longest"] == max(len(its_ids) for its_ids, _, _ in inside)
            if packing:
                ends = batch["document_ends"]
                assert ids.shape[0] == 1 and mask.all() and ends.dtype == torch.int32
                assert ends[0] == 0 and ends[-1] == ids.shape[1] and (ends.diff() > 0).all()
            else:
                assert batch["document_ends"] is None and ids.shape[1] == batch["longest"]
                padding = mask == 0
                assert (ids[padding] == PAD).all() and (labels[padding] == IGNORE).all()
                assert (mask.diff(dim=1) <= 0).all()  # on the right
    assert n_seen == 2 * n


@layouts
def test_counts_are_the_whole_step_s(stored, packing, accumulation, microbatch_tokens):
    documents = make_documents(26)
    for loader in loaders(*stored(13), 2, 20, packing=packing, accumulation=accumulation, microbatch_tokens=microbatch_tokens):
        for i, step in enumerate(by_step(loader)):
            rows = [documents[row] for row in loader.rows_of_step(i * BATCH)]
            for batch in step:
                assert batch["n_examples"] == len(rows) == (6, 6, 6, 2)[i]
                assert batch["global_token_count"] == sum(len(ids) for ids, _ in rows)
                assert batch["global_target_count"] == sum(int(trained.sum()) for _, trained in rows)
                assert batch["global_squared_lengths"] == sum(len(ids) ** 2 for ids, _ in rows)


@sizes
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("microbatch_tokens", [25, 40, 10 ** 6])
def test_no_microbatch_of_several_rows_has_more_than_its_tokens(stored, n, packing, microbatch_tokens):
    sizes = [(batch["target_combined_input_ids"].numel(), batch["n_documents"]) for loader in
             loaders(*stored(n), 2, 2 * n, packing=packing, microbatch_tokens=microbatch_tokens) for batch in loader]
    assert all(tokens <= microbatch_tokens or n_documents == 1 for tokens, n_documents in sizes)


def test_a_batch_is_copied_to_a_device_whole(stored):
    batch = next(iter(loaders(*stored(10), 1, 10)[0]))
    assert same(to_device(batch, torch.device("cpu")), batch)
    on_meta = to_device(batch, torch.device("meta"))
    assert on_meta.keys() == batch.keys()
    for key, value in batch.items():
        assert on_meta[key].device.type == "meta" if torch.is_tensor(value) else on_meta[key] == value


def test_evaluation_takes_the_rows_in_their_order(stored):
    rows, ids = stored(10)
    assert rows_by_step(list(map(by_step, loaders(rows, ids, 2, 10, seed=None)))) == [[0, 2, 4, 6, 8, 10], [12, 14, 16, 18]]


@pytest.mark.parametrize("n, fraction, n_held_out", [(100, 0.1, 10), (100, 0.0, 0), (5, 0.01, 1), (9, 0.5, 4), (999, 0.333, 333)])
def test_held_out_rows_are_trained_on_by_no_run(n, fraction, n_held_out):
    train, held_out = split_rows(np.arange(n), fraction, seed=1)
    assert len(held_out) == n_held_out and sorted([*train, *held_out]) == list(range(n))
    assert train.tolist() == sorted(train) and held_out.tolist() == sorted(held_out)
    if 1 < n_held_out:
        assert held_out.tolist() != split_rows(np.arange(n), fraction, seed=2)[1].tolist()
        assert held_out.tolist() not in (list(range(n_held_out)), list(range(n - n_held_out, n)))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4])
def test_all_examples_of_a_row_are_on_one_side(fraction):
    """Which rows are held out does not hang on how many examples each has become."""
    counts = np.random.default_rng(3).integers(1, 5, 50)
    row_numbers = np.repeat(np.arange(50), counts)
    train, held_out = split_rows(row_numbers, fraction, seed=1)
    rows = split_rows(np.arange(50), fraction, seed=1)
    assert train.tolist() == [i for i, row in enumerate(row_numbers) if row in rows[0]]
    assert held_out.tolist() == [i for i, row in enumerate(row_numbers) if row in rows[1]]
    assert len(rows[1]) == round(50 * fraction) and len(train) + len(held_out) == counts.sum() > 100


lengths_lists = st.lists(st.integers(1, 50), min_size=1, max_size=60).map(lambda lengths: np.array(lengths, np.int32))


@settings(max_examples=300, deadline=None)
@given(lengths=lengths_lists, capacity=st.integers(1, 150), multiple=st.integers(1, 6))
@pytest.mark.parametrize("assign", [pack, batch_by_length])
def test_documents_are_assigned_whole_once_each_and_within_the_capacity(assign, lengths, capacity, multiple):
    groups = assign(lengths, capacity, multiple)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert len(groups) % multiple == 0 and groups == assign(lengths.copy(), capacity, multiple)
    tokens = {pack: lambda group: lengths[group].sum(), batch_by_length: lambda group: len(group) * lengths[group].max()}[assign]
    assert all(len(group) <= 1 or tokens(group) <= capacity for group in groups)
    if tokens([*range(len(lengths))]) <= capacity:
        assert len(groups) == multiple  # no more microbatches than are asked for, where all fit


@settings(max_examples=300, deadline=None)
@given(lengths=lengths_lists, capacity=st.integers(50, 150), multiple=st.integers(1, 6))
def test_packed_groups_are_balanced_and_few(lengths, capacity, multiple):
    groups = pack(lengths, capacity, multiple)
    tokens = [int(lengths[group].sum()) for group in groups]
    for group, its_tokens in zip(groups, tokens):
        assert its_tokens - (lengths[group].min() if group else 0) <= min(tokens)  # without its last document it was the least
    # Where fewer groups would not do, the fullest had several documents, and without its last each one was half full.
    assert len(groups) <= 2 * lengths.sum() / capacity + multiple


@settings(max_examples=300, deadline=None)
@given(lengths=lengths_lists, capacity=st.integers(1, 150), multiple=st.integers(1, 6))
def test_padded_groups_are_runs_by_length_of_nearly_equal_size(lengths, capacity, multiple):
    groups = batch_by_length(lengths, capacity, multiple)
    assert [*lengths[list(itertools.chain(*groups))]] == sorted(lengths)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("microbatch_tokens", [30, 10 ** 6])
@pytest.mark.parametrize("share_context", [True, False])
def test_pairs_stay_together_and_may_share_their_context(tmp_path, world_size, microbatch_tokens, share_context):
    """Each document, put together from where its keys stand, is the one that is stored, at its positions from 0."""
    rng, documents = np.random.default_rng(2), []
    for _ in range(11):
        context = rng.integers(0, 1000, rng.integers(1, 9))
        for n in rng.integers(1, 9, 2):
            ids = np.concatenate([context, rng.integers(0, 1000, n)])
            documents.append((ids, np.arange(len(ids)) >= len(context)))
    store_rows(tmp_path / "pairs", documents)
    rows, found, tokens = TokenisedRows(tmp_path / "pairs", [], 2), [], Counter()
    rows.columns = {"number": np.arange(22, dtype=np.float32).reshape(11, 2)}
    for loader in loaders(rows, np.arange(11), world_size, 11, microbatch_tokens=microbatch_tokens, share_context=share_context):
        for step, batches in enumerate(by_step(loader)):
            for batch in batches:
                ids, ends = batch["target_combined_input_ids"][0].numpy(), batch["document_ends"]
                keys = batch.get("key_positions", torch.arange(len(ids))).numpy()
                borders = batch.get("key_ends", ends).tolist()
                assert ("key_ends" in batch) == bool(share_context and batch["n_documents"])
                assert batch["n_documents"] in (0, len(ends) - 1) and len(batch["examples"]) * 2 == batch["n_documents"]
                tokens[step] += len(ids) if batch["n_documents"] else 0
                assert len(ids) <= microbatch_tokens or len(batch["examples"]) == 1
                for i, number in enumerate(batch["number"].int().tolist()):
                    places = keys[borders[i]:borders[i + 1]]
                    own, on = documents[number]
                    mine = batch["target_documents"].numpy() == i
                    assert ids[places].tolist() == own.tolist() and batch["longest"] >= len(own)
                    assert batch["position_ids"][0].numpy()[places].tolist() == [*range(len(own))]
                    assert batch["target_positions"].numpy()[mine].tolist() == places[on].tolist()
                    assert batch["predicting_positions"].numpy()[mine].tolist() == places[np.flatnonzero(on) - 1].tolist()
                    assert number == 2 * batch["examples"][i // 2] + i % 2
                    found.append(number)
                counts = batch["global_token_count"], batch["global_target_count"], batch["global_squared_lengths"]
            step_rows = loader.rows_of_step(step * BATCH)
            expected = np.zeros(3, int)
            for (first, on), (second, _) in (documents[2 * i:2 * i + 2] for i in step_rows):
                n = int((~on).sum()) * share_context
                expected += [len(first) + len(second) - n, on.sum() + len(second) - (~on).sum(), len(first) ** 2
                             + len(second) ** 2 - n ** 2]
            assert counts == tuple(expected)
            tokens[step, "told"] = counts[0]
    assert sorted(found) == [*range(22)]
    assert all(tokens[step] == tokens[step, "told"] for step in range(math.ceil(11 / BATCH)))


def test_the_rows_that_a_loader_comes_by(stored):
    rows, ids = stored(17)
    for n_examples, seed in ((5, SEED), (17, SEED), (40, SEED), (5, None)):
        loader, = loaders(rows, ids, 1, n_examples, seed)
        assert loader.rows_seen().tolist() == sorted({*sequence_of(rows, ids, n_examples, seed)})
        over = loader.over(rows, ids[3:6])
        assert [rows_in(batch) for batch in over] == [ids[3:6].tolist()] and over.batch_size == loader.batch_size
