"""What a round costs when there is next to nothing to send: its protocol time.

    python -m benchmarks rounds --peers 10 --kilobytes 36 --json -

Processes on this machine in a full mesh. A round's protocol time is the longest, among its members,
from the call of exchange to the aggregate; all call at once, since none trains.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.exchange import specs
from benchmarks.fleet import Process, members
from benchmarks.member import Spec
from benchmarks.output import add_json, median, write


@dataclass(frozen=True, slots=True)
class Round:
    """One round's figures.

    Attributes:
        protocol_seconds: of the slowest member.
        cpu_seconds: of all members, from the call of exchange to the aggregate.
        gossip_deliveries: messages that came to any member by gossip since the round before, the
            second copies too: each has its cost.
        gossip_duplicates: those second copies alone.
    """

    protocol_seconds: float
    cpu_seconds: float
    gossip_deliveries: int
    gossip_duplicates: int
    hashes_equal: bool


Rows = Sequence[dict[str, Any]]
"""The members' answers after a round."""


def one_round(fleet: Sequence[Process]) -> Rows:
    """Let all exchange once."""
    for process in fleet:
        process.say("round")
    for process in fleet:
        process.hear("trained")
    for process in fleet:
        process.say("go")
    return [process.hear("hash") for process in fleet]


def figures(before: Rows, rows: Rows) -> Round:
    """What the members' answers say, after those to the round before."""
    once, twice = (
        sum(row[name] for row in rows) - sum(row[name] for row in before)
        for name in ("gossip_delivered", "gossip_twice")
    )
    return Round(
        protocol_seconds=max(row["seconds"] for row in rows),
        cpu_seconds=sum(row["cpu_seconds"] for row in rows),
        gossip_deliveries=once + twice,
        gossip_duplicates=twice,
        hashes_equal=len({row["hash"] for row in rows}) == 1,
    )


TENSOR_KILOBYTES = 4.0  # the least that a member's tensors have


def small(spec: Spec) -> Spec:
    """The same member with as few tensors as make a small model."""
    return replace(
        spec, tensors=max(1, min(spec.tensors, int(spec.megabytes * 1e3 / TENSOR_KILOBYTES)))
    )


def measure(peers: int, kilobytes: float, topology: dict[str, object], rounds: int) -> list[Round]:
    """So many rounds of one swarm, after one that is not counted."""
    swarm = [small(spec) for spec in specs(peers, kilobytes / 1e3, topology, rounds + 1)]
    with tempfile.TemporaryDirectory(prefix="p2pfl-benchmark-") as directory:
        with members(swarm, Path(directory)) as fleet:
            answers = [one_round(fleet) for _ in range(rounds + 1)]
    return [figures(before, rows) for before, rows in pairwise(answers)]


def main(argv: Sequence[str]) -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks rounds", description="Protocol time of a round."
    )
    parser.add_argument("--peers", type=int, default=10, metavar="N")
    parser.add_argument("--kilobytes", type=float, default=36.0, metavar="K", help="of an update")
    parser.add_argument("--topology", default="full", help="full, ring, star, tree or mesh")
    parser.add_argument("--connections", type=int, default=3, metavar="N", help="of a mesh")
    parser.add_argument("--rounds", type=int, default=50, metavar="N")
    add_json(parser)
    args = parser.parse_args(argv)
    topology: dict[str, object] = {"type": args.topology, "connections": args.connections}
    rounds = measure(args.peers, args.kilobytes, topology, args.rounds)
    result = summary(rounds)
    write(args.json, {**result, "runs": [asdict(each) for each in rounds]}, table(result))
    return 0 if result["hashes_equal"] else 1


def summary(rounds: Sequence[Round]) -> dict[str, object]:
    """Over all rounds."""
    seconds = sorted(each.protocol_seconds for each in rounds)
    return {
        "protocol_seconds_median": median(seconds),
        "protocol_seconds_p90": seconds[int(0.9 * (len(seconds) - 1))],
        "cpu_seconds_per_round": median([each.cpu_seconds for each in rounds]),
        "gossip_deliveries_per_round": sum(each.gossip_deliveries for each in rounds) / len(rounds),
        "gossip_duplicates_per_round": sum(each.gossip_duplicates for each in rounds) / len(rounds),
        "hashes_equal": all(each.hashes_equal for each in rounds),
    }


def table(result: dict[str, object]) -> list[str]:
    """For people."""
    return [
        f"{name:30}{value:10.3f}" if isinstance(value, float) else f"{name:30}{value!s:>10}"
        for name, value in result.items()
    ]
