"""Membership machines on a simulated network with virtual time: loss, cuts, kills and freezes.

Edges follow each machine's own roster, as in a peer; pings run along them each second; gossip
reaches whom the sender's edges lead to; probes and comparisons dial anybody.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from p2pfl_torrent.core.genesis import TopologyTerms
from p2pfl_torrent.core.joining import Sync, answer_sync, first_sync, second_sync
from p2pfl_torrent.core.membership import Membership
from p2pfl_torrent.core.membership_effects import (
    Changed,
    Gossip,
    MembershipEffect,
    Probe,
    RosterChanged,
    SyncWith,
)
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import MemberChanged
from p2pfl_torrent.core.topology import neighbours
from p2pfl_torrent.simulation.world import sign_as, verify

SWARM = bytes(range(32))
PING = 1.0
TRIP = 0.02  # seconds from one peer to another


def star() -> TopologyTerms:
    return TopologyTerms("star", 3, 2, (), ())


def mesh() -> TopologyTerms:
    return TopologyTerms("mesh", 3, 2, (), ())


@dataclass
class Node:
    """One peer: its machine, and what the world does to it."""

    machine: Membership
    neighbours: frozenset[PeerId] = frozenset()
    killed: bool = False
    frozen: bool = False
    heard_pings: dict[PeerId, float] = field(default_factory=dict)
    changes: list[MemberChanged] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        return not self.killed and not self.frozen


class MemberNetwork:
    """A swarm in virtual time."""

    def __init__(
        self, names: Iterable[str], topology: TopologyTerms, seed: int = 0, loss: float = 0.0
    ) -> None:
        self.now = 100.0
        self.rng = random.Random(seed)
        self.topology = topology
        self.loss = loss
        self.side: dict[PeerId, int] = {}
        self.nodes: dict[PeerId, Node] = {}
        self.messages = 0
        self.largest = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        for name in names:
            self.start(PeerId(name))

    # --- what a test does ----------------------------------------------------------------------

    def start(self, peer: PeerId) -> Node:
        """A new process of that peer, that knows nobody."""
        machine = Membership(
            local=peer,
            addrs=[f"/ip4/127.0.0.1/tcp/{len(self.nodes) + 1}"],
            swarm=SWARM,
            seed=1,
            sign=sign_as(peer),
            verify=verify,
            rng=random.Random(self.rng.random()),
            now=self.now,
        )
        node = self.nodes[peer] = Node(machine)
        self._after(self.rng.uniform(0, 0.25), lambda: self._tick(node))
        self._after(self.rng.uniform(0, PING), lambda: self._ping(node))
        return node

    def enter(self, peer: str, through: str, joined_round: int = 1) -> None:
        """Join by the statements of a member, as a Welcome carries them."""
        node, member = self.nodes[PeerId(peer)], self.nodes[PeerId(through)]
        statements = member.machine.statements()
        self._apply(node, node.machine.received(statements, PeerId(through), self.now))
        self._apply(node, node.machine.set_ready(joined_round))

    def enter_all(self, joined_round: int = 1) -> None:
        """Everybody enters through the first."""
        names = list(self.nodes)
        for name in names:
            self.enter(name, names[0], joined_round)

    def kill(self, peer: str) -> None:
        """SIGKILL: its neighbours' edges break at once."""
        node = self.nodes[PeerId(peer)]
        node.killed = True
        for other in self.nodes.values():
            if other.runs and node.machine.local in other.neighbours:
                self._lose_edge(other, node.machine.local)

    def freeze(self, peer: str) -> None:
        """SIGSTOP: its connections stay open."""
        self.nodes[PeerId(peer)].frozen = True

    def thaw(self, peer: str) -> None:
        self.nodes[PeerId(peer)].frozen = False

    def cut(self, *sides: str) -> None:
        """Peers of different sides (texts of one-letter names) cannot reach each other."""
        self.side = {PeerId(name): i for i, names in enumerate(sides) for name in names}

    def heal(self) -> None:
        self.side = {}

    def leave(self, peer: str) -> None:
        node = self.nodes[PeerId(peer)]
        self._apply(node, node.machine.leave())

    def round(self, round: int) -> None:
        for node in self.running():
            node.machine.round_changed(round)

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> float:
        """Let time pass, to its end or until something holds; the seconds that took."""
        began = self.now
        while self._queue and self._queue[0][0] <= began + seconds:
            self.now, _, action = heapq.heappop(self._queue)
            action()
            if until is not None and until():
                return self.now - began
        self.now = began + seconds
        assert until is None, f"not in {seconds} s; rosters: {self.rosters()}"
        return seconds

    # --- what a test sees ----------------------------------------------------------------------

    def running(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.runs]

    def roster(self, peer: str) -> str:
        """A peer's roster as text, for one-letter names."""
        return "".join(member.peer for member in self.nodes[PeerId(peer)].machine.roster())

    def rosters(self) -> dict[str, str]:
        return {node.machine.local: self.roster(node.machine.local) for node in self.running()}

    def agree_on(self, members: str) -> bool:
        """Whether all that run and have not left have exactly these members, in one order."""
        seen = {
            self.roster(node.machine.local)
            for node in self.running()
            if node.machine.local not in node.machine.left()
        }
        return len(seen) == 1 and sorted(seen.pop()) == sorted(members)

    def changes(self, peer: str) -> str:
        """What a peer told its user, as ``b joined, b dead``."""
        return ", ".join(f"{c.member} {c.change}" for c in self.nodes[PeerId(peer)].changes)

    # --- the world -----------------------------------------------------------------------------

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), action))

    def _passes(self, a: PeerId, b: PeerId) -> bool:
        """Whether packets between two peers arrive now, for as long as both live."""
        return self.side.get(a, -1) == self.side.get(b, -1)

    def _tick(self, node: Node) -> None:
        if node.killed:
            return
        if node.runs:
            self._apply(node, node.machine.tick(self.now))
        self._after(node.machine.policy.tick, lambda: self._tick(node))

    def _ping(self, node: Node) -> None:
        if node.killed:
            return
        if node.runs:
            for peer in node.neighbours:
                self._after(TRIP, lambda peer=peer: self._pinged(node, peer))  # type: ignore[misc]
        self._after(PING, lambda: self._ping(node))

    def _pinged(self, node: Node, peer: PeerId) -> None:
        """An edge is open if either side has it, so both hear each other on it."""
        other = self.nodes[peer]
        local = node.machine.local
        if node.runs and other.runs and self._passes(local, peer):
            other.machine.heard(local, self.now)
            node.machine.heard(peer, self.now, 2 * TRIP)

    def _lose_edge(self, node: Node, peer: PeerId) -> None:
        self._apply(node, node.machine.edge_lost(peer))

    def _apply(self, node: Node, effects: list[MembershipEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Changed):
                node.changes.append(effect.event)
            elif isinstance(effect, Gossip):
                self._gossip(node, effect.data, set())
            elif isinstance(effect, Probe):
                self._probe(node, effect)
            elif isinstance(effect, SyncWith):
                self._after(TRIP, lambda effect=effect: self._sync(node, effect))  # type: ignore[misc]
            else:
                assert isinstance(effect, RosterChanged)
                self._draw_overlay(node)

    def _draw_overlay(self, node: Node) -> None:
        roster = [member.peer for member in node.machine.roster()]
        drawn = neighbours(roster, self.topology, 1)
        node.neighbours = drawn.get(node.machine.local, frozenset())
        node.machine.watch(node.neighbours, self.now)

    def _gossip(self, node: Node, data: bytes, seen: set[PeerId]) -> None:
        """Flooding along the edges; each hop may lose it."""
        seen.add(node.machine.local)
        for peer in sorted(node.neighbours - seen):
            if self.rng.random() >= self.loss:
                self._after(TRIP, lambda peer=peer: self._gossiped(node, peer, data, seen))  # type: ignore[misc]

    def _gossiped(self, by: Node, peer: PeerId, data: bytes, seen: set[PeerId]) -> None:
        node = self.nodes[peer]
        if peer in seen or not node.runs or not self._passes(by.machine.local, peer):
            return
        self._count(data)
        self._apply(node, node.machine.received(data, by.machine.local, self.now))
        self._gossip(node, data, seen)

    def _probe(self, node: Node, probe: Probe) -> None:
        local, peer = node.machine.local, probe.peer
        other = self.nodes.get(peer)
        refused = other is not None and other.killed and self._passes(local, peer)

        def arrives() -> None:
            if other is None or not other.runs or not self._passes(local, peer):
                return
            if self.rng.random() < self.loss or not node.runs:
                return
            self._count(probe.news)
            if probe.news:
                self._apply(other, other.machine.received(probe.news, local, self.now))
            other.machine.heard(local, self.now)
            record = other.machine.record()
            self._apply(node, node.machine.received(record, peer, self.now))
            done.append(True)
            self._apply(node, node.machine.probed(peer, True, self.now))

        def over() -> None:
            if not done and not node.killed:
                self._apply(node, node.machine.probed(peer, False, self.now))

        done: list[bool] = []
        self._after(4 * TRIP, arrives)
        self._after(2 * TRIP if refused else probe.timeout, over)

    def _sync(self, node: Node, effect: SyncWith) -> None:
        local, peer = node.machine.local, effect.peer
        other = self.nodes.get(peer)
        if other is None or not other.runs or not node.runs or not self._passes(local, peer):
            return
        if self.rng.random() < self.loss:
            return
        question: Sync | None = first_sync(SWARM, node.machine.census, effect.news)
        while question is not None:
            self._count(question.news)
            self._apply(other, other.machine.received(question.news, local, self.now))
            other.machine.heard(local, self.now)
            answer = answer_sync(other.machine.census, question)
            node.machine.heard(peer, self.now)
            self._count(answer.news)
            self._apply(node, node.machine.received(answer.news, peer, self.now))
            if question.fingerprints is not None:
                break
            question = second_sync(SWARM, node.machine.census, answer)

    def _count(self, data: bytes) -> None:
        if data:
            self.messages += 1
            self.largest = max(self.largest, len(data))
