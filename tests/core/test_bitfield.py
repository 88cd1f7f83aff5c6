"""The bitfield against a plain set of numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.errors import RemoteProtocolError


@given(st.integers(0, 70), st.data())
def test_it_is_a_set_of_numbers(length: int, data: st.DataObject) -> None:
    field, model = Bitfield(length), set[int]()
    indices = st.integers(0, max(0, length - 1))
    for add, index in data.draw(st.lists(st.tuples(st.booleans(), indices), max_size=40)):
        if not length:
            continue
        if add:
            assert field.add(index) == (index not in model)
            model.add(index)
        else:
            assert field.discard(index) == (index in model)
            model.discard(index)
    assert list(field) == sorted(model)
    assert field.count == len(model)
    assert len(field) == length
    assert field.complete == (len(model) == length)
    again = Bitfield.from_bytes(field.to_bytes(), length)
    assert again == field
    assert again.count == field.count
    assert repr(field).count("1") == len(model)


@given(st.binary(max_size=6), st.integers(0, 40))
def test_bytes_of_a_peer_are_a_bitfield_or_its_fault(data: bytes, length: int) -> None:
    try:
        field = Bitfield.from_bytes(data, length)
    except RemoteProtocolError:
        spare = len(data) * 8 - length
        assert not 0 <= spare < 8 or int.from_bytes(data, "big") & ((1 << spare) - 1)
    else:
        assert field.to_bytes() == data
        assert all(0 <= index < length for index in field)


def test_the_first_bit_is_the_most_significant() -> None:
    assert list(Bitfield.from_bytes(b"\x80\x01", 16)) == [0, 15]


def test_full_is_complete() -> None:
    assert [Bitfield.full(length).complete for length in (0, 1, 8, 9)] == [True] * 4
    assert Bitfield.full(9).to_bytes() == b"\xff\x80"


@pytest.mark.parametrize("index", [-1, 8])
def test_an_index_outside_is_an_error(index: int) -> None:
    with pytest.raises(IndexError):
        Bitfield(8).add(index)
