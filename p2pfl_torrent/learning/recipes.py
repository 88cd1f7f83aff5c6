"""Tuned training settings, one per data set: the only place where they stand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train on one data set.

    Attributes:
        dataset: name for `datasets.load`.
        model: name for `models.build`.
        partition: scheme for `partition.partition`.
        epochs: local epochs of one round.
        rounds: rounds until the curve is flat.
        batch_size: upper bound of a mini-batch.
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        on_merge: what becomes of the momentum when weights are replaced by an aggregate.
    """

    dataset: str
    model: str
    partition: str
    epochs: int
    rounds: int
    batch_size: int
    lr: float
    momentum: float
    on_merge: str
