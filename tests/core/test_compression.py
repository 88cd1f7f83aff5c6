"""Every codec: what comes back, how far it is off, and what of another peer's file is refused."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl_torrent.core import zstd
from p2pfl_torrent.core.aggregation import aggregate
from p2pfl_torrent.core.chunking import Layout, TensorSlice, plan, slice_of
from p2pfl_torrent.core.compression import (
    Codec,
    Compression,
    decode_slice,
    encode_slice,
    narrow,
    slice_form,
    still_unsent,
    widen,
)
from p2pfl_torrent.core.encoding import decode_file, encode_file
from p2pfl_torrent.core.errors import CompressionError, ConfigError, RemoteProtocolError
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import Array, Arrays, ModelSpec, TensorSpec
from tests.core.small_models import finite_arrays, same_bits, specs

COMPRESSIONS = [
    *(Compression(codec) for codec in get_args(Codec)),
    *(Compression(codec, delta=True) for codec in get_args(Codec)),
    *(Compression(codec, topk_share=0.1) for codec in ("topk",)),
    *(Compression(codec, zstd_level=3) for codec in get_args(Codec)),
    Compression("int8", delta=True, zstd_level=19),
]
compressions = st.sampled_from(COMPRESSIONS)


def cut(spec: ModelSpec, compression: Compression, *, chunks: int = 3) -> Layout:
    return replace(plan(spec, num_chunks=chunks, block_size=64), compression=compression)


def file_of(layout: Layout, index: int, arrays: Arrays, base: Arrays | None = None) -> bytes:
    return b"".join(encode_file(layout, index, arrays, base))


def there_and_back(layout: Layout, arrays: Arrays, base: Arrays | None = None) -> dict[str, Array]:
    """What every peer gets of a model."""
    found: dict[str, list[Array]] = {tensor.name: [] for tensor in layout.spec.tensors}
    for chunk in layout.chunks:
        file = file_of(layout, chunk.index, arrays, base)
        values = decode_file(layout, chunk.index, file, base)
        for part, rows in zip(chunk.slices, values, strict=True):
            found[layout.spec.tensors[part.tensor].name].append(rows)
    return {
        name: np.concatenate(parts) if parts[0].ndim else parts[0] for name, parts in found.items()
    }


def one(dtype: str, *shape: int) -> ModelSpec:
    return ModelSpec((TensorSpec("w", dtype, shape),))


@given(specs, compressions, st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=80)
def test_a_model_comes_back_in_its_own_dtypes_and_shapes(
    spec: ModelSpec, compression: Compression, chunks: int, seed: int
) -> None:
    layout = cut(spec, compression, chunks=chunks)
    arrays, base = finite_arrays(spec, seed), finite_arrays(spec, seed + 100)
    back = there_and_back(layout, arrays, base)
    for tensor in spec.tensors:
        assert back[tensor.name].dtype == arrays[tensor.name].dtype
        assert back[tensor.name].shape == tensor.shape
        if not tensor.is_float:
            assert same_bits(back[tensor.name], arrays[tensor.name])
    again = there_and_back(layout, arrays, base)
    assert all(same_bits(back[name], again[name]) for name in back)


@given(specs, compressions, st.integers(1, 5))
@settings(max_examples=40)
def test_a_file_has_the_size_that_the_layout_says(
    spec: ModelSpec, compression: Compression, chunks: int
) -> None:
    layout = cut(spec, compression, chunks=chunks)
    for chunk in layout.chunks:
        least, most = layout.file_bounds(chunk.index)
        file = file_of(layout, chunk.index, finite_arrays(spec, 1), finite_arrays(spec, 2))
        assert least <= len(file) <= most


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize(
    ("codec", "bits", "smallest"), [("fp16", 11, 2.0**-24), ("bf16", 8, 2.0**-133)]
)
def test_a_float_codec_rounds_to_its_nearest(
    codec: Codec, bits: int, smallest: float, dtype: str
) -> None:
    spec = one(dtype, 64, 8)
    arrays = finite_arrays(spec, 3)
    back = there_and_back(cut(spec, Compression(codec)), arrays)["w"]
    exact = widen(dtype, arrays["w"]).astype(np.float64)
    error = np.abs(widen(dtype, back).astype(np.float64) - exact)
    assert (error <= np.maximum(np.abs(exact) * 2.0**-bits, smallest / 2)).all()
    if dtype in ("F16", "BF16"):
        assert same_bits(back, arrays["w"])  # no smaller: it went as it was


def test_ties_go_to_even() -> None:
    spec = one("F32", 2)
    arrays: dict[str, Array] = {"w": np.array([1 + 2**-11, 1 + 3 * 2**-11], np.float32)}
    back = there_and_back(cut(spec, Compression("fp16")), arrays)["w"]
    assert back.tolist() == [1.0, 1 + 2**-9]


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(st.lists(finite, min_size=6, max_size=6), min_size=1, max_size=4), st.data())
def test_int8_is_off_by_half_a_scale_at_most(rows: list[list[float]], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["F32", "F64"]))
    kind = np.float64 if dtype == "F64" else np.float32
    values = np.array(rows, kind)
    spec = one(dtype, *values.shape)
    back = there_and_back(cut(spec, Compression("int8"), chunks=1), {"w": values})["w"]
    largest = np.abs(values).max(axis=1, keepdims=True).astype(np.float64)
    scale = np.maximum(largest / 127, np.finfo(kind).smallest_subnormal)
    error = np.abs(back.astype(np.float64) - values.astype(np.float64))
    assert (error <= scale / 2 * (1 + 1e-4)).all()
    assert np.isfinite(back).all()


def test_each_row_of_a_matrix_has_a_scale_of_its_own() -> None:
    values = np.array([[1.0] * 32, [1e-6] * 32], np.float32)
    back = there_and_back(cut(one("F32", 2, 32), Compression("int8")), {"w": values})["w"]
    np.testing.assert_allclose(np.asarray(back, np.float32), values, rtol=1e-6)


@pytest.mark.parametrize(("codec", "value"), [("fp16", 65520.0), ("bf16", 3.4e38)])
def test_what_a_codec_cannot_hold_is_told_before_it_is_sent(codec: Codec, value: float) -> None:
    layout = cut(one("F32", 8), Compression(codec))
    arrays: dict[str, Array] = {"w": np.full(8, value, np.float32)}
    with pytest.raises(CompressionError, match=rf"'w' holds values too large for {codec}: set"):
        file_of(layout, 0, arrays)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_a_bad_scale_is_its_owners_fault(scale: float) -> None:
    form = slice_form(Compression("int8"), "F32", (2, 32))
    arrays: list[Array] = [np.ones((2, 32), np.int8), np.array([1.0, scale], np.float32)]
    with pytest.raises(RemoteProtocolError, match="a scale that is negative, infinite or NaN"):
        decode_slice(form, arrays)


def test_a_bad_owner_is_named_and_the_others_are_averaged() -> None:
    layout = cut(one("F32", 4, 32), Compression("int8"), chunks=1)
    good = file_of(layout, 0, {"w": np.full((4, 32), 2.0, np.float32)})
    bad = bytearray(good)
    scales = next(offset for _, field, offset in layout.form(0).fields if field.suffix == ":scale")
    bad[scales : scales + 4] = np.float32(np.nan).tobytes()
    files = {UpdateId(b"good"): good, UpdateId(b"bad"): bytes(bad), UpdateId(b"cut"): good[:-1]}
    sources = [(PeerId(name.decode()), name, 1.0) for name in sorted(files)]
    kept: list[Array] = []
    result = aggregate(
        layout, {0: sources}, lambda update, _: files[update], {}, lambda _, rows: kept.append(rows)
    )
    assert {refused.owner for refused in result.refused} == {"bad", "cut"}
    np.testing.assert_allclose(np.asarray(kept[0], np.float32), 2.0, rtol=1e-6)


@given(st.sampled_from(COMPRESSIONS[1:]), st.integers(0, 10_000), st.binary(min_size=1, max_size=8))
@settings(max_examples=200)
def test_whatever_a_file_holds_only_its_owner_is_blamed(
    compression: Compression, place: int, noise: bytes
) -> None:
    spec = ModelSpec((TensorSpec("a", "F32", (6, 8)), TensorSpec("n", "I64", ())))
    layout = cut(spec, compression, chunks=1)
    base = finite_arrays(spec, 2)
    data = bytearray(file_of(layout, 0, finite_arrays(spec, 1), base))
    place %= len(data)
    data[place : place + len(noise)] = noise
    try:
        values = decode_file(layout, 0, bytes(data), base)
    except RemoteProtocolError:
        return
    shapes = [array.shape for array in values]
    assert shapes == [layout.slice_shape(part) for part in layout.chunks[0].slices]


def test_a_name_that_a_codec_needs_is_told() -> None:
    spec = ModelSpec((TensorSpec("w", "F32", (4, 32)), TensorSpec("w:scale", "F32", (4,))))
    layout = cut(spec, Compression("int8"), chunks=1)
    with pytest.raises(ConfigError, match=r"'w:scale' has the name of what chunk\.compression"):
        layout.form(0)


def test_int8_takes_a_quarter_and_the_halves_a_half() -> None:
    spec = one("F32", 512, 512)
    arrays, base = finite_arrays(spec, 1), finite_arrays(spec, 2)

    def size(compression: Compression) -> int:
        return len(file_of(cut(spec, compression, chunks=1), 0, arrays, base))

    plain = size(Compression())
    assert size(Compression("int8")) < 0.26 * plain
    assert size(Compression("fp16")) < 0.51 * plain
    assert size(Compression("bf16", delta=True)) < 0.51 * plain
    assert size(Compression("topk", topk_share=0.05)) < 0.11 * plain


def test_a_change_is_sent_more_finely_than_the_weights_are() -> None:
    """Weights near 100 that moved by about 0.01: what int8 rounds is the move."""
    spec = one("F32", 16, 32)
    moved = np.random.default_rng(1).standard_normal((16, 32)) / 100
    base: dict[str, Array] = {"w": np.full((16, 32), 100, np.float32)}
    arrays: dict[str, Array] = {"w": (100 + moved).astype(np.float32)}

    def error(compression: Compression) -> float:
        back = there_and_back(cut(spec, compression), arrays, base)["w"]
        return float(np.abs(np.asarray(back, float) - np.asarray(arrays["w"], float)).max())

    assert error(Compression("int8", delta=True)) < 0.04 / 127
    assert error(Compression("int8")) > 0.04


def test_topk_sends_the_largest_changes_and_leaves_the_others_at_the_base() -> None:
    layout = cut(one("F32", 3, 4), Compression("topk", topk_share=0.25), chunks=1)
    base: dict[str, Array] = {"w": np.ones((3, 4), np.float32)}
    values = np.ones((3, 4), np.float32)
    values[0, 1], values[1, 0], values[2, 3], values[2, 2] = -8, 5, 1.5, 3
    back = there_and_back(layout, {"w": values}, base)["w"]
    values[2, 3] = 1
    assert same_bits(back, values)


MOST = {
    "F64": np.finfo(np.float64).max,
    "F32": float(np.finfo(np.float32).max),
    "F16": 65504.0,
    "BF16": 2.0**128 - 2.0**120,
}


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("begun", "value", "left"), [
    (0.9, 0.95, 0.5), (0.9, 0.9, 0.9), (2.0**-12, 1.0, 0.5), (0.0, 1.0, 1.0),
    (48 / 65504, 1.0, 0.0),  # in F16 the change is a tie that goes up, and the sum another
])  # fmt: skip
def test_what_was_left_out_makes_no_reader_get_infinity(
    dtype: str, share: float, sign: int, begun: float, value: float, left: float
) -> None:
    form = slice_form(Compression("topk", topk_share=share), dtype, (16,))
    wide = np.float64 if dtype == "F64" else np.float32

    def full(share: float) -> Array:
        return narrow(dtype, np.full(16, sign * share * MOST[dtype], wide))

    base, values = full(begun), full(value)
    unsent: Array = np.full(16, sign * left * MOST[dtype], wide)
    for _ in range(3):
        fields = encode_slice(form, values, base, unsent)
        assert fields is not None
        assert np.isfinite(widen(dtype, decode_slice(form, fields, base))).all()
        unsent = still_unsent(form, values, base, unsent, fields)
        assert np.isfinite(unsent).all()


def test_a_share_is_named_alike_however_it_was_written() -> None:
    assert Compression("topk", topk_share=1).name == Compression("topk", topk_share=1.0).name


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_what_was_sent_and_what_is_left_is_all_that_changed(dtype: str, chunks: int) -> None:
    spec = ModelSpec((TensorSpec("w", dtype, (12, 8)), TensorSpec("n", "I64", (3,))))
    layout = cut(spec, Compression("topk", topk_share=0.1), chunks=chunks)
    base = finite_arrays(spec, 0)
    wide = np.float64 if dtype == "F64" else np.float32
    unsent: dict[str, Array] = {"w": np.zeros((12, 8), wide)}
    changed = np.zeros((12, 8))
    for round in range(1, 30):
        arrays = finite_arrays(spec, round)
        changed += widen(dtype, arrays["w"]).astype(float) - widen(dtype, base["w"])
        left: dict[str, Array] = {"w": np.full((12, 8), np.nan, wide)}

        def keep(part: TensorSlice, rows: Array, into: Arrays = left) -> None:
            slice_of(into["w"], part)[...] = rows

        got = np.empty((12, 8), float)
        for chunk in layout.chunks:
            file = b"".join(encode_file(layout, chunk.index, arrays, base, unsent, keep))
            values = decode_file(layout, chunk.index, file, base)
            for part, rows in zip(chunk.slices, values, strict=True):
                if part.tensor == 0:
                    got[part.start : part.stop] = widen(dtype, rows)
        changed -= got - widen(dtype, base["w"])
        unsent = left
        np.testing.assert_allclose(np.asarray(unsent["w"], float), changed, atol=1e-4)
    assert np.abs(changed).max() > 1  # something was left out indeed


@pytest.mark.parametrize(
    "index", [[0, 12], [-1, 3], [3, 3], [5, 2]], ids=["beyond", "negative", "repeated", "unordered"]
)
def test_bad_indices_are_their_owners_fault(index: list[int]) -> None:
    form = slice_form(Compression("topk", topk_share=0.1), "F32", (3, 4))
    assert form.fields[0].shape == (2,)
    arrays: list[Array] = [np.array(index, np.int32), np.ones(2, np.float32)]
    with pytest.raises(RemoteProtocolError, match="indices that are out of range, repeated or not"):
        decode_slice(form, arrays, np.zeros((3, 4), np.float32))


class TestZstd:
    layout = cut(one("F32", 64, 64), Compression(zstd_level=3), chunks=1)
    size = layout.form(0).size

    def test_it_packs_what_can_be_packed(self) -> None:
        arrays: dict[str, Array] = {"w": np.zeros((64, 64), np.float32)}
        assert len(file_of(self.layout, 0, arrays)) < 300
        assert same_bits(there_and_back(self.layout, arrays)["w"], arrays["w"])

    def test_a_frame_of_noise_keeps_to_the_bound(self) -> None:
        noise = np.random.default_rng(1).bytes(1 << 20)
        assert len(noise) < len(zstd.pack(noise, 19)) <= zstd.largest_frame(len(noise))
        assert len(zstd.pack(b"", 1)) <= zstd.largest_frame(0)

    def refuse(self, frame: bytes, says: str) -> None:
        tracemalloc.start()
        try:
            with pytest.raises(RemoteProtocolError, match=says):
                decode_file(self.layout, 0, frame)
            assert tracemalloc.get_traced_memory()[1] < (1 << 20)
        finally:
            tracemalloc.stop()

    def test_a_bomb_is_refused_before_it_is_unpacked(self) -> None:
        bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
        assert len(bomb) < self.layout.file_bounds(0)[1]  # the manifest lets it through
        self.refuse(bomb, "chunk 0 has a zstd frame of 268435456 bytes in place of")

    def test_a_bomb_that_declares_the_right_size_is_refused(self) -> None:
        bomb = bytearray(zstandard.ZstdCompressor().compress(bytes(1 << 24)))
        honest = zstandard.ZstdCompressor().compress(bytes(self.size))
        frame = honest[: zstandard.frame_header_size(honest)]
        frame += bytes(bomb[zstandard.frame_header_size(bytes(bomb)) :])
        assert zstandard.get_frame_parameters(frame).content_size == self.size
        self.refuse(frame, "a damaged zstd frame")

    def test_no_declared_size_is_refused(self) -> None:
        content = bytes(self.size)
        self.refuse(
            zstandard.ZstdCompressor(write_content_size=False).compress(content), "in place of"
        )

    def test_what_is_cut_short_or_followed_by_more_is_refused(self) -> None:
        arrays = finite_arrays(self.layout.spec, 1)
        good = file_of(self.layout, 0, arrays)
        for cut_at in (0, 1, 5, len(good) // 2, len(good) - 1):
            self.refuse(good[:cut_at], "zstd frame")
        self.refuse(good + b"\0", "zstd frame")
        self.refuse(good + good, "zstd frame")


@given(st.binary(max_size=300))
def test_noise_in_place_of_a_frame_is_its_owners_fault(noise: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="chunk 0 has"):
        decode_file(TestZstd.layout, 0, noise)


def test_every_compression_has_a_name_of_its_own() -> None:
    for name in {compression.name for compression in COMPRESSIONS}:
        equal = [c for c in COMPRESSIONS if c.name == name]
        spec = one("F32", 64, 4)
        assert len({cut(spec, c).form(0).fields for c in equal}) == 1
        assert len({c.zstd_level for c in equal}) == 1
    assert Compression("int8", delta=True, zstd_level=3).name == "delta+int8+zstd:3"
    assert Compression("topk", delta=True, topk_share=0.1).name == "topk:0.1"
    assert Compression(topk_share=0.5).is_plain
