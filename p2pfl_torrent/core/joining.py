"""The questions and answers of the members protocol: docs/specs/membership.md in code.

One question, one answer. ``Join`` asks a bootstrap peer, or any member, for the swarm of one's
terms; ``Sync`` makes two peers' statements equal; ``Probe`` asks whether somebody is there.
"""

from __future__ import annotations

from typing import Annotated, Protocol

import msgspec

from p2pfl_torrent.core.census import MAX_MEMBERS, MAX_WITNESSES, Census
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.genesis import MAX_GENESIS_BYTES, Genesis
from p2pfl_torrent.core.manifest import Hash
from p2pfl_torrent.core.messages import MAX_RECORD_BYTES
from p2pfl_torrent.core.statements import ACTIVE, FINGERPRINT_BYTES, LEFT, MAX_BATCH_BYTES

PROTOCOL_ID = "/p2pfl-torrent/members/1.0.0"
MAX_FINGERPRINTS = MAX_MEMBERS * (1 + MAX_WITNESSES) * FINGERPRINT_BYTES
MAX_MESSAGE = MAX_BATCH_BYTES + MAX_FINGERPRINTS + MAX_GENESIS_BYTES + 1024

GenesisBytes = Annotated[bytes, msgspec.Meta(max_length=MAX_GENESIS_BYTES)]
Batch = Annotated[bytes, msgspec.Meta(max_length=MAX_BATCH_BYTES)]
Fingerprints = Annotated[bytes, msgspec.Meta(max_length=MAX_FINGERPRINTS)]


class Join(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Which swarm has these terms?

    Attributes:
        terms: the asker's own, in canonical bytes.
        genesis: a swarm it would begin where there is none; empty where it would not.
        record: its signed record in that swarm, or empty.
    """

    terms: GenesisBytes
    genesis: GenesisBytes
    record: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Answer to Join: the swarm, and what is known of its members."""

    genesis: GenesisBytes
    statements: Batch


class Mismatch(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Answer to Join: the swarm of that name has these terms."""

    terms: GenesisBytes


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Answer to anything: no, and why, in one sentence."""

    reason: Annotated[str, msgspec.Meta(max_length=512)]


class Sync(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Let us know the same.

    Attributes:
        digest: of all statements the asker knows.
        fingerprints: of each of them; None as long as the digests may turn out to be equal.
        news: statements the other may lack.
    """

    swarm: Hash
    digest: Hash
    fingerprints: Fingerprints | None
    news: Batch


class Statements(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Answer to Sync.

    Attributes:
        digest: of all statements the answerer knows, the asker's news included.
        fingerprints: of each of them; empty where the digests are equal.
        news: what the asker lacks, if it sent its fingerprints.
    """

    digest: Hash
    fingerprints: Fingerprints
    news: Batch


class Probe(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Are you there? ``news`` is what is said against you."""

    swarm: Hash
    news: Batch


class Alive(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """Answer to Probe: my newest record."""

    record: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]


Question = Join | Sync | Probe
Answer = Welcome | Mismatch | Refused | Statements | Alive

_encode = msgspec.msgpack.Encoder().encode
_decode_question = msgspec.msgpack.Decoder(Question).decode
_decode_answer = msgspec.msgpack.Decoder(Answer).decode


class Comparable(Protocol):
    """What can be compared with another peer's statements: a Census."""

    def digest(self) -> bytes:
        """Of all statements."""
        ...

    def fingerprints(self) -> bytes:
        """Of each of them, sorted."""
        ...

    def missing_in(self, fingerprints: bytes) -> bytes:
        """A batch of those that are not among the fingerprints."""
        ...


def encode(message: Question | Answer) -> bytes:
    """A message's bytes, without the frame's length."""
    return _encode(message)


def decode_question(data: bytes | bytearray) -> Question:
    """A question; RemoteProtocolError for anything else."""
    try:
        question: Question = _decode_question(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"malformed question about members ({error})") from error
    return question


def decode_answer(data: bytes | bytearray) -> Answer:
    """An answer; RemoteProtocolError for anything else."""
    try:
        answer: Answer = _decode_answer(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"malformed answer about members ({error})") from error
    return answer


SwarmRank = tuple[bool, bool, bytes]
"""Of several swarms of the same terms the one with the lowest rank goes on."""


def swarm_rank(genesis: Genesis, census: Census) -> SwarmRank:
    """First those of whom as many are ready as round 1 waits for, then those with any member.

    Two swarms of the same terms begin where peers reach different bootstrap peers. Everybody who
    meets both decides alike.
    """
    ready = sum(record.status == ACTIVE for record in census)
    has_begun = ready >= genesis.terms.rounds.client_num
    is_empty = all(record.status == LEFT for record in census)
    return not has_begun, is_empty, genesis.swarm_id


def first_sync(swarm: bytes, census: Comparable, news: bytes) -> Sync:
    """A question of a few bytes, enough where both know the same."""
    return Sync(swarm, census.digest(), None, news)


def second_sync(swarm: bytes, census: Comparable, answer: Statements) -> Sync | None:
    """What to ask next, with what the other lacks; None where both know the same."""
    if answer.digest == census.digest():
        return None
    news = census.missing_in(answer.fingerprints)
    return Sync(swarm, census.digest(), census.fingerprints(), news)


def answer_sync(census: Comparable, sync: Sync) -> Statements:
    """The answer to a Sync whose news have been merged already."""
    if sync.digest == census.digest():
        return Statements(sync.digest, b"", b"")
    news = b"" if sync.fingerprints is None else census.missing_in(sync.fingerprints)
    return Statements(census.digest(), census.fingerprints(), news)
