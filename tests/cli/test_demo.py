"""The demo as a user runs it: real processes, real sockets on 127.0.0.1."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = [sys.executable, "-m", "p2pfl_torrent", "demo"]


def children_of(pid: int) -> list[int]:
    """Pids of a process's children."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_three_peers_learn_together(tmp_path: Path) -> None:
    out, run_dir = tmp_path / "demo.json", tmp_path / "run"
    arguments = ["--peers", "3", "--rounds", "2", "--json", str(out), "--run-dir", str(run_dir)]
    done = subprocess.run(
        [*DEMO, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=380
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    told = json.loads(out.read_text())
    assert told["peers"] == 3
    assert len(told["accuracy_alone"]) == 3
    assert 0.85 < told["accuracy_central"] <= 1
    assert [each["round"] for each in told["rounds"]] == [1, 2]
    for each in told["rounds"]:
        assert each["completeness"] == 1.0
        assert len({peer["model_hash"] for peer in each["peers"]}) == 1
        assert each["seconds"] > 0
    assert len({peer["peer_id"] for peer in told["rounds"][0]["peers"]}) == 3
    merged = told["rounds"][-1]["peers"][0]["accuracy_merged"]
    assert merged > max(told["accuracy_alone"])
    assert "equal on 3" in done.stdout
    for number in (1, 2, 3):
        logs = run_dir / f"peer-{number}"
        assert "event" in (logs / "events.jsonl").read_text()
        assert len(json.loads((logs / "metrics.json").read_text())["rounds"]) == 2
        assert "chunk round=1" in (logs / "bittorrent_logs" / "chunk_exchange.log").read_text()
        assert (logs / "topology_logs" / "connection_messages.jsonl").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_behind(number: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [*DEMO, "--peers", "3"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    children: list[int] = []
    try:
        deadline = time.monotonic() + 120
        while len(children) < 6:  # bootstrap, three peers, two baselines
            assert process.poll() is None
            assert time.monotonic() < deadline
            children = children_of(process.pid)
            time.sleep(0.05)  # of another process nothing tells us
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, errors) == (130, b"")
    assert not [pid for pid in children if alive(pid)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_peers_death_ends_the_demo_with_its_sentence(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*DEMO, "--peers", "3", "--rounds", "50", "--run-dir", str(tmp_path / "run")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        events = tmp_path / "run" / "peer-2" / "events.jsonl"
        while not (events.exists() and "RoundFinished" in events.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)  # of another process nothing tells us
        [victim] = [
            pid
            for pid in children_of(process.pid)
            if b"--part\x002/3\x00" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(victim, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert errors == "p2pfl-torrent: peer-2 failed: it was killed by SIGKILL.\n"
