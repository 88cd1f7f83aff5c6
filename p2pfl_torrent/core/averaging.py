"""The weighted mean of a chunk's versions, tile by tile or owner by owner: the same bits.

Where versions are views of mapped files, a tile of all of them is summed at a time, which stays in
the cache. Where they must be decoded, one owner's is in memory at a time, beside float64 sums of
one chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from p2pfl_torrent.core.chunking import ChunkLayout, Layout
from p2pfl_torrent.core.tensors import (
    FLOAT_DTYPES,
    NUMPY_DTYPES,
    Array,
    float64_to_bfloat16,
)
from p2pfl_torrent.core.tiles import TILE, floats, mean, mean_of_doubles
from p2pfl_torrent.core.versions import Version, all_finite

ALIGNMENT = 16  # bytes between the starts of two slices of a chunk in memory; no type is wider

Vector = npt.NDArray[np.float64]


class Scratch:
    """Memory that is used again for every chunk.

    Args:
        is_wide: whether what is merged of half floats is float32, for a step from it.
    """

    def __init__(self, layout: Layout, *, is_wide: bool) -> None:
        self._layout = layout
        self._is_wide = is_wide
        factor = 2 if is_wide else 1
        sizes = (
            factor * chunk.payload_bytes + ALIGNMENT * len(chunk.slices) for chunk in layout.chunks
        )
        self._merged = np.empty(max(sizes, default=0), np.uint8)
        size = min(TILE, max((tensor.size for tensor in layout.spec.tensors), default=0))
        self.accumulator = np.empty(size, np.float64)
        self.term = np.empty(size, np.float64)
        self._sums: Vector | None = None

    def slices(self, chunk: ChunkLayout) -> list[Array]:
        """Room for the merged values of a chunk's slices."""
        arrays: list[Array] = []
        offset = 0
        for part in chunk.slices:
            shape = self._layout.slice_shape(part)
            name = self._layout.spec.tensors[part.tensor].dtype
            dtype = NUMPY_DTYPES["F32" if self._is_wide and name in ("BF16", "F16") else name]
            array: Array = np.ndarray(shape, dtype, buffer=self._merged.data, offset=offset)
            arrays.append(array)
            offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        return arrays

    def sums(self, merged: Sequence[Array]) -> list[Vector]:
        """Room for a sum of each value of a chunk's slices; uninitialised."""
        needed = sum(array.size for array in merged)
        if self._sums is None or self._sums.size < needed:
            self._sums = np.empty(needed, np.float64)
        sums, offset = [], 0
        for array in merged:
            sums.append(self._sums[offset : offset + array.size])
            offset += array.size
        return sums


def average_tiles(
    layout: Layout,
    chunk: ChunkLayout,
    versions: Sequence[Version],
    merged: Sequence[Array],
    scratch: Scratch,
) -> bool:
    """Average into ``merged``; False if that met NaN or infinity, which some version then holds."""
    if not versions:
        return True
    for position, (part, out) in enumerate(zip(chunk.slices, merged, strict=True)):
        parts = [(version.weight, version.arrays[position].reshape(-1)) for version in versions]
        dtype = layout.spec.tensors[part.tensor].dtype
        if not _average(dtype, parts, out.reshape(-1), scratch.accumulator, scratch.term):
            return False
    return True


def average_in_turn(
    layout: Layout,
    chunk: ChunkLayout,
    versions: Iterable[Version],
    merged: Sequence[Array],
    scratch: Scratch,
) -> bool | None:
    """As ``average_tiles``, holding one version at a time.

    Returns:
        Whether any version was delivered; None if NaN or infinity was met, be it that doubles
        overflow in their sum: ``average_tiles`` can tell.
    """
    sums = scratch.sums(merged)
    dtypes = [layout.spec.tensors[part.tensor].dtype for part in chunk.slices]
    seen, total, delivered = 0, 0.0, False
    for version in versions:
        for dtype, values, out, acc in zip(dtypes, version.arrays, merged, sums, strict=True):
            flat, target = values.reshape(-1), out.reshape(-1)
            if not seen:
                _copy(dtype, flat, target)  # should it be the only one, its bits are exact
            elif dtype not in FLOAT_DTYPES:
                np.maximum(target, flat, out=target)
            if dtype in FLOAT_DTYPES:
                _add(dtype, version.weight, flat, acc, scratch.term, is_first=not seen)
        total = total + version.weight if seen else version.weight
        seen, delivered = seen + 1, delivered or version.delivered
    if not seen:
        return False
    for dtype, out, acc in zip(dtypes, merged, sums, strict=True):
        if dtype in FLOAT_DTYPES and not _settle(dtype, acc, total, out.reshape(-1), seen == 1):
            return None
    return delivered


def _add(
    dtype: str, weight: float, values: Array, acc: Vector, term: Vector, *, is_first: bool
) -> None:
    for begin in range(0, acc.size, TILE):
        sums = acc[begin : begin + TILE]
        scaled = sums if is_first else term[: sums.size]
        np.copyto(scaled, floats(dtype, values[begin : begin + TILE]))
        with np.errstate(over="ignore", invalid="ignore"):  # infinities of both signs
            np.multiply(scaled, weight, out=scaled)
            if not is_first:
                np.add(sums, scaled, out=sums)


def _copy(dtype: str, values: Array, out: Array) -> None:
    """The same values; ``out`` may be of a wider type."""
    out[...] = values if out.dtype == values.dtype else floats(dtype, values)


def _settle(dtype: str, acc: Vector, total: float, out: Array, is_only: bool) -> bool:
    """From sums to means; False if one is not finite."""
    for begin in range(0, acc.size, TILE):
        sums = acc[begin : begin + TILE]
        with np.errstate(over="ignore", invalid="ignore"):
            np.divide(sums, total, out=sums)
        if not np.isfinite(sums).all():
            return False
        if not is_only:
            out[begin : begin + TILE] = (
                float64_to_bfloat16(sums) if out.dtype == NUMPY_DTYPES["BF16"] else sums
            )
    return True


def average_slice(dtype: str, parts: Sequence[tuple[float, Array]], out: Array) -> bool:
    """Average 1-d arrays of one dtype into ``out``; integers and booleans take the maximum.

    A single version is copied: its bits are exact, whatever its weight.

    Returns:
        False if NaN or infinity was met; ``out`` is of no use then.
    """
    size = min(TILE, out.size)
    return _average(dtype, parts, out, np.empty(size, np.float64), np.empty(size, np.float64))


def _average(
    dtype: str,
    parts: Sequence[tuple[float, Array]],
    out: Array,
    accumulator: npt.NDArray[np.float64],
    term: npt.NDArray[np.float64],
) -> bool:
    is_float = dtype in FLOAT_DTYPES
    if len(parts) == 1 or not is_float:
        _copy(dtype, parts[0][1], out)
        for _, values in parts[1:]:
            np.maximum(out, values, out=out)
        return not is_float or all_finite(dtype, parts[0][1])
    if dtype == "F64" and not all(all_finite(dtype, values) for _, values in parts):
        return False  # asked first: finite doubles may overflow in their sum
    for begin in range(0, out.size, TILE):
        end = min(begin + TILE, out.size)
        acc, scratch = accumulator[: end - begin], term[: end - begin]
        tiles = [(weight, floats(dtype, values[begin:end])) for weight, values in parts]
        if dtype == "F64":
            mean_of_doubles(tiles, acc, scratch)
        else:
            with np.errstate(invalid="ignore"):  # infinities of both signs
                mean(tiles, acc, scratch)
            # Finite values of the smaller types cannot overflow in float64 (see MAX_WEIGHT), and
            # what is not finite stays so in every sum: one look at the sum is one at each version.
            if not np.isfinite(acc).all():
                return False
        out[begin:end] = float64_to_bfloat16(acc) if out.dtype == NUMPY_DTYPES["BF16"] else acc
    return True
