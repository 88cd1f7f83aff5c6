"""What people get wrong, as real processes: one sentence, an exit code, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "p2pfl_torrent"]
PREFIX = "p2pfl-torrent: "
STRANGER = "12D3KooWGQmdpzHXCqLno4mMxWXKNFQHASBeF99gTm2JR8Vu5Bdc"
KEY = bytes.fromhex("08011220") + bytes(range(32))  # a private key as libp2p writes it
SWARM = "federate: {client_num: 2, join_timeout: 600.0, total_round_num: 3}\n"
ONCE = "topology: {max_connection_attempts: 1}\n"  # the tries and their pauses are tested elsewhere


@dataclass(frozen=True, slots=True)
class Told:
    """How a command ended.

    Attributes:
        sentence: the one line on stderr, without the program's name.
        view: the lines on stdout.
        files: what lies in the folder it ran in, besides the configuration.
    """

    code: int
    sentence: str
    view: list[str]
    files: set[str]


class Desk:
    """Runs commands in a folder of their own, with a temporary directory that must end empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "desk"
        self.folder.mkdir()
        self._temporary = folder / "temporary"
        self._temporary.mkdir()

    def write(self, name: str, content: bytes, mode: int = 0o600) -> None:
        """A file in the folder."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)

    def run(self, *arguments: str, config: str = "") -> Told:
        """Run a command to its end; ``config`` is in swarm.yaml."""
        (self.folder / "swarm.yaml").write_text(config)
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=self.folder,
            env={**os.environ, "TMPDIR": str(self._temporary)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        with process:
            try:
                out, errors = process.communicate(timeout=100)
            finally:
                process.kill()
        with pytest.raises(ProcessLookupError):  # no process of its session is left
            os.killpg(process.pid, 0)
        assert list(self._temporary.iterdir()) == []
        [line] = errors.splitlines()
        assert line.startswith(PREFIX)
        assert line[-1] in ".?"
        assert not any(word in out + line for word in ("Traceback", "Error", "xception", "This is"))
        found = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}
        return Told(
            process.returncode,
            line.removeprefix(PREFIX),
            out.splitlines(),
            found - {"swarm.yaml"},
        )


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@dataclass(frozen=True, slots=True)
class Founder:
    """A member of the swarm that waits for the second one."""

    address: str
    state: Path

    @property
    def listen(self) -> str:
        """Its address without its id."""
        return self.address.partition("/p2p/")[0]

    @property
    def peer_id(self) -> str:
        """Its id."""
        return self.address.rpartition("/")[2]


@pytest.fixture(scope="module")
def founder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Founder]:
    folder = tmp_path_factory.mktemp("founder")
    (folder / "swarm.yaml").write_text(SWARM)
    process = subprocess.Popen(
        [*COMMAND, "join", "swarm.yaml", "--part", "1/2", "--state", "state"],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().rstrip("\n")
            assert "joined swarm" in process.stdout.readline()
            yield Founder(address, folder / "state")
            assert process.poll() is None  # nobody's mistake is the founder's end
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()


JOIN = ("join", "swarm.yaml", "--part", "2/2")
STATE = ("--state", "state")


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("config", "difference"),
    [
        (
            "federate: {client_num: 2, join_timeout: 600.0, total_round_num: 4}\nswarm: {seed: 5}",
            "federate.total_round_num is 4 here and 3 there; swarm.seed is 5 here and 0 there",
        ),
        (
            f"{SWARM}chunk: {{exclude: ['linear2.*']}}",
            "the model has 6 tensors here and 8 there: 'linear2.weight' F32[10, 64] is only there",
        ),
    ],
    ids=["genesis", "model"],
)
def test_another_genesis_or_model(
    config: str, difference: str, founder: Founder, desk: Desk
) -> None:
    told = desk.run(*JOIN, *STATE, "--bootstrap", founder.address, config=config)
    assert told.code == 1
    assert told.sentence == (
        f"The swarm 'swarm' at {founder.address} has other terms: {difference}. Use the same "
        "configuration and model as its members, or another swarm.name for a swarm of your own."
    )
    assert told.files == {"state", "state/identity.key"}  # as asked, and good for the next try
    [address] = told.view
    assert "/p2p/" in address


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("", "Say which part of the data this peer trains on: --part K/2 with K from 1 to 2, or "
         "task.part in the configuration."),
        ("task: {part: 3}", "task.part is 3, but the data is cut into 2 parts."),
        ("tasks: {part: 1}", "swarm.yaml: tasks is not a key; did you mean task.parts?"),
    ],
    ids=["no part", "no such part", "unknown key"],
)  # fmt: skip
def test_a_missing_key_in_the_configuration(config: str, sentence: str, desk: Desk) -> None:
    told = desk.run("join", "swarm.yaml", *STATE, config=config)
    assert (told.code, told.sentence) == (1, sentence)
    assert (told.view, told.files) == ([], set())


def test_arguments_that_cannot_be_understood_exit_2(tmp_path: Path) -> None:
    process = subprocess.run(
        [*COMMAND, "join", "--part", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.splitlines()[-1].startswith("p2pfl-torrent join: error: ")
    assert list(tmp_path.iterdir()) == []


def empty_key(desk: Desk) -> None:
    desk.write("state/identity.key", b"")


def damaged_key(desk: Desk) -> None:
    desk.write("state/identity.key", b"\0" + KEY[1:])


def public_key(desk: Desk) -> None:
    desk.write("state/identity.key", KEY, 0o644)


def folder_for_a_key(desk: Desk) -> None:
    (desk.folder / "state" / "identity.key").mkdir(parents=True)


def lost_key(desk: Desk) -> None:
    desk.write("state/chunks.sqlite", b"")


def file_for_a_state(desk: Desk) -> None:
    desk.write("state", b"")


DAMAGED = (
    "The identity key state/identity.key is damaged: restore it from a backup, or start as a new "
    "peer with another state directory."
)
LOST = (
    "The state directory state has lost its identity.key: restore it from a backup, or give "
    "another state directory to start as a new peer."
)
NO_DIRECTORY = (
    "The identity key state/identity.key cannot be used (state is not a directory): give another "
    "state directory."
)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("command", "prepare", "sentence"),
    [
        (JOIN, damaged_key, DAMAGED),
        (JOIN, lost_key, LOST),
        (JOIN, file_for_a_state, "The state directory state cannot be made (File exists): give "
         "another with --state."),
        (("bootstrap",), empty_key, DAMAGED),
        (("bootstrap",), public_key, "The identity key state/identity.key can be read by other "
         "users: run 'chmod 600 state/identity.key', or, if someone may have copied it, start as "
         "a new peer with another state directory."),
        (("bootstrap",), folder_for_a_key, "The identity key state/identity.key cannot be used "
         "(Is a directory): give another state directory."),
        (("bootstrap",), file_for_a_state, NO_DIRECTORY),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_missing_or_unusable_key(
    command: tuple[str, ...], prepare: Callable[[Desk], None], sentence: str, desk: Desk
) -> None:
    prepare(desk)
    before = {str(path.relative_to(desk.folder)) for path in desk.folder.rglob("*")}
    told = desk.run(*command, *STATE, config=SWARM)
    assert (told.code, told.sentence, told.view) == (1, sentence, [])
    assert told.files == before


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("command", [JOIN, ("bootstrap",)], ids=["join", "bootstrap"])
def test_a_taken_port(command: tuple[str, ...], founder: Founder, desk: Desk) -> None:
    told = desk.run(*command, "--listen", founder.listen, config=SWARM)
    port = founder.listen.rpartition("/")[2]
    assert (told.code, told.view, told.files) == (1, [], set())
    assert told.sentence == (
        f"Port {port} on 127.0.0.1 is taken: listen on another (network.listen or --listen), or "
        "on 0 for any that is free."
    )


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_state_directory_in_use(founder: Founder, desk: Desk) -> None:
    before = {path.name for path in founder.state.iterdir()}
    told = desk.run(*JOIN, "--state", str(founder.state), config=SWARM)
    assert told.code == 1
    assert told.sentence == (
        f"{founder.state} is in use by another peer: stop it, or give this one its own "
        "storage.state_dir."
    )
    assert {path.name for path in founder.state.iterdir()} == before


@contextmanager
def nobody() -> Iterator[str]:
    """A port on which nobody listens: bound, so that nobody else takes it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"/ip4/127.0.0.1/tcp/{bound.getsockname()[1]}/p2p/{STRANGER}"


@contextmanager
def web_server() -> Iterator[str]:
    """A port on which something else answers."""
    answer = "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n" + " " * 200
    code = (
        "import socket; server = socket.create_server(('127.0.0.1', 0)); "
        "print(server.getsockname()[1], flush=True)\n"
        f"while True: one = server.accept()[0]; one.recv(9); one.sendall({answer.encode()!r})"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with server:
        assert server.stdout is not None
        try:
            yield f"/ip4/127.0.0.1/tcp/{server.stdout.readline().strip()}/p2p/{STRANGER}"
        finally:
            server.kill()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("there", "reason"),
    [
        (nobody, "Connection refused"),
        (web_server, "what answers there is no libp2p peer (a message without its newline while "
         "negotiating)"),
    ],
)  # fmt: skip
def test_an_unreachable_bootstrap_peer(
    there: Callable[[], AbstractContextManager[str]], reason: str, desk: Desk
) -> None:
    with there() as address:
        told = desk.run(*JOIN, "--bootstrap", address, config=SWARM + ONCE)
    assert told.code == 1
    assert told.sentence == (
        f"No bootstrap peer could be reached after 1 attempt: {address}: {reason}. Check "
        "network.bootstrap, and that the peer there is running."
    )
    assert told.files == set()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_bootstrap_address_with_another_peers_id(founder: Founder, desk: Desk) -> None:
    address = f"{founder.listen}/p2p/{STRANGER}"
    told = desk.run(*JOIN, "--bootstrap", address, config=SWARM + ONCE)
    assert told.code == 1
    assert told.sentence == (
        f"No bootstrap peer could be reached after 1 attempt: {address}: the peer that answers "
        f"there is {founder.peer_id}. Check network.bootstrap, and that the peer there is running."
    )


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("/ip4/127.0.0.1/tcp/4001", "is not of the form /ip4/192.0.2.1/tcp/4001/p2p/12D3KooW"),
        ("localhost:4001", "is not of the form /ip4/192.0.2.1/tcp/4001/p2p/12D3KooW"),
    ],
)
def test_a_bootstrap_address_that_is_none(address: str, reason: str, desk: Desk) -> None:
    told = desk.run(*JOIN, "--bootstrap", address, config=SWARM)
    assert told.code == 1
    assert told.sentence.startswith(f"network.bootstrap: {address!r} {reason}")
    assert told.files == set()


def test_a_demo_into_a_folder_with_a_run(desk: Desk) -> None:
    (desk.folder / "run" / "peer-1").mkdir(parents=True)
    told = desk.run("demo", "--run-dir", "run")
    assert told.code == 1
    assert told.sentence == f"{desk.folder / 'run'} holds a run already: give another --run-dir."
    assert told.files == {"run", "run/peer-1"}
