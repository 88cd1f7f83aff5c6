"""Reaching a peer that has several addresses, some of which may be dead."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from p2pfl_torrent.core.errors import P2PFLError

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
