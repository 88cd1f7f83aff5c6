"""``p2pfl-torrent config-reference``: the table of all keys, made from the schema itself."""

from __future__ import annotations

from argparse import Namespace
from itertools import groupby
from pathlib import Path

from p2pfl_torrent.cli.output import STDOUT, OutputError, write_json
from p2pfl_torrent.config import KeyReference, reference

INTRODUCTION = """\
# Configuration reference

Made by `p2pfl-torrent config-reference --output docs/reference/configuration.md` from the schema
that checks configurations; `examples/swarm.yaml` is a file to start from. An unknown key is an
error. Keys marked *genesis* must be the same on all peers of a swarm: a peer that differs is told
in which; *local* ones are each peer's own business.
"""


def run(arguments: Namespace) -> int:
    """Print or write the reference."""
    rows = list(reference())
    write_json(arguments.json, rows)
    if arguments.output is not None:
        try:
            Path(arguments.output).write_text(markdown(rows), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{arguments.output} cannot be written: {error.strerror}.") from error
    elif arguments.json != STDOUT:
        print(markdown(rows), end="")
    return 0


def markdown(rows: list[KeyReference]) -> str:
    """The reference page."""
    parts = [INTRODUCTION]
    for section, keys in groupby(rows, key=lambda row: row.path.partition(".")[0]):
        parts.append(f"\n## {section}\n")
        parts.append("| Key | Type | Default | Scope | Meaning | Why this default |")
        parts.append("| --- | --- | --- | --- | --- | --- |")
        for row in keys:
            key = row.path.partition(".")[2]
            cells = (f"`{key}`", row.type, f"`{row.default}`", row.scope, row.meaning, row.why)
            parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(parts) + "\n"
