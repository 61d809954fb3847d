"""Every knob of a run, each on one line: type, default, bounds, whether a resumed run may change it, and what it means.

A config file is Python that ends in `config = Config(...)`: it is executed, so run only files you trust. The command
line overrides it by dotted keys, `model.max_length=1024 datasets=[a.jsonl,b.jsonl]`; a leading `++` or `--` is accepted.
This file imports nothing heavy, so that --help and a misspelt key answer at once. The slots make a misspelt key fail
in a config file too, where it is assigned to.
"""

import contextlib
import copy
import dataclasses
import difflib
import gc
import importlib.util
import json
import math
import os
import re
import runpy
import sys
import time
import types
import typing
from dataclasses import dataclass, field

from script import PARTS, STARTED, end_early, fail, handle_signals, one_line


def between(low: float, high: float) -> tuple[str, typing.Callable]:
    return f"from {low:,} to {high:,}", lambda value: low <= value <= high


ANY = ("", lambda value: True)
DTYPE = ("float32, bfloat16 or float16", lambda value: value in ("", "float32", "bfloat16", "float16"))
ABOVE_0 = ("above 0, and in the range of fp32", lambda value: 1e-37 <= value <= 3e38)
NOT_NEGATIVE = ("0 or more, and in the range of fp32", lambda value: 0 <= value <= 3e38)
BELOW_HALF = ("at least 0 and below 0.5", lambda value: 0 <= value < 0.5)
FRACTION = ("at least 0 and below 1", lambda value: 0 <= value < 1)
COUNT, COUNT_OR_0, FEW = between(1, 10 ** 12), between(0, 10 ** 12), between(1, 10 ** 6)
LENGTH = between(2, 10 ** 12)
SEED, MINUTES = between(0, 2 ** 63 - 1), between(0.01, 10 ** 6)
# Whether a resumed run may have another value: it may where each step's rows and loss stay the same. What is MOVED may have
# another name, and is told by what it holds.
FIXED, MOVED, FREE = "fixed", "moved", "free"


def knob(default, bounds: tuple, may_change: str, meaning: str):
    """A field of the dataclasses below. A list's default is copied for each; bounds don't hold for null."""
    metadata = {"bounds": bounds, "may_change": may_change, "meaning": meaning}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(slots=True)
class PeftConfig:
    lora_r: int = knob(64, FEW, FIXED, "rank of the low-rank update")
    lora_alpha: float = knob(256, ABOVE_0, FIXED, "the update is scaled by lora_alpha / lora_r")
    lora_dropout: float = knob(0.05, FRACTION, FIXED, "dropout on the input of the update")
    target_modules: str | list[str] = knob("all-linear", ANY, FIXED, "names of linears, [q_proj,v_proj], or all but the head")
    use_rslora: bool = knob(False, ANY, FIXED, "scale by lora_alpha / sqrt(lora_r), which keeps large ranks from learning slowly")
    quantise: bool = knob(False, ANY, FIXED, "QLoRA: keep the frozen linears in 4 bits, NF4, a quarter of bf16")


@dataclass(slots=True)
class ModelConfig:
    name_or_path: str = knob("", ANY, MOVED, "required: a Hugging Face model, by hub name or folder (or random_init)")
    tokenizer_name_or_path: str = knob("", ANY, MOVED, "where the tokenizer is, if not with the model")
    random_init: dict | None = knob(None, ANY, FIXED, 'a transformers config, {"model_type": "llama", ...}: random weights')
    chat_template: str = knob("", ANY, FIXED, "file of a Jinja chat template to use instead of the tokenizer's own")
    template_kwargs: dict | None = knob(None, ANY, FIXED, 'the template\'s own switches, {"enable_thinking": false}')
    load_from: str = knob("", ANY, MOVED, "folder with weights to start from instead of name_or_path's")
    from_checkpoint: str = knob("", ANY, FREE, "another run's checkpoint to begin from: weights, optimizer, place in the data")
    batch_size: int = knob(32, COUNT, FIXED, "examples per optimizer step, over all ranks and accumulation steps")
    gradient_accumulation_steps: int = knob(1, COUNT, FREE, "microbatches per rank and step, at least; see the next key")
    microbatch_tokens: int = knob(8192, COUNT, FREE, "tokens a rank computes with at once, at most (or one row)")
    packing: bool = knob(True, ANY, FREE, "rows share a row of the batch, unseen by each other, instead of being padded")
    max_length: int = knob(2048, LENGTH, FIXED, "tokens per row; longer rows lose their oldest turns, then the answer's end")
    max_prompt_length: int | None = knob(None, COUNT, FIXED, "of them, tokens of prompt kept in a row still too long; half")
    max_grad_norm: float = knob(1.0, ABOVE_0, FIXED, "the gradient's global norm is clipped to this")
    activation_checkpointing: bool = knob(False, ANY, FREE, "recompute each block in the backward: less memory, more compute")
    activation_offload: bool = knob(False, ANY, FREE, "keep a recomputed block's input in the host's memory until then")
    cpu_offload: bool = knob(False, ANY, FREE, "keep shards, gradients and optimizer in the host's memory")
    replicas: int = knob(1, COUNT, FREE, "copies of the model, each sharded over neighbouring ranks: HSDP, one a machine")
    compile: bool = knob(False, ANY, FREE, "compile each block and, on a GPU, the log-prob kernel: a minute at the start")
    use_peft: bool = knob(False, ANY, FIXED, "train LoRA adapters, not the weights")
    load_lora_from: str = knob("", ANY, MOVED, "folder of an adapter, ours or PEFT's, to go on from, at its own rank and scale")
    peft: PeftConfig = field(default_factory=PeftConfig)


@dataclass(slots=True)
class WandbConfig:
    enabled: bool = knob(False, ANY, FREE, "also log to Weights & Biases; metrics.jsonl is written in any case")
    project: str = knob("sft", ANY, FREE, "W&B project")


@dataclass(slots=True)
class Config:
    exp_name: str = knob("", ANY, FREE, "required: the run's name; it writes to {cache_dir}/{exp_name}")
    datasets: list[str] = knob([], ANY, MOVED, "required: files, folders, names or hub:owner/name; *2 doubles a weight")
    eval_datasets: list[str] = knob([], ANY, MOVED, "held-out ones; else the test splits of the named data sets")
    conditional: bool = knob(False, ANY, FIXED, "named sets' answers begin with <|good|>; rejected ones, too, with <|bad|>")
    eval_fraction: float = knob(0.0, FRACTION, FIXED, "fraction of the rows to hold out where there are no eval_datasets")
    last_answer_only: bool = knob(False, ANY, FIXED, "train only the last answer of each row")
    max_bad_rows: float = knob(0.01, FRACTION, FREE, "fraction of the rows that may be bad and left out, or nothing is trained")
    cache_dir: str = knob(".cache", ANY, FREE, "where runs, tokenised data and downloaded models are kept")
    seed: int = knob(1, SEED, FIXED, "of the shuffle, of random weights, of dropout")
    n_epochs: int = knob(1, FEW, FREE, "passes over the training rows")
    n_examples: int | None = knob(None, COUNT, FREE, "train on this many examples instead of n_epochs")
    lr: float = knob(5e-6, ABOVE_0, FIXED, "peak learning rate, reached at the end of warmup")
    warmup: float = knob(0.10, FRACTION, FIXED, "fraction of the steps in which the learning rate grows; then a cosine to 0")
    weight_decay: float = knob(0.01, NOT_NEGATIVE, FIXED, "AdamW's, on matrices alone: not on norms and biases")
    beta1: float = knob(0.9, FRACTION, FIXED, "AdamW: decay of the mean gradient")
    beta2: float = knob(0.999, FRACTION, FIXED, "AdamW: decay of the mean squared gradient")
    eps: float = knob(1e-8, ABOVE_0, FIXED, "AdamW: added to the root of the mean squared gradient")
    eval_every: int | None = knob(None, COUNT, FREE, "examples between evaluations: a tenth of the run's; one at the end")
    n_eval_examples: int = knob(256, COUNT_OR_0, FREE, "held-out examples per evaluation")
    n_eval_answers: int = knob(0, COUNT_OR_0, FREE, "held-out prompts answered before and after, scored by exact match")
    do_first_eval: bool = knob(True, ANY, FREE, "evaluate before the first step")
    export_dtype: str = knob("", DTYPE, FREE, "of FINAL's weights: float32, bfloat16 or float16; else that of the base's files")
    intermediate_checkpoints: bool = knob(False, ANY, FREE, "export the model at each evaluation (of LoRA, the adapter)")
    save_every: int | None = knob(None, COUNT, FREE, "examples between checkpoints: a tenth of the run's; one at the end")
    keep_last: int = knob(2, COUNT, FREE, "checkpoints kept")
    stop_if_save_fails: bool = knob(True, ANY, FREE, "stop where a checkpoint can't be written, or else warn and go on")
    allow_changes: bool = knob(False, ANY, FREE, "resume though configuration or data changed in a way that alters the run")
    max_skipped_steps: int = knob(5, COUNT, FREE, "stop after as many consecutive steps of a loss or gradient not finite")
    timeout_minutes: float = knob(30, MINUTES, FREE, "a rank that waits longer than this for another one ends with an error")
    tensorboard: bool = knob(False, ANY, FREE, "also log to {cache_dir}/{exp_name}/tensorboard")
    wandb: WandbConfig = field(default_factory=WandbConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(slots=True)
class DPOConfig(Config):
    """dpo.py's. Of the common keys two have but one value."""

    conditional: bool = knob(False, ("false: it is sft.py's", lambda value: not value), FIXED, "always false")
    last_answer_only: bool = knob(True, ("true: only what is compared is trained", bool), FIXED, "always true")
    beta: float = knob(0.1, ABOVE_0, FIXED, "how closely the model is held to the one it starts from; more is closer")
    label_smoothing: float = knob(0.0, BELOW_HALF, FIXED, "the part of the pairs whose answers are taken to be mixed up")
    loss: str = knob("sigmoid", ("sigmoid or ipo", lambda value: value in ("sigmoid", "ipo")), FIXED, "DPO's own, or IPO's")


SWITCHES = {"model.peft.": "model.use_peft", "wandb.project": "wandb.enabled"}  # without which a key given is of no use


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one line each."""


def brief(value: object) -> str:
    """Returns the value's text as a terminal can show it, of which the middle is left out where it is long."""
    try:
        text = str(value) if str(value).isprintable() else repr(value)
    except ValueError:  # Python's own, of 4,300 digits and more
        return "a number of thousands of digits"
    return text if len(text) < 60 else f"{text[:30]}...{text[-10:]} ({len(text)} characters)"


def check(config: Config, world_size: int) -> list[str]:
    """Returns what is wrong with the values, one line each: those out of bounds, and those that do not go together."""
    config, errors = copy.deepcopy(config), []
    model = config.model

    def require(condition, message):
        if not condition:
            errors.append(message)

    require(config.exp_name, "exp_name is required: a name for the run")
    name = config.exp_name
    require(not re.search(r"[/\\]", name) and name == name.strip(" .") and len(name.encode(errors="replace")) <= 200,
            f"exp_name={brief(repr(name))} must be a plain name of at most 200 bytes, no path, without a dot or blank around it")
    require(not re.fullmatch(r"tokens|datasets|tiny-data|models--.*", name),
            f"exp_name={name} is where cache_dir holds something else")
    require(config.cache_dir.strip(), "cache_dir must name a folder; . is the present one")
    require(config.datasets, "datasets is required: files or folders to train on, datasets=[a.jsonl,b.jsonl]")
    require(model.name_or_path or model.random_init, "model.name_or_path is required: a Hugging Face model's name or folder")
    require(not model.random_init or "model_type" in model.random_init,
            'model.random_init needs a "model_type", as in {"model_type": "llama", "hidden_size": 128}')
    require(not model.random_init or model.name_or_path or model.tokenizer_name_or_path,
            "model.tokenizer_name_or_path is required where model.random_init describes the model")
    for key, (item, _) in knobs(type(config)):
        (text, holds), value = item.metadata["bounds"], get_key(config, key)
        if value is not None and not holds(value):
            errors.append(f"{key}={brief(value)} must be {text}")
            set_key(config, key, default_of(item))  # what follows need not be said of it too
        elif not "".join(value if isinstance(value, (list, str)) else "").isprintable():
            errors.append(f"{key}={value!r} must be a text that can be printed")
    require((model.max_prompt_length or 0) < model.max_length, f"model.max_prompt_length={model.max_prompt_length} must be "
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
    require(model.use_peft or not model.peft.quantise, "model.peft.quantise=true needs model.use_peft=true")
    require(model.activation_checkpointing or not model.activation_offload,
            "model.activation_offload=true needs model.activation_checkpointing=true")
    errors += missing_files(config)
    for key, package in {"wandb.enabled": "wandb", "tensorboard": "tensorboard"}.items():
        require(not get_key(config, key) or importlib.util.find_spec(package),
                f"{key}=true needs a package that is not installed: pip install {package}")
    require(model.peft.target_modules, "model.peft.target_modules must name a layer, or be all-linear")
    return errors


def missing_files(config: Config) -> list[str]:
    """Returns a line for each file or folder that the configuration names and that is not there, or not what it must be."""
    model, errors = config.model, []
    for key in ("datasets", "eval_datasets"):
        entries = getattr(config, key)
        for before, entry in zip(["", *entries], entries):
            name = re.sub(r"\*[^*/]*$", "", entry)
            if os.path.exists(whole := f"{before},{entry}") and not (os.path.exists(before) and os.path.exists(name)):
                errors.append(f"{key}: the file {whole} has a comma: put it in quotes, '{key}=[\"{whole}\"]'")
            elif (os.sep in name or "." in name) and not name.startswith("hub:") and not any(map(os.path.exists, (entry, name))):
                errors.append(f"{key}: {name}: no such file")
    holds = {"load_from": ["config.json"], "load_lora_from": ["adapter_config.json"],
             "from_checkpoint": ["checkpoint.json", "checkpoints", "FINAL", "checkpoint"]}
    for key, files in holds.items():
        name = getattr(model, key)
        if name and not any(os.path.exists(os.path.join(name, file)) for file in files):
            what = f"this folder holds no {files[0]}" if os.path.isdir(name) else "no such folder"
            errors.append(f"model.{key}={name}: {what}")
    if os.path.exists(model.chat_template) and not os.path.isfile(model.chat_template):
        errors.append(f"model.chat_template={model.chat_template}: not a file")
    elif model.chat_template:
        import jinja2
        try:
            with open(model.chat_template, encoding="utf-8") as file:  # transformers' own tag marks what it takes for an answer
                text = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", file.read())
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
        except OSError as error:
            errors.append(f"model.chat_template={model.chat_template}: can't be read: {error.strerror}")
        except UnicodeDecodeError:
            errors.append(f"model.chat_template={model.chat_template}: not UTF-8")
        except jinja2.TemplateSyntaxError as error:
            errors.append(f"model.chat_template={model.chat_template}:{error.lineno}: not a Jinja template: {one_line(error)}")
    own = {"messages", "tools", "documents", "add_generation_prompt", "tokenize", "chat_template"}
    errors += [f"model.template_kwargs: {key} is the run's to set" for key in model.template_kwargs or () if key in own]
    return errors


def changes(then: dict, now: dict, moved: bool = False, kind: type[Config] = Config) -> list[str]:
    """Returns a line for each key whose change alters a run that began with the configuration `then`; both as asdict gives them,
    of this kind.

    A key that `then` does not know had its default: an older version began the run. `moved` tells of what has another name too.
    """
    lines = []
    for key, (item, _) in knobs(kind):
        old, new = then, now
        for name in key.split("."):
            old, new = old.get(name, default_of(item)) if isinstance(old, dict) else default_of(item), new[name]
        if old != new and item.metadata["may_change"] in (FIXED, *[MOVED] * moved):
            lines.append(f"{key}: {old!r} then, {new!r} now")
    return lines


def expand_homes(config: Config) -> None:
    """Puts the user's folder in the place of a leading ~, which a shell does not do behind an equals sign."""
    for key, _ in knobs(type(config)):
        value = get_key(config, key)
        if isinstance(value, str):
            set_key(config, key, os.path.expanduser(value))
        elif isinstance(value, list):
            set_key(config, key, [os.path.expanduser(item) for item in value])


def load_config(argv: list[str], world_size: int, more_checks: typing.Callable[[Config], list[str]] | None = None,
                *kinds: type[Config]) -> Config:
    """`["--config", "configs/llama.py", "lr=1e-5", ...]` → a checked Config, or one of other kinds. Raises ConfigError with all
    that is wrong.

    more_checks returns what else is wrong with it, one line each.
    """
    path, overrides, rest = "", {}, list(argv)
    errors = []
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.lstrip("+-").partition("=")
        if key == "config":
            path = os.path.expanduser(text if equals else rest.pop(0) if rest else "")
        elif equals:
            if overrides.setdefault(key, text) != text:
                errors.append(f"{key} is given twice: {brief(overrides[key])} and {brief(text)}")
        elif argument.startswith("-") and rest and "=" not in rest[0]:
            errors.append(f"{argument} {rest[0]} must be written {key}={rest.pop(0)}")
        else:
            errors.append(f"{argument!r} is not of the form key=value")
    if not path:
        raise ConfigError("\n".join(["--config is required: a file such as configs/tiny.py", *errors]))
    if not os.path.isfile(path):
        raise ConfigError("\n".join([f"--config {path}: no such file", *errors]))
    try:
        config = runpy.run_path(path).get("config")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the file does wrong, be it to exit, the user is told which file
        raise ConfigError("\n".join([f"--config {path}: {type(error).__name__}: {one_line(error)}", *errors])) from error
    if type(config) not in (kinds or [Config]):
        names = " or ".join(f"`config = {kind.__name__}(...)`" for kind in kinds or [Config])
        raise ConfigError("\n".join([f"--config {path}: the file must set {names}", *errors]))

    config = copy.deepcopy(config)  # a file may take over another one's, which Python keeps for the next load
    known, wrong_types = dict(knobs(type(config))), list(wrong_values(config))
    errors += [f"{path}: {line}" for line in wrong_types]
    for key, text in overrides.items():
        if key not in known:
            errors.append(f"unknown key {key!r}{hint_of_halos(key) or nearest(key, known)}")
            continue
        try:
            value = parse(text, known[key][1])
        except (ValueError, RecursionError):  # the latter of JSON that is nested deeply
            errors.append(f"{key}={brief(repr(text))} must be {type_name(known[key][1])}")
            continue
        if not wrong_types:
            set_key(config, key, value)
    if not wrong_types:  # the checks of the values take the right types for granted
        expand_homes(config)
        errors += [f"{key}={text} needs {switch}=true" for key, text in overrides.items() for part, switch in SWITCHES.items()
                   if key.startswith(part) and not get_key(config, switch)]
        errors += check(config, world_size) + (more_checks(config) if more_checks else [])
    if errors:
        raise ConfigError("\n".join(dict.fromkeys(errors)))
    config.model.max_prompt_length = config.model.max_prompt_length or config.model.max_length // 2
    return config


def read_command_line(more_checks: typing.Callable[[Config], list[str]], kind: type[Config] = Config) -> Config:
    """Returns what the script's arguments ask for, or ends the process: by --help, or with all that is wrong with them."""
    if {"--help", "-h"} & set(sys.argv):
        with contextlib.suppress(BrokenPipeError):
            print(usage(kind), flush=True)
        os._exit(0)  # Python itself would complain of the pipe that `head` has closed
    handle_signals(end_early)
    gc.disable()  # else it looks through what the imports make, hundreds of times: a fifth of their time; log.run enables it
    try:
        return load_config(sys.argv[1:], int(os.environ.get("WORLD_SIZE", 1)), more_checks, kind)
    except ConfigError as error:
        fail(error)
    finally:
        PARTS["configuration"] = time.perf_counter() - STARTED


def usage(kind: type[Config] = Config) -> str:
    """Returns every key with its default, type and meaning."""
    script = os.path.basename(sys.argv[0])
    lines = [f"torchrun --nproc_per_node=N {script} --config configs/FILE.py [key=value ...]", ""]
    for key, (item, hint) in knobs(kind):
        meaning, (bounds, _) = item.metadata["meaning"], item.metadata["bounds"]
        shown = "required" if meaning.startswith("required") else json.dumps(default_of(item))
        lines += [f"  {key} = {shown}  ({', '.join(filter(None, (type_name(hint), bounds)))})",
                  f"      {meaning.removeprefix('required: ')}"]
    return "\n".join(lines)


def knobs(cls: type, prefix: str = "") -> typing.Iterator[tuple[str, tuple[dataclasses.Field, object]]]:
    """Yields (dotted key, (field, type)) of every knob."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from knobs(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, (item, hints[item.name])


def default_of(item: dataclasses.Field):
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def get_key(config, key: str):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def set_key(config, key: str, value) -> None:
    *parents, name = key.split(".")
    setattr(get_key(config, ".".join(parents)) if parents else config, name, value)


def hint_of_halos(key: str) -> str:
    """Returns what a key of HALOs, from which many a command line comes, is called here; or "" if it is none."""
    with open(os.path.join(os.path.dirname(__file__), "halos.json"), encoding="utf-8") as file:
        names = json.load(file)
    hint = names.get(key) or names.get(key.rpartition(".")[0] + ".")  # a whole group of keys has a dot behind it
    return f": {hint}" if hint else ""


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
        items = re.findall(r"""\s*("[^"]*"|'[^']*'|[^,]*?)\s*(?:,|$)""", text.removeprefix("[").removesuffix("]"))
        return [item[1:-1] if item[0] == item[-1] and item[0] in "'\"" and item[1:] else item for item in items if item]
    value = hint(text)
    if hint is float and not math.isfinite(value):
        raise ValueError(text)
    return value


def wrong_values(config, prefix: str = "") -> typing.Iterator[str]:
    """Yields a line for each value that is not of its key's type."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(hint) and isinstance(value, hint):
            yield from wrong_values(value, f"{prefix}{name}.")
        elif not fits(value, hint):
            yield f"{prefix}{name}={brief(repr(value))} must be {type_name(hint)}"


def fits(value, hint) -> bool:
    """Whether the value is of the type; an int serves as a float, a bool does not serve as an int, nor infinity as either."""
    if isinstance(hint, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if hint in (int, float):
        return type(value) is int or hint is float and isinstance(value, float) and math.isfinite(value)
    return isinstance(value, hint)


def type_name(hint) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join("null" if option is type(None) else type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return "a list, [a,b]"
    if dataclasses.is_dataclass(hint):
        return f"a {hint.__name__}(...)"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text", dict: "a JSON object"}[hint]
