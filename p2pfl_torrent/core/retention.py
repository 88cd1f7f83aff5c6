"""Which updates may be forgotten when a round begins."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from p2pfl_torrent.core.manifest import Manifest, UpdateId
from p2pfl_torrent.core.peers import PeerId


def forgettable(
    held: Iterable[tuple[Manifest, Iterable[int]]],
    round: int,
    keep_rounds: int,
    fill_max_age: int,
) -> list[UpdateId]:
    """Updates too old to serve or to fill with, now that ``round`` begins.

    Args:
        held: every update known, with the chunks of it that are whole here.
        keep_rounds: rounds whose updates others may still ask for.
        fill_max_age: rounds for which an owner's last received chunk stands in for a missing one.
    """
    held = list(held)
    newest: defaultdict[tuple[PeerId, int], int] = defaultdict(int)
    for manifest, chunks in held:
        for chunk in chunks:
            key = (manifest.owner, chunk)
            newest[key] = max(newest[key], manifest.round)

    def fills(manifest: Manifest, chunks: Iterable[int]) -> bool:
        return round - manifest.round <= fill_max_age and any(
            newest[manifest.owner, chunk] == manifest.round for chunk in chunks
        )

    return [
        manifest.update
        for manifest, chunks in held
        if manifest.round < round - keep_rounds and not fills(manifest, chunks)
    ]
