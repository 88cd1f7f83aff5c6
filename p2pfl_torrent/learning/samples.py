"""Gradients of samples that the user handed over, apart from the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.learning.wrappers import without_wrappers

AT_A_TIME = 8  # per-sample gradients held at once: eight models' worth of memory

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(model output of a batch, targets) -> scalar mean loss, as ``torch.nn.functional`` has them."""

Weights = Mapping[str, torch.Tensor]
"""Parameters by their names in the model without wrappers."""

_REMEDY = {
    "fisher": "leave out its loss= and samples=, so that fisher reads the gradients of training",
    "snip": "make chunk.importance_config.snip.use_cached true, to read the gradients of training",
}


class Samples:
    """Samples of which each round takes the next ones, round and round.

    The model runs in evaluation mode, without the wrappers around it and on copies of its buffers,
    so that nothing of it changes.

    Args:
        model: the peer's model.
        loss: of a batch's output and targets.
        inputs, targets: first side the samples, as many of both, at least one.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, inputs: torch.Tensor, targets: torch.Tensor
    ) -> None:
        self._model = without_wrappers(model)
        self._loss = loss
        self._inputs = inputs
        self._targets = targets
        self._place = 0

    def try_one(self, method: str) -> None:
        """Take the gradient of the first sample as "snip" or "fisher" will.

        Raises:
            ConfigError: it cannot be had of this model.
        """
        weights = dict(self._model.named_parameters())
        if method == "fisher":
            self._of_each(weights, *self._moved(torch.zeros(1, dtype=torch.long)))
        else:
            self._of_all(weights, *self._moved(torch.zeros(1, dtype=torch.long)))

    def of_batch(self, weights: Weights, count: int) -> Weights:
        """The gradients of the next samples' mean loss, of the weights that have one.

        Raises:
            ConfigError: they cannot be had of this model.
        """
        return self._of_all(weights, *self._next(count))

    def of_each(self, weights: Weights, count: int) -> Iterator[Weights]:
        """The gradients of the next samples, some samples at a time, these along the first side.

        Raises:
            ConfigError: they cannot be had of this model.
        """
        inputs, targets = self._next(count)
        for begin in range(0, len(inputs), AT_A_TIME):
            some = slice(begin, begin + AT_A_TIME)
            yield self._of_each(weights, inputs[some], targets[some])

    def _next(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = (torch.arange(min(count, len(self._inputs))) + self._place) % len(self._inputs)
        self._place = int(index[-1] + 1) % len(self._inputs)
        return self._moved(index)

    def _moved(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Some of the samples, where the model is."""
        inputs, targets = self._inputs, self._targets
        device = next((weight.device for weight in self._model.parameters()), inputs.device)
        return (
            inputs[index.to(inputs.device)].to(device),
            targets[index.to(targets.device)].to(device),
        )

    def _loss_of(
        self, weights: Weights, inputs: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        output = functional_call(self._model, {**buffers, **weights}, (inputs,))
        return self._loss(output, targets)

    def _of_all(self, weights: Weights, inputs: torch.Tensor, targets: torch.Tensor) -> Weights:
        weights = _trainable(weights)
        if not weights:
            return {}
        with _in_one_sentence("snip"), _evaluating(self._model), torch.enable_grad():
            loss = self._loss_of({}, inputs, targets)
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        pairs: list[tuple[str, torch.Tensor | None]] = list(zip(weights, found, strict=True))
        return {name: gradient for name, gradient in pairs if gradient is not None}

    def _of_each(self, weights: Weights, inputs: torch.Tensor, targets: torch.Tensor) -> Weights:
        """By ``torch.func``, in one pass over all of these samples."""
        trainable = {name: weight.detach() for name, weight in _trainable(weights).items()}

        def loss_of_one(weights: Weights, one: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self._loss_of(weights, one.unsqueeze(0), target.unsqueeze(0))

        per_sample = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")
        with _in_one_sentence("fisher"), _evaluating(self._model):
            found: Weights = per_sample(trainable, inputs, targets)
        return found


def _trainable(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if weight.requires_grad}


@contextmanager
def _in_one_sentence(method: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the user's model and loss run in here, and raise what they like
        why = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")
        raise ConfigError(
            f"GradientStats cannot take gradients of its samples "
            f"({type(error).__name__}: {why}): {_REMEDY[method]}."
        ) from error


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode: one sample has no batch statistics, and none may be changed."""
    modules = [module for module in model.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True
