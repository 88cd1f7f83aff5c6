"""Scores the chunks of this peer's update by the configured method."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from p2pfl_torrent.config import ChunkSection
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.importance import change_scores, l2_norm_scores, random_scores, rank
from p2pfl_torrent.core.tensors import Array, Arrays

LastDelivered = Callable[[int], Sequence[Array]]
"""Chunk index -> its slices as others last received them from this peer."""


class ImportanceScorer:
    """Ranks chunks, 0 for the least important."""

    def __init__(self, config: ChunkSection, rng: random.Random) -> None:
        self._config = config
        self._rng = rng

    def ranks(self, layout: Layout, arrays: Arrays, last: LastDelivered) -> list[int]:
        """A permutation of the chunk indices' ranks."""
        method = self._config.importance_method
        if method == "random":
            return rank(random_scores(layout, self._rng))
        if method == "l2_norm":
            settings = self._config.importance_config.l2_norm
            return rank(
                l2_norm_scores(
                    layout,
                    arrays,
                    depth_boost=settings.depth_boost,
                    normalize_by_size=settings.normalize_by_size,
                )
            )
        return rank(change_scores(layout, arrays, last))
