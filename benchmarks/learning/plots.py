"""Accuracy by round, drawn: a panel for each group of conditions. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.learning.experiments import Experiment
from benchmarks.learning.run import Condition, Row


def draw(rows: Sequence[Row], experiment: Experiment, path: Path) -> None:
    """Write the image; its kind by the name's end."""
    groups: dict[tuple[object, ...], list[Condition]] = {}
    for condition in experiment.conditions:
        key = tuple(getattr(condition, name) for name in experiment.within)
        groups.setdefault(key, []).append(condition)
    width = len(groups)
    figure = Figure(figsize=(1.5 + 4.5 * width, 6.5))
    axes = figure.subplots(1, width, squeeze=False)
    inner = [name for name in experiment.varied if name not in experiment.within]
    colours = colormaps["tab20"]
    for axis, (key, conditions) in zip(axes[0], groups.items(), strict=True):
        for number, condition in enumerate(conditions):
            runs = [row.accuracy for row in rows if row.condition == condition]
            if runs:
                label = ", ".join(str(getattr(condition, name)) for name in inner)
                curve = [fmean(values) for values in zip(*runs, strict=True)]
                style = "-" if number % 2 == 0 else "--"  # so that neighbours differ in print, too
                axis.plot(
                    range(1, len(curve) + 1), curve, style, label=label, color=colours(number % 20)
                )
        axis.set_title(
            ", ".join(f"{name} {value}" for name, value in zip(experiment.within, key, strict=True))
        )
        axis.set_xlabel("round")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6, loc="lower right", title=", ".join(inner), title_fontsize=6)
    axes[0][0].set_ylabel("accuracy, mean over peers and seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
