"""A stream to another peer, with deadlines, and one error for everything that can go wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.stream.exceptions import StreamError
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import YamuxStream

from p2pfl_torrent.core.errors import P2PFLError
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.exchange.ports import EdgeClosedError
from p2pfl_torrent.overlay.muxer import MAX_PAYLOAD, BoundedYamux

if TYPE_CHECKING:
    from libp2p.network.stream.net_stream import NetStream

READ_AHEAD = 256 << 10
"""Bytes asked of the muxer at a time: below 64 KiB throughput falls, above nothing is gained."""

MIN_PIECE = 4 << 10
SLOW_PIECE = 0.25
"""Seconds. A frame that takes longer to leave is followed by a smaller one, so that others on the
same link (a heartbeat, a window update) wait a quarter of a second at most for their turn."""

CLOSE_TIMEOUT = 5.0


class StreamBroken(P2PFLError, EdgeClosedError):
    """The stream is of no more use; the text says why."""


class StreamTimeout(StreamBroken):
    """Nothing arrived, or nothing could be sent, in the time allowed.

    After a read the stream is still good, and what had arrived is kept: reading again goes on.
    After a write it is not, since part of the message may have gone out.
    """


class EndOfStream(StreamBroken):
    """The other side finished the stream, in order and before the first byte asked for."""


class Stream:
    """Bytes to and from one peer, in order.

    One task may read while another one writes; two readers or two writers are a bug
    (``trio.BusyResourceError``).

    Attributes:
        remote: PeerId of the other side, proven by its handshake.
        protocol: what is spoken on it.
    """

    __slots__ = (
        "_broken",
        "_closed",
        "_got",
        "_muxed",
        "_net",
        "_piece",
        "_reading",
        "_writing",
        "_yamux",
        "protocol",
        "remote",
    )

    def __init__(self, net: NetStream, protocol: str) -> None:
        self._net = net
        self._muxed = cast(YamuxStream, net.muxed_stream)
        self._yamux = cast(BoundedYamux, self._muxed.conn)
        self.remote = PeerId(str(self._yamux.peer_id))
        self.protocol = protocol
        self._got = bytearray()
        self._piece = MAX_PAYLOAD
        self._broken: str | None = None
        self._closed = False
        self._reading = False
        self._writing = False

    def __repr__(self) -> str:
        return f"<Stream {self.protocol} with {self.remote}>"

    async def read_exactly(self, count: int, timeout: float | None = None) -> bytearray:
        """The next ``count`` bytes. They are allocated: bound a count that comes from the wire.

        Raises:
            EndOfStream: the other side finished cleanly, and none of the bytes had arrived.
            StreamTimeout: not all arrived within ``timeout`` seconds; see there.
            StreamBroken: the stream or its connection broke.
        """
        with self._alone("_reading"), self._errors("read"):
            with _deadline(timeout) as deadline:
                if len(self._got) >= count:  # a loop over small messages must let others run too
                    await trio.lowlevel.checkpoint()
                while len(self._got) < count:
                    self._got += await self._receive(READ_AHEAD)
            if deadline.cancelled_caught:
                raise StreamTimeout(f"{self.remote} sent nothing more within {timeout:g} s")
        if len(self._got) == count:
            whole, self._got = self._got, bytearray()
            return whole
        part = self._got[:count]
        del self._got[:count]
        return part

    async def _receive(self, limit: int) -> bytes:
        try:
            return await self._yamux.take(self._muxed, limit)
        except MuxedStreamEOF:
            # The library says the same after a reset, and when the connection is gone.
            if self._yamux.event_shutting_down.is_set():
                raise StreamBroken(f"the connection to {self.remote} is gone") from None
            if self._muxed.reset_received:
                raise StreamBroken(f"{self.remote} reset the stream") from None
            if self._got:
                raise StreamBroken(f"{self.remote} ended the stream in mid-message") from None
            raise EndOfStream(f"{self.remote} ended the stream") from None

    async def write(
        self, data: bytes | bytearray | memoryview, timeout: float | None = None
    ) -> None:
        """Sends ``data``: returns when all of it has been handed to the operating system.

        Raises:
            StreamTimeout: that took longer than ``timeout`` seconds; the stream is reset.
            StreamBroken: the stream or its connection broke.
        """
        rest = memoryview(data).cast("B")
        size = len(rest)
        with self._alone("_writing"), self._errors("write"):
            try:
                with _deadline(timeout) as deadline:
                    while rest:
                        fits = min(await self._window(), self._piece, len(rest))
                        await self._send_piece(rest[:fits])
                        rest = rest[fits:]
            except trio.Cancelled:
                if len(rest) < size:  # half a message is out, nothing can follow it
                    with trio.CancelScope(shield=True):
                        await self.reset()
                raise
            if deadline.cancelled_caught:
                await self.reset()
                raise StreamTimeout(f"{self.remote} took too little within {timeout:g} s")

    async def _send_piece(self, piece: memoryview) -> None:
        began = trio.current_time()
        # Bytes plus a view is bytes: the library's annotation is narrower than its code.
        await self._muxed.write(cast(bytes, piece))
        if trio.current_time() - began > SLOW_PIECE:
            self._piece = max(MIN_PIECE, self._piece // 2)
        elif self._piece < MAX_PAYLOAD:
            self._piece = min(MAX_PAYLOAD, self._piece * 2)

    async def _window(self) -> int:
        """How many bytes may be sent now; waits until some may.

        The library would wait itself, but gives up and resets the stream after 5.0 s in a row
        without a window update: on a link that needs 5 s for the frame in flight (64 KiB at
        105 kbit/s), or whenever the reader pauses. It never sees an empty window from here.
        """
        pause = 0.001
        while self._muxed.send_window <= 0:
            if self._muxed.closed or self._muxed.send_closed:
                raise StreamBroken(f"the stream to {self.remote} was closed")
            await trio.sleep(pause)
            pause = min(0.02, pause * 2)
        return self._muxed.send_window

    async def close(self) -> None:
        """Ends the writing side, in order: the other side reads what was sent, then the end.

        Reading goes on until the other side does the same.
        """
        if self._closed or self._broken is not None:
            return
        self._closed = True
        with trio.move_on_after(CLOSE_TIMEOUT) as deadline, self._errors("close", tell=False):
            await self._net.close()
        if deadline.cancelled_caught:
            await self.reset()

    async def reset(self) -> None:
        """Drops both sides; never raises. The other side gets an error, as do reads here."""
        self._broken = self._broken or "it was reset here"
        with trio.move_on_after(CLOSE_TIMEOUT), self._errors("reset", tell=False):
            await self._net.reset()

    @contextmanager
    def _alone(self, role: str) -> Iterator[None]:
        if getattr(self, role):
            raise trio.BusyResourceError(f"two tasks are {role[1:]} on one stream")
        setattr(self, role, True)
        try:
            yield
        finally:
            setattr(self, role, False)

    @contextmanager
    def _errors(self, doing: str, tell: bool = True) -> Iterator[None]:
        """The one place where the library's errors become ours."""
        if tell and self._broken is not None:
            raise StreamBroken(f"cannot {doing}: {self._broken}")
        if doing == "write" and self._closed:
            raise StreamBroken("cannot write: the writing side was closed here")
        try:
            yield
        except (BaseLibp2pError, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as e:
            if tell:
                self._broken = f"the stream with {self.remote} broke"
                raise StreamBroken(f"cannot {doing}: {self._broken} ({type(e).__name__})") from e


def _deadline(timeout: float | None) -> trio.CancelScope:
    return trio.move_on_after(math.inf if timeout is None else timeout)


class StreamPipe:
    """A stream before it has a protocol: reads no byte that belongs to what follows."""

    def __init__(self, net: NetStream) -> None:
        self._net = net
        self._muxed = cast(YamuxStream, net.muxed_stream)

    async def read(self, n: int | None = None, /) -> bytes:
        try:
            return await cast(BoundedYamux, self._muxed.conn).take(self._muxed, n or READ_AHEAD)
        except MuxedStreamEOF:
            return b""
        except MuxedStreamError as error:
            raise StreamError(str(error)) from error

    async def write(self, data: bytes, /) -> None:
        await self._net.write(data)
