"""Whose request is served next: a fair queue over the fetchers, with a bound on how many at once.

Slots limit how many peers a slow uplink is shared by; the peer that has been sent the fewest bytes
lately goes first. Beside the slots one optimistic place rotates over those who wait.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass, field

from p2pfl_torrent.core.messages import Request
from p2pfl_torrent.core.peers import PeerId


@dataclass(frozen=True, slots=True)
class UploadPolicy:
    """Bounds of the queue.

    Attributes:
        upload_slots: peers served at once, BitTorrent's four.
        optimistic: further places for whoever has waited, drawn at random.
        max_queued: requests of one peer that may wait; a fetcher has at most 10 open.
        slot_seconds: a piece under way for longer no longer holds a slot: its peer is slow, and
            its slowness must not be everybody's.
    """

    upload_slots: int = 4
    optimistic: int = 1
    max_queued: int = 64
    slot_seconds: float = 2.0


@dataclass(slots=True)
class _Fetcher:
    requests: OrderedDict[int, Request] = field(default_factory=OrderedDict)
    sending_since: float | None = None
    sent: float = 0.0  # bytes, halved now and then so that the past fades


FADE_BYTES = 64 << 20  # sent in all, after which every peer's account is halved


class UploadQueue:
    """Requests that wait for their piece."""

    def __init__(self, policy: UploadPolicy, rng: random.Random) -> None:
        self._policy = policy
        self._rng = rng
        self._fetchers: dict[PeerId, _Fetcher] = {}
        self._sent_since_fade = 0
        self._lucky: list[PeerId] = []  # who has the optimistic places, until each is served

    def add(self, peer: PeerId, request: Request) -> bool:
        """Queue a request; False if the peer has too many waiting."""
        fetcher = self._fetchers.setdefault(peer, _Fetcher())
        if len(fetcher.requests) >= self._policy.max_queued:
            return False
        fetcher.requests[request.number] = request
        return True

    def waits(self, peer: PeerId, number: int) -> bool:
        """Whether a request with that number waits."""
        fetcher = self._fetchers.get(peer)
        return fetcher is not None and number in fetcher.requests

    def cancel(self, peer: PeerId, number: int) -> bool:
        """Take a request back; False if it was answered, is being answered or never came."""
        fetcher = self._fetchers.get(peer)
        return fetcher is not None and fetcher.requests.pop(number, None) is not None

    def remove_peer(self, peer: PeerId) -> None:
        """A fetcher is gone."""
        self._fetchers.pop(peer, None)

    def queued(self, peer: PeerId) -> int:
        """Requests of a peer that wait."""
        fetcher = self._fetchers.get(peer)
        return len(fetcher.requests) if fetcher else 0

    def next(self, peer: PeerId, now: float) -> Request | None:
        """The peer's next request, if it may be served now; it then holds a slot."""
        fetcher = self._fetchers.get(peer)
        if fetcher is None or not fetcher.requests or fetcher.sending_since is not None:
            return None
        if peer not in self._served(now):
            return None
        fetcher.sending_since = now
        if peer in self._lucky:
            self._lucky.remove(peer)
        return fetcher.requests.popitem(last=False)[1]

    def sent(self, peer: PeerId, nbytes: int, now: float) -> None:
        """The piece that ``next`` gave out has been handed to the transport."""
        fetcher = self._fetchers.get(peer)
        if fetcher is None:
            return
        fetcher.sending_since = None
        fetcher.sent += nbytes
        self._sent_since_fade += nbytes
        if self._sent_since_fade >= FADE_BYTES:
            self._sent_since_fade = 0
            for other in self._fetchers.values():
                other.sent /= 2

    def runnable(self, now: float) -> list[PeerId]:
        """Peers whose writer has something to send now."""
        return [peer for peer in self._served(now) if self._fetchers[peer].sending_since is None]

    def next_wakeup(self) -> float | None:
        """When a slow piece stops holding a slot, if somebody waits for one."""
        if not any(f.requests and f.sending_since is None for f in self._fetchers.values()):
            return None
        times = [
            fetcher.sending_since + self._policy.slot_seconds
            for fetcher in self._fetchers.values()
            if fetcher.sending_since is not None
        ]
        return min(times, default=None)

    def _served(self, now: float) -> list[PeerId]:
        """Who may be sent to now: fetchers with requests, as many as there are free places."""
        slots = self._policy.upload_slots + self._policy.optimistic
        busy = sum(
            fetcher.sending_since is not None
            and now - fetcher.sending_since < self._policy.slot_seconds
            for fetcher in self._fetchers.values()
        )
        waiting = [
            peer
            for peer, fetcher in self._fetchers.items()
            if fetcher.requests and fetcher.sending_since is None
        ]
        free = max(0, slots - busy)
        if len(waiting) <= free:
            return waiting
        waiting.sort(key=lambda peer: (self._fetchers[peer].sent, peer))
        chosen = waiting[: max(0, free - self._policy.optimistic)]
        others = waiting[len(chosen) :]
        places = free - len(chosen)
        # The same ones until they are served: who is woken must also be let in.
        self._lucky = [peer for peer in self._lucky if peer in others][:places]
        rest = [peer for peer in others if peer not in self._lucky]
        self._lucky += self._rng.sample(rest, places - len(self._lucky))
        return chosen + self._lucky

    def validate(self) -> None:
        """Check the invariants; for tests."""
        for fetcher in self._fetchers.values():
            assert len(fetcher.requests) <= self._policy.max_queued
            assert fetcher.sent >= 0
