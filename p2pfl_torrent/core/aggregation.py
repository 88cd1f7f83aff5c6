"""Partial aggregation: each chunk is merged over the owners whose version of it is here.

By FedAvg, chunk k becomes sum(w_i x_ik) / sum(w_i) over the updates i that delivered it (McMahan
et al. 2017, renormalised per chunk). Sums are element-wise in float64, owners in canonical order,
with numpy's multiply and add only: no BLAS and no reduction whose order may vary, so peers that
counted the same chunks hold the same bits. Whole models are never in memory: versions come from
mapped files, and what is merged goes on slice by slice. Other rules are in ``aggregators``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2pfl_torrent.core.aggregators import FEDAVG, Aggregator
from p2pfl_torrent.core.chunking import ChunkLayout, Layout, TensorSlice, slice_of
from p2pfl_torrent.core.encoding import decode_file
from p2pfl_torrent.core.errors import LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.robust import Distances
from p2pfl_torrent.core.server_optimizers import MOMENTS, step_slice
from p2pfl_torrent.core.tensors import (
    FLOAT_DTYPES,
    NUMPY_DTYPES,
    Array,
    Arrays,
    float64_to_bfloat16,
)
from p2pfl_torrent.core.tiles import TILE, floats, mean, mean_of_doubles

MATRIX = 1 << 21  # elements of all versions at a time where a rule needs them at once: 16 MiB
ALIGNMENT = 16  # bytes between the starts of two slices of a chunk in memory; no type is wider

MAX_WEIGHT = float(1 << 53)  # num_samples can be no larger; times any float32 it is a float64

Read = Callable[[UpdateId, int], bytes | memoryview]
"""A chunk file's bytes, mapped rather than copied."""

Source = tuple[PeerId, UpdateId | None, float]
"""(owner, update to read its chunk from, or None for the round-start value, weight)."""

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
    read: Read,
    start: Arrays,
    keep: Keep,
    bases: Bases = lambda _: None,
    aggregator: Aggregator = FEDAVG,
) -> AggregateResult:
    """Merge chunk by chunk; the merged values of one chunk and a few tiles are all that is held.

    Args:
        sources: chunk index -> versions to merge, in canonical order.
        start: round-start weights, kept for a chunk that nobody delivered, or fewer owners than
            ``Aggregator.least``.
        keep: called for every slice of the model once, in exchange order; with a server optimizer
            for every slice of ``Aggregator.state_spec``, whose start values ``start`` holds. What
            nobody delivered keeps its moments, too.
        bases: the model an update began from, of every update where the compression needs it.
        aggregator: how versions become one. Where it has no weights, an owner has one voice per
            chunk: its latest version.

    Raises:
        LocalProtocolError: versions out of order, a weight that is none, or an aggregator of the
            user's own that gave something else than finite values.
    """
    refused: list[RefusedChunk] = []
    untouched = 0
    scratch = _Scratch(layout, is_wide=aggregator.optimizer is not None)
    for listed in sources.values():
        _check_sources(listed)
    origin = _Origin(read, start, bases)
    chosen = _chosen(layout, sources, origin, aggregator, refused)
    for chunk in layout.chunks:
        listed = chosen.get(chunk.index, ())
        versions = _decoded(layout, chunk.index, listed, origin, refused)
        merged = scratch.slices(chunk)
        if aggregator.combine is not None:
            versions = _finite(layout, chunk.index, versions, refused)
            versions = versions if len(versions) >= aggregator.least else []
            _combine_chunk(layout, chunk, versions, merged, aggregator)
        elif not _average_chunk(layout, chunk, versions, merged, scratch):
            versions = _finite(layout, chunk.index, versions, refused)
            _average_chunk(layout, chunk, versions, merged, scratch)
        delivered = any(version.delivered for version in versions)
        untouched += not delivered
        if not delivered:
            merged = _start_of(layout, chunk.index, start)
        _keep_chunk(layout, chunk, merged, delivered, keep, origin, aggregator)
    return AggregateResult(tuple(refused), untouched)


def _chosen(
    layout: Layout,
    sources: Mapping[int, Sequence[Source]],
    origin: _Origin,
    aggregator: Aggregator,
    refused: list[RefusedChunk],
) -> Mapping[int, Sequence[Source]]:
    """What the aggregator merges of each chunk."""
    if aggregator.is_weighted:
        return sources
    # The latest is the last of an owner's: canonical order is owner, then the round trained in.
    heard = {
        chunk: [(owner, update, 1.0) for owner, update in {o: u for o, u, _ in listed}.items()]
        for chunk, listed in sources.items()
    }
    if aggregator.choose is None:
        return heard
    distances = Distances()
    for chunk in layout.chunks:
        delivered = [source for source in heard.get(chunk.index, ()) if source[1] is not None]
        decoded = _decoded(layout, chunk.index, delivered, origin, refused)
        versions = _finite(layout, chunk.index, decoded, refused)
        sound = {version.owner: version.arrays for version in versions}
        distances.add(chunk, layout, sound)
        heard[chunk.index] = [s for s in delivered if s[0] in sound]
    ranking = aggregator.choose(distances)
    return {chunk: aggregator.of_the_best(ranking, listed) for chunk, listed in heard.items()}


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where values come from."""

    read: Read
    start: Arrays
    bases: Bases


@dataclass(frozen=True, slots=True)
class _Version:
    owner: PeerId
    weight: float
    arrays: list[Array]
    delivered: bool


class _Scratch:
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


def _decoded(
    layout: Layout,
    chunk: int,
    listed: Sequence[Source],
    origin: _Origin,
    refused: list[RefusedChunk],
) -> list[_Version]:
    """The versions of a chunk whose file is one; the others' owners go to ``refused``."""
    versions = []
    for owner, update, weight in listed:
        if update is None:
            versions.append(_Version(owner, weight, _start_of(layout, chunk, origin.start), False))
            continue
        try:
            arrays = decode_file(layout, chunk, origin.read(update, chunk), origin.bases(update))
            _refuse_untruths(layout, chunk, arrays)
        except RemoteProtocolError as error:
            refused.append(RefusedChunk(owner, chunk, error.reason))
        else:
            versions.append(_Version(owner, weight, arrays, True))
    return versions


def _start_of(layout: Layout, chunk: int, start: Arrays) -> list[Array]:
    tensors = layout.spec.tensors
    return [
        slice_of(np.asarray(start[tensors[part.tensor].name]), part)
        for part in layout.chunks[chunk].slices
    ]


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


def _combine_chunk(
    layout: Layout,
    chunk: ChunkLayout,
    versions: Sequence[_Version],
    merged: Sequence[Array],
    aggregator: Aggregator,
) -> None:
    """Merge finite versions into ``merged`` by the aggregator's own rule."""
    if not versions or aggregator.combine is None:
        return
    weights = tuple(version.weight for version in versions)
    for position, (part, array) in enumerate(zip(chunk.slices, merged, strict=True)):
        dtype = layout.spec.tensors[part.tensor].dtype
        out, parts = array.reshape(-1), [v.arrays[position].reshape(-1) for v in versions]
        if dtype not in FLOAT_DTYPES:
            out[...] = np.sort(np.stack(parts), axis=0)[(len(parts) - 1) // 2]
            continue
        tile = max(1024, MATRIX // len(parts))
        for begin in range(0, out.size, tile):
            end = min(begin + tile, out.size)
            values = np.empty((len(parts), end - begin), np.float64)
            for row, part_values in zip(values, parts, strict=True):
                row[...] = floats(dtype, part_values[begin:end])
            values += 0.0  # -0.0 becomes 0.0: which of them a sort puts first is not defined
            result = aggregator.combine(values, weights)
            if result.shape != (end - begin,) or not np.isfinite(result).all():
                raise LocalProtocolError(
                    f"aggregator {aggregator.name!r} gave no finite value per element"
                )
            out[begin:end] = (
                float64_to_bfloat16(result) if out.dtype == NUMPY_DTYPES["BF16"] else result
            )


def _keep_chunk(
    layout: Layout,
    chunk: ChunkLayout,
    merged: Sequence[Array],
    delivered: bool,
    keep: Keep,
    origin: _Origin,
    aggregator: Aggregator,
) -> None:
    """Hand on a chunk's values, by way of the server optimizer where there is one."""
    if aggregator.optimizer is None:
        for part, array in zip(chunk.slices, merged, strict=True):
            keep(part, array)
        return
    tensors = aggregator.state_spec(layout.spec).tensors
    places = {tensor.name: place for place, tensor in enumerate(tensors)}
    for part, array in zip(chunk.slices, merged, strict=True):
        tensor = tensors[part.tensor]
        if tensor.is_float:
            names = [tensor.name + suffix for suffix in MOMENTS]
            m, v = (slice_of(np.asarray(origin.start[name]), part) for name in names)
            if delivered:
                begun = slice_of(np.asarray(origin.start[tensor.name]), part)
                mean_of_all, array = array, np.empty_like(begun)
                m, v = step_slice(
                    aggregator.optimizer, tensor.dtype, begun, mean_of_all, (m, v), array
                )
            for name, moment in zip(names, (m, v), strict=True):
                keep(TensorSlice(places[name], part.start, part.stop), moment)
        keep(part, array)


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
        np.isfinite(floats(dtype, flat[begin : begin + TILE])).all()
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
        is_wide = out.dtype != parts[0][1].dtype
        out[...] = floats(dtype, parts[0][1]) if is_wide else parts[0][1]
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
