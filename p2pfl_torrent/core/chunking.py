"""How a model is cut: chunks of named tensor slices, each chunk a safetensors file.

The layout is a pure function of the model spec and the chunking terms, so every peer of a swarm
derives the same one. A chunk is scored and aggregated whole; it is requested in blocks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import msgspec
import numpy as np

from p2pfl_torrent.core import zstd
from p2pfl_torrent.core.compression import PLAIN, Compression, Field, SliceForm, slice_form
from p2pfl_torrent.core.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.tensors import NUMPY_DTYPES, Array, Arrays, ModelSpec, array_bytes

MAX_CHUNKS = 1 << 16  # a chunk's index is 16 bits on the wire
MIN_CHUNK_BYTES = 8 << 10  # of a tiny model: to ask for a chunk and answer takes 2 ms of CPU
MAX_HEADER_PER_SLICE = 2 << 10  # JSON of one entry: up to 256 characters of name, escaped
MAX_HEADER_FIXED = 1 << 10  # braces, metadata and padding


class TensorSlice(msgspec.Struct, frozen=True, array_like=True):
    """Rows ``start`` to ``stop`` (along the first side) of one tensor; a 0-d tensor is one row.

    Attributes:
        tensor: index into ``ModelSpec.tensors``.
    """

    tensor: Annotated[int, msgspec.Meta(ge=0)]
    start: Annotated[int, msgspec.Meta(ge=0)]
    stop: Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class ChunkLayout:
    """The slices of one chunk.

    Attributes:
        slices: in exchange order.
        payload_bytes: bytes of the slices' values, the file's header excluded.
    """

    index: int
    slices: tuple[TensorSlice, ...]
    payload_bytes: int

    @property
    def max_file_bytes(self) -> int:
        """Bound on the chunk's file: what its slices need and a generous header."""
        return 8 + self.payload_bytes + MAX_HEADER_FIXED + MAX_HEADER_PER_SLICE * len(self.slices)


@dataclass(frozen=True)
class ChunkForm:
    """What a chunk's compressed file looks like, whatever the values.

    Attributes:
        head: the file's bytes before its values.
        slices: the form of each slice, in exchange order.
        fields: (place of a slice, field of its form, its offset in the file), in file order.
        size: bytes of the file, before zstd.
    """

    head: bytes
    slices: tuple[SliceForm, ...]
    fields: tuple[tuple[int, Field, int], ...]
    size: int


@dataclass(frozen=True)
class Layout:
    """A model cut into chunks; every row of every tensor is in exactly one of them.

    Attributes:
        compression: how the chunks' files are written; ``head`` and the functions of this module
            are about plain ones, ``core.encoding`` is about all.
    """

    spec: ModelSpec
    chunks: tuple[ChunkLayout, ...]
    block_size: int
    compression: Compression = PLAIN

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256, part of the genesis: the cut is the same on every peer."""
        slices = [[msgspec.to_builtins(s) for s in chunk.slices] for chunk in self.chunks]
        encoded = json.dumps([self.spec.fingerprint(), self.block_size, slices])
        return hashlib.sha256(encoded.encode()).hexdigest()

    def blocks_of(self, file_bytes: int) -> int:
        """Number of blocks in a chunk file of that many bytes."""
        return -(-file_bytes // self.block_size)

    def head(self, index: int) -> tuple[bytes, tuple[TensorSlice, ...]]:
        """A chunk file's bytes before its values, and its slices in the order of their values.

        They are written here, not by the library: its low-level writer differs between versions,
        has no bfloat16 for numpy, and an owner that restarts must produce the same hashes. The
        order (widest type first, then name) is the library's, so every value is aligned.
        """
        if index not in self._heads:
            self._heads[index] = self._make_head(index)
        return self._heads[index]

    @cached_property
    def _heads(self) -> dict[int, tuple[bytes, tuple[TensorSlice, ...]]]:
        return {}

    def _make_head(self, index: int) -> tuple[bytes, tuple[TensorSlice, ...]]:
        tensors = self.spec.tensors
        named = {self.slice_name(part): part for part in self.chunks[index].slices}
        head, order = file_head(
            {
                name: (tensors[part.tensor].dtype, self.slice_shape(part))
                for name, part in named.items()
            }
        )
        return head, tuple(named[name] for name in order)

    def form(self, index: int) -> ChunkForm:
        """The form of a chunk's file where ``compression`` is not plain.

        Raises:
            ConfigError: a tensor bears the name that a field of another one has.
        """
        if index not in self._forms:
            self._forms[index] = self._make_form(index)
        return self._forms[index]

    @cached_property
    def _forms(self) -> dict[int, ChunkForm]:
        return {}

    def _make_form(self, index: int) -> ChunkForm:
        forms: list[SliceForm] = []
        named: dict[str, tuple[int, Field]] = {}
        for place, part in enumerate(self.chunks[index].slices):
            dtype = self.spec.tensors[part.tensor].dtype
            forms.append(slice_form(self.compression, dtype, self.slice_shape(part)))
            for field in forms[-1].fields:
                name = self.slice_name(part) + field.suffix
                if name in named:
                    raise ConfigError(
                        f"Tensor {name!r} has the name of what chunk.compression adds to another: "
                        "rename it."
                    )
                named[name] = place, field
        head, order = file_head({name: field[1:] for name, (_, field) in named.items()})
        offset = len(head)
        fields: list[tuple[int, Field, int]] = []
        for name in order:
            place, field = named[name]
            fields.append((place, field, offset))
            offset += field.nbytes
        return ChunkForm(head, tuple(forms), tuple(fields), offset)

    def file_bounds(self, index: int) -> tuple[int, int]:
        """Least and most bytes of a chunk's file."""
        if self.compression.zstd_level:
            return 1, zstd.largest_frame(self.form(index).size)
        if not self.compression.is_plain:
            return self.form(index).size, self.form(index).size
        chunk = self.chunks[index]
        return chunk.payload_bytes + 1, chunk.max_file_bytes

    def slice_name(self, part: TensorSlice) -> str:
        """A slice's name inside its safetensors file: ``fc.weight`` or ``fc.weight[0:64]``."""
        tensor = self.spec.tensors[part.tensor]
        rows = tensor.shape[0] if tensor.shape else 1
        if part.start == 0 and part.stop == rows:
            return tensor.name
        return f"{tensor.name}[{part.start}:{part.stop}]"

    def slice_shape(self, part: TensorSlice) -> tuple[int, ...]:
        """Shape of a slice."""
        tensor = self.spec.tensors[part.tensor]
        return (part.stop - part.start, *tensor.shape[1:]) if tensor.shape else ()


def plan(spec: ModelSpec, *, num_chunks: int, block_size: int) -> Layout:
    """Cut a model into about ``num_chunks`` chunks of about equal size.

    Tensors keep their order. A tensor no larger than the target stays whole; a larger one is cut
    along its rows. Fewer chunks come out when the model has fewer rows than that.

    Raises:
        ConfigError: more chunks than can be addressed, or a tensor bears the name that a slice of
            another one would have.
    """
    target = max(1, -(-spec.nbytes // num_chunks))
    chunks: list[list[TensorSlice]] = []
    filled = 0
    for part, nbytes in _pieces(spec, target):
        # Overshooting by less than half a piece is nearer to the target than stopping short.
        if not chunks or filled + nbytes / 2 > target:
            chunks.append([])
            filled = 0
        chunks[-1].append(part)
        filled += nbytes
    return checked_layout(spec, chunks, block_size)


def checked_layout(
    spec: ModelSpec, chunks: Sequence[Sequence[TensorSlice]], block_size: int
) -> Layout:
    """The layout with these slices.

    Raises:
        ConfigError: as ``plan``.
    """
    if len(chunks) > MAX_CHUNKS:
        raise ConfigError(
            f"The model would be cut into {len(chunks)} chunks, of which at most {MAX_CHUNKS} can "
            "be addressed: choose a smaller chunk.num_chunks."
        )
    made = tuple(
        ChunkLayout(index, tuple(slices), sum(_slice_bytes(spec, part) for part in slices))
        for index, slices in enumerate(chunks)
    )
    layout = Layout(spec, made, block_size)
    for chunk in made:
        names = [layout.slice_name(part) for part in chunk.slices]
        if len(set(names)) < len(names):
            name = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"Tensor {name!r} has the name of a slice of another: rename it.")
    return layout


def _slice_bytes(spec: ModelSpec, part: TensorSlice) -> int:
    tensor = spec.tensors[part.tensor]
    rows = tensor.shape[0] if tensor.shape else 1
    return tensor.nbytes // max(1, rows) * (part.stop - part.start)


def _pieces(spec: ModelSpec, target: int) -> Iterator[tuple[TensorSlice, int]]:
    """Slices of at most about ``target`` bytes, in exchange order, with their bytes."""
    for index, tensor in enumerate(spec.tensors):
        rows = tensor.shape[0] if tensor.shape else 1
        if tensor.nbytes <= target or rows <= 1:
            yield TensorSlice(index, 0, rows), tensor.nbytes
            continue
        parts = min(rows, -(-tensor.nbytes // target))
        row_bytes = tensor.nbytes // rows
        for part in range(parts):
            start, stop = rows * part // parts, rows * (part + 1) // parts
            yield TensorSlice(index, start, stop), row_bytes * (stop - start)


def file_head(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, list[str]]:
    """A safetensors file's bytes before its values, and the names in the order of their values.

    Args:
        tensors: name -> dtype and shape.
    """
    order = sorted(tensors, key=lambda name: (-NUMPY_DTYPES[tensors[name][0]].itemsize, name))
    entries: dict[str, dict[str, object]] = {}
    offset = 0
    for name in order:
        dtype, shape = tensors[name]
        stop = offset + math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    encoded = msgspec.json.encode(entries)
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, order


def slice_of(array: Array, part: TensorSlice) -> Array:
    """The rows of a slice, as a view; a 0-d tensor is its own single row."""
    return array[part.start : part.stop] if array.ndim else array


def encode_chunk(layout: Layout, index: int, arrays: Arrays) -> bytes:
    """The safetensors file of one chunk."""
    return b"".join(encode_chunk_parts(layout, index, arrays))


def encode_chunk_parts(layout: Layout, index: int, arrays: Arrays) -> Iterator[bytes | memoryview]:
    """The safetensors file of one chunk in parts: its header, then each slice without a copy.

    Raises:
        LocalProtocolError: an array has another dtype or shape than the layout says.
    """
    header, ordered = layout.head(index)
    yield header
    for part in ordered:
        tensor = layout.spec.tensors[part.tensor]
        array = arrays[tensor.name]
        if array.shape != tensor.shape or array.dtype != NUMPY_DTYPES[tensor.dtype]:
            raise LocalProtocolError(
                f"{tensor.name!r} is {array.dtype}{array.shape}, not {tensor.dtype}{tensor.shape}"
            )
        yield array_bytes(slice_of(array, part))


def checkpoint_layout(spec: ModelSpec) -> Layout:
    """A whole model as a single chunk: the layout of a checkpoint file."""
    slices = tuple(
        TensorSlice(index, 0, tensor.shape[0] if tensor.shape else 1)
        for index, tensor in enumerate(spec.tensors)
    )
    return Layout(spec, (ChunkLayout(0, slices, spec.nbytes),), block_size=max(1, spec.nbytes))


def decode_chunk(layout: Layout, index: int, data: bytes | memoryview) -> list[Array]:
    """The arrays of one chunk's file, in the order of its slices, as read-only views of ``data``.

    A chunk's header is a function of the layout, so it is compared and never parsed: nothing in a
    file from another peer is interpreted.

    Raises:
        RemoteProtocolError: unless the file holds exactly the slices of the layout, with their
            names, dtypes and shapes (the bytes came from another peer).
    """
    view = memoryview(data).cast("B").toreadonly()
    header, ordered = layout.head(index)
    chunk = layout.chunks[index]
    if len(view) != len(header) + chunk.payload_bytes:
        raise RemoteProtocolError(f"chunk {index} is a file of {len(view)} bytes")
    if view[: len(header)] != header:
        raise RemoteProtocolError(f"chunk {index} has another header than agreed")
    offset = len(header)
    arrays: dict[TensorSlice, Array] = {}
    for part in ordered:
        dtype = NUMPY_DTYPES[layout.spec.tensors[part.tensor].dtype]
        shape = layout.slice_shape(part)
        array: Array = np.ndarray(shape, dtype, buffer=view, offset=offset)
        arrays[part] = array
        offset += array.nbytes
    return [arrays[part] for part in chunk.slices]
