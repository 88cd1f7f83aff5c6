"""What members sign about themselves and about each other: docs/specs/membership.md in code.

A member alone says where it is, since when it takes part and that it has left; anybody may carry
the statement on, nobody can change it. Others can only say that they no longer hear from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import msgspec

from p2pfl_torrent.core.errors import LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.manifest import MAX_ROUND, MAX_SIGNATURE_BYTES, Hash
from p2pfl_torrent.core.messages import MAX_RECORD_BYTES
from p2pfl_torrent.core.peers import MAX_PEER_ID, PeerId, Sign, Verify

VERSION = 1
SIGNING_CONTEXT = b"p2pfl-torrent member statement v1\x00"
MAX_ADDRS = 16  # a machine with several networks, each over IPv4 and IPv6
MAX_ADDR = 256  # characters; a relayed address with two peer ids has some 180
MAX_INCARNATION = 1 << 53  # what every msgpack reader can hold; a change each millisecond for ever
MAX_STATEMENTS = 4096  # in one message
MAX_BATCH_BYTES = 1 << 20  # of statements in one message: those of 3,000 members with two addresses
FINGERPRINT_BYTES = 8  # finding a second statement with the same one takes 2^64 hashes

JOINING, ACTIVE, LEFT = range(3)  # a record's status

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_PEER_ID)]
Incarnation = Annotated[int, msgspec.Meta(ge=1, le=MAX_INCARNATION)]


class MemberRecord(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """What a peer says of itself; its newest incarnation replaces what it said before.

    Attributes:
        swarm: the genesis hash.
        status: JOINING (here, not waited for), ACTIVE (a member) or LEFT.
        joined_round: the first round in which it is waited for; 0 unless it ever was ACTIVE.
        addrs: multiaddrs where it can be dialled, best first.
    """

    version: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]
    swarm: Hash
    peer: Name
    incarnation: Incarnation
    status: Annotated[int, msgspec.Meta(ge=JOINING, le=LEFT)]
    joined_round: Annotated[int, msgspec.Meta(ge=0, le=MAX_ROUND)]
    addrs: Annotated[
        tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ADDR, pattern=r"^/")], ...],
        msgspec.Meta(max_length=MAX_ADDRS),
    ]


class Suspicion(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A witness no longer hears the subject, nor could it reach it when it tried.

    Void once the subject's record has a higher incarnation, which is how the subject refutes it.
    """

    version: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]
    swarm: Hash
    subject: Name
    incarnation: Incarnation
    witness: Name


Statement = MemberRecord | Suspicion


class _Wire(msgspec.Struct, frozen=True, array_like=True):
    raw: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]
    signature: Annotated[bytes, msgspec.Meta(max_length=MAX_SIGNATURE_BYTES)]


@dataclass(frozen=True)
class Signed:
    """A statement as its author signed it; not checked until ``check`` has passed it."""

    statement: Statement
    raw: bytes
    signature: bytes

    @cached_property
    def fingerprint(self) -> bytes:
        """Eight bytes that stand for it when two peers compare what they know."""
        return hashlib.sha256(self.raw).digest()[:FINGERPRINT_BYTES]

    @property
    def author(self) -> PeerId:
        """The peer that has to have signed it."""
        said = self.statement
        return PeerId(said.peer if isinstance(said, MemberRecord) else said.witness)

    @property
    def size(self) -> int:
        """Bytes it takes in a batch, at most."""
        return len(self.raw) + len(self.signature) + 7


_encode = msgspec.msgpack.Encoder().encode
_decode_batch = msgspec.msgpack.Decoder(
    Annotated[tuple[_Wire, ...], msgspec.Meta(max_length=MAX_STATEMENTS)]
).decode
_decode_statement = msgspec.msgpack.Decoder(Statement).decode


def sign_statement(statement: Statement, sign: Sign) -> Signed:
    """A statement in canonical bytes with its author's signature."""
    raw = _encode(statement)
    return Signed(statement, raw, sign(SIGNING_CONTEXT + raw))


def sign_record(
    peer: PeerId,
    swarm: bytes,
    incarnation: int,
    status: int,
    joined_round: int,
    addrs: Sequence[str],
    sign: Sign,
) -> Signed:
    """The record of a peer; addresses that are too long or too many are left out, the last first.

    Raises:
        LocalProtocolError: an address that is no multiaddr.
    """
    if any(not addr.startswith("/") for addr in addrs):
        raise LocalProtocolError(f"addresses must be multiaddrs, which begin with /: {addrs}")
    kept = tuple(addr for addr in addrs if len(addr) <= MAX_ADDR)[:MAX_ADDRS]
    while True:
        record = MemberRecord(VERSION, swarm, peer, incarnation, status, joined_round, kept)
        signed = sign_statement(record, sign)
        if len(encode_batch([signed])) <= MAX_RECORD_BYTES or not kept:
            return signed
        kept = kept[:-1]


def encode_batch(statements: Iterable[Signed]) -> bytes:
    """Statements as one message."""
    return _encode([_Wire(signed.raw, signed.signature) for signed in statements])


def decode_batch(data: bytes, swarm: bytes) -> list[Signed]:
    """Statements sent by another peer, typed and bounded, signatures not yet checked.

    Raises:
        RemoteProtocolError: malformed, too many, not canonical, or about another swarm.
    """
    if not data:
        return []
    if len(data) > MAX_BATCH_BYTES:
        raise RemoteProtocolError(f"{len(data)} bytes of member statements")
    try:
        return [_decode_one(wire, swarm) for wire in _decode_batch(data)]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"malformed member statement ({error})") from error


def _decode_one(wire: _Wire, swarm: bytes) -> Signed:
    statement: Statement = _decode_statement(wire.raw)
    if _encode(statement) != wire.raw:
        raise RemoteProtocolError("member statement is not in canonical form")
    if statement.swarm != swarm:
        raise RemoteProtocolError("member statement of another swarm")
    if isinstance(statement, Suspicion) and statement.subject == statement.witness:
        raise RemoteProtocolError("a peer that suspects itself")
    return Signed(statement, wire.raw, wire.signature)


def check(signed: Signed, verify: Verify) -> None:
    """Raises RemoteProtocolError unless the statement's author signed it."""
    if not verify(signed.author, SIGNING_CONTEXT + signed.raw, signed.signature):
        raise RemoteProtocolError(f"member statement not signed by {signed.author}")
