"""The fetcher's side of the chunk exchange: learn manifests, ask for blocks, check what comes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.events import Drop, Effect, Emit, StoreBlocks, StoreComplete, ToHolder
from p2pfl_torrent.core.ledger import Ledger
from p2pfl_torrent.core.manifest import Manifest, UpdateId
from p2pfl_torrent.core.messages import Availability, Cancel, GetManifest, Have, Piece, Request
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.picker import BlockRequest, Picker
from p2pfl_torrent.core.reports import BlockRefused, ChunkReceived

MAX_WANTED = 1024  # manifests heard of but not here: members x rounds kept, with room
MANIFEST_PATIENCE = 10.0  # seconds for 3 KB at 128 kbit/s behind a second of data, many times over
BAD_BLOCK_BAN = 600.0  # seconds; a block that differs from its owner's hash is no accident on Noise


@dataclass(slots=True)
class _Wanted:
    """A manifest that is not here: who offers it, with which chunks, and who was asked."""

    round: int | None
    offers: dict[PeerId, set[int]] = field(default_factory=dict)
    asked: PeerId | None = None
    asked_at: float = 0.0


class Fetching:
    """What this peer still needs, and whom it asks."""

    def __init__(self, ledger: Ledger, picker: Picker, block_size: int, num_chunks: int) -> None:
        self._ledger = ledger
        self._picker = picker
        self._block_size = block_size
        self._num_chunks = num_chunks
        self._wanted: dict[UpdateId, _Wanted] = {}
        self._remote: dict[PeerId, dict[UpdateId, Bitfield]] = {}
        self.bytes_received: dict[UpdateId, int] = {}
        self.bytes_duplicate = 0
        self.requests_sent = 0
        self.blocks_refused = 0

    @property
    def holders(self) -> set[PeerId]:
        """Peers this one may ask."""
        return set(self._remote)

    def opened(self, peer: PeerId) -> None:
        """A holder connected; it will announce what it has."""
        self._remote[peer] = {}
        self._picker.add_holder(peer)

    def closed(self, peer: PeerId) -> None:
        """A holder is gone: what it was asked for returns to the pool."""
        self._remote.pop(peer, None)
        self._picker.remove_holder(peer)
        for wanted in self._wanted.values():
            wanted.offers.pop(peer, None)
            if wanted.asked == peer:
                wanted.asked = None

    def remote_holds(self, peer: PeerId, update: UpdateId) -> Bitfield | None:
        """What a holder announced of an update."""
        return self._remote.get(peer, {}).get(update)

    def available(self, update: UpdateId) -> list[int]:
        """Per chunk, how many holders announced it."""
        counts = [0] * self._num_chunks
        for held in self._remote.values():
            for chunk in held.get(update, ()):
                counts[chunk] += 1
        return counts

    def announced(
        self, peer: PeerId, message: Availability | Have, oldest: int, newest: int
    ) -> None:
        """A holder says what it has; rounds outside ``oldest`` to ``newest`` do not matter.

        Raises:
            RemoteProtocolError: chunks that the layout does not have.
        """
        if peer not in self._remote:
            return  # a gossip of a peer that is no neighbour (any more)
        if isinstance(message, Have):
            self._offer(peer, UpdateId(message.update), None, message.chunks)
            return
        for item in message.updates:
            field_ = Bitfield.from_bytes(item.chunks, self._num_chunks)
            if oldest <= item.round <= newest:
                self._offer(peer, UpdateId(item.update), item.round, field_)

    def _offer(
        self, peer: PeerId, update: UpdateId, round: int | None, chunks: Iterable[int]
    ) -> None:
        chunks = list(chunks)
        if any(chunk >= self._num_chunks for chunk in chunks):
            raise RemoteProtocolError("announced a chunk the layout does not have", peer)
        if update in self._ledger:
            held = self._remote[peer].setdefault(update, Bitfield(self._num_chunks))
            for chunk in chunks:
                held.add(chunk)
            self._picker.holder_has(peer, update, chunks)
            return
        wanted = self._wanted.get(update)
        if wanted is None:
            if len(self._wanted) >= MAX_WANTED:
                return  # it will be announced again
            wanted = self._wanted[update] = _Wanted(round)
        wanted.offers.setdefault(peer, set()).update(chunks)

    def want(self, update: UpdateId, round: int) -> None:
        """A header was seen whose table is not here."""
        if update not in self._ledger and len(self._wanted) < MAX_WANTED:
            self._wanted.setdefault(update, _Wanted(round))

    def learned(self, manifest: Manifest, ages: list[int]) -> None:
        """A manifest entered the ledger: fetch its chunks from those who offered them."""
        self._picker.add_update(manifest, ages=ages)
        wanted = self._wanted.pop(manifest.update, None)
        for peer, chunks in (wanted.offers if wanted else {}).items():
            self._offer(peer, manifest.update, None, chunks)

    def no_manifest(self, peer: PeerId, update: UpdateId) -> None:
        """A holder cannot give a manifest it offered: ask another."""
        wanted = self._wanted.get(update)
        if wanted is not None:
            wanted.offers.pop(peer, None)
            if wanted.asked == peer:
                wanted.asked = None

    def forget(self, update: UpdateId) -> list[Effect]:
        """An update no longer matters: stop fetching it."""
        self.bytes_received.pop(update, None)
        for held in self._remote.values():
            held.pop(update, None)
        return self.stop(update)

    def stop(self, update: UpdateId) -> list[Effect]:
        """Stop fetching an update; who holds what of it stays known."""
        cancels = self._picker.remove_update(update)
        return [ToHolder(request.peer, Cancel(request.number)) for request in cancels]

    def forget_wanted_before(self, round: int) -> None:
        """Manifests of rounds that can no longer matter are not asked for any more."""
        stale = [u for u, w in self._wanted.items() if w.round is not None and w.round < round]
        for update in stale:
            del self._wanted[update]

    # --- asking ------------------------------------------------------------------------------

    def ask(self, now: float) -> list[Effect]:
        """Everything worth asking for now: manifests, and blocks of every holder with room."""
        effects: list[Effect] = []
        for update, wanted in self._wanted.items():
            if wanted.asked is not None and now - wanted.asked_at < MANIFEST_PATIENCE:
                continue
            others = sorted(peer for peer in wanted.offers if peer != wanted.asked)
            if others or wanted.offers:
                wanted.asked = others[0] if others else next(iter(wanted.offers))
                wanted.asked_at = now
                effects.append(ToHolder(wanted.asked, GetManifest(update)))
        for peer in sorted(self._remote):
            effects.extend(self._ask_blocks(peer, now))
        return effects

    def ask_one(self, peer: PeerId, now: float) -> list[Effect]:
        """As ``ask``, blocks of one holder only: after its answer, the common case."""
        return self._ask_blocks(peer, now) if peer in self._remote else []

    def _ask_blocks(self, peer: PeerId, now: float) -> list[Effect]:
        requests = self._picker.next_requests(peer, now)
        self.requests_sent += len(requests)
        return [
            ToHolder(
                peer,
                Request(
                    request.number, request.update, request.chunk, request.block, request.count
                ),
            )
            for request in requests
        ]

    def expire(self, now: float) -> list[Effect]:
        """Give up requests that took too long for their holder's rate."""
        return [
            ToHolder(request.peer, Cancel(request.number)) for request in self._picker.expire(now)
        ]

    def next_wakeup(self, now: float) -> float | None:
        """When ``expire`` or a manifest's patience may matter."""
        times = [w.asked_at + MANIFEST_PATIENCE for w in self._wanted.values() if w.asked]
        timeout = self._picker.next_timeout(now)
        return min(times + ([timeout] if timeout is not None else []), default=None)

    # --- answers -----------------------------------------------------------------------------

    def piece(self, peer: PeerId, piece: Piece, now: float) -> tuple[list[Effect], bool]:
        """Check a piece; (effects, whether a chunk became complete).

        Raises:
            RemoteProtocolError: never asked for, or of another size than asked.
        """
        request = self._picker.received(peer, piece.number, len(piece.data), now)
        if request is None:
            self.bytes_duplicate += len(piece.data)
            return [], False
        known = self._ledger.get(request.update)
        if known is None:
            self.bytes_duplicate += len(piece.data)
            self._picker.verified(request, False, now)
            return [], False
        bad = self._bad_block(known.manifest, request, piece.data)
        outcome = self._picker.verified(request, bad is None, now)
        if bad is not None:
            self.blocks_refused += 1
            owner, round = known.manifest.owner, known.manifest.round
            refused = BlockRefused(peer, owner, round, request.chunk, bad)
            reason = f"block {bad} of chunk {request.chunk} of {owner} was altered"
            return [Emit(refused), Drop(peer, reason, BAD_BLOCK_BAN)], False
        self.bytes_duplicate += outcome.duplicate_bytes
        fresh = len(piece.data) - outcome.duplicate_bytes
        self.bytes_received[request.update] = self.bytes_received.get(request.update, 0) + fresh
        effects: list[Effect] = []
        if fresh:
            offset = request.block * self._block_size
            effects.append(StoreBlocks(request.update, request.chunk, offset, piece.data))
        effects.extend(ToHolder(other.peer, Cancel(other.number)) for other in outcome.cancels)
        if outcome.chunk_complete:
            effects.append(StoreComplete(request.update, request.chunk, peer))
            entry = known.manifest.entries[request.chunk]
            received = ChunkReceived(
                known.manifest.owner, known.manifest.round, request.chunk, entry.size, entry.rank,
                peer,
            )  # fmt: skip
            effects.append(Emit(received))
        return effects, outcome.chunk_complete

    def _bad_block(
        self, manifest: Manifest, request: BlockRequest, data: bytes | bytearray | memoryview
    ) -> int | None:
        """The first block of a piece that does not match its owner's hash."""
        entry = manifest.entries[request.chunk]
        view = memoryview(data)
        for index in range(request.count):
            block = view[index * self._block_size : (index + 1) * self._block_size]
            number = request.block + index
            if hashlib.sha256(block).digest() != entry.block_hash(number):
                return number
        return None
