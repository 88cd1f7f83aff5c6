"""What a view knows of a swarm: events and snapshots of its peers, folded together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from p2pfl_torrent.progress.sentences import sentence
from p2pfl_torrent.statistics import (
    Joined,
    Left,
    PeerEvent,
    PeerStatistics,
    RoundClosed,
    RoundFinished,
    RoundReport,
    RoundStarted,
    TrainingProgress,
)

TICKER_LINES = 200  # kept, of which as many are shown as there is room for


@dataclass(slots=True)
class PeerState:
    """One peer as it last showed itself.

    Attributes:
        label: what the view calls it.
        peer: its PeerId, "" until it is known.
        phase: as in ``PeerStatistics``, or "starting", "left" or "failed".
        training: batches done and in total of this round.
        reports: the last report of each round.
        problem: one sentence where the phase is "failed".
    """

    label: str
    peer: str = ""
    phase: str = "starting"
    round: int = 0
    training: tuple[int, int] = (0, 0)
    loss: float | None = None
    snapshot: PeerStatistics | None = None
    reports: dict[int, RoundReport] = field(default_factory=dict)
    problem: str = ""

    @property
    def last(self) -> RoundReport | None:
        """The report of the round finished last."""
        return next(reversed(self.reports.values()), None)

    def apply(self, event: PeerEvent) -> None:
        """Take in an event."""
        if isinstance(event, Joined):
            self.peer = event.peer
            self.phase = "joining"
        elif isinstance(event, RoundStarted):
            self.round, self.phase, self.training = event.round, "training", (0, 0)
        elif isinstance(event, TrainingProgress):
            self.training = (event.done, event.total)
            self.loss = event.loss if event.loss is not None else self.loss
        elif isinstance(event, RoundClosed):
            self.phase = "aggregating"
        elif isinstance(event, RoundFinished):
            self.reports.pop(event.report.round, None)  # a repeated solo round comes last again
            self.reports[event.report.round] = event.report
        elif isinstance(event, Left):
            self.phase = "left"

    def observe(self, snapshot: PeerStatistics) -> None:
        """Take in a snapshot."""
        self.snapshot = snapshot
        self.peer = snapshot.peer
        if self.phase not in ("left", "failed"):
            self.phase = snapshot.phase
            self.round = max(self.round, min(snapshot.round, snapshot.total_rounds))

    def fail(self, problem: str) -> None:
        """The peer has ended with an error."""
        self.phase, self.problem = "failed", problem


class SwarmState:
    """The peers that a view shows, in order, and what happened lately.

    Args:
        name: the swarm's name.
        topology: its overlay, in words.
        labels: what to call the peers.
    """

    def __init__(self, name: str, topology: str, total_rounds: int, labels: Iterable[str]) -> None:
        self.name = name
        self.topology = topology
        self.total_rounds = total_rounds
        self.peers = {label: PeerState(label) for label in labels}
        self.ticker: deque[str] = deque(maxlen=TICKER_LINES)

    def apply(self, label: str, event: PeerEvent) -> str | None:
        """Take in a peer's event; the line that tells of it, if it is worth one."""
        if isinstance(event, RoundStarted) and event.round > self.total_rounds:
            return None  # the last aggregate would be the start of one more
        self.peers[label].apply(event)
        text = sentence(event, self.name_of)
        return None if text is None else self._tell(f"{label}: {text}")

    def observe(self, label: str, snapshot: PeerStatistics) -> None:
        """Take in a peer's snapshot."""
        self.peers[label].observe(snapshot)

    def fail(self, label: str, problem: str) -> str:
        """A peer has ended with an error; the line that tells of it."""
        self.peers[label].fail(problem)
        return self._tell(f"{label}: failed: {problem}")

    def _tell(self, line: str) -> str:
        self.ticker.append(line)
        return line

    def name_of(self, peer: str) -> str:
        """A peer's label, or the end of its id where it is none of the view's."""
        for state in self.peers.values():
            if state.peer == peer:
                return state.label
        return short_id(peer)

    @property
    def round(self) -> int:
        """The lowest round that a running peer is in."""
        running = [s.round for s in self.peers.values() if s.phase not in ("left", "failed")]
        return min(running, default=max((s.round for s in self.peers.values()), default=0))


def short_id(peer: str) -> str:
    """The last characters of an id: all Ed25519 ids begin alike."""
    return peer if len(peer) <= 10 else f"..{peer[-6:]}"
