"""Real peers in the modes in which not everyone takes everything."""

from __future__ import annotations

import numpy as np
import torch

from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import ChunkReceived, EdgeChanged
from tests.peer.swarms import Member, all_done, swarm

Flat = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def flat(member: Member) -> Flat:
    """All of a member's weights."""
    weights = [weight.detach().flatten() for weight in member.model.parameters()]
    return torch.cat(weights).numpy().astype(np.float64)


async def test_neighbours_on_a_ring_take_each_others_updates_alone() -> None:
    trained: dict[tuple[int, int], Flat] = {}

    async def note(member: Member, round: int) -> None:
        trained[member.number, round] = flat(member)

    async with swarm(
        5,
        before_exchange=note,
        federate={"mode": "neighbour"},
        topology={"type": "ring"},
    ) as members:
        await all_done(members)
        numbers = {member.id: member.number for member in members}
        for member in members:
            near = {owner.owner for owner in member.reports[-1].owners} - {member.id}
            assert len(near) == 2
            assert {event.owner for event in member.told(ChunkReceived)} == near
            expected = sum(trained[numbers[PeerId(o)], 2] for o in (*near, member.id)) / 3
            np.testing.assert_allclose(flat(member), expected, rtol=1e-5, atol=1e-6)
            assert {report.closed_by for report in member.reports} == {"complete"}
            assert {report.completeness for report in member.reports} == {1.0}
            assert {report.agreement for report in member.reports} == {None}
            told = {owner.status for report in member.reports for owner in report.owners}
            assert told == {"complete"}


async def test_fragments_carry_their_share_of_the_bytes() -> None:
    async with swarm(
        4,
        federate={"mode": "fragment", "fragment_share": 0.5, "total_round_num": 3},
        topology={"type": "full"},
    ) as members:
        await all_done(members)
    received = [len(member.told(ChunkReceived)) for member in members]
    chunks = members[0].reports[0].owners[0].total
    assert 0.3 < sum(received) / (4 * 3 * 3 * chunks) < 0.7
    assert {report.completeness for member in members for report in member.reports} == {1.0}
    assert len({member.reports[-1].model_hash for member in members}) == 4


async def test_an_overlay_is_drawn_anew_between_rounds() -> None:
    async with swarm(
        6,
        federate={"mode": "neighbour", "total_round_num": 4},
        topology={"type": "ring", "redraw": 1},
    ) as members:
        await all_done(members)
        for member in members:
            near = [
                frozenset(o.owner for o in report.owners) - {member.id} for report in member.reports
            ]
            assert all(len(owners) == 2 for owners in near)
        changed = [
            {frozenset(o.owner for o in report.owners) for report in member.reports}
            for member in members
        ]
        assert any(len(sets) > 1 for sets in changed)
        dialled = [
            {e.neighbour for e in member.told(EdgeChanged) if e.change == "open"}
            for member in members
        ]
        assert max(len(neighbours) for neighbours in dialled) > 2
