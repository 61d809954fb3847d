"""Ranks and scripts as processes forked from one that has imported everything, which takes longer than most of what they do.

What torchrun adds (rendezvous, restarts, several agents) is not here: conftest's run_script starts it where that is tested.
"""

import functools
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch.distributed.tensor import DTensor

IMPORTED = ["pytest", "conftest", "sft", "sentencepiece", "transformers.models.llama.modeling_llama"]
OUTPUTS = ("stdout", "stderr")


@functools.cache
def server():
    """One that ends with this process; it has no threads, which a fork would lack, and leaves GPUs alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        forkserver.ensure_running()
    return context


class Forked:
    """work(*arguments), of a module, in n ranks, or in a process that is no rank where n is 0. They are killed at the exit."""

    def __init__(self, n: int, work: Callable, *arguments):
        self.outputs = tempfile.TemporaryDirectory()
        for name in OUTPUTS:
            Path(self.outputs.name, name).touch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [{"RANK": rank, "LOCAL_RANK": rank, **group} for rank in range(n)] or [{}]
        self.processes = []
        for rank in ranks:
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **{name: str(value) for name, value in rank.items()}}
            self.processes.append(server().Process(target=begin, args=(environment, self.outputs.name, work, arguments)))
            self.processes[-1].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()
        self.outputs.cleanup()

    def poll(self) -> int | None:
        """As Popen's: None while some run and none has failed."""
        codes = [process.exitcode for process in self.processes]
        return next(filter(None, codes), None if None in codes else 0)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """As Popen's; where one fails the others are ended, as by torchrun."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"not done after {timeout} s: {self.read()}"
            connection.wait([process.sentinel for process in self.processes if process.exitcode is None], 1)
        self.returncode = self.poll()
        for process in self.processes:
            process.terminate()
            process.join(30)
        return self.read()

    def read(self) -> tuple[str, str]:
        return tuple(Path(self.outputs.name, name).read_text() for name in OUTPUTS)


def begin(environment: dict[str, str], outputs: str, work: Callable, arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in enumerate(OUTPUTS, 1):
        os.dup2(os.open(Path(outputs, name), os.O_WRONLY | os.O_APPEND), descriptor)
    work(*arguments)


def run_file(argv: list, cwd: Path | None = None) -> None:
    sys.argv = [str(part) for part in argv]
    sys.path.insert(0, str(Path(argv[0]).parent))
    os.chdir(cwd or ".")
    runpy.run_path(sys.argv[0], run_name="__main__")


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
    assert done.returncode == 0, done.stderr[-5000:]
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
