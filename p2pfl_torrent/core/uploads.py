"""Whose request is served next: a fair queue over the fetchers, with a bound on how many at once.

A place is held for one piece at a time, so a fetcher that asks for nothing more has left its place.
The slots go to whoever has been sent the fewest bytes lately; the optimistic place goes to whoever
has waited longest, and so comes round to everybody, however much they were sent.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass, field
from heapq import nsmallest

from p2pfl_torrent.core.messages import Request
from p2pfl_torrent.core.peers import PeerId


@dataclass(frozen=True, slots=True)
class UploadPolicy:
    """Bounds of the queue.

    Attributes:
        upload_slots: peers served at once, BitTorrent's four: an uplink shared by more brings
            nobody a whole chunk soon.
        optimistic: further places, for whoever has waited longest.
        max_queued: requests of one peer that may wait; a fetcher has at most 10 open.
        slot_seconds: a piece under way for longer no longer holds a place: its peer is slow, and
            its slowness must not be everybody's.
    """

    upload_slots: int = 4
    optimistic: int = 1
    max_queued: int = 64
    slot_seconds: float = 2.0


PLACES = ("slot", "optimistic")
FADE_BYTES = 64 << 20  # sent in all, after which every peer's account is halved


@dataclass(slots=True)
class _Fetcher:
    """One peer's requests and account.

    Attributes:
        drawn: by chance, between equals: an order by name would favour the same peers everywhere.
        turn: when it began to wait for the piece that is next, as a count of such beginnings.
        place: "slot" or "optimistic" while a piece is under way, "none" once that took longer than
            a place is held, empty where nothing is under way.
        writing: its writer is busy, with whatever: it could take no piece now, and gets no place.
    """

    drawn: float
    requests: OrderedDict[int, Request] = field(default_factory=OrderedDict)
    turn: int = 0
    place: str = ""
    writing: bool = False
    sending_since: float = 0.0
    sent: float = 0.0

    @property
    def waits(self) -> bool:
        return bool(self.requests) and not self.place and not self.writing


class UploadQueue:
    """Requests that wait for their piece."""

    def __init__(self, policy: UploadPolicy, rng: random.Random) -> None:
        self._policy = policy
        self._rng = rng
        self._fetchers: dict[PeerId, _Fetcher] = {}
        self._turns = 0
        self._sent_since_fade = 0

    def add(self, peer: PeerId, request: Request) -> bool:
        """Queue a request; False if the peer has too many waiting."""
        fetcher = self._fetchers.get(peer)
        if fetcher is None:
            fetcher = self._fetchers[peer] = _Fetcher(self._rng.random())
        if len(fetcher.requests) >= self._policy.max_queued:
            return False
        if not fetcher.requests and not fetcher.place:
            self._begins_to_wait(fetcher)
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

    def writing(self, peer: PeerId, busy: bool) -> None:
        """A peer's writer begins or ends a write. Who does not read blocks nobody but itself."""
        fetcher = self._fetchers.get(peer)
        if fetcher is None:
            fetcher = self._fetchers[peer] = _Fetcher(self._rng.random())
        fetcher.writing = busy

    def remove_peer(self, peer: PeerId) -> None:
        """A fetcher is gone."""
        self._fetchers.pop(peer, None)

    def queued(self, peer: PeerId) -> int:
        """Requests of a peer that wait."""
        fetcher = self._fetchers.get(peer)
        return len(fetcher.requests) if fetcher else 0

    def next(self, peer: PeerId, now: float) -> Request | None:
        """The peer's next request, if it may be served now; it holds a place until ``sent``."""
        fetcher = self._fetchers.get(peer)
        if fetcher is None or not fetcher.waits:
            return None
        place = self._places(now).get(peer)
        if place is None:
            return None
        fetcher.place = place
        fetcher.sending_since = now
        return fetcher.requests.popitem(last=False)[1]

    def sent(self, peer: PeerId, nbytes: int, now: float) -> None:
        """What ``next`` gave out is answered, with so many bytes: the place is free."""
        fetcher = self._fetchers.get(peer)
        if fetcher is None or not fetcher.place:
            return
        fetcher.place = ""
        fetcher.sent += nbytes
        if fetcher.requests:
            self._begins_to_wait(fetcher)
        self._sent_since_fade += nbytes
        if self._sent_since_fade >= FADE_BYTES:
            self._sent_since_fade = 0
            for other in self._fetchers.values():
                other.sent /= 2

    def runnable(self, now: float) -> list[PeerId]:
        """Peers to whom ``next`` would give a request now."""
        return list(self._places(now))

    def next_wakeup(self) -> float | None:
        """When a slow piece stops holding a place, if somebody waits for one."""
        if not any(fetcher.waits for fetcher in self._fetchers.values()):
            return None
        ends = [
            fetcher.sending_since + self._policy.slot_seconds
            for fetcher in self._fetchers.values()
            if fetcher.place in PLACES
        ]
        return min(ends, default=None)

    def _begins_to_wait(self, fetcher: _Fetcher) -> None:
        self._turns += 1
        fetcher.turn = self._turns

    def _places(self, now: float) -> dict[PeerId, str]:
        """Who may be sent to now, and in which kind of place; the same until something happens."""
        free = {"slot": self._policy.upload_slots, "optimistic": self._policy.optimistic}
        waiting: list[tuple[PeerId, _Fetcher]] = []
        for peer, fetcher in self._fetchers.items():
            if fetcher.waits:
                waiting.append((peer, fetcher))
            elif fetcher.place in PLACES:
                if now >= fetcher.sending_since + self._policy.slot_seconds:
                    fetcher.place = "none"
                else:
                    free[fetcher.place] -= 1
        poorest = nsmallest(free["slot"], waiting, key=lambda item: (item[1].sent, item[1].drawn))
        places = {peer: "slot" for peer, _ in poorest}
        others = [item for item in waiting if item[0] not in places]
        for peer, _ in nsmallest(free["optimistic"], others, key=lambda item: item[1].turn):
            places[peer] = "optimistic"
        return places

    def validate(self) -> None:
        """Check the invariants; for tests."""
        policy, fetchers = self._policy, self._fetchers.values()
        for fetcher in fetchers:
            assert len(fetcher.requests) <= policy.max_queued
            assert fetcher.sent >= 0
        held = [fetcher.place for fetcher in fetchers]
        assert held.count("slot") <= policy.upload_slots
        assert held.count("optimistic") <= policy.optimistic
