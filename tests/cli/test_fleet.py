from __future__ import annotations

import os
from pathlib import Path

import pytest

from p2pfl_torrent.cli.fleet import Fleet, FleetError


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module for the fleet to run: its first argument is Python to execute."""
    (tmp_path / "told.py").write_text("import sys, os, signal, time\nexec(sys.argv[1])\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "told"


def test_a_line_that_was_printed_is_read(script: str, tmp_path: Path) -> None:
    with Fleet(tmp_path, {"COLOUR": "blue"}) as fleet:
        fleet.start(
            "a", script, ["print('hello', os.environ['COLOUR'], flush=True); print('half', end='')"]
        )
        assert fleet.first_line("a", 30) == "hello blue"
        assert fleet.lines("a") == ["hello blue"]


def test_a_failure_is_told_by_its_last_line(script: str, tmp_path: Path) -> None:
    with Fleet(tmp_path, {}) as fleet:
        fleet.start("a", script, ["sys.exit('noise\\np2pfl-torrent: The disk is full.')"])
        with pytest.raises(FleetError, match=r"^a failed: The disk is full\.$"):
            fleet.first_line("a", 30)


def test_a_silent_end_and_a_silent_process_are_told(script: str, tmp_path: Path) -> None:
    with Fleet(tmp_path, {}) as fleet:
        fleet.start("a", script, ["pass"])
        with pytest.raises(FleetError, match="a failed: it ended without a word"):
            fleet.first_line("a", 30)
        fleet.start("b", script, ["time.sleep(60)"])
        with pytest.raises(FleetError, match="b failed: it said nothing for 0 s"):
            fleet.first_line("b", 0.01)


def test_a_death_by_signal_is_told(script: str, tmp_path: Path) -> None:
    with Fleet(tmp_path, {}) as fleet:
        fleet.start("a", script, ["os.kill(os.getpid(), signal.SIGKILL)"])
        with pytest.raises(FleetError, match=r"^a failed: it was killed by SIGKILL\.$"):
            fleet.first_line("a", 30)


def test_nothing_outlives_the_block(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pfl_torrent.cli.fleet.GRACE", 0.5)
    gentle = "print(os.getpid(), flush=True); time.sleep(60)"
    stubborn = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {gentle}"
    with pytest.raises(KeyboardInterrupt), Fleet(tmp_path, {}) as fleet:
        fleet.start("gentle", script, [gentle])
        fleet.start("stubborn", script, [stubborn])
        pids = [int(fleet.first_line(label, 30)) for label in ("gentle", "stubborn")]
        raise KeyboardInterrupt
    assert fleet.killed == ["stubborn"]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
