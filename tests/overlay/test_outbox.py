"""What is sent, in which order, and how much at a time on a slow link."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast

import pytest
import trio
from libp2p.stream_muxer.exceptions import MuxedStreamError
from trio.testing import MockClock

from p2pfl_torrent.overlay.outbox import (
    DATA,
    FAST_FRAME,
    FIRST_FRAME,
    HEADER,
    MAX_FRAME,
    MIN_FRAME,
    PING,
    SLOW_FRAME,
    SYN,
    UNSENT,
    WINDOW_UPDATE,
    Outbox,
)
from p2pfl_torrent.overlay.sending import Sending


@dataclass
class Link:
    """A session on a link of so many bytes a second; remembers what left when."""

    rate: float
    left: list[tuple[float, tuple[int, int, int]]] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)
    unsent: int = 0

    def keep_unsent(self, size: int) -> None:
        self.unsent = size

    def begin(self, messages: Iterable[memoryview], size: int) -> Sending:
        return cast(Sending, _Slow(messages, size))

    def advance(self, sending: Sending) -> bool:
        return False  # a slow link's buffer is always full

    async def finish(self, sending: Sending) -> None:
        slow = cast(_Slow, sending)
        data = bytearray()
        for message in slow.messages:
            data += message
            self.messages.append(len(message))
            await trio.sleep(len(message) / self.rate)
        assert len(data) == slow.size
        self.left += [(trio.current_time(), what) for what in frames(data)]


@dataclass
class _Slow:
    messages: Iterable[memoryview]
    size: int
    ended: bool = False

    def end(self) -> None:
        self.ended = True


def frames(data: bytes | bytearray) -> Iterator[tuple[int, int, int]]:
    """Type, stream and length of each."""
    while data:
        _, kind, _, number, length = HEADER.unpack_from(data)
        yield kind, number, length
        data = data[HEADER.size + (length if kind == DATA else 0) :]


@dataclass
class Bulk:
    """A stream without windows."""

    stream_id: int
    outbox: Outbox

    async def write(self, size: int) -> None:
        while size:
            count = min(size, self.outbox.frame_limit)
            await self.outbox.send(self, [memoryview(bytes(count))], count)
            size -= count

    def withdrawn(self, count: int) -> None:
        raise AssertionError("nothing is cancelled here")


async def test_control_goes_first_and_streams_take_turns(autojump_clock: MockClock) -> None:
    link = Link(rate=1e9)
    outbox = Outbox(link)
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as writing:
            for number in (1, 3, 5):
                writing.start_soon(Bulk(number, outbox).write, 1 << 20)
            await trio.testing.wait_all_tasks_blocked()
            outbox.say(PING, SYN, 0)
            outbox.grant(3, 1000)
            outbox.grant(3, 24)
            nursery.start_soon(outbox.run)
        nursery.cancel_scope.cancel()
    sent = [what for _, what in link.left]
    assert sent[:2] == [(PING, 0, 0), (WINDOW_UPDATE, 3, 1024)]
    numbers = [number for kind, number, _ in sent if kind == DATA]
    turns = [set(numbers[n : n + 3]) for n in range(0, len(numbers) - 3, 3)]
    assert turns == [{1, 3, 5}] * len(turns)
    assert outbox.carried == 3 << 20


@pytest.mark.parametrize("before", [16_000, 5_000_000, 20_000_000, 1_000_000_000])
@pytest.mark.parametrize("kbit", [128, 1000, 10_000])
async def test_a_heartbeat_waits_for_the_frame_that_has_begun_and_then_for_short_ones(
    kbit: int, before: int, autojump_clock: MockClock
) -> None:
    """Bulk and a ping each second, on a link that falls while the bulk is under way."""
    link = Link(rate=before)
    outbox = Outbox(link)
    waits: list[float] = []

    async def beat() -> None:
        for number in range(1000, 1030):
            said = trio.current_time()
            outbox.say(PING, SYN, 0, number)
            await outbox.flush()
            waits.append(trio.current_time() - said)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        nursery.start_soon(Bulk(1, outbox).write, 1 << 30)
        await trio.sleep(5 if before < 1_000_000 else 0.5)
        link.rate = kbit * 125
        begun = outbox.frame_limit
        assert begun <= max(FIRST_FRAME, before * FAST_FRAME)
        await beat()
        nursery.cancel_scope.cancel()
    # Two frames were cut at the earlier rate: the one that has begun, and the next in the queue.
    assert max(waits[:2]) <= begun / link.rate * 1.1 + SLOW_FRAME
    assert max(waits[2:]) <= max(SLOW_FRAME, MIN_FRAME / link.rate) * 1.1
    assert outbox.frame_limit >= MIN_FRAME
    assert link.unsent == max(MIN_FRAME, outbox.frame_limit // UNSENT)


async def test_a_fast_link_gets_whole_pieces(autojump_clock: MockClock) -> None:
    link = Link(rate=1e9)
    outbox = Outbox(link)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        await Bulk(1, outbox).write(16 << 20)
        nursery.cancel_scope.cancel()
    assert link.left[-2][1] == (DATA, 1, MAX_FRAME)


async def test_a_large_part_is_not_joined_with_what_is_before_it(
    autojump_clock: MockClock,
) -> None:
    link = Link(rate=1e9)
    outbox = Outbox(link)
    outbox.frame_limit = MAX_FRAME
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        head, body = b"head of a piece", bytes(200_000)
        await outbox.send(Bulk(1, outbox), [head, body], len(head) + len(body))
        nursery.cancel_scope.cancel()
    assert link.messages == [HEADER.size + len(head), 65519, 65519, 65519, 200_000 - 3 * 65519]


class Ample(Link):
    """A session whose kernel takes all at once."""

    def advance(self, sending: Sending) -> bool:
        slow = cast(_Slow, sending)
        data = b"".join(map(bytes, slow.messages))
        assert len(data) == slow.size
        self.left += [(trio.current_time(), what) for what in frames(data)]
        return True


async def an_idle_outbox(nursery: trio.Nursery, link: Link) -> Outbox:
    outbox = Outbox(link)
    nursery.start_soon(outbox.run)
    await trio.testing.wait_all_tasks_blocked()
    return outbox


async def test_what_the_kernel_takes_at_once_is_sent_at_once() -> None:
    async with trio.open_nursery() as nursery:
        link = Ample(rate=1e9)
        outbox = await an_idle_outbox(nursery, link)
        bulk = Bulk(1, outbox)
        await outbox.send(bulk, [b"first"], 5)
        assert link.left[-1][1] == (DATA, 1, 5)
        outbox.say(PING, SYN, 0)
        await outbox.send(bulk, [b"second"], 6)
        sent = [what for _, what in link.left]
        assert sent == [(DATA, 1, 5), (PING, 0, 0), (DATA, 1, 6)]  # not before what goes first
        nursery.cancel_scope.cancel()
    assert outbox.carried == 11


@pytest.mark.parametrize("turn", [0.0, 1e9])
async def test_a_writer_that_never_waits_lets_others_run_and_can_be_cancelled(
    turn: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pfl_torrent.overlay.outbox.TURN", turn)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        outbox = await an_idle_outbox(nursery, Ample(rate=1e9))
        bulk = Bulk(1, outbox)
        await outbox.send(bulk, [b"x"], 1)  # begins a turn
        async with trio.open_nursery() as running:
            running.start_soon(other)
            for _ in range(100):
                await outbox.send(bulk, [b"x"], 1)
            assert turns >= 99 if turn == 0 else turns <= 1
            with trio.CancelScope() as scope:
                scope.cancel()
                await outbox.send(bulk, [b"x"], 1)
            assert scope.cancelled_caught
            running.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


class Full(Link):
    """A session whose kernel took a part and has no room for more."""

    begun: _Slow

    def begin(self, messages: Iterable[memoryview], size: int) -> Sending:
        self.begun = _Slow(messages, size)
        return cast(Sending, self.begun)


async def test_a_frame_that_nobody_is_left_to_finish_ends_with_the_connection(
    autojump_clock: MockClock,
) -> None:
    """It was begun in the turn of the event loop in which the sending task was cancelled."""
    link = Full(rate=1e9)
    outbox = Outbox(link)

    async def sending() -> None:
        try:
            await outbox.run()
        finally:
            outbox.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sending)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        with trio.fail_after(60) as patience:
            patience.shield = True
            with pytest.raises(MuxedStreamError):
                await outbox.send(Bulk(1, outbox), [b"half"], 4)
    assert link.begun.ended
