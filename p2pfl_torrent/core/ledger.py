"""Which updates are known, which may still be counted, and what each owner last delivered.

Every update is counted at most once, in whichever round it is complete or the deadline passes; a
second manifest by one owner for one round proves equivocation and excludes that owner's updates of
that round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.manifest import Manifest, SignedHeader, UpdateId
from p2pfl_torrent.core.peers import PeerId


@dataclass(slots=True)
class KnownUpdate:
    """One update and how far it is here.

    Attributes:
        wanted: chunks of it that this peer takes, as its exchange mode has it.
        bytes_wanted: of their files.
        lacking: how many of them are not here.
        critical: those of them that its owner ranks highest, the swarm's critical share.
        critical_lacking: how many of these are not here.
        counted_in: the round whose aggregate it went into, here.
        came_late: it became known when its round was over here, so it was not counted in that one.
        dropped: it was reported as too late to count.
    """

    manifest: Manifest
    held: Bitfield
    wanted: Bitfield
    bytes_wanted: int = 0
    lacking: int = 0
    critical: frozenset[int] = frozenset()
    critical_lacking: int = 0
    counted_in: int | None = None
    came_late: bool = False
    dropped: bool = False

    @property
    def is_here(self) -> bool:
        """Whether every chunk that is wanted is here."""
        return not self.lacking

    @property
    def critical_here(self) -> float:
        """Share of its critical chunks that are here, 0-1."""
        total = len(self.critical)
        return (total - self.critical_lacking) / total if total else 1.0


@dataclass(frozen=True, slots=True)
class Equivocation:
    """Two signed manifests of one owner for one round."""

    owner: PeerId
    round: int
    first: UpdateId
    second: UpdateId


@dataclass(slots=True)
class _Slot:
    """What one owner published for one round."""

    update: UpdateId
    equivocated: bool = False


class Ledger:
    """The updates of a swarm as one peer knows them.

    Args:
        critical_share: share of the chunks taken of an update, by their rank, that are critical.
    """

    def __init__(self, num_chunks: int, critical_share: float) -> None:
        self._num_chunks = num_chunks
        self._critical_share = critical_share
        self._updates: dict[UpdateId, KnownUpdate] = {}
        self._slots: dict[tuple[int, PeerId], _Slot] = {}
        self._last: dict[tuple[PeerId, int], tuple[int, UpdateId]] = {}
        self._merged: dict[tuple[PeerId, int], int] = {}

    def __contains__(self, update: UpdateId) -> bool:
        return update in self._updates

    def __getitem__(self, update: UpdateId) -> KnownUpdate:
        return self._updates[update]

    def get(self, update: UpdateId) -> KnownUpdate | None:
        """The update, or None where it is not known."""
        return self._updates.get(update)

    def __iter__(self) -> Iterator[KnownUpdate]:
        return iter(self._updates.values())

    def see(self, signed: SignedHeader) -> Equivocation | None:
        """Note a checked header, with or without its table.

        Returns the proof when it shows for the first time that its owner equivocates.
        """
        slot = self._slots.setdefault((signed.round, signed.owner), _Slot(signed.update))
        if slot.update == signed.update or slot.equivocated:
            return None
        slot.equivocated = True
        return Equivocation(signed.owner, signed.round, slot.update, signed.update)

    def add(
        self, manifest: Manifest, held: Bitfield | None = None, wanted: Bitfield | None = None
    ) -> KnownUpdate:
        """Know an update whose header ``see`` accepted; all of it is wanted if nothing is said."""
        known = KnownUpdate(manifest, Bitfield(self._num_chunks), Bitfield(self._num_chunks))
        self._updates[manifest.update] = known
        for chunk in held or ():
            self.hold(manifest.update, chunk)
        self.want(known, wanted if wanted is not None else Bitfield.full(self._num_chunks))
        return known

    def want(self, known: KnownUpdate, wanted: Bitfield) -> None:
        """These chunks of an update are wanted, whatever was before."""
        entries, size = known.manifest.entries, known.manifest.header.payload_bytes
        if not wanted.complete:
            size = sum(entries[chunk].size for chunk in wanted)
        known.wanted, known.bytes_wanted = wanted, size
        known.critical = self._critical(known.manifest, wanted)
        known.lacking = sum(chunk not in known.held for chunk in wanted)
        known.critical_lacking = sum(chunk not in known.held for chunk in known.critical)

    def _critical(self, manifest: Manifest, wanted: Bitfield) -> frozenset[int]:
        ranked = sorted(wanted, key=lambda chunk: manifest.entries[chunk].rank, reverse=True)
        return frozenset(ranked[: math.ceil(self._critical_share * len(ranked))])

    def hold(self, update: UpdateId, chunk: int) -> None:
        """A chunk is here, verified."""
        known = self._updates[update]
        if known.held.add(chunk):
            known.lacking -= chunk in known.wanted
            known.critical_lacking -= chunk in known.critical
        key = (known.manifest.owner, chunk)
        if self._last.get(key, (0, update))[0] <= known.manifest.round:
            self._last[key] = (known.manifest.round, update)

    def publishers(self, round: int) -> set[PeerId]:
        """Owners of whom a header for that round was seen."""
        return {owner for slot_round, owner in self._slots if slot_round == round}

    def update_of(self, owner: PeerId, round: int) -> KnownUpdate | None:
        """The owner's update of a round, unless unknown or excluded."""
        slot = self._slots.get((round, owner))
        if slot is None or slot.equivocated:
            return None
        return self._updates.get(slot.update)

    def equivocated(self, owner: PeerId, round: int) -> bool:
        """Whether the owner signed two manifests for that round."""
        slot = self._slots.get((round, owner))
        return slot is not None and slot.equivocated

    def countable(self, round: int, max_staleness: int) -> list[KnownUpdate]:
        """Updates of which something may go into the aggregate of ``round``, in canonical order.

        Canonical order is owner, then the round trained in: the order of summation.
        """
        return sorted(
            (
                known
                for known in self._updates.values()
                if known.counted_in is None
                and known.wanted.count
                and round - max_staleness <= known.manifest.round <= round
                and not self.equivocated(known.manifest.owner, known.manifest.round)
            ),
            key=lambda known: (known.manifest.owner, known.manifest.round),
        )

    def count(self, update: UpdateId, chunks: Iterable[int], round: int) -> None:
        """An update went into the aggregate of ``round`` with these chunks."""
        known = self._updates[update]
        known.counted_in = round
        for chunk in chunks:
            self._merged[known.manifest.owner, chunk] = round

    def counted_before(self, round: int) -> dict[UpdateId, int]:
        """What went into which earlier aggregate, made here or taken over."""
        return {
            update: known.counted_in
            for update, known in self._updates.items()
            if known.counted_in is not None and known.counted_in < round
        }

    def restore_counted(self, counted: Mapping[UpdateId, int]) -> None:
        """After a restart: what went into which aggregate before."""
        for update, round in counted.items():
            if update in self._updates:
                self.count(update, self._updates[update].held, round)

    def fill(self, owner: PeerId, chunk: int, round: int, max_age: int) -> UpdateId | None:
        """The owner's last received version of a chunk, if at most ``max_age`` rounds old."""
        last = self._last.get((owner, chunk))
        if last is None or round - last[0] > max_age or last[0] > round:
            return None
        return last[1]

    def ages(self, owner: PeerId, round: int) -> list[int]:
        """Per chunk, rounds since that owner's was last merged here; ``round`` if never."""
        return [round - self._merged.get((owner, chunk), 0) for chunk in range(self._num_chunks)]

    def forget(self, update: UpdateId) -> None:
        """An update's bytes are gone from the store."""
        known = self._updates.pop(update, None)
        if known is None:
            return
        for chunk in known.held:
            key = (known.manifest.owner, chunk)
            if self._last.get(key, (0, b""))[1] == update:
                del self._last[key]

    def forget_rounds_before(self, round: int) -> None:
        """Drop the bookkeeping of what was published in rounds that can no longer matter."""
        for key in [key for key in self._slots if key[0] < round]:
            if self._slots[key].update not in self._updates:
                del self._slots[key]
