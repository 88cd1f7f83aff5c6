"""The clock of one round: when its exchange window opens, ends and is extended.

No synchronised clocks: the window opens for a peer when it has heard that a quorum of the live
members have published, or when its own training deadline passes. A single manifest, early or
hostile, moves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Set
from dataclasses import dataclass

from p2pfl_torrent.core.genesis import RoundTerms
from p2pfl_torrent.core.peers import PeerId

EXTENSION_SHARE = 0.5  # of the window: enough for what is nearly there, no second full wait
MIN_QUORUM = 2  # one manifest, even one's own, never starts a clock


@dataclass(frozen=True, slots=True)
class DeadlineChange:
    """The exchange deadline was set or moved, and why: quorum, train_timeout or extension."""

    deadline: float
    why: str


def quorum(terms: RoundTerms, members: int) -> int:
    """How many of that many members make a quorum."""
    return max(MIN_QUORUM, math.ceil(terms.quorum * members))


class Frontier:
    """How far the other members are, as headers say that each has signed for itself.

    Nobody publishes for a round before it has closed all earlier ones. So who hears of a round
    after its next one has been left behind, and the others will not come back for it.
    """

    def __init__(self) -> None:
        self._newest: dict[PeerId, int] = {}

    def seen(self, owner: PeerId, round: int) -> None:
        """A checked header of a member."""
        self._newest[owner] = max(round, self._newest.get(owner, 0))

    def has_passed(self, round: int, others: Collection[PeerId], quorum: int) -> bool:
        """Whether a quorum, or all others where those are fewer, are beyond the next round."""
        beyond = sum(self._newest.get(peer, 0) > round + 1 for peer in others)
        return 0 < min(quorum, len(others)) <= beyond


class RoundClock:
    """Deadlines of one round at one peer, in seconds of the caller's monotonic clock."""

    def __init__(self, terms: RoundTerms, round: int, now: float) -> None:
        self.round = round
        self._terms = terms
        self._train_deadline = now + terms.train_timeout
        self._published: set[PeerId] = set()
        self.deadline: float | None = None
        self.extended = False

    def published(self, owner: PeerId) -> None:
        """A checked manifest of this round by that owner is known."""
        self._published.add(owner)

    def quorum(self, live: int) -> int:
        """How many of that many live members must have published to open the window."""
        return quorum(self._terms, live)

    def advance(self, live: Set[PeerId], now: float) -> DeadlineChange | None:
        """Open the window if it is time; the change, once."""
        if self.deadline is not None:
            return None
        if len(self._published & live) >= self.quorum(len(live)):
            why = "quorum"
        elif now >= self._train_deadline:
            why = "train_timeout"
        else:
            return None
        self.deadline = now + self._terms.exchange_timeout
        return DeadlineChange(self.deadline, why)

    def extension(self) -> float:
        """Seconds by which the window may be extended, once."""
        return self._terms.exchange_timeout * EXTENSION_SHARE

    def extend(self, now: float) -> DeadlineChange:
        """Extend the window from now; at most once a round."""
        if self.extended or self.deadline is None:
            raise AssertionError("a window is extended once, after it opened")
        self.extended = True
        self.deadline = now + self.extension()
        return DeadlineChange(self.deadline, "extension")

    def passed(self, now: float) -> bool:
        """Whether the exchange deadline is over."""
        return self.deadline is not None and now >= self.deadline

    def next_wakeup(self) -> float:
        """When ``advance`` or ``passed`` may change their answer by time alone."""
        return self._train_deadline if self.deadline is None else self.deadline
