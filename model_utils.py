"""The model as transformers has it: tokenizer, weights read by slices, generation, attention over packed documents."""

import contextlib
import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
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

from configs.base import one_line
from fsdp_utils import ModelError, gather_all, say
from logps import target_logps, whole_batch
from lora import add_lora

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


# For a tokenizer that brings none: roles are lines of text, so no token is new, and an answer ends where every engine stops
PLAIN_TEMPLATE = """\
{%- for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}\
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""


def load_tokenizer(name_or_path: str, cache_dir: str, more_tokens: Iterable[str] = (),
                   chat_template: str = "") -> transformers.PreTrainedTokenizerBase:
    """Returns the tokenizer, with a pad token (eos if it has none) and the chat template of that file, its own, or a plain one.

    `more_tokens` are added, a token each, but not as special ones, of which a text must not hold any.
    Raises ModelError where there is none, or none without running code that came with it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, cache_dir=cache_dir, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{name_or_path}: no tokenizer can be loaded: {one_line(error)}") from error
    tokenizer.template_source = chat_template or name_or_path  # for messages
    tokenizer.size_as_loaded, tokenizer.has_new_template = len(tokenizer), bool(chat_template) or not tokenizer.chat_template
    if chat_template:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        if not tokenizer.eos_token:
            raise ModelError(f"{name_or_path}: the tokenizer has neither a chat template nor an eos_token to end an answer with; "
                             "name a template by model.chat_template=FILE")
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)  # masked by length, so any will do
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in more_tokens])
    return tokenizer


def check_targets(settings: dict, cache_dir: str) -> None:
    """Raises ModelError where there is no such model, or it has no layer for the LoRA that its settings ask for."""
    if not settings["use_peft"] or settings["load_lora_from"] or settings["random_init"]:
        return
    name_or_path = settings["load_from"] or settings["name_or_path"]
    try:
        model = make_outline(name_or_path, cache_dir)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"{name_or_path}: no causal language model can be loaded: {one_line(error)}") from error
    add_lora(model, 1, 1, 0.0, settings["peft"]["target_modules"])


def load_model(name_or_path: str, random_init: dict | None, tokenizer, stop_ids: list[int], cache_dir: str,
               dtype: torch.dtype = torch.float32, fuse: bool = False, sliced: bool = False):
    """Returns a causal LM with a row of the embeddings for every token, that stops generating at stop_ids.

    `random_init` describes a new one (a transformers config; its vocabulary is the tokenizer's), instead of loading it.
    What is trained must be fp32: half of AdamW's steps are too small to change a bf16 weight. `fuse` is linear_logps'.
    If `sliced`, its weights are left to be read when it is sharded, from model.weight_files, {name: (safetensors file, name
    there)}, where the files hold each as the model does; that is empty where the weights are here already. Raises ModelError.
    """
    weight_files, base_dtype = {}, None
    if random_init:
        model = make_new_model(random_init, tokenizer, dtype)
    else:
        try:
            size = len(tokenizer)
            model, weight_files = make_empty_model(name_or_path, cache_dir, dtype, size) if sliced else (None, {})
            if not weight_files:
                model, loaded = AutoModelForCausalLM.from_pretrained(
                    name_or_path, dtype=dtype, cache_dir=cache_dir, trust_remote_code=False, output_loading_info=True,
                    use_safetensors=True)  # never a pickle
                for what, keys in (("missing", loaded["missing_keys"]), ("not this model's", loaded["unexpected_keys"])):
                    if keys:
                        raise ModelError(f"{name_or_path}: {len(keys)} weights are {what}, the first is {min(keys)}")
                base_dtype = AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir, trust_remote_code=False).dtype
        except ModelError:
            raise
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{name_or_path}: no causal language model can be loaded: {one_line(error)}") from error

    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # transformers 5.17's sdpa leaves the softcap out
    old_size = model.get_input_embeddings().num_embeddings
    model.has_new_tokens = len(tokenizer) > old_size
    if model.has_new_tokens:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():  # a new token starts as the mean of the known ones, on every rank alike
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                for tensor in layer.parameters():
                    tensor[old_size:] = tensor[:old_size].mean(0)

    generation = model.generation_config
    stops = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    generation.eos_token_id = sorted({stop for stop in [*stops, *stop_ids] if stop is not None})
    generation.pad_token_id = tokenizer.pad_token_id
    if any(value is not None for value in (generation.temperature, generation.top_p, generation.top_k)):
        generation.do_sample = True  # transformers refuses to save sampling settings that are switched off
    model.target_logps = functools.partial(target_logps, model, fuse=fuse)
    model.weight_files, model.base_dtype = weight_files, base_dtype
    model.own_attention = model.config._attn_implementation
    return model


def make_new_model(description: dict, tokenizer, dtype: torch.dtype):
    try:
        known = AutoConfig.for_model(description["model_type"])
        if unknown := [key for key in description if not hasattr(known, key) and key != "rope_theta"]:
            raise ValueError(f"{known.model_type} knows no {', '.join(unknown)}")
        config = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **description})
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # each model's configuration has checks of its own
        raise ModelError(f"model.random_init: {one_line(error)}") from error


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
    """Returns (model, {name: (file, name in it)} of its weights), the latter empty where they must be loaded by transformers:
    cut otherwise in the files than in the model, or with rows to be added for new tokens."""
    files = find_weights(name_or_path, cache_dir)
    model = make_outline(name_or_path, cache_dir, dtype).eval()
    if find_file(name_or_path, "generation_config.json", cache_dir):
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, cache_dir=cache_dir)
    conversions = get_model_conversion_mapping(model)
    sources, fits = {}, True
    for written, file in files.items():
        name = written
        for conversion in conversions:
            name, matched = conversion.rename_source_key(name)
            fits &= isinstance(conversion, WeightRenaming) or not matched
        sources[name] = file, written
    state = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", {})
    ignored = [*(model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq$"]
    unexpected = [name for name in sources.keys() - state.keys() if not any(re.search(pattern, name) for pattern in ignored)]
    fits &= not unexpected and sources.keys() >= state.keys() - tied.keys()
    if not fits or len(model.get_input_embeddings().weight) < vocabulary:
        return model, {}
    for file in set(files.values()):
        with safe_open(file, "pt") as tensors:
            for name, written in ((name, source[1]) for name, source in sources.items() if source[0] == file and name in state):
                tensor, shape = tensors.get_slice(written), list(state[name].shape)
                if tensor.get_shape() != shape:
                    raise ModelError(f"{file}: {written} has the shape {tensor.get_shape()}, the model's is {shape}")
                if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ModelError(f"{file}: {written} is {tensor.get_dtype()}: quantised weights can't be fine-tuned")
    model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]  # undone when it is saved
    return model, {name: source for name, source in sources.items() if name in state and name not in tied}


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


@torch.no_grad()
def load_weights(model, frozen_only: bool = False) -> None:
    """Fills the weights that load_model has left to be read; of each, every rank reads its own slice.

    (torch's HuggingFaceStorageReader does too, but of all files of the folder, of which another may hold the same names.)
    """
    own, state = dict(model.named_parameters()), model.state_dict()
    sources = {name: source for name, source in model.weight_files.items()
               if not (frozen_only and name in own and own[name].requires_grad)}
    bar = tqdm(total=len(sources), desc="loading", unit=" weights", disable=not sources or dist.get_rank() > 0)
    for file in sorted({file for file, _ in sources.values()}):
        with safe_open(file, "pt") as tensors:
            for name, written in ((name, source[1]) for name, source in sources.items() if source[0] == file):
                source, local, first = tensors.get_slice(written), state[name], 0
                if isinstance(local, DTensor):  # sharded by its first dimension as torch.chunk does, over the mesh's last
                    mesh = local.device_mesh
                    first = mesh.get_local_rank(mesh.ndim - 1) * math.ceil(len(local) / mesh.size(mesh.ndim - 1))
                    local = local.to_local()
                if len(local):
                    local.copy_(source[first:first + len(local)])
                bar.update()
    bar.close()


def compute_dtype(device: torch.device) -> torch.dtype:
    """Returns bf16 for a GPU that has it, fp32 for one that only emulates it, more slowly than fp32, and for CPUs."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Packing: documents one after the other in a single row, each of which sees only itself


def document_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, softcap=None,
                       cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None, **kwargs):
    """Causal attention in which no document sees another, for transformers' AttentionInterface.

    query (1, heads, T, D), key and value (1, kv heads, T, D); the documents are tokens cu_seq_lens_q[i] up to
    cu_seq_lens_q[i + 1], and likewise of the keys. A sliding window of w lets a token see itself and the w - 1 before it;
    softcap bounds the scores (Gemma 2). Returns (1, T, heads, D) and None for the probabilities, which are never made.
    """
    if attention_mask is not None and attention_mask != sliding_window:
        raise ValueError("only its mask knows of the window")
    groups = query.shape[1] // key.shape[1]
    # flash attention takes two types, and heads of these sizes
    fits = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] in range(8, 257, 8)
    if query.is_cuda and varlen_attn and fits and not softcap and not dropout:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        window = (sliding_window - 1 if sliding_window else -1, 0)  # none to the right: causal
        out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scale=scaling, window_size=window)
        return out.unsqueeze(0), None
    return attend_apart(query, key, value, cu_seq_lens_q, dropout, scaling, sliding_window, softcap), None


@torch.compiler.disable  # else it is compiled anew for every number of documents
def attend_apart(query, key, value, ends, dropout, scaling, sliding_window, softcap):
    """document_attention on any device and in any dtype, one document after the other."""
    groups, lengths, outs = query.shape[1] // key.shape[1], ends.diff().tolist(), []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value))):
        length = q.shape[2]
        mask = None
        if softcap or (sliding_window and length > sliding_window):
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
            mask = mask.triu(1 - sliding_window) if sliding_window else mask
        if softcap:
            scores = softcap * torch.tanh(q @ k.repeat_interleave(groups, 1).transpose(2, 3) * (scaling / softcap))
            probabilities = scores.masked_fill(~mask, -math.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
            out = F.dropout(probabilities, dropout) @ v.repeat_interleave(groups, 1)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scaling,
                                                 enable_gqa=groups > 1)
        outs.append(out)
    return torch.cat(outs, dim=2).transpose(1, 2)


def mask_of_documents(*args, local_size: int | None = None, **kwargs) -> int | None:
    """What a model gets for a mask, and hands on to document_attention: nothing, or the window that it would have had."""
    return local_size


transformers.AttentionInterface.register("documents", document_attention)
transformers.AttentionMaskInterface.register("documents", mask_of_documents)


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def enable_packing(model, device: torch.device) -> bool:
    """Switches the model to document_attention; where it can't be packed, leaves it as it was and says why.

    Whether it can is tried: two documents in one row must come out as they do apart, up to a hundredth of what they do
    when nothing keeps them apart. Models that look at their neighbours otherwise than by attention (state spaces,
    convolutions) do not pass, nor those whose attention can't be replaced. All ranks must call it.
    """
    if not model._supports_attention_backend:
        say(f"not packed: {type(model).__name__} has an attention of its own")
        return False
    ids, was_training = torch.arange(24, device=device)[None] % model.config.get_text_config().vocab_size, model.training
    both = whole_batch(ids, 8, 24)
    model.eval()
    try:
        apart = torch.cat([model.target_logps(whole_batch(part))[0] for part in ids.split([8, 16], dim=1)])
        model.set_attn_implementation("documents")
        packed, _ = model.target_logps(both)
        mixed, _ = model.target_logps({**both, "document_ends": both["document_ends"][[0, 2]], "longest": 24})
        problem = "mixes documents" if (packed - apart).abs().max() > 0.01 * (mixed - apart).abs().max() else None
    except (TypeError, ValueError, AttributeError) as error:
        problem = f"takes no other attention ({one_line(error)})"
    model.train(was_training)
    if problem:
        model.set_attn_implementation(model.own_attention)
        say(f"not packed: {type(model).__name__} {problem}")
    return not problem


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
    try:
        model.eval().generation_config = settings  # in the place of the model's own, whose penalties would make greedy less so
        model.set_attn_implementation(model.own_attention)
        yield
    finally:
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
