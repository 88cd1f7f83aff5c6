"""One round of a real swarm: every member shares an update with all others.

    python -m benchmarks exchange --peers 10 --megabytes 23.5 --topology full --json -

Processes on this machine, with the real protocol, store and aggregation. A round's seconds run from
the moment all may begin until the last has every update (``seconds``), and until the last has
averaged them (``seconds_merged``).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.fleet import Process, members
from benchmarks.member import Spec
from benchmarks.output import add_json, median, write


@dataclass(frozen=True, slots=True)
class Round:
    """One round's figures; memory in 10^6 bytes, of the member with most.

    Attributes:
        cpu_seconds: of all members, from the call of exchange to the aggregate.
        duplicate_ratio: payload bytes received twice over those received once.
        control_ratio: all other bytes on the chunk streams over the payload.
        upload_spread: the most that a member uploaded over the mean.
    """

    seconds: float
    seconds_merged: float
    cpu_seconds: float
    duplicate_ratio: float
    control_ratio: float
    upload_spread: float
    rss_idle_mb: float
    rss_peak_mb: float
    hashes_equal: bool
    complete: bool


def specs(peers: int, megabytes: float, topology: dict[str, object], rounds: int) -> list[Spec]:
    """Members of a swarm that share noise for so many rounds."""
    config: dict[str, object] = {
        "federate": {"client_num": peers, "total_round_num": rounds + 1, "join_timeout": 300.0},
        "topology": topology,
        "bittorrent": {"timeout": 600.0},
    }
    return [Spec(config, place, megabytes) for place in range(peers)]


def one_round(fleet: Sequence[Process]) -> Round:
    """Let all exchange once."""
    for process in fleet:
        process.say("round")
    idle = [process.hear("trained")["idle"] for process in fleet]
    for process in fleet:
        process.say("go")
    rows = [process.hear("hash") for process in fleet]
    return _figures(rows, idle)


def _figures(rows: Sequence[dict[str, Any]], idle: Sequence[int]) -> Round:
    payload = sum(row["payload"] for row in rows)
    uploads = [row["uploaded"] for row in rows]
    return Round(
        seconds=max(row["exchange_seconds"] for row in rows),
        seconds_merged=max(row["seconds"] for row in rows),
        cpu_seconds=sum(row["cpu_seconds"] for row in rows),
        duplicate_ratio=sum(row["duplicate"] for row in rows) / payload,
        control_ratio=sum(row["control"] for row in rows) / payload,
        upload_spread=max(uploads) * len(uploads) / sum(uploads),
        rss_idle_mb=max(idle) / 1e6,
        rss_peak_mb=max(row["peak"] for row in rows) / 1e6,
        hashes_equal=len({row["hash"] for row in rows}) == 1,
        complete=all(row["closed_by"] == "complete" for row in rows),
    )


def measure(peers: int, megabytes: float, topology: dict[str, object], rounds: int) -> list[Round]:
    """So many rounds of one swarm, after one that is not counted."""
    with tempfile.TemporaryDirectory(prefix="p2pfl-benchmark-") as directory:
        with members(specs(peers, megabytes, topology, rounds + 1), Path(directory)) as fleet:
            one_round(fleet)  # edges open, files there, rates measured: as in any later round
            return [one_round(fleet) for _ in range(rounds)]


def main(argv: Sequence[str]) -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks exchange", description="One round of a real swarm."
    )
    parser.add_argument("--peers", type=int, default=10, metavar="N")
    parser.add_argument("--megabytes", type=float, default=23.5, metavar="M", help="of an update")
    parser.add_argument("--topology", default="full", help="full, ring, star, tree or mesh")
    parser.add_argument("--connections", type=int, default=3, metavar="N", help="of a mesh")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured")
    add_json(parser)
    args = parser.parse_args(argv)
    topology: dict[str, object] = {"type": args.topology, "connections": args.connections}
    rounds = measure(args.peers, args.megabytes, topology, args.rounds)
    result = summary(rounds)
    write(args.json, {**result, "runs": [asdict(each) for each in rounds]}, table(rounds, result))
    return 0 if result["hashes_equal"] else 1


def summary(rounds: Sequence[Round]) -> dict[str, object]:
    """Medians over the rounds; worst of what must hold in each."""
    rows = [asdict(each) for each in rounds]
    medians: dict[str, object] = {
        name: median([row[name] for row in rows])
        for name, value in rows[0].items()
        if not isinstance(value, bool)
    }
    return {
        **medians,
        "hashes_equal": all(each.hashes_equal for each in rounds),
        "complete": all(each.complete for each in rounds),
    }


def table(rounds: Sequence[Round], result: dict[str, object]) -> list[str]:
    """The rounds and their medians, for people."""
    names = [name for name in asdict(rounds[0]) if name not in ("hashes_equal", "complete")]
    rows = [asdict(each) for each in rounds]
    lines = ["".join(f"{name:>17}" for name in names)]
    lines += ["".join(f"{row[name]:17.4f}" for name in names) for row in (*rows, result)]
    equal = "equal" if result["hashes_equal"] else "NOT equal"
    return [*lines, f"medians in the last line; models {equal}"]
