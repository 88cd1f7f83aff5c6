"""The benchmark of scoring tells what each method costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import scoring


# torch has no batched rule for the backward pass of attention on the CPU, and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_every_method_has_a_share_on_every_model(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    assert scoring.main(["--steps", "2", "--repeats", "1", "--json", str(file)]) == 0
    shares = json.loads(file.read_text())["shares"]
    assert shares.keys() == scoring.MODELS.keys()
    for row in shares.values():
        assert set(row) == set(scoring.METHODS)
        assert all(share > 0 for share in row.values())
