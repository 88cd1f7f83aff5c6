"""The members protocol on a stream: length-prefixed questions and answers in turn.

docs/specs/membership.md says what they mean; a stream carries any number of them, one at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import trio

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.joining import (
    MAX_MESSAGE,
    PROTOCOL_ID,
    Answer,
    Question,
    decode_answer,
    decode_question,
    encode,
)
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.exchange.ports import ByteStream, EdgeClosedError

__all__ = ["PROTOCOL_ID", "Answerer", "ask", "serve_members"]

LENGTH = struct.Struct("!I")
READ_SECONDS = 20.0  # for the rest of a message once its length came: 1 MiB at some 60 kB/s
IDLE_SECONDS = 60.0  # a kept stream without a question; the asker opens another when it needs one
MAX_PER_SECOND = 20  # questions on one stream; a correct peer asks a few in seconds

Answerer = Callable[[Question, PeerId], Answer]
"""``answer(question, sender)``: quick; RemoteProtocolError where the question blames its sender."""


async def ask(stream: ByteStream, question: Question, timeout: float) -> Answer:
    """Ask on an open stream, which can be used for the next question afterwards.

    Raises:
        EdgeClosedError: the stream broke, or no answer came in ``timeout`` seconds.
        RemoteProtocolError: what came is no answer; the stream is of no use any more.
    """
    with trio.move_on_after(timeout):
        await _write(stream, encode(question))
        return decode_answer(await _read(stream, timeout))
    raise EdgeClosedError(f"no answer about members in {timeout:g} s")


async def serve_members(stream: ByteStream, answer: Answerer) -> None:
    """Answer the questions of one stream until it ends or falls idle.

    Raises:
        RemoteProtocolError: its peer broke the protocol; the stream has been reset.
    """
    try:
        while True:
            asked_at = trio.current_time()
            question = decode_question(await _read(stream, IDLE_SECONDS))
            await _write(stream, encode(answer(question, stream.remote)))
            # The next one is read no sooner: who asks faster waits, and costs no more.
            await trio.sleep_until(asked_at + 1 / MAX_PER_SECOND)
    except EdgeClosedError:
        pass  # the usual end: the asker has what it wanted
    except RemoteProtocolError as error:
        raise error.by(stream.remote) from error
    finally:
        await stream.reset()


async def _read(stream: ByteStream, timeout: float) -> bytearray:
    (size,) = LENGTH.unpack(await stream.read_exactly(LENGTH.size, timeout))
    if not 0 < size <= MAX_MESSAGE:
        raise RemoteProtocolError(f"message of {size} bytes about members")
    return await stream.read_exactly(size, READ_SECONDS)


async def _write(stream: ByteStream, body: bytes) -> None:
    await stream.write(LENGTH.pack(len(body)) + body, READ_SECONDS)
