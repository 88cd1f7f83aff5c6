"""The experiments: which conditions are compared, and by what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.learning.run import Condition

FRACTIONS = (0.1, 0.2, 0.4, 0.7)
ORDERS = ("change", "l2_norm")


@dataclass(frozen=True, slots=True)
class Experiment:
    """Conditions to compare.

    Attributes:
        varied: fields of the conditions in which they differ, for the table.
        baseline: what the others are compared with, at equal ``within``.
        within: fields by which the conditions fall into groups.
    """

    what: str
    conditions: Sequence[Condition]
    varied: Sequence[str]
    baseline: Condition
    within: Sequence[str] = ()


def importance() -> Experiment:
    """(a) Which chunks first, where the deadline cuts rounds short."""
    random = Condition(order="random", selection="random", fill_max_age=0)
    policies = [
        random,
        replace(random, fill_max_age=5),
        Condition(order="rotation"),
        Condition(order="rotation in step"),
    ]
    for order in ORDERS:
        policies += [
            Condition(order=order),
            Condition(order=order, fill_max_age=0),
            Condition(order=order, ages=False),
            Condition(order=order, ages=False, fill_max_age=0),
        ]
    return Experiment(
        what="which chunks first, by the share of the bytes that the deadline lets through",
        conditions=[replace(p, fraction=f) for f in FRACTIONS for p in policies],
        varied=("fraction", "order", "ages", "fill_max_age"),
        baseline=random,
        within=("fraction",),
    )


def churn() -> Experiment:
    """(c) Peers killed at random in each round and started again."""
    calm = Condition(selection="rarest_first")
    return Experiment(
        what="30% of the peers killed at random in each round, and back in the next",
        conditions=[calm, replace(calm, killed=0.3)],
        varied=("killed",),
        baseline=calm,
    )


EXPERIMENTS = {"importance": importance(), "churn": churn()}
