"""Federations on virtual time: what the machines of many peers come to together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.chunking import Layout, plan
from p2pfl_torrent.core.compression import PLAIN, Compression
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.genesis import Genesis, RoundTerms, Terms, TopologyTerms
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.scope import Scope
from p2pfl_torrent.core.tensors import Arrays, ModelSpec, TensorSpec, model_hash
from p2pfl_torrent.core.topology import neighbours
from p2pfl_torrent.simulation import (
    Federation,
    Link,
    Node,
    Outcome,
    SharedLinks,
    World,
)
from p2pfl_torrent.simulation.federation import LastDelivered

MODEL = ModelSpec(tuple(TensorSpec(f"t{k}", "F32", (16, 16)) for k in range(6)))
BYTES = MODEL.nbytes


class Adder:
    """Adds its own number to every weight, so that the average can be told."""

    def __init__(self, number: float, seconds: float = 1.0) -> None:
        self.number = number
        self.seconds = seconds
        self.trained: list[int] = []
        self.starts: list[float] = []
        self.last: list[float] = []

    def train(self, round: int, start: Arrays) -> tuple[Arrays, int]:
        self.trained.append(round)
        self.starts.append(float(start["t0"][0, 0]))
        added = self.number
        return {name: np.add(array, added, dtype=np.float32) for name, array in start.items()}, 10

    def ranks(self, layout: Layout, trained: Arrays, last: LastDelivered) -> list[int]:
        self.last.append(float(last(0)[0].flat[0]))
        return list(range(len(layout.chunks)))

    def training_seconds(self, round: int) -> float:
        return self.seconds


def federation(
    names: str = "abcd",
    *,
    rounds: int = 3,
    window: float = 60.0,
    down: float = 1e6,
    seed: int = 0,
    seconds: float = 1.0,
    mode: str = "swarm",
    topology: str = "full",
    share: float = 1.0,
    compression: Compression = PLAIN,
    overlap: bool = False,
    aggregator: str = "fedavg",
    fill: str = "last",
    told: Callable[[Outcome, Arrays], object] = lambda outcome, arrays: None,
) -> Federation:
    layout = replace(plan(MODEL, num_chunks=6, block_size=1024), compression=compression)
    terms = RoundTerms(
        total=rounds,
        client_num=len(names),
        min_members=2,
        join_timeout=60.0,
        train_timeout=1000.0,
        exchange_timeout=window,
        quorum=0.5,
        min_completion_ratio=0.0,
        max_staleness=2,
        fill_max_age=3,
        max_num_samples=1000,
        fill=fill,
    )
    agreed = Terms(
        name="world",
        mode=mode,
        aggregator=aggregator,
        seed=0,
        model=layout.spec.fingerprint(),
        layout=layout.digest,
        topology=TopologyTerms(topology, 3, 2, (), ()),
        rounds=terms,
        fragment_share=share,
        compression=compression.name,
        overlap=overlap,
    )
    start: Arrays = {t.name: np.zeros(t.shape, np.float32) for t in MODEL.tensors}
    initial = model_hash(MODEL, start).hex()
    genesis = Genesis(terms=agreed, run_id="run", creator="a", initial_hash=initial)
    links = SharedLinks({PeerId(name): Link(1e6, down) for name in names})

    def world(
        closed: Callable[[Node, ev.CloseRound], object], missed: Callable[[Node, int], object]
    ) -> World:
        return World(
            genesis=genesis,
            layout=layout,
            links=links,
            seed=seed,
            on_closed=closed,
            on_missed=missed,
        )

    learners = {PeerId(name): Adder(float(k), seconds) for k, name in enumerate(names)}
    return Federation(world, learners, start, told=told)


def hashes(run: Federation) -> dict[int, set[bytes]]:
    found: dict[int, set[bytes]] = {}
    for outcome in run.outcomes:
        found.setdefault(outcome.round, set()).add(outcome.model_hash)
    return found


def test_all_end_with_the_mean_of_what_all_trained() -> None:
    run = federation("abcd", rounds=3)
    run.run()
    for model in run.models.values():
        for array in model.values():
            assert np.allclose(array, 3 * (0 + 1 + 2 + 3) / 4)
    assert {len(found) for found in hashes(run).values()} == {1}
    assert {outcome.completeness for outcome in run.outcomes} == {1.0}
    assert len(run.outcomes) == 4 * 3


def test_the_same_arguments_make_the_same_run_and_a_seed_another() -> None:
    def trace(seed: int) -> str:
        run = federation("abcd", rounds=3, window=8.0, down=BYTES / 8.0, seed=seed)
        run.run()
        return hashlib.sha256(repr(run.outcomes).encode()).hexdigest()

    assert trace(1) == trace(1)
    assert trace(1) != trace(2)


def test_a_deadline_cuts_rounds_short_at_what_the_links_carry() -> None:
    run = federation("abcd", rounds=4, window=10.0, down=0.4 * 3 * BYTES / 10.0)
    run.run()
    later = [outcome.completeness for outcome in run.outcomes if outcome.round > 1]
    assert 0.25 < float(np.mean(later)) < 0.45


def test_scores_see_what_was_last_delivered() -> None:
    run = federation("ab", rounds=2)
    run.run()
    b = run.learners[PeerId("b")]
    assert isinstance(b, Adder)
    assert b.last == [0.0, 1.0]  # the start; then its own update of round 1, not the aggregate


def test_who_dies_is_not_waited_for_and_comes_back_with_its_disk() -> None:
    run = federation("abcd", rounds=6, seconds=20.0)
    world = run.world
    world.at(30.0, lambda: run.kill(PeerId("d")))
    world.at(70.0, lambda: run.restart(PeerId("d")))
    run.run()
    assert set(run.rounds.values()) == {7}
    assert max(outcome.at for outcome in run.outcomes) < 6 * 20.0 + 60.0
    assert len({model_hash(MODEL, model) for model in run.models.values()}) == 1
    d = run.learners[PeerId("d")]
    assert isinstance(d, Adder)
    assert d.trained.count(1) == 1
    assert any(outcome.taken_over for outcome in run.outcomes if outcome.peer == "d")


@pytest.mark.parametrize("at", [21.0, 20.011, 39.0])
def test_killed_at_any_moment_all_survivors_finish(at: float) -> None:
    run = federation("abcd", rounds=3, seconds=20.0)
    run.world.at(at, lambda: run.kill(PeerId("c")))
    run.run()
    assert {run.rounds[PeerId(name)] for name in "abd"} == {4}


def test_neighbours_average_by_metropolis_weights() -> None:
    told: dict[tuple[str, int], Arrays] = {}
    run = federation(
        "abcde",
        rounds=3,
        mode="neighbour",
        topology="ring",
        told=lambda outcome, arrays: told.update({(outcome.peer, outcome.round): arrays}),
    )
    run.run()
    names = "abcde"
    overlay = neighbours([PeerId(name) for name in names], run.world.genesis.terms.topology, 0)
    mixing = np.zeros((5, 5))
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if PeerId(b) in overlay[PeerId(a)]:
                mixing[i, j] = 1 / 3
        mixing[i, i] = 1 - mixing[i].sum()
    expected = np.zeros(5)
    for round in (1, 2, 3):
        expected = mixing @ (expected + np.arange(5.0))
        for place, name in enumerate(names):
            for array in told[name, round].values():
                assert np.allclose(array, expected[place], atol=1e-5)
    assert {outcome.completeness for outcome in run.outcomes} == {1.0}
    assert max(outcome.at for outcome in run.outcomes) < 30.0  # nobody waits for strangers
    payload = [node.payload_bytes for node in run.world.nodes.values()]
    assert max(payload) < 3 * 2 * 1.2 * BYTES  # two neighbours' updates a round


def test_fragments_are_averaged_over_those_who_drew_them() -> None:
    told: dict[tuple[str, int], Arrays] = {}
    run = federation(
        "abcdef",
        rounds=3,
        mode="fragment",
        share=0.4,
        told=lambda outcome, arrays: told.update({(outcome.peer, outcome.round): arrays}),
    )
    run.run()
    members = [PeerId(name) for name in "abcdef"]
    layout = run.world.layout
    for peer in members:
        scope = Scope(run.world.nodes[peer].swarm.scope.terms, peer, members)
        drawn = 0
        for chunk in layout.chunks:
            owners = [k for k, owner in enumerate(members) if chunk.index in scope.wanted(owner, 1)]
            drawn += len(owners) - 1
            for part in chunk.slices:
                rows = told[peer, 1][MODEL.tensors[part.tensor].name][part.start : part.stop]
                assert np.allclose(rows, np.mean(owners))
            for count in run.world.nodes[peer].closed[3].counts:
                # What was not drawn is not missing: nothing older stands in for it.
                assert set(count.chunks) == set(scope.wanted(count.manifest.owner, 3))
                assert not count.fills
        assert drawn
    assert {outcome.completeness for outcome in run.outcomes} == {1.0}


def test_fragments_on_a_sparse_overlay_come_from_neighbours_alone() -> None:
    run = federation("abcdefgh", rounds=4, mode="fragment", topology="mesh", share=0.5)
    run.run()
    assert set(run.rounds.values()) == {5}
    assert len({outcome.model_hash for outcome in run.outcomes if outcome.round == 4}) == 8


@pytest.mark.parametrize("mode", ["neighbour", "fragment"])
def test_a_dead_neighbour_is_not_waited_for_in_any_mode(mode: str) -> None:
    run = federation(
        "abcdef", rounds=3, seconds=20.0, mode=mode, topology="ring", share=0.5, window=200.0
    )
    run.world.at(21.0, lambda: run.kill(PeerId("c")))
    run.run()
    assert {run.rounds[PeerId(name)] for name in "abdef"} == {4}
    assert max(outcome.at for outcome in run.outcomes) < 3 * 20.0 + 30.0


@pytest.mark.parametrize(
    ("compression", "tolerance"),
    [
        (Compression("bf16"), 0.05),
        (Compression("int8"), 0.05),
        (Compression("int8", delta=True), 0.01),
        (Compression("topk", topk_share=0.5), 2.0),
    ],
)
def test_compressed_updates_average_to_the_same_at_all(
    compression: Compression, tolerance: float
) -> None:
    run = federation("abcd", rounds=3, compression=compression)
    run.run()
    assert {len(found) for found in hashes(run).values()} == {1}
    for array in run.models[PeerId("a")].values():
        assert np.abs(np.subtract(array, 4.5)).max() < tolerance


def test_what_topk_left_out_is_sent_later() -> None:
    run = federation("ab", rounds=8, compression=Compression("topk", topk_share=0.25))
    run.run()
    added = 8 * 0.5  # a adds nothing, b adds one a round
    for array in run.models[PeerId("a")].values():
        assert added - 2.5 < array.mean() < added


@pytest.mark.parametrize("mode", ["swarm", "neighbour", "fragment"])
def test_a_restart_loses_nothing_that_was_received(mode: str) -> None:
    run = federation(
        "abcd", rounds=1, mode=mode, share=0.7, window=100.0, down=BYTES / 8.0, seconds=10.0
    )
    before: dict[str, int] = {}

    def kill() -> None:
        before["payload"] = run.world.nodes[PeerId("b")].payload_bytes
        before["here"] = sum(map(len, run.world.nodes[PeerId("b")].complete.values()))
        run.kill(PeerId("b"))

    run.world.at(26.0, kill)
    run.world.at(27.0, lambda: run.restart(PeerId("b")))
    run.run()
    node = run.world.nodes[PeerId("b")]
    assert before["here"] > 6  # its own chunks, and others'
    assert 0 < node.payload_bytes < before["payload"] * 2
    [outcome] = [outcome for outcome in run.outcomes if outcome.peer == "b"]
    assert outcome.completeness == 1.0
    counted = {count.manifest.owner: set(count.chunks) for count in node.closed[1].counts}
    scope = node.swarm.scope
    assert counted == {
        owner: set(scope.wanted(owner, 1)) for owner in run.learners if scope.wanted(owner, 1).count
    }
    assert len(counted) == 4


def test_overlap_hides_the_exchange_behind_the_training_of_the_next_round() -> None:
    def last(overlap: bool) -> float:
        run = federation("abcd", rounds=4, seconds=20.0, down=3 * BYTES / 15.0, overlap=overlap)
        run.run()
        assert {len(found) for found in hashes(run).values()} == {1}
        assert {outcome.completeness for outcome in run.outcomes} == {1.0}
        for model in run.models.values():
            for array in model.values():
                assert np.allclose(array, 4 * (0 + 1 + 2 + 3) / 4)
        return max(outcome.at for outcome in run.outcomes)

    assert last(False) > 4 * (20.0 + 14.0)
    assert 4 * 20.0 + 14.0 < last(True) < 4 * 20.0 + 25.0


def test_with_overlap_a_round_is_trained_from_the_aggregate_of_two_rounds_before() -> None:
    run = federation("abcd", rounds=4, overlap=True)
    run.run()
    for number, name in enumerate("abcd"):
        learner = run.learners[PeerId(name)]
        assert isinstance(learner, Adder)
        assert learner.trained == [1, 2, 3, 4]
        assert np.allclose(learner.starts, [0, number, 1.5 + number, 3.0 + number])


@pytest.mark.parametrize("at", [25.0, 41.0, 55.0])
def test_with_overlap_who_dies_comes_back_and_all_end_alike(at: float) -> None:
    run = federation("abcd", rounds=6, seconds=20.0, down=3 * BYTES / 15.0, overlap=True)
    run.world.at(at, lambda: run.kill(PeerId("d")))
    run.world.at(at + 30.0, lambda: run.restart(PeerId("d")))
    run.run()
    assert set(run.rounds.values()) == {7}
    assert len({model_hash(MODEL, model) for model in run.models.values()}) == 1


def test_with_overlap_a_slow_trainer_misses_the_deadline_and_holds_up_nobody() -> None:
    run = federation("abcd", rounds=5, seconds=5.0, window=10.0, overlap=True)
    slow = run.learners[PeerId("d")]
    assert isinstance(slow, Adder)
    slow.seconds = 40.0
    run.run()
    assert set(run.rounds.values()) == {6}
    assert any(outcome.taken_over for outcome in run.outcomes if outcome.peer == "d")
    others = [outcome.at for outcome in run.outcomes if outcome.peer != "d"]
    assert max(others) < 5 * (5.0 + 10.0) + 10.0


def test_a_server_optimizers_moments_go_on_from_round_to_round() -> None:
    run = federation("abcd", rounds=3, aggregator="fedadam")
    run.run()
    assert {len(found) for found in hashes(run).values()} == {1}
    weight = m = v = 0.0
    for _ in range(3):  # all add 1.5 on average: Reddi et al. 2021, with the usual numbers
        m = 0.9 * m + 0.1 * 1.5
        v = 0.99 * v + 0.01 * 1.5**2
        weight += 0.01 * m / (v**0.5 + 1e-3)
    for model in run.models.values():
        assert model.keys() == {tensor.name for tensor in MODEL.tensors}
        for array in model.values():
            assert np.allclose(array, weight, rtol=1e-5)


def test_controls_that_no_learner_makes_are_refused() -> None:
    with pytest.raises(ConfigError, match="aggregator is scaffold, whose control variates"):
        federation("abcd", aggregator="scaffold")


def test_who_comes_back_takes_the_moments_over() -> None:
    run = federation("abcd", rounds=6, seconds=20.0, aggregator="fedyogi")
    run.world.at(30.0, lambda: run.kill(PeerId("d")))
    run.world.at(70.0, lambda: run.restart(PeerId("d")))
    run.run()
    assert any(outcome.taken_over for outcome in run.outcomes)
    assert len({outcome.model_hash for outcome in run.outcomes if outcome.round == 6}) == 1


def test_a_recycled_change_moves_a_model_on_where_an_old_value_pulls_it_back() -> None:
    """All add the same each round, so that a change is as good as a new update."""

    def last_of(fill: str) -> float:
        run = federation("abcd", rounds=4, window=8.0, down=0.4 * 3 * BYTES / 8.0, fill=fill)
        run.run()
        assert min(outcome.completeness for outcome in run.outcomes) < 0.8
        arrays = [
            np.asarray(array, np.float64) for m in run.models.values() for array in m.values()
        ]
        return float(np.mean([array.mean() for array in arrays]))

    wanted = 4 * (0 + 1 + 2 + 3) / 4
    assert abs(last_of("recycle") - wanted) < 0.5 * abs(last_of("last") - wanted)
