"""Deterministic local training by mini-batch SGD, and evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.learning.datasets import Dataset
from p2pfl_torrent.learning.gradients import GradientStats
from p2pfl_torrent.learning.recipes import OnMerge
from p2pfl_torrent.learning.sgd import SGD

OnBatch = Callable[[int, int, float], None]
"""Called after each batch with (batches done, batches in total, loss of this batch)."""

STATISTICS_SAMPLES = 1024  # of the data, handed to gradient statistics as floats
EVALUATION_BATCH = 512  # bounds the activations held at once


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What one call of `Trainer.train` did.

    Attributes:
        loss: mean cross-entropy over the samples of the last epoch, in nats, without the proximal
            term; not finite if training diverged.
        samples: size of the training set, the weight of this update in FedAvg.
        batches: steps taken over all epochs.
        seconds: wall-clock time.
    """

    loss: float
    samples: int
    batches: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean cross-entropy in nats and share of right answers (0-1) over `samples` samples."""

    loss: float
    accuracy: float
    samples: int


class Trainer:
    """Trains one model on one data set, round after round.

    Equal seeds, data, start weights and thread counts give equal weights. Dropout and the like
    draw from a state forked from torch's global one, which is left as it was.

    Args:
        model: outputs [n, classes] logits; moved to `device`, trained in place.
        batch_size: upper bound; an epoch is cut into batches of nearly equal size, so that no
            tiny last one disturbs batch norm.
        seed: of the shuffling and of the model's own randomness.
        proximal: FedProx' mu (Li et al., MLSys 2020): adds mu/2 * ||w - w0||^2 to the loss, where
            w0 are the weights at the start of each `train`. 0 is FedAvg.
        on_merge: whether `merged` keeps the momentum or starts it anew.

    Raises:
        ConfigError: the data set is empty, a number is out of range, or there is no such device.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        *,
        batch_size: int,
        lr: float,
        momentum: float = 0.0,
        seed: int = 0,
        device: str | torch.device = "cpu",
        proximal: float = 0.0,
        on_merge: OnMerge = "keep",
    ) -> None:
        _check(dataset, batch_size, lr, momentum, proximal, on_merge)
        self._device = _usable(device)
        self.model = model.to(self._device)
        self.dataset = dataset
        self.batch_size = batch_size
        self.proximal = proximal
        self.on_merge = on_merge
        self._optimizer = SGD(model.parameters(), lr=lr, momentum=momentum)
        self._generator = torch.Generator().manual_seed(seed)
        self._x = torch.from_numpy(dataset.x).to(self._device)
        self._y = torch.from_numpy(dataset.y).to(self._device)

    @property
    def batches_per_epoch(self) -> int:
        """Steps of one epoch."""
        return math.ceil(len(self.dataset) / self.batch_size)

    def train(self, epochs: int, on_batch: OnBatch | None = None) -> TrainResult:
        """Run `epochs` epochs in place; the model is left in train mode.

        An exception raised by `on_batch` ends the training between two batches and propagates.
        """
        if epochs < 1:
            raise ConfigError(f"epochs must be at least 1, got {epochs}.")
        start = time.perf_counter()
        total = epochs * self.batches_per_epoch
        weights = self.model.parameters() if self.proximal else ()
        anchors = [parameter.detach().clone() for parameter in weights]
        done = 0
        loss = 0.0
        self.model.train()
        with self._own_randomness():
            for _ in range(epochs):
                weighted = torch.zeros((), dtype=torch.float64, device=self._device)
                for x, y in self._shuffled():
                    batch_loss = self._step(x, y, anchors)
                    weighted += batch_loss * len(y)
                    done += 1
                    if on_batch is not None:
                        on_batch(done, total, batch_loss.item())
                loss = weighted.item() / len(self.dataset)
        return TrainResult(loss, len(self.dataset), done, time.perf_counter() - start)

    def evaluate(self, dataset: Dataset) -> Evaluation:
        """Score the model as it is now."""
        return evaluate(self.model, dataset)

    def merged(self) -> None:
        """Say that the model's weights were replaced by an aggregate: applies `on_merge`."""
        if self.on_merge == "reset":
            self._optimizer.reset()

    def gradient_stats(self, *, with_samples: bool) -> GradientStats:
        """Statistics of this training, for importance by gradients.

        Args:
            with_samples: hand over some of the data too, for gradients apart from the training's.
        """
        if not with_samples:
            return GradientStats(self.model, self._optimizer)
        generator = torch.Generator().manual_seed(len(self.dataset))  # its order may be by class
        some = torch.randperm(len(self.dataset), generator=generator)[:STATISTICS_SAMPLES]
        some = some.to(self._device)
        samples = scaled(self._x[some]), self._y[some]
        loss = functional.cross_entropy
        return GradientStats(self.model, self._optimizer, loss=loss, samples=samples)

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One pass over the training set in its own order, for scoring and recalibrating."""
        order = torch.arange(len(self.dataset))
        return self._cut(order)

    def _step(self, x: torch.Tensor, y: torch.Tensor, anchors: list[torch.Tensor]) -> torch.Tensor:
        self._optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.proximal:
            for parameter, anchor in zip(self.model.parameters(), anchors, strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - anchor, alpha=self.proximal)
        self._optimizer.step()
        return loss.detach()

    def _shuffled(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self._cut(torch.randperm(len(self.dataset), generator=self._generator))

    def _cut(self, order: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for indices in order.to(self._device).tensor_split(self.batches_per_epoch):
            yield scaled(self._x[indices]), self._y[indices]

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Seed what the model itself draws, and put torch's global state back afterwards."""
        seed = int(torch.randint(2**62, (), generator=self._generator))
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.default_generator.manual_seed(seed)
            if cuda:
                with torch.cuda.device(self._device):
                    torch.cuda.manual_seed(seed)
            yield


def scaled(images: torch.Tensor) -> torch.Tensor:
    """Images as float values: uint8 pixels are divided by 255, others are taken as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def set_threads(count: int) -> None:
    """How many threads torch may compute with in this process."""
    torch.set_num_threads(count)


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, batch_size: int = EVALUATION_BATCH) -> Evaluation:
    """Score a model in eval mode, on the device of its weights; its modes are left as they were.

    Raises:
        ConfigError: the data set is empty.
    """
    if not len(dataset):
        raise ConfigError("Cannot evaluate on an empty data set.")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    loss = 0.0
    right = 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for start in range(0, len(dataset), batch_size):
            x = scaled(torch.from_numpy(dataset.x[start : start + batch_size]).to(device))
            y = torch.from_numpy(dataset.y[start : start + batch_size]).to(device)
            logits = model(x)
            loss += functional.cross_entropy(logits, y, reduction="sum").item()
            right += int((logits.argmax(dim=1) == y).sum())
    finally:
        for module, training in modes:
            module.training = training
    return Evaluation(loss / len(dataset), right / len(dataset), len(dataset))


def _usable(device: str | torch.device) -> torch.device:
    try:
        torch.empty(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # A build of torch without CUDA fails an assertion, one without a GPU or MPS a call.
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"Device {str(device)!r} cannot be used here ({reason}): use 'cpu'."
        ) from error


def _check(
    dataset: Dataset,
    batch_size: int,
    lr: float,
    momentum: float,
    proximal: float,
    on_merge: str,
) -> None:
    if not len(dataset):
        raise ConfigError("Cannot train on an empty data set.")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
    if not (np.isfinite(lr) and lr > 0):
        raise ConfigError(f"lr must be above 0, got {lr}.")
    if not 0 <= momentum < 1:
        raise ConfigError(f"momentum must lie in 0..1 (below 1), got {momentum}.")
    if not (np.isfinite(proximal) and proximal >= 0):
        raise ConfigError(f"proximal must be at least 0, got {proximal}.")
    if on_merge not in ("keep", "reset"):
        raise ConfigError(f"on_merge must be keep or reset, got {on_merge!r}.")
