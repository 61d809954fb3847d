"""The model: its tokenizer and weights as transformers has them, LoRA, attention over packed documents, the log-prob kernel."""

import functools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils import cached_file

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


class ModelError(ValueError):
    """A model or tokenizer that can't be used: one line that names it."""


# ChatML, for a tokenizer that brings no chat template of its own
CHATML = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def load_tokenizer(name_or_path: str, cache_dir: str) -> transformers.PreTrainedTokenizerBase:
    """Returns the tokenizer, with a chat template (ChatML if it brings none) and a pad token (eos if it has none).

    Raises ModelError where there is none, or none without running code that came with it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, cache_dir=cache_dir, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{name_or_path}: no tokenizer can be loaded: {one_line(error)}") from error
    if not tokenizer.chat_template:
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + CHATML
        # sentencepiece's user-defined symbols pass for special tokens too, but their flag tells that they are text
        text = {token.content for token in tokenizer.added_tokens_decoder.values() if not token.special}
        special = [token for token in tokenizer.all_special_tokens if token not in text]
        tokenizer.add_special_tokens({"additional_special_tokens": [*special, "<|im_start|>", "<|im_end|>"]})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)  # masked by length, so any will do
    return tokenizer


def load_model(name_or_path: str, random_init: dict | None, tokenizer, stop_id: int | None, cache_dir: str,
               dtype: torch.dtype = torch.float32, fuse: bool = False, sliced: bool = False):
    """Returns a causal LM with a row of the embeddings for every token, that stops generating at stop_id.

    `random_init` describes a new one (a transformers config; its vocabulary is the tokenizer's), instead of loading it.
    What is trained must be fp32: half of AdamW's steps are too small to change a bf16 weight. `fuse` is linear_logps'.
    If `sliced`, its weights are left to be read when it is sharded, from model.weight_files, {name: (safetensors file, name
    there)}, where the files hold each as the model does; that is empty where the weights are here already. Raises ModelError.
    """
    weight_files = {}
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
    generation.eos_token_id = sorted({stop for stop in [*stops, stop_id] if stop is not None})
    generation.pad_token_id = tokenizer.pad_token_id
    if any(value is not None for value in (generation.temperature, generation.top_p, generation.top_k)):
        generation.do_sample = True  # transformers refuses to save sampling settings that are switched off
    model.target_logps = functools.partial(target_logps, model, fuse=fuse)
    model.weight_files = weight_files
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


def make_empty_model(name_or_path: str, cache_dir: str, dtype: torch.dtype, vocabulary: int):
    """Returns (model, {name: (file, name in it)} of its weights), the latter empty where they must be loaded by transformers:
    cut otherwise in the files than in the model, or with rows to be added for new tokens."""
    files = find_weights(name_or_path, cache_dir)
    config = AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir, trust_remote_code=False)
    with Unallocated():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    if cached_file(name_or_path, "generation_config.json", cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False):
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, cache_dir=cache_dir)
    conversions = get_model_conversion_mapping(model)
    places, fits = {}, True
    for written, file in files.items():
        name = written
        for conversion in conversions:
            name, matched = conversion.rename_source_key(name)
            fits &= isinstance(conversion, WeightRenaming) or not matched
        places[name] = file, written
    state = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", {})
    ignored = [*(model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq$"]
    strangers = [name for name in places.keys() - state.keys() if not any(re.search(pattern, name) for pattern in ignored)]
    fits &= not strangers and places.keys() >= state.keys() - tied.keys()
    if not fits or len(model.get_input_embeddings().weight) < vocabulary:
        return model, {}
    for file in set(files.values()):
        with safe_open(file, "pt") as tensors:
            for name, written in ((name, place[1]) for name, place in places.items() if place[0] == file and name in state):
                tensor, shape = tensors.get_slice(written), list(state[name].shape)
                if tensor.get_shape() != shape:
                    raise ModelError(f"{file}: {written} has the shape {tensor.get_shape()}, the model's is {shape}")
                if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ModelError(f"{file}: {written} is {tensor.get_dtype()}: quantised weights can't be fine-tuned")
    model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]  # undone when it is saved
    return model, {name: place for name, place in places.items() if name in state and name not in tied}


def find_weights(name_or_path: str, cache_dir: str) -> dict[str, str]:
    """Returns {name: safetensors file} of a model's weights, which are downloaded if need be; {} where there are none."""
    find = functools.partial(cached_file, name_or_path, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False)
    if index := find("model.safetensors.index.json"):
        weight_map = json.loads(Path(index).read_text())["weight_map"]
        paths = {file: find(file) for file in set(weight_map.values())}
        return {name: paths[file] for name, file in weight_map.items()} if all(paths.values()) else {}
    if not (file := find("model.safetensors")):
        return {}
    with safe_open(file, "pt") as tensors:
        return dict.fromkeys(tensors.keys(), file)


def save_model(folder: Path, model, parts: Iterable[dict[str, torch.Tensor]]) -> None:
    """Writes a state dict that comes in parts, tied weights once, as transformers does: safetensors and configurations."""
    files = []
    for part in parts:
        model.save_pretrained(folder, state_dict=part, max_shard_size="10TB")
        files.append((folder / "model.safetensors").rename(folder / f"part-{len(files)}.safetensors"))
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    weight_map, total = {}, 0
    for i, file in enumerate(files, 1):
        file = file.rename(folder / f"model-{i:05}-of-{len(files):05}.safetensors")
        total += file.stat().st_size
        with safe_open(file, "pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), file.name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def count_flops(model) -> tuple[float, float, float]:
    """Returns what a training step needs of FLOPs for each (token, target, squared document length), the lengths summed.

    A weight of a matrix takes 2 in the forward, 2 for the gradient of its input, and 2 for its own if it is trained. The
    head's take them for targets only. Attention takes 2 * 2 * length² / 2 * width in the forward and twice that after it.
    """
    config, head, embeddings = model.config.get_text_config(), model.get_output_embeddings().weight, model.get_input_embeddings()
    heads = getattr(config, "num_attention_heads", 0)  # a state space model has none
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0

    def flops(weight) -> int:
        return weight.numel() * (6 if weight.requires_grad else 4)

    body = sum(flops(weight) for weight in model.parameters()
               if weight.ndim == 2 and weight is not head and weight is not embeddings.weight)
    return body, flops(head), 6 * config.num_hidden_layers * width


def compute_dtype(device: torch.device) -> torch.dtype:
    """Returns bf16 for a GPU that has it, fp32 for one that only emulates it, more slowly than fp32, and for CPUs."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# LoRA: low-rank adapters beside frozen weights, in files that PEFT reads and writes


class LoRALinear(nn.Linear):
    """A frozen linear layer and a low-rank update of it that is trained: W x + b + s B A dropout(x)

    W (out, in) and b as they were, A (r, in), B (out, r), s = alpha / r, or alpha / sqrt(r) if rslora (Kalajdzievski 2023).
    A starts at random and B at zero, so that the first forward is the base model's, while B's gradient is not zero.
    Only A and B have gradients and optimizer state: r (in + out) numbers instead of in * out. Hu et al. 2021, section 4.1.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float, rslora: bool = False):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight, self.bias = base.in_features, base.out_features, base.weight, base.bias
        self.lora_A = nn.Linear(base.in_features, r, bias=False)  # nn.Linear's own start: Kaiming-uniform
        self.lora_B = nn.Linear(r, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / (math.sqrt(r) if rslora else r)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropout = self.dropout.p if self.training else 0.0
        low = DropoutLinear.apply(x, self.lora_A.weight, dropout) if dropout else self.lora_A(x)
        return F.linear(x, self.weight, self.bias) + self.lora_B(low * self.scaling)  # scaled where it is small


class DropoutLinear(torch.autograd.Function):
    """dropout(x) @ A.T, which keeps for the backward x, held by others anyway, and the mask at a byte a number.

    As two functions they would keep dropout(x) too, and on a CPU the mask in x's dtype: for each of a block's seven linears
    anew, more than all the rest of the block keeps.
    """

    @staticmethod
    def forward(ctx, x, a, p):
        kept = draw_kept(x, p)
        ctx.save_for_backward(x, a, kept)
        ctx.scale = 1 / (1 - p)
        return F.linear(x * kept, a) * ctx.scale

    @staticmethod
    def backward(ctx, grad):
        x, a, kept = ctx.saved_tensors
        grad = grad * ctx.scale
        grad_x = (grad @ a).mul_(kept) if ctx.needs_input_grad[0] else None
        return grad_x, grad.flatten(0, -2).T @ (x * kept).flatten(0, -2), None


def draw_kept(x: torch.Tensor, p: float) -> torch.Tensor:
    """Returns what a dropout of p keeps, a mask of x's shape, each number of which is True with probability 1 - p.

    A CPU draws one number after the other, which takes longer than the matmuls of a small adapter. So there 64 random bits are
    used for four of them, and p is rounded to a 65,536th.
    """
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)
    return (bits[:x.numel()] >= round(p * 2**16) - 2**15).view(x.shape)


def add_lora(model, r: int, alpha: float, dropout: float, target_modules: str | list[str], rslora: bool = False,
             train_embeddings: bool = False) -> None:
    """Freezes the model and puts a LoRALinear in the place of each target, before the model is sharded.

    target_modules: "all-linear" (each linear but the head), or names, whole or their last parts (q_proj). Raises ModelError
    where one matches nothing. `train_embeddings`, for tokens that are new to the model, trains embeddings and head whole.
    """
    head = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    if not linears:
        raise ModelError(f"model.peft: {type(model).__name__} has no nn.Linear to adapt (GPT-2's Conv1D is not supported)")
    if target_modules == "all-linear":
        target_modules = list(linears)
    targets = {}
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        matching = {name: linear for name, linear in linears.items() if f".{name}".endswith(f".{target}")}
        if not matching:
            there = sorted({name.rpartition(".")[2] for name in linears})
            raise ModelError(f"model.peft.target_modules: no linear layer is named {target!r}; there are {', '.join(there)}")
        targets |= matching
    model.requires_grad_(False)
    for name, linear in targets.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(linear, r, alpha, dropout, rslora))
    short = {name.rpartition(".")[2] for name in targets}
    exact = all(name in targets for name in linears if name.rpartition(".")[2] in short)
    model.lora_config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora,
        "target_modules": sorted(short if exact else targets),
        "base_model_name_or_path": model.name_or_path, "bias": "none", "modules_to_save": None, "inference_mode": True}
    if train_embeddings:
        embeddings = model.get_input_embeddings()
        tied = head.weight is embeddings.weight
        layers = [name for name, module in model.named_modules() if module is embeddings or module is head and not tied]
        for name in layers:
            model.get_submodule(name).float().requires_grad_()
        model.lora_config |= {"modules_to_save": sorted(name.rpartition(".")[2] for name in layers), "ensure_weight_tying": tied}


def lora_names(weights: dict) -> list[str]:
    """The names, in a state dict, of the layers that have an adapter."""
    return [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]


def merge_lora(model, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with adapters → the plain model's: W + s B A, in fp32 and rounded once to W's dtype."""
    merged = {name: tensor for name, tensor in weights.items() if ".lora_" not in name}
    for name in lora_names(weights):
        a, b, w = (weights[f"{name}.{part}"].float() for part in ("lora_A.weight", "lora_B.weight", "weight"))
        merged[f"{name}.weight"] = w.addmm(b, a, alpha=model.get_submodule(name).scaling).to(weights[f"{name}.weight"].dtype)
    return merged


def save_adapter(folder: Path, model, weights: dict[str, torch.Tensor]) -> None:
    """Writes the trained part of a state dict as PEFT does: adapter_config.json, adapter_model.safetensors."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(model.lora_config, indent=2))
    trained = {name: weights[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    for tied, source in getattr(model, "all_tied_weights_keys", {}).items():
        if source in trained:
            trained[tied] = trained[source].clone()  # PEFT looks for both
    save_file({f"base_model.model.{name}": tensor.contiguous() for name, tensor in trained.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(folder: str, model, dropout: float, train_embeddings: bool = False) -> None:
    """Adds the adapter of ours or of PEFT's that lies in the folder, with its own rank, scale and targets. Raises ModelError."""
    try:
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        weights = load_file(Path(folder, "adapter_model.safetensors"))
        r, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder}: no adapter can be loaded: {type(error).__name__}: {one_line(error)}") from error
    odd = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "fan_in_fan_out", "lora_bias",
                           "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_bdlora",
                           "arrow_config", "kasa_config", "layer_replication") if config.get(key)]
    if str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        odd.append("init_lora_weights")  # these change the base's weights too
    weights = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or odd or r < 1 or not lora_names(weights):
        raise ModelError(f"{folder}: not a plain LoRA adapter: {', '.join(odd) or 'adapter_config.json'} is not supported")
    # Of a layer trained whole PEFT writes up to three copies, and both names where it is tied.
    weights = {name: tensor for name, tensor in weights.items()
               if ".modules_to_save." not in name and ".original_module." not in name}
    for tied, source in getattr(model, "all_tied_weights_keys", {}).items():
        if tied in weights and source in weights and torch.equal(weights[tied], weights[source]):
            del weights[tied]
    try:
        add_lora(model, r, alpha, dropout, lora_names(weights), config.get("use_rslora", False),
                 train_embeddings or bool(config.get("modules_to_save")))
    except ModelError as error:
        raise ModelError(f"{folder}: the adapter does not fit the model: {error}") from error
    own = dict(model.named_parameters())
    trained = {name for name, parameter in own.items() if parameter.requires_grad}
    if trained != set(weights) or any(own[name].shape != weights[name].shape for name in trained):
        wrong = sorted(trained ^ set(weights)) or [name for name in trained if own[name].shape != weights[name].shape]
        raise ModelError(f"{folder}: the adapter does not fit the model: {len(wrong)} tensors, the first is {wrong[0]}")
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


# ---------------------------------------------------------------------------------------------------------------------
# Packing: documents one after the other in a single row, each of which sees only itself


def document_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, softcap=None,
                       cu_seq_lens_q=None, max_length_q=None, **kwargs):
    """Causal attention in which no document sees another, for transformers' AttentionInterface.

    query (1, heads, T, D), key and value (1, kv heads, T, D); the documents are tokens cu_seq_lens_q[i] up to
    cu_seq_lens_q[i + 1]. A sliding window of w lets a token see itself and the w - 1 before it; softcap bounds the scores
    (Gemma 2). Returns (1, T, heads, D) and None for the probabilities, which are never made.
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
        out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=window)
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
def enable_packing(model, device: torch.device) -> str:
    """Switches the model to document_attention; returns "", or why it can't be packed, and leaves it as it was.

    Whether it can is tried: two documents in one row must come out as they do apart, up to a hundredth of what they do
    when nothing keeps them apart. Models that look at their neighbours otherwise than by attention (state spaces,
    convolutions) do not pass, nor those whose attention can't be replaced. All ranks must call it.
    """
    if not model._supports_attention_backend:
        return f"{type(model).__name__} has an attention of its own"
    own_attention, was_training = model.config._attn_implementation, model.training
    ids = torch.arange(24, device=device)[None] % model.config.get_text_config().vocab_size
    positions = torch.cat([torch.arange(8), torch.arange(16)]).to(device)[None]
    targets = torch.tensor([*range(1, 8), *range(9, 24)], device=device)

    def row_of(*ends: int) -> torch.Tensor:
        ends = torch.tensor([0, *ends], dtype=torch.int32, device=device)
        return model.target_logps(ids, ids, targets, position_ids=positions, document_ends=ends, longest=24)

    model.eval()
    try:
        with torch.no_grad():
            apart = torch.cat([model.target_logps(part, part, torch.arange(1, part.shape[1], device=device))
                               for part in ids.split([8, 16], dim=1)])
            model.set_attn_implementation("documents")
            packed, mixed = row_of(8, 24), row_of(24)
        problem = "mixes documents" if (packed - apart).abs().max() > 0.01 * (mixed - apart).abs().max() else ""
    except (TypeError, ValueError, AttributeError) as error:
        problem = f"takes no other attention ({one_line(error)})"
    model.train(was_training)
    if problem:
        model.set_attn_implementation(own_attention)
        return f"{type(model).__name__} {problem}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# The log-prob kernel


def target_logps(model, input_ids, labels, target_positions, attention_mask=None, position_ids=None, document_ends=None,
                 longest=None, fuse=False, balance=False):
    """Log p(target | the tokens before it), (N,) fp32, of the labels at target_positions, flat places in (B, T).

    Only the tokens before a target are projected to the vocabulary. With document_ends (documents + 1,) the row is packed.
    With `balance`, for a mixture of experts whose configuration asks for output_router_logits, (that, its balance_loss).
    A method of the model, so that FSDP2 gathers the head's weight for it as it does for a forward.
    """
    packed = {} if document_ends is None else {"cu_seq_lens_q": document_ends, "cu_seq_lens_k": document_ends,
                                               "max_length_q": longest, "max_length_k": longest}
    output = model.base_model(input_ids=input_ids, attention_mask=None if packed else attention_mask,
                              position_ids=position_ids, use_cache=False, **packed)
    hidden = output.last_hidden_state
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)  # Cohere, Granite
    logps = linear_logps(hidden.flatten(0, 1)[target_positions - 1], head.weight, labels.flatten()[target_positions],
                         head.bias, scale, getattr(config, "final_logit_softcapping", None), uniform=True, fuse=fuse)  # Gemma
    if not balance:
        return logps
    lengths = document_ends.diff() if packed else attention_mask.sum(1)
    router_logits = torch.stack(output.router_logits)[:, attention_mask.flatten().bool()]  # without the padding
    return logps, balance_loss(router_logits, config.num_experts_per_tok, lengths)


def balance_weight(model) -> float:
    """What balance_loss counts for in the loss of a mixture of experts: as in transformers, 0 unless output_router_logits."""
    config = model.config.get_text_config()
    return config.router_aux_loss_coef if getattr(config, "output_router_logits", False) else 0.0


def balance_loss(router_logits: torch.Tensor, top_k: int, lengths: torch.Tensor) -> torch.Tensor:
    """The load balancing loss of each document, times its tokens, and summed. Fedus et al. 2021 (Switch), eq. 4 to 6:

        E * sum over experts of (times it is chosen / tokens) * (sum of its probabilities / tokens)

    over the tokens of all layers, as transformers' load_balancing_loss_func has it. That is no sum over tokens, so that it
    is taken of a document, not of a microbatch: it would depend on how the step is cut up.
    router_logits (layers, T, E) of documents of these lengths, one after the other, T tokens together.
    """
    probabilities = router_logits.float().softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(top_k).indices, 1.0)
    per_token = torch.stack([chosen, probabilities]).mean(1)  # over the layers: (2, T, E)
    documents = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    chosen, probabilities = per_token.new_zeros(2, len(lengths), per_token.shape[2]).index_add(1, documents, per_token)
    return per_token.shape[2] * (chosen * probabilities / lengths[:, None]).sum()


@torch.compiler.set_stance("force_eager")  # compiling what runs once would take longer than it
@torch.no_grad()
def check_head(model, device: torch.device) -> None:
    """Raises ModelError where target_logps is not what the model's own logits give: a head unlike those known here.

    All ranks must call it.
    """
    ids, was_training = torch.arange(8, device=device)[None], model.training
    model.eval()
    logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    try:
        difference = (model.target_logps(ids, ids, torch.arange(1, 8, device=device)) - logps).abs().max().item()
    except AttributeError:
        difference = math.inf
    model.train(was_training)
    if not difference <= 0.02 * (1 + logps.abs().max().item()):  # bf16 may differ by half of that
        raise ModelError(f"{type(model).__name__}: the logits are not hidden states times a head in a way known here")


def linear_logps(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None = None,
                 scale: float = 1.0, softcap: float | None = None, uniform: bool = False, fuse: bool = False) -> torch.Tensor:
    """Log-probabilities of labels under a vocabulary head, without ever holding the (N, V) logits. Equals

        logits = (hidden @ weight.T + bias) * scale                 # then, with a softcap: softcap * tanh(logits / softcap)
        logps = logits.float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)

    hidden (N, H), weight (V, H), bias (V,), all fp32 or all bf16; labels (N,) int64 in [0, V). Returns (N,) fp32.

    With p = softmax(z) of a row's logits z and g the gradient of the loss to its logp:
        logp      = z[label] - log sum exp z
        d/dz      = g (onehot(label) - p)
        d/dhidden = d/dz @ weight
        d/dweight = d/dz.T @ hidden, summed over the rows
    The rows go through in chunks, whose logits become probabilities and then gradients in one preallocated buffer.

    When is the gradient made? If `uniform`, which promises that the loss is c * logps.sum() for some c, at once in the
    forward, while p is at hand, and the backward only multiplies it by c: three matmuls a chunk (logits, hidden, weight).
    With a frozen head likewise, for any g, since g only scales the rows of d/dhidden: two matmuls, and (N, H) is kept.
    Otherwise g must be known first, and the backward makes the logits again: four matmuls.

    `fuse` compiles what lies between the matmuls, which on a GPU would else take as long as they do; a CPU gains nothing by it.
    """
    return LinearLogps.apply(hidden, weight, bias, labels, scale, softcap, uniform, fuse)


class LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap, uniform, fuse):
        ctx.head, ctx.uniform, ctx.spent = (scale, softcap, fuse), uniform, False
        wanted = ctx.needs_input_grad[:3]
        ctx.made = any(wanted) and (uniform or not any(wanted[1:]))
        logps, *grads = sweep(hidden, weight, bias, labels, *ctx.head, None, wanted if ctx.made else (False,) * 3)
        ctx.save_for_backward(*(grads if ctx.made else (hidden, weight, bias, labels)))
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        if not ctx.made:
            _, *grads = sweep(*ctx.saved_tensors, *ctx.head, grad_logps, ctx.needs_input_grad[:3])
        elif ctx.uniform:
            if grad_logps.numel() > 1 and grad_logps.stride(0) != 0:  # what sum() hands back is one number, expanded
                raise RuntimeError("linear_logps(uniform=True) takes a loss of c * logps.sum() only: write logps.mean() "
                                   "as logps.sum() / n, and set uniform=False where tokens weigh differently")
            if ctx.spent:
                raise RuntimeError("linear_logps(uniform=True) keeps its gradients for one backward, which scales them in place")
            ctx.spent = True
            c = grad_logps[:1].sum()  # 0 where there are no rows
            grads = [None if grad is None else grad.mul_(c) for grad in ctx.saved_tensors]
        else:
            grads = [ctx.saved_tensors[0] * grad_logps[:, None].to(ctx.saved_tensors[0].dtype), None, None]
        return *grads, None, None, None, None, None


def sweep(hidden, weight, bias, labels, scale, softcap, fuse, grad_logps, wanted):
    """One pass over the rows in chunks: (logps, d/dhidden, d/dweight, d/dbias), None for the gradients not wanted.

    grad_logps (N,) is g above; None stands for ones.
    """
    (n_rows, _), vocabulary, fp32 = hidden.shape, len(weight), torch.promote_types(hidden.dtype, torch.float32)
    size = chunk_rows(hidden, vocabulary)
    # On a CPU the matmuls are faster where the logits lie column by column.
    logits = torch.empty_strided((size, vocabulary), (vocabulary, 1) if hidden.is_cuda else (1, size), dtype=fp32,
                                 device=hidden.device)
    logps = hidden.new_empty(n_rows, dtype=fp32)
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=fp32) if wanted[1] else None
    grad_bias = torch.zeros_like(bias, dtype=fp32) if wanted[2] else None
    differentiate = compiled_differentiate() if fuse else differentiate_in_place

    for start in range(0, n_rows, size):
        rows = slice(start, start + size)
        h, g = hidden[rows], None if grad_logps is None else grad_logps[rows, None]
        z = add_matmul(logits[:len(h)], h, weight.T, beta=0)
        logps[rows], minus_dz = differentiate(z, bias, labels[rows, None], scale, softcap, g, any(wanted))
        if wanted[2]:
            grad_bias -= minus_dz.sum(0)
        minus_dz = minus_dz.to(hidden.dtype) if any(wanted) else None
        if wanted[0]:
            torch.addmm(grad_hidden[rows], minus_dz, weight, beta=0, alpha=-1, out=grad_hidden[rows])
        if wanted[1]:
            add_matmul(grad_weight, minus_dz.T, h, alpha=-1)
    if wanted[1]:
        grad_weight = grad_weight.to(weight.dtype)
    if wanted[2]:
        grad_bias = grad_bias.to(bias.dtype)
    return logps, grad_hidden, grad_weight, grad_bias


def differentiate_in_place(z, bias, label, scale, softcap, g, wanted):
    """The chunk's hidden @ weight.T (n, V) → (logps (n,), the negative of its own gradient (n, V), in z's memory)."""
    if bias is not None:
        z += bias
    if scale != 1:
        z *= scale
    if softcap:
        z.div_(softcap).tanh_()
        slope = 1 - z.square() if wanted else None  # of softcap * tanh(z / softcap)
        z *= softcap
    if z.stride(1) == 1:
        logps = torch.log_softmax(z, 1, out=z).gather(1, label)
        z.exp_()
    else:  # torch's own is slow over columns
        of_label, top = z.gather(1, label), z.amax(1, keepdim=True)
        total = z.sub_(top).exp_().sum(1, keepdim=True)
        logps = of_label - top - total.log()
        z /= total
    if not wanted:
        return logps.squeeze(1), None
    minus_dz = z.scatter_add_(1, label, torch.full_like(logps, -1.0))  # p - onehot
    if softcap:
        minus_dz *= slope
    if g is not None:
        minus_dz *= g
    if scale != 1:
        minus_dz *= scale
    return logps.squeeze(1), minus_dz


def differentiate_functionally(z, bias, label, scale, softcap, g, wanted):
    """differentiate_in_place, written for a compiler: two passes over the logits on a GPU instead of seven."""
    z = z if bias is None else z + bias
    z = z * scale
    slope = 1.0
    if softcap:
        z = torch.tanh(z / softcap)
        slope = 1 - z.square()
        z = z * softcap
    logps = z.log_softmax(-1)
    minus_dz = (logps.exp() - (torch.arange(z.shape[1], device=z.device) == label).to(z.dtype)) * slope * scale
    return logps.gather(1, label).squeeze(1), (minus_dz if g is None else minus_dz * g) if wanted else None


@functools.cache  # once a process, not once a microbatch; and not at import, which would wait for the compiler's own
def compiled_differentiate():
    return torch.compile(differentiate_functionally, dynamic=True)


def add_matmul(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    """out = beta * out + alpha * a @ b, in place and in out's precision also where a and b are bf16."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    if a.is_cuda:
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    return torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)


def chunk_rows(hidden: torch.Tensor, vocabulary: int) -> int:
    """Rows a chunk: enough for the matmuls to run at full speed, few enough for the logits to be small beside the model."""
    budget = (512 if hidden.is_cuda else 96) << 20  # bytes of fp32 logits
    most = max(256, budget // (4 * vocabulary) // 128 * 128)
    n_rows = max(1, len(hidden))
    return math.ceil(n_rows / math.ceil(n_rows / most))  # so that the last is not a small one
