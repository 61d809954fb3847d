"""Puts the repository's root on the path, keeps the tests off the network; what several of them share."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"


def run_script(*argv, n_processes: int = 0, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess:
    """Runs a script by python, or n_processes of it by torchrun; returns its exit code and texts."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"] if n_processes else []
    process = subprocess.Popen([sys.executable, *torchrun, *map(str, argv)], cwd=cwd, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: torchrun must end its own processes first
        stdout, stderr = process.communicate(timeout=60)
        raise AssertionError(f"not done after {timeout} s: {argv}\n{stdout[-2000:]}\n{stderr[-2000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run_well(*argv, **options) -> str:
    """run_script, which must succeed; returns what it printed."""
    done = run_script(*argv, **options)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@contextlib.contextmanager
def one_thread():
    """For tiny models: on a busy machine threads that wait for each other take more time than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
