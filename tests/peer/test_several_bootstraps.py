"""Several bootstrap addresses, some of them down or slow for some peers: one swarm all the same."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from torch import nn

from p2pfl_torrent import AsyncPeer, PeerConfig
from p2pfl_torrent.core.genesis import Genesis, Terms
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import Joined, RoundReport
from p2pfl_torrent.core.statements import ACTIVE, encode_batch, sign_record
from p2pfl_torrent.learning.state import describe
from p2pfl_torrent.overlay.bootstrap import Registry
from p2pfl_torrent.overlay.host import Host, open_host
from p2pfl_torrent.overlay.identity import Identity, verify
from p2pfl_torrent.overlay.stream import Stream
from p2pfl_torrent.peer.adapters import StreamPort
from p2pfl_torrent.peer.identity import identity_of
from p2pfl_torrent.peer.network import JoinError, find_swarm
from p2pfl_torrent.peer.node import Node
from p2pfl_torrent.protocols.members import PROTOCOL_ID, serve_members

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
PATIENCE = 60.0


@dataclass
class Bootstrap:
    """A bootstrap-only node on a real host.

    Attributes:
        down_for: peers that cannot reach it now.
        slow: it answers nobody.
    """

    host: Host
    registry: Registry
    down_for: set[str] = field(default_factory=set)
    slow: bool = False

    @property
    def address(self) -> str:
        return self.host.addrs()[0]

    async def serve(self, stream: Stream) -> None:
        if self.slow:
            await trio.sleep_forever()
        if stream.remote not in self.down_for:
            await serve_members(StreamPort(stream), self.registry.answer)


@asynccontextmanager
async def a_bootstrap() -> AsyncIterator[Bootstrap]:
    async with open_host(Identity.ephemeral(), LOOPBACK) as host:
        node = Bootstrap(host, Registry(verify, trio.current_time))
        host.set_handler(PROTOCOL_ID, node.serve)
        yield node


def config(bootstrap: Sequence[Bootstrap], state_dir: str = "") -> PeerConfig:
    return PeerConfig.from_mapping(
        {
            "federate": {"client_num": 2, "total_round_num": 1, "join_timeout": PATIENCE},
            "bittorrent": {"timeout": PATIENCE},
            "topology": {"max_connection_attempts": 1},
            "network": {"bootstrap": [node.address for node in bootstrap]},
            "storage": {"state_dir": state_dir},
        }
    )


async def take_part(peer: AsyncPeer, reports: list[RoundReport]) -> None:
    with trio.fail_after(PATIENCE):
        async with peer:
            async for _ in peer.rounds():
                reports.append(await peer.exchange(num_samples=1))


async def until_joined(peer: AsyncPeer) -> None:
    told = peer.events()
    with trio.fail_after(PATIENCE):
        while not any(isinstance(event, Joined) for event in told.drain()):  # noqa: ASYNC110
            await trio.sleep(0.01)


def one_model(reports: list[RoundReport]) -> bool:
    return len(reports) == 2 and len({report.model_hash for report in reports}) == 1


async def test_a_bootstrap_that_missed_the_founding_makes_no_second_swarm() -> None:
    async with a_bootstrap() as one, a_bootstrap() as other:
        reports: list[RoundReport] = []
        founder = AsyncPeer(config([other]), nn.Linear(4, 2))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_part, founder, reports)
            await until_joined(founder)
            await take_part(AsyncPeer(config([one, other]), nn.Linear(4, 2)), reports)
    assert one_model(reports)


@pytest.fixture
def left_over(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Files and protocols of each peer that has just given way to another swarm."""
    found: list[set[str]] = []
    give_way = Node.give_way

    async def watched(node: Node) -> None:
        await give_way(node)
        files = {path.name for path in node._dir.rglob("*") if path.is_file()}
        served = set(map(str, node._host.libp2p.get_mux().handlers))
        found.append(files | {protocol for protocol in served if "p2pfl-torrent" in protocol})

    monkeypatch.setattr(Node, "give_way", watched)
    return found


async def test_two_swarms_that_began_apart_become_one(
    tmp_path: Path, left_over: list[set[str]]
) -> None:
    """Each peer founds one at the only bootstrap peer that it reaches; then both are up."""
    places = [str(tmp_path / "1"), str(tmp_path / "2")]
    ids = [identity_of(Path(place)) for place in places]
    async with a_bootstrap() as one, a_bootstrap() as other:
        one.down_for.add(ids[1])
        other.down_for.add(ids[0])
        reports: list[RoundReport] = []
        peers = [AsyncPeer(config([one, other], place), nn.Linear(4, 2)) for place in places]
        swarms = []
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(take_part, peer, reports)
                await until_joined(peer)
                swarms.append(peer.statistics().swarm)
            assert swarms[0] != swarms[1]
            one.down_for.clear()
            other.down_for.clear()
    assert one_model(reports)
    assert {peer.statistics().swarm for peer in peers} == {min(swarms)}
    assert left_over == [{"identity.key", "lock"}]


# --- find_swarm by itself ------------------------------------------------------------------------


def terms() -> Terms:
    values = PeerConfig()
    spec = describe(nn.Linear(4, 2))
    return values.terms(spec, values.plan_layout(spec))


def genesis(run_id: str) -> Genesis:
    return Genesis(terms(), run_id, "founder", "0" * 64)


def enter(node: Bootstrap, of: Genesis, members: int) -> None:
    """Members of a swarm have been at a bootstrap peer."""
    swarm = node.registry._swarms.get(of.terms.name) or node.registry._remember(of)
    for _ in range(members):
        identity = Identity.ephemeral()
        peer = PeerId(identity.peer_id)
        said = sign_record(peer, of.swarm_id, 1, ACTIVE, 1, ["/memory/x"], identity.sign)
        swarm.census.merge(encode_batch([said]))


async def find(*bootstrap: Bootstrap) -> Genesis:
    async with open_host(Identity.ephemeral(), LOOPBACK) as host:
        addrs = [node.address for node in bootstrap]
        found = await find_swarm(host, addrs, terms(), genesis("mine"), attempts=1)
        return found.genesis


async def test_what_is_founded_is_known_at_every_bootstrap_peer() -> None:
    async with a_bootstrap() as one, a_bootstrap() as other:
        assert await find(one, other) == genesis("mine")
        for node in (one, other):
            assert node.registry._swarms[terms().name].genesis == genesis("mine")


async def test_a_slow_bootstrap_holds_up_nobody_who_knows_another() -> None:
    async with a_bootstrap() as slow, a_bootstrap() as other:
        slow.slow = True
        enter(other, genesis("theirs"), 1)
        with trio.fail_after(8.0):  # less than the patience with one that does not answer
            assert await find(slow, other) == genesis("theirs")


async def test_of_two_swarms_a_newcomer_takes_the_one_that_has_begun_else_the_lower() -> None:
    low, high = sorted([genesis("x"), genesis("y")], key=lambda of: of.swarm_id)
    async with a_bootstrap() as one, a_bootstrap() as other:
        enter(one, high, 1)
        enter(other, low, 1)
        assert await find(one, other) == low
        enter(one, high, 1)  # now there are client_num of them
        assert await find(one, other) == high
        enter(other, low, 1)
        with pytest.raises(JoinError, match="Two swarms with the same terms have begun"):
            await find(one, other)
