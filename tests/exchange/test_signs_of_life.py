"""A neighbour whose large message comes slowly lives, though no message is whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import cast

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pfl_torrent.core import messages as m
from p2pfl_torrent.core.messages import Message
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.exchange.driver import PING_INTERVAL, Exchange
from p2pfl_torrent.exchange.ports import Channel, UpdateStore
from tests.core.swarm_world import exchanging
from tests.exchange.test_bounds import HELLO, FakeChannel, Surroundings

COMES = 30.0  # seconds until nothing comes any more
HOLDER = PeerId("b")


class Listening(Surroundings):
    """Notes when somebody was heard."""

    def __init__(self) -> None:
        self.heard_at: list[float] = []

    def heard(self, peer: PeerId) -> None:
        self.heard_at.append(trio.current_time())


class Slow(FakeChannel):
    """Answers one ping, then begins a Piece that never gets whole."""

    def __init__(self) -> None:
        super().__init__(HOLDER, lambda: None, reads=True)
        self.pings: list[float] = []
        self._pinged = trio.Event()

    @property
    def begun(self) -> int:  # type: ignore[override]
        return 8000 * int(min(trio.current_time(), COMES))

    async def send(self, message: Message) -> int:
        if isinstance(message, m.Ping):
            self.pings.append(trio.current_time())
            self._pinged.set()
        return await super().send(message)

    async def receive(self) -> tuple[Message, int]:
        self.taken += 1
        if self.taken == 1:
            return HELLO, 1
        if self.taken == 2:
            await self._pinged.wait()
            return m.Pong(1), 1
        await trio.sleep_forever()
        raise AssertionError("for ever is over")


class Dialer:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def open_channel(self, peer: PeerId, addrs: Sequence[str]) -> Channel:
        await trio.lowlevel.checkpoint()
        return self._channel


async def test_what_comes_of_a_message_is_a_sign_of_life(autojump_clock: MockClock) -> None:
    around, channel = Listening(), Slow()
    swarm = exchanging()["a"].swarm
    exchange = Exchange(swarm, cast(UpdateStore, None), Dialer(channel), around, random.Random(1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(exchange.run)
        await wait_all_tasks_blocked()
        exchange.set_neighbours({HOLDER: ()})
        await trio.sleep(2 * COMES)
        nursery.cancel_scope.cancel()
    assert max(around.heard_at) - COMES < 2 * PING_INTERVAL
    silences = [
        later - earlier
        for earlier, later in zip(around.heard_at, around.heard_at[1:], strict=False)
    ]
    assert max(silences) < 2.5 * PING_INTERVAL
    assert len(around.heard_at) > COMES / 2
    assert len(channel.pings) == 2  # for the round trip; and when nothing came any more
