"""Weighted means of tiles: element-wise float64 arithmetic in one order, the same on every peer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from p2pfl_torrent.core.tensors import Array, bfloat16_to_float32

TILE = 1 << 18  # elements summed at a time: accumulator and scratch (4 MiB) stay in the L2 cache

Tiles = Sequence[tuple[float, npt.NDArray[np.floating]]]


def mean(tiles: Tiles, acc: npt.NDArray[np.float64], term: npt.NDArray[np.float64]) -> None:
    """sum(w x) / sum(w) into ``acc``, in this order and no other."""
    # Widened first, then multiplied in place: numpy does both in one call, but 1.6 times slower.
    total, values = tiles[0]
    np.copyto(acc, values)
    np.multiply(acc, total, out=acc)  # not from 0: -0.0 stays -0.0
    for weight, values in tiles[1:]:
        np.copyto(term, values)
        np.multiply(term, weight, out=term)
        np.add(acc, term, out=acc)
        total += weight
    np.divide(acc, total, out=acc)


def mean_of_doubles(
    tiles: Tiles, acc: npt.NDArray[np.float64], term: npt.NDArray[np.float64]
) -> None:
    """As ``mean``, also where finite values times their weights are too large for float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean(tiles, acc, term)
    overflown = ~np.isfinite(acc)
    if not overflown.any():
        return
    # A power of two that brings the weights' sum to 1 or less: nothing but the range changes.
    shift = -math.frexp(math.fsum(weight for weight, _ in tiles))[1]
    limit = np.finfo(np.float64).max
    scaled = np.empty_like(acc)
    with np.errstate(over="ignore"):
        mean([(math.ldexp(weight, shift), values) for weight, values in tiles], scaled, term)
    np.clip(scaled, -limit, limit, out=scaled)  # the division may round up past the largest value
    # Only where it is needed, so that a value never depends on its neighbours in the tile.
    np.copyto(acc, scaled, where=overflown)


def floats(dtype: str, values: Array) -> npt.NDArray[np.floating]:
    """The values of a float array: bfloat16 as float32, others as they are."""
    if dtype == "BF16":
        return bfloat16_to_float32(values)  # type: ignore[arg-type]  # carried as its bits
    return values  # type: ignore[return-value]  # a float dtype by the spec
