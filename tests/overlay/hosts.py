"""Real hosts on the loopback interface, for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from p2pfl_torrent.overlay.gossip import Gossip, open_gossip
from p2pfl_torrent.overlay.host import Host, open_host
from p2pfl_torrent.overlay.identity import Identity
from p2pfl_torrent.overlay.limits import HostLimits
from p2pfl_torrent.overlay.stream import EndOfStream, Stream

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
ECHO = "/flt/test/echo/1"
PATIENCE = 10.0  # seconds: the machine may be busy


def a_host(limits: HostLimits | None = None) -> AbstractAsyncContextManager[Host]:
    return open_host(Identity.ephemeral(), LOOPBACK, limits)


@asynccontextmanager
async def a_pair() -> AsyncIterator[tuple[Host, Host]]:
    """Two hosts, the first connected to the second, which echoes."""
    async with a_host() as ours, a_host() as theirs:
        theirs.set_handler(ECHO, echo)
        await ours.connect(theirs.peer_id, theirs.addrs(), PATIENCE)
        yield ours, theirs


@asynccontextmanager
async def a_gossiping_pair(topic: str) -> AsyncIterator[tuple[Host, Gossip, Host, Gossip]]:
    """Two connected hosts that both follow ``topic`` and know it of each other."""
    async with a_pair() as (ours, theirs), open_gossip(ours) as us, open_gossip(theirs) as them:
        await us.subscribe(topic, lambda peer, data: None)
        await them.subscribe(topic, lambda peer, data: None)
        await until(lambda: us.neighbours(topic) == {theirs.peer_id})
        await until(lambda: them.neighbours(topic) == {ours.peer_id})
        yield ours, us, theirs, them


async def echo(stream: Stream) -> None:
    """Sends back length-prefixed messages until the other side finishes."""
    while True:
        try:
            size = int.from_bytes(await stream.read_exactly(4, PATIENCE), "big")
        except EndOfStream:
            return
        await stream.write(await stream.read_exactly(size, PATIENCE), PATIENCE)


async def ask_echo(host: Host, peer_id: str, data: bytes) -> bytes:
    """What the peer's echo makes of ``data``."""
    stream = await host.open_stream(peer_id, ECHO, PATIENCE)
    answer = bytearray()

    async def send() -> None:
        await stream.write(len(data).to_bytes(4, "big") + data, PATIENCE)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        answer += await stream.read_exactly(len(data), PATIENCE)
    await stream.close()
    return bytes(answer)


async def until(condition: Callable[[], bool]) -> None:
    """Returns as soon as ``condition`` holds; fails after ``PATIENCE`` seconds."""
    with trio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event to offer
            await trio.sleep(0.005)
