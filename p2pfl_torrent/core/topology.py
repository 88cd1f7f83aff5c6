"""Who is whose neighbour: every peer computes the same overlay from the same roster and seed.

Each overlay is a pure function of the members that are left, so it has no history to agree on; and
it is drawn so that one member more or less moves only edges near that member. A graph drawn anew,
or a heap whose later positions all shift by one, would replace most edges at every change.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.genesis import TopologyTerms
from p2pfl_torrent.core.peers import PeerId

if TYPE_CHECKING:
    import networkx as nx

MESH_WINDOW = (
    8  # places on a hash ring searched for the last edges: enough to find one nearly always
)

Neighbours = dict[PeerId, frozenset[PeerId]]


def drawn(seed: int, peer: PeerId, label: str = "") -> bytes:
    """What the swarm's seed draws for a peer, alike everywhere; another label draws anew."""
    return hashlib.sha256(seed.to_bytes(8, "big") + label.encode() + peer.encode()).digest()


def neighbours(roster: Sequence[PeerId], terms: TopologyTerms, seed: int) -> Neighbours:
    """The neighbours of every member, for members in join order.

    The result is symmetric, without self loops, and connected. Only a star, a tree and a custom
    graph without ``members`` look at the order: their first member is hub, root or number 1.

    Raises:
        ConfigError: an unknown topology type.
    """
    build = _BUILDERS.get(terms.type)
    if build is None:
        raise ConfigError(_unknown_type(terms.type))
    graph = _Graph(roster, build(roster, terms, seed))
    return {peer: frozenset(graph.adjacent[peer]) for peer in roster}


def overlay_seed(seed: int, terms: TopologyTerms, round: int) -> int:
    """The seed of a round's overlay: the swarm's, or another every ``terms.redraw`` rounds.

    New neighbours now and then spread what few links carry (Epidemic Learning, de Vos et al.,
    NeurIPS 2023).
    """
    if not terms.redraw:
        return seed
    epoch = max(0, round - 1) // terms.redraw
    digest = hashlib.sha256(f"overlay {seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def validate(terms: TopologyTerms, client_num: int) -> None:
    """Check a user's topology.

    Raises:
        ConfigError: the text names the key and what it may be.
    """
    if terms.type not in _BUILDERS:
        raise ConfigError(_unknown_type(terms.type))
    if terms.type != "custom":
        return
    if not terms.custom_graph:
        raise ConfigError(
            "topology.custom_graph is empty: for a custom topology list each member's neighbours, "
            "such as 1: [2, 3]"
        )
    if len(set(terms.members)) != len(terms.members):
        raise ConfigError("topology.members lists a peer id twice: each number needs its own peer")
    size, source = (
        (len(terms.members), "topology.members has")
        if terms.members
        else (client_num, "federate.client_num is")
    )
    for position, others in terms.custom_graph:
        for number in (position, *others):
            if not 1 <= number <= size:
                raise ConfigError(
                    f"topology.custom_graph names member {number}, but {source} {size}: "
                    f"use numbers from 1 to {size}"
                )
        if position in others:
            raise ConfigError(
                f"topology.custom_graph makes member {position} its own neighbour: remove it there"
            )


def to_networkx(overlay: Mapping[PeerId, Iterable[PeerId]]) -> nx.Graph:
    """The overlay as an undirected graph, to check or to draw."""
    # Only here: it takes 11 MB, and a peer needs no more of a graph than `_Graph`.
    import networkx as nx

    return nx.Graph({peer: sorted(others) for peer, others in overlay.items()})


# --- the topologies --------------------------------------------------------------------------

_Edge = tuple[PeerId, PeerId]


class _Graph:
    """An undirected graph without self loops."""

    def __init__(self, members: Iterable[PeerId], edges: Iterable[_Edge] = ()) -> None:
        self.adjacent: dict[PeerId, set[PeerId]] = {peer: set() for peer in members}
        for a, b in edges:
            self.connect(a, b)

    def connect(self, a: PeerId, b: PeerId) -> None:
        self.adjacent[a].add(b)
        self.adjacent[b].add(a)

    def degree(self, peer: PeerId) -> int:
        return len(self.adjacent[peer])

    def edges(self) -> list[_Edge]:
        return [(a, b) for a, others in self.adjacent.items() for b in others if a < b]

    def parts(self) -> list[set[PeerId]]:
        """The connected components."""
        parts: list[set[PeerId]] = []
        left = set(self.adjacent)
        while left:
            part: set[PeerId] = set()
            reached = {left.pop()}
            while reached:
                part |= reached
                reached = set().union(*(self.adjacent[peer] for peer in reached)) - part
            parts.append(part)
            left -= part
        return parts


def _star(roster: Sequence[PeerId], terms: TopologyTerms, seed: int) -> list[_Edge]:
    return [(roster[0], peer) for peer in roster[1:]]


def _full(roster: Sequence[PeerId], terms: TopologyTerms, seed: int) -> list[_Edge]:
    return [(a, b) for i, a in enumerate(roster) for b in roster[:i]]


def _ring(roster: Sequence[PeerId], terms: TopologyTerms, seed: int) -> list[_Edge]:
    return _around(_hash_ring(roster, seed, "ring"))


def _hash_ring(roster: Iterable[PeerId], seed: int, label: str) -> list[PeerId]:
    return sorted(roster, key=lambda peer: drawn(seed, peer, label))


def _around(ring: Sequence[PeerId]) -> list[_Edge]:
    return [(a, b) for a, b in zip(ring, (*ring[1:], *ring[:1]), strict=True) if a != b]


def _tree(roster: Sequence[PeerId], terms: TopologyTerms, seed: int) -> list[_Edge]:
    """A digital search tree in heap order: parents joined before their children.

    Every member goes down from the root by the digits (base arity) of its hash and settles at the
    first free place. So a newcomer is a leaf, a leaf that goes takes one edge with it, and an inner
    member is replaced from below along one path; the depth stays near log(n).
    """
    arity = terms.arity
    if arity == 1:
        return list(itertools.pairwise(roster))
    edges: list[_Edge] = []
    places: dict[tuple[int, ...], PeerId] = {}
    for peer in roster:
        place: tuple[int, ...] = ()
        digits = int.from_bytes(drawn(seed, peer, "tree"), "big")
        parent: PeerId | None = None
        while place in places:
            parent = places[place]
            digits, digit = divmod(digits, arity)
            place = (*place, digit)
        places[place] = peer
        if parent is not None:
            edges.append((parent, peer))
    return edges


def _mesh(roster: Sequence[PeerId], terms: TopologyTerms, seed: int) -> list[_Edge]:
    """Several hash rings over each other, then single edges between those still below the degree.

    The first ring connects everybody. One member less takes two edges from each ring and adds one.
    """
    connections = max(2, terms.connections)  # below 2 nothing larger than a pair is connected
    if len(roster) <= connections + 1:
        return _full(roster, terms, seed)
    rings = [_hash_ring(roster, seed, f"mesh {turn}") for turn in range(connections // 2)]
    graph = _Graph(roster, itertools.chain.from_iterable(map(_around, rings)))
    ring = _hash_ring(roster, seed, "mesh last")
    window = min(max(MESH_WINDOW, connections), len(ring) - 1)
    pairs = {
        frozenset((ring[i], ring[(i + step) % len(ring)]))
        for i in range(len(ring))
        for step in range(1, window + 1)
        if max(graph.degree(ring[i]), graph.degree(ring[(i + step) % len(ring)])) < connections
    }
    for a, b in sorted(map(sorted, pairs), key=lambda pair: _pair_rank(seed, *pair)):
        if max(graph.degree(a), graph.degree(b)) < connections:
            graph.connect(a, b)  # those that are neighbours already stay as they are
    return graph.edges()


def _pair_rank(seed: int, a: PeerId, b: PeerId) -> bytes:
    return hashlib.sha256(f"{seed} mesh {a} {b}".encode()).digest()


def _custom(roster: Sequence[PeerId], terms: TopologyTerms, seed: int) -> list[_Edge]:
    """The user's graph among those of its members that are here, mended where it falls apart."""
    numbered = [PeerId(member) for member in terms.members] or list(roster)
    here = set(roster)
    graph = _Graph(roster)
    for position, others in terms.custom_graph:
        for other in others:
            if max(position, other) <= len(numbered) and min(position, other) >= 1:
                a, b = numbered[position - 1], numbered[other - 1]
                if a != b and a in here and b in here:
                    graph.connect(a, b)
    _connect(graph, lambda peer: drawn(seed, peer, "repair"))
    return graph.edges()


def _connect(graph: _Graph, rank: Callable[[PeerId], bytes]) -> None:
    """Chain the parts of a graph, each by its members with the fewest edges."""
    parts = sorted(
        (sorted(part, key=rank) for part in graph.parts()),
        key=lambda part: rank(part[0]),
    )
    for part, following in itertools.pairwise(parts):
        a = min(part, key=lambda peer: (graph.degree(peer), rank(peer)))
        b = min(following, key=lambda peer: (graph.degree(peer), rank(peer)))
        graph.connect(a, b)


_BUILDERS: dict[str, Callable[[Sequence[PeerId], TopologyTerms, int], list[_Edge]]] = {
    "star": _star,
    "ring": _ring,
    "mesh": _mesh,
    "tree": _tree,
    "full": _full,
    "custom": _custom,
}
TYPES = tuple(_BUILDERS)


def _unknown_type(name: str) -> str:
    close = difflib.get_close_matches(name, _BUILDERS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"topology.type {name!r} is unknown: {hint}it may be {', '.join(_BUILDERS)}"
