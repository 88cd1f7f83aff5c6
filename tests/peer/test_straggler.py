"""A peer slower than the deadline: rounds close without it, and its update comes in discounted."""

from __future__ import annotations

import pytest
import trio

from p2pfl_torrent import OwnerReport, RoundReport
from p2pfl_torrent.core.aggregation import discount
from p2pfl_torrent.core.peers import PeerId
from tests.peer.swarms import NUM_CHUNKS, PATIENCE, Member, all_done, swarm

# Seconds: what the others wait in vain, and longer than anything else here takes. Nothing old is
# kept to fill holes with, so that what is here of an old update is here because it may count.
TORRENT = {"timeout": 3.0, "fill_max_age": 0}


class Straggler:
    """The first member is late with some rounds; the others train on until it has caught up.

    Args:
        late: a round that it misses -> the round that the others train for by then.
    """

    def __init__(self, late: dict[int, int]) -> None:
        self._late = late
        self._ahead = dict.fromkeys(late.values(), 0)
        self._others_are_ahead = {round: trio.Event() for round in late.values()}
        self._caught_up = {round: trio.Event() for round in late.values()}

    async def before_exchange(self, member: Member, round: int) -> None:
        if member.number == 1:
            if round in self._caught_up:
                self._caught_up[round].set()
            if round in self._late:
                await self._others_are_ahead[self._late[round]].wait()
        elif round in self._caught_up:
            self._ahead[round] += 1
            if self._ahead[round] == 2:
                self._others_are_ahead[round].set()
            with trio.fail_after(PATIENCE):
                await self._caught_up[round].wait()


def of(report: RoundReport, owner: PeerId, trained_round: int) -> OwnerReport | None:
    """What a report says of one update."""
    found = [o for o in report.owners if (o.owner, o.trained_round) == (owner, trained_round)]
    assert len(found) <= 1
    return found[0] if found else None


async def play(late: dict[int, int], max_staleness: int) -> tuple[Member, list[Member]]:
    """Three peers, of which the first is late as told, and in time in the last round."""
    last = max(late.values())
    async with swarm(
        3,
        before_exchange=Straggler(late).before_exchange,
        federate={"total_round_num": last, "max_staleness": max_staleness},
        bittorrent=TORRENT,
        storage={"keep_rounds": 1},
    ) as members:
        await all_done(members)
    straggler, *others = members
    for member in members:
        report = member.reports[-1]
        assert (report.round, report.closed_by) == (last, "complete")
        assert report.model_hash == others[0].reports[-1].model_hash
        assert report.owners == others[0].reports[-1].owners
        for owner in members:
            fresh = of(report, owner.id, last)
            assert fresh is not None
            assert fresh.status == "complete"
    assert len(straggler.reports) == len(late) + 1
    for report, (missed, back) in zip(straggler.reports, late.items(), strict=False):
        assert report.late
        assert report.closed_by == "late"
        assert (report.round, report.next_round) == (missed, back)
        assert report.model_hash == others[0].reports[back - 2].model_hash
        assert report.attested
    for other in others:
        for report in other.reports[:-1]:
            assert report.closed_by == "deadline"
            lacking = of(report, straggler.id, report.round)
            assert lacking is not None
            assert (lacking.status, lacking.chunks, lacking.weight) == ("missing", 0, 0.0)
            assert report.completeness == 1.0  # of what was announced
    return straggler, others


@pytest.mark.parametrize("late", [{1: 2}, {1: 3}, {1: 2, 2: 3}], ids=str)
async def test_a_late_update_goes_into_the_next_round_discounted(late: dict[int, int]) -> None:
    straggler, others = await play(late, max_staleness=2)
    for other in others:
        for missed, back in late.items():
            counted = [of(report, straggler.id, missed) for report in other.reports[back - 1 :]]
            assert counted[0] == OwnerReport(
                owner=straggler.id,
                trained_round=missed,
                num_samples=straggler.num_samples,
                weight=straggler.num_samples * discount(back - missed),
                chunks=NUM_CHUNKS,
                filled=0,
                total=NUM_CHUNKS,
                status="late",
                critical=1.0,
            )
            assert set(counted[1:]) <= {None}  # once


@pytest.mark.parametrize(("late", "max_staleness"), [({1: 2}, 0), ({1: 4}, 1)], ids=str)
async def test_an_update_later_than_that_is_reported_as_dropped(
    late: dict[int, int], max_staleness: int
) -> None:
    straggler, others = await play(late, max_staleness)
    for member in (straggler, *others):
        dropped = of(member.reports[-1], straggler.id, 1)
        assert dropped is not None
        assert (dropped.status, dropped.weight, dropped.chunks) == ("dropped", 0.0, 0)
