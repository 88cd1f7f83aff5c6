"""When a round is over here, and what then counts: pure functions over what is known."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass
from typing import Protocol

from p2pfl_torrent.core.aggregation import discount
from p2pfl_torrent.core.events import Count, Fill
from p2pfl_torrent.core.genesis import RoundTerms
from p2pfl_torrent.core.ledger import KnownUpdate, Ledger
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.rounds import quorum

FROM_BEFORE = ("last", "recycle")  # fill rules that take an owner's older chunk
SMALLEST_FACTOR = 2.0**-40  # of a fill's weight: next to fresh values nothing, alone everything


class Sources(Protocol):
    """What the closing rule asks the picker."""

    def bytes_verified(self, update: UpdateId) -> int:
        """Verified bytes of an update that is being fetched."""
        ...

    def missing_available(self, update: UpdateId) -> bool:
        """Whether some holder has a chunk of it that is missing here."""
        ...


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a round is at one moment.

    Attributes:
        waiting_for: live members expected to contribute whose update is not complete here.
        unannounced: whether one of them has published nothing yet that is known here.
        lacking: whether any countable update is incomplete.
        verified, announced: bytes of the countable updates of others.
        obtainable: bytes missing of those updates of which a holder has something that is missing.
        viable: whether the critical chunks of a quorum of this round's updates are here, the own
            one included.
    """

    waiting_for: tuple[PeerId, ...]
    unannounced: bool
    lacking: bool
    verified: int
    announced: int
    obtainable: int
    viable: bool

    @property
    def completeness(self) -> float:
        """Verified over announced bytes; 1 when nothing was announced."""
        return self.verified / self.announced if self.announced else 1.0


def standing(
    *,
    local: PeerId,
    round: int,
    terms: RoundTerms,
    ledger: Ledger,
    sources: Sources,
    live: Mapping[PeerId, int],
) -> Standing:
    """Where the round stands; ``live`` maps each member waited for to the round it is so from."""
    lacking = False
    verified = announced = obtainable = 0
    viable = 0
    for known in ledger.countable(round, terms.max_staleness):
        viable += known.manifest.round == round and not known.critical_lacking
        if known.manifest.owner == local:
            continue
        total = known.bytes_wanted
        announced += total
        if known.is_here:
            verified += total
            continue
        lacking = True
        here = min(total, sources.bytes_verified(known.manifest.update))
        verified += here
        if sources.missing_available(known.manifest.update):
            obtainable += total - here
    waiting_for = tuple(
        member
        for member, since in sorted(live.items())
        if member != local and since <= round and not _complete(ledger, member, round)
    )
    unannounced = any(ledger.update_of(member, round) is None for member in waiting_for)
    expected = sum(since <= round for since in live.values())
    return Standing(
        waiting_for,
        unannounced,
        lacking,
        verified,
        announced,
        obtainable,
        viable=viable >= quorum(terms, expected),
    )


def _complete(ledger: Ledger, owner: PeerId, round: int) -> bool:
    """Whether an owner's part of the round is done: its update here, or excluded for lying."""
    if ledger.equivocated(owner, round):
        return True
    known = ledger.update_of(owner, round)
    return known is not None and known.is_here


@dataclass(frozen=True, slots=True)
class Window:
    """The exchange window of a round at one moment, and what its holders bring in it.

    Attributes:
        left: seconds to the deadline, None before one is set.
        extension: seconds by which it may still be extended; 0 where it was.
        rate: bytes per second that all holders together were measured to bring.
        settled: whether nothing more has become available for a while.
    """

    left: float | None
    extension: float
    rate: float
    settled: bool

    @property
    def passed(self) -> bool:
        """Whether the deadline is over."""
        return self.left is not None and self.left <= 0.0


def verdict(
    state: Standing, window: Window, min_completion: float, is_hopeless: Callable[[], bool]
) -> str | None:
    """What closes the round now: "complete", "settled" or "deadline"; "extend"; or None yet.

    Args:
        min_completion: the completeness for which the window may be extended, once.
        is_hopeless: whether no missing chunk can come by the deadline any more.
    """
    if not state.waiting_for and not state.lacking:
        return "complete"
    if window.passed:
        return "extend" if worth_extending(state, window, min_completion) else "deadline"
    if not state.waiting_for and not state.obtainable and window.settled:
        return "settled"
    if not state.lacking or state.unannounced or not is_hopeless():
        return None
    return None if worth_extending(state, window, min_completion) else "deadline"


def worth_extending(state: Standing, window: Window, min_completion: float) -> bool:
    """Whether an extension is expected to reach the completeness that is wanted, and is needed."""
    if not window.extension or state.viable or state.completeness >= min_completion:
        return False
    more = min(state.obtainable, window.rate * window.extension)
    return state.verified + more >= min_completion * state.announced


def predicted_miss(state: Standing, window: Window) -> float:
    """Share of what is missing that will not come by the deadline at the measured rates."""
    missing = state.announced - state.verified
    if window.left is None or missing <= 0 or window.rate <= 0.0:
        return 0.0
    return 1.0 - min(1.0, window.rate * max(0.0, window.left) / missing)


def counts(
    *,
    local: PeerId,
    round: int,
    terms: RoundTerms,
    ledger: Ledger,
    dead: Collection[PeerId],
    weight: Callable[[PeerId, int], float] = lambda owner, num_samples: float(num_samples),
) -> tuple[Count, ...]:
    """What goes into the aggregate, in canonical order.

    An update of this round counts with the chunks that are here, its missing ones filled with the
    owner's last received if the swarm agreed on that. An update of which nothing is here yet, or a
    late one that is still incomplete, is left for the next round while it is young enough.

    Args:
        weight: of an owner's fresh update with so many samples.
    """
    result: list[Count] = []
    counting = [
        known
        for known in ledger.countable(round, terms.max_staleness)
        if _counts(known, round - known.manifest.round, terms.max_staleness)
    ]
    fresh = {known.manifest.update for known in counting}
    for known in counting:
        header = known.manifest.header
        staleness = round - header.round
        weighs = weight(known.manifest.owner, header.num_samples) * discount(staleness)
        result.append(
            Count(
                manifest=known.manifest,
                weight=weighs,
                chunks=tuple(known.held),
                fills=_fills(known, weighs, round, terms, ledger, fresh),
                status=_status(known, staleness, known.manifest.owner in dead),
                critical=known.critical_here,
                wanted=tuple(known.wanted),
            )
        )
    return tuple(result)


def _counts(known: KnownUpdate, staleness: int, max_staleness: int) -> bool:
    """Whether an update counts now, or is left for a later round."""
    if known.held.count == 0:
        return False
    return staleness == 0 or known.is_here or staleness == max_staleness


def _fills(
    known: KnownUpdate,
    weight: float,
    round: int,
    terms: RoundTerms,
    ledger: Ledger,
    fresh: Set[UpdateId],
) -> dict[int, Fill]:
    """Chunk -> older update to take it from, but for ``fresh`` ones: those count by themselves.

    What was not wanted of this update is not missing.
    """
    if known.is_here or terms.fill not in FROM_BEFORE:
        return {}
    fills = {}
    for chunk in known.wanted:
        if chunk in known.held:
            continue
        update = ledger.fill(known.manifest.owner, chunk, round, terms.fill_max_age)
        if update is not None and update not in fresh:
            age = known.manifest.round - ledger[update].manifest.round
            fills[chunk] = Fill(update, weight * fill_factor(terms.fill_decay, age))
    return fills


def fill_factor(decay: float, age: int) -> float:
    """Share of its owner's weight that a chunk has which is ``age`` rounds older: decay^age.

    Old values pull a model back to where it was; the further, the older they are. Never zero, so
    that a chunk of which nothing else is here is still averaged over its fills.
    """
    factor = 1.0
    for _ in range(age):  # not a power: libraries round it differently
        factor = max(factor * decay, SMALLEST_FACTOR)
    return factor


def _status(known: KnownUpdate, staleness: int, dead: bool) -> str:
    if staleness:
        return "late"
    if known.is_here:
        return "complete"
    return "dead" if dead else "partial"


def too_late(ledger: Ledger, round: int, max_staleness: int) -> list[KnownUpdate]:
    """Updates that can no longer count anywhere and were not reported as dropped yet."""
    late = (
        known
        for known in ledger
        if known.counted_in is None
        and known.wanted.count
        and not known.dropped
        and known.manifest.round < round - max_staleness
    )
    return sorted(late, key=lambda known: (known.manifest.owner, known.manifest.round))


class Absences:
    """Owners without whom rounds closed, and their updates that came too late even to be known.

    An old manifest alone says nothing, since anybody may repeat one that was counted in its time:
    too late is only what no round since has counted.
    """

    def __init__(self) -> None:
        self._since: dict[PeerId, int] = {}  # members, living or given up: that bounds it
        self._dropped: set[tuple[PeerId, int]] = set()

    def came_too_late(self, owner: PeerId, round: int) -> None:
        """A checked manifest of a round that nobody is behind enough to count."""
        if round >= self._since.get(owner, round + 1):
            self._since[owner] = round + 1
            self._dropped.add((owner, round))

    def forgotten(self, known: KnownUpdate) -> None:
        """An update left the store; if it never counted, nobody has been told yet."""
        if known.counted_in is None and known.wanted.count and not known.dropped:
            self._dropped.add((known.manifest.owner, known.manifest.round))

    def closed(
        self,
        round: int,
        missing: Collection[PeerId],
        live: Collection[PeerId],
        dead: Collection[PeerId],
        counted: Collection[Count],
    ) -> list[tuple[PeerId, int]]:
        """A round closed without some members; (owner, round) of what is reported with it.

        Who is away stays so until a round counts its own update of that round: one that was given
        up and comes back is not waited for at first.
        """
        away = {*self._since, *missing, *dead}.intersection((*live, *dead))
        since = {owner: self._since.get(owner, round) for owner in away}
        for count in counted:
            owner, trained = count.manifest.owner, count.manifest.round
            if owner in since:
                since[owner] = max(since[owner], trained + 1)
                if trained == round:
                    del since[owner]
        self._since = since
        dropped, self._dropped = self._dropped, set()
        return sorted(dropped)
