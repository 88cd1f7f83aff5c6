"""What every benchmark prints and writes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that all benchmarks have."""
    parser.add_argument("--json", metavar="FILE", help="write the result; - for standard output")


def write(path: str | None, result: dict[str, object], table: Sequence[str]) -> None:
    """Print the table, and write the result where it is wanted."""
    if path != "-":
        print("\n".join(table))
    if path is None:
        return
    text = json.dumps({"machine": machine(), **result}, indent=2)
    if path == "-":
        print(text)
    else:
        Path(path).write_text(text + "\n", encoding="utf-8")


def machine() -> dict[str, object]:
    """What the figures were taken on, as far as it matters."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "kernel": platform.release().split("-")[0],
    }


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)
