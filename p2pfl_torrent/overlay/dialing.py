"""Reaching a peer that has several addresses, some of which may be dead."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from multiaddr import Multiaddr
from multiaddr.exceptions import MultiaddrError

from p2pfl_torrent.core.errors import P2PFLError
from p2pfl_torrent.overlay.negotiation import NEGOTIATION_ERRORS

STAGGER = 0.25
"""Seconds before the next address is tried beside those still trying (RFC 8305: 0.25). An
address that fails makes room at once."""

MAX_ADDRESSES = 16
"""Addresses of one peer that are tried; they come from other peers, so somebody must stop."""

Attempt = Callable[[str], Awaitable[None]]


class DialError(P2PFLError):
    """A peer could not be reached; the text says where it was tried and what happened."""


async def first_to_answer(addresses: Sequence[str], attempt: Attempt) -> list[str] | None:
    """Tries ``attempt`` on each address, staggered, until one succeeds; the others are cancelled.

    ``attempt`` raises :class:`DialError` for a failure. Returns None after a success, else what
    each failure said.
    """
    failures: list[str] = []
    reached = False

    async def one(address: str, failed: trio.Event) -> None:
        nonlocal reached
        try:
            await attempt(address)
        except DialError as error:
            failures.append(str(error))
            failed.set()
        else:
            reached = True
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for address in addresses[:MAX_ADDRESSES]:
            failed = trio.Event()
            nursery.start_soon(one, address, failed)
            with trio.move_on_after(STAGGER):
                await failed.wait()
    return None if reached else failures


def address_of(peer_id: str, address: str) -> Multiaddr:
    """An address at which a peer is to be dialled.

    Raises:
        DialError: it is malformed, another peer's, or not a TCP address.
    """
    try:
        maddr = Multiaddr(address)
        named = maddr.get_peer_id()
        names = [protocol.name for protocol in maddr.protocols()]
    except (MultiaddrError, ValueError) as error:
        raise DialError(f"{address[:80]!r} is not a multiaddress") from error
    if named not in (None, peer_id):
        raise DialError(f"{address} is another peer's address")
    if names[1:] not in (["tcp"], ["tcp", "p2p"]):
        raise DialError(f"{address}: only TCP addresses can be reached")
    return maddr


def why(error: BaseException) -> str:
    """What stopped a dial, in a few words; the first cause in the library's chain of wrappers."""
    while isinstance(error.__cause__, BaseLibp2pError) and str(error.__cause__):
        error = error.__cause__
    text = str(error) or type(error).__name__
    if isinstance(error, PeerIDMismatchesPubkey):
        return f"the peer that answers there is {text.rpartition('=')[2]}"
    if isinstance(error, NEGOTIATION_ERRORS):
        if text.startswith("the stream"):  # ended, or broke
            return "what answers there hangs up: it is no libp2p peer, or has no place left"
        return f"what answers there is no libp2p peer ({text})"
    return text.partition(" for /")[0]  # the address, which our sentence has already
