"""Versions of a chunk: where they are read from, and which are refused, with their owner named."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from p2pfl_torrent.core.chunking import Layout, slice_of
from p2pfl_torrent.core.encoding import decode_file
from p2pfl_torrent.core.errors import LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import NUMPY_DTYPES, Array, Arrays, float64_to_bfloat16
from p2pfl_torrent.core.tiles import TILE, floats

Read = Callable[[UpdateId, int], bytes | memoryview]
"""A chunk file's bytes, mapped rather than copied."""

Source = tuple[PeerId, UpdateId | None, float]
"""(owner, update to read its chunk from, or None for the round-start value, weight)."""

Bases = Callable[[UpdateId], Arrays | None]
"""The model that an update names as its base."""


@dataclass(frozen=True, slots=True)
class RefusedChunk:
    """A verified chunk that cannot be averaged, by its owner's own doing."""

    owner: PeerId
    chunk: int
    reason: str


Refusals = dict[tuple[PeerId, int], RefusedChunk]
"""By owner and chunk: a chunk that is read twice is refused once."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where values come from.

    Attributes:
        start: what the round started from.
        recycled: old updates of which the change is taken, added to ``start``; their bases must be
            known.
    """

    read: Read
    start: Arrays
    bases: Bases
    recycled: Collection[UpdateId] = ()

    def is_mapped(self, layout: Layout) -> bool:
        """Whether versions are views of files, so that all of a chunk's take no memory."""
        return layout.compression.is_plain and not self.recycled


@dataclass(frozen=True, slots=True)
class Version:
    """One owner's values of a chunk's slices; not ``delivered`` where it is the round's start."""

    owner: PeerId
    weight: float
    arrays: list[Array]
    delivered: bool


def versions_of(
    layout: Layout, chunk: int, listed: Sequence[Source], origin: Origin, refused: Refusals
) -> Iterator[Version]:
    """The versions of a chunk whose file is one, as they are asked for; others are refused."""
    for owner, update, weight in listed:
        if update is None:
            yield Version(owner, weight, start_of(layout, chunk, origin.start), False)
            continue
        try:
            base = origin.bases(update)
            arrays = decode_file(layout, chunk, origin.read(update, chunk), base)
            _refuse_untruths(layout, chunk, arrays)
        except RemoteProtocolError as error:
            refused[owner, chunk] = RefusedChunk(owner, chunk, error.reason)
            continue
        if update in origin.recycled:
            arrays = _recycled(layout, chunk, arrays, base, origin.start)
        yield Version(owner, weight, arrays, True)


def start_of(layout: Layout, chunk: int, start: Arrays) -> list[Array]:
    """What the round started from, of a chunk's slices."""
    tensors = layout.spec.tensors
    return [
        slice_of(np.asarray(start[tensors[part.tensor].name]), part)
        for part in layout.chunks[chunk].slices
    ]


def finite(
    layout: Layout, chunk: int, versions: Iterable[Version], refused: Refusals
) -> Iterator[Version]:
    """The versions without NaN and infinity; others are refused."""
    for version in versions:
        try:
            _refuse_not_finite(layout, chunk, version.arrays)
        except RemoteProtocolError as error:
            refused[version.owner, chunk] = RefusedChunk(version.owner, chunk, error.reason)
        else:
            yield version


def all_finite(dtype: str, array: Array) -> bool:
    """Whether a float array holds neither NaN nor infinity; a tile at a time."""
    flat = array.reshape(-1)
    return all(
        np.isfinite(floats(dtype, flat[begin : begin + TILE])).all()
        for begin in range(0, flat.size, TILE)
    )


def _recycled(
    layout: Layout, chunk: int, old: Sequence[Array], base: Arrays | None, start: Arrays
) -> list[Array]:
    """The change from an old update's base to it, added to this round's start.

    In float64, rounded to the tensor's dtype. What is no float has no change: it is as it was.
    """
    if base is None:
        raise LocalProtocolError("a change is of no use without its base")
    result = []
    begun, current = start_of(layout, chunk, base), start_of(layout, chunk, start)
    for place, part in enumerate(layout.chunks[chunk].slices):
        tensor = layout.spec.tensors[part.tensor]
        if not tensor.is_float:
            result.append(old[place])
            continue
        out: Array = np.empty(old[place].shape, NUMPY_DTYPES[tensor.dtype])
        flat, *parts = (a.reshape(-1) for a in (out, current[place], old[place], begun[place]))
        for begin in range(0, flat.size, TILE):
            cut = slice(begin, begin + TILE)
            now, was, before = (floats(tensor.dtype, a[cut]).astype(np.float64) for a in parts)
            with np.errstate(over="ignore", invalid="ignore"):  # not finite: refused later
                value = now + (was - before)
                flat[cut] = float64_to_bfloat16(value) if tensor.dtype == "BF16" else value
        result.append(out)
    return result


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
