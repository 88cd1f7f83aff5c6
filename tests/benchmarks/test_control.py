"""What `control` counts, and as what."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from libp2p.pubsub.pb import rpc_pb2

from benchmarks.control import Tally, what_for
from p2pfl_torrent.core import messages as m
from p2pfl_torrent.core.bitfield import Bitfield

UPDATE = b"u" * 32


def test_payload_is_no_control() -> None:
    tally = Tally()
    tally.message(m.Piece(1, bytes(1000)), 1009)
    tally.message(m.Request(1, UPDATE, 0, 0, 1), 45)
    tally.message(m.Have(UPDATE, (1,)), 43)
    tally.message(m.ManifestData(b"manifest"), 99)
    tally.message(m.Ping(1), 8)
    assert tally.bytes == {
        "requests": 9 + 45, "availability": 43, "manifests": 99, "edges": 8,
    }  # fmt: skip


def test_gossip_is_told_apart_by_its_topic() -> None:
    tally = Tally()
    packet = rpc_pb2.RPC(
        publish=[
            rpc_pb2.Message(data=bytes(100), topicIDs=["/p2pfl-torrent/ab/have/peer"]),
            rpc_pb2.Message(data=bytes(200), topicIDs=["/p2pfl-torrent/ab/manifests"]),
            rpc_pb2.Message(data=bytes(300), topicIDs=["/p2pfl-torrent/ab/members"]),
        ]
    ).SerializeToString()
    tally.packet(packet)
    assert sum(tally.bytes.values()) == len(packet)
    assert tally.bytes["gossip of availability"] > 100
    assert tally.bytes["gossip of manifests"] > 200
    assert tally.bytes["gossip of members"] > 300
    assert 0 < tally.bytes["gossip's own"] < 20


def test_code_is_told_apart_by_where_it_is() -> None:
    assert what_for(None) == "the event loop"
    assert what_for(sys._getframe()) == "the event loop"
    found: list[str] = []

    def indices() -> Iterator[int]:
        found.append(what_for(sys._getframe()))
        yield 0

    Bitfield.of(1, indices())  # core's code asks for them
    assert found == ["requests and pieces"]
