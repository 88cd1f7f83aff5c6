"""What the membership machine answers."""

from __future__ import annotations

from dataclasses import dataclass

from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import MemberChanged


@dataclass(frozen=True, slots=True)
class Member:
    """A live member, as the roster lists it; joined_round is the first it is waited for in."""

    peer: PeerId
    addrs: tuple[str, ...]
    joined_round: int


@dataclass(frozen=True, slots=True)
class Gossip:
    """Publish this batch of statements to the swarm."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask a peer whether it lives, on a new stream; answer with ``probed``.

    Attributes:
        timeout: seconds after which it did not answer.
        news: what is said against it, to be sent along so that it can refute at once.
    """

    peer: PeerId
    addrs: tuple[str, ...]
    timeout: float
    news: bytes


@dataclass(frozen=True, slots=True)
class SyncWith:
    """Compare statements with a peer, and send it ``news`` first; give up after ``timeout``."""

    peer: PeerId
    addrs: tuple[str, ...]
    timeout: float
    news: bytes = b""


@dataclass(frozen=True, slots=True)
class RosterChanged:
    """The live members, their order or their addresses changed: draw the overlay anew."""


@dataclass(frozen=True, slots=True)
class Changed:
    """Tell the user."""

    event: MemberChanged


MembershipEffect = Gossip | Probe | SyncWith | RosterChanged | Changed
