"""Who is a member of the swarm, alive, suspected, dead or gone: one peer's view, sans-IO.

A member is given up when two members say, under their signatures, that they can no longer reach
it; one is enough where nobody else is left who could look. Between enough witnesses and the verdict
the subject has a moment to refute, by a record with a higher incarnation. Who hears from a subject
itself after the witnesses spoke passes no verdict, but tells it what is said about it.

Methods return the effects that the shell has to apply, in order; none of them blocks.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from p2pfl_torrent.core.census import Census, News
from p2pfl_torrent.core.encounters import Address, Encounters
from p2pfl_torrent.core.errors import LocalProtocolError
from p2pfl_torrent.core.liveness import Liveness, LivenessPolicy
from p2pfl_torrent.core.membership_effects import (
    Changed,
    Gossip,
    Member,
    MembershipEffect,
    Probe,
    RosterChanged,
    SyncWith,
)
from p2pfl_torrent.core.peers import PeerId, Sign, Verify
from p2pfl_torrent.core.reports import MemberChanged
from p2pfl_torrent.core.statements import (
    ACTIVE,
    JOINING,
    LEFT,
    MAX_INCARNATION,
    VERSION,
    MemberRecord,
    Suspicion,
    encode_batch,
    sign_record,
    sign_statement,
)
from p2pfl_torrent.core.topology import drawn
from p2pfl_torrent.core.verdicts import NUM_CONFIRMERS, Case, Verdicts

NUM_TOLD = 2  # members told of one's own news directly: the suspect may be all that gossip ran over


class Membership:
    """The membership machine of one peer in one swarm; it begins as a JOINING peer.

    Attributes:
        local: this peer.
        policy: the failure detector's times.
        census: all statements known.
    """

    def __init__(
        self,
        *,
        local: PeerId,
        addrs: Sequence[str],
        swarm: bytes,
        seed: int,
        sign: Sign,
        verify: Verify,
        rng: random.Random,
        now: float,
        policy: LivenessPolicy | None = None,
        rendezvous: Sequence[Address] = (),
    ) -> None:
        """Begin with nobody else known.

        Args:
            rendezvous: bootstrap peers with their addresses.
        """
        self.local = local
        self.policy = policy or LivenessPolicy()
        self.census = Census(swarm, verify)
        self._liveness = Liveness(self.policy)
        self._verdicts = Verdicts(local, self.census)
        others = [at for at in rendezvous if at[0] != local]
        self._encounters = Encounters(self.policy, others, rng, now)
        self._seed = seed
        self._sign = sign
        self._round = 0
        self._standing: dict[PeerId, str] = {}
        self._announced: set[PeerId] = set()
        self._called: dict[PeerId, float] = {}  # to confirm a suspicion, and silent since then
        self._roster: tuple[Member, ...] = ()
        self._told_roster: tuple[Member, ...] = self._roster
        self._roster_is_old = False
        self._last_tick = now
        self._accused = False
        self._out_at = float("-inf")
        self._refuted_at = float("-inf")
        self._effects: list[MembershipEffect] = []
        self._own = MemberRecord(VERSION, swarm, local, 1, JOINING, 0, tuple(addrs))
        self._say()
        self._effects.clear()  # nobody is there yet to be told

    # --- queries -------------------------------------------------------------------------------

    def roster(self) -> tuple[Member, ...]:
        """The live members in join order; suspected ones are among them, and this peer if ready."""
        if self._roster_is_old:
            live = [record for record in self.census if self._verdicts.is_member(record)]
            live.sort(key=lambda said: (said.joined_round, drawn(self._seed, PeerId(said.peer))))
            self._roster = tuple(
                Member(PeerId(said.peer), said.addrs, said.joined_round) for said in live
            )
            self._roster_is_old = False
        return self._roster

    def dead(self) -> frozenset[PeerId]:
        """Members that were given up."""
        return self._that_are("dead")

    def left(self) -> frozenset[PeerId]:
        """Members that said good-bye."""
        return self._that_are("left")

    def joining(self) -> frozenset[PeerId]:
        """Peers that are here but not ready yet."""
        return self._that_are("joining")

    def suspected(self) -> frozenset[PeerId]:
        """Live members that somebody suspects."""
        return self._that_are("suspected")

    def addrs(self, peer: PeerId) -> tuple[str, ...]:
        """Where a peer says it can be dialled; empty where nothing is known."""
        record = self.census.get(peer)
        return record.addrs if record is not None else ()

    def record(self) -> bytes:
        """This peer's own signed record, for a Hello; ``received`` reads it."""
        return self.census.record_bytes(self.local)

    def statements(self) -> bytes:
        """All statements, for a joiner."""
        return self.census.missing_in(b"")

    def digest(self) -> bytes:
        """Equal at two peers exactly where their statements are."""
        return self.census.digest()

    # --- what the local peer does --------------------------------------------------------------

    def set_ready(self, joined_round: int) -> list[MembershipEffect]:
        """This peer takes part from ``joined_round`` on, from 1; again after catching up."""
        if joined_round < 1:
            raise LocalProtocolError(f"members join from round 1 on, not {joined_round}")
        self._say(status=ACTIVE, joined_round=joined_round)
        self._tell_some(self.record())
        return self._done()

    def set_addrs(self, addrs: Sequence[str]) -> list[MembershipEffect]:
        """This peer can be dialled elsewhere from now on."""
        if tuple(addrs) != self._own.addrs:
            self._say(addrs=tuple(addrs))
        return self._done()

    def leave(self) -> list[MembershipEffect]:
        """Say good-bye; from now on the machine neither accuses nor defends."""
        if self._own.status != LEFT:
            self._say(status=LEFT)
            self._tell_some(self.record())
        return self._done()

    def round_changed(self, round: int) -> None:
        """This peer is in that round now, 0 before the first."""
        self._round = round

    def watch(self, neighbours: Iterable[PeerId], now: float) -> None:
        """Only these peers' silence is a question from now on."""
        self._liveness.watch((peer for peer in neighbours if peer != self.local), now)

    # --- what happens to it --------------------------------------------------------------------

    def heard(self, peer: PeerId, now: float, round_trip: float | None = None) -> None:
        """Bytes came from a peer; cheap, to be called for each read.

        Args:
            round_trip: seconds, where they answered a ping.
        """
        if peer in self.census:
            self._liveness.heard(peer, now, round_trip)

    def edge_lost(self, peer: PeerId) -> list[MembershipEffect]:
        """The connection to a neighbour broke, or could not be made."""
        if self._own.status != LEFT and self._liveness.edge_lost(peer):
            self._look(peer)
        return self._done()

    def probed(self, peer: PeerId, ok: bool, now: float) -> list[MembershipEffect]:
        """The outcome of a Probe."""
        self._liveness.end_probe(peer, now)
        if ok:
            self.heard(peer, now)
        elif self._own.status == ACTIVE and self._is_gone(peer, now):
            self._suspect(peer, now)
        return self._done()

    def received(self, data: bytes, sender: PeerId, now: float) -> list[MembershipEffect]:
        """A batch of statements, whatever way it came.

        Raises:
            RemoteProtocolError: malformed, badly signed, or of another swarm; nothing is taken.
        """
        news = self.census.merge(data)
        if news:
            self._take(news, sender, now)
        return self._done()

    def tick(self, now: float) -> list[MembershipEffect]:
        """Time has passed; wanted each ``policy.tick`` seconds."""
        self._notice_freeze(now)
        self._last_tick = now
        if self._own.status == LEFT:
            return self._done()
        for peer in list(self._liveness.questionable(now)):
            if self._verdicts.is_here(peer):
                self._look(peer)
        for subject in sorted(self._verdicts.cases):
            self._advance(subject, self._verdicts.cases[subject], now)
        if self._verdicts.out_of_contact():
            self._out_at = now
        if self._accused:
            self._refute(now)
        if self._encounters.due(now, started=self._round > 0):
            self._meet_somebody()
        return self._done()

    # --- the own record ------------------------------------------------------------------------

    def _say(
        self,
        *,
        status: int | None = None,
        joined_round: int | None = None,
        addrs: tuple[str, ...] | None = None,
    ) -> None:
        """Replace the own record: what is not given stays, the incarnation rises."""
        own, known = self._own, self.census.get(self.local)
        incarnation = 1 if known is None else max(own.incarnation, known.incarnation) + 1
        if incarnation > MAX_INCARNATION:
            raise LocalProtocolError("no incarnation is left for another record")
        signed = sign_record(
            self.local,
            self.census.swarm,
            incarnation,
            own.status if status is None else status,
            own.joined_round if joined_round is None else joined_round,
            own.addrs if addrs is None else addrs,
            self._sign,
        )
        self.census.add(signed)
        said = signed.statement
        assert isinstance(said, MemberRecord)
        self._own = said
        self._accused = False
        self._effects.append(Gossip(self.record()))
        self._reconsider(self.local)

    def _refute(self, now: float) -> None:
        """I am here. Who was out while the others gave it up takes the last place again."""
        if now < self._refuted_at + self.policy.refute_interval:
            return
        steps_back = (
            self._own.status == ACTIVE
            and self._verdicts.enough_witnesses(self.local)
            and now <= self._out_at + self.policy.longest
        )
        self._say(joined_round=self._round + 1 if steps_back else None)
        self._refuted_at = now
        self._tell_some(self.record())

    # --- others' statements --------------------------------------------------------------------

    def _take(self, news: News, sender: PeerId, now: float) -> None:
        for peer, is_new in news.records.items():
            if peer == self.local:  # said in an earlier life, or by a second process with our key
                self._say()
                continue
            case = self._verdicts.renewed(peer)
            unheard = case is not None and case.mine and not self._heard_since(peer, case.opened)
            self._liveness.renewed(peer, now, unheard=unheard)
            if is_new and self._verdicts.enough_witnesses(peer):
                # Decided before we came: those who could refute it had their time.
                self._verdicts.condemn(peer)
            self._reconsider(peer)
        if self._own.status == LEFT:
            return
        accused = [PeerId(said.subject) for said in news.suspicions]
        # A record may replace another of its incarnation: what was said about that one still holds.
        accused += [peer for peer in news.records if self.census.is_suspected(peer)]
        for subject in dict.fromkeys(accused):
            if subject == self.local:
                if self.census.is_suspected(subject):  # still, after what was said above
                    self._accused = True
                    self._sync(sender)
            elif self._verdicts.is_here(subject):
                case = self._verdicts.cases.setdefault(subject, Case(opened=now))
                if self._should_look(subject, case):
                    self._look(subject)
            self._reconsider(subject)
        if self._accused:
            self._refute(now)

    # --- suspicion and verdict -----------------------------------------------------------------

    def _suspect(self, subject: PeerId, now: float) -> None:
        record = self.census.get(subject)
        if record is None or self.local in self.census.witnesses(subject):
            return
        said = Suspicion(VERSION, self.census.swarm, subject, record.incarnation, self.local)
        signed = sign_statement(said, self._sign)
        case = self._verdicts.cases.setdefault(subject, Case(opened=now))
        case.mine = True
        if self.census.add(signed):
            self._effects.append(Gossip(encode_batch([signed])))
            self._call_confirmers(subject, case)
        self._reconsider(subject)

    def _advance(self, subject: PeerId, case: Case, now: float) -> None:
        """Pass the verdict on a suspect when it is time, or ask for more witnesses."""
        if not self._verdicts.enough_witnesses(subject):
            case.enough_at = None
            if now >= case.opened + (case.asked + 1) * self.policy.confirm_retry:
                case.asked += 1
                if case.mine:
                    self._question_the_silent(subject, case)
                    self._call_confirmers(subject, case)
                elif self._should_look(subject, case):
                    self._look(subject)
            return
        if case.enough_at is None:
            case.enough_at = now
        if now < case.enough_at + self.policy.confirm_grace:
            return
        is_quiet = self._liveness.silence(subject, now) >= self.policy.suspect_after
        if self._heard_since(subject, case.enough_at) and not is_quiet:
            self._look(subject)  # we hear it: it shall learn what is said, and refute
            return
        self._verdicts.condemn(subject)
        self._reconsider(subject)

    def _call_confirmers(self, subject: PeerId, case: Case) -> None:
        """Tell those who are to look, directly, and some others: gossip may have run over it."""
        news = self.census.suspicion_bytes(subject)
        called = self._verdicts.confirmers(subject, case)[NUM_CONFIRMERS * case.asked :]
        for peer in called:
            if peer != self.local:
                self._sync(peer, news)
        self._tell_some(news, but={subject, *called})

    def _question_the_silent(self, subject: PeerId, case: Case) -> None:
        """Those who were called and have not been heard since may be gone themselves."""
        for peer in self._verdicts.confirmers(subject, case)[: NUM_CONFIRMERS * case.asked]:
            if peer != self.local and not self._heard_since(peer, case.opened):
                self._called[peer] = case.opened
                self._look(peer)

    def _should_look(self, subject: PeerId, case: Case) -> bool:
        if self._own.status != ACTIVE or case.mine:
            return False
        is_near = self._liveness.is_watched(subject)
        return is_near or self.local in self._verdicts.confirmers(subject, case)

    def _look(self, peer: PeerId) -> None:
        if peer in self.census and self._liveness.begin_probe(peer):
            news = self.census.suspicion_bytes(peer)
            timeout = self._liveness.probe_timeout(peer)
            self._effects.append(Probe(peer, self.addrs(peer), timeout, news))

    def _is_gone(self, peer: PeerId, now: float) -> bool:
        """Whether a failed probe is reason enough to accuse, with what else is known."""
        if not self._verdicts.is_here(peer):
            return False
        if self._liveness.is_gone(peer, now):
            return True
        called_at = self._called.pop(peer, None)
        if called_at is not None and not self._heard_since(peer, called_at):
            return True
        case = self._verdicts.cases.get(peer)
        if case is None or self._heard_since(peer, case.opened):
            return False
        is_quiet = self._liveness.silence(peer, now) >= self.policy.probe_after / 2
        return is_quiet or not self._liveness.is_watched(peer)

    def _heard_since(self, peer: PeerId, moment: float) -> bool:
        last = self._liveness.last_heard(peer)
        return last is not None and last > moment

    def _notice_freeze(self, now: float) -> None:
        """A long pause between ticks: this process stood still, and the others' time with it."""
        gap = now - self._last_tick
        if gap <= self.policy.frozen:
            return
        self._liveness.slept(gap, now)
        self._verdicts.slept(gap)
        if gap >= self.policy.suspect_after:
            self._out_at = now
        self._encounters.hurry(now)

    # --- spreading -----------------------------------------------------------------------------

    def _tell_some(self, news: bytes, but: Iterable[PeerId] = ()) -> None:
        excluded = {self.local, *but}
        others = [member.peer for member in self.roster() if member.peer not in excluded]
        for peer in self._encounters.sample(others, NUM_TOLD):
            self._sync(peer, news)

    def _sync(self, peer: PeerId, news: bytes = b"") -> None:
        timeout = self._liveness.stretched(self.policy.sync_timeout, peer)
        self._effects.append(SyncWith(peer, self.addrs(peer), timeout, news))

    def _meet_somebody(self) -> None:
        anybody = sorted(
            PeerId(said.peer)
            for said in self.census
            if said.status != LEFT and said.peer != self.local
        )
        alive = [peer for peer in anybody if self._verdicts.is_here(peer)]
        near = [peer for peer in alive if self._liveness.is_watched(peer)]
        chosen = self._encounters.choose(
            near=near, alive=alive, anybody=anybody, started=self._round > 0
        )
        if isinstance(chosen, tuple):
            self._effects.append(SyncWith(*chosen, self.policy.sync_timeout))
        elif chosen is not None:
            self._sync(chosen)

    # --- standing ------------------------------------------------------------------------------

    def _that_are(self, standing: str) -> frozenset[PeerId]:
        return frozenset(peer for peer, stands in self._standing.items() if stands == standing)

    def _reconsider(self, peer: PeerId) -> None:
        """Bring a peer's standing up to date and report what changed."""
        old, new = self._standing.get(peer, "unknown"), self._verdicts.stands(peer)
        self._standing[peer] = new
        self._roster_is_old = True
        if old == new:
            return
        if new in {"live", "suspected"} and peer not in self._announced:
            self._announced.add(peer)
            self._report(peer, "joined")
        elif new == "live":
            self._report(peer, "returned")
        if new in {"suspected", "dead", "left"} and peer in self._announced:
            self._report(peer, new)

    def _report(self, peer: PeerId, change: str) -> None:
        witnesses = self.census.witnesses(peer) if change in {"suspected", "dead"} else ()
        self._effects.append(Changed(MemberChanged(peer, change, witnesses)))

    def _done(self) -> list[MembershipEffect]:
        roster = self.roster()
        if roster is not self._told_roster:
            if roster != self._told_roster:
                self._effects.append(RosterChanged())
            self._told_roster = roster
        effects, self._effects = self._effects, []
        return effects
