"""The multiplexer: yamux's wire format with bounds.

The reader hands bytes to the streams' inboxes as they are decrypted, wakes a consumer when what it
waits for is whole, and never waits for one stream, nor for the writer. What is sent is the
:class:`Outbox`'s matter. Windows hold both ways; credit is granted in halves of a window.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, cast

import trio
from libp2p.abc import IMuxedConn
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamError,
    MuxedStreamReset,
)

from p2pfl_torrent.exchange.spares import Spares
from p2pfl_torrent.overlay.limits import (
    IDLE_BURST,
    IDLE_RATE,
    INITIAL_WINDOW,
    MAX_BUFFERED,
    WIDE_STREAMS,
)
from p2pfl_torrent.overlay.noise import NoiseSession
from p2pfl_torrent.overlay.outbox import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    Outbox,
)
from p2pfl_torrent.overlay.sending import SessionBroken
from p2pfl_torrent.overlay.yamux_stream import YamuxStream

if TYPE_CHECKING:
    from libp2p.abc import ISecureConn
    from libp2p.connection_types import ConnectionType
    from libp2p.peer.id import ID
    from multiaddr import Multiaddr

log = logging.getLogger(__name__)

MAX_STREAM_ID = 0xFFFFFFFF

BACKLOG = 256
"""Streams the other side may open before we have accepted them."""

StreamGate = Callable[["ID"], bool]
"""Asked for each new inbound stream of a peer: may it be opened?"""


class _IdleFrames:
    """Counts frames that carry nothing, against an allowance; see limits."""

    def __init__(self) -> None:
        self._left = float(IDLE_BURST)
        self._since = trio.current_time()
        self._carried = 0

    def one(self, carried: int) -> None:
        """One more, after ``carried`` bytes were sent in all."""
        self._left -= 1
        if self._left < 0:
            now = trio.current_time()
            self._left += min(IDLE_BURST, (now - self._since) * IDLE_RATE)
            self._left += min(INITIAL_WINDOW, carried - self._carried)
            self._since, self._carried = now, carried
            if self._left < 0:
                raise SessionBroken("it sends frames without end that carry nothing")


class YamuxConn(IMuxedConn):
    """One connection's streams, with the bounds of :mod:`p2pfl_torrent.overlay.limits`.

    Attributes:
        on_close: called once the connection is gone; the library's swarm sets it.
        outbox: where the streams put what they send.
        spares: memory for messages, shared with the host's other connections.
    """

    def __init__(
        self, conn: ISecureConn, peer_id: ID, gate: StreamGate, spares: Spares | None = None
    ) -> None:
        self.secured_conn = cast(NoiseSession, conn)
        self.peer_id = peer_id
        self.event_started = trio.Event()
        self.event_shutting_down = trio.Event()
        self.event_closed = trio.Event()
        self.on_close: Callable[[], Awaitable[None]] | None = None
        self.outbox = Outbox(self.secured_conn)
        self.spares = spares if spares is not None else Spares()
        self.streams: dict[int, YamuxStream] = {}
        self._gate = gate
        self._next_id = 1 if conn.is_initiator else 2
        self._accepting, self._accepted = trio.open_memory_channel[YamuxStream](BACKLOG)
        self._buffered = 0
        self._wide = 0
        self._overdue = 0  # bytes that may still come on streams which are over
        self._idle = _IdleFrames()
        # A header that is not whole yet, or a body of which so much is missing.
        self._header = bytearray()
        self._missing = 0
        self._receiver: YamuxStream | None = None
        self._last = False  # the body's stream ends with it

    # Life

    async def start(self) -> None:
        """Runs the connection to its end; never raises but when cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send)
                self.event_started.set()
                try:
                    await self.secured_conn.pump(self)
                except SessionBroken as error:
                    log.debug("the connection with %s ended: %s", self.peer_id, error)
                except Exception:
                    # The library's swarm runs this task, and would end with it: a bug of ours
                    # costs this connection and no other.
                    log.exception("the connection with %s failed", self.peer_id)
                self._shut_down()  # before the sender is gone: nothing can be begun meanwhile
                nursery.cancel_scope.cancel()
        finally:
            self._shut_down()
        await self._tell_closed()

    async def _send(self) -> None:
        try:
            await self.outbox.run()
        except SessionBroken as error:
            log.debug("cannot send to %s: %s", self.peer_id, error)
        except Exception:
            log.exception("sending to %s failed", self.peer_id)  # see start()
        finally:
            self._shut_down()  # the reader sees that and ends the connection

    async def close(self) -> None:
        """Tells the other side, and closes."""
        if not self.event_shutting_down.is_set():
            self.outbox.say(GO_AWAY, 0, 0)
            await self.outbox.flush()
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
        self.outbox.close()
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
        """Does not wait for the other side, which may still refuse it by a reset.

        Raises:
            MuxedStreamError: the connection is gone.
        """
        await self.outbox.room()
        if self._next_id > MAX_STREAM_ID:
            raise MuxedStreamError("no stream number is left")
        number, self._next_id = self._next_id, self._next_id + 2
        stream = self.streams[number] = YamuxStream(number, self, is_initiator=True)
        self.outbox.say(WINDOW_UPDATE, SYN, number)
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
        self._received()

    def feed(self, data: memoryview) -> None:
        if not data:
            self._idle.one(self.outbox.carried)
        while data:
            if self._missing:
                count = min(self._missing, len(data))
                self._missing -= count
                if self._receiver is not None:
                    self._receiver.inbox.feed(data[:count])
                self._received()
            else:
                count = min(HEADER.size - len(self._header), len(data))
                self._header += data[:count]
                if len(self._header) == HEADER.size:
                    fields = HEADER.unpack(self._header)
                    self._header.clear()
                    self._began(*fields)
            data = data[count:]

    def _received(self) -> None:
        """Some of a body came."""
        if self._buffered > MAX_BUFFERED:
            raise SessionBroken("more data than may lie unread")
        if self._missing:
            return
        stream, self._receiver = self._receiver, None
        last, self._last = self._last, False
        if stream is not None and last:
            stream.ended()

    def _began(self, version: int, kind: int, flags: int, number: int, length: int) -> None:
        """A frame's header came."""
        if version or kind > GO_AWAY:
            raise SessionBroken("what came is not yamux")
        if kind == GO_AWAY:
            raise SessionBroken("the other side closes the connection")
        if kind != DATA or not length:
            self._idle.one(self.outbox.carried)
        if kind == PING:
            if flags & SYN:
                self.outbox.answer(PING, ACK, 0, length)
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
            self.outbox.withdraw(number)
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
            self._overdue += INITIAL_WINDOW
            self.outbox.answer(WINDOW_UPDATE, RST, number)
            return
        self.outbox.answer(WINDOW_UPDATE, ACK, number)

    def _expect(self, stream: YamuxStream | None, length: int) -> None:
        """A body follows; without a stream that still takes it, it is dropped."""
        self._missing = length
        if stream is None:
            if length > self._overdue:
                raise SessionBroken("data for a stream that is not open")
            self._overdue -= length
            return
        if length > stream.recv_window:
            raise SessionBroken("more data than the window allows")
        stream.recv_window -= length
        if length and not stream.recv_closed:
            self._receiver = stream

    # What the streams need

    def hold(self, count: int) -> None:
        """So many bytes more (or less) lie unread."""
        self._buffered += count

    def widen(self) -> bool:
        """Whether one more stream may have a RECEIVE_WINDOW."""
        self._wide += (allowed := self._wide < WIDE_STREAMS)
        return allowed

    def forget(self, stream: YamuxStream) -> None:
        """Both sides are done with a stream, but for what the other side may have under way."""
        if self.streams.pop(stream.stream_id, None) is not None:
            self._buffered -= stream.inbox.held
            self._overdue += stream.recv_window
            self._wide -= stream.wide
            self.outbox.forget(stream.stream_id)
        stream.inbox.detach()

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
