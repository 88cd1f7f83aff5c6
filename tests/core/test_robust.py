"""Robust rules against plain numpy, with missing chunks, shuffled arrival and dishonest owners."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from p2pfl_torrent.core.aggregation import AggregateResult, aggregate
from p2pfl_torrent.core.aggregators import (
    AggregationTerms,
    Aggregator,
    make_aggregator,
    register_aggregator,
)
from p2pfl_torrent.core.chunking import TensorSlice, encode_chunk, plan, slice_of
from p2pfl_torrent.core.contributions import contributions, importance_factor
from p2pfl_torrent.core.errors import ConfigError, LocalProtocolError
from p2pfl_torrent.core.events import CloseRound, Count, Fill
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.robust import Distances, squared_distance, trimmed_mean
from p2pfl_torrent.core.tensors import Array, ModelSpec, TensorSpec
from p2pfl_torrent.core.versions import Source
from tests.core.small_ledgers import WORLD, update
from tests.core.small_models import same_bits

Floats = npt.NDArray[np.float32]

ROWS, CHUNKS = 12, 4
SPEC = ModelSpec((TensorSpec("w", "F32", (ROWS, 3)),))
LAYOUT = plan(SPEC, num_chunks=CHUNKS, block_size=64)
UNWEIGHTED = ["fedmedian", "trimmed_mean", "krum", "multi_krum"]
ALL = ["fedavg", "fedprox", *UNWEIGHTED]

masks = st.lists(
    st.lists(st.booleans(), min_size=len(LAYOUT.chunks), max_size=len(LAYOUT.chunks)),
    min_size=1,
    max_size=7,
)


def values(count: int, seed: int) -> list[Floats]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((ROWS, 3)).astype(np.float32) for _ in range(count)]


START = values(1, 999)[0]


def merge(
    updates: Sequence[Floats],
    mask: Sequence[Sequence[bool]],
    aggregator: Aggregator,
    *,
    start_fills: bool = False,
) -> tuple[Floats, AggregateResult]:
    sources: dict[int, list[Source]] = {}
    for k in range(len(LAYOUT.chunks)):
        sources[k] = [
            (PeerId(f"p{i}"), UpdateId(bytes([i])) if mask[i][k] else None, 1.0 + i)
            for i in range(len(updates))
            if mask[i][k] or start_fills
        ]
    out = np.empty_like(START)

    def keep(part: TensorSlice, rows: Array) -> None:
        slice_of(out, part)[...] = rows

    def read(update: UpdateId, chunk: int) -> bytes:
        return encode_chunk(LAYOUT, chunk, {"w": updates[update[0]]})

    result = aggregate(LAYOUT, sources, read, {"w": START}, keep, aggregator=aggregator)
    return out, result


def rows_of(chunk: int) -> slice:
    (part,) = LAYOUT.chunks[chunk].slices
    return slice(part.start, part.stop)


def everything(count: int) -> list[list[bool]]:
    return [[True] * len(LAYOUT.chunks)] * count


@given(masks, st.integers(0, 99))
@settings(max_examples=60)
def test_medians_and_trimmed_means_are_numpys(mask: list[list[bool]], seed: int) -> None:
    updates = values(len(mask), seed)
    median, _ = merge(updates, mask, make_aggregator("fedmedian"))
    trimmed, _ = merge(
        updates, mask, make_aggregator("trimmed_mean", AggregationTerms(trim_share=0.3))
    )
    for k in range(len(LAYOUT.chunks)):
        here = rows_of(k)
        there = [np.float64(u[here]) for u, m in zip(updates, mask, strict=True) if m[k]]
        if len(there) < 3:
            assert same_bits(median[here], START[here])
            assert same_bits(trimmed[here], START[here])
            continue
        np.testing.assert_allclose(median[here], np.median(there, axis=0), rtol=1e-6)
        cut = min(math.ceil(0.3 * len(there) - 1e-9), (len(there) - 1) // 2)
        kept = np.sort(there, axis=0)[cut : len(there) - cut]
        np.testing.assert_allclose(trimmed[here], kept.mean(axis=0), rtol=1e-6, atol=1e-7)


@given(masks, st.integers(0, 99), st.integers(0, 3))
@settings(max_examples=60)
def test_krum_believes_those_who_are_closest(
    mask: list[list[bool]], seed: int, byzantine: int
) -> None:
    updates = values(len(mask), seed)
    terms = AggregationTerms(byzantine=byzantine)
    one, _ = merge(updates, mask, make_aggregator("krum", terms))
    many, _ = merge(updates, mask, make_aggregator("multi_krum", terms))
    ranking = _krum(updates, mask, byzantine)
    for k in range(len(LAYOUT.chunks)):
        here = rows_of(k)
        believed = [i for i in ranking if mask[i][k]]
        if not believed:
            assert same_bits(one[here], START[here])
            assert same_bits(many[here], START[here])
            continue
        assert same_bits(one[here], updates[believed[0]][here])
        mean = np.mean([np.float64(updates[i][here]) for i in believed], axis=0)
        np.testing.assert_allclose(many[here], mean, rtol=1e-6, atol=1e-7)


def _krum(updates: list[Floats], mask: list[list[bool]], byzantine: int) -> list[int]:
    """Krum as the paper has it, over the part of the model that two share."""
    owners = [i for i, held in enumerate(mask) if any(held)]
    if len(owners) < 3:
        return []
    delivered = sum(
        START[rows_of(k)].size for k in range(len(LAYOUT.chunks)) if any(m[k] for m in mask)
    )

    def distance(i: int, j: int) -> float:
        shared = [k for k in range(len(LAYOUT.chunks)) if mask[i][k] and mask[j][k]]
        size = sum(START[rows_of(k)].size for k in shared)
        parts = [np.float64(updates[i][rows_of(k)]) - updates[j][rows_of(k)] for k in shared]
        return sum(float((d * d).sum()) for d in parts) * delivered / size if size else math.inf

    nearest = max(1, len(owners) - byzantine - 2)
    scores = {i: sum(sorted(distance(i, j) for j in owners if j != i)[:nearest]) for i in owners}
    ranked = sorted((i for i in owners if scores[i] < math.inf), key=lambda i: (scores[i], i))
    believed = max(1, len(owners) - byzantine)
    return ranked[:believed] if len(ranked) >= believed else []


@pytest.mark.parametrize("name", ["krum", "multi_krum"])
def test_who_delivers_everything_is_not_believed_for_that(name: str) -> None:
    spec = ModelSpec((TensorSpec("w", "F32", (8, 3)),))
    layout = plan(spec, num_chunks=8, block_size=64)
    liar = np.full((8, 3), 1000.0, np.float32)
    honest = np.ones((8, 3), np.float32)
    by_name: dict[bytes, Array] = dict.fromkeys((b"0", b"1", b"2", b"3"), honest)
    sources: dict[int, list[Source]] = {
        k: [
            (PeerId("abcd"[k // 2]), UpdateId(str(k // 2).encode()), 1.0),
            (PeerId("z"), UpdateId(b"z"), 1.0),
        ]
        for k in range(8)
    }
    start, out = np.zeros((8, 3), np.float32), np.empty((8, 3), np.float32)

    def keep(part: TensorSlice, rows: Array) -> None:
        slice_of(out, part)[...] = rows

    def read(update: UpdateId, chunk: int) -> bytes:
        return encode_chunk(layout, chunk, {"w": by_name.get(update, liar)})

    aggregate(layout, sources, read, {"w": start}, keep, aggregator=make_aggregator(name))
    assert same_bits(out, start)


@pytest.mark.parametrize(
    ("count", "share", "cut"), [(4, 0.2, 1), (5, 0.2, 1), (6, 0.2, 2), (30, 0.1, 3), (9, 0.0, 0)]
)
def test_a_trim_is_rounded_up(count: int, share: float, cut: int) -> None:
    column = np.arange(count, dtype=np.float64)[:, None] ** 2
    merged = trimmed_mean(column, share)
    assert merged[0] == pytest.approx(column[cut : count - cut].mean())


@pytest.mark.parametrize("name", UNWEIGHTED)
def test_of_two_versions_nobody_can_say_which_one_lies(name: str) -> None:
    liar = np.full((ROWS, 3), -1000.0, np.float32)
    merged, result = merge([values(1, 4)[0], liar], everything(2), make_aggregator(name))
    assert same_bits(merged, START)
    assert result.untouched == len(LAYOUT.chunks)


@pytest.mark.parametrize("name", ALL)
def test_a_fifth_of_flipped_and_scaled_updates(name: str) -> None:
    rng = np.random.default_rng(1)
    truth = rng.standard_normal((ROWS, 3))
    updates: list[Floats] = [
        (truth + 0.1 * rng.standard_normal(truth.shape)).astype(np.float32) for _ in range(10)
    ]
    for liar in (2, 7):
        updates[liar] = -5 * updates[liar]
    terms = AggregationTerms(byzantine=2)
    merged, _ = merge(updates, everything(10), make_aggregator(name, terms))
    error = float(np.linalg.norm(merged - truth) / np.linalg.norm(truth))
    assert (error < 0.15) == (name in UNWEIGHTED)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_the_rest_merged(name: str, bad: float) -> None:
    updates = values(6, 3)
    rest = [updates[i] for i in range(6)]
    updates[2] = updates[2].copy()
    updates[2][rows_of(1)][0, 0] = bad
    mask = everything(6)
    merged, result = merge(updates, mask, make_aggregator(name))
    assert [(r.owner, r.chunk) for r in result.refused] == [("p2", 1)]
    without = [list(row) for row in mask]
    without[2][1] = False
    assert same_bits(merged, merge(rest, without, make_aggregator(name))[0])


def test_fills_and_weights_are_what_the_swarm_agreed_on() -> None:
    part, old = update(2, "b"), update(1, "b")
    count = Count(part, 10.0, (0, 1), {2: Fill(old.update, 2.5)}, "partial", 1.0, (0, 1, 2, 3))
    close = CloseRound(2, "deadline", 2, (count,), (), (), 1.0, False, False, True)
    terms = WORLD.genesis.terms
    plain = contributions(WORLD.layout, close, terms)
    assert plain[0] == [("b", part.update, 10.0)]
    assert plain[2] == [("b", old.update, 2.5)]
    assert plain[3] == []
    started = replace(terms, rounds=replace(terms.rounds, fill="round_start"))
    assert contributions(WORLD.layout, close, started)[3] == [("b", None, 10.0)]
    assert contributions(WORLD.layout, close, started)[4] == []  # not wanted, so not missing
    weighted = replace(terms, aggregation=AggregationTerms(importance_weighting=True))
    (source,) = contributions(WORLD.layout, close, weighted)[0]
    factor = importance_factor(part.entries[0].rank, len(part.entries))
    assert source == ("b", part.update, 10.0 * factor)
    (filled,) = contributions(WORLD.layout, close, weighted)[2]
    factor = importance_factor(part.entries[2].rank, len(part.entries))
    assert filled == ("b", old.update, 2.5 * factor)


def test_a_missing_chunk_may_count_as_the_rounds_start() -> None:
    updates = values(2, 5)
    mask = [[True] * len(LAYOUT.chunks), [False] * len(LAYOUT.chunks)]
    mask[0][0] = False
    merged, result = merge(updates, mask, make_aggregator("fedavg"), start_fills=True)
    assert result.untouched == 1
    assert same_bits(merged[rows_of(0)], START[rows_of(0)])
    here = rows_of(1)
    mean = (np.float64(updates[0][here]) + 2.0 * START[here]) / 3.0
    np.testing.assert_allclose(merged[here], mean, rtol=1e-6)


def test_an_owner_with_a_late_and_a_new_update_has_one_voice() -> None:
    old, new, other, third = values(4, 8)
    sources: dict[int, list[Source]] = {
        k: [
            (PeerId("a"), UpdateId(b"0"), 1.0),
            (PeerId("a"), UpdateId(b"1"), 1.0),
            (PeerId("b"), UpdateId(b"2"), 1.0),
            (PeerId("c"), UpdateId(b"3"), 1.0),
        ]
        for k in range(len(LAYOUT.chunks))
    }
    by_name = {b"0": old, b"1": new, b"2": other, b"3": third}
    out = np.empty_like(START)

    def keep(part: TensorSlice, rows: Array) -> None:
        slice_of(out, part)[...] = rows

    def read(update: UpdateId, chunk: int) -> bytes:
        return encode_chunk(LAYOUT, chunk, {"w": by_name[update]})

    aggregate(LAYOUT, sources, read, {"w": START}, keep, aggregator=make_aggregator("fedmedian"))
    np.testing.assert_allclose(out, np.median([new, other, third], axis=0), rtol=1e-6)


def test_integers_of_unweighted_rules_take_the_lower_median() -> None:
    spec = ModelSpec((TensorSpec("n", "I64", (2,)),))
    layout = plan(spec, num_chunks=1, block_size=64)
    held = [np.array([v, 10 - v], np.int64) for v in (1, 2, 9, 9000)]
    out = np.empty(2, np.int64)

    def keep(part: TensorSlice, rows: Array) -> None:
        out[...] = rows

    sources: dict[int, list[Source]] = {
        0: [(PeerId(f"p{i}"), UpdateId(bytes([i])), 1.0) for i in range(4)]
    }
    aggregate(
        layout,
        sources,
        lambda update, chunk: encode_chunk(layout, chunk, {"n": held[update[0]]}),
        {"n": out.copy()},
        keep,
        aggregator=make_aggregator("fedmedian"),
    )
    assert out.tolist() == [2, 1]


@given(st.integers(0, 3000), st.integers(0, 9))
@settings(max_examples=30)
def test_distances_are_sums_of_squares(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, size)).astype(np.float32)
    exact = math.fsum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True))
    assert squared_distance("F32", a, b) == pytest.approx(exact, rel=1e-13)


def test_too_far_apart_for_float64_is_infinitely_far() -> None:
    top = np.array([np.finfo(np.float64).max])
    assert squared_distance("F64", top, -top) == math.inf


@pytest.mark.parametrize("total", [1, 2, 7, 20])
def test_importance_moves_weight_between_chunks_and_gives_nobody_more(total: int) -> None:
    factors = [importance_factor(rank, total) for rank in range(total)]
    assert sum(factors) == pytest.approx(total)
    assert factors == sorted(factors)
    assert min(factors) > 0


def test_a_name_is_registered_once_and_known_from_then_on() -> None:
    def largest(terms: AggregationTerms) -> Aggregator:
        return Aggregator("largest", combine=lambda found, weights: found.max(axis=0))

    register_aggregator("test_largest", largest)
    updates = values(3, 1)
    merged, _ = merge(updates, everything(3), make_aggregator("test_largest"))
    assert same_bits(merged, np.max(updates, axis=0))
    with pytest.raises(ConfigError, match="registered already"):
        register_aggregator("test_largest", largest)
    with pytest.raises(ConfigError, match=r"federate\.aggregator is 'test_smallest'"):
        make_aggregator("test_smallest")


def test_an_aggregator_of_ones_own_that_breaks_its_promise_is_told_so() -> None:
    wrong = Aggregator("wrong", combine=lambda found, weights: found.sum(axis=0) * np.nan)
    with pytest.raises(LocalProtocolError, match="'wrong'"):
        merge(values(3, 1), everything(3), wrong)


def test_parts_that_nothing_would_use_are_refused() -> None:
    def ranking(_: Distances) -> list[PeerId]:
        return []

    with pytest.raises(ConfigError, match="set is_weighted=False"):
        Aggregator("mine", choose=ranking)
    with pytest.raises(ConfigError, match="set choose"):
        Aggregator("mine", is_weighted=False, believed=1)
    assert Aggregator("mine", is_weighted=False, choose=ranking, believed=1).believed == 1
