"""A whole federation on virtual time: peers train, exchange by their real machines, and average.

What is real: the swarm machine with its picker, closing rule and wire forms; chunks, manifests and
their hashes; the average. What is modelled: links, gossip, the time that training takes. Membership
is told to everybody at once, and who missed a round takes the next one's weights from the first
peer that has them. What an update began from can be had by everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.aggregation import aggregate
from p2pfl_torrent.core.aggregators import make_aggregator
from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.chunking import Layout, TensorSlice, slice_of
from p2pfl_torrent.core.contributions import contributions, recycled
from p2pfl_torrent.core.encoding import decode_file, encode_file
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.manifest import UpdateId, block_hashes, make_manifest
from p2pfl_torrent.core.overlap import carry_over
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import Array, Arrays, model_hash
from p2pfl_torrent.core.topology import neighbours, overlay_seed
from p2pfl_torrent.simulation.node import Node
from p2pfl_torrent.simulation.world import World, sign_as

NOTICED = 5.0  # seconds until everybody knows that a peer has died, or is back
KEEP_ROUNDS = 2  # rounds whose updates are served to others, as storage.keep_rounds has it

LastDelivered = Callable[[int], Sequence[Array]]
"""Chunk index -> the arrays of its slices as the others last received them from this peer."""


class Learner(Protocol):
    """What one peer does between two exchanges."""

    def train(self, round: int, start: Arrays) -> tuple[Arrays, int]:
        """(trained weights, number of samples behind them)."""
        ...

    def ranks(self, layout: Layout, trained: Arrays, last: LastDelivered) -> list[int]:
        """Importance of each chunk, 0 for the least: a permutation."""
        ...

    def training_seconds(self, round: int) -> float:
        """How long ``train`` takes, in virtual time."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one round ended at one peer.

    Attributes:
        at: virtual seconds since the start.
        completeness: verified over announced bytes, own update excluded; 1 where nothing was
            announced.
        payload_bytes: of pieces received since the peer's start, what came twice included.
        model_hash: of the aggregate, or of what was taken over.
        taken_over: the round was missed, and the weights are another peer's.
    """

    peer: PeerId
    round: int
    at: float
    completeness: float
    payload_bytes: int
    model_hash: bytes
    taken_over: bool


@dataclass(slots=True)
class _Ahead:
    """Training of the next round while one is exchanged.

    Attributes:
        round: the one that is exchanged.
        start: what was published for it, from which training goes on.
        done: the next round's training is over.
    """

    round: int
    start: Arrays
    done: bool = False


class Federation:
    """Peers that learn together in a world.

    With ``Terms.overlap`` a round is trained while the one before is exchanged, and every float
    tensor is taken for a parameter.

    Args:
        make_world: given the handlers for a closed and for a missed round.
        start: weights that all begin with.
        told: called when a peer has the weights of its next round.
        published: called when a peer's update of a round is signed, before others hear of it.
    """

    def __init__(
        self,
        make_world: Callable[
            [Callable[[Node, ev.CloseRound], object], Callable[[Node, int], object]], World
        ],
        learners: Mapping[PeerId, Learner],
        start: Arrays,
        told: Callable[[Outcome, Arrays], object] = lambda outcome, arrays: None,
        published: Callable[[PeerId, int], object] = lambda peer, round: None,
    ) -> None:
        self.world = make_world(self._closed, self._missed)
        self.learners = dict(learners)
        self.rounds: dict[PeerId, int] = {}
        self.outcomes: list[Outcome] = []
        self._told = told
        self._published = published
        agreed = self.world.genesis.terms
        self._aggregator = make_aggregator(agreed.aggregator, agreed.aggregation)
        if self._aggregator.has_controls:
            raise ConfigError(
                f"federate.aggregator is {agreed.aggregator}, whose control variates learners here "
                "do not make: use real peers, or another aggregator."
            )
        spec = self.world.layout.spec
        self._state_spec = self._aggregator.state_spec(spec)
        first = self._aggregator.first_state(spec, start)
        self._states: dict[PeerId, Arrays] = dict.fromkeys(self.learners, first)
        self._terms = agreed.rounds
        self._delivered: dict[PeerId, dict[int, list[Array]]] = {}
        self._unsent: dict[PeerId, Arrays] = {}
        self._starts: dict[bytes, Arrays] = {}
        self._overlaps = agreed.overlap
        self._ahead: dict[PeerId, _Ahead] = {}
        self._waiting: dict[PeerId, int] = {}  # who missed a round, and waits for the next one's
        self._edges: set[frozenset[PeerId]] = set()
        self._drawn_for = 1
        for peer in self.learners:
            self.world.add(peer)
        self._draw_overlay()

    @property
    def models(self) -> dict[PeerId, Arrays]:
        """Each peer's merged weights, without what an aggregator keeps besides."""
        return {peer: self._weights(state) for peer, state in self._states.items()}

    def _weights(self, state: Arrays) -> Arrays:
        return {tensor.name: state[tensor.name] for tensor in self.world.layout.spec.tensors}

    # --- the run -----------------------------------------------------------------------------

    def run(self, limit: float = 1e6) -> None:
        """All rounds, until every living peer is through or ``limit`` virtual seconds passed."""
        self.world.members(self.learners)
        for peer in self.learners:
            self._begin(peer, 1, caught_up=False)
        self.world.run_until(self._is_over, limit)

    def _is_over(self) -> bool:
        return all(
            self.rounds[peer] > self._terms.total
            for peer, node in self.world.nodes.items()
            if not node.killed
        )

    def _begin(self, peer: PeerId, round: int, *, caught_up: bool) -> None:
        node = self.world.nodes[peer]
        self.rounds[peer] = round
        if round > self._drawn_for:
            self._drawn_for = round
            self._draw_overlay()
        forgotten = node.prune(
            round, max(KEEP_ROUNDS, self._terms.max_staleness), self._terms.fill_max_age
        )
        self.world.feed(peer, ev.RoundBegun(round, forgotten, caught_up))
        ahead = self._ahead.get(peer)
        if round <= self._terms.total and (ahead is None or ahead.done):
            training = 0.0 if ahead is not None else self.learners[peer].training_seconds(round)
            self.world.at(self.world.now + training, lambda: self._publish(node, round))

    def _train_ahead(self, node: Node, round: int, published: Arrays) -> None:
        """Go on training while a round is exchanged; the last one is waited for."""
        self._ahead.pop(node.name, None)
        if not self._overlaps or round >= self._terms.total:
            return
        ahead = self._ahead[node.name] = _Ahead(round, published)
        training = self.learners[node.name].training_seconds(round + 1)
        self.world.at(self.world.now + training, lambda: self._trained_ahead(node, ahead))

    def _trained_ahead(self, node: Node, ahead: _Ahead) -> None:
        if self._ahead.get(node.name) is ahead and self.world.nodes[node.name] is node:
            ahead.done = True
            reached = self.rounds[node.name]
            if ahead.round < reached <= self._terms.total:
                self._publish(node, reached)

    def _publish(self, node: Node, round: int) -> None:
        peer, layout = node.name, self.world.layout
        if node.killed or self.world.nodes[peer] is not node or self.rounds[peer] != round:
            return
        learner, start = self.learners[peer], self._weights(self._states[peer])
        own = node.swarm.ledger.update_of(peer, round)
        if own is not None:  # published before it died: a second one would be equivocation
            if self._overlaps:
                self._train_ahead(node, round, learner.train(round, start)[0])
            self.world.feed(peer, ev.UpdateReady(own.manifest))
            return
        ahead = self._ahead.get(peer)
        trained, samples = learner.train(round, start if ahead is None else ahead.start)
        if ahead is not None:
            trained = carry_over(layout.spec, start, ahead.start, trained, start.keys())
        delivered = self._delivered.get(peer)

        def last(chunk: int) -> Sequence[Array]:
            if delivered is not None:
                return delivered[chunk]
            tensors = layout.spec.tensors
            return [
                slice_of(start[tensors[part.tensor].name], part)
                for part in layout.chunks[chunk].slices
            ]

        ranks = learner.ranks(layout, trained, last)
        base_hash = self._remember_start(self._states[peer])
        files = self._encoded(peer, trained, start)
        manifest = make_manifest(
            layout=layout,
            swarm=self.world.genesis.swarm_id,
            round=round,
            owner=peer,
            base_hash=base_hash,
            num_samples=samples,
            sizes=[len(data) for data in files],
            ranks=ranks,
            blocks=[block_hashes(data, layout.block_size) for data in files],
            sign=sign_as(peer),
        )
        node.keep(manifest, files)
        self._delivered[peer] = {
            chunk: decode_file(layout, chunk, data, start) for chunk, data in enumerate(files)
        }
        self._published(peer, round)
        self._train_ahead(node, round, trained)
        self.world.feed(peer, ev.UpdateReady(manifest))

    def _encoded(self, peer: PeerId, trained: Arrays, start: Arrays) -> list[bytes]:
        """Chunk files; what a lossy codec leaves out is kept for the peer's next update."""
        layout = self.world.layout
        left = {name: np.zeros_like(array) for name, array in trained.items()}

        def keep(part: TensorSlice, rows: Array) -> None:
            slice_of(left[layout.spec.tensors[part.tensor].name], part)[...] = rows

        unsent = self._unsent.get(peer) if layout.compression.keeps_unsent else None
        files = [
            b"".join(encode_file(layout, k, trained, start, unsent, keep))
            for k in range(len(layout.chunks))
        ]
        self._unsent[peer] = left
        return files

    def _remember_start(self, start: Arrays) -> bytes:
        """Keep what an update began from for as long as the update may be counted or fill."""
        digest = model_hash(self._state_spec, start)
        self._starts.pop(digest, None)
        self._starts[digest] = start
        rounds = max(self._terms.fill_max_age, self._terms.max_staleness) + 2
        while len(self._starts) > rounds * len(self.learners):
            del self._starts[next(iter(self._starts))]
        return digest

    # --- churn -------------------------------------------------------------------------------

    def kill(self, peer: PeerId) -> None:
        """A peer's process dies; its disk stays."""
        self.world.kill(peer)
        self._waiting.pop(peer, None)
        self._ahead.pop(peer, None)
        self.world.at(self.world.now + NOTICED, self._tell_members)

    def restart(self, peer: PeerId) -> None:
        """A peer comes back with its disk, at the start of the round in which it died."""
        old = self.world.nodes[peer]
        node = self.world.add(peer)
        node.closed, node.closed_at = old.closed, old.closed_at
        node.manifests, node.blocks, node.complete = old.manifests, old.blocks, old.complete
        size = len(self.world.layout.chunks)
        for manifest in node.manifests.values():
            held = Bitfield.of(size, node.complete[manifest.update])
            known = old.swarm.ledger.get(manifest.update)
            counted_in = known.counted_in if known is not None else None
            self.world.feed(peer, ev.Restored(manifest, held, {}, counted_in))
        self._edges = {edge for edge in self._edges if peer not in edge}
        self._tell_members()
        self._begin(peer, self.rounds[peer], caught_up=False)

    def _tell_members(self) -> None:
        nodes = self.world.nodes
        live = [peer for peer, node in nodes.items() if not node.killed]
        self.world.members(live, [peer for peer, node in nodes.items() if node.killed])
        self._draw_overlay()

    def _draw_overlay(self) -> None:
        """Open and close edges: those of the living, in the newest round that anybody is in."""
        agreed = self.world.genesis.terms
        live = [peer for peer, node in self.world.nodes.items() if not node.killed]
        seed = overlay_seed(agreed.seed, agreed.topology, self._drawn_for)
        overlay = neighbours(live, agreed.topology, seed)
        wanted = {frozenset((a, b)) for a, near in overlay.items() for b in near}
        for edge in sorted(map(sorted, wanted - self._edges)):
            self.world.link(PeerId(edge[0]), PeerId(edge[1]))
        for edge in sorted(map(sorted, self._edges - wanted)):
            self.world.unlink(PeerId(edge[0]), PeerId(edge[1]))
        self._edges = wanted

    # --- how a round ends --------------------------------------------------------------------

    def _closed(self, node: Node, close: ev.CloseRound) -> None:
        layout, start = self.world.layout, self._states[node.name]
        merged = {name: np.empty_like(array) for name, array in start.items()}

        def keep(part: TensorSlice, rows: Array) -> None:
            target = merged[self._state_spec.tensors[part.tensor].name]
            slice_of(target, part)[...] = rows

        def base_of(update: UpdateId) -> Arrays | None:
            return self._starts.get(node.manifests[update].header.base_hash)

        agreed = self.world.genesis.terms
        aggregate(
            layout,
            contributions(layout, close, agreed),
            node.read,
            start,
            keep,
            base_of,
            self._aggregator,
            recycled(close, agreed),
        )
        self._has(node, close.round, merged, close.completeness, taken_over=False)

    def _missed(self, node: Node, round: int) -> None:
        self._waiting[node.name] = round
        self._take_over()

    def _take_over(self) -> None:
        for peer, round in list(self._waiting.items()):
            ahead = [
                other
                for other, reached in self.rounds.items()
                if reached > round and not self.world.nodes[other].killed and other != peer
            ]
            if ahead:
                del self._waiting[peer]
                source = min(ahead, key=lambda other: (-self.rounds[other], other))
                node = self.world.nodes[peer]
                reached = self.rounds[source] - 1
                self._has(node, reached, self._states[source], 0.0, taken_over=True)

    def _has(
        self, node: Node, round: int, state: Arrays, completeness: float, *, taken_over: bool
    ) -> None:
        peer = node.name
        self._states[peer] = state
        outcome = Outcome(
            peer=peer,
            round=round,
            at=self.world.now,
            completeness=completeness,
            payload_bytes=node.payload_bytes,
            model_hash=model_hash(self._state_spec, state),
            taken_over=taken_over,
        )
        self.outcomes.append(outcome)
        self._told(outcome, self._weights(state))
        # Not at once: this runs while the machine's effects are being applied.
        self.world.at(self.world.now, lambda: self._go_on(node, round + 1, taken_over))

    def _go_on(self, node: Node, round: int, caught_up: bool) -> None:
        if not node.killed and self.world.nodes[node.name] is node:
            self._begin(node.name, round, caught_up=caught_up)
            self._take_over()
