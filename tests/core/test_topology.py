"""Overlays are connected, bounded, alike everywhere, and change little with one member."""

from __future__ import annotations

import statistics

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.genesis import TopologyTerms
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.topology import TYPES, Neighbours, drawn, neighbours, to_networkx, validate

SEED_GRAPH = ((1, (2, 3, 4)), (2, (1, 5)), (3, (1, 4, 5)), (4, (1, 3)), (5, (2, 3)))


def terms(
    kind: str,
    connections: int = 3,
    arity: int = 2,
    graph: tuple[tuple[int, tuple[int, ...]], ...] = SEED_GRAPH,
    members: tuple[str, ...] = (),
) -> TopologyTerms:
    return TopologyTerms(kind, connections, arity, graph if kind == "custom" else (), members)


def roster_of(size: int, seed: int = 0) -> list[PeerId]:
    """A roster in which all joined in the same round."""
    return sorted((PeerId(f"peer{i}") for i in range(size)), key=lambda peer: drawn(seed, peer))


def edges(overlay: Neighbours) -> set[frozenset[PeerId]]:
    return {frozenset((peer, other)) for peer, others in overlay.items() for other in others}


def text(overlay: Neighbours) -> str:
    """Edges as ``ab bc``, for members with names of one letter."""
    return " ".join(sorted("".join(sorted(edge)) for edge in edges(overlay)))


any_terms = st.builds(
    terms,
    kind=st.sampled_from(TYPES),
    connections=st.integers(1, 12),
    arity=st.integers(1, 5),
)


@given(size=st.integers(0, 40), topology=any_terms, seed=st.integers(0, 1 << 53))
def test_every_overlay_is_symmetric_and_connected(
    size: int, topology: TopologyTerms, seed: int
) -> None:
    roster = roster_of(size, seed)
    overlay = neighbours(roster, topology, seed)
    assert list(overlay) == roster
    for peer, others in overlay.items():
        assert peer not in others
        assert all(peer in overlay[other] for other in others)
    if size:
        assert nx.is_connected(to_networkx(overlay))
    assert overlay == neighbours(tuple(roster), topology, seed)


@given(
    order=st.permutations(roster_of(20)),
    kind=st.sampled_from(["ring", "mesh", "full"]),
    connections=st.integers(1, 8),
)
def test_rings_and_meshes_do_not_depend_on_the_order(
    order: list[PeerId], kind: str, connections: int
) -> None:
    topology = terms(kind, connections)
    assert neighbours(order, topology, 5) == neighbours(sorted(order), topology, 5)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_small_swarms_are_full_where_they_can_be(kind: str, size: int) -> None:
    overlay = neighbours(roster_of(size), terms(kind), 0)
    complete = size * (size - 1) // 2
    least = complete if kind in {"full", "mesh", "ring"} else max(0, size - 1)
    assert least <= len(edges(overlay)) <= complete


def test_a_star_has_the_first_of_the_roster_as_hub() -> None:
    assert text(neighbours([PeerId(p) for p in "bacd"], terms("star"), 0)) == "ab bc bd"


@given(size=st.integers(3, 60), seed=st.integers(0, 1000))
def test_a_ring_gives_everybody_two(size: int, seed: int) -> None:
    overlay = neighbours(roster_of(size), terms("ring"), seed)
    assert {len(others) for others in overlay.values()} == {2}


@pytest.mark.parametrize("connections", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("size", [10, 50, 120])
def test_a_mesh_has_about_the_degree_asked_for(size: int, connections: int) -> None:
    for seed in range(5):
        overlay = neighbours(roster_of(size), terms("mesh", connections), seed)
        degrees = [len(others) for others in overlay.values()]
        assert max(degrees) <= max(2, connections)
        assert statistics.mean(degrees) >= max(2, connections) - 0.5
        assert min(degrees) >= 2


def test_a_mesh_is_far_smaller_across_than_a_ring() -> None:
    mesh = to_networkx(neighbours(roster_of(50), terms("mesh", 3), 1))
    assert nx.diameter(mesh) <= 9  # a ring of 50 has 25


@given(size=st.integers(1, 80), arity=st.integers(1, 6), seed=st.integers(0, 1000))
@settings(max_examples=50)
def test_a_tree_has_its_arity_and_parents_that_joined_before(
    size: int, arity: int, seed: int
) -> None:
    roster = roster_of(size, seed)
    tree = to_networkx(neighbours(roster, terms("tree", arity=arity), seed))
    assert nx.is_tree(tree)
    assert tree.degree[roster[0]] <= arity
    place = {peer: i for i, peer in enumerate(roster)}
    for parent, child in nx.bfs_edges(tree, roster[0]):
        assert place[parent] < place[child]
        assert tree.degree[child] <= arity + 1


def test_a_tree_of_fifty_is_shallow() -> None:
    for seed in range(10):
        roster = roster_of(50, seed)
        tree = to_networkx(neighbours(roster, terms("tree"), seed))
        assert max(nx.single_source_shortest_path_length(tree, roster[0]).values()) <= 10


@pytest.mark.parametrize(
    ("topology", "degree", "bound", "mean"),
    [
        (terms("ring"), 2, 3, 3),
        (terms("mesh", 2), 2, 3, 3),
        (terms("mesh", 3), 3, 30, 9),
        (terms("mesh", 4), 4, 14, 8),
        (terms("mesh", 8), 8, 40, 18),
        (terms("tree", arity=2), 3, 18, 5),
        (terms("tree", arity=4), 5, 30, 5),
    ],
    ids=lambda value: f"{value.type}-{value.connections}" if hasattr(value, "type") else "",
)
def test_one_member_of_fifty_more_or_less_moves_few_edges(
    topology: TopologyTerms, degree: int, bound: int, mean: float
) -> None:
    """A random regular graph drawn anew would replace nearly all 75 edges of a mesh."""
    changes: list[int] = []
    for seed in range(4):
        roster = roster_of(50, seed)
        before = edges(neighbours(roster, topology, seed))
        for gone in roster:
            after = edges(neighbours([p for p in roster if p != gone], topology, seed))
            changes.append(len(before ^ after))
    assert max(changes) <= bound
    assert statistics.mean(changes) <= mean <= 3 * degree


def test_a_newcomer_to_a_tree_or_star_takes_one_edge_and_moves_none() -> None:
    for topology in (terms("tree"), terms("star")):
        roster = roster_of(50)
        before = edges(neighbours(roster, topology, 0))
        after = edges(neighbours([*roster, PeerId("late")], topology, 0))
        assert before < after
        assert len(after) == len(before) + 1


# --- custom graphs ---------------------------------------------------------------------------


def test_the_seeds_graph_by_position_and_by_member() -> None:
    roster = [PeerId(p) for p in "abcde"]
    expected = "ab ac ad be cd ce"
    assert text(neighbours(roster, terms("custom"), 0)) == expected
    named = terms("custom", members=tuple("abcde"))
    assert text(neighbours(roster[::-1], named, 0)) == expected


def test_an_edge_named_once_goes_both_ways() -> None:
    graph = ((1, (2,)), (3, (2,)))
    assert text(neighbours([PeerId(p) for p in "abc"], terms("custom", graph=graph), 0)) == "ab bc"


@pytest.mark.parametrize("gone", list("abcde"))
def test_a_custom_graph_is_mended_where_a_member_is_missing(gone: str) -> None:
    named = terms("custom", graph=((1, (2, 3, 4, 5)),), members=tuple("abcde"))  # a star around a
    roster = [PeerId(p) for p in "abcde" if p != gone]
    overlay = neighbours(roster, named, 0)
    assert nx.is_connected(to_networkx(overlay))
    assert len(edges(overlay)) == 3
    if gone != "a":
        assert len(overlay[PeerId("a")]) == 3


def test_members_outside_the_graph_are_attached_without_crowding_one() -> None:
    named = terms("custom", members=tuple("abcde"))
    roster = [PeerId(p) for p in "abcdefghij"]
    overlay = neighbours(roster, named, 0)
    assert nx.is_connected(to_networkx(overlay))
    assert edges(neighbours(roster[:5], named, 0)) < edges(overlay)
    assert all(len(overlay[PeerId(p)]) <= 2 for p in "fghij")


# --- what a user may write -------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_right_passes(kind: str) -> None:
    validate(terms(kind), client_num=5)


@pytest.mark.parametrize(
    ("wrong", "client_num", "says"),
    [
        (terms("mehs"), 5, "did you mean mesh?"),
        (terms("blockchain"), 5, "it may be star, ring, mesh, tree, full, custom"),
        (terms("custom", graph=()), 5, "custom_graph is empty"),
        (terms("custom"), 4, "names member 5, but federate.client_num is 4"),
        (terms("custom", members=("a", "b")), 9, "names member 3, but topology.members has 2"),
        (terms("custom", members=("a", "b", "a", "c", "d")), 5, "lists a peer id twice"),
        (terms("custom", graph=((1, (1,)),)), 5, "member 1 its own neighbour"),
        (terms("custom", graph=((0, (1,)),)), 5, "names member 0"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    wrong: TopologyTerms, client_num: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=r"^topology\.") as caught:
        validate(wrong, client_num)
    assert says in str(caught.value)


def test_an_unknown_type_is_no_overlay() -> None:
    with pytest.raises(ConfigError, match=r"topology\.type"):
        neighbours(roster_of(3), terms("mehs"), 0)
