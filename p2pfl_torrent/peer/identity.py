"""Which peer a state directory belongs to, for programs that name peers before they run."""

from __future__ import annotations

from pathlib import Path

from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.overlay.identity import Identity


def identity_of(state_dir: Path) -> PeerId:
    """The PeerId of a peer with this state directory; its key is made where there is none yet.

    Raises:
        IdentityError: the key file cannot be read or made.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    return PeerId(Identity.load_or_create(state_dir / "identity.key").peer_id)
