"""Every row is in one chunk, every chunk is a safetensors file, and only the agreed one decodes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from p2pfl_torrent.core.chunking import (
    MAX_CHUNKS,
    ChunkLayout,
    Layout,
    TensorSlice,
    checkpoint_layout,
    decode_chunk,
    encode_chunk,
    encode_chunk_parts,
    plan,
    slice_of,
)
from p2pfl_torrent.core.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.tensors import NUMPY_DTYPES, ModelSpec, TensorSpec
from tests.core.small_models import finite_arrays, same_bits, specs

layouts = st.builds(
    lambda spec, chunks, block: plan(spec, num_chunks=chunks, block_size=block),
    specs,
    st.integers(1, 40),
    st.integers(1, 64),
)


def library_reads(data: bytes) -> dict[str, dict[str, Any]]:
    return dict(deserialize(data))  # type: ignore[no-untyped-call]  # it has no types


def rows_of(tensor: TensorSpec) -> int:
    return tensor.shape[0] if tensor.shape else 1


@given(layouts)
def test_every_row_is_in_exactly_one_chunk(layout: Layout) -> None:
    parts = [part for chunk in layout.chunks for part in chunk.slices]
    assert parts == sorted(parts, key=lambda part: (part.tensor, part.start))
    assert sorted({part.tensor for part in parts}) == list(range(len(layout.spec.tensors)))
    for index, tensor in enumerate(layout.spec.tensors):
        mine = [part for part in parts if part.tensor == index]
        assert (mine[0].start, mine[-1].stop) == (0, rows_of(tensor))
        assert all(a.stop == b.start for a, b in pairwise(mine))
    assert [chunk.index for chunk in layout.chunks] == list(range(len(layout.chunks)))
    assert all(chunk.slices for chunk in layout.chunks)
    assert sum(chunk.payload_bytes for chunk in layout.chunks) == layout.spec.nbytes


@given(layouts)
def test_no_chunk_is_far_above_the_target(layout: Layout) -> None:
    target = -(-layout.spec.nbytes // max(1, len(layout.chunks)))
    widest = max(tensor.nbytes // max(1, rows_of(tensor)) for tensor in layout.spec.tensors)
    largest = max(chunk.payload_bytes for chunk in layout.chunks)
    assert largest <= 3 * max(target, widest) + widest


@given(layouts, st.integers(0, 5))
def test_a_chunk_comes_back_as_it_was_and_the_library_reads_the_same(
    layout: Layout, seed: int
) -> None:
    arrays = finite_arrays(layout.spec, seed)
    for chunk in layout.chunks:
        data = encode_chunk(layout, chunk.index, arrays)
        assert chunk.payload_bytes < len(data) <= chunk.max_file_bytes
        decoded = decode_chunk(layout, chunk.index, data)
        by_library = library_reads(data)
        assert len(by_library) == len(chunk.slices)
        for part, array in zip(chunk.slices, decoded, strict=True):
            tensor = layout.spec.tensors[part.tensor]
            assert same_bits(array, slice_of(arrays[tensor.name], part))
            assert not array.flags.writeable
            entry = by_library[layout.slice_name(part)]
            assert entry["dtype"] == tensor.dtype
            assert tuple(entry["shape"]) == array.shape
            assert bytes(entry["data"]) == array.tobytes()


@given(layouts, st.integers(0, 5), st.data())
@settings(max_examples=60)
def test_a_file_with_another_header_or_length_is_refused(
    layout: Layout, seed: int, data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(layout.chunks) - 1))
    good = encode_chunk(layout, index, finite_arrays(layout.spec, seed))
    header = len(good) - layout.chunks[index].payload_bytes
    place = data.draw(st.integers(0, header - 1))
    flipped = bytearray(good)
    flipped[place] ^= data.draw(st.integers(1, 255))
    for bad in (bytes(flipped), good[:-1], good + b"\0", good[:place], b""):
        with pytest.raises(RemoteProtocolError):
            decode_chunk(layout, index, bad)


@given(st.binary(max_size=300), layouts)
def test_noise_is_refused(noise: bytes, layout: Layout) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_chunk(layout, 0, noise)


@given(layouts, st.integers(0, 5))
def test_every_value_is_aligned(layout: Layout, seed: int) -> None:
    arrays = finite_arrays(layout.spec, seed)
    for chunk in layout.chunks:
        data = np.frombuffer(encode_chunk(layout, chunk.index, arrays), np.uint8).copy()
        for array in decode_chunk(layout, chunk.index, memoryview(data.data)):
            if array.size:
                assert (array.ctypes.data - data.ctypes.data) % array.itemsize == 0


def test_the_longest_names_and_most_sides_stay_within_the_bound() -> None:
    worst = "\x01" * 256  # six characters each in JSON
    tensors = tuple(
        TensorSpec(worst[:-1] + chr(65 + i), "BF16", (1 << 40, *(1,) * 15)) for i in range(3)
    )
    chunk = ChunkLayout(0, tuple(TensorSlice(i, 10**11, 10**12) for i in range(3)), 0)
    layout = Layout(ModelSpec(tensors), (chunk,), 1 << 18)
    assert len(layout.head(0)[0]) <= chunk.max_file_bytes - 8


def test_parts_of_a_chunk_share_the_models_memory() -> None:
    spec = ModelSpec((TensorSpec("w", "F32", (64, 64)),))
    arrays = {"w": np.zeros((64, 64), np.float32)}
    _, values = encode_chunk_parts(checkpoint_layout(spec), 0, arrays)
    assert np.shares_memory(np.asarray(values), arrays["w"])


@given(specs)
def test_the_digest_tells_layouts_apart(spec: ModelSpec) -> None:
    def digest(chunks: int, block: int) -> str:
        return plan(spec, num_chunks=chunks, block_size=block).digest

    assert digest(4, 64) == digest(4, 64)
    assert digest(4, 64) != digest(4, 65)
    first = spec.tensors[0]
    renamed = TensorSpec(first.name + "'", first.dtype, first.shape)
    other = ModelSpec((renamed, *spec.tensors[1:]))
    assert plan(other, num_chunks=4, block_size=64).digest != digest(4, 64)


def test_a_tensor_named_like_a_slice_of_another_is_an_error() -> None:
    spec = ModelSpec((TensorSpec("a", "F32", (4,)), TensorSpec("a[2:4]", "F32", (1,))))
    plan(spec, num_chunks=1, block_size=64)  # "a" stays whole: nothing collides
    with pytest.raises(ConfigError, match="rename it"):
        plan(spec, num_chunks=2, block_size=64)


def test_more_chunks_than_an_index_can_name_are_an_error() -> None:
    spec = ModelSpec((TensorSpec("a", "U8", (2 * MAX_CHUNKS,)),))
    with pytest.raises(ConfigError, match="num_chunks"):
        plan(spec, num_chunks=2 * MAX_CHUNKS, block_size=64)


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float64), np.zeros(4, np.float32)])
def test_arrays_that_are_not_the_layouts_are_our_own_fault(wrong: np.ndarray) -> None:
    layout = plan(ModelSpec((TensorSpec("a", "F32", (3,)),)), num_chunks=1, block_size=64)
    with pytest.raises(LocalProtocolError):
        encode_chunk(layout, 0, {"a": wrong})


@given(layouts, st.integers(0, 2000))
def test_blocks_cover_a_file(layout: Layout, size: int) -> None:
    blocks = layout.blocks_of(size)
    assert (blocks - 1) * layout.block_size < size <= blocks * layout.block_size or not size


def test_every_dtype_of_the_table_is_one_of_the_librarys() -> None:
    for name, dtype in NUMPY_DTYPES.items():
        layout = checkpoint_layout(ModelSpec((TensorSpec("t", name, (3,)),)))
        data = encode_chunk(layout, 0, {"t": np.ones(3, dtype)})
        assert library_reads(data)["t"]["dtype"] == name
