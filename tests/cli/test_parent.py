"""What a demo started ends with it, also when nobody is left to end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from p2pfl_torrent.cli.parent import VARIABLE
from tests.cli.test_demo import DEMO, ROOT, children_of


def wait_until_gone(pids: list[int], patience: float) -> None:
    deadline = time.monotonic() + patience
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)  # of another's child nothing tells us


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended but that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("stage", ["while they start", "while they train"])
def test_a_killed_demo_leaves_no_process(stage: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [*DEMO, "--peers", "3", "--rounds", "50", "--run-dir", str(run_dir)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children: list[int] = []
    try:
        deadline = time.monotonic() + 120
        logs = run_dir / "peer-1" / "events.jsonl"
        while len(children) < 6 or (
            stage == "while they train"
            and not (logs.exists() and "RoundStarted" in logs.read_text())
        ):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)  # of another process nothing tells us
            children = children_of(process.pid)
    finally:
        process.kill()
        process.wait()
    try:
        wait_until_gone(children, 20)
    finally:
        for pid in children:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def child(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with its standard input and then runs some code."""
    begin = "from p2pfl_torrent.cli.parent import end_with_parent; end_with_parent(); "
    process = subprocess.Popen(
        [sys.executable, "-c", begin + code],
        cwd=ROOT,
        env={**os.environ, VARIABLE: "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_the_end_of_standard_input_ends_a_process_as_sigterm_does() -> None:
    with child("import time; print(flush=True); time.sleep(100)") as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert process.poll() is None
        process.communicate(timeout=30)  # which closes its input
    assert process.returncode == -signal.SIGTERM


def test_who_does_not_leave_in_order_is_ended() -> None:
    stubborn = (
        "import signal, time; from p2pfl_torrent.cli import parent; parent.GRACE = 0.1; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(100)"
    )
    with child(stubborn) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_process_tells_its_own_children_nothing() -> None:
    with child(f"import os; print({VARIABLE!r} in os.environ)") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"False\n"
