"""What can be wrong with a state directory."""

from __future__ import annotations

from p2pfl_torrent.core.errors import P2PFLError


class StoreError(P2PFLError):
    """The state directory cannot be used as it is; the text says what to do."""
