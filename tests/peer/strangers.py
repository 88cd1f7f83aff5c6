"""What a stranger may say to a peer in the project's own protocols, beside what it should."""

from __future__ import annotations

import math
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
import trio

from p2pfl_torrent.core import messages as m
from p2pfl_torrent.core.joining import PROTOCOL_ID as MEMBERS
from p2pfl_torrent.core.joining import Alive, Join, Probe, Sync, encode
from p2pfl_torrent.core.messages import PROTOCOL_ID as CHUNK
from p2pfl_torrent.core.messages import Message
from p2pfl_torrent.overlay.host import Host, open_host
from p2pfl_torrent.overlay.identity import Identity
from p2pfl_torrent.overlay.stream import EndOfStream, Stream, StreamBroken
from p2pfl_torrent.protocols.state import PROTOCOL_ID as STATE
from p2pfl_torrent.protocols.state import GetState, NoState, State
from tests.peer.swarms import PATIENCE, Member

OTHER_SWARM = b"o" * 32
UNKNOWN = b"u" * 32


@dataclass(frozen=True)
class Facts:
    """What anybody can learn of a peer."""

    swarm: bytes
    update: bytes
    num_chunks: int


Words = Callable[[Facts], bytes]


def facts(victim: Member) -> Facts:
    swarm = victim.node._exchange.swarm
    return Facts(
        victim.node._swarm_id,
        next(iter(swarm.ledger)).manifest.update,
        len(swarm.layout.chunks),
    )


# --- bytes ------------------------------------------------------------------------------------


def frame(message: Message) -> bytes:
    head, payload = m.encode_message(message)
    return head + bytes(payload)


def announced(size: int, kind: int, body: bytes = b"") -> bytes:
    """A frame of the chunk exchange that says its body has ``size`` bytes."""
    return struct.pack("!IB", size, kind) + body


def counted(body: bytes, size: int | None = None) -> bytes:
    """A message of the two other protocols, with its length or another one."""
    return struct.pack("!I", len(body) if size is None else size) + body


def packed(message: msgspec.Struct) -> bytes:
    return counted(msgspec.msgpack.encode(message))


def hello(about: Facts, *, wanted: bool = False, record: bytes = b"") -> bytes:
    return frame(m.Hello(about.swarm, 1, wanted, record))


def after_hello(message: Message) -> Words:
    return lambda about: hello(about) + frame(message)


def request(chunk: int, block: int, count: int) -> Words:
    return lambda about: hello(about) + frame(m.Request(1, about.update, chunk, block, count))


NESTED = b"\x91" * 5000  # arrays in arrays, deeper than Python's own recursion goes
NESTED_PING = b"\x93\x02\x01" + NESTED  # a Ping, and what an array of fields may have besides

FAULTS: dict[str, tuple[str, Words]] = {
    # before a Hello
    "4 GiB of control": (CHUNK, lambda _: announced(2**32 - 1, 0, bytes(1000))),
    "4 GiB of payload": (CHUNK, lambda _: announced(2**32 - 1, 1, bytes(1000))),
    "an empty frame": (CHUNK, lambda _: announced(0, 0)),
    "a frame of no type": (CHUNK, lambda _: announced(1, 7, b"x")),
    "no msgpack": (CHUNK, lambda _: announced(4, 0, b"\xc1\xc1\xc1\xc1")),
    "a nest of arrays": (CHUNK, lambda _: announced(len(NESTED), 0, NESTED)),
    "a Ping and a nest": (CHUNK, lambda _: announced(len(NESTED_PING), 0, NESTED_PING)),
    "text that is not UTF-8": (CHUNK, lambda _: announced(6, 0, b"\x93\x0c\x00\xa2\xff\xfe")),
    "a Ping first": (CHUNK, lambda _: frame(m.Ping(1))),
    "a Request first": (CHUNK, lambda about: frame(m.Request(1, about.update, 0, 0, 1))),
    "a Piece first": (CHUNK, lambda _: frame(m.Piece(1, b"x" * 1024))),
    "a Refuse first": (CHUNK, lambda _: frame(m.Refuse(0, ""))),
    "a Hello with a record that is none": (CHUNK, lambda about: hello(about, record=b"\xc1" * 9)),
    # after one, where questions belong
    "a second Hello": (CHUNK, lambda about: 2 * hello(about)),
    "a chunk that does not exist": (CHUNK, request(200, 0, 1)),
    "a block that does not exist": (CHUNK, request(0, 5000, 1)),
    "a block past the last": (CHUNK, request(0, 2**32 - 1, 0xFFFF)),
    "a Piece never asked for": (CHUNK, after_hello(m.Piece(7, b"x" * 1024))),
    "an Availability": (CHUNK, after_hello(m.Availability(()))),
    "a Reject": (CHUNK, after_hello(m.Reject(1, 0))),
    "a manifest": (CHUNK, after_hello(m.ManifestData(b""))),
    "4 GiB after a Hello": (CHUNK, lambda about: hello(about) + announced(2**32 - 1, 0)),
    # the other protocols
    "4 GiB about members": (MEMBERS, lambda _: counted(bytes(1000), 2**32 - 1)),
    "nothing about members": (MEMBERS, lambda _: counted(b"")),
    "no question about members": (MEMBERS, lambda _: counted(b"\xc1" * 30)),
    "a nest about members": (MEMBERS, lambda _: counted(NESTED)),
    "an answer about members": (MEMBERS, lambda _: counted(encode(Alive(b"")))),
    "a Join with terms that are none": (MEMBERS, lambda _: counted(encode(Join(b"{]", b"", b"")))),
    "news that are none": (MEMBERS, lambda about: counted(encode(Probe(about.swarm, b"\xc1")))),
    "half a fingerprint": (
        MEMBERS,
        lambda about: counted(encode(Sync(about.swarm, UNKNOWN, b"abc", b""))),
    ),
    "4 GiB of state": (STATE, lambda _: counted(bytes(1000), 2**32 - 1)),
    "no state": (STATE, lambda _: counted(b"")),
    "no question about state": (STATE, lambda _: counted(b"\xc1" * 30)),
    "a nest about state": (STATE, lambda _: counted(NESTED[:4000])),
    "a question and a nest": (
        STATE,
        lambda about: counted(b"\x95\x01\xc4\x20" + about.swarm + b"\xc2\xc4\x00" + NESTED[:4000]),
    ),
    "a claim": (STATE, lambda about: packed(State(1, about.swarm, 10, follows=True))),
}
"""Each breaks the protocol; who said it is dropped."""

ANSWERS: dict[str, Words] = {
    "a Ping instead of a Hello": lambda _: frame(m.Ping(1)),
    "a Piece instead of a Hello": lambda _: frame(m.Piece(1, b"x")),
    "4 GiB instead of a Hello": lambda _: announced(2**32 - 1, 0),
    "a bitfield too short": after_hello(m.Availability((m.ChunksOf(UNKNOWN, 1, b""),))),
    "a bitfield too long": after_hello(m.Availability((m.ChunksOf(UNKNOWN, 1, bytes(99)),))),
    "a Have of no chunk": after_hello(m.Have(UNKNOWN, (0xFFFF,))),
    "a Piece never asked for": after_hello(m.Piece(12345, b"x" * 1024)),
    "a Reject of nothing": after_hello(m.Reject(12345, 0)),
    "a manifest that is none": after_hello(m.ManifestData(b"\x93\xc4\x00\xc4\x00\xc4\x00")),
    "a question": after_hello(m.GetManifest(UNKNOWN)),
    "a second Hello": lambda about: 2 * hello(about),
    "a late Refuse": after_hello(m.Refuse(0, "no")),
}
"""What a peer may hear on a stream that it opened itself; who says it is dropped."""

FLOODS: dict[str, tuple[str, Words, Words]] = {
    "manifests": (CHUNK, hello, lambda about: frame(m.GetManifest(about.update))),
    "manifests that are not there": (CHUNK, hello, lambda _: frame(m.GetManifest(UNKNOWN))),
    "pings": (CHUNK, hello, lambda _: frame(m.Ping(1))),
    "cancels": (CHUNK, hello, lambda _: frame(m.Cancel(1))),
    "updates that are not there": (CHUNK, hello, lambda _: frame(m.Request(1, UNKNOWN, 0, 0, 1))),
    "blocks": (
        CHUNK,
        hello,
        lambda about: b"".join(
            frame(m.Request(number, about.update, 0, 0, 1)) + frame(m.Cancel(number))
            for number in range(1000)
        ),
    ),
    "members": (
        MEMBERS,
        lambda _: b"",
        lambda a: counted(encode(Sync(a.swarm, UNKNOWN, b"", b""))),
    ),
    "state": (STATE, lambda _: b"", lambda about: packed(GetState(about.swarm, send=True))),
}
"""What may be asked, asked without end by somebody who does not read the answers."""

HALVES: dict[str, tuple[str, Words]] = {
    "half a header": (CHUNK, lambda _: b"\x00\x00"),
    "half a frame": (CHUNK, lambda _: announced(100, 0, b"\x95\x01")),
    "a Hello and half a frame": (CHUNK, lambda about: hello(about) + announced(9, 0, b"\x94")),
    "half a length": (MEMBERS, lambda _: b"\x00"),
    "half a question": (MEMBERS, lambda about: counted(encode(Probe(about.swarm, b"")))[:-2]),
    "half a length of state": (STATE, lambda _: b"\x00"),
    "half a question of state": (STATE, lambda about: packed(GetState(about.swarm, True))[:-2]),
    "nothing": (CHUNK, lambda _: b""),
    "nothing about members": (MEMBERS, lambda _: b""),
    "nothing about state": (STATE, lambda _: b""),
}
"""What is left of a peer that goes away in mid-sentence: no fault."""

REFUSED: dict[str, tuple[str, Words, bytes]] = {
    "a Hello of another swarm": (
        CHUNK,
        lambda _: frame(m.Hello(OTHER_SWARM, 1, True, b"")),
        b"\x93\x0c" + bytes([m.REFUSE_SWARM]),
    ),
    "a Request of an unknown update": (
        CHUNK,
        after_hello(m.Request(5, UNKNOWN, 0, 0, 1)),
        msgspec.msgpack.encode(m.Reject(5, m.REJECT_GONE)),
    ),
    "a manifest of an unknown update": (
        CHUNK,
        after_hello(m.GetManifest(UNKNOWN)),
        msgspec.msgpack.encode(m.NoManifest(UNKNOWN)),
    ),
    "members of another swarm": (
        MEMBERS,
        lambda _: counted(encode(Probe(OTHER_SWARM, b""))),
        b"this peer is in another swarm",
    ),
    "state of another swarm": (
        STATE,
        lambda _: packed(GetState(OTHER_SWARM, send=True)),
        msgspec.msgpack.encode(NoState("another swarm")),
    ),
}
"""What a correct peer may ask in error, and what it is told."""


# --- talking ----------------------------------------------------------------------------------


@asynccontextmanager
async def a_stranger(victim: Member) -> AsyncIterator[Host]:
    """A peer of no swarm, connected to the victim."""
    async with open_host(Identity.ephemeral(), ["/ip4/127.0.0.1/tcp/0"]) as host:
        await host.connect(victim.id, victim.peer.addrs, PATIENCE)
        yield host


async def say(host: Host, victim: Member, protocol: str, words: bytes) -> Stream:
    """Open a stream and say it, unless the victim hangs up before the end."""
    stream = await host.open_stream(victim.id, protocol, PATIENCE)
    try:
        await stream.write(words, PATIENCE)
    except StreamBroken:
        pass
    return stream


async def heard(stream: Stream, words: bytes) -> bytes:
    """What comes on a stream until ``words`` are in it, or to its end."""
    got = b""
    while words not in got:
        try:
            got += await stream.read_exactly(1, PATIENCE)
        except (EndOfStream, StreamBroken):
            break
    return got


async def flood(victim: Member, protocol: str, opening: bytes, words: bytes) -> None:
    """Say the same without end and without listening; the victim may hang up."""
    async with a_stranger(victim) as stranger:
        stream = await say(stranger, victim, protocol, opening)
        try:
            while True:
                await stream.write(words * max(1, 4096 // len(words)), math.inf)
        except StreamBroken:
            await trio.sleep_forever()


async def say_nothing(victim: Member, protocol: str, streams: int) -> None:
    """Open streams and leave it at that."""
    async with a_stranger(victim) as stranger:
        opened = [await stranger.open_stream(victim.id, protocol, PATIENCE) for _ in range(streams)]
        assert len(opened) == streams
        await trio.sleep_forever()


def answer_with(host: Host, words: bytes) -> None:
    """The stranger's part on the streams that the victim opens to it."""

    async def answer(stream: Stream) -> None:
        try:
            await stream.write(words, PATIENCE)
            await heard(stream, b"\xff never said")
        except StreamBroken:
            pass

    host.set_handler(CHUNK, answer)
