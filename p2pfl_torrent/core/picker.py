"""Which blocks to ask of which holder next.

What is tracked, and why:

1. Per update and chunk: how many holders announced it (rarity), and a rank of importance x age
   within its update. Importance alone would let the same chunks win every round while the rest
   drifts apart; times age, what was long unseen wins too.
2. Chunks begun: some block asked for or here. They are finished first, since only a whole chunk
   can be announced and averaged; their number is bounded (the pending pool).
3. Per holder: the chunks it has that are missing and not begun, in a set that can be sampled in
   O(1). A pick looks at a bounded sample, never at all chunks: near the best, and cheap.
4. Per holder: open requests (the active pool), its measured rate, and so how many bytes it may
   have in flight: about a second's worth, or heartbeats drown behind them.
5. Requests that are overdue by their holder's own rate: near the end another holder is asked too
   (endgame), and the first answer cancels the other.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.manifest import Manifest, UpdateId
from p2pfl_torrent.core.messages import MAX_REQUEST_BYTES
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.sampling import SampleSet

Key = tuple[UpdateId, int]
"""An update's chunk."""


@dataclass(frozen=True, slots=True)
class PickerPolicy:
    """Local settings.

    Attributes:
        selection: "rarest_first" (turning to importance x age by the pressure), "importance"
            (that alone) or "random".
        active_requests: open requests per holder (the seed's active pool).
        pending_chunks: chunks begun at once (the seed's pending pool).
        endgame_holders: holders asked for the same blocks when one of them is overdue.
        target_seconds: of a holder's rate that may be in flight.
        request_seconds: of a holder's rate that one request asks for; a fast link asks for a whole
            chunk in one frame, a slow one for one block.
        first_bytes: in flight before a rate is known: half a second of 1 Mbit/s.
        sample: chunks compared per pick.
        noise: of the score, so that peers with equal views differ.
        random_first: chunks picked at random at first, to have something to offer soon.
        patience: a request is given up after this many times its expected time, and
        patience_floor: seconds at least; a busy holder's queue is not its fault.
        overdue: times its expected time after which the endgame asks another holder too.
    """

    selection: str = "rarest_first"
    active_requests: int = 10
    pending_chunks: int = 20
    endgame_holders: int = 2
    target_seconds: float = 1.0
    request_seconds: float = 0.25
    first_bytes: int = 64 << 10
    sample: int = 48
    noise: float = 0.05
    random_first: int = 2
    patience: float = 6.0
    patience_floor: float = 5.0
    overdue: float = 3.0


FIRST_RATE = 16_000.0  # bytes per second assumed of an unmeasured holder: 128 kbit/s
RATE_WEIGHT = 0.3  # of a new sample: follows a change within a few pieces
OVERDUE_FLOOR = 0.25  # seconds; below that a hiccup of the scheduler looks like a slow holder


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """Blocks asked of one holder."""

    peer: PeerId
    number: int
    update: UpdateId
    chunk: int
    block: int
    count: int
    size: int
    sent_at: float
    expected: float

    @property
    def key(self) -> Key:
        """The chunk it is part of."""
        return self.update, self.chunk


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


@dataclass(slots=True)
class _Begun:
    here: Bitfield
    asked: dict[int, list[tuple[PeerId, int]]] = field(default_factory=dict)


@dataclass(slots=True)
class _Holder:
    has: dict[UpdateId, Bitfield] = field(default_factory=dict)
    candidates: SampleSet[Key] = field(default_factory=SampleSet)
    open: dict[int, BlockRequest] = field(default_factory=dict)
    abandoned: dict[int, BlockRequest] = field(default_factory=dict)
    in_flight: int = 0
    next_number: int = 0
    rate: float | None = None
    busy_since: float = 0.0


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

    # --- what there is -----------------------------------------------------------------------

    def add_update(
        self,
        manifest: Manifest,
        *,
        verified: Mapping[int, Bitfield] | None = None,
        complete: Bitfield | None = None,
        ages: Sequence[int] | None = None,
    ) -> None:
        """Fetch an update; ``ages[k]`` is the rounds since its owner's chunk k was merged here."""
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
                self._begun[manifest.update, chunk] = _Begun(blocks)
                for block in blocks:
                    update.bytes_verified += self._range_size(manifest, chunk, block, 1)

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
            for request in [r for r in holder.open.values() if r.update == update]:
                self._abandon(holder, request)
                cancels.append(request)
        return cancels

    def add_holder(self, peer: PeerId) -> None:
        """A holder connected; nothing is known of it yet."""
        self.remove_holder(peer)
        self._holders[peer] = _Holder()

    def remove_holder(self, peer: PeerId) -> None:
        """A holder is gone; what it was asked for can be asked of others."""
        holder = self._holders.pop(peer, None)
        if holder is None:
            return
        for request in holder.open.values():
            self._unask(request)
        for update, chunks in holder.has.items():
            known = self._updates.get(update)
            for chunk in chunks if known is not None else ():
                known.holders[chunk] -= 1  # type: ignore[union-attr]

    def holder_has(self, peer: PeerId, update: UpdateId, chunks: Iterable[int]) -> None:
        """A holder announced chunks of an update that is known here."""
        holder = self._holders.get(peer)
        known = self._updates.get(update)
        if holder is None or known is None:
            return
        has = holder.has.setdefault(update, Bitfield(len(known.holders)))
        for chunk in chunks:
            if has.add(chunk):
                known.holders[chunk] += 1
                if chunk not in known.complete and (update, chunk) not in self._begun:
                    holder.candidates.add((update, chunk))

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
        while holder is not None and self._has_room(holder):
            found = self._find(peer, holder, now)
            if found is None:
                break
            requests.append(self._ask(peer, holder, found, now))
        return requests

    def _has_room(self, holder: _Holder) -> bool:
        if len(holder.open) >= self._policy.active_requests:
            return False
        return holder.in_flight < self._window(holder) or not holder.open

    def _window(self, holder: _Holder) -> float:
        if holder.rate is None:
            return self._policy.first_bytes
        return max(self._policy.first_bytes / 4, holder.rate * self._policy.target_seconds)

    def _max_blocks(self, holder: _Holder) -> int:
        rate = holder.rate if holder.rate is not None else FIRST_RATE
        size = min(MAX_REQUEST_BYTES, rate * self._policy.request_seconds)
        return max(1, int(size) // self._layout.block_size)

    def _find(self, peer: PeerId, holder: _Holder, now: float) -> tuple[Key, int, int] | None:
        """(chunk, first block, blocks) to ask of a holder: begun first, then new, then endgame."""
        limit = self._max_blocks(holder)
        for key, begun in self._begun.items():
            if self._holds(holder, key):
                start, count = _unasked(begun, limit)
                if count:
                    return key, start, count
        if len(self._begun) < self._policy.pending_chunks or not holder.open:
            key_ = self._best(holder)
            if key_ is not None:
                self._begin(key_)
                start, count = _unasked(self._begun[key_], limit)
                return key_, start, count
        return self._endgame(peer, holder, now)

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

    def _begin(self, key: Key) -> None:
        update, chunk = key
        blocks = self._updates[update].manifest.entries[chunk].num_blocks
        self._begun[key] = _Begun(Bitfield(blocks))
        self._picked += 1
        for holder in self._holders.values():
            holder.candidates.discard(key)

    def _endgame(self, peer: PeerId, holder: _Holder, now: float) -> tuple[Key, int, int] | None:
        """Blocks that another holder is late with, if this one can deliver them sooner."""
        for key, begun in self._begun.items():
            if not self._holds(holder, key):
                continue
            for askers in begun.asked.values():
                if len(askers) >= self._policy.endgame_holders:
                    continue
                other, number = askers[0]
                request = self._holders[other].open[number]
                if other == peer or now - request.sent_at < self._overdue_after(request):
                    continue
                missing = [
                    block
                    for block in range(request.block, request.block + request.count)
                    if block not in begun.here
                ]
                if missing:
                    return key, missing[0], min(len(missing), self._max_blocks(holder))
        return None

    def _overdue_after(self, request: BlockRequest) -> float:
        return max(OVERDUE_FLOOR, self._policy.overdue * request.expected)

    def _holds(self, holder: _Holder, key: Key) -> bool:
        has = holder.has.get(key[0])
        return has is not None and key[1] in has

    def _ask(
        self, peer: PeerId, holder: _Holder, found: tuple[Key, int, int], now: float
    ) -> BlockRequest:
        (update, chunk), block, count = found
        size = self._range_size(self._updates[update].manifest, chunk, block, count)
        rate = holder.rate if holder.rate is not None else FIRST_RATE
        request = BlockRequest(
            peer, holder.next_number, update, chunk, block, count, size, now,
            (holder.in_flight + size) / rate,
        )  # fmt: skip
        if not holder.open:
            holder.busy_since = now
        holder.next_number = (holder.next_number + 1) & 0xFFFFFFFF
        holder.open[request.number] = request
        holder.in_flight += size
        asked = self._begun[update, chunk].asked
        for index in range(block, block + count):
            asked.setdefault(index, []).append((peer, request.number))
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
        request = holder.open.get(number)
        late = holder.abandoned.pop(number, None)
        if request is None and late is None:
            raise RemoteProtocolError(f"piece {number} was never asked for", peer)
        expected = request or late
        assert expected is not None
        if size != expected.size:
            raise RemoteProtocolError(f"piece of {size} bytes instead of {expected.size}", peer)
        if request is not None:
            self._measure(holder, request, now)
            self._close(holder, request)
        begun = self._begun.get(expected.key)
        if begun is None:
            return None
        wanted = range(expected.block, expected.block + expected.count)
        return None if all(block in begun.here for block in wanted) else expected

    def _measure(self, holder: _Holder, request: BlockRequest, now: float) -> None:
        since = max(request.sent_at, holder.busy_since)
        holder.busy_since = now
        sample = request.size / max(1e-4, now - since)
        if holder.rate is None:
            holder.rate = sample
        else:
            holder.rate += RATE_WEIGHT * (sample - holder.rate)

    def verified(self, request: BlockRequest, good: bool, now: float) -> Received:
        """The caller checked the blocks of a piece that ``received`` handed out."""
        begun = self._begun.get(request.key)
        known = self._updates.get(request.update)
        if not good or begun is None or known is None:
            return Received(0, False, ())
        duplicate = 0
        superfluous: dict[tuple[PeerId, int], None] = {}
        for block in range(request.block, request.block + request.count):
            size = self._range_size(known.manifest, request.chunk, block, 1)
            if begun.here.add(block):
                known.bytes_verified += size
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
            holder = self._holders.get(peer)
            request = holder.open.get(number) if holder is not None else None
            if holder is None or request is None:
                continue
            if all(b in begun.here for b in range(request.block, request.block + request.count)):
                self._abandon(holder, request)
                cancels.append(request)
        return cancels

    def rejected(self, peer: PeerId, number: int, now: float) -> None:
        """A holder will not serve a request: it does not have that chunk (any more).

        Raises:
            RemoteProtocolError: never asked for, or answered before.
        """
        holder = self._holders.get(peer)
        if holder is None or holder.abandoned.pop(number, None) is not None:
            return
        request = holder.open.get(number)
        if request is None:
            raise RemoteProtocolError(f"reject of {number}, which was never asked for", peer)
        self._close(holder, request)
        self._lacks(holder, request.key)

    def _lacks(self, holder: _Holder, key: Key) -> None:
        """A holder announced a chunk and does not give it: as if it had not."""
        has = holder.has.get(key[0])
        if has is not None and key[1] in has:
            left = Bitfield(len(has))
            for chunk in has:
                if chunk != key[1]:
                    left.add(chunk)
            holder.has[key[0]] = left
            self._updates[key[0]].holders[key[1]] -= 1

    def expire(self, now: float) -> list[BlockRequest]:
        """Give up requests that took far too long for their holder; the ones to cancel."""
        expired: list[BlockRequest] = []
        for holder in self._holders.values():
            for request in list(holder.open.values()):
                if now >= self._gives_up_at(holder, request):
                    if holder.rate is not None:
                        holder.rate /= 2
                    self._abandon(holder, request)
                    expired.append(request)
        return expired

    def _gives_up_at(self, holder: _Holder, request: BlockRequest) -> float:
        # A holder that is answering others of ours in order is not late with this one.
        since = max(request.sent_at, holder.busy_since)
        patience = self._policy.patience * request.expected
        return since + max(self._policy.patience_floor, patience)

    def next_timeout(self, now: float) -> float | None:
        """When ``expire`` or the endgame may have something to do."""
        times: list[float] = []
        for holder in self._holders.values():
            for request in holder.open.values():
                times.append(self._gives_up_at(holder, request))
                overdue = request.sent_at + self._overdue_after(request)
                if overdue > now:
                    times.append(overdue)
        return min(times, default=None)

    def _abandon(self, holder: _Holder, request: BlockRequest) -> None:
        self._close(holder, request)
        holder.abandoned[request.number] = request

    def _close(self, holder: _Holder, request: BlockRequest) -> None:
        del holder.open[request.number]
        holder.in_flight -= request.size
        self._unask(request)

    def _unask(self, request: BlockRequest) -> None:
        begun = self._begun.get(request.key)
        if begun is None:
            return
        for block in range(request.block, request.block + request.count):
            askers = begun.asked.get(block, [])
            if (request.peer, request.number) in askers:
                askers.remove((request.peer, request.number))
            if not askers:
                begun.asked.pop(block, None)

    # --- questions ---------------------------------------------------------------------------

    def holder_rate(self, peer: PeerId) -> float:
        """Measured rate of a holder in bytes per second; 0 before the first piece."""
        holder = self._holders.get(peer)
        return holder.rate or 0.0 if holder is not None else 0.0

    def open_requests(self, peer: PeerId) -> int:
        """Requests to a holder that wait for their answer."""
        holder = self._holders.get(peer)
        return len(holder.open) if holder is not None else 0

    def bytes_verified(self, update: UpdateId) -> int:
        """Verified bytes of an update; 0 for one that is not fetched."""
        known = self._updates.get(update)
        return known.bytes_verified if known is not None else 0

    def missing_available(self, update: UpdateId) -> bool:
        """Whether some holder has a chunk of an update that is missing here."""
        known = self._updates.get(update)
        return known is not None and any(
            count and chunk not in known.complete for chunk, count in enumerate(known.holders)
        )

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
            assert holder.in_flight == sum(r.size for r in holder.open.values())
            assert len(holder.open) <= self._policy.active_requests
            for request in holder.open.values():
                begun = self._begun[request.key]
                for block in range(request.block, request.block + request.count):
                    assert (peer, request.number) in begun.asked[block]
            for key in holder.candidates:
                assert key not in self._begun
                assert key[1] not in self._updates[key[0]].complete
        for key, begun in self._begun.items():
            assert not begun.here.complete
            for askers in begun.asked.values():
                assert 0 < len(askers) <= self._policy.endgame_holders
                for asker, number in askers:
                    assert self._holders[asker].open[number].key == key
        for update, known in self._updates.items():
            for chunk, count in enumerate(known.holders):
                having = sum(
                    chunk in h.has[update] for h in self._holders.values() if update in h.has
                )
                assert count == having


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
