"""What learning together is compared with: each peer alone, and all data in one place.

A program of its own, so that ``demo`` needs no torch and can end it at any moment:
``python -m p2pfl_torrent.cli.baselines CONFIG PART...`` prints an accuracy for each part, in their
order; part 0 is all data in one place.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from p2pfl_torrent.cli.parent import end_with_parent
from p2pfl_torrent.cli.task import Task, limit_threads, load_tasks
from p2pfl_torrent.config import PeerConfig

NICENESS = 10  # the swarm goes first; this takes the time in which its peers wait for each other


def main(file: str, *parts: str) -> None:
    """Print one accuracy a line."""
    end_with_parent()
    os.nice(NICENESS)
    limit_threads()
    config = PeerConfig.load(Path(file))
    tasks = load_tasks(config, config.federate.client_num, [int(part) for part in parts])
    for task in tasks:
        print(accuracy(task, config.federate.total_round_num), flush=True)


def accuracy(task: Task, rounds: int) -> float:
    """After as many epochs as the swarm's rounds have, from the same start weights."""
    trainer = task.trainer()
    trainer.train(rounds * task.recipe.epochs)
    return task.score(trainer.model)["accuracy"]


if __name__ == "__main__":
    main(*sys.argv[1:])
