"""Processes, sharding, clipping, reductions: what parallelism adds from outside to a model that knows nothing of it."""

import atexit
import contextlib
import functools
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import NoReturn

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from script import RunError, timed


class ModelError(RunError, ValueError):
    """A model, tokenizer or adapter that can't be used: one line that names it."""


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@timed("processes")
def init_processes(timeout_minutes: float = 30) -> tuple[int, int, torch.device]:
    """Joins torchrun's processes, or makes a group of one without it. Returns (rank, world size, device).

    A rank that waits for another longer than the timeout ends with an error.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # batches of all sizes leave no gaps then
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    rank, world_size, store = 0, 1, dist.HashStore()
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
            # torchrun's store still holds the addresses of the processes that it has restarted. (Agents on several machines
            # count their restarts apart, and need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 to do so.)
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return dist.get_rank(), dist.get_world_size(), device


def end_process(code: int = 0) -> NoReturn:
    """Ends this process; whatever is open for writing must be closed.

    Python is not torn down: caches of FSDP2's and DTensor's keep gloo's threads beyond destroy_process_group, and a thread that
    lets go of its last collective's tensors just then aborts the process, once in hundreds of runs.
    """
    if code == 0:
        dist.destroy_process_group()
    atexit._run_exitfuncs()  # W&B's, logging's, multiprocessing's: all but the tearing down
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are; many times as fast as to ask it of each."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def name_of(model: nn.Module) -> str:
    """Returns the name of the model's class, which FSDP2 puts its own before."""
    return type(model).__name__.removeprefix("FSDP")


def say(*texts: str) -> None:
    """Prints them once, not on every rank, and above a bar that is under way."""
    if dist.get_rank() == 0:
        tqdm.write("\n".join(texts).encode(errors="backslashreplace").decode())  # the name of a file may be no UTF-8
        sys.stdout.flush()


def gather_all(value) -> list:
    """Returns every rank's value, which may be anything that pickles, on every rank. All ranks must call it."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_of_another(error: Exception) -> bool:
    """Whether a collective fails since another rank has ended, or does not answer."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)


def on_any_rank(happened: bool) -> bool:
    """Returns whether it is so on one of the ranks, on all; they need not wait for their GPUs. All ranks must call it."""
    flag = torch.tensor(int(happened))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


@contextlib.contextmanager
def failing_together(kind: type[Exception], what: str = "") -> Iterator[None]:
    """Raises kind(f"{what}: …") on every rank where the block fails on one of them. All ranks must enter it.

    Within the block a rank that fails leaves the others alone in whatever collective follows, up to the block's end.
    """
    error = None
    try:
        yield
    except CheckpointException as failed:
        error = "; ".join({str(cause): None for cause, _ in failed.failures.values()})  # what all ranks say is said once
    except (OSError, ValueError, SafetensorError, kind) as cause:
        error = str(cause) or type(cause).__name__
    if error := next(filter(None, gather_all(error)), None):
        raise kind(": ".join(filter(None, (what, " ".join(error.split())))))


# ---------------------------------------------------------------------------------------------------------------------
# Sharding


def make_mesh(device: torch.device, replicas: int = 1) -> DeviceMesh:
    """Returns all ranks as a mesh ("shard",), or ("replicate", "shard") of so many groups of neighbours (HSDP)."""
    sizes = ({"replicate": replicas} if replicas > 1 else {}) | {"shard": dist.get_world_size() // replicas}
    return dist.init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """Returns the model's decoder blocks: of the outermost ModuleLists the one with the most parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    most = max(outermost, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()), default=())
    if not len(most):
        raise ModelError(f"{type(model).__name__}: no blocks (in a nn.ModuleList) are found to shard by")
    return most


def with_inputs_on_host(forward: Callable) -> Callable:
    """Returns the recomputed block's forward, whose input, all that is kept of it for the backward, waits on the host.

    It is copied to pinned memory and back in the order of the GPU's other work: the host waits for neither. What blocks share
    (positions, masks) most models hand to them by keyword, which checkpoint keeps as it is; by position it would go too.
    """
    def inner(*args, **kwargs):
        with saved_tensors_hooks(lambda x: (x.device, x.to("cpu", non_blocking=True)),
                                 lambda kept: kept[1].to(kept[0], non_blocking=True)):
            return forward(*args, **kwargs)
    return inner


@functools.cache
def allow_integers() -> None:
    """Has FSDP2 shard integers, which have no gradient and are never cast; torch does it itself from 2.12 on."""
    if torch.__version__ >= "2.12":
        return
    made_dtypes = _fsdp_param.FSDPParam.init_dtype_attrs
    _fsdp_param.FSDPParam.init_dtype_attrs = lambda self, policy: made_dtypes(
        self, policy if self.sharded_param.is_floating_point() else MixedPrecisionPolicy())
    _fsdp_param.nn = SimpleNamespace(Module=nn.Module, Parameter=lambda data, requires_grad=True: nn.Parameter(
        data, requires_grad and data.is_floating_point()))


@timed("model")
def shard_model(model: nn.Module, mesh: DeviceMesh, *methods: str, dtype: torch.dtype = torch.float32, recompute: bool = False,
                compile: bool = False, offload: bool = False, inputs_on_host: bool = False) -> None:
    """Shards each block and then the rest, in place: FSDP2 gathers one block at a time, computes, and frees it.

    On a mesh with "replicate" each group of ranks shards the model among its own, and gradients are summed over the groups too
    (HSDP: a group is a machine, between which no weights need to travel).

    `methods` are the names of those that compute with the weights, as forward does. `recompute` keeps only each block's input
    for the backward, which computes the rest again (activation checkpointing, Chen et al. 2016), with `inputs_on_host` in the
    host's memory. `compile` compiles each block by itself: the blocks are alike, so that it takes no longer than compiling one.
    `offload` keeps shards, gradients and optimizer in the host's memory. Parameters on the meta device get memory, a block at a
    time, and load_weights fills it.

    The blocks compute in `dtype`, to which weights are rounded as they are gathered. The shards stay as they are, and
    gradients are reduced in fp32, so that what is trained in fp32 has an optimizer in fp32.
    Gradients are summed over the ranks, not averaged: the loss is divided by the global target count already.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    placement = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    uses = Counter(parameter for block in find_blocks(model) for parameter in set(block.parameters()))
    # Blocks that share parameters (Zamba's) are left to the root
    blocks = [block for block in find_blocks(model) if all(uses[parameter] == 1 for parameter in block.parameters())]
    for module in (*blocks, model):
        if compile and module is not model:  # the forward, not the block: the hooks of sharding stay outside
            module.forward = torch.compile(module.forward)
        if recompute and module is not model:
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
            module.forward = with_inputs_on_host(module.forward) if inputs_on_host else module.forward
        allocate(module, mesh.device_type)
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=placement)
    for module in (model, *blocks) if mesh.size() > 1 else ():  # alone, FSDP2 would divide each gradient by it
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that scales too
    for method in methods:
        register_fsdp_forward_method(model, method)
    unsharded = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not unsharded, f"not sharded, so never reduced: {unsharded}"


def allocate(module: nn.Module, device: str) -> None:
    """Gives memory, not yet filled, to the parameters on the meta device; tied ones stay tied."""
    made = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                setattr(owner, name, made[parameter])


def gather_in_parts(model: nn.Module, limit: float, trained_only: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the whole state dict, tied weights once, in parts on the CPU of rank 0; {} on the others. All must take all.

    A part is whole blocks of at most `limit` bytes together, or one that has more.
    """
    blocks = next(name for name, module in model.named_modules() if module is find_blocks(model))
    own = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(own)
    wanted = [(name, tensor) for name, tensor in model.state_dict().items()
              if name not in tied and (own.get(name) or not trained_only)]

    def block_of(item) -> str:
        block = re.match(rf"{re.escape(blocks)}\.\d+\.", item[0])
        return block[0] if block else ""

    part, size = {}, 0
    bar = tqdm(total=len(wanted), desc="gathering", unit=" weights", leave=False, disable=dist.get_rank() > 0)
    for _, group in itertools.groupby(wanted, block_of):
        group = list(group)
        more = sum(tensor.nbytes * (8 if tensor.dtype == torch.uint8 else 1) for _, tensor in group)  # in fp32, if it is packed
        if size and size + more > limit:
            yield part
            part, size = {}, 0
        size += more
        for name, tensor in group:
            if isinstance(tensor, DTensor):
                tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()
            if dist.get_rank() == 0:
                part[name] = tensor.cpu()
            bar.update()
    bar.close()
    yield part


# ---------------------------------------------------------------------------------------------------------------------
# Clipping, reductions


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales the gradients so that their norm over all ranks is at most max_norm; returns the norm before, on all ranks."""
    return nn.utils.clip_grad_norm_(parameters, max_norm).full_tensor()


def accumulate(sums: dict[str, torch.Tensor], metrics: dict[str, torch.Tensor]) -> None:
    """Adds a microbatch's [sum, count] pairs, each a tensor (2,), to those of the step."""
    for key, pair in metrics.items():
        sums[key] = sums[key] + pair if key in sums else pair


def all_reduce_means(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """Adds up each key's [sum, count] over the ranks, in one collective, and divides. All ranks must hold the same keys."""
    total = torch.stack(list(sums.values()))
    dist.all_reduce(total)
    return dict(zip(sums, (total[:, 0] / total[:, 1]).tolist()))  # waits for the device, once
