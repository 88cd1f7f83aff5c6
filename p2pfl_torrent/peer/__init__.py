"""The peer: wiring of core, exchange, protocols, overlay, store and learning, and its two faces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pfl_torrent.learning.gradients import GradientStats
    from p2pfl_torrent.learning.scaffold import Scaffold
    from p2pfl_torrent.peer.blocking import Peer, PeerStoppedError
    from p2pfl_torrent.peer.trio_face import AsyncPeer

__all__ = ["AsyncPeer", "GradientStats", "Peer", "PeerStoppedError", "Scaffold"]


def __getattr__(name: str) -> Any:
    # The faces bring torch, which takes 135 MB and a second: a Node that is given arrays, as in the
    # benchmarks, does without.
    home: Any = None
    if name in ("Peer", "PeerStoppedError"):
        from p2pfl_torrent.peer import blocking as home
    elif name == "GradientStats":
        from p2pfl_torrent.learning import gradients as home
    elif name == "Scaffold":
        from p2pfl_torrent.learning import scaffold as home
    elif name == "AsyncPeer":
        from p2pfl_torrent.peer import trio_face as home
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(home, name)
