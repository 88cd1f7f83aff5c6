"""SCAFFOLD's local part: gradients corrected by control variates, and the peer's new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn, optim

from p2pfl_torrent.core.controls import CONTROL
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.tensors import Array, Arrays
from p2pfl_torrent.learning.wrappers import unwrapping


@dataclass(slots=True)
class _Tracked:
    """A parameter in training.

    Attributes:
        correction: c - c_i, added to each gradient.
        start: its values when the round began.
        moved: sum of the learning rates of its steps: K lr, where the rate does not change.
    """

    correction: torch.Tensor
    start: torch.Tensor
    moved: float = 0.0


class Scaffold:
    """For ``federate.aggregator: scaffold``: hand it to ``Peer(..., controls=...)``.

    A hook corrects the gradients just before each of the optimizer's steps; the training loop
    stays as it is. Formulas: ``core.controls``. With a learning rate that changes, K lr is the sum
    over the steps. On the device of the parameters it holds two more models.

    Args:
        optimizer: plain SGD; weight decay is taken as part of the gradient. Any other moves the
            weights by something else than gradients times the learning rate, of which controls
            could not be told.

    Raises:
        ConfigError: the optimizer has momentum, or adapts its steps.
    """

    def __init__(self, model: nn.Module, optimizer: optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            if not isinstance(optimizer, optim.SGD) or group["momentum"]:
                raise ConfigError(
                    "Scaffold needs steps that are gradients times a learning rate: give it "
                    "torch.optim.SGD with momentum=0."
                )
        unwrapped = unwrapping(model)
        parameters = model.named_parameters(remove_duplicate=False)
        self._parameters = {unwrapped(name): parameter for name, parameter in parameters}
        self._tracked: dict[nn.Parameter, _Tracked] = {}
        self._server: dict[str, Array] = {}
        self._own: dict[str, Array] = {}
        optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def begin(self, state: Arrays, own: Arrays | None) -> None:
        """Begin a round, once the model holds its start weights.

        Args:
            state: what the round starts from, with the controls c.
            own: this peer's c_i; None for zeros.
        """
        self._server = {
            name: np.array(array) for name, array in state.items() if name.endswith(CONTROL)
        }
        self._own = {
            name: np.zeros_like(array) if own is None else np.array(own[name])
            for name, array in self._server.items()
        }
        self._tracked = {}
        for name, server in self._server.items():
            parameter = self._parameters.get(name.removesuffix(CONTROL))
            if parameter is not None:
                correction = torch.from_numpy(np.asarray(np.subtract(server, self._own[name])))
                self._tracked[parameter] = _Tracked(
                    correction.to(parameter.device, parameter.dtype), parameter.detach().clone()
                )

    @torch.no_grad()
    def _before_step(self, optimizer: optim.Optimizer, args: object, kwargs: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                tracked = self._tracked.get(parameter)
                if tracked is not None and parameter.grad is not None:
                    parameter.grad.add_(tracked.correction)
                    tracked.moved += float(group["lr"])

    @torch.no_grad()
    def controls(self) -> Mapping[str, Array]:
        """This peer's new c_i by name; the old one of what was not trained."""
        result = dict(self._own)
        for name, own in self._own.items():
            parameter = self._parameters.get(name.removesuffix(CONTROL))
            tracked = None if parameter is None else self._tracked.get(parameter)
            if parameter is None or tracked is None or not tracked.moved:
                continue
            before, now = tracked.start.cpu().double(), parameter.detach().cpu().double()
            mean = ((before - now) / tracked.moved).numpy()
            fresh = own.astype(np.float64) - self._server[name].astype(np.float64) + mean
            result[name] = np.asarray(fresh, own.dtype)
        return result
