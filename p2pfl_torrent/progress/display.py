"""Shows a swarm while it runs: redrawn in place on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live

from p2pfl_torrent.progress import views
from p2pfl_torrent.progress.state import SwarmState
from p2pfl_torrent.statistics import PeerEvent, PeerStatistics

REFRESH_INTERVAL = 0.2  # seconds: five frames a second look alive and cost some 2% of a core


class Display:
    """Feeds a ``SwarmState`` and shows it. Used by one thread at a time.

    Args:
        console: decides by itself whether it is a terminal, how wide, and (NO_COLOR) in colour.
    """

    def __init__(self, swarm: SwarmState, console: Console) -> None:
        self.swarm = swarm
        self.console = console
        self._drawn_at = 0.0
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False, get_renderable=self._frame)

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.__exit__(kind, error, trace)

    def event(self, label: str, event: PeerEvent) -> None:
        """A peer's event."""
        self._line(self.swarm.apply(label, event))

    def observe(self, label: str, snapshot: PeerStatistics) -> None:
        """A peer's latest snapshot."""
        self.swarm.observe(label, snapshot)

    def fail(self, label: str, problem: str) -> None:
        """A peer ended with an error."""
        self._line(self.swarm.fail(label, problem))

    def say(self, line: str) -> None:
        """Tell something that no peer said."""
        self.swarm.ticker.append(line)
        self._line(line)

    def refresh(self) -> None:
        """Redraw if it is time to."""
        now = time.monotonic()
        if self._live is not None and now - self._drawn_at >= REFRESH_INTERVAL:
            self._drawn_at = now
            self._live.refresh()

    def show(self, renderable: RenderableType) -> None:
        """Print something for good, below the view."""
        self.console.print(renderable)

    def _frame(self) -> RenderableType:
        width, height = self.console.size
        return views.live(self.swarm, width, height, ascii_only=self.console.options.ascii_only)

    def _line(self, line: str | None) -> None:
        if line is not None and self._live is None:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # Rich would end the process from here; what a command runs is ended by its caller.
        raise BrokenPipeError("whoever read this is gone")


def console_for(stream: TextIO | None = None, *, plain: bool = False) -> Console:
    """A console on a stream; tables keep a readable width where it is no terminal.

    Args:
        plain: treat it as no terminal: lines, no colour.
    """
    console = _Console(
        file=stream if stream is not None else sys.stdout,
        force_terminal=False if plain else None,
        highlight=False,
    )
    if not console.is_terminal:
        console.width = max(console.width, 120)
    return console
