"""One stream of a yamux connection: its windows, its ends, and its place in the queue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio
from libp2p.abc import IMuxedStream
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset

from p2pfl_torrent.overlay.inbox import Inbox
from p2pfl_torrent.overlay.limits import (
    FRAME_PROGRESS,
    FRAME_STALL,
    INITIAL_WINDOW,
    RECEIVE_WINDOW,
)
from p2pfl_torrent.overlay.outbox import RST, WINDOW_UPDATE, Bytes

if TYPE_CHECKING:
    from p2pfl_torrent.overlay.yamux import YamuxConn

MAX_SEND_WINDOW = 1 << 32  # nobody means more
READ = 64 << 10


class YamuxStream(IMuxedStream):
    """See :class:`Stream`, which is what the rest of the library uses.

    Attributes:
        inbox: what arrived.
        recv_window: bytes the other side may still send.
        closed: both sides are over, or the stream was reset.
        wide: the window is a RECEIVE_WINDOW.
        sent: bytes handed over to be sent, ever.
    """

    def __init__(self, stream_id: int, conn: YamuxConn, *, is_initiator: bool) -> None:
        self.stream_id = stream_id
        self.conn = self.muxed_conn = conn
        self.is_initiator = is_initiator
        self.inbox = Inbox(self._taken, conn.hold, conn.spares)
        self.recv_window = INITIAL_WINDOW
        self.send_window = INITIAL_WINDOW
        self.sent = 0
        self.send_closed = False
        self.recv_closed = False
        self.reset_received = False
        self.wide = False
        self._ungranted = 0
        self._window = trio.Event()

    @property
    def closed(self) -> bool:
        return self.send_closed and self.recv_closed

    # What the connection tells

    def granted(self, count: int) -> None:
        """The other side takes so many bytes more."""
        self.send_window = min(MAX_SEND_WINDOW, self.send_window + count)
        self._window.set()

    def ended(self) -> None:
        """The other side has sent its last byte."""
        self.recv_closed = True
        self.inbox.finish(MuxedStreamEOF("the other side ended the stream"))
        if self.send_closed:
            self.conn.forget(self)

    def break_off(self, reason: Exception) -> None:
        """Neither side sends any more; what has arrived can still be read."""
        self.send_closed = self.recv_closed = True
        self.inbox.finish(reason)
        self._window.set()

    def _taken(self, count: int) -> None:
        """Hands credit back to the sender once it is worth a frame."""
        self._ungranted += count
        worth = RECEIVE_WINDOW // 2 if self.wide else INITIAL_WINDOW // 4
        if self._ungranted < worth or self.recv_closed:
            return
        granted, self._ungranted = self._ungranted, 0
        if not self.wide and self.conn.widen():  # a stream that is used for more than questions
            self.wide = True
            granted += RECEIVE_WINDOW - INITIAL_WINDOW
        self.recv_window += granted
        self.conn.outbox.grant(self.stream_id, granted)

    # Reading and writing

    async def read(self, n: int | None = None) -> bytes:
        """At most ``n`` bytes, waiting for the first.

        Raises:
            MuxedStreamEOF: the other side ended the stream, and all has been read.
            MuxedStreamError: the stream or the connection broke.
        """
        return bytes(await self.inbox.some(READ if n is None or n < 0 else n))

    async def write(self, data: bytes) -> None:
        await self.write_parts(data)

    async def write_parts(self, *parts: Bytes) -> None:
        """Sends the parts one after the other, as if they were one, without joining them.

        Raises:
            MuxedStreamError: the stream or the connection broke, or the other side gave too little
                credit for FRAME_STALL. What the connection takes is the session's to watch.
        """
        mark, waited = self.sent, 0.0
        rest = [memoryview(part).cast("B") for part in parts]
        left = sum(map(len, rest))
        while left:
            if self.sent - mark >= FRAME_PROGRESS:
                mark, waited = self.sent, 0.0
            waited += await self._may_send(FRAME_STALL - waited)
            size = min(left, self.send_window, self.conn.outbox.frame_limit)
            left -= size
            self.send_window -= size
            self.sent += size
            await self.conn.outbox.send(self, list(_cut(rest, size)), size)

    def withdrawn(self, count: int) -> None:
        """A frame that was handed over has not been sent and will not be."""
        self.sent -= count
        self.granted(count)

    async def _may_send(self, patience: float) -> float:
        """Waits for credit; the seconds that took."""
        began = trio.current_time()
        while not (self.send_window or self.send_closed):
            if self._window.is_set():
                self._window = trio.Event()
            with trio.move_on_at(began + patience) as stall:
                await self._window.wait()
            if stall.cancelled_caught:
                await self.reset()
                raise MuxedStreamError(f"the other side took too little for {FRAME_STALL:g} s")
        if self.send_closed:
            raise self._broken()
        return trio.current_time() - began

    def _broken(self) -> MuxedStreamError:
        if self.reset_received:
            return MuxedStreamReset("the other side reset the stream")
        return MuxedStreamError("the stream is closed")

    # Ends

    async def close(self) -> None:
        """Ends the writing side."""
        if self.send_closed:
            return
        self.send_closed = True
        self._window.set()
        self.conn.outbox.finish(self.stream_id)
        if self.recv_closed:
            self.conn.forget(self)
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """Drops both sides."""
        if self.stream_id not in self.conn.streams:
            return
        self.conn.outbox.withdraw(self.stream_id)
        self.conn.forget(self)
        self.inbox.drop()
        self.break_off(MuxedStreamReset("the stream was reset here"))
        self.conn.outbox.say(WINDOW_UPDATE, RST, self.stream_id)
        await trio.lowlevel.checkpoint()

    def set_deadline(self, ttl: int) -> None:
        raise NotImplementedError("deadlines belong to each read and write")

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.conn.get_remote_address()

    async def __aenter__(self) -> YamuxStream:
        return self


def _cut(parts: list[memoryview], size: int) -> Iterator[memoryview]:
    """Takes ``size`` bytes off the front of ``parts``."""
    while size:
        part = parts[0][:size]
        size -= len(part)
        parts[0] = parts[0][len(part) :]
        if not parts[0]:
            del parts[0]
        if part:
            yield part
