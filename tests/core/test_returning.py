"""A peer that was given up and has caught up with round c: from which round on it is waited for."""

from __future__ import annotations

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.aggregation import discount
from p2pfl_torrent.core.peers import PeerId
from tests.core.swarm_world import TERMS, World

C = 3  # the round it has caught up with


def returned(waited_from: int) -> World:
    """a, b and c are training round 3 when h, which missed round 2, begins it too."""
    world = World("abch")
    world.play(1)
    world.members("abc", dead="h")
    world.play(2, "abc")
    world.begin(C, "abc")
    world.run(10.0)
    world.begin(C, "h", caught_up=True)
    live = {PeerId(name): 1 for name in "abc"} | {PeerId("h"): waited_from}
    for name in "abch":
        world.feed(name, ev.MembersNow(live, frozenset()))
    return world


def close(world: World, names: str, round: int) -> None:
    world.run_until(lambda: all(round in world[name].closed for name in names))


def counted(world: World, name: str, round: int) -> list[tuple[str, int, float]]:
    return [(owner, of, weight) for owner, of, weight, _, _ in world[name].counts(round)]


def test_nobody_waits_for_it_in_the_round_it_begins_late() -> None:
    world = returned(waited_from=C + 1)
    for name in "abc":
        world.publish(name, C)
    close(world, "abc", C)
    assert world.now - 10.0 < 1.0
    assert {world[name].closed[C].closed_by for name in "abc"} == {"complete"}


def test_named_for_that_round_it_would_hold_up_all_until_the_deadline() -> None:
    world = returned(waited_from=C)
    for name in "abc":
        world.publish(name, C)
    close(world, "abc", C)
    assert world.now - 10.0 >= TERMS.exchange_timeout
    assert {world[name].closed[C].closed_by for name in "abc"} == {"deadline"}


def test_what_it_publishes_in_time_counts_all_the_same() -> None:
    world = returned(waited_from=C + 1)
    world.publish("h", C)
    world.run(1.0)
    for name in "abc":
        world.publish(name, C)
    close(world, "abch", C)
    assert {counted(world, name, C)[-1] for name in "abch"} == {("h", C, 10.0)}


def test_what_it_publishes_after_that_counts_late_and_the_next_round_waits_for_it() -> None:
    world = returned(waited_from=C + 1)
    for name in "abc":
        world.publish(name, C)
    close(world, "abc", C)
    world.begin(C + 1, "abc")
    for name in "abc":
        world.publish(name, C + 1)
    world.run(5.0)
    world.publish("h", C)  # its deadline has not passed here
    close(world, "h", C)
    world.begin(C + 1, "h")
    world.run(5.0)
    assert not any(C + 1 in world[name].closed for name in "abc")
    world.publish("h", C + 1)
    close(world, "abch", C + 1)
    for name in "abc":
        assert world[name].closed[C + 1].closed_by == "complete"
        assert ("h", C, 10.0 * discount(1)) in counted(world, name, C + 1)
        assert ("h", C + 1, 10.0) in counted(world, name, C + 1)
