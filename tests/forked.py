"""benchmarks/forked.py for tests: ranks that must succeed, and scripts called as conftest calls them.

What torchrun adds is not here: conftest's run_script starts it where that is tested.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import benchmarks.forked
from benchmarks.forked import run_file


class Forked(benchmarks.forked.Forked):
    imported = ("pytest", "conftest", *benchmarks.forked.Forked.imported)


def run_forked(n: int, work: Callable, *arguments, timeout: float = 120) -> subprocess.CompletedProcess:
    with Forked(n, work, *arguments) as ranks:
        stdout, stderr = ranks.communicate(timeout)
        return subprocess.CompletedProcess((work, *arguments), ranks.returncode, stdout, stderr)


def run_script(*argv, n_processes: int = 0, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess:
    """conftest's, forked."""
    return run_forked(n_processes, run_file, argv, cwd, timeout=timeout)


def run_well(*argv, **options) -> str:
    """conftest's, forked."""
    done = run_script(*argv, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return done.stdout


def run_ranks(n: int, work: Callable, *arguments) -> None:
    """Calls work(*arguments) in n ranks, which must succeed."""
    done = run_forked(n, work, *arguments)
    assert done.returncode == 0, done.stderr[-5000:]


def whole(tensors: dict[str, DTensor]) -> dict[str, torch.Tensor]:
    """Copies of the whole tensors, which FSDP2 shards by their rows over a mesh's last dimension, on all ranks."""
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, {name: tensor.detach().to_local() for name, tensor in tensors.items()})
    return {name: torch.cat([shards[name] for shards in ranks[:tensor.device_mesh.size(-1)]]) for name, tensor in tensors.items()}
