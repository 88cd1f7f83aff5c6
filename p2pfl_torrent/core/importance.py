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
            values = _values(layout, arrays, part)
            square += float(np.square(values).sum())
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
            now = _values(layout, arrays, part)
            before = _as_float64(layout.spec.tensors[part.tensor].dtype, delivered)
            square += float(np.square(now - before).sum())
            size += now.size
        scores.append(float(np.sqrt(square / size)) if size else 0.0)
    return scores


def random_scores(layout: Layout, rng: random.Random) -> list[float]:
    """One draw per chunk."""
    return [rng.random() for _ in layout.chunks]


def _values(layout: Layout, arrays: Arrays, part: TensorSlice) -> npt.NDArray[np.float64]:
    spec = layout.spec.tensors[part.tensor]
    return _as_float64(spec.dtype, slice_of(np.asarray(arrays[spec.name]), part))


def _as_float64(dtype: str, values: Array) -> npt.NDArray[np.float64]:
    if dtype == "BF16":
        values = bfloat16_to_float32(values)  # type: ignore[arg-type]  # carried as its bits
    return values.astype(np.float64)
