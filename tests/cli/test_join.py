"""Two members and a bootstrap node, each a process, as in the README's three terminals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from p2pfl_torrent.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = str(ROOT / "examples" / "swarm.yaml")


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "p2pfl_torrent", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_readmes_three_terminals(tmp_path: Path) -> None:
    with running("bootstrap") as bootstrap:
        entry = ["--bootstrap", first_line(bootstrap), "--rounds", "2"]
        results = [tmp_path / "1.json", tmp_path / "2.json"]
        with (
            running("join", EXAMPLE, *entry, "--part", "1/2", "--json", str(results[0])) as one,
            running("join", EXAMPLE, *entry, "--part", "2/2", "--json", str(results[1])) as two,
        ):
            outputs = [process.communicate(timeout=200) for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), outputs
    told = [json.loads(result.read_text()) for result in results]
    for (out, errors), result in zip(outputs, told, strict=True):
        assert errors == ""
        assert result["addrs"][0] in out.splitlines()
        assert result["peer_id"] in result["addrs"][0]
        assert [each["round"] for each in result["rounds"]] == [1, 2]
        assert "round 2 finished (complete)" in out
    ends = {result["rounds"][-1]["model_hash"] for result in told}
    assert len(ends) == 1
    assert told[0]["rounds"][-1]["accuracy_after"] > 0.8


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_nobody_else_comes_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "swarm.yaml"
    file.write_text("federate: {client_num: 2, join_timeout: 1}")
    with running("join", str(file), "--part", "1/2", "--json", "-") as peer:
        out, errors = peer.communicate(timeout=100)
    assert (peer.returncode, out) == (1, "")
    [*view, sentence] = errors.splitlines()
    assert sentence.startswith("p2pfl-torrent: Only 1 of 2 members came within 1 s")
    assert not any("Traceback" in line for line in view)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_member_that_waits_can_be_interrupted(number: int, tmp_path: Path) -> None:
    file = tmp_path / "swarm.yaml"
    file.write_text("federate: {client_num: 2, join_timeout: 100}")
    with running("join", str(file), "--part", "1/2", "--state", str(tmp_path / "state")) as peer:
        assert "/p2p/" in first_line(peer)  # for the others, who have not come yet
        assert "joined swarm" in first_line(peer)
        peer.send_signal(number)
        _, errors = peer.communicate(timeout=60)
    assert (peer.returncode, errors) == (130, "")


@pytest.mark.parametrize("method", ["snip", "fisher"])
def test_a_gradient_method_in_the_file_is_enough(tmp_path: Path, method: str) -> None:
    """Alone, so that it only has to be allowed to begin."""
    config = tmp_path / "swarm.yaml"
    config.write_text(
        "bittorrent: {enable: false}\n"
        f"chunk: {{importance_config: {{snip: {{use_cached: false}}}}, "
        f"importance_method: {method}}}\n"
        "task: {epochs: 1}\n"
    )
    result = tmp_path / "result.json"
    arguments = ["join", str(config), "--part", "1/4", "--rounds", "1", "--json", str(result)]
    assert main(arguments) == 0
    assert [each["closed_by"] for each in json.loads(result.read_text())["rounds"]] == ["solo"]
