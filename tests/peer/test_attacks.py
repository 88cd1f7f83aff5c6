"""Hostile strangers against a peer of a running swarm: it serves, and the swarm goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from p2pfl_torrent.core.joining import PROTOCOL_ID as MEMBERS
from p2pfl_torrent.core.messages import PROTOCOL_ID as CHUNK
from p2pfl_torrent.core.reports import EdgeChanged, PeerDropped
from p2pfl_torrent.exchange.edges import MAX_WAITING
from p2pfl_torrent.protocols.state import PROTOCOL_ID as STATE
from tests.overlay.attacks import ATTACKS, CRASHES, Target
from tests.peer.strangers import (
    ANSWERS,
    FAULTS,
    FLOODS,
    HALVES,
    REFUSED,
    a_stranger,
    answer_with,
    facts,
    flood,
    heard,
    hello,
    say,
    say_nothing,
)
from tests.peer.swarms import PATIENCE, Member, all_done, swarm, until

ROUNDS = 3

SAID_UNASKED = 8  # a manifest, its availability and a few announcements, while nobody reads


class Pair:
    """Two peers whose rounds stand still where a test wants to attack one of them.

    In round 2 both train until ``trained``; then the victim exchanges, in vain until ``exchanged``.
    """

    def __init__(self) -> None:
        self.trained = trio.Event()
        self.exchanged = trio.Event()
        self.waiting = 0
        self.victim: Member
        self.friend: Member

    async def before_exchange(self, member: Member, round: int) -> None:
        if round == 2:
            self.waiting += 1
            await self.trained.wait()
            if member is self.friend:
                await self.exchanged.wait()

    async def let_exchange(self) -> None:
        """Returns when the victim waits for its friend's update."""
        self.trained.set()
        await until(lambda: self.victim.peer.statistics().phase == "exchanging")

    async def still_serves(self) -> None:
        """Who asks the victim is answered; the edge between the two has not broken."""
        claims = await self.friend.node._catch_up.claims([self.victim.id])
        assert claims.keys() == {self.victim.id}
        for one, other in ((self.victim, self.friend), (self.friend, self.victim)):
            assert [e.change for e in one.told(EdgeChanged) if e.neighbour == other.id] == ["open"]

    async def quiet(self, tasks: int) -> None:
        """Returns when nothing is left of an attack but the tasks that were there before."""
        await until(lambda: living() <= tasks)
        connected = self.victim.node._host.connected
        await until(lambda: connected() == {self.friend.id})


@asynccontextmanager
async def a_pair() -> AsyncIterator[Pair]:
    """A pair that trains for round 2; at the block's end it has finished its rounds."""
    pair = Pair()
    async with swarm(
        2, before_exchange=pair.before_exchange, federate={"total_round_num": ROUNDS}
    ) as members:
        pair.victim, pair.friend = members
        await until(lambda: pair.waiting == 2)
        yield pair
        pair.trained.set()
        pair.exchanged.set()
        await all_done(members)
    ours, theirs = (member.reports for member in members)
    assert [report.round for report in ours] == [1, 2, 3]
    for report, other in zip(ours, theirs, strict=True):
        assert report.model_hash == other.model_hash
        for said in (report, other):
            assert said.closed_by == "complete"
            assert said.completeness == 1.0
            assert len(said.owners) == 2


def living() -> int:
    """Tasks of this program, in which peers and strangers alike live."""
    return trio.lowlevel.current_statistics().tasks_living


async def test_what_crashes_a_stock_host_leaves_a_peer_at_work() -> None:
    async with a_pair() as pair:
        topics = sorted(pair.victim.node._gossip.topics)
        assert len(topics) == 3
        targets = [
            Target(pair.victim.peer.addrs[0], topic, protocol)
            for topic, protocol in zip(topics, (CHUNK, MEMBERS, STATE), strict=True)
        ]
        for moment in ("training", "exchanging"):
            tasks = living()
            for name, attack in ATTACKS.items():
                async with trio.open_nursery() as nursery:
                    for target in targets if name in CRASHES else targets[:1]:
                        nursery.start_soon(attack, target)
                await pair.still_serves()
            assert pair.victim.peer.statistics().phase == moment
            await pair.quiet(tasks)
            if moment == "training":
                await pair.let_exchange()


async def test_what_breaks_our_protocols_costs_its_sender_the_connection() -> None:
    async with a_pair() as pair:
        about, tasks = facts(pair.victim), living()
        for name, (protocol, words) in FAULTS.items():
            async with a_stranger(pair.victim) as stranger:
                stream = await say(stranger, pair.victim, protocol, words(about))
                await heard(stream, b"\xff never said")
            await dropped(pair, stranger.peer_id, name)
        for name, words in ANSWERS.items():
            async with a_stranger(pair.victim) as stranger:
                answer_with(stranger, words(about))
                await say(stranger, pair.victim, CHUNK, hello(about, wanted=True))
                await dropped(pair, stranger.peer_id, name)
        await pair.still_serves()
        await pair.quiet(tasks)


async def dropped(pair: Pair, stranger: str, why: str) -> None:
    with trio.move_on_after(PATIENCE / 6):
        await until(lambda: stranger in {e.peer for e in pair.victim.told(PeerDropped)})
    assert stranger in {event.peer for event in pair.victim.told(PeerDropped)}, why


async def test_what_is_asked_in_error_is_answered() -> None:
    async with a_pair() as pair:
        about, tasks = facts(pair.victim), living()
        for name, (protocol, words, answer) in REFUSED.items():
            async with a_stranger(pair.victim) as stranger:
                stream = await say(stranger, pair.victim, protocol, words(about))
                assert answer in await heard(stream, answer), name
        for protocol, words in HALVES.values():
            async with a_stranger(pair.victim) as stranger:
                stream = await say(stranger, pair.victim, protocol, words(about))
                await stream.close()
                await heard(stream, b"\xff never said")
        await pair.still_serves()
        assert not pair.victim.told(PeerDropped)
        await pair.quiet(tasks)


@asynccontextmanager
async def flooded(victim: Member) -> AsyncIterator[None]:
    """Strangers that ask without end and do not listen, and others that say nothing."""
    about, host = facts(victim), victim.node._host
    async with trio.open_nursery() as nursery:
        for protocol, opening, words in FLOODS.values():
            nursery.start_soon(flood, victim, protocol, opening(about), words(about))
        for protocol in (CHUNK, MEMBERS, STATE):
            nursery.start_soon(say_nothing, victim, protocol, 20)
        await until(lambda: len(host.connected()) == 1 + len(FLOODS) + 3)
        yield
        edges = victim.node._exchange.edges.values()
        # Below it one more question is read, and one has two answers at most.
        # One question more than the bound has two answers; what a round tells unasked is on top.
        most = MAX_WAITING + 1 + SAID_UNASKED
        assert max(len(edge.answer.outbox) for edge in edges if edge.answer) <= most
        nursery.cancel_scope.cancel()


async def test_floods_and_silence_stall_nobody() -> None:
    async with a_pair() as pair:
        tasks = living()
        async with flooded(pair.victim):
            for _ in range(5):
                await pair.still_serves()
        await pair.quiet(tasks)
        async with flooded(pair.victim):
            await pair.let_exchange()
            pair.exchanged.set()
            await until(lambda: len(pair.victim.reports) >= 2)
        assert not pair.victim.told(PeerDropped)  # none of it is against the rules
