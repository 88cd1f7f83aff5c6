"""Shows a peer of this very process while its own thread trains."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Protocol

from p2pfl_torrent.core.reports import Left, PeerEvent, PeerStatistics
from p2pfl_torrent.progress.display import Display

INTERVAL = 0.25  # seconds between two looks


class Events(Protocol):
    """What ``Peer.events()`` gives."""

    def drain(self) -> Iterable[PeerEvent]:
        """What has come since the last call, without waiting."""
        ...


class Following:
    """Feeds a display from a peer's events and snapshots, in a thread of its own.

    Args:
        snapshot: gives the peer's statistics, None while there are none.
    """

    def __init__(
        self,
        display: Display,
        label: str,
        events: Events,
        snapshot: Callable[[], PeerStatistics | None],
    ) -> None:
        self._display = display
        self._label = label
        self._events = events
        self._snapshot = snapshot
        self._stop = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="view", daemon=True)

    def __enter__(self) -> Following:
        self._display.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._display.__exit__(kind, error, trace)
        except OSError as broken:
            self._error = self._error or broken
        if kind is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.wait(INTERVAL):
                self._look()
            self._look()
        except OSError as error:  # whoever watched is gone; the training goes on to its end
            self._error = error

    def _look(self) -> None:
        for event in self._events.drain():
            if isinstance(event, Left) and event.reason != "finished":
                # Whoever runs this peer gets the error itself, and tells it once.
                self._display.swarm.peers[self._label].apply(event)
            else:
                self._display.event(self._label, event)
        snapshot = self._snapshot()
        if snapshot is not None:
            self._display.observe(self._label, snapshot)
        self._display.refresh()
