"""Real peers by each rule: the same bits everywhere, and what the rule says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.peer.swarms import Member, all_done, swarm


@pytest.mark.parametrize("name", ["fedprox", "fedmedian", "trimmed_mean", "krum", "multi_krum"])
async def test_all_peers_end_each_round_with_the_same_bits(name: str) -> None:
    async with swarm(4, federate={"aggregator": name, "byzantine": 0}) as members:
        await all_done(members)
    for round in (0, 1):
        assert len({member.reports[round].model_hash for member in members}) == 1
        assert {member.reports[round].closed_by for member in members} == {"complete"}
    first = list(members[0].model.parameters())
    for member in members[1:]:
        for mine, others in zip(first, member.model.parameters(), strict=True):
            assert torch.equal(mine, others)


async def test_a_median_of_real_updates() -> None:
    trained: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}

    async def note(member: Member, round: int) -> None:
        weight = next(member.model.parameters())
        trained[member.number] = weight.detach().numpy().astype(np.float64)

    async with swarm(
        3, before_exchange=note, federate={"aggregator": "fedmedian", "total_round_num": 1}
    ) as members:
        await all_done(members)
    merged = next(members[0].model.parameters()).detach().numpy()
    np.testing.assert_array_equal(merged, np.median(list(trained.values()), axis=0))


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
async def test_peers_share_the_moments_of_a_server_optimizer(name: str, tmp_path: Path) -> None:
    async with swarm(3, state_dirs=tmp_path, federate={"aggregator": name}) as members:
        await all_done(members)
    for round in (0, 1):
        assert len({member.reports[round].model_hash for member in members}) == 1
        assert members[0].reports[round].agreement == 1.0
    files = [tmp_path / str(k) / "checkpoints" / "round-2.safetensors" for k in (1, 2, 3)]
    assert len({file.read_bytes() for file in files}) == 1
    weights = 4 * sum(weight.numel() for weight in members[0].model.parameters())
    assert files[0].stat().st_size > 3 * weights
