"""Partial FedAvg: each chunk is averaged over the owners whose version of it is here.

Chunk k becomes sum(w_i x_ik) / sum(w_i) over the updates i that delivered it (McMahan et al. 2017,
renormalised per chunk). Sums are element-wise in float64, owners in canonical order, with numpy's
multiply and add only: no BLAS and no reduction whose order may vary, so peers that counted the
same chunks hold the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2pfl_torrent.core.chunking import Layout, decode_chunk
from p2pfl_torrent.core.errors import LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import (
    FLOAT_DTYPES,
    Array,
    Arrays,
    bfloat16_to_float32,
    float64_to_bfloat16,
)

TILE = 1 << 18  # elements summed at a time: accumulator and scratch (4 MiB) stay in the L2 cache

MAX_WEIGHT = float(1 << 53)  # num_samples can be no larger; times any float32 it is a float64

Source = tuple[PeerId, UpdateId, float]
"""(owner, update to read its chunk from, weight)."""


@dataclass(frozen=True, slots=True)
class RefusedChunk:
    """A verified chunk that cannot be averaged, by its owner's own doing."""

    owner: PeerId
    chunk: int
    reason: str


@dataclass(frozen=True, slots=True)
class AggregateResult:
    """What was left out, and how many chunks nobody delivered."""

    refused: tuple[RefusedChunk, ...]
    untouched: int


def discount(staleness: int) -> float:
    """Factor on a late update's weight: (1 + s)^-0.5, polynomial FedAsync (Xie et al. 2019)."""
    # Not a power: libraries round it differently, and every peer must get the same bits.
    return 1.0 / math.sqrt(1.0 + staleness)


def aggregate(
    layout: Layout,
    sources: Mapping[int, Sequence[Source]],
    read: Callable[[UpdateId, int], bytes | memoryview],
    start: Arrays,
    out: Mapping[str, Array],
) -> AggregateResult:
    """Average chunk by chunk into ``out``; one chunk's float64 tiles are all that is added.

    Args:
        sources: chunk index -> versions to average, in canonical order.
        read: a chunk file's bytes, mapped rather than copied.
        start: round-start weights, kept for a chunk that nobody delivered.
        out: writable C-contiguous arrays of the model's shapes; may be those of ``start``.

    Raises:
        LocalProtocolError: versions out of order, or a weight that is none.
    """
    refused: list[RefusedChunk] = []
    untouched = 0
    for chunk in layout.chunks:
        versions: list[tuple[float, list[Array]]] = []
        listed = sources.get(chunk.index, ())
        _check_sources(listed)
        for owner, update, weight in listed:
            try:
                arrays = decode_chunk(layout, chunk.index, read(update, chunk.index))
                _refuse_unusable(layout, chunk.index, arrays)
            except RemoteProtocolError as error:
                refused.append(RefusedChunk(owner, chunk.index, error.reason))
                continue
            versions.append((weight, arrays))
        untouched += not versions
        for position, part in enumerate(chunk.slices):
            tensor = layout.spec.tensors[part.tensor]
            target = _rows(out[tensor.name], part.start, part.stop)
            if not versions:
                target[...] = _rows(np.asarray(start[tensor.name]), part.start, part.stop)
                continue
            parts = [(weight, arrays[position].reshape(-1)) for weight, arrays in versions]
            average_slice(tensor.dtype, parts, target.reshape(-1))
    return AggregateResult(tuple(refused), untouched)


def _rows(array: Array, start: int, stop: int) -> Array:
    """The rows of a slice as a view; a 0-d array as its one element."""
    return array[start:stop] if array.ndim else array.reshape(1)


def _check_sources(listed: Sequence[Source]) -> None:
    owners = [owner for owner, _, _ in listed]
    if owners != sorted(owners):
        raise LocalProtocolError("versions of a chunk must be in the order of their owners")
    if not all(0 < weight <= MAX_WEIGHT for _, _, weight in listed):
        raise LocalProtocolError(f"weights must be above 0 and at most {MAX_WEIGHT}")


def _refuse_unusable(layout: Layout, chunk: int, arrays: Sequence[Array]) -> None:
    for part, array in zip(layout.chunks[chunk].slices, arrays, strict=True):
        tensor = layout.spec.tensors[part.tensor]
        flat = array.reshape(-1)
        for begin in range(0, flat.size, TILE):
            tile = flat[begin : begin + TILE]
            if tensor.is_float and not np.isfinite(_floats(tensor.dtype, tile)).all():
                raise RemoteProtocolError(f"chunk {chunk} holds NaN or infinity in {tensor.name!r}")
            if tensor.dtype == "BOOL" and tile.view(np.uint8).max() > 1:
                raise RemoteProtocolError(f"chunk {chunk} holds no truth values in {tensor.name!r}")


def average_slice(dtype: str, parts: Sequence[tuple[float, Array]], out: Array) -> None:
    """Average finite 1-d arrays of one dtype into ``out``; integers and booleans take the maximum.

    A single version is copied: its bits are exact, whatever its weight.
    """
    if len(parts) == 1:
        out[...] = parts[0][1]
        return
    if dtype not in FLOAT_DTYPES:
        out[...] = parts[0][1]
        for _, values in parts[1:]:
            np.maximum(out, values, out=out)
        return
    size = min(TILE, out.size)
    accumulator = np.empty(size, np.float64)
    scratch = np.empty(size, np.float64)
    for begin in range(0, out.size, TILE):
        end = min(begin + TILE, out.size)
        acc, term = accumulator[: end - begin], scratch[: end - begin]
        tiles = [(weight, _floats(dtype, values[begin:end])) for weight, values in parts]
        if dtype == "F64":
            _mean_of_doubles(tiles, acc, term)
        else:
            _mean(tiles, acc, term)
        out[begin:end] = float64_to_bfloat16(acc) if dtype == "BF16" else acc


_Tiles = Sequence[tuple[float, npt.NDArray[np.floating]]]


def _mean(tiles: _Tiles, acc: npt.NDArray[np.float64], term: npt.NDArray[np.float64]) -> None:
    """sum(w x) / sum(w) into ``acc``, in this order and no other."""
    total, values = tiles[0]
    np.multiply(values, total, out=acc, dtype=np.float64)  # not from 0: -0.0 stays -0.0
    for weight, values in tiles[1:]:
        np.multiply(values, weight, out=term, dtype=np.float64)
        np.add(acc, term, out=acc)
        total += weight
    np.divide(acc, total, out=acc)


def _mean_of_doubles(
    tiles: _Tiles, acc: npt.NDArray[np.float64], term: npt.NDArray[np.float64]
) -> None:
    """As ``_mean``, also where finite values times their weights are too large for float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        _mean(tiles, acc, term)
    overflown = ~np.isfinite(acc)
    if not overflown.any():
        return
    # A power of two that brings the weights' sum to 1 or less: nothing but the range changes.
    shift = -math.frexp(math.fsum(weight for weight, _ in tiles))[1]
    limit = np.finfo(np.float64).max
    scaled = np.empty_like(acc)
    with np.errstate(over="ignore"):
        _mean([(math.ldexp(weight, shift), values) for weight, values in tiles], scaled, term)
    np.clip(scaled, -limit, limit, out=scaled)  # the division may round up past the largest value
    # Only where it is needed, so that a value never depends on its neighbours in the tile.
    np.copyto(acc, scaled, where=overflown)


def _floats(dtype: str, values: Array) -> npt.NDArray[np.floating]:
    if dtype == "BF16":
        return bfloat16_to_float32(values)  # type: ignore[arg-type]  # carried as its bits
    return values  # type: ignore[return-value]  # a float dtype by the spec
