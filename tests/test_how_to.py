"""The worked examples of the how-to pages run as they are printed."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from p2pfl_torrent.core.aggregators import make_aggregator

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "aggregators.md"


def test_an_aggregator_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "printed_example.py").write_text(example, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    printed = importlib.import_module("printed_example")
    assert printed.config.federate.aggregator == "midrange"
    combine = make_aggregator("midrange").combine
    assert combine is not None
    assert combine(np.array([[1.0, 2.0], [3.0, 8.0], [2.0, 2.5]]), (1.0,) * 3).tolist() == [2, 5]
