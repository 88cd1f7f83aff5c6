"""Whom a peer asks for the swarm's state, and how often."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import trio
import trio.testing

from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.exchange.ports import ByteStream, EdgeClosedError
from p2pfl_torrent.peer.catchup import MAX_ASKED, MAX_PAUSE, CatchUp
from p2pfl_torrent.protocols.state import State
from tests.core.swarm_world import MODEL

MEMBERS = [PeerId(f"member {number:02}") for number in range(20)]


class Nobody:
    """Members that cannot be reached."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, PeerId]] = []

    async def open(self, peer: PeerId) -> ByteStream:
        self.asked.append((trio.current_time(), peer))
        raise EdgeClosedError("gone")


def catch_up(nobody: Nobody) -> CatchUp:
    return CatchUp(MODEL, bytes(32), 0.5, nobody.open, random.Random(0))


async def test_no_more_than_eight_are_asked_and_not_always_the_same() -> None:
    nobody = Nobody()
    assert await catch_up(nobody).claims(MEMBERS) == {}
    first = {peer for _, peer in nobody.asked}
    assert len(nobody.asked) == len(first) == MAX_ASKED
    assert first != set(MEMBERS[:MAX_ASKED])
    nobody.asked.clear()
    await catch_up(nobody).claims(MEMBERS[:3])
    assert {peer for _, peer in nobody.asked} == set(MEMBERS[:3])


async def test_it_asks_ever_more_rarely_and_those_who_are_there_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    nobody = Nobody()
    live = list(MEMBERS)

    def members() -> Sequence[PeerId]:
        return [peer for peer in live if peer != MEMBERS[0] or trio.current_time() < began + 10.0]

    began = trio.current_time()
    assert await catch_up(nobody).take(members, 1, 60.0) is None
    assert trio.current_time() == began + 60.0
    times = sorted({time - began for time, _ in nobody.asked})
    pauses = [round(later - earlier, 6) for earlier, later in itertools.pairwise(times)]
    assert pauses == sorted(pauses)
    assert pauses[0] < 1.0
    assert pauses[-1] == MAX_PAUSE
    assert {peer for _, peer in nobody.asked} == set(MEMBERS)
    assert MEMBERS[0] not in {peer for time, peer in nobody.asked if time >= began + 10.0}


def claims(*rounds: int, own_model: bool) -> dict[PeerId, State]:
    """Claims of the first members; each of its own model, or all of a round of one."""
    return {
        MEMBERS[place]: State(
            round, bytes([round % 256, place if own_model else 0]) * 16, 100, False
        )
        for place, round in enumerate(rounds)
    }


def test_one_members_word_moves_nothing() -> None:
    machine = catch_up(Nobody())
    alone = claims(7, 7, 7, 999_999, 6, own_model=True)
    assert machine.reached(alone) == 7
    ranked = machine._ranked(alone, 1, MEMBERS[:5])
    assert {round for round, _, _ in ranked} == {7, 6}
    assert not any(attested for _, _, attested in ranked)
    assert machine.reached(claims(999_999, own_model=True)) == 999_999  # there is nobody else
    assert machine.reached({}) == 0


def test_what_a_quorum_attests_goes_before_what_is_later() -> None:
    machine = catch_up(Nobody())
    ranked = machine._ranked(claims(7, 7, 7, 8, own_model=False), 1, MEMBERS[:4])
    assert ranked[0][0] == 7
    assert ranked[0][2]


def test_among_equals_the_nearest_is_taken() -> None:
    machine = catch_up(Nobody())
    told = claims(7, 7, 7, own_model=True)
    near_first = [MEMBERS[2], MEMBERS[0], MEMBERS[1]]
    ranked = machine._ranked(told, 1, near_first)
    assert [base_hash for _, base_hash, _ in ranked] == [told[p].base_hash for p in near_first]
