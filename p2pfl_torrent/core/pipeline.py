"""The pipeline to one holder: open requests, measured rate, how much may be in flight."""

from __future__ import annotations

import math
from dataclasses import dataclass

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.messages import MAX_REQUEST_BYTES
from p2pfl_torrent.core.peers import PeerId

Key = tuple[UpdateId, int]
"""An update's chunk."""

FIRST_RATE = 16_000.0  # bytes per second assumed of an unmeasured holder: 128 kbit/s
RATE_SECONDS = (
    1.0  # over which a rate is smoothed; by time, or bursts would outweigh the stalls between
)
SAMPLE_SECONDS = 0.01  # pieces that one read brings together say nothing about the link's rate
HICCUP = 0.25  # seconds; less looks like a slow holder where only the scheduler was
LAG_WEIGHT = 0.25  # of a new sample: RFC 6298's for a deviation


@dataclass(frozen=True, slots=True)
class PickerPolicy:
    """Local settings.

    Attributes:
        selection: "rarest_first" (turning to importance x age by the pressure), "importance"
            (that alone) or "random".
        ages: whether importance is multiplied by age; without, it is what an experiment compares
            with.
        active_requests: open requests per holder (the seed's active pool).
        pending_chunks: chunks begun at once (the seed's pending pool).
        endgame_holders: holders asked for the same blocks when one of them is slow or late.
        target_seconds: of a holder's rate that may be in flight at most.
        queue_seconds: of a holder's rate in flight above what its lag hides, or else two requests:
            enough that it never idles, and no more, since what is asked for can no more be asked
            of whoever turns out to be sooner.
        request_seconds: of a holder's rate that one request asks for; a fast link asks for a whole
            chunk in one frame, a slow one for one block.
        dry_seconds: with less than this of its rate in flight above what its lag hides a holder
            would soon idle, so it may begin a chunk above ``pending_chunks``.
        first_bytes: in flight before a rate is known: half a second of 1 Mbit/s.
        look: chunks looked at when others will bring the first ones sooner: a slow holder can
            afford that, and is better off with what only it has.
        noise: how much the stagger weighs against rarity and merit: two ranks among twenty chunks,
            and less than one holder more or less while a chunk is rare.
        random_first: chunks picked at random at first, to have something to offer soon.
        patience: a request is given up after this many times its expected time, and
        patience_floor: seconds at least; a busy holder's queue is not its fault.
        owed_answers: requests given up that a holder has not answered all the same; with more than
            these it is asked nothing.
    """

    selection: str = "rarest_first"
    ages: bool = True
    active_requests: int = 10
    pending_chunks: int = 20
    endgame_holders: int = 2
    target_seconds: float = 1.0
    queue_seconds: float = 0.25
    request_seconds: float = 0.5
    dry_seconds: float = 0.05
    first_bytes: int = 64 << 10
    look: int = 8
    noise: float = 0.1
    random_first: int = 2
    patience: float = 6.0
    patience_floor: float = 5.0
    owed_answers: int = 64


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """Blocks asked of one holder.

    Attributes:
        number: unique among the requests of its holder.
        size: bytes of the ``count`` blocks from ``block`` on.
        expected: seconds from ``sent_at`` after which its answer was expected then.
    """

    peer: PeerId
    number: int
    update: UpdateId
    chunk: int
    block: int
    count: int
    size: int
    sent_at: float
    expected: float

    @property
    def key(self) -> Key:
        """The chunk it is part of."""
        return self.update, self.chunk

    @property
    def blocks(self) -> range:
        """The blocks it asks for."""
        return range(self.block, self.block + self.count)

    @property
    def due(self) -> float:
        """When its answer was expected."""
        return self.sent_at + self.expected


class Pipeline:
    """Requests to one holder, in the order asked.

    Attributes:
        open: by number, requests that wait for their answer.
        abandoned: requests given up that still owe an answer; a late piece is welcome.
        rate: measured, in bytes per second; None before the first sample.
        lag: smoothed seconds by which answers come later than the rate alone explains: round trip,
            jitter, other fetchers' turns.
        round_trip: the shortest that was measured; 0 before the first. A rate is counted from when
            the first byte could be here, or a long way would look like a thin one.
        expired: of the abandoned, those that were late beyond patience.
    """

    __slots__ = (
        "_bytes",
        "_limit",
        "_next_number",
        "_policy",
        "_seconds",
        "_since",
        "abandoned",
        "expired",
        "in_flight",
        "lag",
        "open",
        "peer",
        "rate",
        "round_trip",
    )

    def __init__(self, peer: PeerId, policy: PickerPolicy) -> None:
        self.peer = peer
        self.open: dict[int, BlockRequest] = {}
        self.abandoned: dict[int, BlockRequest] = {}
        self.in_flight = 0
        self.rate: float | None = None
        self.lag = 0.0
        self.round_trip = 0.0
        self.expired: set[int] = set()
        self._policy = policy
        self._limit = policy.active_requests
        self._next_number = 0
        # The last piece, or when the holder began to owe any: a piece of an abandoned request takes
        # its time on the link like any other.
        self._since = 0.0
        self._bytes = 0
        self._seconds = 0.0

    @property
    def usable(self) -> bool:
        """Whether the holder is asked at all: not while it owes answers to what expired."""
        return not self.expired and len(self.abandoned) < self._policy.owed_answers

    def room(self, block_size: int, largest: int) -> int:
        """How many blocks the next request may ask for; 0 for none.

        Args:
            largest: bytes that a chunk has at most, which may be less than a block.
        """
        if not self.usable or (self.open and len(self.open) >= self._limit):
            return 0
        blocks = max(1, self.max_request_bytes // block_size)
        if not self.open:
            return blocks
        # A whole request or none: what is left of a window would make many small ones.
        size = min(blocks * block_size, largest)
        if self.rate is None:
            fits = self.in_flight + size <= self._policy.first_bytes
        else:
            enough = max(size, self.rate * (self._policy.queue_seconds + self.lag))
            most = self.rate * self._policy.target_seconds
            fits = self.in_flight <= enough and self.in_flight + size <= most
        return blocks if fits else 0

    @property
    def dry(self) -> bool:
        """Whether so little is in flight that the holder would idle before the next request."""
        ahead = self.lag + self._policy.dry_seconds
        return not self.open or self.in_flight < self._rate() * ahead

    def _rate(self) -> float:
        return self.rate if self.rate is not None else FIRST_RATE

    def delay(self, nbytes: int, now: float) -> float:
        """Seconds until bytes asked for now are expected, behind all that is in flight."""
        return self.lag + (self.in_flight + nbytes) / self._rate() + self.overdue(now)

    @property
    def late_from(self) -> float:
        """From when on its oldest open request is late; infinite with none open.

        Of an unmeasured holder nothing can be expected but that it takes as long again as it took
        already: it is late from the start, and twice as late later.
        """
        for request in self.open.values():
            return request.due if self.rate is not None else request.sent_at
        return math.inf

    def overdue(self, now: float) -> float:
        """Seconds by which its oldest answer is late."""
        return max(0.0, now - self.late_from)

    def remaining(self, request: BlockRequest, now: float) -> float:
        """Seconds until an open request is expected; what is late, as late again."""
        due = request.due if self.rate is not None else now
        return max(0.0, due - now) + self.overdue(now)

    def longest(self, now: float) -> float:
        """``remaining`` of the newest open request, which is the last to be answered."""
        for request in reversed(self.open.values()):
            return self.remaining(request, now)
        return 0.0

    @property
    def max_request_bytes(self) -> int:
        """What one request may ask for."""
        return min(MAX_REQUEST_BYTES, int(self._rate() * self._policy.request_seconds))

    def measured(self, round_trip: float) -> None:
        """A ping was answered after so many seconds; behind pieces it takes longer than the way."""
        if not self.round_trip or round_trip < self.round_trip:
            self.round_trip = round_trip
            self.lag = max(self.lag, round_trip)

    def ask(self, key: Key, block: int, count: int, size: int, now: float) -> BlockRequest:
        """Open a request."""
        expected = self.lag + (self.in_flight + size) / self._rate()
        request = BlockRequest(
            self.peer, self._next_number, *key, block, count, size, now, expected
        )
        if not self.open and not self.abandoned:
            self._since = now + self.round_trip
        self._next_number = (self._next_number + 1) & 0xFFFFFFFF
        self.open[request.number] = request
        self.in_flight += size
        return request

    def close(self, request: BlockRequest) -> None:
        """A request has its answer."""
        del self.open[request.number]
        self.in_flight -= request.size

    def abandon(self, request: BlockRequest) -> None:
        """Give a request up; its answer is still due."""
        self.close(request)
        self.abandoned[request.number] = request

    def expire(self, request: BlockRequest) -> None:
        """Give a request up that was late beyond patience: nothing more until it is answered."""
        self.abandon(request)
        self.expired.add(request.number)

    def piece(self, number: int, size: int, now: float) -> BlockRequest:
        """Match a piece to its request, open or abandoned, and measure.

        Raises:
            RemoteProtocolError: never asked for, answered before, or of another size.
        """
        request = self.open.get(number) or self.abandoned.get(number)
        if request is None:
            raise RemoteProtocolError(f"piece {number} was never asked for", self.peer)
        if size != request.size:
            raise RemoteProtocolError(f"piece of {size} bytes instead of {request.size}", self.peer)
        if self.rate is not None:
            late = max(0.0, now - request.due + self.lag)
            self.lag += LAG_WEIGHT * (late - self.lag)
            self.lag = max(self.lag, self.round_trip)
        self._measure(size, now)
        self.abandoned.pop(number, None)
        self.expired.discard(number)
        return request

    def _measure(self, size: int, now: float) -> None:
        self._bytes += size
        self._seconds += max(0.0, now - self._since)
        self._since = now
        if self._seconds < SAMPLE_SECONDS:
            return
        sample = self._bytes / self._seconds
        if self.rate is None:
            self.rate = sample
        else:
            weight = 1.0 - math.exp(-self._seconds / RATE_SECONDS)
            self.rate += weight * (sample - self.rate)
        self._bytes, self._seconds = 0, 0.0

    def refused(self, number: int) -> BlockRequest | None:
        """The open request that a reject answers; None if it was abandoned.

        Raises:
            RemoteProtocolError: never asked for, or answered before.
        """
        self.expired.discard(number)
        if self.abandoned.pop(number, None) is not None:
            return None
        request = self.open.get(number)
        if request is None:
            raise RemoteProtocolError(f"reject of {number}, which was never asked for", self.peer)
        return request

    def narrow(self) -> bool:
        """The holder queues no more than are open now; False if it queues nothing at all."""
        self._limit = max(1, len(self.open))
        return bool(self.open)

    def slow_down(self) -> None:
        """A request was given up: the holder is slower than measured."""
        if self.rate is not None:
            self.rate /= 2

    def gives_up_at(self, request: BlockRequest) -> float:
        """When an open request, the oldest, has taken far too long."""
        # A holder that is answering others of ours in order is not late with this one.
        since = max(request.sent_at, self._since)
        return since + max(self._policy.patience_floor, self._policy.patience * request.expected)
