"""LoRA: low-rank adapters beside frozen weights, in files that PEFT reads and writes."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from configs.base import one_line
from fsdp_utils import ModelError


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

    def frozen(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropout = self.dropout.p if self.training else 0.0
        low = DropoutLinear.apply(x, self.lora_A.weight, dropout) if dropout else self.lora_A(x)
        return self.frozen(x) + self.lora_B(low * self.scaling)  # scaled where it is small


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
             use_rslora: bool = False, train_embeddings: bool = False) -> None:
    """Freezes the model and puts a LoRALinear in the place of each layer to adapt, before the model is sharded.

    target_modules: "all-linear" (each linear but the head), or names, whole or their last parts (q_proj). Raises ModelError
    where one matches nothing. `train_embeddings`, for tokens that are new to the model, trains embeddings and head whole.
    """
    head = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    if not linears:
        raise ModelError(f"model.peft: {type(model).__name__} has no nn.Linear to adapt (GPT-2's Conv1D is not supported)")
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
    short = {name.rpartition(".")[2] for name in adapted}
    exact = all(name in adapted for name in linears if name.rpartition(".")[2] in short)
    model.lora_config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora_r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout,
        "use_rslora": use_rslora, "target_modules": sorted(short if exact else adapted),
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


@torch.no_grad()
def merge_in_place(model: nn.Module) -> None:
    """Adds each adapter to its layer's weight; the layer is then a plain linear one, and no slower."""
    for name in lora_names(model.state_dict()):
        layer = model.get_submodule(name)
        merged = merge_lora(model, {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()})
        layer.weight.data, layer.forward = merged[f"{name}.weight"], super(LoRALinear, layer).forward


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


UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "fan_in_fan_out", "lora_bias",
               "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "arrow_config",
               "kasa_config", "layer_replication")  # of PEFT's adapter_config.json, where they are set


def load_adapter(model, folder: str, lora_dropout: float, train_embeddings: bool = False) -> None:
    """Adds the adapter of ours or of PEFT's that lies in the folder, with its own rank, scale and targets. Raises ModelError."""
    try:
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        weights = load_file(Path(folder, "adapter_model.safetensors"))
        r, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder}: no adapter can be loaded: {type(error).__name__}: {one_line(error)}") from error
    unsupported = [key for key in UNSUPPORTED if config.get(key)]
    if str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        unsupported.append("init_lora_weights")  # these change the base's weights too
    weights = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    plain = config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"
    if not plain or unsupported or r < 1 or not lora_names(weights):
        what = ", ".join(unsupported) or "adapter_config.json"
        raise ModelError(f"{folder}: not a plain LoRA adapter: {what} is not supported")
    # Of a layer trained whole PEFT writes up to three copies, and both names where it is tied.
    weights = {name: tensor for name, tensor in weights.items()
               if ".modules_to_save." not in name and ".original_module." not in name}
    for tied, source in getattr(model, "all_tied_weights_keys", {}).items():
        if tied in weights and source in weights and torch.equal(weights[tied], weights[source]):
            del weights[tied]
    try:
        add_lora(model, r, alpha, lora_dropout, lora_names(weights), config.get("use_rslora", False),
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
