"""Every codec: what comes back, how far it is off, and what of another peer's file is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl_torrent.core.aggregation import aggregate
from p2pfl_torrent.core.chunking import Layout, plan
from p2pfl_torrent.core.compression import Codec, Compression, decode_slice, slice_form, widen
from p2pfl_torrent.core.encoding import decode_file, encode_file
from p2pfl_torrent.core.errors import CompressionError, ConfigError, RemoteProtocolError
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import Array, ModelSpec, TensorSpec
from tests.core.small_models import finite_arrays, same_bits, specs

COMPRESSIONS = [Compression(codec) for codec in get_args(Codec)]
compressions = st.sampled_from(COMPRESSIONS)


def cut(spec: ModelSpec, compression: Compression, *, chunks: int = 3) -> Layout:
    return replace(plan(spec, num_chunks=chunks, block_size=64), compression=compression)


def file_of(layout: Layout, index: int, arrays: dict[str, Array]) -> bytes:
    return b"".join(encode_file(layout, index, arrays))


def there_and_back(layout: Layout, arrays: dict[str, Array]) -> dict[str, Array]:
    """What every peer gets of a model."""
    found: dict[str, list[Array]] = {tensor.name: [] for tensor in layout.spec.tensors}
    for chunk in layout.chunks:
        values = decode_file(layout, chunk.index, file_of(layout, chunk.index, arrays))
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
    arrays = finite_arrays(spec, seed)
    back = there_and_back(layout, arrays)
    for tensor in spec.tensors:
        assert back[tensor.name].dtype == arrays[tensor.name].dtype
        assert back[tensor.name].shape == tensor.shape
        if not tensor.is_float:
            assert same_bits(back[tensor.name], arrays[tensor.name])
    again = there_and_back(layout, arrays)
    assert all(same_bits(back[name], again[name]) for name in back)


@given(specs, compressions, st.integers(1, 5))
@settings(max_examples=40)
def test_a_file_has_the_size_that_the_layout_says(
    spec: ModelSpec, compression: Compression, chunks: int
) -> None:
    layout = cut(spec, compression, chunks=chunks)
    for chunk in layout.chunks:
        least, most = layout.file_bounds(chunk.index)
        assert least <= len(file_of(layout, chunk.index, finite_arrays(spec, 1))) <= most


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
    data = bytearray(file_of(layout, 0, finite_arrays(spec, 1)))
    place %= len(data)
    data[place : place + len(noise)] = noise
    try:
        values = decode_file(layout, 0, bytes(data))
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
    arrays = finite_arrays(spec, 1)
    sizes = {c.codec: len(file_of(cut(spec, c, chunks=1), 0, arrays)) for c in COMPRESSIONS}
    assert sizes["int8"] < 0.26 * sizes["none"]
    assert sizes["fp16"] < 0.51 * sizes["none"]
