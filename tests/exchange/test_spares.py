"""Buffers that are used again: never by two, never without bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pfl_torrent.exchange.spares import MAX_SPARE, MIN_SPARE, Spares

SIZES = st.sampled_from([1, 100, MIN_SPARE - 1, MIN_SPARE, MIN_SPARE + 1, 1 << 20, 2 << 20])


def test_a_buffer_that_was_given_back_is_used_again() -> None:
    spares = Spares()
    first = spares.take(2 * MIN_SPARE)
    buffer = first.obj
    spares.give(first)
    second = spares.take(MIN_SPARE)
    assert second.obj is buffer
    assert len(second) == MIN_SPARE
    assert spares.take(MIN_SPARE).obj is not buffer


def test_a_small_message_holds_no_large_buffer() -> None:
    spares = Spares()
    spares.give(spares.take(4 * MIN_SPARE))
    assert memoryview(spares.take(MIN_SPARE).obj).nbytes == MIN_SPARE


@given(st.lists(st.tuples(st.booleans(), SIZES), max_size=40))
def test_no_two_have_the_same_buffer_and_little_is_kept(steps: list[tuple[bool, int]]) -> None:
    spares = Spares()
    taken: list[memoryview] = []
    for take, size in steps:
        if take or not taken:
            view = spares.take(size)
            assert len(view) == size
            assert not view.readonly
            assert all(view.obj is not other.obj for other in taken)
            taken.append(view)
        else:
            spares.give(taken.pop(0))
        assert spares.kept <= MAX_SPARE
