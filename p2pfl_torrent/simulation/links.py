"""What a simulated link does with a piece: when its writer is free again, when it arrives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from p2pfl_torrent.core.peers import PeerId


class Links(Protocol):
    """The ways between peers; questions, announcements and gossip take the latency alone."""

    def latency(self, sender: PeerId, receiver: PeerId) -> float:
        """Seconds that the first byte takes."""
        ...

    def carry(self, sender: PeerId, receiver: PeerId, size: int, now: float) -> tuple[float, float]:
        """Take a piece of ``size`` bytes: (time its writer is free, time it has arrived)."""
        ...


@dataclass(frozen=True, slots=True)
class EqualLinks:
    """Every pair of peers has a way of its own, at one rate.

    Attributes:
        delay: seconds.
        rate: bytes per second.
    """

    delay: float
    rate: float

    def latency(self, sender: PeerId, receiver: PeerId) -> float:
        """Seconds that the first byte takes."""
        return self.delay

    def carry(self, sender: PeerId, receiver: PeerId, size: int, now: float) -> tuple[float, float]:
        """Take a piece of ``size`` bytes: (time its writer is free, time it has arrived)."""
        sent = now + size / self.rate
        return sent, sent + self.delay


@dataclass(frozen=True, slots=True)
class Link:
    """What one peer is connected by.

    Attributes:
        up, down: bytes per second.
        delay: seconds, each way; a piece takes the sender's and the receiver's.
    """

    up: float
    down: float
    delay: float = 0.01


class SharedLinks:
    """Each peer has one uplink and one downlink, which all its neighbours share.

    Pieces go through a link one after the other in the order in which they were written, and are
    forwarded as they come: one between two idle links takes its time on the slower of them. A
    writer is busy until its piece is through both, as behind a transport whose window is full.
    """

    def __init__(self, links: Mapping[PeerId, Link]) -> None:
        self.links = dict(links)
        self._up: dict[PeerId, float] = {}
        self._down: dict[PeerId, float] = {}

    def latency(self, sender: PeerId, receiver: PeerId) -> float:
        """Seconds that the first byte takes."""
        return self.links[sender].delay + self.links[receiver].delay

    def carry(self, sender: PeerId, receiver: PeerId, size: int, now: float) -> tuple[float, float]:
        """Take a piece of ``size`` bytes: (time its writer is free, time it has arrived)."""
        delay = self.latency(sender, receiver)
        begins = max(now, self._up.get(sender, 0.0))
        sent = begins + size / self.links[sender].up
        taken = (
            max(begins + delay, self._down.get(receiver, 0.0)) + size / self.links[receiver].down
        )
        arrived = max(taken, sent + delay)
        self._up[sender], self._down[receiver] = sent, arrived
        return max(sent, arrived - delay), arrived
