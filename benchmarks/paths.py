"""The four ways of carrying bytes that ``benchmarks transport`` compares, each as an open link.

A link carries pieces one way and an acknowledgement back. Of the other three, what is received is
dropped as it comes; ours assembles pieces, as the exchange needs them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as StockNoise
from multiaddr import Multiaddr

from benchmarks.tls import NAME, client_context, server_context
from p2pfl_torrent.core.messages import Piece, Pong
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.exchange.ports import Channel
from p2pfl_torrent.overlay.host import Host, open_host
from p2pfl_torrent.overlay.identity import Identity
from p2pfl_torrent.overlay.stream import Stream
from p2pfl_torrent.peer.adapters import HostDialer, StreamPort
from p2pfl_torrent.protocols.chunk import PROTOCOL_ID, ChunkChannel

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
MAX_CONTROL = 1 << 20
READ = 256 << 10  # asked for at a time on the other paths; more was no faster
STOCK_PROTOCOL = TProtocol("/benchmark/1.0.0")


class Link(Protocol):
    """An open connection of the kind that is measured."""

    async def send(self, piece: memoryview) -> None:
        """Hand over one piece."""
        ...

    async def receive(self, count: int, size: int) -> None:
        """Take ``count`` pieces of ``size`` bytes."""
        ...

    async def acknowledge(self) -> None:
        """Say that all has come."""
        ...

    async def acknowledged(self) -> None:
        """Wait until that was said."""
        ...


Told = Callable[[str], None]
"""Takes the address on which a path listens."""


class OurLink:
    """The channel that the exchange uses."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def send(self, piece: memoryview) -> None:
        await self._channel.send(Piece(0, piece))

    async def receive(self, count: int, size: int) -> None:
        for _ in range(count):
            message, _ = await self._channel.receive()
            assert isinstance(message, Piece)
            assert len(message.data) == size

    async def acknowledge(self) -> None:
        await self._channel.send(Pong(0))

    async def acknowledged(self) -> None:
        await self._channel.receive()


class ByteLink:
    """A stream of bytes."""

    def __init__(
        self,
        write: Callable[[memoryview], Awaitable[None]],
        read: Callable[[int], Awaitable[bytes | bytearray]],
    ) -> None:
        self._write = write
        self._read = read

    async def send(self, piece: memoryview) -> None:
        await self._write(piece)

    async def receive(self, count: int, size: int) -> None:
        left = count * size
        while left:
            data = await self._read(min(left, READ))
            if not data:
                raise EOFError("the other end is gone")
            left -= len(data)

    async def acknowledge(self) -> None:
        await self._write(memoryview(b"."))

    async def acknowledged(self) -> None:
        await self._read(1)


# Ours


@asynccontextmanager
async def _host() -> AsyncIterator[Host]:
    async with open_host(Identity.ephemeral(), [LOOPBACK]) as host:
        yield host


@asynccontextmanager
async def _listen_ours(told: Told) -> AsyncIterator[Link]:
    arrived, links = trio.open_memory_channel[Link](1)
    over = trio.Event()

    async def serve(stream: Stream) -> None:
        await arrived.send(OurLink(ChunkChannel(StreamPort(stream), MAX_CONTROL)))
        await over.wait()

    async with _host() as host:
        host.set_handler(PROTOCOL_ID, serve)
        told(host.addrs()[0])
        yield await links.receive()
        over.set()


@asynccontextmanager
async def _dial_ours(address: str) -> AsyncIterator[Link]:
    peer = PeerId(address.rpartition("/p2p/")[2])
    async with _host() as host:
        yield OurLink(await HostDialer(host, MAX_CONTROL).open_channel(peer, [address]))


# The library's Noise and yamux


@asynccontextmanager
async def _stock_host() -> AsyncIterator[IHost]:
    keys = create_new_key_pair()
    noise = StockNoise(keys, noise_privkey=create_new_x25519_key_pair().private_key)
    host = new_host(key_pair=keys, sec_opt={NOISE_ID: noise})
    async with host.run([Multiaddr(LOOPBACK)]):
        try:
            yield host
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(5):
                await host.close()


def _stock_link(stream: INetStream) -> Link:
    async def write(data: memoryview) -> None:
        await stream.write(bytes(data))  # it takes nothing else

    return ByteLink(write, stream.read)


@asynccontextmanager
async def _listen_stock(told: Told) -> AsyncIterator[Link]:
    arrived, links = trio.open_memory_channel[Link](1)
    over = trio.Event()

    async def serve(stream: INetStream) -> None:
        await arrived.send(_stock_link(stream))
        await over.wait()

    async with _stock_host() as host:
        host.set_stream_handler(STOCK_PROTOCOL, serve)
        told(str(host.get_addrs()[0]))
        yield await links.receive()
        over.set()


@asynccontextmanager
async def _dial_stock(address: str) -> AsyncIterator[Link]:
    info = info_from_p2p_addr(Multiaddr(address))
    async with _stock_host() as host:
        await host.connect(info)
        yield _stock_link(await host.new_stream(info.peer_id, [STOCK_PROTOCOL]))


# trio's own


@asynccontextmanager
async def _accepted(told: Told) -> AsyncIterator[trio.SocketStream]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        told(str(listener.socket.getsockname()[1]))
        stream = await listener.accept()
    async with stream:
        yield stream


def _trio_link(stream: trio.abc.Stream) -> Link:
    return ByteLink(stream.send_all, stream.receive_some)


@asynccontextmanager
async def _listen_tcp(told: Told) -> AsyncIterator[Link]:
    async with _accepted(told) as stream:
        yield _trio_link(stream)


@asynccontextmanager
async def _dial_tcp(address: str) -> AsyncIterator[Link]:
    async with await trio.open_tcp_stream("127.0.0.1", int(address)) as stream:
        yield _trio_link(stream)


@asynccontextmanager
async def _listen_ssl(told: Told) -> AsyncIterator[Link]:
    with TemporaryDirectory(prefix="p2pfl-benchmark-") as directory:
        context = server_context(Path(directory))
    async with _accepted(told) as stream:
        secure = trio.SSLStream(stream, context, server_side=True)
        await secure.do_handshake()
        yield _trio_link(secure)


@asynccontextmanager
async def _dial_ssl(address: str) -> AsyncIterator[Link]:
    async with await trio.open_tcp_stream("127.0.0.1", int(address)) as stream:
        secure = trio.SSLStream(stream, client_context(), server_hostname=NAME)
        await secure.do_handshake()
        yield _trio_link(secure)


LISTEN: dict[str, Callable[[Told], AbstractAsyncContextManager[Link]]] = {
    "ours": _listen_ours,
    "libp2p_stock": _listen_stock,
    "trio_ssl": _listen_ssl,
    "trio_tcp": _listen_tcp,
}
DIAL: dict[str, Callable[[str], AbstractAsyncContextManager[Link]]] = {
    "ours": _dial_ours,
    "libp2p_stock": _dial_stock,
    "trio_ssl": _dial_ssl,
    "trio_tcp": _dial_tcp,
}
