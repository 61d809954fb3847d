"""plot.py: what is drawn of which record, the image, and its errors of one line."""

import json
import math
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script, run_well

import plot

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb
from matplotlib.image import imread

SIZE = 2160, 1320  # pixels: 7.2 x 4.4 inches, a page's width, at 300 to the inch


def make_records(n_steps: int = 8, level: float = 2.0, skipped: tuple[int, ...] = ()) -> list[dict]:
    """As sft.py logs them: a step of 4 examples that was skipped has no loss."""
    records = [{"step": 0, "counter": 0, "loss/eval": level, "logps/eval": -9.0}]
    for step in range(1, n_steps + 1):
        known = step not in skipped
        records.append({"step": step, "counter": 4 * step, "lr": 1e-5 * step, "grad_norm": 1.0 / step if known else None,
                        "loss/train": level / step if known else None, "skipped_steps": sum(s <= step for s in skipped),
                        "tokens_per_second": 900.0 + step, "peak_memory_gb": 1.5})
    return [*records, {"step": n_steps, "counter": 4 * n_steps, "loss/eval": level / 2, "logps/eval": -4.0}]


def write_run(folder: Path, records: list[dict], end: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    return folder


def draw_runs(folder: Path, runs: dict[str, list[dict]]):
    return plot.draw({name: plot.read_run(write_run(folder / f"{i}", records)) for i, (name, records) in enumerate(runs.items())})


def lines_of(figure, key: str) -> list:
    (ax,) = [ax for ax in figure.axes if ax.get_title(loc="left") == plot.PANELS[key]]
    return ax.get_lines()


def pixels_of(image: np.ndarray, colour: str) -> int:
    return int((np.abs(image[..., :3] - to_rgb(colour)).max(-1) < 0.01).sum())


def names_in(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


def test_each_panel_draws_its_key_over_the_examples_seen(tmp_path):
    figure = draw_runs(tmp_path, {"a": make_records()})
    assert len(figure.axes) == 6 and {ax.get_title(loc="left") for ax in figure.axes} == set(plot.PANELS.values())
    counters = [4.0 * step for step in range(1, 9)]
    expected = {"lr": [1e-5 * step * 1e6 for step in range(1, 9)], "grad_norm": [1 / step for step in range(1, 9)],
                "loss/train": [2 / step for step in range(1, 9)], "peak_memory_gb": [1.5] * 8,
                "tokens_per_second": [901.0, 902, 903, 904, 905, 906, 907, 908]}
    for key, values in expected.items():
        first = lines_of(figure, key)[0]
        assert first.get_xdata().tolist() == counters and first.get_ydata().tolist() == values, key
    (held_out,) = lines_of(figure, "loss/eval")
    assert held_out.get_xdata().tolist() == [0, 32] and held_out.get_ydata().tolist() == [2, 1]
    assert held_out.get_marker() == "o" and held_out.get_linestyle() == "-"
    assert names_in(figure)[0] == "a" and "skipped step" not in names_in(figure)


def test_runs_have_a_colour_and_a_marker_each_and_are_named_once(tmp_path):
    names = ["a", "_b", "c", "d", "e", "f"]
    figure = draw_runs(tmp_path, {name: make_records(level=i + 1) for i, name in enumerate(names)})
    assert names_in(figure)[:6] == names
    held_out = lines_of(figure, "loss/eval")
    assert [line.get_ydata()[0] for line in held_out] == [1, 2, 3, 4, 5, 6]
    for style in ("color", "marker"):
        assert len({getattr(line, f"get_{style}")() for line in held_out}) == 6
    for key in plot.PANELS:
        assert [line.get_color() for line in held_out] == list(dict.fromkeys(line.get_color() for line in lines_of(figure, key)))


def test_a_step_without_a_loss_leaves_a_gap_and_a_mark(tmp_path):
    figure = draw_runs(tmp_path, {"whole": make_records(), "skipping": make_records(skipped=(3, 6))})
    for key in ("loss/train", "grad_norm"):
        raw = [line for line in lines_of(figure, key) if line.get_marker() != "x" and line.get_alpha()]
        assert [np.isnan(line.get_ydata()).nonzero()[0].tolist() for line in raw] == [[], [2, 5]]
        marks = [line.get_xdata().tolist() for line in lines_of(figure, key) if line.get_marker() == "x"]
        assert [mark for mark in marks if mark] == [[12, 24]]
    assert "skipped step" in names_in(figure)


def add_pairs(records: list[dict]) -> list[dict]:
    """As dpo.py logs them besides."""
    means = {"train": lambda n: {"margin/train": n / 4 - 0.5, "accuracy/train": min(1, n / 10)},
             "eval": lambda n: {"margin/eval": n / 8, "accuracy/eval": n / 40}}
    return [record | means["eval" if "loss/eval" in record else "train"](record["counter"]) for record in records]


@pytest.mark.filterwarnings("error")
def test_margins_and_accuracy_are_drawn_where_a_run_holds_them(tmp_path):
    figure = draw_runs(tmp_path, {"rows": make_records(), "pairs": add_pairs(make_records())})
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == [*plot.PANELS.values(), *plot.COMPARED.values()] and figure.get_size_inches().tolist() == [9.6, 4.4]
    counters, drawn = [4.0 * step for step in range(1, 9)], {}
    for key, ax in zip(plot.COMPARED, figure.axes[6:]):
        raw, mean, held_out = drawn[key] = [line for line in ax.get_lines() if len(line.get_xdata())]
        assert raw.get_xdata().tolist() == counters and held_out.get_xdata().tolist() == [0, 32]
        assert {line.get_color() for line in drawn[key]} == {plot.COLOURS[1]}
        assert [line.get_marker() for line in drawn[key]] == ["None", "", "s"] and raw.get_alpha() and not mean.get_alpha()
    assert drawn["margin/train"][0].get_ydata().tolist() == [n / 4 - 0.5 for n in counters]
    assert drawn["margin/train"][2].get_ydata().tolist() == [0, 4]
    assert drawn["accuracy/train"][0].get_ydata().tolist() == [100 * min(1, n / 10) for n in counters]
    assert drawn["accuracy/train"][2].get_ydata().tolist() == [0, 80]
    assert figure.axes[7].get_ylim() == (0, 104) and figure.axes[6].get_yscale() == figure.axes[7].get_yscale() == "linear"
    figure.savefig(tmp_path / "plot.png")
    assert len(draw_runs(tmp_path / "alone", {"rows": make_records()}).axes) == 6


@pytest.mark.parametrize("records", [make_records(n_steps=2, skipped=(1, 2)), make_records(n_steps=2)[:1]],
                         ids=["every step is skipped", "nothing but the first evaluation"])
@pytest.mark.filterwarnings("error")
def test_a_run_without_a_loss_is_drawn(tmp_path, records):
    draw_runs(tmp_path, {"a": records}).savefig(tmp_path / "plot.png")
    assert pixels_of(imread(tmp_path / "plot.png"), plot.COLOURS[0]) > 100  # its name, and the held-out loss


@pytest.mark.parametrize("values, expected", [
    ([3.0], [3.0]), ([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]), ([math.nan, 2.0], [math.nan, 2.0]),
    ([0.0] * 20 + [6.0] + [0.0] * 19, [0.0] * 19 + [2.0] * 3 + [0.0] * 18),  # 40 values: three at a time
    ([6.0, 0.0, *[3.0] * 38], [3.0, 3.0, 2.0, *[3.0] * 37]),  # two at the ends
    ([1.0, math.nan, 3.0, *[5.0] * 37], [1.0, 2.0, 4.0, 13 / 3, *[5.0] * 36]),
])
def test_moving_mean_of_the_finite_values(values, expected):
    np.testing.assert_allclose(plot.moving_mean(np.array(values)), expected, atol=1e-12)


@pytest.mark.parametrize("lowest, scale", [(0.21, "linear"), (0.19, "log"), (0.0, "linear")])
def test_a_loss_that_falls_by_more_than_a_decade_has_a_logarithmic_axis(tmp_path, lowest, scale):
    records = make_records(n_steps=2)
    records[2]["loss/train"] = lowest
    ax = lines_of(draw_runs(tmp_path, {"a": records}), "loss/train")[0].axes
    assert ax.get_yscale() == scale


# ---------------------------------------------------------------------------------------------------------------------
# The image


@pytest.mark.slow
def test_the_image_is_a_page_with_every_run_s_colour(tmp_path):
    folders = [write_run(tmp_path / name / "run", make_records(level=i + 1, skipped=(2,)))  # told apart by the whole path
               for i, name in enumerate("abc")]
    assert run_well(ROOT / "plot.py", *folders, "--out", tmp_path / "page.png") == ""
    content = (tmp_path / "page.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", content[16:24]) == SIZE
    image = imread(tmp_path / "page.png")
    counts = [pixels_of(image, colour) for colour in plot.COLOURS]
    assert min(counts[:3]) > 2000 and max(counts[3:]) == 0
    assert (image[..., :3] > 0.99).mean() > 0.8  # the paper is white
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "page.png"]


def test_the_image_replaces_the_one_before_it_whole(tmp_path, monkeypatch):
    run = write_run(tmp_path / "a", make_records())
    (tmp_path / "plot.png").write_text("the page before")
    os.link(tmp_path / "plot.png", tmp_path / "held")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(run)])
    plot.main()
    assert imread(tmp_path / "plot.png").shape[:2] == SIZE[::-1]
    assert (tmp_path / "held").read_text() == "the page before"  # another file took its name


@pytest.mark.parametrize("end", ['{"step": 9, "coun', "{"])
def test_a_last_line_that_is_half_written_is_left_out(tmp_path, end):
    whole, cut = (plot.read_run(write_run(tmp_path / name, make_records(), end)) for name, end in (("a", ""), ("b", end)))
    assert whole.keys() == cut.keys() and all(np.array_equal(whole[key], cut[key]) for key in whole)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.fixture
def fails_with(tmp_path, monkeypatch, capfd):
    """Calls plot.py's main in this process, in tmp_path; returns the one line with which it ends."""
    def call(*argv) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, argv)])
        with pytest.raises(SystemExit) as error:
            plot.main()
        out, text = capfd.readouterr()
        (line,) = text.splitlines()
        assert error.value.code == 1 and out == ""
        return line
    return call


@pytest.mark.slow
def test_an_error_is_one_line_and_code_1(tmp_path):
    done = run_script(ROOT / "plot.py", tmp_path / "none", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and not list(tmp_path.iterdir())
    (line,) = done.stderr.splitlines()
    assert line == (f"plot.py: {tmp_path}/none/metrics.jsonl: No such file or directory; "
                    "give the folder of a run, {cache_dir}/{exp_name}")


def test_what_can_t_be_read_is_named(tmp_path, fails_with):
    assert fails_with(tmp_path / "none").startswith(f"plot.py: {tmp_path}/none/metrics.jsonl: No such file or directory; give ")
    broken = write_run(tmp_path / "broken", make_records(n_steps=1), "{\n{}\n")
    assert fails_with(broken).startswith(f"plot.py: {broken}/metrics.jsonl:4: not valid JSON: ")
    empty = write_run(tmp_path / "empty", [])
    assert fails_with(empty) == f"plot.py: {empty}/metrics.jsonl: nothing is logged yet"
    assert not list(tmp_path.glob("plot.p*"))


def test_what_can_t_be_drawn_or_written_is_named(tmp_path, fails_with):
    run = write_run(tmp_path / "a", make_records())
    assert fails_with(*[run] * 7) == "plot.py: 7 runs can't be told apart on one page; give at most 6"
    out = tmp_path / "none" / "page.png"
    assert fails_with(run, "--out", out) == f"plot.py: --out {out}: there is no folder {tmp_path}/none"
    for out, said in ((tmp_path, "this is a folder"), (run / "metrics.jsonl", "the page is a .png"),
                      ("/dev/null", "this is a pipe or a device, which a file must not replace"),
                      (f"{'x' * 300}.png", "can't be written: File name too long")):
        assert fails_with(run, "--out", out) == f"plot.py: --out {out}: {said}"
    (tmp_path / "in_the_way.png.partial").mkdir()
    assert fails_with(run, "--out", "in_the_way.png").endswith("in_the_way.png: can't be written: Is a directory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "in_the_way.png.partial"]


def test_an_option_that_is_none_is_one_line(fails_with):
    assert fails_with() == "plot.py: the following arguments are required: RUN_FOLDER"
    assert fails_with("a", "--size", 3) == "plot.py: unrecognized arguments: --size 3"


NO_COUNTER = "counter, the examples seen, must be a number"


@pytest.mark.parametrize("line, said", [
    ("5", "must be a JSON object, not 5"), ("null", "must be a JSON object, not null"), ("[]", "must be a JSON object, not []"),
    ("{}", NO_COUNTER), ('{"counter": null}', NO_COUNTER), ('{"counter": NaN}', NO_COUNTER),
    (f'{{"counter": {"1" * 400}}}', NO_COUNTER), (f'{{"counter": {"1" * 5000}}}', NO_COUNTER),
    ('{"counter": "x"}', 'counter must be a number or null, not "x"'), ("", "not valid JSON: Expecting value"),
    ('{"counter": 1, "lr": [1]}', "lr must be a number or null, not [1.0]"),
    ('{"counter": 1, "lr": true}', "lr must be a number or null, not true"),
    ("[" * 10 ** 5, "maximum recursion depth exceeded while decoding a JSON array from a unicode string")])
def test_a_line_that_is_no_record_is_named(tmp_path, fails_with, line, said):
    run = write_run(tmp_path / "a", make_records(n_steps=1), f"{line}\n")
    assert fails_with(run) == f"plot.py: {run}/metrics.jsonl:4: {said}"


def test_a_file_that_is_no_text_is_named(tmp_path, fails_with):
    for name, make, said in (("a", lambda file: file.write_bytes(b"\xff\xfe"), "not UTF-8"),
                             ("b", os.mkfifo, "not a file; give the folder of a run, {cache_dir}/{exp_name}")):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "metrics.jsonl")
        assert fails_with(tmp_path / name) == f"plot.py: {tmp_path}/{name}/metrics.jsonl: {said}"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1" * 400])
def test_what_is_not_finite_is_drawn_as_missing(tmp_path, value):
    run = plot.read_run(write_run(tmp_path / "a", make_records(), f'{{"counter": 33, "loss/train": {value}}}\n'))
    assert run["loss/train"][0, -1] == 33 and np.isnan(run["loss/train"][1, -1])
    assert plot.draw({"a": run})


def test_a_run_s_name_is_drawn_as_it_is(tmp_path, monkeypatch):
    names = {"a$\\frac{$": "a$\\frac{$", "$x$": "$x$", "_b": "_b", os.fsdecode(b"\xff"): "\\udcff", "c\n": "c\\n"}
    runs = [write_run(tmp_path / name, make_records()) for name in names]
    drawn, write = [], plot.write
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "write", lambda page, out: (drawn.append(names_in(page)), write(page, out)))
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, runs)])
    plot.main()
    assert drawn[0][:5] == [*names.values()] and (tmp_path / "plot.png").is_file()


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch, fails_with):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    line = fails_with(write_run(tmp_path / "a", make_records()))
    assert line == "plot.py: matplotlib is missing: pip install matplotlib"
