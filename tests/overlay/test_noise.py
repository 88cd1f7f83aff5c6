"""The Noise session: what arrives is what was sent, or the connection is closed for good."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from p2pfl_torrent.overlay.noise import NoiseSession
from p2pfl_torrent.overlay.sending import (
    BIG_BUFFERS,
    MAX_NONCE,
    MAX_PLAINTEXT,
    SEND_BUFFER,
    SMALL_BUFFER,
    SPARE_BUFFERS,
    Buffers,
    SessionBroken,
)
from tests.overlay.links import Collected, seal, sessions, wire

PATIENCE = 10.0


async def pumped(session: NoiseSession, sink: Collected) -> str:
    """What ended the pumping; in order: ''."""
    with trio.fail_after(PATIENCE):
        try:
            await session.pump(sink)
        except SessionBroken as error:
            return str(error)
    return ""


async def arrived(session: NoiseSession, sink: Collected, count: int) -> None:
    """Pumps until so many bytes are there."""
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.pump, sink)
            while len(sink.data) < count:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()


async def is_of_no_use(session: NoiseSession) -> bool:
    """Nothing can be asked of it, and its socket is closed."""
    for ask in (lambda: session.read(1), lambda: session.write(b"x")):
        with pytest.raises(SessionBroken):
            await ask()
    with pytest.raises(SessionBroken):
        await session.pump(Collected())
    return wire(session).socket.fileno() == -1


@pytest.mark.parametrize("room", [0, 1000, 1 << 20])
async def test_all_sizes_arrive_as_they_were_sent(room: int) -> None:
    parts = [os.urandom(size) for size in (1, 2, 1000, MAX_PLAINTEXT, MAX_PLAINTEXT + 1, 3 << 20)]
    whole = b"".join(parts)
    async with sessions() as (near, far):
        sink = Collected(room)

        async def send() -> None:
            for part in parts:
                await near.write(part)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await arrived(far, sink, len(whole))
        assert sink.data == whole


async def test_reading_before_the_multiplexer_and_pumping_after_it_lose_nothing() -> None:
    async with sessions() as (near, far):
        for word in (b"/multistream", b"/yamux", b"and the rest"):
            await near.write(word)
        assert await far.read(5) == b"/mult"
        assert await far.read() == b"istream"
        assert await far.read(6) == b"/yamux"
        sink = Collected()
        await arrived(far, sink, 12)
        assert sink.data == b"and the rest"


@given(
    cuts=st.lists(st.integers(1, 399), max_size=6), sizes=st.lists(st.integers(0, 90), max_size=6)
)
@settings(max_examples=30)
async def test_however_the_network_cuts_it(cuts: list[int], sizes: list[int]) -> None:
    async with sessions() as (near, far):
        texts = [os.urandom(size) for size in sizes]
        stream = b"".join(seal(near, text) for text in texts)
        sink = Collected(room=50)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(far.pump, sink)
            places = sorted({0, *(place for place in cuts if place < len(stream)), len(stream)})
            for start, end in pairwise(places):
                await wire(near).send_all(stream[start:end])
                await wait_all_tasks_blocked()
            assert sink.data == b"".join(texts)
            assert sink.empty == texts.count(b"")
            nursery.cancel_scope.cancel()


@given(garbage=st.binary(min_size=18, max_size=400))
@settings(max_examples=30)
async def test_garbage_is_one_clean_error(garbage: bytes) -> None:
    async with sessions() as (near, far):
        await wire(near).send_all(garbage)
        await wire(near).send_eof()
        sink = Collected(room=100)
        assert await pumped(far, sink) in (
            "a message shorter than its tag",
            "a message that does not verify",
            "the connection ended in mid-message",
        )
        assert sink.data == b""


@pytest.mark.parametrize("room", [0, 100])
@pytest.mark.parametrize("byte", [2, 5, -1])
async def test_a_changed_message_is_not_handed_out(byte: int, room: int) -> None:
    async with sessions() as (near, far):
        message = bytearray(seal(near, b"to be changed"))
        message[byte] ^= 1
        await wire(near).send_all(bytes(message))
        sink = Collected(room)
        assert await pumped(far, sink) == "a message that does not verify"
        assert sink.data == b""
        assert await is_of_no_use(far)


async def test_what_was_verified_before_a_bad_message_was_handed_out_and_is_not_taken_again() -> (
    None
):
    async with sessions() as (near, far):
        good = seal(near, b"good")
        bad = bytes(20)
        await wire(near).send_all(good + b"\0\x12" + bad[2:] + good)
        with pytest.raises(SessionBroken, match="does not verify"):
            await far.read(8)
        with pytest.raises(SessionBroken, match="does not verify"):
            await far.read(8)  # with the numbers of before, the second `good` would verify
        assert await is_of_no_use(far)


async def test_a_repeated_message_does_not_verify() -> None:
    async with sessions() as (near, far):
        message = seal(near, b"once")
        await wire(near).send_all(message + message)
        sink = Collected()
        assert await pumped(far, sink) == "a message that does not verify"
        assert sink.data == b"once"


async def test_messages_in_another_order_do_not_verify() -> None:
    async with sessions() as (near, far):
        first, second = seal(near, b"first"), seal(near, b"second")
        await wire(near).send_all(second + first)
        sink = Collected()
        assert await pumped(far, sink) == "a message that does not verify"
        assert sink.data == b""


async def test_a_message_of_ours_that_comes_back_does_not_verify() -> None:
    async with sessions() as (near, far):
        await wire(near).send_all(seal(far, b"yours"))  # number 0 of the other direction
        assert await pumped(far, Collected()) == "a message that does not verify"


@pytest.mark.parametrize("size", [0, 1, 15])
async def test_a_message_shorter_than_its_tag(size: int) -> None:
    async with sessions() as (near, far):
        await wire(near).send_all(size.to_bytes(2, "big") + bytes(size))
        assert await pumped(far, Collected()) == "a message shorter than its tag"
        assert await is_of_no_use(far)


async def test_an_end_in_mid_message_is_no_order() -> None:
    async with sessions() as (near, far):
        await wire(near).send_all(seal(near, b"whole") + seal(near, b"cut off")[:-1])
        await wire(near).send_eof()
        sink = Collected()
        assert await pumped(far, sink) == "the connection ended in mid-message"
        assert sink.data == b"whole"


async def test_an_end_between_messages_is_order() -> None:
    async with sessions() as (near, far):
        await near.write(b"all of it")
        await near.close()
        sink = Collected()
        assert await pumped(far, sink) == ""
        assert sink.data == b"all of it"
        with pytest.raises(SessionBroken, match=r"broke|closed"):
            await near.write(b"after the close")


async def test_the_last_number_is_not_used() -> None:
    async with sessions() as (near, far):
        near._sealer.number = far._received = MAX_NONCE - 1
        await near.write(b"the last one")
        sink = Collected()
        await arrived(far, sink, 12)
        with pytest.raises(SessionBroken, match="our nonces are used up"):
            await near.write(b"one more")
        assert await is_of_no_use(near)


async def test_a_message_with_the_last_number_is_not_accepted() -> None:
    async with sessions() as (near, far):
        near._sealer.number, far._received = MAX_NONCE - 1, MAX_NONCE
        await wire(near).send_all(seal(near, b"one too many"))
        assert await pumped(far, Collected()) == "the nonces of the other side are used up"


async def test_a_cancelled_send_closes_the_connection() -> None:
    async with sessions() as (near, far):
        with trio.move_on_after(0.05) as cancelled:
            for _ in range(1000):
                await near.write(bytes(1 << 20))
        assert cancelled.cancelled_caught
        assert await is_of_no_use(near)
        sink = Collected(1 << 20)
        assert await pumped(far, sink) in ("", "the connection ended in mid-message")
        assert not any(sink.data)


async def test_cancelled_reading_goes_on() -> None:
    async with sessions() as (near, far):
        message = seal(near, b"in two pieces")
        sink = Collected()
        for piece in (message[:7], message[7:]):
            with trio.move_on_after(0.05):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(far.pump, sink)
                    await wire(near).send_all(piece)
        assert sink.data == b"in two pieces"


async def test_a_sink_that_raises_breaks_the_session() -> None:
    class Raising(Collected):
        def feed(self, data: memoryview) -> None:
            raise ZeroDivisionError

    async with sessions() as (near, far):
        await near.write(b"x")
        with pytest.raises(ZeroDivisionError):
            await far.pump(Raising())
        assert await is_of_no_use(far)


async def test_a_peer_that_takes_nothing_is_given_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with sessions() as (near, _far):
        began = trio.current_time()
        with pytest.raises(SessionBroken, match="took too little for 60 s"):
            while True:
                await near.write(bytes(1 << 20))
        assert 60 <= trio.current_time() - began < 240
        assert await is_of_no_use(near)


async def test_empty_messages_do_not_keep_the_loop_for_themselves() -> None:
    async with sessions() as (near, far):
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        flood = b"".join(seal(near, b"") for _ in range(5000)) + seal(near, b"x")
        await wire(near).send_all(flood)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            assert await far.read(1) == b"x"
            assert turns  # before the block's end, which is a turn in any case
            nursery.cancel_scope.cancel()


async def test_a_turn_ends_whatever_the_messages_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here each small one takes a whole turn; all are handed out all the same."""
    monkeypatch.setattr("p2pfl_torrent.overlay.noise.TURN", 0.0)
    async with sessions() as (near, far):
        turns: list[int] = []
        sink = Collected()

        async def other() -> None:
            while len(sink.data) < 20:
                turns.append(len(sink.data))
                await trio.lowlevel.checkpoint()

        await wire(near).send_all(b"".join(seal(near, bytes([n])) for n in range(20)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await arrived(far, sink, 20)
        assert sink.data == bytes(range(20))
        assert len(set(turns)) > 10


def test_many_stalled_senders_hold_small_buffers() -> None:
    buffers = Buffers()
    held = [buffers.borrow(1 << 20) for _ in range(500)]
    assert sum(map(len, held)) == BIG_BUFFERS * SEND_BUFFER + (500 - BIG_BUFFERS) * SMALL_BUFFER
    for buffer in held:
        buffers.give_back(buffer)
    assert sum(len(spare) for kind in buffers._spare.values() for spare in kind) == (
        SPARE_BUFFERS * (SEND_BUFFER + SMALL_BUFFER)
    )
    assert len(buffers.borrow(1 << 20)) == SEND_BUFFER
    assert len(buffers.borrow(12)) == SMALL_BUFFER


async def test_a_small_buffer_sends_all_the_same() -> None:
    async with sessions() as (near, far):
        held = [near._buffers.borrow(1 << 20) for _ in range(BIG_BUFFERS)]
        data = os.urandom(1 << 20)
        sink = Collected()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.write, data)
            await arrived(far, sink, len(data))
        assert sink.data == data
        for buffer in held:
            near._buffers.give_back(buffer)
