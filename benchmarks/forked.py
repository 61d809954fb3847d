"""Ranks and scripts as processes forked from one that has imported everything, which takes longer than most of what they do.

What torchrun adds (rendezvous, restarts, several agents) is not here.
"""

import functools
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path

OUTPUTS = ("stdout", "stderr")


@functools.cache
def server(*imported: str):
    """One that ends with this process; it has no threads, which a fork would lack, and leaves GPUs alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*imported])
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                   "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker"}  # of semaphores of what is killed
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


class Forked:
    """work(*arguments), of a module, in n ranks, or in a process that is no rank where n is 0. They are killed at the exit."""

    imported = ("sft", "dpo", "sentencepiece", "transformers.models.llama.modeling_llama")

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
            process = server(*self.imported).Process(target=begin, args=(environment, self.outputs.name, work, arguments))
            process.start()
            self.processes.append(process)

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

    def wait(self, seconds: float) -> int | None:
        """Waits until all have ended or one has failed, at most so long; returns poll()."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and (left := deadline - time.monotonic()) > 0:
            connection.wait([process.sentinel for process in self.processes if process.exitcode is None], left)
        return self.poll()

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """As Popen's; where one fails the others are ended, as by torchrun."""
        self.returncode = self.wait(timeout)
        assert self.returncode is not None, f"not done after {timeout} s: {self.read()}"
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
