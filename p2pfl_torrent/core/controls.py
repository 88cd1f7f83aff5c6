"""SCAFFOLD's control variates: a second group of tensors in every update.

Karimireddy et al. 2020, algorithm 1, option II. A peer i steps by g - c_i + c in place of its
gradient g; after K steps of rate lr from x to y its control is

    c_i' = c_i - c + (x - y) / (K lr)

What is exchanged is y and c_i'; both are merged by the weighted mean, chunk by chunk, and the mean
of the controls is c of the next round. With all peers in every round and equal weights that is the
paper's algorithm with a global step of 1. Of an absent owner's control the paper keeps the last;
here it counts for as long as its last chunk fills.
"""

from __future__ import annotations

from p2pfl_torrent.core.tensors import Array, Arrays, ModelSpec, TensorSpec

CONTROL = ":c"  # what a control's name has after its tensor's


def with_controls(spec: ModelSpec) -> ModelSpec:
    """A model with its controls: after all its tensors ``name:c``, of the floats.

    float64 of an F64 tensor, float32 of any other.
    """
    return ModelSpec((*spec.tensors, *_controls(spec)), spec.aliases)


def _controls(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(tensor.name + CONTROL, "F64" if tensor.dtype == "F64" else "F32", tensor.shape)
        for tensor in spec.tensors
        if tensor.is_float
    )


def controls_of(spec: ModelSpec) -> ModelSpec:
    """The second group alone, of a spec that has it."""
    names = {tensor.name for tensor in spec.tensors}
    found = (t for t in spec.tensors if t.name.endswith(CONTROL))
    return ModelSpec(tuple(t for t in found if t.name.removesuffix(CONTROL) in names))


def only_controls(arrays: Arrays, spec: ModelSpec) -> dict[str, Array]:
    """The values of ``controls_of(spec)``."""
    return {tensor.name: arrays[tensor.name] for tensor in controls_of(spec).tensors}
