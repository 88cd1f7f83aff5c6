"""Which gossip topics a peer follows, and what it publishes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import trio
import trio.testing

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.exchange.driver import Exchange
from p2pfl_torrent.exchange.membership import MembershipDriver
from p2pfl_torrent.overlay.gossip import Gossip, OnMessage
from p2pfl_torrent.peer.topics import MAX_QUEUED, Topics

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
PREFIX = f"/p2pfl-torrent/{'00' * 16}"


class FakeGossip:
    """Subscriptions and publications, each after a turn of the scheduler."""

    def __init__(self) -> None:
        self.followed: dict[str, OnMessage] = {}
        self.published: list[tuple[str, bytes]] = []

    async def subscribe(self, topic: str, on_message: OnMessage, *, publisher: str | None) -> None:
        await trio.lowlevel.checkpoint()
        assert topic not in self.followed
        assert publisher == (topic.rpartition("/have/")[2] if "/have/" in topic else None)
        self.followed[topic] = on_message

    async def unsubscribe(self, topic: str) -> None:
        await trio.lowlevel.checkpoint()
        del self.followed[topic]

    async def publish(self, topic: str, data: bytes, *, to_all: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        assert to_all == ("/have/" in topic)
        self.published.append((topic, data))

    @property
    def near(self) -> set[str]:
        """Whose availability is followed."""
        have = f"{PREFIX}/have/"
        return {topic.removeprefix(have) for topic in self.followed if topic.startswith(have)}


class Told:
    """An exchange and a membership driver that only listen."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def feed(self, stimulus: ev.Stimulus) -> None:
        self.heard.append(stimulus)

    def gossip_received(self, data: bytes, via: PeerId) -> None:
        self.heard.append((via, data))


@asynccontextmanager
async def following() -> AsyncIterator[tuple[FakeGossip, Topics, Told]]:
    gossip, told = FakeGossip(), Told()
    topics = Topics(cast(Gossip, gossip), bytes(32), A)
    async with trio.open_nursery() as nursery:
        exchange, driver = cast(Exchange, told), cast(MembershipDriver, told)
        nursery.start_soon(topics.follow, exchange, driver)
        nursery.start_soon(topics.publish)
        yield gossip, topics, told
        nursery.cancel_scope.cancel()


async def test_only_the_neighbours_of_now_are_followed() -> None:
    async with following() as (gossip, topics, _):
        for near in ({B, C}, {C}, {A, C}, set(), {B}):
            topics.set_neighbours(near)
            await trio.testing.wait_all_tasks_blocked()
            assert gossip.near == near
        topics.set_neighbours({C})  # once more before the first is through
        await trio.lowlevel.checkpoint()
        topics.set_neighbours({A})
        await trio.testing.wait_all_tasks_blocked()
        assert gossip.near == {A}
        assert topics.members in gossip.followed
    await topics.leave()
    assert gossip.followed == {}


async def test_what_comes_reaches_who_is_to_hear_it() -> None:
    async with following() as (gossip, topics, told):
        topics.set_neighbours({B})
        await trio.testing.wait_all_tasks_blocked()
        gossip.followed[f"{PREFIX}/manifests"]("b", b"1")
        gossip.followed[f"{PREFIX}/members"]("b", b"2")
        gossip.followed[f"{PREFIX}/have/b"]("b", b"3")
        assert told.heard == [
            ev.ManifestGossip(B, b"1"),
            (B, b"2"),
            ev.AvailabilityGossip(B, b"3"),
        ]


async def test_what_is_published_waits_in_a_queue_that_is_bounded() -> None:
    async with following() as (gossip, topics, _):
        await trio.testing.wait_all_tasks_blocked()
        topics.queue_manifest(b"1")
        topics.queue_availability(b"2")
        await trio.testing.wait_all_tasks_blocked()
        assert gossip.published == [(f"{PREFIX}/manifests", b"1"), (f"{PREFIX}/have/a", b"2")]
        for _ in range(MAX_QUEUED + 10):
            topics.queue_availability(b"3")
        await trio.testing.wait_all_tasks_blocked()
        assert (
            gossip.published.count((f"{PREFIX}/have/a", b"3")) == MAX_QUEUED + 1
        )  # one was being awaited
