"""How the core names peers and checks what they signed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NewType

PeerId = NewType("PeerId", str)
"""A libp2p peer id in its base58 text form; the text order is the canonical order of owners."""

Sign = Callable[[bytes], bytes]
"""Signs a message with the local peer's key."""

Verify = Callable[[PeerId, bytes, bytes], bool]
"""``verify(peer, message, signature)``: whether that peer signed that message; never raises."""

MAX_PEER_ID = 64  # an Ed25519 id has 52 characters, a hashed RSA id 46; room for one more kind
