"""When silence becomes a question, and a question a suspicion.

Any byte from a peer proves that it lives. Of a watched peer that has been silent for a while one
asks by a probe, which opens a stream anew; only silence and a failed probe together make a
suspicion. A lost edge is asked about at once, and no more than the failed probe is needed then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from p2pfl_torrent.core.peers import PeerId


@dataclass(frozen=True, slots=True)
class LivenessPolicy:
    """Times of the failure detector, all in seconds.

    Attributes:
        probe_after: silence of a neighbour after which it is probed. Pings come each second, so
            two have gone unanswered.
        suspect_after: silence that, with a failed probe, makes a suspicion.
        probe_timeout: how long a probe may take.
        sync_timeout: how long a comparison of statements may take.
        round_trips: no time above is shorter than this many of the measured round trips, in which
            a probe dials, shakes hands and asks.
        longest: however slow a link is, nothing above is longer than this.
        confirm_grace: between enough witnesses and the verdict, for the subject to refute.
        confirm_retry: without enough witnesses, when further members are asked to look.
        refute_interval: a subject refutes at most this often, however often it is accused.
        sync_joining, sync_started: between two comparisons with somebody, before and after the
            first round began.
        tick: how often the machine wants to be told that time has passed.
        frozen: a pause between two ticks that means that this very process stood still, so that
            the silence of the others is no sign.
    """

    probe_after: float = 2.5
    suspect_after: float = 4.0
    probe_timeout: float = 2.0
    sync_timeout: float = 5.0
    round_trips: float = 8.0
    longest: float = 20.0
    confirm_grace: float = 1.0
    confirm_retry: float = 3.0
    refute_interval: float = 0.5
    sync_joining: float = 1.5
    sync_started: float = 5.0
    tick: float = 0.25
    frozen: float = 1.5


MAX_PATIENCE = 8.0  # times the usual silence, for those that others reach again and again


@dataclass(slots=True)
class _Watched:
    """What is known of one neighbour's signs of life."""

    since: float
    edge_lost: bool = False
    next_probe: float = 0.0
    patience: float = 1.0


class Liveness:
    """Signs of life of all peers, and the questions about the watched ones."""

    def __init__(self, policy: LivenessPolicy) -> None:
        self._policy = policy
        self._heard: dict[PeerId, float] = {}
        self._round_trips: dict[PeerId, tuple[float, float]] = {}
        self._watched: dict[PeerId, _Watched] = {}
        self._probing: set[PeerId] = set()

    def watch(self, peers: Iterable[PeerId], now: float) -> None:
        """From now on, these are the peers whose silence matters."""
        wanted = set(peers)
        for peer in self._watched.keys() - wanted:
            del self._watched[peer]
        for peer in sorted(wanted - self._watched.keys()):
            self._watched[peer] = _Watched(since=now)

    def watched(self) -> list[PeerId]:
        """The watched peers, in canonical order."""
        return sorted(self._watched)

    def is_watched(self, peer: PeerId) -> bool:
        return peer in self._watched

    def heard(self, peer: PeerId, now: float, round_trip: float | None = None) -> None:
        """Bytes came from a peer; ``round_trip`` in seconds where they answered a ping."""
        self._heard[peer] = now
        watched = self._watched.get(peer)
        if watched is not None:
            watched.edge_lost = False
            watched.patience = 1.0
        if round_trip is not None:
            mean, deviation = self._round_trips.get(peer, (round_trip, round_trip / 2))
            deviation += (abs(round_trip - mean) - deviation) / 4  # RFC 6298's smoothing
            mean += (round_trip - mean) / 8
            self._round_trips[peer] = mean, deviation

    def last_heard(self, peer: PeerId) -> float | None:
        """When the last byte came from a peer."""
        return self._heard.get(peer)

    def edge_lost(self, peer: PeerId) -> bool:
        """The edge broke; whether the peer is watched and should be probed at once."""
        watched = self._watched.get(peer)
        if watched is None:
            return False
        watched.edge_lost = True
        return True

    def renewed(self, peer: PeerId, now: float, *, unheard: bool) -> None:
        """The peer refuted suspicions: its silence counts anew, longer where we were wrong alone.

        Args:
            unheard: we suspected it and others, not we, have heard from it since.
        """
        watched = self._watched.get(peer)
        if watched is not None:
            watched.since = now
            watched.edge_lost = False
            watched.patience = min(MAX_PATIENCE, watched.patience * (2.0 if unheard else 1.0))

    def slept(self, seconds: float, now: float) -> None:
        """This process stood still for so long, until now; nobody's silence counts for that."""
        for peer in self._heard:
            self._heard[peer] = min(now, self._heard[peer] + seconds)
        for watched in self._watched.values():
            watched.since = min(now, watched.since + seconds)

    # --- probes --------------------------------------------------------------------------------

    def silence(self, peer: PeerId, now: float) -> float:
        """Seconds since the last sign of life, or since the peer is watched or refuted."""
        watched = self._watched.get(peer)
        since = watched.since if watched is not None else float("-inf")
        return now - max(since, self._heard.get(peer, float("-inf")))

    def stretched(self, seconds: float, peer: PeerId) -> float:
        """A time of the policy, as long as the peer's measured round trips demand."""
        mean, deviation = self._round_trips.get(peer, (0.0, 0.0))
        by_link = self._policy.round_trips * (mean + 4 * deviation)
        return max(seconds, min(by_link, self._policy.longest))

    def probe_timeout(self, peer: PeerId) -> float:
        """How long a probe of this peer may take."""
        return self.stretched(self._policy.probe_timeout, peer)

    def begin_probe(self, peer: PeerId) -> bool:
        """Whether a probe may begin now: one at a time for each peer."""
        if peer in self._probing:
            return False
        self._probing.add(peer)
        return True

    def end_probe(self, peer: PeerId, now: float) -> None:
        """A probe is over; the next one waits for a while."""
        self._probing.discard(peer)
        watched = self._watched.get(peer)
        if watched is not None:
            watched.next_probe = now + self._policy.probe_timeout / 2

    def questionable(self, now: float) -> Iterator[PeerId]:
        """Watched peers that have been silent long enough to be probed."""
        for peer in self.watched():
            watched = self._watched[peer]
            patience = watched.patience * self.stretched(self._policy.probe_after, peer)
            overdue = self.silence(peer, now) >= patience or watched.edge_lost
            if overdue and now >= watched.next_probe and peer not in self._probing:
                yield peer

    def is_gone(self, peer: PeerId, now: float) -> bool:
        """Whether a probe that failed just now, with what else is known, makes a suspicion."""
        watched = self._watched.get(peer)
        if watched is None:
            return False
        patience = watched.patience * self.stretched(self._policy.suspect_after, peer)
        return watched.edge_lost or self.silence(peer, now) >= patience
