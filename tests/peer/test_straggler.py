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
    """The first member misses some rounds; then the others train on until it has caught up."""

    def __init__(self, missed: int) -> None:
        self._back = missed + 1
        self._ahead = 0
        self._others_are_ahead = trio.Event()
        self._caught_up = trio.Event()

    async def before_exchange(self, member: Member, round: int) -> None:
        if member.number == 1:
            if round == 1:
                await self._others_are_ahead.wait()
            elif round == self._back:
                self._caught_up.set()
        elif round == self._back:
            self._ahead += 1
            if self._ahead == 2:
                self._others_are_ahead.set()
            with trio.fail_after(PATIENCE):
                await self._caught_up.wait()


def of(report: RoundReport, owner: PeerId, trained_round: int) -> OwnerReport | None:
    """What a report says of one update."""
    found = [o for o in report.owners if (o.owner, o.trained_round) == (owner, trained_round)]
    assert len(found) <= 1
    return found[0] if found else None


async def play(missed: int, max_staleness: int) -> tuple[Member, list[Member]]:
    """Three peers, of which the first misses the first rounds but not the one after."""
    rounds = {"total_round_num": missed + 1, "max_staleness": max_staleness}
    hook = Straggler(missed).before_exchange
    async with swarm(
        3,
        before_exchange=hook,
        federate=rounds,
        bittorrent=TORRENT,
        storage={"keep_rounds": 1},
    ) as members:
        await all_done(members)
    straggler, *others = members
    for member in members:
        last = member.reports[-1]
        assert last.round == missed + 1
        assert last.model_hash == others[0].reports[-1].model_hash
        for owner in (m.id for m in members):
            fresh = of(last, owner, missed + 1)
            assert fresh is not None
            assert fresh.status == "complete"
    late, after = straggler.reports
    assert late.late
    assert late.closed_by == "late"
    assert (late.round, late.next_round) == (1, missed + 1)
    assert late.model_hash == others[0].reports[missed - 1].model_hash
    assert late.attested
    assert after.closed_by == "complete"
    for other in others:
        for report in other.reports[:missed]:
            assert report.closed_by == "deadline"
            lacking = of(report, straggler.id, report.round)
            assert lacking is not None
            assert (lacking.status, lacking.chunks, lacking.weight) == ("missing", 0, 0.0)
            assert report.completeness == 1.0  # of what was announced
        assert other.reports[missed].closed_by == "complete"
    return straggler, others


@pytest.mark.parametrize("missed", [1, 2])
async def test_a_late_update_goes_into_the_next_round_discounted(missed: int) -> None:
    straggler, others = await play(missed, max_staleness=2)
    for member in (straggler, *others):
        late = of(member.reports[-1], straggler.id, 1)
        assert late == OwnerReport(
            owner=straggler.id,
            trained_round=1,
            num_samples=straggler.num_samples,
            weight=straggler.num_samples * discount(missed),
            chunks=NUM_CHUNKS,
            filled=0,
            total=NUM_CHUNKS,
            status="late",
        )


@pytest.mark.parametrize(("missed", "max_staleness"), [(1, 0), (3, 1)])
async def test_an_update_later_than_that_is_reported_as_dropped(
    missed: int, max_staleness: int
) -> None:
    straggler, others = await play(missed, max_staleness)
    for member in (straggler, *others):
        dropped = of(member.reports[-1], straggler.id, 1)
        assert dropped is not None
        assert (dropped.status, dropped.weight, dropped.chunks) == ("dropped", 0.0, 0)
