"""Partial FedAvg: the same bits in whatever order chunks arrive, and nobody can poison it."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl_torrent.core.aggregation import (
    MAX_WEIGHT,
    AggregateResult,
    aggregate,
    discount,
)
from p2pfl_torrent.core.averaging import average_slice
from p2pfl_torrent.core.chunking import (
    Layout,
    TensorSlice,
    decode_chunk,
    encode_chunk,
    plan,
    slice_of,
)
from p2pfl_torrent.core.errors import LocalProtocolError
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import (
    NUMPY_DTYPES,
    Array,
    ModelSpec,
    TensorSpec,
    bfloat16_to_float32,
)
from p2pfl_torrent.core.tiles import TILE
from tests.core.small_models import finite_arrays, same_bits, specs

Files = dict[tuple[UpdateId, int], bytes]


class Swarm:
    """Updates of some owners as chunk files, and which chunks of each have arrived."""

    def __init__(self, spec: ModelSpec, weights: Sequence[float], num_chunks: int = 4) -> None:
        self.spec = spec
        self.layout = plan(spec, num_chunks=num_chunks, block_size=64)
        self.start = finite_arrays(spec, 999)
        self.weights = weights
        self.updates = [finite_arrays(spec, seed) for seed in range(len(weights))]
        self.files: Files = {}
        self.sources: dict[int, list[tuple[PeerId, UpdateId, float]]] = {}

    def deliver(self, owner: int, chunk: int, data: bytes | None = None) -> None:
        update = UpdateId(bytes([owner]))
        encoded = encode_chunk(self.layout, chunk, self.updates[owner])
        self.files[update, chunk] = encoded if data is None else data
        listed = self.sources.setdefault(chunk, [])
        listed.append((PeerId(f"peer{owner:03}"), update, self.weights[owner]))
        listed.sort()

    def run(
        self, out: Mapping[str, Array] | None = None
    ) -> tuple[dict[str, Array], AggregateResult]:
        if out is None:
            out = {name: np.empty_like(array) for name, array in self.start.items()}
        written = []

        def keep(part: TensorSlice, rows: Array) -> None:
            written.append(part)
            slice_of(out[self.spec.tensors[part.tensor].name], part)[...] = rows

        result = aggregate(
            self.layout, self.sources, lambda u, c: self.files[u, c], self.start, keep
        )
        assert written == [part for chunk in self.layout.chunks for part in chunk.slices]
        return dict(out), result


def equal(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


weights_of = st.lists(
    st.floats(0.001, 2.0**40, allow_nan=False).map(lambda w: round(w, 6)), min_size=1, max_size=6
)


@given(specs, weights_of, st.randoms(use_true_random=False), st.data())
@settings(max_examples=60)
def test_the_order_of_arrival_changes_no_bit(
    spec: ModelSpec, weights: list[float], chance: object, data: st.DataObject
) -> None:
    first, second = Swarm(spec, weights), Swarm(spec, weights)
    pairs = st.tuples(
        st.integers(0, len(weights) - 1), st.integers(0, len(first.layout.chunks) - 1)
    )
    arrived = data.draw(st.lists(pairs, unique=True, max_size=20))
    for owner, chunk in arrived:
        first.deliver(owner, chunk)
    for owner, chunk in data.draw(st.permutations(arrived)):
        second.deliver(owner, chunk)
    one, result = first.run()
    assert equal(one, second.run()[0])
    delivered = {chunk for _, chunk in arrived}
    assert result == AggregateResult((), len(first.layout.chunks) - len(delivered))


@given(
    weights_of,
    st.sampled_from(["F64", "F32", "F16", "BF16"]),
    st.integers(0, 1000),
    st.sets(st.integers(0, 5)),
)
@settings(max_examples=60)
def test_each_chunk_is_renormalised_over_those_who_delivered_it(
    weights: list[float], dtype: str, seed: int, absent: set[int]
) -> None:
    swarm = Swarm(ModelSpec((TensorSpec("w", dtype, (5,)),)), weights, num_chunks=1)
    present = [i for i in range(len(weights)) if i not in absent]
    for owner in reversed(present):
        swarm.deliver(owner, 0)
    merged = _exact(dtype, swarm.run()[0]["w"])
    if not present:
        assert merged == _exact(dtype, swarm.start["w"])
        return
    values = [_exact(dtype, swarm.updates[i]["w"]) for i in present]
    total = sum(Fraction(weights[i]) for i in present)
    spacing = {"F64": 2.0**-49, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}[dtype]
    for k, got in enumerate(merged):
        want = (
            sum(Fraction(weights[i]) * v[k] for i, v in zip(present, values, strict=True)) / total
        )
        size = float(max(abs(v[k]) for v in values))  # terms may cancel: the error is of their size
        denormals = 2.0**-25 if dtype == "F16" else 0.0
        assert (
            abs(float(got - want))
            <= spacing * 1.001 * abs(float(want)) + size * 2.0**-49 + denormals
        )


def _exact(dtype: str, array: Array) -> list[Fraction]:
    floats = bfloat16_to_float32(array) if dtype == "BF16" else array  # type: ignore[arg-type]
    return [Fraction(float(value)) for value in floats]


@given(specs, st.floats(1e-3, MAX_WEIGHT))
def test_a_single_update_comes_back_bit_for_bit(spec: ModelSpec, weight: float) -> None:
    swarm = Swarm(spec, [weight])
    for chunk in swarm.layout.chunks:
        swarm.deliver(0, chunk.index)
    assert equal(swarm.run()[0], swarm.updates[0])


@pytest.mark.parametrize("dtype", sorted(NUMPY_DTYPES))
def test_integers_and_truth_values_take_the_maximum(dtype: str) -> None:
    values = [np.array([0, 1, 1], NUMPY_DTYPES[dtype]), np.array([0, 0, 1], NUMPY_DTYPES[dtype])]
    if dtype[0] in "IU":
        values[0][2] = 100
    out = np.empty(3, NUMPY_DTYPES[dtype])
    average_slice(dtype, [(1.0, values[0]), (9.0, values[1])], out)
    if TensorSpec("t", dtype, ()).is_float:
        assert out.tolist() != np.maximum(*values).tolist()
    else:
        assert out.tolist() == np.maximum(*values).tolist()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16"])
def test_the_extremes_of_a_dtype_average_to_themselves(dtype: str) -> None:
    carrier: np.dtype[Any] = NUMPY_DTYPES[dtype]
    info = np.finfo(carrier)
    values: npt.NDArray[Any] = np.array(
        [info.max, -info.max, info.smallest_subnormal, -info.smallest_subnormal, -0.0, info.tiny],
        carrier,
    )
    out = np.empty_like(values)
    for weights in ([1.0, 1.0], [3.0, 1e9, 7.0], [MAX_WEIGHT] * 5, [0.1] * 3):
        average_slice(dtype, [(weight, values) for weight in weights], out)
        if dtype == "F64":
            np.testing.assert_allclose(out, values, rtol=1e-15, atol=5e-324)
            assert np.isfinite(out).all()
        else:
            assert same_bits(out, values)


def test_denormals_are_averaged_and_not_flushed() -> None:
    tiny = float(np.finfo(np.float32).smallest_subnormal)
    a, b = np.array([tiny * 6], np.float32), np.array([tiny * 2], np.float32)
    out = np.empty(1, np.float32)
    average_slice("F32", [(1.0, a), (1.0, b)], out)
    assert float(out[0]) == tiny * 4


def test_opposite_extremes_with_large_weights_do_not_overflow() -> None:
    top = np.finfo(np.float64).max
    a, b = np.array([top, top]), np.array([-top, top / 2])
    out = np.empty(2)
    average_slice("F64", [(2.0**50, a), (2.0**50, b)], out)
    np.testing.assert_allclose(out, [0.0, top * 0.75], rtol=1e-15)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
def test_a_tensor_of_several_tiles_is_averaged_like_one(dtype: str) -> None:
    rng = np.random.default_rng(1)
    size = TILE * 2 + 17
    if dtype == "BF16":
        columns: list[Array] = [rng.integers(0, 0x7F7F, size).astype(np.uint16) for _ in range(3)]
    else:
        columns = [rng.standard_normal(size).astype(NUMPY_DTYPES[dtype]) for _ in range(3)]
    whole, pieces = np.empty(size, NUMPY_DTYPES[dtype]), np.empty(size, NUMPY_DTYPES[dtype])
    average_slice(dtype, list(zip((1.0, 2.5, 7.0), columns, strict=True)), whole)
    for at in range(0, size, 100_003):
        cut = slice(at, at + 100_003)
        parts = [(w, c[cut]) for w, c in zip((1.0, 2.5, 7.0), columns, strict=True)]
        average_slice(dtype, parts, pieces[cut])
    assert same_bits(whole, pieces)


MIXED = ModelSpec(
    (
        TensorSpec("f", "F32", (6, 2)),
        TensorSpec("h", "BF16", (6,)),
        TensorSpec("b", "BOOL", (5,)),
        TensorSpec("n", "I64", ()),
    )
)


def _poisoned(layout: Layout, chunk: int, arrays: dict[str, Array], name: str) -> bytes:
    data = bytearray(encode_chunk(layout, chunk, arrays))
    decoded = decode_chunk(layout, chunk, memoryview(data))
    for part, array in zip(layout.chunks[chunk].slices, decoded, strict=True):
        if layout.spec.tensors[part.tensor].name == name:
            place = array.ctypes.data - np.frombuffer(data, np.uint8).ctypes.data
            evil = {"f": np.float32(np.nan).tobytes(), "h": b"\x80\x7f", "b": b"\x02"}[name]
            data[place : place + len(evil)] = evil
    return bytes(data)


@pytest.mark.parametrize("name", ["f", "h", "b"])
def test_what_cannot_be_averaged_is_left_out_and_its_owner_named(name: str) -> None:
    clean, swarm = Swarm(MIXED, [1.0, 2.0, 3.0], 1), Swarm(MIXED, [1.0, 2.0, 3.0], 1)
    for owner in (0, 2):
        clean.deliver(owner, 0)
        swarm.deliver(owner, 0)
    swarm.deliver(1, 0, _poisoned(swarm.layout, 0, swarm.updates[1], name))
    merged, result = swarm.run()
    assert equal(merged, clean.run()[0])
    assert [(refused.owner, refused.chunk) for refused in result.refused] == [("peer001", 0)]
    assert repr(name) in result.refused[0].reason


def test_a_file_that_is_no_chunk_is_left_out_and_the_start_value_stays() -> None:
    swarm = Swarm(MIXED, [1.0], 1)
    swarm.deliver(0, 0, b"no chunk at all")
    merged, result = swarm.run()
    assert equal(merged, swarm.start)
    assert result.untouched == 1
    assert [refused.owner for refused in result.refused] == ["peer000"]


@given(specs, st.data())
@settings(max_examples=30)
def test_the_aggregate_may_be_written_over_the_start(spec: ModelSpec, data: st.DataObject) -> None:
    swarm = Swarm(spec, [1.0, 3.0])
    for chunk in swarm.layout.chunks:
        for owner in data.draw(st.sets(st.integers(0, 1))):
            swarm.deliver(owner, chunk.index)
    apart = swarm.run()[0]
    assert equal(swarm.run(swarm.start)[0], apart)


def test_owners_out_of_order_or_weights_that_are_none_are_our_own_fault() -> None:
    swarm = Swarm(MIXED, [1.0, 1.0], 1)
    swarm.deliver(0, 0)
    swarm.deliver(1, 0)
    swarm.sources[0].reverse()
    with pytest.raises(LocalProtocolError, match="order"):
        swarm.run()
    for weight in (0.0, -1.0, math.nan, math.inf):
        other = Swarm(MIXED, [weight], 1)
        other.deliver(0, 0)
        with pytest.raises(LocalProtocolError, match="weights"):
            other.run()


def test_the_discount_is_the_polynomial_one() -> None:
    assert [discount(s) for s in (0, 3, 8)] == [1.0, 0.5, 1 / 3]
    assert discount(1) == 1 / math.sqrt(2)


def test_a_merge_holds_a_chunk_and_not_a_model() -> None:
    spec = ModelSpec((TensorSpec("w", "F32", (1 << 12, 1 << 10)),))  # 16 MiB
    swarm = Swarm(spec, [1.0, 2.0, 3.0], num_chunks=32)
    for chunk in swarm.layout.chunks:
        for owner in range(3):
            swarm.deliver(owner, chunk.index)
    tracemalloc.start()
    try:
        aggregate(
            swarm.layout,
            swarm.sources,
            lambda u, c: swarm.files[u, c],
            swarm.start,
            lambda part, rows: None,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * TILE * 8 + spec.nbytes // 8


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_infinities_of_both_signs_are_found_in_their_sum(dtype: str) -> None:
    swarm = Swarm(ModelSpec((TensorSpec("w", dtype, (5,)),)), [1.0, 1.0, 1.0], 1)
    infinity = 0x7F80 if dtype == "BF16" else np.inf
    swarm.updates[0]["w"][3] = infinity
    swarm.updates[1]["w"][3] = infinity | 0x8000 if isinstance(infinity, int) else -infinity
    for owner in range(3):
        swarm.deliver(owner, 0)
    merged, result = swarm.run()
    assert [refused.owner for refused in result.refused] == ["peer000", "peer001"]
    assert same_bits(merged["w"], swarm.updates[2]["w"])


def test_a_single_version_that_is_not_finite_leaves_the_start_value() -> None:
    swarm = Swarm(ModelSpec((TensorSpec("w", "F32", (5,)),)), [1.0], 1)
    swarm.updates[0]["w"][0] = np.nan
    swarm.deliver(0, 0)
    merged, result = swarm.run()
    assert (len(result.refused), result.untouched) == (1, 1)
    assert equal(merged, swarm.start)
