"""One membership machine: what it believes, refutes, and refuses."""

from __future__ import annotations

import random

import pytest

from p2pfl_torrent.core.errors import LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.liveness import LivenessPolicy
from p2pfl_torrent.core.membership import Membership
from p2pfl_torrent.core.membership_effects import (
    Changed,
    Gossip,
    Member,
    MembershipEffect,
    Probe,
    RosterChanged,
    SyncWith,
)
from p2pfl_torrent.core.messages import MAX_RECORD_BYTES
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.statements import (
    ACTIVE,
    JOINING,
    VERSION,
    Signed,
    Suspicion,
    decode_batch,
    encode_batch,
    sign_record,
    sign_statement,
)
from p2pfl_torrent.simulation.world import sign_as, verify
from tests.core.member_network import SWARM

A, B, C, D = (PeerId(name) for name in "abcd")
POLICY = LivenessPolicy()


def machine(now: float = 0.0, rendezvous: str = "") -> Membership:
    """The machine of peer a, which is ready, in a swarm with nobody else."""
    result = Membership(
        local=A,
        addrs=["/ip4/127.0.0.1/tcp/1"],
        swarm=SWARM,
        seed=1,
        sign=sign_as("a"),
        verify=verify,
        rng=random.Random(7),
        now=now,
        rendezvous=[(PeerId(name), (f"/dns/{name}/tcp/1",)) for name in rendezvous],
    )
    result.set_ready(1)
    return result


def record(peer: str, incarnation: int = 1, status: int = ACTIVE, joined_round: int = 1) -> Signed:
    addrs = [f"/dns/{peer}/tcp/1"]
    return sign_record(PeerId(peer), SWARM, incarnation, status, joined_round, addrs, sign_as(peer))


def suspicion(witness: str, subject: str, incarnation: int = 1) -> Signed:
    said = Suspicion(VERSION, SWARM, subject, incarnation, witness)
    return sign_statement(said, sign_as(witness))


def hear(m: Membership, *statements: Signed, now: float = 0.0, by: str = "b") -> str:
    """Receive a batch; the effects as text."""
    return told(m.received(encode_batch(statements), PeerId(by), now))


def told(effects: list[MembershipEffect]) -> str:
    """Effects as ``b joined, probe c, sync d, gossip, roster``."""
    words = []
    for effect in effects:
        if isinstance(effect, Changed):
            words.append(f"{effect.event.member} {effect.event.change}")
        elif isinstance(effect, Probe):
            words.append(f"probe {effect.peer}")
        elif isinstance(effect, SyncWith):
            words.append(f"sync {effect.peer}")
        elif isinstance(effect, Gossip):
            words.append("gossip")
        else:
            words.append("roster")
    return ", ".join(words)


def swarm_of(names: str, now: float = 0.0) -> Membership:
    m = machine(now)
    hear(m, *(record(name) for name in names if name != "a"), now=now)
    return m


def roster(m: Membership) -> str:
    return "".join(sorted(member.peer for member in m.roster()))


def incarnation(m: Membership) -> int:
    own = m.census.get(m.local)
    assert own is not None
    return own.incarnation


def tick_until(m: Membership, start: float, end: float) -> str:
    """Ticks at the policy's pace, probes unanswered; what the user was told."""
    changes: list[str] = []
    now = start
    while now < end:
        effects = m.tick(now)
        for effect in list(effects):
            if isinstance(effect, Probe):
                effects += m.probed(effect.peer, False, now)
        changes += [told([effect]) for effect in effects if isinstance(effect, Changed)]
        now += POLICY.tick
    return ", ".join(changes)


def test_a_member_joins_when_it_is_ready() -> None:
    m = machine()
    assert hear(m, record("b", status=JOINING, joined_round=0)) == ""
    assert m.joining() == {B}
    assert roster(m) == "a"
    assert hear(m, record("b", 2, joined_round=5)) == "b joined, roster"
    assert m.roster()[-1] == Member(B, ("/dns/b/tcp/1",), 5)
    assert hear(m, record("b", 2, joined_round=5)) == ""


def test_the_join_order_is_round_then_draw() -> None:
    m = machine()
    hear(m, record("b", joined_round=3), record("c", joined_round=2), record("d", joined_round=1))
    assert [member.peer for member in m.roster()][2:] == [C, B]
    assert {member.peer for member in m.roster()[:2]} == {A, D}


def test_an_older_incarnation_changes_nothing() -> None:
    m = swarm_of("ab")
    hear(m, record("b", 7, joined_round=4))
    assert hear(m, record("b", 6, joined_round=1)) == ""
    assert m.roster()[-1].joined_round == 4


def test_one_witness_makes_a_suspect_and_two_a_dead_member_after_the_grace() -> None:
    m = swarm_of("abcd")
    assert "b suspected" in hear(m, suspicion("c", "b"))
    assert m.suspected() == {B}
    tick_until(m, 0, 0.5)
    assert roster(m) == "abcd"
    hear(m, suspicion("d", "b"), now=0.5)
    assert tick_until(m, 0.5, 0.5 + POLICY.confirm_grace) == ""
    assert tick_until(m, 0.5 + POLICY.confirm_grace, 2) == "b dead"
    assert roster(m) == "acd"
    assert m.dead() == {B}


def test_a_refutation_in_time_saves_and_one_too_late_returns() -> None:
    m = swarm_of("abcd")
    hear(m, suspicion("c", "b"), suspicion("d", "b"))
    assert hear(m, record("b", 2), now=0.5) == "b returned"
    assert tick_until(m, 0.5, 5) == ""
    hear(m, suspicion("c", "b", 2), suspicion("d", "b", 2), now=5)
    assert tick_until(m, 5, 8) == "b dead"
    assert hear(m, record("b", 3, joined_round=9), now=8) == "b returned, roster"


def test_a_suspicion_of_an_old_incarnation_is_void() -> None:
    m = swarm_of("abcd")
    hear(m, record("b", 2))
    assert hear(m, suspicion("c", "b", 1), suspicion("d", "b", 1)) == ""
    assert not m.suspected()


def test_one_witness_is_enough_where_nobody_else_could_look() -> None:
    m = swarm_of("ab")
    m.watch([B], 0.0)
    changes = tick_until(m, 0.0, 12.0)
    assert changes == "b suspected, b dead"
    assert roster(m) == "a"


def test_a_dead_member_stays_dead_when_its_witnesses_go() -> None:
    m = swarm_of("abcd")
    hear(m, suspicion("c", "b"), suspicion("d", "b"))
    tick_until(m, 0, 2)
    hear(m, record("c", 2, status=2), record("d", 2, status=2), now=2)
    tick_until(m, 2, 10)
    assert m.dead() == {B}
    assert m.left() == {C, D}


def test_two_witnesses_do_not_kill_whom_we_hear_but_it_is_told() -> None:
    m = swarm_of("abcd")
    accused = m.received(encode_batch([suspicion("c", "b"), suspicion("d", "b")]), C, 0.0)
    probes = [effect for effect in accused if isinstance(effect, Probe)]
    for quarter in range(20):
        now = quarter * 0.25
        m.probed(B, True, now + 0.1)
        effects = m.tick(now + 0.2)
        probes += [effect for effect in effects if isinstance(effect, Probe)]
    assert roster(m) == "abcd"
    assert 10 < len(probes) <= 21
    for probe in probes:
        assert {said.author for said in decode_batch(probe.news, SWARM)} == {C, D}


def test_the_accused_refutes_at_once_and_not_for_every_accusation() -> None:
    m = swarm_of("abcd")
    m.round_changed(4)
    before = incarnation(m)
    assert "gossip" in hear(m, suspicion("b", "a", before), now=1.0)
    assert incarnation(m) == before + 1
    for attempt in range(50):  # a hostile member accuses each new incarnation
        hear(m, suspicion("b", "a", incarnation(m)), now=1.0 + attempt / 1000)
    assert incarnation(m) == before + 1
    m.tick(1.0 + POLICY.refute_interval)
    assert incarnation(m) == before + 2


def test_two_liars_cannot_take_a_members_place() -> None:
    m = swarm_of("abcd")
    m.round_changed(4)
    m.tick(0.5)
    hear(m, suspicion("b", "a", incarnation(m)), suspicion("c", "a", incarnation(m)), now=1.0)
    assert {member.joined_round for member in m.roster()} == {1}


def test_who_stood_still_while_it_was_given_up_goes_to_the_back() -> None:
    m = swarm_of("abcd")
    m.round_changed(4)
    m.watch([B, C], 0.0)
    m.tick(0.0)
    assert "probe" not in told(m.tick(30.0)), "its own pause is not the others' silence"
    hear(m, suspicion("b", "a", incarnation(m)), suspicion("c", "a", incarnation(m)), now=30.1)
    assert m.roster()[-1] == Member(A, ("/ip4/127.0.0.1/tcp/1",), 5)


def test_a_silent_neighbour_is_probed_before_it_is_accused() -> None:
    m = swarm_of("abcd")
    m.watch([B], 0.0)
    m.heard(B, 0.0)
    m.tick(0.0)
    for quarter in range(1, 10):
        assert "probe" not in told(m.tick(quarter * 0.25))
    assert "probe b" in told(m.tick(2.5))
    assert told(m.probed(B, True, 2.6)) == ""
    assert not m.suspected()
    m.tick(4.0)
    assert "probe b" in told(m.tick(5.25))
    assert told(m.probed(B, False, 7.25)).startswith("gossip, sync")


def test_a_lost_edge_and_a_refused_dial_are_enough_at_once() -> None:
    m = swarm_of("abcd")
    m.watch([B], 0.0)
    m.heard(B, 1.0)
    assert told(m.edge_lost(B)) == "probe b"
    assert told(m.edge_lost(B)) == "", "one probe at a time"
    assert "b suspected" in told(m.probed(B, False, 1.1))
    assert told(m.edge_lost(C)) == "", "not a neighbour: an edge closed on purpose"


def test_a_joiner_accuses_nobody() -> None:
    m = Membership(
        local=A,
        addrs=[],
        swarm=SWARM,
        seed=1,
        sign=sign_as("a"),
        verify=verify,
        rng=random.Random(7),
        now=0.0,
    )
    hear(m, record("b"), record("c"))
    m.watch([B], 0.0)
    assert tick_until(m, 0.0, 20.0) == ""


def test_a_restarted_peer_takes_an_incarnation_above_its_old_one() -> None:
    m = machine()
    assert "gossip" in hear(m, record("a", 40, joined_round=2))
    assert incarnation(m) == 41
    assert m.roster()[0].joined_round == 1


def test_a_new_roster_is_told_though_another_effect_looked_at_it_before() -> None:
    m = swarm_of("abc")
    text = hear(m, record("d"), suspicion("b", "a", incarnation(m)), now=1.0)
    assert text.endswith("roster")
    assert text.count("roster") == 1


def test_after_good_bye_it_says_nothing_more() -> None:
    m = swarm_of("abc")
    m.watch([B], 0.0)
    assert told(m.leave()).startswith("gossip")
    assert told(m.leave()) == ""
    assert tick_until(m, 0.0, 30.0) == ""
    hear(m, suspicion("b", "a", incarnation(m)), suspicion("c", "a", incarnation(m)), now=1.0)
    assert roster(m) == "bc"


def test_another_swarms_statements_are_an_error() -> None:
    m = machine()
    foreign = sign_record(B, bytes(32), 1, ACTIVE, 1, [], sign_as("b"))
    with pytest.raises(RemoteProtocolError, match="another swarm"):
        hear(m, foreign)


def test_a_false_signature_spoils_the_whole_batch() -> None:
    m = machine()
    good, bad = record("b"), record("c")
    forged = Signed(bad.statement, bad.raw, good.signature)
    with pytest.raises(RemoteProtocolError, match="not signed by c"):
        hear(m, good, forged)
    assert roster(m) == "a"


def test_an_own_record_always_fits_a_hello() -> None:
    m = machine()
    m.set_addrs([f"/dns/{'x' * 240}{i:02}/tcp/1" for i in range(20)])
    assert MAX_RECORD_BYTES - 300 < len(m.record()) <= MAX_RECORD_BYTES
    hear(swarm_of("b"), *decode_batch(m.record(), SWARM))
    with pytest.raises(LocalProtocolError, match="multiaddrs"):
        m.set_addrs(["127.0.0.1:80"])
    with pytest.raises(LocalProtocolError, match="round 1"):
        m.set_ready(0)


def test_bootstrap_peers_are_met_now_and_then() -> None:
    m = machine(rendezvous="z")
    hear(m, record("b"))
    m.round_changed(1)
    met = "".join(
        effect.peer
        for quarter in range(4 * 200)
        for effect in m.tick(quarter * 0.25)
        if isinstance(effect, SyncWith)
    )
    assert 30 <= len(met) <= 50
    assert 5 <= met.count("z") <= 11
    assert len(met) == met.count("z") + met.count("b")


def test_all_effects_have_a_name_in_these_tests() -> None:
    assert told([RosterChanged(), Gossip(b"")]) == "roster, gossip"
