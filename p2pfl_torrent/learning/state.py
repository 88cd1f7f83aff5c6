"""A torch module as named numpy arrays, and back in place.

Integer and bool buffers are part of the exchange, and so are 0-d tensors. What a module's
``get_extra_state`` puts into the state_dict, tensor or not, stays at home. Names are those of the
state_dict without the wrappers of ``torch.compile`` and ``nn.DataParallel``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import nn, optim

from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.tensors import (
    MAX_DIMENSIONS,
    Array,
    Arrays,
    ModelSpec,
    TensorSpec,
    check_arrays,
)
from p2pfl_torrent.learning.norms import NormPolicy, names_kept_home
from p2pfl_torrent.learning.wrappers import unwrapping

Module = nn.Module
"""A model, named here so that the rooms above need not import torch."""

Optimizer = optim.Optimizer
"""An optimizer, likewise."""

DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""torch dtype -> safetensors dtype name."""

LOADED_AT_A_TIME = 4 << 20  # bytes of a tensor: what a copy of read-only rows takes

EXTRA_STATE = "_extra_state"
"""Last part of the name under which torch files what a module's ``get_extra_state`` returns."""


def describe(
    model: nn.Module,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    norm_policy: NormPolicy = "average",
) -> ModelSpec:
    """What of a model is exchanged, in state_dict order.

    Tensors that share storage, offset, shape and strides are tied: they are exchanged once, under
    their first name. A tied weight is in if any of its names is included, and out if any is
    excluded or kept home: what a user withholds must not leave under another name.

    Args:
        include: globs on state_dict names.
        exclude: globs that take out again.
        norm_policy: see `NormPolicy`.

    Raises:
        ConfigError: nothing is left to exchange, a glob matches no name, or a tensor cannot be
            exchanged (its dtype, layout or device, or the state_dict holds a copy of it).
    """
    state = _state(model)
    for pattern in (*include, *exclude):
        if state and not any(fnmatchcase(name, pattern) for name in state):
            raise ConfigError(f"{pattern!r} matches no tensor{_close(pattern, state)}.")
    unwrapped = unwrapping(model)
    withheld = {unwrapped(name) for name in names_kept_home(model, norm_policy)}
    withheld |= {name for name in state if _matches(name, exclude)}
    owned = _memory(model)
    tensors = []
    aliases = []
    for first, *others in _tied(state):
        names = (first, *others)
        if withheld.intersection(names) or not any(_matches(name, include) for name in names):
            continue
        tensors.append(_spec(first, state[first], owned))
        aliases += [(other, first) for other in others]
    spec = ModelSpec(tuple(tensors), tuple(aliases))
    spec.validate()
    return spec


def parameter_names(model: nn.Module) -> frozenset[str]:
    """The state_dict names, also the tied ones, of what training moves: all but buffers."""
    unwrapped = unwrapping(model)
    return frozenset(unwrapped(name) for name, _ in model.named_parameters(remove_duplicate=False))


def explain_mismatch(model: nn.Module, spec: ModelSpec) -> str | None:
    """The first tensor in which a model differs from a spec, as one sentence; None if it fits.

    Tensors of the model that the spec does not name are not a difference: they stay at home.
    """
    state = _state(model)
    for expected in spec.tensors:
        tensor = state.get(expected.name)
        if tensor is None:
            hint = _close(expected.name, state)
            return f"Tensor {expected.name!r} is not in this model{hint}."
        wanted = f"{expected.dtype}{list(expected.shape)}"
        if _unsupported(tensor) is not None:
            return f"Tensor {expected.name!r} must be {wanted}, but it {_unsupported(tensor)}."
        found = f"{DTYPES[tensor.dtype]}{list(tensor.shape)}"
        if found != wanted:
            return f"Tensor {expected.name!r} is {found} in this model, the swarm has {wanted}."
    return _explain_ties(state, spec)


def to_arrays(model: nn.Module, spec: ModelSpec) -> dict[str, Array]:
    """The model's tensors as C-contiguous arrays.

    Contiguous CPU tensors are not copied: their arrays alias the model, change with it, and must
    not be written. Others are copied. `snapshot` gives arrays that stay as they are.

    Raises:
        ConfigError: the model does not fit the spec.
    """
    state = _fitting(model, spec)
    return {tensor.name: _to_array(_on_cpu(state[tensor.name])) for tensor in spec.tensors}


def snapshot(model: nn.Module, spec: ModelSpec) -> dict[str, Array]:
    """The model's tensors as arrays of their own.

    Raises:
        ConfigError: the model does not fit the spec.
    """
    state = _fitting(model, spec)
    arrays = {}
    for tensor in spec.tensors:
        source = state[tensor.name]
        found = _on_cpu(source)
        aliasing = found.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        arrays[tensor.name] = _to_array(found.clone() if aliasing else found)
    return arrays


@torch.no_grad()
def load_arrays(model: nn.Module, spec: ModelSpec, arrays: Arrays) -> None:
    """Write arrays into the model in place: tied weights stay tied, parameters keep identity.

    All names, dtypes and shapes are checked before the first write.

    Raises:
        ConfigError: the model or the arrays do not fit the spec.
    """
    state = _fitting(model, spec)
    check_arrays(spec, arrays)
    for expected in spec.tensors:
        array, target = arrays[expected.name], state[expected.name]
        if array.ndim == 0:
            target.copy_(_to_tensor(array))
            continue
        row_bytes = max(1, expected.nbytes // max(1, len(array)))
        step = max(1, LOADED_AT_A_TIME // row_bytes)
        for begin in range(0, len(array), step):
            rows = slice(begin, begin + step)
            target[rows].copy_(_to_tensor(array[rows]))


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    unwrapped = unwrapping(model)
    return {
        unwrapped(name): value
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and name.rpartition(".")[2] != EXTRA_STATE
    }


def _memory(model: nn.Module) -> set[int]:
    """Where the model's own parameters and buffers lie."""
    own = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in own if _unsupported(tensor) is None}


def _fitting(model: nn.Module, spec: ModelSpec) -> dict[str, torch.Tensor]:
    mismatch = explain_mismatch(model, spec)
    if mismatch is not None:
        raise ConfigError(mismatch)
    return _state(model)


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it is contiguous on the CPU, else a copy that is."""
    return tensor.detach().cpu().resolve_neg().contiguous()


def _to_array(on_cpu: torch.Tensor) -> Array:
    if on_cpu.dtype == torch.bfloat16:
        bits: Array = on_cpu.view(torch.int16).numpy().view(np.uint16)
        return bits
    array: Array = on_cpu.numpy()
    return array


def _to_tensor(array: Array) -> torch.Tensor:
    if not (array.flags.writeable and array.flags.c_contiguous):
        array = array.copy()  # torch takes no read-only memory without a warning
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _spec(name: str, tensor: torch.Tensor, owned: set[int]) -> TensorSpec:
    problem = _unsupported(tensor)
    if problem is not None:
        raise ConfigError(f"Tensor {name!r} {problem}: exclude it or convert it.")
    if tensor.numel() and tensor.untyped_storage().data_ptr() not in owned:
        # Written into a copy, an average would be lost without a word.
        raise ConfigError(
            f"Tensor {name!r} in the state_dict is a copy, not a parameter or buffer of the model: "
            f"exclude it, or give the module inside that holds it."
        )
    return TensorSpec(name, DTYPES[tensor.dtype], tuple(tensor.shape))


def _unsupported(tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot be exchanged, as the rest of a sentence about it."""
    if nn.parameter.is_lazy(tensor):
        return "has no shape yet (run one forward pass first)"
    if tensor.dtype not in DTYPES:
        return f"has dtype {str(tensor.dtype).removeprefix('torch.')}, which cannot be exchanged"
    if tensor.is_meta:
        return "is on the meta device and has no values"
    if tensor.layout != torch.strided:
        return f"has the layout {str(tensor.layout).removeprefix('torch.')}, only strided works"
    if not _has_memory(tensor):
        return "has no memory of its own (sharded, as by FSDP, or packed)"
    if tensor.dim() > MAX_DIMENSIONS:
        return f"has {tensor.dim()} dimensions, above the limit of {MAX_DIMENSIONS}"
    if any(
        stride == 0 and side > 1 for stride, side in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        return "repeats one memory cell (expand), which cannot be written"
    return None


def _has_memory(tensor: torch.Tensor) -> bool:
    """False for a tensor that only stands for others: torch gives such no data pointer."""
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return False
    return True


def _tied(state: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Groups of names of one and the same tensor, in state_dict order."""
    groups: dict[object, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(_identity(name, tensor), []).append(name)
    return list(groups.values())


def _identity(name: str, tensor: torch.Tensor) -> object:
    """Equal for tied tensors only; what has no memory (empty, meta, sparse) is tied to nothing."""
    if _unsupported(tensor) is not None or tensor.numel() == 0:
        return name
    storage = tensor.untyped_storage().data_ptr()
    place = (tensor.device, storage, tensor.storage_offset(), tensor.dtype)
    return (*place, tensor.shape, tensor.stride())


def _explain_ties(state: Mapping[str, torch.Tensor], spec: ModelSpec) -> str | None:
    identities = {name: _identity(name, tensor) for name, tensor in state.items()}
    for alias, canonical in spec.aliases:
        if alias not in state:
            return f"Tensor {alias!r} is not in this model; the swarm ties it to {canonical!r}."
        if identities[alias] != identities.get(canonical):
            return f"Tensor {alias!r} is not tied to {canonical!r} in this model as in the swarm."
    exchanged: dict[object, str] = {}
    for tensor in spec.tensors:
        other = exchanged.setdefault(identities[tensor.name], tensor.name)
        if other != tensor.name:
            return f"Tensor {tensor.name!r} is tied to {other!r} in this model, not in the swarm."
    return None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _close(name: str, state: Mapping[str, torch.Tensor]) -> str:
    close = difflib.get_close_matches(name, state, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
