"""Gossip repairs: what the edges carried already is not said again."""

from __future__ import annotations

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.swarm import SwarmPolicy
from tests.core.swarm_world import World

POLICY = SwarmPolicy()


def test_manifests_that_the_edges_carried_are_not_gossiped() -> None:
    """One gossip delivery costs what five on an open stream do, and each is forwarded."""
    world = World("abcd")
    world.play()
    world.run(60.0)
    assert not any(node.sent(ev.PublishManifest) for node in world.peers)
    assert {len(node.counts(1)) for node in world.peers} == {4}


def test_a_manifest_that_a_neighbour_shows_nothing_of_is_gossiped() -> None:
    """Its stream may be stuck: others can tell it then, and whoever has no edge yet."""
    world = World("abc")
    world["b"].killed = True  # frozen: nobody has noticed
    world.begin(1)
    world.publish("a")
    world.run(POLICY.gossip_interval - 0.1)
    assert not world["a"].sent(ev.PublishManifest)
    world.run(0.2)
    assert len(world["a"].sent(ev.PublishManifest)) == 1
    world.run(60.0)
    assert len(world["a"].sent(ev.PublishManifest)) == 1
    assert world["a"].swarm.ledger.update_of(world["a"].name, 1) is not None
    assert world["c"].swarm.ledger.update_of(world["a"].name, 1) is not None


def test_a_manifest_is_gossiped_at_once_where_members_have_no_edge() -> None:
    """Hop by hop it may be overtaken by the word that its owner has left, whom nobody waits for."""
    world = World("abcd", edges=["ab", "bc", "cd", "da"])
    world.begin(1)
    world.publish("a")
    world.run(0.1)
    assert len(world["a"].sent(ev.PublishManifest)) == 1
    assert world["c"].swarm.ledger.update_of(world["a"].name, 1) is not None
    world.run(60.0)
    assert len(world["a"].sent(ev.PublishManifest)) == 1


def test_a_manifest_without_anybody_to_carry_it_is_gossiped() -> None:
    world = World("ab", edges=[])
    world.begin(1)
    world.publish("a")
    world.run(POLICY.gossip_interval + 0.1)
    assert len(world["a"].sent(ev.PublishManifest)) == 1


def test_availability_is_gossiped_in_batches_while_an_exchange_lasts() -> None:
    """However many chunks come, one message in an interval at most."""
    world = World("ab", rate=50.0)
    world.begin(1)
    for name in "ab":
        world.publish(name)
    world.run(4.9 * POLICY.gossip_interval)
    for node in world.peers:
        assert 1 not in node.closed
        assert 1 <= len(node.sent(ev.PublishAvailability)) <= 4


def test_availability_that_all_have_shown_to_share_is_not_gossiped() -> None:
    world = World("abcd", edges=["ab", "bc", "cd", "da"])
    world.play()
    world.run(60.0)
    assert not any(node.sent(ev.PublishAvailability) for node in world.peers)
