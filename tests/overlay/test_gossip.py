"""Gossip between real hosts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import combinations

import pytest
import trio

from p2pfl_torrent.core.errors import LocalProtocolError
from p2pfl_torrent.overlay.gossip import MAX_DATA, Gossip, GossipLimits, open_gossip
from p2pfl_torrent.overlay.host import Host
from tests.overlay.hosts import ECHO, PATIENCE, a_gossiping_pair, a_host, a_pair, ask_echo, until

TOPIC = "swarm"


@dataclass
class Node:
    host: Host
    gossip: Gossip
    heard: list[tuple[str, bytes]] = field(default_factory=list)

    def listen(self, peer: str, data: bytes) -> None:
        self.heard.append((peer, data))


@asynccontextmanager
async def a_swarm(size: int, links: Sequence[tuple[int, int]]) -> AsyncIterator[list[Node]]:
    """Nodes that follow TOPIC, linked as given, each knowing that its neighbours follow it too."""
    async with AsyncExitStack() as stack:
        nodes = []
        for _ in range(size):
            host = await stack.enter_async_context(a_host())
            node = Node(host, await stack.enter_async_context(open_gossip(host)))
            await node.gossip.subscribe(TOPIC, node.listen)
            nodes.append(node)
        async with trio.open_nursery() as nursery:
            for a, b in links:
                host = nodes[b].host
                nursery.start_soon(nodes[a].host.connect, host.peer_id, host.addrs(), PATIENCE)
        for a, b in links:
            one, other = nodes[a], nodes[b]
            await until(lambda o=one, p=other.host.peer_id: p in o.gossip.neighbours(TOPIC))  # type: ignore[misc]
            await until(lambda o=other, p=one.host.peer_id: p in o.gossip.neighbours(TOPIC))  # type: ignore[misc]
        yield nodes


@pytest.mark.parametrize(
    ("name", "links"),
    [
        ("ring", [(n, (n + 1) % 6) for n in range(6)]),
        ("full", list(combinations(range(6), 2))),
        ("star", [(0, n) for n in range(1, 6)]),
    ],
)
async def test_everybody_hears_everybody(name: str, links: list[tuple[int, int]]) -> None:
    async with a_swarm(6, links) as nodes:
        for number, node in enumerate(nodes):
            await node.gossip.publish(TOPIC, f"from {number}".encode())
        said = {(node.host.peer_id, f"from {n}".encode()) for n, node in enumerate(nodes)}
        for node in nodes:
            others = {message for message in said if message[0] != node.host.peer_id}
            await until(lambda h=node.heard, o=others: set(h) >= o)  # type: ignore[misc]
            assert sorted(node.heard) == sorted(others)  # each once, told by its originator's name
            assert node.gossip.counters.published == 1
            assert node.gossip.counters.delivered == 5
            assert node.gossip.counters.dropped == 0


async def test_a_burst_of_a_hundred_arrives() -> None:
    async with a_swarm(3, [(0, 1), (1, 2)]) as (first, _relay, last):
        said = [f"{number}".encode() for number in range(100)]
        for data in said:
            await first.gossip.publish(TOPIC, data)
            await trio.lowlevel.checkpoint()
        await until(lambda: len(last.heard) == 100)
        assert sorted(data for _, data in last.heard) == sorted(said)


async def test_the_largest_message_arrives_and_a_larger_one_is_our_bug() -> None:
    async with a_swarm(2, [(0, 1)]) as (first, last):
        await first.gossip.publish(TOPIC, bytes(MAX_DATA))
        await until(lambda: last.heard == [(first.host.peer_id, bytes(MAX_DATA))])
        with pytest.raises(LocalProtocolError, match="announce a hash"):
            await first.gossip.publish(TOPIC, bytes(MAX_DATA + 1))
        assert first.gossip.counters.published == 1


async def test_one_can_publish_to_a_topic_one_does_not_follow() -> None:
    async with a_swarm(2, [(0, 1)]) as (first, last):
        await last.gossip.subscribe("availability", last.listen)
        await until(lambda: first.gossip.neighbours("availability") == {last.host.peer_id})
        await first.gossip.publish("availability", b"have")
        await until(lambda: last.heard == [(first.host.peer_id, b"have")])


async def test_what_is_not_relayed_goes_to_all_neighbours_and_no_further() -> None:
    """In a full mesh each message of a relayed topic comes some three times."""
    links = [(0, 1), (0, 2), (0, 3), (0, 4), (4, 5)]
    async with a_swarm(6, links) as (first, *others):
        for node in others:
            await node.gossip.subscribe("availability", node.listen, publisher=first.host.peer_id)
        *near, far = others
        names = {node.host.peer_id for node in near}
        await until(lambda: first.gossip.neighbours("availability") == names)
        said = [(first.host.peer_id, b"%d" % number) for number in range(20)]
        for _, data in said:
            await first.gossip.publish("availability", data, to_all=True)
        await first.gossip.publish(TOPIC, b"the end")  # what is passed on comes in this order
        await until(lambda: all(len(node.heard) > 20 for node in near) and len(far.heard) > 0)
        assert all(node.heard[:20] == said for node in near)
        assert far.heard == [(first.host.peer_id, b"the end")]
        # Nobody else was told: in a full mesh that would be as many words as peers, cubed.
        assert not any(node.gossip.neighbours("availability") for node in others)


async def test_a_publisher_learns_who_follows_it_when_they_meet_and_when_they_cease() -> None:
    async with a_host() as one, a_host() as other:
        async with open_gossip(one) as first, open_gossip(other) as last:
            node = Node(other, last)
            await last.subscribe("availability", node.listen, publisher=one.peer_id)
            await one.connect(other.peer_id, other.addrs(), PATIENCE)  # after it was followed
            await until(lambda: first.neighbours("availability") == {other.peer_id})
            await first.publish("availability", b"have", to_all=True)
            await until(lambda: node.heard == [(one.peer_id, b"have")])
            await last.unsubscribe("availability")
            await until(lambda: first.neighbours("availability") == set())
            await last.subscribe("availability", node.listen, publisher=one.peer_id)
            await until(lambda: first.neighbours("availability") == {other.peer_id})


async def test_after_unsubscribing_one_hears_nothing() -> None:
    async with a_swarm(2, [(0, 1)]) as (first, last):
        with pytest.raises(LocalProtocolError, match="subscribed to swarm already"):
            await last.gossip.subscribe(TOPIC, last.listen)
        await last.gossip.subscribe("other", last.listen)
        await last.gossip.unsubscribe(TOPIC)
        await last.gossip.unsubscribe(TOPIC)
        assert last.gossip.topics == {"other"}
        await until(lambda: first.gossip.neighbours(TOPIC) == set())
        await until(lambda: first.gossip.neighbours("other") == {last.host.peer_id})
        await first.gossip.publish(TOPIC, b"unheard")
        await first.gossip.publish("other", b"heard")
        await until(lambda: last.heard == [(first.host.peer_id, b"heard")])


async def test_a_late_subscriber_gets_what_was_just_said() -> None:
    async with a_swarm(2, [(0, 1)]) as (first, last):
        await first.gossip.subscribe("late", first.listen)
        await first.gossip.publish("late", b"a moment ago")
        await last.gossip.subscribe("late", last.listen)
        await until(lambda: last.heard == [(first.host.peer_id, b"a moment ago")])


@pytest.mark.parametrize("first", [True, False])
async def test_gossip_that_opens_after_the_connection_finds_it(first: bool) -> None:
    async with a_pair() as (ours, theirs):
        one, other = (ours, theirs) if first else (theirs, ours)
        await until(lambda: one.connected() == {other.peer_id})
        async with open_gossip(one) as early:
            await early.subscribe(TOPIC, lambda peer, data: None)
            assert await ask_echo(ours, theirs.peer_id, b"meanwhile") == b"meanwhile"
            async with open_gossip(other) as late:
                await late.subscribe(TOPIC, lambda peer, data: None)
                await until(lambda: early.neighbours(TOPIC) == {other.peer_id})
                await until(lambda: late.neighbours(TOPIC) == {one.peer_id})


async def test_gossip_survives_the_loss_of_one_of_two_connections() -> None:
    async with a_host() as one, a_host() as other, open_gossip(one) as a, open_gossip(other) as b:
        left, right = Node(one, a), Node(other, b)
        for node in (left, right):
            await node.gossip.subscribe(TOPIC, node.listen)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.connect, other.peer_id, other.addrs(), PATIENCE)
            nursery.start_soon(other.connect, one.peer_id, one.addrs(), PATIENCE)
        await until(lambda: a.neighbours(TOPIC) == {other.peer_id})
        await until(lambda: b.neighbours(TOPIC) == {one.peer_id})
        used = a._pubsub.peers[next(iter(a._pubsub.peers))].muxed_conn
        (conn,) = [c for c in one.swarm.get_connections() if c.muxed_conn is used]
        await one.swarm.drop(conn)
        if not one.connected():  # the dials did not cross: there was only one connection
            await one.connect(other.peer_id, other.addrs(), PATIENCE)

        async def said(by: Node, to: Node, data: bytes) -> None:
            with trio.fail_after(PATIENCE):
                while (by.host.peer_id, data) not in to.heard:
                    await by.gossip.publish(TOPIC, data)
                    await trio.sleep(0.05)

        await said(left, right, b"to the right")
        await said(right, left, b"to the left")


async def test_a_neighbour_that_says_too_much_is_cut() -> None:
    limits = GossipLimits(messages_per_second=0.001, message_burst=5)
    async with a_pair() as (ours, theirs):
        async with open_gossip(ours) as us, open_gossip(theirs, limits) as them:
            node = Node(theirs, them)
            await us.subscribe(TOPIC, lambda peer, data: None)
            await them.subscribe(TOPIC, node.listen)
            await until(lambda: us.neighbours(TOPIC) == {theirs.peer_id})
            for number in range(10):
                await us.publish(TOPIC, bytes([number]))
            await until(lambda: them.counters.dropped == 5)
            assert len(node.heard) == 5


async def test_a_restart_does_not_repeat_sequence_numbers() -> None:
    async with a_pair() as (ours, theirs), open_gossip(theirs) as them:
        node = Node(theirs, them)
        await them.subscribe(TOPIC, node.listen)
        for number in range(3):
            async with open_gossip(ours) as us:
                await until(lambda u=us: u.neighbours(TOPIC) == {theirs.peer_id})  # type: ignore[misc]
                for _ in range(5):
                    await us.publish(TOPIC, b"again")
                await until(lambda n=number: len(node.heard) == 5 * (n + 1))  # type: ignore[misc]


async def test_leaving_the_block_ends_gossip_and_not_the_host() -> None:
    async with a_gossiping_pair(TOPIC) as (ours, _us, theirs, _them):
        assert await ask_echo(ours, theirs.peer_id, b"x") == b"x"
    with pytest.raises(ZeroDivisionError):
        async with a_host() as host, open_gossip(host):
            raise ZeroDivisionError
    async with a_host() as host:
        async with open_gossip(host):
            pass
        assert ECHO not in host.libp2p.get_mux().get_protocols()
