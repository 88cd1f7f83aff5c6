"""One peer of an experiment: trains on its part of the task, and ranks its chunks."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.learning.tasks import Samples, Task
from p2pfl_torrent.config import ChunkSection, PeerConfig
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.tensors import Arrays
from p2pfl_torrent.learning.gradients import GradientStats
from p2pfl_torrent.learning.state import describe, load_arrays, snapshot
from p2pfl_torrent.peer.scoring import ImportanceScorer, chosen_method
from p2pfl_torrent.simulation.federation import LastDelivered

ROTATIONS = ("rotation", "rotation in step")
SAMPLED = "fisher per sample"

Distort = Callable[[Arrays, Arrays], Arrays]
"""What a lying peer makes of (the round's start, the trained weights)."""


class TaskLearner:
    """Local training as FedAvg has it; chunks ranked by the product's own scorer.

    Args:
        place: of this peer among ``peers``, from 0; the owner's place in the rotations.
        order: an ``importance_method``, one of ``ROTATIONS``, or ``SAMPLED``, which is Fisher by
            per-sample gradients of all the data and not of the mini-batches.
        model: shared by all learners of a run, which train one after the other.
        seconds: of virtual time that the training of a round takes.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        layout: Layout,
        place: int,
        peers: int,
        *,
        order: str,
        seed: int,
        seconds: float,
        distort: Distort | None = None,
    ) -> None:
        self._task = task
        self._model = model
        self._spec = describe(model)
        self._part: Samples = task.parts[place]
        self._place, self._peers = place, peers
        self._order = order
        self._generator = torch.Generator().manual_seed(1000 * seed + place)
        self._seconds = seconds
        self._distort = distort
        self._round = 0
        self._start: Arrays | None = None
        self._stats = self._gradients()
        self._scorer: ImportanceScorer | None = None
        if order not in ROTATIONS:
            rng = random.Random(f"{seed} {place}")
            section = self._section()
            method = chosen_method(section, None, self._stats)
            self._scorer = ImportanceScorer(section, method, layout, rng, self._stats)

    def _gradients(self) -> GradientStats:
        if self._order == SAMPLED:
            samples = (self._part.x, self._part.y)
            return GradientStats(self._model, loss=self._task.loss, samples=samples)
        return GradientStats(self._model)

    def _section(self) -> ChunkSection:
        method = "fisher" if self._order == SAMPLED else self._order
        return PeerConfig().with_values(chunk__importance_method=method).chunk

    def train(self, round: int, start: Arrays) -> tuple[Arrays, int]:
        """(trained weights, number of samples)."""
        self._round, self._start = round, start
        load_arrays(self._model, self._spec, start)
        optimizer = self._task.optimizer(self._model.parameters())
        for _ in range(self._task.epochs):
            order = torch.randperm(len(self._part), generator=self._generator)
            for batch in torch.split(order, self._task.batch_size):
                optimizer.zero_grad()
                loss = self._task.loss(self._model(self._part.x[batch]), self._part.y[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                self._stats.on_before_step()
                optimizer.step()
        trained = snapshot(self._model, self._spec)
        if self._distort is not None:
            return self._distort(start, trained), len(self._part)
        return trained, len(self._part)

    def ranks(self, layout: Layout, trained: Arrays, last: LastDelivered) -> list[int]:
        """Importance of each chunk, 0 for the least."""
        chunks = len(layout.chunks)
        if self._order == "rotation in step":
            return list(range(chunks))
        if self._scorer is None:
            offset = self._place * chunks // self._peers
            return [(chunk + offset) % chunks for chunk in range(chunks)]

        def start() -> Arrays:
            assert self._start is not None
            return self._start

        return self._scorer.ranks(self._round, trained, last, start)

    def training_seconds(self, round: int) -> float:
        """Virtual seconds of a round's training."""
        return self._seconds
