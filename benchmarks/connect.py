"""How fast a full mesh comes up: every member dials, meets and opens a chunk stream to all others.

    python -m benchmarks connect --peers 10 --json -

Processes on this machine with the real join, membership and dialling. All listen, and wait, before
the clock starts; it stops when every member has its own stream open on each of its links, so each
link twice. A link's time runs, at each of its two ends, from the moment it is wanted there, which
is when the other is known to be a member, until that end's stream is open.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.fleet import Process, gathered
from benchmarks.member import Spec
from benchmarks.output import add_json, median, write

KILOBYTES = 36.0  # of the model, which is not exchanged here


@dataclass(frozen=True, slots=True)
class Mesh:
    """One mesh coming up.

    Attributes:
        seconds: from all listening until every link has both streams open.
        longest_link_ms: of the end that waited longest.
        cpu_seconds: of all members in this time.
    """

    seconds: float
    links: int
    mean_link_ms: float
    longest_link_ms: float
    cpu_seconds: float


def specs(peers: int) -> list[Spec]:
    """Members that wait, listening, until they are told to go."""
    config: dict[str, object] = {
        "federate": {"client_num": peers, "total_round_num": 1, "join_timeout": 120.0},
        "topology": {"type": "full", "timeout": 120.0},
        "bittorrent": {"linger": 0.0},
    }
    return [Spec(config, place, KILOBYTES / 1e3, waits=True) for place in range(peers)]


def connected(fleet: Sequence[Process]) -> Mesh:
    """Let all that listen connect."""
    began = time.monotonic()
    for process in fleet:
        process.say("go")
    return figures([process.hear("ready") for process in fleet], began)


def figures(rows: Sequence[dict[str, Any]], began: float) -> Mesh:
    """What the members' answers say.

    Raises:
        ValueError: a link is missing.
    """
    times = [seconds for row in rows for seconds in row["links"].values()]
    ends = len(rows) * (len(rows) - 1)
    if len(times) != ends:
        raise ValueError(f"{len(times)} streams are open, not {ends}: some link did not come up")
    return Mesh(
        seconds=max(row["at"] for row in rows) - began,
        links=ends // 2,
        mean_link_ms=fmean(times) * 1e3,
        longest_link_ms=max(times) * 1e3,
        cpu_seconds=sum(row["cpu_seconds"] for row in rows),
    )


def measure(peers: int) -> Mesh:
    """One mesh of new processes."""
    with tempfile.TemporaryDirectory(prefix="p2pfl-benchmark-") as directory:
        with gathered(specs(peers), Path(directory)) as fleet:
            return connected(fleet)


def main(argv: Sequence[str]) -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks connect", description="How fast a full mesh comes up."
    )
    parser.add_argument("--peers", type=int, default=10, metavar="N")
    parser.add_argument("--runs", type=int, default=5, metavar="N")
    add_json(parser)
    args = parser.parse_args(argv)
    runs = [asdict(measure(args.peers)) for _ in range(args.runs)]
    middle: dict[str, object] = {name: median([run[name] for run in runs]) for name in runs[0]}
    table = ["".join(f"{name:>17}" for name in middle)]
    table += ["".join(f"{row[name]:17.3f}" for name in middle) for row in (*runs, middle)]
    write(args.json, {**middle, "runs": runs}, [*table, "medians in the last line"])
    return 0
