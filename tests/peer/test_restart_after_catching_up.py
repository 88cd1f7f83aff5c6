"""A peer that took over the others' state, and is killed before it finishes a round of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio

from p2pfl_torrent.core.reports import RoundStarted
from tests.peer.swarms import PATIENCE, Member, config, swarm
from tests.peer.test_straggler import TORRENT, Straggler

SECTIONS: dict[str, dict[str, Any]] = {
    "federate": {"total_round_num": 3, "max_staleness": 2},
    "bittorrent": TORRENT,
}


def counted(member: Member) -> dict[tuple[int, int], int | None]:
    """(number of the owner, round) of each update that it knows -> the round that counted it."""
    return {
        (known.manifest.header.num_samples // 10, known.manifest.round): known.counted_in
        for known in member.node._exchange.swarm.ledger
    }


async def one_catches_up_with_round_2(state_dirs: Path) -> dict[tuple[int, int], int | None]:
    """The first of three misses round 1; all are cut off when it has begun round 2.

    Returns:
        what it then knew.
    """
    straggler = Straggler({1: 2})
    has_caught_up = trio.Event()

    async def before_exchange(member: Member, round: int) -> None:
        if member.number == 1 and round == 2:
            has_caught_up.set()
            await trio.sleep_forever()
        await straggler.before_exchange(member, round)

    async with swarm(
        3,
        before_exchange=before_exchange,
        state_dirs=state_dirs,
        **SECTIONS,
    ) as members:
        with trio.fail_after(PATIENCE):
            await has_caught_up.wait()
        return counted(members[0])


async def test_it_goes_on_from_the_state_it_took(tmp_path: Path) -> None:
    known = await one_catches_up_with_round_2(tmp_path)
    again = Member(config(3, [], str(tmp_path / "1"), SECTIONS), 1)
    with trio.fail_after(PATIENCE):
        async with again.peer:
            assert [event.round for event in again.told(RoundStarted)] == [2]
            assert counted(again) == known
            assert {known[2, 1], known[3, 1]} == {1}
            assert known[1, 1] is None  # it came too late for the state
