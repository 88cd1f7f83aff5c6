"""Membership drivers that reach each other in memory, under a mock clock."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import trio

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.genesis import Genesis, RoundTerms, Terms, TopologyTerms
from p2pfl_torrent.core.joining import (
    Answer,
    Question,
    decode_answer,
    decode_question,
    encode,
)
from p2pfl_torrent.core.membership import Membership
from p2pfl_torrent.core.membership_effects import Member
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import MemberChanged
from p2pfl_torrent.core.topology import neighbours
from p2pfl_torrent.exchange.membership import MembershipDriver
from p2pfl_torrent.exchange.ports import EdgeClosedError
from p2pfl_torrent.overlay.bootstrap import Registry
from p2pfl_torrent.simulation.world import sign_as, verify

BOOTSTRAP = PeerId("bootstrap")
TRIP = 0.01


def terms(name: str = "swarm", total: int = 5) -> Terms:
    rounds = RoundTerms(total, 3, 2, 60.0, 60.0, 30.0, 0.5, 0.7, 2, 3, 1000)
    star = TopologyTerms("star", 3, 2, (), ())
    return Terms(name, "swarm", "fedavg", 1, "model", "layout", star, rounds)


def genesis(run_id: str = "run", name: str = "swarm", total: int = 5) -> Genesis:
    return Genesis(terms(name, total), run_id, "a", "0" * 64)


class World:
    """All peers of a test, and a bootstrap node."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.genesis = genesis()
        self.peers: dict[PeerId, FakePeer] = {}
        self.registry: Registry | None = Registry(verify, trio.current_time)
        self.answers = 0

    def start(self, name: str, joined_round: int = 1) -> FakePeer:
        """A process of that peer, which enters through the bootstrap node."""
        peer = self.peers[PeerId(name)] = FakePeer(self, PeerId(name))
        self.nursery.start_soon(peer.run)
        peer.driver.set_ready(joined_round)
        return peer

    async def answer_of(self, peer: PeerId, question: Question, sender: PeerId) -> Answer:
        await trio.sleep(TRIP)
        asked = decode_question(encode(question))
        if peer == BOOTSTRAP:
            if self.registry is None:
                raise EdgeClosedError("connection refused")
            answer = self.registry.answer(asked, sender)
        else:
            other = self.peers.get(peer)
            if other is None or other.killed:
                raise EdgeClosedError("connection refused")
            if other.frozen:
                await trio.sleep_forever()
            answer = other.driver.answer(asked, sender)
        self.answers += 1
        await trio.sleep(TRIP)
        return decode_answer(encode(answer))

    def rosters(self) -> set[str]:
        """What the running peers hold for the members, one entry for each view."""
        return {
            "".join(sorted(member.peer for member in peer.roster))
            for peer in self.peers.values()
            if peer.runs
        }

    async def agree_on(self, names: str, within: float) -> float:
        """Wait until all that run have these members; the seconds that took."""
        began = trio.current_time()
        with trio.move_on_after(within):
            while self.rosters() != {names}:  # noqa: ASYNC110 - a view has no event to offer
                await trio.sleep(0.05)
            return trio.current_time() - began
        raise AssertionError(f"{self.rosters()} and not {names} after {within} s")


class FakePeer:
    """A driver with edges and pings, as a node has them."""

    def __init__(self, world: World, peer: PeerId) -> None:
        self.world = world
        self.peer = peer
        self.killed = self.frozen = False
        self.roster: tuple[Member, ...] = ()
        self.neighbours: frozenset[PeerId] = frozenset()
        self.changes: list[str] = []
        self.faults: list[str] = []
        self.other_swarms: list[tuple[bytes, PeerId]] = []
        self._scope = trio.CancelScope()
        machine = Membership(
            local=peer,
            addrs=[f"/memory/{peer}"],
            swarm=world.genesis.swarm_id,
            seed=1,
            sign=sign_as(peer),
            verify=verify,
            rng=random.Random(peer),
            now=trio.current_time(),
            rendezvous=[(BOOTSTRAP, ("/memory/bootstrap",))],
        )
        self.driver = MembershipDriver(
            machine,
            world.genesis,
            self,
            on_change=self._changed,
            on_roster=self._draw,
            on_fault=lambda by, reason: self.faults.append(f"{by}: {reason}"),
            on_other_swarm=lambda told, by: self.other_swarms.append((told.genesis, by)),
        )

    @property
    def runs(self) -> bool:
        return not self.killed and not self.frozen

    async def run(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.driver.run)
                nursery.start_soon(self._ping)

    def kill(self) -> None:
        """SIGKILL: edges to it break, its tasks end."""
        self.killed = True
        self._scope.cancel()
        for other in self.world.peers.values():
            if other.runs and self.peer in other.neighbours:
                other.driver.edge_lost(self.peer)

    # --- MemberNetwork ---

    async def ask(
        self, peer: PeerId, addrs: Sequence[str], question: Question, timeout: float
    ) -> Answer:
        if self.frozen:
            await trio.sleep_forever()
        try:
            return await self.world.answer_of(peer, question, self.peer)
        except RemoteProtocolError as error:  # there it blames us; here the stream is reset
            raise EdgeClosedError("reset") from error

    async def gossip(self, data: bytes) -> None:
        if self.frozen:
            return
        for peer in self.neighbours:
            self.world.nursery.start_soon(
                partial(self._carry, self.world.peers[peer], data, {self.peer})
            )

    async def _carry(self, to: FakePeer, data: bytes, seen: set[PeerId]) -> None:
        await trio.sleep(TRIP)
        if to.runs and to.peer not in seen:
            seen.add(to.peer)
            to.driver.gossip_received(data, self.peer)
            for peer in to.neighbours - seen:
                self.world.nursery.start_soon(
                    partial(self._carry, self.world.peers[peer], data, seen)
                )

    # --- what a node does ---

    def _changed(self, event: MemberChanged) -> None:
        self.changes.append(f"{event.member} {event.change}")

    def _draw(self, roster: tuple[Member, ...]) -> None:
        self.roster = roster
        drawn = neighbours([member.peer for member in roster], self.world.genesis.terms.topology, 1)
        self.neighbours = drawn.get(self.peer, frozenset())
        self.driver.watch(self.neighbours)

    async def _ping(self) -> None:
        while True:
            await trio.sleep(1.0)
            for peer in self.neighbours:
                other = self.world.peers[peer]
                if self.runs and other.runs:
                    self.driver.heard(peer, 2 * TRIP)
                    other.driver.heard(self.peer, 2 * TRIP)
