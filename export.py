"""FINAL is the base's folder with other weights: what a run did not change is the base's own, byte for byte.

So an engine reads FINAL as it reads the base, with whatever version of transformers. Where there is no base to copy from, because
the model or its tokenizer is new, it is what transformers writes, with the keys beside it that older versions look for.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from checkpoint import FILES, CheckpointError, step_of, written_whole
from fsdp_utils import failing_together, gather_in_parts
from lora import merge_lora, save_adapter
from model_utils import TOKENIZER_FILES, base_of, find_file, fingerprint

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json",
                   "video_preprocessor_config.json", "feature_extractor_config.json")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def export_model(folder: Path, model, tokenizer, n_steps: int, metrics: dict, settings: dict, merged: bool = False,
                 checkpoint: Path | None = None) -> None:
    """Writes a folder for engines and PEFT: the model, or of LoRA the adapter and if `merged` the model too, the tokenizer,
    the last metrics, the run's settings, and the checkpoint, if it is of this step.

    All ranks must call it; raises CheckpointError on all.
    """
    whole = merged or not settings["model"]["use_peft"]
    with written_whole(folder) as partial:
        if settings["model"]["use_peft"]:
            write_gathered(model, lambda parts: save_adapter(partial / "adapter", model, next(parts)), trained_only=True)
        if whole:
            dtypes = dtypes_in_files(model)
            round_to = rounding(model, dtypes, settings["export_dtype"])
            write_gathered(model, lambda parts: save_model(
                partial, model, (merge_lora(model, with_frozen_as_read(model, part, dtypes), round_to) for part in parts),
                round_to, names_in_files(model), kept_weights(model)), limit=5e9)
        with failing_together(CheckpointError):
            if dist.get_rank() == 0:
                tokenizer.save_pretrained(partial)
                finish_folder(partial, model, tokenizer, settings)
                schedule = {"step": metrics["step"], "total_steps": n_steps, "warmup": settings["warmup"], "lr": settings["lr"]}
                for file, content in {"metrics": metrics, "scheduler": schedule, "sft_config": settings}.items():
                    write_json(partial / f"{file}.json", content)
                written = [path for path in partial.rglob("*") if path.is_file()]
                write_json(partial / FILES, {str(path.relative_to(partial)): fingerprint(path) for path in written})
                if checkpoint and step_of(checkpoint) == metrics["step"]:
                    shutil.copytree(checkpoint, partial / "checkpoint", copy_function=link_or_copy)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def write_gathered(model: nn.Module, write: Callable[[Iterator[dict]], None], limit: float = math.inf,
                   trained_only: bool = False) -> None:
    """Calls write(gather_in_parts(...)) on rank 0. All ranks must call it; raises CheckpointError on all where it fails."""
    parts = gather_in_parts(model, limit, trained_only)
    with failing_together(CheckpointError):
        try:
            if dist.get_rank() == 0:
                write(parts)
        finally:
            for _ in parts:  # gathering takes all ranks, also where rank 0 can't write
                pass


def names_in_files(model) -> dict[str, str]:
    """Returns what the weights are called in the base's files, where these hold each as the model does; else {}."""
    names = {name: written for name, (_, written) in model.weight_files.items()}
    tied = getattr(model, "all_tied_weights_keys", {})
    return names | {name: names[source] for name, source in tied.items() if source in names}


def dtypes_in_files(model) -> dict[str, torch.dtype]:
    """Returns each weight's dtype in the base's files, by its name in the model."""
    dtypes = {}
    for file in {file for file, _ in model.weight_files.values()}:
        with safe_open(file, "pt") as tensors:
            dtypes |= {name: DTYPES[tensors.get_slice(written).get_dtype()]
                       for name, (other, written) in model.weight_files.items() if other == file}
    return dtypes


def with_frozen_as_read(model, part: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """Puts the files' own numbers, of these dtypes, in the place of frozen weights that are held in less precision."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in (part.keys() & dtypes.keys()) - trained:
        held = part[name].dtype
        if held.is_floating_point and torch.promote_types(held, dtypes[name]) != held:
            file, written = model.weight_files[name]
            with safe_open(file, "pt") as tensors:
                known, grown = tensors.get_tensor(written), part[name].to(dtypes[name])
            part[name] = known if known.shape == grown.shape else torch.cat([known, grown[len(known):]])
    return part


def kept_weights(model) -> Iterator[dict[str, torch.Tensor]]:
    """Yields what the base's files hold beside the model's weights, as the vision of which it is the text."""
    for file in sorted(set(model.kept_weights.values())):
        with safe_open(file, "pt") as tensors:
            yield {name: tensors.get_tensor(name) for name, other in model.kept_weights.items() if other == file}


def save_model(folder: Path, model, parts: Iterable[dict[str, torch.Tensor]],
               round_to: Callable[[str], torch.dtype] | None = None, names: dict[str, str] | None = None,
               others: Iterable[dict[str, torch.Tensor]] = ()) -> None:
    """Writes a state dict that comes in parts, tied weights once: safetensors and configurations.

    round_to(name) is the dtype that a floating-point weight is written in, by default the one it has; `names` gives each another
    name, or else transformers undoes what it has done to the files' names and weights. `others` are written as they are.
    """
    files = []
    for part in parts:
        if round_to:
            part = {name: tensor.to(round_to(name)) if tensor.is_floating_point() else tensor for name, tensor in part.items()}
        files.append(folder / f"part-{len(files)}.safetensors")
        if names:
            save_file({names[name]: tensor.contiguous() for name, tensor in part.items()}, files[-1], metadata={"format": "pt"})
        else:
            model.save_pretrained(folder, state_dict=part, max_shard_size="10TB")
            (folder / "model.safetensors").rename(files[-1])
    for part in others:
        files.append(folder / f"part-{len(files)}.safetensors")
        save_file(part, files[-1], metadata={"format": "pt"})
    if names:  # else save_pretrained has written them
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    weight_map, total = {}, 0
    for i, file in enumerate(files, 1):
        file = file.rename(folder / f"model-{i:05}-of-{len(files):05}.safetensors")
        total += file.stat().st_size
        with safe_open(file, "pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), file.name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def rounding(model, dtypes: dict[str, torch.dtype], dtype: str) -> Callable[[str], torch.dtype]:
    """Returns what tells a weight's dtype from its name: the one named, or that of the base's file, or else the base's usual."""
    if dtype:
        return lambda name: getattr(torch, dtype)
    usual = max(dtypes.values(), key=[*dtypes.values()].count, default=model.base_dtype or torch.float32)
    return lambda name: dtypes.get(name, usual)


# ---------------------------------------------------------------------------------------------------------------------
# Everything else


def finish_folder(folder: Path, model, tokenizer, settings: dict) -> None:
    """Puts the base's own files in the place of those that transformers has written, where the run has changed nothing of them.

    A changed key is changed in the base's file: stop tokens, a chat template, the weights' dtype.
    """
    config, cache_dir = settings["model"], settings["cache_dir"]
    base = base_of(config)
    if (folder / "config.json").exists():
        if base:
            original = find_file(base, "config.json", cache_dir)
            put_back(folder / "config.json", original, config_changes(read_json(original), model, settings["export_dtype"]))
            if file := find_file(base, "generation_config.json", cache_dir):
                stops = model.generation_config.eos_token_id
                same = {*as_list(read_json(file).get("eos_token_id"))} == {*stops}
                put_back(folder / "generation_config.json", file, {} if same else {"eos_token_id": stops})
            for name in PROCESSOR_FILES:
                if file := find_file(base, name, cache_dir):
                    shutil.copyfile(file, folder / name)
        else:
            add_flat_keys(folder / "config.json")
    source = config["tokenizer_name_or_path"] or config["name_or_path"]
    originals = {name: file for name in TOKENIZER_FILES if (file := find_file(source, name, cache_dir))}
    if len(tokenizer) == tokenizer.size_as_loaded:
        for name in TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
        for name, file in originals.items():
            shutil.copyfile(file, folder / name)
        if tokenizer.has_new_template:
            (folder / "chat_template.json").unlink(missing_ok=True)
            (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
            put_back(folder / "tokenizer_config.json", originals.get("tokenizer_config.json"),
                     {"chat_template": tokenizer.chat_template})
    else:  # transformers 4 knows neither this class nor the list of further special tokens
        written = read_json(folder / "tokenizer_config.json")
        more = written.pop("extra_special_tokens", None)
        written |= {"additional_special_tokens": more} if isinstance(more, list) else {}
        written |= {"chat_template": tokenizer.chat_template}
        if written.get("tokenizer_class") == "TokenizersBackend":
            written["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(folder / "tokenizer_config.json", written)


def put_back(file: Path, original: str | None, changes: dict) -> None:
    """Makes the file what it was, but for some keys; None removes one. Without a change it is the same bytes."""
    content = read_json(original) if original else {}
    changed = {key: value for key, value in changes.items() if content.get(key) != value}
    if original and not changed:
        shutil.copyfile(original, file)
        return
    write_json(file, {key: value for key, value in {**content, **changed}.items() if value is not None or key not in changed})


def config_changes(config: dict, model, dtype: str) -> dict:
    """Returns what of the base's config.json the run has changed, None for what goes; where it has a text's own part, in that."""
    changes = {key: dtype for key in ("torch_dtype", "dtype") if key in config} if dtype else {}
    if "text_config" in config:
        changes["text_config"] = config["text_config"] | config_changes(config["text_config"], model, dtype)
    else:
        changes |= model.config_changes
    return {**changes, "quantization_config": None}


def add_flat_keys(file: Path) -> None:
    """Adds what transformers 4 and converters look for, beside the forms of transformers 5."""
    config = read_json(file)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        config.setdefault("rope_theta", rope["rope_theta"])
        config.setdefault("rope_scaling", scaling if rope.get("rope_type", "default") != "default" else None)
        if config["model_type"] == "gpt_neox":
            config |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    write_json(file, config)


def as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def read_json(file: str | Path) -> dict:
    return json.loads(Path(file).read_text(encoding="utf-8"))


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)  # takes no room, and lasts when the source is deleted
    except OSError:
        shutil.copy2(source, target)
