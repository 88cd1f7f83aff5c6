"""The processes of a demo: this program's own commands, each with its output in files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from p2pfl_torrent.core.errors import P2PFLError

GRACE = 10.0  # seconds a process gets to leave before it is killed
PATIENCE = 120.0  # seconds for a node's first line: libp2p loads slowly where all load at once
POLL = 0.1  # seconds between two looks at a process

ONE_THREAD: Mapping[str, str] = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Many peers share a machine: more threads than cores only get in each other's way."""


class FleetError(P2PFLError):
    """A process did not do what it was started for; the text has its own sentence."""


class Fleet:
    """Child processes by label; none outlives the ``with`` block.

    Attributes:
        killed: labels of those that had to be killed at the end.
    """

    def __init__(self, run_dir: Path) -> None:
        self.killed: list[str] = []
        self._dir = run_dir
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._files = ExitStack()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop(list(self._processes))
        self._files.close()

    def start(self, label: str, module: str, arguments: Sequence[str]) -> None:
        """Run a module of this package; its output goes to ``LABEL.stdout`` and ``.stderr``."""
        out = self._files.enter_context(self.output(label).open("wb"))
        errors = self._files.enter_context(self._errors(label).open("wb"))
        self._processes[label] = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            env={**os.environ, **ONE_THREAD},
        )

    def output(self, label: str) -> Path:
        """The file with what a process printed."""
        return self._dir / f"{label}.stdout"

    def _errors(self, label: str) -> Path:
        return self._dir / f"{label}.stderr"

    def code(self, label: str) -> int | None:
        """The exit code of a process; None while it runs."""
        return self._processes[label].poll()

    def sentence(self, label: str) -> str:
        """Why a process failed, in its own words."""
        code = self.code(label)
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        lines = self._errors(label).read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("p2pfl-torrent: ") if lines else f"exit code {code}"

    def first_line(self, label: str, patience: float = PATIENCE) -> str:
        """The first line a process prints.

        Raises:
            FleetError: it ended without one, or none came in time.
        """
        self._until(label, patience, lambda: b"\n" in self.output(label).read_bytes())
        text = self.output(label).read_text()
        if "\n" not in text:
            raise FleetError(f"{label} did not start: {self.sentence(label)}")
        return text.splitlines()[0]

    def result(self, label: str, patience: float) -> list[str]:
        """All lines of a process, once it has ended.

        Raises:
            FleetError: it failed, or did not end in time.
        """
        self._until(label, patience, lambda: False)
        if self.code(label) != 0:
            raise FleetError(f"{label} failed: {self.sentence(label)}")
        return self.output(label).read_text().splitlines()

    def _until(self, label: str, patience: float, done: Callable[[], bool]) -> None:
        """Wait for a process to be done or to end."""
        deadline = time.monotonic() + patience
        while self.code(label) is None and not done():
            if time.monotonic() > deadline:
                raise FleetError(f"{label} was not done after {patience:.0f} s.")
            time.sleep(POLL)

    def stop(self, labels: Sequence[str]) -> None:
        """End processes: ask, wait a little, then kill."""
        running = {label: self._processes[label] for label in labels if self.code(label) is None}
        for process in running.values():
            process.terminate()
        deadline = time.monotonic() + GRACE
        for label, process in running.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.killed.append(label)
                process.kill()
                process.wait()
