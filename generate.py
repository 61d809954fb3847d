"""Chats with a trained model in the terminal, or answers a file of prompts in batches.

    python generate.py .cache/llama3-8B-sft/FINAL         # /reset begins a new chat; an empty line, ctrl-D or ctrl-C ends it
    python generate.py .cache/llama3-8B-sft/FINAL --prompts prompts.jsonl --out answers.json
    python generate.py FOLDER --prompts prompts.jsonl --out answers.json --temperature 0.7 --top-p 0.95 --n-samples 4

FOLDER holds a model, as FINAL does, or an adapter, as FINAL/adapter and step-100 do, which is merged into its base. A prompt
is a row of any shape that rows.py lists; its answer, if it has one, is left out. The answers are a list as AlpacaEval reads it.
"""

import argparse
import sys

from script import Options, fail, why_not_writable


def parse_arguments() -> argparse.Namespace:
    parser = Options(__doc__)
    add = parser.add_argument
    add("model", metavar="FOLDER", help="of a model or an adapter, or a model's name on the Hub")
    add("--base", help="the adapter's base model, if not the one that its adapter_config.json names")
    add("--prompts", metavar="FILE", help="of rows (.jsonl, .json, .csv), or a folder of them; without it, chat")
    add("--out", metavar="FILE", help=".json, for the answers to --prompts")
    add("--system", help="the system message, where a prompt has none")
    add("--max-new-tokens", type=int, help="of an answer (512, or half of the tokens that the model takes in all)")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy: always the likeliest token")
    add("--top-p", type=float, default=1.0, help="draw only from the likeliest tokens that have this probability together (1)")
    add("--n-samples", type=int, default=1, help="answers to each of --prompts (1)")
    add("--batch-size", type=int, default=16, help="answers to --prompts made at once (16)")
    add("--seed", type=int, default=1, help="with the same --batch-size it draws the same answers (1)")
    add("--cache-dir", default=".cache", help="of models from the Hub (.cache)")
    args = parser.parse_args()
    counts = args.n_samples, args.batch_size, 1 if args.max_new_tokens is None else args.max_new_tokens
    reason = args.out and (why_not_writable(args.out) or "these are the prompts" * (args.out == args.prompts))
    errors = {
        "--prompts and --out need each other": bool(args.prompts) != bool(args.out),
        f"--out {args.out}: {reason}": reason,
        "--n-samples, --batch-size and --max-new-tokens must be at least 1, and at most a million":
            not all(1 <= count <= 10 ** 6 for count in counts),
        "--temperature must be 0, which is greedy, or from 0.001 to 1000":
            not (args.temperature == 0 or 1e-3 <= args.temperature <= 1e3),
        "--top-p must be above 0, and at most 1": not 0 < args.top_p <= 1,
        "--top-p and --n-samples need a --temperature above 0: greedily there is one answer":
            args.temperature == 0 and (args.top_p != 1 or args.n_samples > 1),
        "--system must be UTF-8": args.system and not args.system.encode(errors="ignore").decode() == args.system,
        "--seed must be from 0 to 2**63 - 1": not 0 <= args.seed < 2 ** 63}
    if wrong := [text for text, is_wrong in errors.items() if is_wrong]:
        parser.error("\n".join(wrong))
    return args


if __name__ == "__main__":  # before torch is imported, so that --help and a wrong option answer at once
    args = parse_arguments()

import contextlib
import json
import os
import readline  # noqa: F401 (gives input() its keys for editing)
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers import TextStreamer

from chat import ChatEncoder, words_of
from data import DataError
from fsdp_utils import ModelError
from lora import load_adapter, merge_in_place
from model_utils import compute_dtype, generate, load_model, load_tokenizer
from rows import Conversation, list_files, read_rows, to_conversation


def main(args: argparse.Namespace) -> None:
    rows = read_prompts(args.prompts, args.system) if args.prompts else []
    model, encoder = load(args.model, args.base, args.cache_dir)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    args.max_new_tokens = args.max_new_tokens or min(512, room // 2)
    encoder.max_length, encoder.max_prompt_length = room, room - args.max_new_tokens
    torch.manual_seed(args.seed)
    if rows:
        answer(model, encoder, rows, args)
    else:
        chat(model, encoder, args)


def load(folder: str, base: str | None, cache_dir: str) -> tuple[nn.Module, ChatEncoder]:
    """Returns the model, an adapter merged into it, and its encoder, which cuts nothing. Raises ModelError, DataError."""
    adapter, base = find_adapter(folder, base)
    folders = [adapter, adapter.parent] if adapter else []  # sft.py writes the tokenizer into the folder around the adapter's
    name = next((str(candidate) for candidate in folders if (candidate / "tokenizer_config.json").is_file()), base)
    switches = {}  # of the template, which sft.py keeps with the model
    for candidate in [*folders, Path(folder)]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            switches = json.loads((candidate / "sft_config.json").read_text())["model"]["template_kwargs"] or {}
    encoder = ChatEncoder(load_tokenizer(name, cache_dir), sys.maxsize, sys.maxsize, template_kwargs=switches)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(device)
    model = load_model(base, None, encoder.tokenizer, encoder.stop_ids, cache_dir, dtype)
    if adapter:
        load_adapter(model, str(adapter), 0.0, model.n_new_rows)
        merge_in_place(model)
        for parameter in model.parameters():  # not model.to(dtype), which would round RoPE's buffers too
            parameter.data = parameter.data.to(dtype)
    return model.to(device).eval(), encoder


def find_adapter(folder: str, base: str | None) -> tuple[Path | None, str]:
    """Returns (adapter, its base) if the folder has an adapter, in it or in adapter/, but no model; else (None, folder)."""
    folders = [] if any(Path(folder).glob("model*.safetensors")) else [Path(folder), Path(folder, "adapter")]
    adapter = next((candidate for candidate in folders if (candidate / "adapter_config.json").is_file()), None)
    if not adapter and base:
        raise ModelError(f"{folder}: this is no adapter, which --base is for")
    if adapter and not base:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        if not base:
            raise ModelError(f"{adapter}: adapter_config.json names no base_model_name_or_path; name it by --base")
    return adapter, base or folder


class Prompt(NamedTuple):
    where: str  # file:line
    dataset: str  # the file's name
    row: Conversation  # up to its last question


def read_prompts(path: str, system: str | None) -> list[Prompt]:
    """Returns the prompt of each row, without its answer if it has one. Raises DataError."""
    prompts, errors = [], []
    for file in list_files([path]):
        for line, row in read_rows(file):
            try:
                row = to_conversation(row, answered=False)
                messages = row.messages[:-1] if row.messages and row.messages[-1]["role"] == "assistant" else row.messages
                if not messages and row.text is None:
                    raise ValueError("the user asks nothing in this row")
            except (ValueError, RecursionError) as error:  # the latter on showing a value that is nested deeply
                errors.append(f"{file}:{line}: {error}")
                continue
            if system and messages and messages[0]["role"] not in ("system", "developer"):
                messages = [{"role": "system", "content": system, "train": False}, *messages]
            prompts.append(Prompt(f"{file}:{line}", file.stem, row._replace(messages=messages)))
    if not (prompts or errors):
        errors = [f"{path}: no rows in this file"]
    refuse(errors)
    return prompts


def refuse(errors: list[str]) -> None:
    """Raises DataError where there are any: with the first eight."""
    if errors:
        raise DataError("\n".join(errors[:8] + [f"and {len(errors) - 8} more"] * (len(errors) > 8)))


def encode_prompt(encoder: ChatEncoder, row: Conversation, where: str) -> list[int]:
    """A row without its last answer → the ids that the answer follows.

    Raises DataError, which begins with `where`; also for a prompt that is too long: cut, it would be another question.
    """
    if spelt := encoder.template.control.search(words_of(row)):
        print(f"warning: {where}: {spelt[0]!r} in the text becomes the control token of that name", file=sys.stderr)
    try:
        ids = encoder.prompt_ids(row)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if len(ids) > encoder.max_prompt_length:
        max_new_tokens = encoder.max_length - encoder.max_prompt_length
        raise DataError(f"{where}: the prompt's {len(ids)} tokens and --max-new-tokens {max_new_tokens} are more than the "
                        f"{encoder.max_length} that the model takes")
    return ids


def answer(model: nn.Module, encoder: ChatEncoder, rows: list[Prompt], args: argparse.Namespace) -> None:
    """Answers what read_prompts has read. args.out is written whole or not at all. Raises DataError, OSError."""
    out, partial = Path(args.out), Path(f"{args.out}.partial")
    partial.touch()  # what can't be written is found before the first answer, not after the last
    partial.unlink()
    encoded, errors = [], []
    for prompt in rows:
        try:
            encoded.append(encode_prompt(encoder, prompt.row, prompt.where))
        except DataError as error:
            errors.append(str(error))
    refuse(errors)
    prompts = [ids for ids in encoded for _ in range(args.n_samples)]
    answers = generate(model, prompts, args.max_new_tokens, args.batch_size, args.temperature, args.top_p)
    records = []
    for i, ids in enumerate(answers):
        row, sample = divmod(i, args.n_samples)
        _, dataset, asked = rows[row]
        question = asked.text if asked.text is not None else asked.messages[-1]["content"]
        records.append({"instruction": question, "output": encoder.read_answer(ids), "generator": args.model,
                        "dataset": dataset, "prompt_id": row, "sample_id": sample, "type": "sample"})
    partial.write_text(json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, out)
    n_cut = sum(len(ids) == args.max_new_tokens for ids in answers)
    print(f"{out}: {len(records)} answers, {n_cut} of them cut off after {args.max_new_tokens} tokens (--max-new-tokens)")


def chat(model: nn.Module, encoder: ChatEncoder, args: argparse.Namespace) -> None:
    """Answers each line of the standard input in the light of those before it."""
    if not sys.stdin:
        raise DataError("the standard input is closed, so that nothing can be asked; --prompts FILE --out FILE answers a file")
    sys.stdin.reconfigure(errors="replace")  # a stray byte does not end a chat
    streamer = TextStreamer(encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages = beginning = [{"role": "system", "content": args.system, "train": False}] if args.system else []
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # ctrl-D, ctrl-C
        while question := input("> " if sys.stdin.isatty() else "").strip():
            if question == "/reset":
                messages = beginning
                continue
            asked = [*messages, {"role": "user", "content": question, "train": False}]
            try:
                prompt = encode_prompt(encoder, Conversation(asked, [], None, set(), 0, {}), "this chat")
            except DataError as error:
                print(f"{error}; /reset begins a new one", file=sys.stderr)
                continue
            [ids] = generate(model, [prompt], args.max_new_tokens, 1, args.temperature, args.top_p, streamer)
            messages = [*asked, {"role": "assistant", "content": encoder.read_answer(ids), "train": False}]
    if sys.stdin.isatty():
        print()  # after ctrl-D the shell's prompt would follow on the line of ours


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what it warns of, the error says or nothing follows from
    try:
        main(args)
    except (DataError, ModelError, OSError) as error:
        fail(error)
    except torch.OutOfMemoryError:
        fail("out of memory; a smaller --batch-size or --max-new-tokens takes less")
