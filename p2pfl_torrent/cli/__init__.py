"""The command line. Commands are thin users of ``Peer``; each lives in a module of its own."""

from p2pfl_torrent.cli.entry import main

__all__ = ["main"]
