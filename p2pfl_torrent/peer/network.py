"""How this peer's members reach each other, and how it finds its swarm in the first place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import trio
from multiaddr import Multiaddr

from p2pfl_torrent.config import explain
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
from p2pfl_torrent.core.joining import Answer, Join, Mismatch, Question, Refused, Welcome
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.exchange.ports import EdgeClosedError
from p2pfl_torrent.overlay.gossip import Gossip
from p2pfl_torrent.overlay.host import Host
from p2pfl_torrent.peer.adapters import open_stream
from p2pfl_torrent.protocols.members import PROTOCOL_ID, ask

JOIN_PATIENCE = 10.0  # seconds for one answer of a bootstrap peer, dialling included
RETRY_PAUSE = 0.5  # seconds before the second try, then twice as long each time


class JoinError(P2PFLError):
    """The swarm could not be joined; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Welcomed:
    """What a bootstrap peer said: the swarm, and its members' signed statements."""

    genesis: Genesis
    statements: bytes
    via: PeerId


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
        except Exception as error:
            raise ConfigError(f"network.bootstrap: {text!r} is not a multiaddress.") from error
        if peer is None:
            raise ConfigError(
                f"network.bootstrap: {text} names no peer; give the whole address that the other "
                "peer printed, ending in /p2p/ and its id."
            )
        result.append((PeerId(peer), text))
    return result


async def find_swarm(
    host: Host, bootstrap: Sequence[str], terms: Terms, proposed: Genesis, attempts: int
) -> Welcomed:
    """Ask the bootstrap peers for the swarm of these terms; the first of them to answer decides.

    Raises:
        ConfigError: an address is malformed.
        GenesisMismatchError: the swarm of that name has other terms.
        JoinError: nobody answered, or the answer was no.
    """
    question = Join(encode_terms(terms), proposed.encode(), b"")
    failures: dict[str, str] = {}
    for attempt in range(attempts):
        if attempt:
            await trio.sleep(RETRY_PAUSE * 2 ** (attempt - 1))
        for peer, address in parse_bootstrap(bootstrap):
            try:
                answer = await ask_peer(host, peer, [address], question, JOIN_PATIENCE)
                return _welcomed(answer, peer, address, terms)
            except (EdgeClosedError, RemoteProtocolError) as error:
                failures[address] = str(error)
    reasons = "; ".join(
        reason if address in reason else f"{address}: {reason}"
        for address, reason in failures.items()
    )
    tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    raise JoinError(
        f"No bootstrap peer could be reached after {tries}: {reasons}. Check "
        "network.bootstrap, and that the peer there is running."
    )


def _welcomed(answer: Answer, peer: PeerId, address: str, terms: Terms) -> Welcomed:
    if isinstance(answer, Mismatch):
        differing = explain(terms, decode_terms(answer.terms))
        raise GenesisMismatchError(
            f"The swarm {terms.name!r} at {address} has other terms: {differing}. Use the same "
            "configuration and model as its members, or another swarm.name for a swarm of your own."
        )
    if isinstance(answer, Refused):
        raise JoinError(f"{address} refused: {answer.reason}")
    if not isinstance(answer, Welcome):
        raise RemoteProtocolError(f"{type(answer).__name__} as answer to a Join", peer)
    genesis = decode_genesis(answer.genesis)
    if genesis.terms != terms:
        raise RemoteProtocolError("welcomed to a swarm with other terms", peer)
    return Welcomed(genesis, answer.statements, peer)
