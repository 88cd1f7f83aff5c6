"""What `rounds` makes of its members' answers."""

from __future__ import annotations

from benchmarks.exchange import specs
from benchmarks.member import model
from benchmarks.rounds import figures, small, summary


def answer(seconds: float, delivered: int, twice: int, said: str = "ab") -> dict[str, object]:
    return {
        "seconds": seconds,
        "cpu_seconds": 0.1,
        "gossip_delivered": delivered,
        "gossip_twice": twice,
        "hash": said,
    }


def test_deliveries_are_counted_since_the_round_before() -> None:
    before = [answer(1.0, 10, 3), answer(1.0, 20, 0)]
    after = [answer(0.2, 14, 3), answer(0.4, 21, 2)]
    one = figures(before, after)
    assert one.protocol_seconds == 0.4
    assert (one.gossip_deliveries, one.gossip_duplicates) == (4 + 1 + 2, 2)
    assert one.hashes_equal


def test_the_summary_takes_the_median_and_tells_an_unequal_round() -> None:
    before = [answer(0.0, 0, 0)]
    rows = [figures(before, [answer(seconds, 1, 1)]) for seconds in (0.1, 0.3, 9.0)]
    result = summary(rows)
    assert result["protocol_seconds_median"] == 0.3
    assert result["gossip_deliveries_per_round"] == 2.0
    assert result["hashes_equal"] is True
    unequal = figures([answer(0.0, 0, 0)] * 2, [answer(0.1, 0, 0), answer(0.1, 0, 0, "cd")])
    assert summary([*rows, unequal])["hashes_equal"] is False


def test_the_model_has_the_size_asked_for() -> None:
    for kilobytes in (4.0, 36.0, 1000.0):
        (spec,) = specs(1, kilobytes / 1e3, {"type": "full"}, 1)
        assert 0.8 <= model(small(spec)).nbytes / (kilobytes * 1e3) <= 1.2
