"""Norm layers in federated averaging: what leaves the peer, and running statistics afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import nn

from p2pfl_torrent.core.errors import ConfigError

NormPolicy = Literal["average", "local", "recalibrate"]
"""What becomes of norm layers:

- ``average``: exchanged like every other tensor, buffers included;
- ``local``: all their tensors stay at home (FedBN, Li et al., ICLR 2021), which helps where the
  peers' inputs look different, and leaves no common model;
- ``recalibrate``: weights are averaged, running statistics stay at home and are recomputed with
  the merged weights by `recalibrate`.
"""

RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

# Read from the class name, so that the norms of other libraries (LlamaRMSNorm, T5LayerNorm,
# FrozenBatchNorm2d) and torch's own, which old versions partly lack, are known alike.
_NORM_KINDS = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm")

Batch = torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor]


def is_norm(module: nn.Module) -> bool:
    """Whether this is a norm layer by its type, or that of a base class; a block is none."""
    if next(module.children(), None) is not None:
        return False
    names = [cls.__name__ for cls in type(module).__mro__]
    return any(kind in name for name in names for kind in _NORM_KINDS)


def names_kept_home(model: nn.Module, policy: NormPolicy) -> frozenset[str]:
    """The state_dict names that this policy leaves out of the exchange."""
    if policy not in ("average", "local", "recalibrate"):
        raise ConfigError(f"Unknown norm_policy {policy!r}: choose average, local or recalibrate.")
    if policy == "average":
        return frozenset()
    kept = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        if is_norm(module):
            # Not state_dict(): only the module's own names are wanted, without a copy or a hook.
            own = {**module._parameters, **module._buffers}
            names = own if policy == "local" else own.keys() & set(RUNNING_STATISTICS)
            kept |= {f"{prefix}.{name}" if prefix else name for name in names}
    return frozenset(kept)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Recompute the running statistics of all norm layers from forward passes.

    The statistics become the plain mean over the batches, each counted alike, so batches should
    be of similar size. Only norm layers with running statistics run in train mode: dropout stays
    off. Modes and momenta are put back, and no gradient is made.

    Args:
        model: called with one tensor.
        batches: tensors, or tuples whose first entry is the input; moved to the model's device.

    Returns:
        The number of batches used; 0, without touching the batches, if no layer has statistics.

    Raises:
        ConfigError: there was no batch. The old statistics are kept then, as they are when a
            forward pass fails.
    """
    layers = [module for module in model.modules() if _tracks(module)]
    if not layers:
        return 0
    tensor = next(model.parameters(), None)
    device = tensor.device if tensor is not None else torch.device("cpu")
    count = 0
    with _measuring(model, layers):
        for batch in batches:
            count += 1
            for layer in layers:
                if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
                    layer.momentum = 1 / count  # it takes no None; this is the same mean
            _forward(model, _input(batch).to(device))
        if not count:
            raise ConfigError(
                "Cannot recalibrate norm layers without a batch: pass data that can be gone "
                "through again each round, such as a list or a DataLoader, no generator."
            )
    return count


def _input(batch: object) -> torch.Tensor:
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, torch.Tensor):
        raise ConfigError(
            f"A batch to recalibrate norm layers with must be a tensor, or a tuple with the input "
            f"first, not {type(x).__name__}."
        )
    return x


def _forward(model: nn.Module, x: torch.Tensor) -> None:
    try:
        model(x)
    except ValueError as error:  # torch's word for one value per channel, of which no variance is
        raise ConfigError(
            f"A batch {list(x.shape)} to recalibrate norm layers with does not go through the "
            f"model: {error}"
        ) from error


def _tracks(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.modules.batchnorm._NormBase)
        and module.track_running_stats
        and module.running_mean is not None
    )


@contextmanager
def _measuring(model: nn.Module, layers: list[nn.Module]) -> Iterator[None]:
    """Norm layers accumulate afresh; all else in eval mode. On failure the old statistics."""
    modes = [(module, module.training) for module in model.modules()]
    norms = [cast(Any, layer) for layer in layers]
    momenta = [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a cumulative average
        norm.train()
    try:
        yield
    except BaseException:
        for norm, old in zip(norms, before, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(old[name])
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
