"""The built-in training task of ``join`` and ``demo``: data, model and settings of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from p2pfl_torrent.config import TaskSection
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.learning.datasets import Dataset, load
from p2pfl_torrent.learning.partition import partition
from p2pfl_torrent.learning.recipes import RECIPES, Recipe


@dataclass(frozen=True, slots=True)
class Task:
    """One peer's share of a training task.

    Attributes:
        train: this peer's data; test: what every peer is scored on.
        everything: all peers' data, for the central baseline.
    """

    recipe: Recipe
    train: Dataset
    test: Dataset
    everything: Dataset
    seed: int


def recipe_of(section: TaskSection) -> Recipe:
    """The recipe with the configuration's changes."""
    recipe = RECIPES.get(section.recipe)
    if recipe is None:
        raise ConfigError(
            f"task.recipe: {section.recipe!r} is not known; use one of {', '.join(RECIPES)}."
        )
    return replace(
        recipe,
        partition=section.partition or recipe.partition,
        epochs=section.epochs or recipe.epochs,
        batch_size=section.batch_size or recipe.batch_size,
        lr=section.lr or recipe.lr,
    )


def load_task(section: TaskSection, seed: int, part: int, parts: int) -> Task:
    """Part ``part`` (from 1) of ``parts`` of the recipe's data, the same cut on every peer."""
    recipe = recipe_of(section)
    train, test = load(recipe.dataset, Path(section.data_root) if section.data_root else None)
    cut = partition(recipe.partition, train.y, parts, np.random.default_rng(seed))
    return Task(recipe, train.subset(cut[part - 1]), test, train, seed)


def use_one_thread() -> None:
    """Small models train fastest on one thread, and many peers share a machine."""
    from p2pfl_torrent.learning.trainer import set_threads

    set_threads(1)


def score(task: Task, model: object) -> Mapping[str, float]:
    """Loss and accuracy on the test data."""
    from p2pfl_torrent.learning.trainer import evaluate

    result = evaluate(model, task.test)  # type: ignore[arg-type]  # a torch module
    return {"loss": result.loss, "accuracy": result.accuracy}


def baseline(task: Task, data: Dataset, rounds: int) -> float:
    """Accuracy after as many epochs on ``data`` alone, from the same start weights."""
    from p2pfl_torrent.learning.models import build
    from p2pfl_torrent.learning.trainer import Trainer, evaluate

    recipe = task.recipe
    model = build(recipe.model, data.in_shape, data.classes, task.seed)
    trainer = Trainer(
        model,
        data,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        momentum=recipe.momentum,
        seed=task.seed,
    )
    trainer.train(rounds * recipe.epochs)
    return evaluate(model, task.test).accuracy
