"""A stream to another peer, with deadlines, and one error for everything that can go wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.stream.exceptions import StreamError
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError

from p2pfl_torrent.core.errors import P2PFLError
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.exchange.ports import EdgeClosedError
from p2pfl_torrent.overlay.inbox import BodyBytes
from p2pfl_torrent.overlay.limits import FRAME_STALL
from p2pfl_torrent.overlay.yamux_stream import YamuxStream

if TYPE_CHECKING:
    from libp2p.network.stream.net_stream import NetStream

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
        "_muxed",
        "_net",
        "_reading",
        "_writing",
        "protocol",
        "remote",
    )

    def __init__(self, net: NetStream, protocol: str) -> None:
        self._net = net
        self._muxed = cast(YamuxStream, net.muxed_stream)
        self.remote = PeerId(str(self._muxed.conn.peer_id))
        self.protocol = protocol
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
            with _deadline(timeout), self._ends():
                return await self._muxed.inbox.exactly(count)
        raise StreamTimeout(f"{self.remote} sent nothing more within {timeout:g} s")

    async def read_frame(
        self, head_bytes: int, body_bytes: BodyBytes
    ) -> tuple[bytearray, memoryview]:
        """The next frame, as head and body: received where it stays, woken for once.

        A body is there until the next call: then its memory is used again.
        From the first call on there are only frames of that kind. ``body_bytes`` says from a head
        how many bytes follow; its RemoteProtocolError comes out here, and ends the reading.

        Raises:
            EndOfStream: the other side finished cleanly, between two frames.
            StreamTimeout: a body came too slowly; see FRAME_STALL.
            StreamBroken: the stream or its connection broke.
        """
        with self._alone("_reading"), self._errors("read"):
            try:
                with self._ends():
                    return await self._muxed.inbox.frame(head_bytes, body_bytes)
            except trio.TooSlowError:
                raise StreamTimeout(
                    f"{self.remote} sent too little of a message for {FRAME_STALL:g} s"
                ) from None

    @property
    def begun(self) -> int:
        """Bytes that are here of the frame that is coming; for who reads frames."""
        return self._muxed.inbox.begun

    @contextmanager
    def _ends(self) -> Iterator[None]:
        try:
            yield
        except MuxedStreamEOF:
            raise self._ended() from None
        except MuxedStreamError:
            if self._muxed.conn.event_shutting_down.is_set():
                raise StreamBroken(f"the connection to {self.remote} is gone") from None
            if self._muxed.reset_received:
                raise StreamBroken(f"{self.remote} reset the stream") from None
            raise

    def _ended(self) -> StreamBroken:
        if self._muxed.inbox.partial:
            return StreamBroken(f"{self.remote} ended the stream in mid-message")
        return EndOfStream(f"{self.remote} ended the stream")

    async def write(
        self, data: bytes | bytearray | memoryview, timeout: float | None = None
    ) -> None:
        """Sends ``data``: returns when all of it has been handed to the operating system.

        Raises:
            StreamTimeout: that took longer than ``timeout`` seconds; the stream is reset.
            StreamBroken: the stream or its connection broke, or the other side takes too little of
                it; see FRAME_STALL.
        """
        await self._send((data,), timeout)

    async def write_frame(
        self, head: bytes, body: bytes | bytearray | memoryview, timeout: float | None = None
    ) -> None:
        """``head`` and ``body`` as one write, without joining them; see :meth:`write`."""
        await self._send((head, body), timeout)

    async def _send(
        self, parts: Sequence[bytes | bytearray | memoryview], timeout: float | None
    ) -> None:
        with self._alone("_writing"), self._errors("write"):
            began, size = self._muxed.sent, sum(memoryview(part).nbytes for part in parts)
            try:
                with _deadline(timeout) as deadline:
                    await self._muxed.write_parts(*parts)
            except trio.Cancelled:
                if (
                    0 < self._muxed.sent - began < size
                ):  # half a message is out, nothing can follow it
                    with trio.CancelScope(shield=True):
                        await self.reset()
                raise
            if deadline.cancelled_caught:
                await self.reset()
                raise StreamTimeout(f"{self.remote} took too little within {timeout:g} s")

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
            return await self._muxed.read(n)
        except MuxedStreamEOF:
            return b""
        except MuxedStreamError as error:
            raise StreamError(str(error)) from error

    async def write(self, data: bytes, /) -> None:
        await self._net.write(data)
