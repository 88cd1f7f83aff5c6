"""Several drivers and a bootstrap node: joining, the death of a hub, leaving, returning."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.genesis import encode_terms
from p2pfl_torrent.core.joining import Join, Mismatch, Refused, Sync, Welcome
from p2pfl_torrent.core.joining import Probe as Question
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.statements import encode_batch, sign_record
from p2pfl_torrent.overlay.bootstrap import Registry
from p2pfl_torrent.simulation.world import sign_as, verify
from tests.exchange.member_drivers import World, genesis, terms


@asynccontextmanager
async def a_world(names: str = "") -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        world = World(nursery)
        for name in names:
            world.start(name)
        if names:
            await world.agree_on("".join(sorted(names)), within=15)
        yield world
        nursery.cancel_scope.cancel()


def hub_of(world: World) -> str:
    return next(iter(world.peers.values())).roster[0].peer


async def test_peers_find_each_other_through_the_bootstrap_node(autojump_clock: MockClock) -> None:
    async with a_world() as world:
        for name in "abcdef":
            world.start(name)
        assert await world.agree_on("abcdef", within=15) < 6


async def test_the_death_of_the_bootstrap_node_changes_nothing(autojump_clock: MockClock) -> None:
    async with a_world("abcd") as world:
        world.registry = None
        await trio.sleep(60)
        assert world.rosters() == {"abcd"}
        assert not any("suspected" in " ".join(peer.changes) for peer in world.peers.values())


async def test_a_restarted_bootstrap_node_learns_its_swarm_from_the_members(
    autojump_clock: MockClock,
) -> None:
    async with a_world("abc") as world:
        for peer in world.peers.values():
            peer.driver.round_changed(1)
        world.registry = Registry(verify, trio.current_time)
        await trio.sleep(60)
        assert world.registry.swarms() == {"swarm": 3}
        world.start("d", joined_round=2)
        await world.agree_on("abcd", within=10)


async def test_a_killed_hub_is_given_up_and_another_takes_over(autojump_clock: MockClock) -> None:
    async with a_world("abcde") as world:
        hub = hub_of(world)
        world.peers[PeerId(hub)].kill()
        rest = "abcde".replace(hub, "")
        assert await world.agree_on(rest, within=10) < 4
        assert len({peer.roster[0].peer for peer in world.peers.values() if peer.runs}) == 1


async def test_a_frozen_hub_is_given_up_within_ten_seconds(autojump_clock: MockClock) -> None:
    async with a_world("abcde") as world:
        hub = hub_of(world)
        world.peers[PeerId(hub)].frozen = True
        await world.agree_on("abcde".replace(hub, ""), within=10)


async def test_leaving_is_known_before_the_goodbye_returns(autojump_clock: MockClock) -> None:
    async with a_world("abcd") as world:
        leaver = world.peers[PeerId("b")]
        began = trio.current_time()
        await leaver.driver.leave()
        assert trio.current_time() - began <= 2.0
        leaver.kill()
        await world.agree_on("acd", within=8)
        assert all("b dead" not in peer.changes for peer in world.peers.values())


async def test_a_killed_member_returns_under_its_name(autojump_clock: MockClock) -> None:
    async with a_world("abcd") as world:
        world.peers[PeerId("c")].kill()
        await world.agree_on("abd", within=10)
        world.start("c", joined_round=7)
        await world.agree_on("abcd", within=10)
        assert world.peers[PeerId("a")].roster[-1].peer == "c"
        assert "c returned" in world.peers[PeerId("a")].changes


async def test_an_idle_swarm_asks_little(autojump_clock: MockClock) -> None:
    async with a_world("abcde") as world:
        for peer in world.peers.values():
            peer.driver.round_changed(1)
        await trio.sleep(10)
        before = world.answers
        await trio.sleep(100)
        assert world.answers - before <= 5 * 30  # a comparison in some 5 s for each of five


async def test_any_member_lets_newcomers_in(autojump_clock: MockClock) -> None:
    async with a_world("ab") as world:
        driver = world.peers[PeerId("a")].driver
        newcomer = PeerId("n")
        welcome = driver.answer(Join(encode_terms(terms()), b"", b""), newcomer)
        assert isinstance(welcome, Welcome)
        assert welcome.genesis == world.genesis.encode()
        other = driver.answer(Join(encode_terms(terms(total=9)), b"", b""), newcomer)
        assert other == Mismatch(encode_terms(terms()))
        wrong = driver.answer(Join(encode_terms(terms("elsewhere")), b"", b""), newcomer)
        assert isinstance(wrong, Refused)
        assert "not in elsewhere" in wrong.reason


async def test_another_swarms_member_is_refused_and_nonsense_is_blamed(
    autojump_clock: MockClock,
) -> None:
    async with a_world("ab") as world:
        peer = world.peers[PeerId("a")]
        assert isinstance(peer.driver.answer(Question(bytes(32), b""), PeerId("b")), Refused)
        with pytest.raises(RemoteProtocolError):
            peer.driver.answer(Sync(world.genesis.swarm_id, bytes(32), None, b"\xc1"), PeerId("b"))
        peer.driver.gossip_received(b"\xc1", PeerId("b"))
        assert len(peer.faults) == 1
        assert peer.faults[0].startswith("b: malformed")
        assert genesis("other").swarm_id != world.genesis.swarm_id


async def test_a_member_of_another_swarm_of_the_same_terms_is_told_of_but_no_newcomer(
    autojump_clock: MockClock,
) -> None:
    async with a_world("a") as world:
        driver, other = world.peers[PeerId("a")].driver, genesis("another")
        said = sign_record(PeerId("x"), other.swarm_id, 1, 0, 0, ["/memory/x"], sign_as("x"))
        for record in (b"", encode_batch([said])):
            question = Join(encode_terms(other.terms), other.encode(), record)
            answer = driver.answer(question, PeerId("x"))
            assert isinstance(answer, Welcome)
            assert answer.genesis == world.genesis.encode()
        assert world.peers[PeerId("a")].other_swarms == [(other.encode(), "x")]


async def test_a_bootstrap_peer_that_knows_another_swarm_is_told_of(
    autojump_clock: MockClock,
) -> None:
    async with a_world("abc") as world:
        other = min((genesis(str(n)) for n in range(8)), key=lambda of: of.swarm_id)
        assert other.swarm_id < world.genesis.swarm_id
        world.registry = Registry(verify, trio.current_time)
        said = sign_record(PeerId("x"), other.swarm_id, 1, 0, 0, ["/memory/x"], sign_as("x"))
        join = Join(encode_terms(other.terms), other.encode(), b"")
        world.registry.answer(join, PeerId("x"))
        for _ in range(2):
            join = Join(encode_terms(other.terms), other.encode(), encode_batch([said]))
            world.registry.answer(join, PeerId("x"))
        await trio.sleep(30)
        for peer in world.peers.values():
            assert (other.encode(), "bootstrap") in peer.other_swarms
            assert peer.faults == []
