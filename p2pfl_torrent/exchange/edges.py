"""One edge of the overlay: two streams to a neighbour, what waits to be sent, what was counted."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import trio

from p2pfl_torrent.core.messages import Message, Piece
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.exchange.ports import Channel

MAX_OUTBOX = 8192  # messages; more waiting means that the other side does not read
MAX_WAITING = 64  # answers, of which a correct neighbour waits for some 30; each may be a manifest
MAX_TOGETHER = 32  # messages in one write: more gain nothing, and wait for each other
RATE_HORIZON = 2.0  # seconds over which a rate is averaged: smooth to look at, quick to follow
RTT_WEIGHT = 0.125  # of a new sample, RFC 6298


class OutboxFullError(Exception):
    """The neighbour does not take what is sent to it."""


class Outbox:
    """Messages waiting for one stream's writer; bounded; put never blocks."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._wake = trio.Event()
        self._has_room = trio.Event()

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Message) -> None:
        """Queue a message; OutboxFullError when the neighbour does not read."""
        if len(self._messages) >= MAX_OUTBOX:
            raise OutboxFullError
        self._messages.append(message)
        self._wake.set()

    def wake(self) -> None:
        """Let the writer look again, though no message was put."""
        self._wake.set()

    def take(self) -> Message | None:
        """The next message, if there is one."""
        if not self._messages:
            return None
        message = self._messages.popleft()
        if len(self._messages) == MAX_WAITING - 1:
            self._has_room.set()
            self._has_room = trio.Event()
        return message

    def take_some(self) -> list[Message]:
        """The next messages, as many as may share a write."""
        taken: list[Message] = []
        while len(taken) < MAX_TOGETHER and (message := self.take()) is not None:
            taken.append(message)
        return taken

    async def room(self) -> None:
        """Until fewer than MAX_WAITING messages wait."""
        while len(self._messages) >= MAX_WAITING:
            await self._has_room.wait()

    async def wait(self) -> None:
        """Until a put or a wake since the last wait."""
        await self._wake.wait()
        self._wake = trio.Event()


@dataclass(slots=True)
class Traffic:
    """Bytes one way over one edge, control and payload, with a rate in bytes per second."""

    payload: int = 0
    control: int = 0
    _window: float = 0.0
    _since: float = 0.0

    def add(self, message: Message, size: int, now: float) -> None:
        """A message of that many bytes on the stream went by."""
        data = len(message.data) if isinstance(message, Piece) else 0
        self.payload += data
        self.control += size - data
        self._window = self._decayed(now) + size
        self._since = now

    def include(self, other: Traffic) -> None:
        """Count another edge's bytes as well."""
        self.payload += other.payload
        self.control += other.control

    def rate(self, now: float) -> float:
        """Bytes per second over about the last RATE_HORIZON seconds."""
        return self._decayed(now) / RATE_HORIZON

    def _decayed(self, now: float) -> float:
        return self._window * max(0.0, 1.0 - (now - self._since) / RATE_HORIZON)


@dataclass(slots=True)
class Lane:
    """One direction of asking: a stream, its outbox and the scope that ends it."""

    channel: Channel
    outbox: Outbox = field(default_factory=Outbox)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    wanted: bool = True


@dataclass(slots=True)
class Edge:
    """What is known of the way to one neighbour.

    Attributes:
        ask: our stream, on which we fetch; None while it is not open.
        answer: the neighbour's stream, on which it fetches from us.
        round_trip: smoothed, in seconds, of pings on our stream.
    """

    peer: PeerId
    ask: Lane | None = None
    answer: Lane | None = None
    down: Traffic = field(default_factory=Traffic)
    up: Traffic = field(default_factory=Traffic)
    heard_at: float = -1e9
    round_trip: float | None = None
    round: int = 0
    answered: trio.Event = field(default_factory=trio.Event)

    def measured(self, sample: float) -> None:
        """A ping was answered after that many seconds."""
        if self.round_trip is None:
            self.round_trip = sample
        else:
            self.round_trip += RTT_WEIGHT * (sample - self.round_trip)

    @property
    def open(self) -> bool:
        """Whether either side's stream is there."""
        return self.ask is not None or self.answer is not None
