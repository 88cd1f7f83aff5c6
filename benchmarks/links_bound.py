"""What links allow at best when everybody is to have everybody's update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations

MAX_PEERS = 14  # all their subsets are looked at


@dataclass(frozen=True, slots=True)
class Goodput:
    """What a link carried of TCP's payload when it was measured, in bytes per second."""

    up: float
    down: float


@dataclass(frozen=True, slots=True)
class Bound:
    """No schedule needs less time.

    Attributes:
        peers: whose links it is that are busy all this time, as places.
        up: whether it is their uplinks, not their downlinks.
    """

    seconds: float
    peers: tuple[int, ...]
    up: bool


def bound(size: float, links: Sequence[Goodput], edges: Mapping[int, Set[int]]) -> Bound:
    """The largest of what each set of links needs.

    All uplinks together carry each update to each other peer, N (N - 1) of them. And into each set
    of peers every update from outside comes once at least: through the uplinks of those outside who
    have a neighbour inside, and the downlinks of those inside who have one outside. So a peer's own
    uplink carries its update once at least, and its downlink all the others'.

    Args:
        size: bytes of an update.
        links: of the peers, in order.
        edges: place -> places of its neighbours.
    """
    everybody = range(len(links))
    if len(links) > MAX_PEERS:
        raise ValueError(f"a bound of {len(links)} peers has too many cuts; {MAX_PEERS} can be had")
    whole = len(links) * (len(links) - 1) * size / sum(link.up for link in links)
    cuts = (
        found
        for count in range(1, len(links))
        for inside in combinations(everybody, count)
        for found in _cut(size, links, edges, frozenset(inside))
    )
    return max((Bound(whole, tuple(everybody), True), *cuts), key=lambda found: found.seconds)


def _cut(
    size: float,
    links: Sequence[Goodput],
    edges: Mapping[int, Set[int]],
    inside: frozenset[int],
) -> Iterator[Bound]:
    needed = (len(links) - len(inside)) * size
    into = tuple(peer for peer in range(len(links)) if peer not in inside and edges[peer] & inside)
    through = tuple(peer for peer in sorted(inside) if edges[peer] - inside)
    if not into:
        raise ValueError("the overlay is not connected")
    yield Bound(needed / sum(links[peer].up for peer in into), into, True)
    yield Bound(needed / sum(links[peer].down for peer in through), through, False)
