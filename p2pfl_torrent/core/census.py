"""The newest statements about every member of a swarm, and how two peers make theirs equal.

Merging is idempotent and does not depend on the order of arrival: of each peer the record with the
highest incarnation stays, and of the suspicions those about that incarnation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.peers import PeerId, Verify
from p2pfl_torrent.core.statements import (
    FINGERPRINT_BYTES,
    LEFT,
    MAX_BATCH_BYTES,
    MAX_STATEMENTS,
    MemberRecord,
    Signed,
    Suspicion,
    check,
    decode_batch,
    encode_batch,
)

MAX_MEMBERS = 1024  # ever seen in one run of a swarm; nobody is forgotten to make room for others
MAX_WITNESSES = 4  # kept per subject: two decide, and two may prove to be wrong

EMPTY_DIGEST = hashlib.sha256().digest()


@dataclass(frozen=True, slots=True)
class News:
    """What a merge changed.

    Attributes:
        records: peers with a newer record, and whether they were unknown before.
        suspicions: suspicions that were not known.
    """

    records: Mapping[PeerId, bool]
    suspicions: tuple[Suspicion, ...]

    def __bool__(self) -> bool:
        return bool(self.records or self.suspicions)


class Census:
    """Statements of one swarm. Signatures are checked once, when a statement is news."""

    def __init__(self, swarm: bytes, verify: Verify) -> None:
        self.swarm = swarm
        self._verify = verify
        self._records: dict[PeerId, Signed] = {}
        self._suspicions: dict[PeerId, dict[PeerId, Signed]] = {}
        self._known: dict[bytes, Signed] = {}
        self._digest: bytes | None = EMPTY_DIGEST

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._records

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[MemberRecord]:
        for signed in self._records.values():
            yield _record(signed)

    def get(self, peer: PeerId) -> MemberRecord | None:
        """The newest record of a peer."""
        signed = self._records.get(peer)
        return None if signed is None else _record(signed)

    def record_bytes(self, peer: PeerId) -> bytes:
        """The newest record of a peer as a batch of one; empty where there is none."""
        signed = self._records.get(peer)
        return b"" if signed is None else encode_batch([signed])

    def suspects(self) -> list[PeerId]:
        """Peers whose current incarnation somebody suspects."""
        return list(self._suspicions)

    def is_suspected(self, peer: PeerId) -> bool:
        """Whether somebody suspects the peer's current incarnation."""
        return peer in self._suspicions

    def witnesses(self, subject: PeerId) -> tuple[PeerId, ...]:
        """Who suspects the subject's current incarnation, in canonical order."""
        return tuple(sorted(self._suspicions.get(subject, ())))

    def suspicion_bytes(self, subject: PeerId) -> bytes:
        """The suspicions against a subject as a batch; empty where there are none."""
        held = self._suspicions.get(subject)
        return encode_batch(held[witness] for witness in sorted(held)) if held else b""

    # --- merging -------------------------------------------------------------------------------

    def merge(self, data: bytes) -> News:
        """Take in a batch from another peer: all of it or, when it is refused, nothing.

        Raises:
            RemoteProtocolError: malformed, of another swarm, or news with a false signature.
        """
        batch = decode_batch(data, self.swarm)
        news = [signed for signed in batch if signed.fingerprint not in self._known]
        records = [signed for signed in news if isinstance(signed.statement, MemberRecord)]
        accusations = [signed for signed in news if isinstance(signed.statement, Suspicion)]
        records = [signed for signed in records if self._is_newer(signed)]
        ahead = {signed.author: _record(signed) for signed in records}
        accusations = [signed for signed in accusations if self._may_matter(signed, ahead)]
        for signed in (*records, *accusations):
            check(signed, self._verify)
        changed: dict[PeerId, bool] = {}
        for signed in records:
            known = signed.author in self._records
            if self.add(signed):
                changed.setdefault(signed.author, not known)
        added = [signed.statement for signed in accusations if self.add(signed)]
        return News(changed, tuple(said for said in added if isinstance(said, Suspicion)))

    def add(self, signed: Signed) -> bool:
        """Take in one statement whose signature is right; whether it changed anything."""
        if isinstance(signed.statement, MemberRecord):
            return self._add_record(signed)
        return self._add_suspicion(signed, signed.statement)

    def _is_newer(self, signed: Signed) -> bool:
        old = self._records.get(signed.author)
        if old is None:
            return len(self._records) < MAX_MEMBERS
        new_at, old_at = _record(signed).incarnation, _record(old).incarnation
        # Two records of one incarnation: its author erred; all keep the same one of them.
        return (new_at, signed.raw) > (old_at, old.raw)

    def _may_matter(self, signed: Signed, ahead: Mapping[PeerId, MemberRecord]) -> bool:
        """A cheap test before the signature's: of a current incarnation, by a known member."""
        said = signed.statement
        assert isinstance(said, Suspicion)
        subject, witness = PeerId(said.subject), PeerId(said.witness)
        return (witness in self._records or witness in ahead) and any(
            record is not None and record.incarnation == said.incarnation
            for record in (self.get(subject), ahead.get(subject))
        )

    def _add_record(self, signed: Signed) -> bool:
        if not self._is_newer(signed):
            return False
        peer = signed.author
        old = self._records.get(peer)
        if old is not None:
            del self._known[old.fingerprint]
            new = _record(signed)
            # As when they come late: none holds against a later life, or somebody who has left.
            if _record(old).incarnation < new.incarnation or new.status == LEFT:
                for void in self._suspicions.pop(peer, {}).values():
                    del self._known[void.fingerprint]
        self._records[peer] = signed
        self._known[signed.fingerprint] = signed
        self._digest = None
        return True

    def _add_suspicion(self, signed: Signed, said: Suspicion) -> bool:
        subject, witness = PeerId(said.subject), PeerId(said.witness)
        record = self.get(subject)
        if (
            record is None
            or record.incarnation != said.incarnation
            or record.status == LEFT
            or witness not in self._records
        ):
            return False
        held = self._suspicions.get(subject, {})
        if witness in held or (len(held) >= MAX_WITNESSES and witness > max(held)):
            return False
        if len(held) >= MAX_WITNESSES:  # all keep the same ones: those that come first by name
            del self._known[held.pop(max(held)).fingerprint]
        self._suspicions[subject] = {**held, witness: signed}
        self._known[signed.fingerprint] = signed
        self._digest = None
        return True

    # --- comparing -----------------------------------------------------------------------------

    def digest(self) -> bytes:
        """SHA-256 of the sorted fingerprints: equal exactly where the statements are."""
        if self._digest is None:
            self._digest = hashlib.sha256(self.fingerprints()).digest()
        return self._digest

    def fingerprints(self) -> bytes:
        """The sorted fingerprints of all statements, concatenated."""
        return b"".join(sorted(self._known))

    def missing_in(self, fingerprints: bytes) -> bytes:
        """A batch of what somebody with those fingerprints lacks; what does not fit comes later.

        Raises:
            RemoteProtocolError: they are not fingerprints.
        """
        if len(fingerprints) % FINGERPRINT_BYTES:
            raise RemoteProtocolError(f"fingerprints of {len(fingerprints)} bytes")
        theirs = {
            fingerprints[at : at + FINGERPRINT_BYTES]
            for at in range(0, len(fingerprints), FINGERPRINT_BYTES)
        }
        chosen: list[Signed] = []
        room = MAX_BATCH_BYTES - 16
        for signed in self._in_order():
            if signed.fingerprint in theirs:
                continue
            if signed.size > room or len(chosen) == MAX_STATEMENTS:
                break
            room -= signed.size
            chosen.append(signed)
        return encode_batch(chosen) if chosen else b""

    def _in_order(self) -> Iterator[Signed]:
        """Records before the suspicions, which mean nothing without them."""
        yield from self._records.values()
        for held in self._suspicions.values():
            yield from held.values()


def _record(signed: Signed) -> MemberRecord:
    assert isinstance(signed.statement, MemberRecord)
    return signed.statement
