"""Our Noise session and yamux with the library's own, in both roles."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest
import trio
from libp2p import new_host
from libp2p.abc import INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as StockNoise
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from p2pfl_torrent.overlay.host import Host
from p2pfl_torrent.overlay.stream import Stream
from p2pfl_torrent.overlay.yamux import YamuxConn
from tests.overlay.hosts import ECHO, LOOPBACK, a_host, echo, until

STREAMS = 8
BYTES = 20_000_000 // STREAMS  # of each stream, each way
PATIENCE = 100.0  # the library is slow, and the machine may be busy


@asynccontextmanager
async def a_stock_host() -> AsyncIterator[BasicHost]:
    """The library's host with its own Noise session and its own yamux, as of the box."""
    keys = create_new_key_pair()
    noise = StockNoise(keys, noise_privkey=create_new_x25519_key_pair().private_key)
    host = cast(BasicHost, new_host(key_pair=keys, sec_opt={NOISE_ID: noise}))
    host.set_stream_handler(TProtocol(ECHO), stock_echo)
    async with host.run([Multiaddr(address) for address in LOOPBACK]):
        await cast(Swarm, host.get_network()).auto_connector.stop()
        yield host
        with trio.CancelScope(shield=True), trio.move_on_after(3):
            await host.close()


async def stock_read(stream: INetStream, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        data += await stream.read(min(1 << 16, count - len(data)))
    return bytes(data)


async def stock_echo(stream: INetStream) -> None:
    """One message, and the end."""
    size = int.from_bytes(await stock_read(stream, 4), "big")
    data = await stock_read(stream, size)
    await stream.write(data)
    await stream.close()


async def ours_asks(stream: Stream) -> None:
    data = os.urandom(BYTES)
    await stream.write(len(data).to_bytes(4, "big") + data, PATIENCE)
    assert await stream.read_exactly(len(data), PATIENCE) == data
    await stream.close()


async def stock_asks(stream: NetStream) -> None:
    data = os.urandom(BYTES)
    await stream.write(len(data).to_bytes(4, "big") + data)
    assert await stock_read(stream, len(data)) == data
    await stream.close()


async def many_streams_each_way(ours: Host, stock: BasicHost) -> None:
    """20 MB asked by each and echoed by the other, on eight streams of each, all at once."""
    ours_id, stock_id = ours.peer_id, str(stock.get_id())
    mine = [await ours.open_stream(stock_id, ECHO, PATIENCE) for _ in range(STREAMS)]
    conn = stock.get_network().get_connections()[0]
    assert str(conn.muxed_conn.peer_id) == ours_id
    assert type(conn.muxed_conn) is Yamux
    assert isinstance(ours.swarm.get_connections()[0].muxed_conn, YamuxConn)
    theirs = [
        cast(NetStream, await stock.new_stream(conn.muxed_conn.peer_id, [TProtocol(ECHO)]))
        for _ in range(STREAMS)
    ]
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            for one in mine:
                nursery.start_soon(ours_asks, one)
            for other in theirs:
                nursery.start_soon(stock_asks, other)


@pytest.mark.timeout(240)
async def test_we_dial_the_library() -> None:
    async with a_host() as ours, a_stock_host() as stock:
        ours.set_handler(ECHO, echo)
        addrs = [str(address) for address in stock.get_addrs()]
        await ours.connect(str(stock.get_id()), addrs, PATIENCE)
        await many_streams_each_way(ours, stock)
        await ours.disconnect(str(stock.get_id()))
        await until(lambda: not stock.get_network().get_connections())


@pytest.mark.timeout(240)
async def test_the_library_dials_us() -> None:
    async with a_host() as ours, a_stock_host() as stock:
        ours.set_handler(ECHO, echo)
        swarm = cast(Swarm, stock.get_network())
        address = Multiaddr(ours.addrs()[0])
        await swarm.dial_addr(address, ID.from_base58(ours.peer_id))
        await until(lambda: ours.connected() == {str(stock.get_id())})
        await many_streams_each_way(ours, stock)


async def test_the_library_reads_byte_by_byte_and_is_not_cut_off() -> None:
    """It grants us one byte more for each: thousands of frames that carry nothing."""
    async with a_host() as ours, a_stock_host() as stock:
        size = 6000

        async def slowly(stream: INetStream) -> None:
            got = bytearray()
            while len(got) < size:
                got += await stream.read(1)
            await stream.write(bytes(got))

        stock.set_stream_handler(TProtocol("/flt/test/slow/1"), slowly)
        stock_id = str(stock.get_id())
        addrs = [str(address) for address in stock.get_addrs()]
        await ours.connect(stock_id, addrs, PATIENCE)
        stream = await ours.open_stream(stock_id, "/flt/test/slow/1", PATIENCE)
        data = os.urandom(size)
        await stream.write(data, PATIENCE)
        assert await stream.read_exactly(size, PATIENCE) == data
