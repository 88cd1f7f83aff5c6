"""Which suspicions are enough to give a member up, and who could still look at a suspect.

Two witnesses decide; one does where no other member is left that is itself beyond suspicion. A
verdict stays until the subject's next incarnation, whatever becomes of its witnesses.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from p2pfl_torrent.core.census import Census
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.statements import ACTIVE, JOINING, LEFT, MemberRecord

NUM_WITNESSES = 2
NUM_CONFIRMERS = 2  # members drawn to look at a suspect, besides its neighbours


@dataclass(slots=True)
class Case:
    """A suspicion that is neither refuted nor decided yet.

    Attributes:
        opened: when it became known here.
        enough_at: since when there are witnesses enough.
        asked: how often further members have been asked to look.
        mine: the local peer is one of the witnesses.
    """

    opened: float
    enough_at: float | None = None
    asked: int = 0
    mine: bool = False


class Verdicts:
    """Standing of every peer in the local view: unknown, joining, live, suspected, dead or left."""

    def __init__(self, local: PeerId, census: Census) -> None:
        self._local = local
        self._census = census
        self._dead: dict[PeerId, int] = {}
        self.cases: dict[PeerId, Case] = {}

    def stands(self, peer: PeerId) -> str:
        """The peer's standing now."""
        record = self._census.get(peer)
        if record is None:
            return "unknown"
        if record.status == LEFT:
            return "left"
        if self._dead.get(peer) == record.incarnation:
            return "dead"
        if record.status == JOINING:
            return "joining"
        suspected = peer != self._local and self._census.is_suspected(peer)
        return "suspected" if suspected else "live"

    def is_member(self, record: MemberRecord) -> bool:
        """Whether this is the record of a live member."""
        return record.status == ACTIVE and self._dead.get(PeerId(record.peer)) != record.incarnation

    def is_here(self, peer: PeerId) -> bool:
        """Whether the peer is neither dead nor gone, as far as is known."""
        return self.stands(peer) in {"live", "suspected", "joining"}

    def enough_witnesses(self, subject: PeerId) -> bool:
        """Whether the suspicions against a subject decide."""
        witnesses = self._census.witnesses(subject)
        if not witnesses or len(witnesses) >= NUM_WITNESSES:
            return bool(witnesses)
        return not self.judges(subject)

    def judges(self, subject: PeerId) -> list[PeerId]:
        """Members that could still look at the subject, in an order drawn for it."""
        witnesses = self._census.witnesses(subject)
        free = [
            PeerId(record.peer)
            for record in self._census
            if self.is_member(record)
            and record.peer != subject
            and record.peer not in witnesses
            and (record.peer == self._local or not self._census.is_suspected(PeerId(record.peer)))
        ]
        return sorted(free, key=lambda peer: hashlib.sha256((subject + peer).encode()).digest())

    def confirmers(self, subject: PeerId, case: Case) -> list[PeerId]:
        """Those of the judges that are to look: the first two, and two more each time."""
        return self.judges(subject)[: NUM_CONFIRMERS * (case.asked + 1)]

    def condemn(self, subject: PeerId) -> None:
        """Give a member up until its next incarnation."""
        record = self._census.get(subject)
        assert record is not None
        self._dead[subject] = record.incarnation
        self.cases.pop(subject, None)

    def renewed(self, peer: PeerId) -> Case | None:
        """A newer record of the peer: nothing that was said about it holds; its case, if any."""
        self._dead.pop(peer, None)
        return self.cases.pop(peer, None)

    def slept(self, seconds: float) -> None:
        """The local process stood still: the time to refute begins anew for everybody."""
        for case in self.cases.values():
            case.opened += seconds
            case.enough_at = None

    def out_of_contact(self) -> bool:
        """Whether most members are lost to the local peer, so that rather it was away than they."""
        if not self._dead and not self.cases:
            return False
        members = [record for record in self._census if record.status == ACTIVE]
        lost = [
            record
            for record in members
            if not self.is_member(record)
            or self._local in self._census.witnesses(PeerId(record.peer))
        ]
        return 2 * len(lost) > len(members)
