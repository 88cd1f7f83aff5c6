"""One simulated peer: its machine, its disk, and what it told its user."""

from __future__ import annotations

from dataclasses import dataclass, field

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.manifest import Manifest, UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import PeerEvent
from p2pfl_torrent.core.retention import forgettable
from p2pfl_torrent.core.swarm import Swarm


@dataclass
class Node:
    """A peer of a simulated world.

    Attributes:
        manifests, blocks: its disk: what a restart finds again.
        closed, closed_at: by round, how it closed here and when.
        missed: rounds that the others had finished before this peer published.
        killed: its process is gone.
        payload_bytes: of all pieces received, what came twice included.
        corrupts: it changes a byte of every piece that it sends.
    """

    name: PeerId
    swarm: Swarm
    manifests: dict[UpdateId, Manifest] = field(default_factory=dict)
    blocks: dict[tuple[UpdateId, int], bytearray] = field(default_factory=dict)
    complete: dict[UpdateId, set[int]] = field(default_factory=dict)
    events: list[PeerEvent] = field(default_factory=list)
    closed: dict[int, ev.CloseRound] = field(default_factory=dict)
    closed_at: dict[int, float] = field(default_factory=dict)
    missed: list[int] = field(default_factory=list)
    killed: bool = False
    corrupts: bool = False
    payload_bytes: int = 0
    tick_at: float = -1.0

    def keep(self, manifest: Manifest, files: list[bytes]) -> None:
        """Write an own update to the disk, whole."""
        self.manifests[manifest.update] = manifest
        self.complete[manifest.update] = set(range(len(files)))
        for chunk, data in enumerate(files):
            self.blocks[manifest.update, chunk] = bytearray(data)

    def read(self, update: UpdateId, chunk: int) -> bytes:
        """A chunk's file."""
        return bytes(self.blocks[update, chunk])

    def prune(self, round: int, keep_rounds: int, fill_max_age: int) -> tuple[UpdateId, ...]:
        """Forget what is too old to serve or to fill with, now that ``round`` begins."""
        held = [(self.manifests[update], chunks) for update, chunks in self.complete.items()]
        forgotten = tuple(forgettable(held, round, keep_rounds, fill_max_age))
        for update in forgotten:
            manifest = self.manifests.pop(update)
            del self.complete[update]
            for chunk in range(len(manifest.entries)):
                del self.blocks[update, chunk]
        return forgotten
