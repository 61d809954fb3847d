"""The model as transformers has it: tokenizer, weights read by slices, generation, attention over packed documents."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils import cached_file

from configs.base import ModelConfig
from fsdp_utils import ModelError, failing_together, find_blocks, gather_all, is_finite
from logps import target_logps
from lora import NEW_ROWS, add_lora, find_packable, load_adapter, quantise_linears
from nf4 import quantise
from script import one_line, timed

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja", "chat_template.json")
SLICE = 2 ** 14  # bytes
# For a tokenizer that brings none: roles are lines of text, so no token is new, and an answer ends where every engine stops
PLAIN_TEMPLATE = """\
{%- for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}\
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""


@timed("tokenizer")
def load_tokenizer(name_or_path: str, cache_dir: str, more_tokens: Iterable[str] = (),
                   chat_template: str = "") -> transformers.PreTrainedTokenizerBase:
    """Returns the tokenizer, with a pad token (eos if it has none) and the chat template of that file, its own, or a plain one.

    `more_tokens` are added, a token each, but not as special ones, of which a text must not hold any.
    Raises ModelError where there is none, or none without running code that came with it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, cache_dir=cache_dir, trust_remote_code=False)
    except Exception as error:  # what is wrong in a folder's files may raise anything
        raise ModelError(f"{name_or_path}: no tokenizer can be loaded: {reason(error)}") from error
    if not tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}:  # transformers' own, where a folder holds none
        raise ModelError(f"{name_or_path}: there is no tokenizer")
    tokenizer.template_source = chat_template or name_or_path  # for messages
    tokenizer.size_as_loaded, tokenizer.has_new_template = len(tokenizer), bool(chat_template) or not tokenizer.chat_template
    if chat_template:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        if not tokenizer.eos_token:
            raise ModelError(f"{name_or_path}: the tokenizer has neither a chat template nor an eos_token to end an answer with; "
                             "name a template by model.chat_template=FILE")
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)  # masked by length, so any will do
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in more_tokens])
    return tokenizer


def reason(error: Exception) -> str:
    """Returns in a line why transformers could not load something, without advice that is of no use here."""
    text = one_line(error)
    if "custom code" in text or "trust_remote_code" in text:
        return "it needs code that came with it, which is never run here"
    if "tiktoken" in text:  # for which transformers takes whatever is no sentencepiece model
        return "its tokenizer.model is damaged, or tiktoken's: take a tokenizer.json"
    text = re.sub(r"^Unrecognized configuration class <class '.*\.(\w+)'>.*", r"\1 is that of another kind of model", text)
    text = re.sub(r"^(Class v|V)alidation error for [^:]*: \w+: |[.:]? (Model type should be|Should contain) one of .*", "", text)
    return f"it knows no {text}" if isinstance(error, KeyError) else text


def base_of(settings: dict) -> str:
    """Returns where a run's weights come from, by its model's settings; "" where random ones are made."""
    return settings["load_from"] or ("" if settings["random_init"] else settings["name_or_path"])


def check_model(settings: dict, tokenizer, cache_dir: str) -> None:
    """Raises ModelError where there is no such model, or it has no blocks, or no layer for what its settings ask of LoRA."""
    base = base_of(settings)
    try:
        if base:
            model = make_outline(base, cache_dir)
        else:
            with Unallocated():
                model = make_new_model(settings["random_init"], tokenizer, torch.float32)
    except ModelError:
        raise
    except Exception as error:  # each model's configuration has checks of its own
        raise ModelError(f"{base}: no causal language model can be loaded: {reason(error)}") from error
    find_blocks(model)
    if settings["peft"]["quantise"]:
        find_packable(model)
    if settings["use_peft"] and not settings["load_lora_from"]:
        add_lora(model, 1, 1, 0.0, settings["peft"]["target_modules"])


@timed("model")
def load_model(name_or_path: str, random_init: dict | None, tokenizer, stop_ids: list[int], cache_dir: str,
               dtype: torch.dtype = torch.float32, fuse: bool = False, sliced: bool = False):
    """Returns a causal LM with a row of the embeddings for every token, that stops generating at stop_ids.

    `random_init` describes a new one (a transformers config; its vocabulary is the tokenizer's), instead of loading it.
    What is trained must be fp32: half of AdamW's steps are too small to change a bf16 weight. `fuse` is linear_logps'.
    If `sliced`, its weights are left to be read when it is sharded, from model.weight_files, {name: (safetensors file, name
    there)}, where the files hold each as the model does; that is empty where the weights are here already. Raises ModelError.
    """
    weight_files, kept, base_dtype = {}, {}, None
    if random_init:
        model = make_new_model(random_init, tokenizer, dtype)
        old_size = model.get_input_embeddings().num_embeddings
    else:
        try:
            if sliced:
                model, weight_files, kept, old_size = make_empty_model(name_or_path, cache_dir, dtype, len(tokenizer))
            if not weight_files:
                model, loaded = AutoModelForCausalLM.from_pretrained(
                    name_or_path, dtype=dtype, cache_dir=cache_dir, trust_remote_code=False, output_loading_info=True,
                    use_safetensors=True)  # never a pickle
                others = loaded["unexpected_keys"] if not is_part(model, name_or_path, cache_dir) else []
                for what, keys in (("missing", loaded["missing_keys"]), ("not this model's", others)):
                    if keys:
                        raise ModelError(f"{name_or_path}: {len(keys)} weights are {what}, the first is {min(keys)}")
                if broken := [name for name, weight in model.named_parameters() if not is_finite(weight.data)]:
                    raise ModelError(f"{name_or_path}: {broken[0]} holds values that are not finite")
                old_size = grow(model, len(tokenizer))
                base_dtype = AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir, trust_remote_code=False).dtype
        except ModelError:
            raise
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{name_or_path}: no causal language model can be loaded: {reason(error)}") from error

    model.weight_files, model.kept_weights, model.base_dtype = weight_files, kept, base_dtype
    return set_up(model, tokenizer, stop_ids, old_size, fuse)


def set_up(model, tokenizer, stop_ids: list[int], old_size: int, fuse: bool):
    """Gives a model, which had old_size rows of embeddings before it grew, what the other modules read of it; returns it."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # transformers 5.17's sdpa leaves the softcap out
    generation = model.generation_config
    stops = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    generation.eos_token_id = sorted({stop for stop in [*stops, *stop_ids] if stop is not None})
    generation.pad_token_id = tokenizer.pad_token_id
    if any(value is not None for value in (generation.temperature, generation.top_p, generation.top_k)):
        generation.do_sample = True  # transformers refuses to save sampling settings that are switched off
    model.target_logps = functools.partial(target_logps, model, fuse=fuse)
    model.given_weights = set()  # by an adapter, and not to be read from the files
    model.uses_own_logits = False  # until check_head finds that it must
    model.n_new_rows = model.get_input_embeddings().num_embeddings - old_size  # of its embeddings, for tokens new to it
    model.own_attention = model.config._attn_implementation
    return model


def make_model(config: ModelConfig, tokenizer, stop_ids: list[int], cache_dir: str, device: torch.device,
               load: Callable = load_model):
    """Returns the model to train, with adapters if they are what is trained; to be sharded, and then filled by load_weights."""
    # A frozen base is kept in the precision it computes in; what is trained is fp32 in any case.
    model = load(config.load_from or config.name_or_path, None if config.load_from else config.random_init, tokenizer, stop_ids,
                 cache_dir, compute_dtype(device) if config.use_peft else torch.float32, sliced=True,
                 fuse=config.compile and device.type == "cuda")
    peft = dataclasses.asdict(config.peft)
    if peft.pop("quantise"):
        quantise_linears(model)
    if config.load_lora_from:
        load_adapter(model, config.load_lora_from, config.peft.lora_dropout, model.n_new_rows)
    elif config.use_peft:
        add_lora(model, **peft, n_new_rows=model.n_new_rows)
    return model.train()


def make_new_model(description: dict, tokenizer, dtype: torch.dtype):
    try:
        known = AutoConfig.for_model(description["model_type"])
        if unknown := [key for key in description if not hasattr(known, key) and key != "rope_theta"]:
            raise ValueError(f"{known.model_type} knows no {', '.join(unknown)}")
        if description.get("vocab_size", len(tokenizer)) < len(tokenizer):
            raise ValueError(f"vocab_size={description['vocab_size']} is less than the tokenizer's {len(tokenizer):,} tokens")
        config = AutoConfig.for_model(**{"vocab_size": len(tokenizer)} | description)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # each model's configuration has checks of its own
        raise ModelError(f"model.random_init: {reason(error)}") from error


class Unallocated(TorchFunctionMode):
    """Puts what torch.empty makes, as the weights of linears and embeddings, on the meta device; buffers come out as ever."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **{**(kwargs or {}), **({"device": "meta"} if function is torch.empty else {})})


def make_outline(name_or_path: str, cache_dir: str, dtype: torch.dtype = torch.float32):
    """Returns the model that a configuration describes, without memory for its weights."""
    config = AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir, trust_remote_code=False)
    with Unallocated():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def make_empty_model(name_or_path: str, cache_dir: str, dtype: torch.dtype, vocabulary: int):
    """Returns (model, {name: (file, name in it)} of its weights, {name: file} of those that are not its, its rows of embeddings
    before it grew). The second is empty where transformers must load them: cut otherwise in the files than in the model.

    A model that is part of another, as its text, leaves weights in the files that are not its; FINAL has them all the same.
    """
    files = find_weights(name_or_path, cache_dir)
    model = make_outline(name_or_path, cache_dir, dtype).eval()
    if find_file(name_or_path, "generation_config.json", cache_dir):
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, cache_dir=cache_dir)
    conversions = get_model_conversion_mapping(model)
    sources, kept, fits, state, prefix = {}, {}, True, model.state_dict(), f"{model.base_model_prefix}."
    for written, file in files.items():
        name = written
        for conversion in conversions:
            name, matched = conversion.rename_source_key(name)
            fits &= isinstance(conversion, WeightRenaming) or not matched
        name = next((other for other in (name, name.removeprefix(prefix), prefix + name) if other in state), name)
        if name in state:
            sources[name] = file, written
        else:
            kept[written] = file, name
    tied = getattr(model, "all_tied_weights_keys", {})
    ignored = [*(model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq$"]
    others = [name for _, name in kept.values() if not any(re.search(pattern, name) for pattern in ignored)]
    fits &= not others or is_part(model, name_or_path, cache_dir)
    kept = {written: file for written, (file, _) in kept.items()}
    if not fits or not sources.keys() >= state.keys() - tied.keys():
        return model, {}, kept, 0
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    with Unallocated():
        old_size = grow(model, vocabulary)
    for file in set(files.values()):
        with safe_open(file, "pt") as tensors:
            for name, written in ((name, source[1]) for name, source in sources.items() if source[0] == file):
                tensor = tensors.get_slice(written)
                if tensor.get_shape() != shapes[name]:
                    raise ModelError(f"{file}: {written} has the shape {tensor.get_shape()}, the model's is {shapes[name]}")
                if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ModelError(f"{file}: {written} is {tensor.get_dtype()}: quantised weights can't be fine-tuned")
    model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]  # undone when it is saved
    return model, {name: source for name, source in sources.items() if name not in tied}, kept, old_size


def is_part(model, name_or_path: str, cache_dir: str) -> bool:
    """Whether the folder holds a larger model, with vision or audio, of which this is the text."""
    whole = AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir, trust_remote_code=False)
    return whole.model_type != model.config.model_type


@torch.no_grad()
def grow(model, vocabulary: int) -> int:
    """Gives the model a row of embeddings for every token if it has fewer, a multiple of 64 of them; returns how many it had.

    A new row is the mean of the known ones, on every rank alike. Raises ModelError where the model can't grow.
    """
    old_size, model.config_changes = model.get_input_embeddings().num_embeddings, {}
    if vocabulary <= old_size:
        return old_size
    before, config = {name: tensor.shape for name, tensor in model.state_dict().items()}, model.config.get_text_config().to_dict()
    try:
        model.resize_token_embeddings(vocabulary, pad_to_multiple_of=64, mean_resizing=False)
        with Unallocated():
            again = AutoModelForCausalLM.from_config(model.config).state_dict()
    except (AttributeError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"{type(model).__name__} takes no new tokens: {one_line(error)}") from error
    for name, tensor in model.state_dict().items():
        if again[name].shape != tensor.shape:
            raise ModelError(f"{type(model).__name__} takes no new tokens: its configuration does not tell the rows of {name}")
        if tensor.shape != before[name]:
            tensor[old_size:] = tensor[:old_size].mean(0)
    now = model.config.get_text_config().to_dict()
    model.config_changes = {key: value for key, value in now.items() if value != config.get(key)}
    return old_size


def find_file(name_or_path: str, file: str, cache_dir: str) -> str | None:
    """Returns the path of a model's file, which is downloaded if need be; None where there is none."""
    return cached_file(name_or_path, file, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False)


def find_weights(name_or_path: str, cache_dir: str) -> dict[str, str]:
    """Returns {name: safetensors file} of a model's weights, which are downloaded if need be; {} where there are none."""
    find = functools.partial(find_file, name_or_path, cache_dir=cache_dir)
    if index := find("model.safetensors.index.json"):
        weight_map = json.loads(Path(index).read_text())["weight_map"]
        paths = {file: find(file) for file in set(weight_map.values())}
        return {name: paths[file] for name, file in weight_map.items()} if all(paths.values()) else {}
    if not (file := find("model.safetensors")):
        return {}
    with safe_open(file, "pt") as tensors:
        return dict.fromkeys(tensors.keys(), file)


def fingerprints(settings: dict, cache_dir: str) -> dict[str, str]:
    """Returns {file: its size and a checksum} of those that the model, its tokenizer and its adapter begin from.

    Of a file of more than 4 MB the checksum is of 256 slices.
    """
    base = base_of(settings)
    try:
        files = {"config.json": find_file(base, "config.json", cache_dir)} if base else {}
        files |= {Path(file).name: file for file in find_weights(base, cache_dir).values()} if base else {}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{base}: its weights can't be read: {one_line(error)}") from error
    source = settings["tokenizer_name_or_path"] or settings["name_or_path"]
    files |= {name: find_file(source, name, cache_dir) for name in TOKENIZER_FILES}
    if adapter := settings["load_lora_from"]:
        files |= {file.name: str(file) for file in Path(adapter).glob("adapter_*")}
    return {name: fingerprint(file) for name, file in files.items() if file}


def fingerprint(file: str | Path) -> str:
    size = os.path.getsize(file)
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        for start in range(0, size, max(SLICE, size // 256)):
            stream.seek(start)
            digest.update(stream.read(SLICE))
    return f"{size:,} bytes of {digest.hexdigest()[:12]}"


@timed("model")
@torch.no_grad()
def load_weights(model, frozen_only: bool = False) -> None:
    """Fills the weights that load_model has left to be read; of each, every rank reads its own slice.

    (torch's HuggingFaceStorageReader does too, but of all files of the folder, of which another may hold the same names.)
    """
    own, state = dict(model.named_parameters()), model.state_dict()
    sources = {name: source for name, source in model.weight_files.items()
               if name not in model.given_weights and not (frozen_only and name in own and own[name].requires_grad)}
    with tqdm(total=len(sources), desc="loading", unit=" weights", disable=not sources or dist.get_rank() > 0) as bar, \
            failing_together(ModelError):
        for file in sorted({file for file, _ in sources.values()}):
            with safe_open(file, "pt") as tensors:
                for name, written in ((name, source[1]) for name, source in sources.items() if source[0] == file):
                    if not fill(state[name], tensors, written, is_new=name.endswith(NEW_ROWS)) and name in own:
                        raise ModelError(f"{file}: {written} holds values that are not finite")
                    bar.update()


def fill(weight: torch.Tensor, tensors, name: str, is_new: bool) -> bool:
    """Fills this rank's part of a weight by its name in an open file, rows that are not there by their mean, as are all of a new
    weight's. Returns whether all that it holds now is finite.
    """
    source, local, first, device = tensors.get_slice(name), weight, 0, weight.device.type
    if isinstance(weight, DTensor):  # sharded by its first dimension as torch.chunk does, over the mesh's last
        mesh = weight.device_mesh
        device = mesh.device_type  # also of weights that wait on the host
        first = mesh.get_local_rank(mesh.ndim - 1) * math.ceil(len(weight) / mesh.size(mesh.ndim - 1))
        local = weight.to_local()
    if local.dtype == torch.uint8:  # packed: the device quantises a few rows at a time, of which it makes several copies
        finite = True
        for i in range(0, len(local), 1024):
            rows = source[first + i:first + min(i + 1024, len(local))].to(device)
            local[i:i + 1024] = quantise(rows)
            finite &= is_finite(rows)
        return finite
    if not local.ndim:
        local.copy_(tensors.get_tensor(name))
    elif len(local):
        n_known = 0 if is_new else max(0, min(len(local), source.get_shape()[0] - first))
        local[:n_known] = source[first:first + n_known]
        if n_known < len(local):
            local[n_known:] = mean_row(source)
    return is_finite(local)


def mean_row(source) -> torch.Tensor:
    """Returns the mean of the rows of a tensor in a file, of which a few are held at a time."""
    n_rows, *rest = source.get_shape()
    step = max(1, (64 << 20) // (4 * math.prod(rest)))
    return sum(source[start:start + step].double().sum(0) for start in range(0, n_rows, step)) / n_rows


def compute_dtype(device: torch.device) -> torch.dtype:
    """Returns bf16 for a GPU that has it, fp32 for one that only emulates it, more slowly than fp32, and for CPUs."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def pad_left(prompts: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts to be answered → (ids, mask), (B, T) int64: they end together, so that their answers begin together."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    return ids, torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])


@contextlib.contextmanager
def ready_to_generate(model, settings: GenerationConfig) -> Iterator[None]:
    """Puts the model into evaluation, with these settings alone, and with its own attention: the packed one knows no cache."""
    was_training, own_settings, attention = model.training, model.generation_config, model.config._attn_implementation
    config = model.config.get_text_config()
    routers = getattr(config, "output_router_logits", None)
    try:
        model.eval().generation_config = settings  # in the place of the model's own, whose penalties would make greedy less so
        model.set_attn_implementation(model.own_attention)
        if routers:
            config.output_router_logits = False  # transformers' balancing loss takes no cache
        with torch.compiler.set_stance("force_eager"):  # else the few times that a block is compiled anew go to answers' lengths
            yield
    finally:
        if routers:
            config.output_router_logits = routers
        model.generation_config = own_settings
        model.train(was_training).set_attn_implementation(attention)


@torch.no_grad()
def generate(model, prompts: list[list[int]], max_new_tokens: int, batch_size: int = 64, temperature: float = 0.0,
             top_p: float = 1.0, streamer: TextStreamer | None = None) -> list[list[int]]:
    """Ids of prompts → ids of their answers, up to the token that ends them and without it, on every rank.

    Greedily where the temperature is 0. The ranks share the prompts, `batch_size` each at a time, and all must call it.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    stops, pad_id = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad_id,
                                do_sample=bool(sampling), **sampling)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the longest first: memory runs out at once or never
    rounds, answers = range(0, len(order), batch_size * world_size), {}
    with ready_to_generate(model, settings):
        for first in tqdm(rounds, desc="answering", unit=" batches", leave=False, disable=rank > 0 or len(rounds) == 1):
            mine = order[first:first + batch_size * world_size][rank::world_size]
            ids, mask = pad_left([prompts[i] for i in mine] or [[pad_id]], pad_id)
            # A rank that has finished, or has no prompt, goes on with the others: the weights are gathered for every token.
            output = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), streamer=streamer,
                                    synced_gpus=world_size > 1)
            for i, answer in zip(mine, output[:, ids.shape[1]:].tolist()):
                answers[i] = list(itertools.takewhile(lambda token: token not in stops, answer))
    parts = gather_all(answers) if world_size > 1 else [answers]
    return [answer for _, answer in sorted((i, answer) for part in parts for i, answer in part.items())]
