"""Which blocks to ask of which holder next.

What is tracked, and why:

1. Per update and chunk: how many holders announced it (rarity), and a rank of importance x age
   within its update. Importance alone would let the same chunks win every round while the rest
   drifts apart; times age, what was long unseen wins too. Per update: the bytes still missing that
   some holder has, so that whether a round may settle is a look at a number.
2. Chunks begun: some block asked for or here. They are finished first, since only a whole chunk
   can be announced and averaged; the number being asked for is bounded (the pending pool).
3. Per holder: the chunks it has that are missing and not begun, in a set that can be sampled in
   O(1). A pick looks at a bounded sample, never at all chunks: near the best, and cheap.
4. Per holder: open requests (the active pool), its measured rate, and so how many bytes it may
   have in flight: about a second's worth, or heartbeats drown behind them (``pipeline``).
5. Requests that are overdue by their holder's own rate: near the end another holder is asked too
   (endgame), and the first answer cancels the other.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.manifest import Manifest, UpdateId
from p2pfl_torrent.core.messages import REJECT_BUSY, REJECT_MISSING
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.pipeline import OVERDUE_FLOOR, BlockRequest, Key, PickerPolicy, Pipeline
from p2pfl_torrent.core.sampling import SampleSet

__all__ = ["BlockRequest", "Picker", "PickerPolicy", "Received"]


@dataclass(frozen=True, slots=True)
class Received:
    """What a checked piece changed.

    Attributes:
        duplicate_bytes: of blocks that were here already.
        chunk_complete: every block of its chunk is here now.
        cancels: requests to other holders that are superfluous now.
    """

    duplicate_bytes: int
    chunk_complete: bool
    cancels: tuple[BlockRequest, ...]


@dataclass(slots=True)
class _Update:
    manifest: Manifest
    complete: Bitfield
    merit: list[float]  # per chunk, rank of importance x age, 0-1
    holders: list[int]  # per chunk, how many announced it
    bytes_verified: int = 0
    obtainable: int = 0  # bytes missing of chunks that some holder has


@dataclass(slots=True)
class _Begun:
    here: Bitfield
    missing: int  # bytes
    free: int  # blocks neither here nor asked for
    asked: dict[int, list[tuple[PeerId, int]]] = field(default_factory=dict)


@dataclass(slots=True)
class _Holder:
    pipeline: Pipeline
    has: dict[UpdateId, Bitfield] = field(default_factory=dict)
    candidates: SampleSet[Key] = field(default_factory=SampleSet)

    def holds(self, key: Key) -> bool:
        has = self.has.get(key[0])
        return has is not None and key[1] in has


class Picker:
    """The fetcher's scheduler."""

    def __init__(self, *, layout: Layout, policy: PickerPolicy, rng: random.Random) -> None:
        self._layout = layout
        self._policy = policy
        self._rng = rng
        self._updates: dict[UpdateId, _Update] = {}
        self._begun: dict[Key, _Begun] = {}
        self._holders: dict[PeerId, _Holder] = {}
        self._pressure = 0.0
        self._picked = 0
        self._quiet_until = 0.0  # no open request is overdue before

    # --- what there is -----------------------------------------------------------------------

    def add_update(
        self,
        manifest: Manifest,
        *,
        verified: Mapping[int, Bitfield] | None = None,
        complete: Bitfield | None = None,
        ages: Sequence[int] | None = None,
    ) -> None:
        """Fetch an update; ``ages[k]`` is the rounds since its owner's chunk k was merged here.

        Args:
            verified: of chunks that are here in part, the blocks that are.
            complete: chunks that are here; changed as more arrive.
        """
        entries = manifest.entries
        if ages is None:
            ages = [1] * len(entries)
        order = sorted(
            range(len(entries)),
            key=lambda k: ((entries[k].rank + 1) * max(1, ages[k]), entries[k].rank),
        )
        merit = [0.0] * len(entries)
        for place, chunk in enumerate(order):
            merit[chunk] = place / max(1, len(entries) - 1)
        done = complete if complete is not None else Bitfield(len(entries))
        update = _Update(manifest, done, merit, [0] * len(entries))
        update.bytes_verified = sum(entries[chunk].size for chunk in done)
        self._updates[manifest.update] = update
        for chunk, blocks in (verified or {}).items():
            if chunk not in done and blocks.count:
                here = sum(self._range_size(manifest, chunk, block, 1) for block in blocks)
                free = len(blocks) - blocks.count
                self._begun[manifest.update, chunk] = _Begun(
                    blocks, entries[chunk].size - here, free
                )
                update.bytes_verified += here

    def remove_update(self, update: UpdateId) -> list[BlockRequest]:
        """Stop fetching an update; the requests to cancel."""
        if self._updates.pop(update, None) is None:
            return []
        for key in [key for key in self._begun if key[0] == update]:
            del self._begun[key]
        cancels: list[BlockRequest] = []
        for holder in self._holders.values():
            for chunk in holder.has.pop(update, ()):
                holder.candidates.discard((update, chunk))
            pipeline = holder.pipeline
            for request in [r for r in pipeline.open.values() if r.update == update]:
                pipeline.abandon(request)
                cancels.append(request)
        return cancels

    def add_holder(self, peer: PeerId) -> None:
        """A holder connected; nothing is known of it yet."""
        self.remove_holder(peer)
        self._holders[peer] = _Holder(Pipeline(peer, self._policy))

    def remove_holder(self, peer: PeerId) -> None:
        """A holder is gone; what it was asked for can be asked of others."""
        holder = self._holders.pop(peer, None)
        if holder is None:
            return
        for update, chunks in holder.has.items():
            for chunk in chunks:
                self._one_holder_less(update, chunk)
        for request in holder.pipeline.open.values():
            self._unask(request)

    def holder_has(self, peer: PeerId, update: UpdateId, chunks: Iterable[int]) -> None:
        """A holder announced chunks of an update that is known here."""
        holder = self._holders.get(peer)
        known = self._updates.get(update)
        if holder is None or known is None:
            return
        has = holder.has.setdefault(update, Bitfield(len(known.holders)))
        for chunk in chunks:
            if not has.add(chunk):
                continue
            known.holders[chunk] += 1
            if chunk in known.complete:
                continue
            begun = self._begun.get((update, chunk))
            if begun is None:
                holder.candidates.add((update, chunk))
            if known.holders[chunk] == 1:
                known.obtainable += self._missing(update, chunk)

    def _one_holder_less(self, update: UpdateId, chunk: int) -> None:
        known = self._updates[update]
        known.holders[chunk] -= 1
        if not known.holders[chunk] and chunk not in known.complete:
            known.obtainable -= self._missing(update, chunk)

    def _missing(self, update: UpdateId, chunk: int) -> int:
        """Bytes missing of an incomplete chunk."""
        begun = self._begun.get((update, chunk))
        if begun is not None:
            return begun.missing
        return self._updates[update].manifest.entries[chunk].size

    def set_pressure(self, share: float) -> None:
        """The predicted share of the updates that will miss the deadline, 0-1.

        0 picks the rarest first, 1 the most important and longest unseen.
        """
        self._pressure = min(1.0, max(0.0, share))

    # --- asking ------------------------------------------------------------------------------

    def next_requests(self, peer: PeerId, now: float) -> list[BlockRequest]:
        """What to ask of a holder now, as far as its pipeline has room."""
        holder = self._holders.get(peer)
        requests: list[BlockRequest] = []
        while holder is not None and holder.pipeline.has_room:
            found = self._find(holder, now)
            if found is None:
                break
            requests.append(self._ask(holder, *found, now))
        return requests

    def _max_blocks(self, holder: _Holder) -> int:
        return max(1, holder.pipeline.max_request_bytes // self._layout.block_size)

    def _find(self, holder: _Holder, now: float) -> tuple[Key, int, int] | None:
        """(chunk, first block, blocks) to ask of a holder: begun first, then new, then endgame."""
        limit = self._max_blocks(holder)
        pending = 0
        for key, begun in self._begun.items():
            pending += bool(begun.asked)
            if begun.free and holder.holds(key):
                return key, *_unasked(begun, limit)
        if pending < self._policy.pending_chunks or not holder.pipeline.open:
            best = self._best(holder)
            if best is not None:
                return best, *_unasked(self._begin(best), limit)
        return self._endgame(holder, now)

    def _best(self, holder: _Holder) -> Key | None:
        """The chunk to begin next: the one comparison that is the policy."""
        sample = holder.candidates.sample(self._policy.sample, self._rng)
        if not sample:
            return None
        if self._picked < self._policy.random_first:
            return sample[0]
        return max(sample, key=self._score)

    def _score(self, key: Key) -> float:
        update, chunk = key
        known = self._updates[update]
        rarity = 1.0 / max(1, known.holders[chunk])
        if self._policy.selection == "random":
            return self._rng.random()
        p = 1.0 if self._policy.selection == "importance" else self._pressure
        noise = self._policy.noise * self._rng.random()
        return p * known.merit[chunk] + (1.0 - p) * rarity + noise

    def _begin(self, key: Key) -> _Begun:
        update, chunk = key
        entry = self._updates[update].manifest.entries[chunk]
        begun = self._begun[key] = _Begun(Bitfield(entry.num_blocks), entry.size, entry.num_blocks)
        self._picked += 1
        for holder in self._holders.values():
            holder.candidates.discard(key)
        return begun

    def _endgame(self, holder: _Holder, now: float) -> tuple[Key, int, int] | None:
        """Blocks that other holders are late with, if this one has them too."""
        if now < self._quiet_until:
            return None
        limit, late = self._max_blocks(holder), False
        quiet_until = now + OVERDUE_FLOOR  # of a request that is sent from now on
        for key, begun in self._begun.items():
            for block, askers in begun.asked.items():
                overdue_at = max(self._overdue_at(asker) for asker in askers)
                if overdue_at > now:
                    quiet_until = min(quiet_until, overdue_at)
                    continue
                late = True
                count = 0
                while count < limit and self._may_ask_too(holder, key, begun, block + count):
                    count += 1
                if count:
                    return key, block, count
        self._quiet_until = now if late else quiet_until
        return None

    def _overdue_at(self, asker: tuple[PeerId, int]) -> float:
        pipeline = self._holders[asker[0]].pipeline
        return pipeline.overdue_at(pipeline.open[asker[1]])

    def _may_ask_too(self, holder: _Holder, key: Key, begun: _Begun, block: int) -> bool:
        """Whether one more holder may be asked for a block that others were asked for."""
        askers = begun.asked.get(block)
        return (
            askers is not None
            and block not in begun.here
            and len(askers) < self._policy.endgame_holders
            and holder.holds(key)
            and all(peer != holder.pipeline.peer for peer, _ in askers)
        )

    def _ask(self, holder: _Holder, key: Key, block: int, count: int, now: float) -> BlockRequest:
        size = self._range_size(self._updates[key[0]].manifest, key[1], block, count)
        request = holder.pipeline.ask(key, block, count, size, now)
        begun = self._begun[key]
        for index in request.blocks:
            askers = begun.asked.setdefault(index, [])
            begun.free -= not askers
            askers.append((request.peer, request.number))
        return request

    def _range_size(self, manifest: Manifest, chunk: int, block: int, count: int) -> int:
        return manifest.block_range(chunk, block, count, self._layout.block_size)[1]

    # --- answers -----------------------------------------------------------------------------

    def received(self, peer: PeerId, number: int, size: int, now: float) -> BlockRequest | None:
        """Match a piece to its request; None if it is of no more use.

        Raises:
            RemoteProtocolError: never asked for, answered before, or of another size.
        """
        holder = self._holders.get(peer)
        if holder is None:
            return None
        request = holder.pipeline.piece(number, size, now)
        if number in holder.pipeline.open:
            holder.pipeline.close(request)
            self._unask(request, keep=True)
        begun = self._begun.get(request.key)
        if begun is None:
            # A chunk of which nothing was here may have gone back to the candidates meanwhile.
            known = self._updates.get(request.update)
            return request if known is not None and request.chunk not in known.complete else None
        return None if all(block in begun.here for block in request.blocks) else request

    def verified(self, request: BlockRequest, good: bool, now: float) -> Received:
        """The caller checked the blocks of a piece that ``received`` handed out."""
        known = self._updates.get(request.update)
        if known is None or request.chunk in known.complete:
            return Received(0, False, ())
        begun = self._begun.get(request.key)
        if not good:
            if begun is not None:
                self._give_back(request.key, begun)
            return Received(0, False, ())
        if begun is None:
            begun = self._begin(request.key)
        duplicate = 0
        superfluous: dict[tuple[PeerId, int], None] = {}
        for block in request.blocks:
            size = self._range_size(known.manifest, request.chunk, block, 1)
            if begun.here.add(block):
                known.bytes_verified += size
                begun.missing -= size
                begun.free -= block not in begun.asked
                if known.holders[request.chunk]:
                    known.obtainable -= size
            else:
                duplicate += size
            superfluous.update(dict.fromkeys(begun.asked.get(block, ())))
        cancels = self._cancel_covered(begun, superfluous)
        complete = begun.here.complete
        if complete:
            known.complete.add(request.chunk)
            del self._begun[request.key]
        return Received(duplicate, complete, tuple(cancels))

    def _cancel_covered(
        self, begun: _Begun, asked: Iterable[tuple[PeerId, int]]
    ) -> list[BlockRequest]:
        """Requests all of whose blocks are here: they need no answer any more."""
        cancels: list[BlockRequest] = []
        for peer, number in asked:
            pipeline = self._holders[peer].pipeline
            request = pipeline.open[number]
            if all(block in begun.here for block in request.blocks):
                pipeline.abandon(request)
                self._unask(request)
                cancels.append(request)
        return cancels

    def rejected(self, peer: PeerId, number: int, now: float, reason: int = REJECT_MISSING) -> None:
        """A holder will not serve a request: it has not that chunk (any more), or is busy.

        Raises:
            RemoteProtocolError: never asked for, or answered before.
        """
        holder = self._holders.get(peer)
        request = holder.pipeline.refused(number) if holder is not None else None
        if holder is None or request is None:
            return
        holder.pipeline.close(request)
        if not (reason == REJECT_BUSY and holder.pipeline.narrow()):
            self._lacks(holder, request.key)
        self._unask(request)

    def _lacks(self, holder: _Holder, key: Key) -> None:
        """A holder announced a chunk and does not give it: as if it had not."""
        has = holder.has.get(key[0])
        if has is not None and has.discard(key[1]):
            self._one_holder_less(*key)

    def expire(self, now: float) -> list[BlockRequest]:
        """Give up requests that took far too long for their holder; the ones to cancel."""
        expired: list[BlockRequest] = []
        for holder in self._holders.values():
            pipeline = holder.pipeline
            for request in list(pipeline.open.values()):
                if now >= pipeline.gives_up_at(request):
                    pipeline.slow_down()
                    pipeline.abandon(request)
                    self._unask(request)
                    expired.append(request)
        return expired

    def next_timeout(self, now: float) -> float | None:
        """When ``expire`` or the endgame may have something to do."""
        times: list[float] = []
        for holder in self._holders.values():
            pipeline = holder.pipeline
            for request in pipeline.open.values():
                times.append(pipeline.gives_up_at(request))
                overdue = pipeline.overdue_at(request)
                if overdue > now:
                    times.append(overdue)
        return min(times, default=None)

    def _unask(self, request: BlockRequest, *, keep: bool = False) -> None:
        """Forget that a request asked for its blocks; ``keep`` where its piece is here."""
        begun = self._begun.get(request.key)
        if begun is None:
            return
        for block in request.blocks:
            askers = begun.asked[block]
            askers.remove((request.peer, request.number))
            if not askers:
                del begun.asked[block]
                begun.free += block not in begun.here
        if not keep:
            self._give_back(request.key, begun)

    def _give_back(self, key: Key, begun: _Begun) -> None:
        """A chunk of which nothing is here or asked for is not begun any more."""
        if begun.asked or begun.here.count:
            return
        del self._begun[key]
        for holder in self._holders.values():
            if holder.holds(key):
                holder.candidates.add(key)

    # --- questions ---------------------------------------------------------------------------

    def holder_rate(self, peer: PeerId) -> float:
        """Measured rate of a holder in bytes per second; 0 before it could be measured."""
        holder = self._holders.get(peer)
        return holder.pipeline.rate or 0.0 if holder is not None else 0.0

    def open_requests(self, peer: PeerId) -> int:
        """Requests to a holder that wait for their answer."""
        holder = self._holders.get(peer)
        return len(holder.pipeline.open) if holder is not None else 0

    def bytes_verified(self, update: UpdateId) -> int:
        """Verified bytes of an update; 0 for one that is not fetched."""
        known = self._updates.get(update)
        return known.bytes_verified if known is not None else 0

    def missing_available(self, update: UpdateId) -> bool:
        """Whether some holder has a chunk of an update that is missing here."""
        known = self._updates.get(update)
        return known is not None and known.obtainable > 0

    def chunk_states(self, update: UpdateId) -> str:
        """One character a chunk: "#" here, "+" begun, "." missing."""
        known = self._updates.get(update)
        if known is None:
            return ""
        return "".join(
            "#" if chunk in known.complete else "+" if (update, chunk) in self._begun else "."
            for chunk in range(len(known.holders))
        )

    def validate(self) -> None:
        """Check the invariants; for tests."""
        for peer, holder in self._holders.items():
            pipeline = holder.pipeline
            assert pipeline.in_flight == sum(r.size for r in pipeline.open.values())
            assert len(pipeline.open) <= self._policy.active_requests
            assert not pipeline.open.keys() & pipeline.abandoned.keys()
            for request in pipeline.open.values():
                begun = self._begun[request.key]
                for block in request.blocks:
                    assert (peer, request.number) in begun.asked[block]
            has = {(update, chunk) for update, chunks in holder.has.items() for chunk in chunks}
            assert set(holder.candidates) == {
                key
                for key in has
                if key not in self._begun and key[1] not in self._updates[key[0]].complete
            }
        for key, begun in self._begun.items():
            self._validate_begun(key, begun)
        for update, known in self._updates.items():
            obtainable = 0
            for chunk, count in enumerate(known.holders):
                having = sum(holder.holds((update, chunk)) for holder in self._holders.values())
                assert count == having
                if count and chunk not in known.complete:
                    obtainable += self._missing(update, chunk)
            assert known.obtainable == obtainable

    def _validate_begun(self, key: Key, begun: _Begun) -> None:
        manifest = self._updates[key[0]].manifest
        assert not begun.here.complete
        assert begun.here.count or begun.asked
        assert begun.missing == sum(
            self._range_size(manifest, key[1], block, 1)
            for block in range(len(begun.here))
            if block not in begun.here
        )
        assert begun.free == sum(
            block not in begun.here and block not in begun.asked for block in range(len(begun.here))
        )
        for askers in begun.asked.values():
            assert 0 < len(askers) <= self._policy.endgame_holders
            assert len({peer for peer, _ in askers}) == len(askers)
            for asker, number in askers:
                assert self._holders[asker].pipeline.open[number].key == key


def _unasked(begun: _Begun, limit: int) -> tuple[int, int]:
    """(first block, number) of the first run of blocks neither here nor asked for."""
    start = count = 0
    for block in range(len(begun.here)):
        if block in begun.here or block in begun.asked:
            if count:
                break
            continue
        if not count:
            start = block
        count += 1
        if count == limit:
            break
    return start, count
