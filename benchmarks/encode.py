"""Milliseconds that a row takes to become token ids and targets, against the minimum and against TRL.

    python benchmarks/encode.py --model MODEL_FOLDER --data gsm8k.jsonl --template glm.jinja

Conversations are made of the file's rows: one of them, 8, 80 (160 messages), one behind the other. The ways take turns on the
same rows, and the best round of each counts. The ratios are of that, and of the CPU time of all threads, on which what else a
machine does tells less. What is compared:
    the minimum   one apply_chat_template(tokenize=True) a row, which knows nothing of targets
    ours          ChatEncoder.encode_rows, CHUNK rows at a time, as the token cache asks for it; it tokenises a chunk's texts at
                  once, by all cores (TOKENIZERS_PARALLELISM=false: by one)
    TRL           its SFTTrainer's preparation of a data set, in one process as it comes, if trl is installed: with
                  assistant_only_loss, "all answers", if the chat template has generation markers or TRL knows its like with them.
                  It refuses others: there it gets a prompt and a completion, and trains "last answers" alone, which is less work
Two lines more: 160 messages where max_length is 2048, so that the oldest have to go; and 8 turns with the template of --template,
meant for one that writes an answer otherwise once another follows, so that a row becomes an example an answer.
"""

import argparse
import importlib.util
import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from common import describe_machine, print_table

from chat import ChatEncoder
from data import CHUNK
from model_utils import load_tokenizer
from rows import read_rows, to_conversation

LONG = 1 << 20  # tokens: nothing is too long


def time_in_turn(runs: dict[str, Callable], rounds: int) -> dict[str, tuple[float, float]]:
    """Returns the fewest seconds, and the fewest CPU seconds, of each."""
    seconds = {name: [] for name in runs}
    for _, (name, run) in itertools.product(range(rounds), runs.items()):
        started = time.perf_counter(), time.process_time()
        run()
        seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return {name: tuple(map(min, zip(*values))) for name, values in seconds.items()}


def encode(encoder: ChatEncoder, file: Path, chats: list[list[dict]]) -> Counter:
    counts = Counter()
    for first in range(0, len(chats), CHUNK):
        rows = [(line, {"messages": chat}) for line, chat in enumerate(chats[first:first + CHUNK], first + 1)]
        counts += encoder.encode_rows(0, file, first, rows)[1]
    return counts


def make_trl(tokenizer, chats: list[list[dict]]) -> tuple[Callable, str]:
    """Returns (what prepares the chats as TRL does, on which loss)."""
    import datasets
    import trl
    from trl.chat_template_utils import get_training_chat_template

    datasets.disable_caching()
    datasets.disable_progress_bars()
    try:
        get_training_chat_template(tokenizer)
        rows, loss = [{"messages": chat} for chat in chats], "all answers"
    except ValueError:
        rows, loss = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats], "last answers"
    data = datasets.Dataset.from_list(rows)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    settings = trl.SFTConfig(tempfile.gettempdir(), max_length=None, assistant_only_loss=loss == "all answers", report_to="none",
                             use_cpu=True, bf16=False)
    trainer = trl.SFTTrainer(model, settings, train_dataset=data.select([0]), processing_class=tokenizer)
    return lambda: trainer._prepare_dataset(data, tokenizer, settings, False, None, "train"), loss


def measure(name: str, tokenizer, chats: list[list[dict]], args, max_length: int = LONG) -> list[str]:
    """Returns the table's line."""
    encoder = ChatEncoder(tokenizer, max_length, max_length // 2)
    counts = encode(encoder, Path(args.data), chats)
    bad = [f"{reason} ({count} rows)" for reason, count in counts.items() if reason.startswith("bad: ")]
    if bad:
        raise SystemExit(f"{name}: {'; '.join(bad)}")
    runs, loss = {"minimum": lambda: [tokenizer.apply_chat_template(chat, tokenize=True) for chat in chats],
                  "ours": lambda: encode(encoder, Path(args.data), chats)}, ""
    if max_length == LONG and importlib.util.find_spec("trl"):  # TRL cuts off the end of what is too long
        runs["TRL"], loss = make_trl(tokenizer, chats)
    seconds = time_in_turn(runs, args.rounds)
    least = seconds["minimum"]
    cells = [f"{seconds[way][0] / len(chats) * 1e3:.2f}" if way in seconds else "" for way in ("minimum", "ours", "TRL")]
    ratios = [f"{seconds[way][i] / least[i]:.2f}" if way in seconds else "" for way in ("ours", "TRL") for i in (0, 1)]
    sizes = [f"{len(chats):,}", f"{counts['tokens'] / len(chats):,.0f}", f"{counts['examples'] / len(chats):.2f}"]
    return [name, *sizes, *cells, *ratios, loss]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a tokenizer with a chat template")
    parser.add_argument("--data", required=True, help="a file of rows in words, of one question and one answer each")
    parser.add_argument("--template", help="file of a chat template, for one line more")
    parser.add_argument("--rows", type=int, default=2000, help="of the file that are read, at least 80")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    tokenizer = load_tokenizer(args.model, ".cache")
    singles = [[{"role": message["role"], "content": message["content"]} for message in to_conversation(row).messages]
               for _, row in itertools.islice(read_rows(Path(args.data)), args.rows)]
    if len(singles) < 80:
        parser.error(f"{args.data} has {len(singles)} rows; a chat of 160 messages is made of 80")
    of_8, of_80 = [[sum(singles[i:i + n], []) for i in range(0, len(singles) - n + 1, n)] for n in (8, 80)]
    print(describe_machine("cpu", torch.float32), f"{len(os.sched_getaffinity(0))} cores", sep=", ")
    table = [measure("1 turn", tokenizer, singles, args), measure("8 turns", tokenizer, of_8, args),
             measure("160 messages", tokenizer, of_80, args),
             measure("160 messages, max_length 2048", tokenizer, of_80, args, 2048)]
    if args.template:
        other = load_tokenizer(args.model, ".cache", chat_template=args.template)
        table.append(measure(f"8 turns, {Path(args.template).name}", other, of_8, args))
    print_table(["ms a row", "rows", "tokens", "examples", "the minimum", "ours", "TRL", "ours / min.", "in CPU time",
                 "TRL / min.", "in CPU time", "TRL trains"], table)


if __name__ == "__main__":
    main()
