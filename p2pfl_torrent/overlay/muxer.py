"""Yamux with bounds: what py-libp2p's multiplexer needs before strangers may talk to it.

Differences to the stock class, which stays the wire format's only implementation:

* One task sends. In the stock class the caller sends, and a caller that is cancelled (every
  deadline is a cancellation) leaves half a Noise message on the wire, which breaks the connection
  for all streams. Here a frame goes out whole or not at all, whoever waits for it.
* Control frames (window updates, pings, resets: 12 bytes) are sent first and are not waited for,
  so that reading does not stall behind one's own bulk data on a slow uplink.
* Credit is granted in quarters of a window instead of after every read, which for the library's
  one-byte reads of varints costs a frame per byte.
* Windows hold for the sender too; inbound streams and unread bytes are bounded.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import trio
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.protocol_muxer.generic_selector import GenericMultistreamSelector
from libp2p.protocol_muxer.multiselect import DEFAULT_NEGOTIATE_TIMEOUT
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import (
    DEFAULT_WINDOW_SIZE,
    HEADER_SIZE,
    PROTOCOL_ID,
    TYPE_GO_AWAY,
    TYPE_WINDOW_UPDATE,
    YAMUX_HEADER_FORMAT,
    Yamux,
    YamuxStream,
)

from p2pfl_torrent.overlay.limits import (
    FRAME_STALL,
    MAX_BUFFERED,
    MAX_CONTROL_FRAMES,
    RECEIVE_WINDOW,
)
from p2pfl_torrent.overlay.negotiation import BoundedSelector

if TYPE_CHECKING:
    from libp2p.abc import IMuxedConn, IMuxedStream, ISecureConn
    from libp2p.peer.id import ID

MAX_NOISE_PLAINTEXT = 65519
MAX_PAYLOAD = MAX_NOISE_PLAINTEXT - HEADER_SIZE
"""Bytes of a frame that still fit one Noise message; one byte more costs a second message."""

StreamGate = Callable[["ID"], bool]
"""Asked for each new inbound stream of a peer: may it be opened?"""


class _Frame:
    __slots__ = ("data", "done", "sent")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.done = trio.Event()
        self.sent = False


class _HeaderTap:
    """Remembers the last frame header, which the base class does not tell whom it asks to read."""

    def __init__(self, conn: ISecureConn) -> None:
        self._conn = conn
        self.header = bytes(HEADER_SIZE)

    async def read(self, n: int | None = None) -> bytes:
        data = await self._conn.read(n)
        if len(data) == HEADER_SIZE:
            self.header = data
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conn, name)


class BoundedYamux(Yamux):
    """One connection's streams, with the bounds of :mod:`p2pfl_torrent.overlay.limits`."""

    def __init__(self, conn: ISecureConn, peer_id: ID, gate: StreamGate) -> None:
        async def on_close() -> None:  # SwarmConn replaces it; the base class awaits it
            pass

        self._tap = _HeaderTap(conn)
        super().__init__(
            cast("ISecureConn", self._tap),
            peer_id,
            is_initiator=conn.is_initiator,
            on_close=on_close,
        )
        self._gate = gate
        self._control: deque[bytes] = deque()
        self._frames: deque[_Frame] = deque()
        self._wake = trio.Event()
        self._drained = trio.Event()
        self._sending_over = False
        self._ungranted: dict[int, int] = {}

    # Sending

    async def _write_frame(self, data: bytes) -> None:
        """Sends one frame; when cancelled, the frame is either still sent whole or never."""
        if self._sending_over:
            raise ConnectionClosedError("the connection is closed", transport="tcp")
        if len(data) == HEADER_SIZE and data[1] != TYPE_GO_AWAY:
            while len(self._control) >= MAX_CONTROL_FRAMES:
                self._drained = trio.Event() if self._drained.is_set() else self._drained
                await self._drained.wait()
                if self._sending_over:
                    raise ConnectionClosedError("the connection is closed", transport="tcp")
            self._control.append(data)
            self._wake.set()
            await trio.lowlevel.checkpoint()
            return
        frame = _Frame(data)
        self._frames.append(frame)
        self._wake.set()
        try:
            await frame.done.wait()
        except trio.Cancelled:
            if frame in self._frames:  # not begun: take it back
                self._frames.remove(frame)
            raise
        if not frame.sent:
            raise ConnectionClosedError("the connection closed while sending", transport="tcp")

    async def _send_frames(self) -> None:
        frame: _Frame | None = None
        try:
            while True:
                # A frame that woke us may have been taken back: hence the loop.
                while not self._control and not self._frames:
                    self._wake = trio.Event()
                    await self._wake.wait()
                frame = self._frames.popleft() if self._frames else None
                control = b"".join(self._control)
                self._control.clear()
                self._drained.set()
                with trio.fail_after(FRAME_STALL):
                    for message in _noise_messages(control, frame.data if frame else b""):
                        await self.secured_conn.write(message)
                if frame is not None:
                    frame.sent = True
                    frame.done.set()
        except Exception:  # noqa: BLE001
            # Whatever the socket or the cipher raised, nothing more can be sent: the socket is
            # closed, the reading task sees that and tears the connection down.
            await self.abort()
        finally:
            self._sending_over = True
            self._drained.set()
            for waiting in [*self._frames, *([frame] if frame else [])]:
                waiting.done.set()
            self._frames.clear()

    async def _handle_incoming_with_ready_signal(
        self, task_status: Any = trio.TASK_STATUS_IGNORED
    ) -> None:
        assert self._nursery is not None  # the base class has just opened it
        self._nursery.start_soon(self._send_frames)
        await super()._handle_incoming_with_ready_signal(task_status)

    async def abort(self) -> None:
        """Closes the socket without a word: for a peer that does not listen any more."""
        with trio.CancelScope(shield=True):
            await self.secured_conn.close()

    # Receiving

    async def take(self, stream: YamuxStream, limit: int) -> bytes:
        """At most ``limit`` bytes of what arrived on ``stream``, waiting for the first.

        Cancelling it loses no byte. Errors are the library's own.
        """
        data = await self.read_stream(stream.stream_id, limit)
        sid = stream.stream_id
        if sid in self.streams:
            self._grant(stream, self._ungranted.get(sid, 0) + len(data))
        return data

    def _grant(self, stream: YamuxStream, credit: int) -> None:
        """Hands ``credit`` back to the sender once it is worth a frame."""
        sid = stream.stream_id
        granted = credit
        if stream.target_recv_window < RECEIVE_WINDOW:  # the sender still has the initial 256 KiB
            worth = DEFAULT_WINDOW_SIZE // 4
            granted += RECEIVE_WINDOW - DEFAULT_WINDOW_SIZE
        else:
            worth = RECEIVE_WINDOW // 4
        if credit < worth or len(self._control) >= MAX_CONTROL_FRAMES:
            self._ungranted[sid] = credit
            return
        self._ungranted[sid] = 0
        stream.target_recv_window = RECEIVE_WINDOW
        stream.recv_window += granted
        self._control.append(
            struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_WINDOW_UPDATE, 0, sid, granted)
        )
        self._wake.set()

    def _finalize_stream_locked(self, stream: YamuxStream, *, fully_closed: bool) -> None:
        super()._finalize_stream_locked(stream, fully_closed=fully_closed)
        if stream.stream_id not in self.streams:
            self._ungranted.pop(stream.stream_id, None)

    async def _read_data_body(self, length: int) -> bytes:
        _, _, _, number, _ = struct.unpack(YAMUX_HEADER_FORMAT, self._tap.header)
        stream = self.streams.get(number)
        window = stream.recv_window if stream else DEFAULT_WINDOW_SIZE
        unread = sum(map(len, self.stream_buffers.values()))
        if length > window or unread + length > MAX_BUFFERED:
            # The one error that the base class answers by closing the connection.
            raise trio.TooSlowError("more data than the window allows")
        return await super()._read_data_body(length)

    # Streams

    def inbound_streams(self) -> int:
        """How many streams the other side has opened and not finished."""
        return sum(not stream.is_initiator for stream in self.streams.values())

    async def accept_stream(self) -> IMuxedStream:
        while True:
            stream = await super().accept_stream()
            if self._gate(self.peer_id):
                return stream
            await stream.reset()


class YamuxOnly(MuxerMultistream):
    """Negotiates Yamux, and gives a :class:`BoundedYamux`; the stock class ignores the class."""

    def __init__(self, gate: StreamGate) -> None:
        super().__init__({TProtocol(PROTOCOL_ID): Yamux})
        self._gate = gate
        self._selector = cast(
            "GenericMultistreamSelector[Any]", BoundedSelector({TProtocol(PROTOCOL_ID): Yamux})
        )

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        protocol, _ = await self._selector.select(
            conn, conn.is_initiator, DEFAULT_NEGOTIATE_TIMEOUT
        )
        return self._annotate_connection(BoundedYamux(conn, peer_id, self._gate), conn, protocol)


def _noise_messages(control: bytes, data: bytes) -> list[bytes]:
    """What to encrypt at a time; never nothing, which the other side takes for the end."""
    if len(control) + len(data) <= MAX_NOISE_PLAINTEXT:
        return [control + data]
    return [part for part in (control, data) if part]
