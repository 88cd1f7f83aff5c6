"""What a peer shows of itself: snapshots, events and round reports, by the names of the core.

User interfaces and logs import from here; of the machines behind the numbers they know nothing.
"""

from p2pfl_torrent.core.reports import (
    BlockRefused,
    ChunkReceived,
    DeadlineSet,
    EdgeChanged,
    ImportanceSwitched,
    Joined,
    Left,
    ManifestSeen,
    MemberChanged,
    NeighbourStatistics,
    OwnerReport,
    PeerDropped,
    PeerEvent,
    PeerStatistics,
    RoundClosed,
    RoundFinished,
    RoundReport,
    RoundStarted,
    TrainingProgress,
    UpdateProgress,
)

__all__ = [
    "BlockRefused",
    "ChunkReceived",
    "DeadlineSet",
    "EdgeChanged",
    "ImportanceSwitched",
    "Joined",
    "Left",
    "ManifestSeen",
    "MemberChanged",
    "NeighbourStatistics",
    "OwnerReport",
    "PeerDropped",
    "PeerEvent",
    "PeerStatistics",
    "RoundClosed",
    "RoundFinished",
    "RoundReport",
    "RoundStarted",
    "TrainingProgress",
    "UpdateProgress",
]
