"""What carrying bytes from one process to another costs, with and without encryption.

    python -m benchmarks transport --json -

Our channel, py-libp2p's own Noise and yamux, trio's SSL and trio's TCP, each between two processes
of its own. The paths take turns, so that whatever else the machine does falls on all of them.
Hashing and disk are not in it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.fleet import Process
from benchmarks.output import add_json, median, write

PATHS = ("ours", "libp2p_stock", "trio_ssl", "trio_tcp")
MEGABYTES = (16, 128)
PIECES = (256, 1024)  # KiB: a block, and a chunk asked for whole


@dataclass(frozen=True, slots=True)
class Run:
    """One transfer over one path; CPU of both processes, 10^9 bytes a GB."""

    path: str
    megabytes: int
    piece_kib: int
    mb_per_s: float
    cpu_s_per_gb: float


class Pair:
    """Both ends of one path, connected."""

    def __init__(self, path: str, sender: Process, receiver: Process) -> None:
        self._path = path
        self._sender = sender
        self._receiver = receiver

    def transfer(self, megabytes: int, piece_kib: int) -> Run:
        size = piece_kib << 10
        count = max(1, round(megabytes * 1e6 / size))
        self._receiver.say(f"{count} {size}")
        self._receiver.hear("ready")
        self._sender.say(f"{count} {size}")
        received, sent = self._receiver.hear("cpu"), self._sender.hear("seconds")
        return Run(
            self._path,
            megabytes,
            piece_kib,
            count * size / 1e6 / sent["seconds"],
            (received["cpu"] + sent["cpu"]) / (count * size / 1e9),
        )


@contextmanager
def pairs(paths: Sequence[str], directory: Path) -> Iterator[list[Pair]]:
    """A pair of processes for each path."""
    with ExitStack() as stack:

        def end(path: str, *address: str) -> Process:
            role = "receiver" if address else "sender"
            errors = stack.enter_context((directory / f"{path}-{role}.err").open("w+b"))
            process = Process(
                f"{path}'s {role}", ["-m", "benchmarks.transport_end", path, *address], errors
            )
            stack.callback(process.end)
            return process

        connected = []
        for path in paths:
            sender = end(path)
            receiver = end(path, sender.hear("address")["address"])
            receiver.hear("open")
            connected.append(Pair(path, sender, receiver))
        yield connected


def measure(paths: Sequence[str], megabytes: Sequence[int], repeats: int) -> list[list[Run]]:
    """For each repeat one run of every kind; a first one of each, which opens windows, is lost."""
    with tempfile.TemporaryDirectory(prefix="p2pfl-benchmark-") as directory:
        with pairs(paths, Path(directory)) as connected:
            for pair in connected:
                pair.transfer(16, PIECES[-1])
            return [
                [
                    pair.transfer(size, piece)
                    for size in megabytes
                    for piece in PIECES
                    for pair in connected
                ]
                for _ in range(repeats)
            ]


def medians(repeats: Sequence[Sequence[Run]]) -> list[Run]:
    """Of each kind of run."""
    return [
        Run(
            same[0].path,
            same[0].megabytes,
            same[0].piece_kib,
            median([run.mb_per_s for run in same]),
            median([run.cpu_s_per_gb for run in same]),
        )
        for same in zip(*repeats, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours against another path with the same bytes in the same pieces: medians over repeats."""

    over: str
    megabytes: int
    piece_kib: int
    speed: float
    cpu: float


def ratios(repeats: Sequence[Sequence[Run]], over: str) -> list[Ratio]:
    """Taken inside each repeat, where both ran one after the other."""
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for runs in repeats:
        of = {(run.path, run.megabytes, run.piece_kib): run for run in runs}
        for (path, *kind), run in of.items():
            if path == "ours":
                other = of[over, kind[0], kind[1]]
                found.setdefault((kind[0], kind[1]), []).append(
                    (run.mb_per_s / other.mb_per_s, run.cpu_s_per_gb / other.cpu_s_per_gb)
                )
    return [
        Ratio(over, *kind, median([speed for speed, _ in pairs]), median([cpu for _, cpu in pairs]))
        for kind, pairs in found.items()
    ]


def summary(repeats: Sequence[Sequence[Run]]) -> dict[str, object]:
    """The ratios that count are the least favourable ones."""
    others = [path for path in PATHS if path != "ours" and path in {r.path for r in repeats[0]}]
    by_path = {over: ratios(repeats, over) for over in others}
    worst: dict[str, float] = {}
    for over, found in by_path.items():
        worst[f"ours_over_{over}"] = min(ratio.speed for ratio in found)
        worst[f"cpu_ours_over_{over}"] = max(ratio.cpu for ratio in found)
    return {
        "runs": [asdict(run) for run in medians(repeats)],
        "ratios": worst,
        "ratios_by_kind": [asdict(ratio) for found in by_path.values() for ratio in found],
        "repeats": [[asdict(run) for run in runs] for runs in repeats],
    }


def table(repeats: Sequence[Sequence[Run]], result: dict[str, object]) -> list[str]:
    """For people."""
    lines = [f"{'path':14}{'MB':>6}{'piece KiB':>11}{'MB/s':>9}{'CPU s/GB':>10}"]
    lines += [
        f"{run.path:14}{run.megabytes:6}{run.piece_kib:11}{run.mb_per_s:9.0f}{run.cpu_s_per_gb:10.2f}"
        for run in medians(repeats)
    ]
    worst = result["ratios"]
    assert isinstance(worst, dict)
    return [*lines, *(f"{name}: {value:.2f}" for name, value in worst.items())]


def main(argv: Sequence[str]) -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks transport", description="Bytes from one process to another."
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--megabytes", type=int, nargs="+", default=list(MEGABYTES), metavar="M")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), metavar="PATH")
    add_json(parser)
    args = parser.parse_args(argv)
    if "ours" not in args.paths:
        parser.error("the ratios are ours over the others: --paths must have ours in it")
    repeats = measure(args.paths, args.megabytes, args.repeats)
    result = summary(repeats)
    write(args.json, result, table(repeats, result))
    return 0
