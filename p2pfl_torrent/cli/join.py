"""``p2pfl-torrent join``: one member of a swarm, training a built-in task."""

from __future__ import annotations

from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from p2pfl_torrent.cli.demo_swarm import topology_of
from p2pfl_torrent.cli.following import Following
from p2pfl_torrent.cli.output import check_writable, view_stream, write_json
from p2pfl_torrent.cli.task import Task, limit_threads, load_tasks, part_of
from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.errors import ConfigError, P2PFLError
from p2pfl_torrent.core.reports import RoundReport
from p2pfl_torrent.progress.display import Display, console_for
from p2pfl_torrent.progress.state import SwarmState

if TYPE_CHECKING:
    from p2pfl_torrent.learning.trainer import Trainer
    from p2pfl_torrent.peer import Peer

MAX_SOLO = 3  # rounds in a row without another member; then nobody is coming


class AloneError(P2PFLError):
    """The other members are gone."""


def run(arguments: Namespace) -> int:
    """Train every round of the swarm."""
    check_writable(arguments.json)
    config = configured(arguments)
    part, parts = part_of(arguments.part, config)
    make_state_directory(config)
    [task] = load_tasks(config, parts, [part])
    limit_threads()
    from p2pfl_torrent.peer import Peer

    trainer = task.trainer(config.federate.on_merge)
    calibration = list(trainer.batches()) if config.chunk.norm_policy == "recalibrate" else None
    console = console_for(view_stream(arguments.json), plain=arguments.plain)
    peer = Peer(
        config.with_values(federate__on_merge="keep"),  # the trainer sees to its own optimizer
        trainer.model,
        evaluate=task.score,
        calibration=calibration,
        gradients=trainer.gradient_stats(
            with_samples=not config.chunk.importance_config.snip.use_cached
        ),
        on_address=lambda address: console.print(address, markup=False, soft_wrap=True),
    )
    label = f"part {part}/{parts}"
    rounds = config.federate.total_round_num
    swarm = SwarmState(config.swarm.name, topology_of(config), rounds, [label])
    with ExitStack() as stack:
        display = Display(swarm, console)
        stack.enter_context(Following(display, label, peer.events(), peer.snapshot))
        stack.enter_context(peer)
        addrs = peer.addrs
        reports = take_part(peer, task, trainer, solo_is_wanted=not config.bittorrent.enable)
    if config.federate.overlap:  # no call returns the last round but one
        reports = list(swarm.peers[label].reports.values())
    write_json(arguments.json, {"peer_id": peer.peer_id, "addrs": addrs, "rounds": reports})
    return 0


def take_part(
    peer: Peer, task: Task, trainer: Trainer, *, solo_is_wanted: bool = False
) -> list[RoundReport]:
    """Train and exchange round by round, as any program that embeds ``Peer`` does.

    Raises:
        AloneError: nobody else has been there for ``MAX_SOLO`` rounds.
    """
    reports: list[RoundReport] = []
    solo = 0
    for _ in peer.rounds():
        result = trainer.train(task.recipe.epochs, on_batch=peer.progress)
        metrics = {"loss": result.loss, "train_seconds": result.seconds}
        report = peer.exchange(num_samples=result.samples, metrics=metrics)
        trainer.merged()
        reports.append(report)
        solo = solo + 1 if report.solo and not solo_is_wanted else 0
        if solo == MAX_SOLO:
            raise AloneError(
                f"No other member was there for {MAX_SOLO} rounds in a row; start the others "
                "again, then join once more."
            )
    return reports


def make_state_directory(config: PeerConfig) -> None:
    """Make the place for identity, chunks and checkpoints before anything is loaded.

    Raises:
        ConfigError: it cannot be made.
    """
    if config.storage.state_dir:
        try:
            Path(config.storage.state_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"The state directory {config.storage.state_dir} cannot be made "
                f"({error.strerror}): give another with --state."
            ) from error


def configured(arguments: Namespace) -> PeerConfig:
    """The file's configuration with what the command line says in its place."""
    config = PeerConfig.load(arguments.config)
    values: dict[str, object] = {}
    if arguments.bootstrap:
        values["network__bootstrap"] = list(arguments.bootstrap)
    if arguments.listen:
        values["network__listen"] = list(arguments.listen)
    if arguments.rounds:
        values["federate__total_round_num"] = arguments.rounds
    if arguments.recipe:
        values["task__recipe"] = arguments.recipe
    if arguments.data:
        values["task__data_root"] = arguments.data
    if arguments.download:
        values["task__download"] = True
    if arguments.state:
        values["storage__state_dir"] = arguments.state
    if arguments.run_dir:
        values["storage__run_dir"] = arguments.run_dir
    return config.with_values(**values)
