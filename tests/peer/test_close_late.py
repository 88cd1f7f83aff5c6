"""A peer that missed its round's deadline, while nobody else went on from it either."""

from __future__ import annotations

from p2pfl_torrent.core.reports import RoundClosed, RoundFinished
from tests.peer.swarms import Member, swarm, until


async def test_what_is_here_is_merged_and_told() -> None:
    async def before_exchange(member: Member, round: int) -> None:
        if member.number == 1:
            await until(lambda: member.peer.statistics().deadline_in == 0.0)
        else:
            await until(lambda: bool(members[0].reports))

    async with swarm(
        2,
        before_exchange=before_exchange,
        federate={"total_round_num": 1, "train_timeout": 0.5},
        bittorrent={"timeout": 0.5},
    ) as members:
        await until(lambda: bool(members[0].told(RoundFinished)))
        [report] = members[0].reports
        assert (report.closed_by, report.next_round) == ("deadline", 2)
        assert [event.round for event in members[0].told(RoundClosed)] == [1]
