"""``p2pfl-torrent demo``: a whole swarm on this machine, one process a peer, and its worth."""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from p2pfl_torrent.cli.demo_result import Baselines, PeerRecord, conclude, failure, result
from p2pfl_torrent.cli.demo_swarm import bound, demo_config, topology_of
from p2pfl_torrent.cli.fleet import Fleet
from p2pfl_torrent.cli.output import check_writable, view_stream, write_json
from p2pfl_torrent.cli.task import prepare_data
from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.errors import P2PFLError
from p2pfl_torrent.progress.display import Display, console_for
from p2pfl_torrent.progress.state import SwarmState
from p2pfl_torrent.runlog import EventTail, read_statistics

POLL = 0.2  # seconds between two looks at the peers' logs
CONFIG = "swarm.yaml"
CENTRAL, ALONE = "central training", "training alone"  # labels of the two baseline processes


class DemoError(P2PFLError):
    """The demo could not be carried through."""


@dataclass(frozen=True, slots=True)
class _Places:
    """Where a demo keeps things: ``run`` may be kept, ``scratch`` is gone at the end."""

    run: Path
    scratch: Path


def run(arguments: Namespace) -> int:
    """Run the swarm, compare, and tell."""
    check_writable(arguments.json)
    config = demo_config(arguments)
    prepare_data(config.task)  # missing data is told, or fetched, before six processes start
    config = config.with_values(task__download=False)
    rounds = config.federate.total_round_num
    console = console_for(view_stream(arguments.json))
    records = [PeerRecord(f"peer-{k}") for k in range(1, config.federate.client_num + 1)]
    began = time.monotonic()
    deadline = began + bound(arguments, config)
    labels = [record.label for record in records]
    swarm = SwarmState(config.swarm.name, topology_of(config), rounds, labels)
    with _places(arguments, console) as places:
        with Fleet(places.run, {"TMPDIR": str(places.scratch)}) as fleet:
            with Display(swarm, console) as display:
                _start(config, places, fleet, labels)
                _watch(fleet, places, records, display, deadline)
            seconds = time.monotonic() - began
            baselines = _baselines(fleet, console, deadline)
    conclude(console, records, baselines)
    write_json(arguments.json, result(records, baselines, seconds))
    told = failure(records, rounds)
    if told is not None:
        raise DemoError(told)
    return 0


@contextmanager
def _places(arguments: Namespace, console: Console) -> Iterator[_Places]:
    """The demo's directories; those that nobody asked to keep are removed.

    A demo that is killed by SIGKILL leaves its temporary directory: its logs are all that tells
    what happened, and the system clears such directories in its own time.
    """
    with tempfile.TemporaryDirectory(prefix="p2pfl-demo-") as temporary:
        scratch = Path(temporary) / "scratch"
        scratch.mkdir()
        if arguments.run_dir:
            path = Path(arguments.run_dir).absolute()
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DemoError(f"{path} cannot be made: {error.strerror}.") from error
            if any(path.glob("peer-*")):
                raise DemoError(f"{path} holds a run already: give another --run-dir.")
        elif arguments.keep:
            path = Path(tempfile.mkdtemp(prefix="p2pfl-demo-run-"))
        else:
            path = Path(temporary) / "run"
            path.mkdir()
        try:
            yield _Places(path, scratch)
        finally:
            if arguments.run_dir or arguments.keep:
                console.print(f"Logs are in {path}", markup=False, soft_wrap=True)


def _start(config: PeerConfig, places: _Places, fleet: Fleet, labels: Sequence[str]) -> None:
    """Start the bootstrap node, the peers, and what they are compared with."""
    fleet.start("bootstrap", "p2pfl_torrent", ["bootstrap"])
    states = {label: places.scratch / f"state-{label}" for label in labels}
    if config.topology.type == "custom":
        config = config.with_values(topology__members=_identities(list(states.values())))
    config = config.with_values(network__bootstrap=[fleet.first_line("bootstrap")])
    file = places.run / CONFIG
    file.write_text(config.to_yaml(), encoding="utf-8")
    for number, (label, state) in enumerate(states.items(), 1):
        part = f"{number}/{len(labels)}"
        directories = ["--state", str(state), "--run-dir", str(places.run / label)]
        fleet.start(
            label, "p2pfl_torrent", ["join", str(file), "--plain", "--part", part, *directories]
        )
    module = "p2pfl_torrent.cli.baselines"
    fleet.start(CENTRAL, module, [str(file), "0"])
    fleet.start(ALONE, module, [str(file), *(str(k) for k in range(1, len(labels) + 1))])


def _identities(states: Sequence[Path]) -> list[str]:
    """The peers' ids in order: a custom graph says by number who is whose neighbour."""
    from p2pfl_torrent.peer.identity import identity_of  # libp2p takes a second to load

    return [identity_of(state) for state in states]


def _watch(
    fleet: Fleet, places: _Places, records: list[PeerRecord], display: Display, deadline: float
) -> None:
    """Show the peers until all have ended.

    Raises:
        FleetError: a peer, or the bootstrap node, failed.
        DemoError: they did not end in time.
    """
    tails = {record.label: EventTail(places.run / record.label) for record in records}
    while True:
        # Exit codes first, so that what a peer logged last is still read below.
        codes = {label: fleet.code(label) for label in tails}
        for record in records:
            for logged in tails[record.label].poll():
                record.note(logged.event)
                display.event(record.label, logged.event)
            snapshot = read_statistics(places.run / record.label)
            if snapshot is not None:
                display.observe(record.label, snapshot)
        display.refresh()
        for label, code in codes.items():
            if code not in (None, 0):
                display.fail(label, fleet.sentence(label))
                fleet.check(label)
        if all(code == 0 for code in codes.values()):
            return
        for label in ("bootstrap", CENTRAL, ALONE):
            fleet.check(label)
        _check_time(deadline)
        time.sleep(POLL)


def _baselines(fleet: Fleet, console: Console, deadline: float) -> Baselines:
    """Wait for what the swarm is compared with."""
    told = False
    while not (fleet.check(CENTRAL) and fleet.check(ALONE)):
        if not told:
            console.print("Training each peer alone and all data in one place, to compare ...")
            told = True
        _check_time(deadline)
        time.sleep(POLL)
    [central] = fleet.lines(CENTRAL)
    return Baselines(tuple(float(line) for line in fleet.lines(ALONE)), float(central))


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise DemoError(
            "The demo did not finish in time; try fewer peers, or a longer --timeout SECONDS."
        )
