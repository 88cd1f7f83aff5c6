"""Partial FedAvg: each chunk is averaged over the owners whose version of it is here.

Chunk k becomes sum(w_i x_ik) / sum(w_i) over the updates i that delivered it (McMahan et al. 2017,
renormalised per chunk). Sums are element-wise in float64, owners in canonical order, with numpy's
multiply and add only: no BLAS and no reduction whose order may vary, so peers that counted the
same chunks hold the same bits. Whole models are never in memory: versions come from mapped files,
and what is merged goes on slice by slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2pfl_torrent.core.chunking import ChunkLayout, Layout, TensorSlice, slice_of
from p2pfl_torrent.core.encoding import decode_file
from p2pfl_torrent.core.errors import LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import (
    FLOAT_DTYPES,
    NUMPY_DTYPES,
    Array,
    Arrays,
    bfloat16_to_float32,
    float64_to_bfloat16,
)

TILE = 1 << 18  # elements summed at a time: accumulator and scratch (4 MiB) stay in the L2 cache
ALIGNMENT = 16  # bytes between the starts of two slices of a chunk in memory; no type is wider

MAX_WEIGHT = float(1 << 53)  # num_samples can be no larger; times any float32 it is a float64

Source = tuple[PeerId, UpdateId, float]
"""(owner, update to read its chunk from, weight)."""

Bases = Callable[[UpdateId], Arrays | None]
"""The model that an update names as its base."""

Keep = Callable[[TensorSlice, Array], object]
"""Takes the merged values of one slice; the array is used again after the call."""


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
    keep: Keep,
    bases: Bases = lambda _: None,
) -> AggregateResult:
    """Average chunk by chunk; the merged values of one chunk and two tiles are all that is held.

    Args:
        sources: chunk index -> versions to average, in canonical order.
        read: a chunk file's bytes, mapped rather than copied.
        start: round-start weights, kept for a chunk that nobody delivered.
        keep: called for every slice of the model once, in exchange order.
        bases: the model an update began from, of every update where the compression needs it.

    Raises:
        LocalProtocolError: versions out of order, or a weight that is none.
    """
    refused: list[RefusedChunk] = []
    untouched = 0
    scratch = _Scratch(layout)
    for chunk in layout.chunks:
        listed = sources.get(chunk.index, ())
        _check_sources(listed)
        versions = _decoded(layout, chunk.index, listed, read, bases, refused)
        merged = scratch.slices(chunk)
        if not _average_chunk(layout, chunk, versions, merged, scratch):
            versions = _finite(layout, chunk.index, versions, refused)
            _average_chunk(layout, chunk, versions, merged, scratch)
        untouched += not versions
        for part, array in zip(chunk.slices, merged, strict=True):
            name = layout.spec.tensors[part.tensor].name
            keep(part, array if versions else slice_of(np.asarray(start[name]), part))
    return AggregateResult(tuple(refused), untouched)


@dataclass(frozen=True, slots=True)
class _Version:
    owner: PeerId
    weight: float
    arrays: list[Array]


class _Scratch:
    """Memory that is used again for every chunk."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        sizes = (chunk.payload_bytes + ALIGNMENT * len(chunk.slices) for chunk in layout.chunks)
        self._merged = np.empty(max(sizes, default=0), np.uint8)
        size = min(TILE, max((tensor.size for tensor in layout.spec.tensors), default=0))
        self.accumulator = np.empty(size, np.float64)
        self.term = np.empty(size, np.float64)

    def slices(self, chunk: ChunkLayout) -> list[Array]:
        """Room for the merged values of a chunk's slices."""
        arrays: list[Array] = []
        offset = 0
        for part in chunk.slices:
            shape = self._layout.slice_shape(part)
            dtype = NUMPY_DTYPES[self._layout.spec.tensors[part.tensor].dtype]
            array: Array = np.ndarray(shape, dtype, buffer=self._merged.data, offset=offset)
            arrays.append(array)
            offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        return arrays


def _decoded(
    layout: Layout,
    chunk: int,
    listed: Sequence[Source],
    read: Callable[[UpdateId, int], bytes | memoryview],
    bases: Bases,
    refused: list[RefusedChunk],
) -> list[_Version]:
    """The versions of a chunk whose file is one; the others' owners go to ``refused``."""
    versions = []
    for owner, update, weight in listed:
        try:
            arrays = decode_file(layout, chunk, read(update, chunk), bases(update))
            _refuse_untruths(layout, chunk, arrays)
        except RemoteProtocolError as error:
            refused.append(RefusedChunk(owner, chunk, error.reason))
        else:
            versions.append(_Version(owner, weight, arrays))
    return versions


def _finite(
    layout: Layout, chunk: int, versions: Sequence[_Version], refused: list[RefusedChunk]
) -> list[_Version]:
    """The versions without NaN and infinity; the others' owners go to ``refused``."""
    finite = []
    for version in versions:
        try:
            _refuse_not_finite(layout, chunk, version.arrays)
        except RemoteProtocolError as error:
            refused.append(RefusedChunk(version.owner, chunk, error.reason))
        else:
            finite.append(version)
    return finite


def _average_chunk(
    layout: Layout,
    chunk: ChunkLayout,
    versions: Sequence[_Version],
    merged: Sequence[Array],
    scratch: _Scratch,
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


def _check_sources(listed: Sequence[Source]) -> None:
    owners = [owner for owner, _, _ in listed]
    if owners != sorted(owners):
        raise LocalProtocolError("versions of a chunk must be in the order of their owners")
    if not all(0 < weight <= MAX_WEIGHT for _, _, weight in listed):
        raise LocalProtocolError(f"weights must be above 0 and at most {MAX_WEIGHT}")


def _refuse_untruths(layout: Layout, chunk: int, arrays: Sequence[Array]) -> None:
    for part, array in zip(layout.chunks[chunk].slices, arrays, strict=True):
        tensor = layout.spec.tensors[part.tensor]
        if tensor.dtype == "BOOL" and array.size and array.view(np.uint8).max() > 1:
            raise RemoteProtocolError(f"chunk {chunk} holds no truth values in {tensor.name!r}")


def _refuse_not_finite(layout: Layout, chunk: int, arrays: Sequence[Array]) -> None:
    for part, array in zip(layout.chunks[chunk].slices, arrays, strict=True):
        tensor = layout.spec.tensors[part.tensor]
        if tensor.is_float and not all_finite(tensor.dtype, array):
            raise RemoteProtocolError(f"chunk {chunk} holds NaN or infinity in {tensor.name!r}")


def all_finite(dtype: str, array: Array) -> bool:
    """Whether a float array holds neither NaN nor infinity; a tile at a time."""
    flat = array.reshape(-1)
    return all(
        np.isfinite(_floats(dtype, flat[begin : begin + TILE])).all()
        for begin in range(0, flat.size, TILE)
    )


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
        out[...] = parts[0][1]
        for _, values in parts[1:]:
            np.maximum(out, values, out=out)
        return not is_float or all_finite(dtype, out)
    if dtype == "F64" and not all(all_finite(dtype, values) for _, values in parts):
        return False  # asked first: finite doubles may overflow in their sum
    for begin in range(0, out.size, TILE):
        end = min(begin + TILE, out.size)
        acc, scratch = accumulator[: end - begin], term[: end - begin]
        tiles = [(weight, _floats(dtype, values[begin:end])) for weight, values in parts]
        if dtype == "F64":
            _mean_of_doubles(tiles, acc, scratch)
        else:
            with np.errstate(invalid="ignore"):  # infinities of both signs
                _mean(tiles, acc, scratch)
            # Finite values of the smaller types cannot overflow in float64 (see MAX_WEIGHT), and
            # what is not finite stays so in every sum: one look at the sum is one at each version.
            if not np.isfinite(acc).all():
                return False
        out[begin:end] = float64_to_bfloat16(acc) if dtype == "BF16" else acc
    return True


_Tiles = Sequence[tuple[float, npt.NDArray[np.floating]]]


def _mean(tiles: _Tiles, acc: npt.NDArray[np.float64], term: npt.NDArray[np.float64]) -> None:
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
