"""Partial aggregation: each chunk is merged over the owners whose version of it is here.

By FedAvg, chunk k becomes sum(w_i x_ik) / sum(w_i) over the updates i that delivered it (McMahan
et al. 2017, renormalised per chunk). Sums are element-wise in float64, owners in canonical order,
with numpy's multiply and add only: no BLAS and no reduction whose order may vary, so peers that
counted the same chunks hold the same bits. Whole models are never in memory: versions come from
mapped files, and what is merged goes on slice by slice. Other rules are in ``aggregators``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from p2pfl_torrent.core.aggregators import FEDAVG, Aggregator
from p2pfl_torrent.core.averaging import Scratch, average_in_turn, average_tiles
from p2pfl_torrent.core.chunking import ChunkLayout, Layout, TensorSlice, slice_of
from p2pfl_torrent.core.errors import LocalProtocolError
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.robust import Distances
from p2pfl_torrent.core.server_optimizers import MOMENTS, step_slice
from p2pfl_torrent.core.tensors import (
    FLOAT_DTYPES,
    NUMPY_DTYPES,
    Array,
    Arrays,
    float64_to_bfloat16,
)
from p2pfl_torrent.core.tiles import floats
from p2pfl_torrent.core.versions import (
    Bases,
    Origin,
    Read,
    Refusals,
    RefusedChunk,
    Source,
    Version,
    finite,
    start_of,
    versions_of,
)

MATRIX = 1 << 21  # elements of all versions at a time where a rule needs them at once: 16 MiB
MAX_WEIGHT = float(1 << 53)  # num_samples can be no larger; times any float32 it is a float64

Keep = Callable[[TensorSlice, Array], object]
"""Takes the merged values of one slice; the array is used again after the call."""


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
    recycled: Collection[UpdateId] = (),
) -> AggregateResult:
    """Merge chunk by chunk.

    What is held is the merged values of one chunk and a few tiles; where files are no plain values,
    float64 sums of a chunk and one owner's values of it besides, or with a rule other than the mean
    every owner's.

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
        recycled: updates that ``versions.Origin`` takes the change of; their bases must be known.

    Raises:
        LocalProtocolError: versions out of order, a weight that is none, or an aggregator of the
            user's own that gave something else than finite values.
    """
    refused: Refusals = {}
    untouched = 0
    scratch = Scratch(layout, is_wide=aggregator.optimizer is not None)
    for listed in sources.values():
        _check_sources(listed)
    origin = Origin(read, start, bases, recycled)
    chosen = _chosen(layout, sources, origin, aggregator, refused)
    for chunk in layout.chunks:
        listed = chosen.get(chunk.index, ())
        merged = scratch.slices(chunk)
        delivered = _merge_chunk(
            layout, chunk, listed, origin, refused, merged, scratch, aggregator
        )
        untouched += not delivered
        if not delivered:
            merged = start_of(layout, chunk.index, start)
        _keep_chunk(layout, chunk, merged, delivered, keep, origin, aggregator)
    return AggregateResult(tuple(refused.values()), untouched)


def _merge_chunk(
    layout: Layout,
    chunk: ChunkLayout,
    listed: Sequence[Source],
    origin: Origin,
    refused: Refusals,
    merged: Sequence[Array],
    scratch: Scratch,
    aggregator: Aggregator,
) -> bool:
    """Merge versions into ``merged``; whether any of them was delivered."""

    def read() -> Iterator[Version]:
        return versions_of(layout, chunk.index, listed, origin, refused)

    def sound() -> Iterator[Version]:
        return finite(layout, chunk.index, read(), refused)

    if aggregator.combine is not None:
        versions = list(sound())
        versions = versions if len(versions) >= aggregator.least else []
        _combine_chunk(layout, chunk, versions, merged, aggregator)
        return any(version.delivered for version in versions)
    if not origin.is_mapped(layout):
        for made in (read, sound):  # the second only after one that was not finite
            delivered = average_in_turn(layout, chunk, made(), merged, scratch)
            if delivered is not None:
                return delivered
    versions = list(read())
    if not average_tiles(layout, chunk, versions, merged, scratch):
        versions = list(finite(layout, chunk.index, versions, refused))
        average_tiles(layout, chunk, versions, merged, scratch)
    return any(version.delivered for version in versions)


def _chosen(
    layout: Layout,
    sources: Mapping[int, Sequence[Source]],
    origin: Origin,
    aggregator: Aggregator,
    refused: Refusals,
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
        decoded = versions_of(layout, chunk.index, delivered, origin, refused)
        versions = finite(layout, chunk.index, decoded, refused)
        sound = {version.owner: version.arrays for version in versions}
        distances.add(chunk, layout, sound)
        heard[chunk.index] = [s for s in delivered if s[0] in sound]
    ranking = aggregator.choose(distances)
    return {chunk: aggregator.of_the_best(ranking, listed) for chunk, listed in heard.items()}


def _combine_chunk(
    layout: Layout,
    chunk: ChunkLayout,
    versions: Sequence[Version],
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
    origin: Origin,
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
