"""What strangers can make an exchange remember, and queue for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import trio
from trio.testing import MockClock

from p2pfl_torrent.core import messages as m
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.messages import Message
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import PeerEvent
from p2pfl_torrent.exchange.driver import HELLO_PATIENCE, MAX_BANNED, MAX_EDGES, Exchange
from p2pfl_torrent.exchange.edges import MAX_WAITING
from p2pfl_torrent.exchange.ports import Channel, EdgeClosedError, UpdateStore
from p2pfl_torrent.peer.snapshot import take_statistics
from tests.core.swarm_world import World, exchanging

HELLO = m.Hello(b"s" * 32, 1, False, b"")


class Surroundings:
    """A peer that lets everybody in and wants to know nothing."""

    def hello(self, wanted: bool) -> m.Hello:
        return HELLO

    def admit(self, peer: PeerId, hello: m.Hello) -> m.Refuse | None:
        return None

    def heard(self, peer: PeerId) -> None: ...

    def edge_lost(self, peer: PeerId) -> None: ...

    def dropped(self, peer: PeerId, reason: str) -> None: ...

    def emit(self, event: PeerEvent) -> None: ...

    def gossip_manifest(self, data: bytes) -> None: ...

    def gossip_availability(self, data: bytes) -> None: ...


class NoDialer:
    async def open_channel(self, peer: PeerId, addrs: Sequence[str]) -> Channel:
        raise EdgeClosedError("nobody there")


class FakeChannel:
    """Says a Hello, then what it is told to say, until there is nothing more.

    Attributes:
        taken: messages that the exchange has read.
    """

    begun = 0

    def __init__(self, remote: str, says: Callable[[], Message | None], *, reads: bool) -> None:
        self.remote = PeerId(remote)
        self.taken = 0
        self._says = says
        self._reads = reads

    async def send(self, message: Message) -> int:
        await trio.lowlevel.checkpoint()
        if not self._reads and not isinstance(message, m.Hello):
            await trio.sleep_forever()
        return 1

    async def send_together(self, messages: Sequence[Message]) -> list[int]:
        return [await self.send(message) for message in messages]

    async def receive(self) -> tuple[Message, int]:
        await trio.lowlevel.checkpoint()
        self.taken += 1
        message = HELLO if self.taken == 1 else self._says()
        if message is None:
            raise EdgeClosedError("it has gone")
        return message, 1

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def an_exchange() -> tuple[World, Exchange]:
    """Peer a's, which has published; its store is not asked for anything here."""
    world = exchanging()
    store = cast(UpdateStore, None)
    swarm = world["a"].swarm
    return world, Exchange(swarm, store, NoDialer(), Surroundings(), random.Random(1))


async def test_who_asks_and_does_not_read_is_read_no_further(autojump_clock: MockClock) -> None:
    world, exchange = an_exchange()
    question = m.GetManifest(world["a"].updates[1])
    channel = FakeChannel("stranger", lambda: question, reads=False)
    with trio.move_on_after(60):
        await exchange.serve(channel)
    assert channel.taken < 3 * MAX_WAITING
    assert len(exchange.edges) == 1


async def test_who_asks_and_reads_is_answered_however_much_it_asks(
    autojump_clock: MockClock,
) -> None:
    world, exchange = an_exchange()
    left = iter([m.GetManifest(world["a"].updates[1])] * 10_000)
    channel = FakeChannel("stranger", lambda: next(left, None), reads=True)
    await exchange.serve(channel)
    assert channel.taken == 10_002


async def test_who_says_nothing_is_not_waited_for_long(autojump_clock: MockClock) -> None:
    class Silent(FakeChannel):
        async def receive(self) -> tuple[Message, int]:
            await trio.sleep_forever()
            raise AssertionError("for ever is over")

    _, exchange = an_exchange()
    await exchange.serve(Silent("stranger", lambda: None, reads=True))
    assert trio.current_time() == HELLO_PATIENCE
    assert not exchange.edges


async def test_strangers_that_came_and_went_are_forgotten(autojump_clock: MockClock) -> None:
    _, exchange = an_exchange()
    await exchange.serve(FakeChannel("b", lambda: None, reads=True))
    for number in range(MAX_EDGES + 10):
        await exchange.serve(FakeChannel(f"stranger {number}", lambda: None, reads=True))
        assert len(exchange.edges) <= MAX_EDGES
    assert PeerId("b") in exchange.edges  # a member
    assert PeerId(f"stranger {MAX_EDGES + 9}") in exchange.edges


def bytes_ever(exchange: Exchange) -> int:
    statistics = take_statistics(
        exchange,
        swarm_id=b"s" * 32,
        round=1,
        total_rounds=1,
        phase="training",
        topology="full",
        members=(),
        now=trio.current_time(),
    )
    return statistics.bytes_control_down


async def test_what_forgotten_strangers_sent_stays_counted(autojump_clock: MockClock) -> None:
    _, exchange = an_exchange()
    for number in range(MAX_EDGES + 10):
        says = iter([m.Ping(1)])
        channel = FakeChannel(f"stranger {number}", partial(next, says, None), reads=True)
        await exchange.serve(channel)
    assert len(exchange.edges) < MAX_EDGES
    assert bytes_ever(exchange) == MAX_EDGES + 10  # a FakeChannel's messages have one byte


async def test_the_dropped_do_not_add_up_for_ever(autojump_clock: MockClock) -> None:
    _, exchange = an_exchange()
    for number in range(MAX_BANNED + 10):
        exchange.blame(RemoteProtocolError("nonsense", f"stranger {number}"))
    assert len(exchange._banned) == MAX_BANNED
    channel = FakeChannel(f"stranger {MAX_BANNED + 9}", lambda: None, reads=True)
    await exchange.serve(channel)
    assert channel.taken == 1  # its Hello, and no more


class Blank:
    """A store in which everything is zero."""

    def read(self, update: UpdateId, chunk: int, offset: int, into: memoryview) -> None:
        into[:] = bytes(len(into))


async def test_strangers_that_take_nothing_keep_nobody_from_pieces(
    autojump_clock: MockClock,
) -> None:
    world, exchange = an_exchange()
    exchange._store = cast(UpdateStore, Blank())
    update = world["a"].updates[1]
    served = 0

    async def ask(peer: str, *, reads: bool) -> None:
        asked = 0
        channel = FakeChannel(peer, lambda: None, reads=reads)

        async def receive() -> tuple[Message, int]:
            nonlocal asked
            if asked:
                await trio.sleep(0.2)  # by now what they are told of the update stands in the way
            asked += 1
            return (m.Request(asked, update, 0, 0, 1) if asked > 1 else HELLO), 1

        async def send_together(messages: Sequence[Message]) -> list[int]:
            nonlocal served
            if not reads:
                await trio.sleep_forever()
            served += sum(isinstance(message, m.Piece) for message in messages)
            await trio.lowlevel.checkpoint()
            return [1] * len(messages)

        channel.receive, channel.send_together = receive, send_together  # type: ignore[method-assign]
        await exchange.serve(channel)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(exchange.run)
        for number in range(8):
            nursery.start_soon(partial(ask, f"deaf {number}", reads=False))
        await trio.sleep(1.0)
        nursery.start_soon(partial(ask, "honest", reads=True))
        await trio.sleep(10.0)
        nursery.cancel_scope.cancel()
    assert served > 40
