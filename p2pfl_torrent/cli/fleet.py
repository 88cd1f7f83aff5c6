"""The processes of a demo: this program's own commands, each with its output in files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, TracebackType

from p2pfl_torrent.cli.parent import VARIABLE
from p2pfl_torrent.core.errors import P2PFLError

GRACE = 10.0  # seconds a process gets to leave before it is killed
PATIENCE = 120.0  # seconds for a node's first line: libp2p loads slowly where all load at once
POLL = 0.1  # seconds between two looks at a process


class FleetError(P2PFLError):
    """A process did not do what it was started for; the text has its own sentence."""


class Fleet:
    """Child processes by label; none outlives the ``with`` block, nor this process if it is killed.

    Args:
        directory: where a process's output goes, as ``LABEL.stdout`` and ``LABEL.stderr``.
        environment: variables that the processes get besides this one's own.

    Attributes:
        killed: labels of those that had to be killed at the end.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self.killed: list[str] = []
        self._dir = directory
        self._environment = {**os.environ, **environment, VARIABLE: "1"}
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
        for process in self._processes.values():
            if process.stdin is not None:
                process.stdin.close()
        self._files.close()

    def start(self, label: str, module: str, arguments: Sequence[str]) -> None:
        """Run a module of this package, which calls ``parent.end_with_parent``."""
        out = self._files.enter_context(self._output(label).open("wb"))
        errors = self._files.enter_context(self._errors(label).open("wb"))
        with _uninterrupted():
            self._processes[label] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,  # never written to: its end tells that this process is gone
                stdout=out,
                stderr=errors,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others
            )

    def _output(self, label: str) -> Path:
        return self._dir / f"{label}.stdout"

    def _errors(self, label: str) -> Path:
        return self._dir / f"{label}.stderr"

    def code(self, label: str) -> int | None:
        """The exit code of a process; None while it runs."""
        return self._processes[label].poll()

    def check(self, label: str) -> bool:
        """Whether a process has ended well.

        Raises:
            FleetError: it has failed; the text ends with its own sentence.
        """
        code = self.code(label)
        if code not in (None, 0):
            raise FleetError(f"{label} failed: {self.sentence(label)}")
        return code == 0

    def sentence(self, label: str) -> str:
        """Why a process failed, in its own words."""
        code = self.code(label)
        if code is not None and code < 0:
            return f"it was killed by {signal.Signals(-code).name}."
        lines = self._errors(label).read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("p2pfl-torrent: ") if lines else f"exit code {code}."

    def lines(self, label: str) -> list[str]:
        """The whole lines that a process has printed so far."""
        return self._output(label).read_text(errors="replace").rpartition("\n")[0].splitlines()

    def first_line(self, label: str, patience: float = PATIENCE) -> str:
        """The first line a process prints.

        Raises:
            FleetError: it ended without one, or none came in time.
        """
        deadline = time.monotonic() + patience
        while not self.lines(label):
            if self.check(label):
                raise FleetError(f"{label} failed: it ended without a word.")
            if time.monotonic() > deadline:
                raise FleetError(f"{label} failed: it said nothing for {patience:.0f} s.")
            time.sleep(POLL)
        return self.lines(label)[0]

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


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait: between the start of a process and its name here nobody would end it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    came = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)
