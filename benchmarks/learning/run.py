"""One run of an experiment: a federation on virtual time under one condition, with one seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.learning.learner import TaskLearner
from benchmarks.learning.tasks import TASKS, Task
from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.chunking import Layout
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


@dataclass(frozen=True, slots=True)
class Condition:
    """What a run is made under.

    Attributes:
        scheme: how the data is cut among the peers.
        order: how each owner ranks its chunks.
        ages: whether ranks are multiplied by the rounds since a chunk was last merged.
        selection: of the picker, as in the configuration.
        fraction: of the bytes of the others' updates that the deadline lets through; 1 for all.
        fill_max_age: rounds for which an owner's last chunk stands in for a missing one.
        killed: share of the peers killed at random in each round's window, and started again.
        attackers: share of the peers whose updates are flipped and five times as large.
    """

    task: str = "mnist"
    scheme: str = "dirichlet(0.3)"
    peers: int = 10
    rounds: int = 20
    order: str = "change"
    ages: bool = True
    selection: str = "importance"
    fraction: float = 1.0
    fill_max_age: int = 5
    killed: float = 0.0
    attackers: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """What a run came to; lists have an entry per round, means over the peers.

    Attributes:
        accuracy: of the merged models on the test set.
        seconds: virtual, since the start, when half of the peers had merged.
        models: different models among the peers.
        payload_bytes: received by a peer in the whole run.
    """

    condition: Condition
    seed: int
    accuracy: list[float]
    seconds: list[float]
    completeness: list[float]
    models: list[int]
    payload_bytes: float

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def flipped(start: Arrays, trained: Arrays) -> Arrays:
    """The update's step backwards, five times as far."""
    return {
        name: np.subtract(start[name], 5.0 * np.subtract(array, start[name])).astype(array.dtype)
        for name, array in trained.items()
    }


def run(condition: Condition, seed: int) -> Row:
    """One federation from beginning to end."""
    task = TASKS[condition.task](condition.peers, seed, condition.scheme)
    model = task.build(seed)
    layout = task.layout(model)
    start = task.start(model)
    peers = [PeerId(f"peer-{place}") for place in range(condition.peers)]
    lying = round(condition.attackers * condition.peers)
    learners = {
        peer: TaskLearner(
            task,
            model,
            place,
            condition.peers,
            order=condition.order,
            seed=seed,
            seconds=TRAINING,
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
    return watch.row(condition, seed, federation.outcomes, payload)


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

    def row(self, condition: Condition, seed: int, outcomes: list[Outcome], payload: float) -> Row:
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
    others = (condition.peers - 1) * sum(chunk.max_file_bytes for chunk in layout.chunks)
    payload = (condition.peers - 1) * sum(chunk.payload_bytes for chunk in layout.chunks)
    share = condition.fraction if condition.fraction < 1.0 else ROOM * others / payload
    rate = share * payload / WINDOW
    policy = SwarmPolicy(picker=PickerPolicy(selection=condition.selection, ages=condition.ages))
    return World(
        genesis=_genesis(condition, layout, start),
        layout=layout,
        links=SharedLinks({peer: Link(2.0 * rate, rate) for peer in peers}),
        policy=policy,
        seed=seed,
        on_closed=closed,
        on_missed=missed,
    )


def _genesis(condition: Condition, layout: Layout, start: Arrays) -> Genesis:
    terms = RoundTerms(
        total=condition.rounds,
        client_num=condition.peers,
        min_members=2,
        join_timeout=60.0,
        train_timeout=10.0 * TRAINING,
        exchange_timeout=WINDOW,
        quorum=0.5,
        min_completion_ratio=0.0,
        max_staleness=2,
        fill_max_age=condition.fill_max_age,
        max_num_samples=1 << 20,
    )
    agreed = Terms(
        name="learning",
        mode="swarm",
        aggregator="fedavg",
        seed=0,
        model=layout.spec.fingerprint(),
        layout=layout.digest,
        topology=TopologyTerms("full", 3, 2, (), ()),
        rounds=terms,
    )
    initial = model_hash(layout.spec, start).hex()
    return Genesis(terms=agreed, run_id="learning", creator="peer-0", initial_hash=initial)
