"""The multiplexer: the same streams however their bytes come, and for bad bytes one clean error."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pfl_torrent.overlay.limits import (
    FRAME_PROGRESS,
    FRAME_STALL,
    IDLE_BURST,
    IDLE_RATE,
    INITIAL_WINDOW,
    MAX_ANSWERS,
    MAX_BUFFERED,
    MAX_CONTROL_FRAMES,
    RECEIVE_WINDOW,
    WIDE_STREAMS,
)
from p2pfl_torrent.overlay.outbox import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
)
from p2pfl_torrent.overlay.sending import SessionBroken
from p2pfl_torrent.overlay.yamux import YamuxConn
from p2pfl_torrent.overlay.yamux_stream import MAX_SEND_WINDOW, YamuxStream
from tests.overlay.links import admit, conns, seal, sessions, wire

PEER = ID(b"somebody")
PATIENCE = 10.0


class NoSession:
    """Stands for the session where only the reader is looked at: we are who dialled."""

    is_initiator = True
    closed = False

    def keep_unsent(self, size: int) -> None:
        pass

    def close_now(self) -> None:
        self.closed = True


def a_conn(gate: Any = admit) -> YamuxConn:
    return YamuxConn(cast(Any, NoSession()), PEER, gate)


def header(kind: int, flags: int, number: int, length: int = 0) -> bytes:
    return HEADER.pack(0, kind, flags, number, length)


def data(number: int, body: bytes, flags: int = 0) -> bytes:
    return header(DATA, flags, number, len(body)) + body


def feed(conn: YamuxConn, *frames: bytes) -> None:
    for frame in frames:
        conn.feed(memoryview(frame))


def said(conn: YamuxConn) -> list[tuple[int, int, int, int]]:
    """Control frames queued: type, flags, stream, length."""
    return [HEADER.unpack(frame)[1:] for frame in conn.outbox._control]


@dataclass
class Told:
    """What a stream's other end has said."""

    body: bytes = b""
    ended: bool = False
    window: int = INITIAL_WINDOW


@dataclass
class Talk:
    """A valid stream of bytes from the other side, and what it says."""

    wire: bytearray = field(default_factory=bytearray)
    streams: dict[int, Told] = field(default_factory=dict)


@st.composite
def talks(draw: st.DrawFn) -> Talk:
    talk = Talk()
    numbers = st.sampled_from([2, 4, 6])
    for _ in range(draw(st.integers(0, 12))):
        what, number = (
            draw(st.sampled_from(["data", "fin", "window", "ping"])),
            draw(numbers),
        )
        if what == "ping":
            talk.wire += header(PING, draw(st.sampled_from([SYN, ACK])), 0, 7)
            continue
        known = talk.streams.get(number)
        if known is None:
            known = talk.streams[number] = Told()
            talk.wire += header(WINDOW_UPDATE, SYN, number)
        if known.ended:
            continue
        if what == "data":
            body = draw(st.binary(max_size=200))
            known.body += body
            talk.wire += data(number, body)
        elif what == "window":
            more = draw(st.integers(0, 1000))
            known.window += more
            talk.wire += header(WINDOW_UPDATE, 0, number, more)
        elif what == "fin":
            body = draw(st.binary(max_size=20))
            known.body += body
            known.ended = True
            talk.wire += data(number, body, FIN)
    return talk


def state(conn: YamuxConn) -> dict[int, tuple[bytes, bool, int, int]]:
    return {
        number: (
            bytes(stream.inbox._pending),
            stream.recv_closed,
            stream.recv_window,
            stream.send_window,
        )
        for number, stream in conn.streams.items()
    }


@given(talk=talks(), cuts=st.lists(st.integers(0, 3000), max_size=12))
async def test_frames_are_the_same_however_they_come(talk: Talk, cuts: list[int]) -> None:
    whole, pieces = a_conn(), a_conn()
    feed(whole, bytes(talk.wire))
    places = sorted({0, *(place for place in cuts if place < len(talk.wire)), len(talk.wire)})
    feed(pieces, *(bytes(talk.wire[a:b]) for a, b in zip(places, places[1:], strict=False)))  # noqa: RUF007 - one may be alone
    expected = {
        number: (told.body, told.ended, INITIAL_WINDOW - len(told.body), told.window)
        for number, told in talk.streams.items()
    }
    assert state(whole) == state(pieces) == expected
    assert said(whole) == said(pieces)
    assert whole._buffered == sum(len(told.body) for told in talk.streams.values())


noise = st.one_of(
    st.binary(max_size=60),
    st.builds(
        HEADER.pack,
        st.sampled_from([0, 0, 0, 1]),
        st.integers(0, 4),
        st.integers(0, 15),
        st.sampled_from([0, 1, 2, 3, 4, 2**32 - 1]),
        st.sampled_from([0, 1, 30, INITIAL_WINDOW, INITIAL_WINDOW + 1, 2**32 - 1]),
    ),
)


@given(parts=st.lists(noise, max_size=30))
@example(parts=[header(DATA, 0, 1, 13), bytes(13)])  # to a stream of ours
@settings(max_examples=300)
async def test_garbage_is_one_clean_error_and_holds_little(parts: list[bytes]) -> None:
    conn = a_conn()
    own = [await conn.open_stream() for _ in range(2)]
    try:
        feed(conn, *parts)
    except SessionBroken:
        pass
    held = sum(len(stream.inbox._pending) for stream in {*conn.streams.values(), *own})
    assert held <= sum(map(len, parts))
    assert 0 <= conn._buffered <= MAX_BUFFERED
    assert len(conn.outbox._control) <= MAX_ANSWERS
    assert all(0 <= stream.send_window <= MAX_SEND_WINDOW for stream in conn.streams.values())
    assert all(stream.recv_window >= 0 for stream in conn.streams.values())


@given(garbage=st.binary(min_size=12, max_size=200).filter(lambda text: text[0] != 0))
@settings(max_examples=20)
async def test_garbage_closes_the_connection_and_nothing_else(garbage: bytes) -> None:
    async with sessions() as (near, far):
        conn = YamuxConn(far, far.remote_peer, admit)
        await near.write(garbage)
        with trio.fail_after(PATIENCE):
            await conn.start()
        assert conn.is_closed
        assert wire(far).socket.fileno() == -1
        with pytest.raises(MuxedStreamError):
            await conn.open_stream()
        with pytest.raises(MuxedConnUnavailable):
            await conn.accept_stream()


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([HEADER.pack(1, DATA, 0, 2, 0)], "not yamux"),
        ([header(4, 0, 0)], "not yamux"),
        ([header(GO_AWAY, 0, 0)], "closes the connection"),
        ([header(WINDOW_UPDATE, SYN, 0)], "not free"),
        ([header(WINDOW_UPDATE, SYN, 3)], "not free"),
        ([header(WINDOW_UPDATE, SYN, 2), header(WINDOW_UPDATE, SYN, 2)], "not free"),
        ([header(DATA, 0, 2, 1)], "a stream that is not open"),
        ([header(DATA, SYN, 2, INITIAL_WINDOW + 1)], "the window allows"),
        ([data(2, bytes(INITIAL_WINDOW), SYN), data(2, b"x")], "the window allows"),
    ],
)
async def test_a_breach_is_told(frames: list[bytes], says: str) -> None:
    conn = a_conn()
    with pytest.raises(SessionBroken, match=says):
        feed(conn, *frames)


# Flow control


async def test_what_was_under_way_to_a_stream_that_was_reset_is_dropped_and_no_more() -> None:
    conn = a_conn()
    feed(conn, header(WINDOW_UPDATE, SYN, 2), data(2, bytes(100)))
    await conn.streams[2].reset()
    assert conn._buffered == 0
    feed(conn, data(2, bytes(INITIAL_WINDOW - 100)))
    assert conn._buffered == 0
    with pytest.raises(SessionBroken, match="not open"):
        feed(conn, data(2, b"x"))


async def test_a_reset_in_the_middle_of_a_body_drops_the_rest_of_it() -> None:
    conn = a_conn()
    frame = data(2, b"a" * 100, SYN)
    feed(conn, frame[:50])
    stream = conn.streams[2]
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(MuxedStreamReset):
                await stream.inbox.exactly(100)

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        await stream.reset()
    feed(conn, frame[50:], data(4, b"next", SYN))
    assert bytes(conn.streams[4].inbox._pending) == b"next"
    assert conn._buffered == 4


async def test_data_for_a_stream_that_was_refused_is_dropped() -> None:
    conn = a_conn(gate=lambda peer: False)
    feed(conn, data(2, bytes(1000), SYN), data(2, bytes(1000)), header(WINDOW_UPDATE, FIN, 2))
    assert said(conn) == [(WINDOW_UPDATE, RST, 2, 0)]
    assert conn.streams == {}
    assert conn._buffered == 0


async def test_data_after_the_end_is_dropped() -> None:
    conn = a_conn()
    feed(conn, data(2, b"last", SYN | FIN), data(2, b"more"))
    assert await conn.streams[2].inbox.exactly(4) == b"last"
    with pytest.raises(MuxedStreamEOF):
        await conn.streams[2].inbox.some(1)
    with pytest.raises(SessionBroken, match="the window allows"):
        feed(conn, data(2, bytes(INITIAL_WINDOW - 7)))


async def test_window_updates_do_not_overflow() -> None:
    conn = a_conn()
    feed(conn, header(WINDOW_UPDATE, SYN, 2), *[header(WINDOW_UPDATE, 0, 2, 2**32 - 1)] * 100)
    assert conn.streams[2].send_window == MAX_SEND_WINDOW


async def test_a_peer_that_keeps_to_its_windows_is_never_cut_off() -> None:
    """64 streams, of which twenty were read before nobody read any more."""
    conn = a_conn()
    for number in range(2, 130, 2):
        feed(conn, header(WINDOW_UPDATE, SYN, number))
    for number in range(2, 42, 2):
        for _ in range(4):
            feed(conn, data(number, bytes(INITIAL_WINDOW // 4)))
            await conn.streams[number].inbox.exactly(INITIAL_WINDOW // 4)
    wide = [stream for stream in conn.streams.values() if stream.recv_window > INITIAL_WINDOW]
    assert len(wide) == WIDE_STREAMS
    for number, stream in conn.streams.items():
        feed(conn, data(number, bytes(stream.recv_window)))
        assert stream.recv_window == 0
    assert conn._buffered <= MAX_BUFFERED


async def test_streams_that_are_over_leave_their_wide_windows_to_others() -> None:
    conn = a_conn()
    for number in range(2, 2 + 6 * WIDE_STREAMS, 2):
        feed(conn, data(number, bytes(INITIAL_WINDOW // 4), SYN))
        stream = conn.streams[number]
        await stream.inbox.exactly(INITIAL_WINDOW // 4)
        assert stream.recv_window == RECEIVE_WINDOW
        await stream.reset()


async def test_memory_set_aside_for_messages_counts() -> None:
    """Forty messages of a mebibyte announced, and not sent."""
    conn = a_conn()
    async with trio.open_nursery() as nursery:
        for number in range(2, 82, 2):
            feed(conn, header(WINDOW_UPDATE, SYN, number))
            inbox = conn.streams[number].inbox
            nursery.start_soon(inbox.frame, 1, lambda head: 1 << 20)
        await wait_all_tasks_blocked()
        with pytest.raises(SessionBroken, match="may lie unread"):
            for number in range(2, 82, 2):
                feed(conn, data(number, b"\0"))
        nursery.cancel_scope.cancel()
    assert conn._buffered <= MAX_BUFFERED + (1 << 20)


async def test_cancelled_reads_do_not_widen_the_window() -> None:
    """The sender was given credit for the same bytes at each time-out."""
    conn = a_conn()
    feed(conn, header(WINDOW_UPDATE, SYN, 2))
    stream = conn.streams[2]
    for _ in range(50):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.inbox.exactly, 1 << 20)
                await wait_all_tasks_blocked()
                feed(conn, data(2, bytes(1000)))
                scope.cancel()
    assert stream.recv_window == INITIAL_WINDOW - 50_000


# Frames that carry nothing


async def test_pings_that_are_not_answered_end_the_connection() -> None:
    conn = a_conn()
    feed(conn, *[header(PING, SYN, 0, number) for number in range(MAX_ANSWERS)])
    assert said(conn)[-1] == (PING, ACK, 0, MAX_ANSWERS - 1)
    with pytest.raises(SessionBroken, match="asks faster than it takes the answers"):
        feed(conn, header(PING, SYN, 0))


async def test_an_honest_peer_may_ask_a_lot_while_our_line_is_busy() -> None:
    """128 streams opened at once and closed again, 128 refused, a ping each second of a stall; and
    as many control frames of our own."""
    admitted = iter([True] * 128 + [False] * 128)
    conn = a_conn(gate=lambda peer: next(admitted))
    for _ in range(MAX_CONTROL_FRAMES):
        await conn.open_stream()
    for number in range(2, 514, 2):
        feed(conn, header(WINDOW_UPDATE, SYN, number), header(WINDOW_UPDATE, FIN, number))
    feed(conn, *[header(PING, SYN, 0, second) for second in range(int(FRAME_STALL))])
    for stream in list(conn.streams.values()):
        await stream.close()
    assert len(said(conn)) < MAX_ANSWERS


@pytest.mark.parametrize(
    "frame",
    [
        header(PING, ACK, 0),
        header(WINDOW_UPDATE, 0, 2, 1),
        header(WINDOW_UPDATE, RST, 1000),
        header(DATA, 0, 2),
        b"",
    ],
)
async def test_frames_that_carry_nothing_have_an_end(
    frame: bytes, autojump_clock: MockClock
) -> None:
    conn = a_conn()
    feed(conn, *[header(WINDOW_UPDATE, SYN, 2)], *[frame] * (IDLE_BURST - 1))
    await trio.sleep(1)
    feed(conn, *[frame] * int(IDLE_RATE))
    with pytest.raises(SessionBroken, match="carry nothing"):
        feed(conn, frame, frame)


async def test_credit_for_every_byte_sent_is_no_flood() -> None:
    """A stock py-libp2p grants a byte for each one it reads, if it reads them one by one."""
    async with conns() as (near, far):
        stream = await near.open_stream()
        answering = await far.accept_stream()
        await stream.write(bytes(20_000))
        assert await answering.inbox.exactly(20_000) == bytes(20_000)
        for _ in range(20_000):
            near.feed(memoryview(header(WINDOW_UPDATE, 0, stream.stream_id, 1)))


# Streams over a real session


async def pair(near: YamuxConn, far: YamuxConn) -> tuple[YamuxStream, YamuxStream]:
    ours = await near.open_stream()
    with trio.fail_after(PATIENCE):
        return ours, await far.accept_stream()


async def test_who_does_not_read_bounds_who_writes_and_hinders_no_other() -> None:
    async with conns() as (near, far):
        slow, slows = await pair(near, far)
        fast, fasts = await pair(near, far)
        payload = os.urandom(8 << 20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slow.write, bytes(4 << 20))
            nursery.start_soon(fast.write, payload)
            with trio.fail_after(PATIENCE):
                assert await fasts.inbox.exactly(len(payload)) == payload
            await wait_all_tasks_blocked()
            assert slow.send_window == 0
            assert slows.inbox.held == INITIAL_WINDOW
            assert far._buffered == INITIAL_WINDOW
            with trio.fail_after(PATIENCE):
                assert await slows.inbox.exactly(4 << 20) == bytes(4 << 20)


async def test_a_window_that_opens_wakes_all_who_wait_for_it() -> None:
    async with conns() as (near, far):
        ours, theirs = await pair(near, far)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.write, bytes(INITIAL_WINDOW))
            await wait_all_tasks_blocked()
            nursery.start_soon(ours.write, b"a")
            nursery.start_soon(ours.write, b"b")
            with trio.fail_after(PATIENCE):
                got = await theirs.inbox.exactly(INITIAL_WINDOW + 2)
        assert sorted(got[-2:]) == sorted(b"ab")


@pytest.mark.parametrize("idle", [True, False])
async def test_what_was_handed_over_arrives_as_it_was(idle: bool) -> None:
    """Who cancels a write while it leaves may use its buffer for something else."""
    async with sessions() as (ours, theirs):
        near = YamuxConn(ours, ours.remote_peer, admit)
        far = YamuxConn(theirs, theirs.remote_peer, admit)
        near.outbox.frame_limit = 64 << 20
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.start)
            await near.event_started.wait()
            stream = await near.open_stream()
            stream.granted(64 << 20)
            if idle:  # what the kernel takes then leaves in the writer's own task
                await wait_all_tasks_blocked()
                assert not near.outbox._busy
            buffer = bytearray(b"a") * (48 << 20)  # more than the kernel takes
            with trio.CancelScope() as cancelled:
                async with trio.open_nursery() as writing:
                    writing.start_soon(stream.write, buffer)
                    await wait_all_tasks_blocked()
                    cancelled.cancel()
            assert cancelled.cancelled_caught
            buffer[:] = b"b" * len(buffer)
            buffer.clear()  # nor is it held on to
            got = Everything()
            nursery.start_soon(theirs.pump, got)
            with trio.fail_after(PATIENCE):
                while got.count < (48 << 20) + 24:
                    await trio.lowlevel.checkpoint()
            assert got.strange == 24  # two headers
            nursery.cancel_scope.cancel()
        assert not far.streams


class Everything:
    """Counts what comes, and what of it is no `a`."""

    count = strange = 0

    def room(self) -> memoryview:
        return memoryview(b"")

    def filled(self, count: int) -> None:
        raise AssertionError

    def feed(self, plain: memoryview) -> None:
        self.count += len(plain)
        self.strange += len(plain) - bytes(plain).count(b"a")


async def test_the_end_of_a_stream_does_not_overtake_its_data() -> None:
    async with sessions() as (ours, theirs):
        near = YamuxConn(ours, ours.remote_peer, admit)
        far = YamuxConn(theirs, theirs.remote_peer, admit)
        stream = await near.open_stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, b"before the end")
            await wait_all_tasks_blocked()
            await stream.close()
            nursery.start_soon(near.start)
            nursery.start_soon(far.start)
            with trio.fail_after(PATIENCE):
                other = await far.accept_stream()
                assert await other.inbox.exactly(14) == b"before the end"
                with pytest.raises(MuxedStreamEOF):
                    await other.inbox.some(1)
            nursery.cancel_scope.cancel()


async def test_a_stream_that_is_reset_sends_nothing_after_it() -> None:
    async with sessions() as (ours, theirs):
        near = YamuxConn(ours, ours.remote_peer, admit)
        far = YamuxConn(theirs, theirs.remote_peer, admit)
        first, second = await near.open_stream(), await near.open_stream()
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                with pytest.raises(MuxedStreamError):
                    await first.write(bytes(1000))

            nursery.start_soon(write)
            await wait_all_tasks_blocked()
            await first.reset()
            nursery.start_soon(near.start)
            nursery.start_soon(far.start)
            await second.write(b"the other")
            with trio.fail_after(PATIENCE):
                await far.accept_stream()
                other = await far.accept_stream()
                assert await other.inbox.exactly(9) == b"the other"
            assert list(far.streams) == [second.stream_id]
            nursery.cancel_scope.cancel()


async def test_a_withdrawn_write_leaves_the_stream_as_it_was() -> None:
    async with sessions() as (ours, theirs):
        near = YamuxConn(ours, ours.remote_peer, admit)
        far = YamuxConn(theirs, theirs.remote_peer, admit)
        stream = await near.open_stream()
        for _ in range(5):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as writing:
                    writing.start_soon(stream.write, b"never")
                    await wait_all_tasks_blocked()
                    scope.cancel()
        assert (stream.sent, stream.send_window) == (0, INITIAL_WINDOW)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.start)
            nursery.start_soon(far.start)
            await stream.write(b"this")
            with trio.fail_after(PATIENCE):
                other = await far.accept_stream()
                assert await other.inbox.exactly(4) == b"this"
            nursery.cancel_scope.cancel()


async def test_both_reset_at_once() -> None:
    async with conns() as (near, far):
        for _ in range(20):
            ours, theirs = await pair(near, far)
            async with trio.open_nursery() as nursery:
                for stream in (ours, theirs):
                    nursery.start_soon(stream.write, bytes(INITIAL_WINDOW))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ours.reset)
                nursery.start_soon(theirs.reset)
        ours, theirs = await pair(near, far)
        await ours.write(b"still good")
        with trio.fail_after(PATIENCE):
            assert await theirs.inbox.exactly(10) == b"still good"
        assert len(near.streams) == len(far.streams) == 1
        assert near._buffered == far._buffered == 0


async def test_going_away_breaks_the_streams_of_both() -> None:
    async with conns() as (near, far):
        ours, theirs = await pair(near, far)
        await ours.write(b"last words")
        await near.close()
        with trio.fail_after(PATIENCE):
            await far.event_closed.wait()
            assert await theirs.inbox.exactly(10) == b"last words"
            for stream in (ours, theirs):
                with pytest.raises(MuxedStreamError) as caught:
                    await stream.read(1)
                assert not isinstance(caught.value, MuxedStreamEOF)
                with pytest.raises(MuxedStreamError):
                    await stream.write(b"x")


async def test_a_bug_of_ours_in_sending_costs_this_connection_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with conns() as (near, far):
        monkeypatch.setattr(near.outbox, "_session", None)
        stream = await near.open_stream()
        with trio.fail_after(PATIENCE), pytest.raises(MuxedStreamError):
            await stream.write(b"x")  # behind the SYN: the task that sends has it
        with trio.fail_after(PATIENCE):
            await near.event_closed.wait()
            await far.event_closed.wait()
    assert "sending to" in caplog.text


async def test_a_flood_of_tiny_frames_over_the_wire_is_cut_off() -> None:
    async with sessions() as (near, far):
        conn = YamuxConn(far, far.remote_peer, admit)
        flood = header(WINDOW_UPDATE, SYN, 1) + header(WINDOW_UPDATE, 0, 1, 1) * 5400
        async with trio.open_nursery() as nursery:
            nursery.start_soon(conn.start)
            try:
                while True:
                    await wire(near).send_all(seal(near, flood))
                    flood = header(WINDOW_UPDATE, 0, 1, 1) * 5400
            except trio.BrokenResourceError:
                pass
        assert conn.is_closed


def grant(stream: YamuxStream, count: int) -> None:
    """Credit for bytes that nobody took."""
    stream.recv_window += count
    stream.conn.outbox.grant(stream.stream_id, count)


@pytest.mark.parametrize("credit", [0, 1])
async def test_who_gives_no_credit_is_not_waited_for(
    credit: int, autojump_clock: MockClock
) -> None:
    """Nothing at all, or a byte now and then."""
    async with conns() as (near, far), trio.open_nursery() as nursery:
        stream = await near.open_stream()
        answering = await far.accept_stream()

        async def dribble() -> None:
            while True:
                await trio.sleep(0.7)
                grant(answering, credit)

        nursery.start_soon(dribble)
        began = trio.current_time()
        with pytest.raises(MuxedStreamError, match="took too little for 60 s"):
            await stream.write(bytes(2 * INITIAL_WINDOW))
        assert FRAME_STALL <= trio.current_time() - began < FRAME_STALL + 1
        assert near.is_established
        nursery.cancel_scope.cancel()


async def test_slow_credit_is_waited_for(autojump_clock: MockClock) -> None:
    async with conns() as (near, far), trio.open_nursery() as nursery:
        stream = await near.open_stream()
        answering = await far.accept_stream()

        async def take_slowly() -> None:
            for _ in range(4):
                await trio.sleep(FRAME_STALL - 1)
                grant(answering, FRAME_PROGRESS)

        nursery.start_soon(take_slowly)
        await stream.write(bytes(INITIAL_WINDOW + 4 * FRAME_PROGRESS))
