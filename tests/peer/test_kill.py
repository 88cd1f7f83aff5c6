"""Kill -9 of real processes: the bootstrap node, a member in mid-exchange, a star's hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.genesis import TopologyTerms
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.topology import neighbours
from tests.peer.processes import Member, Swarm, bootstrap_node, swarm, until

TIMEOUT = 60.0  # seconds of the exchange window, which nobody may wait out here

pytestmark = pytest.mark.slow


def sections(count: int, rounds: int, **topology: object) -> dict[str, Any]:
    return {
        "federate": {"client_num": count, "total_round_num": rounds, "join_timeout": 100.0},
        "topology": topology,
        "bittorrent": {"timeout": TIMEOUT},
    }


def gather(fleet: Swarm, address: str, count: int) -> list[Member]:
    """So many members, all ready to train round 1."""
    members = [fleet.start([address]) for _ in range(count)]
    for member in members:
        member.wait_for("addrs")
    return members


def one_round(members: Sequence[Member], round: int) -> list[Any]:
    for member in members:
        member.go()
    return [member.report(round) for member in members]


def the_same(reports: Sequence[Any]) -> bool:
    return len({report["model_hash"] for report in reports}) == 1


def kill_in_mid_exchange(victim: Member, others: Sequence[Member], round: int) -> list[Any]:
    """All exchange; the victim dies when the first of its chunks arrives somewhere."""
    owner = victim.peer_id
    for member in (victim, *others):
        member.go()

    def begun() -> bool:
        return any(m.find("ChunkReceived", owner=owner, round=round) is not None for m in others)

    until(begun, others, f"chunk of {victim.label}")
    victim.kill()
    return [member.report(round) for member in others]


def assert_not_waited_for(reports: Sequence[Any]) -> None:
    """The round ended by what was there, long before its window did."""
    assert {report["closed_by"] for report in reports} <= {"complete", "settled"}
    assert max(report["exchange_seconds"] for report in reports) < TIMEOUT / 2


def assert_whole(members: Sequence[Member], round: int, topology: TopologyTerms) -> None:
    """A complete round among these members, over exactly the overlay that they should have."""
    reports = one_round(members, round)
    assert {report["closed_by"] for report in reports} == {"complete"}
    assert {report["members"] for report in reports} == {len(members)}
    assert the_same(reports)
    for member in members:
        statistics = member.wait_for("statistics", round=round + 1)
        roster = [PeerId(peer) for peer in statistics["members"]]
        assert set(roster) == {each.peer_id for each in members}
        expected = neighbours(roster, topology, seed=0)[PeerId(member.peer_id)]
        edges = {each["peer"] for each in statistics["neighbours"] if each["connected"]}
        assert expected <= edges


@pytest.mark.timeout(300)
def test_a_run_outlives_its_bootstrap_and_takes_in_a_late_peer(tmp_path: Path) -> None:
    setup = sections(2, 4, type="full")
    with bootstrap_node() as (bootstrap, address), swarm(tmp_path, setup) as fleet:
        members = gather(fleet, address, 2)
        bootstrap.kill()
        bootstrap.wait()
        first = one_round(members, 1)
        assert {report["closed_by"] for report in first} == {"complete"}
        late = fleet.start([members[1].address])
        entered = late.wait_for("RoundStarted")
        assert entered["round"] == 2
        assert entered["model_hash"] == first[0]["model_hash"]
        for member in members:  # it is waited for once it is ready, whatever round that falls into
            member.wait_for("MemberChanged", member=late.peer_id, change="joined")
        # Nobody waits for it in the round it enters, so its first update may count there or in the
        # next; the round after that is the first in which all must count the same.
        for round in (2, 3, 4):
            reports = one_round([*members, late], round)
            assert {report["closed_by"] for report in reports} == {"complete"}
        assert the_same(reports)
        assert {report["members"] for report in reports} == {3}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["mesh", "ring"])
def test_a_member_killed_in_mid_exchange_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    setup = sections(6, 4, type=kind, connections=3)
    terms = PeerConfig.from_mapping(setup).topology_terms()
    with bootstrap_node() as (_, address), swarm(tmp_path, setup, megabytes=4) as fleet:
        members = gather(fleet, address, 6)
        assert {report["closed_by"] for report in one_round(members, 1)} == {"complete"}
        victim, *others = members[2:] + members[:2]
        reports = kill_in_mid_exchange(victim, others, 2)
        assert_not_waited_for(reports)
        assert the_same(reports)
        assert_whole(others, 3, terms)


@pytest.mark.timeout(300)
def test_a_stars_hub_killed_in_mid_exchange_is_replaced(tmp_path: Path) -> None:
    setup = sections(5, 4, type="star")
    terms = PeerConfig.from_mapping(setup).topology_terms()
    with bootstrap_node() as (_, address), swarm(tmp_path, setup, megabytes=4) as fleet:
        members = gather(fleet, address, 5)
        assert {report["closed_by"] for report in one_round(members, 1)} == {"complete"}
        roster = members[0].wait_for("statistics", round=2)["members"]
        [hub] = [member for member in members if member.peer_id == roster[0]]
        others = [member for member in members if member is not hub]
        reports = kill_in_mid_exchange(hub, others, 2)
        assert_not_waited_for(reports)
        assert the_same(reports)
        assert_whole(others, 3, terms)
