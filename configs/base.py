"""Every knob of a run: one dataclass tree, one comment each.

A config file is Python that ends in `config = Config(...)`: it is executed, so run only files you trust. The command
line overrides it by dotted keys, `model.max_length=1024 datasets=[a.jsonl,b.jsonl]`; a leading `++` or `--` is accepted.
This file imports nothing heavy, so that --help and a misspelt key answer at once. The slots make a misspelt key fail
in a config file too, where it is assigned to.
"""

import copy
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import os
import re
import runpy
import types
import typing
from dataclasses import dataclass, field


@dataclass(slots=True)
class PeftConfig:
    lora_r: int = 64  # rank of the low-rank update
    lora_alpha: float = 256  # the update is scaled by lora_alpha / lora_r
    lora_dropout: float = 0.05  # dropout on the input of the update
    target_modules: str | list[str] = "all-linear"  # names of linears, [q_proj,v_proj], or all-linear: all but the head
    use_rslora: bool = False  # scale by lora_alpha / sqrt(lora_r) instead, which keeps large ranks from learning slowly


@dataclass(slots=True)
class ModelConfig:
    name_or_path: str = ""  # required: a Hugging Face model, by hub name or folder (or describe one by random_init)
    tokenizer_name_or_path: str = ""  # where the tokenizer is, if not with the model
    random_init: dict | None = None  # a transformers config, {"model_type": "llama", ...}: random weights, nothing is loaded
    load_from: str = ""  # folder with weights to start from instead of name_or_path's
    from_checkpoint: str = ""  # checkpoint of another run to begin from: weights, optimizer, schedule, place in the data
    batch_size: int = 32  # examples per optimizer step, over all ranks and accumulation steps
    gradient_accumulation_steps: int = 1  # microbatches per rank and optimizer step, at least; more where the next key asks
    microbatch_tokens: int = 8192  # tokens a rank computes with at once, at most (or one row): less memory, more microbatches
    packing: bool = True  # rows share a row of the batch, unseen by each other, instead of being padded
    max_length: int = 2048  # tokens per row; longer rows lose their oldest turns first, then the end of the last answer
    max_prompt_length: int = 1024  # tokens of prompt kept in a row that is still too long after that
    max_grad_norm: float = 1.0  # the gradient's global norm is clipped to this
    activation_checkpointing: bool = False  # recompute each block in the backward: less memory, a third more compute
    cpu_offload: bool = False  # keep shards, gradients and optimizer in the host's memory: for a model too large for the GPUs
    replicas: int = 1  # copies of the model, each sharded over as many neighbouring ranks: HSDP, one copy a machine
    compile: bool = False  # compile each block, and on a GPU the log-prob kernel's elementwise part: a minute at the start
    use_peft: bool = False  # train LoRA adapters, not the weights
    load_lora_from: str = ""  # folder of an adapter, ours or PEFT's, to go on from, at its own rank and scale
    peft: PeftConfig = field(default_factory=PeftConfig)


@dataclass(slots=True)
class WandbConfig:
    enabled: bool = False  # also log to Weights & Biases; metrics.jsonl is written in any case
    project: str = "sft"  # W&B project


@dataclass(slots=True)
class Config:
    exp_name: str = ""  # required: the run's name; it writes to {cache_dir}/{exp_name}
    datasets: list[str] = field(default_factory=list)  # required: files, folders, names or hub:owner/name; *2 doubles a weight
    eval_datasets: list[str] = field(default_factory=list)  # held-out ones; else the test splits of the named data sets
    conditional: bool = False  # answers of named data sets begin with <|good|>, and rejected ones are trained on with <|bad|>
    eval_fraction: float = 0.0  # fraction of the training rows to hold out where there are no eval_datasets
    cache_dir: str = ".cache"  # where runs, tokenised data and downloaded models are kept
    seed: int = 1  # of the shuffle, of random weights, of dropout
    n_epochs: int = 1  # passes over the training rows
    n_examples: int | None = None  # train on this many examples instead of n_epochs
    lr: float = 5e-6  # peak learning rate, reached at the end of warmup
    warmup: float = 0.10  # fraction of the steps with a linearly growing learning rate; after it, a cosine to 0
    weight_decay: float = 0.01  # AdamW's, on matrices alone: not on norms and biases
    beta1: float = 0.9  # AdamW: decay of the mean gradient
    beta2: float = 0.999  # AdamW: decay of the mean squared gradient
    eps: float = 1e-5  # AdamW: added to the root of the mean squared gradient
    eval_every: int = 20_000  # examples between evaluations; there is always one at the end
    n_eval_examples: int = 256  # held-out examples per evaluation
    n_eval_answers: int = 0  # held-out prompts answered greedily at the first and the last evaluation, scored by exact match
    do_first_eval: bool = True  # evaluate before the first step
    intermediate_checkpoints: bool = False  # export the model at each evaluation, as FINAL is (of LoRA, the adapter)
    save_every: int = 20_000  # examples between checkpoints to resume from; there is always one at the end
    keep_last: int = 2  # checkpoints kept
    stop_if_save_fails: bool = True  # stop where a checkpoint can't be written (a full disk), or else warn and go on
    allow_changes: bool = False  # resume though the configuration or the data changed in a way that alters the run
    max_skipped_steps: int = 5  # stop after as many steps in a row whose loss or gradient is not finite; they are skipped
    timeout_minutes: float = 30  # a rank that waits longer than this for another one ends with an error
    tensorboard: bool = False  # also log to {cache_dir}/{exp_name}/tensorboard
    wandb: WandbConfig = field(default_factory=WandbConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one line each."""


def check(config: Config, world_size: int) -> list[str]:
    """Returns what is wrong with the values, one line each."""
    model, errors = config.model, []

    def require(condition, message):
        if not condition:
            errors.append(message)

    require(config.exp_name, "exp_name is required: a name for the run")
    require(not re.search(r"[/\\\0]", config.exp_name) and config.exp_name not in (".", ".."),
            f"exp_name={config.exp_name!r} must be a plain name, not a path")
    require(config.datasets, "datasets is required: files or folders to train on, datasets=[a.jsonl,b.jsonl]")
    require(model.name_or_path or model.random_init, "model.name_or_path is required: a Hugging Face model's name or folder")
    require(not model.random_init or "model_type" in model.random_init,
            'model.random_init needs a "model_type", as in {"model_type": "llama", "hidden_size": 128}')
    require(not model.random_init or model.name_or_path or model.tokenizer_name_or_path,
            "model.tokenizer_name_or_path is required where model.random_init describes the model")
    for key in ("lr", "n_epochs", "n_examples", "eval_every", "eps", "model.max_length", "model.max_prompt_length",
                "model.max_grad_norm", "model.peft.lora_r", "model.batch_size", "model.microbatch_tokens",
                "model.gradient_accumulation_steps", "model.replicas", "save_every", "keep_last", "max_skipped_steps",
                "timeout_minutes"):
        value = get_key(config, key)
        require(value is None or value > 0, f"{key}={value} must be above 0")
    for key in ("weight_decay", "n_eval_examples", "n_eval_answers"):
        require(get_key(config, key) >= 0, f"{key}={get_key(config, key)} must not be negative")
    for key in ("warmup", "eval_fraction", "beta1", "beta2", "model.peft.lora_dropout"):
        require(0 <= get_key(config, key) < 1, f"{key}={get_key(config, key)} must be at least 0 and below 1")
    require(model.max_prompt_length < model.max_length, f"model.max_prompt_length={model.max_prompt_length} must be "
            f"below model.max_length={model.max_length}, to leave room for an answer")
    microbatches = world_size * max(1, model.gradient_accumulation_steps)
    require(model.batch_size % microbatches == 0,
            f"model.batch_size={model.batch_size} must be divisible by {world_size} ranks x "
            f"{model.gradient_accumulation_steps} accumulation steps = {microbatches}")
    require(world_size % max(1, model.replicas) == 0,
            f"model.replicas={model.replicas} must divide the number of ranks, {world_size}")
    require(not (config.conditional and config.n_eval_answers), "n_eval_answers can't grade the answers of conditional=true")
    require(not (config.eval_datasets and config.eval_fraction), "eval_datasets and eval_fraction exclude each other")
    require(model.use_peft or not model.load_lora_from, "model.load_lora_from needs model.use_peft=true")
    for key, package in {"wandb.enabled": "wandb", "tensorboard": "tensorboard"}.items():
        require(not get_key(config, key) or importlib.util.find_spec(package),
                f"{key}=true needs a package that is not installed: pip install {package}")
    require(model.peft.target_modules, "model.peft.target_modules must name a layer, or be all-linear")
    return errors


# What may differ when a run is resumed, since the examples, their order and the loss of each step stay the same. (`datasets`
# may have moved: the rows themselves are compared.)
HARMLESS = {"exp_name", "datasets", "eval_datasets", "cache_dir", "n_epochs", "n_examples", "eval_every", "n_eval_examples",
            "n_eval_answers", "do_first_eval", "intermediate_checkpoints", "save_every", "keep_last", "stop_if_save_fails",
            "allow_changes", "max_skipped_steps", "timeout_minutes", "tensorboard", "wandb.enabled", "wandb.project",
            "model.from_checkpoint", "model.gradient_accumulation_steps", "model.microbatch_tokens", "model.packing",
            "model.activation_checkpointing", "model.cpu_offload", "model.replicas", "model.compile"}


def changes(then: dict, now: Config) -> list[str]:
    """Returns a line for each key whose change alters a run that began with the configuration `then`, as asdict gives it."""
    lines = []
    for key, (_, default, _) in keys(Config):
        old, new = then, get_key(now, key)
        for name in key.split("."):
            old = old.get(name, default) if isinstance(old, dict) else default
        if old != new and key not in HARMLESS:
            lines.append(f"{key}: {old!r} then, {new!r} now")
    return lines


def load_config(argv: list[str], world_size: int) -> Config:
    """`["--config", "configs/llama.py", "lr=1e-5", ...]` → a checked Config. Raises ConfigError with all that is wrong."""
    path, overrides, rest = "", {}, list(argv)
    errors = []
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.lstrip("+-").partition("=")
        if key == "config":
            path = text if equals else rest.pop(0) if rest else ""
        elif equals:
            overrides[key] = text
        else:
            errors.append(f"{argument!r} is not of the form key=value")
    if not path:
        raise ConfigError("\n".join(["--config is required: a file such as configs/tiny.py", *errors]))
    if not os.path.isfile(path):
        raise ConfigError("\n".join([f"--config {path}: no such file", *errors]))
    try:
        config = runpy.run_path(path).get("config")
    except Exception as error:  # whatever the file does wrong, the user is told which file
        text = str(error).partition("\n")[0]
        raise ConfigError("\n".join([f"--config {path}: {type(error).__name__}: {text}", *errors])) from error
    if not isinstance(config, Config):
        raise ConfigError("\n".join([f"--config {path}: the file must set `config = Config(...)`", *errors]))

    config = copy.deepcopy(config)  # a file may take over another one's, which Python keeps for the next load
    known, wrong_types = dict(keys(Config)), list(misfits(config))
    errors += [f"{path}: {line}" for line in wrong_types]
    for key, text in overrides.items():
        if key not in known:
            errors.append(f"unknown key {key!r}{nearest(key, known)}")
            continue
        try:
            value = parse(text, known[key][0])
        except ValueError:
            errors.append(f"{key}={text!r} must be {type_name(known[key][0])}")
            continue
        if not wrong_types:
            set_key(config, key, value)
    if not wrong_types:  # the checks of the values take the right types for granted
        errors += check(config, world_size)
    if errors:
        raise ConfigError("\n".join(errors))
    return config


def usage() -> str:
    """Returns every key with its default, type and comment."""
    lines = ["torchrun --nproc_per_node=N sft.py --config configs/FILE.py [key=value ...]", ""]
    for key, (hint, default, comment) in keys(Config):
        shown = "required" if comment.startswith("required") else json.dumps(default)
        lines.append(f"  {key} = {shown}  ({type_name(hint)})\n      {comment.removeprefix('required: ')}")
    return "\n".join(lines)


def keys(cls: type, prefix: str = "") -> typing.Iterator[tuple[str, tuple]]:
    """Yields (dotted key, (type, default, comment)) of every knob; the comment is the one in the source above."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    hints, defaults = typing.get_type_hints(cls), cls()
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, (hint, getattr(defaults, item.name), comments.get(item.name, ""))


def get_key(config, key: str):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def set_key(config, key: str, value) -> None:
    *parents, name = key.split(".")
    setattr(get_key(config, ".".join(parents)) if parents else config, name, value)


def nearest(key: str, known: typing.Iterable[str]) -> str:
    """Returns ", did you mean ...?", by the whole key or by its last part alone; or "" where nothing is like it."""
    by_last_part = {name.split(".")[-1]: name for name in known}
    match = difflib.get_close_matches(key, known, 1) or difflib.get_close_matches(key.split(".")[-1], by_last_part, 1)
    return f", did you mean {by_last_part.get(match[0], match[0])!r}?" if match else " (--help lists them all)"


def parse(text: str, hint):
    """Reads the text of an override as the type `hint`. Raises ValueError where it is not one."""
    if isinstance(hint, types.UnionType):  # X | None, or str | list[str]
        options = typing.get_args(hint)
        if text in ("null", "None") and type(None) in options:
            return None
        return parse(text, list[str] if text.startswith("[") and list[str] in options else options[0])
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if hint is dict:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(text)
        return value
    if typing.get_origin(hint) is list:
        items = text.removeprefix("[").removesuffix("]").split(",")
        return [item.strip().strip("'\"") for item in items if item.strip()]
    value = hint(text)
    if hint is float and not math.isfinite(value):
        raise ValueError(text)
    return value


def misfits(config, prefix: str = "") -> typing.Iterator[str]:
    """Yields a line for each value that is not of its key's type."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(hint) and isinstance(value, hint):
            yield from misfits(value, f"{prefix}{name}.")
        elif not fits(value, hint):
            yield f"{prefix}{name}={value!r} must be {type_name(hint)}"


def fits(value, hint) -> bool:
    """Whether the value is of the type; an int serves as a float, a bool does not serve as an int, nor infinity as either."""
    if isinstance(hint, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint)


def type_name(hint) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join("null" if option is type(None) else type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return "a list, [a,b]"
    if dataclasses.is_dataclass(hint):
        return f"a {hint.__name__}(...)"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text", dict: "a JSON object"}[hint]
