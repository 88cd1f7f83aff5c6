"""How much each chunk of an update matters, by the values alone; ranks travel in the manifest.

Scores are ranked within the update, so no owner gains by large values.

- ``l2_norm``: norm(w) / sqrt(size) x (1 + depth_boost x depth / layers), the seed's formula.
- ``change``: norm(value now - value last delivered) / sqrt(size).
- ``random``: the baseline of every comparison.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

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
