"""Scores by gradients: refused without statistics, and the same ranks after two relays."""

from __future__ import annotations

import random
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import trio
from torch import nn

from p2pfl_torrent import AsyncPeer, ConfigError, GradientStats, Peer, PeerConfig
from p2pfl_torrent.core.architecture import Architecture, Family
from p2pfl_torrent.core.chunking import plan
from p2pfl_torrent.core.importance import rank
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import ImportanceSwitched, RoundReport
from p2pfl_torrent.learning.state import describe
from p2pfl_torrent.peer.scoring import ImportanceScorer, chosen_method
from tests.peer.swarms import NUM_CHUNKS, Member, all_done, config, identities, swarm, until


@pytest.mark.parametrize("face", [Peer, AsyncPeer])
@pytest.mark.parametrize("method", ["magnitude", "snip", "fisher", "adaptive"])
def test_a_gradient_method_without_statistics_says_what_to_add(face: Any, method: str) -> None:
    settings = PeerConfig().with_values(chunk__importance_method=method)
    with pytest.raises(ConfigError, match=r"as gradients=GradientStats\(model, optimizer\)"):
        face(settings, nn.Linear(8, 8))


def test_snip_on_a_batch_of_its_own_needs_data() -> None:
    settings = PeerConfig().with_values(
        chunk__importance_method="snip", chunk__importance_config__snip__use_cached=False
    )
    with pytest.raises(ConfigError, match="use_cached is false"):
        Peer(settings, nn.Linear(8, 8), gradients=GradientStats(nn.Linear(8, 8)))


@pytest.mark.parametrize("method", ["fisher", "snip", "adaptive"])
def test_samples_that_the_model_cannot_take_are_told_when_the_peer_is_made(method: str) -> None:
    settings = PeerConfig().with_values(
        chunk__importance_method=method, chunk__importance_config__snip__use_cached=False
    )
    model = nn.Linear(8, 8)
    samples = torch.zeros(4, 9), torch.zeros(4, 8)
    stats = GradientStats(model, loss=nn.functional.mse_loss, samples=samples)
    with pytest.raises(ConfigError, match="cannot take gradients of its samples"):
        Peer(settings, model, gradients=stats)


def test_a_scorer_by_gradients_is_not_made_without_them() -> None:
    layout = plan(describe(nn.Linear(8, 8)), num_chunks=2, block_size=4096)
    with pytest.raises(ConfigError, match="give the Peer gradient statistics"):
        ImportanceScorer(PeerConfig().chunk, "snip", layout, random.Random(1), None)


class Nothing:
    """Gradient statistics of which nothing is asked yet."""

    def __init__(self, *, has_samples: bool = False) -> None:
        self.has_samples = has_samples

    def try_samples(self, method: str) -> None:
        pass


def method_of(family: Family | None, *, given: bool = True, **values: object) -> str:
    """The method that ``auto``, which is the default, chooses."""
    gradients: Any = Nothing() if given else None
    architecture = Architecture(family, ()) if family is not None else None
    return chosen_method(PeerConfig().with_values(**values).chunk, architecture, gradients)


def test_by_default_the_method_is_the_seeds_for_the_architecture() -> None:
    families = get_args(Family)
    assert {family: method_of(family) for family in families} == {
        "cnn": "magnitude", "transformer": "fisher", "hybrid": "adaptive", "small": "l2_norm",
        "large": "snip",
    }  # fmt: skip
    assert {method_of(family, given=False) for family in families} == {"change"}
    assert method_of(None) == "change"  # nothing is known of the model


def test_the_architecture_that_the_configuration_names_goes_before_the_one_found() -> None:
    assert method_of("small", chunk__architecture="large") == "snip"
    assert method_of("cnn", chunk__architecture="uniform") == "magnitude"
    assert method_of("cnn", chunk__importance_method="delta") == "delta"


def test_what_auto_chose_may_need_data_too() -> None:
    with pytest.raises(ConfigError, match="use_cached is false"):
        method_of("large", chunk__importance_config__snip__use_cached=False)


def test_adaptive_between_methods_without_gradients_needs_none() -> None:
    settings = PeerConfig().with_values(
        chunk__importance_method="adaptive", chunk__importance_config__adaptive__late="delta"
    )
    Peer(settings, nn.Linear(8, 8))


async def test_ranks_are_the_owners_after_two_relays(tmp_path: Path) -> None:
    ids = identities(tmp_path, 4)
    async with swarm(
        4,
        state_dirs=tmp_path,
        chunk={"importance_method": "delta"},
        topology={"type": "custom", "custom_graph": {1: [2], 2: [3], 3: [4]}, "members": ids},
    ) as members:
        ranks: dict[tuple[str, str], list[int]] = {}

        def ranks_seen() -> dict[tuple[str, str], list[int]]:
            return {
                (member.id, owner): [entry.rank for entry in update.manifest.entries]
                for member in members
                for owner in ids
                if (update := member.node._exchange.swarm.ledger.update_of(owner, 1)) is not None
            }

        def all_seen() -> bool:
            if len(members) == 4 and all_open(members):
                ranks.update(ranks_seen())
            return len(ranks) == 16

        await until(all_seen)
        await all_done(members)
    assert len({tuple(ranks[owner, owner]) for owner in ids}) > 1  # not the same for any update
    for (_, owner), seen in ranks.items():
        assert seen == ranks[owner, owner]
    for member in members:
        assert all(report.completeness == 1.0 for report in member.reports)


def all_open(members: list[Member]) -> bool:
    """Whether each has its parts."""
    return all(member.node.snapshot() is not None for member in members)


class Learner:
    """A peer of two that trains with a hooked optimizer.

    Attributes:
        ranks: of its update of round 1.
        expected: ranks by mean abs(g * w), from its own gradients.
    """

    def __init__(self, bootstrap: list[str], seed: int) -> None:
        torch.manual_seed(seed)
        layers = (nn.Linear(64, 64, bias=False) for _ in range(NUM_CHUNKS))
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        chunk = {
            "importance_method": "adaptive",
            "importance_config": {"adaptive": {"early": "snip", "late": "random", "patience": 1}},
        }
        gradients = GradientStats(self.model, self.optimizer)
        self.peer = AsyncPeer(
            config(2, bootstrap, "", {"chunk": chunk}), self.model, gradients=gradients
        )
        self.told = self.peer.events()
        self.reports: list[RoundReport] = []
        self.ranks: list[int] = []
        self.expected: list[int] = []

    async def take_part(self, *, forgets_to_train: bool = False) -> None:
        async with self.peer as peer, aclosing(peer.rounds()) as rounds:
            async for round in rounds:
                if forgets_to_train and round == 1:
                    with pytest.raises(ConfigError, match="GradientStats saw none of the weights"):
                        await peer.exchange(num_samples=4)
                self.model(torch.randn(4, 64)).square().sum().backward()
                if round == 1:
                    weights = dict(self.model.named_parameters()).values()
                    products = [(w.grad * w).abs().mean().item() for w in weights]  # type: ignore[operator]  # used
                    self.expected = rank(products)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.reports.append(await peer.exchange(num_samples=4, metrics={"loss": 1.0}))
                if round == 1:
                    ledger = peer._node._exchange.swarm.ledger
                    update = ledger.update_of(PeerId(peer.peer_id), 1)
                    assert update is not None
                    self.ranks = [entry.rank for entry in update.manifest.entries]


async def test_a_peer_ranks_by_the_gradients_of_its_training() -> None:
    first, second = await two_learners()
    for learner in (first, second):
        assert learner.ranks == learner.expected
        told = [event for event in learner.told.drain() if isinstance(event, ImportanceSwitched)]
        assert [(event.round, event.method) for event in told] == [(3, "random")]
        assert [report.importance_method for report in learner.reports] == ["snip", "snip"]
    assert first.expected != second.expected


async def test_an_exchange_before_any_gradient_says_so_and_may_be_repeated() -> None:
    for learner in await two_learners(forgets_to_train=True):
        assert learner.ranks == learner.expected
        assert {report.completeness for report in learner.reports} == {1.0}


async def two_learners(*, forgets_to_train: bool = False) -> tuple[Learner, Learner]:
    """After all their rounds."""
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            first = Learner([], 1)
            nursery.start_soon(partial(first.take_part, forgets_to_train=forgets_to_train))
            await until(lambda: bool(first.peer.addrs))
            second = Learner(list(first.peer.addrs), 2)
            nursery.start_soon(partial(second.take_part, forgets_to_train=forgets_to_train))
    return first, second
