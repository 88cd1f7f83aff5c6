"""What one connection has to send: control frames, window updates, and a frame of each stream.

* A frame goes out whole or not at all, whoever waits for it and is cancelled: what the kernel takes
  at once leaves at once if nothing else is queued, and one task sends all the rest.
* Control frames (12 bytes) go first and are not waited for.
* A stream has one frame in the queue at most, no longer than the link at its last rate carries in a
  quarter of a second (in 10 ms if it is beyond 64 KiB), so that streams take turns and the queue is
  bounded by their number.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import trio
from libp2p.stream_muxer.exceptions import MuxedStreamError

from p2pfl_torrent.overlay.limits import MAX_ANSWERS, MAX_CONTROL_FRAMES
from p2pfl_torrent.overlay.sending import MAX_PLAINTEXT, Sending, SessionBroken, cut

Bytes = bytes | bytearray | memoryview

HEADER = struct.Struct("!BBHII")  # version, type, flags, stream, length
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8

SMALL = 4 << 10
"""Payload up to here is joined with its header: one message of Noise is cheaper than a copy."""

MIN_FRAME = 4 << 10
FIRST_FRAME = 64 << 10
MAX_FRAME = (1 << 20) + 64
"""A whole Piece with its head."""

SLOW_FRAME = 0.25
"""Seconds. A frame of up to FIRST_FRAME that takes longer to leave is followed by one that would
not have, so that others on the same link (a heartbeat, a window update) wait no longer for theirs.
Not shorter: where each frame waits for busy tasks, small ones would carry next to nothing."""

FAST_FRAME = 0.01
"""Seconds that a frame beyond FIRST_FRAME may take. A frame that has begun cannot be made shorter:
on a link that falls to a hundredth of its rate what goes first waits for a hundred times this."""

UNSENT = 4
"""Part of a frame that the kernel may hold unsent. With less, sending takes many small system calls
(16 KiB, trio's default, costs a tenth more CPU); with more, what goes first waits behind it."""


TURN = 0.002
"""Seconds that a stream may send without a break while the kernel takes all of it."""


class Session(Protocol):
    """What sends."""

    def keep_unsent(self, size: int) -> None:
        """Bound what the kernel holds unsent."""
        ...

    def begin(self, messages: Iterable[memoryview], size: int) -> Sending:
        """Messages to be sent now, before any others."""
        ...

    def advance(self, sending: Sending) -> bool:
        """What goes at once; whether that was all. Raises SessionBroken."""
        ...

    async def finish(self, sending: Sending) -> None:
        """The rest. Raises SessionBroken."""
        ...


class Sender(Protocol):
    """A stream, as far as its frames concern it."""

    stream_id: int

    def withdrawn(self, count: int) -> None:
        """A frame with so many bytes was queued, and will not be sent."""
        ...


class _Frame:
    """One stream's bytes on their way out."""

    __slots__ = ("_parts", "begun", "done", "flags", "number", "sent", "size")

    def __init__(self, number: int, parts: list[Bytes], size: int, flags: int = 0) -> None:
        self.number = number
        self.size = size
        self.flags = flags
        self.begun = False
        self.sent = False
        self.done = trio.Event()
        self._parts = parts

    @property
    def header(self) -> bytes:
        return HEADER.pack(0, DATA, self.flags, self.number, self.size)

    def messages(self, head: bytes) -> Iterator[memoryview]:
        """What goes into one message of Noise each: small parts with what is before them, large
        ones not copied."""
        joined, index = bytearray(head), 0
        while index < len(self._parts) and len(self._parts[index]) <= SMALL >= len(joined):
            joined += self._parts[index]
            index += 1
        yield from cut(joined)
        for place in range(index, len(self._parts)):
            start = 0
            while start < len(self._parts[place]):  # looked up anew for each: see keep()
                yield memoryview(self._parts[place])[start : start + MAX_PLAINTEXT]
                start += MAX_PLAINTEXT

    def keep(self) -> None:
        """Whoever waited does not any more, and may do with its bytes as it likes."""
        self._parts = [bytes(part) for part in self._parts]


class Outbox:
    """See above.

    Attributes:
        frame_limit: bytes of payload that the next frame may have.
        carried: bytes of payload sent, ever.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.frame_limit = FIRST_FRAME
        self._session.keep_unsent(FIRST_FRAME // UNSENT)
        self._control: deque[bytes] = deque()
        self._credits: dict[int, int] = {}
        self._frames: deque[_Frame] = deque()
        self._wake = trio.Event()
        self._drained = trio.Event()
        self._closed = False
        self._busy = True  # until run() has nothing to do
        self._turn = 0.0  # when frames sent at once have had theirs
        self._begun: tuple[_Frame, Sending] | None = None
        self.carried = 0

    # Control: none of it waits

    def say(self, kind: int, flags: int, number: int, length: int = 0) -> None:
        """One control frame, before all data that is queued."""
        self._control.append(HEADER.pack(0, kind, flags, number, length))
        self._wake.set()

    def answer(self, kind: int, flags: int, number: int, length: int = 0) -> None:
        """For the reader, which cannot wait: it bounds what the other side makes us say.

        Raises:
            SessionBroken: it does not take the answers.
        """
        if len(self._control) >= MAX_ANSWERS:
            raise SessionBroken("it asks faster than it takes the answers")
        self.say(kind, flags, number, length)

    def grant(self, number: int, count: int) -> None:
        """Tell the other side that it may send so many bytes more on a stream."""
        self._credits[number] = self._credits.get(number, 0) + count
        self._wake.set()

    def finish(self, number: int) -> None:
        """End a stream's writing side, after what is queued of it."""
        if any(frame.number == number for frame in self._frames):
            self._frames.append(_Frame(number, [], 0, FIN))
        else:
            self.say(WINDOW_UPDATE, FIN, number)

    def forget(self, number: int) -> None:
        """No more credit is granted on this stream."""
        self._credits.pop(number, None)

    def withdraw(self, number: int) -> None:
        """Nothing that is queued of this stream is sent any more; what is being sent, is."""
        for frame in [frame for frame in self._frames if frame.number == number]:
            self._frames.remove(frame)
            frame.done.set()

    async def room(self) -> None:
        """Waits until few control frames are queued: for who starts something that will need more.

        Raises:
            MuxedStreamError: the connection is gone.
        """
        await trio.lowlevel.checkpoint()
        while len(self._control) >= MAX_CONTROL_FRAMES and not self._closed:
            await self._draining()
        if self._closed:
            raise MuxedStreamError("the connection is gone")

    async def flush(self) -> None:
        """Waits until all control is sent, or the connection gone."""
        while self._control and not self._closed:
            await self._draining()

    async def _draining(self) -> None:
        if self._drained.is_set():
            self._drained = trio.Event()
        await self._drained.wait()

    # Data

    async def send(self, stream: Sender, parts: list[Bytes], size: int) -> None:
        """Sends one data frame of ``size`` bytes; when cancelled, it goes out whole or not at all.

        Raises:
            MuxedStreamError: the stream or the connection is over.
        """
        if self._closed:
            raise MuxedStreamError("the connection is gone")
        frame = _Frame(stream.stream_id, parts, size)
        if self._nothing_queued() and not self._busy:
            if self._sent_at_once(frame):
                await self._let_others_run()
                return
        else:
            self._frames.append(frame)
        self._wake.set()
        try:
            await frame.done.wait()
        except trio.Cancelled:
            if frame.begun:
                frame.keep()
            elif frame in self._frames:
                self._frames.remove(frame)
                stream.withdrawn(size)
            raise
        if not frame.sent:
            raise MuxedStreamError("the stream is over, or its connection")

    async def _let_others_run(self) -> None:
        """A cancellation is noticed each time; a turn of the event loop costs as much as sending
        a small frame, and comes once in a TURN."""
        if time.monotonic() < self._turn:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()
            self._turn = time.monotonic() + TURN

    def _nothing_queued(self) -> bool:
        return not (self._begun or self._control or self._credits or self._frames)

    def _sent_at_once(self, frame: _Frame) -> bool:
        frame.begun = True
        head = frame.header
        try:
            sending = self._session.begin(frame.messages(head), len(head) + frame.size)
            if not self._session.advance(sending):
                self._begun = frame, sending
                return False
        except SessionBroken as error:  # the reader will end the connection
            raise MuxedStreamError(str(error)) from error
        self._left(frame, 0.0)
        return True

    # Sending

    async def run(self) -> None:
        """Sends what is there and what comes; SessionBroken ends it."""
        while True:
            # A frame that woke us may have been taken back: hence the loop.
            while self._nothing_queued():
                self._busy = False
                self._wake = trio.Event()
                await self._wake.wait()
            self._busy = True
            if self._begun:
                (frame, sending), self._begun = self._begun, None
                with self._sent(frame):
                    await self._session.finish(sending)
            else:
                await self._send_next()

    async def _send_next(self) -> None:
        """Everything that is control, then one frame."""
        said = len(self._control)
        control = b"".join(self._control) + b"".join(
            HEADER.pack(0, WINDOW_UPDATE, 0, number, count)
            for number, count in self._credits.items()
        )
        self._credits.clear()
        if self._frames:
            frame = self._frames.popleft()
            head = control + frame.header
            with self._sent(frame):
                sending = self._session.begin(frame.messages(head), len(head) + frame.size)
                await self._session.finish(sending)
        else:
            await self._session.finish(self._session.begin(cut(control), len(control)))
        for _ in range(said):
            self._control.popleft()
        self._drained.set()

    @contextmanager
    def _sent(self, frame: _Frame) -> Iterator[None]:
        """Around the sending of a frame: whoever waits for it is told, however it ends."""
        frame.begun = True
        began = trio.current_time()
        try:
            yield
            self._left(frame, trio.current_time() - began)
        finally:
            frame.done.set()

    def _left(self, frame: _Frame, seconds: float) -> None:
        frame.sent = True
        self.carried += frame.size
        self._pace(frame.size, seconds)

    def _pace(self, size: int, seconds: float) -> None:
        limit, longer = self.frame_limit, min(MAX_FRAME, self.frame_limit * 2)
        fitting = _fitting(size / seconds) if seconds else MAX_FRAME
        if seconds > (FAST_FRAME if size > FIRST_FRAME else SLOW_FRAME):
            self.frame_limit = max(MIN_FRAME, min(limit, fitting))
        elif size >= limit and fitting >= longer:
            self.frame_limit = longer
        if self.frame_limit != limit:
            self._session.keep_unsent(max(MIN_FRAME, self.frame_limit // UNSENT))

    def close(self) -> None:
        """The connection is gone: whoever waits is told."""
        self._closed = True
        self._drained.set()
        for frame in self._frames:
            frame.done.set()
        self._frames.clear()
        if self._begun:  # run() was cancelled before it saw this one
            (frame, sending), self._begun = self._begun, None
            sending.end()
            frame.done.set()


def _fitting(rate: float) -> int:
    """The longest frame for a link of so many bytes a second."""
    return int(max(rate * FAST_FRAME, min(FIRST_FRAME, rate * SLOW_FRAME)))
