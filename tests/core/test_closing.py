"""What closes a round and what counts in it, over small ledgers."""

from __future__ import annotations

from collections.abc import Mapping

from p2pfl_torrent.core.aggregation import discount
from p2pfl_torrent.core.closing import Standing, counts, standing, too_late
from p2pfl_torrent.core.ledger import Ledger
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from tests.core.small_ledgers import ledger, update
from tests.core.swarm_world import terms

TERMS = terms(max_staleness=2, fill_max_age=2)
A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
SIZE = update(1).header.payload_bytes


class Verified:
    """What a picker knows: bytes here of each update, and which some holder has more of."""

    def __init__(self, here: Mapping[UpdateId, int], offered: set[UpdateId]) -> None:
        self._here, self._offered = here, offered

    def bytes_verified(self, update: UpdateId) -> int:
        return self._here.get(update, 0)

    def missing_available(self, update: UpdateId) -> bool:
        return update in self._offered


def stand(made: Ledger, sources: Verified, live: Mapping[PeerId, int], round: int = 2) -> Standing:
    return standing(local=A, round=round, terms=TERMS, ledger=made, sources=sources, live=live)


def count(made: Ledger, round: int, dead: set[PeerId] | None = None) -> list[tuple[str, int, str]]:
    found = counts(local=A, round=round, terms=TERMS, ledger=made, dead=dead or set())
    return [(c.manifest.owner, c.manifest.round, c.status) for c in found]


def test_a_round_stands_on_what_others_announced() -> None:
    mine, whole, part = update(2), update(2, "b"), update(2, "c")
    made = ledger((mine, "#########"), (whole, "#########"), (part, "##......."))
    state = stand(made, Verified({part.update: 700}, {part.update}), {A: 1, B: 1, C: 1})
    assert state == Standing((C,), False, True, SIZE + 700, 2 * SIZE, SIZE - 700)
    assert state.completeness == (SIZE + 700) / (2 * SIZE)
    nobody_has_it = stand(made, Verified({part.update: 700}, set()), {A: 1, B: 1})
    assert nobody_has_it == Standing((), False, True, SIZE + 700, 2 * SIZE, 0)


def test_nothing_announced_is_complete() -> None:
    state = stand(ledger((update(2), "#########")), Verified({}, set()), {A: 1})
    assert state.completeness == 1.0
    assert not state.waiting_for
    assert not state.lacking


def test_joiners_are_not_waited_for_and_liars_neither() -> None:
    made = ledger((update(2, "b"), "........."))
    made.see(update(2, "b", salt="other").signed)
    state = stand(made, Verified({}, set()), {A: 1, B: 1, C: 3})
    assert state.waiting_for == ()
    assert stand(made, Verified({}, set()), {A: 1, B: 1, C: 2}).waiting_for == (C,)


def test_what_counts_and_how() -> None:
    made = ledger(
        (update(2, "a"), "#########"),
        (update(2, "b"), "##......."),
        (update(2, "c"), "........."),
        (update(1, "c"), "#########"),
        (update(1, "d"), "####....."),
    )
    assert count(made, 2) == [("a", 2, "complete"), ("b", 2, "partial"), ("c", 1, "late")]
    assert count(made, 2, {B})[1] == ("b", 2, "dead")
    # A late one that is incomplete waits as long as it may; then what is here counts.
    assert ("d", 1, "late") in count(made, 3)


def test_lateness_costs_weight() -> None:
    made = ledger((update(1, "b"), "#########"))
    for round in (1, 2, 3):
        (found,) = counts(local=A, round=round, terms=TERMS, ledger=made, dead=set())
        assert found.weight == 10 * discount(round - 1)
    assert counts(local=A, round=4, terms=TERMS, ledger=made, dead=set()) == ()


def test_missing_chunks_are_filled_with_what_is_not_too_old() -> None:
    old, older, part = update(2, "b"), update(1, "b"), update(4, "b")
    made = ledger((older, "#########"), (old, "####....."), (part, "##......."))
    made.count(old.update, range(4), 2)
    made.count(older.update, range(9), 1)
    (found,) = counts(local=A, round=4, terms=TERMS, ledger=made, dead=set())
    assert found.chunks == (0, 1)
    assert found.fills == {2: old.update, 3: old.update}  # the oldest is three rounds old


def test_a_late_update_that_counts_fills_nothing_besides() -> None:
    late, part = update(1, "b"), update(2, "b")
    made = ledger((late, "#########"), (part, "##......."))
    found = counts(local=A, round=2, terms=TERMS, ledger=made, dead=set())
    assert [(c.manifest.round, dict(c.fills)) for c in found] == [(1, {}), (2, {})]


def test_too_late() -> None:
    first, second = update(1, "b"), update(2, "c")
    made = ledger((first, "#........"), (second, "........."))
    assert [known.manifest.owner for known in too_late(made, 4, 2)] == [B]
    made[first.update].dropped = True
    assert too_late(made, 4, 2) == []
    made.count(second.update, (), 3)
    assert too_late(made, 9, 2) == []
