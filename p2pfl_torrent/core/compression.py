"""How chunk files are made smaller: what a swarm agreed on, and the form that gives each slice.

Everything here is element-wise arithmetic of IEEE 754 in a fixed order, so whoever decodes a file
gets the same bits. docs/specs/compression.md is the wire form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.tensors import (
    FLOAT_DTYPES,
    NUMPY_DTYPES,
    Array,
    bfloat16_to_float32,
    float32_to_bfloat16,
    float64_to_bfloat16,
)

Codec = Literal["none", "fp16", "bf16", "int8"]
Wide = npt.NDArray[np.floating]
"""Values as they are computed with: float64 of an F64 tensor, float32 of any other."""

STEPS = 127  # int8 is used symmetrically: -128 would have no counterpart
SCALE = ":scale"


@dataclass(frozen=True, slots=True)
class Compression:
    """What the genesis says about chunk files."""

    codec: Codec = "none"

    @property
    def name(self) -> str:
        """As manifests and the genesis write it; ``none`` where files are plain."""
        return self.codec

    @property
    def is_plain(self) -> bool:
        """Whether a file holds a chunk's values as they are."""
        return self == PLAIN


PLAIN = Compression()


class Field(NamedTuple):
    """One tensor of a chunk's file: what its name has after the slice's, dtype and shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class SliceForm:
    """How one slice lies in a file.

    Attributes:
        codec: ``none`` where the slice goes as it is: integers, truth values, and whatever the
            swarm's codec would not make smaller.
        dtype, shape: of the slice.
    """

    codec: Codec
    dtype: str
    shape: tuple[int, ...]
    fields: tuple[Field, ...]


def slice_form(compression: Compression, dtype: str, shape: tuple[int, ...]) -> SliceForm:
    """The form of a slice, the same on every peer."""
    plain = Field("", dtype, shape)
    if dtype in FLOAT_DTYPES and compression.codec != "none":
        fields = _fields(compression.codec, dtype, shape)
        if sum(field.nbytes for field in fields) < plain.nbytes:
            return SliceForm(compression.codec, dtype, shape, fields)
    return SliceForm("none", dtype, shape, (plain,))


def _fields(codec: Codec, dtype: str, shape: tuple[int, ...]) -> tuple[Field, ...]:
    if codec == "int8":
        scale = "F64" if dtype == "F64" else "F32"
        return Field("", "I8", shape), Field(SCALE, scale, (_rows(shape),))
    return (Field("", "F16" if codec == "fp16" else "BF16", shape),)


def _rows(shape: tuple[int, ...]) -> int:
    """Rows with a scale of their own: those of a matrix; a vector is one row."""
    return shape[0] if len(shape) > 1 else 1


def encode_slice(form: SliceForm, values: Array) -> list[Array] | None:
    """A slice's values as the arrays of its fields; None where the codec cannot hold them.

    It cannot hold what is, or would become, infinite or NaN. Rounds to nearest, ties to even.
    ``int8`` is off by half a scale at most, and the rounding of one float operation.
    """
    if form.codec == "none":
        return [values]
    wide = widen(form.dtype, values)
    if form.codec == "int8":
        return _to_int8(form, wide)
    coded = narrow(form.fields[0].dtype, wide)
    return [np.asarray(coded)] if np.isfinite(widen(form.fields[0].dtype, coded)).all() else None


def decode_slice(form: SliceForm, arrays: Sequence[Array]) -> Array:
    """The values of a slice in its own dtype.

    Raises:
        RemoteProtocolError: a scale is negative, infinite or NaN; what it did, without the chunk.
    """
    if form.codec == "none":
        return arrays[0]
    if form.codec == "int8":
        return np.asarray(narrow(form.dtype, _from_int8(form, arrays)))
    return np.asarray(narrow(form.dtype, widen(form.fields[0].dtype, arrays[0])))


def _to_int8(form: SliceForm, wide: Wide) -> list[Array] | None:
    """Symmetric, a scale per row: the largest magnitude is 127 steps."""
    rows = wide.reshape(_rows(form.shape), -1)
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    if not np.isfinite(largest).all():
        return None
    kind = wide.dtype.type
    with np.errstate(under="ignore", over="ignore"):
        scale = largest / kind(STEPS)
        # Never rounded down: the largest would need more than 127 steps, a subnormal many more.
        short = scale * kind(STEPS) < largest
    scale = np.where(short, np.nextafter(scale, kind(np.inf)), scale)
    # 127 steps of it must not leave the type's range again.
    scale = np.minimum(scale, kind(_largest_scale(form.dtype)))
    divisor = np.where(scale > 0, scale, kind(1))[:, None]
    steps = np.rint(rows / divisor)
    np.clip(steps, -STEPS, STEPS, out=steps)
    return [steps.astype(np.int8).reshape(form.shape), scale]


def _largest_scale(dtype: str) -> float:
    """The largest scale of which 127 steps are finite in a dtype."""
    if dtype == "F64":
        most = float(np.finfo(np.float64).max)
        return most / STEPS if most / STEPS * STEPS <= most else math.nextafter(most / STEPS, 0.0)
    most = {"F32": 2.0**128 - 2.0**104, "F16": 65504.0, "BF16": 2.0**128 - 2.0**120}[dtype]
    scale = np.float32(most / STEPS)
    return float(scale if float(scale) * STEPS <= most else np.nextafter(scale, np.float32(0)))


def _from_int8(form: SliceForm, arrays: Sequence[Array]) -> Wide:
    steps, scale = arrays[0], cast("Wide", arrays[1])
    if not (np.isfinite(scale) & (scale >= 0)).all():
        raise RemoteProtocolError("a scale that is negative, infinite or NaN")
    with np.errstate(over="ignore"):  # what becomes infinite is refused with its owner named
        wide = steps.reshape(scale.size, -1).astype(scale.dtype)
        np.multiply(wide, scale[:, None], out=wide)
    return wide.reshape(form.shape)


def widen(dtype: str, values: Array) -> Wide:
    """Exact: float64 of F64, else float32; a copy unless the dtype is one of these."""
    if dtype == "BF16":
        return bfloat16_to_float32(cast("npt.NDArray[np.uint16]", values))
    return values.astype(np.float64 if dtype == "F64" else np.float32, copy=False)


def narrow(dtype: str, wide: Wide) -> Array:
    """Rounded once to a float dtype, to nearest, ties to even; infinite where it is too large."""
    if dtype == "BF16":
        if wide.dtype == np.float64:
            return float64_to_bfloat16(cast("npt.NDArray[np.float64]", wide))
        return float32_to_bfloat16(cast("npt.NDArray[np.float32]", wide))
    with np.errstate(over="ignore"):
        return wide.astype(NUMPY_DTYPES[dtype], copy=False)
