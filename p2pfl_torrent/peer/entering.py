"""How a peer that has found its swarm comes to its first round there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import trio

from p2pfl_torrent.core.genesis import Genesis
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import Array
from p2pfl_torrent.exchange.driver import Exchange
from p2pfl_torrent.exchange.membership import MembershipDriver
from p2pfl_torrent.peer.catchup import CatchUp
from p2pfl_torrent.peer.network import JoinError
from p2pfl_torrent.peer.rounds import Rounds
from p2pfl_torrent.store import Checkpoints, Store, StoreError

PAUSE = 0.2  # seconds between two looks at who is there while joining


@dataclass(frozen=True, slots=True)
class Start:
    """The weights that this peer would begin a swarm with, and their model_hash."""

    weights: dict[str, Array]
    hash: bytes


class Entering:
    """Resumes, takes over the state of a swarm that has begun, or begins with the others."""

    def __init__(
        self,
        *,
        genesis: Genesis,
        start: Start,
        store: Store,
        checkpoints: Checkpoints,
        exchange: Exchange,
        driver: MembershipDriver,
        catch_up: CatchUp,
        rounds: Rounds,
    ) -> None:
        self._genesis = genesis
        self._terms = genesis.terms.rounds
        self._start = start
        self._store = store
        self._checkpoints = checkpoints
        self._exchange = exchange
        self._driver = driver
        self._catch_up = catch_up
        self._rounds = rounds

    def _members(self) -> Collection[PeerId]:
        return [member.peer for member in self._driver.machine.roster()]

    def _others(self) -> list[PeerId]:
        """Members to ask, neighbours first."""
        near = self._exchange.edges
        others = [peer for peer in self._members() if peer != self._exchange.swarm.local]
        return sorted(others, key=lambda peer: (peer not in near, peer))

    async def enter_running(self) -> bool:
        """Resume, or take over the state of a swarm that has begun; False if it has not.

        Raises:
            JoinError: it has, and nobody gives its state.
            StoreError: our own is damaged, and there is nobody else.
        """
        claims = await self._catch_up.claims(self._others())
        furthest = self._catch_up.reached(claims)
        last = self._store.last_round()
        if last is not None and last[0] + 1 >= furthest and await self._is_sound(last, furthest):
            self._driver.set_ready(last[0] + 1)
            self._rounds.resume(last[0] + 1, last[1])
            return True
        if furthest == 0:
            return False
        patience = self._terms.join_timeout
        taken = await self._catch_up.take(self._others, 1, patience)
        if taken is None:
            raise JoinError(
                f"The swarm is in round {furthest}, but no member gave its state within "
                f"{patience:g} s; try again, or enter through another member."
            )
        self._driver.set_ready(taken.round + 1)
        await self._rounds.take_over(taken)
        return True

    async def _is_sound(self, last: tuple[int, bytes], furthest: int) -> bool:
        """Whether the last checkpoint holds what was saved; if not, others' state will do.

        Raises:
            StoreError: it does not, and there are no others.
        """
        try:
            await trio.to_thread.run_sync(self._checkpoints.load, *last)
        except StoreError:
            if furthest == 0:
                raise
            return False
        return True

    async def begin_alone(self) -> None:
        """Begin round 1 with this peer's own weights."""
        self._driver.set_ready(1)
        await self._rounds.begin(1, self._start.weights, self._start.hash)

    async def begin_with_others(self, edge_timeout: float) -> None:
        """Wait for the first members, agree on the start weights, and begin round 1.

        Args:
            edge_timeout: seconds for the edges to open.

        Raises:
            JoinError: too few came in time.
        """
        rounds = self._terms
        initial = bytes.fromhex(self._genesis.initial_hash)
        with trio.move_on_after(rounds.join_timeout):
            weights = await self._initial_weights(initial)
            await trio.to_thread.run_sync(self._checkpoints.save, 0, weights)
            self._driver.set_ready(1)
            await self._exchange.until(lambda: len(self._members()) >= rounds.client_num)
        if len(self._members()) < min(rounds.min_members, rounds.client_num):
            raise JoinError(
                f"Only {len(self._members())} of {rounds.client_num} members came within "
                f"{rounds.join_timeout:g} s (federate.join_timeout); start the others, or lower "
                "federate.client_num on every peer."
            )
        with trio.move_on_after(edge_timeout):
            await self._exchange.until(self._edges_open)
        self._rounds.resume(1, initial)

    async def _initial_weights(self, initial: bytes) -> dict[str, Array]:
        """Our own start weights where they are the swarm's, else some member's."""
        if self._start.hash == initial:
            return self._start.weights
        while True:
            for peer in self._others() or self._driver.machine.joining():
                arrays = await self._catch_up.fetch(peer, initial)
                if arrays is not None:
                    return arrays
            await trio.sleep(PAUSE)

    def _edges_open(self) -> bool:
        edges = self._exchange.edges
        return all(peer in edges and edges[peer].ask is not None for peer in self._exchange.wanted)
