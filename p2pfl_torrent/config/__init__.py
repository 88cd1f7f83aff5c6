"""A peer's configuration: the seed's YAML sections and keys, validated, each with one home.

Every key does something; an unknown key is an error with a suggestion.

    schema       sections and keys, with defaults, bounds, meanings and reasons
    reading      YAML to plain data with known keys; errors in the file's words
    peer_config  PeerConfig, and what the rooms need of it
    differences  two peers' terms, compared key by key
    reference    the rows of docs/reference/configuration.md
"""

from p2pfl_torrent.config.differences import explain
from p2pfl_torrent.config.peer_config import PeerConfig
from p2pfl_torrent.config.reference import KeyReference, reference
from p2pfl_torrent.config.schema import ChunkSection, TaskSection

__all__ = ["ChunkSection", "KeyReference", "PeerConfig", "TaskSection", "explain", "reference"]
