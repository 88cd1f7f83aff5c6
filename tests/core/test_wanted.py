"""Manifests heard of but not here: whom to ask, whom to ask next, and no more than that."""

from __future__ import annotations

from p2pfl_torrent.core.census import MAX_MEMBERS
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.wanted import MANIFEST_PATIENCE, MAX_ASKED, MAX_OFFERS, Wanted

A, B = PeerId("a"), PeerId("b")
U, V = UpdateId(b"u" * 32), UpdateId(b"v" * 32)
LATER = MANIFEST_PATIENCE + 0.5


def numbered(number: int) -> UpdateId:
    return UpdateId(number.to_bytes(32, "big"))


def test_what_is_offered_is_asked_for_once() -> None:
    wanted = Wanted(8)
    wanted.offer(A, U, 1, [0, 3], 0)
    assert wanted.ask(0.0, 2) == [(A, U)]
    assert wanted.ask(1.0, 2) == []


def test_another_is_asked_when_one_is_late_and_the_same_again_if_there_is_no_other() -> None:
    wanted = Wanted(8)
    wanted.offer(A, U, 1, [0], 0)
    wanted.offer(B, U, 1, [0], 0)
    assert wanted.ask(0.0, 2) == [(A, U)]
    assert wanted.next_timeout() == MANIFEST_PATIENCE
    assert wanted.ask(LATER, 2) == [(B, U)]
    wanted.withdraw(A, U)
    assert wanted.ask(2 * LATER, 2) == [(B, U)]


def test_another_is_asked_at_once_when_one_has_it_not() -> None:
    wanted = Wanted(8)
    wanted.offer(A, U, 1, [0], 0)
    wanted.offer(B, U, 1, [0], 0)
    wanted.ask(0.0, 2)
    wanted.withdraw(A, U)
    assert wanted.ask(0.0, 2) == [(B, U)]
    wanted.remove_peer(B)
    assert wanted.ask(0.0, 2) == []
    assert len(wanted) == 0


def test_a_seen_header_waits_for_whoever_offers_it() -> None:
    wanted = Wanted(8)
    wanted.seen(U, 1)
    assert wanted.ask(0.0, 2) == []
    assert wanted.next_timeout() is None
    wanted.offer(A, U, None, [1], 0)
    assert wanted.ask(0.0, 2) == [(A, U)]
    wanted.withdraw(A, U)
    assert len(wanted) == 1


def test_a_round_that_is_yet_to_come_is_waited_for() -> None:
    wanted = Wanted(8)
    wanted.offer(A, U, 5, [0], 0)
    wanted.offer(A, V, None, [0], 0)
    assert wanted.ask(0.0, 4) == [(A, V)]
    wanted.dated(V, 6)
    assert wanted.ask(LATER, 5) == [(A, U)]
    assert wanted.ask(LATER, 6) == [(A, V)]


def test_what_was_offered_is_told_when_the_manifest_is_here() -> None:
    wanted = Wanted(8)
    wanted.offer(A, U, 1, [0, 3], 0)
    wanted.offer(A, U, None, [4], 0)
    wanted.offer(B, U, 1, [7], 3)
    offers = wanted.found(U)
    assert {peer: (list(o.chunks), o.counted_in) for peer, o in offers.items()} == {
        A: ([0, 3, 4], 0),
        B: ([7], 3),
    }
    assert wanted.found(U) == {}


def test_old_rounds_are_forgotten() -> None:
    wanted = Wanted(8)
    wanted.offer(A, U, 1, [0], 0)
    wanted.offer(A, V, 2, [0], 0)
    wanted.offer(A, numbered(1), None, [0], 0)
    wanted.forget_before(2)
    assert wanted.ask(0.0, 2) == [(A, V)]
    assert len(wanted) == 1


def test_each_peers_offers_are_bounded_and_come_back_when_resolved() -> None:
    wanted = Wanted(8)
    for number in range(2 * MAX_OFFERS):
        wanted.offer(A, numbered(number), 1, [0], 0)
    assert len(wanted) == MAX_OFFERS
    wanted.offer(B, U, 1, [0], 0)
    assert (B, U) in wanted.ask(0.0, 2)
    wanted.found(numbered(0))
    wanted.offer(A, V, 1, [0], 0)
    assert len(wanted) == MAX_OFFERS + 1


def test_a_newcomer_gets_all_that_the_largest_swarm_offers() -> None:
    """By its only neighbour: of the round, the one before, as late as they may be, and the next."""
    wanted = Wanted(8)
    rounds = 4  # max_staleness is 2 unless set
    for number in range(MAX_MEMBERS * rounds):
        wanted.offer(A, numbered(number), 1 + number // MAX_MEMBERS, [0, 5], 0)
    got = 0
    while asked := wanted.ask(0.0, rounds):
        for peer, update in asked:
            assert list(wanted.found(update)[peer].chunks) == [0, 5]
            got += 1
    assert got == MAX_MEMBERS * rounds


def test_one_peer_is_asked_for_a_few_at_a_time() -> None:
    wanted = Wanted(8)
    for number in range(3 * MAX_ASKED):
        wanted.offer(A, numbered(number), 1, [0], 0)
    first = wanted.ask(0.0, 2)
    assert len(first) == MAX_ASKED
    wanted.found(first[0][1])
    assert len(wanted.ask(1.0, 2)) == 1
    assert len(wanted.ask(LATER, 2)) == MAX_ASKED - 1
    timeout = wanted.next_timeout()
    assert timeout is not None
    assert timeout == 1.0 + MANIFEST_PATIENCE  # nothing that a full peer keeps waiting is due


def test_the_asked_are_spread_over_those_who_offer() -> None:
    wanted = Wanted(8)
    for number in range(10):
        for peer in (A, B):
            wanted.offer(peer, numbered(number), 1, [0], 0)
    asked = [peer for peer, _ in wanted.ask(0.0, 2)]
    assert asked.count(A) == asked.count(B) == 5


def test_looking_ahead_asks_once_for_what_is_to_come_and_again_in_its_time() -> None:
    wanted = Wanted(8)
    wanted.offer(A, U, 7, [0], 0)
    assert wanted.ask(0.0, 2) == []
    wanted.look_ahead(True)
    assert wanted.ask(0.0, 2) == [(A, U)]
    wanted.dated(U, 7)
    wanted.offer(B, U, 7, [1], 0)
    assert wanted.ask(1.0, 2) == []
    wanted.look_ahead(False)
    assert wanted.ask(1.0, 6) == []
    assert wanted.ask(1.0, 7) == [(A, U)]
