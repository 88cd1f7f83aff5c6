"""FedProx's local part: a penalty on how far training moves from the round's start."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from p2pfl_torrent.core.errors import ConfigError


def proximal_term(
    model: torch.nn.Module, start: Mapping[str, torch.Tensor], mu: float
) -> torch.Tensor:
    """mu / 2 times the squared distance of a model's parameters from ``start`` (Li et al. 2020).

    Add it to the loss of each batch. Its gradient for a parameter w is mu (w - start).

    Args:
        start: a copy of the parameters by name, taken when the round began: ``{name:
            parameter.detach().clone() for name, parameter in model.named_parameters()}``.
            Parameters that need no gradient may be left out.
        mu: 0 or more; 0.001 to 1 in the paper.

    Returns:
        A scalar on the parameters' device.

    Raises:
        ConfigError: mu is negative, or a trained parameter is not in ``start``.
    """
    if not mu >= 0:
        raise ConfigError(f"mu is {mu}: the proximal term's factor must be 0 or more.")
    squares = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in start:
            raise ConfigError(f"Parameter {name!r} is not in start: copy all when a round begins.")
        squares.append((parameter - start[name].detach()).pow(2).sum())
    if not squares:
        raise ConfigError("The model has no parameter that is trained.")
    return torch.stack(squares).sum() * (mu / 2)
