"""What a peer keeps on disk: updates being exchanged, rounds finished, checkpoints.

May import the core only, and sqlite3 and files; knows neither the network nor torch.
"""

from p2pfl_torrent.store.checkpoints import Checkpoints
from p2pfl_torrent.store.errors import StoreError
from p2pfl_torrent.store.genesis import forget_swarm, keep_genesis, load_genesis
from p2pfl_torrent.store.updates import Store

__all__ = ["Checkpoints", "Store", "StoreError", "forget_swarm", "keep_genesis", "load_genesis"]
