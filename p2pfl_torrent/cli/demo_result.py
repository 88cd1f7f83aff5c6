"""What came of a demo: each peer's reports folded into rounds, as tables and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from p2pfl_torrent.progress import views
from p2pfl_torrent.statistics import Joined, PeerEvent, RoundFinished, RoundReport


@dataclass(slots=True)
class PeerRecord:
    """What one peer logged that the result is made of: its last report of each round."""

    label: str
    peer_id: str = ""
    reports: dict[int, RoundReport] = field(default_factory=dict)

    def note(self, event: PeerEvent) -> None:
        """Take in an event."""
        if isinstance(event, Joined):
            self.peer_id = event.peer
        elif isinstance(event, RoundFinished):
            self.reports[event.report.round] = event.report

    @property
    def last(self) -> RoundReport | None:
        """Its report of the latest round."""
        return self.reports[max(self.reports)] if self.reports else None

    def shortfall(self, rounds: int) -> str | None:
        """Why this peer does not hold what the swarm ended with, in a sentence.

        A round that it was late for, or skipped, is none where it caught up: nothing is lost then.
        """
        last = self.last
        if last is not None and last.solo:
            return f"{self.label} was alone in round {last.round}."
        following = last.next_round if last is not None else 1
        return None if following > rounds else f"{self.label} did not finish round {following}."

    def late(self) -> list[RoundReport]:
        """Its reports of rounds that went on without its update."""
        return [report for _, report in sorted(self.reports.items()) if report.late]


@dataclass(frozen=True, slots=True)
class Baselines:
    """Accuracies with the same start weights and number of epochs, but without a swarm.

    Attributes:
        alone: each peer on its own data.
        central: all data in one place.
    """

    alone: tuple[float, ...]
    central: float


def by_round(records: Sequence[PeerRecord]) -> list[tuple[int, list[PeerRecord]]]:
    """Each round with the peers that finished it."""
    numbers = sorted({number for record in records for number in record.reports})
    return [(n, [record for record in records if n in record.reports]) for n in numbers]


def failure(records: Sequence[PeerRecord], rounds: int) -> str | None:
    """Why a demo is no success, in a sentence: not all peers ended with the swarm's one model."""
    for record in records:
        shortfall = record.shortfall(rounds)
        if shortfall is not None:
            return shortfall
    hashes = Counter(record.last.model_hash for record in records if record.last is not None)
    if len(hashes) > 1:
        each = ", ".join(f"{model[:8]} on {count}" for model, count in hashes.most_common())
        return f"The peers did not end with one model: {each}."
    return None


def conclude(console: Console, records: Sequence[PeerRecord], baselines: Baselines) -> None:
    """Print the rounds and the comparison."""
    rounds = [(n, [r.reports[n] for r in several]) for n, several in by_round(records)]
    console.print(views.rounds_table(rounds))
    for record in records:
        for report in record.late():
            late = f"{record.label} was too slow for round {report.round}"
            console.print(f"{late} and caught up with the others.", style="yellow")
    console.print()
    comparisons = []
    for record, alone in zip(records, baselines.alone, strict=True):
        last = record.last
        local, merged = (last.accuracy_before, last.accuracy_after) if last else (None, None)
        comparisons.append(views.Comparison(record.label, alone, local, merged))
    console.print(views.comparison_table(comparisons, baselines.central))


def result(records: Sequence[PeerRecord], baselines: Baselines, seconds: float) -> dict[str, Any]:
    """The demo's JSON."""
    return {
        "peers": len(records),
        "seconds": seconds,
        "accuracy_central": baselines.central,
        "accuracy_alone": baselines.alone,
        "rounds": [_round(number, several) for number, several in by_round(records)],
    }


def _round(number: int, records: Sequence[PeerRecord]) -> dict[str, Any]:
    """One round; its seconds are those of its slowest peer, from training to the aggregate."""
    reports = [record.reports[number] for record in records]
    return {
        "round": number,
        "seconds": max(r.metrics.get("train_seconds", 0.0) + r.seconds for r in reports),
        "exchange_seconds": max(r.seconds for r in reports),
        "completeness": sum(r.completeness for r in reports) / len(reports),
        "bytes_payload": sum(r.bytes_payload for r in reports),
        "bytes_duplicate": sum(r.bytes_duplicate for r in reports),
        "hashes_equal": len({r.model_hash for r in reports}) == 1,
        "peers": [
            {
                "peer_id": record.peer_id,
                "accuracy_local": report.accuracy_before,
                "accuracy_merged": report.accuracy_after,
                "model_hash": report.model_hash,
                "completeness": report.completeness,
                "viable": report.viable,
                "closed_by": report.closed_by,
                "late": report.late,
            }
            for record, report in zip(records, reports, strict=True)
        ],
    }
