"""Which blocks to ask of which holder next.

What is tracked, and why:

1. Per update and chunk: how many holders announced it (rarity), and a rank of importance x age
   within its update. Importance alone would let the same chunks win every round while the rest
   drifts apart; times age, what was long unseen wins too. Per update: the bytes still missing that
   some holder has, so that whether a round may settle is a look at a number.
2. Chunks begun: some block asked for or here. They are finished first, since only a whole chunk
   can be announced and averaged; the number being asked for is bounded (the pending pool).
3. Per update and chunk: a stagger, drawn here once. Peers with equal views take different chunks,
   and one peer takes from all owners in turn.
4. Per holder: the chunks it has that are missing and not begun, in a heap by score. Scores mostly
   fall (others announce the same chunk), so the top is scored anew when it is looked at, and sinks
   if it fell; after what raises scores (a holder left, the pressure changed) the heap is made anew
   at its next use. So the pick is the best, and no event looks at all chunks.
5. Per holder: open requests (the active pool), its measured rate and lag, and so how many bytes it
   may have in flight (about a second's worth, or heartbeats drown behind them) and when it will
   deliver (``pipeline``). A slow holder is not asked for what another brings much sooner.
6. Endgame: when all that is missing and to be had was asked for, a holder that has nothing else to
   bring is asked for what another brings much later; and at any time for what another is late
   with. The first answer cancels the other.
7. A holder that let its patience pass is asked nothing until it has answered what it owes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.manifest import Manifest, UpdateId
from p2pfl_torrent.core.messages import REJECT_BUSY, REJECT_MISSING
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.pipeline import HICCUP, BlockRequest, Key, PickerPolicy, Pipeline

__all__ = ["BlockRequest", "Picker", "PickerPolicy", "Received"]

PRESSURE_STEP = 0.125  # a smaller change of the pressure is not worth ordering all chunks anew


@dataclass(frozen=True, slots=True)
class Received:
    """What a checked piece changed.

    Attributes:
        duplicate_bytes: of blocks that were here already.
        chunk_complete: every block of its chunk is here now.
        cancels: requests to other holders that are superfluous now.
        blocks: that were not here before.
    """

    duplicate_bytes: int
    chunk_complete: bool
    cancels: tuple[BlockRequest, ...]
    blocks: tuple[int, ...] = ()


@dataclass(slots=True)
class _Update:
    manifest: Manifest
    complete: Bitfield
    settled: Bitfield  # chunks that are here or not wanted: none of them is asked for
    bytes_wanted: int
    merit: list[float]  # per chunk, rank of importance x age, 0-1
    stagger: list[float]  # per chunk, 0-1, evenly spread in an order drawn here
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
    order: list[tuple[float, UpdateId, int]] = field(default_factory=list)  # heap: -score, chunk
    ordered_in: int = 0  # the epoch in which the heap was made

    def holds(self, key: Key) -> bool:
        has = self.has.get(key[0])
        return has is not None and key[1] in has


class Picker:
    """The fetcher's scheduler."""

    def __init__(self, *, layout: Layout, policy: PickerPolicy, rng: random.Random) -> None:
        self._layout = layout
        self._largest = 1  # bytes of a chunk
        self._policy = policy
        self._rng = rng
        self._updates: dict[UpdateId, _Update] = {}
        self._begun: dict[Key, _Begun] = {}
        self._holders: dict[PeerId, _Holder] = {}
        self._pressure = 0.0
        self._picked = 0
        self._epoch = 0  # counts what makes heaps stale
        self._bytes_missing = 0

    # --- what there is -----------------------------------------------------------------------

    def add_update(
        self,
        manifest: Manifest,
        *,
        verified: Mapping[int, Bitfield] | None = None,
        complete: Bitfield | None = None,
        wanted: Bitfield | None = None,
        ages: Sequence[int] | None = None,
    ) -> None:
        """Fetch an update; ``ages[k]`` is the rounds since its owner's chunk k was merged here.

        Args:
            verified: of chunks that are here in part, the blocks that are.
            complete: chunks that are here; changed as more arrive.
            wanted: chunks to fetch; None for all.
        """
        entries = manifest.entries
        self._largest = max(self._largest, *(entry.size for entry in entries))
        if ages is None or not self._policy.ages:
            ages = [1] * len(entries)
        order = sorted(
            range(len(entries)),
            key=lambda k: ((entries[k].rank + 1) * max(1, ages[k]), entries[k].rank),
        )
        merit = [0.0] * len(entries)
        for place, chunk in enumerate(order):
            merit[chunk] = place / max(1, len(entries) - 1)
        done = complete if complete is not None else Bitfield(len(entries))
        settled = Bitfield.of(len(entries), done)
        for chunk in range(len(entries)):
            if wanted is not None and chunk not in wanted:
                settled.add(chunk)
        missing = sum(entry.size for chunk, entry in enumerate(entries) if chunk not in settled)
        here = sum(entries[chunk].size for chunk in done)
        update = _Update(
            manifest, done, settled, here + missing,
            merit, self._stagger(len(entries)), [0] * len(entries), here,
        )  # fmt: skip
        self._updates[manifest.update] = update
        for chunk, blocks in (verified or {}).items():
            if chunk not in settled and blocks.count:
                here = sum(self._range_size(manifest, chunk, block, 1) for block in blocks)
                free = len(blocks) - blocks.count
                self._begun[manifest.update, chunk] = _Begun(
                    blocks, entries[chunk].size - here, free
                )
                update.bytes_verified += here
        self._bytes_missing += update.bytes_wanted - update.bytes_verified

    def _stagger(self, chunks: int) -> list[float]:
        order = list(range(chunks))
        self._rng.shuffle(order)
        return [(place + self._rng.random()) / chunks for place in order]

    def remove_update(self, update: UpdateId) -> list[BlockRequest]:
        """Stop fetching an update; the requests to cancel."""
        known = self._updates.pop(update, None)
        if known is None:
            return []
        self._bytes_missing -= known.bytes_wanted - known.bytes_verified
        self._epoch += 1  # or its chunks would stay at the bottom of every heap
        for key in [key for key in self._begun if key[0] == update]:
            del self._begun[key]
        cancels: list[BlockRequest] = []
        for holder in self._holders.values():
            holder.has.pop(update, None)
            pipeline = holder.pipeline
            for request in [r for r in pipeline.open.values() if r.update == update]:
                pipeline.abandon(request)
                cancels.append(request)
        return cancels

    def add_holder(self, peer: PeerId) -> None:
        """A holder connected; nothing is known of it yet."""
        self.remove_holder(peer)
        self._holders[peer] = _Holder(Pipeline(peer, self._policy), ordered_in=self._epoch)

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
        self._epoch += 1

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
            if chunk in known.settled:
                continue
            if (update, chunk) not in self._begun:
                self._enqueue(holder, (update, chunk))
            if known.holders[chunk] == 1:
                known.obtainable += self._missing(update, chunk)

    def _one_holder_less(self, update: UpdateId, chunk: int) -> None:
        known = self._updates[update]
        known.holders[chunk] -= 1
        if not known.holders[chunk] and chunk not in known.settled:
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
        share = min(1.0, max(0.0, share))
        extreme = share in (0.0, 1.0) and share != self._pressure
        if extreme or abs(share - self._pressure) >= PRESSURE_STEP:
            self._pressure = share
            self._epoch += 1

    def measured(self, peer: PeerId, round_trip: float) -> None:
        """A holder answered a ping after so many seconds."""
        holder = self._holders.get(peer)
        if holder is not None:
            holder.pipeline.measured(round_trip)

    # --- asking ------------------------------------------------------------------------------

    def next_requests(self, peer: PeerId, now: float) -> list[BlockRequest]:
        """What to ask of a holder now, as far as its pipeline has room."""
        holder = self._holders.get(peer)
        requests: list[BlockRequest] = []
        while holder is not None:
            limit = holder.pipeline.room(self._layout.block_size, self._largest)
            found = self._find(holder, limit, now) if limit else None
            if found is None:
                break
            requests.append(self._ask(holder, *found, now))
        return requests

    def _find(self, holder: _Holder, limit: int, now: float) -> tuple[Key, int, int] | None:
        """(chunk, first block, blocks) to ask of a holder: begun first, then new, then endgame."""
        pending = 0
        for key, begun in self._begun.items():
            pending += bool(begun.asked)
            if begun.free and holder.holds(key) and self._is_worth(holder, key, limit, now):
                return key, *_unasked(begun, limit)
        if pending < self._policy.pending_chunks or holder.pipeline.dry:
            for key in self._best(holder):
                if self._is_worth(holder, key, limit, now):
                    return key, *_unasked(self._begin(key), limit)
        return self._endgame(holder, limit, now)

    def _best(self, holder: _Holder) -> Iterator[Key]:
        """Chunks to begin next with a holder, the best first; a few, where the caller declines."""
        if holder.ordered_in != self._epoch:
            self._order(holder)
        order = holder.order
        if order and self._picked < self._policy.random_first:
            drawn = self._rng.choice(order)[1:]
            if self._could_begin(holder, drawn):
                yield drawn
        declined: list[tuple[float, UpdateId, int]] = []
        try:
            while order and len(declined) < self._policy.look:
                negative, update, chunk = order[0]
                key = update, chunk
                if not self._could_begin(holder, key):
                    heappop(order)
                elif self._score(key) < -negative:
                    heapreplace(order, (-self._score(key), *key))
                else:
                    yield key
                    declined.append(heappop(order))
        finally:
            for entry in declined:
                heappush(order, entry)

    def _could_begin(self, holder: _Holder, key: Key) -> bool:
        known = self._updates.get(key[0])
        if known is None or key[1] in known.settled or key in self._begun:
            return False
        return holder.holds(key)

    def _enqueue(self, holder: _Holder, key: Key) -> None:
        """A chunk of a holder may be begun; a stale heap will find it when it is made anew."""
        if holder.ordered_in == self._epoch:
            heappush(holder.order, (-self._score(key), *key))

    def _order(self, holder: _Holder) -> None:
        holder.order = [
            (-self._score((update, chunk)), update, chunk)
            for update, chunks in holder.has.items()
            for chunk in chunks
            if self._could_begin(holder, (update, chunk))
        ]
        heapify(holder.order)
        holder.ordered_in = self._epoch

    def _score(self, key: Key) -> float:
        """How soon to begin a chunk: the one comparison that is the policy."""
        known, chunk = self._updates[key[0]], key[1]
        stagger = known.stagger[chunk]
        if self._policy.selection == "random":
            return stagger
        p = 1.0 if self._policy.selection == "importance" else self._pressure
        rarity = 1.0 / max(1, known.holders[chunk])
        return p * known.merit[chunk] + (1.0 - p) * rarity + self._policy.noise * stagger

    def _is_worth(self, holder: _Holder, key: Key, limit: int, now: float) -> bool:
        """Whether to ask a holder for what others may have too.

        Not if another will deliver it much sooner (in less than half the time), unless this one
        would idle and all that is missing takes longer than this one needs to deliver.
        """
        nbytes = limit * self._layout.block_size
        mine = holder.pipeline.delay(nbytes, now)
        if mine <= HICCUP or holder.pipeline.rate is None:
            return True
        pipelines = [h.pipeline for h in self._holders.values() if h is holder or h.holds(key)]
        usable = [p for p in pipelines if p.rate is not None and p.usable]
        if not any(2.0 * pipeline.delay(nbytes, now) + HICCUP < mine for pipeline in usable):
            return True
        if holder.pipeline.open:
            return False
        return self._bytes_missing >= mine * sum(p.rate for p in usable if p.rate is not None)

    def _begin(self, key: Key) -> _Begun:
        update, chunk = key
        entry = self._updates[update].manifest.entries[chunk]
        begun = self._begun[key] = _Begun(Bitfield(entry.num_blocks), entry.size, entry.num_blocks)
        self._picked += 1
        return begun

    def _endgame(self, holder: _Holder, limit: int, now: float) -> tuple[Key, int, int] | None:
        """Blocks that another holder will bring much later than this one would, or is late with."""
        much_later = 2.0 * holder.pipeline.delay(limit * self._layout.block_size, now) + HICCUP
        all_asked = self._all_asked()
        for other in self._holders.values():
            if other is holder or other.pipeline.longest(now) <= much_later:
                continue
            if not all_asked and other.pipeline.overdue(now) <= much_later:
                continue
            for request in other.pipeline.open.values():
                if other.pipeline.remaining(request, now) <= much_later:
                    continue
                for block in request.blocks:
                    count = 0
                    while count < limit and self._may_ask_too(holder, request.key, block + count):
                        count += 1
                    if count:
                        return request.key, block, count
        return None

    def _all_asked(self) -> bool:
        """Whether as much is in flight as is missing and to be had: before, nobody is waited for
        with whom something else could not be had meanwhile."""
        in_flight = sum(holder.pipeline.in_flight for holder in self._holders.values())
        return in_flight >= sum(known.obtainable for known in self._updates.values())

    def _may_ask_too(self, holder: _Holder, key: Key, block: int) -> bool:
        """Whether one more holder may be asked for a block that others were asked for."""
        begun = self._begun[key]
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
            return request if known is not None and request.chunk not in known.settled else None
        return None if all(block in begun.here for block in request.blocks) else request

    def verified(self, request: BlockRequest, good: bool, now: float) -> Received:
        """The caller checked the blocks of a piece that ``received`` handed out."""
        known = self._updates.get(request.update)
        if known is None or request.chunk in known.settled:
            return Received(0, False, ())
        begun = self._begun.get(request.key)
        if not good:
            if begun is not None:
                self._give_back(request.key, begun)
            return Received(0, False, ())
        if begun is None:
            begun = self._begin(request.key)
        duplicate = 0
        fresh: list[int] = []
        superfluous: dict[tuple[PeerId, int], None] = {}
        for block in request.blocks:
            size = self._range_size(known.manifest, request.chunk, block, 1)
            if begun.here.add(block):
                fresh.append(block)
                known.bytes_verified += size
                self._bytes_missing -= size
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
            known.settled.add(request.chunk)
            del self._begun[request.key]
        return Received(duplicate, complete, tuple(cancels), tuple(fresh))

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
        """Give up on holders that took far too long; the requests to cancel.

        A holder answers in order, so with its oldest request all the others wait too.
        """
        expired: list[BlockRequest] = []
        for holder in self._holders.values():
            pipeline = holder.pipeline
            oldest = next(iter(pipeline.open.values()), None)
            if oldest is None or now < pipeline.gives_up_at(oldest):
                continue
            pipeline.slow_down()
            for request in list(pipeline.open.values()):
                pipeline.expire(request)
                self._unask(request)
                expired.append(request)
        return expired

    def next_timeout(self, now: float) -> float | None:
        """When ``expire`` or the endgame may have something to do."""
        times: list[float] = []
        for holder in self._holders.values():
            for request in holder.pipeline.open.values():
                times.append(holder.pipeline.gives_up_at(request))
                # While it is late, others may become worth asking for the same: look now and then.
                times.append(max(now, holder.pipeline.late_from) + HICCUP)
                break
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
                self._enqueue(holder, key)

    # --- questions ---------------------------------------------------------------------------

    def held(self, update: UpdateId) -> Bitfield:
        """A copy of which chunks are here; of no length for an update that is not fetched."""
        known = self._updates.get(update)
        if known is None:
            return Bitfield(0)
        return Bitfield.from_bytes(known.complete.to_bytes(), len(known.complete))

    def availability(self, update: UpdateId) -> list[int]:
        """Per chunk, how many holders announced it; empty for an update that is not fetched."""
        known = self._updates.get(update)
        return list(known.holders) if known is not None else []

    def delay(self, peer: PeerId, nbytes: int, now: float) -> float:
        """Seconds until a holder would deliver bytes asked for now; infinite for a stranger."""
        holder = self._holders.get(peer)
        return holder.pipeline.delay(nbytes, now) if holder is not None else float("inf")

    def holder_rate(self, peer: PeerId) -> float:
        """Measured rate of a holder in bytes per second; 0 before it could be measured."""
        holder = self._holders.get(peer)
        return holder.pipeline.rate or 0.0 if holder is not None else 0.0

    def total_rate(self) -> float:
        """Measured rates of all holders, which may serve one chunk; infinite while one is not."""
        rates = (holder.pipeline.rate for holder in self._holders.values())
        return sum(math.inf if rate is None else rate for rate in rates)

    def least_unasked(self) -> int:
        """Bytes, at least, to ask for still until one more chunk is here; 0 where none is missing.

        What was asked for may arrive at any moment: nobody knows how much of it is on the way.
        """
        size = self._layout.block_size
        begun = (
            max(0, chunk.free - 1) * size for chunk in self._begun.values()
        )  # one may be short
        untouched = (
            entry.size
            for update, known in self._updates.items()
            for chunk, entry in enumerate(known.manifest.entries)
            if chunk not in known.settled and (update, chunk) not in self._begun
        )
        return min((*begun, *untouched), default=0)

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
        """One character a chunk: "#" here, "+" begun, "." missing, "-" not wanted."""
        known = self._updates.get(update)
        if known is None:
            return ""
        return "".join(
            "#"
            if chunk in known.complete
            else "-"
            if chunk in known.settled
            else "+"
            if (update, chunk) in self._begun
            else "."
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
            assert pipeline.expired <= pipeline.abandoned.keys()
            self._validate_order(holder)
        for key, begun in self._begun.items():
            self._validate_begun(key, begun)
        for update, known in self._updates.items():
            obtainable = 0
            for chunk, count in enumerate(known.holders):
                having = sum(holder.holds((update, chunk)) for holder in self._holders.values())
                assert count == having
                if count and chunk not in known.settled:
                    obtainable += self._missing(update, chunk)
            assert known.obtainable == obtainable
        assert self._bytes_missing == sum(
            known.bytes_wanted - known.bytes_verified for known in self._updates.values()
        )

    def _validate_order(self, holder: _Holder) -> None:
        """Every chunk that a holder could begin is in its heap, with at least its score."""
        if holder.ordered_in != self._epoch:
            return
        stored: dict[Key, float] = {}
        for negative, update, chunk in holder.order:
            stored[update, chunk] = max(-negative, stored.get((update, chunk), -negative))
        for update, chunks in holder.has.items():
            for chunk in chunks:
                if self._could_begin(holder, (update, chunk)):
                    assert stored[update, chunk] >= self._score((update, chunk))

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
