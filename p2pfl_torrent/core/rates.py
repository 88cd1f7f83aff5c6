"""How fast a holder answers, measured while it has something to answer."""

from __future__ import annotations

FIRST_RATE = 16_000.0  # bytes per second assumed of an unmeasured holder: 128 kbit/s
HALF_LIFE = 2.0  # seconds of answering after which a measurement counts half: a few pieces' time
SHORTEST = 1e-6  # seconds; two pieces may be read from a socket in one go
LAG_WEIGHT = 0.25  # of a new sample: about that of RFC 6298 for a deviation


class RateMeter:
    """Bytes over seconds of answering, the past fading.

    A ratio of sums, not an average of ratios: pieces that a socket hands over back to back would
    each look as fast as memory, and their average with them.

    Attributes:
        lag: smoothed seconds by which answers came later than the rate alone explains: round trip,
            jitter, other fetchers' turns.
    """

    __slots__ = ("_assumed", "_bytes", "_seconds", "lag")

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0
        self._assumed = FIRST_RATE
        self.lag = 0.0

    @property
    def measured(self) -> bool:
        """Whether anything came yet."""
        return self._seconds > 0.0

    @property
    def rate(self) -> float:
        """Bytes per second; FIRST_RATE before anything came."""
        return self._bytes / self._seconds if self._seconds else self._assumed

    def arrived(self, nbytes: int, seconds: float, late: float) -> None:
        """A piece took ``seconds`` of answering and came ``late`` seconds after its expectation."""
        if self.measured:
            self.lag += LAG_WEIGHT * (max(0.0, late) - self.lag)
        fading = 0.5 ** (seconds / HALF_LIFE)
        self._bytes = self._bytes * fading + nbytes
        self._seconds = self._seconds * fading + max(SHORTEST, seconds)

    def slowed(self) -> None:
        """Nothing came for far too long: expect half of before, so that patience doubles."""
        self._bytes /= 2
        self._assumed /= 2
