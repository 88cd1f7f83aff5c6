"""What learning together is compared with: each peer alone, and all data in one place.

A program of its own, so that ``demo`` needs no torch and can end it at any moment:
``python -m p2pfl_torrent.cli.baselines CONFIG`` prints the central accuracy, then each peer's.
"""

from __future__ import annotations

import sys
from pathlib import Path

from p2pfl_torrent.cli.task import baseline, load_task, use_one_thread
from p2pfl_torrent.config import PeerConfig


def main(file: str) -> None:
    """Print one accuracy a line, each after as many epochs as the swarm's rounds have."""
    use_one_thread()
    config = PeerConfig.load(Path(file))
    parts = config.federate.client_num
    rounds = config.federate.total_round_num
    tasks = [load_task(config.task, config.swarm.seed, part, parts) for part in range(1, parts + 1)]
    print(baseline(tasks[0], tasks[0].everything, rounds), flush=True)
    for task in tasks:
        print(baseline(task, task.train, rounds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
