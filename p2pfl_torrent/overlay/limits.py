"""What one peer, one address and all of them together may take from a host."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

INITIAL_WINDOW = 256 << 10
"""Bytes a sender may be ahead of the reader on a new stream: yamux fixes it."""

RECEIVE_WINDOW = 4 << 20
"""The same on a stream that is read: 20 MB/s over a 100 ms path, with credit for half of it at a
time, since each grant costs both sides a turn of the event loop."""

WIDE_STREAMS = 4
"""Streams of one connection that have a RECEIVE_WINDOW; two, one a direction, carry chunks."""

MAX_BUFFERED = 32 << 20
"""Bytes that one connection may have received but not read, with what is set aside for messages
that have begun. A peer that keeps to its windows needs 31 MiB if 64 streams are full and unread."""

MAX_CONTROL_FRAMES = 128
"""Yamux control frames (12 bytes each) waiting to be sent before a new stream must wait."""

MAX_ANSWERS = 1024
"""Control frames waiting to be sent before one more answer is too many, and the connection closed.
While a frame of data leaves (FRAME_STALL at worst) a peer may open and close a burst of 128
streams, have as many refused, and ping: some 500. The memory is 64 KiB."""

IDLE_BURST = 4096
IDLE_RATE = 1000.0
"""Frames without payload that a peer may send, at once and a second, besides one for each byte that
it got: so often does a stock py-libp2p that reads bytes one by one grant us a byte more."""

FRAME_PROGRESS = 64 << 10
FRAME_STALL = 60.0
"""Seconds in which FRAME_PROGRESS bytes of a frame that has begun, or its rest, must leave or come:
9 kbit/s. So 2 MiB get through a link that fell to 64 kbit/s, in 262 s; slower is a dead link."""

MAX_PROTOCOL_NAME = 256
"""Bytes of a protocol name in a multistream-select message; ours have below 40."""

MAX_NEGOTIATION_MESSAGES = 16
"""Messages a peer may send to agree on one protocol: every proposal costs it one."""


@dataclass(frozen=True)
class HostLimits:
    """Bounds a host enforces on its own, since the library's are off or miscounted.

    Attributes:
        connections: open and half-open connections in all, both directions.
        connections_per_peer: a peer that opens more loses its oldest one: after a simultaneous
            dial there are two, and after a change of network the old ones may be dead.
        connections_per_ip: inbound, open and half-open, from one address. Peers behind one NAT,
            or a fleet on one machine, share an address.
        accepts_per_second: new inbound connections from one address, each some 5 ms of CPU.
        accept_burst: the same, at once.
        streams_per_peer: inbound streams open at a time.
        stream_opens_per_second: inbound streams opened by one peer, some 2 ms of CPU each.
        stream_burst: the same, at once.
        handshake_timeout: seconds for Noise and the muxer.
        negotiation_timeout: seconds for agreeing on a stream's protocol.
    """

    connections: int = 512
    connections_per_peer: int = 4
    connections_per_ip: int = 256
    accepts_per_second: float = 32.0
    accept_burst: int = 256
    streams_per_peer: int = 64
    stream_opens_per_second: float = 32.0
    stream_burst: int = 128
    handshake_timeout: float = 10.0
    negotiation_timeout: float = 10.0


class TokenBuckets:
    """A token bucket per key: ``rate`` tokens a second, at most ``burst`` saved up.

    Full buckets are forgotten once more than ``max_keys`` are kept, so that nobody can grow the
    table by inventing keys faster than buckets fill up.
    """

    def __init__(self, rate: float, burst: float, max_keys: int = 4096) -> None:
        self._rate = rate
        self._burst = burst
        self._max_keys = max_keys
        self._buckets: dict[Hashable, tuple[float, float]] = {}

    def take(self, key: Hashable, now: float, amount: float = 1.0) -> bool:
        """Whether ``key`` may spend ``amount`` at time ``now`` (seconds, any origin)."""
        tokens, since = self._buckets.get(key, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._rate)
        allowed = tokens >= amount
        self._buckets[key] = (tokens - amount if allowed else tokens, now)
        if len(self._buckets) > self._max_keys:
            self._forget_full(now)
        return allowed

    def _forget_full(self, now: float) -> None:
        self._buckets = {
            key: (tokens, since)
            for key, (tokens, since) in self._buckets.items()
            if tokens + (now - since) * self._rate < self._burst
        }
