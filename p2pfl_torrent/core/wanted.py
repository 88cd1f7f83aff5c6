"""Manifests heard of but not here: who offers them, who was asked, and who is to be asked next.

Anybody can offer what does not exist. So each peer's offers have a bound of their own, and a peer
that offers much is asked for a little at a time: it can hold up nobody but itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId

MAX_OFFERS = 4096  # unknown updates offered by one peer: 1024 members x 4 rounds. A Have names
# chunks once: of what is dropped here the peer's chunks stay unknown until its stream opens anew
MAX_ASKED = 16  # manifests asked of one peer at once; each may be a megabyte
MANIFEST_PATIENCE = 10.0  # seconds for 3 KB at 128 kbit/s behind a second of data, many times over


@dataclass(slots=True)
class Offer:
    """What one peer holds of an update, and the round in which it counted it (0: not yet)."""

    chunks: Bitfield
    counted_in: int = 0


@dataclass(slots=True)
class _Entry:
    round: int | None
    offers: dict[PeerId, Offer] = field(default_factory=dict)
    seen: bool = False  # its signed header, so that it exists
    came_early: bool = False  # it was here before its time, and is of no more use until then
    asked: PeerId | None = None
    asked_at: float = 0.0
    queued: int = 0  # peers in whose queue it waits


class Wanted:
    """The manifests to get.

    An update is asked for, waits in the queues of those who offer it, or waits for its round; so
    that the cost of an event does not grow with what is wanted.
    """

    def __init__(self, num_chunks: int) -> None:
        self._num_chunks = num_chunks
        self._newest = 0
        self._looks_ahead = False
        self._entries: dict[UpdateId, _Entry] = {}
        self._offered: Counter[PeerId] = Counter()
        self._open: Counter[PeerId] = Counter()
        self._asked: dict[UpdateId, None] = {}  # in the order asked
        self._queues: dict[PeerId, dict[UpdateId, None]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def seen(self, update: UpdateId, round: int) -> None:
        """Its signed header was seen; owners sign one a round, which bounds them."""
        entry = self._entries.setdefault(update, _Entry(round))
        entry.round, entry.seen = round, True
        self._place(update, entry)

    def dated(self, update: UpdateId, round: int) -> None:
        """Of what round one that was offered is: it is asked for (again) in that round."""
        entry = self._entries.get(update)
        if entry is not None:
            entry.round, entry.came_early = round, True
            self._take_back(update, entry)
            self._place(update, entry)

    def offer(
        self,
        peer: PeerId,
        update: UpdateId,
        round: int | None,
        chunks: Iterable[int],
        counted_in: int,
    ) -> None:
        """A peer has chunks of it; ``round`` as far as the peer said."""
        entry = self._entries.get(update)
        offer = entry.offers.get(peer) if entry is not None else None
        if offer is None:
            if self._offered[peer] >= MAX_OFFERS:
                return
            self._offered[peer] += 1
            entry = self._entries.setdefault(update, _Entry(round))
            offer = entry.offers[peer] = Offer(Bitfield(self._num_chunks))
            if entry.queued:
                self._queue(peer, update, entry)
        assert entry is not None
        if entry.round is None:
            entry.round = round
        offer.counted_in = max(offer.counted_in, counted_in)
        for chunk in chunks:
            offer.chunks.add(chunk)
        self._place(update, entry)

    def withdraw(self, peer: PeerId, update: UpdateId) -> None:
        """A peer does not have it after all."""
        entry = self._entries.get(update)
        if entry is None or entry.offers.pop(peer, None) is None:
            return
        self._offered[peer] -= 1
        self._unqueue(peer, update, entry)
        if entry.asked == peer:
            self._take_back(update, entry)
        if not entry.offers and not entry.seen:
            del self._entries[update]
        else:
            self._place(update, entry)

    def remove_peer(self, peer: PeerId) -> None:
        """A peer is gone, and its offers with it."""
        for update in [u for u, entry in self._entries.items() if peer in entry.offers]:
            self.withdraw(peer, update)
        for counts in (self._offered, self._open, self._queues):
            counts.pop(peer, None)

    def found(self, update: UpdateId) -> dict[PeerId, Offer]:
        """It is here or not wanted any more; what was offered of it."""
        entry = self._entries.pop(update, None)
        if entry is None:
            return {}
        self._take_back(update, entry)
        for peer in entry.offers:
            self._offered[peer] -= 1
            self._unqueue(peer, update, entry)
        return entry.offers

    def forget_before(self, round: int) -> None:
        """Drop those of older rounds, and those whose round nobody could say."""
        for update, entry in list(self._entries.items()):
            if entry.round is None or entry.round < round:
                self.found(update)

    def look_ahead(self, on: bool) -> None:
        """Whether to ask for those of later rounds too, once: to see how far their owners are."""
        if on != self._looks_ahead:
            self._looks_ahead = on
            for update, entry in self._entries.items():
                self._place(update, entry)

    def ask(self, now: float, newest: int) -> list[tuple[PeerId, UpdateId]]:
        """(peer, update) to ask for now; those of rounds after ``newest`` wait for their time."""
        if newest > self._newest:
            self._newest = newest
            for update, entry in self._entries.items():
                self._place(update, entry)
        self._give_up(now)
        asked: list[tuple[PeerId, UpdateId]] = []
        while True:
            free = [p for p, queue in self._queues.items() if queue and self._open[p] < MAX_ASKED]
            if not free:
                return asked
            peer = min(free, key=lambda peer: (self._open[peer], peer))
            update = next(iter(self._queues[peer]))
            entry = self._entries[update]
            for other in entry.offers:
                self._unqueue(other, update, entry)
            entry.asked, entry.asked_at = peer, now
            self._asked[update] = None
            self._open[peer] += 1
            asked.append((peer, update))

    def next_timeout(self) -> float | None:
        """When a manifest that was asked for is late."""
        for update in self._asked:
            return self._entries[update].asked_at + MANIFEST_PATIENCE
        return None

    def _give_up(self, now: float) -> None:
        """What was asked for too long ago goes to the queues of the others who offer it."""
        while self._asked:
            update = next(iter(self._asked))
            entry = self._entries[update]
            late = entry.asked
            if now < entry.asked_at + MANIFEST_PATIENCE:
                return
            self._take_back(update, entry)
            for peer in entry.offers:
                if peer != late or len(entry.offers) == 1:
                    self._queue(peer, update, entry)

    def _take_back(self, update: UpdateId, entry: _Entry) -> None:
        """It is not asked of anybody any more."""
        if entry.asked is not None:
            self._open[entry.asked] -= 1
            entry.asked = None
            del self._asked[update]

    def _place(self, update: UpdateId, entry: _Entry) -> None:
        """Queue it where it is offered, if it is neither queued nor asked for and in its time."""
        in_time = (
            entry.round is None
            or entry.round <= self._newest
            or (self._looks_ahead and not entry.came_early)
        )
        if in_time and entry.asked is None and not entry.queued:
            for peer in entry.offers:
                self._queue(peer, update, entry)
        elif not in_time and entry.queued:
            for peer in entry.offers:
                self._unqueue(peer, update, entry)

    def _queue(self, peer: PeerId, update: UpdateId, entry: _Entry) -> None:
        queue = self._queues.setdefault(peer, {})
        entry.queued += update not in queue
        queue[update] = None

    def _unqueue(self, peer: PeerId, update: UpdateId, entry: _Entry) -> None:
        queue = self._queues.get(peer)
        if queue is not None and update in queue:
            del queue[update]
            entry.queued -= 1
