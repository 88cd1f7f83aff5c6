"""``p2pfl-torrent join``: one member of a swarm, training a built-in task."""

from __future__ import annotations

from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from p2pfl_torrent.cli.output import check_writable, view_stream, write_json
from p2pfl_torrent.cli.task import Task, load_task, score, use_one_thread
from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.errors import ConfigError, P2PFLError
from p2pfl_torrent.core.reports import RoundReport
from p2pfl_torrent.progress.sentences import finished

MAX_SOLO = 3  # rounds in a row without another member; then nobody is coming


class AloneError(P2PFLError):
    """The other members are gone."""


def run(arguments: Namespace) -> int:
    """Train every round of the swarm."""
    check_writable(arguments.json)
    config = _configured(arguments)
    part, parts = _part(arguments, config)
    use_one_thread()
    task = load_task(config.task, config.swarm.seed, part, parts)
    out = view_stream(arguments.json)

    def say(line: str) -> None:
        print(line, file=out, flush=True)

    reports = take_part(config, task, say)
    write_json(arguments.json, {"rounds": reports})
    return 0


def take_part(config: PeerConfig, task: Task, say: Any) -> list[RoundReport]:
    """What any program with a model of its own does; a line for each round."""
    from p2pfl_torrent.learning.models import build
    from p2pfl_torrent.learning.trainer import Trainer
    from p2pfl_torrent.peer import Peer
    from p2pfl_torrent.runlog import Recorder

    recipe = task.recipe
    model = build(recipe.model, task.train.in_shape, task.train.classes, task.seed)
    trainer = Trainer(
        model,
        task.train,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        momentum=recipe.momentum,
        seed=task.seed,
        on_merge=config.federate.on_merge,
    )
    peer = Peer(
        config.with_values(federate__on_merge="keep"),  # the trainer sees to its optimizer
        model,
        evaluate=lambda scored: score(task, scored),
    )
    reports: list[RoundReport] = []
    solo = 0
    with ExitStack() as stack:
        if config.storage.run_dir:
            directory = Path(config.storage.run_dir)
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(Recorder(directory, peer.events(), peer.snapshot))
        stack.enter_context(peer)
        for address in peer.addrs:
            say(address)
        for _ in peer.rounds():
            result = trainer.train(recipe.epochs, on_batch=peer.progress)
            report = peer.exchange(num_samples=result.samples, metrics={"loss": result.loss})
            trainer.merged()
            reports.append(report)
            say(finished(report))
            solo = solo + 1 if report.solo else 0
            if solo == MAX_SOLO and config.bittorrent.enable:
                raise AloneError(
                    f"No other member was there for {MAX_SOLO} rounds; start the others again, "
                    "and join once more."
                )
    return reports


def _configured(arguments: Namespace) -> PeerConfig:
    config = PeerConfig.load(arguments.config)
    values: dict[str, object] = {}
    if arguments.bootstrap:
        values["network__bootstrap"] = list(arguments.bootstrap)
    if arguments.listen:
        values["network__listen"] = list(arguments.listen)
    if arguments.rounds:
        values["federate__total_round_num"] = arguments.rounds
    if arguments.state:
        values["storage__state_dir"] = arguments.state
    if arguments.run_dir:
        values["storage__run_dir"] = arguments.run_dir
    return config.with_values(**values)


def _part(arguments: Namespace, config: PeerConfig) -> tuple[int, int]:
    part, parts = arguments.part or (
        config.task.part,
        config.task.parts or config.federate.client_num,
    )
    if not 1 <= part <= parts:
        raise ConfigError(
            f"Say which part of the data is this peer's: --part 1/{parts}, or task.part."
        )
    return part, parts
