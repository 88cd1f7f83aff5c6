"""What closes a round and what counts in it, over small ledgers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil

import msgspec
import pytest

from p2pfl_torrent.core.aggregation import discount
from p2pfl_torrent.core.closing import (
    SMALLEST_FACTOR,
    Standing,
    Window,
    counts,
    predicted_miss,
    standing,
    too_late,
    verdict,
)
from p2pfl_torrent.core.events import Fill
from p2pfl_torrent.core.ledger import Ledger
from p2pfl_torrent.core.manifest import Manifest, UpdateId
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
    assert state == Standing((C,), False, True, SIZE + 700, 2 * SIZE, SIZE - 700, viable=True)
    assert state.completeness == (SIZE + 700) / (2 * SIZE)
    nobody_has_it = stand(made, Verified({part.update: 700}, set()), {A: 1, B: 1})
    assert nobody_has_it == Standing((), False, True, SIZE + 700, 2 * SIZE, 0, viable=True)


def critical(manifest: Manifest, share: float) -> list[int]:
    """Chunks by rank, the most important first, down to the share."""
    ranked = sorted(range(9), key=lambda chunk: -manifest.entries[chunk].rank)
    return ranked[: ceil(share * 9)]


def without(manifest: Manifest, *chunks: int) -> str:
    return "".join("." if chunk in chunks else "#" for chunk in range(9))


def test_a_round_is_viable_with_the_critical_chunks_of_a_quorum() -> None:
    mine, b, c = update(2), update(2, "b"), update(2, "c")
    (first, second, third), (of_c, *_) = critical(b, 0.3), critical(c, 0.3)

    def viable(held_b: str, held_c: str, live: str = "abcd", round: int = 2) -> bool:
        made = ledger((mine, "#########"), (b, held_b), (c, held_c), critical_share=0.3)
        sources = Verified({}, set())
        return stand(made, sources, {PeerId(name): 1 for name in live}, round).viable

    others = [chunk for chunk in range(9) if chunk not in (first, second, third)]
    assert viable(without(b, *others), ".........")  # mine and b's: two of four
    for chunk in (first, second, third):
        assert not viable(without(b, chunk), ".........")
    assert not viable("#########", without(c, of_c), "abcdef")  # three of six are needed
    assert viable("#########", without(c, *others_of(c)), "abcdef")
    assert not viable("#########", "#########", round=3)  # of the round before


def others_of(manifest: Manifest) -> list[int]:
    return [chunk for chunk in range(9) if chunk not in critical(manifest, 0.3)]


def test_a_joiner_makes_no_quorum_larger_before_its_round() -> None:
    made = ledger((update(2), "#########"), (update(2, "b"), "#########"))
    live = {A: 1, B: 1, C: 1, PeerId("d"): 1}
    newcomer = PeerId("e")
    assert stand(made, Verified({}, set()), {**live, newcomer: 3}).viable
    assert not stand(made, Verified({}, set()), {**live, newcomer: 2}).viable


def test_what_counts_says_how_much_of_the_critical_is_here() -> None:
    b = update(2, "b")
    (first, *_) = critical(b, 0.5)
    made = ledger((b, without(b, first)), critical_share=0.5)
    (found,) = counts(local=A, round=2, terms=TERMS, ledger=made, dead=set())
    assert found.critical == pytest.approx(4 / 5)


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
    # The oldest is three rounds old.
    assert found.fills == {2: Fill(old.update, 10.0), 3: Fill(old.update, 10.0)}


def test_a_fill_weighs_less_the_older_it_is_and_never_nothing() -> None:
    first, second, part = update(1, "b"), update(2, "b"), update(3, "b")
    made = ledger((first, "#########"), (second, "####....."), (part, "##......."))
    made.count(first.update, range(9), 1)
    made.count(second.update, range(4), 2)

    def weights(decay: float) -> list[float]:
        agreed = msgspec.structs.replace(TERMS, fill_decay=decay)
        (found,) = counts(local=A, round=3, terms=agreed, ledger=made, dead=set())
        return [fill.weight / found.weight for _, fill in sorted(found.fills.items())]

    assert weights(0.25) == [0.25] * 2 + [0.0625] * 5
    assert weights(1e-300) == [SMALLEST_FACTOR] * 7


@pytest.mark.parametrize("fill", ["renormalise", "round_start"])
def test_where_the_swarm_agreed_on_another_fill_no_old_chunk_stands_in(fill: str) -> None:
    old, part = update(1, "b"), update(2, "b")
    made = ledger((old, "#########"), (part, "##......."))
    made.count(old.update, range(9), 1)
    agreed = msgspec.structs.replace(TERMS, fill=fill)
    (found,) = counts(local=A, round=2, terms=agreed, ledger=made, dead=set())
    assert (found.chunks, dict(found.fills)) == ((0, 1), {})


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


def stands(**changes: object) -> Standing:
    """One update of 1,000 bytes is expected, half of it is here, and a holder has the rest."""
    half = Standing((B,), False, True, verified=500, announced=1000, obtainable=500, viable=False)
    return replace(half, **changes)  # type: ignore[arg-type]


def windows(**changes: object) -> Window:
    """Ten seconds are left, in which 100 bytes come."""
    ten = Window(left=10.0, extension=5.0, rate=10.0, settled=False)
    return replace(ten, **changes)  # type: ignore[arg-type]


COMPLETE = {"waiting_for": (), "lacking": False, "verified": 1000, "obtainable": 0}
NOBODY = {"waiting_for": (), "obtainable": 0}


@pytest.mark.parametrize(
    ("state", "window", "min_completion", "is_hopeless", "expected"),
    [
        ({}, {}, 0.0, False, None),
        (COMPLETE, {}, 0.0, False, "complete"),
        (COMPLETE, {"left": 0.0}, 0.9, False, "complete"),
        ({"waiting_for": ()}, {"settled": True}, 0.0, False, None),
        (NOBODY, {"settled": True}, 0.0, False, "settled"),
        (NOBODY, {}, 0.0, False, None),
        ({}, {"left": 0.0}, 0.0, False, "deadline"),
        ({}, {"left": 0.0}, 0.55, False, "extend"),
        ({}, {"left": 0.0}, 0.56, False, "deadline"),
        ({"viable": True}, {"left": 0.0}, 0.55, False, "deadline"),
        ({"viable": True}, {}, 0.55, False, None),
        ({"viable": True}, {}, 0.55, True, "deadline"),
        ({}, {"left": 0.0, "extension": 0.0}, 0.55, False, "deadline"),
        ({"obtainable": 10}, {"left": 0.0}, 0.55, False, "deadline"),
        ({}, {}, 0.0, True, "deadline"),
        ({}, {}, 0.55, True, None),
        ({"unannounced": True}, {}, 0.0, True, None),
        ({"lacking": False}, {}, 0.0, True, None),
    ],
)
def test_what_closes_a_round(
    state: dict[str, object],
    window: dict[str, object],
    min_completion: float,
    is_hopeless: bool,
    expected: str | None,
) -> None:
    found = verdict(stands(**state), windows(**window), min_completion, lambda: is_hopeless)
    assert found == expected


def test_what_will_miss_the_deadline() -> None:
    assert predicted_miss(stands(), windows()) == 0.8
    assert predicted_miss(stands(), windows(left=50.0)) == 0.0
    assert predicted_miss(stands(), windows(left=-1.0)) == 1.0
    for unknown in (windows(left=None), windows(rate=0.0)):
        assert predicted_miss(stands(), unknown) == 0.0
    assert predicted_miss(stands(**COMPLETE), windows()) == 0.0
