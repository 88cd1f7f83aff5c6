"""Announcements to everybody: GossipSub with bounds, and without the library's five ways to die.

A message carries its originator's signature, and the originator is whom the callback is told; who
forwarded it does not matter. Gossip drops messages silently when queues are full: whatever is
announced here must also be obtainable by asking.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import trio
from libp2p.abc import INetStream
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.rpc_queue import RpcQueue
from libp2p.tools.anyio_service import background_trio_service

from p2pfl_torrent.core.errors import LocalProtocolError
from p2pfl_torrent.overlay.identity import is_peer_id
from p2pfl_torrent.overlay.limits import TokenBuckets
from p2pfl_torrent.overlay.mesh import Router
from p2pfl_torrent.overlay.rpc import (
    MAX_MESSAGES,
    MAX_RPC,
    MAX_SUBSCRIPTIONS,
    WireError,
    bounded,
)
from p2pfl_torrent.overlay.stream import Stream, StreamBroken
from p2pfl_torrent.overlay.yamux_stream import YamuxStream

if TYPE_CHECKING:
    from p2pfl_torrent.overlay.host import Host

log = logging.getLogger(__name__)

MAX_DATA = 16 << 10
"""Bytes one message may carry. Larger things are announced by hash and pulled over a stream."""

OUTBOUND_QUEUE = 256
"""Packets waiting for one neighbour before more are dropped: 4 MiB of the largest messages. The
library's 32 lose most of a round's manifests."""

JOINED = 48 << 10  # bytes of messages joined into one packet: one frame, one read

OnMessage = Callable[[str, bytes], None]


@dataclass(frozen=True)
class GossipLimits:
    """What one neighbour may send.

    Attributes:
        messages_per_second: published messages forwarded by one neighbour, its own and others'.
            A relay forwards the sum of a topic, so this bounds the swarm's rate too.
        message_burst: the same, at once: a round's manifests come together.
        entries_per_second: subscriptions and control entries of one neighbour. Above it, its
            gossip stream is reset.
        entry_burst: the same, at once.
    """

    messages_per_second: float = 200.0
    message_burst: int = 1000
    entries_per_second: float = 500.0
    entry_burst: int = 4000


@dataclass
class GossipCounters:
    """Running totals since :func:`open_gossip`.

    Attributes:
        published: messages of ours.
        delivered: messages handed to a callback.
        duplicates: messages that had been delivered before.
        dropped: messages refused: too fast, too large, malformed or falsely signed.
        broken_streams: neighbours' gossip streams reset for what came over them.
    """

    published: int = 0
    delivered: int = 0
    duplicates: int = 0
    dropped: int = 0
    broken_streams: int = 0


class Gossip:
    """Topics, to publish to and to be told of. Made by :func:`open_gossip`.

    Attributes:
        counters: see there.
    """

    def __init__(self, host: Host, limits: GossipLimits) -> None:
        self.counters = GossipCounters()
        self._router = Router()
        self._pubsub = _GuardedPubsub(host, self._router, limits, self.counters)

    @property
    def topics(self) -> frozenset[str]:
        """The topics we are told of."""
        return frozenset(self._pubsub.callbacks)

    def neighbours(self, topic: str) -> set[str]:
        """The connected peers that told us that they follow ``topic``."""
        return {str(peer) for peer in self._pubsub.peer_topics.get(topic, ())}

    async def subscribe(
        self, topic: str, on_message: OnMessage, *, publisher: str | None = None
    ) -> None:
        """Calls ``on_message(originator, data)`` for every message on ``topic`` but our own.

        Args:
            publisher: the one peer that publishes there, if that is so, ``to_all`` of its
                neighbours that follow it. Nobody else is told that we do, and nothing that comes
                is passed on.

        The callback is called in place, between two reads of a socket: it must be quick and must
        not raise (that is logged). No queue lies in between, so none can overflow.

        Raises:
            LocalProtocolError: we are subscribed already.
        """
        if topic in self._pubsub.callbacks:
            raise LocalProtocolError(f"subscribed to {topic} already")
        self._pubsub.callbacks[topic] = on_message
        if publisher is not None:
            self._pubsub.publishers[topic] = ID.from_base58(publisher)
            self._router.unrelayed.add(topic)
        await self._pubsub.subscribe(topic)

    async def unsubscribe(self, topic: str) -> None:
        """Ends a subscription; nothing happens if there is none."""
        if self._pubsub.callbacks.pop(topic, None) is not None:
            await self._pubsub.unsubscribe(topic)
            self._pubsub.publishers.pop(topic, None)
            self._router.unrelayed.discard(topic)

    async def publish(self, topic: str, data: bytes, *, to_all: bool = False) -> None:
        """Signs ``data`` and passes it to our neighbours; no promise that anybody gets it.

        Args:
            to_all: to each neighbour that follows the topic, for those that do not relay it.

        Raises:
            LocalProtocolError: more than ``MAX_DATA`` bytes.
        """
        if len(data) > MAX_DATA:
            raise LocalProtocolError(
                f"{len(data)} bytes are too many to gossip (at most {MAX_DATA}): announce a hash"
            )
        if to_all:
            self._router.to_all.add(topic)
        await self._pubsub.publish(topic, data)
        self.counters.published += 1


@asynccontextmanager
async def open_gossip(host: Host, limits: GossipLimits | None = None) -> AsyncIterator[Gossip]:
    """Gossip over ``host``'s connections, those it has and those to come."""
    gossip = Gossip(host, limits or GossipLimits())
    pubsub = gossip._pubsub
    failure: BaseException | None = None
    async with background_trio_service(pubsub), background_trio_service(gossip._router):
        await pubsub.wait_until_ready()
        for peer in host.connected():
            pubsub.meet(ID.from_base58(peer))
        try:
            yield gossip
        except BaseException as error:  # noqa: BLE001 - raised again below,
            failure = error  # outside the nurseries that would wrap it in a group
        finally:
            with trio.CancelScope(shield=True):
                await pubsub.part()
    if failure is not None:
        raise failure


class _GuardedPubsub(Pubsub):
    """The library's pubsub; what comes from a neighbour is bounded before it is believed."""

    def __init__(
        self, host: Host, router: Router, limits: GossipLimits, counters: GossipCounters
    ) -> None:
        super().__init__(host.libp2p, router, strict_signing=True, max_inbound_rpc_size=MAX_RPC)
        # The library starts at the time in seconds: after a restart within as many seconds as
        # messages were sent, the new ones would look like old ones and vanish.
        self.counter = time.time_ns()
        self.callbacks: dict[str, OnMessage] = {}
        self.publishers: dict[str, ID] = {}  # of topics with one
        self._counters = counters
        self._inbound: Counter[ID] = Counter()
        self._meeting: set[ID] = set()
        self._readers: set[Stream] = set()
        self._swarm = host.swarm
        self._notifee = host.swarm.notifees[-1]  # the one just registered
        self._messages = TokenBuckets(limits.messages_per_second, limits.message_burst)
        self._entries = TokenBuckets(limits.entries_per_second, limits.entry_burst)

    def meet(self, peer_id: ID) -> None:
        """Opens our stream to a peer that speaks gossip, unless there is one or it is under way."""
        stream = self.peers.get(peer_id)
        if stream is None:
            self._schedule_peer_stream_retry(peer_id)
        elif _is_dead(stream):  # the library would find out at the next message, and lose that
            self._handle_dead_peer(peer_id)

    async def part(self) -> None:
        """Resets all gossip streams, so that neighbours do not take us for a silent listener."""
        self._swarm.remove_notifee(self._notifee)
        for protocol in self.protocols:
            self.host.remove_stream_handler(protocol)
        async with trio.open_nursery() as nursery:
            for reader in self._readers:
                nursery.start_soon(reader.reset)
            for stream in self.peers.values():
                nursery.start_soon(stream.reset)
        self.seen_messages.stop()  # ends its thread

    async def _handle_new_peer(self, peer_id: ID) -> None:
        if peer_id in self._meeting:  # else both would open a stream, and one be forgotten open
            return
        self._meeting.add(peer_id)
        try:
            await super()._handle_new_peer(peer_id)
        finally:
            self._meeting.discard(peer_id)
        for topic, publisher in self.publishers.items():
            if publisher == peer_id and topic in self.callbacks:
                self._tell(peer_id, rpc_pb2.RPC.SubOpts(subscribe=True, topicid=topic))

    # What we follow

    def get_hello_packet(self) -> rpc_pb2.RPC:
        """What each peer is told when its stream opens; topics with one publisher, it alone is."""
        packet = super().get_hello_packet()
        shared = [one for one in packet.subscriptions if one.topicid not in self.publishers]
        del packet.subscriptions[:]
        packet.subscriptions.extend(shared)
        return packet

    async def message_all_peers(
        self, raw_msg: bytes, announce: rpc_pb2.RPC.SubOpts | None = None
    ) -> None:
        """Tells what we begin or cease to follow to all whom it concerns."""
        publisher = self.publishers.get(announce.topicid) if announce is not None else None
        if publisher is None:
            await super().message_all_peers(raw_msg, announce)
        elif announce is not None:
            self._tell(publisher, announce)

    def _tell(self, peer_id: ID, announce: rpc_pb2.RPC.SubOpts) -> None:
        queue = self.peer_queues.get(peer_id)
        if queue is not None:  # else it will be told when its stream opens
            packet = rpc_pb2.RPC(subscriptions=[announce])
            self._enqueue_or_retry_announce(peer_id, queue, packet, announce)

    # Sending

    async def handle_sending_messages(
        self, peer_id: ID, stream: INetStream, queue: RpcQueue
    ) -> None:
        """Writes what is queued for one neighbour, small messages several to a packet."""
        queue.max_message_size = MAX_RPC // 2  # what we send must fit what we accept
        queue._queue.max_size = OUTBOUND_QUEUE
        try:
            while (first := await queue.pop()) is not None:
                if not await self.write_msg(stream, _joined(first, queue)):
                    return
        except Exception:
            # The stream broke in a way the library does not name; it is opened anew.
            log.debug("sending gossip to %s failed", peer_id, exc_info=True)
            self._handle_dead_peer(peer_id)

    # Receiving

    async def continuously_read_stream(self, stream: INetStream) -> None:
        """Reads one neighbour's stream to its end; never raises."""
        peer_id = stream.muxed_conn.peer_id
        # It may have come up later than we did and have refused our stream at that time.
        self.meet(peer_id)
        reader = Stream(cast(NetStream, stream), stream.get_protocol() or "")
        self._inbound[peer_id] += 1
        self._readers.add(reader)
        try:
            while self.manager.is_running:
                await self._receive(peer_id, await _read_rpc(reader))
        except (StreamBroken, WireError) as error:
            if isinstance(error, WireError):
                self._counters.broken_streams += 1
            log.debug("the gossip stream of %s ended: %s", peer_id, error)
        except Exception:
            # The library's handlers of control messages were not written for hostile input: what
            # they raise costs the sender its stream and not us our process.
            self._counters.broken_streams += 1
            log.warning("gossip from %s could not be handled", peer_id, exc_info=True)
        finally:
            self._inbound[peer_id] -= 1
            self._readers.discard(reader)
            self._forget_all_subscriptions(peer_id)
        await reader.reset()

    def _forget_all_subscriptions(self, peer_id: ID) -> None:
        """Forgets what a peer follows, once no stream is left on which it would tell us again.

        The library forgets it when *our* stream to the peer breaks, which the peer need not notice.
        """
        if self._inbound[peer_id] > 0:
            self._replayed_recent_topics.pop(peer_id, None)
            return
        del self._inbound[peer_id]
        super()._forget_all_subscriptions(peer_id)

    async def handle_dead_peer_queue(self) -> None:
        """Mends the gossip with a peer whose connection closed, even if it has another one.

        The library looks only at peers without any connection, and would go on writing to the
        closed one of two until it failed.
        """
        async with self.dead_peer_receive_channel:
            self.event_handle_dead_peer_queue_started.set()
            async for peer_id in self.dead_peer_receive_channel:
                stream = self.peers.get(peer_id)
                if stream is None or stream.muxed_conn.is_closed:
                    self._handle_dead_peer(peer_id)

    async def _receive(self, peer_id: ID, packet: bytes) -> None:
        rpc, entries = bounded(packet, self.callbacks)
        now = trio.current_time()
        if entries and not self._entries.take(peer_id, now, entries):
            raise WireError("too many subscriptions and control messages")
        for subscription in rpc.subscriptions:
            self.handle_subscription(peer_id, subscription)
        for message in rpc.publish:
            if not self._messages.take(peer_id, now):
                self._counters.dropped += 1
            elif self._is_subscribed_to_msg(message):
                await self.push_msg(peer_id, message)
        if rpc.HasField("control"):
            await self.router.handle_rpc(rpc, peer_id)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """One message, ours or a neighbour's, to the callback and on to the neighbours."""
        if msg_forwarder != self.my_id and not self._wanted(msg):
            return
        before = self._counters.delivered
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception:
            # A key that is none, a validator's bug: the library lets them end the process.
            self._counters.dropped += 1
            log.debug("bad gossip from %s", msg_forwarder, exc_info=True)
            return
        if msg_forwarder != self.my_id and self._counters.delivered == before:
            self._counters.dropped += 1

    def _wanted(self, msg: rpc_pb2.Message) -> bool:
        if self._is_msg_seen(msg):
            self._counters.duplicates += 1
            return False
        if (
            len(msg.data) > MAX_DATA
            or len(msg.topicIDs) != 1
            or len(msg.seqno) != 8
            or not is_peer_id(str(ID(msg.from_id)))
            or ID(msg.from_id) == self.my_id
        ):
            self._counters.dropped += 1
            return False
        return True

    def notify_subscriptions(self, publish_message: rpc_pb2.Message) -> None:
        originator = ID(publish_message.from_id)
        if originator == self.my_id:
            return
        callback = self.callbacks.get(publish_message.topicIDs[0])
        if callback is None:
            return
        self._counters.delivered += 1
        try:
            callback(str(originator), publish_message.data)
        except Exception:  # a subscriber's bug must not keep the message from the others
            log.exception("a gossip callback failed")


def _is_dead(stream: INetStream) -> bool:
    muxed = cast(YamuxStream, cast(NetStream, stream).muxed_stream)
    return muxed.closed or muxed.send_closed or muxed.conn.is_closed


def _joined(first: rpc_pb2.RPC, queue: RpcQueue) -> rpc_pb2.RPC:
    """One packet of ``first`` and what is queued behind it, as far as they fit; control alone."""
    waiting = queue._queue._non_priority
    size = first.ByteSize()
    if first.HasField("control") or queue._queue._priority:
        return first
    packet = rpc_pb2.RPC()
    packet.CopyFrom(first)  # the queued object may be queued for other neighbours too
    while waiting and not waiting[0].HasField("control"):
        size += waiting[0].ByteSize()
        if (
            size > JOINED
            or len(packet.publish) + len(waiting[0].publish) > MAX_MESSAGES
            or len(packet.subscriptions) + len(waiting[0].subscriptions) > MAX_SUBSCRIPTIONS
        ):
            break
        packet.MergeFrom(waiting.popleft())
    return packet


async def _read_rpc(reader: Stream) -> bytes:
    size = 0
    for shift in (0, 7, 14):
        byte = (await reader.read_exactly(1))[0]
        size |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    else:
        size = MAX_RPC + 1
    if size > MAX_RPC:
        raise WireError(f"a gossip packet of more than {MAX_RPC} bytes")
    return bytes(await reader.read_exactly(size))
