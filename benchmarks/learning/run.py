"""One run of an experiment: a federation on virtual time under one condition, with one seed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, cast

import numpy as np

from benchmarks.learning.learner import TaskLearner
from benchmarks.learning.tasks import TASKS, Task
from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.aggregators import AggregationTerms
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.compression import Codec, Compression
from p2pfl_torrent.core.genesis import Genesis, RoundTerms, Terms, TopologyTerms
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.picker import PickerPolicy
from p2pfl_torrent.core.swarm import SwarmPolicy
from p2pfl_torrent.core.tensors import Arrays, model_hash
from p2pfl_torrent.simulation import Federation, Link, Node, Outcome, SharedLinks, World

WINDOW = 60.0  # virtual seconds of an exchange
TRAINING = 10.0
ROOM = 3.0  # of a link's rate, where the deadline is not to cut anything short
STRUCK_WITHIN = WINDOW / ROOM  # of a round's exchange, which takes about as long
DOWN = 30.0  # virtual seconds that a killed peer is away
PATIENT = 100.0  # windows that last as many times as long: all is waited for
WORSE = 5.0  # times, what an attacker sends backwards


@dataclass(frozen=True, slots=True)
class Condition:
    """What a run is made under; what is not said is the product's default or nothing special.

    Attributes:
        scheme: how the data is cut among the peers.
        order: how each owner ranks its chunks, see ``TaskLearner``.
        ages: whether ranks are multiplied by the rounds since a chunk was last merged.
        selection: of the picker, as in the configuration.
        fraction: of the bytes of the others' updates that the deadline lets through; 1 for all.
        fill, fill_decay, fill_max_age: what stands in for a chunk that did not come.
        aggregator: by its name in the configuration.
        chunks: that the model is cut into.
        killed: share of the peers killed at random in each round's exchange, and started again.
        attackers: share of the peers whose updates go backwards and five times as far.
        compression: codec of the chunks, with ``delta`` relative to the round's start.
        mode, fragment_share, topology: as in the configuration.
        slow: share of the peers whose links are ``slower`` times slower.
        lagging: share of the peers that train ``slower`` times as long.
        patient: whether the deadline waits for all.
        overlap: whether a round is exchanged while the next one is trained.
    """

    task: str = "mnist"
    scheme: str = "dirichlet(0.3)"
    peers: int = 10
    rounds: int = 20
    order: str = "change"
    ages: bool = True
    selection: str = "rarest_first"
    fraction: float = 1.0
    fill: str = "last"
    fill_decay: float = 1.0
    fill_max_age: int = 5
    chunks: int = 20
    aggregator: str = "fedavg"
    killed: float = 0.0
    attackers: float = 0.0
    compression: str = "none"
    delta: bool = False
    topk_share: float = 1.0
    mode: str = "swarm"
    fragment_share: float = 1.0
    topology: str = "full"
    slow: float = 0.0
    lagging: float = 0.0
    slower: float = 10.0
    patient: bool = False
    overlap: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """What a run came to; lists have an entry per round, means over the peers.

    Attributes:
        accuracy: of the merged models on the test set; of honest peers alone.
        seconds: virtual, since the start, when half of the peers had merged.
        models: different models among the peers.
        payload_bytes: received by a peer in the whole run.
        cpu_seconds: of this process, evaluation included.
    """

    condition: Condition
    seed: int
    accuracy: list[float]
    seconds: list[float]
    completeness: list[float]
    models: list[int]
    payload_bytes: float
    cpu_seconds: float

    def as_json(self) -> dict[str, Any]:
        """For a file: of the condition what is not as usual."""
        usual = Condition()
        changed = {
            name: value
            for name, value in asdict(self.condition).items()
            if value != getattr(usual, name)
        }
        return {**asdict(self), "condition": changed}


def flipped(start: Arrays, trained: Arrays) -> Arrays:
    """The update's step backwards, five times as far."""
    return {
        name: np.subtract(start[name], WORSE * np.subtract(array, start[name])).astype(array.dtype)
        for name, array in trained.items()
    }


def run(condition: Condition, seed: int) -> Row:
    """One federation from beginning to end."""
    began = time.process_time()
    task = TASKS[condition.task](condition.peers, seed, condition.scheme)
    model = task.build(seed)
    layout = replace(task.layout(model, condition.chunks), compression=_compression(condition))
    start = task.start(model)
    peers = [PeerId(f"peer-{place}") for place in range(condition.peers)]
    lying = round(condition.attackers * condition.peers)
    lagging = round(condition.lagging * condition.peers)
    learners = {
        peer: TaskLearner(
            task,
            model,
            layout,
            place,
            condition.peers,
            order=condition.order,
            seed=seed,
            seconds=TRAINING * (condition.slower if place < lagging else 1.0),
            distort=flipped if place < lying else None,
        )
        for place, peer in enumerate(peers)
    }
    watch = Watch(task, task.build(seed), layout)
    churn = Churn(condition.killed, random.Random(seed))
    federation = churn.federation = Federation(
        lambda closed, missed: _world(condition, layout, start, peers, seed, closed, missed),
        learners,
        start,
        told=watch,
        published=churn,
    )
    federation.run()
    payload = fmean(node.payload_bytes for node in federation.world.nodes.values())
    honest = [outcome for outcome in federation.outcomes if outcome.peer in peers[lying:]]
    return watch.row(condition, seed, honest, payload, time.process_time() - began)


class Watch:
    """Scores each model that a round left, each once."""

    def __init__(self, task: Task, model: Any, layout: Layout) -> None:
        self._task = task
        self._model = model
        self._layout = layout
        self._known: dict[bytes, float] = {}

    def __call__(self, outcome: Outcome, arrays: Arrays) -> None:
        if outcome.model_hash not in self._known:
            self._known[outcome.model_hash] = self._task.accuracy(self._model, arrays)

    def row(
        self,
        condition: Condition,
        seed: int,
        outcomes: list[Outcome],
        payload: float,
        cpu_seconds: float,
    ) -> Row:
        """The run's figures."""
        rounds = [
            [outcome for outcome in outcomes if outcome.round == number]
            for number in range(1, condition.rounds + 1)
        ]
        return Row(
            condition=condition,
            seed=seed,
            accuracy=[fmean(self._known[o.model_hash] for o in each) for each in rounds],
            seconds=[sorted(o.at for o in each)[len(each) // 2] for each in rounds],
            completeness=[
                fmean([o.completeness for o in each if not o.taken_over] or [0.0])
                for each in rounds
            ],
            models=[len({o.model_hash for o in each}) for each in rounds],
            payload_bytes=payload,
            cpu_seconds=cpu_seconds,
        )


class Churn:
    """Kills a share of the peers at random in each round's exchange, and starts them again."""

    def __init__(self, share: float, rng: random.Random) -> None:
        self._share = share
        self._rng = rng
        self._struck = 0
        self.federation: Federation | None = None

    def __call__(self, peer: PeerId, round: int) -> None:
        """An update is published: the first one of a round begins its exchange."""
        assert self.federation is not None
        if self._share and round > self._struck:
            self._struck = round
            world = self.federation.world
            world.at(world.now + self._rng.uniform(0.0, 1.0) * STRUCK_WITHIN, self._strike)

    def _strike(self) -> None:
        federation = self.federation
        assert federation is not None
        world, peers = federation.world, sorted(federation.learners)
        for peer in self._rng.sample(peers, round(self._share * len(peers))):
            if not world.nodes[peer].killed:
                federation.kill(peer)
                world.at(world.now + DOWN, partial(federation.restart, peer))


def _world(
    condition: Condition,
    layout: Layout,
    start: Arrays,
    peers: list[PeerId],
    seed: int,
    closed: Callable[[Node, ev.CloseRound], object],
    missed: Callable[[Node, int], object],
) -> World:
    plain = (condition.peers - 1) * layout.spec.nbytes  # so that codecs meet the same links
    rate = (condition.fraction if condition.fraction < 1.0 else ROOM) * plain / WINDOW
    slow = round(condition.slow * condition.peers)

    def link(place: int) -> Link:
        share = 1.0 / condition.slower if place < slow else 1.0
        return Link(2.0 * rate * share, rate * share)

    policy = SwarmPolicy(picker=PickerPolicy(selection=condition.selection, ages=condition.ages))
    return World(
        genesis=_genesis(condition, layout, start),
        layout=layout,
        links=SharedLinks({peer: link(place) for place, peer in enumerate(peers)}),
        policy=policy,
        seed=seed,
        on_closed=closed,
        on_missed=missed,
    )


def _compression(condition: Condition) -> Compression:
    codec = cast("Codec", condition.compression)
    return Compression(codec, condition.delta, condition.topk_share)


def _genesis(condition: Condition, layout: Layout, start: Arrays) -> Genesis:
    terms = RoundTerms(
        total=condition.rounds,
        client_num=condition.peers,
        min_members=2,
        join_timeout=60.0,
        train_timeout=PATIENT * TRAINING,
        exchange_timeout=WINDOW * (PATIENT if condition.patient else 1.0),
        quorum=1.0 if condition.patient else 0.5,
        min_completion_ratio=0.0,
        max_staleness=2,
        fill_max_age=condition.fill_max_age,
        max_num_samples=1 << 20,
        fill=condition.fill,
        fill_decay=condition.fill_decay,
    )
    byzantine = max(1, round(condition.attackers * condition.peers))
    agreed = Terms(
        name="learning",
        mode=condition.mode,
        aggregator=condition.aggregator,
        seed=0,
        model=layout.spec.fingerprint(),
        layout=layout.digest,
        topology=TopologyTerms(condition.topology, 3, 2, (), ()),
        rounds=terms,
        compression=layout.compression.name,
        aggregation=AggregationTerms(byzantine=byzantine),
        fragment_share=condition.fragment_share,
        overlap=condition.overlap,
    )
    initial = model_hash(layout.spec, start).hex()
    return Genesis(terms=agreed, run_id="learning", creator="peer-0", initial_hash=initial)
