"""What the closing of a round means for the average: which version of a chunk, with what weight."""

from __future__ import annotations

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.genesis import Terms
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.versions import Source


def contributions(layout: Layout, close: ev.CloseRound, terms: Terms) -> dict[int, list[Source]]:
    """Chunk -> versions to merge, in canonical order, filled as the swarm agreed.

    With ``importance_weighting`` an update's weight is multiplied, per chunk, by
    ``importance_factor`` of the chunk's signed rank. Fills have the rank of what they stand for.
    """
    total = len(layout.chunks)
    chunks: dict[int, list[Source]] = {chunk.index: [] for chunk in layout.chunks}
    for count in close.counts:
        owner, weight = count.manifest.owner, count.weight
        found: dict[int, Source] = {}
        if terms.rounds.fill == "round_start":
            found = dict.fromkeys(count.wanted, (owner, None, weight))
        found.update(dict.fromkeys(count.chunks, (owner, count.manifest.update, weight)))
        found.update({chunk: (owner, *fill) for chunk, fill in count.fills.items()})
        for chunk, (_, update, weight) in found.items():
            factor = 1.0
            if terms.aggregation.importance_weighting:
                factor = importance_factor(count.manifest.entries[chunk].rank, total)
            chunks[chunk].append((owner, update, weight * factor))
    return chunks


def recycled(close: ev.CloseRound, terms: Terms) -> frozenset[UpdateId]:
    """The old updates of which the change is taken, not the values.

    An update either counts in a round or fills, so that which of its chunks does not matter.
    """
    if terms.rounds.fill != "recycle":
        return frozenset()
    return frozenset(fill.update for count in close.counts for fill in count.fills.values())


def importance_factor(rank: int, total: int) -> float:
    """2 (rank + 1) / (total + 1), rank 0 being the least important of ``total`` chunks.

    An owner's factors are 1 on average: nobody gains weight over the whole model.
    """
    return 2.0 * (rank + 1) / (total + 1)
