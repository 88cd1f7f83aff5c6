"""What `connect` makes of its members' answers."""

from __future__ import annotations

import pytest

from benchmarks.connect import figures


def answer(at: float, **links: float) -> dict[str, object]:
    return {"at": at, "links": links, "cpu_seconds": 0.5}


def test_a_mesh_is_up_when_its_last_member_is() -> None:
    rows = [answer(11.0, b=0.1, c=0.2), answer(11.5, a=0.3, c=0.1), answer(11.2, a=0.1, b=0.4)]
    mesh = figures(rows, began=10.0)
    assert (mesh.seconds, mesh.links) == (1.5, 3)
    assert mesh.mean_link_ms == pytest.approx(200.0)
    assert mesh.longest_link_ms == pytest.approx(400.0)
    assert mesh.cpu_seconds == 1.5


def test_a_link_that_did_not_come_up_is_no_figure() -> None:
    with pytest.raises(ValueError, match="1 streams are open, not 2"):
        figures([answer(1.0, b=0.1), answer(1.0)], began=0.0)
