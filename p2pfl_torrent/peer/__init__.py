"""The peer: wiring of core, exchange, protocols, overlay, store and learning, and its two faces."""

from p2pfl_torrent.peer.blocking import Peer, PeerStoppedError
from p2pfl_torrent.peer.trio_face import AsyncPeer

__all__ = ["AsyncPeer", "Peer", "PeerStoppedError"]
