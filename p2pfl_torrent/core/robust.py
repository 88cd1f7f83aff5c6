"""Aggregation that some dishonest owners cannot steer: trimmed means, medians, and Krum's choice.

None of these weighs by num_samples: a weight that its owner claims would be a way to shout.
Everything is element-wise float64 arithmetic in a fixed order, so all peers get the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from p2pfl_torrent.core.chunking import ChunkLayout, Layout
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import Array
from p2pfl_torrent.core.tiles import floats, mean_of_doubles

Matrix = npt.NDArray[np.float64]
"""(versions, elements): the finite values of every version of a tile."""

LEAST_OWNERS = 3  # of two, nobody can say which one lies
PAIR_TILE = 1 << 16  # elements of a difference at a time; a power of two, as it is folded


def trimmed_mean(values: Matrix, share: float) -> npt.NDArray[np.float64]:
    """Mean of each column without its ceil(share * n) largest and as many smallest values.

    Coordinate-wise and unweighted (Yin et al. 2018, rounded up: where versions are missing, a
    share that cut someone would else cut nobody). At least the middle one or two stay, so a
    share of 0.5 is the median, the mean of the middle two where n is even.
    """
    count = len(values)
    # Less a little: 0.1 * 30 is above 3 in binary.
    cut = min(math.ceil(share * count - 1e-9), (count - 1) // 2)
    ordered = np.sort(values, axis=0)[cut : count - cut]
    result = np.empty(values.shape[1], np.float64)
    mean_of_doubles([(1.0, row) for row in ordered], result, np.empty_like(result))
    return result


class Distances:
    """Squared distances between owners' updates, over the chunks that both delivered.

    A distance over a part of the model is scaled up to the whole: times all float elements that
    anybody delivered, over those that the two share.
    """

    def __init__(self) -> None:
        self.owners: set[PeerId] = set()
        self._sums: dict[tuple[PeerId, PeerId], float] = {}
        self._shared: dict[tuple[PeerId, PeerId], int] = {}
        self._elements = 0

    def add(
        self, chunk: ChunkLayout, layout: Layout, versions: Mapping[PeerId, Sequence[Array]]
    ) -> None:
        """A chunk's decoded, finite slices by those who delivered it."""
        dtypes = [layout.spec.tensors[part.tensor].dtype for part in chunk.slices]
        are_floats = [layout.spec.tensors[part.tensor].is_float for part in chunk.slices]
        owners = sorted(versions)
        self.owners.update(owners)
        for i, first in enumerate(owners):
            for second in owners[i + 1 :]:
                total, elements = 0.0, 0
                for dtype, is_float, a, b in zip(
                    dtypes, are_floats, versions[first], versions[second], strict=True
                ):
                    if is_float:
                        total += squared_distance(dtype, a, b)
                        elements += a.size
                pair = (first, second)
                self._sums[pair] = self._sums.get(pair, 0.0) + total
                self._shared[pair] = self._shared.get(pair, 0) + elements
        if owners:
            sizes = zip(are_floats, versions[owners[0]], strict=True)
            self._elements += sum(array.size for is_float, array in sizes if is_float)

    def between(self, a: PeerId, b: PeerId) -> float:
        """Squared distance; infinite where two owners share nothing, so cannot be compared."""
        pair = (min(a, b), max(a, b))
        shared = self._shared.get(pair, 0)
        return self._sums[pair] * (self._elements / shared) if shared else math.inf


def squared_distance(dtype: str, a: Array, b: Array) -> float:
    """Sum of (a - b)^2 in float64, added up by halves: numpy's own sum has no promised order."""
    a, b = a.reshape(-1), b.reshape(-1)
    total = 0.0
    with np.errstate(over="ignore"):  # too far apart for float64 is infinitely far
        for begin in range(0, a.size, PAIR_TILE):
            end = min(begin + PAIR_TILE, a.size)
            squares = floats(dtype, a[begin:end]).astype(np.float64)
            squares -= floats(dtype, b[begin:end])
            squares *= squares
            total += _folded(squares)
    return total


def _folded(values: npt.NDArray[np.float64]) -> float:
    size = values.size
    while size > 1:
        half = (size + 1) // 2
        values[: size - half] += values[half:size]
        size = half
    return float(values[0]) if size else 0.0


def krum_ranking(distances: Distances, byzantine: int) -> list[PeerId]:
    """Owners by Krum's score, best first: at most the n - f of n whom one may believe.

    A score is the sum of an owner's n - f - 2 smallest squared distances to others (Blanchard et
    al. 2017), of the smallest one at least; equal scores go by owner. Its guarantee needs
    n >= 2f + 3: with fewer owners the best are still taken, and at least one.

    Who shares chunks with too few others has no score and is not believed. If that leaves fewer
    than n - f, or n is below ``LEAST_OWNERS``, nobody is: a liar who delivers everything would be
    the one that can be compared.
    """
    owners = sorted(distances.owners)
    if len(owners) < LEAST_OWNERS:
        return []
    nearest = max(1, len(owners) - byzantine - 2)
    scored = []
    for owner in owners:
        others = sorted(distances.between(owner, other) for other in owners if other != owner)
        score = 0.0
        for distance in others[:nearest]:
            score += distance
        if math.isfinite(score):
            scored.append((score, owner))
    believed = max(1, len(owners) - byzantine)
    if len(scored) < believed:
        return []
    return [owner for _, owner in sorted(scored)][:believed]
