"""Swarms in which links break, gossip is lost and peers die: what must hold however it goes."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pfl_torrent.core import events as ev
from tests.core.swarm_world import World, terms

NAMES = "abcdef"
RING = ["ab", "bc", "cd", "de", "ef", "fa"]


def chaos(seed: int, *, gossip: bool, deaths: int, rounds: int) -> World:
    """Rounds of six peers; links come and go, peers die, and slow ones miss their round."""
    rng = random.Random(seed)
    world = World(
        NAMES,
        edges=RING,
        gossip=gossip,
        seed=seed,
        rate=rng.choice([3_000.0, 20_000.0, 1e6]),
        latency=rng.choice([0.001, 0.05, 0.3]),
        terms=terms(exchange_timeout=rng.choice([5.0, 20.0]), train_timeout=20.0),
    )
    alive = list(NAMES)
    for round in range(1, rounds + 1):
        world.begin(round, alive)
        for name in alive:
            world.publish(name, round)
            world.run(rng.choice([0.0, 0.1, 1.0]))
            a, b = rng.sample(NAMES, 2)
            if a in alive and b in alive:
                rng.choice([world.link, world.unlink])(a, b)
            if deaths and len(alive) > 3 and rng.random() < 0.2:
                deaths -= 1
                world.kill(alive[-1])
                world.members(alive[:-1], dead=set(NAMES) - set(alive[:-1]))
                alive.pop()
        for a, b in zip(alive, [*alive[1:], alive[0]], strict=True):  # whoever lives is connected
            world.link(a, b)
        world.run_until(lambda r=round: all(r in world[name].closed for name in alive), 120.0)  # type: ignore[misc]
    world.run(30.0)
    return world


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.booleans(), st.integers(0, 2))
def test_whatever_happens(seed: int, gossip: bool, deaths: int) -> None:
    world = chaos(seed, gossip=gossip, deaths=deaths, rounds=3)
    for node in world.peers:
        if node.killed:
            continue
        counted: list[tuple[str, int]] = []
        for round, close in sorted(node.closed.items()):
            assert close.closed_by in ("complete", "settled", "deadline")
            assert 0.0 <= close.completeness <= 1.0
            owners = [(c.manifest.owner, c.manifest.round) for c in close.counts]
            assert owners == sorted(owners)
            assert (node.name, round) in owners  # one's own is always there
            counted += owners
            for count in close.counts:
                assert not set(count.chunks) & set(count.fills)
                assert count.manifest.round <= round
            world.aggregate(node.name, round)  # every byte that counts is on this peer's disk
        assert len(counted) == len(set(counted)), "an update was counted twice"
        assert node.sent(ev.Drop) == [], "an honest peer was blamed"
    assert world.unanswered() == 0


@pytest.mark.parametrize("seed", range(5))
def test_where_all_is_well_nobody_waits_for_the_deadline(seed: int) -> None:
    world = World(NAMES, edges=RING, seed=seed, gossip=bool(seed % 2))
    for round in (1, 2, 3):
        began = world.now
        world.play(round)
        assert {node.closed[round].closed_by for node in world.peers} == {"complete"}
        assert len({node.counts(round) for node in world.peers}) == 1
        assert world.now - began < 1.0
