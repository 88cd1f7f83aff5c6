"""The multiplexer: yamux's wire format with bounds, a reader and a writer a connection.

* The reader hands bytes to the streams' inboxes as they are decrypted, wakes a consumer when what
  it waits for is whole, and never waits for one stream, nor for the writer.
* One task sends: a frame goes out whole or not at all, whoever waits for it and is cancelled.
  Control frames (12 bytes) go first and are not waited for.
* A stream has one frame in the queue at most, no longer than the link carries in a quarter of a
  second, so that streams take turns and the queue is bounded by their number.
* Windows hold both ways; credit is granted in quarters of a window.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, cast

import trio
from libp2p.abc import IMuxedConn
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamError,
    MuxedStreamReset,
)

from p2pfl_torrent.overlay.limits import MAX_BUFFERED, MAX_CONTROL_FRAMES, RECEIVE_WINDOW
from p2pfl_torrent.overlay.noise import NoiseSession, SessionBroken
from p2pfl_torrent.overlay.yamux_stream import FIN, RST, Bytes, YamuxStream

if TYPE_CHECKING:
    from libp2p.abc import ISecureConn
    from libp2p.connection_types import ConnectionType
    from libp2p.peer.id import ID
    from multiaddr import Multiaddr

log = logging.getLogger(__name__)

HEADER = struct.Struct("!BBHII")  # version, type, flags, stream, length
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK = 1, 2
MAX_STREAM_ID = 0xFFFFFFFF

BACKLOG = 256
"""Streams the other side may open before we have accepted them."""

SMALL = 4 << 10
"""Payload up to here is joined with its header: one message of Noise is cheaper than a copy."""

MIN_FRAME = 4 << 10
FIRST_FRAME = 64 << 10
MAX_FRAME = (1 << 20) + 64
"""A whole Piece with its head."""

SLOW_FRAME = 0.25
"""Seconds. A frame that takes longer to leave is followed by a smaller one, so that others on the
same link (a heartbeat, a window update) wait a quarter of a second at most for their turn."""

StreamGate = Callable[["ID"], bool]
"""Asked for each new inbound stream of a peer: may it be opened?"""


class _Frame:
    """One stream's bytes on their way out."""

    __slots__ = ("begun", "done", "parts", "sent", "size", "stream")

    def __init__(self, stream: int, parts: Sequence[Bytes], size: int) -> None:
        self.stream = stream
        self.parts = parts
        self.size = size
        self.begun = False
        self.sent = False
        self.done = trio.Event()


class YamuxConn(IMuxedConn):
    """One connection's streams, with the bounds of :mod:`p2pfl_torrent.overlay.limits`.

    Attributes:
        on_close: called once the connection is gone; the library's swarm sets it.
        frame_limit: bytes of payload that the next frame may have.
    """

    def __init__(self, conn: ISecureConn, peer_id: ID, gate: StreamGate) -> None:
        self.secured_conn = cast(NoiseSession, conn)
        self.peer_id = peer_id
        self.event_started = trio.Event()
        self.event_shutting_down = trio.Event()
        self.event_closed = trio.Event()
        self.on_close: Callable[[], Awaitable[None]] | None = None
        self.frame_limit = FIRST_FRAME
        self.streams: dict[int, YamuxStream] = {}
        self._gate = gate
        self._next_id = 1 if conn.is_initiator else 2
        self._accepting, self._accepted = trio.open_memory_channel[YamuxStream](BACKLOG)
        self._buffered = 0
        # Reading: a header that is not whole yet, or a body of which so much is missing.
        self._header = bytearray()
        self._missing = 0
        self._receiver: YamuxStream | None = None
        self._last = False  # the body's stream ends with it
        # Writing
        self._control: deque[bytes] = deque()
        self._credits: dict[int, int] = {}
        self._frames: deque[_Frame] = deque()
        self._wake = trio.Event()
        self._drained = trio.Event()

    # Life

    async def start(self) -> None:
        """Runs the connection to its end; never raises but when cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_frames)
                self.event_started.set()
                try:
                    await self.secured_conn.pump(self)
                except SessionBroken as error:
                    log.debug("the connection with %s ended: %s", self.peer_id, error)
                except Exception:
                    # The library's swarm runs this task, and would end with it: a bug of ours
                    # costs this connection and no other.
                    log.exception("the connection with %s failed", self.peer_id)
                nursery.cancel_scope.cancel()
        finally:
            self._shut_down()
        await self._tell_closed()

    async def close(self) -> None:
        """Tells the other side, and closes."""
        if not self.event_shutting_down.is_set():
            self._control.append(HEADER.pack(0, GO_AWAY, 0, 0, 0))
            self._wake.set()
            while self._control and not self.event_shutting_down.is_set():
                await self._room_for_control(1)
            self._shut_down()
        await self._tell_closed()

    async def abort(self) -> None:
        """Closes the socket without a word: for a peer that does not listen any more."""
        self._shut_down()
        await trio.lowlevel.checkpoint()

    def _shut_down(self) -> None:
        if self.event_shutting_down.is_set():
            return
        self.event_shutting_down.set()
        self.secured_conn.close_now()
        for stream in list(self.streams.values()):
            stream.break_off(MuxedStreamError("the connection is gone"))
        self.streams.clear()
        self._accepting.close()
        self._drained.set()
        for frame in self._frames:
            frame.done.set()
        self._frames.clear()
        self.event_closed.set()

    async def _tell_closed(self) -> None:
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            try:
                await on_close()
            except Exception:
                # The library's bookkeeping and its listeners; see start().
                log.exception("closing the connection with %s failed", self.peer_id)

    # Streams

    def inbound_streams(self) -> int:
        """How many streams the other side has opened and not finished."""
        return sum(not stream.is_initiator for stream in self.streams.values())

    async def open_stream(self) -> YamuxStream:
        await self._room_for_control(MAX_CONTROL_FRAMES)
        if self._next_id > MAX_STREAM_ID:
            raise MuxedStreamError("no stream number is left")
        number, self._next_id = self._next_id, self._next_id + 2
        stream = self.streams[number] = YamuxStream(number, self, is_initiator=True)
        self._say(WINDOW_UPDATE, SYN, number, 0)
        return stream

    async def accept_stream(self) -> YamuxStream:
        """The next stream that the other side opened; MuxedConnUnavailable when it is gone."""
        try:
            return await self._accepted.receive()
        except trio.EndOfChannel:
            raise MuxedConnUnavailable("the connection is gone") from None

    # Receiving: what NoiseSession.pump asks of its sink

    def room(self) -> memoryview:
        if self._receiver is None:
            return memoryview(b"")
        return self._receiver.inbox.room()[: self._missing]

    def filled(self, count: int) -> None:
        assert self._receiver is not None  # else there was no room
        self._missing -= count
        self._receiver.inbox.filled(count)
        if not self._missing:
            self._body_complete()

    def feed(self, data: memoryview) -> None:
        while data:
            if self._missing:
                count = min(self._missing, len(data))
                self._missing -= count
                if self._receiver is not None:
                    self._receiver.inbox.feed(data[:count])
                if not self._missing:
                    self._body_complete()
            else:
                count = min(HEADER.size - len(self._header), len(data))
                self._header += data[:count]
                if len(self._header) == HEADER.size:
                    fields = HEADER.unpack(self._header)
                    self._header.clear()
                    self._began(*fields)
            data = data[count:]

    def _began(self, version: int, kind: int, flags: int, number: int, length: int) -> None:
        """A frame's header came."""
        if version or kind > GO_AWAY:
            raise SessionBroken("what came is not yamux")
        if kind == GO_AWAY:
            raise SessionBroken("the other side closes the connection")
        if kind == PING:
            if flags & SYN:
                self._answer(PING, ACK, 0, length)
            return
        if flags & SYN:
            self._opened(number)
        stream = self.streams.get(number)
        if kind == DATA:
            self._expect(stream, length)
        elif stream is not None:
            stream.granted(length)
        if stream is not None and flags & RST:
            self._receiver = None
            stream.reset_received = True
            self.forget(stream)
            stream.break_off(MuxedStreamReset("the other side reset the stream"))
        elif stream is not None and flags & FIN:
            if kind == DATA and length:
                self._last = True
            else:
                stream.ended()

    def _opened(self, number: int) -> None:
        ours = self._next_id & 1
        if not number or number & 1 == ours or number in self.streams:
            raise SessionBroken("a stream with a number that is not free")
        stream = self.streams[number] = YamuxStream(number, self, is_initiator=False)
        try:
            if not self._gate(self.peer_id):
                raise trio.WouldBlock
            self._accepting.send_nowait(stream)
        except trio.WouldBlock:
            del self.streams[number]
            self._answer(WINDOW_UPDATE, RST, number, 0)
            return
        self._answer(WINDOW_UPDATE, ACK, number, 0)

    def _expect(self, stream: YamuxStream | None, length: int) -> None:
        # A stream that was reset here may still have a window's worth under way.
        window = RECEIVE_WINDOW if stream is None else stream.recv_window
        if length > window:
            raise SessionBroken("more data than the window allows")
        if self._buffered + length > MAX_BUFFERED:
            raise SessionBroken("more data than may lie unread")
        self._missing = length
        if stream is not None and length:
            self._receiver = stream
            stream.recv_window -= length

    def _body_complete(self) -> None:
        stream, self._receiver = self._receiver, None
        last, self._last = self._last, False
        if stream is not None and last:
            stream.ended()

    # What the streams need

    def hold(self, count: int) -> None:
        """So many bytes more (or less) lie unread."""
        self._buffered += count

    def forget(self, stream: YamuxStream) -> None:
        """Both sides are done with a stream."""
        if self.streams.pop(stream.stream_id, None) is not None:
            self._buffered -= stream.inbox.held
            self._credits.pop(stream.stream_id, None)
        stream.inbox.detach()

    def grant(self, stream: YamuxStream, count: int) -> None:
        """Tell the other side that it may send so many bytes more."""
        self._credits[stream.stream_id] = self._credits.get(stream.stream_id, 0) + count
        self._wake.set()

    async def end(self, number: int, flag: int) -> None:
        """Send a stream's FIN or RST, soon."""
        await self._room_for_control(MAX_CONTROL_FRAMES)
        self._say(WINDOW_UPDATE, flag, number, 0)

    async def send(self, stream: YamuxStream, parts: Sequence[Bytes], size: int) -> None:
        """Sends one data frame of ``size`` bytes; when cancelled, it goes out whole or not at all.

        Raises:
            MuxedStreamError: the connection is gone.
        """
        if self.event_shutting_down.is_set():
            raise MuxedStreamError("the connection is gone")
        frame = _Frame(stream.stream_id, parts, size)
        self._frames.append(frame)
        self._wake.set()
        try:
            await frame.done.wait()
        except trio.Cancelled:
            if not frame.begun and frame in self._frames:
                self._frames.remove(frame)
                stream.withdrawn(size)
            raise
        if not frame.sent:
            raise MuxedStreamError("the connection is gone")

    # Sending

    def _say(self, kind: int, flags: int, number: int, length: int) -> None:
        self._control.append(HEADER.pack(0, kind, flags, number, length))
        self._wake.set()

    def _answer(self, kind: int, flags: int, number: int, length: int) -> None:
        """For the reader, which cannot wait: it bounds what the other side makes us say."""
        if len(self._control) >= 2 * MAX_CONTROL_FRAMES:
            raise SessionBroken("it asks faster than it takes the answers")
        self._say(kind, flags, number, length)

    async def _room_for_control(self, limit: int) -> None:
        await trio.lowlevel.checkpoint()
        while len(self._control) >= limit and not self.event_shutting_down.is_set():
            if self._drained.is_set():
                self._drained = trio.Event()
            await self._drained.wait()
        if self.event_shutting_down.is_set() and limit > 1:
            raise MuxedStreamError("the connection is gone")

    async def _send_frames(self) -> None:
        try:
            while True:
                # A frame that woke us may have been taken back: hence the loop.
                while not (self._control or self._credits or self._frames):
                    self._wake = trio.Event()
                    await self._wake.wait()
                await self._send_next()
        except SessionBroken as error:
            log.debug("cannot send to %s: %s", self.peer_id, error)
        finally:
            self._shut_down()  # the reader sees that and ends the connection

    async def _send_next(self) -> None:
        """Everything that is control, then one frame."""
        control = b"".join(self._control) + b"".join(
            HEADER.pack(0, WINDOW_UPDATE, 0, number, count)
            for number, count in self._credits.items()
        )
        said = len(self._control)
        self._credits.clear()
        if not self._frames:
            await self.secured_conn.send(control)
        else:
            frame = self._frames.popleft()
            frame.begun = True
            head = control + HEADER.pack(0, DATA, 0, frame.stream, frame.size)
            began = trio.current_time()
            try:
                await self.secured_conn.send(*_joined(head, frame.parts))
                frame.sent = True
            finally:
                frame.done.set()
            self._pace(frame.size, trio.current_time() - began)
        for _ in range(said):
            self._control.popleft()
        self._drained.set()

    def _pace(self, size: int, seconds: float) -> None:
        if seconds > SLOW_FRAME:
            self.frame_limit = max(MIN_FRAME, min(size, self.frame_limit) // 2)
        elif seconds < SLOW_FRAME / 4 and size >= self.frame_limit:
            self.frame_limit = min(MAX_FRAME, self.frame_limit * 2)

    # What the library asks of a muxer

    @property
    def is_initiator(self) -> bool:
        return self.secured_conn.is_initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self.event_shutting_down.is_set()

    @property
    def is_closed(self) -> bool:
        return self.event_closed.is_set()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.secured_conn.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self.secured_conn.get_connection_type()


def _joined(head: bytes, parts: Sequence[Bytes]) -> list[Bytes]:
    """Small parts in one message of Noise with what is before them; large ones not copied."""
    joined: list[Bytes] = [head]
    for part in parts:
        if len(part) <= SMALL and len(joined[-1]) <= SMALL:
            joined[-1] = bytes(joined[-1]) + bytes(part)
        else:
            joined.append(part)
    return joined
