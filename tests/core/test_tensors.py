"""Specs that are refused, hashes that notice every bit, and rounding to bfloat16."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.tensors import (
    MAX_DIMENSIONS,
    Array,
    ModelSpec,
    TensorSpec,
    array_bytes,
    bfloat16_to_float32,
    check_arrays,
    float32_to_bfloat16,
    float64_to_bfloat16,
    model_hash,
)
from tests.core.small_models import finite_arrays, specs

F32 = TensorSpec("a", "F32", (2, 3))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ((), "no tensor"),
        ((F32, F32), "'a' appears twice"),
        ((TensorSpec("c", "C64", ()),), "'c' has dtype C64"),
        ((TensorSpec("n", "F32", (-1,)),), "'n' has a negative side"),
        ((TensorSpec("__metadata__", "F32", ()),), "__metadata__"),
        ((TensorSpec("", "F32", ()),), "1 to 256"),
        ((TensorSpec("x" * 257, "F32", ()),), "1 to 256"),
        ((TensorSpec("\ud800", "F32", ()),), "1 to 256"),
        ((TensorSpec("d", "F32", (1,) * (MAX_DIMENSIONS + 1)),), "sides"),
    ],
)
def test_a_spec_that_cannot_be_exchanged_names_the_tensor(
    tensors: tuple[TensorSpec, ...], says: str
) -> None:
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        ModelSpec(tensors).validate()


@given(specs, st.integers(0, 3))
def test_arrays_of_a_spec_pass_and_are_hashed_whole(spec: ModelSpec, seed: int) -> None:
    spec.validate()
    arrays = finite_arrays(spec, seed)
    check_arrays(spec, arrays)
    assert sum(len(array_bytes(array)) for array in arrays.values()) == spec.nbytes
    before = model_hash(spec, arrays)
    assert before == model_hash(spec, {name: array.copy() for name, array in arrays.items()})
    for tensor in spec.tensors:
        if tensor.size:
            flipped = bytearray(arrays[tensor.name].tobytes())
            flipped[-1] ^= 1
            changed = np.frombuffer(flipped, arrays[tensor.name].dtype).reshape(tensor.shape)
            assert model_hash(spec, {**arrays, tensor.name: changed}) != before


def test_arrays_that_are_not_the_specs_are_named() -> None:
    spec = ModelSpec((F32,))
    good = np.zeros((2, 3), np.float32)
    cases: list[tuple[dict[str, Array], str]] = [
        ({}, "'a' is missing"),
        ({"a": good.astype(np.float64)}, "'a' is float64"),
        ({"a": good.T}, "expected F32"),
        ({"a": good, "b": good}, "'b' is not part"),
    ]
    for arrays, says in cases:
        with pytest.raises(ConfigError, match=says):
            check_arrays(spec, arrays)


def test_a_transposed_array_hashes_by_its_values() -> None:
    spec = ModelSpec((F32,))
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert model_hash(spec, {"a": np.asfortranarray(values)}) == model_hash(spec, {"a": values})


def _value(bits: int) -> Fraction:
    (value,) = struct.unpack("!f", struct.pack("!I", bits << 16))
    return Fraction(value)


def _nearest_bfloat16(value: float) -> int:
    """By exact arithmetic; the even one of a tie, infinity from half a step past the largest."""
    sign = 0x8000 if math.copysign(1, value) < 0 else 0
    magnitude = abs(Fraction(value))
    low, high = 0, 0x7F7F
    while low < high:  # the largest bfloat16 not above the value
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _value(middle) <= magnitude else (low, middle - 1)
    above = _value(low + 1) if low < 0x7F7F else _value(low) * 2 - _value(low - 1)
    to_low, to_high = magnitude - _value(low), above - magnitude
    up = to_high < to_low or (to_high == to_low and low & 1)
    return sign | (low + bool(up))


near_ties = st.builds(
    lambda bits, nudge: math.copysign(
        float(_value(bits) + _value(bits + 1)) / 2 * (1 + nudge * 2.0**-52), 1 - (nudge & 2)
    ),
    st.integers(0, 0x7F7E),
    st.integers(-3, 3),
)


@given(st.one_of(near_ties, st.floats(allow_nan=False, allow_infinity=False)))
def test_a_double_rounds_to_the_nearest_bfloat16_at_once(value: float) -> None:
    assert int(float64_to_bfloat16(np.array(value))) == _nearest_bfloat16(value)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_float_rounds_to_the_nearest_bfloat16(value: float) -> None:
    assert int(float32_to_bfloat16(np.array(value, np.float32))) == _nearest_bfloat16(value)


def test_every_bfloat16_survives_the_way_through_wider_floats() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = bfloat16_to_float32(bits)
    numbers = ~np.isnan(wide)
    assert np.array_equal(float32_to_bfloat16(wide)[numbers], bits[numbers])
    assert np.array_equal(float64_to_bfloat16(wide[numbers].astype(np.float64)), bits[numbers])
    assert np.isnan(bfloat16_to_float32(float32_to_bfloat16(wide)))[~numbers].all()
    assert np.isnan(bfloat16_to_float32(float64_to_bfloat16(np.array([np.nan])))).all()
