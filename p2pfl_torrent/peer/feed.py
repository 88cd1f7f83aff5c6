"""Hands a peer's events to whoever listens, in any thread, without ever waiting for a listener."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from p2pfl_torrent.core.reports import PeerEvent

DEFAULT_BACKLOG = 10_000  # events a slow listener may be behind: some 20 MB at worst


class Subscription(Iterator[PeerEvent]):
    """A blocking iterator over a peer's events; it ends when the peer has stopped.

    Attributes:
        missed: events thrown away, oldest first, because this listener was too slow.
    """

    def __init__(self, backlog: int) -> None:
        self.missed = 0
        self._events: deque[PeerEvent] = deque(maxlen=backlog)
        self._changed = threading.Condition()
        self._ended = False

    def put(self, event: PeerEvent) -> None:
        """Called by the feed."""
        with self._changed:
            if len(self._events) == self._events.maxlen:
                self.missed += 1
            self._events.append(event)
            self._changed.notify()

    def end(self) -> None:
        """No more events will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def drain(self) -> list[PeerEvent]:
        """What has come since, without waiting."""
        with self._changed:
            events = list(self._events)
            self._events.clear()
            return events

    def __next__(self) -> PeerEvent:
        with self._changed:
            while not self._events:
                if self._ended:
                    raise StopIteration
                self._changed.wait()
            return self._events.popleft()


class EventFeed:
    """Fans events out to subscriptions."""

    def __init__(self) -> None:
        self._subscriptions: list[Subscription] = []
        self._lock = threading.Lock()
        self._ended = False

    def subscribe(self, backlog: int = DEFAULT_BACKLOG) -> Subscription:
        """A new listener, from now on."""
        subscription = Subscription(backlog)
        with self._lock:
            if self._ended:
                subscription.end()
            self._subscriptions.append(subscription)
        return subscription

    def emit(self, event: PeerEvent) -> None:
        """Hand an event to every listener."""
        for subscription in self._subscriptions:
            subscription.put(event)

    def end(self) -> None:
        """The peer has stopped."""
        with self._lock:
            self._ended = True
            for subscription in self._subscriptions:
                subscription.end()
