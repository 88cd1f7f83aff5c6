"""What modelled links do with pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.simulation import EqualLinks, Link, SharedLinks

A, B, C = map(PeerId, "abc")


def test_equal_links_know_nothing_of_each_other() -> None:
    links = EqualLinks(0.1, 100.0)
    assert links.carry(A, B, 50, 1.0) == (1.5, 1.6)
    assert links.carry(A, C, 50, 1.0) == (1.5, 1.6)


def test_a_piece_takes_its_time_on_the_slower_of_two_links() -> None:
    links = SharedLinks({A: Link(100.0, 1.0, 0.5), B: Link(1.0, 50.0, 0.25)})
    assert links.carry(A, B, 100, 0.0) == (2.0, 2.75)


def test_an_uplink_is_shared() -> None:
    links = SharedLinks({A: Link(100.0, 1.0, 0.0), B: Link(1.0, 1e6, 0.0), C: Link(1.0, 1e6, 0.0)})
    first, second = links.carry(A, B, 100, 0.0), links.carry(A, C, 100, 0.0)
    assert first[1] == pytest.approx(1.0)
    assert second[1] == pytest.approx(2.0)


def test_a_downlink_is_shared_and_holds_the_writers_up() -> None:
    links = SharedLinks({A: Link(1e6, 1.0, 0.0), B: Link(1e6, 1.0, 0.0), C: Link(1.0, 100.0, 0.0)})
    assert links.carry(A, C, 100, 0.0)[1] == pytest.approx(1.0)
    free, arrived = links.carry(B, C, 100, 0.0)
    assert free == arrived == pytest.approx(2.0)


@given(
    pieces=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("abc"), st.integers(1, 1000)), max_size=30
    ).map(lambda pieces: [piece for piece in pieces if piece[0] != piece[1]]),
    rates=st.lists(st.floats(1.0, 1000.0), min_size=6, max_size=6),
)
def test_no_link_carries_more_than_its_rate(
    pieces: list[tuple[str, str, int]], rates: list[float]
) -> None:
    made = {PeerId(n): Link(rates[2 * k], rates[2 * k + 1], 0.0) for k, n in enumerate("abc")}
    links = SharedLinks(made)
    last: dict[tuple[str, str], float] = {}
    up: dict[str, int] = dict.fromkeys("abc", 0)
    down: dict[str, int] = dict.fromkeys("abc", 0)
    for sender, receiver, size in pieces:
        free, arrived = links.carry(PeerId(sender), PeerId(receiver), size, 0.0)
        up[sender] += size
        down[receiver] += size
        assert free <= arrived
        assert arrived >= up[sender] / made[PeerId(sender)].up - 1e-6
        assert arrived >= down[receiver] / made[PeerId(receiver)].down - 1e-6
        assert arrived >= last.get((sender, receiver), 0.0)
        last[sender, receiver] = arrived
