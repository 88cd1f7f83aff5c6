"""Real peers that exchange compressed chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.encoding import encode_file
from p2pfl_torrent.core.tensors import Arrays, model_hash
from p2pfl_torrent.learning.state import to_arrays
from p2pfl_torrent.peer import rounds
from p2pfl_torrent.peer.rounds import UpdateError
from tests.peer.swarms import Member, all_done, swarm

CHUNKS: list[tuple[dict[str, Any], float]] = [
    ({"compression": "none"}, 1.05),
    ({"compression": "fp16"}, 0.55),
    ({"compression": "bf16"}, 0.55),
    ({"compression": "int8"}, 0.31),
    ({"compression": "int8", "delta": True}, 0.31),
    ({"compression": "none", "delta": True}, 1.05),
    ({"compression": "topk", "topk_share": 0.05}, 0.15),
    ({"compression": "int8", "zstd_level": 3}, 0.3),
    ({"compression": "none", "zstd_level": 1}, 1.05),
]
"""Keys, and the most bytes received over those of the others' weights, in chunks of 8 KiB."""


@pytest.mark.parametrize(("chunk", "ratio"), CHUNKS, ids=str)
async def test_all_peers_end_each_round_with_the_same_bits(
    chunk: dict[str, Any], ratio: float
) -> None:
    async with swarm(3, chunk=chunk) as members:
        await all_done(members)
    for round in (0, 1):
        reports = [member.reports[round] for member in members]
        assert {report.closed_by for report in reports} == {"complete"}
        assert len({report.model_hash for report in reports}) == 1
        assert {owner.status for report in reports for owner in report.owners} == {"complete"}
        weights = 2 * 4 * sum(weight.numel() for weight in members[0].model.parameters())
        assert max(r.bytes_payload for r in reports) < ratio * weights
    first = list(members[0].model.parameters())
    for member in members[1:]:
        for mine, others in zip(first, member.model.parameters(), strict=True):
            assert torch.equal(mine, others)


async def test_what_the_codec_cannot_hold_is_told_to_the_user_and_not_shared() -> None:
    told: list[str] = []

    async def spoil(member: Member, round: int) -> None:
        weight = next(member.model.parameters())
        whole = weight.detach().clone()
        weight.data.fill_(1e30)
        with pytest.raises(UpdateError) as error:
            await member.peer.exchange(num_samples=1)
        told.append(str(error.value))
        weight.data.copy_(whole)

    async with swarm(2, before_exchange=spoil, chunk={"compression": "fp16"}) as members:
        await all_done(members)
    assert "holds values too large for fp16" in told[0]
    assert members[0].reports[-1].model_hash == members[1].reports[-1].model_hash


async def test_a_hostile_owner_is_named_and_the_round_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its scales are NaN: everybody leaves its chunks out, itself too, which reads what it sent."""
    hostile: set[str] = set()

    def encode(layout: Layout, index: int, arrays: Arrays, *others: Any) -> list[bytes]:
        file = bytearray(b"".join(encode_file(layout, index, arrays, *others)))
        if model_hash(layout.spec, arrays).hex() in hostile:
            for _, field, offset in layout.form(index).fields:
                if field.suffix == ":scale":
                    file[offset : offset + 4] = np.float32(np.nan).tobytes()
        return [bytes(file)]

    async def mark(member: Member, round: int) -> None:
        if member.number == 2:
            spec = member.node._layout.spec
            hostile.add(model_hash(spec, to_arrays(member.model, spec)).hex())

    monkeypatch.setattr(rounds, "encode_file", encode)
    # Scores that look at its last update would stop the hostile one itself.
    chunk = {"compression": "int8", "importance_method": "l2_norm"}
    async with swarm(3, before_exchange=mark, chunk=chunk) as members:
        await all_done(members)
    for round in (0, 1):
        reports = [member.reports[round] for member in members]
        assert len({report.model_hash for report in reports}) == 1
        for report in reports:
            told = {owner.owner: owner.status for owner in report.owners}
            assert told.pop(members[1].id) == "refused"
            assert set(told.values()) == {"complete"}


@pytest.mark.parametrize(
    ("chunk", "fill"), [({"delta": True}, "last"), ({}, "recycle")], ids=["delta", "recycle"]
)
async def test_what_an_old_chunk_began_from_is_kept_while_it_may_fill(
    chunk: dict[str, Any], fill: str
) -> None:
    kept: list[set[int]] = []

    async def look(member: Member, round: int) -> None:
        if round == 7:
            kept.append(set(member.node._rounds._checkpoints.rounds()))

    async with swarm(
        2,
        before_exchange=look,
        chunk=chunk,
        federate={"total_round_num": 7},
        bittorrent={"fill_max_age": 4, "fill": fill},
    ) as members:
        await all_done(members)
    # A chunk of round 3 may fill in round 7, and was trained from the end of round 2.
    assert all(found >= {2, 3, 4, 5, 6} for found in kept)
    assert len(kept) == 2
