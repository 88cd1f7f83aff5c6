"""The swarm machine: one peer's part in the exchange of updates, decided without any I/O.

Fed with what happened (``events`` stimuli) and the time, it answers with what to do (effects). A
round at this machine is ``training`` until the own update is ready, ``exchanging`` until it is
closed, then ``closed`` until the shell has averaged and says that the next one begins; or it is
``missed`` until the shell has caught up with the others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.closing import (
    Absences,
    Standing,
    Window,
    counts,
    predicted_miss,
    standing,
    too_late,
    verdict,
)
from p2pfl_torrent.core.errors import LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.events import Drop, Effect, Emit, Stimulus
from p2pfl_torrent.core.fetching import Fetching
from p2pfl_torrent.core.genesis import Genesis
from p2pfl_torrent.core.gossiping import Gossiping
from p2pfl_torrent.core.ledger import KnownUpdate, Ledger
from p2pfl_torrent.core.manifest import (
    Manifest,
    SignedHeader,
    UpdateId,
    decode_manifest,
    decode_manifest_gossip,
    update_of,
)
from p2pfl_torrent.core.messages import (
    Availability,
    Have,
    ManifestData,
    Message,
    NoManifest,
    Piece,
    Pong,
    Reject,
    decode_availability_gossip,
)
from p2pfl_torrent.core.peers import PeerId, Verify
from p2pfl_torrent.core.picker import Picker, PickerPolicy
from p2pfl_torrent.core.reports import DeadlineSet, ManifestSeen, PeerDropped, RoundClosed
from p2pfl_torrent.core.rounds import DeadlineChange, Frontier, RoundClock
from p2pfl_torrent.core.scope import Scope, ScopeTerms
from p2pfl_torrent.core.serving import Serving, Upload
from p2pfl_torrent.core.uploads import UploadPolicy, UploadQueue

MAX_PARKED = 64  # manifests of owners not known as members yet; membership gossip may lag
PROTOCOL_BAN = 60.0  # seconds, doubled by each further offence
MAX_BAN = 3600.0
MAX_OFFENDERS = 4096  # whose offences are counted; a new name costs nothing
OPTIMISM = 2.0  # times a measured rate: what a link that was shared may reach alone


@dataclass(frozen=True, slots=True)
class SwarmPolicy:
    """Local settings of the machine.

    Attributes:
        gossip_interval: seconds for which news has to be gone along the edges, and batches are
            made, before it is gossiped.
        settle_seconds: how long nothing more of a dead owner's update may have become available
            before it is given up: some relays' Have away.
    """

    picker: PickerPolicy = field(default_factory=PickerPolicy)
    uploads: UploadPolicy = field(default_factory=UploadPolicy)
    gossip_interval: float = 5.0
    settle_seconds: float = 0.5


class Swarm:
    """Everything this peer knows and decides about the updates of one swarm."""

    def __init__(
        self,
        *,
        local: PeerId,
        genesis: Genesis,
        layout: Layout,
        policy: SwarmPolicy,
        verify: Verify,
        rng: random.Random,
    ) -> None:
        self.local = local
        self.terms = genesis.terms.rounds
        self.layout = layout
        self.round = 0
        self.phase = "training"
        self.ledger = Ledger(len(layout.chunks), self.terms.critical_share)
        agreed = genesis.terms
        scope = ScopeTerms(
            agreed.mode, agreed.fragment_share, agreed.seed, agreed.topology, len(layout.chunks)
        )
        self.scope = Scope(scope, local, (local,))
        self.picker = Picker(layout=layout, policy=policy.picker, rng=rng)
        self.serving = Serving(self.ledger, UploadQueue(policy.uploads, rng), layout.block_size)
        self.fetching = Fetching(self.ledger, self.picker, layout.block_size, len(layout.chunks))
        self.clock: RoundClock | None = None
        self.live: Mapping[PeerId, int] = MappingProxyType({local: 1})
        self.dead: frozenset[PeerId] = frozenset()
        self._members: set[PeerId] = {local}  # now or before: who goes leaves its updates behind
        self._swarm_id = genesis.swarm_id
        self._largest_chunk = max(layout.file_bounds(chunk.index)[1] for chunk in layout.chunks)
        self._policy = policy
        self._verify = verify
        self._parked: dict[bytes, PeerId] = {}
        self._restored_blocks: dict[UpdateId, Mapping[int, Bitfield]] = {}
        self._absences = Absences()
        self._frontier = Frontier()
        self._gossiping = Gossiping(policy.gossip_interval)
        self._left_behind = False  # the others had finished this round before its deadline here
        self._taken = 0  # the round whose start weights were last taken from another peer
        self._moved = True  # something happened by which the round may be over
        self._settling_since = 0.0
        self._strikes: dict[PeerId, int] = {}
        self._handlers: dict[type[Any], Callable[[Any, float], list[Effect]]] = {
            ev.HolderOpened: self._holder_opened,
            ev.HolderClosed: self._holder_closed,
            ev.FetcherOpened: self._fetcher_opened,
            ev.FetcherClosed: self._fetcher_closed,
            ev.FromHolder: self._from_holder,
            ev.FromFetcher: self._from_fetcher,
            ev.ManifestGossip: self._manifest_gossip,
            ev.AvailabilityGossip: self._availability_gossip,
            ev.MembersNow: self._members_now,
            ev.RoundBegun: self._round_begun,
            ev.Restored: self._restored,
            ev.UpdateReady: self._update_ready,
            ev.CloseLate: self._close_late,
            ev.Tick: self._tick,
        }

    def handle(self, stimulus: Stimulus, now: float) -> list[Effect]:
        """What to do about a stimulus, in the order in which it must be done."""
        try:
            effects = self._handlers[type(stimulus)](stimulus, now)
        except RemoteProtocolError as error:
            effects = self.blame(error, getattr(stimulus, "peer", None))
        for effect in list(effects):
            if isinstance(effect, Drop):
                effects.extend(self._left(effect.peer, now))
        effects.extend(self.serving.announce(now))
        effects.extend(self._judge(now))
        return effects

    # --- edges -------------------------------------------------------------------------------

    def _holder_opened(self, stimulus: ev.HolderOpened, now: float) -> list[Effect]:
        self.fetching.opened(stimulus.peer)
        return []

    def _holder_closed(self, stimulus: ev.HolderClosed, now: float) -> list[Effect]:
        if not self.fetching.asks(stimulus.peer):
            return []
        self.fetching.closed(stimulus.peer)
        self._settling_since = now
        return self._ask(now)

    def _left(self, peer: PeerId, now: float) -> list[Effect]:
        """A peer is dropped: it is asked and answered no more, whatever is still on its streams."""
        self.serving.closed(peer)
        return self._holder_closed(ev.HolderClosed(peer), now)

    def _ask(self, now: float) -> list[Effect]:
        return self.fetching.ask(now, self.round + 1)

    def _fetcher_opened(self, stimulus: ev.FetcherOpened, now: float) -> list[Effect]:
        return self.serving.opened(stimulus.peer, self._oldest_round())

    def _fetcher_closed(self, stimulus: ev.FetcherClosed, now: float) -> list[Effect]:
        self.serving.closed(stimulus.peer)
        return []

    def _oldest_round(self) -> int:
        """The oldest round whose updates may still be counted by somebody who is behind."""
        return max(1, self.round - max(1, self.terms.max_staleness))

    def blame(self, error: RemoteProtocolError, fallback: PeerId | None) -> list[Effect]:
        """Drop a peer that broke the protocol, for longer each time."""
        peer = PeerId(error.peer) if error.peer else fallback
        if peer is None:
            return []  # a relay's gossip: its envelope's signer is checked by pubsub
        strikes = self._strikes[peer] = self._strikes.pop(peer, 0) + 1
        if len(self._strikes) > MAX_OFFENDERS:
            del self._strikes[next(iter(self._strikes))]  # whose last one is longest ago
        seconds = min(MAX_BAN, PROTOCOL_BAN * 2.0 ** (strikes - 1))
        return [
            Emit(PeerDropped(peer, error.reason, seconds)),
            Drop(peer, error.reason, seconds),
        ]

    # --- messages ----------------------------------------------------------------------------

    def _from_fetcher(self, stimulus: ev.FromFetcher, now: float) -> list[Effect]:
        if stimulus.peer not in self.serving.fetchers:
            return []
        return self.serving.received(stimulus.peer, stimulus.message)

    def _from_holder(self, stimulus: ev.FromHolder, now: float) -> list[Effect]:
        peer, message = stimulus.peer, stimulus.message
        if not self.fetching.asks(peer):
            return []
        if isinstance(message, Piece):
            return self._piece(peer, message, now)
        if isinstance(message, (Have, Availability)):
            return self._announced(peer, message, now)
        return self._answer(peer, message, now)

    def _piece(self, peer: PeerId, piece: Piece, now: float) -> list[Effect]:
        effects, completed = self.fetching.piece(peer, piece, now)
        self._settling_since = now
        if completed:
            for effect in list(effects):
                if isinstance(effect, ev.StoreComplete):
                    self.ledger.hold(effect.update, effect.chunk)
                    self._moved |= self.ledger[effect.update].is_here
                    self._gossiping.changed(effect.update, now)
                    self.serving.have(effect.update, effect.chunk)
        if any(isinstance(effect, Drop) for effect in effects):
            return effects
        # Only this holder's pipeline has room now, unless a request was taken back elsewhere.
        if any(isinstance(effect, ev.ToHolder) for effect in effects):
            return effects + self._ask(now)
        return effects + self.fetching.ask_blocks(peer, now)

    def _announced(self, peer: PeerId, message: Have | Availability, now: float) -> list[Effect]:
        self.fetching.announced(peer, message, self._oldest_round())
        self._settling_since = now
        effects: list[Effect] = []
        if isinstance(message, Availability) and self._taken:
            for item in message.updates:
                effects.extend(self._contained(UpdateId(item.update)))
        effects.extend(self.fetching.ask_manifests(now, self.round + 1))
        return effects + self.fetching.ask_blocks(peer, now)

    def _contained(self, update: UpdateId) -> list[Effect]:
        """Leave out an update that the state taken over holds, as those say who counted it."""
        known = self.ledger.get(update)
        if known is None or known.counted_in is not None or known.manifest.round >= self._taken:
            return []
        counted_in = self.fetching.counted_elsewhere(update, self._taken)
        if counted_in is None:
            return []
        self.ledger.count(update, known.held, counted_in)
        self._moved = True
        return self.fetching.stop(update)

    def _contained_by_time(self, known: KnownUpdate, left: int) -> list[Effect]:
        """Leave out what was here in time in a round up to ``left``: the state taken holds it.

        Of the rounds that this peer was never in, it cannot say what came in time: it asks, as far
        as that still matters.
        """
        update, round = known.manifest.update, known.manifest.round
        if known.counted_in is not None or round >= self.round or known.came_late:
            return []
        if round > left and round >= self._oldest_round():
            return self.fetching.ask_about(update)
        self.ledger.count(update, known.held, self.round - 1)
        return []

    def _answer(self, peer: PeerId, message: Message, now: float) -> list[Effect]:
        if isinstance(message, Reject):
            self.picker.rejected(peer, message.number, now, message.reason)
        elif isinstance(message, ManifestData):
            return self._manifest(message.manifest, peer, now)
        elif isinstance(message, NoManifest):
            self.fetching.no_manifest(peer, UpdateId(message.update))
        elif not isinstance(message, Pong):
            raise RemoteProtocolError(f"{type(message).__name__} on a stream for answers", peer)
        return self._ask(now)

    # --- manifests ---------------------------------------------------------------------------

    def _manifest_gossip(self, stimulus: ev.ManifestGossip, now: float) -> list[Effect]:
        try:
            signed = decode_manifest_gossip(
                stimulus.data,
                swarm=self._swarm_id,
                verify=self._verify,
                max_num_samples=self.terms.max_num_samples,
            )
        except RemoteProtocolError as error:
            return self.blame(error, stimulus.via)
        if signed is None:
            return self._manifest(stimulus.data, stimulus.via, now)
        if self._relevant(signed) and signed.owner in self._members:
            effects = self._see(signed)
            if not self.ledger.equivocated(signed.owner, signed.round):
                self.fetching.want(signed.update, signed.round)
            return effects + self._ask(now)
        self._irrelevant(signed)
        return []

    def _availability_gossip(self, stimulus: ev.AvailabilityGossip, now: float) -> list[Effect]:
        message = decode_availability_gossip(stimulus.data)
        return self._announced(stimulus.peer, message, now)

    def _relevant(self, signed: SignedHeader) -> bool:
        return self._oldest_round() <= signed.round <= self.round + 1

    def _irrelevant(self, signed: SignedHeader) -> None:
        if signed.round < self._oldest_round():
            self._absences.came_too_late(signed.owner, signed.round)
        elif signed.round > self.round and signed.owner in self._members:
            self._frontier.seen(signed.owner, signed.round)
            self._moved = True

    def _manifest(self, data: bytes, via: PeerId, now: float) -> list[Effect]:
        """A whole manifest from a peer: checked, remembered, and its chunks asked for."""
        claimed = update_of(data)
        if claimed is not None and claimed in self.ledger:
            return []  # it came from another neighbour, or by gossip too
        try:
            manifest = decode_manifest(
                data,
                layout=self.layout,
                swarm=self._swarm_id,
                verify=self._verify,
                max_num_samples=self.terms.max_num_samples,
            )
        except RemoteProtocolError as error:
            return self.blame(error, via)
        if not self._relevant(manifest.signed):
            self._irrelevant(manifest.signed)
            self.fetching.not_now(manifest.update, manifest.round, self.round)
            return []
        if manifest.owner not in self._members and manifest.owner not in self.dead:
            if len(self._parked) < MAX_PARKED:
                self._parked[data] = via
            return []
        return self._learn(manifest, via, now)

    def _see(self, signed: SignedHeader) -> list[Effect]:
        """Note a checked header; an equivocating owner is excluded for that round."""
        self._moved = True
        proof = self.ledger.see(signed)
        if self.clock is not None and signed.round == self.clock.round:
            self.clock.published(signed.owner)
        if proof is None:
            return []
        effects = self.fetching.stop(proof.first)
        reason = f"signed two manifests for round {proof.round}; its update is left out"
        return [*effects, Emit(PeerDropped(proof.owner, reason, 0.0))]

    def _learn(self, manifest: Manifest, via: PeerId, now: float) -> list[Effect]:
        first = self.ledger.update_of(manifest.owner, manifest.round)
        effects = self._see(manifest.signed)
        if self.ledger.equivocated(manifest.owner, manifest.round):
            self.fetching.unwanted(manifest.update)
            if effects and first is not None:  # found out now: others may have seen but one
                effects.extend(self.serving.show_manifests(first.manifest, manifest))
            return effects
        wanted = self.scope.wanted(manifest.owner, manifest.round)
        known = self.ledger.add(manifest, wanted=wanted)
        known.came_late = self._is_over(manifest.round, now)
        effects.append(ev.StoreManifest(manifest))
        self.fetching.learned(known, self.ledger.ages(manifest.owner, manifest.round))
        header = manifest.header
        seen = ManifestSeen(
            manifest.owner, manifest.round, via, header.num_samples, header.payload_bytes
        )
        effects.append(Emit(seen))
        self._settling_since = now
        effects.extend(self._contained(manifest.update))
        return effects + self._ask(now)

    def _is_over(self, round: int, now: float) -> bool:
        if self.clock is None or round != self.round:
            return round < self.round
        return self.phase in ("missed", "closed") or self.clock.passed(now)

    # --- members and rounds ------------------------------------------------------------------

    def _members_now(self, stimulus: ev.MembersNow, now: float) -> list[Effect]:
        self.live = MappingProxyType(dict(stimulus.live))
        self.dead = stimulus.dead
        effects = self._decide_wanted()
        self._members.update(stimulus.live)
        self._moved = True
        self._settling_since = now
        parked, self._parked = self._parked, {}
        for data, via in parked.items():
            effects.extend(self._manifest(data, via, now))
        return effects

    def _round_begun(self, stimulus: ev.RoundBegun, now: float) -> list[Effect]:
        # Of a round that was left early nobody here knows what came in time for it.
        left = self.round - self._left_behind
        self.round, self._left_behind = stimulus.round, False
        self.phase = "training"
        self.clock = RoundClock(self.terms, self.round, now)
        if stimulus.caught_up:
            self._taken = self.round
        effects: list[Effect] = []
        for update in stimulus.forgotten:
            known = self.ledger.get(update)
            if known is not None and (known.came_late or not stimulus.caught_up):
                self._absences.forgotten(known)
            effects.extend(self.fetching.forget(update))
            self.ledger.forget(update)
            self._restored_blocks.pop(update, None)
        for known in list(self.ledger):
            effects.extend(self._contained(known.manifest.update))
            if stimulus.caught_up:
                effects.extend(self._contained_by_time(known, left))
            if known.counted_in is not None:
                effects.extend(self.fetching.stop(known.manifest.update))
        effects.extend(self._decide_wanted())
        self.ledger.forget_rounds_before(self._oldest_round())
        self.fetching.look_ahead(False)
        self.fetching.forget_wanted_before(self._oldest_round())
        for owner in self.ledger.publishers(self.round):
            self.clock.published(owner)
        return effects + self._ask(now)

    def _restored(self, stimulus: ev.Restored, now: float) -> list[Effect]:
        manifest = stimulus.manifest
        if self.ledger.see(manifest.signed) is not None:
            return []
        wanted = self.scope.wanted(manifest.owner, manifest.round)
        known = self.ledger.add(manifest, stimulus.held, wanted)
        if stimulus.counted_in is not None:
            self.ledger.restore_counted({manifest.update: stimulus.counted_in})
        elif not wanted.count:  # who the members are is not known yet
            self._restored_blocks[manifest.update] = stimulus.blocks
        elif not known.is_here:
            ages = self.ledger.ages(manifest.owner, manifest.round)
            self.fetching.wanted_after_all(known, ages, stimulus.blocks)
        return []

    def _decide_wanted(self) -> list[Effect]:
        """What is wanted of the updates of this round, and of those restored, by who is here now.

        While training alone: from its own update on, whoever comes or goes changes nothing of what
        a peer takes in the round. Nor after the last round, when all go one by one.
        """
        is_over = self.round > self.terms.total
        if self.scope.terms.mode == "swarm" or self.phase != "training" or is_over:
            return []
        self.scope = self.scope.with_members(self.live)
        effects: list[Effect] = []
        for known in self.ledger:
            update, owner, round = known.manifest.update, known.manifest.owner, known.manifest.round
            is_open = round >= self.round or update in self._restored_blocks
            if known.counted_in is not None or owner == self.local or not is_open:
                continue
            wanted = self.scope.wanted(owner, round)
            if wanted == known.wanted:
                continue
            self.ledger.want(known, wanted)
            effects.extend(self.fetching.stop(update))
            if not known.is_here:
                blocks = self._restored_blocks.get(update, {})
                ages = self.ledger.ages(owner, round)
                self.fetching.wanted_after_all(known, ages, blocks)
        return effects

    @property
    def solo(self) -> bool:
        """Whether there are too few live members for an exchange."""
        return len(self.live) < self.terms.min_members

    def _has_been_left(self) -> bool:
        """Whether the others went on without this peer, more than one round ahead."""
        assert self.clock is not None
        others = self.live.keys() - {self.local}
        return self._frontier.has_passed(self.round, others, self.clock.quorum(len(self.live)))

    def _update_ready(self, stimulus: ev.UpdateReady, now: float) -> list[Effect]:
        manifest = stimulus.manifest
        if self.phase != "training" or self.clock is None or manifest.round != self.round:
            raise LocalProtocolError(
                f"an update for round {manifest.round} in the {self.phase} phase of {self.round}"
            )
        missed = self.clock.passed(now) or self._has_been_left()
        effects: list[Effect] = []
        if manifest.update not in self.ledger:
            self._see(manifest.signed)
            self.ledger.add(manifest, Bitfield.full(len(self.layout.chunks)))
            effects.append(ev.StoreManifest(manifest))
        known = self.ledger[manifest.update]
        known.came_late = missed
        self._moved = True
        self.clock.published(self.local)
        effects.extend(self.serving.announce_update(known, with_manifest=True))
        others = self.live.keys() - {self.local}
        self._gossiping.published(manifest, now, to_all=others <= self.serving.fetchers)
        self._settling_since = now
        if missed:
            return [*effects, self._miss(now)]
        self.phase = "exchanging"
        self.fetching.look_ahead(True)
        return effects + self._ask(now)

    def _miss(self, now: float) -> Effect:
        assert self.clock is not None
        self.phase = "missed"
        self._left_behind = not self.clock.passed(now)
        return ev.MissedRound(self.round)

    # --- time --------------------------------------------------------------------------------

    def _tick(self, stimulus: ev.Tick, now: float) -> list[Effect]:
        is_open = self.clock is not None and self.clock.deadline is not None
        miss = predicted_miss(self.standing(), self._window(now)) if is_open else 0.0
        self.picker.set_pressure(miss)
        expired = self.fetching.expire(now)
        asked = self._ask(now)
        due = self._gossiping.due(now, self.ledger, self._all_have_some, self._all_have_all)
        return expired + asked + due

    def _all_have_some(self, known: KnownUpdate) -> bool:
        """Whether all who fetch here, if anybody does, have shown that they have some of it."""
        shown = self._shown(known)
        return bool(shown) and all(chunks is not None and chunks.count for chunks, _ in shown)

    def _all_have_all(self, known: KnownUpdate) -> bool:
        """Whether all who fetch here have shown that they have all of it."""
        return all(
            chunks is not None and (chunks.complete or all(chunk in chunks for chunk in wanted))
            for chunks, wanted in self._shown(known)
        )

    def _shown(self, known: KnownUpdate) -> list[tuple[Bitfield | None, Bitfield]]:
        """Of each who fetches here and takes some of an update: what it has shown, and takes."""
        owner = known.manifest.owner
        found = []
        for peer in (self.serving.fetchers & self.live.keys()) - {owner}:
            wanted = self.scope.wanted_by(peer, owner, known.manifest.round)
            if wanted.count:
                remote = self.fetching.remote_holds(peer, known.manifest.update)
                found.append((remote, wanted))
        return found

    def next_wakeup(self, now: float) -> float:
        """When a Tick is due at the latest."""
        times = [now + 60.0]
        # Once passed while still training, nothing here waits for it any more.
        if self.clock is not None and not self.clock.passed(now):
            times.append(self.clock.next_wakeup())
        if self.phase == "exchanging":
            settled = self._settling_since + self._policy.settle_seconds
            times.extend(time for time in (settled, self._hopeless_from(now)) if time > now)
        for timeout in (
            self.fetching.next_wakeup(now),
            self.serving.next_wakeup(),
            self._gossiping.next_wakeup(),
        ):
            if timeout is not None:
                times.append(timeout)
        return min(times)

    def _judge(self, now: float) -> list[Effect]:
        """Open, extend or close the round where it is time."""
        clock = self.clock
        if clock is None or self.phase in ("missed", "closed"):
            return []
        effects: list[Effect] = []
        change = clock.advance(self.live.keys(), now)
        if change is not None:
            effects.append(self._deadline_set(change, now))
        settled = self._has_settled(now)
        if self.phase != "exchanging" or not (self._moved or settled or clock.passed(now)):
            return effects
        self._moved = False
        if self._has_been_left():
            return [*effects, self._miss(now)]
        state = self.standing()
        found = verdict(
            state,
            self._window(now),
            self.terms.min_completion_ratio,
            lambda: self._hopeless_from(now) <= now,
        )
        if found is None:
            return effects
        if found == "extend":
            return [*effects, self._deadline_set(clock.extend(now), now)]
        return [*effects, *self._close(found, state)]

    def _has_settled(self, now: float) -> bool:
        return now - self._settling_since >= self._policy.settle_seconds

    def _window(self, now: float) -> Window:
        assert self.clock is not None
        deadline = self.clock.deadline
        return Window(
            left=None if deadline is None else deadline - now,
            extension=0.0 if self.clock.extended else self.clock.extension(),
            rate=sum(self.picker.holder_rate(peer) for peer in self.fetching.holders),
            settled=self._has_settled(now),
        )

    def _hopeless_from(self, now: float) -> float:
        """From when on no chunk could come by the deadline, even if all holders sped up for it.

        Long before that, a time at which to ask again.
        """
        rate = OPTIMISM * self.picker.total_rate()
        if self.clock is None or self.clock.deadline is None or not rate:
            return math.inf
        ask_again = self.clock.deadline - self._largest_chunk / rate
        if now < ask_again:
            return ask_again
        return self.clock.deadline - self.picker.least_unasked() / rate

    def standing(self) -> Standing:
        """How far the current round is."""
        return standing(
            local=self.local,
            round=self.round,
            terms=self.terms,
            ledger=self.ledger,
            sources=self.picker,
            live={
                peer: since
                for peer, since in self.live.items()
                if self.scope.takes_from(peer, self.round)
            },
        )

    def _deadline_set(self, change: DeadlineChange, now: float) -> Effect:
        return Emit(DeadlineSet(self.round, change.deadline - now, change.why))

    def _close(self, closed_by: str, state: Standing) -> list[Effect]:
        assert self.clock is not None
        self.phase = "closed"
        counted = counts(
            local=self.local,
            round=self.round,
            terms=self.terms,
            ledger=self.ledger,
            dead=self.dead,
            weight=lambda owner, samples: self.scope.weight(owner, self.round, samples),
        )
        effects: list[Effect] = []
        for count in counted:
            self.ledger.count(count.manifest.update, count.chunks, self.round)
            if count.status == "late":  # who is late again must not count it once more
                known = self.ledger[count.manifest.update]
                effects.extend(self.serving.announce_update(known, with_manifest=False))
        late = too_late(self.ledger, self.round, self.terms.max_staleness)
        for old in late:
            old.dropped = True
        dropped = {(old.manifest.owner, old.manifest.round) for old in late}
        # A member whose update is here in part is reported there, not as missing.
        heard = {count.manifest.owner for count in counted if count.status != "late"}
        missing = tuple(member for member in state.waiting_for if member not in heard)
        away = self._absences.closed(self.round, missing, self.live.keys(), self.dead, counted)
        dropped.update(away)
        close = ev.CloseRound(
            round=self.round,
            closed_by=closed_by,
            members=len(self.live),
            counts=counted,
            missing=missing,
            dropped=tuple(sorted(dropped)),
            completeness=state.completeness,
            extended=self.clock.extended,
            below_min_completion=state.completeness < self.terms.min_completion_ratio,
            viable=state.viable,
        )
        return [*effects, Emit(RoundClosed(self.round, closed_by, state.completeness)), close]

    def _close_late(self, stimulus: ev.CloseLate, now: float) -> list[Effect]:
        if self.phase != "missed":
            raise LocalProtocolError(f"CloseLate in the {self.phase} phase")
        return self._close("deadline", self.standing())

    # --- the writer's questions --------------------------------------------------------------

    def next_upload(self, peer: PeerId, now: float) -> Upload | Reject | None:
        """The next answer to write to a fetcher, if it is its turn."""
        return self.serving.next_upload(peer, now)

    def others_have_all(self) -> bool:
        """Whether all who fetch here hold what they take of the last two rounds' updates here."""
        for known in self.ledger:
            if known.manifest.round < self.round - 1 or known.held.count == 0:
                continue
            if not self._all_have_all(known):
                return False
        return True
