"""Chats with a trained model in the terminal, or answers a file of prompts in batches.

    python generate.py .cache/llama3-8B-sft/FINAL         # /reset begins a new chat; an empty line, ctrl-D or ctrl-C ends it
    python generate.py .cache/llama3-8B-sft/FINAL --prompts prompts.jsonl --out answers.json
    python generate.py FOLDER --prompts prompts.jsonl --out answers.json --temperature 0.7 --top-p 0.95 --n-samples 4

FOLDER holds a model, as FINAL does, or an adapter, as FINAL/adapter and step-100 do, which is merged into its base. A prompt
is a row of any shape that data.py lists; its answer, if it has one, is left out. The answers are a list as AlpacaEval reads it.
"""

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"generate.py: {message}")
    add = parser.add_argument
    add("model", metavar="FOLDER", help="of a model or an adapter, or a model's name on the Hub")
    add("--base", help="the adapter's base model, if not the one that its adapter_config.json names")
    add("--prompts", metavar="FILE", help=".jsonl, .json, or a folder of them; without it, chat")
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
    if bool(args.prompts) != bool(args.out):
        parser.error("--prompts and --out need each other")
    if min(args.n_samples, args.batch_size, 1 if args.max_new_tokens is None else args.max_new_tokens) < 1:
        parser.error("--n-samples, --batch-size and --max-new-tokens must be at least 1")
    if not (0 <= args.temperature < float("inf") and 0 < args.top_p <= 1):
        parser.error("--temperature must be a number from 0 on, --top-p one above 0 and up to 1")
    if not args.temperature and (args.top_p, args.n_samples) != (1, 1):
        parser.error("--top-p and --n-samples need a --temperature above 0: greedily there is one answer")
    return args


if __name__ == "__main__":  # before torch is imported, so that --help and a wrong option answer at once
    args = parse_arguments()

import contextlib
import itertools
import json
import os
import readline  # noqa: F401 (gives input() its keys for editing)
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, TextStreamer

from data import ChatEncoder, DataError, list_files, pad_left, read_rows, to_messages
from model_utils import (
    LoRALinear,
    ModelError,
    compute_dtype,
    load_adapter,
    load_model,
    load_tokenizer,
    lora_names,
    merge_lora,
)


def main(args: argparse.Namespace) -> None:
    rows = read_prompts(args.prompts, args.system) if args.prompts else []
    model, encoder = load(args)
    torch.manual_seed(args.seed)
    if rows:
        answer(model, encoder, rows, args)
    else:
        chat(model, encoder, args.system)


def load(args: argparse.Namespace) -> tuple[nn.Module, ChatEncoder]:
    """Returns the model, whose generation_config says what the arguments say, and its encoder. Raises ModelError, DataError."""
    adapter, base = find_adapter(args.model, args.base)
    places = [adapter, adapter.parent] if adapter else []  # sft.py writes the tokenizer into the folder around the adapter's
    name = next((str(place) for place in places if (place / "tokenizer_config.json").is_file()), base)
    encoder = ChatEncoder(load_tokenizer(name, args.cache_dir), sys.maxsize, sys.maxsize)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(device)
    model = load_model(base, None, encoder.tokenizer, encoder.stop_id, args.cache_dir, dtype)
    if adapter:
        load_adapter(str(adapter), model, dropout=0.0)
        merge_in_place(model)
        for parameter in model.parameters():  # not model.to(dtype), which would round RoPE's buffers too
            parameter.data = parameter.data.to(dtype)

    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    max_new_tokens = args.max_new_tokens or min(512, room // 2)
    encoder.max_length, encoder.max_prompt_length = room, room - max_new_tokens
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0} if args.temperature else {}
    stops, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    model.generation_config = GenerationConfig(  # in the place of the model's own, whose penalties would make greedy less so
        max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad, do_sample=bool(sampling), **sampling)
    return model.to(device).eval(), encoder


def find_adapter(folder: str, base: str | None) -> tuple[Path | None, str]:
    """Returns (adapter, its base) if the folder has an adapter, in it or in adapter/, but no model; else (None, folder)."""
    places = [] if any(Path(folder).glob("model*.safetensors")) else [Path(folder), Path(folder, "adapter")]
    adapter = next((place for place in places if (place / "adapter_config.json").is_file()), None)
    if not adapter and base:
        raise ModelError(f"{folder}: this is no adapter, which --base is for")
    if adapter and not base:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        if not base:
            raise ModelError(f"{adapter}: adapter_config.json names no base_model_name_or_path; name it by --base")
    return adapter, base or folder


@torch.no_grad()
def merge_in_place(model: nn.Module) -> None:
    """Adds each adapter to its layer's weight; the layer is then a plain linear one, and no slower."""
    for name in lora_names(model.state_dict()):
        layer = model.get_submodule(name)
        merged = merge_lora(model, {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()})
        layer.weight.data, layer.forward = merged[f"{name}.weight"], super(LoRALinear, layer).forward


def read_prompts(path: str, system: str | None) -> list[tuple[str, str, list[dict]]]:
    """Returns (file:line, name of the file, messages of which a question is the last) of each row. Raises DataError."""
    rows = []
    for file in list_files([path]):
        for line, row in read_rows(file):
            try:
                messages = to_prompt(row)
            except (ValueError, RecursionError) as error:  # the latter on showing a value that is nested deeply
                raise DataError(f"{file}:{line}: {error}") from error
            if system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": system}, *messages]
            rows.append((f"{file}:{line}", file.stem, messages))
    if not rows:
        raise DataError(f"{path}: no rows in this file")
    return rows


def to_prompt(row: object) -> list[dict]:
    """A row of to_messages' shapes, of which prompt and instruction may stand alone → messages up to the last question."""
    match row:
        case {"messages": _} | {"conversations": _} | {"completion": _} | {"output": _}:
            pass
        case {"prompt": _}:
            row = {**row, "completion": ""}
        case {"instruction": _}:
            row = {**row, "output": ""}
    messages = to_messages(row)
    if messages[-1]["role"] == "assistant":
        messages.pop()
    if messages[-1]["role"] != "user":
        raise ValueError("the user asks nothing in this row")
    return messages


def encode_prompt(encoder: ChatEncoder, messages: list[dict], where: str) -> list[int]:
    """Messages, of which a question is the last → the ids that its answer follows.

    Raises DataError, which begins with `where`; also for a prompt that is too long: cut, it would be another question.
    """
    for spelt in filter(None, (encoder.special.search(message["content"]) for message in messages)):
        print(f"warning: {where}: {spelt[0]!r} in the text becomes the control token of that name", file=sys.stderr)
    try:
        ids = encoder.ids(encoder.render(encoder.fold_system(messages), for_answer=True))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if len(ids) > encoder.max_prompt_length:
        max_new_tokens = encoder.max_length - encoder.max_prompt_length
        raise DataError(f"{where}: the prompt's {len(ids)} tokens and --max-new-tokens {max_new_tokens} are more than the "
                        f"{encoder.max_length} that the model takes")
    return ids


@torch.inference_mode()
def generate(model: nn.Module, prompts: list[list[int]], streamer: TextStreamer | None = None) -> list[list[int]]:
    """Ids of prompts, padded on the left → ids of their answers, up to the token that ends them and without it."""
    ids, mask = pad_left(prompts, model.generation_config.pad_token_id)
    output = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), streamer=streamer)
    stops, answers = model.generation_config.eos_token_id, output[:, ids.shape[1]:].tolist()
    return [list(itertools.takewhile(lambda token: token not in stops, answer)) for answer in answers]


def to_text(encoder: ChatEncoder, ids: list[int]) -> str:
    """Ids of an answer → its text, without what the template writes in front of each, such as an empty thought."""
    return encoder.tokenizer.decode(ids, skip_special_tokens=True).strip().removeprefix(encoder.lead.strip()).strip()


def answer(model: nn.Module, encoder: ChatEncoder, rows: list[tuple[str, str, list[dict]]], args: argparse.Namespace) -> None:
    """Answers what read_prompts has read. args.out is written whole or not at all. Raises DataError, OSError."""
    out, partial = Path(args.out), Path(f"{args.out}.partial")
    partial.touch()  # what can't be written is found before the first answer, not after the last
    partial.unlink()
    prompts = [encode_prompt(encoder, messages, where) for where, _, messages in rows]
    samples = [(row, sample) for row in range(len(rows)) for sample in range(args.n_samples)]
    samples.sort(key=lambda key: -len(prompts[key[0]]))  # the longest first: memory runs out at once or never
    answers = {}
    for start in tqdm(range(0, len(samples), args.batch_size), desc="answering", unit="batch"):
        batch = samples[start:start + args.batch_size]
        answers |= zip(batch, generate(model, [prompts[row] for row, _ in batch]))
    records = [{"instruction": rows[row][2][-1]["content"], "output": to_text(encoder, answers[row, sample]),
                "generator": args.model, "dataset": rows[row][1], "prompt_id": row, "sample_id": sample, "type": "sample"}
               for row, sample in sorted(answers)]
    partial.write_text(json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, out)
    limit = model.generation_config.max_new_tokens
    n_cut = sum(len(ids) == limit for ids in answers.values())
    print(f"{out}: {len(records)} answers, {n_cut} of them cut off after {limit} tokens (--max-new-tokens)")


def chat(model: nn.Module, encoder: ChatEncoder, system: str | None) -> None:
    """Answers each line of the standard input in the light of those before it."""
    sys.stdin.reconfigure(errors="replace")  # a stray byte does not end a chat
    streamer = TextStreamer(encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages = beginning = [{"role": "system", "content": system}] if system else []
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # ctrl-D, ctrl-C
        while question := input("> " if sys.stdin.isatty() else "").strip():
            if question == "/reset":
                messages = beginning
                continue
            asked = [*messages, {"role": "user", "content": question}]
            try:
                [ids] = generate(model, [encode_prompt(encoder, asked, "this chat")], streamer)
            except DataError as error:
                print(f"{error}; /reset begins a new one", file=sys.stderr)
                continue
            messages = [*asked, {"role": "assistant", "content": to_text(encoder, ids)}]
    if sys.stdin.isatty():
        print()  # after ctrl-D the shell's prompt would follow on the line of ours


if __name__ == "__main__":
    try:
        main(args)
    except (DataError, ModelError, OSError) as error:
        sys.exit(f"generate.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("generate.py: out of memory; a smaller --batch-size or --max-new-tokens takes less")
