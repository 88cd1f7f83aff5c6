"""Swarm machines on virtual time: every message in its wire form, over links that are modelled.

Each edge carries two streams, as in a peer; a stream delivers in order. Gossip reaches everybody
after twice the latency, or nobody. Every request is seen to be answered exactly once. What happens
is a function of the arguments alone.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.errors import LocalProtocolError
from p2pfl_torrent.core.genesis import Genesis
from p2pfl_torrent.core.manifest import block_hashes
from p2pfl_torrent.core.messages import (
    FRAME_HEADER,
    Message,
    Piece,
    Reject,
    Request,
    decode_body,
    encode_message,
    frame_body_bytes,
)
from p2pfl_torrent.core.peers import PeerId, Sign
from p2pfl_torrent.core.serving import Upload
from p2pfl_torrent.core.swarm import Swarm, SwarmPolicy
from p2pfl_torrent.simulation.links import Links
from p2pfl_torrent.simulation.node import Node

MIN_TICK = 0.005  # as the driver's
MAX_CONTROL = 1 << 20


def sign_as(peer: str) -> Sign:
    """A signature that only ``verify`` with that peer's name accepts; a world needs no keys."""
    return lambda message: hashlib.sha256(peer.encode() + message).digest()


def verify(peer: PeerId, message: bytes, signature: bytes) -> bool:
    """Whether ``sign_as`` that peer made it."""
    return signature == hashlib.sha256(peer.encode() + message).digest()


@dataclass
class Stream:
    """One stream: ``fetcher`` opened it and asks, ``holder`` answers."""

    fetcher: PeerId
    holder: PeerId
    opened_at: float
    open_requests: set[int] = field(default_factory=set)
    is_open: bool = True
    last_question: float = 0.0
    last_answer: float = 0.0


class World:
    """Peers, links and the time.

    Args:
        gossip: whether it reaches anybody.
        on_closed: told of each round that closed at a node; ``Node.closed`` has it already.
        on_missed: told of each round that a node missed.
    """

    def __init__(
        self,
        *,
        genesis: Genesis,
        layout: Layout,
        links: Links,
        policy: SwarmPolicy | None = None,
        gossip: bool = True,
        seed: int = 0,
        on_closed: Callable[[Node, ev.CloseRound], object] = lambda node, close: None,
        on_missed: Callable[[Node, int], object] = lambda node, round: None,
    ) -> None:
        self.now = 0.0
        self.genesis = genesis
        self.layout = layout
        self.links = links
        self.gossip = gossip
        self.rng = random.Random(seed)
        self.nodes: dict[PeerId, Node] = {}
        self.fed = 0
        self._policy = policy if policy is not None else SwarmPolicy()
        self._on_closed = on_closed
        self._on_missed = on_missed
        self._streams: dict[tuple[PeerId, PeerId], Stream] = {}
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    # --- who is there ------------------------------------------------------------------------

    def add(self, peer: PeerId) -> Node:
        """A peer without neighbours; one of that name before it is replaced, disk and all."""
        swarm = Swarm(
            local=peer,
            genesis=self.genesis,
            layout=self.layout,
            policy=self._policy,
            verify=verify,
            rng=random.Random(f"{peer}{self.rng.random()}"),
        )
        node = self.nodes[peer] = self._node(peer, swarm)
        return node

    def _node(self, peer: PeerId, swarm: Swarm) -> Node:
        return Node(peer, swarm)

    def link(self, a: PeerId, b: PeerId) -> None:
        """Open both streams of an edge; new ones replace what was open."""
        for fetcher, holder in ((a, b), (b, a)):
            replaced = self._streams.get((fetcher, holder))
            if replaced is not None:
                replaced.is_open = False
            self._streams[fetcher, holder] = Stream(fetcher, holder, self.now)
        for x, y in ((a, b), (b, a)):
            self.feed(x, ev.HolderOpened(y))
            self.feed(x, ev.FetcherOpened(y))

    def unlink(self, a: PeerId, b: PeerId) -> None:
        """Both streams of an edge break, without a farewell."""
        for x, y in ((a, b), (b, a)):
            stream = self._streams.pop((x, y), None)
            if stream is None:
                continue
            stream.is_open = False
            for end, stimulus in (
                (stream.fetcher, ev.HolderClosed(stream.holder)),
                (stream.holder, ev.FetcherClosed(stream.fetcher)),
            ):
                if not self.nodes[end].killed:
                    self.feed(end, stimulus)

    def are_linked(self, fetcher: PeerId, holder: PeerId) -> bool:
        """Whether that stream is open."""
        return (fetcher, holder) in self._streams

    def kill(self, peer: PeerId) -> None:
        """A peer is gone; its neighbours notice that its streams broke."""
        self.nodes[peer].killed = True
        for a, b in list(self._streams):
            if peer in (a, b) and (a, b) in self._streams:
                self.unlink(a, b)

    def members(self, live: Iterable[PeerId], dead: Iterable[PeerId] = (), since: int = 1) -> None:
        """Everybody's view from now on; all are waited for from round ``since`` on."""
        view = ev.MembersNow(dict.fromkeys(live, since), frozenset(dead))
        for node in list(self.nodes.values()):
            if not node.killed:
                self.feed(node.name, view)

    # --- time --------------------------------------------------------------------------------

    def feed(self, peer: PeerId, stimulus: ev.Stimulus) -> list[ev.Effect]:
        """Tell a machine something, and do what it answers."""
        node = self.nodes[peer]
        effects = node.swarm.handle(stimulus, self.now)
        self.fed += 1
        self._fed(node, effects)
        for effect in effects:
            self._apply(node, effect)
        self._pump(node)
        self._rearm(node)
        return effects

    def _fed(self, node: Node, effects: list[ev.Effect]) -> None:
        """For those who look on: before the effects are applied."""

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self._queue, (when, next(self._order), action))

    def run_until(self, condition: Callable[[], bool], limit: float = 300.0) -> None:
        """Let time pass until a condition holds.

        Raises:
            LocalProtocolError: nothing more will happen, or it does not within ``limit`` seconds.
        """
        end = self.now + limit
        while not condition():
            if not self._queue:
                raise LocalProtocolError(f"nothing more will happen at {self.now:.3f} s")
            if self._queue[0][0] > end:
                raise LocalProtocolError(f"still not so after {limit} s")
            self._step()

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self._step()
        self.now = end

    def _step(self) -> None:
        self.now, _, action = heapq.heappop(self._queue)
        action()

    def _rearm(self, node: Node) -> None:
        due = max(self.now + MIN_TICK, node.swarm.next_wakeup(self.now))
        if node.tick_at <= self.now or due < node.tick_at:
            node.tick_at = due
            self.at(due, lambda: self._tick(node, due))

    def _tick(self, node: Node, due: float) -> None:
        if node.tick_at == due and not node.killed:
            node.tick_at = -1.0
            self.feed(node.name, ev.Tick())

    # --- effects -----------------------------------------------------------------------------

    def _apply(self, node: Node, effect: ev.Effect) -> None:
        if isinstance(effect, ev.ToHolder):
            self._question(node.name, effect.peer, effect.message)
        elif isinstance(effect, ev.ToFetcher):
            self._answer(node.name, effect.peer, effect.message)
        elif isinstance(effect, (ev.PublishManifest, ev.PublishAvailability)):
            self._gossip(node, effect)
        elif isinstance(effect, ev.StoreManifest):
            update = effect.manifest.update
            node.manifests[update] = effect.manifest
            node.complete.setdefault(update, set())
            for chunk, entry in enumerate(effect.manifest.entries):
                node.blocks.setdefault((update, chunk), bytearray(entry.size))
        elif isinstance(effect, ev.StoreBlocks):
            stop = effect.offset + len(effect.data)
            node.blocks[effect.update, effect.chunk][effect.offset : stop] = effect.data
        elif isinstance(effect, ev.StoreComplete):
            self._completed(node, effect)
        elif isinstance(effect, ev.Drop):
            self.at(self.now, lambda: self.unlink(node.name, effect.peer))
        elif isinstance(effect, ev.CloseRound):
            if effect.round in node.closed:
                raise LocalProtocolError(f"{node.name} closed round {effect.round} twice")
            node.closed[effect.round], node.closed_at[effect.round] = effect, self.now
            self._on_closed(node, effect)
        elif isinstance(effect, ev.MissedRound):
            node.missed.append(effect.round)
            self._on_missed(node, effect.round)
        elif isinstance(effect, ev.Emit):
            node.events.append(effect.event)

    def _completed(self, node: Node, effect: ev.StoreComplete) -> None:
        entry = node.swarm.ledger[effect.update].manifest.entries[effect.chunk]
        data = node.read(effect.update, effect.chunk)
        if block_hashes(data, self.layout.block_size) != entry.blocks:
            raise LocalProtocolError(f"{node.name} kept a chunk {effect.chunk} unverified")
        node.complete.setdefault(effect.update, set()).add(effect.chunk)

    def _gossip(self, node: Node, effect: ev.PublishManifest | ev.PublishAvailability) -> None:
        if not self.gossip:
            return
        for other in self.nodes.values():
            if other is node:
                continue
            if isinstance(effect, ev.PublishManifest):
                stimulus: ev.Stimulus = ev.ManifestGossip(node.name, effect.data)
            elif (other.name, node.name) in self._streams:
                stimulus = ev.AvailabilityGossip(node.name, effect.data)
            else:
                continue
            arrives = self.now + 2 * self.links.latency(node.name, other.name)
            self._deliver(arrives, other, stimulus)

    def _question(self, fetcher: PeerId, holder: PeerId, message: Message) -> None:
        stream = self._streams.get((fetcher, holder))
        if stream is None:
            return
        if isinstance(message, Request):
            if message.number in stream.open_requests:
                raise LocalProtocolError(f"{fetcher} asked {message.number} twice")
            stream.open_requests.add(message.number)
        arrives = self.now + self.links.latency(fetcher, holder)
        stream.last_question = max(stream.last_question, arrives)
        stimulus = ev.FromFetcher(fetcher, over_the_wire(message))
        self._deliver(stream.last_question, self.nodes[holder], stimulus, stream)

    def _answer(
        self, holder: PeerId, fetcher: PeerId, message: Message, arrives: float | None = None
    ) -> None:
        stream = self._streams.get((fetcher, holder))
        if stream is None:
            return
        if isinstance(message, (Piece, Reject)):
            if message.number not in stream.open_requests:
                raise LocalProtocolError(f"{holder} answered {message.number} unasked, or twice")
            stream.open_requests.remove(message.number)
        if arrives is None:
            arrives = self.now + self.links.latency(holder, fetcher)
        stream.last_answer = max(stream.last_answer, arrives)
        stimulus = ev.FromHolder(holder, over_the_wire(message))
        self._deliver(stream.last_answer, self.nodes[fetcher], stimulus, stream)

    def _deliver(
        self, when: float, node: Node, stimulus: ev.Stimulus, stream: Stream | None = None
    ) -> None:
        def arrive() -> None:
            is_current = self.nodes.get(node.name) is node  # and not replaced by a restart
            if is_current and not node.killed and (stream is None or stream.is_open):
                if isinstance(stimulus, ev.FromHolder) and isinstance(stimulus.message, Piece):
                    node.payload_bytes += len(stimulus.message.data)
                self.feed(node.name, stimulus)

        self.at(when, arrive)

    # --- uploads -----------------------------------------------------------------------------

    def _pump(self, node: Node) -> None:
        """Let every writer that may send take its next answer."""
        for peer in node.swarm.serving.runnable(self.now):
            stream = self._streams.get((peer, node.name))
            upload = node.swarm.next_upload(peer, self.now) if stream is not None else None
            if isinstance(upload, Upload):
                data = bytes(node.blocks[upload.update, upload.chunk])
                data = data[upload.offset : upload.offset + upload.size]
                if node.corrupts:
                    data = bytes([data[0] ^ 1]) + data[1:]
                self._upload(node, upload, data)
            elif isinstance(upload, Reject):
                self._answer(node.name, peer, upload)
                self.at(self.now, lambda: self._pump(node))

    def _upload(self, node: Node, upload: Upload, data: bytes) -> None:
        stream = self._streams[upload.peer, node.name]
        free, arrives = self.links.carry(node.name, upload.peer, len(data), self.now)

        def sent() -> None:
            if node.killed or not stream.is_open:
                return
            node.swarm.serving.uploaded(upload.peer, upload.size, self.now)
            self._answer(node.name, upload.peer, Piece(upload.number, data), arrives)
            self._pump(node)

        self.at(free, sent)

    def unanswered(self) -> int:
        """Requests on open streams that have no answer."""
        return sum(len(stream.open_requests) for stream in self._streams.values())


def over_the_wire(message: Message) -> Message:
    """A message as it comes out at the other end of a stream."""
    head, payload = encode_message(message)
    frame = head + bytes(payload)
    kind, size = frame_body_bytes(frame[: FRAME_HEADER.size], MAX_CONTROL)
    if size != len(frame) - FRAME_HEADER.size:
        raise LocalProtocolError(f"a frame says {size} bytes and has {len(frame)}")
    return decode_body(kind, frame[FRAME_HEADER.size :])
