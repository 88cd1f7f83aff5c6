"""A simulated world for tests: names of one letter, updates of noise, pictures of what is held."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np

from p2pfl_torrent import simulation
from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.aggregation import aggregate
from p2pfl_torrent.core.chunking import Layout, encode_chunk, plan
from p2pfl_torrent.core.contributions import contributions
from p2pfl_torrent.core.genesis import Genesis, RoundTerms, Terms, TopologyTerms
from p2pfl_torrent.core.manifest import Manifest, UpdateId, block_hashes, make_manifest
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.swarm import Swarm, SwarmPolicy
from p2pfl_torrent.core.tensors import Array, ModelHasher, ModelSpec, TensorSpec
from p2pfl_torrent.simulation.world import sign_as

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

Counts = tuple[tuple[PeerId, int, float, tuple[int, ...], tuple[tuple[int, ev.Fill], ...]], ...]
Event = TypeVar("Event")


@dataclass
class Node(simulation.Node):
    """One peer, and all that its machine answered."""

    effects: list[ev.Effect] = field(default_factory=list)
    updates: dict[int, UpdateId] = field(default_factory=dict)

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


class World(simulation.World):
    """Peers with short names, on equal links."""

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
        layout = plan(model, num_chunks=chunks, block_size=block_size)
        super().__init__(
            genesis=_genesis(terms, layout),
            layout=layout,
            links=simulation.EqualLinks(latency, rate),
            policy=policy,
            gossip=gossip,
            seed=seed,
        )
        for name in names:
            self.add(name)
        pairs = edges if edges is not None else map("".join, itertools.combinations(names, 2))
        for pair in pairs:
            self.link(pair[0], pair[1])
        self.members(names)

    # --- building ----------------------------------------------------------------------------

    def add(self, peer: str) -> Node:
        """A peer, not linked to anybody."""
        super().add(PeerId(peer))
        return self[peer]

    @property
    def peers(self) -> list[Node]:
        """All, the killed ones too."""
        return [self[name] for name in self.nodes]

    def _node(self, peer: PeerId, swarm: Swarm) -> Node:
        return Node(peer, swarm)

    def __getitem__(self, name: str) -> Node:
        node = self.nodes[PeerId(name)]
        assert isinstance(node, Node)
        return node

    def link(self, a: str, b: str) -> None:
        """Open both streams of an edge; new ones replace what was open."""
        super().link(PeerId(a), PeerId(b))

    def unlink(self, a: str, b: str) -> None:
        """Both streams of an edge break, without a farewell."""
        super().unlink(PeerId(a), PeerId(b))

    def kill(self, peer: str) -> None:
        """A peer is gone; its neighbours notice that its streams broke."""
        super().kill(PeerId(peer))

    def members(self, live: Iterable[str], dead: Iterable[str] = (), since: int = 1) -> None:
        """Everybody's membership view, from now on."""
        super().members(map(PeerId, live), map(PeerId, dead), since)

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
        self[name].keep(manifest, files)
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
        sources = contributions(self.layout, node.closed[round], self.genesis.terms)
        start = weights(self.layout.spec, f"start {round}")
        merged = ModelHasher(self.layout.spec)
        aggregate(
            self.layout,
            sources,
            node.read,
            start,
            lambda part, rows: merged.add(rows),
        )
        return merged.digest()

    # --- time --------------------------------------------------------------------------------

    def feed(self, peer: str, stimulus: ev.Stimulus) -> list[ev.Effect]:
        """Tell a machine something, and do what it answers."""
        return super().feed(PeerId(peer), stimulus)

    def _fed(self, node: simulation.Node, effects: list[ev.Effect]) -> None:
        if self.fed % 5 == 0:  # it looks at everything: not after each of thousands of events
            node.swarm.picker.validate()
        self[node.name].effects.extend(effects)

    def tell(self, name: str, effect: ev.Effect) -> None:
        """Let a peer do what its machine did not ask for."""
        self._apply(self[name], effect)

    # --- looking -----------------------------------------------------------------------------

    def picture(self, owner: str, round: int = 1) -> dict[str, str]:
        """What each living peer holds of an owner's update: "#" a chunk, "." none."""
        update = self[owner].updates[round]
        return {
            node.name: _line(node.swarm, update) for node in self.nodes.values() if not node.killed
        }


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
