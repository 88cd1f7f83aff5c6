"""Makes ``docs/reference/configuration.md`` from the schema: run it after changing a key.

python scripts/configuration_reference.py           # writes the page
python scripts/configuration_reference.py --check   # exit 1 if it is not up to date
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from p2pfl_torrent.config import KeyReference, reference

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "configuration.md"

INTRODUCTION = """\
# Configuration reference

Made by `python scripts/configuration_reference.py` from the schema that checks configurations.
`examples/swarm.yaml` is a file to start from; every key may be left out. An unknown key is an
error. Keys marked *genesis* must be the same on all peers of a swarm: a peer that differs is told
in which. *Local* ones are each peer's own business.
"""


def markdown(rows: Iterable[KeyReference]) -> str:
    """The page."""
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


def main(arguments: list[str]) -> int:
    """Write the page, or compare it."""
    text = markdown(reference())
    if "--check" in arguments:
        return 0 if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
