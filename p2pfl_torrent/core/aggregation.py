"""Partial FedAvg: each chunk is averaged over the owners whose version of it is here.

Chunk k becomes sum(w_i x_ik) / sum(w_i) over the updates i that delivered it (McMahan et al. 2017,
renormalised per chunk). Sums are element-wise in float64, owners in canonical order, with numpy's
multiply and add only: no BLAS and no reduction whose order may vary, so peers that counted the
same chunks hold the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2pfl_torrent.core.chunking import Layout, decode_chunk
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import Array, Arrays, bfloat16_to_float32, float32_to_bfloat16

TILE = 1 << 18  # elements summed at a time: accumulator and scratch (4 MiB) stay in the L2 cache

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
    return float((1 + staleness) ** -0.5)


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
        out: writable arrays of the model's shapes.
    """
    refused: list[RefusedChunk] = []
    untouched = 0
    for chunk in layout.chunks:
        versions: list[tuple[float, list[Array]]] = []
        for owner, update, weight in sources.get(chunk.index, ()):
            try:
                arrays = decode_chunk(layout, chunk.index, read(update, chunk.index))
                _refuse_non_finite(layout, chunk.index, arrays)
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


def _refuse_non_finite(layout: Layout, chunk: int, arrays: Sequence[Array]) -> None:
    for part, array in zip(layout.chunks[chunk].slices, arrays, strict=True):
        tensor = layout.spec.tensors[part.tensor]
        if tensor.is_float and not np.isfinite(_floats(tensor.dtype, array)).all():
            raise RemoteProtocolError(f"chunk {chunk} holds NaN or infinity in {tensor.name!r}")


def average_slice(dtype: str, parts: Sequence[tuple[float, Array]], out: Array) -> None:
    """Average 1-d arrays of one dtype into ``out``; integers and booleans take the maximum.

    A single version is copied: its bits are exact, whatever its weight.
    """
    if len(parts) == 1:
        out[...] = parts[0][1]
        return
    if dtype not in ("F64", "F32", "F16", "BF16"):
        out[...] = parts[0][1]
        for _, values in parts[1:]:
            np.maximum(out, values, out=out)
        return
    total = 0.0
    for weight, _ in parts:
        total += weight
    size = min(TILE, out.size)
    accumulator = np.empty(size, np.float64)
    scratch = np.empty(size, np.float64)
    for begin in range(0, out.size, TILE):
        end = min(begin + TILE, out.size)
        acc, term = accumulator[: end - begin], scratch[: end - begin]
        acc[...] = 0.0
        for weight, values in parts:
            np.multiply(_floats(dtype, values[begin:end]), weight, out=term, dtype=np.float64)
            np.add(acc, term, out=acc)
        np.divide(acc, total, out=acc)
        out[begin:end] = _rounded(dtype, acc)


def _floats(dtype: str, values: Array) -> npt.NDArray[np.floating]:
    if dtype == "BF16":
        return bfloat16_to_float32(values)  # type: ignore[arg-type]  # carried as its bits
    return values  # type: ignore[return-value]  # a float dtype by the spec


def _rounded(dtype: str, values: npt.NDArray[np.float64]) -> Array:
    if dtype == "BF16":
        return float32_to_bfloat16(values.astype(np.float32))
    return values  # numpy rounds to nearest even when it assigns
