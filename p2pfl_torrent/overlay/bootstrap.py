"""What a bootstrap-only node knows: which swarms there are, and who said what about their members.

It is a meeting place and no member: it passes no verdicts, nobody waits for it, and once peers have
met, its death changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from p2pfl_torrent.core.census import Census
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.genesis import Genesis, decode_genesis, decode_terms, encode_terms
from p2pfl_torrent.core.joining import (
    Answer,
    Join,
    Mismatch,
    Question,
    Refused,
    Sync,
    Welcome,
    answer_sync,
    swarm_rank,
)
from p2pfl_torrent.core.peers import PeerId, Verify
from p2pfl_torrent.core.statements import LEFT

MAX_SWARMS = 64
CONTACT_SECONDS = 60.0
"""A swarm none of whose members came by for so long is over, and its name free. In a running swarm
each member comes by about every 25 s."""


@dataclass(slots=True)
class _Swarm:
    """One swarm and when a member of it was last here."""

    genesis: Genesis
    census: Census
    contact: float


class Registry:
    """The rendezvous of any number of swarms, each known by its name."""

    def __init__(
        self,
        verify: Verify,
        clock: Callable[[], float],
        *,
        max_swarms: int = MAX_SWARMS,
        contact_seconds: float = CONTACT_SECONDS,
    ) -> None:
        self._verify = verify
        self._clock = clock
        self._max_swarms = max_swarms
        self._contact_seconds = contact_seconds
        self._swarms: dict[str, _Swarm] = {}
        self._by_id: dict[bytes, _Swarm] = {}

    def swarms(self) -> dict[str, int]:
        """For each swarm's name, how many peers are known that have not left."""
        return {
            name: sum(record.status != LEFT for record in swarm.census)
            for name, swarm in self._swarms.items()
        }

    def answer(self, question: Question, sender: PeerId) -> Answer:
        """The answer to a question of the members protocol.

        Raises:
            RemoteProtocolError: the question holds what no correct peer says.
        """
        if isinstance(question, Join):
            return self._join(question, sender)
        swarm = self._by_id.get(question.swarm)
        if swarm is None:
            return Refused("this bootstrap peer does not know that swarm")
        if not isinstance(question, Sync):
            return Refused("a bootstrap peer is no member")
        swarm.census.merge(question.news)
        self._note_contact(swarm, sender)
        return answer_sync(swarm.census, question)

    def _join(self, join: Join, sender: PeerId) -> Answer:
        terms = decode_terms(join.terms)
        swarm = self._swarms.get(terms.name)
        if swarm is None or self._is_over(swarm):
            if not join.genesis:
                return Refused("nobody has begun that swarm yet")
            proposed = decode_genesis(join.genesis)
            if proposed.terms != terms:
                raise RemoteProtocolError("a proposed genesis with other terms than asked for")
            swarm = self._adopt(proposed, swarm)
            if swarm is None:
                return Refused("this bootstrap peer has as many swarms as it can hold")
        if swarm.genesis.terms != terms:
            return Mismatch(encode_terms(swarm.genesis.terms))
        swarm = self._compared(join, swarm, sender)
        if join.genesis == swarm.genesis.encode():
            swarm.census.merge(join.record)
        self._note_contact(swarm, sender)
        return Welcome(swarm.genesis.encode(), swarm.census.missing_in(b""))

    def _compared(self, join: Join, swarm: _Swarm, sender: PeerId) -> _Swarm:
        """The swarm itself, or the one that its asker is in, if this one gives way to that."""
        if not join.genesis or not join.record:
            return swarm
        other = decode_genesis(join.genesis)
        if other.terms != swarm.genesis.terms:
            raise RemoteProtocolError("a proposed genesis with other terms than asked for")
        if other == swarm.genesis:
            return swarm
        census = Census(other.swarm_id, self._verify)
        census.merge(join.record)
        ours, theirs = swarm_rank(swarm.genesis, swarm.census), swarm_rank(other, census)
        has_begun = not ours[0]
        if has_begun or ours <= theirs:
            return swarm
        self._forget(swarm)
        return self._remember(other)

    def _adopt(self, genesis: Genesis, old: _Swarm | None) -> _Swarm | None:
        if old is not None and old.genesis == genesis:
            old.contact = self._clock()
            return old
        if old is not None:
            self._forget(old)
        elif len(self._swarms) >= self._max_swarms:
            over = [swarm for swarm in self._swarms.values() if self._is_over(swarm)]
            if not over:
                return None
            self._forget(min(over, key=lambda swarm: swarm.contact))
        return self._remember(genesis)

    def _remember(self, genesis: Genesis) -> _Swarm:
        swarm = _Swarm(genesis, Census(genesis.swarm_id, self._verify), self._clock())
        self._swarms[genesis.terms.name] = swarm
        self._by_id[genesis.swarm_id] = swarm
        return swarm

    def _forget(self, swarm: _Swarm) -> None:
        del self._swarms[swarm.genesis.terms.name]
        del self._by_id[swarm.genesis.swarm_id]

    def _note_contact(self, swarm: _Swarm, sender: PeerId) -> None:
        """Only members keep a swarm alive: a newcomer's question does not."""
        record = swarm.census.get(sender)
        if record is not None and record.status != LEFT:
            swarm.contact = self._clock()

    def _is_over(self, swarm: _Swarm) -> bool:
        everybody_left = len(swarm.census) > 0 and all(
            record.status == LEFT for record in swarm.census
        )
        return everybody_left or self._clock() - swarm.contact > self._contact_seconds
