"""The state protocol: what round the swarm is in, and that round's start weights.

For joiners, for peers that come back and for those that missed a round (docs/specs/state.md). The
answer is a claim (round, hash of the start weights, bytes) and, where asked for, the checkpoint
itself, a safetensors file. Whoever asks collects claims from several members first.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Protocol, TypeVar

import msgspec

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.manifest import MAX_ROUND, Hash
from p2pfl_torrent.exchange.ports import ByteStream

PROTOCOL_ID = "/p2pfl-torrent/state/1.0.0"
MAX_FRAME = 4096
PART_BYTES = 256 << 10  # one read of the checkpoint: what py-libp2p moves well
PATIENCE = 20.0  # seconds for a small message
PART_PATIENCE = 60.0  # seconds for one part: 256 KiB at 64 kbit/s takes 33
_LENGTH = struct.Struct("!I")
_T = TypeVar("_T")


class GetState(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Asks for a claim, and with ``send`` for the bytes behind it.

    Attributes:
        expected: with ``send``, the hash that must be meant; another is not worth sending.
    """

    swarm: Hash
    send: bool
    expected: Annotated[bytes, msgspec.Meta(max_length=32)] = b""


class State(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A member's claim.

    Attributes:
        round: the round the member is in; 0 while the swarm has not started.
        base_hash: model_hash of that round's start weights (of round 1's, before the start).
        size: bytes of the checkpoint file; they follow in this answer if ``follows``.
    """

    round: Annotated[int, msgspec.Meta(ge=0, le=MAX_ROUND)]
    base_hash: Hash
    size: Annotated[int, msgspec.Meta(ge=0)]
    follows: bool


class NoState(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """This peer cannot say: another swarm, or it is catching up itself."""

    reason: Annotated[str, msgspec.Meta(max_length=256)]


_Answer = State | NoState
_decode_question = msgspec.msgpack.Decoder(GetState).decode
_decode_answer = msgspec.msgpack.Decoder(_Answer).decode
_encode = msgspec.msgpack.Encoder().encode


class StateSource(Protocol):
    """What a member offers."""

    def current_state(self) -> tuple[int, bytes, int] | None:
        """(round, base hash, checkpoint bytes) now, or None while there is none to give."""
        ...

    def kept_state(self, base_hash: bytes) -> tuple[int, int] | None:
        """(round, checkpoint bytes) of an earlier round's start weights, if they can be given."""
        ...

    def read_state(self, round: int, offset: int, size: int) -> bytes:
        """Bytes of the checkpoint that ``round`` starts from; OSError once it is gone."""
        ...


async def serve_state(stream: ByteStream, swarm: bytes, source: StateSource) -> None:
    """Answer one question.

    Raises:
        RemoteProtocolError: it was not a question of this protocol.
        EdgeClosedError: the asker is gone.
    """
    question = await _read(stream, _decode_question)
    state = source.current_state()
    if question.swarm != swarm:
        await _write(stream, NoState("another swarm"))
    elif state is None:
        await _write(stream, NoState("catching up"))
    else:
        round, base_hash, size = state
        if question.send and question.expected not in (b"", base_hash):
            kept = source.kept_state(question.expected)
            if kept is not None:
                (round, size), base_hash = kept, question.expected
        follows = question.send and question.expected in (b"", base_hash)
        await _write(stream, State(round, base_hash, size, follows))
        if follows and not await _send(stream, source, round, size):
            await stream.reset()
            return
    await stream.close()


async def _send(stream: ByteStream, source: StateSource, round: int, size: int) -> bool:
    """Send a checkpoint; False if it is gone, since this peer has gone on by some rounds."""
    for offset in range(0, size, PART_BYTES):
        wanted = min(PART_BYTES, size - offset)
        try:
            part = source.read_state(round, offset, wanted)
        except OSError:
            return False
        if len(part) != wanted:
            return False
        await stream.write(part, PART_PATIENCE)
    return True


async def ask_state(stream: ByteStream, swarm: bytes) -> State | None:
    """A member's claim, None where it cannot say."""
    await _write(stream, GetState(swarm, send=False))
    answer = await _read(stream, _decode_answer)
    return answer if isinstance(answer, State) else None


async def fetch_state(
    stream: ByteStream, swarm: bytes, expected: bytes, max_bytes: int
) -> AsyncIterator[bytes | bytearray]:
    """The checkpoint whose start weights have the ``expected`` hash, in parts as they come.

    The caller checks the hash over the whole; until then not one value is to be trusted.

    Raises:
        RemoteProtocolError: it is larger than the model can be, or not a message.
        EdgeClosedError: the member has moved on, cannot say, or is gone.
    """
    await _write(stream, GetState(swarm, send=True, expected=expected))
    answer = await _read(stream, _decode_answer)
    if not isinstance(answer, State) or not answer.follows or answer.base_hash != expected:
        return
    if answer.size > max_bytes:
        raise RemoteProtocolError(f"state of {answer.size} bytes", stream.remote)
    left = answer.size
    while left:
        part = await stream.read_exactly(min(PART_BYTES, left), PART_PATIENCE)
        left -= len(part)
        yield part


async def _write(stream: ByteStream, message: msgspec.Struct) -> None:
    body = _encode(message)
    await stream.write(_LENGTH.pack(len(body)) + body, PATIENCE)


async def _read(stream: ByteStream, decode: Callable[[bytes | bytearray], _T]) -> _T:
    (size,) = _LENGTH.unpack(await stream.read_exactly(_LENGTH.size, PATIENCE))
    if not 0 < size <= MAX_FRAME:
        raise RemoteProtocolError(f"state frame of {size} bytes", stream.remote)
    body = await stream.read_exactly(size, PATIENCE)
    try:
        return decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"malformed state message ({error})", stream.remote) from error
