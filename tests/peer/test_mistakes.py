"""A program that embeds a peer gets the same sentences as P2PFLErrors, and nothing goes on."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from torch import nn

from p2pfl_torrent import AsyncPeer, P2PFLError, Peer, PeerConfig
from p2pfl_torrent.core.errors import ConfigError, GenesisMismatchError
from p2pfl_torrent.overlay.host import HostError
from p2pfl_torrent.overlay.identity import IdentityError
from p2pfl_torrent.peer.identity import identity_of
from p2pfl_torrent.peer.network import JoinError
from p2pfl_torrent.store import StoreError

STRANGER = "12D3KooWGQmdpzHXCqLno4mMxWXKNFQHASBeF99gTm2JR8Vu5Bdc"


def config(**values: object) -> PeerConfig:
    return PeerConfig().with_values(
        federate__join_timeout=100.0, topology__max_connection_attempts=1, **values
    )


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No thread of ours and no temporary directory outlives a failure."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    yield
    assert [t for t in threading.enumerate() if t.name == "p2pfl-torrent"] == []
    # trio keeps idle worker threads for its next call; they are daemons and hold no program up.
    assert [t for t in threading.enumerate() if not t.daemon] == [threading.main_thread()]
    assert list(temporary.iterdir()) == []


def failure(kind: type[P2PFLError], config: PeerConfig, model: nn.Module | None = None) -> str:
    """The sentence with which a peer does not come up."""
    with pytest.raises(kind) as caught, Peer(config, model or nn.Linear(4, 2)):
        raise AssertionError("it came up")
    assert type(caught.value) is kind
    return str(caught.value)


@asynccontextmanager
async def founder() -> AsyncIterator[str]:
    """The address of a member that waits for a second one."""
    addresses, told = trio.open_memory_channel[str](1)
    peer = AsyncPeer(config(), nn.Linear(4, 2), on_address=addresses.send_nowait)

    async def wait() -> None:
        async with peer:
            raise AssertionError("a second member came")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        yield await told.receive()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("values", "model", "difference"),
    [
        (
            {"federate__total_round_num": 4},
            nn.Linear(4, 2),
            "federate.total_round_num is 4 here and 10 there",
        ),
        (
            {},
            nn.Linear(4, 3),
            "the model's tensor 'weight' is F32[3, 4] here and F32[2, 4] there",
        ),
        (
            {"chunk__include": ["weight"]},
            nn.Linear(4, 2),
            "the model has 1 tensor here and 2 there: 'bias' F32[2] is only there",
        ),
    ],
    ids=["genesis", "shape", "tensor"],
)
async def test_another_genesis_or_model(
    values: dict[str, object], model: nn.Module, difference: str
) -> None:
    async with founder() as address:
        other = config(network__bootstrap=[address], **values)
        told = await trio.to_thread.run_sync(failure, GenesisMismatchError, other, model)
    assert told == (
        f"The swarm 'swarm' at {address} has other terms: {difference}. Use the same "
        "configuration and model as its members, or another swarm.name for a swarm of your own."
    )


def test_what_the_model_lacks() -> None:
    assert "check include and exclude" in failure(ConfigError, config(chunk__exclude=["*"]))
    assert "reset: give the Peer your optimizer" in failure(
        ConfigError, config(federate__on_merge="reset")
    )


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("identity.key", b"", "identity.key is damaged: restore it from a backup"),
        ("chunks.sqlite", b"", "has lost its identity.key: restore it from a backup"),
    ],
)
def test_a_missing_or_damaged_key(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / name).write_bytes(content)
    (state / name).chmod(0o600)
    assert told in failure(IdentityError, config(storage__state_dir=str(state)))
    assert [path.name for path in state.iterdir()] == [name]


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_state_directory_that_is_a_file(below: str, tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_text("mine")
    told = failure(StoreError, config(storage__state_dir=str(file / below)))
    assert told.startswith("storage.state_dir: ")
    assert "a file is in its way" in told
    assert file.read_text() == "mine"


def taken_port() -> socket.socket:
    """A port of this machine with a listener."""
    return socket.create_server(("127.0.0.1", 0))


def test_a_taken_port() -> None:
    with taken_port() as other:
        port = other.getsockname()[1]
        listen = f"/ip4/127.0.0.1/tcp/{port}"
        told = failure(HostError, config(network__listen=[listen]))
    assert told.startswith(f"Port {port} on 127.0.0.1 is taken: listen on another")


async def test_the_trio_face_says_the_same() -> None:
    with taken_port() as other:
        port = other.getsockname()[1]
        listen = f"/ip4/127.0.0.1/tcp/{port}"
        with pytest.raises(HostError, match=rf"^Port {port} on 127\.0\.0\.1 is taken"):
            async with AsyncPeer(config(network__listen=[listen]), nn.Linear(4, 2)):
                raise AssertionError("it came up")


def test_nobody_at_the_bootstrap_address() -> None:
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        address = f"/ip4/127.0.0.1/tcp/{bound.getsockname()[1]}/p2p/{STRANGER}"
        told = failure(JoinError, config(network__bootstrap=[address]))
    assert told == (
        f"No bootstrap peer could be reached after 1 attempt: {address}: Connection refused. "
        "Check network.bootstrap, and that the peer there is running."
    )


async def test_another_peer_at_the_bootstrap_address() -> None:
    async with founder() as actual:
        place, _, peer_id = actual.rpartition("/")
        address = f"{place}/{STRANGER}"
        wrong = config(network__bootstrap=[address])
        told = await trio.to_thread.run_sync(failure, JoinError, wrong)
    assert f"1 attempt: {address}: the peer that answers there is {peer_id}. Check" in told


async def test_a_peer_that_is_its_own_bootstrap_peer_founds_the_swarm(tmp_path: Path) -> None:
    """All members may have the same configuration, the founder too."""
    address = f"/ip4/127.0.0.1/tcp/4001/p2p/{identity_of(tmp_path)}"
    mine = config(network__bootstrap=[address], storage__state_dir=str(tmp_path))
    mine = mine.with_values(federate__join_timeout=0.5)
    told = await trio.to_thread.run_sync(failure, JoinError, mine)
    assert told.startswith("Only 1 of 2 members came within 0.5 s")
