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

MAX_OFFERS = 1024  # unknown updates offered by one peer: members x rounds kept, with room
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
    asked: PeerId | None = None
    asked_at: float = 0.0


class Wanted:
    """The manifests to get."""

    def __init__(self, num_chunks: int) -> None:
        self._num_chunks = num_chunks
        self._entries: dict[UpdateId, _Entry] = {}
        self._offered: Counter[PeerId] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def seen(self, update: UpdateId, round: int) -> None:
        """Its signed header was seen; owners sign one a round, which bounds them."""
        entry = self._entries.setdefault(update, _Entry(round))
        entry.round, entry.seen = round, True

    def dated(self, update: UpdateId, round: int) -> None:
        """Of what round one that was offered is: it is asked for (again) in that round."""
        entry = self._entries.get(update)
        if entry is not None:
            entry.round, entry.asked = round, None

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
                return  # it will be announced again
            self._offered[peer] += 1
            entry = self._entries.setdefault(update, _Entry(round))
            offer = entry.offers[peer] = Offer(Bitfield(self._num_chunks))
        assert entry is not None
        if entry.round is None:
            entry.round = round
        offer.counted_in = max(offer.counted_in, counted_in)
        for chunk in chunks:
            offer.chunks.add(chunk)

    def withdraw(self, peer: PeerId, update: UpdateId) -> None:
        """A peer does not have it after all."""
        entry = self._entries.get(update)
        if entry is None:
            return
        if entry.asked == peer:
            entry.asked = None
        if entry.offers.pop(peer, None) is not None:
            self._offered[peer] -= 1
        if not entry.offers and not entry.seen:
            del self._entries[update]

    def remove_peer(self, peer: PeerId) -> None:
        """A peer is gone, and its offers with it."""
        for update in list(self._entries):
            self.withdraw(peer, update)
        self._offered.pop(peer, None)

    def found(self, update: UpdateId) -> dict[PeerId, Offer]:
        """It is here or not wanted any more; what was offered of it."""
        entry = self._entries.pop(update, None)
        if entry is None:
            return {}
        self._offered.subtract(entry.offers.keys())
        return entry.offers

    def forget_before(self, round: int) -> None:
        """Drop those of older rounds, and those whose round nobody could say."""
        for update, entry in list(self._entries.items()):
            if entry.round is None or entry.round < round:
                self.found(update)

    def ask(self, now: float, newest: int) -> list[tuple[PeerId, UpdateId]]:
        """(peer, update) to ask for now; those of rounds after ``newest`` wait for their time."""
        open_: Counter[PeerId] = Counter()
        due: list[tuple[UpdateId, _Entry]] = []
        for update, entry in self._entries.items():
            if entry.asked is not None and now - entry.asked_at < MANIFEST_PATIENCE:
                open_[entry.asked] += 1
            elif entry.offers and (entry.round is None or entry.round <= newest):
                due.append((update, entry))
        asked: list[tuple[PeerId, UpdateId]] = []
        for update, entry in due:
            # Not the one that was asked in vain, if there is another.
            peer = min(
                entry.offers,
                key=lambda peer: (peer == entry.asked, open_[peer], peer),
            )
            if open_[peer] >= MAX_ASKED:
                entry.asked = None  # its turn comes with the next answer
                continue
            open_[peer] += 1
            entry.asked, entry.asked_at = peer, now
            asked.append((peer, update))
        return asked

    def next_timeout(self) -> float | None:
        """When a manifest that was asked for is late."""
        times = [
            entry.asked_at + MANIFEST_PATIENCE
            for entry in self._entries.values()
            if entry.asked is not None and entry.offers
        ]
        return min(times, default=None)
