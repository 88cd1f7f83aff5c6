"""One's own progress on an aggregate that came late."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl_torrent.core.overlap import carry_over
from p2pfl_torrent.core.tensors import (
    NUMPY_DTYPES,
    Array,
    ModelSpec,
    TensorSpec,
    bfloat16_to_float32,
    float32_to_bfloat16,
)

small = st.integers(-1000, 1000)


def one(dtype: str, *values: float) -> Array:
    if dtype == "BF16":
        return float32_to_bfloat16(np.array(values, np.float32))
    return np.array(values, NUMPY_DTYPES[dtype])


def carried(
    dtype: str, a: Array, x: Array, y: Array, parameters: tuple[str, ...] = ("w",)
) -> Array:
    spec = ModelSpec((TensorSpec("w", dtype, a.shape),))
    return carry_over(spec, {"w": a}, {"w": x}, {"w": y}, parameters)["w"]


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_progress_is_added_to_the_aggregate_in_every_float_type(dtype: str) -> None:
    found = carried(dtype, one(dtype, 4.0, -1.0), one(dtype, 1.0, 8.0), one(dtype, 1.5, 6.0))
    assert found.dtype == NUMPY_DTYPES[dtype]
    values = bfloat16_to_float32(found) if dtype == "BF16" else found  # type: ignore[arg-type]
    assert values.tolist() == [4.5, -3.0]


@given(a=small, x=small, y=small)
def test_who_stood_where_the_swarm_is_keeps_its_weights_and_who_stood_still_takes_the_swarms(
    a: int, x: int, y: int
) -> None:
    a_, x_, y_ = (np.array([value / 7], np.float32) for value in (a, x, y))
    assert carried("F32", x_, x_, y_) == y_
    assert carried("F32", a_, x_, x_) == a_


def test_the_sum_is_rounded_once() -> None:
    far = one("F32", 2.0**24)
    # y - x is 2**24 - 0.25, which float32 cannot hold: the sum with -2**24 is exact all the same.
    assert carried("F32", one("F32", -(2.0**24)), one("F32", 0.25), far).tolist() == [-0.25]


@pytest.mark.parametrize(("dtype", "parameters"), [("F32", ()), ("I64", ("w",)), ("BOOL", ("w",))])
def test_buffers_and_integers_are_as_trained(dtype: str, parameters: tuple[str, ...]) -> None:
    y = one(dtype, 1, 0)
    found = carried(dtype, one(dtype, 0, 0), one(dtype, 1, 1), y, parameters)
    assert found.tolist() == y.tolist()
    assert not np.shares_memory(found, y)


def test_scalars_and_tensors_of_several_tiles_keep_their_shapes() -> None:
    rng = np.random.default_rng(0)
    for shape in ((), (0, 3), (3, 1 << 17)):
        a, x, y = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
        found = carried("F32", np.asarray(a), np.asarray(x), np.asarray(y))
        assert found.shape == shape
        assert np.allclose(found, a + (y - x), atol=1e-5)


def test_what_is_too_large_for_its_type_is_infinite_and_not_wrapped() -> None:
    big = one("F16", 6e4)
    assert np.isinf(carried("F16", big, one("F16", 0.0), big)).all()
