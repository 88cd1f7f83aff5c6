from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from p2pfl_torrent import __version__
from p2pfl_torrent.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
BOOTSTRAP = [sys.executable, "-m", "p2pfl_torrent", "bootstrap"]
COMMANDS = ["demo", "bootstrap", "join"]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_and_json(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"example:\n  p2pfl-torrent {command}" in out
    assert "--json FILE" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"p2pfl-torrent {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--peers", "1"], "argument --peers: 1 must be from 2 to 500"),
        (["demo", "--peers", "many"], "'many' is not a whole number"),
        (["demo", "--rounds", "0"], "argument --rounds: 0 must be from 1"),
        (["demo", "--topology", "moebius"], "invalid choice: 'moebius'"),
        (["demo", "--timeout", "nan"], "seconds must be above 0"),
        (["join"], "required: CONFIG"),
        (["join", "x.yaml", "--part", "3"], "'3' is not of the form K/N"),
        (["join", "x.yaml", "--part", "3/2"], "there is no part 3 of 2"),
        (["join", "x.yaml", "--part", "0/2"], "there is no part 0 of 2"),
    ],
)
def test_what_cannot_be_understood_exits_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that fails."""
    assert main(arguments) == 1
    told = capsys.readouterr()
    assert told.out == ""
    [line] = told.err.splitlines()
    assert line.startswith("p2pfl-torrent: ")
    return line.removeprefix("p2pfl-torrent: ")


def test_an_error_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.yaml"
    assert failure(["join", str(missing)], capsys) == (
        f"{missing}: No such file or directory; give the path of a YAML file."
    )


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["join", str(tmp_path / "none.yaml"), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--topology", "custom"], "--topology custom needs --graph FILE"),
        (["--topology", "ring", "--graph", "x.yaml"], "--graph makes the topology custom"),
        (["--topology", "ring", "--connections", "3"], "--connections is for a mesh"),
        (["--graph", "none.yaml"], "none.yaml cannot be read: No such file or directory."),
        (["--partition", "even"], "Unknown partition 'even': write one of iid"),
        (["--recipe", "digit"], "task.recipe 'digit' is not known: did you mean digits?"),
        (["--json", "nowhere/x.json"], "nowhere/x.json cannot be written"),
    ],
)
def test_a_demo_that_cannot_be_is_told_before_anything_starts(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert failure(["demo", *arguments], capsys).startswith(told)


def test_join_says_which_part_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "swarm.yaml"
    file.write_text("federate: {client_num: 3}")
    assert failure(["join", str(file)], capsys) == (
        "Say which part of the data this peer trains on: --part K/3 with K from 1 to 3, or "
        "task.part in the configuration."
    )
    file.write_text("task: {part: 4, parts: 3}")
    assert failure(["join", str(file)], capsys) == (
        "task.part is 4, but the data is cut into 3 parts."
    )


def test_help_comes_without_loading_torch_or_libp2p() -> None:
    code = (
        "import sys\n"
        "from p2pfl_torrent.cli import main\n"
        "assert main(['demo', '--help']) == 0\n"
        "heavy = {'torch', 'libp2p', 'numpy', 'trio', 'sklearn', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_bootstrap_prints_its_address_and_leaves_quietly(number: int, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [*BOOTSTRAP, "--state", str(tmp_path / "state"), "--json", str(tmp_path / "b.json")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        try:
            assert process.stdout is not None
            address = process.stdout.readline().decode().rstrip("\n")
            process.send_signal(number)
            rest, _ = process.communicate(timeout=30)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130
    assert (rest, errors.read_text()) == (b"", "")
    assert address.startswith("/ip4/127.0.0.1/tcp/")
    assert "/p2p/12D3KooW" in address
    assert json.loads((tmp_path / "b.json").read_text())["addrs"] == [address]
    assert (tmp_path / "state" / "identity.key").stat().st_mode & 0o777 == 0o600


def test_a_bootstrap_put_behind_by_a_script_can_be_ended() -> None:
    # Such a shell starts it with SIGINT ignored, and SIGTERM is taken by way of SIGINT.
    ignore = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    ignore += "os.execv(sys.executable, [sys.executable, '-m', 'p2pfl_torrent', 'bootstrap'])"
    process = subprocess.Popen([sys.executable, "-c", ignore], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.terminate()
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_end_changes_nothing(number: int) -> None:
    code = (
        "import atexit, sys; from p2pfl_torrent.cli import main\n"
        "atexit.register(lambda: (print(flush=True), sys.stdin.readline()))\n"
        "sys.argv[1:] = ['join', 'none.yaml']; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"  # it has told what was wrong, and ends
        process.send_signal(number)
        _, errors = process.communicate("\n", timeout=30)
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1


def test_other_peers_words_cannot_command_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    told = failure(["join", "\x1b[2J\u202e\n.yaml"], capsys)
    assert told.startswith("\\x1b[2J\\u202e .yaml: No such file")


def test_a_bad_address_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nonsense" in failure(["bootstrap", "--listen", "nonsense"], capsys)
