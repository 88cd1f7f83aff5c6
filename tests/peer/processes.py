"""Leads members that are processes (``member.py``) and hears what they tell."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

MEMBER = Path(__file__).with_name("member.py")
PATIENCE = 100.0  # seconds for anything; two cores may be busy with other tests

Value = Any
"""What a JSON line holds: the attributes of an event, a report or statistics."""


class Member:
    """One process and everything it has told so far."""

    def __init__(self, label: str, process: subprocess.Popen[str]) -> None:
        self.label = label
        self.process = process
        self.told: list[tuple[str, Value]] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def listen(self, seconds: float) -> bool:
        """Take in what it told; whether there was anything within so many seconds."""
        try:
            line = self._lines.get(timeout=seconds) if seconds else self._lines.get_nowait()
        except queue.Empty:
            return False
        if line is None:
            raise AssertionError(f"{self.label} ended with {self.process.wait()}: {self.errors()}")
        if not line.endswith("\n"):
            return True  # it was killed in the middle of a word
        said = json.loads(line)
        self.told.append((said["kind"], said["value"]))
        return True

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def find(self, kind: str, **values: object) -> Value | None:
        """The first thing of a kind, with these values, that it told."""
        for told, value in self.told:
            if told == kind and all(value[name] == wanted for name, wanted in values.items()):
                return value
        return None

    def wait_for(self, kind: str, **values: object) -> Value:
        """What it tells of a kind, with these values: already told, or within PATIENCE."""
        until(lambda: self.find(kind, **values) is not None, [self], f"{kind} {values}")
        return self.find(kind, **values)

    def go(self) -> None:
        """Let it train and exchange one round."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    @property
    def peer_id(self) -> str:
        return str(self.wait_for("Joined")["peer"])

    @property
    def address(self) -> str:
        return str(self.wait_for("addrs")[0])

    def report(self, round: int) -> Value:
        return self.wait_for("report", round=round)

    def kill(self) -> None:
        """Kill -9, and no grace."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass  # a line it will never read


def until(condition: Callable[[], bool], members: Sequence[Member], what: str) -> None:
    """Listen to members until a condition on what they told holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            last = {member.label: member.told[-3:] for member in members}
            raise AssertionError(f"no {what} within {PATIENCE:g} s; last told: {last}")
        heard = [member.listen(0.0) for member in members]
        if not any(heard):
            members[0].listen(0.01)


class Swarm:
    """Members started so far, all with the same configuration but for their bootstrap."""

    def __init__(self, directory: Path, sections: Mapping[str, Any], megabytes: int) -> None:
        self.members: list[Member] = []
        self._directory = directory
        self._sections = sections
        self._megabytes = megabytes
        self._stack = ExitStack()

    def start(self, bootstrap: Sequence[str], state: str = "") -> Member:
        """One more member, which enters through these addresses."""
        place = len(self.members) + 1
        config = self._directory / f"peer-{place}.yaml"
        sections = {**self._sections, "network": {"bootstrap": list(bootstrap)}}
        if state:
            sections["storage"] = {"state_dir": state}
        config.write_text(yaml.safe_dump(sections), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, str(MEMBER), str(config), str(place), str(self._megabytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(self._directory)},
        )
        member = Member(f"peer-{place}", process)
        self._stack.callback(member.close)
        self.members.append(member)
        return member

    def close(self) -> None:
        self._stack.close()


@contextmanager
def swarm(directory: Path, sections: Mapping[str, Any], megabytes: int = 1) -> Iterator[Swarm]:
    """A swarm of processes, none of which outlives the block."""
    result = Swarm(directory, sections, megabytes)
    try:
        yield result
    finally:
        result.close()


@contextmanager
def bootstrap_node() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A bootstrap-only node, and the address it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "p2pfl_torrent", "bootstrap"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()
