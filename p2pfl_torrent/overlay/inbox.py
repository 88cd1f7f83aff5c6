"""What arrived on one stream: bytes that go straight to who waits for them, or frames.

No awaits but in the waiting itself: the connection's reader puts, one consumer takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.exchange.spares import Spares
from p2pfl_torrent.overlay.limits import FRAME_PROGRESS, FRAME_STALL

BodyBytes = Callable[[bytearray], int]
"""From a frame's head, how many bytes follow; RemoteProtocolError where it will not do."""

FRAME_OVERHEAD = 256  # bytes of memory of a frame that waits, besides its body

SMALL_FRAME = 4 << 10  # bytes of body
FRAMES_IN_A_ROW = 16
"""Small frames taken without letting other tasks run: milliseconds of work, and what they make the
consumer say leaves together."""

_NOTHING = memoryview(b"")


def _ignore(count: int) -> None:
    pass


class Inbox:
    """The receiving half of a stream.

    Attributes:
        held: bytes of memory that the other side keeps occupied here.
        end: why nothing more will come, once that is so.
    """

    __slots__ = (
        "_body_bytes", "_credit", "_frames", "_got", "_handed_out", "_head", "_head_bytes", "_hold",
        "_in_a_row", "_into", "_mark", "_owed", "_paid", "_pending", "_since", "_spares", "_wake",
        "end", "held",
    )  # fmt: skip

    def __init__(
        self, credit: Callable[[int], None], hold: Callable[[int], None], spares: Spares
    ) -> None:
        """``credit`` is told what the sender may send anew, ``hold`` how ``held`` changes."""
        self._credit = credit
        self._hold = hold
        self._spares = spares  # where the bodies of frames come from and go to
        self._pending = bytearray()
        self._paid = 0  # of the first bytes pending, for so many credit was given already
        self._into = _NOTHING
        self._got = 0
        self._wake: trio.Event | None = None
        self.held = 0
        self.end: Exception | None = None
        # Of frames alone:
        self._body_bytes: BodyBytes | None = None
        self._head_bytes = 0
        self._head: bytearray | None = None
        self._frames: deque[tuple[bytearray, memoryview]] = deque()
        self._handed_out = _NOTHING
        self._owed = 0
        self._mark = 0  # bytes of the body that had come ...
        self._since = 0.0  # ... when its progress was last looked at
        self._in_a_row = 0

    # The reader's side

    def room(self) -> memoryview:
        """Where the next bytes go, if that is known."""
        return self._into[self._got :]

    def filled(self, count: int) -> None:
        """So many bytes have been written to ``room()``."""
        self._got += count
        if self._body_bytes is None:
            self._credit(count)
            if self._got == len(self._into):
                self._rouse()
            return
        self._owed += count
        if not self._frames:  # who takes frames waits for this one
            self._settle()
        if self._got == len(self._into):
            self._part_complete()

    def feed(self, data: memoryview) -> None:
        """The next bytes."""
        while data:
            count = min(len(self._into) - self._got, len(data))
            if not count:
                break
            self._into[self._got : self._got + count] = data[:count]
            data = data[count:]
            self.filled(count)
        if data and self.end is None:
            self._pending += data
            self._change(len(data))
            self._rouse()

    def finish(self, reason: Exception) -> None:
        """Nothing more will come: ``reason`` is raised when what is here has been taken."""
        if self.end is None:
            self.end = reason
        self._rouse()

    def detach(self) -> None:
        """The stream is over: what is still taken here concerns no connection."""
        self._credit = self._hold = _ignore

    def drop(self) -> None:
        """Forget what was not taken, and take nothing more."""
        self._change(-self.held)
        self._into, self._got, self._head = _NOTHING, 0, None
        self._pending.clear()
        self._paid = 0
        self._frames.clear()

    def _part_complete(self) -> None:
        """A frame's head or body is here."""
        assert self._body_bytes is not None
        if self._head is None:
            head = self._into.obj
            assert isinstance(head, bytearray)
            try:
                size = self._body_bytes(head)
            except RemoteProtocolError as error:
                self._into, self._got = _NOTHING, 0
                self.finish(error)
                return
            self._head = head
            self._change(size)
            self._into, self._got = self._spares.take(size), 0
            self._look()
            if size:
                return
        self._frames.append((self._head, self._into))
        self._change(FRAME_OVERHEAD)
        self._head = None
        self._into, self._got = memoryview(bytearray(self._head_bytes)), 0
        self._rouse()

    def _look(self) -> None:
        self._mark, self._since = self._got, trio.current_time()

    def _change(self, count: int) -> None:
        self.held += count
        self._hold(count)

    def _settle(self, limit: int | None = None) -> None:
        """Gives the credit that was held back, at most ``limit`` of it."""
        count = self._owed if limit is None else min(limit, self._owed)
        if count > 0:
            self._owed -= count
            self._credit(count)

    def _rouse(self) -> None:
        if self._wake is not None:
            self._wake.set()

    # The consumer's side

    async def _wait(self) -> None:
        if self._wake is not None:
            raise trio.BusyResourceError("two tasks are reading one stream")
        self._wake = trio.Event()
        try:
            await self._wake.wait()
        finally:
            self._wake = None

    def _take(self, count: int) -> bytearray:
        taken = self._pending[:count]
        del self._pending[:count]
        self._change(-len(taken))
        paid = min(self._paid, len(taken))
        self._paid -= paid
        self._credit(len(taken) - paid)
        return taken

    async def some(self, limit: int) -> bytearray:
        """At most ``limit`` bytes, waiting for the first; cancelling it loses none."""
        if self._pending:
            await trio.lowlevel.checkpoint()
        while not self._pending:
            if self.end is not None:
                raise self.end.with_traceback(None)
            await self._wait()
        return self._take(limit)

    async def exactly(self, count: int) -> bytearray:
        """``count`` bytes; cancelling it loses none, nor does an end before the last."""
        if len(self._pending) >= count:  # a loop over small messages must let others run too
            await trio.lowlevel.checkpoint()
            if len(self._pending) >= count:  # not reset meanwhile
                return self._take(count)
        whole = bytearray(count)
        self._into, self._got = memoryview(whole), 0
        came = len(self._pending)
        self._into[:came] = self._take(came)
        self._got = came
        try:
            while self._got < count:
                if self.end is not None:
                    raise self.end.with_traceback(None)
                await self._wait()
        except BaseException:
            self._into, got, self._got = _NOTHING, self._got, 0
            self._pending[:0] = whole[:got]
            self._paid += got
            self._change(got)
            raise
        self._into, self._got = _NOTHING, 0
        return whole

    @property
    def begun(self) -> int:
        """Bytes that are here of the frame that is coming."""
        return self._got

    @property
    def partial(self) -> bool:
        """Whether bytes are here that were not taken."""
        return bool(self._pending or self._frames or self._head is not None or self._got)

    async def frame(self, head_bytes: int, body_bytes: BodyBytes) -> tuple[bytearray, memoryview]:
        """The next frame, as head and body; from the first call on there are only frames.

        A body is there until the next call: then its memory is used again.

        Raises:
            trio.TooSlowError: less than FRAME_PROGRESS of its body came within FRAME_STALL.
            RemoteProtocolError: ``body_bytes`` refused it.
        """
        if self._handed_out:
            self._spares.give(self._handed_out)
            self._handed_out = _NOTHING
        if self._body_bytes is None:
            self._body_bytes, self._head_bytes = body_bytes, head_bytes
            self._into, self._got = memoryview(bytearray(head_bytes)), 0
            self._change(-len(self._pending))
            self._owed, self._paid = -self._paid, 0
            pending, self._pending = self._pending, bytearray()
            self.feed(memoryview(pending))
        if self._frames:
            # Small ones that came together are taken together; then others run too.
            self._in_a_row += 1
            if self._in_a_row >= FRAMES_IN_A_ROW or len(self._frames[0][1]) > SMALL_FRAME:
                self._in_a_row = 0
                await trio.lowlevel.checkpoint()
        while not self._frames:
            if self.end is not None:
                raise self.end.with_traceback(None)
            since = self._since if self._head is not None else trio.current_time()
            with trio.move_on_at(since + FRAME_STALL) as deadline:
                await self._wait()
            if deadline.cancelled_caught and self._head is not None and not self._frames:
                if trio.current_time() >= self._since + FRAME_STALL:
                    if self._got - self._mark < FRAME_PROGRESS:
                        raise trio.TooSlowError
                    self._look()
        head, body = self._frames.popleft()
        self._handed_out = body
        self._change(-len(body) - FRAME_OVERHEAD)
        if self._frames:
            self._settle(len(head) + len(body))
        else:  # what follows may have been held up by us: its time runs from now
            self._look()
            self._settle()
        return head, body
