"""SCAFFOLD by real peers: one model everywhere, the paper's numbers, and controls that stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import trio
from torch import nn

from p2pfl_torrent import AsyncPeer, ConfigError, PeerConfig, RoundReport, Scaffold
from p2pfl_torrent.learning.state import describe, to_arrays
from p2pfl_torrent.peer.node import Node
from p2pfl_torrent.peer.running import open_node

SIZE, LR, ROUNDS = 600, 0.1, 3
STEPS = (1, 4, 7)
SAMPLES = (10, 30, 20)


class Member:
    """A peer that pulls its weights towards a number of its own."""

    def __init__(self, place: int, bootstrap: list[str], state_dir: Path | None = None) -> None:
        self.place = place
        self.model = nn.Linear(SIZE, 1, bias=False).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        self.peer = AsyncPeer(
            config(bootstrap, state_dir),
            self.model,
            controls=Scaffold(self.model, self.optimizer),
        )
        self.reports: list[RoundReport] = []

    async def take_part(self, rounds: int = ROUNDS) -> None:
        async with self.peer as peer:
            for _ in range(rounds):
                for _ in range(STEPS[self.place]):
                    self.optimizer.zero_grad()
                    loss = (self.model.weight - float(self.place)).pow(2).sum() / 2
                    loss.backward()  # type: ignore[no-untyped-call]
                    self.optimizer.step()
                self.reports.append(await peer.exchange(num_samples=SAMPLES[self.place]))


def config(bootstrap: list[str], state_dir: Path | None) -> PeerConfig:
    return PeerConfig.from_mapping(
        {
            "federate": {"client_num": 3, "total_round_num": ROUNDS, "aggregator": "scaffold"},
            "bittorrent": {"timeout": 60.0},
            "chunk": {"num_chunks": 6, "block_size": 1024},
            "network": {"bootstrap": bootstrap},
            "storage": {"state_dir": "" if state_dir is None else str(state_dir)},
        }
    )


async def together(state_dir: Path | None = None, rounds: int = ROUNDS) -> list[Member]:
    torch.manual_seed(0)
    members = [Member(0, [], state_dir)]
    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(members[0].take_part, rounds)
            while not members[0].peer.addrs:
                await trio.lowlevel.checkpoint()
            for place in (1, 2):
                members.append(Member(place, [members[0].peer.addrs[0]]))
                nursery.start_soon(members[-1].take_part, rounds)
    return members


async def test_all_end_with_the_bits_that_the_paper_comes_to() -> None:
    torch.manual_seed(0)
    x = nn.Linear(SIZE, 1, bias=False).double().weight.detach().numpy().copy()
    members = await together()
    for round in range(ROUNDS):
        assert len({member.reports[round].model_hash for member in members}) == 1
    c, own = np.zeros_like(x), [np.zeros_like(x) for _ in STEPS]
    shares = np.array(SAMPLES) / sum(SAMPLES)
    for _ in range(ROUNDS):
        trained, fresh = [], []
        for place, steps in enumerate(STEPS):
            y = x.copy()
            for _ in range(steps):
                y -= LR * (y - place - own[place] + c)
            trained.append(y)
            fresh.append(own[place] - c + (x - y) / (steps * LR))
        x = sum(share * y for share, y in zip(shares, trained, strict=True))
        c = sum(share * new for share, new in zip(shares, fresh, strict=True))
        own = fresh
    for member in members:
        np.testing.assert_allclose(member.model.weight.detach().numpy(), x, rtol=1e-10)


async def test_a_peer_goes_on_with_the_control_it_had(tmp_path: Path) -> None:
    await together(tmp_path, rounds=1)
    model = nn.Linear(SIZE, 1, bias=False).double()
    spec = describe(model)
    async with open_node(Node(config([], tmp_path), spec, to_arrays(model, spec))) as node:
        assert node.round == 2
        own, start = node.own_controls(), node.start_weights()
        first = node._checkpoints.load(0)["weight"]
    assert own is not None
    # One step from the start, uncorrected: the control is the gradient there.
    mine = np.asarray(own["weight:c"], np.float64)
    np.testing.assert_allclose(mine, np.asarray(first, np.float64), rtol=1e-9)
    assert start["weight:c"].shape == (1, SIZE)
    assert not np.allclose(np.asarray(start["weight:c"], np.float64), mine)


@pytest.mark.parametrize("aggregator", ["scaffold", "fedavg"])
def test_controls_are_needed_with_scaffold_and_of_no_use_without(aggregator: str) -> None:
    model = nn.Linear(4, 4)
    controls = Scaffold(model, torch.optim.SGD(model.parameters(), lr=0.1))
    settings = PeerConfig.from_mapping({"federate": {"aggregator": aggregator}})
    with pytest.raises(ConfigError, match=f"aggregator is {aggregator}: with scaffold, and only"):
        AsyncPeer(settings, model, controls=None if aggregator == "scaffold" else controls)
