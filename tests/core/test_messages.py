"""Every message comes back as it was; whatever else arrives is its sender's fault."""

from __future__ import annotations

import os
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl_torrent.core import messages as m
from p2pfl_torrent.core.errors import LocalProtocolError, RemoteProtocolError

hashes = st.binary(min_size=32, max_size=32)
numbers = st.integers(0, 0xFFFFFFFF)
rounds = st.integers(1, 0xFFFFFFFF)

control = st.one_of(
    st.builds(m.Hello, hashes, st.integers(0, 0xFFFFFFFF), st.booleans(), st.binary(max_size=99)),
    st.builds(m.Ping, numbers),
    st.builds(m.Pong, numbers),
    st.builds(
        m.Availability,
        st.lists(
            st.builds(m.ChunksOf, hashes, rounds, st.binary(max_size=9)), max_size=4
        ).map(tuple),
    ),
    st.builds(m.Have, hashes, st.lists(st.integers(0, 0xFFFF), max_size=9).map(tuple)),
    st.builds(m.GetManifest, hashes, st.booleans()),
    st.builds(m.ManifestData, st.binary(max_size=200)),
    st.builds(m.NoManifest, hashes),
    st.builds(
        m.Request, numbers, hashes, st.integers(0, 0xFFFF), numbers, st.integers(1, 0xFFFF)
    ),
    st.builds(m.Cancel, numbers),
    st.builds(m.Reject, numbers, st.integers(0, 3)),
    st.builds(m.Refuse, st.integers(0, 3), st.text(max_size=20)),
)  # fmt: skip
pieces = st.builds(m.Piece, numbers, st.binary(min_size=1, max_size=99))


def frame(message: m.Message) -> bytes:
    head, payload = m.encode_message(message)
    return head + bytes(payload)


def parse(data: bytes) -> m.Message:
    """The one message of these bytes, as a reader of a stream would."""
    head = data[: m.FRAME_HEADER.size]
    if len(head) < m.FRAME_HEADER.size:
        raise EOFError
    kind, size = m.frame_body_bytes(head, m.MAX_CONTROL_FRAME)
    if len(data) != m.FRAME_HEADER.size + size:
        raise EOFError
    return m.decode_body(kind, data[m.FRAME_HEADER.size :])


@given(control | pieces)
def test_every_message_comes_back_as_it_was(message: m.Message) -> None:
    again = parse(frame(message))
    assert type(again) is type(message)
    assert again == message


def test_every_kind_of_message_has_its_own_number() -> None:
    kinds = typing.get_args(m.ControlMessage)
    tags = [kind.__struct_config__.tag for kind in kinds]
    assert tags == list(range(1, len(kinds) + 1))


@given(control | pieces, st.data())
@settings(max_examples=300)
def test_a_changed_byte_makes_another_message_or_a_fault(
    message: m.Message, data: st.DataObject
) -> None:
    changed = bytearray(frame(message))
    place = data.draw(st.integers(0, len(changed) - 1))
    changed[place] ^= data.draw(st.integers(1, 255))
    try:
        other = parse(bytes(changed))
    except (RemoteProtocolError, EOFError):
        return
    assert parse(frame(other)) == other


@given(st.binary(max_size=120), st.sampled_from([m.TYPE_CONTROL, m.TYPE_PIECE]))
def test_noise_is_a_message_or_its_senders_fault(noise: bytes, kind: int) -> None:
    try:
        message = m.decode_body(kind, noise)
    except RemoteProtocolError:
        return
    assert parse(frame(message)) == message


@given(st.binary(max_size=120))
def test_noise_on_an_availability_topic_is_a_fault(noise: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        m.decode_availability_gossip(noise)


def test_availability_gossips() -> None:
    availability = m.Availability((m.ChunksOf(b"\1" * 32, 7, b"\x80"),))
    assert m.decode_availability_gossip(m.availability_gossip(availability)) == availability
    with pytest.raises(RemoteProtocolError, match="Ping on an availability topic"):
        m.decode_availability_gossip(frame(m.Ping(1))[m.FRAME_HEADER.size :])


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (0, m.TYPE_CONTROL),
        (m.MAX_CONTROL_FRAME + 1, m.TYPE_CONTROL),
        (0xFFFFFFFF, m.TYPE_CONTROL),
        (m.PIECE_HEADER.size, m.TYPE_PIECE),
        (m.MAX_PIECE_FRAME + 1, m.TYPE_PIECE),
        (10, 2),
        (10, 255),
    ],
)
def test_a_frame_out_of_bounds_is_refused_by_its_head(size: int, kind: int) -> None:
    with pytest.raises(RemoteProtocolError):
        m.frame_body_bytes(m.FRAME_HEADER.pack(size, kind), m.MAX_CONTROL_FRAME)


BODY = msgspec.msgpack.encode


@pytest.mark.parametrize(
    "body",
    [
        BODY([2]),  # a field too few
        BODY([2, -1]),
        BODY([2, 1 << 32]),
        BODY([2, 1.5]),
        BODY([2, "1"]),
        BODY([2, True]),
        BODY([99, 1]),
        BODY({"type": 2, "number": 1}),
        BODY([6, b"\0" * 31]),
        BODY([6, "0" * 32]),
        BODY([4, [[b"\0" * 32, 0, b""]]]),
        BODY([5, b"\0" * 32, [0] * (m.MAX_HAVE + 1)]),
        BODY([5, b"\0" * 32, [1 << 16]]),
        BODY([9, 1, b"\0" * 32, 0, 0, 0]),
        BODY([11, 1, 4]),
        BODY([12, 0, "x" * 65537]),
        b"\x92\x0c\xa1\xff",  # a text that is not UTF-8
        b"\x93\x0c\x00\xa1\xff",
        b"\xdd\xff\xff\xff\xff",  # a list of four thousand million, none of which is there
        b"\x92\x04\xdd\xff\xff\xff\xff",
        b"\x92\x07\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,  # a list in a list in a list
        BODY([2, 1]) + b"\0",
    ],
    ids=lambda body: body[:12].hex(),
)
def test_a_body_outside_the_schema_is_refused(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        m.decode_body(m.TYPE_CONTROL, body)


def test_a_later_versions_further_fields_are_ignored() -> None:
    assert m.decode_body(m.TYPE_CONTROL, BODY([2, 1, "more", [1]])) == m.Ping(1)


@pytest.mark.parametrize("body", [b"", b"\0\0\0", b"\0\0\0\0"])
def test_a_piece_has_a_payload(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        m.decode_body(m.TYPE_PIECE, body)


def test_a_pieces_payload_is_never_copied() -> None:
    payload = bytearray(os.urandom(1000))
    _, sent = m.encode_message(m.Piece(5, payload))
    assert sent is payload
    body = bytearray(b"\0\0\0\5") + payload
    received = m.decode_body(m.TYPE_PIECE, body)
    assert isinstance(received, m.Piece)
    body[4] ^= 1
    assert received.data[0] == payload[0] ^ 1


@pytest.mark.parametrize("size", [0, m.MAX_REQUEST_BYTES + 1])
def test_a_piece_out_of_bounds_is_our_own_fault(size: int) -> None:
    with pytest.raises(LocalProtocolError):
        m.encode_message(m.Piece(1, bytes(size)))


def test_the_largest_piece_fits_its_frame() -> None:
    data = frame(m.Piece(1, bytes(m.MAX_REQUEST_BYTES)))
    assert m.frame_body_bytes(data[:5], 1) == (m.TYPE_PIECE, m.MAX_PIECE_FRAME)
