"""A server optimizer's moments outlive a missed round and a restart, with real peers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import trio
from torch import nn

from p2pfl_torrent import AsyncPeer, PeerConfig
from p2pfl_torrent.core.aggregators import make_aggregator
from p2pfl_torrent.core.tensors import model_hash
from p2pfl_torrent.learning.state import describe, to_arrays
from p2pfl_torrent.peer.node import Node
from p2pfl_torrent.peer.running import open_node
from tests.peer.swarms import Member, all_done, swarm


async def test_who_takes_over_a_state_takes_the_moments_too(tmp_path: Path) -> None:
    others_are_ahead = trio.Event()
    ahead = 0

    async def before_exchange(member: Member, round: int) -> None:
        nonlocal ahead
        if member.number == 1 and round == 1:
            await others_are_ahead.wait()
        elif member.number > 1 and round == 2:
            ahead += 1
            if ahead == 2:
                others_are_ahead.set()

    async with swarm(
        3,
        before_exchange=before_exchange,
        state_dirs=tmp_path,
        federate={"aggregator": "fedadam"},
        bittorrent={"timeout": 1.0},
    ) as members:
        await all_done(members)
    assert members[0].reports[0].late
    taken, made = (tmp_path / k / "checkpoints" / "round-1.safetensors" for k in "12")
    assert taken.read_bytes() == made.read_bytes()


def config(state_dir: Path | None, bootstrap: list[str]) -> PeerConfig:
    return PeerConfig.from_mapping(
        {
            "federate": {"client_num": 2, "total_round_num": 2, "aggregator": "fedyogi"},
            "bittorrent": {"timeout": 30.0},
            "network": {"bootstrap": bootstrap},
            "storage": {"state_dir": "" if state_dir is None else str(state_dir)},
        }
    )


async def test_a_peer_goes_on_with_the_moments_it_had(tmp_path: Path) -> None:
    models = [nn.Linear(64, 64), nn.Linear(64, 64)]
    founder = AsyncPeer(config(tmp_path, []), models[0])
    hashes: set[str] = set()

    async def take_part(peer: AsyncPeer, trained: nn.Linear) -> None:
        async with peer:
            with torch.no_grad():
                trained.weight.add_(1.0)
            hashes.add((await peer.exchange(num_samples=1)).model_hash)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_part, founder, models[0])
        while not founder.addrs:
            await trio.lowlevel.checkpoint()
        other = AsyncPeer(config(None, [founder.addrs[0]]), models[1])
        nursery.start_soon(take_part, other, models[1])

    model = nn.Linear(64, 64)
    spec = describe(model)
    async with open_node(Node(config(tmp_path, []), spec, to_arrays(model, spec))) as node:
        assert node.round == 2
        state = node._checkpoints.load(1)
        assert node.start_weights().keys() == {"weight", "bias"}
        assert np.abs(state["weight:v"].astype(np.float64)).max() > 0
        assert {model_hash(make_aggregator("fedyogi").state_spec(spec), state).hex()} == hashes
