"""What arrived on a stream: no byte lost, none credited twice, and all that is held counted."""

from __future__ import annotations

import os

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.exchange.spares import Spares
from p2pfl_torrent.overlay.inbox import FRAME_OVERHEAD, Inbox
from p2pfl_torrent.overlay.limits import FRAME_PROGRESS, FRAME_STALL

MAX_BODY = 2 << 20

HEAD = 3


class Ended(Exception):
    pass


class Box:
    """An inbox with its books."""

    def __init__(self) -> None:
        self.credit = 0
        self.held = 0
        self.inbox = Inbox(self._give, self._hold, Spares())

    def _give(self, count: int) -> None:
        assert count >= 0
        self.credit += count

    def _hold(self, count: int) -> None:
        self.held += count
        assert self.held >= 0

    def put(self, data: bytes) -> None:
        """As the connection's reader does: straight to its place where that is known."""
        view = memoryview(data)
        while view:
            room = self.inbox.room()
            if 0 < len(room) <= len(view):
                count = len(room)
                room[:] = view[:count]
                self.inbox.filled(count)
            else:
                count = min(len(view), 7)
                self.inbox.feed(view[:count])
            view = view[count:]


def body_bytes(head: bytearray) -> int:
    size = int.from_bytes(head, "big")
    if size > MAX_BODY:
        raise RemoteProtocolError("too long")
    return size


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(HEAD, "big") + body


async def next_frame(box: Box) -> bytes:
    head, body = await box.inbox.frame(HEAD, body_bytes)
    assert body_bytes(head) == len(body)
    return bytes(body)


async def test_cancelled_reads_credit_every_byte_once() -> None:
    box = Box()
    sent = b""
    for round in range(50):
        sent += bytes([round]) * 10
        with trio.CancelScope() as cancelled:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(box.inbox.exactly, 501)
                await wait_all_tasks_blocked()
                box.put(bytes([round]) * 10)
                cancelled.cancel()
    assert box.credit <= len(sent)
    assert box.held == len(sent)
    assert await box.inbox.exactly(500) == sent
    assert (box.credit, box.held) == (500, 0)


async def test_a_read_that_was_cancelled_may_be_followed_by_frames() -> None:
    box = Box()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.inbox.exactly, 100)
        await wait_all_tasks_blocked()
        box.put(frame(b"first") + frame(b"second")[:4])
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    box.put(frame(b"second")[4:])
    assert await next_frame(box) == b"first"
    assert await next_frame(box) == b"second"
    assert (box.credit, box.held) == (11 + 2 * HEAD, 0)


@given(
    bodies=st.lists(st.binary(max_size=300), max_size=8),
    cuts=st.lists(st.integers(0, 2400), max_size=10),
    before=st.integers(0, 40),
)
async def test_frames_are_the_same_however_they_come(
    bodies: list[bytes], cuts: list[int], before: int
) -> None:
    box = Box()
    stream = os.urandom(before) + b"".join(map(frame, bodies))
    places = sorted({0, *(place for place in cuts if place < len(stream)), len(stream)})
    got: list[bytes] = []

    async def take() -> None:
        if before:
            assert await box.inbox.exactly(before) == stream[:before]
        while len(got) < len(bodies):
            got.append(await next_frame(box))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        for start, end in zip(places, places[1:], strict=False):  # noqa: RUF007 - one may be alone
            box.put(stream[start:end])
            await wait_all_tasks_blocked()
    assert got == bodies
    assert box.credit == len(stream)
    assert box.held == 0
    assert not box.inbox.partial


async def test_credit_waits_for_who_takes_the_frames() -> None:
    box = Box()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(next_frame, box)
        await wait_all_tasks_blocked()
        box.put(frame(b"a" * (100 - HEAD)))
        for _ in range(10):
            box.put(frame(b"b" * (100 - HEAD)))
    assert box.credit == 200  # the one taken, and the one behind it that is now waited for
    assert box.held == 10 * (100 - HEAD + FRAME_OVERHEAD)
    for _ in range(10):
        await next_frame(box)
    assert (box.credit, box.held) == (1100, 0)


async def test_what_waits_in_frames_without_a_body_is_counted() -> None:
    box = Box()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(next_frame, box)
        await wait_all_tasks_blocked()
        box.put(frame(b"") * 1001)
    assert box.held == 1000 * FRAME_OVERHEAD


async def test_what_is_set_aside_for_a_body_is_counted_at_once() -> None:
    box = Box()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(next_frame, box)
        await wait_all_tasks_blocked()
        box.put(frame(bytes(40_000))[:HEAD])
        assert box.held == 40_000
        nursery.cancel_scope.cancel()


async def test_a_head_that_will_not_do_ends_the_reading() -> None:
    box = Box()
    async with trio.open_nursery() as nursery:

        async def refuse() -> None:
            for _ in range(2):
                with pytest.raises(RemoteProtocolError, match="too long"):
                    await next_frame(box)

        nursery.start_soon(refuse)
        await wait_all_tasks_blocked()
        box.put(b"\xff\xff\xff" + bytes(1000))
    box.put(bytes(1000))
    assert box.held == 0


async def test_an_end_comes_after_what_came_before_it() -> None:
    box = Box()
    box.put(frame(b"last") + b"\0")
    box.inbox.finish(Ended())
    box.inbox.finish(ZeroDivisionError())
    assert await next_frame(box) == b"last"
    assert box.inbox.partial
    for _ in range(2):
        with pytest.raises(Ended):
            await next_frame(box)


async def test_a_body_that_stops_is_told_and_the_wait_for_a_head_is_not_limited(
    autojump_clock: MockClock,
) -> None:
    box = Box()
    async with trio.open_nursery() as nursery:

        async def late() -> None:
            with pytest.raises(trio.TooSlowError):
                await next_frame(box)
            assert trio.current_time() == began + 1000 + FRAME_STALL

        began = trio.current_time()
        nursery.start_soon(late)
        await trio.sleep(1000)
        box.put(frame(b"stops")[:4])


async def test_a_body_on_a_slow_link_comes_however_long_it_takes(autojump_clock: MockClock) -> None:
    """2 MiB at 64 kbit/s."""
    box = Box()
    body = os.urandom(MAX_BODY)
    rest = memoryview(frame(body))
    async with trio.open_nursery() as nursery:

        async def take() -> None:
            assert await next_frame(box) == body
            assert 250 < trio.current_time() - began < 270

        began = trio.current_time()
        nursery.start_soon(take)
        while rest:
            await trio.sleep(1)
            box.put(bytes(rest[:8000]))
            rest = rest[8000:]


async def test_what_is_here_of_a_frame_is_told() -> None:
    box = Box()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(next_frame, box)
        await wait_all_tasks_blocked()
        box.put(frame(bytes(1000))[: HEAD + 300])
        assert box.inbox.begun == 300
        nursery.cancel_scope.cancel()


async def test_a_body_that_dribbles_is_not_waited_for(autojump_clock: MockClock) -> None:
    """It begins well, then a byte comes now and then."""
    box = Box()
    async with trio.open_nursery() as nursery:

        async def take() -> None:
            with pytest.raises(trio.TooSlowError):
                await next_frame(box)
            assert trio.current_time() - began == 2 * FRAME_STALL
            nursery.cancel_scope.cancel()

        began = trio.current_time()
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        box.put(frame(bytes(MAX_BODY))[: HEAD + FRAME_PROGRESS])
        while True:
            await trio.sleep(0.7)
            box.put(b"x")


async def test_a_consumer_that_was_away_does_not_blame_the_sender(
    autojump_clock: MockClock,
) -> None:
    """The sender had no credit while frames lay here."""
    box = Box()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(next_frame, box)
        await wait_all_tasks_blocked()
        box.put(frame(b"taken") + frame(b"lies here") + frame(b"begun")[:4])
    await trio.sleep(10 * FRAME_STALL)
    assert await next_frame(box) == b"lies here"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(next_frame, box)
        await trio.sleep(FRAME_STALL / 2)
        box.put(frame(b"begun")[4:])


async def test_a_reset_in_the_checkpoint_of_a_reader_gives_it_nothing_short() -> None:
    for _ in range(20):  # whichever of the two tasks runs first
        box = Box()
        box.put(b"enough for all")

        async def read(box: Box = box) -> None:
            with pytest.raises(Ended):
                await box.inbox.exactly(6)

        async def reset(box: Box = box) -> None:
            box.inbox.drop()
            box.inbox.finish(Ended())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(reset)
        assert box.held == 0


async def test_two_readers_are_a_bug() -> None:
    box = Box()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.inbox.some, 1)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await box.inbox.some(1)
        nursery.cancel_scope.cancel()
