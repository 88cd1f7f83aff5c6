"""Many peers' machines in one process, on virtual time and modelled links: no sockets, no disk."""

from p2pfl_torrent.simulation.federation import Federation, Learner, Outcome
from p2pfl_torrent.simulation.links import EqualLinks, Link, Links, SharedLinks
from p2pfl_torrent.simulation.node import Node
from p2pfl_torrent.simulation.world import World

__all__ = [
    "EqualLinks",
    "Federation",
    "Learner",
    "Link",
    "Links",
    "Node",
    "Outcome",
    "SharedLinks",
    "World",
]
