"""Swarm machines on links of a simulated world with virtual time: no sockets, no clock, no disk.

Every message goes through its wire form. Each edge carries two streams, as in a peer; a stream
delivers in order, after a delay and, for pieces, at a rate. Gossip reaches everybody, or is lost.
A world checks by itself that every request is answered exactly once.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.aggregation import Source, aggregate
from p2pfl_torrent.core.chunking import Layout, encode_chunk, plan
from p2pfl_torrent.core.genesis import Genesis, RoundTerms, Terms, TopologyTerms
from p2pfl_torrent.core.manifest import Manifest, UpdateId, block_hashes, make_manifest
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
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import PeerEvent
from p2pfl_torrent.core.serving import Upload
from p2pfl_torrent.core.swarm import Swarm, SwarmPolicy
from p2pfl_torrent.core.tensors import Array, ModelHasher, ModelSpec, TensorSpec
from tests.core.member_network import sign_as, verify

MODEL = ModelSpec((TensorSpec("a", "F32", (64, 8)), TensorSpec("b", "F32", (8,))))
TERMS = RoundTerms(
    total=10,
    client_num=2,
    min_members=2,
    join_timeout=60.0,
    train_timeout=100.0,
    exchange_timeout=30.0,
    quorum=0.5,
    min_completion_ratio=0.0,
    max_staleness=2,
    fill_max_age=2,
    max_num_samples=10_000,
)
MIN_TICK = 0.005  # as the driver's
MAX_CONTROL = 1 << 20

Counts = tuple[tuple[PeerId, int, float, tuple[int, ...], tuple[tuple[int, UpdateId], ...]], ...]
Event = TypeVar("Event")


@dataclass
class Node:
    """One peer: its machine, its disk, and what it told its user."""

    name: PeerId
    swarm: Swarm
    blocks: dict[tuple[UpdateId, int], bytearray] = field(default_factory=dict)
    events: list[PeerEvent] = field(default_factory=list)
    effects: list[ev.Effect] = field(default_factory=list)
    closed: dict[int, ev.CloseRound] = field(default_factory=dict)
    closed_at: dict[int, float] = field(default_factory=dict)
    missed: list[int] = field(default_factory=list)
    updates: dict[int, UpdateId] = field(default_factory=dict)
    killed: bool = False
    tick_at: float = -1.0
    corrupts: bool = False

    def counts(self, round: int) -> Counts:
        """What went into this peer's aggregate of a round, comparable with another peer's."""
        return tuple(
            (c.manifest.owner, c.manifest.round, c.weight, c.chunks, tuple(sorted(c.fills.items())))
            for c in self.closed[round].counts
        )

    def told(self, kind: type[Event]) -> list[Event]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def sent(self, kind: type[Event]) -> list[Event]:
        """The effects of one kind."""
        return [effect for effect in self.effects if isinstance(effect, kind)]


@dataclass
class _Stream:
    """One stream: ``fetcher`` opened it and asks, ``holder`` answers."""

    fetcher: PeerId
    holder: PeerId
    open_requests: set[int] = field(default_factory=set)
    last_question: float = 0.0
    last_answer: float = 0.0
    is_open: bool = True


class World:
    """Peers, links and the time."""

    def __init__(
        self,
        names: str | Sequence[str],
        *,
        edges: Iterable[str] | None = None,
        terms: RoundTerms = TERMS,
        model: ModelSpec = MODEL,
        chunks: int = 8,
        block_size: int = 128,
        latency: float = 0.01,
        rate: float = 1e6,
        gossip: bool = True,
        policy: SwarmPolicy | None = None,
        seed: int = 0,
    ) -> None:
        self.now = 0.0
        self.layout: Layout = plan(model, num_chunks=chunks, block_size=block_size)
        self.genesis = _genesis(terms, self.layout)
        self.latency = latency
        self.rate = rate
        self.gossip = gossip
        self.rng = random.Random(seed)
        self.nodes: dict[PeerId, Node] = {}
        self._policy = policy if policy is not None else SwarmPolicy()
        self._streams: dict[tuple[PeerId, PeerId], _Stream] = {}
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.fed = 0
        for name in names:
            self.add(name)
        pairs = edges if edges is not None else map("".join, itertools.combinations(names, 2))
        for pair in pairs:
            self.link(pair[0], pair[1])
        self.members(names)

    # --- building ----------------------------------------------------------------------------

    def add(self, name: str) -> Node:
        """A peer, not linked to anybody."""
        peer = PeerId(name)
        swarm = Swarm(
            local=peer,
            genesis=self.genesis,
            layout=self.layout,
            policy=self._policy,
            verify=verify,
            rng=random.Random(f"{name}{self.rng.random()}"),
        )
        node = self.nodes[peer] = Node(peer, swarm)
        return node

    def __getitem__(self, name: str) -> Node:
        return self.nodes[PeerId(name)]

    def link(self, a: str, b: str) -> None:
        """Open both streams of an edge; new ones replace what was open."""
        for fetcher, holder in ((a, b), (b, a)):
            replaced = self._streams.get((PeerId(fetcher), PeerId(holder)))
            if replaced is not None:
                replaced.is_open = False
            self._streams[PeerId(fetcher), PeerId(holder)] = _Stream(
                PeerId(fetcher), PeerId(holder), set(), self.now, self.now
            )
        for x, y in ((a, b), (b, a)):
            self.feed(x, ev.HolderOpened(PeerId(y)))
            self.feed(x, ev.FetcherOpened(PeerId(y)))

    def unlink(self, a: str, b: str) -> None:
        """Both streams of an edge break, without a farewell."""
        for x, y in ((PeerId(a), PeerId(b)), (PeerId(b), PeerId(a))):
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

    def kill(self, name: str) -> None:
        """A peer is gone; its neighbours notice that its streams broke."""
        self[name].killed = True
        for a, b in list(self._streams):
            if name in (a, b) and (a, b) in self._streams:
                self.unlink(a, b)

    def members(self, live: Iterable[str], dead: Iterable[str] = (), joined: int = 1) -> None:
        """Everybody's membership view, from now on."""
        now = ev.MembersNow(
            {PeerId(name): joined for name in live}, frozenset(PeerId(name) for name in dead)
        )
        for node in list(self.nodes.values()):
            if not node.killed:
                self.feed(node.name, now)

    # --- rounds ------------------------------------------------------------------------------

    def begin(self, round: int, names: Iterable[str] | None = None, **about: bool) -> None:
        """Peers begin to train for a round."""
        for name in names if names is not None else list(self.nodes):
            if not self[name].killed:
                self.feed(name, ev.RoundBegun(round, (), **about))

    def update(self, name: str, round: int, *, samples: int = 10, salt: str = "") -> Manifest:
        """A peer's trained, stored and signed update; the same for the same arguments."""
        arrays = weights(self.layout.spec, f"{name}/{round}/{salt}")
        files = [encode_chunk(self.layout, k, arrays) for k in range(len(self.layout.chunks))]
        ranks = list(range(len(files)))
        random.Random(f"{name}{round}").shuffle(ranks)
        manifest = make_manifest(
            layout=self.layout,
            swarm=self.genesis.swarm_id,
            round=round,
            owner=PeerId(name),
            base_hash=hashlib.sha256(f"base {round}".encode()).digest(),
            num_samples=samples,
            sizes=[len(data) for data in files],
            ranks=ranks,
            blocks=[block_hashes(data, self.layout.block_size) for data in files],
            sign=sign_as(name),
        )
        for chunk, data in enumerate(files):
            self[name].blocks[manifest.update, chunk] = bytearray(data)
        return manifest

    def publish(self, name: str, round: int = 1, *, samples: int = 10) -> None:
        """A peer has trained: its exchange begins."""
        manifest = self.update(name, round, samples=samples)
        self[name].updates[round] = manifest.update
        self.feed(name, ev.UpdateReady(manifest))

    def play(self, round: int = 1, names: Iterable[str] | None = None) -> None:
        """A whole round: everybody begins, publishes and closes."""
        playing = list(names) if names is not None else list(self.nodes)
        self.begin(round, playing)
        for name in playing:
            self.publish(name, round)
        self.run_until(lambda: all(round in self[name].closed for name in playing))

    def aggregate(self, name: str, round: int) -> bytes:
        """Hash of what a peer's averaging makes of a round."""
        node = self[name]
        sources: dict[int, list[Source]] = {}
        for count in node.closed[round].counts:
            chunks = dict.fromkeys(count.chunks, count.manifest.update)
            for chunk, update in {**chunks, **count.fills}.items():
                source = (count.manifest.owner, update, count.weight)
                sources.setdefault(chunk, []).append(source)
        start = weights(self.layout.spec, f"start {round}")
        merged = ModelHasher(self.layout.spec)
        aggregate(
            self.layout,
            sources,
            lambda u, k: bytes(node.blocks[u, k]),
            start,
            lambda part, rows: merged.add(rows),
        )
        return merged.digest()

    # --- time --------------------------------------------------------------------------------

    def feed(self, name: str, stimulus: ev.Stimulus) -> list[ev.Effect]:
        """Tell a machine something, and do what it answers."""
        node = self[name]
        effects = node.swarm.handle(stimulus, self.now)
        if self.fed % 5 == 0:  # it looks at everything: not after each of thousands of events
            node.swarm.picker.validate()
        self.fed += 1
        node.effects.extend(effects)
        for effect in effects:
            self._apply(node, effect)
        self._pump(node)
        self._rearm(node)
        return effects

    def tell(self, name: str, effect: ev.Effect) -> None:
        """Let a peer do what its machine did not ask for."""
        self._apply(self[name], effect)

    def run_until(self, condition: Callable[[], bool], limit: float = 300.0) -> None:
        """Let time pass until a condition holds; it must within ``limit`` seconds."""
        end = self.now + limit
        while not condition():
            assert self._queue, f"nothing more will happen at {self.now:.3f} s"
            assert self._queue[0][0] <= end, f"still not so after {limit} s"
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

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._order), action))

    def _rearm(self, node: Node) -> None:
        due = max(self.now + MIN_TICK, node.swarm.next_wakeup(self.now))
        if node.tick_at <= self.now or due < node.tick_at:
            node.tick_at = due
            self._at(due, lambda: self._tick(node, due))

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
            for chunk, entry in enumerate(effect.manifest.entries):
                key = effect.manifest.update, chunk
                node.blocks.setdefault(key, bytearray(entry.size))
        elif isinstance(effect, ev.StoreBlocks):
            stop = effect.offset + len(effect.data)
            node.blocks[effect.update, effect.chunk][effect.offset : stop] = effect.data
        elif isinstance(effect, ev.StoreComplete):
            self._check_chunk(node, effect)
        elif isinstance(effect, ev.Drop):
            self._at(self.now, lambda: self.unlink(node.name, effect.peer))
        elif isinstance(effect, ev.CloseRound):
            assert effect.round not in node.closed
            node.closed[effect.round], node.closed_at[effect.round] = effect, self.now
        elif isinstance(effect, ev.MissedRound):
            node.missed.append(effect.round)
        elif isinstance(effect, ev.Emit):
            node.events.append(effect.event)

    def _check_chunk(self, node: Node, effect: ev.StoreComplete) -> None:
        entry = node.swarm.ledger[effect.update].manifest.entries[effect.chunk]
        data = bytes(node.blocks[effect.update, effect.chunk])
        assert block_hashes(data, self.layout.block_size) == entry.blocks

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
            self._deliver(self.now + 2 * self.latency, other, stimulus)

    def _question(self, fetcher: PeerId, holder: PeerId, message: Message) -> None:
        stream = self._streams.get((fetcher, holder))
        if stream is None:
            return
        if isinstance(message, Request):
            assert message.number not in stream.open_requests
            stream.open_requests.add(message.number)
        stream.last_question = max(stream.last_question, self.now + self.latency)
        arrives = ev.FromFetcher(fetcher, over_the_wire(message))
        self._deliver(stream.last_question, self.nodes[holder], arrives, stream)

    def _answer(
        self, holder: PeerId, fetcher: PeerId, message: Message, sent: float | None = None
    ) -> None:
        stream = self._streams.get((fetcher, holder))
        if stream is None:
            return
        if isinstance(message, (Piece, Reject)):
            assert message.number in stream.open_requests, "answered twice, or never asked"
            stream.open_requests.remove(message.number)
        sent = self.now if sent is None else sent
        stream.last_answer = max(stream.last_answer, sent + self.latency)
        arrives = ev.FromHolder(holder, over_the_wire(message))
        self._deliver(stream.last_answer, self.nodes[fetcher], arrives, stream)

    def _deliver(
        self, when: float, node: Node, stimulus: ev.Stimulus, stream: _Stream | None = None
    ) -> None:
        def arrive() -> None:
            if not node.killed and (stream is None or stream.is_open):
                self.feed(node.name, stimulus)

        self._at(when, arrive)

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
                self._at(self.now, lambda: self._pump(node))

    def _upload(self, node: Node, upload: Upload, data: bytes) -> None:
        stream = self._streams[upload.peer, node.name]

        def sent() -> None:
            if node.killed or not stream.is_open:
                return
            node.swarm.serving.uploaded(upload.peer, upload.size, self.now)
            self._answer(node.name, upload.peer, Piece(upload.number, data))
            self._pump(node)

        self._at(self.now + len(data) / self.rate, sent)

    # --- looking -----------------------------------------------------------------------------

    def picture(self, owner: str, round: int = 1) -> dict[str, str]:
        """What each living peer holds of an owner's update: "#" a chunk, "." none."""
        update = self[owner].updates[round]
        return {
            node.name: _line(node.swarm, update) for node in self.nodes.values() if not node.killed
        }

    def unanswered(self) -> int:
        """Requests on open streams that have no answer."""
        return sum(len(stream.open_requests) for stream in self._streams.values())


def _line(swarm: Swarm, update: UpdateId) -> str:
    known = swarm.ledger.get(update)
    if known is None:
        return "?"
    return "".join("#" if chunk in known.held else "." for chunk in range(len(known.held)))


def exchanging(**about: Any) -> World:
    """Two linked peers that have just published, on links that carry no piece in a lifetime."""
    world = World("ab", **{"rate": 1e-3, **about})
    world.begin(1)
    for name in "ab":
        world.publish(name)
    return world


def weights(spec: ModelSpec, seed: str) -> dict[str, Array]:
    """Values of a model, the same for the same seed."""
    digest = hashlib.sha256(seed.encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in spec.tensors}


def over_the_wire(message: Message) -> Message:
    """A message as it comes out at the other end of a stream."""
    head, payload = encode_message(message)
    frame = head + bytes(payload)
    kind, size = frame_body_bytes(frame[: FRAME_HEADER.size], MAX_CONTROL)
    assert size == len(frame) - FRAME_HEADER.size
    return decode_body(kind, frame[FRAME_HEADER.size :])


def terms(**changes: float) -> RoundTerms:
    """The world's usual terms, but for these."""
    return msgspec.structs.replace(TERMS, **changes)


def _genesis(round_terms: RoundTerms, layout: Layout) -> Genesis:
    topology = TopologyTerms("full", 3, 2, (), ())
    agreed = Terms(
        name="world",
        mode="swarm",
        aggregator="fedavg",
        seed=0,
        model=layout.spec.fingerprint(),
        layout=layout.digest,
        topology=topology,
        rounds=round_terms,
    )
    return Genesis(terms=agreed, run_id="run", creator="a", initial_hash="00" * 32)
