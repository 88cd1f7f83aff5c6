"""A peer that stood still while the others finished several rounds, with no deadline near.

Here h freezes, is given up, and wakes in round 2, when the others are in round 6 and wait for it.
"""

from __future__ import annotations

import pytest

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.messages import Availability, GetManifest
from p2pfl_torrent.core.peers import PeerId
from tests.core.swarm_world import World, terms

LONG = terms(train_timeout=3600.0, exchange_timeout=600.0)
QUICK = 15.0  # seconds: some messages, and one time-out of a manifest


def frozen(*, published: bool, gossip: bool = True, names: str = "abch") -> World:
    """h is back: it has its streams again, and the others wait for it in round 6."""
    others = names.replace("h", "")
    world = World(names, terms=LONG, gossip=gossip)
    world.play(1)
    world.begin(2)
    if published:
        world.publish("h", 2)
        world.run(1.0)
    freeze(world, others)
    for name in others:
        world.publish(name, 2)
    world.run_until(lambda: all(2 in world[name].closed for name in others))
    for round in (3, 4, 5):
        world.play(round, others)
    world.begin(6, others)
    world.members(names)  # it says that it is back, and only then its streams open
    for name in others:
        world.publish(name, 6)
    world.run(1.0)
    thaw(world, others)
    return world


def freeze(world: World, others: str) -> None:
    world.kill("h")
    world.members(others, dead="h")


def thaw(world: World, others: str) -> None:
    world["h"].killed = False
    world["h"].tick_at = -1.0
    for name in others:
        world.link("h", name)
    world.members(f"{others}h")


def catch_up(world: World, names: str) -> None:
    """h takes round 6's start weights, and that round closes with all."""
    world.begin(6, "h", caught_up=True)
    world.publish("h", 6)
    world.run_until(lambda: all(6 in world[name].closed for name in names), QUICK)
    assert {world[name].closed[6].closed_by for name in names} == {"complete"}
    assert len({world[name].counts(6) for name in names}) == 1


@pytest.mark.parametrize("gossip", [True, False])
def test_it_gives_up_its_round_as_soon_as_it_has_trained(gossip: bool) -> None:
    world = frozen(published=False, gossip=gossip)
    world.run(1.0)
    world.publish("h", 2)
    world.run_until(lambda: world["h"].missed == [2], QUICK)
    catch_up(world, "abch")


@pytest.mark.parametrize("gossip", [True, False])
def test_it_gives_up_a_round_in_mid_exchange(gossip: bool) -> None:
    world = frozen(published=True, gossip=gossip)
    world.run_until(lambda: world["h"].missed == [2], QUICK)
    catch_up(world, "abch")


def test_of_two_one_may_be_left_behind() -> None:
    world = World("ah", terms=LONG)
    world.play(1)
    world.begin(2)
    freeze(world, "a")
    for round in (2, 3, 4):
        world.begin(round, "a")
        world.publish("a", round)
    world.run(1.0)
    thaw(world, "a")
    world.publish("h", 2)
    world.run_until(lambda: world["h"].missed == [2], QUICK)


def test_what_the_others_have_not_counted_yet_is_counted_with_them() -> None:
    """s has published round 4 late, into round 5, in which h comes back."""
    world = World("abcsh", terms=LONG)
    world.play(1)
    world.begin(2)
    freeze(world, "abcs")
    for name in "abcs":
        world.publish(name, 2)
    world.run_until(lambda: all(2 in world[name].closed for name in "abcs"))
    world.play(3, "abcs")
    world.members("abc", dead="sh")
    world.begin(4, "s")
    world.play(4, "abc")
    world.begin(5, "abc")
    world.run(LONG.exchange_timeout)
    world.publish("s", 4)
    assert world["s"].missed == [4]
    world.begin(5, "s", caught_up=True)
    world.members("abcsh")
    for name in "ab":
        world.publish(name, 5)
    world.run(1.0)
    thaw(world, "abcs")
    world.publish("h", 2)
    world.run_until(lambda: world["h"].missed == [2], QUICK)
    world.begin(5, "h", caught_up=True)
    world.run(1.0)
    for name in "csh":
        world.publish(name, 5)
    world.run_until(lambda: all(5 in world[name].closed for name in "abcsh"), QUICK)
    counted = {world[name].counts(5) for name in "abcsh"}
    assert len(counted) == 1
    assert ("s", 4) in {(owner, of) for owner, of, _, _, _ in counted.pop()}


def test_who_has_a_manifest_asks_only_whether_it_was_counted() -> None:
    world = World("ab")
    world.play(1)
    update = world["b"].updates[1]
    asked = world["a"].swarm.fetching.ask_about(update)
    assert asked == [ev.ToHolder(PeerId("b"), GetManifest(update, is_known=True))]
    answers = world.feed("b", ev.FromFetcher(PeerId("a"), GetManifest(update, is_known=True)))
    [answer] = [effect.message for effect in answers if isinstance(effect, ev.ToFetcher)]
    assert isinstance(answer, Availability)
    assert [(item.update, item.counted_in) for item in answer.updates] == [(update, 1)]


def test_one_member_far_ahead_moves_nobody() -> None:
    world = World("abch", terms=LONG)
    world.begin(1)
    for name in "ah":
        world.publish(name)
    for round in (3, 50, 1000):
        ahead = world.update("c", round)
        world.feed("h", ev.ManifestGossip(PeerId("c"), ahead.encode()))
    world.run(1.0)
    assert world["h"].missed == []
    for name in "bc":
        world.publish(name)
    world.run_until(lambda: all(1 in world[name].closed for name in "abch"), QUICK)


def test_headers_of_the_next_round_leave_nobody_behind() -> None:
    world = World("abch", terms=LONG)
    world.begin(1)
    for name in "abc":
        world.feed("h", ev.ManifestGossip(PeerId(name), world.update(name, 2).encode()))
    world.publish("h")
    world.run(1.0)
    assert world["h"].missed == []


def test_what_came_after_an_early_closing_was_not_counted_in_time() -> None:
    """a closes round 1 without x, whose update it hears of then, and misses round 2."""
    world = World("abx", edges=["ab"], terms=terms(max_staleness=3))
    world.members("ab", dead="x")
    world.play(1, "ab")
    world.feed("a", ev.ManifestGossip(PeerId("x"), world.update("x", 1).encode()))
    world.begin(2)
    world.run(LONG.train_timeout)
    world.publish("a", 2)
    assert world["a"].missed == [2]
    world.begin(3, "a", caught_up=True)
    known = world["a"].swarm.ledger.update_of(PeerId("x"), 1)
    assert known is not None
    assert known.counted_in is None
