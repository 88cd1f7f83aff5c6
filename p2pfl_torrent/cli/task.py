"""The built-in training task of ``join`` and ``demo``: data, model and settings of a recipe."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from p2pfl_torrent.config import PeerConfig, TaskSection
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.learning.datasets import Dataset, load, prepare
from p2pfl_torrent.learning.partition import parse, partition
from p2pfl_torrent.learning.recipes import RECIPES, OnMerge, Recipe

if TYPE_CHECKING:  # torch takes seconds to load; whoever only looks at a task does not wait for it
    from p2pfl_torrent.learning.state import Module
    from p2pfl_torrent.learning.trainer import Trainer

THREADS_VARIABLE = "P2PFL_TORRENT_THREADS"


@dataclass(frozen=True, slots=True)
class Task:
    """One peer's share of a training task.

    Attributes:
        train: the data of this part.
        test: what every peer is scored on.
        seed: of the start weights, the same on every peer.
        part: from 1; 0 is all data in one place.
    """

    recipe: Recipe
    train: Dataset
    test: Dataset
    seed: int
    part: int

    def trainer(self, on_merge: OnMerge = "keep") -> Trainer:
        """A trainer of a fresh model: the same start weights for every part, its own shuffling."""
        from p2pfl_torrent.learning.models import build
        from p2pfl_torrent.learning.trainer import Trainer

        recipe = self.recipe
        return Trainer(
            build(recipe.model, self.train.in_shape, self.train.classes, self.seed),
            self.train,
            batch_size=recipe.batch_size,
            lr=recipe.lr,
            momentum=recipe.momentum,
            seed=self.seed + self.part,
            on_merge=on_merge,
        )

    def score(self, model: Module) -> Mapping[str, float]:
        """Loss and accuracy on the test data."""
        from p2pfl_torrent.learning.trainer import evaluate

        result = evaluate(model, self.test)
        return {"loss": result.loss, "accuracy": result.accuracy}


def recipe_of(section: TaskSection) -> Recipe:
    """The recipe with the configuration's changes.

    Raises:
        ConfigError: there is no such recipe, or its data cannot be cut as the text says.
    """
    recipe = RECIPES.get(section.recipe)
    if recipe is None:
        close = difflib.get_close_matches(section.recipe, RECIPES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(RECIPES)}."
        raise ConfigError(f"task.recipe {section.recipe!r} is not known: {hint}")
    parse(section.partition or recipe.partition)
    return replace(
        recipe,
        partition=section.partition or recipe.partition,
        epochs=section.epochs or recipe.epochs,
        batch_size=section.batch_size or recipe.batch_size,
        lr=section.lr or recipe.lr,
    )


def part_of(given: tuple[int, int] | None, config: PeerConfig) -> tuple[int, int]:
    """Which part of how many is this peer's: the given one, or the configuration's.

    Raises:
        ConfigError: neither says, or there is no such part.
    """
    task = config.task
    part, parts = given or (task.part, task.parts or config.federate.client_num)
    if not part:
        raise ConfigError(
            f"Say which part of the data this peer trains on: --part K/{parts} with K from 1 to "
            f"{parts}, or task.part in the configuration."
        )
    if not 1 <= part <= parts:
        raise ConfigError(f"task.part is {part}, but the data is cut into {parts} parts.")
    return part, parts


def load_tasks(config: PeerConfig, parts: int, chosen: list[int]) -> list[Task]:
    """These parts (from 1; 0 is all data) of the recipe's data, cut alike on every peer.

    Raises:
        ConfigError: the data is not there, or cannot be cut into so many parts.
    """
    section, seed = config.task, config.swarm.seed
    recipe = recipe_of(section)
    train, test = load(recipe.dataset, section.data_root or None, download=section.download)
    cut = partition(recipe.partition, train.y, parts, np.random.default_rng(seed))
    return [
        Task(recipe, train.subset(cut[part - 1]) if part else train, test, seed, part)
        for part in chosen
    ]


def prepare_data(section: TaskSection) -> None:
    """See that the recipe's data is there, and fetch it where the configuration says so.

    Raises:
        ConfigError: it is not there.
    """
    prepare(recipe_of(section).dataset, section.data_root or None, download=section.download)


def limit_threads() -> None:
    """One thread unless the user wants more: small models gain nothing, and peers share cores."""
    from p2pfl_torrent.learning.trainer import set_threads

    written = os.environ.get(THREADS_VARIABLE, "1")
    if not written.isdecimal() or not 1 <= int(written) <= 1024:
        raise ConfigError(f"{THREADS_VARIABLE} is {written!r}: it must be a number of threads.")
    set_threads(int(written))
