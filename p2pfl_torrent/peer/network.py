"""How this peer's members reach each other, and how it finds its swarm in the first place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import trio
from multiaddr import Multiaddr

from p2pfl_torrent.config import explain
from p2pfl_torrent.core.census import Census
from p2pfl_torrent.core.errors import (
    ConfigError,
    GenesisMismatchError,
    P2PFLError,
    RemoteProtocolError,
)
from p2pfl_torrent.core.genesis import (
    Genesis,
    Terms,
    decode_genesis,
    decode_terms,
    encode_terms,
)
from p2pfl_torrent.core.joining import (
    Answer,
    Join,
    Mismatch,
    Question,
    Refused,
    SwarmRank,
    Welcome,
    swarm_rank,
)
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.exchange.ports import EdgeClosedError
from p2pfl_torrent.overlay.gossip import Gossip
from p2pfl_torrent.overlay.host import Host
from p2pfl_torrent.overlay.identity import verify
from p2pfl_torrent.peer.adapters import open_stream
from p2pfl_torrent.protocols.members import PROTOCOL_ID, ask

JOIN_PATIENCE = 10.0  # seconds for one answer of a bootstrap peer, dialling included
SECOND_OPINION = 1.0  # seconds for the other bootstrap peers, once one has named the swarm
RETRY_PAUSE = 0.5  # seconds before the second try, then twice as long each time


class JoinError(P2PFLError):
    """The swarm could not be joined; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Welcomed:
    """What a bootstrap peer said: the swarm, and its members' signed statements.

    Attributes:
        via: who said it; None where this peer is its own bootstrap peer.
        rank: of several swarms of the same terms, the one with the lowest goes on.
    """

    genesis: Genesis
    statements: bytes
    via: PeerId | None
    rank: SwarmRank

    @classmethod
    def of(
        cls, genesis: Genesis, census: Census, statements: bytes = b"", via: PeerId | None = None
    ) -> Welcomed:
        """With its rank."""
        return cls(genesis, statements, via, swarm_rank(genesis, census))

    @property
    def begun(self) -> bool:
        """Whether as many are ready there as its first round waits for."""
        return not self.rank[0]


class HostNetwork:
    """The members protocol and the members' gossip topic over one host."""

    def __init__(self, host: Host, gossip: Gossip, topic: str) -> None:
        self._host = host
        self._gossip = gossip
        self._topic = topic

    async def ask(
        self, peer: PeerId, addrs: Sequence[str], question: Question, timeout: float
    ) -> Answer:
        """Connect where needed and ask; EdgeClosedError, RemoteProtocolError."""
        return await ask_peer(self._host, peer, addrs, question, timeout)

    async def gossip(self, data: bytes) -> None:
        """Publish a batch of statements."""
        await self._gossip.publish(self._topic, data)


async def ask_peer(
    host: Host, peer: PeerId, addrs: Sequence[str], question: Question, timeout: float
) -> Answer:
    """One question of the members protocol on a stream of its own."""
    with trio.move_on_after(timeout):
        stream = await open_stream(host, peer, addrs, PROTOCOL_ID)
        try:
            return await ask(stream, question, timeout)
        finally:
            with trio.CancelScope(shield=True):
                await stream.reset()
    raise EdgeClosedError(f"no answer in {timeout:g} s")


def parse_bootstrap(addrs: Sequence[str]) -> list[tuple[PeerId, str]]:
    """(peer, address) of each bootstrap address; ConfigError for one that names no peer."""
    result = []
    for text in addrs:
        try:
            address = Multiaddr(text)
            peer = address.get_peer_id()
        except Exception as error:  # multiaddr's own, ValueError, or what a codec raises
            raise ConfigError(f"network.bootstrap: {text!r} is not a multiaddress.") from error
        if peer is None:
            raise ConfigError(
                f"network.bootstrap: {text} names no peer; give the whole address that the other "
                "peer printed, ending in /p2p/ and its id."
            )
        result.append((PeerId(peer), text))
    return result


def founded(genesis: Genesis) -> Welcomed:
    """A swarm that nobody else knows yet."""
    return Welcomed.of(genesis, Census(genesis.swarm_id, verify))


async def find_swarm(
    host: Host, bootstrap: Sequence[str], terms: Terms, proposed: Genesis, attempts: int
) -> Welcomed:
    """The swarm of these terms; begun with ``proposed`` where no bootstrap peer knows one.

    All are asked before anything is proposed, so that one which is slow or briefly down does not
    make a second swarm.

    Raises:
        ConfigError: an address is malformed.
        GenesisMismatchError: the swarm of that name has other terms.
        JoinError: nobody answered, the answer was no, or two such swarms have begun.
    """
    # In the same order at every peer: those who propose at once propose at the same bootstrap peer.
    places = sorted({at for at in parse_bootstrap(bootstrap) if at[0] != host.peer_id})
    question = Join(encode_terms(terms), b"", b"")
    failures: dict[str, str] = {}
    reached: list[_Place] = []
    for attempt in range(attempts):
        if attempt:
            await trio.sleep(RETRY_PAUSE * 2 ** (attempt - 1))
        answers = await _ask_all(host, places, question, failures)
        found = _welcomes(answers, terms, failures)
        if found:
            return _best(found)
        reached = list(answers)
        if len(reached) == len(places):
            break
    if places and not reached:
        raise JoinError(_unreachable(failures, attempts))
    return await _begin(host, reached, terms, proposed)


def _unreachable(failures: Mapping[str, str], attempts: int) -> str:
    reasons = "; ".join(
        reason if address in reason else f"{address}: {reason}"
        for address, reason in failures.items()
    )
    tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    return (
        f"No bootstrap peer could be reached after {tries}: {reasons}. Check "
        "network.bootstrap, and that the peer there is running."
    )


_Place = tuple[PeerId, str]
"""A bootstrap peer and its address."""


async def _begin(host: Host, places: Sequence[_Place], terms: Terms, proposed: Genesis) -> Welcomed:
    """Propose at one bootstrap peer after the other; what one has adopted is told to the next.

    Some may have adopted another peer's proposal meanwhile.
    """
    found: list[Welcomed] = []
    refusals: dict[str, str] = {}
    for place in places:
        genesis = found[0].genesis if found else proposed
        question = Join(encode_terms(terms), genesis.encode(), b"")
        answers = await _ask_all(host, [place], question, refusals)
        found += _welcomes(answers, terms, refusals)
    if places and not found:
        reasons = "; ".join(f"{address} refused: {why}" for address, why in refusals.items())
        raise JoinError(reasons)
    return _best(found) if found else founded(proposed)


async def _ask_all(
    host: Host, places: Sequence[_Place], question: Join, failures: dict[str, str]
) -> dict[_Place, Answer]:
    """The answers of those that gave one; once one knows the swarm, the others get little time."""
    answers: dict[_Place, Answer] = {}
    async with trio.open_nursery() as nursery:

        async def ask_one(place: _Place) -> None:
            peer, address = place
            try:
                answer = await ask_peer(host, peer, [address], question, JOIN_PATIENCE)
            except (EdgeClosedError, RemoteProtocolError) as error:
                failures[address] = str(error)
                return
            answers[place] = answer
            if isinstance(answer, Welcome):
                scope = nursery.cancel_scope
                scope.deadline = min(scope.deadline, trio.current_time() + SECOND_OPINION)

        for place in places:
            nursery.start_soon(ask_one, place)
    return {place: answers[place] for place in places if place in answers}


def _welcomes(
    answers: Mapping[_Place, Answer], terms: Terms, failures: dict[str, str]
) -> list[Welcomed]:
    """Who knows the swarm; those who do not are noted among the failures.

    Raises:
        GenesisMismatchError: nobody does, and somebody knows one of that name with other terms.
    """
    found: list[Welcomed] = []
    mismatch: GenesisMismatchError | None = None
    for (peer, address), answer in answers.items():
        try:
            if isinstance(answer, Welcome):
                found.append(read_welcome(answer, peer, terms))
            elif isinstance(answer, Mismatch):
                differing = explain(terms, decode_terms(answer.terms))
                mismatch = GenesisMismatchError(
                    f"The swarm {terms.name!r} at {address} has other terms: {differing}. Use the "
                    "same configuration and model as its members, or another swarm.name for a "
                    "swarm of your own."
                )
            elif isinstance(answer, Refused):
                failures[address] = answer.reason
            else:
                raise RemoteProtocolError(f"{type(answer).__name__} as answer to a Join", peer)
        except RemoteProtocolError as error:
            failures[address] = str(error)
    if mismatch is not None and not found:
        raise mismatch
    return found


def read_welcome(answer: Welcome, peer: PeerId, terms: Terms) -> Welcomed:
    """A swarm that a peer told of; RemoteProtocolError where it cannot be one of these terms."""
    genesis = decode_genesis(answer.genesis)
    if genesis.terms != terms:
        raise RemoteProtocolError("welcomed to a swarm with other terms", peer)
    census = Census(genesis.swarm_id, verify)
    census.merge(answer.statements)
    return Welcomed.of(genesis, census, answer.statements, peer)


def _best(found: Sequence[Welcomed]) -> Welcomed:
    """The swarm with the lowest rank.

    Raises:
        JoinError: two have begun.
    """
    swarms = {welcomed.genesis.swarm_id: welcomed for welcomed in reversed(found)}
    begun = [swarm for swarm in swarms.values() if swarm.begun]
    if len(begun) > 1:
        named = " and ".join(
            f"{swarm.genesis.swarm_id.hex()[:8]} at {swarm.via}" for swarm in begun
        )
        raise JoinError(
            f"Two swarms with the same terms have begun, {named}: keep in network.bootstrap only "
            "the addresses of the one that you want to join."
        )
    return min(swarms.values(), key=lambda swarm: swarm.rank)
