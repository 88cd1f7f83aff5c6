"""The holder's side of the chunk exchange: announce what is held, answer what is asked."""

from __future__ import annotations

from dataclasses import dataclass

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.events import Effect, ToFetcher
from p2pfl_torrent.core.ledger import KnownUpdate, Ledger
from p2pfl_torrent.core.manifest import Manifest, UpdateId
from p2pfl_torrent.core.messages import (
    MAX_REQUEST_BYTES,
    REJECT_BUSY,
    REJECT_CANCELLED,
    REJECT_GONE,
    REJECT_MISSING,
    Availability,
    Cancel,
    ChunksOf,
    GetManifest,
    Have,
    ManifestData,
    Message,
    NoManifest,
    Ping,
    Pong,
    Reject,
    Request,
)
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.uploads import UploadQueue

ANNOUNCE_BYTES = 64 << 10  # of one Availability: less than a frame may have, soon through
ENTRY_BYTES = 64  # of one update in it beside its bitfield: a hash, two rounds and their heads


@dataclass(frozen=True, slots=True)
class Upload:
    """A piece to read from the store and send: the answer to one request."""

    peer: PeerId
    number: int
    update: UpdateId
    chunk: int
    offset: int
    size: int


class Serving:
    """What this peer offers, and to whom."""

    def __init__(self, ledger: Ledger, uploads: UploadQueue, block_size: int) -> None:
        self._ledger = ledger
        self._uploads = uploads
        self._block_size = block_size
        self.fetchers: set[PeerId] = set()
        self.bytes_uploaded = 0

    def opened(self, peer: PeerId, oldest_round: int) -> list[Effect]:
        """A fetcher connected: tell it all that is held of rounds from ``oldest_round`` on."""
        self.closed(peer)  # what was asked on a stream that this one replaces
        self.fetchers.add(peer)
        updates = [
            chunks_of(known)
            for known in self._ledger
            if known.held.count and known.manifest.round >= oldest_round
        ]
        size = ENTRY_BYTES + max((len(item.chunks) for item in updates), default=0)
        step = max(1, ANNOUNCE_BYTES // size)
        return [
            ToFetcher(peer, Availability(tuple(updates[start : start + step])))
            for start in range(0, len(updates), step)
        ]

    def closed(self, peer: PeerId) -> None:
        """A fetcher is gone, and its questions with it."""
        self.fetchers.discard(peer)
        self._uploads.remove_peer(peer)

    def received(self, peer: PeerId, message: Message) -> list[Effect]:
        """A question of a fetcher.

        Raises:
            RemoteProtocolError: not a question, or one that no correct fetcher asks.
        """
        if isinstance(message, Request):
            return self._requested(peer, message)
        if isinstance(message, Cancel):
            if self._uploads.cancel(peer, message.number):
                return [ToFetcher(peer, Reject(message.number, REJECT_CANCELLED))]
            return []  # its piece is under way, or was answered before the cancel came
        if isinstance(message, Ping):
            return [ToFetcher(peer, Pong(message.number))]
        if isinstance(message, GetManifest):
            known = self._ledger.get(UpdateId(message.update))
            if known is None:
                return [ToFetcher(peer, NoManifest(message.update))]
            # Whoever asks may have been away for rounds: it must learn before it counts the update
            # whether the state that it has taken over holds it.
            held = ToFetcher(peer, Availability((chunks_of(known),)))
            if message.is_known:
                return [held]
            return [held, ToFetcher(peer, ManifestData(known.manifest.encode()))]
        raise RemoteProtocolError(f"{type(message).__name__} on a stream for questions", peer)

    def _requested(self, peer: PeerId, request: Request) -> list[Effect]:
        known = self._ledger.get(UpdateId(request.update))
        if known is None:
            return [ToFetcher(peer, Reject(request.number, REJECT_GONE))]
        entries = known.manifest.entries
        if (
            request.chunk >= len(entries)
            or request.block + request.count > entries[request.chunk].num_blocks
            or request.count * self._block_size > max(MAX_REQUEST_BYTES, self._block_size)
        ):
            raise RemoteProtocolError("request outside the chunk or above the bound", peer)
        if request.chunk not in known.held:
            return [ToFetcher(peer, Reject(request.number, REJECT_MISSING))]
        if self._uploads.waits(peer, request.number):
            raise RemoteProtocolError(f"request {request.number} while it is open", peer)
        if not self._uploads.add(peer, request):
            return [ToFetcher(peer, Reject(request.number, REJECT_BUSY))]
        return []

    def next_upload(self, peer: PeerId, now: float) -> Upload | Reject | None:
        """The next answer to write to a peer, if it is its turn."""
        request = self._uploads.next(peer, now)
        if request is None:
            return None
        known = self._ledger.get(UpdateId(request.update))
        if known is None:  # pruned while the request waited
            self._uploads.sent(peer, 0, now)
            return Reject(request.number, REJECT_GONE)
        offset, size = known.manifest.block_range(
            request.chunk, request.block, request.count, self._block_size
        )
        return Upload(peer, request.number, known.manifest.update, request.chunk, offset, size)

    def uploaded(self, peer: PeerId, size: int, now: float) -> None:
        """A piece of that many bytes has been handed to the transport."""
        self._uploads.sent(peer, size, now)
        self.bytes_uploaded += size

    def queued(self, peer: PeerId) -> int:
        """Requests of a fetcher that wait for their answer."""
        return self._uploads.queued(peer)

    def runnable(self, now: float) -> list[PeerId]:
        """Fetchers whose writer has a piece to send now."""
        return self._uploads.runnable(now)

    def next_wakeup(self) -> float | None:
        """When a slot that a slow fetcher holds becomes free for another."""
        return self._uploads.next_wakeup()

    def announce_chunk(self, update: UpdateId, chunk: int) -> list[Effect]:
        """Tell every fetcher that a chunk is here, the one it came from too: it counts on that."""
        return [ToFetcher(peer, Have(update, (chunk,))) for peer in sorted(self.fetchers)]

    def announce_update(self, known: KnownUpdate, *, with_manifest: bool) -> list[Effect]:
        """Tell every fetcher what is held of an update; its manifest first, where it is new."""
        messages: list[Message] = [Availability((chunks_of(known),))]
        if with_manifest:
            messages.insert(0, ManifestData(known.manifest.encode()))
        return [ToFetcher(peer, message) for peer in sorted(self.fetchers) for message in messages]

    def show_manifests(self, *manifests: Manifest) -> list[Effect]:
        """Send manifests to every fetcher: two of one owner for one round convict it."""
        messages = [ManifestData(manifest.encode()) for manifest in manifests]
        return [ToFetcher(peer, message) for peer in sorted(self.fetchers) for message in messages]


def chunks_of(known: KnownUpdate) -> ChunksOf:
    """Which chunks of an update are held, for the wire."""
    return ChunksOf(
        known.manifest.update, known.manifest.round, known.held.to_bytes(), known.counted_in or 0
    )
