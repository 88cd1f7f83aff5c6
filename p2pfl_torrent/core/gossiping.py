"""What this peer gossips of its updates, and when: only what the edges seem not to have carried.

An edge's stream carries a manifest or a new chunk at once and reliably, for a tenth of what a
gossip delivery costs. So news is gossiped only if it is not settled a while after that; but a
manifest at once where there are members to whom no edge leads.
"""

from __future__ import annotations

from collections.abc import Callable

from p2pfl_torrent.core.events import Effect, PublishAvailability, PublishManifest
from p2pfl_torrent.core.ledger import KnownUpdate, Ledger
from p2pfl_torrent.core.manifest import Manifest, UpdateId, encode_header_gossip
from p2pfl_torrent.core.messages import Availability, availability_gossip
from p2pfl_torrent.core.serving import chunks_of

MAX_GOSSIP_BYTES = 16 << 10  # larger manifests are announced by header and pulled

Known = Callable[[KnownUpdate], bool]


class Gossiping:
    """News that waits for its time; it is told when to look."""

    def __init__(self, interval: float) -> None:
        """``interval`` is in seconds, see ``SwarmPolicy.gossip_interval``."""
        self._interval = interval
        self._manifest: Manifest | None = None
        self._manifest_at = 0.0
        self._to_all = True
        self._new: set[UpdateId] = set()
        self._ripe: set[UpdateId] = set()  # new for an interval already
        self._look_at = 0.0

    def published(self, manifest: Manifest, now: float, *, to_all: bool) -> None:
        """Our manifest went to all who fetch here; one of an older round is history.

        Unless those are all members (``to_all``) it is gossiped at once: hop by hop it may come
        after the word that we have left, and nobody waits for the update of who has left.
        """
        self._manifest, self._to_all = manifest, to_all
        self._manifest_at = now + self._interval if to_all else now
        self.changed(manifest.update, now)

    def changed(self, update: UpdateId, now: float) -> None:
        """More of an update is held than before."""
        if not (self._new or self._ripe):
            self._look_at = now + self._interval
        self._new.add(update)

    def due(self, now: float, ledger: Ledger, begun: Known, complete: Known) -> list[Effect]:
        """What it is time to gossip.

        Args:
            begun: whether all neighbours have shown that they have some of an update.
            complete: whether all have shown that they have all of it.
        """
        effects: list[Effect] = []
        if self._manifest is not None and now >= self._manifest_at:
            manifest, self._manifest = self._manifest, None
            known = ledger.get(manifest.update)
            if known is not None and not (self._to_all and begun(known)):
                effects.append(PublishManifest(_gossip_form(manifest)))
        if (self._new or self._ripe) and now >= self._look_at:
            known_ripe = (ledger.get(update) for update in sorted(self._ripe))
            news = [chunks_of(one) for one in known_ripe if one is not None and not complete(one)]
            self._ripe, self._new = self._new, set()
            self._look_at = now + self._interval
            body = availability_gossip(Availability(tuple(news)))
            if news and len(body) <= MAX_GOSSIP_BYTES:  # else what the edges carry must do
                effects.append(PublishAvailability(body))
        return effects

    def next_wakeup(self) -> float | None:
        """When something will be due."""
        times = [self._manifest_at] if self._manifest is not None else []
        times += [self._look_at] if self._new or self._ripe else []
        return min(times, default=None)


def _gossip_form(manifest: Manifest) -> bytes:
    whole = manifest.encode()
    return whole if len(whole) <= MAX_GOSSIP_BYTES else encode_header_gossip(manifest.signed)
