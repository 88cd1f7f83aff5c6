"""Kill -9 of a real process while a round is exchanged and the next one trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.peer.processes import Member, bootstrap_node, swarm, until

ROUNDS = 4
SETUP = {
    "federate": {
        "client_num": 3,
        "total_round_num": ROUNDS,
        "join_timeout": 100.0,
        "overlap": True,
    },
    "topology": {"type": "full"},
    "bittorrent": {"timeout": 60.0},
}

pytestmark = pytest.mark.slow


def finished(member: Member, round: int) -> Any:
    """What it told of the end of a round."""
    reports = [told["report"] for kind, told in member.told if kind == "RoundFinished"]
    return next((report for report in reports if report["round"] == round), None)


def all_finished(members: Sequence[Member], round: int) -> list[Any]:
    until(lambda: all(finished(m, round) for m in members), members, f"end of round {round}")
    return [finished(member, round) for member in members]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("moment", ["exchanging", "merged"])
def test_who_is_killed_in_the_overlap_goes_on_and_counts_once(moment: str, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with bootstrap_node() as (_, address), swarm(tmp_path, SETUP, megabytes=4) as fleet:
        victim = fleet.start([address], state)
        others = [fleet.start([address]) for _ in range(2)]
        for member in (victim, *others):
            member.wait_for("addrs")
        for member in (victim, *others):
            member.go()
            member.go()
        owner = victim.peer_id
        if moment == "exchanging":  # it trains round 3 and its update of round 2 is on its way
            victim.wait_for("report", round=1, closed_by="complete")
            others[0].wait_for("ManifestSeen", owner=owner, round=2)
        else:
            victim.wait_for("RoundStarted", round=3)
        victim.kill()

        again = fleet.start([address], state)
        again.wait_for("addrs")
        first = again.wait_for("RoundStarted")
        assert first["round"] == 3 if moment == "merged" else first["round"] in (2, 3)
        for _ in range(ROUNDS):
            again.go()
        for member in others:
            for _ in range(ROUNDS - 2):
                member.go()
        members = [again, *others]
        reports = all_finished(members, ROUNDS)
        assert len({report["model_hash"] for report in reports}) == 1
        for member in others:
            assert member.find("PeerDropped") is None
            ends = [finished(member, round) for round in range(1, ROUNDS + 1)]
            counted = [
                each["trained_round"]
                for end in ends
                for each in end["owners"]
                if each["owner"] == owner and each["weight"] and each["chunks"]
            ]
            assert counted == sorted(set(counted))
            assert {1, 2} <= set(counted)
