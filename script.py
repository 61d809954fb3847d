"""A script's process from its first line to its last words: its clock, its options, the signals that end it, its errors.

It imports nothing heavy, and is imported before all that takes long.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import typing

STARTED, PARENT = time.perf_counter(), os.getppid()  # a script imports this file before all that takes long
PARTS = {}  # of this process's start: seconds by name


class RunError(Exception):
    """What ends a run, told in a line."""


@contextlib.contextmanager
def timed(part: str) -> typing.Iterator[None]:
    """Adds the seconds of the block, or of each call of the function that it decorates, to those of a part of the start."""
    began = time.perf_counter()
    PARTS.setdefault("imports", began - STARTED - sum(PARTS.values()))  # whatever is before the first
    yield
    PARTS[part] = PARTS.get(part, 0.0) + time.perf_counter() - began


def printable(text: str) -> str:
    """Returns the text, in which a terminal would obey nothing."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def one_line(error: Exception | str) -> str:
    """Returns the error's text, of at most 300 characters, none of which a terminal obeys; or its type's name if it has none."""
    return printable(" ".join(str(error).split())[:300] or type(error).__name__)


def handle_signals(handler: typing.Callable | signal.Handlers) -> None:
    """Has handler(number, frame) called by what asks a run to end, but for what is ignored: by nohup, a closed terminal."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def end_early(number: int, _) -> None:
    """Ends this process and its own with a line: before a run's first step there is nothing to save."""
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        os.write(2, f"\n{os.path.basename(sys.argv[0])}: ended by {name} before its first step\n".encode())
    for process in sys.modules["multiprocessing"].active_children() if "multiprocessing" in sys.modules else ():
        process.kill()
    os._exit(128 + number)


def fail(error: object, end: typing.Callable[[int], typing.NoReturn] = sys.exit, wait: float | None = None) -> typing.NoReturn:
    """Ends this process with code 1 and the error's text as the last one on the screen: torchrun prints that of its file last.

    wait   seconds in which another rank may speak first, whose end makes torchrun end this one too. By default the first of a
           machine's ranks speaks for all, since all find the same.
    """
    handle_signals(signal.SIG_DFL)  # there is nothing more to save
    time.sleep(60 * (os.environ.get("LOCAL_RANK", "0") != "0") if wait is None else wait)
    text = f"{os.path.basename(sys.argv[0])}: {error}"
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with open(file, "w", encoding="utf-8") as out:
            json.dump({"message": f"\n\n{text}", "timestamp": int(time.time())}, out)
    else:
        print(text, file=sys.stderr)
    end(1)


class Options(argparse.ArgumentParser):
    """Reads a script's own options. What is wrong with them is said as all else is: in a line, and with code 1."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> typing.NoReturn:
        fail(message)

    def print_help(self, file: typing.TextIO | None = None) -> None:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python itself would complain of the pipe that `head` has closed
        super().print_help(file)


def why_not_writable(path: str | os.PathLike) -> str:
    """Returns why no file can be written by this name, in the place of another if there is one; "" where nothing is known."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    if os.path.exists(path) and not os.path.isfile(path):
        return "this is a folder" if os.path.isdir(path) else "this is a pipe or a device, which a file must not replace"
    return "" if os.access(folder, os.W_OK) else f"nothing may be written to the folder {folder}"
