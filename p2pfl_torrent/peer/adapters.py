"""Fits the overlay's host to the ports that the exchange and the protocols were written against."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.exchange.ports import Channel, EdgeClosedError, FrameStream
from p2pfl_torrent.overlay.dialing import DialError
from p2pfl_torrent.overlay.host import Host
from p2pfl_torrent.overlay.stream import Stream, StreamBroken
from p2pfl_torrent.protocols.chunk import PROTOCOL_ID, ChunkChannel

CONNECT_PATIENCE = 10.0  # seconds for TCP, Noise and Yamux; 0.3 s round trips and 0.1 CPU are in it
STREAM_PATIENCE = 10.0  # seconds to negotiate one protocol on an open connection


class StreamPort:
    """An overlay stream as a FrameStream: one error type for every way it can end."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    @property
    def remote(self) -> PeerId:
        """The authenticated peer at the other end."""
        return PeerId(self._stream.remote)

    async def read_exactly(self, count: int, timeout: float | None = None) -> bytearray:
        """``count`` bytes; EdgeClosedError at the end of the stream or past ``timeout``."""
        with _as_edge_closed():
            return await self._stream.read_exactly(count, math.inf if timeout is None else timeout)

    async def write(
        self, data: bytes | bytearray | memoryview, timeout: float | None = None
    ) -> None:
        """Hand all of ``data`` to the transport."""
        with _as_edge_closed():
            await self._stream.write(data, math.inf if timeout is None else timeout)

    @property
    def begun(self) -> int:
        """Bytes that are here of the frame that is coming."""
        return self._stream.begun

    async def read_frame(
        self, head_bytes: int, body_bytes: Callable[[bytearray], int]
    ) -> tuple[bytearray, memoryview]:
        """The next frame, as head and body; once called, only frames can be read."""
        with _as_edge_closed():
            return await self._stream.read_frame(head_bytes, body_bytes)

    async def write_frame(
        self, head: bytes, body: bytes | bytearray | memoryview, timeout: float | None = None
    ) -> None:
        """Hand both to the transport as one message, without joining them."""
        with _as_edge_closed():
            await self._stream.write_frame(head, body, math.inf if timeout is None else timeout)

    async def close(self) -> None:
        """End the writing side."""
        with _as_edge_closed():
            await self._stream.close()

    async def reset(self) -> None:
        """Abort both sides; never raises."""
        await self._stream.reset()


@contextmanager
def _as_edge_closed() -> Iterator[None]:
    try:
        yield
    except StreamBroken as error:
        raise EdgeClosedError(str(error)) from error


async def open_stream(host: Host, peer: PeerId, addrs: Sequence[str], protocol: str) -> FrameStream:
    """A stream to a peer, connecting first where needed; EdgeClosedError when that fails."""
    try:
        if peer not in host.connected():
            await host.connect(peer, addrs, CONNECT_PATIENCE)
        return StreamPort(await host.open_stream(peer, protocol, STREAM_PATIENCE))
    except (DialError, StreamBroken) as error:
        raise EdgeClosedError(str(error)) from error


class HostDialer:
    """Opens chunk streams through the host; ``max_control`` bounds their control frames."""

    def __init__(self, host: Host, max_control: int) -> None:
        self._host = host
        self._max_control = max_control

    async def open_channel(self, peer: PeerId, addrs: Sequence[str]) -> Channel:
        """The chunk stream of an edge."""
        stream = await open_stream(self._host, peer, addrs, PROTOCOL_ID)
        return ChunkChannel(stream, self._max_control)
