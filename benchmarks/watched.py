"""A run whose ranks tell what they are about to do on the disk, and get a signal at a chosen moment of it.

Python says it before it does it ("audit events"), so that the moment is hit to the letter, without polling or luck.
"""

import os
import re
import signal
import sys
from pathlib import Path
from typing import NamedTuple, TextIO

from benchmarks.forked import run_file

ROOT = Path(__file__).resolve().parent.parent
VERBS = {"os.mkdir": "make", "os.rename": "rename", "os.link": "link", "os.remove": "remove", "os.rmdir": "remove"}
HALF_A_RECORD = '{"step": 3, "cou'


class Moment(NamedTuple):
    """Before the n-th time that what one of these ranks does fits the pattern; or if `torn`, when a file is begun by it."""

    pattern: str
    n: int = 1
    ranks: tuple[int, ...] = (0, 1)
    torn: bool = False
    number: int = signal.SIGKILL


class Watch:
    """An audit hook: writes a line, "verb path", for what this process does below runs/, and sends the moment's signal."""

    def __init__(self, events: Path, moment: Moment | None):
        self.out, self.moment, self.n = os.open(events, os.O_CREAT | os.O_APPEND | os.O_WRONLY), moment, 0

    def __call__(self, event: str, args: tuple) -> None:
        if not (event in VERBS or event in ("open", "record") and isinstance(args[0], (str, Path))):
            return
        path, verb, mode = str(args[event == "os.link"]), VERBS.get(event, event), args[1] if event == "open" else None
        if mode:  # by open(); by os.open(), as for a sync, there is none
            verb = "read" if mode[0] == "r" else "write"
        elif verb == "remove" and args[-1] >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{args[-1]}"), path)
        path = os.path.relpath(path)
        if not path.startswith("runs/"):
            return
        os.write(self.out, f"{verb} {path}\n".encode())
        if self.moment and re.match(self.moment.pattern, f"{verb} {path}"):
            self.n += 1
            if self.n == self.moment.n:
                torn = self.moment.torn and tear(path, mode, args[1] if event == "record" else None)
                os.write(2, f"\nrank {os.environ['RANK']}, {'within' if torn else 'before'}: {verb} {path}\n".encode())
                os.kill(os.getpid(), self.moment.number)


def tear(path: str, mode: str | None, metrics: TextIO | None) -> bool:
    """Leaves what is on the disk between a file's opening and its writing, or half a record. Returns whether it could."""
    if mode and mode[0] == "w":
        os.close(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY))
    elif metrics:
        metrics.write(HALF_A_RECORD)
        metrics.flush()
    return bool(metrics or mode and mode[0] == "w")


def run_watched(folder: Path, overrides: list[str], moment: Moment | None) -> None:
    """A script in a rank, sft.py unless the first override names another, in a folder with a configuration by the script's name.

    Each record that it logs is an audit event too.
    """
    from log import Log
    rank, write = int(os.environ["RANK"]), Log.write

    def announce(log: Log, record: dict) -> None:
        sys.audit("record", "runs/run/metrics.jsonl", None if rank else log.out)
        write(log, record)

    Log.write = announce
    sys.addaudithook(Watch(folder / f"events-{rank}", moment if moment and rank in moment.ranks else None))
    script = overrides[0] if overrides[:1] == ["dpo.py"] else "sft.py"
    run_file([ROOT / script, "--config", script, *[key for key in overrides if key != script]], folder)
