"""What an update began from, and what it left out: kept, and told where it is gone."""

from __future__ import annotations

import random
from collections.abc import Set
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing
from msgspec.structs import replace as replace_struct
from safetensors.numpy import load_file

from p2pfl_torrent.core.chunking import TensorSlice, plan
from p2pfl_torrent.core.compression import Codec, Compression
from p2pfl_torrent.core.manifest import Manifest
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import Array, ModelSpec, TensorSpec, model_hash
from p2pfl_torrent.exchange.ports import ByteStream
from p2pfl_torrent.peer.bases import Bases, Residuals
from p2pfl_torrent.peer.catchup import CatchUp
from p2pfl_torrent.peer.rounds import KEPT_CHECKPOINTS, kept_checkpoints
from p2pfl_torrent.store import Checkpoints, Store
from tests.core.small_ledgers import WORLD, update
from tests.peer.processes import Member as Process
from tests.peer.processes import bootstrap_node, swarm, until
from tests.peer.swarms import Member, all_done
from tests.peer.swarms import swarm as members_of

TOPK = {"compression": "topk", "topk_share": 0.05}
SPEC = ModelSpec((TensorSpec("n", "I64", (2,)), TensorSpec("w", "BF16", (4, 2))))
LAYOUT = replace(plan(SPEC, num_chunks=1, block_size=64), compression=Compression("topk"))


def keep(residuals: Residuals, round: int, value: float) -> None:
    with residuals.draft(round) as take:
        take(TensorSlice(1, 0, 3), np.full((3, 2), value, np.float32))
        take(TensorSlice(1, 3, 4), np.full((1, 2), value, np.float32))


def test_what_was_left_out_is_there_after_a_restart(tmp_path: Path) -> None:
    keep(Residuals(tmp_path, LAYOUT), 1, 0.25)
    again = Residuals(tmp_path, LAYOUT)
    assert again.before(1) is None  # round 1 may have to be done once more
    found = again.before(5)  # rounds may have been missed
    assert found is not None
    assert found.keys() == {"w"}
    assert found["w"].dtype == np.float32
    assert (found["w"] == 0.25).all()


def test_an_update_that_is_cut_short_leaves_what_was_kept(tmp_path: Path) -> None:
    residuals = Residuals(tmp_path, LAYOUT)
    keep(residuals, 1, 0.25)
    with pytest.raises(ZeroDivisionError):
        with residuals.draft(2) as take:
            take(TensorSlice(1, 0, 3), np.ones((3, 2), np.float32))
            raise ZeroDivisionError
    assert residuals.before(3) is not None
    keep(residuals, 2, 0.5)
    keep(residuals, 3, 0.75)
    first, second = residuals.before(3), residuals.before(4)
    assert first is not None
    assert second is not None
    assert (first["w"][0, 0], second["w"][0, 0]) == (0.5, 0.75)
    assert residuals.before(2) is None  # two are kept


def test_what_is_not_finite_is_left_out_no_longer(tmp_path: Path) -> None:
    residuals = Residuals(tmp_path, LAYOUT)
    with residuals.draft(1) as take:
        take(TensorSlice(1, 0, 3), np.full((3, 2), 0.5, np.float32))
        take(TensorSlice(1, 3, 4), np.array([[-np.inf, np.nan]], np.float32))
    found = residuals.before(2)
    assert found is not None
    assert np.asarray(found["w"]).tolist() == [[0.5, 0.5]] * 3 + [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("compression", "fill", "age", "late", "kept"),
    [
        ("topk", "last", 20, 1, 21),
        ("topk", "renormalise", 20, 1, KEPT_CHECKPOINTS),
        ("topk", "renormalise", 20, 9, 10),
        ("none", "last", 20, 9, KEPT_CHECKPOINTS),
        ("none", "recycle", 20, 30, 21),
        ("topk", "recycle", 20, 30, 31),
    ],
)
def test_no_more_models_are_kept_than_updates_may_begin_from(
    compression: Codec, fill: str, age: int, late: int, kept: int
) -> None:
    terms = replace_struct(
        WORLD.genesis.terms.rounds, fill=fill, fill_max_age=age, max_staleness=late
    )
    assert kept_checkpoints(Compression(compression), terms) == kept


def test_a_damaged_one_is_as_none(tmp_path: Path) -> None:
    residuals = Residuals(tmp_path, LAYOUT)
    keep(residuals, 1, 0.25)
    [path] = (tmp_path / "unsent" / "checkpoints").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert residuals.before(2) is None


def stray(member: Member, claimed: bytes | None = None) -> None:
    """As if it had closed round 1 with other chunks than the rest."""
    rounds = member.node._rounds
    arrays = {
        name: np.asarray(np.asarray(rows, np.float32) + 1)
        for name, rows in rounds._checkpoints.load(1).items()
    }
    rounds._checkpoints.save(1, arrays)
    rounds.base_hash = claimed or model_hash(member.node._layout.spec, arrays)
    rounds._store.finish_round(1, "complete", rounds.base_hash, b"{}", ())


def statuses(member: Member) -> dict[str, str]:
    return {owner.owner: owner.status for owner in member.reports[1].owners}


CHANGES = {"compression": "int8", "delta": True}
BASE_PATIENCE = 8.0


class Owners(CatchUp):
    """Some give the base that is asked for; the others take the question and say nothing."""

    def __init__(self, givers: Set[str]) -> None:
        async def unused(peer: PeerId) -> ByteStream:
            raise AssertionError(peer)

        super().__init__(SPEC, b"", 0.5, unused, random.Random(0))
        self._givers = givers

    async def fetch(self, peer: PeerId, base_hash: bytes) -> dict[str, Array] | None:
        if peer not in self._givers:
            await trio.sleep_forever()
        return {"base": np.frombuffer(base_hash, np.uint8)}


async def fetched(tmp_path: Path, manifests: list[Manifest], givers: Set[str]) -> list[bool]:
    """Whether the base of each comes from owners of which only these give any."""

    def decode(data: bytes) -> Manifest:
        raise AssertionError(data)

    swarm_id = manifests[0].header.swarm
    with Store(
        tmp_path, LAYOUT, swarm=swarm_id, keep_rounds=1, fill_max_age=1, decode=decode
    ) as store:
        bases = Bases(store, Checkpoints(tmp_path, SPEC), Owners(givers), bytes(32), BASE_PATIENCE)
        found = await bases.fetch(manifests, await bases.of(manifests))
    return [found[manifest.update] is not None for manifest in manifests]


async def test_who_stalls_keeps_no_other_base_from_being_fetched(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    stalls, gives = sorted(
        (update(1, "a"), update(2, "b")), key=lambda manifest: manifest.header.base_hash
    )
    assert await fetched(tmp_path, [stalls, gives], {gives.owner}) == [False, True]
    assert trio.current_time() <= BASE_PATIENCE


async def test_who_stalls_keeps_no_other_owner_of_a_base_from_being_asked(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    owners = sorted((update(1, name) for name in "abcd"), key=lambda manifest: manifest.owner)
    assert await fetched(tmp_path, owners, {owners[-1].owner}) == [True] * 4
    assert trio.current_time() <= BASE_PATIENCE


async def test_start_weights_are_given_and_a_damaged_base_is_as_none() -> None:
    async def look(member: Member, round: int) -> None:
        if round != 2:
            return
        node, rounds = member.node, member.node._rounds
        path = rounds._checkpoints.path(0)
        sound = path.read_bytes()
        own = node._exchange.swarm.ledger.update_of(member.id, 1)
        assert own is not None
        assert node.kept_state(own.manifest.header.base_hash) == (1, len(sound))
        for content in (sound, sound[:-1] + bytes([sound[-1] ^ 1]), sound[:-1]):
            path.unlink()  # the old file may be mapped
            path.write_bytes(content)
            found = await rounds.bases.of([own.manifest])
            assert (found[own.manifest.update] is not None) == (content == sound)
            seen.append(member.number)

    seen: list[int] = []
    async with members_of(2, before_exchange=look, chunk=CHANGES) as members:
        await all_done(members)
    assert sorted(seen) == [1, 1, 1, 2, 2, 2]


async def test_a_base_that_is_not_here_is_fetched_from_who_has_it() -> None:
    """Peers that had come apart end the next round with the same bits again."""

    async def part(member: Member, round: int) -> None:
        if member.number == 1 and round == 2:
            stray(member)

    async with members_of(3, before_exchange=part, chunk=CHANGES) as members:
        await all_done(members)
    assert all(set(statuses(member).values()) == {"complete"} for member in members)
    assert len({member.reports[1].model_hash for member in members}) == 1
    assert {member.reports[1].agreement for member in members} == {0.0, 0.5}


async def test_a_change_of_weights_that_nobody_has_is_left_out_and_told() -> None:
    async def lie(member: Member, round: int) -> None:
        if member.number == 1 and round == 2:
            stray(member, claimed=bytes(32))

    async with members_of(3, before_exchange=lie, chunk=CHANGES) as members:
        await all_done(members)
    strange = members[0].id
    for member in members[1:]:
        told = statuses(member)
        assert told.pop(strange) == "another base"
        assert set(told.values()) == {"complete"}
    assert members[1].reports[1].model_hash == members[2].reports[1].model_hash
    told = statuses(members[0])
    assert told.pop(strange) == "another base"  # its checkpoint is not what the hash says
    assert set(told.values()) == {"complete"}  # it fetched theirs


def comings(member: Process, of: str) -> int:
    """How often a member saw another one come."""
    changes = [value for kind, value in member.told if kind == "MemberChanged"]
    return sum(v["member"] == of and v["change"] in ("joined", "returned") for v in changes)


def left_out(path: Path) -> float:
    """Norm of what one file of residuals holds."""
    return float(np.sqrt(sum(np.square(rows).sum() for rows in load_file(path).values())))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_peer_goes_on_with_what_it_left_out(tmp_path: Path) -> None:
    sections = {
        "federate": {"client_num": 2, "total_round_num": 3, "join_timeout": 100.0},
        "topology": {"type": "full"},
        "bittorrent": {"timeout": 60.0},
        "chunk": TOPK,
    }
    state, kept = str(tmp_path / "state"), tmp_path / "state" / "unsent" / "checkpoints"
    with bootstrap_node() as (_, address), swarm(tmp_path, sections) as fleet:
        stays = fleet.start([address])
        dies = fleet.start([address], state)
        for member in (stays, dies):
            member.wait_for("addrs")
        for member in (stays, dies):
            member.go()
        assert stays.report(1)["model_hash"] == dies.report(1)["model_hash"]
        dies.wait_for("RoundStarted", round=2)
        dies.kill()
        before = left_out(kept / "round-1.safetensors")
        seen = comings(stays, dies.peer_id)
        again = fleet.start([address], state)
        again.wait_for("RoundStarted", round=2)
        again.wait_for("MemberChanged", member=stays.peer_id)
        until(lambda: comings(stays, dies.peer_id) > seen, [stays], "return of the killed")
        for round in (2, 3):
            for member in (stays, again):
                member.go()
            reports = [member.report(round) for member in (stays, again)]
            assert {report["closed_by"] for report in reports} == {"complete"}
            assert len({report["model_hash"] for report in reports}) == 1
        names = sorted(path.name for path in kept.iterdir())
        assert names == ["round-2.safetensors", "round-3.safetensors"]
        # Two rounds' independent noise is sqrt(2) times one's; one alone would be as before.
        assert left_out(kept / "round-2.safetensors") > 1.2 * before
