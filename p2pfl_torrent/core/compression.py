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

from p2pfl_torrent.core.errors import LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.tensors import (
    FLOAT_DTYPES,
    NUMPY_DTYPES,
    Array,
    bfloat16_to_float32,
    float32_to_bfloat16,
    float64_to_bfloat16,
)

Codec = Literal["none", "fp16", "bf16", "int8", "topk"]
Wide = npt.NDArray[np.floating]
"""Values as they are computed with: float64 of an F64 tensor, float32 of any other."""

STEPS = 127  # int8 is used symmetrically: -128 would have no counterpart
MAX_ZSTD_LEVEL = 19  # above, a frame may ask its reader for 128 MiB of window


@dataclass(frozen=True, slots=True)
class Compression:
    """What the genesis says about chunk files.

    Attributes:
        delta: floats are sent as the change since the update's base.
        topk_share: share of a slice's changes that ``topk`` sends.
        zstd_level: of the frame that a file is packed in; 0 for none.
    """

    codec: Codec = "none"
    delta: bool = False
    topk_share: float = 1.0
    zstd_level: int = 0

    @property
    def name(self) -> str:
        """As manifests and the genesis write it; ``none`` where files are plain."""
        parts = ["delta"] if self.delta and self.codec != "topk" else []
        if self.codec != "none":
            parts.append(f"topk:{float(self.topk_share)!r}" if self.codec == "topk" else self.codec)
        if self.zstd_level:
            parts.append(f"zstd:{self.zstd_level}")
        return "+".join(parts) or "none"

    @property
    def is_plain(self) -> bool:
        """Whether a file holds a chunk's values as they are."""
        return self.name == "none"

    @property
    def needs_base(self) -> bool:
        """Whether a file is of use only to who has the model that its update began from."""
        return self.delta or self.codec == "topk"

    @property
    def keeps_unsent(self) -> bool:
        """Whether an owner keeps what it did not send, and adds it to its next update."""
        return self.codec == "topk"


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
        codec: ``none`` where the values go in their own dtype: integers, truth values, and
            whatever the swarm's codec would not make smaller.
        delta: the change since the base is what goes.
        dtype, shape: of the slice.
    """

    codec: Codec
    delta: bool
    dtype: str
    shape: tuple[int, ...]
    fields: tuple[Field, ...]


def slice_form(compression: Compression, dtype: str, shape: tuple[int, ...]) -> SliceForm:
    """The form of a slice, the same on every peer."""
    plain = Field("", dtype, shape)
    if dtype not in FLOAT_DTYPES:
        return SliceForm("none", False, dtype, shape, (plain,))
    delta = compression.needs_base
    if compression.codec != "none":
        fields = _fields(compression, dtype, shape)
        if sum(field.nbytes for field in fields) < plain.nbytes:
            return SliceForm(compression.codec, delta, dtype, shape, fields)
    return SliceForm("none", delta, dtype, shape, (plain,))


def _fields(compression: Compression, dtype: str, shape: tuple[int, ...]) -> tuple[Field, ...]:
    if compression.codec == "int8":
        scale = "F64" if dtype == "F64" else "F32"
        return Field("", "I8", shape), Field(":scale", scale, (_rows(shape),))
    if compression.codec == "topk":
        size = math.prod(shape)
        sent = min(size, math.ceil(compression.topk_share * size))
        index = "I32" if size <= 1 << 31 else "I64"
        return Field(":index", index, (sent,)), Field(":value", dtype, (sent,))
    return (Field("", "F16" if compression.codec == "fp16" else "BF16", shape),)


def _rows(shape: tuple[int, ...]) -> int:
    """Rows with a scale of their own: those of a matrix; a vector is one row."""
    return shape[0] if len(shape) > 1 else 1


def encode_slice(
    form: SliceForm, values: Array, base: Array | None = None, unsent: Array | None = None
) -> list[Array] | None:
    """A slice's values as the arrays of its fields; None where the codec cannot hold them.

    It cannot hold what is, or would become, infinite or NaN. Rounds to nearest, ties to even.
    ``int8`` is off by half a scale at most, and the rounding of one float operation.

    Args:
        base: the slice in the update's base, for a form with ``delta``.
        unsent: what earlier updates of this owner left out, added to the change.
    """
    if form.codec == "none" and not form.delta:
        return [values]
    wide = to_send(form, values, base, unsent)
    if form.codec == "int8":
        return _to_int8(form, wide)
    if form.codec == "topk":
        return _to_topk(form, wide, _given(base))
    coded = narrow(form.fields[0].dtype, wide)
    if not np.isfinite(widen(form.fields[0].dtype, coded)).all():
        return None
    return [_in_range(form, coded, _given(base)) if form.delta else coded]


def to_send(form: SliceForm, values: Array, base: Array | None, unsent: Array | None) -> Wide:
    """What a form is to carry of a slice: its values, or their change and what was left out.

    What was left out is added as far as the sum stays in the dtype: a reader that got infinity
    would refuse the chunk, and leave an infinite rest to every update after it.
    """
    wide = widen(form.dtype, values)
    if form.delta:
        wide = wide - widen(form.dtype, _given(base))
    if unsent is None:
        return wide
    with np.errstate(over="ignore", invalid="ignore"):
        wide = wide + cast("Wide", unsent)
        start = widen(form.dtype, _given(base))
        aim, most = start + wide, _most(form.dtype)
        return np.where(np.abs(aim) > most, np.clip(aim, -most, most) - start, wide)


def still_unsent(
    form: SliceForm, values: Array, base: Array, unsent: Array | None, fields: Sequence[Array]
) -> Wide:
    """What readers of these fields do not get of ``to_send``: the error that is fed back.

    Measured at what they reconstruct, so that a change too small for the tensor's dtype is not
    lost either (error feedback: Seide et al. 2014, Stich et al. 2018).
    """
    got = widen(form.dtype, decode_slice(form, fields, base)) - widen(form.dtype, base)
    return np.asarray(to_send(form, values, base, unsent) - got)


def decode_slice(form: SliceForm, arrays: Sequence[Array], base: Array | None = None) -> Array:
    """The values of a slice in its own dtype.

    Args:
        base: the slice in the update's base, for a form with ``delta``.

    Raises:
        RemoteProtocolError: bad scales or indices; the reason says what, not in which chunk.
    """
    if form.codec == "none" and not form.delta:
        return arrays[0]
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later
        if form.codec == "int8":
            wide = _from_int8(form, arrays)
        elif form.codec == "topk":
            wide = _from_topk(form, arrays)
        else:
            wide = widen(form.fields[0].dtype, arrays[0])
            wide = wide.astype(np.float64 if form.dtype == "F64" else np.float32, copy=False)
        if form.delta:
            wide = widen(form.dtype, _given(base)) + wide
    return np.asarray(narrow(form.dtype, wide))


def _given(base: Array | None) -> Array:
    if base is None:
        raise LocalProtocolError("a change is of no use without its base")
    return base


def _most(dtype: str) -> float:
    """The largest finite value of a float dtype."""
    if dtype == "F64":
        return float(np.finfo(np.float64).max)
    return {"F32": 2.0**128 - 2.0**104, "F16": 65504.0, "BF16": 2.0**128 - 2.0**120}[dtype]


def _to_topk(form: SliceForm, wide: Wide, base: Array) -> list[Array] | None:
    """The largest changes, by increasing index (top-k: Aji & Heafield 2017)."""
    flat = wide.reshape(-1)
    index_field, value_field = form.fields
    (sent,) = index_field.shape
    left_out = flat.size - sent
    chosen = np.sort(np.argpartition(np.abs(flat), left_out)[left_out:])
    values = narrow(value_field.dtype, flat[chosen])
    if not np.isfinite(widen(value_field.dtype, values)).all():
        return None
    values = _in_range(form, values, base.reshape(-1)[chosen])
    return [chosen.astype(NUMPY_DTYPES[index_field.dtype]), values]


def _in_range(form: SliceForm, changes: Array, start: Array) -> Array:
    """Finite changes, each the next smaller one where rounding took its sum out of the dtype."""
    with np.errstate(over="ignore"):
        wide = widen(form.fields[-1].dtype, changes)
        got = widen(form.dtype, narrow(form.dtype, widen(form.dtype, start) + wide))
    beyond = ~np.isfinite(got)
    if not beyond.any():
        return changes
    smaller = changes.copy()
    bits = smaller.view(f"u{smaller.itemsize}")
    bits[beyond] -= 1  # the next towards zero, of either sign
    return smaller


def _from_topk(form: SliceForm, arrays: Sequence[Array]) -> Wide:
    index, values = cast("npt.NDArray[np.signedinteger]", arrays[0]), arrays[1]
    size = math.prod(form.shape)
    if index[0] < 0 or index[-1] >= size or not (index[1:] > index[:-1]).all():
        raise RemoteProtocolError("indices that are out of range, repeated or not in order")
    wide: Wide = np.zeros(size, np.float64 if form.dtype == "F64" else np.float32)
    wide[index] = widen(form.dtype, values)
    return cast("Wide", wide.reshape(form.shape))


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
    scale = np.minimum(scale, kind(_largest_scale(form)))
    divisor = np.where(scale > 0, scale, kind(1))[:, None]
    steps = np.rint(rows / divisor)
    np.clip(steps, -STEPS, STEPS, out=steps)
    return [steps.astype(np.int8).reshape(form.shape), scale]


def _largest_scale(form: SliceForm) -> float:
    """The largest scale of which 127 steps are finite: in the dtype, of a change as computed."""
    dtype = "F32" if form.delta and form.dtype != "F64" else form.dtype
    most = _most(dtype)
    if dtype == "F64":
        return most / STEPS if most / STEPS * STEPS <= most else math.nextafter(most / STEPS, 0.0)
    scale = np.float32(most / STEPS)
    return float(scale if float(scale) * STEPS <= most else np.nextafter(scale, np.float32(0)))


def _from_int8(form: SliceForm, arrays: Sequence[Array]) -> Wide:
    steps, scale = arrays[0], cast("Wide", arrays[1])
    if not (np.isfinite(scale) & (scale >= 0)).all():
        raise RemoteProtocolError("a scale that is negative, infinite or NaN")
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
