"""Drives one membership machine: its ticks, probes, comparisons and gossip.

The node that owns it feeds it with what the chunk streams hear, and draws the overlay from the
roster it is told. All entry points but ``run`` and ``leave`` are synchronous and never fail for
what a remote sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import trio

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.genesis import Genesis, decode_terms, encode_terms
from p2pfl_torrent.core.joining import (
    Alive,
    Answer,
    Join,
    Mismatch,
    Probe,
    Question,
    Refused,
    Statements,
    Sync,
    Welcome,
    answer_sync,
    first_sync,
    second_sync,
)
from p2pfl_torrent.core.membership import Membership
from p2pfl_torrent.core.membership_effects import (
    Changed,
    Gossip,
    Member,
    MembershipEffect,
    SyncWith,
)
from p2pfl_torrent.core.membership_effects import Probe as ProbeEffect
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import MemberChanged
from p2pfl_torrent.exchange.driver import TaskStatus
from p2pfl_torrent.exchange.ports import EdgeClosedError

MAX_PROBES = 16  # at once; each may be a dial with a handshake of some 10 ms of CPU
MAX_SYNCS = 16
MAX_WAITING_GOSSIP = 64  # batches; more than these are left to the comparisons
GOODBYE_SECONDS = 2.0


class MemberNetwork(Protocol):
    """How members reach each other."""

    async def ask(
        self, peer: PeerId, addrs: Sequence[str], question: Question, timeout: float
    ) -> Answer:
        """Connect where needed, ask on a new stream, and return the answer.

        Raises:
            EdgeClosedError: nobody there, or no answer in ``timeout`` seconds.
            RemoteProtocolError: what came is no answer.
        """
        ...

    async def gossip(self, data: bytes) -> None:
        """Publish a batch of statements on the swarm's membership topic."""
        ...


def _ignore_other_swarm(welcome: Welcome, via: PeerId) -> None:
    """Nobody wants to know of a second swarm of the same terms."""


def _ignore_fault(peer: PeerId, reason: str) -> None:
    """Nobody wants to know who broke the protocol."""


class MembershipDriver:
    """The shell of one peer's membership.

    Attributes:
        machine: for its queries; nobody else feeds it.
    """

    def __init__(
        self,
        machine: Membership,
        genesis: Genesis,
        network: MemberNetwork,
        *,
        on_change: Callable[[MemberChanged], None],
        on_roster: Callable[[tuple[Member, ...]], None],
        on_fault: Callable[[PeerId, str], None] = _ignore_fault,
        on_other_swarm: Callable[[Welcome, PeerId], None] = _ignore_other_swarm,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        """Nothing happens before ``run``.

        Args:
            on_change: told of every change for the user; must be quick and not raise.
            on_roster: told of every new roster, likewise.
            on_fault: told who broke the protocol, and how.
            on_other_swarm: told of a swarm of the same terms that another peer knows or is in.
        """
        self.machine = machine
        self._genesis = genesis
        self._network = network
        self._on_change = on_change
        self._on_roster = on_roster
        self._on_fault = on_fault
        self._on_other_swarm = on_other_swarm
        self._clock = clock
        self._nursery: trio.Nursery | None = None
        self._early: list[MembershipEffect] = []
        self._syncing: dict[PeerId, SyncWith | None] = {}
        self._probes = trio.CapacityLimiter(MAX_PROBES)
        self._syncs = trio.CapacityLimiter(MAX_SYNCS)
        self._to_gossip, self._gossip_queue = trio.open_memory_channel[bytes](MAX_WAITING_GOSSIP)

    async def run(self, *, task_status: TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        """Drive the machine until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._publish)
            early, self._early = self._early, []
            self._apply(early)
            task_status.started()
            try:
                while True:
                    self._apply(self.machine.tick(self._clock()))
                    await trio.sleep(self.machine.policy.tick)
            finally:
                self._nursery = None

    async def leave(self) -> None:
        """Say good-bye to the swarm; returns when some have heard it, or after two seconds."""
        effects = self.machine.leave()
        with trio.move_on_after(GOODBYE_SECONDS):
            async with trio.open_nursery() as nursery:
                for effect in effects:
                    if isinstance(effect, SyncWith):
                        nursery.start_soon(self._compare_with, effect)
                    elif isinstance(effect, Gossip):
                        nursery.start_soon(self._network.gossip, effect.data)
        self._apply([effect for effect in effects if not isinstance(effect, SyncWith | Gossip)])

    # --- what the node tells -------------------------------------------------------------------

    def set_ready(self, joined_round: int) -> None:
        """See ``Membership.set_ready``."""
        self._apply(self.machine.set_ready(joined_round))

    def round_changed(self, round: int) -> None:
        """See ``Membership.round_changed``."""
        self.machine.round_changed(round)

    def watch(self, neighbours: Iterable[PeerId]) -> None:
        """See ``Membership.watch``."""
        self.machine.watch(neighbours, self._clock())

    def heard(self, peer: PeerId, round_trip: float | None = None) -> None:
        """See ``Membership.heard``."""
        self.machine.heard(peer, self._clock(), round_trip)

    def edge_lost(self, peer: PeerId) -> None:
        """See ``Membership.edge_lost``."""
        self._apply(self.machine.edge_lost(peer))

    def gossip_received(self, data: bytes, via: PeerId) -> None:
        """Statements came over pubsub, in an envelope signed by ``via``."""
        self._receive(data, via)

    def record_received(self, data: bytes, sender: PeerId) -> None:
        """A record came in a Hello, or statements in a Welcome."""
        self._receive(data, sender)

    def answer(self, question: Question, sender: PeerId) -> Answer:
        """This member's answer to a question of the members protocol.

        Raises:
            RemoteProtocolError: the question holds what no correct peer says.
        """
        self.heard(sender)
        if isinstance(question, Join):
            return self._answer_join(question, sender)
        if question.swarm != self._genesis.swarm_id:
            return Refused("this peer is in another swarm")
        self._apply(self.machine.received(question.news, sender, self._clock()))
        if isinstance(question, Sync):
            return answer_sync(self.machine.census, question)
        return Alive(self.machine.record())

    def _answer_join(self, join: Join, sender: PeerId) -> Answer:
        theirs = decode_terms(join.terms)
        ours = self._genesis.terms
        if theirs.name != ours.name:
            return Refused(f"this peer is in the swarm {ours.name}, not in {theirs.name}"[:512])
        if theirs != ours:
            return Mismatch(encode_terms(ours))
        if join.genesis == self._genesis.encode():
            self._apply(self.machine.received(join.record, sender, self._clock()))
        elif join.record:  # not a newcomer's proposal: it is a member there
            self._on_other_swarm(Welcome(join.genesis, join.record), sender)
        return Welcome(self._genesis.encode(), self.machine.statements())

    # --- applying effects ----------------------------------------------------------------------

    def _receive(self, data: bytes, sender: PeerId) -> None:
        try:
            effects = self.machine.received(data, sender, self._clock())
        except RemoteProtocolError as error:
            self._on_fault(sender, error.reason)
            return
        self._apply(effects)

    def _apply(self, effects: Iterable[MembershipEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Changed):
                self._on_change(effect.event)
            elif isinstance(effect, Gossip):
                try:
                    self._to_gossip.send_nowait(effect.data)
                except trio.WouldBlock:
                    pass  # the comparisons bring it to everybody all the same
            elif isinstance(effect, ProbeEffect | SyncWith):
                self._start(effect)
            else:
                self._on_roster(self.machine.roster())

    def _start(self, effect: ProbeEffect | SyncWith) -> None:
        if self._nursery is None:
            self._early.append(effect)
        elif isinstance(effect, ProbeEffect):
            self._nursery.start_soon(self._probe, effect)
        elif effect.peer in self._syncing:
            self._syncing[effect.peer] = effect  # once more, when the one under way is over
        else:
            self._syncing[effect.peer] = None
            self._nursery.start_soon(self._sync, effect)

    async def _publish(self) -> None:
        async for data in self._gossip_queue:
            await self._network.gossip(data)

    async def _probe(self, effect: ProbeEffect) -> None:
        ok = False
        async with self._probes:
            question = Probe(self._genesis.swarm_id, effect.news)
            answer = await self._ask(effect.peer, effect.addrs, question, effect.timeout)
        if isinstance(answer, Alive):
            ok = True
            self._receive(answer.record, effect.peer)
        self._apply(self.machine.probed(effect.peer, ok, self._clock()))

    async def _sync(self, effect: SyncWith) -> None:
        again: SyncWith | None = effect
        while again is not None:
            async with self._syncs:
                await self._compare_with(again)
            again, self._syncing[effect.peer] = self._syncing[effect.peer], None
        del self._syncing[effect.peer]

    async def _compare_with(self, effect: SyncWith) -> None:
        """Make the statements here and there equal, in one question or two."""
        swarm, census = self._genesis.swarm_id, self.machine.census
        question: Sync | None = first_sync(swarm, census, effect.news)
        while question is not None:
            answer = await self._ask(effect.peer, effect.addrs, question, effect.timeout)
            if not isinstance(answer, Statements):
                if isinstance(answer, Refused) and effect.peer not in census:
                    await self._register(effect)
                return
            self.heard(effect.peer)
            self._receive(answer.news, effect.peer)
            if question.fingerprints is not None:
                return
            try:
                question = second_sync(swarm, census, answer)
            except RemoteProtocolError as error:
                self._on_fault(effect.peer, error.reason)
                return

    async def _register(self, effect: SyncWith) -> None:
        """A bootstrap peer that does not know our swarm: it was restarted, or knows another."""
        genesis = self._genesis.encode()
        join = Join(encode_terms(self._genesis.terms), genesis, self.machine.record())
        answer = await self._ask(effect.peer, effect.addrs, join, effect.timeout)
        if isinstance(answer, Welcome):
            if answer.genesis == genesis:
                self._receive(answer.statements, effect.peer)
            else:
                self._on_other_swarm(answer, effect.peer)

    async def _ask(
        self, peer: PeerId, addrs: Sequence[str], question: Question, timeout: float
    ) -> Answer | None:
        with trio.move_on_after(timeout):
            try:
                return await self._network.ask(peer, addrs, question, timeout)
            except EdgeClosedError:
                pass  # nobody there: the caller draws its conclusion from no answer
            except RemoteProtocolError as error:
                self._on_fault(peer, error.reason)
        return None
