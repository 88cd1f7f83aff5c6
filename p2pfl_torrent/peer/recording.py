"""Keeps the run directory of a peer in a trio program."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from p2pfl_torrent.core.reports import PeerStatistics
from p2pfl_torrent.peer.feed import EventFeed
from p2pfl_torrent.runlog import Recorder, RunLogError


@asynccontextmanager
async def recorded(
    run_dir: str, feed: EventFeed, snapshot: Callable[[], PeerStatistics | None]
) -> AsyncIterator[None]:
    """Write what the feed tells inside the block to ``run_dir``; nothing where that is empty.

    Args:
        snapshot: called in trio's thread.

    Raises:
        RunLogError: on entering, if the directory cannot be written; at the end, if something
            could not be, and the block raised nothing itself.
    """
    if not run_dir:
        yield
        return
    token = trio.lowlevel.current_trio_token()

    def look() -> PeerStatistics | None:
        try:
            return trio.from_thread.run_sync(snapshot, trio_token=token)
        except trio.RunFinishedError:
            return None

    recorder = Recorder(Path(run_dir), feed.subscribe(), look)
    recorder.start()
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        # In a thread: the recorder's last look needs this one.
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(recorder.stop)
            except RunLogError:
                if succeeded:
                    raise
