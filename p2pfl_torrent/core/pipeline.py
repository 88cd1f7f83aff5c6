"""The pipeline to one holder: open requests, measured rate, how much may be in flight."""

from __future__ import annotations

from dataclasses import dataclass

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.messages import MAX_REQUEST_BYTES
from p2pfl_torrent.core.peers import PeerId

Key = tuple[UpdateId, int]
"""An update's chunk."""

FIRST_RATE = 16_000.0  # bytes per second assumed of an unmeasured holder: 128 kbit/s
RATE_WEIGHT = 0.3  # of a new sample: follows a change within a few pieces
SAMPLE_SECONDS = 0.01  # pieces that one read brings together say nothing about the link's rate
OVERDUE_FLOOR = 0.25  # seconds; below that a hiccup of the scheduler looks like a slow holder


@dataclass(frozen=True, slots=True)
class PickerPolicy:
    """Local settings.

    Attributes:
        selection: "rarest_first" (turning to importance x age by the pressure), "importance"
            (that alone) or "random".
        active_requests: open requests per holder (the seed's active pool).
        pending_chunks: chunks begun at once (the seed's pending pool).
        endgame_holders: holders asked for the same blocks when one of them is overdue.
        target_seconds: of a holder's rate that may be in flight.
        request_seconds: of a holder's rate that one request asks for; a fast link asks for a whole
            chunk in one frame, a slow one for one block.
        first_bytes: in flight before a rate is known: half a second of 1 Mbit/s.
        sample: chunks compared per pick.
        noise: of the score, so that peers with equal views differ.
        random_first: chunks picked at random at first, to have something to offer soon.
        patience: a request is given up after this many times its expected time, and
        patience_floor: seconds at least; a busy holder's queue is not its fault.
        overdue: times its expected time after which the endgame asks another holder too.
        owed_answers: requests given up that a holder has not answered all the same; with more than
            these it is asked nothing.
    """

    selection: str = "rarest_first"
    active_requests: int = 10
    pending_chunks: int = 20
    endgame_holders: int = 2
    target_seconds: float = 1.0
    request_seconds: float = 0.25
    first_bytes: int = 64 << 10
    sample: int = 48
    noise: float = 0.05
    random_first: int = 2
    patience: float = 6.0
    patience_floor: float = 5.0
    overdue: float = 3.0
    owed_answers: int = 64


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """Blocks asked of one holder."""

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


class Pipeline:
    """Requests to one holder, in the order asked.

    Attributes:
        open: by number, requests that wait for their answer.
        abandoned: requests given up that still owe an answer; a late piece is welcome.
        rate: measured, in bytes per second; None before the first sample.
    """

    __slots__ = (
        "_bytes",
        "_limit",
        "_next_number",
        "_policy",
        "_seconds",
        "_since",
        "abandoned",
        "in_flight",
        "open",
        "peer",
        "rate",
    )

    def __init__(self, peer: PeerId, policy: PickerPolicy) -> None:
        self.peer = peer
        self.open: dict[int, BlockRequest] = {}
        self.abandoned: dict[int, BlockRequest] = {}
        self.in_flight = 0
        self.rate: float | None = None
        self._policy = policy
        self._limit = policy.active_requests
        self._next_number = 0
        self._since = 0.0  # the last answer, or when the pipeline ceased to be empty
        self._bytes = 0
        self._seconds = 0.0

    @property
    def has_room(self) -> bool:
        """Whether one more request may be sent."""
        if not self.open:
            return len(self.abandoned) < self._policy.owed_answers
        return (
            len(self.open) < self._limit
            and self.in_flight < self._window()
            and len(self.abandoned) < self._policy.owed_answers
        )

    def _window(self) -> float:
        if self.rate is None:
            return self._policy.first_bytes
        return max(self._policy.first_bytes / 4, self.rate * self._policy.target_seconds)

    @property
    def max_request_bytes(self) -> int:
        """What one request may ask for."""
        rate = self.rate if self.rate is not None else FIRST_RATE
        return min(MAX_REQUEST_BYTES, int(rate * self._policy.request_seconds))

    def ask(self, key: Key, block: int, count: int, size: int, now: float) -> BlockRequest:
        """Open a request."""
        rate = self.rate if self.rate is not None else FIRST_RATE
        expected = (self.in_flight + size) / rate
        request = BlockRequest(
            self.peer, self._next_number, *key, block, count, size, now, expected
        )
        if not self.open:
            self._since = now
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
        if self.open:
            self._measure(size, now)
        self.abandoned.pop(number, None)
        return request

    def _measure(self, size: int, now: float) -> None:
        self._bytes += size
        self._seconds += now - self._since
        self._since = now
        if self._seconds < SAMPLE_SECONDS:
            return
        sample = self._bytes / self._seconds
        self.rate = sample if self.rate is None else self.rate + RATE_WEIGHT * (sample - self.rate)
        self._bytes, self._seconds = 0, 0.0

    def refused(self, number: int) -> BlockRequest | None:
        """The open request that a reject answers; None if it was abandoned.

        Raises:
            RemoteProtocolError: never asked for, or answered before.
        """
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
        """When a request has taken far too long."""
        # A holder that is answering others of ours in order is not late with this one.
        since = max(request.sent_at, self._since)
        return since + max(self._policy.patience_floor, self._policy.patience * request.expected)

    def overdue_at(self, request: BlockRequest) -> float:
        """When another holder may be asked for the same."""
        return request.sent_at + max(OVERDUE_FLOOR, self._policy.overdue * request.expected)
