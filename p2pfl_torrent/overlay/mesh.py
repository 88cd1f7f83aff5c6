"""GossipSub's router: who gets a message, and which neighbours form a topic's mesh.

Wire and vocabulary are GossipSub 1.1 and 1.2, handlers and queues the library's. What decides is
written anew here, because the library's heartbeat sends each peer the grafts of all peers before
it, tells nobody in back-off of missed messages, keeps a list of every message's time for ever,
and queues each message for every neighbour that does not follow its topic.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable

import trio
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, PROTOCOL_ID_V12, GossipSub
from libp2p.pubsub.pb import rpc_pb2

log = logging.getLogger(__name__)

DEGREE, DEGREE_LOW, DEGREE_HIGH = 3, 2, 6
"""Links per topic: wanted, grafted below, pruned above. Every link more is a duplicate more of
each message and costs its CPU; what a thin mesh misses, IHAVE repairs a heartbeat later."""

MAX_TOLD = 500  # ids in one IHAVE: a receiver accepts some more (rpc.MAX_IDS)
LAZY_DEGREE = 3
"""Neighbours outside the mesh that are told the ids of recent messages at each heartbeat."""

HEARTBEAT = 1  # seconds
BACK_OFF = 5  # seconds before a pruned link is tried again; GossipSub's 60 is for lasting swarms
GOSSIP_WINDOW, GOSSIP_HISTORY = 3, 6  # heartbeats for which an id is told, a message kept
FANOUT_LIFE = 60  # seconds for which the readers of a topic we only write to are kept

IDONTWANT_FROM = 4 << 10
"""Bytes from which a duplicate costs more than telling the neighbours that we have it."""


class Router(GossipSub):
    """The library's router, with our decisions.

    Attributes:
        unrelayed: topics we follow without a mesh: nothing that comes on them is passed on.
        to_all: topics on which each follower gets our messages from us.
    """

    def __init__(self) -> None:
        super().__init__(
            [PROTOCOL_ID_V12, PROTOCOL_ID_V11],
            degree=DEGREE,
            degree_low=DEGREE_LOW,
            degree_high=DEGREE_HIGH,
            gossip_window=GOSSIP_WINDOW,
            gossip_history=GOSSIP_HISTORY,
            heartbeat_interval=HEARTBEAT,
            prune_back_off=BACK_OFF,
            unsubscribe_back_off=BACK_OFF,
            do_px=False,
            adaptive_gossip_enabled=False,
            spam_protection_enabled=False,  # 10 a second per forwarder; GossipLimits bound it
            eclipse_protection_enabled=False,  # grafts above the degree, for other IPs
        )

        self.unrelayed: set[str] = set()
        self.to_all: set[str] = set()
        self._young: dict[tuple[str, ID], int] = {}  # links, and for how many beats still

    async def join(self, topic: str) -> None:
        """Begins to follow a topic."""
        if topic not in self.unrelayed:
            await super().join(topic)

    # Sending

    async def publish(self, msg_forwarder: ID, pubsub_msg: rpc_pb2.Message) -> None:
        """Passes on a message that has been found good."""
        (topic,) = pubsub_msg.topicIDs
        if topic in self.unrelayed and msg_forwarder != self._me:
            return
        self.mcache.put(pubsub_msg)
        mid = pubsub_msg.from_id + pubsub_msg.seqno
        if len(pubsub_msg.data) >= IDONTWANT_FROM:
            await self._emit_idontwant_for_message(mid, [topic])
        packet = rpc_pb2.RPC(publish=[pubsub_msg])
        for peer in self._receivers(topic, own=msg_forwarder == self._me):
            if peer not in (
                msg_forwarder,
                ID(pubsub_msg.from_id),
            ) and mid not in self.dont_send_message_ids.get(peer, ()):
                self.send_rpc(peer, packet)

    def _receivers(self, topic: str, own: bool) -> set[ID]:
        if own and topic in self.to_all:
            return self._followers(topic)
        if topic not in self.mesh:
            known = self.fanout.setdefault(topic, set()) & self._followers(topic)
            known |= _some(self._followers(topic) - known, DEGREE - len(known))
            self.fanout[topic] = known
            self.time_since_last_publish[topic] = int(time.time())
            return known
        links = self.mesh[topic]
        if own and len(links) < DEGREE:  # a young mesh may not have grown together yet
            return links | _some(self._followers(topic) - links, DEGREE - len(links))
        return links

    async def send_recent_messages(self, peer_id: ID, topic: str) -> None:
        """Brings a neighbour that has just subscribed up to date."""
        for mid in self.mcache.window(topic)[:MAX_TOLD]:
            message = self.mcache.get(mid)
            if message is not None and ID(message.from_id) != peer_id:
                self.send_rpc(peer_id, rpc_pb2.RPC(publish=[message]))

    async def emit_control_message(self, control_msg: rpc_pb2.ControlMessage, to_peer: ID) -> None:
        self.send_rpc(to_peer, rpc_pb2.RPC(control=control_msg), priority=True)

    # The mesh

    async def heartbeat(self) -> None:
        await trio.sleep(self.heartbeat_initial_delay)
        while True:
            try:
                await self._beat()
            except Exception:
                # An exception here would end the service and with it the program. The mesh it
                # stumbled over is mended by the next beat.
                log.exception("a gossip heartbeat failed")
            await trio.sleep(HEARTBEAT)

    async def _beat(self) -> None:
        for topic in list(self.mesh):
            await self._mend(topic)
        for topic in list(self.fanout):
            if self.time_since_last_publish.get(topic, 0) + FANOUT_LIFE < time.time():
                del self.fanout[topic]
                self.time_since_last_publish.pop(topic, None)
        for topic in [*self.mesh, *self.fanout]:
            await self._tell_of_recent(topic)
        self._young = {link: left - 1 for link, left in self._young.items() if left > 1}
        self.mcache.shift()
        self._prune_idontwant_entries()
        self._periodic_security_cleanup()
        self._forget_back_offs()

    async def _mend(self, topic: str) -> None:
        followers = self._followers(topic)
        links = self.mesh[topic]
        links &= followers
        if len(links) < DEGREE_LOW:
            ready = {peer for peer in followers - links if not self._check_back_off(peer, topic)}
            for peer in _some(ready, DEGREE - len(links)):
                links.add(peer)
                self._notify_mesh_peer_added(peer, topic)
                await self.emit_graft(topic, peer)
        elif len(links) > DEGREE_HIGH:
            for peer in _some(links, len(links) - DEGREE):
                links.discard(peer)
                self._add_back_off(peer, topic, False)
                await self.emit_prune(topic, peer, False, False)

    async def _tell_of_recent(self, topic: str) -> None:
        mids = self.mcache.window(topic)
        if mids:
            links = self.mesh.get(topic) or self.fanout.get(topic, set())
            told = _some(self._followers(topic) - links, LAZY_DEGREE)
            # What came just before a link was made was not sent along it.
            told |= {peer for peer in links if (topic, peer) in self._young}
            for peer in told:
                await self.emit_ihave(topic, mids[:MAX_TOLD], peer)

    def _notify_mesh_peer_added(self, peer_id: ID, topic: str) -> None:
        super()._notify_mesh_peer_added(peer_id, topic)
        self._young[topic, peer_id] = GOSSIP_WINDOW

    def _forget_back_offs(self) -> None:
        now = time.time()
        for topic, peers in list(self.back_off.items()):
            self.back_off[topic] = {peer: until for peer, until in peers.items() if until > now}
            if not self.back_off[topic]:
                del self.back_off[topic]

    # Who

    @property
    def _me(self) -> ID:
        assert self.pubsub is not None  # attached by the Pubsub's constructor
        return self.pubsub.my_id

    def _followers(self, topic: str) -> set[ID]:
        assert self.pubsub is not None  # attached by the Pubsub's constructor
        peers = self.pubsub.peer_topics.get(topic, set())
        return {peer for peer in peers if peer in self.peer_protocol}

    async def _do_px(self, px_peers: list[rpc_pb2.PeerInfo]) -> None:
        """Ignores peers suggested by others: the overlay decides whom to dial."""


def _some(peers: Iterable[ID], count: int) -> set[ID]:
    pool = sorted(peers, key=ID.to_bytes)  # a set's order differs from run to run
    return set(random.sample(pool, min(len(pool), max(0, count))))
