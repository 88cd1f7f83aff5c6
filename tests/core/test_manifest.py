"""A manifest says one thing in one way, signed; anything else is its sender's fault."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl_torrent.core.chunking import Layout, encode_chunk, plan
from p2pfl_torrent.core.compression import Compression
from p2pfl_torrent.core.encoding import encode_file
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.manifest import (
    MAX_SIGNATURE_BYTES,
    SIGNING_CONTEXT,
    ChunkEntry,
    Manifest,
    ManifestHeader,
    SignedHeader,
    block_hashes,
    decode_manifest,
    decode_manifest_gossip,
    decode_signed_header,
    encode_header_gossip,
    hash_blocks,
    make_manifest,
    max_wire_bytes,
)
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import ModelSpec, TensorSpec
from p2pfl_torrent.overlay.identity import Identity, verify
from tests.core.small_models import finite_arrays, specs

OWNER = Identity(b"\x07" * 32)
SWARM = b"\x01" * 32
SPEC = ModelSpec((TensorSpec("w", "F32", (8, 4)), TensorSpec("b", "BF16", (8,))))
LAYOUT = plan(SPEC, num_chunks=3, block_size=64)
MAX_SAMPLES = 1000


def manifest_of(layout: Layout = LAYOUT, *, round: int = 3, num_samples: int = 10) -> Manifest:
    arrays = finite_arrays(layout.spec, 1)
    files = [encode_chunk(layout, chunk.index, arrays) for chunk in layout.chunks]
    return make_manifest(
        layout=layout,
        swarm=SWARM,
        round=round,
        owner=PeerId(OWNER.peer_id),
        base_hash=b"\x02" * 32,
        num_samples=num_samples,
        sizes=[len(file) for file in files],
        ranks=list(reversed(range(len(files)))),
        blocks=[block_hashes(file, layout.block_size) for file in files],
        sign=OWNER.sign,
    )


MANIFEST = manifest_of()


def decode(data: bytes, layout: Layout = LAYOUT, swarm: bytes = SWARM) -> Manifest:
    return decode_manifest(
        data, layout=layout, swarm=swarm, verify=verify, max_num_samples=MAX_SAMPLES
    )


def signed_as_it_is(header: ManifestHeader, table: bytes) -> bytes:
    """A manifest whose owner signs whatever it says."""
    header = msgspec.structs.replace(header, table_hash=hashlib.sha256(table).digest())
    raw = header.encode()
    signed = SignedHeader(header, raw, OWNER.sign(SIGNING_CONTEXT + raw))
    return on_the_wire(signed, table)


def on_the_wire(signed: SignedHeader, table: bytes) -> bytes:
    return msgspec.msgpack.encode([signed.raw, signed.signature, table])


def table_of(manifest: Manifest) -> bytes:
    _, _, table = msgspec.msgpack.decode(manifest.encode())
    assert isinstance(table, bytes)
    return table


@given(specs, st.integers(1, 9), st.integers(16, 100))
@settings(max_examples=40)
def test_a_manifest_comes_back_as_it_was(spec: ModelSpec, chunks: int, block: int) -> None:
    layout = plan(spec, num_chunks=chunks, block_size=block)
    manifest = manifest_of(layout)
    data = manifest.encode()
    assert len(data) <= max_wire_bytes(layout)
    again = decode(data, layout)
    assert again == manifest
    assert again.update == hashlib.sha256(manifest.signed.raw).digest()
    assert (again.owner, again.round) == (OWNER.peer_id, 3)


def test_it_is_encoded_once_for_all_who_ask() -> None:
    data = MANIFEST.encode()
    assert MANIFEST.encode() is data
    assert decode(data).encode() is data


def test_the_header_stays_small() -> None:
    assert len(manifest_of(round=2**32 - 1, num_samples=999).signed.raw) < 256


def test_no_byte_can_be_changed_on_the_way() -> None:
    data = MANIFEST.encode()
    for place in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[place] ^= flip
            with pytest.raises(RemoteProtocolError):
                decode(bytes(changed))


def test_no_byte_can_be_cut_off_or_added() -> None:
    data = MANIFEST.encode()
    for bad in (*(data[:size] for size in range(len(data))), data + b"\xc0", b"\xc0" + data):
        with pytest.raises(RemoteProtocolError):
            decode(bad)


@given(st.binary(max_size=400))
def test_noise_is_its_senders_fault(noise: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(noise)
    with pytest.raises(RemoteProtocolError):
        decode_signed_header(noise, noise, swarm=SWARM, verify=verify, max_num_samples=5)
    with pytest.raises(RemoteProtocolError):
        decode_manifest_gossip(noise, swarm=SWARM, verify=verify, max_num_samples=5)


fields = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=40)
    | st.text(max_size=20) | st.floats(),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=3), inner),
)  # fmt: skip


@given(st.lists(fields, max_size=9), st.lists(fields, max_size=4))
@settings(max_examples=40)
def test_well_formed_msgpack_that_is_no_manifest_is_refused(
    header: list[object], table: list[object]
) -> None:
    """The owner itself signs it: only the schema stands in the way."""
    raw = msgspec.msgpack.encode(header)
    signature = OWNER.sign(SIGNING_CONTEXT + raw)
    with pytest.raises(RemoteProtocolError):
        decode(msgspec.msgpack.encode([raw, signature, msgspec.msgpack.encode(table)]))
    with pytest.raises(RemoteProtocolError):
        decode(signed_as_it_is(MANIFEST.header, msgspec.msgpack.encode(table)))


def entries_with(change: Callable[[list[ChunkEntry]], None]) -> bytes:
    entries = list(MANIFEST.entries)
    change(entries)
    return msgspec.msgpack.encode(entries)


def changed(index: int, **what: object) -> bytes:
    return entries_with(
        lambda entries: entries.__setitem__(index, msgspec.structs.replace(entries[index], **what))
    )


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (entries_with(lambda entries: entries.__delitem__(-1)), "chunks, the swarm agreed on"),
        (changed(0, slices=MANIFEST.entries[1].slices), "other slices"),
        (changed(0, size=1), "claims 1 bytes"),
        (changed(0, size=1 << 40), "claims"),
        (changed(0, blocks=b""), "number of block hashes"),
        (changed(0, blocks=MANIFEST.entries[0].blocks + b"\0" * 32), "number of block hashes"),
        (changed(0, blocks=MANIFEST.entries[0].blocks[:-1]), "number of block hashes"),
        (changed(0, rank=0), "permutation"),
        (changed(0, rank=1 << 62), "permutation"),
        (changed(0, rank=-1), "malformed chunk table"),
        (b"\xdd\xff\xff\xff\xff", "malformed chunk table"),
        (b"", "malformed chunk table"),
        (b"\xdc\x00" + bytes([len(MANIFEST.entries)]) + table_of(MANIFEST)[1:], "canonical"),
    ],
)
def test_a_table_that_its_owner_signed_must_still_be_the_layouts(table: bytes, says: str) -> None:
    with pytest.raises(RemoteProtocolError, match=says):
        decode(signed_as_it_is(MANIFEST.header, table))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"swarm": b"\x09" * 32}, "another swarm"),
        ({"num_samples": MAX_SAMPLES + 1}, "above the agreed bound"),
        ({"num_samples": 0}, "malformed"),
        ({"round": 0}, "malformed"),
        ({"round": 1 << 32}, "malformed"),
        ({"version": 2}, "malformed"),
        ({"base_hash": b"short"}, "malformed"),
        ({"payload_bytes": 1}, "payload_bytes is not the sum"),
        ({"owner": Identity(b"\x08" * 32).peer_id}, "not signed by its owner"),
        ({"owner": "nobody"}, "not signed by its owner"),
    ],
)
def test_a_header_out_of_bounds_is_refused(change: dict[str, object], says: str) -> None:
    header = msgspec.structs.replace(MANIFEST.header, **change)
    with pytest.raises(RemoteProtocolError, match=says):
        decode(signed_as_it_is(header, table_of(MANIFEST)))


def test_the_signature_covers_the_header_and_nothing_else_signed_passes_for_it() -> None:
    raw = MANIFEST.signed.raw
    for message in (raw, SIGNING_CONTEXT, SIGNING_CONTEXT + raw + b"\0"):
        forged = replace(MANIFEST.signed, signature=OWNER.sign(message))
        with pytest.raises(RemoteProtocolError, match="not signed by its owner"):
            decode(on_the_wire(forged, table_of(MANIFEST)))


def test_another_header_with_the_same_table_is_another_update() -> None:
    assert manifest_of(round=4).update != MANIFEST.update
    assert table_of(manifest_of(round=4)) == table_of(MANIFEST)


def test_a_header_gossips_alone() -> None:
    def gossip(data: bytes) -> SignedHeader | None:
        return decode_manifest_gossip(data, swarm=SWARM, verify=verify, max_num_samples=MAX_SAMPLES)

    alone = encode_header_gossip(MANIFEST.signed)
    assert len(alone) < 512
    assert gossip(alone) == MANIFEST.signed
    assert gossip(MANIFEST.encode()) is None
    for place in range(len(alone)):
        changed = bytearray(alone)
        changed[place] ^= 1
        with pytest.raises(RemoteProtocolError):
            gossip(bytes(changed))


def test_a_long_signature_or_manifest_is_refused_before_it_is_checked() -> None:
    def never(*_: object) -> bool:
        raise AssertionError("a signature was checked")

    header = MANIFEST.signed.raw
    for data in (
        msgspec.msgpack.encode([header, b"\0" * (MAX_SIGNATURE_BYTES + 1), table_of(MANIFEST)]),
        msgspec.msgpack.encode([header * 3, b"\0" * 64, table_of(MANIFEST)]),
        msgspec.msgpack.encode([header, b"\0" * 64, b"\0" * max_wire_bytes(LAYOUT)]),
    ):
        with pytest.raises(RemoteProtocolError):
            decode_manifest(data, layout=LAYOUT, swarm=SWARM, verify=never, max_num_samples=9)


@given(st.integers(0, 2), st.data())
def test_ranges_of_blocks_end_with_the_chunk(chunk: int, data: st.DataObject) -> None:
    entry = MANIFEST.entries[chunk % len(MANIFEST.entries)]
    block = data.draw(st.integers(0, entry.num_blocks - 1))
    count = data.draw(st.integers(1, entry.num_blocks - block))
    index = MANIFEST.entries.index(entry)
    offset, size = MANIFEST.block_range(index, block, count, LAYOUT.block_size)
    assert offset == block * LAYOUT.block_size
    last = block + count == entry.num_blocks
    assert offset + size == (entry.size if last else (block + count) * LAYOUT.block_size)
    assert [len(entry.block_hash(i)) for i in range(entry.num_blocks)] == [32] * entry.num_blocks


@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(1, 20))
def test_a_file_in_parts_has_the_hashes_of_the_whole(parts: list[bytes], block_size: int) -> None:
    data = b"".join(parts)
    blocks = [data[at : at + block_size] for at in range(0, len(data), block_size)]
    hashes = b"".join(hashlib.sha256(block).digest() for block in blocks)
    assert hash_blocks(parts, block_size) == hashes == block_hashes(data, block_size)


def test_a_manifest_says_how_its_chunks_are_compressed() -> None:
    compressed = replace(LAYOUT, compression=Compression("bf16"))
    arrays = finite_arrays(SPEC, 1)
    files = [b"".join(encode_file(compressed, k, arrays)) for k in range(len(compressed.chunks))]
    manifest = make_manifest(
        layout=compressed,
        swarm=SWARM,
        round=3,
        owner=PeerId(OWNER.peer_id),
        base_hash=b"\x02" * 32,
        num_samples=10,
        sizes=[len(file) for file in files],
        ranks=range(len(files)),
        blocks=[block_hashes(file, compressed.block_size) for file in files],
        sign=OWNER.sign,
    )
    assert manifest.header.compression == "bf16"
    assert decode(manifest.encode(), compressed) == manifest
    with pytest.raises(RemoteProtocolError, match="compressed by bf16, the swarm agreed on none"):
        decode(manifest.encode())
    with pytest.raises(RemoteProtocolError, match="compressed by none, the swarm agreed on bf16"):
        decode(MANIFEST.encode(), compressed)
    larger = [msgspec.structs.replace(entry, size=entry.size + 1) for entry in manifest.entries]
    header = msgspec.structs.replace(
        manifest.header, payload_bytes=manifest.header.payload_bytes + len(larger)
    )
    with pytest.raises(RemoteProtocolError, match="chunk 0 claims"):
        decode(signed_as_it_is(header, msgspec.msgpack.encode(larger)), compressed)


def test_none_is_not_written_out() -> None:
    header = MANIFEST.header
    raw = msgspec.msgpack.encode(msgspec.structs.astuple(header))
    with pytest.raises(RemoteProtocolError, match="canonical"):
        decode_signed_header(
            raw,
            OWNER.sign(SIGNING_CONTEXT + raw),
            swarm=SWARM,
            verify=verify,
            max_num_samples=MAX_SAMPLES,
        )
