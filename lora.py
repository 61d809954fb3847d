"""LoRA: low-rank adapters beside frozen weights, in files that PEFT reads and writes."""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from fsdp_utils import ModelError, allow_integers, is_finite, name_of, say
from logps import weight_of
from nf4 import BLOCK, FrozenProduct, dequantise, pairs_of_values, quantise
from script import one_line


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight (out, in), of `dtype`, is packed by nf4.py: (out, in / 2 + in / 64 + 4) uint8."""

    def __init__(self, base: nn.Linear, pairs: torch.Tensor):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        self.dtype = base.weight.dtype
        packed = quantise(torch.empty_like(base.weight, device="meta")) if base.weight.is_meta else quantise(base.weight.data)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("pairs", pairs, persistent=False)  # for it to lie on the device once

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            raise TypeError(f"model.peft.quantise: it casts to a weight's dtype, which is {x.dtype} where the weight is packed")
        return FrozenProduct.apply(x, self.weight, self.bias, self.pairs)


def find_packable(model) -> dict[str, nn.Linear]:
    """Returns the linear layers, by name, that can be adapted and are of whole blocks. Raises ModelError where there is none."""
    linears = {name: linear for name, linear in find_linears(model).items() if linear.in_features % BLOCK == 0}
    if not linears:
        raise ModelError(f"model.peft.quantise: no linear layer of {name_of(model)} has a multiple of {BLOCK} inputs")
    return linears


def quantise_linears(model) -> None:
    """Puts a QuantisedLinear in the place of each linear of find_packable's, before any is adapted; says what stays as it is."""
    allow_integers()
    linears, pairs = find_packable(model), pairs_of_values()
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantisedLinear(linear, pairs))
    others = {re.sub(r"\.\d+\.", ".*.", name): None for name, parameter in model.named_parameters()
              if parameter.ndim > 1 and parameter.dtype != torch.uint8}
    say(f"quantised: {len(linears)} linear layers; not so: {', '.join(others)}, and what has one dimension")


def n_weights(parameter: torch.Tensor) -> int:
    """Returns how many numbers a parameter holds, packed or not."""
    packed = parameter.dtype == torch.uint8
    return len(parameter) * ((parameter.shape[1] - 4) // (BLOCK // 2 + 1)) * BLOCK if packed else parameter.numel()


class LoRALinear(nn.Linear):
    """A frozen linear layer and a low-rank update of it that is trained: W x + b + s B A dropout(x)

    W (out, in) and b as they were, A (r, in), B (out, r), s = alpha / r, or alpha / sqrt(r) if rslora (Kalajdzievski 2023).
    A starts at random and B at zero, so that the first forward is the base model's, while B's gradient is not zero.
    Only A and B have gradients and optimizer state: r (in + out) numbers instead of in * out. Hu et al. 2021, section 4.1.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float, rslora: bool = False):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight, self.bias = base.in_features, base.out_features, base.weight, base.bias
        if isinstance(base, QuantisedLinear):
            self.dtype = base.dtype
            self.register_buffer("pairs", base.pairs, persistent=False)
        self.lora_A = nn.Linear(base.in_features, r, bias=False)  # nn.Linear's own start: Kaiming-uniform
        self.lora_B = nn.Linear(r, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / (math.sqrt(r) if rslora else r)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (QuantisedLinear if self.weight.dtype == torch.uint8 else nn.Linear).forward(self, x)
        dropout = self.dropout.p if self.training else 0.0
        low = DropoutLinear.apply(x, self.lora_A.weight, dropout) if dropout else self.lora_A(x)
        return y + self.lora_B(low * self.scaling)  # scaled where it is small


NEW_ROWS = "token_adapter.trainable_tokens_delta"  # PEFT's name


class RowsBeside:
    """An embedding or a head, frozen, whose last rows are trained beside it: those of tokens that are new to the model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frozen = self._parameters["weight"]
        self._parameters["weight"] = weight_of(self)  # as the layer's own forward reads it
        try:
            return super().forward(x)
        finally:
            self._parameters["weight"] = frozen


def train_new_rows(model, n_rows: int) -> None:
    """Makes the last n_rows of embeddings and head trainable, fp32, and nothing else of them; tied ones stay tied."""
    embeddings, head, made = model.get_input_embeddings(), model.get_output_embeddings(), {}
    for name, layer in [(name, module) for name, module in model.named_modules() if module is embeddings or module is head]:
        frozen = layer.weight
        if frozen not in made:
            made[frozen] = nn.Module()
            made[frozen].trainable_tokens_delta = nn.Parameter(frozen[-n_rows:].detach().clone().float())
            if f"{name}.weight" in model.weight_files:  # to begin as the mean of the rows there
                model.weight_files[f"{name}.{NEW_ROWS}"] = model.weight_files[f"{name}.weight"]
        layer.token_adapter = made[frozen]
        layer.__class__ = type(f"{type(layer).__name__}RowsBeside", (RowsBeside, type(layer)), {})


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


def add_lora(model, lora_r: int, lora_alpha: float, lora_dropout: float, target_modules: str | list[str],
             use_rslora: bool = False, n_new_rows: int = 0, train_embeddings: bool = False) -> None:
    """Freezes the model and puts a LoRALinear in the place of each layer to adapt, before the model is sharded.

    target_modules: "all-linear" (each linear but the head), or names, whole or their last parts (q_proj). Raises ModelError
    where one matches nothing. Of embeddings and head the last n_new_rows are trained, for tokens that are new to the model, or
    all of them with `train_embeddings`, as some of PEFT's adapters have it.
    """
    linears = find_linears(model)
    if not linears:
        raise ModelError(f"model.peft: {name_of(model)} has no nn.Linear to adapt (GPT-2's Conv1D is not supported)")
    if target_modules == "all-linear":
        target_modules = list(linears)
    adapted = {}
    for module in [target_modules] if isinstance(target_modules, str) else target_modules:
        matching = {name: linear for name, linear in linears.items() if f".{name}".endswith(f".{module}")}
        if not matching:
            there = sorted({name.rpartition(".")[2] for name in linears})
            raise ModelError(f"model.peft.target_modules: no linear layer is named {module!r}; there are {', '.join(there)}")
        adapted |= matching
    model.requires_grad_(False)
    for name, linear in adapted.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(linear, lora_r, lora_alpha, lora_dropout, use_rslora))
    model.lora_config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora_r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout,
        "use_rslora": use_rslora, "base_model_name_or_path": model.name_or_path, "bias": "none", "modules_to_save": None,
        "inference_mode": True}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not (train_embeddings or n_new_rows):
        return
    train_embeddings |= head.bias is not None  # which PEFT would leave out beside rows of its own
    tied = head.weight is embeddings.weight
    layers = [name for name, module in model.named_modules() if module is embeddings or module is head and not tied]
    if train_embeddings:
        for name in layers:
            model.get_submodule(name).float().requires_grad_()
        model.lora_config |= {"modules_to_save": sorted(map(last_name, layers)), "ensure_weight_tying": tied}
    else:
        rows = list(range(len(embeddings.weight) - n_new_rows, len(embeddings.weight)))
        train_new_rows(model, n_new_rows)
        model.lora_config |= {"trainable_token_indices": {last_name(name): rows for name in layers}}


def is_plain(linear: nn.Linear) -> bool:
    """Whether it computes W x + b: one with a forward of its own is tried."""
    if type(linear).forward is nn.Linear.forward or isinstance(linear, QuantisedLinear):
        return True
    twin, x = copy.deepcopy(linear).to_empty(device="cpu").float(), torch.randn(2, linear.in_features)
    try:
        for parameter in twin.parameters():
            nn.init.normal_(parameter)
        return torch.allclose(twin(x), F.linear(x, twin.weight, twin.bias), rtol=1e-4, atol=1e-4)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def find_linears(model) -> dict[str, nn.Linear]:
    """Returns the linear layers, by name, that an adapter beside them changes.

    That is not the head, no layer that computes something else (a router), none whose weight is another's too (Zamba's, into
    which two adapters could not be merged), none whose adapter PEFT could not find in a file, and of a state space (Gu & Dao
    2023) the way in alone: the kernels that a GPU runs it with read its other weights themselves.
    """
    head, found, renamings = model.get_output_embeddings(), {}, get_renamings(model)
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        state_space = {"A_log", "D"} <= {own for own, _ in module.named_parameters(recurse=False)}
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}".removeprefix(".")
            if not isinstance(child, nn.Linear) or child is head or uses[id(child.weight)] > 1 or not is_plain(child):
                continue
            adapter = f"{full}.lora_A.weight"
            is_found = name_in_model(renamings, name_in_files(renamings, adapter)) == adapter
            if is_found and (child_name == "in_proj" or not state_space):
                found[full] = child
    return found


def lora_names(weights: dict) -> list[str]:
    """The names, in a state dict, of the layers that have an adapter."""
    return [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]


def merge_lora(model, weights: dict[str, torch.Tensor],
               round_to: Callable[[str], torch.dtype] | None = None) -> dict[str, torch.Tensor]:
    """A state dict with adapters → the plain model's: W + s B A, and new rows in W.

    The sum is taken in fp32 and rounded once, to round_to(name), by default W's dtype. Where W is packed it is what was computed
    with: dequantised, in the dtype of the layer.
    """
    dtype_of = round_to or (lambda name: weights[name].dtype)
    weights = {name: dequantise(tensor, pairs_of_values(), model.get_submodule(name.removesuffix(".weight")).dtype)
               if tensor.dtype == torch.uint8 else tensor for name, tensor in weights.items()}
    merged = {name: tensor for name, tensor in weights.items() if ".lora_" not in name and not name.endswith(NEW_ROWS)}
    for name in weights.keys() - merged.keys():
        if name.endswith(NEW_ROWS):
            whole = name.replace(NEW_ROWS, "weight")
            rows = weights[whole][:-len(weights[name])], weights[name]
            merged[whole] = torch.cat([part.to(dtype_of(whole)) for part in rows])
    for name in lora_names(weights):
        a, b, w = (weights[f"{name}.{part}"].float() for part in ("lora_A.weight", "lora_B.weight", "weight"))
        merged[f"{name}.weight"] = w.addmm(b, a, alpha=model.get_submodule(name).scaling).to(dtype_of(f"{name}.weight"))
    return merged


@torch.no_grad()
def merge_in_place(model: nn.Module) -> None:
    """Adds each adapter to its layer's weight; the layer is then a plain linear one, and no slower. So with new rows."""
    for layer in [layer for layer in model.modules() if isinstance(layer, RowsBeside)]:
        whole = weight_of(layer)
        layer.__class__ = type(layer).__bases__[1]
        layer.weight.data = whole
        del layer.token_adapter
    for name in lora_names(model.state_dict()):
        layer = model.get_submodule(name)
        merged = merge_lora(model, {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()})
        layer.weight.data, layer.forward = merged[f"{name}.weight"], super(LoRALinear, layer).forward


def save_adapter(folder: Path, model, weights: dict[str, torch.Tensor]) -> None:
    """Writes the trained part of a state dict as PEFT does: adapter_config.json, adapter_model.safetensors."""
    folder.mkdir()
    trained = {name: weights[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    config = model.lora_config | name_targets(model, lora_names(trained))
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    for tied, source in getattr(model, "all_tied_weights_keys", {}).items():
        if source in trained:
            trained[tied] = trained[source].clone()  # PEFT looks for both
    renamings = get_renamings(model)
    save_file({f"base_model.model.{name_in_files(renamings, name)}": tensor.contiguous() for name, tensor in trained.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})


def name_targets(model, adapted: list[str]) -> dict:
    """Returns what PEFT's configuration says of which layers are adapted: their last names where no other module has these.

    In a mixture PEFT takes the names that single experts have in the files for the fused experts', also where they are a dense
    layer's. So these layers are named as parameters, which it knows since 0.17 and has no dropout for.
    """
    fused = [conversion for conversion in get_model_conversion_mapping(model) if isinstance(conversion, WeightConverter)]
    of_experts = {last_name(pattern.removesuffix(".weight")) for conversion in fused for pattern in conversion.source_patterns
                  if "expert" in pattern}
    parameters = sorted(f"{name}.weight" for name in adapted if last_name(name) in of_experts)
    modules = [name for name in adapted if last_name(name) not in of_experts]
    short = {last_name(name) for name in modules}
    exact = all(name in modules for name, _ in model.named_modules() if last_name(name) in short)
    return {"target_modules": sorted(short if exact else modules),
            **({"target_parameters": parameters, "lora_dropout": 0.0} if parameters else {})}


def last_name(name: str) -> str:
    return name.rpartition(".")[2]


def name_in_files(renamings: list[WeightRenaming], name: str) -> str:
    """Returns a weight's name in an adapter's file, whose names PEFT turns into the model's as those of a checkpoint's are."""
    for renaming in renamings:
        if renaming.rename_source_key(name)[0] != name:  # it would be renamed once more
            name = renaming.reverse_transform().rename_source_key(name)[0]
    return name


def name_in_model(renamings: list[WeightRenaming], name: str) -> str:
    for renaming in renamings:
        name = renaming.rename_source_key(name)[0]
    return name


def get_renamings(model) -> list[WeightRenaming]:
    return [conversion for conversion in get_model_conversion_mapping(model) if isinstance(conversion, WeightRenaming)]


UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "fan_in_fan_out", "lora_bias",
               "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config",
               "layer_replication")  # of PEFT's adapter_config.json, where they are set


def load_adapter(model, folder: str, lora_dropout: float, n_new_rows: int = 0) -> None:
    """Adds the adapter of ours or of PEFT's that lies in the folder, with its own rank, scale and targets. Raises ModelError."""
    try:
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        weights = load_file(Path(folder, "adapter_model.safetensors"))
        r, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder}: no adapter can be loaded: {type(error).__name__}: {one_line(error)}") from error
    if wild := [name for name, tensor in weights.items() if not is_finite(tensor)]:
        raise ModelError(f"{folder}/adapter_model.safetensors: {wild[0]} holds values that are not finite")
    unsupported = [key for key in UNSUPPORTED if config.get(key)]
    if str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        unsupported.append("init_lora_weights")  # these change the base's weights too
    renamings = get_renamings(model)
    weights = {name_in_model(renamings, name.removeprefix("base_model.model.")): tensor for name, tensor in weights.items()}
    plain = config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"
    if not plain or unsupported or r < 1 or not lora_names(weights):
        what = ", ".join(unsupported) or "adapter_config.json"
        raise ModelError(f"{folder}: not a plain LoRA adapter: {what} is not supported")
    # Of a layer trained whole PEFT writes up to three copies, and both names where it is tied.
    weights = {name: tensor for name, tensor in weights.items()
               if not any(part in name for part in (".modules_to_save.", ".original_module.", ".token_adapter.base_layer."))}
    for names in getattr(model, "all_tied_weights_keys", {}).items():
        for tied, source in (names, [f"{name.removesuffix('weight')}{NEW_ROWS}" for name in names]):
            if tied in weights and source in weights and torch.equal(weights[tied], weights[source]):
                del weights[tied]
    try:
        add_lora(model, r, alpha, lora_dropout, lora_names(weights), config.get("use_rslora", False), n_new_rows,
                 bool(config.get("modules_to_save")))
    except ModelError as error:
        raise ModelError(f"{folder}: the adapter does not fit the model: {error}") from error
    own = dict(model.named_parameters())
    trained = {name for name, parameter in own.items() if parameter.requires_grad}
    tokens = config.get("trainable_token_indices") or {}
    for rows in tokens.values() if isinstance(tokens, dict) else [tokens]:
        first = model.get_input_embeddings().num_embeddings - n_new_rows
        if rows != list(range(first, first + len(rows))):
            raise ModelError(f"{folder}: it trains the tokens {rows}; only those that are new to the model can be trained alone")
    if n_new_rows:  # an adapter may know of no new tokens, or of no rows beyond them
        trained -= {name for name in trained - set(weights) if name.endswith(NEW_ROWS)}
        weights = {name: pad_rows(tensor, len(own[name])) if name in own and ".lora_" not in name else tensor
                   for name, tensor in weights.items()}
    if trained != set(weights) or any(own[name].shape != weights[name].shape for name in trained):
        wrong = sorted(trained ^ set(weights)) or [name for name in trained if own[name].shape != weights[name].shape]
        raise ModelError(f"{folder}: the adapter does not fit the model: {len(wrong)} tensors, the first is {wrong[0]}")
    for name, tensor in weights.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Parameter(tensor.to(own[name].dtype).clone()))
    for tied, source in getattr(model, "all_tied_weights_keys", {}).items():
        if source in weights:
            parent, _, child = tied.rpartition(".")
            setattr(model.get_submodule(parent), child, model.get_parameter(source))
    model.given_weights = set(weights)


def pad_rows(tensor: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Returns the rows of tokens with more behind them, fewer than 64, that no token has: the mean of those."""
    more = n_rows - len(tensor)
    return torch.cat([tensor, tensor.mean(0, keepdim=True).expand(more, *tensor.shape[1:])]) if 0 < more < 64 else tensor
