"""The wire formats as files: what other implementations are to read and write, byte for byte.

Nothing here writes the vectors. A change that breaks one of these tests changes the protocol and
needs a new protocol id.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from p2pfl_torrent.core import messages as m
from p2pfl_torrent.core.aggregation import discount
from p2pfl_torrent.core.architecture import Architecture, Group, Part, plan_by_architecture
from p2pfl_torrent.core.averaging import average_slice
from p2pfl_torrent.core.chunking import Layout, decode_chunk, encode_chunk, plan, slice_of
from p2pfl_torrent.core.compression import Compression
from p2pfl_torrent.core.encoding import decode_file, encode_file
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.genesis import decode_genesis, decode_terms, encode_terms
from p2pfl_torrent.core.manifest import (
    SIGNING_CONTEXT,
    Manifest,
    block_hashes,
    decode_manifest,
    decode_manifest_gossip,
    encode_header_gossip,
    make_manifest,
)
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import NUMPY_DTYPES, Array, ModelSpec, TensorSpec, model_hash
from p2pfl_torrent.overlay.identity import Identity, verify
from tests.core.small_models import same_bits


def vectors(name: str) -> dict[str, Any]:
    path = Path(__file__).parents[1] / "vectors" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


MANIFEST = vectors("manifest")
EXCHANGE = vectors("chunk-exchange")
AVERAGES = vectors("averages")
GENESIS = vectors("genesis")
COMPRESSION = vectors("compression")
ARCHITECTURE = vectors("architecture")

_MODEL = MANIFEST["model"]
SPEC = ModelSpec(
    tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in _MODEL["tensors"]),
    tuple((other, name) for other, name in _MODEL["aliases"]),
)
LAYOUT: Layout = plan(
    SPEC,
    num_chunks=MANIFEST["layout"]["num_chunks"],
    block_size=MANIFEST["layout"]["block_size"],
)
ARRAYS: dict[str, Array] = {
    tensor.name: np.frombuffer(
        bytes.fromhex(MANIFEST["model"]["values"][tensor.name]), NUMPY_DTYPES[tensor.dtype]
    ).reshape(tensor.shape)
    for tensor in SPEC.tensors
}
FILES = [bytes.fromhex(file) for file in MANIFEST["files"]]
KEY = Identity(bytes.fromhex(MANIFEST["key"]["seed"]))
SWARM = bytes.fromhex(MANIFEST["swarm"])


def decode(data: bytes) -> Manifest:
    return decode_manifest(
        data,
        layout=LAYOUT,
        swarm=SWARM,
        verify=verify,
        max_num_samples=MANIFEST["max_num_samples"],
    )


def test_the_model_has_this_fingerprint_and_hash() -> None:
    assert SPEC.fingerprint() == MANIFEST["model"]["fingerprint"]
    assert model_hash(SPEC, ARRAYS).hex() == MANIFEST["model"]["hash"]


def test_the_model_is_cut_like_this() -> None:
    cut = [[[p.tensor, p.start, p.stop] for p in chunk.slices] for chunk in LAYOUT.chunks]
    assert cut == MANIFEST["layout"]["chunks"]
    assert LAYOUT.digest == MANIFEST["layout"]["digest"]


def group(listed: dict[str, Any]) -> Group:
    members = (
        group(member) if "members" in member else Part(member["tensor"], member["stacks"])
        for member in listed["members"]
    )
    return Group(listed["kind"], tuple(members), listed["heads"])


@pytest.mark.parametrize("case", ARCHITECTURE["cases"], ids=lambda case: case["name"])
def test_a_model_is_cut_like_this_along_its_architecture(case: dict[str, Any]) -> None:
    tensors = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in case["tensors"])
    layout = plan_by_architecture(
        ModelSpec(tensors, tuple((other, name) for other, name in case["aliases"])),
        Architecture(case["family"], tuple(map(group, case["groups"]))),
        num_chunks=case["num_chunks"],
        block_size=case["block_size"],
    )
    cut = [[[p.tensor, p.start, p.stop] for p in chunk.slices] for chunk in layout.chunks]
    assert cut == case["chunks"]
    assert layout.digest == case["digest"]


def test_the_chunks_are_these_files() -> None:
    assert len(FILES) == len(LAYOUT.chunks)
    for chunk, file in zip(LAYOUT.chunks, FILES, strict=True):
        assert encode_chunk(LAYOUT, chunk.index, ARRAYS) == file
        for part, array in zip(chunk.slices, decode_chunk(LAYOUT, chunk.index, file), strict=True):
            name = SPEC.tensors[part.tensor].name
            assert same_bits(array, slice_of(ARRAYS[name], part))


def test_the_owner_writes_this_manifest() -> None:
    made = make_manifest(
        layout=LAYOUT,
        swarm=SWARM,
        round=MANIFEST["header"]["round"],
        owner=PeerId(KEY.peer_id),
        base_hash=bytes.fromhex(MANIFEST["model"]["hash"]),
        num_samples=MANIFEST["header"]["num_samples"],
        sizes=[len(file) for file in FILES],
        ranks=MANIFEST["ranks"],
        blocks=[block_hashes(file, LAYOUT.block_size) for file in FILES],
        sign=KEY.sign,
    )
    assert KEY.peer_id == MANIFEST["key"]["peer"]
    assert SIGNING_CONTEXT.hex() == MANIFEST["signing_context"]
    assert made.signed.raw.hex() == MANIFEST["raw"]
    assert made.signed.signature.hex() == MANIFEST["signature"]
    assert msgspec.msgpack.decode(made.encode())[2].hex() == MANIFEST["table"]
    assert made.update.hex() == MANIFEST["update"]
    assert made.encode().hex() == MANIFEST["encoded"]
    assert encode_header_gossip(made.signed).hex() == MANIFEST["header_alone"]


def test_a_reader_reads_this_manifest() -> None:
    manifest = decode(bytes.fromhex(MANIFEST["encoded"]))
    assert manifest.update.hex() == MANIFEST["update"]
    assert manifest.owner == MANIFEST["key"]["peer"]
    for field, value in MANIFEST["header"].items():
        found = getattr(manifest.header, field)
        assert (found.hex() if isinstance(found, bytes) else found) == value
    alone = decode_manifest_gossip(
        bytes.fromhex(MANIFEST["header_alone"]),
        swarm=SWARM,
        verify=verify,
        max_num_samples=MANIFEST["max_num_samples"],
    )
    assert alone == manifest.signed


@pytest.mark.parametrize("case", MANIFEST["refused"], ids=lambda case: case["name"])
def test_a_reader_refuses_this_manifest(case: dict[str, str]) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(bytes.fromhex(case["data"]))


def compressed_arrays(spec: ModelSpec, values: dict[str, str]) -> dict[str, Array]:
    return {
        tensor.name: np.frombuffer(
            bytes.fromhex(values[tensor.name]), NUMPY_DTYPES[tensor.dtype]
        ).reshape(tensor.shape)
        for tensor in spec.tensors
    }


@pytest.mark.parametrize("case", COMPRESSION["files"], ids=lambda case: case["compression"])
def test_a_compressed_chunk_is_this_file_and_has_these_bits(case: dict[str, Any]) -> None:
    listed = COMPRESSION["tensors"]
    spec = ModelSpec(tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in listed))
    values = compressed_arrays(spec, COMPRESSION["values"])
    base = compressed_arrays(spec, COMPRESSION["base"])
    compression = Compression(*case["keys"])
    assert compression.name == case["compression"]
    layout = replace(plan(spec, num_chunks=1, block_size=64), compression=compression)
    file = bytes.fromhex(case["file"])
    if not compression.zstd_level:  # another release of zstd may write another frame
        assert b"".join(encode_file(layout, 0, values, base)) == file
    for part, array in zip(
        layout.chunks[0].slices, decode_file(layout, 0, file, base), strict=True
    ):
        assert array.tobytes().hex() == case["decoded"][spec.tensors[part.tensor].name]


def shown(value: object) -> object:
    """A message's field as the vectors write it."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).hex()
    if isinstance(value, tuple):
        return [shown(item) for item in value]
    if isinstance(value, msgspec.Struct):
        return {name: shown(getattr(value, name)) for name in value.__struct_fields__}
    return value


@pytest.mark.parametrize("case", EXCHANGE["messages"], ids=lambda case: case["name"])
def test_a_message_is_this_frame(case: dict[str, Any]) -> None:
    frame = bytes.fromhex(case["frame"])
    kind, size = m.frame_body_bytes(frame[: m.FRAME_HEADER.size], m.MAX_CONTROL_FRAME)
    assert size == len(frame) - m.FRAME_HEADER.size
    message = m.decode_body(kind, frame[m.FRAME_HEADER.size :])
    assert type(message).__name__ == case["name"]
    assert {name: shown(getattr(message, name)) for name in case["fields"]} == case["fields"]
    head, payload = m.encode_message(message)
    assert head + bytes(payload) == frame


def test_every_message_has_its_vector() -> None:
    assert m.PROTOCOL_ID == EXCHANGE["protocol"]
    assert len({case["name"] for case in EXCHANGE["messages"]}) == 13


@pytest.mark.parametrize("case", EXCHANGE["refused"], ids=lambda case: case["name"])
def test_a_reader_refuses_this_frame(case: dict[str, str]) -> None:
    frame = bytes.fromhex(case["frame"])
    with pytest.raises(RemoteProtocolError):
        kind, _ = m.frame_body_bytes(frame[: m.FRAME_HEADER.size], m.MAX_CONTROL_FRAME)
        m.decode_body(kind, frame[m.FRAME_HEADER.size :])


@pytest.mark.parametrize("case", AVERAGES["averages"], ids=lambda case: case["name"])
def test_an_average_has_these_bits(case: dict[str, Any]) -> None:
    dtype = NUMPY_DTYPES[case["dtype"]]
    parts: list[tuple[float, Array]] = [
        (float.fromhex(weight), np.frombuffer(bytes.fromhex(values), dtype))
        for weight, values in zip(case["weights"], case["values"], strict=True)
    ]
    out = np.empty_like(parts[0][1])
    average_slice(case["dtype"], parts, out)
    assert out.tobytes().hex() == case["average"]


def test_the_discounts_have_these_bits() -> None:
    assert [discount(s).hex() for s in range(6)] == AVERAGES["discounts"]


def test_terms_and_genesis_are_these_bytes() -> None:
    assert encode_terms(decode_terms(GENESIS["terms"].encode())).decode() == GENESIS["terms"]
    genesis = decode_genesis(GENESIS["genesis"].encode())
    assert genesis.encode().decode() == GENESIS["genesis"]
    assert genesis.swarm_id.hex() == GENESIS["swarm"]


def test_a_later_key_is_encoded_where_it_is_unusual_alone() -> None:
    usual = decode_terms(GENESIS["terms"].encode())
    assert usual.rounds.critical_share == 0.3
    unusual = decode_terms(GENESIS["unusual_terms"].encode())
    changed = msgspec.structs.replace(usual.rounds, critical_share=0.5)
    assert unusual == msgspec.structs.replace(usual, rounds=changed)
    assert encode_terms(unusual).decode() == GENESIS["unusual_terms"]
