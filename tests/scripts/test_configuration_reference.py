from __future__ import annotations

from p2pfl_torrent.config import KeyReference, reference
from scripts.configuration_reference import PAGE, main, markdown


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(reference()), (
        "run: python scripts/configuration_reference.py"
    )
    assert main(["--check"]) == 0


def test_a_cell_cannot_break_its_row() -> None:
    row = KeyReference("chunk.size", "int | None", "3", "local", "a | b", "why")
    assert "| `size` | int \\| None | `3` | local | a \\| b | why |" in markdown([row])
