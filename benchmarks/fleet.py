"""Leads the processes of a benchmark, line by line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from benchmarks.member import Spec


class FleetError(Exception):
    """A process ended before its time."""


class Process:
    """One child that answers lines with JSON lines."""

    def __init__(
        self,
        label: str,
        arguments: Sequence[str],
        errors: IO[bytes],
        *,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        within: Sequence[str] = (),
    ) -> None:
        """``within`` are words before the command, by which it runs somewhere else."""
        self.label = label
        self._errors = errors
        self._child = subprocess.Popen(
            [*within, python, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
        )

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._child.pid

    def say(self, line: str) -> None:
        """One line on its stdin."""
        assert self._child.stdin is not None
        self._child.stdin.write(line.encode() + b"\n")
        self._child.stdin.flush()

    def hear(self, key: str) -> dict[str, Any]:
        """The next answer that has this key; others before it are passed over.

        Raises:
            FleetError: it ended without.
        """
        assert self._child.stdout is not None
        for line in self._child.stdout:
            answer: dict[str, Any] = json.loads(line)
            if key in answer:
                return answer
        code = self._child.wait()
        self._errors.seek(0)
        raise FleetError(f"{self.label} ended with {code}: {self._errors.read().decode()[-2000:]}")

    def kill(self) -> None:
        """End it at once; whoever waits to hear from it gets a FleetError."""
        self._child.kill()

    def end(self) -> None:
        """Close its stdin, which ends it, and make sure."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._child.wait(30)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


@contextmanager
def members(specs: Sequence[Spec], directory: Path) -> Iterator[list[Process]]:
    """A swarm of members that have all joined; the first is the founder."""
    with gathered(specs, directory) as fleet:
        for process in fleet:
            process.hear("ready")
        yield fleet


@contextmanager
def gathered(
    specs: Sequence[Spec], directory: Path, within: Sequence[Sequence[str]] = ()
) -> Iterator[list[Process]]:
    """Members of a swarm that have begun to join, the first as its founder.

    Those that wait for a word before they join all listen.

    Args:
        within: for each member, words before its command.
    """
    with ExitStack() as stack:
        fleet: list[Process] = []
        entry: list[str] = []
        for spec, words in zip(specs, within or [()] * len(specs), strict=True):
            network = {**spec.network, "bootstrap": list(entry)}
            sections = {**spec.config, "network": network}
            file = directory / f"member-{spec.place}.json"
            file.write_text(json.dumps({**asdict(spec), "config": sections}), encoding="utf-8")
            errors = stack.enter_context((directory / f"member-{spec.place}.err").open("w+b"))
            process = Process(
                f"member {spec.place}",
                ["-m", "benchmarks.member", str(file)],
                errors,
                within=words,
            )
            stack.callback(process.end)
            fleet.append(process)
            if not entry:
                entry.append(process.hear("address")["address"])
        for process, spec in zip(fleet[1:], specs[1:], strict=True):
            if spec.waits:
                process.hear("address")
        yield fleet
