"""One peer of an experiment: trains on its part of the task, and ranks its chunks."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.learning.tasks import Samples, Task
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.importance import change_scores, l2_norm_scores, random_scores, rank
from p2pfl_torrent.core.tensors import Arrays
from p2pfl_torrent.learning.state import describe, load_arrays, snapshot
from p2pfl_torrent.simulation.federation import LastDelivered


class TaskLearner:
    """Local SGD, as FedAvg has it.

    Args:
        place: of this peer among ``peers``, from 0; the owner's place in the rotations.
        order: how chunks are ranked, one of ``ORDERS``.
        model: shared by all learners of a run, which train one after the other.
        seconds: of virtual time that the training of a round takes.
        distort: what a lying peer does to its update, given the start and the trained weights.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        place: int,
        peers: int,
        *,
        order: str,
        seed: int,
        seconds: float = 10.0,
        distort: Callable[[Arrays, Arrays], Arrays] | None = None,
    ) -> None:
        self._task = task
        self._model = model
        self._spec = describe(model)
        self._part: Samples = task.parts[place]
        self._place, self._peers = place, peers
        self._order = order
        self._rng = random.Random(f"{seed} {place}")
        self._generator = torch.Generator().manual_seed(1000 * seed + place)
        self._seconds = seconds
        self._distort = distort

    def train(self, round: int, start: Arrays) -> tuple[Arrays, int]:
        """(trained weights, number of samples)."""
        load_arrays(self._model, self._spec, start)
        optimizer = self._task.optimizer(self._model.parameters())
        for _ in range(self._task.epochs):
            order = torch.randperm(len(self._part), generator=self._generator)
            for batch in torch.split(order, self._task.batch_size):
                optimizer.zero_grad()
                loss = self._task.loss(self._model(self._part.x[batch]), self._part.y[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        trained = snapshot(self._model, self._spec)
        if self._distort is not None:
            return self._distort(start, trained), len(self._part)
        return trained, len(self._part)

    def ranks(self, layout: Layout, trained: Arrays, last: LastDelivered) -> list[int]:
        """Importance of each chunk, 0 for the least."""
        chunks = len(layout.chunks)
        if self._order == "random":
            return rank(random_scores(layout, self._rng))
        if self._order == "rotation in step":
            return list(range(chunks))
        if self._order == "rotation":
            offset = self._place * chunks // self._peers
            return [(chunk + offset) % chunks for chunk in range(chunks)]
        if self._order == "l2_norm":
            scores = l2_norm_scores(layout, trained, depth_boost=0.3, normalize_by_size=True)
            return rank(scores)
        return rank(change_scores(layout, trained, last))

    def training_seconds(self, round: int) -> float:
        """Virtual seconds of a round's training."""
        return self._seconds
