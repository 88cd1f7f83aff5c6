"""The bound that shaped links are judged by, and what is made of the members' answers."""

from __future__ import annotations

import pytest

from benchmarks.links import Trial, Watch
from benchmarks.links_bound import Goodput, bound
from testnet.netns import Link, Place

FULL = {place: {0, 1, 2} - {place} for place in range(3)}
RING = {0: {1, 3}, 1: {0, 2}, 2: {1, 3}, 3: {2, 0}}


def test_equal_links_are_bound_by_all_of_them() -> None:
    best = bound(10.0, [Goodput(1.0, 1.0)] * 3, FULL)
    assert best.seconds == 20.0  # each sends two updates, and receives two


def test_a_slow_uplink_carries_its_own_update_once() -> None:
    best = bound(10.0, [Goodput(0.1, 100.0), Goodput(100.0, 100.0), Goodput(100.0, 100.0)], FULL)
    assert (best.seconds, best.peers, best.up) == (100.0, (0,), True)


def test_a_slow_downlink_carries_all_others() -> None:
    best = bound(10.0, [Goodput(100.0, 100.0), Goodput(100.0, 0.1), Goodput(100.0, 100.0)], FULL)
    assert (best.seconds, best.peers, best.up) == (200.0, (1,), False)


def test_too_little_upload_in_all_binds_all() -> None:
    links = [Goodput(1.0, 100.0), Goodput(1.0, 100.0), Goodput(0.5, 100.0)]
    best = bound(10.0, links, FULL)
    assert (best.seconds, best.peers) == (60.0 / 2.5, (0, 1, 2))


def test_a_cut_of_the_overlay_binds() -> None:
    """In a ring of four, what 2 is to have goes through 1 and 3 alone."""
    links = [Goodput(100.0, 100.0), Goodput(0.5, 100.0), Goodput(100.0, 100.0), Goodput(0.5, 100.0)]
    assert bound(10.0, links, RING).seconds == pytest.approx(30.0)
    full = {place: {0, 1, 2, 3} - {place} for place in range(4)}
    assert bound(10.0, links, full).seconds == pytest.approx(20.0)


def test_an_overlay_in_two_parts_has_no_bound() -> None:
    with pytest.raises(ValueError, match="not connected"):
        bound(1.0, [Goodput(1.0, 1.0)] * 3, {0: {1}, 1: {0}, 2: set()})


def row(seconds: float, owners: dict[str, float], downloaded: int) -> dict[str, object]:
    return {
        "exchange_seconds": seconds,
        "owners": owners,
        "payload": downloaded,
        "duplicate": 0,
        "downloaded": downloaded,
        "control_down": 0,
        "uploaded": 0,
        "control": 10,
    }


def test_a_crippled_device_is_judged_by_its_link_and_not_waited_for() -> None:
    places = [Place(str(number), "", Link()) for number in range(3)]
    goodputs = [Goodput(10.0, 10.0), Goodput(10.0, 10.0), Goodput(0.1, 0.2)]
    trial = Trial(places, goodputs, 1, 100, 50.0, {"type": "full"})
    rows = [
        row(12.0, {"a": 1.0, "b": 1.0, "c": 0.1}, 100),
        row(20.0, {"a": 0.5, "b": 1.0, "c": 0.0}, 50),
        row(50.0, {"c": 1.0}, 9),
    ]
    watch = Watch([])
    watch.samples = [[(0.0, 0, 0), (1.0, 10, 10), (2.0, 20, 20)]] * 3
    figures = trial.figures(rows, "abc", FULL, watch, began=0.0)
    assert figures.bound_seconds == 10.0
    assert (figures.seconds, figures.ratio) == (20.0, 2.0)
    assert figures.completeness == [1.0, 0.75]
    assert figures.crippled == [pytest.approx(9 / (0.2 * 50.0))]
    assert figures.bottleneck_idle == 0.0


def test_idle_is_time_with_less_than_half_of_the_mean() -> None:
    watch = Watch([])
    watch.samples = [[(0.0, 0, 0), (1.0, 0, 100), (2.0, 0, 110), (3.0, 0, 210), (9.0, 0, 210)]]
    assert watch.idle([0], False, until=5.0) == pytest.approx(1 / 3)
