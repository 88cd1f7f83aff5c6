"""A peer's own progress, put on an aggregate that came one round late.

A peer publishes x, trains on from it to y while the round is exchanged, and then learns the
aggregate a. Its next update is a + (y - x): CoCoD-SGD (Shen et al. 2019), or DaSGD with a delay of
one round (Zhou et al. 2020).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from p2pfl_torrent.core.tensors import (
    NUMPY_DTYPES,
    Array,
    Arrays,
    ModelSpec,
    TensorSpec,
    float64_to_bfloat16,
)
from p2pfl_torrent.core.tiles import TILE, floats


def carry_over(
    spec: ModelSpec, aggregate: Arrays, start: Arrays, trained: Arrays, parameters: Collection[str]
) -> dict[str, Array]:
    """``aggregate + (trained - start)`` of the parameters that are floats; of the rest ``trained``.

    The rest are buffers and integers: what they hold is measured, not learned, and a running
    variance could turn negative.

    Args:
        start: what was trained from; all three have the spec's tensors.
        parameters: names; others than the spec's do not matter.

    Returns:
        Arrays of their own. Sums are in float64, rounded once; what is too large for the dtype
        becomes infinite.
    """
    carried = {}
    for tensor in spec.tensors:
        name = tensor.name
        if tensor.is_float and name in parameters:
            carried[name] = _carry_over(tensor, aggregate[name], start[name], trained[name])
        else:
            carried[name] = np.array(trained[name])
    return carried


def _carry_over(tensor: TensorSpec, aggregate: Array, start: Array, trained: Array) -> Array:
    result = np.empty(tensor.size, NUMPY_DTYPES[tensor.dtype])
    flat = [array.reshape(-1) for array in (aggregate, start, trained)]
    for begin in range(0, tensor.size, TILE):
        tile = slice(begin, begin + TILE)
        base, before, after = (floats(tensor.dtype, array[tile]) for array in flat)
        with np.errstate(over="ignore", invalid="ignore"):  # told by whoever checks the update
            moved = np.subtract(after, before, dtype=np.float64)
            np.add(moved, base, out=moved)
            if tensor.dtype == "BF16":
                result[tile] = float64_to_bfloat16(moved)
            else:
                result[tile] = moved.astype(result.dtype)
    return result.reshape(tensor.shape)
