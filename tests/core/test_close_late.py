"""A round that this peer missed, and from which nobody else has gone on either."""

from __future__ import annotations

import pytest

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.errors import LocalProtocolError
from p2pfl_torrent.core.messages import Availability
from p2pfl_torrent.core.reports import RoundClosed
from tests.core.swarm_world import TERMS, World


def missed(world: World, name: str, round: int) -> None:
    """A peer that has trained until the round's deadline was over."""
    world.run(TERMS.train_timeout + TERMS.exchange_timeout)
    world.publish(name, round)
    assert world[name].missed == [round]


def test_it_is_told_and_announced_as_any_closing() -> None:
    world = World("abc")
    world.play(1)
    world.begin(2)
    missed(world, "c", 2)
    world.begin(3, "c", caught_up=True)
    world.begin(3, "a")  # round 2 is lost here, too
    world.run(1.0)
    missed(world, "a", 3)
    effects = world.feed("a", ev.CloseLate())
    [closed] = [effect for effect in effects if isinstance(effect, ev.CloseRound)]
    assert closed.closed_by == "deadline"
    assert [(c.manifest.owner, c.manifest.round) for c in closed.counts] == [("a", 3), ("c", 2)]
    assert RoundClosed(3, "deadline", 1.0) in world["a"].told(RoundClosed)
    late = world["c"].updates[2]
    counted = [
        item.counted_in
        for effect in effects
        if isinstance(effect, ev.ToFetcher) and isinstance(effect.message, Availability)
        for item in effect.message.updates
        if item.update == late
    ]
    assert counted == [3, 3]  # to b and to c


def test_only_a_missed_round_is_closed_late() -> None:
    world = World("ab")
    world.begin(1)
    with pytest.raises(LocalProtocolError, match="training"):
        world.feed("a", ev.CloseLate())
