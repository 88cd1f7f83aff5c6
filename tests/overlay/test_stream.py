"""What a stream promises: deadlines, ends, and bytes that survive both."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from p2pfl_torrent.exchange.ports import ByteStream, EdgeClosedError
from p2pfl_torrent.overlay.limits import RECEIVE_WINDOW
from p2pfl_torrent.overlay.stream import EndOfStream, Stream, StreamBroken, StreamTimeout
from tests.overlay.hosts import PATIENCE, a_pair, ask_echo, until

PIPE = "/flt/test/pipe/1"


@asynccontextmanager
async def a_stream() -> AsyncIterator[tuple[Stream, Stream]]:
    """Both ends of one stream."""
    async with a_pair() as (ours, theirs):
        ends: list[Stream] = []
        over = trio.Event()

        async def keep(stream: Stream) -> None:
            ends.append(stream)
            await over.wait()

        theirs.set_handler(PIPE, keep)
        near = await ours.open_stream(theirs.peer_id, PIPE, PATIENCE)
        await until(lambda: bool(ends))
        yield near, ends[0]
        over.set()


def is_a_byte_stream(stream: Stream) -> ByteStream:
    """What the exchange asks of a stream; mypy reads this line."""
    return stream


async def test_twenty_mebibytes_arrive_as_they_were_sent() -> None:
    async with a_pair() as (ours, theirs):
        data = os.urandom(20 << 20)
        assert await ask_echo(ours, theirs.peer_id, data) == data


async def test_both_ends_know_whom_they_talk_to_about_what() -> None:
    async with a_stream() as (near, far):
        assert near.protocol == far.protocol == PIPE
        assert near.remote != far.remote
        assert repr(near) == f"<Stream {PIPE} with {near.remote}>"


async def test_a_clean_end_is_an_end_and_what_came_before_is_read() -> None:
    async with a_stream() as (near, far):
        await near.write(b"last words", PATIENCE)
        await near.close()
        await near.close()
        assert await far.read_exactly(5, PATIENCE) == b"last "
        assert await far.read_exactly(5, PATIENCE) == b"words"
        with pytest.raises(EndOfStream):
            await far.read_exactly(1, PATIENCE)
        with pytest.raises(EdgeClosedError):
            await far.read_exactly(1, PATIENCE)


async def test_an_end_in_mid_message_is_no_clean_end() -> None:
    async with a_stream() as (near, far):
        await near.write(b"abc", PATIENCE)
        await near.close()
        with pytest.raises(StreamBroken, match="in mid-message") as caught:
            await far.read_exactly(4, PATIENCE)
        assert not isinstance(caught.value, EndOfStream)


async def test_after_close_one_can_still_read_but_not_write() -> None:
    async with a_stream() as (near, far):
        await near.close()
        await far.write(b"answer", PATIENCE)
        assert await near.read_exactly(6, PATIENCE) == b"answer"
        with pytest.raises(StreamBroken, match="closed here"):
            await near.write(b"more", PATIENCE)


async def test_a_reset_breaks_both_ends() -> None:
    async with a_stream() as (near, far):
        await near.write(b"abc", PATIENCE)
        await near.reset()
        await near.reset()
        with pytest.raises(StreamBroken, match="reset here"):
            await near.read_exactly(1, PATIENCE)
        with pytest.raises(StreamBroken) as caught:
            await far.read_exactly(4, PATIENCE)
        assert not isinstance(caught.value, EndOfStream)
        with pytest.raises(StreamBroken):
            await far.write(b"x", PATIENCE)


async def test_a_reset_between_messages_is_no_clean_end() -> None:
    async with a_stream() as (near, far):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.reset)
            with pytest.raises(StreamBroken) as caught:
                await far.read_exactly(1, PATIENCE)
        assert not isinstance(caught.value, EndOfStream)
        with pytest.raises(StreamBroken) as caught:
            await far.read_exactly(1, PATIENCE)
        assert not isinstance(caught.value, EndOfStream)


async def test_a_read_that_times_out_loses_nothing() -> None:
    async with a_stream() as (near, far):
        await near.write(b"abc", PATIENCE)
        for _ in range(3):
            with pytest.raises(StreamTimeout, match=r"sent nothing more within 0\.05 s"):
                await far.read_exactly(6, 0.05)
        await near.write(b"def", PATIENCE)
        assert await far.read_exactly(6, PATIENCE) == b"abcdef"


async def test_a_cancelled_read_loses_nothing() -> None:
    async with a_stream() as (near, far):
        sent = os.urandom(1 << 20)
        got = bytearray()

        async def read() -> None:
            while len(got) < len(sent):
                with trio.move_on_after(0.001):
                    got.extend(await far.read_exactly(min(1000, len(sent) - len(got))))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await near.write(sent, PATIENCE)
        assert got == sent


async def test_a_write_nobody_reads_times_out_and_the_connection_lives() -> None:
    async with a_pair() as (ours, theirs):
        over = trio.Event()

        async def ignore(stream: Stream) -> None:
            await over.wait()

        theirs.set_handler(PIPE, ignore)
        stream = await ours.open_stream(theirs.peer_id, PIPE, PATIENCE)
        with pytest.raises(StreamTimeout, match=r"took too little within 0\.3 s"):
            await stream.write(bytes(2 * RECEIVE_WINDOW), 0.3)
        with pytest.raises(StreamBroken, match="reset here"):
            await stream.write(b"x", PATIENCE)
        assert await ask_echo(ours, theirs.peer_id, b"other streams live") == b"other streams live"
        over.set()


async def test_a_cancelled_write_leaves_the_connection_whole() -> None:
    async with a_pair() as (ours, theirs):

        async def swallow(stream: Stream) -> None:
            while True:
                await stream.read_exactly(10_000, PATIENCE)

        theirs.set_handler(PIPE, swallow)
        for number in range(20):
            stream = await ours.open_stream(theirs.peer_id, PIPE, PATIENCE)
            with trio.move_on_after(0.001 * number):
                await stream.write(bytes(4 << 20))
            assert await ask_echo(ours, theirs.peer_id, b"whole") == b"whole"
            await stream.reset()


async def test_two_readers_of_one_stream_are_a_bug() -> None:
    async with a_stream() as (near, _far):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_until_cancelled, near)
            await trio.testing.wait_all_tasks_blocked(0.01)
            with pytest.raises(trio.BusyResourceError, match="two tasks are reading"):
                await near.read_exactly(1, PATIENCE)
            nursery.cancel_scope.cancel()


async def read_until_cancelled(stream: Stream) -> None:
    await stream.read_exactly(1)


async def test_a_reader_and_a_writer_do_not_disturb_each_other() -> None:
    async with a_stream() as (near, far):
        data = os.urandom(3 << 20)

        async def send(stream: Stream) -> None:
            await stream.write(data, PATIENCE)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, near)
            nursery.start_soon(send, far)
            assert await near.read_exactly(len(data), PATIENCE) == data
            assert await far.read_exactly(len(data), PATIENCE) == data


async def test_nothing_is_read_or_written_in_no_time() -> None:
    async with a_stream() as (near, far):
        assert await near.read_exactly(0, PATIENCE) == b""
        await near.write(b"", PATIENCE)
        await near.write(memoryview(b"view"), PATIENCE)
        await near.write(bytearray(b"array"), PATIENCE)
        assert await far.read_exactly(9, PATIENCE) == b"viewarray"


def test_a_reader_that_pauses_longer_than_the_library_waits() -> None:
    """The library resets a stream whose window stays empty for 5 s; ours waits for its deadline.

    Seconds pass twenty times as fast here.
    """

    async def main() -> None:
        async with a_stream() as (near, far):
            data = os.urandom(3 * RECEIVE_WINDOW)

            async def send() -> None:
                await near.write(data, 200)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await trio.sleep(12)
                assert await far.read_exactly(len(data), 200) == data

    trio.run(main, clock=MockClock(rate=20))
