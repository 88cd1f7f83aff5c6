"""``p2pfl-torrent demo``: a whole swarm on this machine, one process a peer, and its worth."""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml
from rich.console import Console

from p2pfl_torrent.cli.fleet import Fleet, FleetError
from p2pfl_torrent.cli.join import topology_of
from p2pfl_torrent.cli.output import check_writable, view_stream, write_json
from p2pfl_torrent.cli.task import load_task
from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.errors import ConfigError, P2PFLError
from p2pfl_torrent.progress import views
from p2pfl_torrent.progress.display import Display, console_for
from p2pfl_torrent.progress.state import SwarmState
from p2pfl_torrent.runlog import EventTail, LoggedEvent, read_statistics
from p2pfl_torrent.statistics import Joined, RoundFinished, RoundReport, RoundStarted

POLL = 0.2  # seconds between two looks at the peers' logs
BASELINE_PATIENCE = 3600.0  # seconds; they train as much as the peers did, on one core


class DemoError(P2PFLError):
    """The demo could not be carried through."""


@dataclass(slots=True)
class PeerRecord:
    """What one peer logged that the result is made of."""

    label: str
    peer_id: str = ""
    started: dict[int, float] = field(default_factory=dict)
    finished: dict[int, float] = field(default_factory=dict)
    reports: dict[int, RoundReport] = field(default_factory=dict)

    def note(self, logged: LoggedEvent) -> None:
        """Take in an event."""
        event = logged.event
        if isinstance(event, Joined):
            self.peer_id = event.peer
        elif isinstance(event, RoundStarted):
            self.started.setdefault(event.round, logged.t)
        elif isinstance(event, RoundFinished):
            self.finished[event.report.round] = logged.t
            self.reports[event.report.round] = event.report

    def lacks(self, total: int) -> int | None:
        """The first round that this peer did not merge with the others."""
        for number in range(1, total + 1):
            report = self.reports.get(number)
            if report is None or report.solo or report.closed_by == "late":
                return number
        return None


def run(arguments: Namespace) -> int:
    """Run the swarm, compare, and tell."""
    check_writable(arguments.json)
    config = demo_config(arguments)
    peers = config.federate.client_num
    load_task(config.task, config.swarm.seed, 1, peers)  # what is wrong with the data shows here
    console = console_for(view_stream(arguments.json))
    records = [PeerRecord(f"peer-{number}") for number in range(1, peers + 1)]
    with ExitStack() as stack:
        run_dir = stack.enter_context(_RunDir(arguments, console))
        fleet = stack.enter_context(Fleet(run_dir))
        began = time.monotonic()
        failed = _swarm(config, fleet, run_dir, records, console, _bound(arguments, config))
        seconds = time.monotonic() - began
        if not any(record.reports for record in records):
            raise DemoError(next(iter(failed.values()), "No peer finished a round."))
        console.print("Comparing with each peer alone and with all data in one place ...")
        central, *alone = _baselines(config, fleet, run_dir)
        _conclude(console, records, alone, central)
        write_json(arguments.json, result(records, alone, central, seconds))
    lacking = [(r.label, r.lacks(config.federate.total_round_num)) for r in records]
    for label, number in lacking:
        if number is not None:
            why = f": {failed[label]}" if label in failed else "."
            raise DemoError(f"{label} did not finish round {number} with the others{why}")
    if failed:
        label, why = next(iter(failed.items()))
        raise DemoError(f"{label} failed after its last round: {why}")
    return 0


# --- what to run -----------------------------------------------------------------------------


def demo_config(arguments: Namespace) -> PeerConfig:
    """The swarm that the command line describes; ConfigError if it cannot be."""
    if arguments.graph and arguments.topology not in (None, "custom"):
        raise ConfigError(
            f"--graph describes a custom topology, --topology says {arguments.topology}: "
            "leave one of them out."
        )
    topology = arguments.topology or ("custom" if arguments.graph else "mesh")
    if topology == "custom" and not arguments.graph:
        raise ConfigError(
            "--topology custom needs --graph FILE, such as examples/custom_graph.yaml."
        )
    if arguments.connections and topology != "mesh":
        raise ConfigError(f"--connections is about a mesh, and the topology is {topology}.")
    graph = read_graph(Path(arguments.graph)) if arguments.graph else {}
    peers = arguments.peers or DEFAULT_PEERS
    if graph:
        numbers = {*graph, *(other for others in graph.values() for other in others)}
        if arguments.peers and arguments.peers != len(numbers):
            raise ConfigError(
                f"--peers says {arguments.peers}, {arguments.graph} has {len(numbers)} peers: "
                "leave --peers out."
            )
        peers = len(numbers)
    task: dict[str, Any] = {"recipe": arguments.recipe}
    if arguments.partition:
        task["partition"] = arguments.partition
    if arguments.epochs:
        task["epochs"] = arguments.epochs
    shape: dict[str, Any] = {"type": topology, "custom_graph": graph}
    if arguments.connections:
        shape["connections"] = arguments.connections
    return PeerConfig.from_mapping(
        {
            "swarm": {"name": "demo", "seed": arguments.seed},
            "federate": {
                "client_num": peers,
                "total_round_num": arguments.rounds,
                # All processes start at once, and share the machine while they import and train.
                "join_timeout": 60.0 + 5.0 * peers,
                "train_timeout": 60.0 + 10.0 * peers,
            },
            "topology": shape,
            "bittorrent": {"timeout": 30.0 + 5.0 * peers},
            "task": task,
        }
    )


DEFAULT_PEERS = 6


def read_graph(path: Path) -> dict[int, list[int]]:
    """The neighbours of each peer, from YAML with the seed's ``custom_graph``, bare or nested."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not YAML"
        raise ConfigError(f"{path} cannot be read: {reason}.") from error
    for key in ("topology", "custom_graph"):
        if isinstance(data, dict) and key in data:
            data = data[key]
    try:
        graph = msgspec.convert(data, dict[int, list[int]])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path} must hold lines such as '1: [2, 3]' ({error}).") from error
    if not graph:
        raise ConfigError(f"{path} names no peer: write lines such as '1: [2, 3]'.")
    return graph


class _RunDir:
    """The demo's directory: the user's, or a temporary one that is gone afterwards."""

    def __init__(self, arguments: Namespace, console: Console) -> None:
        self._given = arguments.run_dir
        self._kept = bool(arguments.run_dir or arguments.keep)
        self._console = console
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._path = Path()

    def __enter__(self) -> Path:
        if self._given:
            self._path = Path(self._given)
            if any(self._path.glob("peer-*")):
                raise DemoError(f"{self._path} holds a run already: give another --run-dir.")
            try:
                self._path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DemoError(f"{self._path} cannot be made: {error.strerror}.") from error
        elif self._kept:
            self._path = Path(tempfile.mkdtemp(prefix="p2pfl-demo-"))
        else:
            self._temporary = tempfile.TemporaryDirectory(prefix="p2pfl-demo-")
            self._path = Path(self._temporary.name)
        return self._path

    def __exit__(self, *_: object) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
        elif self._kept:
            self._console.print(f"Logs: {self._path}", markup=False, soft_wrap=True)


def _bound(arguments: Namespace, config: PeerConfig) -> float:
    """Seconds after which the demo gives up: what the rounds may take at the very most."""
    if arguments.timeout:
        return float(arguments.timeout)
    federate = config.federate
    per_round = federate.train_timeout + 1.5 * config.bittorrent.timeout
    return federate.join_timeout + federate.total_round_num * per_round


# --- running ---------------------------------------------------------------------------------


def _swarm(
    config: PeerConfig,
    fleet: Fleet,
    run_dir: Path,
    records: list[PeerRecord],
    console: Console,
    bound: float,
) -> Mapping[str, str]:
    """Run all peers to their end; a sentence for each that failed."""
    fleet.start("bootstrap", "p2pfl_torrent", ["bootstrap"])
    address = fleet.first_line("bootstrap")
    file = run_dir / "swarm.yaml"
    file.write_text(config.with_values(network__bootstrap=[address]).to_yaml(), encoding="utf-8")
    labels = [record.label for record in records]
    for number, label in enumerate(labels, 1):
        directory = run_dir / label
        directory.mkdir()
        arguments = ["join", str(file), "--part", f"{number}/{len(labels)}"]
        fleet.start(label, "p2pfl_torrent", [*arguments, "--run-dir", str(directory)])
    swarm = SwarmState(
        config.swarm.name, topology_of(config), config.federate.total_round_num, labels
    )
    with Display(swarm, console) as display:
        failed = _watch(fleet, run_dir, records, display, bound)
        fleet.stop(["bootstrap", *labels])
        for label in fleet.killed:
            display.say(f"{label} did not leave and was killed")
    return failed


def _watch(
    fleet: Fleet, run_dir: Path, records: list[PeerRecord], display: Display, bound: float
) -> dict[str, str]:
    """Show the peers until all have ended; a sentence for each that failed."""
    deadline = time.monotonic() + bound
    tails = {record.label: EventTail(run_dir / record.label) for record in records}
    failed: dict[str, str] = {}
    while True:
        # Exit codes first, so that what a peer logged last is still read below.
        codes = {label: fleet.code(label) for label in tails}
        for record in records:
            for logged in tails[record.label].poll():
                record.note(logged)
                display.event(record.label, logged.event)
            snapshot = read_statistics(run_dir / record.label)
            if snapshot is not None:
                display.observe(record.label, snapshot)
        for label, code in codes.items():
            if code not in (None, 0) and label not in failed:
                failed[label] = fleet.sentence(label)
                display.fail(label, failed[label])
        display.refresh()
        running = [label for label, code in codes.items() if code is None]
        if not running:
            return failed
        if time.monotonic() > deadline:
            for label in running:
                failed[label] = f"it did not finish within {bound:.0f} s"
                display.fail(label, failed[label])
            return failed
        time.sleep(POLL)


def _baselines(config: PeerConfig, fleet: Fleet, run_dir: Path) -> list[float]:
    """Accuracy of central training, then of each peer alone."""
    label = "baselines"
    fleet.start(label, "p2pfl_torrent.cli.baselines", [str(run_dir / "swarm.yaml")])
    found = [float(line) for line in fleet.result(label, BASELINE_PATIENCE)]
    if len(found) != config.federate.client_num + 1:
        raise FleetError(f"{label} failed: it gave {len(found)} accuracies.")
    return found


# --- the result ------------------------------------------------------------------------------


def _by_round(records: list[PeerRecord]) -> list[tuple[int, list[PeerRecord]]]:
    """Each round with the peers that finished it."""
    numbers = sorted({number for record in records for number in record.reports})
    return [(n, [record for record in records if n in record.reports]) for n in numbers]


def _conclude(
    console: Console, records: list[PeerRecord], alone: list[float], central: float
) -> None:
    rounds = [(n, [r.reports[n] for r in several]) for n, several in _by_round(records)]
    console.print(views.rounds_table(rounds))
    comparisons = []
    for record, own in zip(records, alone, strict=True):
        last = record.reports[max(record.reports)] if record.reports else None
        before, after = (last.accuracy_before, last.accuracy_after) if last else (None, None)
        comparisons.append(views.Comparison(record.label, own, before, after))
    console.print(views.comparison_table(comparisons, central))


def result(
    records: list[PeerRecord], alone: list[float], central: float, seconds: float
) -> dict[str, Any]:
    """The demo's JSON, as docs/reference and the design page give it.

    A round's seconds are from its first peer's start of training to its last peer's aggregate.
    """
    rounds = []
    for number, several in _by_round(records):
        reports = [record.reports[number] for record in several]
        began = min(record.started.get(number, record.finished[number]) for record in several)
        rounds.append(
            {
                "round": number,
                "seconds": max(record.finished[number] for record in several) - began,
                "completeness": sum(r.completeness for r in reports) / len(reports),
                "bytes_payload": sum(r.bytes_payload for r in reports),
                "bytes_duplicate": sum(r.bytes_duplicate for r in reports),
                "hashes_equal": len({r.model_hash for r in reports}) == 1,
                "peers": [
                    {
                        "peer_id": record.peer_id,
                        "accuracy_local": record.reports[number].accuracy_before,
                        "accuracy_merged": record.reports[number].accuracy_after,
                        "model_hash": record.reports[number].model_hash,
                        "completeness": record.reports[number].completeness,
                    }
                    for record in several
                ],
            }
        )
    return {
        "peers": len(records),
        "seconds": seconds,
        "accuracy_central": central,
        "accuracy_alone": alone,
        "rounds": rounds,
    }
