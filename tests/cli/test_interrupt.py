"""Ctrl-C and SIGTERM end a member in whatever it is doing: exit code 130, nothing left behind."""

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

from p2pfl_torrent.runlog import read_statistics

CONFIG = """
federate: {{client_num: 2, join_timeout: 600.0, train_timeout: {wait}, total_round_num: 1}}
bittorrent: {{timeout: {wait}, linger: 600.0}}
task: {{epochs: {epochs}}}
"""
FOR_EVER = 1_000_000  # epochs
SOME = 8  # epochs, that take a second or more


class Member:
    """A ``join`` in a folder of its own, with a temporary directory of its own."""

    def __init__(self, folder: Path, config: str, *arguments: str) -> None:
        self.folder = folder
        self.temporary = folder / "temporary"
        self.temporary.mkdir(parents=True)
        (folder / "swarm.yaml").write_text(config)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "p2pfl_torrent", "join", "swarm.yaml", *arguments,
             "--run-dir", "run"],
            cwd=folder,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )  # fmt: skip

    def address(self) -> str:
        """What it prints first."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def wait_until(self, phase: str) -> None:
        """Until it says that it is in a phase."""
        deadline = time.monotonic() + 100
        while (seen := read_statistics(self.folder / "run")) is None or seen.phase != phase:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, seen
            time.sleep(0.05)  # of another process nothing tells us

    def interrupt(self, number: signal.Signals) -> None:
        """End it, and see that it ends well."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=30)
        assert (self.process.returncode, errors) == (130, "")
        assert list(self.temporary.iterdir()) == []
        with pytest.raises(ProcessLookupError):  # no process of its session is left
            os.killpg(self.process.pid, 0)


@contextmanager
def two_members(tmp_path: Path, wait: float, epochs: int) -> Iterator[tuple[Member, Member]]:
    """One that trains some epochs, and one that trains for ever, so that the first must wait."""
    quick = Member(tmp_path / "quick", CONFIG.format(wait=wait, epochs=epochs), "--part", "1/2")
    members = [quick]
    try:
        slow = CONFIG.format(wait=wait, epochs=FOR_EVER)
        entry = ["--part", "2/2", "--bootstrap", quick.address()]
        members.append(Member(tmp_path / "slow", slow, *entry))
        yield quick, members[1]
    finally:
        for member in members:
            with member.process:
                member.process.kill()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_while_exchanging_and_while_training(tmp_path: Path) -> None:
    with two_members(tmp_path, wait=600.0, epochs=1) as (quick, slow):
        quick.wait_until("exchanging")
        slow.wait_until("training")
        quick.interrupt(signal.SIGINT)
        slow.interrupt(signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_while_seeding_at_the_end(tmp_path: Path) -> None:
    with two_members(tmp_path, wait=1.0, epochs=SOME) as (quick, slow):
        slow.wait_until("training")
        slow.process.send_signal(signal.SIGSTOP)  # its network would take the update meanwhile
        quick.wait_until("seeding")
        quick.interrupt(signal.SIGTERM)
        slow.process.send_signal(signal.SIGCONT)
        slow.interrupt(signal.SIGINT)
