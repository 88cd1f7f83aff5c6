"""What a peer tells its user: round reports, statistics snapshots and typed events.

User interfaces, logs and metrics are built on these alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from p2pfl_torrent.core.peers import PeerId

UNDERWAY = "underway"  # how a round is "closed" whose exchange goes on while the next is trained


@dataclass(frozen=True, slots=True)
class OwnerReport:
    """What became of one owner's update in one round.

    Attributes:
        trained_round: the round it was trained in; less than the report's when it came late.
        num_samples: its weight before any discount.
        weight: its weight in the average: num_samples times the staleness discount.
        chunks: chunks of it that were counted fresh.
        filled: chunks for which the owner's last received one stood in.
        total: chunks of an update.
        status: "complete", "partial", "late" (counted in this round though trained in an earlier
            one), "missing" (a live member's that did not come), "dead" (its owner died first),
            "dropped" (older than max_staleness), "refused" (its values could not be averaged) or
            "another base" (a change of weights that this peer does not have).
        critical: share of its critical chunks, those its owner ranked highest, that were here at
            the closing, 0-1; ``bittorrent.critical_share`` says how many these are.
    """

    owner: PeerId
    trained_round: int
    num_samples: int
    weight: float
    chunks: int
    filled: int
    total: int
    status: str
    critical: float

    @property
    def completeness(self) -> float:
        """Share of its chunks that were counted fresh, 0-1."""
        return self.chunks / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What one ``exchange`` did.

    Attributes:
        round: the round that was closed.
        next_round: the round the model is now the start of; more than round + 1 after catching up.
        closed_by: "complete", "settled" (no neighbour has anything that is missing), "deadline"
            (the window is over, or no missing chunk could come before its end), "late" (this peer
            missed the round and caught up), "solo" (too few members; nothing merged) or "underway"
            (``federate.overlap``: published, and reported by the next call).
        members: live members at the closing, this peer included.
        owners: one entry per update known, owners in canonical order, this peer's own included.
        completeness: verified bytes over announced bytes, own update excluded, 0-1.
        bytes_payload: verified block bytes received for this round.
        bytes_duplicate: block bytes received more than once.
        bytes_uploaded: block bytes served during this round.
        seconds: from the call of exchange to the aggregate.
        exchange_seconds: the part of it before the closing.
        aggregate_seconds: the part of it spent averaging.
        model_hash: hex model_hash of the aggregate, exchanged tensors only.
        importance_method: by which this peer's update was ranked; empty where none was: a round
            that was solo or late, or one whose update is from before a restart.
        agreement: share of the others' updates of this round that were trained from the same start
            weights as ours; None where there was none.
        extended: whether the window was extended to reach min_completion_ratio.
        below_min_completion: whether it was not reached all the same.
        viable: whether the critical chunks of the updates of a quorum of members, this one
            included, were here at the closing; such a round is not extended.
        late: this peer's own update missed the round; it goes into a later one, discounted, or is
            reported there as dropped.
        attested: after catching up, whether a quorum attested the state taken; None otherwise.
        loss_before, accuracy_before, loss_after, accuracy_after: of ``evaluate``, before and after
            merging, where one was given.
        metrics: what the caller of exchange handed in.
    """

    round: int
    next_round: int
    closed_by: str
    members: int
    owners: tuple[OwnerReport, ...]
    completeness: float
    bytes_payload: int
    bytes_duplicate: int
    bytes_uploaded: int
    seconds: float
    exchange_seconds: float
    aggregate_seconds: float
    model_hash: str
    agreement: float | None = None
    extended: bool = False
    below_min_completion: bool = False
    viable: bool = False
    importance_method: str = ""
    late: bool = False
    attested: bool | None = None
    loss_before: float | None = None
    accuracy_before: float | None = None
    loss_after: float | None = None
    accuracy_after: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def solo(self) -> bool:
        """Whether there were too few members and nothing was merged."""
        return self.closed_by == "solo"

    @property
    def underway(self) -> bool:
        """Whether the round's exchange still goes on: nothing is known of it yet."""
        return self.closed_by == UNDERWAY


def report_without_merging(
    *,
    round: int,
    next_round: int,
    closed_by: str,
    members: int,
    seconds: float,
    model_hash: str,
    metrics: Mapping[str, float],
    exchange_seconds: float = 0.0,
    aggregate_seconds: float = 0.0,
    late: bool = False,
    attested: bool | None = None,
) -> RoundReport:
    """Of a call in which nothing was averaged here: a solo or missed round, or one under way."""
    return RoundReport(
        round=round,
        next_round=next_round,
        closed_by=closed_by,
        members=members,
        owners=(),
        completeness=0.0,
        bytes_payload=0,
        bytes_duplicate=0,
        bytes_uploaded=0,
        seconds=seconds,
        exchange_seconds=exchange_seconds,
        aggregate_seconds=aggregate_seconds,
        model_hash=model_hash,
        late=late,
        attested=attested,
        metrics=dict(metrics),
    )


@dataclass(frozen=True, slots=True)
class UpdateProgress:
    """How much of one update is here.

    Attributes:
        chunks: one character a chunk: "#" held, "+" begun, "." missing.
        available: for each chunk, how many neighbours announced it.
    """

    owner: PeerId
    round: int
    chunks: str
    available: tuple[int, ...]
    bytes_verified: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class NeighbourStatistics:
    """One edge as this peer sees it; rates in bytes per second, round trip in seconds."""

    peer: PeerId
    connected: bool
    alive: bool
    round: int
    rate_down: float
    rate_up: float
    bytes_down: int
    bytes_up: int
    requests_open: int
    uploads_queued: int
    round_trip: float | None


@dataclass(frozen=True, slots=True)
class PeerStatistics:
    """An immutable snapshot of a peer, cheap to take at any time.

    Attributes:
        phase: "joining", "training", "exchanging", "aggregating", "seeding" or "stopped".
        deadline_in: seconds to the round's current deadline, None where none runs yet.
        members: live members, this peer included; ``dead`` those given up.
        progress: updates of the current round and late ones, owners in canonical order.
    """

    peer: PeerId
    swarm: str
    round: int
    total_rounds: int
    phase: str
    deadline_in: float | None
    members: tuple[PeerId, ...]
    dead: tuple[PeerId, ...]
    topology: str
    neighbours: tuple[NeighbourStatistics, ...]
    progress: tuple[UpdateProgress, ...]
    completeness: float
    bytes_down: int
    bytes_up: int
    bytes_duplicate: int
    bytes_control_down: int
    bytes_control_up: int
    requests_sent: int
    blocks_refused: int


@dataclass(frozen=True, slots=True)
class Joined:
    """This peer has found the swarm. ``members`` counts those known at the time."""

    swarm: str
    peer: PeerId
    round: int
    members: int


@dataclass(frozen=True, slots=True)
class MemberChanged:
    """A member became "joined", "suspected", "dead", "left" or "returned" in this peer's view."""

    member: PeerId
    change: str
    witnesses: tuple[PeerId, ...] = ()


@dataclass(frozen=True, slots=True)
class EdgeChanged:
    """An edge of the overlay became "open" or "closed"; seconds from the first dial to open."""

    neighbour: PeerId
    change: str
    reason: str = ""
    seconds: float | None = None
    address: str = ""


@dataclass(frozen=True, slots=True)
class RoundStarted:
    """Training of a round may begin; its start weights have this hex hash."""

    round: int
    model_hash: str
    members: int


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """What the user's loop reported through ``Peer.progress``."""

    round: int
    done: int
    total: int
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class ImportanceSwitched:
    """From this round on, adaptive importance scores updates by another method."""

    round: int
    method: str
    why: str


@dataclass(frozen=True, slots=True)
class ManifestSeen:
    """An owner's update for a round became known."""

    owner: PeerId
    round: int
    via: PeerId
    num_samples: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class ChunkReceived:
    """A chunk is here, verified; ``source`` delivered its last block."""

    owner: PeerId
    round: int
    chunk: int
    size: int
    rank: int
    source: PeerId


@dataclass(frozen=True, slots=True)
class BlockRefused:
    """A block that did not match its owner's hash was thrown away and its sender dropped."""

    sender: PeerId
    owner: PeerId
    round: int
    chunk: int
    block: int


@dataclass(frozen=True, slots=True)
class PeerDropped:
    """A peer broke the protocol (or was refused) and is no longer talked to for a while."""

    peer: PeerId
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class DeadlineSet:
    """A round's exchange deadline was set or moved: "quorum", "train_timeout" or "extension"."""

    round: int
    in_seconds: float
    why: str


@dataclass(frozen=True, slots=True)
class RoundClosed:
    """A round was closed here; the report follows when the aggregate is made."""

    round: int
    closed_by: str
    completeness: float


@dataclass(frozen=True, slots=True)
class RoundFinished:
    """The aggregate of a round is in the model."""

    report: RoundReport


@dataclass(frozen=True, slots=True)
class Left:
    """This peer has stopped; ``reason`` is "finished" or what went wrong."""

    reason: str


PeerEvent = (
    Joined
    | MemberChanged
    | EdgeChanged
    | RoundStarted
    | TrainingProgress
    | ImportanceSwitched
    | ManifestSeen
    | ChunkReceived
    | BlockRefused
    | PeerDropped
    | DeadlineSet
    | RoundClosed
    | RoundFinished
    | Left
)
"""Everything a peer reports; ``events.jsonl`` holds one a line, its type under ``event``."""
