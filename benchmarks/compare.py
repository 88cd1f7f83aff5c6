"""The same work by other systems, in the same run: everybody's update to everybody.

    python -m benchmarks compare --peers 10 --megabytes 23.5 --topology full --json -

Each repeat starts every system anew, one after the other, and measures it once; a ratio is the
median of the repeats' ratios. Before each lap as much memory as it writes is used and freed. What
lies within the clock differs, so we are compared with:

- libtorrent: with dialling on both sides. Our clock contains the hashing and storing of the own
  update too, which libtorrent has done before (``seconds``);
- gloo, and raw sockets where asked for: links open before on both sides (``seconds_open``);
- p2pfl and a central server: links open before, and until the updates are averaged
  (``seconds_merged``). p2pfl's clock starts when its nodes have voted and spread the start weights;
  from its start to its end it takes ``seconds_from_start``, and its learner trains nothing.

Our CPU-seconds contain the averaging, always. What cannot be prepared or does not finish is left
out, and ``missing`` says why. The topology is ours, p2pfl's and libtorrent's, and that of raw
sockets; gloo and a central server have their own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.fleet import FleetError
from benchmarks.output import add_json, median, write
from benchmarks.systems.catalogue import DEFAULT, OURS, SYSTEMS, System
from benchmarks.systems.child import DIALLED, OPEN
from benchmarks.systems.environments import PreparationError, default_cache, prepare
from benchmarks.systems.runs import Lap, Work, run, write_updates

Laps = dict[str, Lap]  # by what the clock contains


@dataclass(slots=True)
class Results:
    """What was measured so far, and what could not be."""

    laps: dict[str, list[Laps]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def prepared(systems: Sequence[System], cache: Path, results: Results) -> dict[str, str]:
    """The Python for each system that can be had."""
    pythons: dict[str, str] = {}
    for system in systems:
        if system.environment is None:
            pythons[system.name] = sys.executable
            continue
        try:
            pythons[system.name] = str(prepare(system.environment, cache))
        except PreparationError as error:
            results.missing[system.name] = str(error)
    return pythons


def measure(
    systems: Sequence[System],
    pythons: Mapping[str, str],
    work: Work,
    repeats: Mapping[str, int],
    results: Results,
) -> None:
    """All repeats, the systems interleaved."""
    for repeat in range(max(repeats[system.name] for system in systems)):
        for system in systems:
            if system.name in pythons and repeat < repeats[system.name]:
                measure_once(system, pythons[system.name], work, results)


def measure_once(system: System, python: str, work: Work, results: Results) -> None:
    """One more lap of a system, unless it has failed before."""
    if system.name in results.missing:
        return
    with tempfile.TemporaryDirectory(dir=work.directory, prefix=system.name) as scratch:
        try:
            laps = run(system, python, work, Path(scratch))
        except FleetError as error:
            results.missing[system.name] = sentence(error)
            return
    results.laps.setdefault(system.name, []).append(laps)


def sentence(error: FleetError) -> str:
    """A failed process's last words, without their traceback."""
    what, _, words = str(error).partition(": ")
    last = [line.strip() for line in words.splitlines() if line.strip()][-1:]
    return ": ".join([what, *last])


def seconds_of(laps: Sequence[Laps], figure: str) -> list[float]:
    """One of our figures, for each repeat."""
    if figure == "seconds":
        return [lap[DIALLED].seconds for lap in laps]
    if figure == "seconds_open":
        return [lap[OPEN].seconds for lap in laps]
    return [merged for lap in laps if (merged := lap[OPEN].merged_seconds) is not None]


def ratios(laps: Mapping[str, Sequence[Laps]]) -> dict[str, float]:
    """Our time over theirs: the median of the repeats' ratios."""
    result: dict[str, float] = {}
    for name, theirs in laps.items():
        counterpart = SYSTEMS[name].counterpart
        if counterpart and OURS in laps:
            ours = seconds_of(laps[OURS], counterpart)
            pairs = zip(ours, theirs, strict=False)  # p2pfl may have fewer repeats
            result[f"ours_over_{name}"] = median(
                [mine / sole(their).seconds for mine, their in pairs]
            )
    return result


def sole(laps: Laps) -> Lap:
    """The one lap of a system that has one a repeat."""
    (only,) = laps.values()
    return only


def figures(name: str, laps: Sequence[Laps]) -> dict[str, object]:
    """A system's part of the result."""
    every = [lap for each in laps for lap in each.values()]
    equal: dict[str, object] = {"hashes_equal": all(lap.equal for lap in every)}
    if name != OURS:
        only = [sole(each) for each in laps]
        return {
            "seconds": [lap.seconds for lap in only],
            "seconds_from_start": [lap.seconds_from_start for lap in only],
            "cpu_seconds": median([lap.cpu_seconds for lap in only]),
            **equal,
        }
    return {
        "seconds": seconds_of(laps, "seconds"),
        "seconds_open": seconds_of(laps, "seconds_open"),
        "seconds_merged": seconds_of(laps, "seconds_merged"),
        "cpu_seconds": median([each[DIALLED].cpu_seconds for each in laps]),
        "cpu_seconds_open": median([each[OPEN].cpu_seconds for each in laps]),
        "duplicate_ratio": [each[OPEN].duplicate_ratio for each in laps],
        "links_before_dialling": max(each[DIALLED].links_before for each in laps),
        **equal,
    }


def table(results: Results, over: Mapping[str, float]) -> list[str]:
    """Medians for people."""
    lines = [f"{'':20}{'seconds':>10}{'CPU-s':>10}{'ours over it':>14}"]

    def line(label: str, laps: Sequence[Lap], ratio: float | None = None) -> str:
        seconds = median([lap.seconds for lap in laps])
        cpu = median([lap.cpu_seconds for lap in laps])
        equal = "" if all(lap.equal for lap in laps) else "  NOT all the same at the end"
        return f"{label:20}{seconds:10.2f}{cpu:10.2f}{_number(ratio)}{equal}"

    for name, laps in results.laps.items():
        if name == OURS:
            lines.append(line("ours, with dialling", [each[DIALLED] for each in laps]))
            lines.append(line("ours, links open", [each[OPEN] for each in laps]))
            merged = median(seconds_of(laps, "seconds_merged"))
            lines.append(f"{'  until averaged':20}{merged:10.2f}")
        else:
            lines.append(line(name, [sole(each) for each in laps], over.get(f"ours_over_{name}")))
    return [*lines, *(f"{name} is missing: {why}" for name, why in results.missing.items())]


def _number(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:14.2f}"


def chosen(text: str) -> list[System]:
    """The systems of a comma-separated list.

    Raises:
        argparse.ArgumentTypeError: one of them is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"no system is called {', '.join(unknown) or 'nothing'}: take {', '.join(SYSTEMS)}"
        )
    return [SYSTEMS[name] for name in dict.fromkeys(names)]


def main(argv: Sequence[str]) -> int:
    """Measure and tell."""
    args = arguments(argv)
    results = Results()
    repeats = dict.fromkeys(SYSTEMS, args.repeats)
    if args.repeats_p2pfl is not None:
        repeats["p2pfl"] = args.repeats_p2pfl
    pythons = prepared(args.systems, args.cache, results)
    with tempfile.TemporaryDirectory(prefix="p2pfl-benchmark-") as directory:
        write_updates(Path(directory), args.peers, args.megabytes)
        work = Work(args.peers, args.topology, Path(directory))
        measure(args.systems, pythons, work, repeats, results)
    over = ratios(results.laps)
    what: dict[str, object] = {
        "peers": args.peers,
        "megabytes": args.megabytes,
        "topology": args.topology,
        "repeats": args.repeats,
    }
    systems = {name: figures(name, laps) for name, laps in results.laps.items()}
    result = {**what, "systems": systems, "ratios": over, "missing": results.missing}
    write(args.json, result, table(results, over))
    return 0 if all(system["hashes_equal"] for system in systems.values()) else 1


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description="Our round beside those of other systems, which are installed where needed.",
    )
    parser.add_argument("--peers", type=int, default=10, metavar="N")
    parser.add_argument("--megabytes", type=float, default=23.5, metavar="M", help="of an update")
    parser.add_argument("--topology", default="full", choices=("full", "ring"))
    parser.add_argument(
        "--systems",
        type=chosen,
        default=",".join(DEFAULT),
        metavar="A,B",
        help=f"of {', '.join(SYSTEMS)}; default {', '.join(DEFAULT)}",
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument(
        "--repeats-p2pfl", type=int, metavar="N", help="fewer, since each takes about a minute"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        metavar="DIR",
        help="where environments are kept; default %(default)s",
    )
    add_json(parser)
    return parser.parse_args(argv)
