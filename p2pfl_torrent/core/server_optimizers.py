"""Adaptive server optimizers: the aggregate is a step; its moments go on from round to round.

Reddi et al. 2021 (Adaptive Federated Optimization, algorithm 2), with the round-start weights x and
the weighted mean a of the updates:

    d = a - x;  m' = b1 m + (1 - b1) d;  x' = x + lr m' / (sqrt(v') + tau)
    Adagrad: v' = v + d^2      Adam: v' = b2 v + (1 - b2) d^2
    Yogi:    v' = v - (1 - b2) d^2 sign(v - d^2)

The change d is clipped to the square root of the moments' largest value, and v to that value: m and
v then stay of one size, and no later step leaves the algorithm's bounds after an absurd change.

The moments are part of the state that a round starts from: they lie in its checkpoint, its hash
covers them, and whoever takes a state over takes them too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from p2pfl_torrent.core.tensors import (
    Array,
    ModelSpec,
    TensorSpec,
    float64_to_bfloat16,
)
from p2pfl_torrent.core.tiles import TILE, floats

MOMENTS = (":m", ":v")  # what a moment's name has after its tensor's
LARGEST = 2.0**128 - 2.0**120  # of bfloat16; float32 reaches a little further
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ServerOptimizer:
    """One of the three, with its numbers; all are bounded by the configuration."""

    kind: Literal["fedadam", "fedyogi", "fedadagrad"]
    learning_rate: float
    beta1: float
    beta2: float
    tau: float

    def step(self, start: Vector, mean: Vector, m: Vector, v: Vector, largest: float) -> Vector:
        """The new weights; ``m`` and ``v`` are changed in place. Element-wise, one order.

        Args:
            largest: value that a moment may have.
        """
        bound = math.sqrt(largest)
        change = np.clip(mean - start, -bound, bound)
        square = np.minimum(change * change, largest)
        m *= self.beta1
        m += (1.0 - self.beta1) * change
        if self.kind == "fedadagrad":
            v += square
        elif self.kind == "fedadam":
            v *= self.beta2
            v += (1.0 - self.beta2) * square
        else:
            v -= (1.0 - self.beta2) * square * np.sign(v - square)
        np.minimum(v, largest, out=v)
        return start + self.learning_rate * m / (np.sqrt(v) + self.tau)


def state_spec(spec: ModelSpec) -> ModelSpec:
    """A model with its moments: after all its tensors ``name:m``, then ``name:v``, of the floats.

    float64 of an F64 tensor, float32 of any other.
    """
    moments = tuple(
        TensorSpec(tensor.name + suffix, _moment_dtype(tensor.dtype), tensor.shape)
        for suffix in MOMENTS
        for tensor in spec.tensors
        if tensor.is_float
    )
    return ModelSpec((*spec.tensors, *moments), spec.aliases)


def step_slice(
    optimizer: ServerOptimizer,
    dtype: str,
    start: Array,
    mean: Array,
    moments: tuple[Array, Array],
    out: Array,
) -> tuple[Array, Array]:
    """Write the new weights of a float slice to ``out``, which may be ``mean``; its new moments.

    Weights that leave their dtype's range become the largest it has.

    Args:
        start: the slice's round-start weights; ``moments`` those of the round's start, unchanged.
        mean: of ``dtype``, or float32, so that of half floats no small change is rounded away.
    """
    first, second = (np.array(moment, order="C") for moment in moments)
    begun, merged, flat = start.reshape(-1), mean.reshape(-1), out.reshape(-1)
    mean_dtype = "F32" if mean.dtype == np.float32 else dtype
    flat_m, flat_v = first.reshape(-1), second.reshape(-1)
    largest = _largest(_moment_dtype(dtype))
    for begin in range(0, flat.size, TILE):
        cut = slice(begin, begin + TILE)
        x = floats(dtype, begun[cut]).astype(np.float64)
        a = floats(mean_dtype, merged[cut]).astype(np.float64)
        m, v = flat_m[cut].astype(np.float64), flat_v[cut].astype(np.float64)
        with np.errstate(over="ignore"):
            stepped = optimizer.step(x, a, m, v, largest)
        flat_m[cut], flat_v[cut] = m, v
        stepped = np.clip(stepped, -_largest(dtype), _largest(dtype))
        flat[cut] = float64_to_bfloat16(stepped) if dtype == "BF16" else stepped
    return first, second


def _largest(dtype: str) -> float:
    return {"F64": float(np.finfo(np.float64).max), "F16": 65504.0}.get(dtype, LARGEST)


def _moment_dtype(dtype: str) -> str:
    return "F64" if dtype == "F64" else "F32"
