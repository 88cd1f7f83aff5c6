"""From which round on a peer that missed one says that it is waited for."""

from __future__ import annotations

import trio

from p2pfl_torrent.core.peers import PeerId
from tests.peer.swarms import PATIENCE, Member, all_done, swarm, until

MISSED = 1
TORRENT = {"timeout": 1.0}


def waited_from(member: Member, other: PeerId) -> int:
    """The round that ``member``'s roster names for another."""
    return member.node._members[other].joined_round


async def play(*, given_up: bool, expected: int) -> None:
    """The first of three members misses round 1 and catches up with round 2."""
    others_are_ahead, seen = trio.Event(), trio.Event()
    ahead = 0

    async def before_exchange(member: Member, round: int) -> None:
        nonlocal ahead
        first, *others = members
        if member is not first:
            if round == MISSED + 1:
                ahead += 1
                if ahead == len(others):
                    others_are_ahead.set()
                with trio.fail_after(PATIENCE):
                    await seen.wait()
        elif round == MISSED:
            await others_are_ahead.wait()
            if given_up:  # and so has refuted, taking the last place
                first.node._driver.set_ready(MISSED + 1)
        else:
            assert round == MISSED + 1
            await until(lambda: all(waited_from(other, first.id) == expected for other in members))
            seen.set()

    async with swarm(
        3, before_exchange=before_exchange, federate={"total_round_num": 2}, bittorrent=TORRENT
    ) as members:
        await all_done(members)
    assert members[0].reports[0].late


async def test_one_that_only_was_slow_keeps_its_place() -> None:
    await play(given_up=False, expected=1)


async def test_one_that_was_given_up_is_waited_for_from_the_next_round_on() -> None:
    await play(given_up=True, expected=MISSED + 2)
