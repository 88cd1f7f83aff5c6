"""The gossip topics of one peer in one swarm: which it follows, and what it publishes there."""

from __future__ import annotations

from collections.abc import Collection

import trio

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.exchange.driver import Exchange
from p2pfl_torrent.exchange.membership import MembershipDriver
from p2pfl_torrent.overlay.gossip import Gossip, OnMessage

MAX_QUEUED = 64  # publications waiting; more are dropped, the edges repair


class Topics:
    """Follows the manifests, the members, and the availability of the neighbours.

    Attributes:
        members: the topic of the members' statements.
    """

    def __init__(self, gossip: Gossip, swarm_id: bytes, local: PeerId) -> None:
        prefix = f"/p2pfl-torrent/{swarm_id.hex()[:32]}"
        self.members = f"{prefix}/members"
        self._manifests = f"{prefix}/manifests"
        self._have = f"{prefix}/have"
        self._local = local
        self._gossip = gossip
        self._followed: set[str] = set()
        self._near: dict[str, PeerId] = {}  # topics, and who publishes there
        self._changed = trio.Event()
        self._to_publish, self._queue = trio.open_memory_channel[tuple[str, bytes, bool]](
            MAX_QUEUED
        )

    async def follow(self, exchange: Exchange, driver: MembershipDriver) -> None:
        """Tell them what comes, until cancelled."""

        def manifest(origin: str, data: bytes) -> None:
            exchange.feed(ev.ManifestGossip(PeerId(origin), data))

        def members(origin: str, data: bytes) -> None:
            driver.gossip_received(data, PeerId(origin))

        def availability(origin: str, data: bytes) -> None:
            exchange.feed(ev.AvailabilityGossip(PeerId(origin), data))

        await self._follow(self._manifests, manifest)
        await self._follow(self.members, members)
        always = set(self._followed)
        while True:
            near = self._near  # replaced, never changed, while we follow
            wanted = near.keys() | always
            for topic in self._followed - wanted:
                self._followed.remove(topic)
                await self._gossip.unsubscribe(topic)
            for topic in wanted - self._followed:
                await self._follow(topic, availability, near[topic])
            await self._changed.wait()
            self._changed = trio.Event()

    async def _follow(
        self, topic: str, on_message: OnMessage, publisher: PeerId | None = None
    ) -> None:
        self._followed.add(topic)
        await self._gossip.subscribe(topic, on_message, publisher=publisher)

    def set_neighbours(self, neighbours: Collection[PeerId]) -> None:
        """Whose availability is of interest from now on."""
        self._near = {f"{self._have}/{peer}": peer for peer in neighbours}
        self._changed.set()

    async def leave(self) -> None:
        """Follow nothing any more; ``follow`` has been cancelled."""
        for topic in self._followed:
            await self._gossip.unsubscribe(topic)
        self._followed.clear()

    # --- publishing --------------------------------------------------------------------------

    async def publish(self) -> None:
        """Publish what is queued, until cancelled."""
        async for topic, data, to_all in self._queue:
            await self._gossip.publish(topic, data, to_all=to_all)

    def queue_manifest(self, data: bytes) -> None:
        """Publish on the manifest topic, soon."""
        self._put(self._manifests, data)

    def queue_availability(self, data: bytes) -> None:
        """Publish on our availability topic, soon."""
        self._put(f"{self._have}/{self._local}", data, to_all=True)

    def _put(self, topic: str, data: bytes, *, to_all: bool = False) -> None:
        try:
            self._to_publish.send_nowait((topic, data, to_all))
        except trio.WouldBlock:
            pass  # what gossip would have told is pulled over the edges
