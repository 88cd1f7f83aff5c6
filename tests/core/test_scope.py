"""Exchange modes: whose chunks a peer takes, and with what weight."""

from __future__ import annotations

from math import fsum

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl_torrent.core.genesis import TopologyTerms
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.scope import Scope, ScopeTerms
from p2pfl_torrent.core.topology import neighbours, overlay_seed

RING = TopologyTerms("ring", 3, 2, (), ())
MESH = TopologyTerms("mesh", 3, 2, (), ())
FULL = TopologyTerms("full", 3, 2, (), ())


def peers(count: int) -> list[PeerId]:
    return [PeerId(f"peer-{k}") for k in range(count)]


def scope(
    mode: str, count: int, local: int = 0, *, topology: TopologyTerms = RING, share: float = 0.25
) -> Scope:
    members = peers(count)
    return Scope(ScopeTerms(mode, share, 7, topology, 40), members[local], members)


def test_a_swarm_takes_everything_of_everybody() -> None:
    mine = scope("swarm", 6)
    for owner in peers(6):
        assert mine.wanted(owner, 3).complete
        assert mine.weight(owner, 3, 17) == 17.0
    assert mine.takes_from(PeerId("stranger"), 3)


def test_neighbours_are_taken_whole_and_others_not_at_all() -> None:
    mine = scope("neighbour", 6)
    near = neighbours(peers(6), RING, 7)[mine.local]
    assert len(near) == 2
    for owner in peers(6):
        taken = mine.wanted(owner, 1)
        assert taken.complete if owner in near or owner == mine.local else taken.count == 0
        assert mine.takes_from(owner, 1) == bool(taken.count)


@given(count=st.integers(2, 12), kind=st.sampled_from(["ring", "mesh", "star", "tree", "full"]))
def test_metropolis_weights_are_symmetric_positive_and_sum_to_one(count: int, kind: str) -> None:
    topology = msgspec.structs.replace(MESH, type=kind)
    overlay = neighbours(peers(count), topology, 7)
    weights: dict[tuple[PeerId, PeerId], float] = {}
    for place, peer in enumerate(peers(count)):
        mine = scope("neighbour", count, place, topology=topology)
        for owner in (*overlay[peer], peer):
            weights[peer, owner] = mine.weight(owner, 1, 1000)
        row = [weights[peer, owner] for owner in (*overlay[peer], peer)]
        assert fsum(row) == pytest.approx(1.0)
        assert min(row) > 0.0
    for (a, b), weight in weights.items():
        assert weights[b, a] == weight


def test_fragments_are_a_share_drawn_anew_for_each_round_owner_and_receiver() -> None:
    mine = scope("fragment", 6, topology=FULL)
    theirs = scope("fragment", 6, 1, topology=FULL)
    third = PeerId("peer-2")
    drawn = [mine.wanted(third, round) for round in range(1, 101)]
    assert 0.22 < sum(one.count for one in drawn) / (100 * 40) < 0.28
    assert len({one.to_bytes() for one in drawn}) > 95
    assert mine.wanted(third, 1) != theirs.wanted(third, 1)
    assert mine.wanted(third, 1) != mine.wanted(PeerId("peer-3"), 1)
    assert mine.wanted(mine.local, 1).complete
    assert mine.weight(third, 1, 9) == 9.0


@given(
    mode=st.sampled_from(["swarm", "neighbour", "fragment"]),
    count=st.integers(2, 8),
    round=st.integers(1, 50),
    share=st.floats(0.01, 1.0),
)
def test_an_owner_knows_what_others_will_ask(
    mode: str, count: int, round: int, share: float
) -> None:
    scopes = [scope(mode, count, k, topology=MESH, share=share) for k in range(count)]
    for owner in scopes:
        for other in scopes:
            assert owner.wanted_by(other.local, owner.local, round) == other.wanted(
                owner.local, round
            )


def test_an_overlay_drawn_anew_moves_whom_a_peer_takes_from() -> None:
    topology = msgspec.structs.replace(MESH, redraw=2)
    mine = scope("neighbour", 12, topology=topology)
    taken = [
        frozenset(owner for owner in peers(12) if mine.takes_from(owner, round))
        for round in range(1, 21)
    ]
    assert all(taken[k] == taken[k + 1] for k in range(0, 20, 2))
    assert len(set(taken)) > 5


def test_without_redrawing_a_round_changes_no_seed() -> None:
    assert {overlay_seed(5, MESH, round) for round in range(10)} == {5}


def test_members_that_go_are_taken_from_no_more() -> None:
    mine = scope("neighbour", 6)
    (gone, *_) = [owner for owner in peers(6) if owner != mine.local and mine.takes_from(owner, 1)]
    left = mine.with_members(peer for peer in peers(6) if peer != gone)
    assert not left.takes_from(gone, 1)
    assert sum(left.takes_from(owner, 1) for owner in peers(6)) == 3
