"""What a peer takes of memory: idle beside a bare py-libp2p host, and at most in an exchange.

    python -m benchmarks memory --updates 10,20 --megabytes 23.5 --large 4x498 --json -

Anonymous resident memory: what is mapped from files is the kernel's to take back. Every exchange is
a full mesh of as many processes as there are updates, without torch, with the real protocol, store
and aggregation. The peaks are above idle, of the peer with most: the peer's own update, which in
training is the user's model, is in them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.exchange import one_round, specs
from benchmarks.fleet import Process, members
from benchmarks.output import add_json, median, write

REPEATS = 5  # of the processes that only idle


@dataclass(frozen=True, slots=True)
class Exchange:
    """One mesh of peers; memory in 10^6 bytes.

    Attributes:
        idle_mb: of the peer with most, before it has an update.
        peak_above_idle_mb: most that any peer took more than that, its own update included.
        after_mb: of the peer with most, when its update is gone again.
    """

    peers: int
    megabytes: float
    rounds: int
    idle_mb: float
    peak_above_idle_mb: float
    after_mb: float
    seconds: float
    hashes_equal: bool
    complete: bool

    @property
    def peak_without_update_mb(self) -> float:
        """Most above idle, the peer's own update taken off."""
        return self.peak_above_idle_mb - self.megabytes


def bare_host() -> float:
    """10^6 bytes that a py-libp2p host takes."""
    with tempfile.TemporaryFile() as errors:
        process = Process("bare host", ["-m", "benchmarks.bare_host"], errors)
        try:
            return float(process.hear("anonymous")["anonymous"]) / 1e6
        finally:
            process.end()


def resident(fleet: Sequence[Process]) -> list[float]:
    """10^6 bytes that each of the members takes now."""
    for process in fleet:
        process.say("memory")
    return [process.hear("anonymous")["anonymous"] / 1e6 for process in fleet]


def exchange(peers: int, megabytes: float, rounds: int) -> Exchange:
    """A mesh of members, watched."""
    with tempfile.TemporaryDirectory(prefix="p2pfl-benchmark-") as directory:
        wanted = specs(peers, megabytes, {"type": "full"}, rounds)
        with members(wanted, Path(directory)) as fleet:
            idle = max(resident(fleet))
            done = [one_round(fleet) for _ in range(rounds)]
            return Exchange(
                peers=peers,
                megabytes=megabytes,
                rounds=rounds,
                idle_mb=idle,
                peak_above_idle_mb=max(each.rss_peak_mb for each in done) - idle,
                after_mb=max(resident(fleet)),
                seconds=max(each.seconds_merged for each in done),
                hashes_equal=all(each.hashes_equal for each in done),
                complete=all(each.complete for each in done),
            )


def idle_peer() -> float:
    """10^6 bytes that a member of two takes before it has an update."""
    with tempfile.TemporaryDirectory(prefix="p2pfl-benchmark-") as directory:
        with members(specs(2, 1.0, {"type": "full"}, 1), Path(directory)) as fleet:
            return resident(fleet)[0]


def main(argv: Sequence[str]) -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory", description="What a peer takes of memory."
    )
    parser.add_argument("--updates", default="10,20", metavar="A,B", help="peers of each mesh")
    parser.add_argument("--megabytes", type=float, default=23.5, metavar="M", help="of an update")
    parser.add_argument("--large", default="4x498", metavar="NxM", help="one more mesh; 0 for none")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="in each mesh")
    add_json(parser)
    args = parser.parse_args(argv)
    pairs = [(bare_host(), idle_peer()) for _ in range(REPEATS)]
    meshes = [(int(peers), args.megabytes) for peers in args.updates.split(",") if peers]
    if args.large != "0":
        peers, _, megabytes = args.large.partition("x")
        meshes.append((int(peers), float(megabytes)))
    done = [exchange(peers, megabytes, args.rounds) for peers, megabytes in meshes]
    result: dict[str, object] = {
        "bare_host_mb": median([bare for bare, _ in pairs]),
        "idle_peer_mb": median([idle for _, idle in pairs]),
        "idle_above_bare_mb": median([idle - bare for bare, idle in pairs]),
        "exchanges": [
            {**asdict(each), "peak_without_update_mb": each.peak_without_update_mb} for each in done
        ],
    }
    write(args.json, result, table(result, done))
    return 0 if all(each.hashes_equal and each.complete for each in done) else 1


def table(result: dict[str, object], done: Sequence[Exchange]) -> list[str]:
    """For people."""
    names = ("bare_host_mb", "idle_peer_mb", "idle_above_bare_mb")
    lines = [f"{name:24}{result[name]:10.1f}" for name in names]
    head = ("peers", "update MB", "idle MB", "peak - idle", "less update", "after MB", "seconds")
    lines.append("".join(f"{name:>13}" for name in head) + "  models")
    for each in done:
        figures = (
            each.megabytes,
            each.idle_mb,
            each.peak_above_idle_mb,
            each.peak_without_update_mb,
            each.after_mb,
            each.seconds,
        )
        row = f"{each.peers:13}" + "".join(f"{figure:13.1f}" for figure in figures)
        equal = "equal" if each.hashes_equal else "NOT equal"
        lines.append(f"{row}  {equal}{'' if each.complete else ', NOT complete'}")
    return lines
