"""Processes, sharding, clipping, checkpoints: what parallelism adds from outside to a model that knows nothing of it."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method


class ShardingError(ValueError):
    """A model that can't be sharded."""


def init_processes() -> tuple[int, int, torch.device]:
    """Joins torchrun's processes, or makes a group of one without it. Returns (rank, world size, device)."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size(), device


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """Returns the model's decoder blocks: of the outermost ModuleLists the one with the most parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if not outermost:
        raise ShardingError(f"{type(model).__name__}: no list of blocks (nn.ModuleList) is found to shard by")
    return max(outermost, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


def shard_model(model: nn.Module, device: torch.device, *methods: str, compile: bool = False) -> None:
    """Shards each block and then the rest, in place: FSDP2 gathers one block at a time, computes, and frees it.

    `methods` are the names of those that compute with the weights, as forward does. `compile` compiles each block by
    itself: the blocks are alike, so that it takes no longer than compiling one.

    Weights, their gradients' reduction and so the optimizer stay fp32; on a GPU that has bf16 the compute is bf16.
    Gradients are summed over the ranks, not averaged: the loss is divided by the global target count already.
    """
    policy = MixedPrecisionPolicy()
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = find_blocks(model)
    for block in blocks:
        if compile:
            block.forward = torch.compile(block.forward)  # not the block: the hooks of sharding and checkpointing stay outside
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in (model, *blocks):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that scales too
    for method in methods:
        register_fsdp_forward_method(model, method)
    unsharded = [name for name, parameter in model.named_parameters() if not isinstance(parameter, dist.tensor.DTensor)]
    assert not unsharded, f"not sharded, so never reduced: {unsharded}"


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales the gradients so that their norm over all ranks is at most max_norm; returns the norm before, on all ranks."""
    return nn.utils.clip_grad_norm_(parameters, max_norm).full_tensor()


def all_reduce_sums(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adds up each key's tensor over the ranks, in one collective. All ranks must hold the same keys and shapes."""
    total = torch.stack(list(sums.values()))
    dist.all_reduce(total)
    return dict(zip(sums, total))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: whole, gathered in rank 0's memory, so that any number of processes can go on from them


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, write: Callable, frozen: bool) -> None:
    """Makes a folder of the optimizer's state and of what write(folder, weights) puts there, given the state dict on rank 0.

    All ranks must call it. It is written under another name and renamed when whole; a folder of that name is replaced.
    `frozen`: whether the weights that are not trained are gathered too.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=not frozen)
    weights = get_model_state_dict(model, options=options)
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial, weights)
        torch.save(optimizer_state, partial / "optimizer.pt")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    dist.barrier()


def load_optimizer(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores what save_checkpoint wrote, on any number of processes. The model must hold the folder's weights."""
    state = torch.load(f"{folder}/optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
