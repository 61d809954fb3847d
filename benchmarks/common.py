"""What the benchmarks share: what machine this is, interleaved timing, peak memory, a table."""

import ctypes
import gc
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))


def describe_machine(device: str, dtype: torch.dtype) -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu[1] if cpu else platform.machine()}"
    return (f"{name}, {torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')}, "
            f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")


def time_interleaved(runs: dict[str, Callable], repeats: int, device: str) -> dict[str, float]:
    """Returns the median seconds of each. They take turns, so that what else the machine does falls on all alike."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats + 1):  # the first round warms up
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def peak_extra_memory(run: Callable, device: str) -> int:
    """Returns the bytes held at once during the run beyond those held before it (and not given back: its results)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now (man 5 proc)
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{os.getpid()}/status").read_text())[1]) * 1024


BLOCK = 1 << 26  # bytes


def bare_write(file: Path, size: int) -> None:
    """Writes so many bytes to the disk, as fast as it takes them."""
    block = os.urandom(BLOCK)
    with open(file, "wb", buffering=0) as stream:
        for start in range(0, size, BLOCK):
            stream.write(memoryview(block)[:size - start])
        os.fsync(stream.fileno())


def bare_read(file: Path) -> None:
    block = bytearray(BLOCK)
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(block):
            pass


def forget(folder: Path) -> None:
    """Drops the folder's files from the page cache, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width) in
                                enumerate(zip(row, widths))) + " |")
