"""When to compare statements with somebody, and with whom.

Mostly a neighbour, whose connection is open; now and then a bootstrap peer, so that newcomers find
the swarm there; and now and then anybody who has not left, the dead among them, because two halves
of a swarm that each gave up the other find together by nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from p2pfl_torrent.core.liveness import LivenessPolicy
from p2pfl_torrent.core.peers import PeerId

TURNS = 5  # of these encounters, one is with a bootstrap peer and one with anybody
RENDEZVOUS_TURN, ANYBODY_TURN = 3, 0

Address = tuple[PeerId, tuple[str, ...]]


class Encounters:
    """The schedule of one peer's periodic syncs."""

    def __init__(
        self,
        policy: LivenessPolicy,
        rendezvous: Sequence[Address],
        rng: random.Random,
        now: float,
    ) -> None:
        self._policy = policy
        self._rendezvous = list(rendezvous)
        self._rng = rng
        self._next = now
        self._turn = 0

    def hurry(self, now: float) -> None:
        """The next encounter is due now."""
        self._next = now

    def due(self, now: float, *, started: bool) -> bool:
        """Whether it is time; the next time is set then."""
        if now < self._next:
            return False
        pause = self._policy.sync_started if started else self._policy.sync_joining
        self._next = now + pause * self._rng.uniform(0.75, 1.25)  # so that swarms do not pulse
        self._turn += 1
        return True

    def choose(
        self,
        *,
        near: Sequence[PeerId],
        alive: Sequence[PeerId],
        anybody: Sequence[PeerId],
        started: bool,
    ) -> Address | PeerId | None:
        """Whom to meet: a bootstrap peer with its addresses, or a peer whose record has them."""
        if self._rendezvous and (
            self._turn % TURNS == RENDEZVOUS_TURN or not (started or self._turn % 2 == 0)
        ):
            return self._rng.choice(self._rendezvous)
        if self._turn % TURNS == ANYBODY_TURN and anybody:
            return self._rng.choice(anybody)
        some = near or alive or anybody
        if some:
            return self._rng.choice(some)
        return self._rng.choice(self._rendezvous) if self._rendezvous else None

    def sample(self, peers: Sequence[PeerId], count: int) -> list[PeerId]:
        """Up to ``count`` of the peers, drawn."""
        return self._rng.sample(peers, min(count, len(peers)))
