"""Federated learning without a server: updates spread as BitTorrent spreads a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pfl_torrent.config import PeerConfig
    from p2pfl_torrent.core.aggregators import AggregationTerms, Aggregator, register_aggregator
    from p2pfl_torrent.core.errors import ConfigError, GenesisMismatchError, P2PFLError
    from p2pfl_torrent.core.reports import OwnerReport, PeerEvent, PeerStatistics, RoundReport
    from p2pfl_torrent.peer import AsyncPeer, GradientStats, Peer, PeerStoppedError, Scaffold

__version__ = "0.1.0"

__all__ = [
    "AggregationTerms",
    "Aggregator",
    "AsyncPeer",
    "ConfigError",
    "GenesisMismatchError",
    "GradientStats",
    "OwnerReport",
    "P2PFLError",
    "Peer",
    "PeerConfig",
    "PeerEvent",
    "PeerStatistics",
    "PeerStoppedError",
    "RoundReport",
    "Scaffold",
    "register_aggregator",
]


def __getattr__(name: str) -> Any:
    # The peer brings torch and libp2p, seconds to import, the configuration numpy and networkx:
    # only whoever uses them pays for them, and `p2pfl-torrent --help` comes at once.
    home: Any = None
    if name in ("AsyncPeer", "GradientStats", "Peer", "PeerStoppedError", "Scaffold"):
        from p2pfl_torrent import peer as home
    elif name == "PeerConfig":
        from p2pfl_torrent import config as home
    elif name in ("AggregationTerms", "Aggregator", "register_aggregator"):
        from p2pfl_torrent.core import aggregators as home
    elif name in ("ConfigError", "GenesisMismatchError", "P2PFLError"):
        from p2pfl_torrent.core import errors as home
    elif name in ("OwnerReport", "PeerEvent", "PeerStatistics", "RoundReport"):
        from p2pfl_torrent.core import reports as home
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(home, name)
