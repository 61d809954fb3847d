"""Draws the metrics.jsonl of one run or of several as one page: losses, learning rate, gradient norm, speed and memory;
and where they compare answers, as dpo.py's do, margins and accuracy.

    python plot.py .cache/llama3-8B-sft .cache/llama3-8B-lora --out plot.png    # needs matplotlib
"""

import contextlib
import json
import math
from pathlib import Path

import numpy as np

from script import Options, fail, one_line, printable, why_not_writable

PANELS = {"loss/train": "Training loss (nats)", "loss/eval": "Held-out loss (nats)",
          "grad_norm": "Gradient norm, before clipping", "lr": "Learning rate (× 10⁻⁶)",
          "tokens_per_second": "Throughput (tokens/s)", "peak_memory_gb": "Peak memory of rank 0 (GB)"}
# Two more, where a run holds them, each with the held-out ones beside those of the training
COMPARED = {"margin/train": "Margin (held out: with markers)", "accuracy/train": "Accuracy (%; held out: with markers)"}
HELD_OUT = {"margin/train": "margin/eval", "accuracy/train": "accuracy/eval"}
KEYS = (*PANELS, *COMPARED, *HELD_OUT.values(), "skipped_steps")  # of a record that are drawn
NOISY = ("loss/train", "grad_norm", "tokens_per_second", *COMPARED)
FACTORS = {"lr": 1e6, "accuracy/train": 100, "accuracy/eval": 100}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe & Ito's: the colour-blind tell them apart


def read_run(folder: Path) -> dict[str, np.ndarray]:
    """Returns {key: (2, N)}: examples seen and value, NaN where it is null. A half-written last line is left out."""
    file, records = folder / "metrics.jsonl", []
    if file.exists() and not file.is_file():
        raise ValueError(f"{file}: not a file; give the folder of a run, {{cache_dir}}/{{exp_name}}")
    try:
        for line in file.read_text().split("\n")[:-1]:  # after the last newline there is nothing, or half a line
            records.append(read_record(line))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; give the folder of a run, {{cache_dir}}/{{exp_name}}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}:{len(records) + 1}: {one_line(error)}") from error
    if not records:
        raise ValueError(f"{file}: nothing is logged yet")
    return {key: np.array([(record["counter"], record[key]) for record in records if key in record], float).reshape(-1, 2).T
            for key in KEYS}


def read_record(line: str) -> dict[str, float]:
    """Returns the numbers of a line that are drawn, NaN where they are null. Raises ValueError, RecursionError."""
    try:
        record = json.loads(line, parse_int=float)  # a number of thousands of digits is infinite
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg}") from error
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, not {line[:40]}")
    record = {key: math.nan if record[key] is None else record[key] for key in ("counter", *KEYS) if key in record}
    for key, value in record.items():
        if not isinstance(value, float):
            raise ValueError(f"{key} must be a number or null, not {json.dumps(value)[:40]}")
    if not math.isfinite(record.get("counter", math.nan)):
        raise ValueError("counter, the examples seen, must be a number")
    return {key: value if math.isfinite(value) else math.nan for key, value in record.items()}


def moving_mean(values: np.ndarray) -> np.ndarray:
    """Returns (N,): the mean of the finite values around each, over a twentieth of all; NaN where there are none."""
    finite, window = np.isfinite(values), np.ones(2 * (len(values) // 40) + 1)
    total, count = (np.convolve(part, window, "same") for part in (np.where(finite, values, 0), finite))
    return total / np.where(count > 0, count, np.nan)


def draw(runs: dict[str, dict[str, np.ndarray]]):
    """Returns a matplotlib Figure of {name: what read_run returns}."""
    from matplotlib import figure, lines, ticker
    panels = PANELS | (COMPARED if any(run[key].size for run in runs.values() for key in COMPARED | HELD_OUT) else {})
    page = figure.Figure(figsize=(1.2 * len(panels), 4.4), dpi=300, layout="constrained")
    axes, legend = dict(zip(panels, page.subplots(2, len(panels) // 2, sharex=True).flat)), {}
    axes["loss/eval"].sharey(axes["loss/train"])
    for (name, run), colour, marker in zip(runs.items(), COLOURS, "os^DvP"):
        legend[name] = lines.Line2D([], [], color=colour, marker=marker, markersize=3.5, linewidth=1.2)
        for key, ax in [*axes.items(), *((HELD_OUT[key], axes[key]) for key in axes if key in HELD_OUT)]:
            x, y = run[key][0], run[key][1] * FACTORS.get(key, 1)
            if key in NOISY and len(y):
                ax.plot(x, y, color=colour, linewidth=0.5, alpha=0.3)
                y = moving_mean(y)
            ax.plot(x, y, color=colour, linewidth=1.2, marker=marker if key.endswith("/eval") else "", markersize=3.5)
        x = run["skipped_steps"][0][np.diff(run["skipped_steps"][1], prepend=0) > 0]
        for ax in (axes["loss/train"], axes["grad_norm"]):  # at the foot, for a skipped step may have no value
            ax.plot(x, 0 * x + 0.03, "x", color=colour, markersize=4, transform=ax.get_xaxis_transform())
    legend["each step, under its moving mean"] = lines.Line2D([], [], color="0.5", linewidth=0.5)
    if any(run["skipped_steps"][1].any() for run in runs.values()):
        legend["skipped step"] = lines.Line2D([], [], color="0.4", marker="x", linestyle="", markersize=4)
    texts = page.legend(legend.values(), legend, loc="outside upper center", ncols=4, frameon=False, fontsize=7).get_texts()
    for text in texts:
        text.set_parse_math(False)  # a name may hold dollars
    for key, ax in axes.items():
        ax.set_title(panels[key], fontsize=7.5, loc="left")
        ax.tick_params(which="both", labelsize=6.5, length=2)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", linewidth=0.3, color="0.85")
        low, high = ax.dataLim.intervaly
        if key in ("lr", "tokens_per_second", "peak_memory_gb"):
            ax.set_ylim(0, 1.08 * high if high > 0 else 1)
        elif key == "accuracy/train":
            ax.set_ylim(0, 104)
        elif key not in COMPARED and 0 < 10 * low < high:
            ax.set_yscale("log", subs=(2, 5))
        number = ticker.EngFormatter(sep="") if high >= 1000 else "{x:g}"
        ax.yaxis.set(major_formatter=number, minor_formatter=number)
        ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    page.supxlabel("Examples seen", fontsize=7.5)
    return page


def write(page, out: Path) -> None:
    """Writes the page whole or not at all."""
    if reason := why_not_writable(out) or "the page is a .png" * (out.suffix != ".png"):
        raise ValueError(f"--out {out}: {reason}")
    partial = Path(f"{out}.partial")
    try:
        page.savefig(partial, format="png")
        partial.replace(out)
    except OSError as error:
        raise ValueError(f"--out {out}: can't be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def main() -> None:
    options = Options(__doc__)
    options.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="{cache_dir}/{exp_name}")
    options.add_argument("--out", type=Path, default="plot.png")
    args = options.parse_args()
    names = [folder.resolve().name for folder in args.runs]
    names = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, args.runs)]
    names = [*map(printable, names)]
    try:
        if len(names) > len(COLOURS):
            raise ValueError(f"{len(names)} runs can't be told apart on one page; give at most {len(COLOURS)}")
        write(draw(dict(zip(names, map(read_run, args.runs)))), args.out)
    except ImportError:
        fail("matplotlib is missing: pip install matplotlib")
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main()
