"""How a model is cut along its architecture: what belongs together stays in one chunk.

A plain description of the model's parts goes in, a ``Layout`` comes out. Whoever knows the
framework makes the description; nothing here does. Chunk sizes keep to the range of the family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from p2pfl_torrent.core.chunking import Layout, TensorSlice, checked_layout, plan
from p2pfl_torrent.core.tensors import ModelSpec

Family = Literal["cnn", "transformer", "hybrid", "small", "large"]
Kind = Literal["position", "embedding", "attention", "norm", "conv", "linear", "head", "other"]

MB = 1_000_000
RANGES: Mapping[Family, tuple[int, int]] = {
    "cnn": (1 * MB, 5 * MB),
    "transformer": (5 * MB, 20 * MB),
    "hybrid": (2 * MB, 10 * MB),
    "small": (MB // 2, 2 * MB),
    "large": (10 * MB, 50 * MB),
}
"""Least and most payload bytes of a chunk."""

SMALL_BELOW = 10_000_000  # parameters
LARGE_ABOVE = 100_000_000  # parameters

ALWAYS_GRANTED = 20
"""Chunks that a model may be cut into however small they are: with fewer, a round that its deadline
cuts short has little to rank and to fill."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a group.

    Attributes:
        name: as in the spec, or an alias there.
        stacks: how many times the group's heads lie one after the other along its rows: 1 for a
            query matrix, 3 for one that holds queries, keys and values; 0 where rows are no heads.
    """

    name: str
    stacks: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that belong together, with what is inside them.

    Attributes:
        heads: attention heads along the rows of the parts with stacks; with grouped queries, the
            groups.
    """

    kind: Kind
    members: tuple[Part | Group, ...]
    heads: int = 1


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a model is made of.

    Attributes:
        groups: in the order of exchange; a tensor counts where it is named first.
    """

    family: Family
    groups: tuple[Group, ...]


_Piece = tuple[list[TensorSlice], int]
"""Slices that go into one chunk, and their bytes."""


def plan_by_architecture(
    spec: ModelSpec, architecture: Architecture, *, num_chunks: int, block_size: int
) -> Layout:
    """Cut a model into about ``num_chunks`` chunks that keep its groups together.

    Groups keep their order; tensors that no group names come last, each for itself. The family's
    range bounds the chunks' payload. Its lower end yields to half of an equal share, so that up to
    ``ALWAYS_GRANTED`` chunks are made of a model of any size. The last chunk may be smaller than
    the range; one may be larger if a single row or a norm layer is.

    A group of at most 1.5 times the target is not cut. A larger one falls apart into what is in
    it, attention into runs of heads with their queries, keys and values, a matrix into rows.

    Raises:
        ConfigError: as ``plan``.
    """
    low, high = RANGES[architecture.family]
    wished = spec.nbytes // num_chunks
    if architecture.family == "small":
        finer = max(num_chunks, -(-spec.nbytes // high))
        return plan(spec, num_chunks=finer, block_size=block_size)
    granted = spec.nbytes // min(num_chunks, ALWAYS_GRANTED)
    target = max(1, min(low, granted), min(wished, high))
    low = min(low, granted // 2)
    # Whatever has less than `low` can take one more piece and stay within `high`.
    limit = max(1, min(target * 3 // 2, high - low))
    cutter = _Cutter(spec, limit, min(target, limit))
    chunks = _packed(cutter.pieces(architecture.groups), low, target, high)
    return checked_layout(spec, chunks, block_size)


def _packed(pieces: Iterator[_Piece], low: int, target: int, high: int) -> list[list[TensorSlice]]:
    chunks: list[_Piece] = []
    slices: list[TensorSlice] = []
    filled = 0
    for parts, nbytes in pieces:
        # Overshooting by less than half a piece is nearer to the target than stopping short.
        enough = filled + nbytes / 2 > target or filled + nbytes > high
        if slices and filled >= low and enough:
            chunks.append((slices, filled))
            slices, filled = [], 0
        slices = [*slices, *parts]
        filled += nbytes
    if chunks and filled < low and chunks[-1][1] + filled <= high:
        before, _ = chunks.pop()
        slices = before + slices
    if slices:
        chunks.append((slices, filled))
    return [_joined(parts) for parts, _ in chunks]


def _joined(slices: list[TensorSlice]) -> list[TensorSlice]:
    """Neighbouring rows of one tensor as one slice."""
    joined: list[TensorSlice] = []
    for part in slices:
        last = joined[-1] if joined else None
        if last is not None and last.tensor == part.tensor and last.stop == part.start:
            joined[-1] = TensorSlice(part.tensor, last.start, part.stop)
        else:
            joined.append(part)
    return joined


class _Cutter:
    """Cuts groups into pieces of at most ``limit`` bytes, about ``target`` where it must cut."""

    def __init__(self, spec: ModelSpec, limit: int, target: int) -> None:
        self._spec = spec
        self._limit = limit
        self._target = target
        self._index = {tensor.name: index for index, tensor in enumerate(spec.tensors)}
        self._index.update({alias: self._index[name] for alias, name in spec.aliases})
        self._left = set(range(len(spec.tensors)))

    def pieces(self, groups: tuple[Group, ...]) -> Iterator[_Piece]:
        for group in groups:
            yield from self._group(self._known(group))
        for index in sorted(self._left):
            yield from self._rows(index)

    def _known(self, group: Group) -> Group:
        """The group without what the spec lacks and what another group has."""
        members: list[Part | Group] = []
        for member in group.members:
            if isinstance(member, Group):
                inner = self._known(member)
                members += [inner] if inner.members else []
            elif self._index.get(member.name) in self._left:
                self._left.discard(self._index[member.name])
                members.append(member)
        return Group(group.kind, tuple(members), group.heads)

    def _group(self, group: Group) -> Iterator[_Piece]:
        indices = [self._index[part.name] for part in _parts(group)]
        nbytes = sum(self._spec.tensors[index].nbytes for index in indices)
        if nbytes <= self._limit or group.kind == "norm":
            if indices:
                yield [self._whole(index) for index in indices], nbytes
            return
        headed = [part for part in _parts(group) if self._is_headed(part, group.heads)]
        if group.heads > 1 and headed:
            yield from self._heads(headed, group.heads)
        taken = {part.name for part in headed}
        for member in group.members:
            if isinstance(member, Group):
                yield from self._group(_without(member, taken))
            elif member.name not in taken:
                yield from self._rows(self._index[member.name])

    def _is_headed(self, part: Part, heads: int) -> bool:
        tensor = self._spec.tensors[self._index[part.name]]
        runs = part.stacks * heads
        rows = tensor.shape[0] if tensor.shape else 0
        return heads > 1 and runs > 0 and rows > 0 and rows % runs == 0

    def _heads(self, parts: list[Part], heads: int) -> Iterator[_Piece]:
        """Runs of heads, each with its rows of all these parts."""
        tensors = [self._spec.tensors[self._index[part.name]] for part in parts]
        head_bytes = sum(tensor.nbytes for tensor in tensors) // heads
        if head_bytes > self._limit:
            for part in parts:
                yield from self._rows(self._index[part.name])
            return
        for start, stop in _runs(heads, self._target // max(1, head_bytes)):
            slices = []
            for part, tensor in zip(parts, tensors, strict=True):
                stack = tensor.shape[0] // part.stacks
                rows = stack // heads
                for place in range(0, tensor.shape[0], stack):
                    slices.append(
                        TensorSlice(
                            self._index[part.name], place + rows * start, place + rows * stop
                        )
                    )
            yield slices, head_bytes * (stop - start)

    def _rows(self, index: int) -> Iterator[_Piece]:
        tensor = self._spec.tensors[index]
        rows = tensor.shape[0] if tensor.shape else 1
        if tensor.nbytes <= self._limit or rows <= 1:
            yield [self._whole(index)], tensor.nbytes
            return
        row_bytes = tensor.nbytes // rows
        for start, stop in _runs(rows, self._target // row_bytes):
            yield [TensorSlice(index, start, stop)], row_bytes * (stop - start)

    def _whole(self, index: int) -> TensorSlice:
        tensor = self._spec.tensors[index]
        return TensorSlice(index, 0, tensor.shape[0] if tensor.shape else 1)


def _runs(count: int, most: int) -> Iterator[tuple[int, int]]:
    """``count`` things in runs of nearly the same length, none longer than ``most``."""
    runs = -(-count // max(1, most))
    for run in range(runs):
        yield count * run // runs, count * (run + 1) // runs


def _parts(group: Group) -> Iterator[Part]:
    for member in group.members:
        if isinstance(member, Group):
            yield from _parts(member)
        else:
            yield member


def _without(group: Group, names: set[str]) -> Group:
    members = tuple(
        _without(member, names) if isinstance(member, Group) else member
        for member in group.members
        if isinstance(member, Group) or member.name not in names
    )
    return Group(group.kind, members, group.heads)
