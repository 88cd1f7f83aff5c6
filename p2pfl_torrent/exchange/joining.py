"""How a newcomer finds its swarm: it asks the bootstrap peers it was given, or any member."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from p2pfl_torrent.core.encounters import Address
from p2pfl_torrent.core.errors import GenesisMismatchError, P2PFLError, RemoteProtocolError
from p2pfl_torrent.core.genesis import (
    Genesis,
    Terms,
    decode_genesis,
    decode_terms,
    difference,
    encode_terms,
)
from p2pfl_torrent.core.joining import Answer, Join, Mismatch, Refused, Welcome
from p2pfl_torrent.exchange.membership import MemberNetwork
from p2pfl_torrent.exchange.ports import EdgeClosedError

ASK_SECONDS = 5.0  # one question: a dial, a handshake and the statements of a large swarm
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 2.0  # between two rounds of asking, doubled each time


async def join_swarm(
    network: MemberNetwork,
    rendezvous: Sequence[Address],
    terms: Terms,
    proposal: Genesis | None,
    timeout: float,
) -> tuple[Genesis, bytes]:
    """The genesis of the swarm with these terms, and its member statements.

    Where no bootstrap peer knows such a swarm, the first that answers is asked to adopt the
    proposal; whoever proposes first wins, and the others get its genesis.

    Args:
        rendezvous: bootstrap peers or members; in the same order everywhere.
        proposal: the swarm this peer would begin; None to wait until somebody else begins it.
        timeout: seconds to go on trying.

    Raises:
        GenesisMismatchError: the swarm of that name has other terms.
        P2PFLError: no answer from any of them in time.
    """
    pause = FIRST_PAUSE
    why = "no bootstrap peer is configured"
    with trio.move_on_after(timeout):
        while rendezvous:
            # Who already knows the swarm is asked before somebody is told to begin another one.
            offers = (
                (None, proposal) if proposal is not None and len(rendezvous) > 1 else (proposal,)
            )
            for offer in offers:
                for at in rendezvous:
                    found = await _join_through(network, at, terms, offer)
                    if not isinstance(found, str):
                        return found
                    why = found
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
    names = ", ".join(_place(at) for at in rendezvous) or "nobody"
    raise P2PFLError(
        f"no way into the swarm {terms.name} in {timeout:g} s: asked {names}, and at last {why}"
    )


async def _join_through(
    network: MemberNetwork, at: Address, terms: Terms, offer: Genesis | None
) -> tuple[Genesis, bytes] | str:
    """What one bootstrap peer answers: the swarm, or why not."""
    join = Join(encode_terms(terms), offer.encode() if offer is not None else b"", b"")
    try:
        answer: Answer = await network.ask(*at, join, ASK_SECONDS)
        if isinstance(answer, Mismatch):
            told = difference(terms, decode_terms(answer.terms))
            if told:
                raise GenesisMismatchError(
                    f"the swarm {terms.name} at {_place(at)} has other terms, use its "
                    f"configuration or another name: {told}"
                )
        if isinstance(answer, Welcome):
            genesis = decode_genesis(answer.genesis)
            if genesis.terms == terms:
                return genesis, answer.statements
    except EdgeClosedError as error:
        return f"{_place(at)} cannot be reached ({error})"
    except RemoteProtocolError as error:
        return f"{_place(at)} does not speak this protocol ({error.reason})"
    if isinstance(answer, Refused):
        return f"{_place(at)} refused: {answer.reason}"
    return f"{_place(at)} answered something else"


def _place(at: Address) -> str:
    peer, addrs = at
    return addrs[0] if addrs else peer
