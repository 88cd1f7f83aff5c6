"""Stochastic gradient descent, as ``torch.optim.SGD`` computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


class SGD:
    """The built-in recipes' optimizer.

    torch's own optimizers load its compiler when they are made, which nothing here uses: 1.2
    CPU-seconds and 70 MB in every process of a swarm.

    Args:
        momentum: 0 for none; not dampened, not Nesterov's.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], *, lr: float, momentum: float) -> None:
        self._parameters = list(parameters)
        self._lr = lr
        self._momentum = momentum
        self._velocity: dict[int, torch.Tensor] = {}  # by a parameter's place
        self._pre_hooks: list[Callable[..., None]] = []

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def register_step_pre_hook(self, hook: Callable[..., None]) -> None:
        """Call ``hook(optimizer, args, kwargs)`` before every step, as torch's optimizers do."""
        self._pre_hooks.append(hook)

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters that have a gradient."""
        for hook in self._pre_hooks:
            hook(self, (self,), {})
        for place, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                parameter.add_(self._direction(place, parameter.grad), alpha=-self._lr)

    def reset(self) -> None:
        """Stand still: forget the momentum."""
        self._velocity.clear()

    def _direction(self, place: int, gradient: torch.Tensor) -> torch.Tensor:
        if not self._momentum:
            return gradient
        velocity = self._velocity.get(place)
        if velocity is None:
            velocity = self._velocity[place] = gradient.clone()
        else:
            velocity.mul_(self._momentum).add_(gradient)
        return velocity
