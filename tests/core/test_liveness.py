"""Silence, probes and how slow links stretch every time of the detector."""

from __future__ import annotations

import pytest

from p2pfl_torrent.core.liveness import MAX_PATIENCE, Liveness, LivenessPolicy
from p2pfl_torrent.core.peers import PeerId

A = PeerId("a")
POLICY = LivenessPolicy()


def watching(now: float = 0.0) -> Liveness:
    liveness = Liveness(POLICY)
    liveness.watch([A], now)
    return liveness


def asked(liveness: Liveness, now: float) -> bool:
    return list(liveness.questionable(now)) == [A]


def test_a_fast_link_keeps_the_policys_times() -> None:
    liveness = watching()
    for second in range(10):
        liveness.heard(A, float(second), 0.001)
    assert liveness.probe_timeout(A) == POLICY.probe_timeout
    assert not asked(liveness, 9 + POLICY.probe_after - 0.01)
    assert asked(liveness, 9 + POLICY.probe_after)


def test_a_slow_link_is_given_its_round_trips() -> None:
    liveness = watching()
    for second in range(30):
        liveness.heard(A, float(second), 1.0)
    stretched = POLICY.round_trips * 1.0
    assert liveness.probe_timeout(A) == pytest.approx(stretched, rel=0.05)
    assert not asked(liveness, 29 + 0.9 * stretched)
    assert asked(liveness, 29 + 1.1 * stretched)


def test_no_link_is_so_slow_that_death_goes_unnoticed() -> None:
    liveness = watching()
    liveness.heard(A, 0.0, 1000.0)
    assert liveness.probe_timeout(A) == POLICY.longest


def test_silence_alone_is_no_suspicion_before_its_time() -> None:
    liveness = watching()
    liveness.heard(A, 1.0)
    assert not liveness.is_gone(A, 1.0 + POLICY.suspect_after - 0.01)
    assert liveness.is_gone(A, 1.0 + POLICY.suspect_after)


def test_a_lost_edge_is_asked_about_at_once_until_something_is_heard() -> None:
    liveness = watching()
    liveness.heard(A, 1.0)
    assert liveness.edge_lost(A)
    assert asked(liveness, 1.0)
    assert liveness.is_gone(A, 1.0)
    liveness.heard(A, 1.1)
    assert not asked(liveness, 1.1)
    assert not liveness.is_gone(A, 1.1)


def test_probes_of_one_peer_do_not_overlap_or_follow_at_once() -> None:
    liveness = watching()
    assert liveness.begin_probe(A)
    assert not liveness.begin_probe(A)
    assert not asked(liveness, 5.0)
    liveness.end_probe(A, 5.0)
    assert not asked(liveness, 5.5)
    assert asked(liveness, 6.0)


def test_who_is_unreachable_for_us_alone_is_asked_less_and_less() -> None:
    liveness = watching()
    waits = []
    now = 0.0
    for _ in range(6):
        liveness.renewed(A, now, unheard=True)
        start = now
        while not liveness.is_gone(A, now):
            now += 0.25
        waits.append(now - start)
    assert waits == sorted(waits)
    assert waits[-1] == MAX_PATIENCE * POLICY.suspect_after
    liveness.heard(A, now)
    assert liveness.is_gone(A, now + POLICY.suspect_after)


def test_whoever_is_not_watched_is_never_asked() -> None:
    liveness = watching()
    liveness.watch([], 1.0)
    assert not list(liveness.questionable(100.0))
    assert not liveness.is_gone(A, 100.0)
    assert not liveness.edge_lost(A)


def test_a_pause_of_this_process_is_nobodys_silence() -> None:
    liveness = watching()
    liveness.heard(A, 1.0)
    liveness.slept(60.0, 61.5)
    assert liveness.silence(A, 61.5) == pytest.approx(0.5)
    liveness.slept(60.0, 62.0)
    assert liveness.silence(A, 62.0) == 0.0
