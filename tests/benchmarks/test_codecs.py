"""The benchmark of compressions tells what each saves and costs."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import codecs


def test_every_compression_has_a_row(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    assert codecs.main(["--megabytes", "4", "--repeats", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["codecs"]
    assert rows.keys() == {compression.name for compression in codecs.COMPRESSIONS}
    assert rows["none"]["error_max"] == 0 == rows["zstd:3"]["error_max"]
    assert rows["delta+int8"]["error_max"] < rows["int8"]["error_max"] / 50
    assert rows["int8"]["bytes_ratio"] < 0.3 < rows["bf16"]["bytes_ratio"] < 0.55
