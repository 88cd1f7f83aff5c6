"""Small models for tests: random specs, and arrays of every bit pattern that a spec allows."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from p2pfl_torrent.core.tensors import NUMPY_DTYPES, Array, ModelSpec, TensorSpec

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__" and "[" not in name
)

tensors = st.builds(
    TensorSpec,
    name=names,
    dtype=st.sampled_from(sorted(NUMPY_DTYPES)),
    shape=st.lists(st.integers(0, 7), max_size=4).map(tuple),
)

specs = st.lists(tensors, min_size=1, max_size=8, unique_by=lambda tensor: tensor.name).map(
    lambda found: ModelSpec(tuple(found))
)


def finite_arrays(spec: ModelSpec, seed: int) -> dict[str, Array]:
    """Finite values for every tensor of a spec, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return {tensor.name: _values(tensor, rng) for tensor in spec.tensors}


def _values(tensor: TensorSpec, rng: np.random.Generator) -> Array:
    dtype: np.dtype[Any] = NUMPY_DTYPES[tensor.dtype]
    if tensor.dtype == "BF16":
        bits = rng.standard_normal(tensor.shape).astype(np.float32).reshape(-1).view(np.uint32)
        return (bits >> np.uint32(16)).astype(np.uint16).reshape(tensor.shape)
    if tensor.is_float:
        return np.asarray(rng.standard_normal(tensor.shape), dtype=dtype)
    if tensor.dtype == "BOOL":
        return np.asarray(rng.integers(0, 2, tensor.shape), dtype=dtype)
    info = np.iinfo(dtype)
    return np.asarray(rng.integers(info.min, info.max, tensor.shape, dtype, endpoint=True))


def same_bits(a: Array, b: Array) -> bool:
    """Equal dtype, shape and bytes."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
