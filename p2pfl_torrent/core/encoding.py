"""Chunk files as the swarm's compression writes them, and back to values.

What ``chunking.encode_chunk_parts`` and ``decode_chunk`` are to plain files, these are to all: a
layout says which it has.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from p2pfl_torrent.core.chunking import Layout, decode_chunk, encode_chunk_parts, slice_of
from p2pfl_torrent.core.compression import decode_slice, encode_slice
from p2pfl_torrent.core.errors import CompressionError, LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.tensors import NUMPY_DTYPES, Array, Arrays, array_bytes


def encode_file(layout: Layout, index: int, arrays: Arrays) -> Iterator[bytes | memoryview]:
    """A chunk's file in parts; a plain one without a copy of the values.

    Raises:
        CompressionError: the codec cannot hold a value.
        LocalProtocolError: an array has another dtype or shape than the layout says.
    """
    if layout.compression.is_plain:
        yield from encode_chunk_parts(layout, index, arrays)
        return
    form = layout.form(index)
    coded: dict[tuple[int, str], Array] = {}
    for place, (part, shape) in enumerate(
        zip(layout.chunks[index].slices, form.slices, strict=True)
    ):
        tensor = layout.spec.tensors[part.tensor]
        array = arrays[tensor.name]
        if array.shape != tensor.shape or array.dtype != NUMPY_DTYPES[tensor.dtype]:
            raise LocalProtocolError(
                f"{tensor.name!r} is {array.dtype}{array.shape}, not {tensor.dtype}{tensor.shape}"
            )
        fields = encode_slice(shape, slice_of(array, part))
        if fields is None:
            raise CompressionError(
                f"Tensor {tensor.name!r} holds values too large for {shape.codec}: set "
                "chunk.compression to bf16 or none at every peer, or keep the tensor home by "
                "chunk.exclude."
            )
        coded.update(((place, f.suffix), a) for f, a in zip(shape.fields, fields, strict=True))
    yield form.head
    for place, field, _ in form.fields:
        yield array_bytes(coded[place, field.suffix])


def decode_file(layout: Layout, index: int, data: bytes | memoryview) -> list[Array]:
    """The values of one chunk's file in the layout's dtypes, in the order of its slices.

    A file's head is a function of the layout, so it is compared and never parsed: nothing in a
    file from another peer is interpreted. Of a plain file the arrays are read-only views.

    Raises:
        RemoteProtocolError: unless the file has exactly the form that the layout says.
    """
    if layout.compression.is_plain:
        return decode_chunk(layout, index, data)
    view = memoryview(data).cast("B").toreadonly()
    form = layout.form(index)
    if len(view) != form.size:
        raise RemoteProtocolError(f"chunk {index} is a file of {len(view)} bytes")
    if view[: len(form.head)] != form.head:
        raise RemoteProtocolError(f"chunk {index} has another header than agreed")
    coded: dict[tuple[int, str], Array] = {}
    for place, field, offset in form.fields:
        dtype = NUMPY_DTYPES[field.dtype]
        coded[place, field.suffix] = np.ndarray(field.shape, dtype, buffer=view, offset=offset)
    values: list[Array] = []
    for place, shape in enumerate(form.slices):
        try:
            values.append(decode_slice(shape, [coded[place, f.suffix] for f in shape.fields]))
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"chunk {index} has {error.reason}") from error
    return values
