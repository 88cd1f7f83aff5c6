"""Ctrl-C, wherever the user's program is: nothing hangs, the state directory is free again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("interrupted.py")
ROOT = PROGRAM.parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("place", ["enter", "training", "exchange", "leave", "error"])
@pytest.mark.parametrize("style", ["blocking", "trio"])
def test_ctrl_c_ends_a_peer_in_order(style: str, place: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), style, place, str(tmp_path / "state")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            if place != "error":
                assert process.stdout.readline() == "now\n"
                process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=100)
        finally:
            process.kill()
    assert out == "released\n", errors
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT
