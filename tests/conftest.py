"""Puts the root on the path, keeps the tests off the network and on one thread each; what several of them share."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # waking a second thread takes longer than any matrix here, the more so beside other tests

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from data import DTYPES, TokenisedRows
from make_tiny import make_rows, train_tokenizer

LONG = ("test_checkpoint.py", "test_sft.py", "test_fake_gpu.py", "test_will_it_fit.py")


def pytest_collection_modifyitems(items: list) -> None:
    """Files that take minutes come first: the last ones, which no other process can share, should be short."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def launch(argv: Sequence, torchrun: Sequence[str] = (), cwd: Path | None = None) -> subprocess.Popen:
    """Starts a script by python, or by torchrun with these options, on the CPU."""
    command = [sys.executable, *(["-m", "torch.distributed.run", *torchrun] if torchrun else []), *map(str, argv)]
    return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def run_script(*argv, n_processes: int = 0, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess:
    """Runs a script by python, or n_processes of it by torchrun, on the CPU; returns its exit code and texts."""
    process = launch(argv, ("--standalone", f"--nproc_per_node={n_processes}") if n_processes else (), cwd)
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
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return done.stdout


@contextlib.contextmanager
def process_of_one():
    """For what else is torchrun's to run: no group of processes is left where it fails."""
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def write_model(folder: Path, tied: bool = False, dtype: torch.dtype = torch.float32, **changes) -> None:
    """A Llama with biases, none of whose norms and biases is a one or a zero, and the tokenizer of the tiny task."""
    folder.mkdir()
    train_tokenizer(make_rows(200, 1)[0], folder)
    torch.manual_seed(3)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 256, "tie_word_embeddings": tied,
              "attention_bias": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**config | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)


def store_rows(folder: Path, documents: list[tuple[np.ndarray, np.ndarray]], n_documents: int = 1) -> TokenisedRows:
    """Documents as the token cache holds them, so many a row, without the file that they come from."""
    lengths = [len(ids) for ids, _ in documents]
    rows = np.arange(len(documents)) // n_documents
    columns = {"ids": np.concatenate([ids for ids, _ in documents]), "trained": np.concatenate([on for _, on in documents]),
               "lengths": lengths, "targets": [on.sum() for _, on in documents], "lines": rows + 1,
               "files": 0 * rows, "rows": rows, "answers": 0 * rows - 1}
    folder.mkdir(parents=True)
    for name, dtype in DTYPES.items():
        np.asarray(columns[name], dtype).tofile(folder / f"{name}.bin")
    np.cumsum([0, *lengths], dtype=np.int64).tofile(folder / "offsets.bin")
    (folder / "counts.json").write_text("[{}, {}]")
    return TokenisedRows(folder, [], n_documents)
