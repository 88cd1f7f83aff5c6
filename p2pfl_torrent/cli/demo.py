"""``p2pfl-torrent demo``: a whole swarm on this machine, one process a peer, and its worth."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import yaml

from p2pfl_torrent.cli.output import check_writable, view_stream, write_json
from p2pfl_torrent.cli.task import baseline, load_task, recipe_of, use_one_thread
from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.errors import ConfigError, P2PFLError
from p2pfl_torrent.core.reports import RoundFinished, RoundReport
from p2pfl_torrent.progress import views
from p2pfl_torrent.progress.display import Display, console_for
from p2pfl_torrent.progress.state import SwarmState
from p2pfl_torrent.runlog import EventTail, read_statistics

POLL = 0.2  # seconds between two looks at the peers' logs
GRACE = 5.0  # seconds a process gets to leave before it is killed
BOOT = 60.0  # seconds for the bootstrap node to print its address


class DemoError(P2PFLError):
    """The demo could not be carried through."""


def run(arguments: Namespace) -> int:
    """Run the swarm, compare, and tell."""
    check_writable(arguments.json)
    config = _config(arguments)
    began = time.monotonic()
    with ExitStack() as stack:
        run_dir = _run_dir(arguments, stack)
        console = console_for(view_stream(arguments.json))
        labels = [f"peer-{k}" for k in range(1, config.federate.client_num + 1)]
        swarm = SwarmState(
            config.swarm.name,
            config.topology.type,
            config.federate.total_round_num,
            labels,
        )
        fleet = stack.enter_context(_Fleet(config, run_dir, labels))
        with Display(swarm, console) as display:
            _watch(fleet, display, _bound(arguments, config))
        seconds = time.monotonic() - began
        alone, central = _baselines(config, len(labels))
        reports = {label: fleet.reports[label] for label in labels}
        _conclude(console, reports, alone, central)
        write_json(arguments.json, _result(reports, fleet.peer_ids, alone, central, seconds))
        if arguments.run_dir or arguments.keep:
            console.print(f"logs: {run_dir}", markup=False, highlight=False)
    return 0


def _config(arguments: Namespace) -> PeerConfig:
    topology = arguments.topology or ("custom" if arguments.graph else "mesh")
    peers, graph = arguments.peers, {}
    if arguments.graph:
        graph = _graph(Path(arguments.graph))
        peers = len(graph)
    elif topology == "custom":
        raise ConfigError(
            "--topology custom needs --graph FILE, such as examples/custom_graph.yaml."
        )
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
                "join_timeout": 60.0 + 5.0 * peers,
                "train_timeout": 60.0 + 10.0 * peers,
            },
            "topology": shape,
            "bittorrent": {"timeout": 30.0 + 5.0 * peers},
            "task": task,
        }
    )


def _graph(path: Path) -> dict[int, list[int]]:
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}".splitlines()[0]) from error
    for key in ("topology", "custom_graph"):
        if isinstance(data, dict) and key in data:
            data = data[key]
    try:
        return msgspec.convert(data, dict[int, list[int]])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path} must hold lines such as '1: [2, 3]' ({error}).") from error


def _run_dir(arguments: Namespace, stack: ExitStack) -> Path:
    if arguments.run_dir:
        path = Path(arguments.run_dir)
        path.mkdir(parents=True, exist_ok=True)
        return path
    if arguments.keep:
        return Path(tempfile.mkdtemp(prefix="p2pfl-demo-"))
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="p2pfl-demo-")))


def _bound(arguments: Namespace, config: PeerConfig) -> float:
    """Seconds after which the demo gives up: what the rounds may take at the very most."""
    if arguments.timeout:
        return float(arguments.timeout)
    federate = config.federate
    per_round = federate.train_timeout + 1.5 * config.bittorrent.timeout
    return federate.join_timeout + federate.total_round_num * per_round


class _Fleet:
    """The bootstrap node and the peers, as processes of this one."""

    def __init__(self, config: PeerConfig, run_dir: Path, labels: Sequence[str]) -> None:
        self.labels = labels
        self.reports: dict[str, list[RoundReport]] = {label: [] for label in labels}
        self.peer_ids: dict[str, str] = {}
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.run_dir = run_dir
        self._config = config
        self._bootstrap: subprocess.Popen[str] | None = None
        self._files = ExitStack()
        self.tails = {label: EventTail(self._dir(label)) for label in labels}

    def _dir(self, label: str) -> Path:
        path = self.run_dir / label
        path.mkdir(parents=True, exist_ok=True)
        return path

    def __enter__(self) -> _Fleet:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        self._bootstrap = self._run("bootstrap", ["bootstrap"], stdout=subprocess.PIPE)
        assert self._bootstrap.stdout is not None
        address = self._bootstrap.stdout.readline().strip()
        if not address:
            raise DemoError(f"The bootstrap node did not start: {self._error_of('bootstrap')}")
        config = self._config.with_values(network__bootstrap=[address])
        file = self.run_dir / "swarm.yaml"
        file.write_text(config.to_yaml())
        for number, label in enumerate(self.labels, 1):
            part = f"{number}/{len(self.labels)}"
            arguments = ["join", str(file), "--part", part, "--run-dir", str(self._dir(label))]
            self.processes[label] = self._run(label, arguments, stdout=subprocess.DEVNULL)

    def _run(self, label: str, arguments: list[str], stdout: int) -> subprocess.Popen[str]:
        errors = self._files.enter_context((self.run_dir / f"{label}.stderr").open("w"))
        command = [sys.executable, "-m", "p2pfl_torrent", *arguments]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=errors, text=True
        )

    def _error_of(self, label: str) -> str:
        lines = (self.run_dir / f"{label}.stderr").read_text().strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def check(self) -> bool:
        """Whether all peers have finished; DemoError if one failed."""
        codes = {label: process.poll() for label, process in self.processes.items()}
        for label, code in codes.items():
            if code not in (None, 0):
                raise DemoError(f"{label} failed: {self._error_of(label)}")
        return all(code == 0 for code in codes.values())

    def __exit__(self, *_: object) -> None:
        running = [p for p in [*self.processes.values(), self._bootstrap] if p is not None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._bootstrap is not None and self._bootstrap.stdout is not None:
            self._bootstrap.stdout.close()
        self._files.close()


def _watch(fleet: _Fleet, display: Display, bound: float) -> None:
    """Show the peers until all are done."""
    deadline = time.monotonic() + bound
    done = False
    while not done:
        done = fleet.check()  # first, so that what was logged last is still read below
        for label, tail in fleet.tails.items():
            for logged in tail.poll():
                display.event(label, logged.event)
                if isinstance(logged.event, RoundFinished):
                    fleet.reports[label].append(logged.event.report)
            snapshot = read_statistics(fleet.run_dir / label)
            if snapshot is not None:
                fleet.peer_ids[label] = snapshot.peer
                display.observe(label, snapshot)
        display.refresh()
        if not done and time.monotonic() > deadline:
            raise DemoError(f"The demo did not finish within {bound:.0f} s.")
        if not done:
            time.sleep(POLL)
    missing = [label for label in fleet.labels if not fleet.reports[label]]
    if missing:
        raise DemoError(f"{missing[0]} ended without finishing a round.")


def _baseline(mapping: dict[str, Any], part: int, parts: int) -> float:
    """In a process of its own: part 0 is all data in one place."""
    use_one_thread()
    config = PeerConfig.from_mapping(mapping)
    task = load_task(config.task, config.swarm.seed, max(1, part), parts)
    data = task.train if part else task.everything
    return baseline(task, data, config.federate.total_round_num)


def _baselines(config: PeerConfig, parts: int) -> tuple[list[float], float]:
    """(accuracy of each peer alone, of central training), with the rounds' budget of epochs."""
    recipe_of(config.task)
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        mapping = config.to_mapping()
        jobs = [pool.submit(_baseline, mapping, part, parts) for part in range(parts + 1)]
        central, *alone = [job.result() for job in jobs]
    return alone, central


def _by_round(reports: dict[str, list[RoundReport]]) -> list[tuple[int, list[RoundReport]]]:
    rounds = sorted({report.round for several in reports.values() for report in several})
    return [
        (number, [r for several in reports.values() for r in several if r.round == number])
        for number in rounds
    ]


def _conclude(
    console: Any, reports: dict[str, list[RoundReport]], alone: list[float], central: float
) -> None:
    console.print(views.rounds_table(_by_round(reports)))
    comparisons = [
        views.Comparison(label, own, several[-1].accuracy_before, several[-1].accuracy_after)
        for (label, several), own in zip(reports.items(), alone, strict=True)
    ]
    console.print(views.comparison_table(comparisons, central))


def _result(
    reports: dict[str, list[RoundReport]],
    peer_ids: dict[str, str],
    alone: list[float],
    central: float,
    seconds: float,
) -> dict[str, Any]:
    label_of = {id(r): label for label, several in reports.items() for r in several}
    return {
        "peers": len(reports),
        "seconds": seconds,
        "accuracy_central": central,
        "accuracy_alone": alone,
        "rounds": [
            {
                "round": number,
                "seconds": max(r.seconds for r in several),
                "completeness": sum(r.completeness for r in several) / len(several),
                "bytes_payload": sum(r.bytes_payload for r in several),
                "bytes_duplicate": sum(r.bytes_duplicate for r in several),
                "peers": [
                    {
                        "peer_id": peer_ids[label_of[id(r)]],
                        "accuracy_local": r.accuracy_before,
                        "accuracy_merged": r.accuracy_after,
                        "model_hash": r.model_hash,
                        "completeness": r.completeness,
                    }
                    for r in several
                ],
            }
            for number, several in _by_round(reports)
        ],
    }
