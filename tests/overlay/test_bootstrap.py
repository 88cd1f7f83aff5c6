"""The rendezvous adopts the first genesis of a name, keeps terms apart, and stays small."""

from __future__ import annotations

import pytest

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.genesis import Genesis, encode_terms
from p2pfl_torrent.core.joining import (
    Answer,
    Join,
    Mismatch,
    Probe,
    Refused,
    Statements,
    Sync,
    Welcome,
)
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.statements import ACTIVE, LEFT, encode_batch, sign_record
from p2pfl_torrent.overlay.bootstrap import CONTACT_SECONDS, Registry
from p2pfl_torrent.simulation.world import sign_as, verify
from tests.exchange.member_drivers import genesis

A, B = PeerId("a"), PeerId("b")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(clock: Clock) -> Registry:
    return Registry(verify, clock, max_swarms=3)


def record(peer: str, of: Genesis, incarnation: int = 1, status: int = ACTIVE) -> bytes:
    signed = sign_record(
        PeerId(peer), of.swarm_id, incarnation, status, 1, ["/memory/x"], sign_as(peer)
    )
    return encode_batch([signed])


def join(registry: Registry, of: Genesis, sender: PeerId = A, *, propose: bool = True) -> Answer:
    proposal = of.encode() if propose else b""
    said = record(sender, of) if propose else b""
    return registry.answer(Join(encode_terms(of.terms), proposal, said), sender)


def welcomed(answer: Answer) -> bytes:
    assert isinstance(answer, Welcome)
    return answer.genesis


def test_the_first_proposal_is_adopted_and_the_second_gets_it(registry: Registry) -> None:
    first, second = genesis("one"), genesis("two")
    assert welcomed(join(registry, first, A)) == first.encode()
    assert welcomed(join(registry, second, B)) == first.encode()
    assert registry.swarms() == {"swarm": 1}, "a record in the refused swarm says nothing"


def test_without_a_proposal_nothing_begins(registry: Registry) -> None:
    assert isinstance(join(registry, genesis(), propose=False), Refused)
    join(registry, genesis("one"))
    assert welcomed(join(registry, genesis("two"), B, propose=False)) == genesis("one").encode()


def by_id(*swarms: Genesis) -> list[Genesis]:
    return sorted(swarms, key=lambda of: of.swarm_id)


def registered(registry: Registry, of: Genesis, peer: str) -> bytes:
    """A member of a swarm tells of it; which one the registry knows then."""
    question = Join(encode_terms(of.terms), of.encode(), record(peer, of))
    return welcomed(registry.answer(question, PeerId(peer)))


def test_of_two_swarms_that_have_not_begun_the_lower_goes_on(registry: Registry) -> None:
    low, high = by_id(genesis("one"), genesis("two"))
    registered(registry, high, "a")
    registered(registry, high, "a")
    assert registered(registry, low, "b") == low.encode()
    assert registered(registry, high, "a") == low.encode()


def test_a_swarm_that_nobody_entered_gives_way_to_any(registry: Registry) -> None:
    low, high = by_id(genesis("one"), genesis("two"))
    registry.answer(Join(encode_terms(low.terms), low.encode(), b""), A)
    assert welcomed(join(registry, high, B, propose=False)) == low.encode()
    assert registered(registry, high, "b") == high.encode()


def test_a_swarm_that_has_begun_gives_way_to_none(registry: Registry) -> None:
    low, high = by_id(genesis("one"), genesis("two"))
    registered(registry, high, "a")
    for member in "abc":  # client_num is 3
        registered(registry, high, member)
    assert registered(registry, low, "x") == high.encode()


def test_a_proposal_without_a_member_displaces_nothing(registry: Registry) -> None:
    low, high = by_id(genesis("one"), genesis("two"))
    registered(registry, high, "a")
    registered(registry, high, "a")
    registry.answer(Join(encode_terms(low.terms), low.encode(), b""), B)
    assert registered(registry, high, "a") == high.encode()


def test_other_terms_under_a_living_name_are_a_mismatch(registry: Registry, clock: Clock) -> None:
    join(registry, genesis(total=5))
    clock.now = CONTACT_SECONDS - 1
    answer = join(registry, genesis(total=9), B)
    assert answer == Mismatch(encode_terms(genesis(total=5).terms))


def test_a_name_is_free_when_nobody_came_by_for_long(registry: Registry, clock: Clock) -> None:
    join(registry, genesis("one", total=5))
    clock.now = CONTACT_SECONDS + 1
    assert welcomed(join(registry, genesis("two", total=9), B)) == genesis("two", total=9).encode()


def test_the_same_file_run_again_later_is_another_swarm(registry: Registry, clock: Clock) -> None:
    join(registry, genesis("one"))
    clock.now = CONTACT_SECONDS + 1
    assert welcomed(join(registry, genesis("two"))) == genesis("two").encode()
    old = Sync(genesis("one").swarm_id, bytes(32), None, b"")
    assert isinstance(registry.answer(old, A), Refused)


def test_a_swarm_that_all_have_left_is_over_at_once(registry: Registry) -> None:
    one = genesis("one")
    join(registry, one)
    registry.answer(Sync(one.swarm_id, bytes(32), None, record("a", one, 2, LEFT)), A)
    assert welcomed(join(registry, genesis("two"), B)) == genesis("two").encode()


def test_members_keep_a_swarm_alive_and_strangers_do_not(registry: Registry, clock: Clock) -> None:
    one = genesis("one")
    join(registry, one, A)
    for _ in range(5):
        clock.now += CONTACT_SECONDS / 2
        registry.answer(Sync(one.swarm_id, bytes(32), None, b""), A)
    assert welcomed(join(registry, genesis("two"), B)) == one.encode()
    for _ in range(5):
        clock.now += CONTACT_SECONDS / 2
        answer = join(registry, genesis("two"), PeerId("stranger"))
    assert welcomed(answer) == genesis("two").encode()


def test_statements_pass_from_one_member_to_the_next(registry: Registry) -> None:
    one = genesis("one")
    join(registry, one, A)
    answer = registry.answer(Sync(one.swarm_id, bytes(32), b"", record("b", one)), B)
    assert isinstance(answer, Statements)
    for name in ("a", "b"):
        assert record(name, one)[2:] in answer.news
    assert registry.swarms() == {"swarm": 2}


def test_the_number_of_swarms_is_bounded_and_the_stalest_over_makes_room(
    registry: Registry, clock: Clock
) -> None:
    for i in range(3):
        clock.now = float(i)
        join(registry, genesis(name=f"swarm{i}"))
    assert isinstance(join(registry, genesis(name="more")), Refused)
    clock.now = CONTACT_SECONDS + 1.5
    join(registry, genesis(name="more"))
    assert sorted(registry.swarms()) == ["more", "swarm1", "swarm2"]


def test_lies_are_blamed_on_the_liar(registry: Registry) -> None:
    one = genesis("one")
    with pytest.raises(RemoteProtocolError, match="other terms"):
        registry.answer(Join(encode_terms(one.terms), genesis(total=9).encode(), b""), A)
    with pytest.raises(RemoteProtocolError):
        registry.answer(Join(b"{}", b"", b""), A)
    join(registry, one)
    forged = sign_record(B, one.swarm_id, 1, ACTIVE, 1, [], sign_as("a"))
    with pytest.raises(RemoteProtocolError, match="not signed by b"):
        registry.answer(Sync(one.swarm_id, bytes(32), None, encode_batch([forged])), A)


def test_it_is_no_member(registry: Registry) -> None:
    join(registry, genesis())
    assert isinstance(registry.answer(Probe(genesis().swarm_id, b""), A), Refused)
    assert isinstance(registry.answer(Probe(bytes(32), b""), A), Refused)
