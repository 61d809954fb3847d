"""Every type of causal language model that transformers knows, tiny and random: what training does with it.

    python benchmarks/all_types.py [llama gemma4 ...] [--json FILE] [--table FILE]    # all of them: 6 minutes on one core

Each is loaded, trained a step, saved, adapted by LoRA and given new tokens as sft.main does it, in a process of its own. The
reference is plain transformers in fp32, each document alone, and PEFT. Sizes and structures are in all_types_configs.py.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from all_types_configs import VOCABULARY, build
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from configs.base import Config, ModelConfig, PeftConfig
from data import IGNORE, collate_packed, collate_padded
from export import export_model
from fsdp_utils import ModelError, init_processes, make_mesh, shard_model
from lora import lora_names
from model_utils import load_tokenizer, load_weights
from script import one_line
from sft import get_batch_metrics, make_model
from trial import check_gradients, try_model

LENGTHS = [40, 3, 17, 5, 29, 12]  # of documents: some are longer than the windows, 8
SECONDS, MEMORY = 120, 16 << 30  # for each type
LOSS, GRADIENT = 1e-5, 1e-3  # relative errors that rounding explains


def make_documents() -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, trained): from one target, the last token, to all but the first. No id is a special token's."""
    rng, documents = np.random.default_rng(7), []
    for i, length in enumerate(LENGTHS):
        trained = np.arange(length) >= (1, length - 1, length // 2)[i % 3]
        documents.append((rng.integers(8, VOCABULARY - 16, length), trained))
    return documents


def write_checkpoint(model, folder: Path) -> None:
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "<|endoftext|>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "<|endoftext|>")), bos_token="<s>", eos_token="<|endoftext|>",
        pad_token="<pad>", chat_template="{{ messages }}")
    tokenizer.save_pretrained(folder)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Plain transformers


def load_plain(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def plain_logits(model, ids) -> torch.Tensor:
    return model(input_ids=torch.as_tensor(ids)[None], use_cache=False).logits[0]


@torch.no_grad()
def probe(model) -> torch.Tensor:
    return plain_logits(model.eval(), make_documents()[0][0])


def plain_loss(model) -> torch.Tensor:
    """Returns the sum of NLL / count of targets."""
    documents, loss = make_documents(), 0.0
    try:
        plain_logits(model.train(), documents[0][0])
    except ValueError:  # Gemma 3 wants to be told in training what is an image
        model.eval()
    for ids, trained in documents:
        labels = torch.as_tensor(np.where(trained, ids, IGNORE))
        loss = loss + F.cross_entropy(plain_logits(model, ids)[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")
    return loss / sum(int(trained.sum()) for _, trained in documents)


@torch.no_grad()
def describe_plain(folder: Path) -> dict:
    """Whether logits depend on earlier tokens alone, and how many positions there are, where they are in a table."""
    model, (ids, _) = load_plain(folder).eval(), make_documents()[0]
    other, seen = ids.copy(), plain_logits(model, ids)[:-1]
    other[-1] += 1
    facts = {"causal": torch.allclose(plain_logits(model, other)[:-1], seen, rtol=1e-4, atol=1e-5)}
    for length in (64, 65, 80):  # the configurations say 64
        try:
            plain_logits(model, np.full(length, 9))
        except (IndexError, RuntimeError, ValueError) as error:
            return facts | {"positions": length - 1, "beyond": describe(error)}
    return facts


# ---------------------------------------------------------------------------------------------------------------------
# The project, as sft.main has it


def prepare(folder: Path, device: torch.device, lora: bool = False, quantise: bool = False, more_tokens: tuple = ()):
    """Returns (model, batch, how it is trained and what was said, what exports it to a folder)."""
    tokenizer = load_tokenizer(str(folder), "", more_tokens)
    config = ModelConfig(name_or_path=str(folder), use_peft=lora,
                         peft=PeftConfig(lora_r=4, lora_alpha=8, lora_dropout=0.0, quantise=quantise))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        model = make_model(config, tokenizer, [2], "", device)
        shard_model(model, make_mesh(device), "target_logps")
        load_weights(model)
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # else the gradient of A would be zero
                torch.nn.init.normal_(parameter.data.to_local(), std=0.1)
        check_gradients(model, device)
        packing = try_model(model, device, max(LENGTHS), packing=True)
    batch = (collate_packed if packing else collate_padded)(make_documents(), tokenizer.pad_token_id)
    batch |= {"global_target_count": len(batch["target_positions"]), "global_token_count": sum(LENGTHS),
              "n_documents": len(LENGTHS)}
    said = said.getvalue().strip()
    how = f"{'packed' if packing else 'padded'}{', whole logits' * model.uses_own_logits}"
    settings = dataclasses.asdict(Config(exp_name="all", model=config))
    return model, batch, {"how": how, "said": said}, lambda out: export_model(
        out, model, tokenizer, 1, {"step": 1}, settings, merged=True)


def step(model, batch: dict) -> tuple[float, dict[str, torch.Tensor | None]]:
    loss, _ = get_batch_metrics(model, batch, "train", batch["global_target_count"])
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.item(), {name: None if grad is None else grad.full_tensor() for name, grad in gradients.items()}


def zero(grad: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros(()) if grad is None else grad


def largest_error(gradients: dict, expected: dict) -> tuple[float, str]:
    """Returns the largest relative error of a parameter's gradient, and its name; next to nothing is measured by the whole."""
    whole = torch.stack([grad.norm() for grad in expected.values() if grad is not None]).norm()
    errors = {name: ((zero(gradients.get(name)) - zero(grad)).norm() / max(zero(grad).norm(), 0.01 * whole)).item()
              for name, grad in expected.items()}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return errors[worst], worst


def try_training(folder: Path, out: Path, device: torch.device) -> dict:
    plain = load_plain(folder)
    loss = plain_loss(plain)
    loss.backward()
    expected, loss = {name: parameter.grad for name, parameter in plain.named_parameters()}, loss.item()
    model, batch, facts, export_to = prepare(folder, device)
    own_loss, gradients = step(model, batch)
    # transformers thaws what a model has frozen, as Marian's sines, when it loads it
    expected = {name: grad for name, grad in expected.items() if model.get_parameter(name).requires_grad}
    error, worst = largest_error(gradients, expected)
    facts |= {"loss": loss, "loss_error": abs(own_loss - loss) / loss, "gradient_error": error, "worst": worst,
              "sliced": bool(model.weight_files), "idle": [name for name, grad in gradients.items() if grad is None]}
    if not (facts["loss_error"] < LOSS and error < GRADIENT):
        facts["how"] = f"WRONG {facts['how']} (loss {facts['loss_error']:.0e}, {worst} {error:.0e})"
    try:
        export_to(out)
        before, after = read_weights(folder), read_weights(out)
        lost = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
        difference = (probe(load_plain(out)) - probe(load_plain(folder))).abs().max().item()
        export = f"WRONG logits {difference:.0e}" if difference else "exact"
        return facts | {"export": f"{len(lost)} weights lost, as {lost[0]}" if lost else export, "lost": lost}
    except Exception as error:
        return facts | {"export": f"CRASH {describe(error)}", "export_trace": traceback.format_exc()[-3000:]}


def try_lora(folder: Path, out: Path, device: torch.device, quantise: bool = False) -> dict:
    model, batch, _, export_to = prepare(folder, device, lora=True, quantise=quantise)
    loss, gradients = step(model, batch)
    adapters = [name for name in lora_names(gradients) if model.get_submodule(name).lora_A.weight.requires_grad]
    idle = [name for name in adapters if not zero(gradients[f"{name}.lora_A.weight"]).any()]
    facts, found = {"adapters": len(adapters), "lora_idle": idle}, [f"{len(idle)} of {len(adapters)} idle"] if idle else []

    def compare(what: str, model) -> None:
        with torch.no_grad():
            if not (error := abs(plain_loss(model).item() - loss) / loss) < 5 * LOSS:  # W + BA is rounded
                found.append(f"WRONG {what} {error:.0e}")

    export_to(out)
    compare("merged", load_plain(out))
    if quantise:  # in PEFT its adapter meets another base
        n_packed = sum(parameter.dtype == torch.uint8 for parameter in model.parameters())
        return {"qlora": "; ".join([*found, f"{n_packed} packed"])}
    try:
        compare("in PEFT", PeftModel.from_pretrained(load_plain(folder), out / "adapter"))
    except Exception as error:
        found.append(f"CRASH in PEFT {describe(error)}")
        facts["lora_trace"] = traceback.format_exc()[-3000:]
    return facts | {"lora": "; ".join(found) or "exact"}


def try_new_tokens(folder: Path, out: Path, device: torch.device) -> dict:
    model, batch, _, export_to = prepare(folder, device, more_tokens=("<|new 1|>", "<|new 2|>", "<|new 3|>"))
    loss, _ = step(model, batch)
    export_to(out)
    new, old = (load_plain(path).get_input_embeddings().weight for path in (out, folder))
    if len(new) >= VOCABULARY + 3 and torch.equal(new[:len(old)], old) and np.isfinite(loss):
        return {"new_tokens": "good"}
    return {"new_tokens": f"WRONG loss {loss}, {len(new)} rows, {int((new[:len(old)] != old).any(1).sum())} changed"}


TRIES = {"how": try_training, "lora": try_lora, "qlora": functools.partial(try_lora, quantise=True), "new_tokens": try_new_tokens}


# ---------------------------------------------------------------------------------------------------------------------
# One type in one process


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def examine(model_type: str, folder: Path, send) -> None:
    """Sends parts of the type's row as they become known."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    base = folder / "base"
    try:
        model = build(model_type)
        send({"class": type(model).__name__, "parameters": sum(parameter.numel() for parameter in model.parameters())})
        write_checkpoint(model, base)
        plain = load_plain(base)
        send(describe_plain(base) | {"class": type(plain).__name__})
        loss = plain_loss(plain)
        loss.backward()
        if not loss.isfinite():
            raise ValueError(f"its loss is {loss.item()}")
    except Exception as error:
        return send({"how": "not built", "why": describe(error), "trace": traceback.format_exc()[-3000:]})
    _, _, device = init_processes()
    for column, work in TRIES.items():
        try:
            send(work(base, folder / column, device))
        except ModelError as error:
            why = one_line(error).removeprefix(f"{base}: ")
            send({"how": "refused", "why": why} if column == "how" else {column: f"refused: {why}"})
            if column == "how":
                return
        except Exception as error:
            send({column: f"CRASH {describe(error)}", f"{column}_trace": traceback.format_exc()[-3000:]})


def begin(model_type: str, folder: Path, pipe) -> None:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    examine(model_type, folder, pipe.send)
    pipe.close()
    os._exit(0)  # as end_process, past the threads of gloo


def run(model_type: str) -> dict:
    """Returns the type's row: type, class, how, why or what was said, lora, new_tokens, export, and the numbers."""
    row, started = {"type": model_type}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        here, there = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=begin, args=(model_type, Path(folder), there))
        child.start()
        there.close()
        with contextlib.suppress(EOFError):
            while here.poll(max(0, started + SECONDS - time.monotonic())):
                row |= here.recv()
        child.join(max(0, started + SECONDS - time.monotonic()))
        late = child.is_alive()
        child.kill()
        child.join()
        if late or child.exitcode:
            column = next((column for column in TRIES if column not in row), "end")
            row[column] = f"CRASH {f'not done after {SECONDS} s' if late else f'exit code {child.exitcode}'}"
            row["log"] = Path(folder, "log").read_text(errors="replace")[-2000:]
    return row | {"seconds": round(time.monotonic() - started, 1)}


# ---------------------------------------------------------------------------------------------------------------------
# The report


def reason(row: dict) -> str:
    """Why it is refused, not built or not packed, without the name of the class."""
    why = row.get("why") or next((line for line in row.get("said", "").splitlines() if line.startswith("not packed")), "")
    return re.sub(r"(not packed: )?\b\w+(ForCausalLM|LMHead\w*|ForConditionalGeneration):? ", "", why)


def line(row: dict) -> str:
    numbers = [f"loss {row['loss_error']:.0e}, gradient {row['gradient_error']:.0e}"] if "loss_error" in row else []
    notes = [f"{row['positions']} positions"] if "positions" in row else []
    notes += [] if row.get("causal", True) else ["NOT CAUSAL"]
    columns = [f"{key}: {row[key]}" for key in (*TRIES, "export") if key != "how" and key in row]
    how = f"{row['how']} ({reason(row)})" if reason(row) else row["how"]
    return " | ".join([row["type"], row.get("class", "-"), how, *numbers, *columns, *notes, f"{row['seconds']} s"])


def kind_of(cell: str) -> str:
    """What a column says, without its numbers and names."""
    return "; ".join(re.sub(r"\d+ of \d+ |^\d+ | \d\S*$", "", re.split(r" \(|: | \w+Error|, as", part)[0])
                     for part in cell.split("; ")[:2])


def make_table(rows: list[dict]) -> str:
    groups = defaultdict(list)
    order = ["packed", "packed, whole logits", "padded", "padded, whole logits", "refused", "not built"]
    for row in rows:
        groups[row["how"].split(" (")[0], reason(row)].append(row["type"])
    lines = ["| trained how | why | types |", "| --- | --- | --- |"]
    for (how, why), types in sorted(groups.items(), key=lambda item: ([*order, item[0][0]].index(item[0][0]), -len(item[1]))):
        lines.append(f"| {how} | {why.replace('|', '/')} | {len(types)}: {', '.join(types)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--json", type=Path, help="file to write all that was found to")
    parser.add_argument("--table", type=Path, help="file to write a table for docs/models.md to")
    options, rows = parser.parse_args(), []
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for model_type in options.types:
        rows.append(run(model_type))
        print(line(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    if options.table:
        options.table.write_text(make_table(rows))
    for column in (*TRIES, "export"):
        kinds = Counter(kind_of(row[column]) for row in rows if column in row)
        print(f"{column}:", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))


if __name__ == "__main__":
    main()
