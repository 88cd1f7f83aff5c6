"""Hostile peers against a running host with gossip: it lives, and serves the others."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from p2pfl_torrent.overlay.gossip import Gossip
from p2pfl_torrent.overlay.host import Host
from p2pfl_torrent.overlay.stream import Stream
from tests.overlay.attacks import ATTACKS, CRASHES, Target
from tests.overlay.hosts import a_gossiping_pair, ask_echo, until

TOPIC = "swarm"
RAISING = "/flt/test/raise/1"


@dataclass(frozen=True)
class Victim:
    host: Host
    gossip: Gossip
    friend: Host
    friends_gossip: Gossip
    heard: list[bytes]

    @property
    def target(self) -> Target:
        return Target(self.host.addrs()[0], TOPIC, RAISING)

    async def still_serves(self) -> None:
        """Its friend, connected since before the attack, still gets what it asks for."""
        assert await ask_echo(self.friend, self.host.peer_id, b"x" * 10_000) == b"x" * 10_000
        await self.friends_gossip.publish(TOPIC, b"still there?")
        await until(lambda: b"still there?" in self.heard)


@asynccontextmanager
async def a_victim() -> AsyncIterator[Victim]:
    async with a_gossiping_pair(TOPIC) as (friend, friends_gossip, host, gossip):
        heard: list[bytes] = []

        async def raises(stream: Stream) -> None:
            raise ZeroDivisionError("a bug in our own handler")

        def listen(peer: str, data: bytes) -> None:
            heard.append(data)
            if data == b"hostile":
                raise ZeroDivisionError("a bug in our own callback")

        host.set_handler(RAISING, raises)
        await gossip.unsubscribe(TOPIC)
        await gossip.subscribe(TOPIC, listen)
        await until(lambda: friends_gossip.neighbours(TOPIC) == {host.peer_id})
        yield Victim(host, gossip, friend, friends_gossip, heard)


@pytest.mark.parametrize("name", ATTACKS)
async def test_the_victim_lives_and_serves_its_friend(name: str) -> None:
    async with a_victim() as victim:
        await ATTACKS[name](victim.target)
        await victim.still_serves()


async def test_all_single_message_crashes_in_a_row() -> None:
    async with a_victim() as victim:
        for _ in range(2):
            for attack in CRASHES.values():
                await attack(victim.target)
        await victim.still_serves()


async def test_a_validator_that_raises_costs_the_message_only() -> None:
    async with a_victim() as victim:

        def validator(peer: object, message: object) -> bool:
            if getattr(message, "data", b"") == b"hostile":
                raise ZeroDivisionError("a bug in our own validator")
            return True

        victim.gossip._pubsub.set_topic_validator(TOPIC, validator, is_async_validator=False)
        await ATTACKS["good_gossip"](victim.target)
        assert victim.heard == []
        assert victim.gossip.counters.dropped == 1
        await victim.still_serves()


async def test_bugs_of_ours_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with a_victim() as victim:
        with caplog.at_level(logging.ERROR, "p2pfl_torrent"):
            await ATTACKS["good_gossip"](victim.target)
            await ATTACKS["an_ordinary_stream"](victim.target)
    told = [str(record.exc_info and record.exc_info[1]) for record in caplog.records]
    assert "a bug in our own callback" in told
    assert "a bug in our own handler" in told


async def test_a_bad_key_is_dropped_and_counted() -> None:
    async with a_victim() as victim:
        await ATTACKS["gossip_with_a_bad_key"](victim.target)
        assert victim.heard == []
        assert victim.gossip.counters.dropped == 1


async def test_a_flood_is_cut_to_the_burst() -> None:
    async with a_victim() as victim:
        await ATTACKS["gossip_flood"](victim.target)
        await until(lambda: victim.gossip.counters.dropped > 0)
        await victim.still_serves()
        assert victim.heard.count(b"hostile") < 2000


async def test_control_floods_leave_nothing_behind() -> None:
    async with a_victim() as victim:
        await ATTACKS["control_floods"](victim.target)
        pubsub, router = victim.gossip._pubsub, victim.gossip._router
        assert victim.gossip.counters.broken_streams == 5
        assert set(pubsub.peer_topics) == {TOPIC}
        assert set(router.back_off) <= {TOPIC}
        assert set(router.mesh) == {TOPIC}


async def test_a_sender_that_ignores_the_window_is_cut_off() -> None:
    async with a_victim() as victim:
        await ATTACKS["ignored_window"](victim.target)
        await until(lambda: victim.host.connected() == {victim.friend.peer_id})
