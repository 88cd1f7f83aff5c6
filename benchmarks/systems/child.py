"""What the processes of every system share. Standard library alone: some run where nothing else is.

A process is led by lines on stdin, and answers with JSON lines. It tells its ``address``, is given
those of all, connects and tells ``ready``. Then for each round it is told ``prepare`` and how,
``go`` and, when all have ended, ``check``; it answers with ``prepared``, ``ended`` (by the clock
that all processes of a machine share) and ``cpu_seconds`` with a ``digest`` of what it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

OPEN = "open"  # links are open before the clock starts
DIALLED = "dialled"  # links are opened within the clock
SAMPLES = 100  # behind each update, where a system weighs them


@dataclass(frozen=True, slots=True)
class Task:
    """What a process is to do.

    Attributes:
        place: from 0.
        peers: how many have an update.
        topology: "full" or "ring".
        updates: directory of all updates.
        scratch: directory of its own.
    """

    place: int
    peers: int
    topology: str
    updates: str
    scratch: str

    def update(self, place: int) -> Path:
        """The file of somebody's update."""
        return Path(self.updates) / f"update-{place}.bin"

    def neighbours(self) -> list[int]:
        """Who has a link with this one."""
        if self.topology == "full":
            return [place for place in range(self.peers) if place != self.place]
        around = {(self.place - 1) % self.peers, (self.place + 1) % self.peers}
        return sorted(around - {self.place})


def read_task() -> Task:
    """The task whose file the first argument names."""
    return Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


_out = sys.stdout


def keep_stdout() -> None:
    """What others print goes to stderr from now on; only ``tell`` writes to the leader."""
    global _out
    _out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


def tell(**values: object) -> None:
    """One line to the leader."""
    _out.write(json.dumps(values) + "\n")
    _out.flush()


def told() -> str:
    """The leader's next line. Without a leader the process ends."""
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    return line.strip()


def cpu_seconds() -> float:
    """CPU of this process so far, user and system, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def digest_of(updates: Iterable[bytes | bytearray | memoryview | Path]) -> str:
    """One hash over several updates, in the order of their owners."""
    whole = hashlib.sha256()
    for update in updates:
        data = update.read_bytes() if isinstance(update, Path) else update
        whole.update(hashlib.sha256(data).digest())
    return whole.hexdigest()


def one_round(work: Callable[[], None], digest: Callable[[], str]) -> None:
    """A round of a system whose work is one call that blocks until this process has everything."""
    told()
    tell(prepared=True)
    told()
    used = cpu_seconds()
    work()
    tell(ended=time.monotonic())
    told()
    tell(cpu_seconds=cpu_seconds() - used, digest=digest())
