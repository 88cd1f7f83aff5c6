"""A relay that alters one byte of what it passes on: found out, dropped, and done without."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from p2pfl_torrent.core.fetching import BAD_BLOCK_BAN
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.messages import Reject
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import BlockRefused, ChunkReceived, MemberChanged, PeerDropped
from p2pfl_torrent.core.serving import Upload
from tests.peer.swarms import NUM_CHUNKS, Member, all_done, identities, swarm, until

SQUARE = {1: [2, 4], 3: [2, 4]}  # from 1 to 3 only through 2 or 4


def alter_what_is_relayed(member: Member, owner: PeerId, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on one byte of every piece of the owner's chunks is another."""
    store, ledger = member.node._store, member.node._exchange.swarm.ledger
    read = store.read

    def altered(update: UpdateId, chunk: int, offset: int, into: memoryview) -> None:
        read(update, chunk, offset, into)
        if ledger[update].manifest.owner == owner:
            into[len(into) // 2] ^= 1

    monkeypatch.setattr(store, "read", altered)


def serve_nothing_to(
    member: Member, neighbour: PeerId, until: trio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of that neighbour wait until the event."""
    swarm = member.node._exchange.swarm
    next_upload = swarm.next_upload

    def held_back(peer: PeerId, now: float) -> Upload | Reject | None:
        return next_upload(peer, now) if peer != neighbour or until.is_set() else None

    monkeypatch.setattr(swarm, "next_upload", held_back)


async def test_an_altered_block_is_refused_and_fetched_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, relay, _, other = ids = identities(tmp_path, 4)
    altering, refused = trio.Event(), trio.Event()

    async def before_exchange(member: Member, round: int) -> None:
        if member.id == relay and round == 1:
            alter_what_is_relayed(member, owner, monkeypatch)
            altering.set()
        elif member.id == owner and round == 1:
            await altering.wait()
            # So that the victim has nobody else to ask at first.
            serve_nothing_to(member, other, refused, monkeypatch)

    async with swarm(
        4,
        before_exchange=before_exchange,
        state_dirs=tmp_path,
        topology={"type": "custom", "custom_graph": SQUARE, "members": ids},
    ) as members:
        a, _, c, d = members
        await until(lambda: c.told(BlockRefused) != [])
        refused.set()
        a.node._exchange._wake_writers()
        await all_done(members)
    for member in members:
        assert [report.round for report in member.reports] == [1, 2]
        for report, first in zip(member.reports, a.reports, strict=True):
            assert report.closed_by == "complete"
            assert report.completeness == 1.0
            assert report.model_hash == first.model_hash
            assert {owner.owner for owner in report.owners} == set(ids)
            assert {owner.status for owner in report.owners} == {"complete"}
    # Who was dropped is still a member: its own updates come another way, nobody thinks it dead.
    changes = {event.change for member in members for event in member.told(MemberChanged)}
    assert changes == {"joined", "left"}
    (refusal,) = c.told(BlockRefused)
    assert (refusal.sender, refusal.owner, refusal.round) == (relay, owner, 1)
    (dropped,) = c.told(PeerDropped)
    assert (dropped.peer, dropped.seconds) == (relay, BAD_BLOCK_BAN)
    assert "altered" in dropped.reason
    received = c.told(ChunkReceived)
    assert len(received) == 2 * 3 * NUM_CHUNKS
    assert {event.source for event in received if event.owner == owner} == {other}
    assert {event.source for event in received if event.round == 2} == {other}
    for honest in (a, d):
        assert not honest.told(BlockRefused)
        assert not honest.told(PeerDropped)
