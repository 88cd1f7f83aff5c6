"""Leads the processes of one system through its rounds."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fleet import FleetError, Process
from benchmarks.member import Spec, model, weights
from benchmarks.systems.catalogue import System
from benchmarks.systems.child import DIALLED, Task, digest_of

PARTINGS = 20  # attempts to have nobody connected


@dataclass(frozen=True, slots=True)
class Work:
    """What all systems do: each of so many peers has an update, and all need all.

    Attributes:
        directory: of the updates; what a system leaves in it goes with its lap.
    """

    peers: int
    topology: str
    directory: Path

    @property
    def bytes_written(self) -> int:
        """By all peers together, in a round."""
        return self.peers**2 * (self.directory / "update-0.bin").stat().st_size

    @property
    def digest(self) -> str:
        """Of all updates, as those who have them tell."""
        return digest_of(self.directory / f"update-{place}.bin" for place in range(self.peers))


@dataclass(frozen=True, slots=True)
class Lap:
    """One round of one system.

    Attributes:
        seconds: from when all may begin until the last process has everything.
        seconds_from_start: from the word to begin; longer where a system first votes, say.
        merged_seconds: until the last has averaged it too, where the system says.
        cpu_seconds: of all processes, from the word until all have ended.
        links_before: connections there were already when links were to be dialled.
        duplicate_ratio: payload received twice over payload, where the system says.
        equal: all processes ended with the same, and with the right thing where that can be told.
    """

    seconds: float
    seconds_from_start: float
    merged_seconds: float | None
    cpu_seconds: float
    links_before: int
    duplicate_ratio: float | None
    equal: bool


def write_updates(directory: Path, peers: int, megabytes: float) -> None:
    """Noise for all, the same as our members make in their first round."""
    for place in range(peers):
        arrays = weights(model(Spec({}, place, megabytes)), np.random.default_rng(place + 1))
        with (directory / f"update-{place}.bin").open("wb") as file:
            for array in arrays.values():
                file.write(array.tobytes())


def run(system: System, python: str, work: Work, scratch: Path) -> dict[str, Lap]:
    """One lap for each of a system's rounds, with new processes.

    Raises:
        FleetError: a process failed, or all together were too slow.
    """
    with _processes(system, python, work, scratch) as fleet:
        addresses = [process.hear("address")["address"] for process in fleet]
        _say(fleet, json.dumps(addresses))
        _hear(fleet, "ready")
        return {kind: _round(system, fleet, kind, work) for kind in system.rounds}


def _say(fleet: Sequence[Process], line: str) -> None:
    for process in fleet:
        process.say(line)


def _hear(fleet: Sequence[Process], key: str) -> list[dict[str, Any]]:
    return [process.hear(key) for process in fleet]


def warm(directory: Path, size: int) -> None:
    """Write and drop ``size`` bytes, so that a virtual machine holds the memory for that many.

    Its host hands it over page by page, at ten times the cost of writing, and takes it back when
    it lies idle: else that cost falls to whichever system comes first.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    piece = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(min(size, free // 2) // len(piece)):
            file.write(piece)


def _round(system: System, fleet: Sequence[Process], kind: str, work: Work) -> Lap:
    warm(work.directory, work.bytes_written * 5 // 4)
    _say(fleet, f"prepare {kind}")
    links = _links(_hear(fleet, "prepared"))
    for _ in range(PARTINGS if kind == DIALLED else 0):
        if not links:
            break
        _say(fleet, "part")
        links = _links(_hear(fleet, "prepared"))
    began = time.monotonic()
    _say(fleet, "go")
    ends = _hear(fleet, "ended")
    _say(fleet, "check")
    checks = _hear(fleet, "cpu_seconds")
    return lap(began, ends, checks, links, work.digest if system.gathers else None)


def _links(answers: Sequence[dict[str, Any]]) -> int:
    ends: int = sum(answer.get("links", 0) for answer in answers)
    return ends // 2


def lap(
    began: float,
    ends: Sequence[dict[str, Any]],
    checks: Sequence[dict[str, Any]],
    links: int,
    expected: str | None,
) -> Lap:
    """What the processes' answers say; ``expected`` is what each must hold, where that is known.

    A system that begins later by its own doing, after a vote say, tells ``began`` itself.
    """
    word, began = began, max([began, *(end["began"] for end in ends if "began" in end)])
    merged = [end["merged"] for end in ends if "merged" in end]
    digests = {check["digest"] for check in checks}
    ended = max(end["ended"] for end in ends)
    return Lap(
        seconds=ended - began,
        seconds_from_start=ended - word,
        merged_seconds=max(merged) - began if merged else None,
        cpu_seconds=sum(check["cpu_seconds"] for check in checks),
        links_before=links,
        duplicate_ratio=_duplicates(checks),
        equal=(
            len(digests) == 1
            and (expected is None or digests == {expected})
            and all(check.get("complete", True) for check in checks)
        ),
    )


def _duplicates(checks: Sequence[dict[str, Any]]) -> float | None:
    payload: int = sum(check.get("payload", 0) for check in checks)
    duplicate: int = sum(check.get("duplicate", 0) for check in checks)
    return duplicate / payload if payload else None


@contextmanager
def _processes(system: System, python: str, work: Work, scratch: Path) -> Iterator[list[Process]]:
    """The processes, gone at the end, or killed when they take too long."""
    fleet: list[Process] = []
    with ExitStack() as stack:
        for place in range(work.peers + system.servers):
            own = scratch / f"process-{place}"
            own.mkdir(parents=True)
            task = Task(place, work.peers, work.topology, str(work.directory), str(own))
            file = own / "task.json"
            file.write_text(json.dumps(asdict(task)), encoding="utf-8")
            errors = stack.enter_context((own / "errors").open("w+b"))
            command = ["-m", f"benchmarks.systems.{system.module}", str(file), *system.arguments]
            process = Process(
                f"{system.name} {place}",
                command,
                errors,
                python=python,
                environment=environment(system, own),
            )
            stack.callback(process.end)
            fleet.append(process)
        with _in_time(system, fleet):
            yield fleet


@contextmanager
def _in_time(system: System, fleet: Sequence[Process]) -> Iterator[None]:
    late = threading.Event()

    def kill() -> None:
        late.set()
        for process in fleet:
            process.kill()

    timer = threading.Timer(system.patience, kill)
    timer.start()
    try:
        yield
    except FleetError as error:
        if late.is_set():
            raise FleetError(
                f"{system.name} did not finish within {system.patience:g} s"
            ) from error
        raise
    finally:
        timer.cancel()


def environment(system: System, own: Path) -> dict[str, str]:
    """Variables for a process: its files in its own directory, one thread for number crunching."""
    variables = {**os.environ, "TMPDIR": str(own), "OMP_NUM_THREADS": "1"}
    variables["GLOO_SOCKET_IFNAME"] = "lo"
    if system.environment is not None:
        # Of all that is installed here, a foreign interpreter shall see this package alone.
        shared = own / "path"
        shared.mkdir()
        (shared / "benchmarks").symlink_to(Path(__file__).resolve().parents[1])
        variables["PYTHONPATH"] = str(shared)
        variables["PYTHONDONTWRITEBYTECODE"] = "1"
    return variables
