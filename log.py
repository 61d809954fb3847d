"""What a run writes and shows: metrics.jsonl, the progress bar, trackers, the example at its start, the summary at its end."""

import contextlib
import gc
import hashlib
import itertools
import json
import math
import os
import re
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from data import Examples, TokenisedRows
from fsdp_utils import end_process, is_of_another, say
from lora import n_weights
from model_utils import PLAIN_TEMPLATE
from script import PARTS, STARTED, RunError, fail, one_line


class LogError(RunError):
    """A tracker that can't be used, in one line."""


class WandbTracker:
    """Weights & Biases, which sends from a process of its own. Raises LogError where its server does not answer."""

    def __init__(self, run_dir: Path, settings: dict):
        import wandb
        try:
            self.run = wandb.init(project=settings["wandb"]["project"], name=settings["exp_name"], dir=run_dir,
                                  config=settings, resume="allow",
                                  id=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],
                                  settings=wandb.Settings(init_timeout=15))
        except wandb.Error as error:
            raise LogError(f"wandb.enabled=true: W&B can't be reached: {one_line(error)}; WANDB_MODE=offline logs to "
                           f"{run_dir}/wandb, for `wandb sync`") from error

    def log(self, record: dict) -> None:
        self.run.log(record, step=record["counter"])

    def close(self) -> None:
        self.run.finish()


class TensorBoardTracker:
    def __init__(self, run_dir: Path):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(run_dir / "tensorboard")

    def log(self, record: dict) -> None:
        for key, value in record.items():
            if value is not None:
                self.writer.add_scalar(key, value, record["counter"])

    def close(self) -> None:
        self.writer.close()


def make_trackers(run_dir: Path, settings: dict) -> list:
    """Returns those that the settings, the run's configuration, ask for; each has log(record) and close()."""
    wanted = [WandbTracker(run_dir, settings)] if settings["wandb"]["enabled"] else []
    return wanted + ([TensorBoardTracker(run_dir)] if settings["tensorboard"] else [])


# The means over held-out examples that are told of, where a run has them: by what they are multiplied, their digits, their unit
TOLD = {"loss/eval": (1, ".4f", ""), "accuracy/eval": (100, ".0f", " %"), "margin/eval": (1, ".2f", "")}


def told(key: str, *values: float | None) -> str:
    factor, digits, unit = TOLD[key]
    return " → ".join("not finite" if value is None else f"{factor * value:{digits}}" for value in values) + unit


class Log:
    """metrics.jsonl, the progress bar and the trackers, written by rank 0.

    It goes on from the records of `resumed_from`, a checkpoint, where there is one. `flops` are count_flops'.
    """

    def __init__(self, run_dir: Path, resumed_from: Path | None, counter: int, n_examples: int, device: torch.device,
                 flops: tuple[float, float, float], settings: dict):
        self.rank, self.device, self.records, self.last = dist.get_rank(), device, [], {}
        self.flops, self.peak_flops = flops, peak_flops(device)
        self.clock = self.started = time.perf_counter()
        lines = (resumed_from / "metrics.jsonl").read_text() if resumed_from else ""
        for line in lines.splitlines():
            self.records.append(json.loads(line))
            self.last |= self.records[-1]
        if self.rank == 0:
            (run_dir / "metrics.jsonl").write_text(lines)  # what came after the checkpoint is trained and logged again
            self.out, self.trackers = open(run_dir / "metrics.jsonl", "a"), make_trackers(run_dir, settings)
        self.bar = tqdm(total=n_examples, initial=counter, unit=" examples", desc="training", disable=self.rank > 0)
        self.counter, self.n_microbatches = counter, 0  # examples before this step, and what is computed of it

    def add_microbatch(self, batch: dict) -> None:
        """Moves the bar within a step."""
        self.n_microbatches += 1
        self.bar.update(self.counter + batch["n_examples"] * self.n_microbatches // batch["n_microbatches"] - self.bar.n)

    def add_step(self, step: int, counter: int, skipped: int, lr: float, grad_norm: float, means: dict, batch: dict) -> None:
        """batch: the step's last, for the counts of the whole step."""
        now = time.perf_counter()
        seconds, self.clock, self.counter, self.n_microbatches = now - self.clock, now, counter, 0
        record = {"step": step, "counter": counter, "lr": lr, "grad_norm": grad_norm, **means, "skipped_steps": skipped,
                  "target_fraction": batch["global_target_count"] / batch["global_token_count"],
                  "tokens_per_second": batch["global_token_count"] / seconds,
                  "examples_per_second": batch["n_examples"] / seconds,
                  "peak_memory_gb": peak_memory(self.device) / 1e9}
        if self.peak_flops:
            counts = batch["global_token_count"], batch["global_target_count"], batch["global_squared_lengths"]
            needed = sum(count * flops for count, flops in zip(counts, self.flops))
            record["mfu"] = needed / seconds / (dist.get_world_size() * self.peak_flops)
        self.write(record)
        self.bar.set_postfix_str(f"step {step}, loss {means['loss/train']:.3f}, lr {lr:.1e}, grad norm {grad_norm:.2f}, "
                                 f"{record['tokens_per_second']:,.0f} tokens/s", refresh=False)

    def add_evaluation(self, step: int, counter: int, means: dict) -> None:
        self.write({"step": step, "counter": counter, **means})
        say(f"step {step}: held-out "
            + ", ".join(f"{key.removesuffix('/eval')} {told(key, means[key])}" for key in TOLD if key in means))

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Says on the progress bar what is done between two steps, and keeps its time out of the second's."""
        self.bar.set_description(what)
        try:
            yield
        finally:  # a run may go on where it can't save
            self.bar.set_description("training")
            self.clock = time.perf_counter()

    def write(self, record: dict) -> None:
        record = {key: value if math.isfinite(value) else None for key, value in record.items()}  # JSON has no other number
        self.last |= record
        self.records.append(record)
        if self.rank == 0:
            print(json.dumps(record), file=self.out, flush=True)
            for tracker in self.trackers:
                tracker.log(record)

    def close(self) -> None:
        self.bar.close()
        if self.rank == 0:
            self.out.close()
            for tracker in self.trackers:
                tracker.close()

    def summary(self, questions: list[dict], answers: dict[int, list[str]], final: Path) -> str:
        """Returns what a run ends with; answers are by step, as show_answers takes them."""
        steps = [record for record in self.records if record.get("loss/train") is not None]
        lines = [f"{self.last['step']} steps, {time.perf_counter() - self.started:.0f} s since the start, "
                 f"peak memory {self.last.get('peak_memory_gb', 0):.1f} GB"]
        if steps:
            lines.append(f"loss/train {steps[0]['loss/train']:.4f} → {steps[-1]['loss/train']:.4f}")
        if len(steps) >= 10:
            lines.append(plot([record["loss/train"] for record in steps]))
        for key in TOLD:
            if values := [record[key] for record in self.records if key in record]:
                lines.append(f"{key} {told(key, values[0], values[-1])}")
        if questions:
            lines.append(show_answers(questions, answers))
        return "\n".join([*lines, f"saved to {final}; to talk to it: python generate.py {final}"])


def count_flops(model) -> tuple[float, float, float]:
    """Returns what a training step needs of FLOPs for each (token, target, squared document length), the lengths summed.

    A weight of a matrix takes 2 in the forward, 2 for the gradient of its input, and 2 for its own if it is trained. The
    head's take them for targets only. Attention takes 2 * 2 * length² / 2 * width in the forward and twice that after it.
    """
    config, head, embeddings = model.config.get_text_config(), model.get_output_embeddings().weight, model.get_input_embeddings()
    heads = getattr(config, "num_attention_heads", 0)  # a state space model has none
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0

    def flops(weight) -> int:
        return n_weights(weight) * (6 if weight.requires_grad else 4)

    body = sum(flops(weight) for weight in model.parameters()
               if weight.ndim == 2 and weight is not head and weight is not embeddings.weight)
    return body, flops(head), 6 * config.num_hidden_layers * width


def peak_memory(device: torch.device) -> int:
    """Returns bytes: the most the device's tensors have held at once, or on a CPU the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Dense bf16 FLOP/s, as the makers state them, by a part of the device's name
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """Returns the device's dense bf16 FLOP/s, None where PEAK_FLOPS does not know it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def plot(values: list[float], width: int = 72, height: int = 10) -> str:
    """Draws a curve in text; each column is the mean of its share of the values."""
    columns = [float(np.mean(part)) for part in np.array_split(values, min(width, len(values)))]
    low, high = min(columns), max(columns)
    rows = [round((value - low) / ((high - low) or 1) * (height - 1)) for value in columns]
    lines = []
    for row in reversed(range(height)):
        label = {height - 1: f"{high:.3f}", 0: f"{low:.3f}"}.get(row, "")
        lines.append(f"{label:>8} │" + "".join("•" if at == row else " " for at in rows))
    return "\n".join([*lines, " " * 9 + "└" + "─" * len(columns)])


def written_as_text(tokenizer) -> list[str]:
    """Returns what looks like a control token in the chat template and is no token. The plain template's are meant as text."""
    template, vocabulary = tokenizer.get_chat_template(), tokenizer.get_vocab()
    if PLAIN_TEMPLATE in template:
        return []
    return sorted({text for text in re.findall(r"<\|[^|<>{}\s]+\|>|<\w+_of_\w+>", template) if text not in vocabulary})


def describe_data(tokenizer, train: Examples, held_out: Examples, run_dir: Path) -> str:
    """Returns what became of the rows, in ten lines and an example of each kind; writes all of it to run_dir/data.json."""
    rows, counts = train.rows, Counter(train.rows.counts)
    if dist.get_rank() == 0:
        report = {name: {"files": [*map(str, part.files)], "passed over": [*map(str, part.passed_over)], "counts": part.counts,
                         "first": {key: part.place(key) for key in part.places}}
                  for name, part in {"eval": held_out.rows, "train": rows}.items()}
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (run_dir / "data.json").write_bytes(text.encode(errors="backslashreplace"))  # files' names may be no UTF-8
    lines = [f"data: {counts['rows']:,} rows → {counts['examples']:,} examples, {counts['tokens kept']:,} tokens, of which "
             f"{counts['targets']:,} are targets"]
    if texts := written_as_text(tokenizer):
        lines.append(f"  the chat template writes {', '.join(texts)} as text: none is one token of this tokenizer")
    if more := counts["tokens more by splitting"]:
        lines.append("  an answer that the template writes otherwise once another follows is an example of its own: "
                     f"{counts['tokens'] / (counts['tokens'] - more):.2g} times the tokens; last_answer_only=true or a switch of "
                     "the template (model.template_kwargs) may spare them")
    for what in ("split", "dropped", "bad"):
        reasons = rows.counted(what)
        told = [f"{n:,} {reason} ({rows.place(f'{what}: {reason}')})" for reason, n in itertools.islice(reasons.items(), 3)]
        told += [f"and {len(reasons) - 3} more reasons"] if len(reasons) > 3 else []
        lines += [f"  {what}: {'; '.join(told)}"] if told else []
    if counts["examples truncated"]:
        lines.append(f"  too long: {counts['examples truncated']:,} examples; {counts['tokens dropped']:,} tokens are dropped")
    if left_out := counts["answers before the first question, left out"]:
        lines.append(f"  left out: {left_out:,} answers before the first question")
    lost = sum(sum(held_out.rows.counted(what).values()) for what in ("bad", "dropped"))
    if lost and held_out.rows is not rows:
        lines.append(f"  of the held-out rows {lost:,} are bad or dropped: {run_dir / 'data.json'}")
    passed_over = [one_line(file.name) for file in rows.passed_over]
    for what, names in (("keys that nothing reads", rows.counted("unread")), ("files passed over", passed_over)):
        if names:
            lines.append(f"  {what}: {', '.join(sorted(names)[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}")
    return "\n".join([*lines, *show_examples(tokenizer, rows)])


def describe_run(n_examples: int, n_steps: int, n_eval: int, n_held_out: int, model, packing: bool,
                 resumed_from: Path | None) -> str:
    """Returns the lines that a run begins with, behind those on its data."""
    parameters = list(model.parameters())
    n_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    lines = [
        f"eval: {n_eval} of {n_held_out} held-out examples" if n_held_out else
        "eval: nothing is held out; eval_fraction=0.05 would hold out a twentieth of the rows, eval_datasets=[FILE] a file",
        f"model: {sum(map(n_weights, parameters)) / 1e6:.1f}M parameters, {n_trained / 1e6:.1f}M trained, on "
        f"{dist.get_world_size()} x {parameters[0].device.type}",
        f"steps: {n_steps}, of {n_examples:,} examples, {'packed' if packing else 'padded'}"]
    return "\n".join([*lines, *([f"resumed from {resumed_from}"] if resumed_from else [])])


def describe_start() -> str:
    """Returns how long this process has taken since it was started, and the parts, in order; those below 0.05 s are "other"."""
    whole = time.perf_counter() - STARTED
    parts = {part: seconds for part, seconds in PARTS.items() if seconds >= 0.05}
    parts["other"] = whole - sum(parts.values())
    return f"start: {whole:.1f} s: " + ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())


def run(main: Callable, config) -> None:
    """Calls main(config) and ends the process, whatever comes: all that goes wrong is told last, and once."""
    gc.freeze()  # what the imports have made need not be looked through: tokenising takes an eighth less
    gc.enable()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        main(config)
    except (RunError, OSError) as error:
        fail(error, end_process)
    except Exception as error:
        text, wait = explain(error, config.timeout_minutes)
        fail(text, end_process, wait)
    end_process()


def explain(error: Exception, timeout_minutes: float) -> tuple[str, float]:
    """Returns what to say of an error that no code foresees, and for how many seconds other ranks may speak before.

    A rank that waits for another which has ended knows less than that one; of memory and processes a line tells enough.
    """
    rank, text = f"rank {os.environ.get('RANK', 0)}", one_line(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return f"{rank}: out of memory: {text}; python will_it_fit.py with the same arguments tells what would fit", 0
    if is_of_another(error):
        return f"{rank}: another rank has ended, or has not answered for {timeout_minutes} minutes: {text[:200]}", 10
    return traceback.format_exc(), 0


def show_examples(tokenizer, rows: TokenisedRows, most: int = 3) -> list[str]:
    """Returns the last example of the first row of each kind that the rows have."""
    shown = []
    for name in [name for name in rows.places if name.startswith("shown: ")][:most]:
        file, line = rows.places[name]
        i = np.flatnonzero((rows.file_of == file) & (rows.lines == line))[-1]
        for number, (ids, trained, *_) in enumerate(rows[i], 1):
            part = f", {number} of {rows.n_documents} that belong together" * (rows.n_documents > 1)
            shown.append(show_example(tokenizer, ids, trained, f"{name.removeprefix('shown: ')}, {rows.where(i)}{part}"))
    return shown


def show_example(tokenizer, ids: np.ndarray, trained: np.ndarray, name: str, longest: int = 700) -> str:
    """Returns the example's text with its targets in green, or in ⟦brackets⟧ where the output is not a terminal.

    Of each stretch that is longer than so many characters, and of more than six stretches, the middle is left out.
    """
    before, after = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    parts = []
    for is_target, group in itertools.groupby(zip(ids.tolist(), trained.tolist()), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group])
        if len(text) > longest:
            text = f"{text[:longest // 2]} […] {text[-longest // 2:]}"
        parts.append(f"{before}{text}{after}" if is_target else text)
    parts = [*parts[:3], " […] ", *parts[-3:]] if len(parts) > 6 else parts
    return f"--- an example, {name}; what is trained is marked\n" + "".join(parts) + "\n---"


def show_answers(questions: list[dict], answers: dict[int, list[str]], n_samples: int = 8) -> str:
    """Returns a few of the last answers, and the part that is exactly right by skill, at each step that answered.

    questions [{"prompt", "expected", "skill"}], answers {step: their texts in the same order}.
    """
    lines = [f"--- held-out prompts, answered after step {max(answers)}"]
    last = list(zip(questions, answers[max(answers)]))
    one_of_each = {question["skill"]: (question, text) for question, text in reversed(last)}
    for question, text in ([*one_of_each.values()] if len(one_of_each) > 1 else last)[:n_samples]:
        sign = "✓" if is_right(question, text) else f"✗ (expected {question['expected']!r})"
        lines.append(f"{question['prompt']} → {text} {sign}")
    lines.append(f"--- exactly right, in %{'':7}" + "".join(f"{f'step {step}':>10}" for step in answers))
    for skill in [*sorted({*one_of_each} - {"all"}), "all"]:
        rights = [[is_right(question, text) for question, text in zip(questions, texts) if skill in (question["skill"], "all")]
                  for texts in answers.values()]
        lines.append(f"{skill:<30}" + "".join(f"{100 * sum(right) / len(right):10.0f}" for right in rights))
    return "\n".join(lines)


def is_right(question: dict, text: str) -> bool:
    return text.strip() == question["expected"].strip()
