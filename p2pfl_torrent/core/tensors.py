"""What a model is to the core: named tensors with a dtype and a shape, and their bytes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from p2pfl_torrent.core.errors import ConfigError

Array = npt.NDArray[np.generic]
Arrays = Mapping[str, Array]
"""Tensor name -> C-contiguous array of the spec's shape; BF16 travels as its 16 raw bits."""

NUMPY_DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has no bfloat16
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""safetensors' dtype names and the numpy dtype that carries each."""

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})

MAX_TENSORS = 1 << 16  # a 100-layer transformer has some 1,600
MAX_DIMENSIONS = 16
MAX_NAME = 256


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """Name, safetensors dtype name and shape of one exchanged tensor."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
    dtype: str
    shape: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]

    @property
    def size(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return NUMPY_DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.size * self.itemsize

    @property
    def is_float(self) -> bool:
        """Whether the tensor is averaged; the others take the elementwise maximum."""
        return self.dtype in FLOAT_DTYPES


class ModelSpec(msgspec.Struct, frozen=True, array_like=True):
    """The exchanged part of a model: part of the genesis, the same on every peer.

    Attributes:
        tensors: in exchange order; a tied weight appears once.
        aliases: (other name, canonical name) of each tied weight.
    """

    tensors: Annotated[tuple[TensorSpec, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    aliases: Annotated[tuple[tuple[str, str], ...], msgspec.Meta(max_length=MAX_TENSORS)] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all exchanged tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def fingerprint(self) -> str:
        """Hex SHA-256 over names, dtypes, shapes and aliases."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    def validate(self) -> None:
        """Check a spec, raising ConfigError with the offending tensor's name."""
        if not self.tensors:
            raise ConfigError("The model has no tensor to exchange: check include and exclude.")
        if len(self.tensors) > MAX_TENSORS:
            raise ConfigError(f"The model has more than {MAX_TENSORS} tensors: exclude some.")
        seen: set[str] = set()
        for tensor in self.tensors:
            if tensor.name in seen:
                raise ConfigError(f"Tensor {tensor.name!r} appears twice in the model.")
            if not 1 <= len(tensor.name) <= MAX_NAME or not _is_text(tensor.name):
                raise ConfigError(
                    f"Tensor {tensor.name!r} needs a name of 1 to {MAX_NAME} Unicode characters."
                )
            if tensor.name == "__metadata__":
                raise ConfigError("A safetensors file reserves the name '__metadata__': rename it.")
            if len(tensor.shape) > MAX_DIMENSIONS:
                raise ConfigError(f"Tensor {tensor.name!r} has more than {MAX_DIMENSIONS} sides.")
            if tensor.dtype not in NUMPY_DTYPES:
                raise ConfigError(
                    f"Tensor {tensor.name!r} has dtype {tensor.dtype}, which cannot be exchanged: "
                    f"exclude it or use one of {', '.join(NUMPY_DTYPES)}."
                )
            if any(side < 0 for side in tensor.shape):
                raise ConfigError(f"Tensor {tensor.name!r} has a negative side.")
            seen.add(tensor.name)


def _is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8: Python's strings may hold halves of surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_arrays(spec: ModelSpec, arrays: Arrays) -> None:
    """Raise ConfigError, naming the tensor, unless the arrays are exactly those of the spec."""
    for tensor in spec.tensors:
        array = arrays.get(tensor.name)
        if array is None:
            raise ConfigError(f"Tensor {tensor.name!r} is missing.")
        if array.shape != tensor.shape or array.dtype != NUMPY_DTYPES[tensor.dtype]:
            raise ConfigError(
                f"Tensor {tensor.name!r} is {array.dtype}{list(array.shape)}, "
                f"expected {tensor.dtype}{list(tensor.shape)}."
            )
    unknown = arrays.keys() - {tensor.name for tensor in spec.tensors}
    if unknown:
        raise ConfigError(f"Tensor {min(unknown)!r} is not part of the model.")


def array_bytes(array: Array) -> bytes | memoryview:
    """The raw bytes of an array in C order, without a copy where it is contiguous."""
    if not array.size:
        return b""
    flat = np.ascontiguousarray(array).reshape(-1)
    return memoryview(flat.view(np.uint8))  # type: ignore[arg-type]  # numpy arrays are buffers


def model_hash(spec: ModelSpec, arrays: Arrays) -> bytes:
    """SHA-256 over the spec's fingerprint and every tensor's bytes in exchange order (32 bytes)."""
    hasher = ModelHasher(spec)
    for tensor in spec.tensors:
        hasher.add(arrays[tensor.name])
    return hasher.digest()


class ModelHasher:
    """``model_hash`` of values that come piece by piece: rows of tensors, in exchange order."""

    def __init__(self, spec: ModelSpec) -> None:
        self._sha256 = hashlib.sha256(spec.fingerprint().encode())

    def add(self, rows: Array) -> None:
        """The next values."""
        self._sha256.update(array_bytes(rows))

    def digest(self) -> bytes:
        """The hash, once all were added."""
        return self._sha256.digest()


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Exact: a bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even; NaN stays NaN."""
    # not ascontiguousarray, which makes a 0-d array 1-d
    bits = np.asarray(values, dtype=np.float32, order="C").view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = np.where(np.isnan(values), (bits >> np.uint32(16)) | np.uint32(0x40), rounded)
    return quiet.astype(np.uint16)


def float64_to_bfloat16(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even, at once; NaN stays NaN.

    By way of float32 a value just beside a tie would first be rounded onto it, and then the wrong
    way. So the step to float32 rounds to odd (Boldo & Melquiond 2008), which keeps it off the tie.
    """
    with np.errstate(over="ignore"):
        nearest = np.asarray(values, dtype=np.float64).astype(np.float32)
    back = nearest.astype(np.float64)
    bits = nearest.view(np.uint32)
    bits = bits - (np.abs(back) > np.abs(values))  # now the float32 next towards zero
    odd = np.where(back != values, bits | np.uint32(1), bits).astype(np.uint32)
    exact = np.where(np.isfinite(values), odd, nearest.view(np.uint32))
    return float32_to_bfloat16(exact.view(np.float32))
