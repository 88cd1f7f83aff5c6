from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from p2pfl_torrent.cli import main
from p2pfl_torrent.cli.arguments import parse
from p2pfl_torrent.cli.join import configured
from p2pfl_torrent.cli.task import (
    THREADS_VARIABLE,
    Task,
    limit_threads,
    load_tasks,
    part_of,
    prepare_data,
)
from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.learning.datasets import DATA_VARIABLE, Dataset
from p2pfl_torrent.learning.partition import parse as parse_partition
from p2pfl_torrent.learning.recipes import RECIPES
from p2pfl_torrent.learning.state import describe, snapshot

EXAMPLE = str(Path(__file__).resolve().parent.parent.parent / "examples" / "swarm.yaml")


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


def write_idx(folder: Path, images: int) -> None:
    """MNIST's four files with few images, each label as often as any other."""
    rng = np.random.default_rng(0)
    for half in ("train", "t10k"):
        pixels = rng.integers(0, 256, (images, 28, 28), np.uint8)
        labels = np.arange(images, dtype=np.uint8) % 10
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{half}-{name}-ubyte").write_bytes(header + array.tobytes())


def test_mnist_is_read_from_the_folder_that_the_command_names(tmp_path: Path) -> None:
    write_idx(tmp_path, 60)
    arguments = ["join", EXAMPLE, "--recipe", "mnist", "--data", str(tmp_path)]
    config = configured(parse(arguments)).with_values(task__partition="iid")
    prepare_data(config.task)
    [task] = load_tasks(config, 3, [2])
    assert (len(task.train), len(task.test), task.train.in_shape) == (20, 60, (1, 28, 28))
    result = task.trainer().train(1)
    assert result.batches == 1
    assert 1 < result.loss < 5  # of values in 0..1: pixels up to 255 give hundreds


def test_missing_data_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    for command in (["demo"], ["join", EXAMPLE, "--part", "1/2"]):
        assert main([*command, "--recipe", "mnist"]) == 1
        assert capsys.readouterr().err.startswith(
            "p2pfl-torrent: No folder of data files: name it with --data DIR"
        )
        assert main([*command, "--recipe", "mnist", "--data", str(tmp_path)]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(
            f"p2pfl-torrent: train-images-idx3-ubyte is not in {tmp_path}: put MNIST's four IDX"
        )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_demo_of_another_recipe(tmp_path: Path) -> None:
    write_idx(tmp_path, 100)
    told = tmp_path / "told.json"
    arguments = ["--recipe", "mnist", "--data", ".", "--peers", "2", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "p2pfl_torrent", "demo", *arguments, "--json", str(told)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(told.read_text())
    [round] = result["rounds"]
    assert round["completeness"] == 1.0
    # 105,866 weights of four bytes from each peer to the other: the recipe's model, not digits'.
    assert round["bytes_payload"] > 2 * 4 * 105_866


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_trained(recipe: str) -> None:
    settings = RECIPES[recipe]
    shape = (3, 32, 32) if "CIFAR10" in settings.dataset else (1, 28, 28)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, *shape), np.uint8)
    data = Dataset(pixels, np.arange(8, dtype=np.int64), 10)
    task = Task(settings, data, data, 0, 1)
    trainer = task.trainer()
    before = task.score(trainer.model)["loss"]
    trainer.train(20)
    assert task.score(trainer.model)["loss"] < before - 0.5
    parse_partition(settings.partition)


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
