"""A bootstrap-only node: a meeting place that is no member of any swarm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import trio

from p2pfl_torrent.core.errors import P2PFLError
from p2pfl_torrent.overlay.bootstrap import Registry
from p2pfl_torrent.overlay.host import open_host
from p2pfl_torrent.overlay.identity import Identity, verify
from p2pfl_torrent.overlay.stream import Stream
from p2pfl_torrent.peer.adapters import StreamPort
from p2pfl_torrent.protocols.members import PROTOCOL_ID, serve_members

OnReady = Callable[[tuple[str, ...]], None]


async def serve_bootstrap(
    listen: Sequence[str],
    state_dir: Path | None,
    on_ready: OnReady,
) -> None:
    """Run until cancelled; ``on_ready`` is told the addresses to give to peers.

    Args:
        state_dir: where the identity is kept, so that the address stays the same; None: a new one.

    Raises:
        HostError, IdentityError: one sentence each.
    """
    identity = (
        Identity.ephemeral()
        if state_dir is None
        else Identity.load_or_create(state_dir / "identity.key")
    )
    async with open_host(identity, listen) as host:
        registry = Registry(verify, trio.current_time)

        async def serve(stream: Stream) -> None:
            await serve_members(StreamPort(stream), registry.answer)

        host.set_handler(PROTOCOL_ID, serve)
        on_ready(host.addrs())
        await trio.sleep_forever()


def run_bootstrap(listen: Sequence[str], state_dir: Path | None, on_ready: OnReady) -> None:
    """Blocking form of ``serve_bootstrap``.

    Raises:
        KeyboardInterrupt: after SIGINT or SIGTERM, when everything is closed.
        HostError, IdentityError: one sentence each.
    """
    interrupted = trio.run(
        _until_interrupted, partial(serve_bootstrap, listen, state_dir, on_ready)
    )
    if interrupted:
        raise KeyboardInterrupt


async def _until_interrupted(serve: Callable[[], Awaitable[None]]) -> bool:
    """Serve until a signal comes; whether one did.

    Left to itself, KeyboardInterrupt is raised in whichever task runs just then, one of the
    library's for all we know, which may wrap it, or take it for its connection's trouble and go on.
    """
    if threading.current_thread() is not threading.main_thread():
        await serve()  # only the main thread can receive signals
        return False
    failure: BaseException | None = None
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def serving() -> None:
                nonlocal failure
                try:
                    await serve()
                except P2PFLError as error:  # raised again below, not wrapped in a group
                    failure = error
                    nursery.cancel_scope.cancel()

            nursery.start_soon(serving)
            async for _ in signals:
                nursery.cancel_scope.cancel()
                return True
    if failure is not None:
        raise failure
    return False
