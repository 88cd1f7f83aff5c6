"""The pipeline to one holder over links of any rate and length."""

from __future__ import annotations

from heapq import heappop, heappush

import pytest

from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.pipeline import PickerPolicy, Pipeline

BLOCK = 64 << 10


def carried(bytes_per_second: float, round_trip: float, seconds: float = 60.0) -> float:
    """The share of a link's rate that one holder's pipeline makes use of."""
    pipeline = Pipeline(PeerId("holder"), PickerPolicy())
    pipeline.measured(round_trip)
    now = free_at = 0.0
    got = 0
    under_way: list[tuple[float, int, int]] = []
    while now < seconds:
        while blocks := pipeline.room(BLOCK, 2 << 20):
            request = pipeline.ask((UpdateId(b"u"), 0), 0, blocks, blocks * BLOCK, now)
            free_at = max(free_at, now + round_trip / 2) + request.size / bytes_per_second
            heappush(under_way, (free_at + round_trip / 2, request.number, request.size))
        now, number, size = heappop(under_way)
        pipeline.close(pipeline.piece(number, size, now))
        got += size
    return got / now / bytes_per_second


@pytest.mark.parametrize(
    ("megabits", "round_trip"),
    [(0.128, 0.05), (2, 0.3), (10, 0.45), (100, 0.6), (100, 0.02), (1000, 0.001)],
)
def test_a_link_is_filled_however_long_it_is(megabits: float, round_trip: float) -> None:
    assert carried(megabits * 125_000, round_trip) > 0.85
