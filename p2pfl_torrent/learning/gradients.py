"""Gradient statistics of a round, gathered while the user trains: what scores chunks by gradients.

A hook on the optimizer reads ``.grad`` just before a step. Sums stay on the parameter's device and
are fetched once a round, so no step waits for one. Only some steps are looked at: a mean over some
mini-batches ranks chunks much as one over all of them does, at a fraction of the cost.

Elements without a gradient (buffers, frozen or unused parameters, what is not a parameter) count
nowhere: a chunk's mean is over the elements that have one, and a chunk of none scores 0. It travels
all the same, as the picker multiplies importance by age. A gradient that is not finite (a step that
a loss scaler will skip) is left out.

A loss scaler unscales gradients before it calls the optimizer, so the hook reads true ones; a
callback reads what is there. Ranks of snip, and of fisher, do not depend on a constant scale.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn, optim
from torch.func import functional_call, grad, vmap

from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.importance import Moments
from p2pfl_torrent.learning.wrappers import unwrapping

EVERY = {"magnitude": 64, "snip": 32, "fisher": 8}
"""Steps between two that are looked at, per method: each keeps its cost below its share."""

SAMPLES_AT_A_TIME = 8  # per-sample gradients held at once: eight models' worth of memory

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(model output of a batch, targets) -> scalar mean loss, as ``torch.nn.functional`` has them."""


@dataclass(slots=True)
class _Piece:
    """The rows of one parameter that are in one chunk."""

    chunk: int
    rows: slice | None  # None: a 0-d parameter
    sums: torch.Tensor | None = None  # of the round; see _magnitude_of and _snip_of


@dataclass(slots=True)
class _Tracked:
    name: str  # as the model has it
    parameter: nn.Parameter
    pieces: list[_Piece] = field(default_factory=list)
    squares: torch.Tensor | None = None  # sum of g * g over the steps seen
    steps: int = 0


class GradientStats:
    """What gradients say about each chunk; hand it to ``Peer(..., gradients=...)``.

    Args:
        model: the peer's model.
        optimizer: statistics are taken before its steps. Without one, call ``on_before_step`` after
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
        optimizer: optim.Optimizer | None = None,
        *,
        loss: Loss | None = None,
        samples: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        if (loss is None) != (samples is None):
            raise ConfigError("GradientStats needs loss= and samples= together, or neither.")
        if samples is not None and (len(samples[0]) != len(samples[1]) or not len(samples[0])):
            raise ConfigError("GradientStats: samples= must be as many inputs as targets, not 0.")
        self._model = model
        self._loss = loss
        self._samples = samples
        self._next_sample = 0
        self._method = ""
        self._hooked = False  # whether training is looked at
        self._tracked: list[_Tracked] = []
        self._chunks = 0
        self._step = 0
        self._max_steps = 0
        self._history: deque[list[Moments]] = deque(maxlen=1)
        self._scored: tuple[int, list[list[Moments]] | list[float]] | None = None
        if optimizer is not None:
            optimizer.register_step_pre_hook(self._before_step)

    @property
    def has_samples(self) -> bool:
        """Whether gradients can be computed apart from the user's training."""
        return self._samples is not None

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
        self._step = 0
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
                entry.pieces.append(_Piece(chunk.index, rows))
        self._tracked = list(tracked.values())

    # --- while the user trains ---------------------------------------------------------------

    def _before_step(self, *_: object) -> None:
        self.on_before_step()

    @torch.no_grad()
    def on_before_step(self, *_: object) -> None:
        """Look at the gradients, if it is this step's turn; arguments of a callback are ignored."""
        step, self._step = self._step, self._step + 1
        if not self._hooked or step % EVERY[self._method]:
            return
        if self._method == "fisher" and step // EVERY["fisher"] >= self._max_steps:
            return
        for entry in self._tracked:
            gradient = entry.parameter.grad
            if gradient is not None:
                self._take(entry, gradient.to_dense() if gradient.is_sparse else gradient)

    def _take(self, entry: _Tracked, gradient: torch.Tensor) -> None:
        if self._method == "fisher":
            square = torch.nan_to_num(_wide(gradient), 0.0, 0.0, 0.0).square_()
            entry.squares = square if entry.squares is None else entry.squares.add_(square)
            entry.steps += 1
            return
        for piece in entry.pieces:
            g = gradient if piece.rows is None else gradient[piece.rows]
            if self._method == "magnitude":
                sums = _magnitude_of(g)
                piece.sums = sums if piece.sums is None else piece.sums.add_(sums)
            else:
                weight = entry.parameter if piece.rows is None else entry.parameter[piece.rows]
                sums = _snip_of(g, weight)
                # One mini-batch: the last one seen, unless it was not finite.
                piece.sums = (
                    sums if piece.sums is None else torch.where(sums[1] > 0, sums, piece.sums)
                )

    # --- when the round is scored ------------------------------------------------------------

    def moments(self, round: int) -> list[list[Moments]]:
        """Of each round remembered, this one last, per chunk; then a new round begins.

        Asked again for the same round, as after a cancelled exchange, the answer is the same.
        """
        if self._scored is None or self._scored[0] != round:
            self._history.append([Moments(*sums) for sums in self._summed(4)])
            self._forget()
            self._scored = round, []
        return list(self._history)

    def snip(self, round: int, *, batch_size: int, use_cached: bool) -> list[float]:
        """Mean abs(g * w) per chunk, g from one mini-batch (Lee, Ajanthan, Torr, ICLR 2019).

        Args:
            batch_size: samples of the mini-batch, where it is not taken from training.
            use_cached: the gradient of a step of the user's training; else one on ``samples``.
        """
        if self._scored is None or self._scored[0] != round:
            if not use_cached:
                self._gradient_of_samples(batch_size)
            sums = self._summed(2)
            self._scored = round, [total / count if count else 0.0 for total, count in sums]
            self._forget()
        return list(self._scored[1])  # type: ignore[arg-type]  # floats, of this method

    def fisher(self, round: int, *, num_samples: int, damping: float) -> list[float]:
        """Mean sqrt(E[g * g] + damping * m) per chunk; m is the mean of E[g * g] over the model.

        The damping is relative, so that it means the same whatever the loss's scale: an absolute
        0.001 would drown most networks' E[g * g], of 1e-4 and less, and order chunks by nothing.
        """
        if self._scored is None or self._scored[0] != round:
            if self._samples is not None:
                self._square_gradients_of_samples(num_samples)
            self._scored = round, self._fisher(damping)
            self._forget()
        return list(self._scored[1])  # type: ignore[arg-type]  # floats, of this method

    def _summed(self, width: int) -> list[list[float]]:
        """The pieces' sums added per chunk, fetched from each device at once."""
        totals = [[0.0] * width for _ in range(self._chunks)]
        by_device: dict[torch.device, list[_Piece]] = {}
        for entry in self._tracked:
            for piece in entry.pieces:
                if piece.sums is not None:
                    by_device.setdefault(piece.sums.device, []).append(piece)
        for pieces in by_device.values():
            stacked = torch.stack([s.double() for p in pieces if (s := p.sums) is not None])
            for piece, row in zip(pieces, stacked.tolist(), strict=True):
                total = totals[piece.chunk]
                totals[piece.chunk] = [old + new for old, new in zip(total, row, strict=True)]
        return totals

    @torch.no_grad()
    def _fisher(self, damping: float) -> list[float]:
        means = [
            (entry, entry.squares.div_(entry.steps))
            for entry in self._tracked
            if entry.squares is not None
        ]
        size = sum(mean.numel() for _, mean in means)
        damp = damping * sum(float(mean.sum()) for _, mean in means) / max(1, size)
        for entry, mean in means:
            for piece in entry.pieces:
                rows = mean if piece.rows is None else mean[piece.rows]
                total = (rows + damp).sqrt().sum()
                piece.sums = torch.stack([total, torch.full_like(total, float(rows.numel()))])
        return [total / count if count else 0.0 for total, count in self._summed(2)]

    def _forget(self) -> None:
        self._step = 0
        for entry in self._tracked:
            entry.squares, entry.steps = None, 0
            for piece in entry.pieces:
                piece.sums = None

    # --- gradients of the samples handed over ------------------------------------------------

    def _next(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._samples is not None
        inputs, targets = self._samples
        index = (torch.arange(min(count, len(inputs))) + self._next_sample) % len(inputs)
        self._next_sample = int(index[-1] + 1) % len(inputs)
        device = next((entry.parameter.device for entry in self._tracked), inputs.device)
        return (
            inputs[index.to(inputs.device)].to(device),
            targets[index.to(targets.device)].to(device),
        )

    def _trainable(self) -> dict[str, torch.Tensor]:
        return {
            entry.name: entry.parameter for entry in self._tracked if entry.parameter.requires_grad
        }

    def _gradient_of_samples(self, count: int) -> None:
        assert self._loss is not None
        inputs, targets = self._next(count)
        trainable = self._trainable()
        with _evaluating(self._model), torch.enable_grad():
            loss = self._loss(self._model(inputs), targets)
            found = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        gradients = dict(zip(trainable, found, strict=True))
        self._forget()
        with torch.no_grad():
            for entry in self._tracked:
                gradient = gradients.get(entry.name)
                if gradient is not None:
                    self._take(entry, gradient)

    def _square_gradients_of_samples(self, count: int) -> None:
        """Per-sample gradients by ``torch.func``, squared and summed, some samples at a time."""
        inputs, targets = self._next(count)
        trainable = {name: weight.detach() for name, weight in self._trainable().items()}

        def loss_of_one(
            weights: Mapping[str, torch.Tensor], one: torch.Tensor, target: torch.Tensor
        ) -> torch.Tensor:
            assert self._loss is not None
            output = functional_call(self._model, dict(weights), (one.unsqueeze(0),))
            return self._loss(output, target.unsqueeze(0))

        per_sample = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")
        with _evaluating(self._model):
            for begin in range(0, len(inputs), SAMPLES_AT_A_TIME):
                some = slice(begin, begin + SAMPLES_AT_A_TIME)
                found = per_sample(trainable, inputs[some], targets[some])
                for entry in self._tracked:
                    if entry.name not in found:
                        continue
                    square = torch.nan_to_num(_wide(found[entry.name]), 0.0, 0.0, 0.0)
                    square = square.square_().sum(0)
                    entry.squares = square if entry.squares is None else entry.squares + square
                    entry.steps += len(inputs[some])


class _evaluating:  # noqa: N801 - used as a function
    """A model in evaluation mode: one sample has no batch statistics, and none may be changed."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if module.training]

    def __enter__(self) -> None:
        for module in self._modules:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            module.training = True


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Half floats as float32: their squares and sums would over- or underflow."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _magnitude_of(gradient: torch.Tensor) -> torch.Tensor:
    """count, sum abs(g), sum g, sum g * g; all 0 where one is not finite."""
    g = _wide(gradient)
    count = torch.full((), float(g.numel()), dtype=g.dtype, device=g.device)
    sums = torch.stack([count, g.abs().sum(), g.sum(), g.square().sum()])
    return torch.where(sums.isfinite().all(), sums, torch.zeros_like(sums))


def _snip_of(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """sum abs(g * w), count; both 0 where one is not finite."""
    product = (_wide(gradient) * _wide(weight.detach())).abs_().sum()
    sums = torch.stack([product, torch.full_like(product, float(gradient.numel()))])
    return torch.where(sums.isfinite().all(), sums, torch.zeros_like(sums))
