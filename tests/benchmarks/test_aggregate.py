"""The benchmark of averaging compares two ways to one result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import aggregate


@pytest.mark.parametrize("name", ["fedavg", "fedadam"])
def test_both_ways_lead_to_the_same_bits(tmp_path: Path, name: str) -> None:
    file = tmp_path / "result.json"
    arguments = ["--updates", "3", "--megabytes", "0.5", "--repeats", "1", "--json", str(file)]
    assert aggregate.main([*arguments, "--aggregator", name]) == 0
    result = json.loads(file.read_text())
    assert {"gb_per_s", "numpy_gb_per_s", "ratio", "rss_peak_mb"} <= result.keys()


def test_another_result_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def biased(loaded: object) -> dict[str, object]:
        return {f"layer{k}.weight": np.zeros((1000, 6), np.float32) for k in range(20)}

    monkeypatch.setattr(aggregate, "summed_by_numpy", biased)
    assert aggregate.main(["--updates", "2", "--megabytes", "0.48", "--repeats", "1"]) == 1
