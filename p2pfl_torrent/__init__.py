"""Federated learning without a server: updates spread as chunks, the way BitTorrent spreads a file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pfl_torrent.config import PeerConfig
    from p2pfl_torrent.core.errors import ConfigError, GenesisMismatchError, P2PFLError
    from p2pfl_torrent.core.reports import OwnerReport, PeerEvent, PeerStatistics, RoundReport
    from p2pfl_torrent.peer import AsyncPeer, Peer, PeerStoppedError

__version__ = "0.1.0"

__all__ = [
    "AsyncPeer",
    "ConfigError",
    "GenesisMismatchError",
    "OwnerReport",
    "P2PFLError",
    "Peer",
    "PeerConfig",
    "PeerEvent",
    "PeerStatistics",
    "PeerStoppedError",
    "RoundReport",
]

_HOMES = {
    "PeerConfig": "p2pfl_torrent.config",
    "ConfigError": "p2pfl_torrent.core.errors",
    "GenesisMismatchError": "p2pfl_torrent.core.errors",
    "P2PFLError": "p2pfl_torrent.core.errors",
    "OwnerReport": "p2pfl_torrent.core.reports",
    "PeerEvent": "p2pfl_torrent.core.reports",
    "PeerStatistics": "p2pfl_torrent.core.reports",
    "RoundReport": "p2pfl_torrent.core.reports",
    "AsyncPeer": "p2pfl_torrent.peer",
    "Peer": "p2pfl_torrent.peer",
    "PeerStoppedError": "p2pfl_torrent.peer",
}


def __getattr__(name: str) -> Any:
    # The peer brings torch and libp2p, seconds to import, the configuration numpy and networkx:
    # only whoever uses them pays for them, and `p2pfl-torrent --help` comes at once.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
