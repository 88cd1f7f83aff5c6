"""An exchange that the user's trio program cancels, and calls again."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from p2pfl_torrent.core.reports import ManifestSeen
from p2pfl_torrent.peer.node import Node
from p2pfl_torrent.peer.rounds import UpdateError
from tests.peer.swarms import Member, all_done, swarm, until


def part(node: Node, name: str) -> Any:
    return {"store": node._store, "checkpoints": node._checkpoints, "exchange": node._exchange}[
        name
    ]


def cancel_after(node: Node, scope: trio.CancelScope, name: str, method: str, phase: str) -> None:
    """Cancel once, when a method of one of its parts has been called in a phase."""
    owner = part(node, name)
    original = getattr(owner, method)

    def called(*args: Any, **named: Any) -> Any:
        result = original(*args, **named)
        if node._rounds.phase == phase:
            setattr(owner, method, original)
            scope.cancel()
        return result

    setattr(owner, method, called)


@pytest.mark.parametrize(
    ("name", "method", "phase"),
    [
        ("store", "complete_chunk", "training"),
        ("exchange", "feed", "exchanging"),
        ("checkpoints", "load", "aggregating"),
    ],
)
async def test_it_goes_on_where_it_was(name: str, method: str, phase: str) -> None:
    async def before_exchange(member: Member, round: int) -> None:
        if (member.number, round) == (1, 1):
            with trio.CancelScope() as scope:
                cancel_after(member.node, scope, name, method, phase)
                await member.peer.exchange(num_samples=member.num_samples)
            assert scope.cancelled_caught

    async with swarm(2, before_exchange=before_exchange) as members:
        await all_done(members)
    for round, reports in enumerate(zip(*(member.reports for member in members), strict=True), 1):
        assert {(report.round, report.closed_by) for report in reports} == {(round, "complete")}
        assert len({report.model_hash for report in reports}) == 1
    seen = [event for event in members[1].told(ManifestSeen) if event.round == 1]
    assert len(seen) == 1


async def test_a_second_call_at_the_same_time_is_told() -> None:
    told: list[str] = []

    async def before_exchange(member: Member, round: int) -> None:
        if member.number == 1:
            await until(lambda: members[1].peer.statistics().phase == "exchanging")
            with pytest.raises(UpdateError) as failure:
                await members[1].peer.exchange(num_samples=1)
            told.append(str(failure.value))

    async with swarm(
        2, before_exchange=before_exchange, federate={"total_round_num": 1}
    ) as members:
        await all_done(members)
    assert told == [
        "exchange was called while the exchange of round 1 is under way: await that call first."
    ]
