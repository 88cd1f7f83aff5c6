"""The experiments: which conditions are compared, and by what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.learning.learner import ROTATIONS, SAMPLED
from benchmarks.learning.run import Condition

METHODS = (  # the first two are looked at most closely
    "change",
    "fisher",
    SAMPLED,
    "snip",
    "magnitude",
    "delta",
    "l2_norm",
)


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


def importance(task: str = "mnist") -> Experiment:
    """(a) Which chunks first, where the deadline cuts rounds short."""
    first = Condition(task=task, selection="importance")
    random = replace(first, order="random", selection="random", fill="renormalise")
    best = [replace(first, order=order) for order in ("change", "fisher")]
    brief = [random, replace(random, fill="last"), *best]
    brief += [replace(policy, fill_decay=0.5) for policy in best]
    usual = [*brief, replace(best[1], fill="renormalise")]
    wide = [replace(first, order=order) for order in (*ROTATIONS, *METHODS[2:])]
    wide += [replace(policy, ages=False, fill="renormalise") for policy in best]
    by_fraction = {0.1: [*usual, *wide], 0.2: [*usual, *wide], 0.4: usual, 0.7: brief}
    return Experiment(
        what="which chunks first, by the share of the bytes that the deadline lets through",
        conditions=[replace(p, fraction=f) for f, chosen in by_fraction.items() for p in chosen],
        varied=("fraction", "order", "ages", "fill", "fill_decay"),
        baseline=random,
        within=("fraction",),
    )


def fills() -> Experiment:
    """(b) What stands in for a chunk that did not come."""
    whole = Condition(rounds=15)
    rules = [replace(whole, fill=fill) for fill in ("last", "renormalise", "round_start")]
    rules.append(replace(whole, fill_decay=0.5))
    cut = [replace(rule, fraction=f) for f in (0.7, 0.4, 0.2) for rule in rules]
    return Experiment(
        what="what stands in for a chunk that did not come",
        conditions=[whole, *cut],
        varied=("fraction", "fill", "fill_decay"),
        baseline=whole,
    )


def churn() -> Experiment:
    """(c) Peers killed at random in each round and started again."""
    calm = Condition(rounds=15)
    return Experiment(
        what="30% of the peers killed at random in each round, and back half a minute later",
        conditions=[calm, replace(calm, killed=0.3)],
        varied=("killed",),
        baseline=calm,
    )


def attackers() -> Experiment:
    """(d) Peers whose updates go backwards and five times as far."""
    clean = Condition(rounds=10, scheme="iid")
    rules = ("fedavg", "fedmedian", "trimmed_mean", "multi_krum")
    return Experiment(
        what="a fifth of the peers send updates flipped and five times as large",
        conditions=[
            replace(clean, scheme=scheme, aggregator=rule, attackers=share)
            for scheme in ("iid", "dirichlet(0.3)")
            for rule in rules
            for share in (0.0, 0.2)
        ],
        varied=("scheme", "aggregator", "attackers"),
        baseline=clean,
        within=("scheme",),
    )


def compression() -> Experiment:
    """(e) What codecs save and cost, in 9 chunks of 8 KiB, as the product cuts so small a model."""
    plain = Condition(rounds=15, chunks=9)
    return Experiment(
        what="codecs of the chunks: bytes and accuracy",
        conditions=[
            plain,
            replace(plain, compression="fp16"),
            replace(plain, compression="bf16"),
            replace(plain, compression="int8"),
            replace(plain, compression="int8", delta=True),
            replace(plain, compression="topk", topk_share=0.1),
            replace(plain, compression="topk", topk_share=0.03),
        ],
        varied=("compression", "delta", "topk_share"),
        baseline=plain,
    )


def modes() -> Experiment:
    """(f) Who gets what, with one slow link in five."""
    swarm = Condition(rounds=15, slow=0.2, patient=True)
    return Experiment(
        what="exchange modes with every fifth link ten times slower, and all waited for",
        conditions=[
            swarm,
            replace(swarm, mode="neighbour", topology="mesh"),
            replace(swarm, mode="neighbour", topology="ring"),
            replace(swarm, mode="fragment", fragment_share=0.33),
            replace(swarm, mode="fragment", fragment_share=0.15),
        ],
        varied=("mode", "topology", "fragment_share"),
        baseline=swarm,
    )


def stragglers() -> Experiment:
    """(g) A deadline against waiting for all."""
    waiting = Condition(rounds=15, patient=True)
    return Experiment(
        what="a deadline beside waiting for all, with slow links or slow training",
        conditions=[
            replace(waiting, patient=patient, slow=slow, lagging=lagging)
            for slow, lagging in ((0.0, 0.0), (0.2, 0.0), (0.0, 0.2))
            for patient in (True, False)
        ],
        varied=("slow", "lagging", "patient"),
        baseline=waiting,
        within=("slow", "lagging"),
    )


def overlap() -> Experiment:
    """(g) A round exchanged while the next one is trained."""
    apart = Condition(rounds=15)
    return Experiment(
        what="exchange after training, or while the next round is trained",
        conditions=[apart, replace(apart, overlap=True)],
        varied=("overlap",),
        baseline=apart,
    )


EXPERIMENTS = {
    "importance": importance(),
    "importance-text": importance("text"),
    "fills": fills(),
    "churn": churn(),
    "attackers": attackers(),
    "compression": compression(),
    "modes": modes(),
    "stragglers": stragglers(),
    "overlap": overlap(),
}
