from __future__ import annotations

import numpy as np
import pytest

from p2pfl_torrent.cli.task import THREADS_VARIABLE, limit_threads, load_tasks, part_of
from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.learning.state import describe, snapshot


def test_the_parts_are_a_cut_of_all_data() -> None:
    whole, *parts = load_tasks(PeerConfig(), 3, [0, 1, 2, 3])
    assert sum(len(part.train) for part in parts) == len(whole.train)
    again = load_tasks(PeerConfig(), 3, [2])[0]
    assert np.array_equal(again.train.x, parts[1].train.x)
    assert all(np.array_equal(part.test.x, whole.test.x) for part in parts)


def test_the_configuration_changes_the_recipe() -> None:
    config = PeerConfig().with_values(
        task__epochs=7, task__lr=0.25, task__batch_size=5, task__partition="label_skew(2)"
    )
    [task] = load_tasks(config, 5, [1])
    recipe = task.recipe
    assert (recipe.epochs, recipe.lr, recipe.batch_size) == (7, 0.25, 5)
    assert len(np.unique(task.train.y)) == 2


def test_all_start_from_the_same_weights_and_shuffle_their_own_way() -> None:
    tasks = load_tasks(PeerConfig(), 2, [0, 1, 2])
    trainers = [task.trainer() for task in tasks]
    spec = describe(trainers[0].model)
    starts = [snapshot(trainer.model, spec) for trainer in trainers]
    for start in starts[1:]:
        assert all(np.array_equal(start[name], starts[0][name]) for name in start)
    other = load_tasks(PeerConfig().with_values(swarm__seed=1), 2, [1])[0].trainer()
    drawn = snapshot(other.model, spec)
    assert any(not np.array_equal(drawn[name], starts[0][name]) for name in drawn)


def test_a_score_has_loss_and_accuracy() -> None:
    [task] = load_tasks(PeerConfig(), 2, [1])
    scores = task.score(task.trainer().model)
    assert 0 <= scores["accuracy"] <= 0.4  # untrained
    assert scores["loss"] > 1


def test_the_command_line_goes_before_the_configuration() -> None:
    config = PeerConfig().with_values(task__part=2, task__parts=4)
    assert part_of(None, config) == (2, 4)
    assert part_of((1, 3), config) == (1, 3)
    assert part_of(None, config.with_values(task__parts=0, federate__client_num=9)) == (2, 9)


@pytest.mark.parametrize("written", ["0", "-1", "many", "", "9999"])
def test_threads_must_be_a_number(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS_VARIABLE, written)
    with pytest.raises(ConfigError, match="must be a number of threads"):
        limit_threads()
