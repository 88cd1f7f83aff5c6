"""The metainfo of one update, signed by its owner: what a relay may carry but not change.

A manifest is a small signed header and a chunk table whose hash the header holds. The header
alone attests an owner's round, base and sample count; the table is needed to fetch chunks.
docs/specs/manifest.md is the wire form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, NewType, TypeVar

import msgspec

from p2pfl_torrent.core.chunking import Layout, TensorSlice
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.peers import MAX_PEER_ID, PeerId, Sign, Verify

VERSION = 1
HASH_BYTES = 32
MAX_ROUND = (1 << 32) - 1
MAX_HEADER_BYTES = 512  # today's is about 220
MAX_COMPRESSION = 64  # the longest name has some 30 characters
MAX_SIGNATURE_BYTES = 512  # Ed25519: 64; an RSA-4096 key would need 512
SIGNING_CONTEXT = b"p2pfl-torrent manifest v1\x00"

UpdateId = NewType("UpdateId", bytes)
"""SHA-256 of a manifest's header bytes; names the update on the wire."""

Hash = Annotated[bytes, msgspec.Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]


class ManifestHeader(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the owner signs.

    Attributes:
        swarm: the genesis hash.
        round: the round this update was trained in, from 1.
        base_hash: model_hash of the round-start model it was trained from, which is the owner's
            aggregate of the round before.
        num_samples: training samples behind the update, its weight in the average.
        payload_bytes: bytes of all chunk files.
        table_hash: SHA-256 of the encoded chunk table.
        compression: ``Compression.name`` of the chunk files; not encoded where it is ``none``.
    """

    version: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]
    swarm: Hash
    round: Annotated[int, msgspec.Meta(ge=1, le=MAX_ROUND)]
    owner: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_PEER_ID)]
    base_hash: Hash
    num_samples: Annotated[int, msgspec.Meta(ge=1, le=(1 << 53))]
    payload_bytes: Annotated[int, msgspec.Meta(ge=1)]
    table_hash: Hash
    compression: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_COMPRESSION)] = "none"

    def encode(self) -> bytes:
        """The bytes that are signed."""
        values = msgspec.structs.astuple(self)
        return msgspec.msgpack.encode(values[:-1] if self.compression == "none" else values)


class ChunkEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One chunk of an update.

    Attributes:
        slices: what it holds; must be those of the swarm's layout.
        size: bytes of its safetensors file.
        rank: importance within this update, 0 (least) to number of chunks - 1; a permutation.
        blocks: the SHA-256 of each block, concatenated.
    """

    slices: tuple[TensorSlice, ...]
    size: Annotated[int, msgspec.Meta(ge=1)]
    rank: Annotated[int, msgspec.Meta(ge=0)]
    blocks: bytes

    def block_hash(self, block: int) -> bytes:
        """SHA-256 of one block."""
        return self.blocks[block * HASH_BYTES : (block + 1) * HASH_BYTES]

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.blocks) // HASH_BYTES


class _Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    header: Annotated[bytes, msgspec.Meta(max_length=MAX_HEADER_BYTES)]
    signature: Annotated[bytes, msgspec.Meta(max_length=MAX_SIGNATURE_BYTES)]
    table: bytes


@dataclass(frozen=True)
class SignedHeader:
    """A header as its owner signed it."""

    header: ManifestHeader
    raw: bytes
    signature: bytes

    @cached_property
    def update(self) -> UpdateId:
        """Identity of the update."""
        return UpdateId(hashlib.sha256(self.raw).digest())

    @property
    def owner(self) -> PeerId:
        """The peer that trained and signed it."""
        return PeerId(self.header.owner)

    @property
    def round(self) -> int:
        """The round it was trained in."""
        return self.header.round


@dataclass(frozen=True)
class Manifest:
    """A signed header with its chunk table, checked.

    Attributes:
        wire: both and the signature as they are sent; each fetcher gets these bytes.
    """

    signed: SignedHeader
    entries: tuple[ChunkEntry, ...]
    wire: bytes

    @property
    def update(self) -> UpdateId:
        """Identity of the update."""
        return self.signed.update

    @property
    def owner(self) -> PeerId:
        """The peer that trained and signed it."""
        return self.signed.owner

    @property
    def round(self) -> int:
        """The round it was trained in."""
        return self.signed.round

    @property
    def header(self) -> ManifestHeader:
        """The signed statement."""
        return self.signed.header

    def encode(self) -> bytes:
        """The wire form: header, signature and table."""
        return self.wire

    def block_range(self, chunk: int, block: int, count: int, block_size: int) -> tuple[int, int]:
        """Offset and bytes of ``count`` blocks inside a chunk's file."""
        offset = block * block_size
        return offset, min(count * block_size, self.entries[chunk].size - offset)


def max_wire_bytes(layout: Layout) -> int:
    """Bound on an encoded manifest of this layout: every chunk as large as it may be."""
    blocks = sum(layout.blocks_of(layout.file_bounds(chunk.index)[1]) for chunk in layout.chunks)
    slices = sum(len(chunk.slices) for chunk in layout.chunks)
    return 2048 + HASH_BYTES * blocks + 24 * slices + 32 * len(layout.chunks)


def block_hashes(data: bytes | memoryview, block_size: int) -> bytes:
    """The concatenated SHA-256 of each block of a chunk's file."""
    return hash_blocks((data,), block_size)


def hash_blocks(parts: Iterable[bytes | memoryview], block_size: int) -> bytes:
    """``block_hashes`` of a file that comes in parts."""
    hashes: list[bytes] = []
    block, room = hashlib.sha256(), block_size
    for part in parts:
        view = memoryview(part)
        while view:
            block.update(view[:room])
            taken = min(room, len(view))
            view, room = view[taken:], room - taken
            if not room:
                hashes.append(block.digest())
                block, room = hashlib.sha256(), block_size
    if room < block_size:
        hashes.append(block.digest())
    return b"".join(hashes)


def make_manifest(
    *,
    layout: Layout,
    swarm: bytes,
    round: int,
    owner: PeerId,
    base_hash: bytes,
    num_samples: int,
    sizes: Sequence[int],
    ranks: Sequence[int],
    blocks: Sequence[bytes],
    sign: Sign,
) -> Manifest:
    """Describe and sign an update; ``blocks[k]`` as ``block_hashes`` gives them for chunk k."""
    entries = tuple(
        ChunkEntry(chunk.slices, size, rank, hashes)
        for chunk, size, rank, hashes in zip(layout.chunks, sizes, ranks, blocks, strict=True)
    )
    table = msgspec.msgpack.encode(entries)
    header = ManifestHeader(
        version=VERSION,
        swarm=swarm,
        round=round,
        owner=owner,
        base_hash=base_hash,
        num_samples=num_samples,
        payload_bytes=sum(sizes),
        table_hash=hashlib.sha256(table).digest(),
        compression=layout.compression.name,
    )
    raw = header.encode()
    signed = SignedHeader(header, raw, sign(SIGNING_CONTEXT + raw))
    wire = msgspec.msgpack.encode(_Wire(raw, signed.signature, table))
    return Manifest(signed, entries, wire)


_T = TypeVar("_T")
_wire_decoder = msgspec.msgpack.Decoder(_Wire)
_header_decoder = msgspec.msgpack.Decoder(ManifestHeader)
_table_decoder = msgspec.msgpack.Decoder(tuple[ChunkEntry, ...])


def _decode(
    decoder: msgspec.msgpack.Decoder[_T],
    data: bytes,
    what: str,
    encode: Callable[[_T], bytes] = msgspec.msgpack.encode,
) -> _T:
    """What the bytes say, if they are the one canonical way to say it."""
    try:
        value = decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"malformed {what} ({error})") from error
    if encode(value) != data:
        raise RemoteProtocolError(f"{what} is not in canonical form")
    return value


def decode_signed_header(
    raw: bytes, signature: bytes, *, swarm: bytes, verify: Verify, max_num_samples: int
) -> SignedHeader:
    """Check a header that came from another peer.

    Raises:
        RemoteProtocolError: malformed, not canonical, of another swarm, badly signed, or with
            more samples than the genesis allows.
    """
    if len(raw) > MAX_HEADER_BYTES:
        raise RemoteProtocolError("manifest header too long")
    header = _decode(_header_decoder, raw, "manifest header", ManifestHeader.encode)
    if header.swarm != swarm:
        raise RemoteProtocolError("manifest of another swarm")
    if header.num_samples > max_num_samples:
        raise RemoteProtocolError(f"num_samples {header.num_samples} above the agreed bound")
    if not verify(PeerId(header.owner), SIGNING_CONTEXT + raw, signature):
        raise RemoteProtocolError(f"manifest not signed by its owner {header.owner}")
    return SignedHeader(header, raw, signature)


def decode_manifest(
    data: bytes, *, layout: Layout, swarm: bytes, verify: Verify, max_num_samples: int
) -> Manifest:
    """Check a manifest that came from another peer against the swarm's layout.

    Raises:
        RemoteProtocolError: as ``decode_signed_header``, or the table is not the signed one, or
            its chunks are not those of the layout.
    """
    if len(data) > max_wire_bytes(layout):
        raise RemoteProtocolError(f"manifest of {len(data)} bytes")
    wire = _decode(_wire_decoder, data, "manifest")
    signed = decode_signed_header(
        wire.header, wire.signature, swarm=swarm, verify=verify, max_num_samples=max_num_samples
    )
    if hashlib.sha256(wire.table).digest() != signed.header.table_hash:
        raise RemoteProtocolError("chunk table is not the one its owner signed")
    if signed.header.compression != layout.compression.name:
        raise RemoteProtocolError(
            f"chunks compressed by {signed.header.compression}, the swarm agreed on "
            f"{layout.compression.name}"
        )
    entries = _decode(_table_decoder, wire.table, "chunk table")
    _check_entries(entries, layout, signed.header.payload_bytes)
    return Manifest(signed, entries, data)


def update_of(data: bytes) -> UpdateId | None:
    """Which update an encoded manifest claims to describe, unchecked; None for other bytes."""
    try:
        return UpdateId(hashlib.sha256(_wire_decoder.decode(data).header).digest())
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def encode_header_gossip(signed: SignedHeader) -> bytes:
    """What is gossiped of a manifest too long for gossip: an encoded manifest without its table."""
    return msgspec.msgpack.encode(_Wire(signed.raw, signed.signature, b""))


def decode_manifest_gossip(
    data: bytes, *, swarm: bytes, verify: Verify, max_num_samples: int
) -> SignedHeader | None:
    """The checked header of a gossiped manifest that lacks its table, None of one that has it.

    Raises:
        RemoteProtocolError: malformed, or as ``decode_signed_header``. The caller bounds the bytes.
    """
    wire = _decode(_wire_decoder, data, "manifest gossip")
    if wire.table:
        return None
    return decode_signed_header(
        wire.header, wire.signature, swarm=swarm, verify=verify, max_num_samples=max_num_samples
    )


def _check_entries(entries: tuple[ChunkEntry, ...], layout: Layout, payload: int) -> None:
    if len(entries) != len(layout.chunks):
        raise RemoteProtocolError(
            f"{len(entries)} chunks, the swarm agreed on {len(layout.chunks)}"
        )
    for entry, chunk in zip(entries, layout.chunks, strict=True):
        if entry.slices != chunk.slices:
            raise RemoteProtocolError(f"chunk {chunk.index} has other slices than agreed")
        least, most = layout.file_bounds(chunk.index)
        if not least <= entry.size <= most:
            raise RemoteProtocolError(f"chunk {chunk.index} claims {entry.size} bytes")
        if len(entry.blocks) != HASH_BYTES * layout.blocks_of(entry.size):
            raise RemoteProtocolError(f"chunk {chunk.index} has a wrong number of block hashes")
    if sorted(entry.rank for entry in entries) != list(range(len(entries))):
        raise RemoteProtocolError("importance ranks are not a permutation")
    if sum(entry.size for entry in entries) != payload:
        raise RemoteProtocolError("payload_bytes is not the sum of the chunks")
