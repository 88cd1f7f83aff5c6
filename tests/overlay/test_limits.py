from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pfl_torrent.overlay.limits import TokenBuckets


def test_a_burst_then_the_rate() -> None:
    buckets = TokenBuckets(rate=2, burst=3)
    assert [buckets.take("a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert [buckets.take("a", 0.5) for _ in range(2)] == [True, False]
    assert buckets.take("b", 0.5)


def test_more_than_the_burst_is_never_allowed() -> None:
    buckets = TokenBuckets(rate=100, burst=3)
    assert not buckets.take("a", 1000.0, amount=4)
    assert buckets.take("a", 1000.0, amount=3)


def test_full_buckets_are_forgotten() -> None:
    buckets = TokenBuckets(rate=1, burst=2, max_keys=10)
    for number in range(1000):
        buckets.take(number, now=float(number))
    assert len(buckets._buckets) <= 11


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0, 3)), max_size=50))
def test_no_interval_gets_more_than_rate_and_burst(steps: list[tuple[float, float]]) -> None:
    buckets = TokenBuckets(rate=2.0, burst=5.0)
    now = spent = 0.0
    for pause, amount in steps:
        now += pause
        if buckets.take("key", now, amount):
            spent += amount
        assert spent <= 5.0 + 2.0 * now + 1e-6
