"""A peer that was killed and comes back with its state directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from torch import nn

from p2pfl_torrent import AsyncPeer
from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.chunking import encode_chunk
from p2pfl_torrent.core.genesis import decode_genesis
from p2pfl_torrent.core.manifest import Manifest, block_hashes, decode_manifest, make_manifest
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.learning.state import describe, to_arrays
from p2pfl_torrent.overlay.identity import Identity, verify
from p2pfl_torrent.peer.node import Node
from p2pfl_torrent.peer.running import open_node
from p2pfl_torrent.store import Store, StoreError


def config(bootstrap: list[str], state_dir: str = "") -> PeerConfig:
    return PeerConfig.from_mapping(
        {
            "federate": {"client_num": 2, "total_round_num": 2, "join_timeout": 60.0},
            "bittorrent": {"timeout": 30.0},
            "network": {"bootstrap": bootstrap},
            "storage": {"state_dir": state_dir},
        }
    )


async def one_round(state_dir: Path) -> None:
    """Two peers finish round 1 of 2; the founder keeps its state."""
    founder = AsyncPeer(config([], str(state_dir)), nn.Linear(64, 64))

    async def take_part(peer: AsyncPeer) -> None:
        async with peer:
            await peer.exchange(num_samples=1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_part, founder)
        while not founder.addrs:
            await trio.lowlevel.checkpoint()
        nursery.start_soon(take_part, AsyncPeer(config([founder.addrs[0]]), nn.Linear(64, 64)))


def again(state_dir: Path) -> Node:
    model = nn.Linear(64, 64)
    spec = describe(model)
    return Node(config([], str(state_dir)), spec, to_arrays(model, spec))


def plant_unpublished_update(state_dir: Path) -> Manifest:
    """What a kill between signing an update and storing its last chunk leaves behind."""
    model = nn.Linear(64, 64)
    spec = describe(model)
    layout = config([]).plan_layout(spec)
    assert len(layout.chunks) > 1
    files = [encode_chunk(layout, k, to_arrays(model, spec)) for k in range(len(layout.chunks))]
    identity = Identity.load_or_create(state_dir / "identity.key")
    swarm = decode_genesis((state_dir / "genesis.json").read_bytes()).swarm_id
    manifest = make_manifest(
        layout=layout,
        swarm=swarm,
        round=2,
        owner=PeerId(identity.peer_id),
        base_hash=bytes(32),
        num_samples=1,
        sizes=[len(file) for file in files],
        ranks=range(len(files)),
        blocks=[block_hashes(file, layout.block_size) for file in files],
        sign=identity.sign,
    )

    def decode(data: bytes) -> Manifest:
        return decode_manifest(data, layout=layout, swarm=swarm, verify=verify, max_num_samples=1)

    with Store(
        state_dir,
        layout,
        swarm=swarm,
        keep_rounds=1,
        fill_max_age=1,
        decode=decode,
    ) as store:
        store.put_manifest(manifest)
        store.write(manifest.update, 0, 0, files[0])
    return manifest


async def test_an_update_cut_short_before_it_was_published_is_forgotten(tmp_path: Path) -> None:
    await one_round(tmp_path)
    manifest = plant_unpublished_update(tmp_path)
    async with open_node(again(tmp_path)) as node:
        assert node.round == 2
        ledger = node._exchange.swarm.ledger
        assert PeerId(node.peer_id) not in ledger.publishers(2)
        assert manifest.update not in {m.update for m in node._store.manifests()}


async def test_a_damaged_checkpoint_is_not_trained_on(tmp_path: Path) -> None:
    await one_round(tmp_path)
    path = tmp_path / "checkpoints" / "round-1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="holds other weights than were saved"):
        async with open_node(again(tmp_path)):
            raise AssertionError("must not resume")


async def test_a_torn_genesis_is_told(tmp_path: Path) -> None:
    await one_round(tmp_path)
    path = tmp_path / "genesis.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"genesis\.json is damaged"):
        async with open_node(again(tmp_path)):
            raise AssertionError("must not found another swarm beside this one's store")
