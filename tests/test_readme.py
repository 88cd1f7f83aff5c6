"""What README.md shows is run here as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from p2pfl_torrent.cli.arguments import parse

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = PROGRAM.findall(README)
COMMANDS = [line[4:] for line in PROGRAM.sub("", README).splitlines() if line.startswith("    ")]
ROUNDS = 5

MAX_LINES = 40  # an example that is longer is not read


def test_the_readme_shows_a_blocking_and_a_trio_program() -> None:
    blocking, trio_style = PROGRAMS
    assert "with Peer(" in blocking
    assert "async with AsyncPeer(" in trio_style
    for program in PROGRAMS:
        assert len(program.splitlines()) <= MAX_LINES


@contextmanager
def terminal(directory: Path, command: str, **words: str) -> Iterator[subprocess.Popen[str]]:
    """Type one of the README's lines; words in capitals are filled in."""
    assert command in COMMANDS
    program, *arguments = [words.get(word, word) for word in command.split()]
    assert program == "python"
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},  # a terminal shows each line at once
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("program", PROGRAMS, ids=["blocking", "trio"])
def test_two_terminals_end_with_one_model(program: str, tmp_path: Path) -> None:
    (tmp_path / "my_training.py").write_text(program, encoding="utf-8")
    with ExitStack() as stack:
        one = stack.enter_context(terminal(tmp_path, "python my_training.py 1"))
        assert one.stdout is not None
        address = one.stdout.readline().strip()
        assert address.startswith("/ip4/127.0.0.1/tcp/")
        two = stack.enter_context(
            terminal(tmp_path, "python my_training.py 2 ADDRESS", ADDRESS=address)
        )
        outputs = [process.communicate(timeout=200) for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), outputs
    assert [errors for _, errors in outputs] == ["", ""]
    printed = [re.findall(r"^round (\d+): .* model (\w{16})$", out, re.M) for out, _ in outputs]
    assert [int(round) for round, _ in printed[0]] == list(range(1, ROUNDS + 1))
    assert printed[0] == printed[1]
    ours, theirs = (load_file(tmp_path / f"model-{place}.safetensors") for place in (1, 2))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert np.array_equal(tensor, theirs[name])
    for accuracy in re.findall(rf"^round {ROUNDS}: .*accuracy (\S+),", outputs[0][0], re.M):
        assert float(accuracy) > 0.7


def test_every_command_line_can_be_typed() -> None:
    assert COMMANDS
    for command in COMMANDS:
        program, *arguments = shlex.split(command, comments=True)
        if program == "p2pfl-torrent":
            parsed = parse(arguments)
            assert Path(ROOT / getattr(parsed, "config", "README.md")).exists()
        elif program == "make":
            rules = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{arguments[0]}:.*##", rules, re.MULTILINE)
        else:
            assert program == "python"  # run above


def test_every_place_it_names_is_there() -> None:
    places = re.findall(r"`((?:docs|examples|tests)/[\w./-]*|[A-Z]+\.md)`", README)
    assert places
    for place in places:
        assert (ROOT / place).exists(), place
