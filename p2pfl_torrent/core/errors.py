"""The errors of this library, sorted by whose fault they are."""

from __future__ import annotations


class P2PFLError(Exception):
    """Base of every error meant for the user: its text is one sentence that says what to do."""


class ConfigError(P2PFLError):
    """A configuration key, file or argument is wrong; the text names it."""


class CompressionError(P2PFLError):
    """The swarm's compression cannot carry these values; the text names the tensor and the key."""


class GenesisMismatchError(P2PFLError):
    """Another peer belongs to a swarm with other terms; the text names the differing keys."""


class LocalProtocolError(P2PFLError):
    """This program asked its own machine for something impossible: a bug here or in the caller."""


class RemoteProtocolError(P2PFLError):
    """Another peer broke the protocol; that peer is dropped, this one goes on.

    Attributes:
        peer: the peer to blame, or ``""`` where the caller knows it better than the decoder.
        reason: what it did, for the log and the event stream.
    """

    def __init__(self, reason: str, peer: str = "") -> None:
        super().__init__(f"{peer}: {reason}" if peer else reason)
        self.peer = peer
        self.reason = reason

    def by(self, peer: str) -> RemoteProtocolError:
        """The same error with the peer named."""
        return RemoteProtocolError(self.reason, peer)
