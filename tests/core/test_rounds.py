"""The clock of a round: what opens the window, what ends it, and what moves it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.rounds import DeadlineChange, RoundClock
from tests.core.swarm_world import terms

FOUR = {PeerId(name) for name in "abcd"}


def clock(**about: float) -> RoundClock:
    return RoundClock(terms(train_timeout=100.0, exchange_timeout=30.0, **about), 1, 1000.0)


def test_a_quorum_opens_the_window_once() -> None:
    ours = clock()
    assert ours.advance(FOUR, 1001.0) is None
    ours.published(PeerId("a"))
    assert ours.advance(FOUR, 1002.0) is None
    ours.published(PeerId("b"))
    assert ours.advance(FOUR, 1003.0) == DeadlineChange(1033.0, "quorum")
    ours.published(PeerId("c"))
    assert ours.advance(FOUR, 1004.0) is None
    assert [ours.passed(now) for now in (1032.9, 1033.0)] == [False, True]


def test_only_live_members_make_a_quorum() -> None:
    ours = clock()
    for name in "axyz":
        ours.published(PeerId(name))
    assert ours.advance(FOUR, 1001.0) is None
    ours.published(PeerId("b"))
    assert ours.advance(FOUR, 1002.0) is not None


def test_deaths_may_make_a_quorum() -> None:
    ours = clock(quorum=1.0)
    for name in "ab":
        ours.published(PeerId(name))
    assert ours.advance(FOUR, 1001.0) is None
    assert ours.advance({PeerId("a"), PeerId("b")}, 1002.0) is not None


def test_the_train_deadline_opens_the_window_too() -> None:
    ours = clock()
    assert ours.next_wakeup() == 1100.0
    assert ours.advance(FOUR, 1099.0) is None
    assert ours.advance(FOUR, 1100.0) == DeadlineChange(1130.0, "train_timeout")
    assert ours.next_wakeup() == 1130.0


def test_it_is_extended_once_by_half() -> None:
    ours = clock()
    with pytest.raises(AssertionError):
        ours.extend(1001.0)
    ours.advance(FOUR, 1100.0)
    assert ours.extend(1130.0) == DeadlineChange(1145.0, "extension")
    assert not ours.passed(1144.0)
    with pytest.raises(AssertionError):
        ours.extend(1145.0)


@given(st.integers(0, 200), st.floats(0, 1))
def test_one_manifest_is_never_a_quorum(live: int, share: float) -> None:
    need = clock(quorum=share).quorum(live)
    assert need >= 2
    assert need >= share * live
    assert need <= max(2, live)
