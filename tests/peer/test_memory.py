"""A peer's memory in an exchange: its own update, and little more than that."""

from __future__ import annotations

import pytest

from benchmarks.memory import exchange

MEGABYTES = 80.0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_exchange_makes_no_copy_of_the_model() -> None:
    done = exchange(2, MEGABYTES, rounds=1)
    assert done.complete
    assert done.hashes_equal
    # A chunk, the tiles of a sum, and what is on its way: 20 to 30 MB. A copy would be 80 more.
    assert done.peak_without_update_mb < MEGABYTES * 0.75
