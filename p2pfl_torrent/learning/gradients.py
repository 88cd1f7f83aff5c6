"""Gradient statistics of a round, gathered while the user trains: what scores chunks by gradients.

A hook on the optimizer reads ``.grad`` just before a step. Sums stay on the parameter's device and
are fetched once a round, so no step waits for one. Only some steps are looked at: a mean over some
mini-batches ranks chunks much as one over all of them does, at a fraction of the cost.

Elements without a gradient (buffers, frozen or unused parameters, what is not a parameter) count
nowhere: a chunk's mean is over the elements that have one, and a chunk of none scores 0. It travels
all the same, as the picker multiplies importance by age. A parameter's gradient that holds a value
which is not finite is left out, all of it: that step is none for this parameter. snip, which looks
at one mini-batch, then keeps the one before.

A loss scaler unscales gradients before it calls the optimizer, so the hook reads true ones; a
callback reads what is there. Ranks of snip, and of fisher, do not depend on a constant scale.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch
from torch import nn

from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.importance import Moments
from p2pfl_torrent.learning.samples import Loss, Samples, Weights
from p2pfl_torrent.learning.wrappers import unwrapping, without_wrappers

EVERY = {"magnitude": 64, "snip": 32, "fisher": 8}
"""Steps between two that are looked at, per method: each keeps its cost below its share."""

STEPS_PER_SAMPLE = 6  # of training, for each per-sample gradient: that is what these may cost
LEAST_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class _Piece:
    """The rows of one parameter that are in one chunk."""

    chunk: int
    rows: slice | None  # None: a 0-d parameter
    size: int  # elements

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These rows of the parameter, or of what has its shape."""
        return tensor if self.rows is None else tensor[self.rows]


@dataclass(slots=True)
class _Tracked:
    """One parameter and its sums of the round, all on its device; None before the first step."""

    name: str  # as the model without wrappers has it
    parameter: nn.Parameter
    pieces: list[_Piece] = field(default_factory=list)
    steps: torch.Tensor | None = None  # that count: 0-d, float64
    sums: torch.Tensor | None = None  # [pieces, sums], as _magnitude_of and _snip_of have them
    squares: torch.Tensor | None = None  # sum of g * g, of the parameter's shape


class HookedOptimizer(Protocol):
    """What is asked of an optimizer: torch's have it, and the built-in recipes'."""

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> object:
        """Call the hook before every step; as torch's, it may return other arguments of it."""


class GradientStats:
    """What gradients say about each chunk; hand it to ``Peer(..., gradients=...)``.

    Args:
        model: the peer's model.
        optimizer: statistics are taken before its steps; of a step that is given a closure, after
            the closure has run, its first time. Without an optimizer, call ``on_before_step`` after
            every ``backward`` and before the step, as from a framework's callback.
        loss: with ``samples``, fisher uses per-sample gradients, and snip can use a batch of its
            own (``use_cached: false``).
        samples: (inputs, targets) of local data, first side the samples. Each round takes the next
            ones of them, round and round.

    With a hook alone, ``fisher`` is the root mean square of *mini-batch* gradients. Those are means
    over the samples of a batch, so their squares are no estimate of the empirical Fisher, only of
    the same order of chunks where gradients of samples vary alike; ``loss`` and ``samples`` give
    the estimate itself, for a backward pass per sample.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: HookedOptimizer | None = None,
        *,
        loss: Loss | None = None,
        samples: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        if (loss is None) != (samples is None):
            raise ConfigError("GradientStats needs loss= and samples= together, or neither.")
        if samples is not None and (len(samples[0]) != len(samples[1]) or not len(samples[0])):
            raise ConfigError("GradientStats: samples= must be as many inputs as targets, not 0.")
        self._model = without_wrappers(model)
        self._samples: Samples | None = None
        if loss is not None and samples is not None:
            self._samples = Samples(model, loss, *samples)
        self._method = ""
        self._hooked = False  # whether training is looked at
        self._sees = False  # whether a gradient of what is exchanged came by since the round began
        self._tracked: list[_Tracked] = []
        self._chunks = 0
        self._step = 0
        self._max_steps = 0
        self._history: deque[list[Moments]] = deque(maxlen=1)
        self._scored: tuple[int, list[float]] | None = None  # a round and its scores
        if optimizer is not None:
            optimizer.register_step_pre_hook(self._before_step)

    @property
    def has_samples(self) -> bool:
        """Whether gradients can be computed apart from the user's training."""
        return self._samples is not None

    def try_samples(self, method: str) -> None:
        """Take the gradient of one sample, if there are some, as "snip" or "fisher" will.

        Raises:
            ConfigError: it cannot be had of this model.
        """
        if self._samples is not None:
            self._samples.try_one(method)

    def watch(
        self,
        layout: Layout,
        method: str,
        *,
        history_window: int,
        max_steps: int,
        from_samples: bool,
    ) -> None:
        """Gather from now on what a method needs of a layout's chunks.

        Args:
            method: "magnitude", "snip" or "fisher".
            history_window: rounds that magnitude pools.
            max_steps: mini-batches of a round that fisher looks at.
            from_samples: training is not looked at: snip takes a batch of ``samples``. For fisher
                they are used whenever there are some.
        """
        self._method, self._max_steps, self._chunks = method, max_steps, len(layout.chunks)
        self._history, self._scored = deque(maxlen=history_window), None
        self._hooked = not (from_samples or (method == "fisher" and self.has_samples))
        self._step, self._sees = 0, False
        unwrapped = unwrapping(self._model)
        parameters = self._model.named_parameters(remove_duplicate=False)
        by_name = {unwrapped(name): (name, parameter) for name, parameter in parameters}
        tracked: dict[int, _Tracked] = {}
        for chunk in layout.chunks:
            for part in chunk.slices:
                spec = layout.spec.tensors[part.tensor]
                found = by_name.get(spec.name)
                if found is None or not spec.is_float:
                    continue
                entry = tracked.setdefault(part.tensor, _Tracked(*found))
                rows = slice(part.start, part.stop) if spec.shape else None
                size = prod(spec.shape[1:]) * (part.stop - part.start) if rows else 1
                entry.pieces.append(_Piece(chunk.index, rows, size))
        self._tracked = list(tracked.values())

    # --- while the user trains ---------------------------------------------------------------

    def _before_step(
        self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Look now, or at what a closure leaves: the gradients of its step are not there before."""
        by_place = len(args) > 1  # the first is the optimizer
        closure = args[1] if by_place else kwargs.get("closure")
        if not callable(closure):
            self.on_before_step()
            return None
        if by_place:
            return (args[0], self._looking(closure), *args[2:]), kwargs
        return args, {**kwargs, "closure": self._looking(closure)}

    def _looking(self, closure: Callable[[], object]) -> Callable[[], object]:
        """A closure that looks at the gradients the first time that it was called."""
        has_looked = False

        def looking() -> object:
            nonlocal has_looked
            loss = closure()
            if not has_looked:
                has_looked = True
                self.on_before_step()
            return loss

        return looking

    @torch.no_grad()
    def on_before_step(self, *_: object) -> None:
        """Look at the gradients, if it is this step's turn; arguments of a callback are ignored."""
        step, self._step = self._step, self._step + 1
        if not self._hooked or step % EVERY[self._method]:
            return
        if self._method == "fisher" and step // EVERY["fisher"] >= self._max_steps:
            return
        found = [(each, g) for each in self._tracked if (g := each.parameter.grad) is not None]
        if not found:
            self._step = step  # the next one has its turn
            return
        self._sees = True
        for entry, gradient in found:
            self._take(entry, gradient.to_dense() if gradient.is_sparse else gradient)

    def _take(self, entry: _Tracked, gradient: torch.Tensor) -> None:
        if self._method == "fisher":
            self._add_squares(entry, _wide(gradient).square(), 1)
            return
        if self._method == "magnitude":
            rows = [_magnitude_of(_wide(piece.of(gradient))) for piece in entry.pieces]
        else:
            product = _wide(gradient) * _wide(entry.parameter.detach())
            rows = [_snip_of(piece.of(product)) for piece in entry.pieces]
        sums = torch.stack(rows)
        counts = sums.isfinite().all()
        steps = counts.double()
        if entry.sums is None or entry.steps is None:
            entry.sums = torch.where(counts, sums, torch.zeros_like(sums))
            entry.steps = steps
        elif self._method == "magnitude":
            entry.sums = torch.where(counts, entry.sums + sums, entry.sums)
            entry.steps += steps
        else:  # one mini-batch: the last one seen
            entry.sums = torch.where(counts, sums, entry.sums)
            entry.steps = torch.maximum(entry.steps, steps)

    def _add_squares(self, entry: _Tracked, square: torch.Tensor, steps: int) -> None:
        """Take in g * g of so many steps, or the sum of them."""
        counts = square.sum().isfinite()
        square = torch.where(counts, square, torch.zeros_like(square))
        if entry.squares is None or entry.steps is None:
            entry.squares, entry.steps = square, counts.double() * steps
        else:
            entry.squares += square
            entry.steps += counts.double() * steps

    # --- when the round is scored ------------------------------------------------------------

    def moments(self, round: int) -> list[list[Moments]]:
        """Of each round remembered, this one last, per chunk; then a new round begins.

        Asked again for the same round, as after a cancelled exchange, the answer is the same. So it
        is after a round without a step, here and for the other methods.

        Raises:
            ConfigError: no gradient came by since ``watch``.
        """
        if self._is_new(round):
            sums = self._summed(3)
            self._history.append([Moments(*each) for each in sums])
            self._scored_now(round, [])
        return list(self._history)

    def snip(self, round: int, *, batch_size: int, use_cached: bool) -> list[float]:
        """Mean abs(g * w) per chunk, g from one mini-batch (Lee, Ajanthan, Torr, ICLR 2019).

        Args:
            batch_size: samples of the mini-batch, where it is not taken from training.
            use_cached: the gradient of a step of the user's training; else one on ``samples``.

        Raises:
            ConfigError: training is looked at, and no gradient came by since ``watch``; or none can
                be had of the samples.
        """
        if self._is_new(round):
            if not use_cached:
                self._take_batch(batch_size)
            self._scored_now(round, [_mean(*each) for each in self._summed(1)])
        return self._scores()

    def fisher(self, round: int, *, num_samples: int, damping: float) -> list[float]:
        """Mean sqrt(E[g * g] + damping * m) per chunk; m is the mean of E[g * g] over the model.

        The damping is relative, so that it means the same whatever the scale of the loss. An
        absolute one decides the order wherever squared gradients are smaller than it.

        Args:
            num_samples: per-sample gradients at most; no more than ``LEAST_SAMPLES`` and one for
                each ``STEPS_PER_SAMPLE`` steps of the round's training, where steps are seen.

        Raises:
            ConfigError: training is looked at, and no gradient came by since ``watch``; or none can
                be had of the samples.
        """
        if self._is_new(round):
            if self._samples is not None:
                if self._step:
                    afforded = max(LEAST_SAMPLES, self._step // STEPS_PER_SAMPLE)
                    num_samples = min(num_samples, afforded)
                self._take_samples(num_samples)
            self._root(damping)
            self._scored_now(round, [_mean(*each) for each in self._summed(1)])
        return self._scores()

    def _weights(self) -> Weights:
        return {entry.name: entry.parameter for entry in self._tracked}

    @torch.no_grad()
    def _take_batch(self, count: int) -> None:
        assert self._samples is not None
        self._forget()
        found = self._samples.of_batch(self._weights(), count)
        for entry in self._tracked:
            if entry.name in found:
                self._take(entry, found[entry.name])

    @torch.no_grad()
    def _take_samples(self, count: int) -> None:
        assert self._samples is not None
        self._forget()
        for found in self._samples.of_each(self._weights(), count):
            for entry in self._tracked:
                if entry.name in found:
                    square = _wide(found[entry.name]).square()
                    self._add_squares(entry, square.sum(0), len(square))

    def _is_new(self, round: int) -> bool:
        """Whether a round is to be scored, not answered from what was scored before."""
        if self._scored is not None and self._scored[0] == round:
            return False
        if not self._hooked:
            return True
        if not self._sees and self._scored is None:
            raise ConfigError(
                f"Importance by {self._method} needs gradients, but GradientStats saw none of the "
                "weights that are exchanged: make it of the model and the optimizer that are "
                "trained, or call its on_before_step() between backward() and the step (in a "
                "closure, after backward())."
            )
        return self._sees

    def _scored_now(self, round: int, scores: list[float]) -> None:
        self._scored = round, scores
        self._forget()

    def _scores(self) -> list[float]:
        assert self._scored is not None
        return list(self._scored[1])

    def _summed(self, width: int) -> list[list[float]]:
        """Per chunk: entries seen, then the sums over them; fetched from each device at once."""
        totals = [[0.0] * (1 + width) for _ in range(self._chunks)]
        by_device: dict[torch.device, list[tuple[_Piece, torch.Tensor]]] = {}
        for entry in self._tracked:
            if entry.sums is None or entry.steps is None:
                continue
            rows = torch.cat([entry.steps.expand(len(entry.pieces), 1), entry.sums.double()], 1)
            found = by_device.setdefault(rows.device, [])
            found += zip(entry.pieces, rows, strict=True)
        for pieces in by_device.values():
            fetched = torch.stack([row for _, row in pieces]).tolist()
            for (piece, _), (steps, *sums) in zip(pieces, fetched, strict=True):
                total = totals[piece.chunk]
                total[0] += steps * piece.size
                for place, value in enumerate(sums, 1):
                    total[place] += value
        return totals

    @torch.no_grad()
    def _root(self, damping: float) -> None:
        """Make of each parameter's squares the sums of sqrt(E[g * g] + damping * m)."""
        means = []
        for entry in self._tracked:
            if entry.squares is not None and entry.steps is not None:
                mean = entry.squares.div_(entry.steps.clamp(min=1).to(entry.squares.dtype))
                means.append((entry, mean, entry.steps.clamp(max=1)))
        size = sum(float(counts) * mean.numel() for _, mean, counts in means)
        damp = damping * sum(float(mean.sum()) for _, mean, _ in means) / max(1, size)
        for entry, mean, counts in means:
            roots = mean.add_(damp).sqrt_()
            sums = torch.stack([piece.of(roots).sum() for piece in entry.pieces])
            entry.sums, entry.steps = sums.double().mul_(counts).unsqueeze(1), counts

    def _forget(self) -> None:
        self._step, self._sees = 0, False
        for entry in self._tracked:
            entry.steps = entry.sums = entry.squares = None


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Half floats as float32: their squares and sums would over- or underflow."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _magnitude_of(g: torch.Tensor) -> torch.Tensor:
    """Sums of abs(g), g and g * g."""
    return torch.stack([g.abs().sum(), g.sum(), g.square().sum()])


def _snip_of(product: torch.Tensor) -> torch.Tensor:
    """Sum of abs(g * w), of which the product is given."""
    return product.abs().sum().unsqueeze(0)


def _mean(count: float, total: float) -> float:
    return total / count if count else 0.0
