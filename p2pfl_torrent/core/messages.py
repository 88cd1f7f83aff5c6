"""The messages of the chunk exchange and their bytes: docs/specs/chunk-exchange.md in code.

One stream per edge and direction: the side that opened it (the fetcher) asks, the other (the
holder) answers and announces. Every Request gets exactly one Piece or Reject.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated

import msgspec

from p2pfl_torrent.core.errors import LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.manifest import MAX_ROUND, Hash

PROTOCOL_ID = "/p2pfl-torrent/chunk/1.0.0"

FRAME_HEADER = struct.Struct("!IB")  # bytes that follow the type, type
MAX_CONTROL_FRAME = 1 << 20  # a manifest of 32,000 blocks; a larger model's layout raises it
MAX_REQUEST_BYTES = 2 << 20  # one Piece's payload: bounds what a request can pin in memory
MAX_RECORD_BYTES = 4096  # a signed member record with 16 addresses
MAX_HAVE = 4096  # chunks in one Have
MAX_UPDATES = 4096  # updates in one Availability: members x rounds kept


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """First message of both sides: who I am and which swarm this is about.

    Attributes:
        swarm: the genesis hash.
        round: the round the sender is in, 0 before the first.
        wanted: whether the sender's own topology has this edge (else it mirrors the other's).
        record: the sender's signed member record.
    """

    swarm: Hash
    round: Annotated[int, msgspec.Meta(ge=0, le=MAX_ROUND)]
    wanted: bool
    record: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Fetcher -> holder: are you there? Answered by a Pong with the same number."""

    number: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Holder -> fetcher: the answer to a Ping."""

    number: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]


class ChunksOf(msgspec.Struct, frozen=True, array_like=True):
    """Which chunks of one update the sender holds.

    Attributes:
        round: of the update, so that a receiver can drop what it no longer needs.
        chunks: a bitfield of the layout's length.
        counted_in: the round whose aggregate the sender put it into, 0 for none yet. Who takes over
            a state learns by it which updates that state holds already.
    """

    update: Hash
    round: Annotated[int, msgspec.Meta(ge=1, le=MAX_ROUND)]
    chunks: Annotated[bytes, msgspec.Meta(max_length=8192)]
    counted_in: Annotated[int, msgspec.Meta(ge=0, le=MAX_ROUND)] = 0


class Availability(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Holder -> fetcher, and the body of an availability gossip: what the sender holds."""

    updates: Annotated[tuple[ChunksOf, ...], msgspec.Meta(max_length=MAX_UPDATES)]


class Have(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Holder -> fetcher: these chunks of an update have been verified since."""

    update: Hash
    chunks: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)], ...], msgspec.Meta(max_length=MAX_HAVE)
    ]


class GetManifest(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Fetcher -> holder: send me this manifest. Answered by ManifestData or NoManifest.

    Attributes:
        is_known: it is here; the Availability before the answer is all that is wanted.
    """

    update: Hash
    is_known: bool = False


class ManifestData(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Holder -> fetcher: a whole encoded manifest, asked for or new."""

    manifest: bytes


class NoManifest(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """Holder -> fetcher: I do not have the manifest you asked for."""

    update: Hash


class Request(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """Fetcher -> holder: ``count`` blocks of a chunk, at most MAX_REQUEST_BYTES together.

    Attributes:
        number: chosen by the fetcher, unique among its open requests on this stream.
    """

    number: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
    update: Hash
    chunk: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
    block: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
    count: Annotated[int, msgspec.Meta(ge=1, le=0xFFFF)]


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """Fetcher -> holder: I no longer need it; answer with Reject unless the Piece is under way."""

    number: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]


class Reject(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """Holder -> fetcher: this request will not be served.

    Attributes:
        reason: one of REJECT_REASONS.
    """

    number: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
    reason: Annotated[int, msgspec.Meta(ge=0, le=3)]


REJECT_MISSING, REJECT_CANCELLED, REJECT_BUSY, REJECT_GONE = range(4)
REJECT_REASONS = ("not held", "cancelled", "too many requests", "no longer kept")

REFUSE_SWARM, REFUSE_MEMBER, REFUSE_FULL, REFUSE_BANNED = range(4)


class Refuse(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """Instead of a Hello: no exchange with you, and why.

    Attributes:
        reason: one of the REFUSE numbers.
        detail: one sentence; for another swarm, the canonical genesis of the refuser.
    """

    reason: Annotated[int, msgspec.Meta(ge=0, le=3)]
    detail: Annotated[str, msgspec.Meta(max_length=65536)]


@dataclass(frozen=True)
class Piece:
    """Holder -> fetcher: the blocks of one request.

    The one message that is not msgpack: its body is the request's number (4 bytes, big endian)
    and the payload, so that the payload is never copied into another encoding.
    """

    number: int
    data: bytes | bytearray | memoryview


ControlMessage = (
    Hello
    | Ping
    | Pong
    | Availability
    | Have
    | GetManifest
    | ManifestData
    | NoManifest
    | Request
    | Cancel
    | Reject
    | Refuse
)
Message = ControlMessage | Piece

TYPE_CONTROL = 0
TYPE_PIECE = 1
PIECE_HEADER = struct.Struct("!I")
MAX_PIECE_FRAME = PIECE_HEADER.size + MAX_REQUEST_BYTES

_decode_control = msgspec.msgpack.Decoder(ControlMessage).decode
_encode_control = msgspec.msgpack.Encoder().encode


def encode_message(message: Message) -> tuple[bytes, bytes | bytearray | memoryview]:
    """A frame as (head, payload); the payload is empty but for a Piece, and never copied."""
    if isinstance(message, Piece):
        if not 0 < len(message.data) <= MAX_REQUEST_BYTES:
            raise LocalProtocolError(f"piece of {len(message.data)} bytes")
        size = PIECE_HEADER.size + len(message.data)
        return FRAME_HEADER.pack(size, TYPE_PIECE) + PIECE_HEADER.pack(message.number), message.data
    body = _encode_control(message)
    return FRAME_HEADER.pack(len(body), TYPE_CONTROL) + body, b""


def frame_body_bytes(head: bytes | bytearray | memoryview, max_control: int) -> tuple[int, int]:
    """(type, body bytes) from the 5 bytes of a frame header.

    Raises:
        RemoteProtocolError: an unknown type or a body above its bound.
    """
    size, kind = FRAME_HEADER.unpack(head)
    if kind == TYPE_PIECE:
        if not PIECE_HEADER.size < size <= MAX_PIECE_FRAME:
            raise RemoteProtocolError(f"piece frame of {size} bytes")
    elif kind != TYPE_CONTROL:
        raise RemoteProtocolError(f"frame of unknown type {kind}")
    elif not 0 < size <= max_control:
        raise RemoteProtocolError(f"control frame of {size} bytes")
    return kind, size


def decode_body(kind: int, body: bytes | bytearray | memoryview) -> Message:
    """The message of a frame's body.

    Raises:
        RemoteProtocolError: not a message of this protocol.
    """
    if kind == TYPE_PIECE:
        view = memoryview(body)
        if len(view) <= PIECE_HEADER.size:
            raise RemoteProtocolError("piece without a payload")
        (number,) = PIECE_HEADER.unpack_from(view)
        return Piece(number, view[PIECE_HEADER.size :])
    try:
        message: ControlMessage = _decode_control(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"malformed message ({error})") from error
    return message


def availability_gossip(availability: Availability) -> bytes:
    """Body of an availability announcement on the publisher's topic."""
    return _encode_control(availability)


def decode_availability_gossip(data: bytes) -> Availability:
    """The reverse; RemoteProtocolError for anything else."""
    message = decode_body(TYPE_CONTROL, data)
    if not isinstance(message, Availability):
        raise RemoteProtocolError(f"{type(message).__name__} on an availability topic")
    return message
