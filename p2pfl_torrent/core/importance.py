"""How much each chunk of an update matters, by the values alone; ranks travel in the manifest.

Scores are ranked within the update, so no owner gains by large values.

- ``l2_norm``: norm(w) / sqrt(size) x (1 + depth_boost x depth / layers), the seed's formula.
- ``change``: norm(value now - value last delivered) / sqrt(size).
- ``delta``: norm(value now - value at the round's start) / norm(value at the round's start).
- ``magnitude``: mean abs gradient over the last rounds x (1 + variance), from `Moments`.
- ``random``: the baseline of every comparison.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2pfl_torrent.core.chunking import Layout, TensorSlice, slice_of
from p2pfl_torrent.core.tensors import Array, Arrays, bfloat16_to_float32

TILE = 1 << 18  # elements looked at in one go: 2 MiB as float64, whatever a chunk's size


def rank(scores: list[float]) -> list[int]:
    """0 for the lowest score, ties by index: a permutation."""
    order = sorted(range(len(scores)), key=lambda index: (scores[index], index))
    ranks = [0] * len(scores)
    for place, index in enumerate(order):
        ranks[index] = place
    return ranks


def l2_norm_scores(
    layout: Layout, arrays: Arrays, *, depth_boost: float, normalize_by_size: bool
) -> list[float]:
    """One score per chunk; a chunk's depth is the mean place of its tensors in exchange order."""
    layers = max(1, len(layout.spec.tensors) - 1)
    scores = []
    for chunk in layout.chunks:
        square, size, depth = 0.0, 0, 0.0
        for part in chunk.slices:
            values = _rows(layout, arrays, part)
            square += _square(layout.spec.tensors[part.tensor].dtype, values)
            size += values.size
            depth += part.tensor / len(chunk.slices)
        norm = np.sqrt(square / size) if normalize_by_size and size else np.sqrt(square)
        scores.append(float(norm) * (1 + depth_boost * depth / layers))
    return scores


def change_scores(
    layout: Layout, arrays: Arrays, last: Callable[[int], Sequence[Array]]
) -> list[float]:
    """Root mean square difference to the values last delivered, per chunk.

    Args:
        last: chunk index -> the arrays of its slices as they were last delivered.
    """
    scores = []
    for chunk in layout.chunks:
        square, size = 0.0, 0
        for part, delivered in zip(chunk.slices, last(chunk.index), strict=True):
            now = _rows(layout, arrays, part)
            square += _square(layout.spec.tensors[part.tensor].dtype, now, delivered)
            size += now.size
        scores.append(float(np.sqrt(square / size)) if size else 0.0)
    return scores


def delta_scores(layout: Layout, arrays: Arrays, start: Arrays) -> list[float]:
    """How much training changed each chunk, relative to its size before.

    A chunk that was all zeros and changed scores infinity: no change of it is small. One that did
    not change scores 0.

    Args:
        start: the round's start weights, under the names of ``arrays``.
    """
    scores = []
    for chunk in layout.chunks:
        moved, before = 0.0, 0.0
        for part in chunk.slices:
            dtype = layout.spec.tensors[part.tensor].dtype
            old = _rows(layout, start, part)
            moved += _square(dtype, _rows(layout, arrays, part), old)
            before += _square(dtype, old)
        if before:
            scores.append(float(np.sqrt(moved) / np.sqrt(before)))
        else:
            scores.append(float("inf") if moved else 0.0)
    return scores


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over the gradient entries that were seen of one chunk.

    Attributes:
        count: entries seen; 0 for a chunk that has no gradient.
        absolute, total, square: sums of abs(g), g and g * g.
    """

    count: float
    absolute: float
    total: float
    square: float


def magnitude_scores(
    rounds: Sequence[Sequence[Moments]], *, chunks: int, use_variance: bool
) -> list[float]:
    """Mean abs gradient x (1 + variance of the gradient), pooled over rounds; the seed's formula.

    Args:
        rounds: for each round remembered, one entry per chunk.
        chunks: how many there are; one that saw no gradient scores 0.
    """
    scores = []
    for chunk in range(chunks):
        seen = [moments[chunk] for moments in rounds]
        count = sum(moments.count for moments in seen)
        if not count:
            scores.append(0.0)
            continue
        mean = sum(moments.total for moments in seen) / count
        variance = max(0.0, sum(moments.square for moments in seen) / count - mean * mean)
        absolute = sum(moments.absolute for moments in seen) / count
        scores.append(absolute * (1 + variance) if use_variance else absolute)
    return scores


def random_scores(layout: Layout, rng: random.Random) -> list[float]:
    """One draw per chunk."""
    return [rng.random() for _ in layout.chunks]


def _rows(layout: Layout, arrays: Arrays, part: TensorSlice) -> Array:
    return slice_of(np.asarray(arrays[layout.spec.tensors[part.tensor].name]), part)


def _square(dtype: str, now: Array, before: Array | None = None) -> float:
    """Sum of the squares of values, or of their differences; a tile at a time."""
    now = now.reshape(-1)
    square = 0.0
    for begin in range(0, now.size, TILE):
        tile = slice(begin, begin + TILE)
        values = _as_float64(dtype, now[tile])
        if before is not None:
            values -= _as_float64(dtype, before.reshape(-1)[tile])
        square += float(np.square(values, out=values).sum())
    return square


def _as_float64(dtype: str, values: Array) -> npt.NDArray[np.float64]:
    """A copy."""
    if dtype == "BF16":
        values = bfloat16_to_float32(values)  # type: ignore[arg-type]  # carried as its bits
    return values.astype(np.float64)
