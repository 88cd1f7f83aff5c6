"""Whole swarms of membership machines: joins, deaths, freezes, partitions and returns."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from p2pfl_torrent.core.genesis import TopologyTerms
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.topology import drawn
from tests.core.member_network import MemberNetwork, mesh, star

Topology = Callable[[], TopologyTerms]
TEN = "abcdefghij"
HUB = min(TEN, key=lambda name: drawn(1, PeerId(name)))
LEAVES = TEN.replace(HUB, "")


def joined(
    names: str = TEN, topology: Topology = mesh, seed: int = 0, loss: float = 0.0
) -> MemberNetwork:
    """A swarm in round 3 whose members all joined in round 1."""
    network = MemberNetwork(names, topology(), seed=seed, loss=loss)
    network.enter_all()
    network.run(20, until=lambda: network.agree_on(names))
    network.round(3)
    network.run(5)
    return network


@pytest.mark.parametrize("topology", [star, mesh])
def test_members_that_enter_through_one_find_all(topology: Topology) -> None:
    network = MemberNetwork(TEN, topology())
    network.enter_all()
    assert network.run(10, until=lambda: network.agree_on(TEN)) < 3
    assert network.roster("a")[0] == HUB


def test_nothing_happens_to_a_healthy_swarm() -> None:
    network = joined()
    network.run(1)
    before = network.messages
    network.run(120)
    assert network.messages == before
    assert all("suspected" not in network.changes(name) for name in TEN)


@pytest.mark.parametrize("topology", [star, mesh])
@pytest.mark.parametrize("who", [HUB, LEAVES[0], LEAVES[-1]])
def test_a_killed_member_is_dead_everywhere_in_seconds(topology: Topology, who: str) -> None:
    network = joined(topology=topology)
    network.kill(who)
    rest = TEN.replace(who, "")
    took = network.run(10, until=lambda: network.agree_on(rest))
    assert took < 4
    network.run(60)
    assert network.agree_on(rest)
    assert f"{who} suspected, {who} dead" in network.changes(rest[0])


@pytest.mark.parametrize("topology", [star, mesh])
@pytest.mark.parametrize("who", [HUB, LEAVES[0]])
def test_a_frozen_member_is_dead_everywhere_within_ten_seconds(
    topology: Topology, who: str
) -> None:
    network = joined(topology=topology)
    network.freeze(who)
    rest = TEN.replace(who, "")
    assert network.run(10, until=lambda: network.agree_on(rest)) > 4


def test_a_frozen_hub_returns_to_the_last_place_and_the_new_one_stays() -> None:
    network = joined(topology=star)
    network.freeze(HUB)
    network.run(10, until=lambda: network.agree_on(LEAVES))
    successor = network.roster(LEAVES[0])[0]
    network.run(20)
    network.thaw(HUB)
    network.run(15, until=lambda: network.agree_on(TEN))
    assert network.roster(LEAVES[0])[0] == successor
    assert network.roster(LEAVES[0])[-1] == HUB
    assert network.changes(LEAVES[0]).endswith(f"{HUB} dead, {HUB} returned")
    assert all(f"{name} suspected" not in network.changes(HUB) for name in LEAVES)


def test_two_neighbours_and_the_one_between_them_die_together() -> None:
    network = joined()
    for who in "abc":
        network.kill(who)
    network.run(30, until=lambda: network.agree_on("defghij"))


@pytest.mark.parametrize("killed", ["b", "bc", "bcd", "bcdefghij"])
def test_whoever_is_left_alone_gives_up_the_others(killed: str) -> None:
    names = "a" + killed
    network = joined(names)
    for who in killed:
        network.kill(who)
    network.run(15, until=lambda: network.agree_on("a"))


def test_a_lone_witness_is_not_believed_and_the_accused_refutes() -> None:
    network = joined()
    victim, others = network.nodes[PeerId("a")], TEN[1:]
    witness = next(iter(sorted(victim.neighbours)))
    network._passes = lambda a, b: {a, b} != {PeerId("a"), witness}  # type: ignore[method-assign]
    network.run(60)
    assert all("a dead" not in network.changes(name) for name in others)
    assert network.agree_on(TEN)
    assert network.roster("a") == network.roster("b")
    # It is accused less and less often: the others' word counts for something.
    accusations = network.changes(witness).count("a suspected")
    assert 2 <= accusations <= 6


def test_a_partition_parts_and_heals_and_seniority_stays_with_the_many() -> None:
    network = joined()
    before = network.roster("c")
    network.cut("ab", TEN[2:])
    network.run(30)
    assert network.roster("a") in {"ab", "ba"}
    assert sorted(network.roster("c")) == sorted(TEN[2:])
    network.heal()
    network.run(60, until=lambda: network.agree_on(TEN))
    network.run(30)
    assert network.agree_on(TEN)
    roster = network.roster("c")
    assert roster[:8] == "".join(name for name in before if name not in "ab")
    assert set(roster[8:]) == set("ab")


def test_one_that_leaves_is_gone_at_once_and_never_called_dead() -> None:
    network = joined()
    network.leave("a")
    network.kill("a")
    assert network.run(10, until=lambda: network.agree_on(TEN[1:])) < 2
    network.run(20)
    assert all("a left" in network.changes(name) for name in TEN[1:])
    assert all("a dead" not in network.changes(name) for name in TEN[1:])


@pytest.mark.parametrize("gone_for", [0.2, 30.0])
def test_a_restarted_member_is_welcome_under_its_old_name(gone_for: float) -> None:
    network = joined()
    network.kill("a")
    network.run(gone_for)
    network.start(PeerId("a"))
    network.enter("a", through="b", joined_round=4)
    network.run(30, until=lambda: network.agree_on(TEN))
    network.run(20)
    assert network.agree_on(TEN)
    assert network.roster("b")[-1] == "a"


def test_a_newcomer_learns_who_is_dead_without_being_told_twice() -> None:
    network = joined()
    network.kill("a")
    network.run(10)
    network.start(PeerId("k"))
    network.enter("k", through="b", joined_round=4)
    assert network.roster("k") == network.roster("b") + ("" if "k" in network.roster("b") else "k")
    network.run(10, until=lambda: network.agree_on(TEN[1:] + "k"))
    assert "a" not in network.changes("k").split()


@pytest.mark.parametrize("seed", range(5))
def test_a_lossy_network_converges_and_loses_nobody(seed: int) -> None:
    network = joined(loss=0.25, seed=seed)
    network.run(120)
    network.kill("a")
    network.run(60)
    network.loss = 0.0
    network.run(60, until=lambda: network.agree_on(TEN[1:]))
    assert network.largest < 16_384


def test_fifty_members_hold_together_while_ten_die() -> None:
    names = "".join(chr(ord("A") + i) for i in range(50))
    network = joined(names)
    for who in names[:10]:
        network.kill(who)
    assert network.run(30, until=lambda: network.agree_on(names[10:])) < 20
