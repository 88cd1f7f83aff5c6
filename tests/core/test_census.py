"""Statements merge alike in any order, are bounded, and cost a signature check only once."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl_torrent.core.census import MAX_MEMBERS, MAX_WITNESSES, Census
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.joining import (
    Join,
    Probe,
    Statements,
    Sync,
    answer_sync,
    decode_answer,
    decode_question,
    encode,
    first_sync,
    second_sync,
)
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.statements import (
    ACTIVE,
    LEFT,
    MAX_BATCH_BYTES,
    MAX_STATEMENTS,
    SIGNING_CONTEXT,
    VERSION,
    MemberRecord,
    Signed,
    Suspicion,
    decode_batch,
    encode_batch,
    sign_statement,
)
from p2pfl_torrent.simulation.world import sign_as, verify
from tests.core.member_network import SWARM
from tests.core.test_membership import record, suspicion

VECTORS = Path(__file__).parents[1] / "vectors" / "membership.json"


def census(*statements: Signed) -> Census:
    result = Census(SWARM, verify)
    result.merge(encode_batch(statements))
    return result


names = st.sampled_from("abcde")
statements = st.lists(
    st.one_of(
        st.builds(
            record, names, st.integers(1, 3), st.sampled_from([ACTIVE, LEFT]), st.integers(1, 3)
        ),
        st.tuples(names, names, st.integers(1, 3))
        .filter(lambda said: said[0] != said[1])
        .map(lambda said: suspicion(*said)),
    ),
    max_size=25,
)


@given(said=statements, data=st.data())
def test_after_comparing_all_know_the_same_whatever_came_first(
    said: list[Signed], data: st.DataObject
) -> None:
    one, other = census(), census()
    for signed in said:
        one.merge(encode_batch([signed]))
    for signed in data.draw(st.permutations(said)):
        other.merge(encode_batch([signed]))
    # A suspicion that came before its subject's record was not understood: comparing brings it.
    for _ in range(2):
        one.merge(other.missing_in(one.fingerprints()))
        other.merge(one.missing_in(other.fingerprints()))
    assert one.digest() == other.digest()
    assert sorted(one.suspects()) == sorted(other.suspects())
    assert not one.merge(other.missing_in(b""))


def test_a_goodbye_voids_what_was_said_before_it_in_the_same_incarnation() -> None:
    here, gone = record("b", 1, ACTIVE, 1), record("b", 1, LEFT, 1)
    said = [record("a", 1, ACTIVE, 1), here, suspicion("a", "b", 1), gone]
    late = census()
    for signed in [said[0], here, gone, said[2]]:
        late.merge(encode_batch([signed]))
    early = census()
    for signed in said:
        early.merge(encode_batch([signed]))
    assert early.digest() == late.digest()
    assert not early.suspects()


@given(said=statements, more=statements)
def test_one_sync_of_two_questions_makes_equal(said: list[Signed], more: list[Signed]) -> None:
    asker, answerer = census(*said), census(*more)
    question: Sync | None = first_sync(SWARM, asker, b"")
    questions = 0
    while question is not None:
        questions += 1
        answerer.merge(question.news)
        answer = answer_sync(answerer, question)
        asker.merge(answer.news)
        if question.fingerprints is not None:
            break
        question = second_sync(SWARM, asker, answer)
    answerer.merge(asker.missing_in(answerer.fingerprints()))
    assert asker.digest() == answerer.digest()
    assert questions <= 2


def test_equal_views_cost_a_few_bytes() -> None:
    many = [record(f"peer{i}") for i in range(100)]
    one, other = census(*many), census(*many)
    question = first_sync(SWARM, one, b"")
    answer = answer_sync(other, question)
    assert second_sync(SWARM, one, answer) is None
    assert len(encode(question)) + len(encode(answer)) < 120


def test_a_signature_is_checked_once_and_not_for_old_news() -> None:
    checked: list[str] = []

    def counting(peer: PeerId, message: bytes, signature: bytes) -> bool:
        checked.append(peer)
        return verify(peer, message, signature)

    known = Census(SWARM, counting)
    batch = encode_batch([record("a", 2), record("b"), suspicion("b", "a", 2)])
    known.merge(batch)
    assert checked == ["a", "b", "b"]
    known.merge(batch)
    known.merge(encode_batch([record("a", 1), suspicion("b", "a", 1), suspicion("x", "a", 2)]))
    assert checked == ["a", "b", "b"]


def test_nobody_is_evicted_by_many_new_names() -> None:
    known = census(record("a"), record("b"), suspicion("b", "a"))
    for start in range(0, MAX_MEMBERS + 200, 200):
        known.merge(encode_batch([record(f"sybil{start + i}") for i in range(200)]))
    assert len(known) == MAX_MEMBERS
    assert PeerId("a") in known
    assert known.witnesses(PeerId("a")) == ("b",)
    assert known.merge(encode_batch([record("a", 2)])).records == {"a": False}


def test_witnesses_are_bounded_and_the_same_ones_stay_everywhere() -> None:
    crowd = [record(name) for name in "abcdefgh"]
    accusations = [suspicion(name, "a") for name in "bcdefgh"]
    one = census(*crowd, *accusations)
    other = census(*crowd, *reversed(accusations))
    assert one.witnesses(PeerId("a")) == tuple("bcdefgh"[:MAX_WITNESSES])
    assert one.digest() == other.digest()


def test_a_stranger_is_no_witness() -> None:
    known = census(record("a"), suspicion("stranger", "a"))
    assert not known.is_suspected(PeerId("a"))


@pytest.mark.parametrize(
    "data",
    [
        b"\x00",
        b"\xc1",
        b"\x91" * 5000,
        msgspec.msgpack.encode([1]),
        msgspec.msgpack.encode([[b"", b""]]),
        msgspec.msgpack.encode([[b"x" * 5000, b""]]),
        msgspec.msgpack.encode([[b"", b""]] * (MAX_STATEMENTS + 1)),
        bytes(MAX_BATCH_BYTES + 1),
        encode_batch(
            [Signed(suspicion("a", "b").statement, b"\x81" + suspicion("a", "b").raw, b"")]
        ),
    ],
)
def test_what_is_no_batch_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_batch(data, SWARM)


@pytest.mark.parametrize(
    "statement",
    [
        MemberRecord(VERSION, SWARM, "a", 0, ACTIVE, 1, ()),
        MemberRecord(VERSION, SWARM, "a", 1, 7, 1, ()),
        MemberRecord(2, SWARM, "a", 1, ACTIVE, 1, ()),
        MemberRecord(VERSION, SWARM, "", 1, ACTIVE, 1, ()),
        MemberRecord(VERSION, SWARM, "a" * 65, 1, ACTIVE, 1, ()),
        MemberRecord(VERSION, SWARM, "a", 1, ACTIVE, 1, ("http://a",)),
        MemberRecord(VERSION, SWARM, "a", 1, ACTIVE, 1, ("/" + "x" * 256,)),
        MemberRecord(VERSION, SWARM, "a", 1, ACTIVE, 1, ("/a",) * 17),
        MemberRecord(VERSION, SWARM, "a", 1 << 54, ACTIVE, 1, ()),
        Suspicion(VERSION, SWARM, "a", 1, "a"),
    ],
)
def test_what_no_member_says_is_refused(statement: MemberRecord | Suspicion) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_batch(encode_batch([sign_statement(statement, sign_as("a"))]), SWARM)


def test_another_encoding_of_the_same_statement_is_refused() -> None:
    said = record("a")
    longer = said.raw.replace(b"\xa1a", b"\xd9\x01a", 1)  # str8 in place of fixstr
    assert longer != said.raw
    with pytest.raises(RemoteProtocolError, match="canonical"):
        decode_batch(encode_batch([Signed(said.statement, longer, said.signature)]), SWARM)


@given(data=st.binary(max_size=200))
def test_noise_is_blamed_on_the_remote(data: bytes) -> None:
    for decode in (decode_question, decode_answer, lambda noise: census().merge(noise)):
        try:
            decode(data)
        except RemoteProtocolError:
            pass


def test_questions_and_answers_come_back_as_they_were() -> None:
    for question in (
        Join(b"terms", b"", b""),
        Sync(SWARM, SWARM, None, b""),
        Sync(SWARM, SWARM, b"12345678", b"x"),
        Probe(SWARM, b""),
    ):
        assert decode_question(encode(question)) == question
    answer = Statements(SWARM, b"", b"news")
    assert decode_answer(encode(answer)) == answer
    with pytest.raises(RemoteProtocolError):
        decode_question(encode(answer))


def test_fingerprints_of_odd_length_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="fingerprints"):
        census(record("a")).missing_in(b"123")


# --- test vectors ----------------------------------------------------------------------------


def test_the_vectors_of_the_spec() -> None:
    vectors = json.loads(VECTORS.read_text())
    swarm = bytes.fromhex(vectors["swarm"])
    assert SIGNING_CONTEXT.hex() == vectors["signing_context"]
    for vector in vectors["statements"]:
        raw, batch = bytes.fromhex(vector["raw"]), bytes.fromhex(vector["batch"])
        (signed,) = decode_batch(batch, swarm)
        assert signed.raw == raw
        assert msgspec.msgpack.decode(raw)[3:] == vector["fields"][3:]
        assert signed.author == vector["author"]
        assert signed.fingerprint.hex() == vector["fingerprint"]
        assert encode_batch([signed]) == batch
    known = Census(swarm, lambda peer, message, signature: True)
    for vector in vectors["statements"]:
        known.merge(bytes.fromhex(vector["batch"]))
    assert known.digest().hex() == vectors["digest"]
    for vector in vectors["messages"]:
        body = bytes.fromhex(vector["body"])
        decode = decode_question if vector["kind"] == "question" else decode_answer
        message = decode(body)
        assert type(message).__name__ == vector["name"]
        assert encode(message) == body
