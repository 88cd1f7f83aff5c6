"""The fetcher's side of the chunk exchange: learn manifests, ask for blocks, check what comes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.events import Drop, Effect, Emit, StoreBlocks, StoreComplete, ToHolder
from p2pfl_torrent.core.ledger import KnownUpdate, Ledger
from p2pfl_torrent.core.manifest import Manifest, UpdateId
from p2pfl_torrent.core.messages import Availability, Cancel, GetManifest, Have, Piece, Request
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.picker import BlockRequest, Picker
from p2pfl_torrent.core.reports import BlockRefused, ChunkReceived, PeerDropped
from p2pfl_torrent.core.wanted import Wanted

BAD_BLOCK_BAN = 600.0  # seconds; a block that differs from its owner's hash is no accident on Noise


@dataclass(slots=True)
class _Remote:
    """What a holder said of the updates that are known here."""

    held: dict[UpdateId, Bitfield] = field(default_factory=dict)
    counted_in: dict[UpdateId, int] = field(default_factory=dict)


class Fetching:
    """What this peer still needs, and whom it asks."""

    def __init__(self, ledger: Ledger, picker: Picker, block_size: int, num_chunks: int) -> None:
        self._ledger = ledger
        self._picker = picker
        self._block_size = block_size
        self._num_chunks = num_chunks
        self._wanted = Wanted(num_chunks)
        self._remote: dict[PeerId, _Remote] = {}
        self.bytes_received: dict[UpdateId, int] = {}
        self.bytes_duplicate = 0
        self.requests_sent = 0
        self.blocks_refused = 0

    @property
    def holders(self) -> set[PeerId]:
        """Peers this one may ask."""
        return set(self._remote)

    def asks(self, peer: PeerId) -> bool:
        """Whether this peer may ask that one."""
        return peer in self._remote

    def opened(self, peer: PeerId) -> None:
        """A holder connected; it will announce what it has."""
        self.closed(peer)
        self._remote[peer] = _Remote()
        self._picker.add_holder(peer)

    def closed(self, peer: PeerId) -> None:
        """A holder is gone: what it was asked for returns to the pool."""
        self._remote.pop(peer, None)
        self._picker.remove_holder(peer)
        self._wanted.remove_peer(peer)

    def remote_holds(self, peer: PeerId, update: UpdateId) -> Bitfield | None:
        """What a holder announced of an update."""
        remote = self._remote.get(peer)
        return remote.held.get(update) if remote is not None else None

    def counted_elsewhere(self, update: UpdateId, before: int) -> int | None:
        """The round of less than ``before`` in which a holder counted an update, if one did."""
        for remote in self._remote.values():
            round = remote.counted_in.get(update, 0)
            if 0 < round < before:
                return round
        return None

    def available(self, update: UpdateId) -> list[int]:
        """Per chunk, how many holders announced it."""
        counts = [0] * self._num_chunks
        for remote in self._remote.values():
            for chunk in remote.held.get(update, ()):
                counts[chunk] += 1
        return counts

    def announced(self, peer: PeerId, message: Availability | Have, oldest: int) -> None:
        """A holder says what it has; rounds before ``oldest`` do not matter any more.

        Raises:
            RemoteProtocolError: chunks that the layout does not have.
        """
        if peer not in self._remote:
            return  # a gossip of a peer that is no neighbour (any more)
        if isinstance(message, Have):
            if any(chunk >= self._num_chunks for chunk in message.chunks):
                raise RemoteProtocolError("announced a chunk the layout does not have", peer)
            self._offer(peer, UpdateId(message.update), None, message.chunks, 0)
            return
        for item in message.updates:
            chunks = Bitfield.from_bytes(item.chunks, self._num_chunks)
            if item.round >= oldest:
                update = UpdateId(item.update)
                self._offer(peer, update, item.round, chunks, item.counted_in)

    def _offer(
        self,
        peer: PeerId,
        update: UpdateId,
        round: int | None,
        chunks: Iterable[int],
        counted_in: int,
    ) -> None:
        if update not in self._ledger:
            self._wanted.offer(peer, update, round, chunks, counted_in)
            return
        remote = self._remote[peer]
        held = remote.held.setdefault(update, Bitfield(self._num_chunks))
        if counted_in:
            remote.counted_in[update] = counted_in
        chunks = list(chunks)
        for chunk in chunks:
            held.add(chunk)
        self._picker.holder_has(peer, update, chunks)

    def want(self, update: UpdateId, round: int) -> None:
        """A header was seen whose table is not here."""
        if update not in self._ledger:
            self._wanted.seen(update, round)

    def learned(self, known: KnownUpdate, ages: list[int]) -> None:
        """A manifest entered the ledger: fetch what is wanted of it from those who offered it."""
        manifest = known.manifest
        if known.wanted.count:
            self._picker.add_update(manifest, ages=ages, wanted=known.wanted)
        for peer, offer in self._wanted.found(manifest.update).items():
            self._offer(peer, manifest.update, None, offer.chunks, offer.counted_in)

    def wanted_after_all(
        self, known: KnownUpdate, ages: list[int], verified: Mapping[int, Bitfield]
    ) -> None:
        """Chunks of an update that was known before are wanted now: fetch what is not here."""
        update = known.manifest.update
        here = Bitfield.of(self._num_chunks, known.held)
        self._picker.add_update(
            known.manifest, verified=verified, complete=here, wanted=known.wanted, ages=ages
        )
        for peer, remote in self._remote.items():
            if update in remote.held:
                self._picker.holder_has(peer, update, remote.held[update])

    def unwanted(self, update: UpdateId) -> None:
        """A manifest is of no use: it is not asked for any more."""
        self._wanted.found(update)

    def not_now(self, update: UpdateId, round: int, current: int) -> None:
        """A manifest came too early or too late: ask for it in its time, if that is to come."""
        if round < current:
            self._wanted.found(update)
        else:
            self._wanted.dated(update, round)

    def no_manifest(self, peer: PeerId, update: UpdateId) -> None:
        """A holder cannot give a manifest it offered: ask another."""
        self._wanted.withdraw(peer, update)

    def forget(self, update: UpdateId) -> list[Effect]:
        """An update no longer matters: stop fetching it."""
        self.bytes_received.pop(update, None)
        for remote in self._remote.values():
            remote.held.pop(update, None)
            remote.counted_in.pop(update, None)
        return self.stop(update)

    def stop(self, update: UpdateId) -> list[Effect]:
        """Stop fetching an update; who holds what of it stays known."""
        cancels = self._picker.remove_update(update)
        return [ToHolder(request.peer, Cancel(request.number)) for request in cancels]

    def look_ahead(self, on: bool) -> None:
        """Whether manifests of later rounds are asked for too, if only for what they tell."""
        self._wanted.look_ahead(on)

    def forget_wanted_before(self, round: int) -> None:
        """Manifests of rounds that can no longer matter are not asked for any more."""
        self._wanted.forget_before(round)

    # --- asking ------------------------------------------------------------------------------

    def ask(self, now: float, newest: int) -> list[Effect]:
        """Everything worth asking for now, of every holder; manifests up to round ``newest``."""
        effects = self.ask_manifests(now, newest)
        for peer in sorted(self._remote):
            effects.extend(self.ask_blocks(peer, now))
        return effects

    def ask_manifests(self, now: float, newest: int) -> list[Effect]:
        """Manifests that were offered or whose header was seen, up to round ``newest``."""
        return [
            ToHolder(peer, GetManifest(update)) for peer, update in self._wanted.ask(now, newest)
        ]

    def ask_about(self, update: UpdateId) -> list[Effect]:
        """Ask every holder of an update that is known here whether it has counted it."""
        return [
            ToHolder(peer, GetManifest(update, is_known=True))
            for peer in sorted(self._remote)
            if update in self._remote[peer].held
        ]

    def ask_blocks(self, peer: PeerId, now: float) -> list[Effect]:
        """Blocks of one holder: after its answer, the common case."""
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
        times = (self._wanted.next_timeout(), self._picker.next_timeout(now))
        return min((time for time in times if time is not None), default=None)

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
        known = self._ledger[request.update]
        bad = self._bad_block(known.manifest, request, piece.data)
        outcome = self._picker.verified(request, bad is None, now)
        if bad is not None:
            self.blocks_refused += 1
            owner, round = known.manifest.owner, known.manifest.round
            refused = BlockRefused(peer, owner, round, request.chunk, bad)
            reason = f"block {bad} of chunk {request.chunk} of {owner} was altered"
            dropped = PeerDropped(peer, reason, BAD_BLOCK_BAN)
            return [Emit(refused), Emit(dropped), Drop(peer, reason, BAD_BLOCK_BAN)], False
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
        for index, number in enumerate(request.blocks):
            block = view[index * self._block_size : (index + 1) * self._block_size]
            if hashlib.sha256(block).digest() != entry.block_hash(number):
                return number
        return None
