"""How a model is cut: chunks of named tensor slices, each chunk a safetensors file.

The layout is a pure function of the model spec and the chunking terms, so every peer of a swarm
derives the same one. A chunk is scored and aggregated whole; it is requested in blocks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import msgspec
import numpy as np

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.tensors import NUMPY_DTYPES, Array, Arrays, ModelSpec, array_bytes

MAX_CHUNKS = 1 << 16  # a chunk's index is 16 bits on the wire
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
class Layout:
    """A model cut into chunks; every row of every tensor is in exactly one of them."""

    spec: ModelSpec
    chunks: tuple[ChunkLayout, ...]
    block_size: int

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256, part of the genesis: the cut is the same on every peer."""
        slices = [[msgspec.to_builtins(s) for s in chunk.slices] for chunk in self.chunks]
        encoded = json.dumps([self.spec.fingerprint(), self.block_size, slices])
        return hashlib.sha256(encoded.encode()).hexdigest()

    def blocks_of(self, file_bytes: int) -> int:
        """Number of blocks in a chunk file of that many bytes."""
        return -(-file_bytes // self.block_size)

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
    """
    target = max(1, -(-spec.nbytes // num_chunks))
    chunks: list[ChunkLayout] = []
    slices: list[TensorSlice] = []
    filled = 0

    def close() -> None:
        nonlocal filled
        if slices:
            chunks.append(ChunkLayout(len(chunks), tuple(slices), filled))
            slices.clear()
            filled = 0

    for part, nbytes in _pieces(spec, target):
        # Overshooting by less than half a piece is nearer to the target than stopping short.
        if slices and filled + nbytes / 2 > target:
            close()
        slices.append(part)
        filled += nbytes
    close()
    if len(chunks) > MAX_CHUNKS:
        raise ValueError(f"{len(chunks)} chunks, at most {MAX_CHUNKS} can be addressed")
    return Layout(spec, tuple(chunks), block_size)


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


def slice_of(array: Array, part: TensorSlice) -> Array:
    """The rows of a slice, as a view; a 0-d tensor is its own single row."""
    return array[part.start : part.stop] if array.ndim else array


def encode_chunk(layout: Layout, index: int, arrays: Arrays) -> bytes:
    """The safetensors file of one chunk."""
    return b"".join(encode_chunk_parts(layout, index, arrays))


def encode_chunk_parts(layout: Layout, index: int, arrays: Arrays) -> Iterator[bytes | memoryview]:
    """The safetensors file of one chunk in parts: its header, then each slice without a copy.

    The bytes are written here, not by the library: its low-level writer differs between versions,
    has no bfloat16 for numpy, and an owner that restarts must produce the same hashes. The order
    (widest type first, then name) is the library's, so every value is aligned.
    """
    ordered = sorted(
        layout.chunks[index].slices,
        key=lambda part: (-layout.spec.tensors[part.tensor].itemsize, layout.slice_name(part)),
    )
    header: dict[str, dict[str, Any]] = {}
    offset = 0
    for part in ordered:
        tensor = layout.spec.tensors[part.tensor]
        shape = layout.slice_shape(part)
        size = math.prod(shape) * tensor.itemsize
        header[layout.slice_name(part)] = {
            "dtype": tensor.dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = msgspec.json.encode(header)
    encoded += b" " * (-len(encoded) % 8)
    yield len(encoded).to_bytes(8, "little") + encoded
    for part in ordered:
        array = arrays[layout.spec.tensors[part.tensor].name]
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

    Raises:
        RemoteProtocolError: unless the file holds exactly the slices of the layout, with their
            names, dtypes and shapes (the bytes came from another peer).
    """
    view = memoryview(data).cast("B").toreadonly()
    header, body = _split_header(view, layout.chunks[index].max_file_bytes)
    header.pop("__metadata__", None)
    parts = layout.chunks[index].slices
    if len(header) != len(parts):
        raise RemoteProtocolError(f"chunk {index} holds {len(header)} tensors, not {len(parts)}")
    arrays: list[Array] = []
    for part in parts:
        tensor = layout.spec.tensors[part.tensor]
        shape = layout.slice_shape(part)
        entry = header.get(layout.slice_name(part))
        if (
            not isinstance(entry, dict)
            or entry.get("dtype") != tensor.dtype
            or entry.get("shape") != list(shape)
        ):
            raise RemoteProtocolError(f"chunk {index} lacks {layout.slice_name(part)!r} as agreed")
        dtype = NUMPY_DTYPES[tensor.dtype]
        values = _values(entry.get("data_offsets"), body, int(np.prod(shape)) * dtype.itemsize)
        arrays.append(np.frombuffer(values, dtype=dtype).reshape(shape))
    return arrays


def _split_header(view: memoryview, max_bytes: int) -> tuple[dict[str, Any], memoryview]:
    """Header object and value bytes of a safetensors file, bounded."""
    if not 8 <= len(view) <= max_bytes:
        raise RemoteProtocolError(f"chunk file of {len(view)} bytes")
    length = int.from_bytes(view[:8], "little")
    if length > len(view) - 8:
        raise RemoteProtocolError("chunk file shorter than its header says")
    try:
        header = msgspec.json.decode(view[8 : 8 + length], type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError("chunk file with an unreadable header") from error
    return header, view[8 + length :]


def _values(offsets: object, body: memoryview, nbytes: int) -> memoryview:
    """The value bytes at a header's ``data_offsets``."""
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int for offset in offsets)
    ):
        raise RemoteProtocolError("chunk file with malformed offsets")
    start, stop = offsets
    if not 0 <= start <= stop <= len(body) or stop - start != nbytes:
        raise RemoteProtocolError("chunk file with offsets out of range")
    return body[start:stop]
