"""What the swarm machine is told (stimuli) and what it answers (effects)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.manifest import Manifest, UpdateId
from p2pfl_torrent.core.messages import Message
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import PeerEvent

# --- stimuli ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HolderOpened:
    """Our chunk stream to a peer is open: we may fetch from it."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class HolderClosed:
    """Our chunk stream to a peer is gone."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class FetcherOpened:
    """A peer's chunk stream to us is open: it may fetch from us."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class FetcherClosed:
    """A peer's chunk stream to us is gone."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class FromHolder:
    """A message on our stream: an answer or an announcement."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class FromFetcher:
    """A message on a peer's stream to us: a question."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class ManifestGossip:
    """A manifest (or its header alone) came over pubsub; ``via`` is who signed the envelope."""

    via: PeerId
    data: bytes


@dataclass(frozen=True, slots=True)
class AvailabilityGossip:
    """A neighbour's batched availability came over its topic."""

    peer: PeerId
    data: bytes


@dataclass(frozen=True, slots=True)
class MembersNow:
    """The membership view: live members with the round each is waited for from, and the dead.

    Attributes:
        live: in join order.
    """

    live: Mapping[PeerId, int]
    dead: frozenset[PeerId]


@dataclass(frozen=True, slots=True)
class RoundBegun:
    """Training of a round begins here.

    Attributes:
        forgotten: updates that left the store.
        caught_up: the round's start weights were taken from another peer, not averaged here.
    """

    round: int
    forgotten: tuple[UpdateId, ...] = ()
    caught_up: bool = False


@dataclass(frozen=True, slots=True)
class Restored:
    """An update found in the store at start, with the chunks and blocks that verified."""

    manifest: Manifest
    held: Bitfield
    blocks: Mapping[int, Bitfield]
    counted_in: int | None


@dataclass(frozen=True, slots=True)
class UpdateReady:
    """Our own update is stored, chunk by chunk, and signed; the exchange phase begins."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class CloseLate:
    """Nobody else went on from the round that this peer missed: close it with what is here."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Stimulus = (
    HolderOpened
    | HolderClosed
    | FetcherOpened
    | FetcherClosed
    | FromHolder
    | FromFetcher
    | ManifestGossip
    | AvailabilityGossip
    | MembersNow
    | RoundBegun
    | Restored
    | UpdateReady
    | CloseLate
    | Tick
)

# --- effects ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToHolder:
    """Send on our stream to a peer."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class ToFetcher:
    """Send on a peer's stream to us."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class PublishManifest:
    """Gossip an encoded manifest, or its header where the whole is too long."""

    data: bytes


@dataclass(frozen=True, slots=True)
class PublishAvailability:
    """Gossip our batched availability on our own topic."""

    data: bytes


@dataclass(frozen=True, slots=True)
class StoreManifest:
    """Remember a manifest durably."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class StoreBlocks:
    """Write verified bytes at an offset inside a chunk's file."""

    update: UpdateId
    chunk: int
    offset: int
    data: bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class StoreComplete:
    """Record that a chunk is whole."""

    update: UpdateId
    chunk: int
    source: PeerId


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the edge to a peer that broke the protocol, and refuse it for some seconds."""

    peer: PeerId
    reason: str
    seconds: float


class Fill(NamedTuple):
    """An older update of an owner, whose chunk stands in for a missing one, and its weight."""

    update: UpdateId
    weight: float


@dataclass(frozen=True, slots=True)
class Count:
    """One update's part in an aggregate.

    Attributes:
        weight: num_samples, or what the mode says, times the staleness discount.
        chunks: held chunks, counted fresh.
        fills: missing chunk -> what stands in for it.
        status: as in ``reports.OwnerReport``.
        critical: share of its critical chunks that are held, 0-1.
        wanted: chunks that this peer takes of it, all but in some modes.
    """

    manifest: Manifest
    weight: float
    chunks: tuple[int, ...]
    fills: Mapping[int, Fill]
    status: str
    critical: float
    wanted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CloseRound:
    """The round is over here: aggregate these, then begin the next.

    Attributes:
        closed_by: "complete", "settled", "deadline" or "solo".
        members: live members at this moment.
        missing: live members that were waited for in vain.
        dropped: (owner, round) of updates too late to count.
        viable: as in ``closing.Standing``.
    """

    round: int
    closed_by: str
    members: int
    counts: tuple[Count, ...]
    missing: tuple[PeerId, ...]
    dropped: tuple[tuple[PeerId, int], ...]
    completeness: float
    extended: bool
    below_min_completion: bool
    viable: bool


@dataclass(frozen=True, slots=True)
class MissedRound:
    """The others are done with the round: our update is published late; catch up."""

    round: int


@dataclass(frozen=True, slots=True)
class Emit:
    """Tell the user."""

    event: PeerEvent


Effect = (
    ToHolder
    | ToFetcher
    | PublishManifest
    | PublishAvailability
    | StoreManifest
    | StoreBlocks
    | StoreComplete
    | Drop
    | CloseRound
    | MissedRound
    | Emit
)
