"""Chunk files as the swarm's compression writes them, and back to values.

What ``chunking.encode_chunk_parts`` and ``decode_chunk`` are to plain files, these are to all: a
layout says which it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from p2pfl_torrent.core import zstd
from p2pfl_torrent.core.chunking import (
    Layout,
    TensorSlice,
    decode_chunk,
    encode_chunk_parts,
    slice_of,
)
from p2pfl_torrent.core.compression import SliceForm, decode_slice, encode_slice, still_unsent
from p2pfl_torrent.core.errors import CompressionError, LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.tensors import NUMPY_DTYPES, Array, Arrays, array_bytes

KeepUnsent = Callable[[TensorSlice, Array], object]
"""Takes what readers will not get of a slice of floats: float64 of F64, else float32."""


def encode_file(
    layout: Layout,
    index: int,
    arrays: Arrays,
    base: Arrays | None = None,
    unsent: Arrays | None = None,
    keep_unsent: KeepUnsent | None = None,
) -> Iterator[bytes | memoryview]:
    """A chunk's file in parts; a plain one without a copy of the values.

    Args:
        base: the model that ``arrays`` were trained from, where the compression needs it.
        unsent: what ``keep_unsent`` was given for the owner's update before.

    Raises:
        CompressionError: the codec cannot hold a value.
        LocalProtocolError: an array has another dtype or shape than the layout says.
    """
    if layout.compression.is_plain:
        yield from encode_chunk_parts(layout, index, arrays)
        return
    form = layout.form(index)
    coded: list[dict[str, Array]] = []
    for part, shape in zip(layout.chunks[index].slices, form.slices, strict=True):
        fields = _encoded(layout, part, shape, arrays, base, unsent, keep_unsent)
        coded.append({field.suffix: a for field, a in zip(shape.fields, fields, strict=True)})
    parts: list[bytes | memoryview] = [form.head]
    parts += [array_bytes(coded[place][field.suffix]) for place, field, _ in form.fields]
    if layout.compression.zstd_level:
        yield zstd.pack(b"".join(parts), layout.compression.zstd_level)
    else:
        yield from parts


def _encoded(
    layout: Layout,
    part: TensorSlice,
    form: SliceForm,
    arrays: Arrays,
    base: Arrays | None,
    unsent: Arrays | None,
    keep_unsent: KeepUnsent | None,
) -> list[Array]:
    tensor = layout.spec.tensors[part.tensor]
    array = arrays[tensor.name]
    if array.shape != tensor.shape or array.dtype != NUMPY_DTYPES[tensor.dtype]:
        raise LocalProtocolError(
            f"{tensor.name!r} is {array.dtype}{array.shape}, not {tensor.dtype}{tensor.shape}"
        )
    rows = slice_of(array, part)
    before = _rows_of(base, tensor.name, part) if form.delta else None
    left = _rows_of(unsent, tensor.name, part) if tensor.is_float else None
    fields = encode_slice(form, rows, before, left)
    if fields is None:
        raise CompressionError(
            f"Tensor {tensor.name!r} holds values too large for {layout.compression.name}: set "
            "chunk.compression to bf16 or none at every peer, or keep the tensor home by "
            "chunk.exclude."
        )
    if keep_unsent is not None and before is not None:
        keep_unsent(part, still_unsent(form, rows, before, left, fields))
    return fields


def _rows_of(arrays: Arrays | None, name: str, part: TensorSlice) -> Array | None:
    return None if arrays is None else slice_of(arrays[name], part)


def decode_file(
    layout: Layout, index: int, data: bytes | memoryview, base: Arrays | None = None
) -> list[Array]:
    """The values of one chunk's file in the layout's dtypes, in the order of its slices.

    A file's head is a function of the layout, so it is compared and never parsed: nothing in a
    file from another peer is interpreted. Of a plain file the arrays are read-only views.

    Args:
        base: the model that the update names as its base, where the compression needs it.

    Raises:
        RemoteProtocolError: unless the file has exactly the form that the layout says.
    """
    if layout.compression.is_plain:
        return decode_chunk(layout, index, data)
    try:
        return _decoded(layout, index, memoryview(data).cast("B"), base)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"chunk {index} has {error.reason}") from error


def _decoded(layout: Layout, index: int, view: memoryview, base: Arrays | None) -> list[Array]:
    form = layout.form(index)
    if layout.compression.zstd_level:
        view = memoryview(zstd.unpack(view, form.size))
    if len(view) != form.size:
        raise RemoteProtocolError(f"{len(view)} bytes in place of {form.size}")
    if view[: len(form.head)] != form.head:
        raise RemoteProtocolError("another header than agreed")
    coded: dict[tuple[int, str], Array] = {}
    for place, field, offset in form.fields:
        dtype = NUMPY_DTYPES[field.dtype]
        array: Array = np.ndarray(field.shape, dtype, buffer=view.toreadonly(), offset=offset)
        coded[place, field.suffix] = array
    values: list[Array] = []
    for place, (part, shape) in enumerate(
        zip(layout.chunks[index].slices, form.slices, strict=True)
    ):
        name = layout.spec.tensors[part.tensor].name
        before = _rows_of(base, name, part) if shape.delta else None
        fields = [coded[place, field.suffix] for field in shape.fields]
        values.append(decode_slice(shape, fields, before))
    return values
