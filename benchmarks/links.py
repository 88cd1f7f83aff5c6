"""A swarm on slow and unequal links, beside what the links allow and beside a central server.

    python -m benchmarks links --scenario seed --json -

Each peer has a network namespace of its own, whose link is shaped both ways; needs root and
iproute2. The model is scaled so that the bound for all-to-all multicast, from what each link was
measured to carry, is about a minute. There is one round without the scenario's crippled device,
which all must complete; one with it, which ends at a deadline; and the same links with a central
server on the best of them. No delay and no loss are added: what is shaped is the rate.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import links_star
from benchmarks.fleet import Process, gathered
from benchmarks.links_bound import Bound, Goodput, bound
from benchmarks.links_meter import measure as goodputs
from benchmarks.member import Spec
from benchmarks.output import add_json, write
from testnet.netns import Link, NetworkError, Place, carried, links

Device = tuple[str, Link]
MBIT = 1e6
EDGE: Device = ("edge server", Link(100 * MBIT, 1000 * MBIT))
HIGH: Device = ("high phone", Link(50 * MBIT, 100 * MBIT))
LOW: Device = ("low phone", Link(5 * MBIT, 20 * MBIT))
RASPBERRY: Device = ("Raspberry Pi", Link(10 * MBIT, 50 * MBIT))
IOT: Device = ("IoT device", Link(0.128 * MBIT, 0.512 * MBIT))

SCENARIOS: dict[str, tuple[list[Device], list[Device]]] = {
    "seed": ([EDGE, *[HIGH] * 2, *[LOW] * 4, *[RASPBERRY] * 2], [IOT]),
}
"""Devices that are to complete, the best first; and the crippled ones of the second round."""

METER_SECONDS = 10.0
SAMPLE_SECONDS = 0.25
IDLE = 0.5  # of its mean rate: a sample with less is idle time
WINDOW = 1.5  # times the bound: the deadline of the round with the crippled device
PATIENCE = 10.0  # times the bound: a deadline that no round without it should need


@dataclass(frozen=True, slots=True)
class Round:
    """One round of the swarm.

    Attributes:
        ratio: seconds over the bound.
        bottleneck_utilisation: bytes that the bound's links carried, over what they could.
        bottleneck_idle: share of the time in which they carried less than half of their mean.
        duplicate_ratio: payload received twice over all received.
        control_ratio: other bytes on the chunk streams over the payload.
        completeness: of each peer, without the crippled devices' updates.
        crippled: payload that each crippled device received, over what its link could carry.
    """

    seconds: float
    bound_seconds: float
    ratio: float
    bottleneck: str
    bottleneck_utilisation: float
    bottleneck_idle: float
    duplicate_ratio: float
    control_ratio: float
    completeness: list[float]
    crippled: list[float]


class Watch:
    """What each link carried, sampled: (time, bytes up, bytes down) per peer."""

    def __init__(self, fleet: Sequence[Process]) -> None:
        self.samples: list[list[tuple[float, int, int]]] = [[] for _ in fleet]
        self._fleet = fleet
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            for process, samples in zip(self._fleet, self.samples, strict=True):
                try:
                    samples.append((time.monotonic(), *carried(process.pid)))
                except NetworkError:
                    return  # it has ended before its time, which whoever waits for it will say

    def end(self) -> None:
        self._over.set()

    def idle(self, peers: Sequence[int], up: bool, until: float) -> float:
        """Share of the samples in which these links carried less than IDLE of their mean."""
        shares = []
        for peer in peers:
            series = [sample for sample in self.samples[peer] if sample[0] <= until]
            counts = [sample[1 if up else 2] for sample in series]
            steps = [after - before for before, after in pairwise(counts)]
            mean = fmean(steps) if steps else 0.0
            shares.append(fmean([step < IDLE * mean for step in steps]) if steps else 1.0)
        return fmean(shares)


@contextmanager
def watched(fleet: Sequence[Process]) -> Iterator[Watch]:
    """Sample the links inside the block."""
    watch = Watch(fleet)
    thread = threading.Thread(target=watch.run)
    thread.start()
    try:
        yield watch
    finally:
        watch.end()
        thread.join()


@dataclass(frozen=True, slots=True)
class Trial:
    """A swarm on some of the places.

    Attributes:
        crippled: how many of them, at the end, need not complete.
        size: bytes of an update.
        deadline: seconds of the exchange window.
        run_dir: where the peers keep their logs; empty for none.
    """

    places: Sequence[Place]
    goodputs: Sequence[Goodput]
    crippled: int
    size: int
    deadline: float
    topology: dict[str, object]
    run_dir: str = ""

    def specs(self) -> list[Spec]:
        """Of its members."""
        count = len(self.places)
        return [
            Spec(
                {
                    "federate": {"client_num": count, "total_round_num": 2, "join_timeout": 120.0},
                    "topology": self.topology,
                    "bittorrent": {"timeout": self.deadline, "linger": 0.0},
                    "storage": {"run_dir": f"{self.run_dir}/{place}" if self.run_dir else ""},
                },
                place,
                self.size / 1e6,
                network={"listen": [f"/ip4/{self.places[place].address}/tcp/0"]},
            )
            for place in range(count)
        ]

    def run(self, directory: Path) -> Round:
        """One round."""
        within = [place.enter for place in self.places]
        with gathered(self.specs(), directory, within) as fleet:
            ready = [process.hear("ready") for process in fleet]
            for process in fleet:
                process.say("round")
            for process in fleet:
                process.hear("trained")
            with watched(fleet) as watch:
                began = time.monotonic()
                for process in fleet:
                    process.say("go")
                rows = [process.hear("hash") for process in fleet]
        names = [answer["ready"] for answer in ready]
        edges = {
            place: {names.index(peer) for peer in answer["neighbours"]}
            for place, answer in enumerate(ready)
        }
        return self.figures(rows, names, edges, watch, began)

    def figures(
        self,
        rows: Sequence[dict[str, Any]],
        names: Sequence[str],
        edges: Mapping[int, Set[int]],
        watch: Watch,
        began: float,
    ) -> Round:
        """What the members' answers say."""
        whole = len(self.places) - self.crippled
        best = self._bound(whole, edges)
        seconds = max(row["exchange_seconds"] for row in rows[:whole])
        payload = sum(row["payload"] for row in rows)
        return Round(
            seconds=seconds,
            bound_seconds=best.seconds,
            ratio=seconds / best.seconds,
            bottleneck=f"{'up' if best.up else 'down'}link of {sorted(best.peers)}",
            bottleneck_utilisation=self._utilisation(best, rows, seconds),
            bottleneck_idle=watch.idle(best.peers, best.up, began + seconds),
            duplicate_ratio=sum(row["duplicate"] for row in rows) / payload,
            control_ratio=sum(row["control"] for row in rows) / payload,
            completeness=[
                fmean([row["owners"].get(name, 0.0) for name in names[:whole]])
                for row in rows[:whole]
            ],
            crippled=[
                (row["downloaded"] - row["duplicate"])
                / (self.goodputs[place].down * row["exchange_seconds"])
                for place, row in enumerate(rows)
                if place >= whole
            ],
        )

    def _bound(self, whole: int, edges: Mapping[int, Set[int]]) -> Bound:
        inside = set(range(whole))
        return bound(
            self.size,
            self.goodputs[:whole],
            {place: set(edges[place]) & inside for place in inside},
        )

    def _utilisation(self, best: Bound, rows: Sequence[dict[str, Any]], seconds: float) -> float:
        could = sum(
            self.goodputs[peer].up if best.up else self.goodputs[peer].down for peer in best.peers
        )
        keys = ("uploaded", "control") if best.up else ("downloaded", "control_down")
        did = sum(rows[peer][key] for peer in best.peers for key in keys)
        return float(did / (could * seconds))


def run(scenario: str, seconds: float, topology: dict[str, object], run_dir: str) -> dict[str, Any]:
    """Everything that the scenario asks for.

    Raises:
        NetworkError: no namespaces can be made here.
    """
    good, crippled = SCENARIOS[scenario]
    devices = [*good, *crippled]
    with (
        tempfile.TemporaryDirectory(prefix="p2pfl-benchmark-") as scratch,
        links([*(link for _, link in devices), Link()]) as (*places, hub),
    ):
        directory = Path(scratch)
        measured = goodputs(places, hub, directory, METER_SECONDS)
        whole = len(good)
        full = {place: set(range(whole)) - {place} for place in range(whole)}
        size = round(seconds / bound(1.0, measured[:whole], full).seconds)

        def trial(count: int, deadline: float, name: str) -> Round:
            folder = directory / name
            folder.mkdir()
            logs = f"{run_dir}/{name}" if run_dir else ""
            without = len(devices) - count
            made = Trial(
                places[:count], measured[:count], len(crippled) - without, size, deadline,
                topology, logs,
            )  # fmt: skip
            return made.run(folder)

        complete = trial(whole, PATIENCE * seconds, "without")
        limited = trial(len(devices), WINDOW * seconds, "with")
        star = {
            mode: links_star.measure(mode, places[:whole], size, directory)
            for mode in links_star.MODES
        }
    return {
        "scenario": scenario,
        "topology": topology,
        "megabytes": size / 1e6,
        "devices": [
            {"name": name, "up_bit_s": link.up, "down_bit_s": link.down, **asdict(goodput)}
            for (name, link), goodput in zip(devices, measured, strict=True)
        ],
        **asdict(complete),
        "with_crippled": asdict(limited),
        "central": {f"{mode}_seconds": value for mode, value in star.items()},
        "ratios": {f"central_{mode}": value / complete.seconds for mode, value in star.items()},
    }


def main(argv: Sequence[str]) -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks links",
        description="A swarm on shaped links, beside their bound and a central server.",
    )
    parser.add_argument("--scenario", choices=SCENARIOS, default="seed")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="of the bound")
    parser.add_argument("--topology", default="full", help="full, ring, star, tree or mesh")
    parser.add_argument("--connections", type=int, default=4, metavar="N", help="of a mesh")
    parser.add_argument("--run-dir", default="", metavar="DIR", help="keep the peers' logs")
    add_json(parser)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)  # else it would end without removing what it made
    topology: dict[str, object] = {"type": args.topology, "connections": args.connections}
    try:
        result = run(args.scenario, args.seconds, topology, args.run_dir)
    except NetworkError as error:
        print(error, file=sys.stderr)
        return 1
    write(args.json, result, table(result))
    return 0


def _stop(number: int, frame: object) -> None:
    sys.exit(128 + number)


def table(result: Mapping[str, Any]) -> list[str]:
    """For people."""
    limited = result["with_crippled"]
    lines = [
        f"{device['name']:14} up {device['up'] / 1e6:8.3f}  down {device['down'] / 1e6:8.3f} MB/s"
        for device in result["devices"]
    ]
    lines += [
        f"updates of {result['megabytes']:.1f} MB; bound by the {result['bottleneck']}",
        f"all complete    {result['seconds']:7.1f} s, {result['ratio']:.3f} of the bound of "
        f"{result['bound_seconds']:.1f} s; bottleneck used {result['bottleneck_utilisation']:.1%}, "
        f"idle {result['bottleneck_idle']:.1%}; twice {result['duplicate_ratio']:.2%}, "
        f"control {result['control_ratio']:.2%}; least complete {min(result['completeness']):.1%}",
        f"with crippled   {limited['seconds']:7.1f} s; least complete of the others "
        f"{min(limited['completeness']):.1%}; crippled got "
        + ", ".join(f"{share:.1%}" for share in limited["crippled"])
        + f" of what the link carries; twice {limited['duplicate_ratio']:.2%}",
    ]
    lines += [
        f"central {mode:8}{result['central'][f'{mode}_seconds']:7.1f} s, "
        f"{result['ratios'][f'central_{mode}']:.2f} times the swarm's"
        for mode in links_star.MODES
    ]
    return lines
