"""A program that embeds a peer gets its run directory from the peer itself, in either style."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from p2pfl_torrent import AsyncPeer, P2PFLError, Peer, PeerConfig
from p2pfl_torrent.core.reports import Joined, Left, RoundFinished
from p2pfl_torrent.runlog import (
    CONNECTIONS,
    EXCHANGE,
    METRICS,
    RunLogError,
    read_events,
    read_statistics,
)

ROUNDS = 2


def alone(run_dir: Path) -> PeerConfig:
    """A peer of a swarm of one, whose rounds close at once."""
    return PeerConfig.from_mapping(
        {
            "federate": {"client_num": 1, "total_round_num": ROUNDS},
            "bittorrent": {"enable": False},
            "storage": {"run_dir": str(run_dir)},
        }
    )


def check(run_dir: Path, peer_id: str) -> None:
    events = [logged.event for logged in read_events(run_dir)]
    assert isinstance(events[0], Joined)
    assert events[0].peer == peer_id
    finished = [event.report.round for event in events if isinstance(event, RoundFinished)]
    assert finished == list(range(1, ROUNDS + 1))
    assert events[-1] == Left("finished")
    statistics = read_statistics(run_dir)
    assert statistics is not None
    assert (statistics.peer, statistics.phase) == (peer_id, "stopped")
    assert "finished round=2" in (run_dir / EXCHANGE).read_text()
    assert "Joined" in (run_dir / CONNECTIONS).read_text()
    assert len(json.loads((run_dir / METRICS).read_text())["rounds"]) == ROUNDS


def test_a_blocking_peer_keeps_its_run_directory(tmp_path: Path) -> None:
    with Peer(alone(tmp_path), nn.Linear(4, 2)) as peer:
        for _ in peer.rounds():
            peer.exchange(num_samples=1)
    check(tmp_path, peer.peer_id)


async def test_a_trio_peer_keeps_its_run_directory(tmp_path: Path) -> None:
    async with AsyncPeer(alone(tmp_path), nn.Linear(4, 2)) as peer:
        async for _ in peer.rounds():
            await peer.exchange(num_samples=1)
    check(tmp_path, peer.peer_id)


def test_the_log_ends_with_what_went_wrong(tmp_path: Path) -> None:
    nobody = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWGQmdpzHXCqLno4mMxWXKNFQHASBeF99gTm2JR8Vu5Bdc"
    config = PeerConfig.from_mapping(
        {
            "topology": {"max_connection_attempts": 1},
            "network": {"bootstrap": [nobody]},
            "storage": {"run_dir": str(tmp_path)},
        }
    )
    with pytest.raises(P2PFLError, match="No bootstrap peer"), Peer(config, nn.Linear(4, 2)):
        raise AssertionError("must not get in")
    [left] = [logged.event for logged in read_events(tmp_path)]
    assert isinstance(left, Left)
    assert left.reason.startswith("No bootstrap peer")


def test_a_run_directory_that_cannot_be_written_is_told_before_joining(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    peer = Peer(alone(tmp_path / "file"), nn.Linear(4, 2))
    events = peer.events()
    with pytest.raises(RunLogError, match="cannot be written"), peer:
        raise AssertionError("must not get in")
    assert list(events) == []  # and whoever listens is let go


def test_what_could_not_be_written_is_told_at_the_end(tmp_path: Path) -> None:
    trained = []
    with pytest.raises(P2PFLError, match="could not be written"):
        with Peer(alone(tmp_path), nn.Linear(4, 2)) as peer:
            (tmp_path / "statistics.new").mkdir()
            for round in peer.rounds():
                peer.exchange(num_samples=1)
                trained.append(round)
    assert trained == [1, 2]  # to its end
