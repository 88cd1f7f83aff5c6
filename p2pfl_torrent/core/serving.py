"""The holder's side of the chunk exchange: announce what is held, answer what is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.events import Effect, ToFetcher
from p2pfl_torrent.core.ledger import KnownUpdate, Ledger
from p2pfl_torrent.core.manifest import Manifest, UpdateId
from p2pfl_torrent.core.messages import (
    MAX_HAVE,
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
ANNOUNCE_SPACING = 0.02  # seconds a fetcher between announcements of new chunks: each costs about
# half a millisecond of CPU at either end, so all of a peer's cost it a few hundredths of its time
MAX_SPACING = 0.25  # seconds, with however many fetchers; what they know is never much older


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
        self._fresh: dict[UpdateId, list[int]] = {}  # chunks not announced yet
        self._announce_at = 0.0

    def opened(self, peer: PeerId, oldest_round: int) -> list[Effect]:
        """A fetcher connected: tell it all that is held of rounds from ``oldest_round`` on."""
        self.closed(peer)  # what was asked on a stream that this one replaces
        self.fetchers.add(peer)
        held = [
            known
            for known in self._ledger
            if known.held.count and known.manifest.round >= oldest_round
        ]
        # The newest round first: what a fetcher has no room to remember is the oldest then.
        updates = [
            chunks_of(known) for known in sorted(held, key=lambda k: k.manifest.round, reverse=True)
        ]
        return [ToFetcher(peer, message) for message in _announcements(updates)]

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

    def writing(self, peer: PeerId, busy: bool) -> None:
        """A fetcher's writer begins or ends a write: meanwhile it takes no further piece."""
        if peer in self.fetchers:
            self._uploads.writing(peer, busy)

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
        """When chunks are to be announced, or a slow fetcher's slot is free for another."""
        times = (self._uploads.next_wakeup(), self._announce_at if self._fresh else None)
        return min((time for time in times if time is not None), default=None)

    def have(self, update: UpdateId, chunk: int) -> None:
        """A chunk is here: ``announce`` will say so."""
        self._fresh.setdefault(update, []).append(chunk)

    def announce(self, now: float) -> list[Effect]:
        """Tell every fetcher which chunks are new here, those they came from too: they count on it.

        At once after a quiet while, else together with those of the next few hundredths.
        """
        if not self._fresh or now < self._announce_at:
            return []
        fresh, self._fresh = self._fresh, {}
        spacing = min(MAX_SPACING, ANNOUNCE_SPACING * len(self.fetchers))
        self._announce_at = now + spacing
        messages = self._news(fresh)
        return [ToFetcher(peer, message) for peer in sorted(self.fetchers) for message in messages]

    def _news(self, fresh: Mapping[UpdateId, Sequence[int]]) -> Sequence[Message]:
        """These chunks, as far as they were not forgotten meanwhile, in short."""
        if len(fresh) == 1:
            ((update, chunks),) = fresh.items()
            if len(chunks) <= MAX_HAVE:
                return [Have(update, tuple(chunks))] if update in self._ledger else []
        updates = [
            ChunksOf(
                update,
                known.manifest.round,
                Bitfield.of(len(known.held), chunks).to_bytes(),
                known.counted_in or 0,
            )
            for update, chunks in fresh.items()
            if (known := self._ledger.get(update)) is not None
        ]
        return _announcements(updates)

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


def _announcements(updates: Sequence[ChunksOf]) -> list[Availability]:
    """In messages that are soon through on a slow link."""
    size = ENTRY_BYTES + max((len(item.chunks) for item in updates), default=0)
    step = max(1, ANNOUNCE_BYTES // size)
    return [
        Availability(tuple(updates[start : start + step])) for start in range(0, len(updates), step)
    ]


def chunks_of(known: KnownUpdate) -> ChunksOf:
    """Which chunks of an update are held, for the wire."""
    return ChunksOf(
        known.manifest.update, known.manifest.round, known.held.to_bytes(), known.counted_in or 0
    )
