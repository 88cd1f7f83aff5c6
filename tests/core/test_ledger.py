"""Each update counts once; a second manifest excludes; the last received fills a gap."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl_torrent.core.ledger import Ledger
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from tests.core.small_ledgers import bits, ledger, update

A = PeerId("a")


def countable(made: Ledger, round: int, staleness: int = 2) -> list[tuple[str, int]]:
    return [(k.manifest.owner, k.manifest.round) for k in made.countable(round, staleness)]


def test_what_may_count_is_in_canonical_order_and_not_too_old() -> None:
    made = ledger(*((update(r, o), "#########") for r in (3, 1, 2, 4) for o in "ba"))
    assert countable(made, 3) == [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2), ("b", 3)]
    assert countable(made, 4, 1) == [("a", 3), ("a", 4), ("b", 3), ("b", 4)]


def test_an_update_counts_once() -> None:
    first = update(1)
    made = ledger((first, "#########"))
    made.count(first.update, range(9), 1)
    assert countable(made, 1) == countable(made, 2) == []
    assert made[first.update].counted_in == 1


def test_what_was_counted_is_known_after_a_restart() -> None:
    first = update(1)
    made = ledger((first, "####....."))
    made.restore_counted({first.update: 1, UpdateId(b"x" * 32): 1})
    assert countable(made, 2) == []
    assert made.ages(A, 3) == [2, 2, 2, 2, 3, 3, 3, 3, 3]


def test_two_manifests_for_a_round_exclude_both_and_are_proven_once() -> None:
    first, second, third = update(1), update(1, salt="x"), update(1, salt="y")
    made = ledger((first, "#########"), (update(2), "#########"))
    proof = made.see(second.signed)
    assert proof is not None
    assert (proof.owner, proof.round, proof.first, proof.second) == (
        "a",
        1,
        first.update,
        second.update,
    )
    assert made.see(second.signed) is made.see(third.signed) is made.see(first.signed) is None
    assert made.equivocated(A, 1)
    assert made.update_of(A, 1) is None
    assert countable(made, 2) == [("a", 2)]


def test_the_last_received_version_of_a_chunk_fills() -> None:
    old, new = update(1), update(3)
    made = ledger((old, "#########"), (new, "##......."))
    assert made.fill(A, 0, 4, 5) == new.update
    assert made.fill(A, 8, 4, 5) == old.update
    assert made.fill(A, 8, 4, 2) is None  # three rounds old
    assert made.fill(A, 0, 2, 5) is None  # of a later round
    assert made.fill(PeerId("b"), 0, 4, 5) is None
    late = update(2)
    made.see(late.signed)
    made.add(late, bits("#########"))
    assert made.fill(A, 0, 4, 5) == new.update
    assert made.fill(A, 8, 4, 5) == late.update


def test_what_left_the_store_fills_no_more() -> None:
    old = update(1)
    made = ledger((old, "#########"))
    made.forget(old.update)
    made.forget(old.update)
    assert made.fill(A, 0, 2, 5) is None
    assert old.update not in made
    assert A in made.publishers(1)
    made.forget_rounds_before(2)
    assert A not in made.publishers(1)


def test_publishers_are_known_by_their_headers() -> None:
    made = Ledger(9, 0.3)
    made.see(update(1).signed)
    made.see(update(1, "b").signed)
    made.see(update(2, "b").signed)
    assert made.publishers(1) == {"a", "b"}
    assert made.publishers(2) == {"b"}


def test_what_earlier_aggregates_hold() -> None:
    first, second, third = update(1), update(1, "b"), update(2)
    made = ledger((first, "#########"), (second, "#########"), (third, "#########"))
    made.count(first.update, [], 1)
    made.count(third.update, [], 2)
    assert made.counted_before(2) == {first.update: 1}
    assert made.counted_before(3) == {first.update: 1, third.update: 2}


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1.0])
@given(wanted=st.sets(st.integers(0, 8), min_size=1), order=st.permutations(range(9)))
def test_critical_are_the_highest_ranks_of_what_is_taken(
    share: float, wanted: set[int], order: list[int]
) -> None:
    manifest = update(1)
    made = Ledger(9, share)
    taken = bits("".join("#" if chunk in wanted else "." for chunk in range(9)))
    known = made.add(manifest, wanted=taken)
    by_rank = sorted(wanted, key=lambda chunk: manifest.entries[chunk].rank)
    assert known.critical == set(by_rank[-ceil(share * len(wanted)) :])
    for count, chunk in enumerate(order):
        made.hold(manifest.update, chunk)
        made.hold(manifest.update, chunk)  # again: nothing changes
        here = known.critical.intersection(order[: count + 1])
        assert known.critical_here == len(here) / len(known.critical)
