"""What the rows of an experiment say, condition by condition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

from benchmarks.learning.experiments import Experiment
from benchmarks.learning.run import Condition, Row
from benchmarks.learning.tasks import TARGETS

EARLY = 10  # the round after which an early accuracy is told


def rounds_to(accuracy: Sequence[float], target: float) -> float:
    """Rounds until a curve first reaches the target, between two rounds in proportion.

    Infinite where it does not.
    """
    before = 0.0
    for number, value in enumerate(accuracy):
        if value >= target:
            part = (target - before) / (value - before) if value > before else 1.0
            return number + part if number else 1.0
        before = value
    return math.inf


def seconds_to(row: Row, target: float) -> float:
    """Virtual seconds until half of the peers had merged the round that reached the target."""
    for value, seconds in zip(row.accuracy, row.seconds, strict=True):
        if value >= target:
            return seconds
    return math.inf


def summary(rows: Sequence[Row], experiment: Experiment) -> list[dict[str, Any]]:
    """A line for each condition: means over its seeds, and how it stands to its baseline."""
    lines = []
    for condition in experiment.conditions:
        mine = _of(rows, condition)
        if not mine:
            continue
        base = _of(rows, _baseline(experiment, condition))
        target = TARGETS[condition.task]
        final = [row.accuracy[-1] for row in mine]
        early = min(EARLY, condition.rounds) - 1
        reached = fmean(rounds_to(row.accuracy, target) for row in mine)
        line: dict[str, Any] = {name: getattr(condition, name) for name in experiment.varied}
        line |= {
            "seeds": len(mine),
            "rounds_to_target": reached,
            "seconds_to_target": fmean(seconds_to(row, target) for row in mine),
            "accuracy_early": fmean(row.accuracy[early] for row in mine),
            "accuracy_final": fmean(final),
            "accuracy_final_deviation": stdev(final) if len(final) > 1 else 0.0,
            "completeness": fmean(fmean(row.completeness) for row in mine),
            "bytes": fmean(row.payload_bytes for row in mine),
            "models_final": fmean(row.models[-1] for row in mine),
        }
        if base:
            others = fmean(rounds_to(row.accuracy, target) for row in base)
            line["speed_up"] = others / reached
            line["early_points"] = 100 * (
                line["accuracy_early"] - fmean(row.accuracy[early] for row in base)
            )
            line["final_points"] = 100 * (
                line["accuracy_final"] - fmean(row.accuracy[-1] for row in base)
            )
        lines.append({name: _finite(value) for name, value in line.items()})
    return lines


def _finite(value: object) -> object:
    """None, which JSON knows, for what was not reached."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(lines: Sequence[dict[str, Any]], experiment: Experiment) -> list[str]:
    """The same in Markdown."""
    if not lines:
        return ["no runs"]
    head = f"| {' | '.join(lines[0])} |"
    rows = [f"| {' | '.join(_shown(value) for value in line.values())} |" for line in lines]
    return [head, "|" + " --- |" * len(lines[0]), *rows]


def _of(rows: Sequence[Row], condition: Condition) -> list[Row]:
    return [row for row in rows if row.condition == condition]


def _baseline(experiment: Experiment, condition: Condition) -> Condition:
    changes = {name: getattr(condition, name) for name in experiment.within}
    return replace(experiment.baseline, **changes)


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3f}".rstrip("0").rstrip(".")
    return str(value)
