"""Two ends of one connection below the host, ours or the library's, for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID

from p2pfl_torrent.overlay.noise import NoiseSession, NoiseTransport
from p2pfl_torrent.overlay.transport import ExactTcpStream
from p2pfl_torrent.overlay.yamux import StreamGate, YamuxConn

if TYPE_CHECKING:
    from libp2p.abc import ISecureConn


@asynccontextmanager
async def sockets() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    """Both ends of a TCP connection: who dialled, and who listened."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        dialled = await trio.open_tcp_stream(*listener.socket.getsockname())
        accepted = await listener.accept()
    async with dialled, accepted:
        yield dialled, accepted


@asynccontextmanager
async def sessions() -> AsyncIterator[tuple[NoiseSession, NoiseSession]]:
    """Both ends of a Noise session, after a real handshake."""
    async with sockets() as (dialled, accepted):
        ours, theirs = _transport(), _transport()
        ends: dict[str, ISecureConn] = {}

        async def listen() -> None:
            ends["far"] = await theirs.secure_inbound(_raw(accepted, False))

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen)
                ends["near"] = await ours.secure_outbound(_raw(dialled, True), theirs.local_peer)
        yield cast(NoiseSession, ends["near"]), cast(NoiseSession, ends["far"])


def admit(peer: ID) -> bool:
    return True


@asynccontextmanager
async def conns(gate: StreamGate = admit) -> AsyncIterator[tuple[YamuxConn, YamuxConn]]:
    """Both ends of a running multiplexer."""
    async with sessions() as (near, far):
        one = YamuxConn(near, near.remote_peer, gate)
        other = YamuxConn(far, far.remote_peer, gate)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.start)
            nursery.start_soon(other.start)
            await one.event_started.wait()
            await other.event_started.wait()
            yield one, other
            nursery.cancel_scope.cancel()


def seal(session: NoiseSession, plaintext: bytes) -> bytes:
    """The bytes on the wire of the session's next message: for who forges them."""
    out = memoryview(bytearray(len(plaintext) + 18))
    session._sealer.seal(memoryview(plaintext), out)
    return bytes(out)


def wire(session: NoiseSession) -> trio.SocketStream:
    """The socket under a session."""
    return session._tcp.stream


class Collected:
    """A sink that keeps all, in a buffer of its own if it has one."""

    def __init__(self, room: int = 0) -> None:
        self.data = bytearray()
        self.empty = 0
        self.buffer = memoryview(bytearray(room))

    def room(self) -> memoryview:
        return self.buffer

    def filled(self, count: int) -> None:
        self.data += self.buffer[:count]

    def feed(self, data: memoryview) -> None:
        self.data += data
        self.empty += not data


def _transport() -> NoiseTransport:
    return NoiseTransport(
        create_new_key_pair(), noise_privkey=create_new_x25519_key_pair().private_key
    )


def _raw(stream: trio.SocketStream, is_initiator: bool) -> Any:
    return RawConnection(ExactTcpStream(stream, set()), is_initiator)
