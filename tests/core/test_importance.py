from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl_torrent.core.chunking import Layout, plan, slice_of
from p2pfl_torrent.core.importance import (
    TILE,
    Moments,
    change_scores,
    delta_scores,
    l2_norm_scores,
    magnitude_scores,
    random_scores,
    rank,
)
from p2pfl_torrent.core.tensors import Array, ModelSpec, TensorSpec, float32_to_bfloat16


def layout_of(*tensors: tuple[str, tuple[int, ...]], chunks: int, dtype: str = "F32") -> Layout:
    spec = ModelSpec(tuple(TensorSpec(name, dtype, shape) for name, shape in tensors))
    return plan(spec, num_chunks=chunks, block_size=4096)


LAYERS = layout_of(("a", (4, 4)), ("b", (4, 4)), ("c", (4, 4)), chunks=3)


def full(a: float, b: float, c: float) -> dict[str, Array]:
    return {
        name: np.full((4, 4), value, np.float32)
        for name, value in zip("abc", (a, b, c), strict=True)
    }


@given(st.lists(st.floats(allow_nan=False), max_size=40))
def test_ranks_are_a_permutation_in_the_order_of_the_scores(scores: list[float]) -> None:
    ranks = rank(scores)
    assert sorted(ranks) == list(range(len(scores)))
    by_rank = sorted(range(len(scores)), key=ranks.__getitem__)
    assert [scores[index] for index in by_rank] == sorted(scores)


def test_l2_norm_is_the_seeds_formula() -> None:
    scores = l2_norm_scores(LAYERS, full(1, 1, 1), depth_boost=0.3, normalize_by_size=True)
    assert scores == pytest.approx([1.0, 1.15, 1.3])
    scores = l2_norm_scores(LAYERS, full(1, -2, 3), depth_boost=0.0, normalize_by_size=True)
    assert scores == pytest.approx([1.0, 2.0, 3.0])
    scores = l2_norm_scores(LAYERS, full(1, 1, 1), depth_boost=0.0, normalize_by_size=False)
    assert scores == pytest.approx([4.0, 4.0, 4.0])


def test_size_counts_only_where_it_is_not_normalised() -> None:
    layout = layout_of(("small", (1, 100)), ("large", (1, 400)), chunks=2)
    arrays: dict[str, Array] = {
        "small": np.ones((1, 100), np.float32),
        "large": np.ones((1, 400), np.float32),
    }
    plain = l2_norm_scores(layout, arrays, depth_boost=0, normalize_by_size=False)
    assert plain == pytest.approx([10.0, 20.0])
    normalised = l2_norm_scores(layout, arrays, depth_boost=0, normalize_by_size=True)
    assert normalised == pytest.approx([1.0, 1.0])


def test_change_is_measured_against_what_was_delivered() -> None:
    before = full(0, 0, 0)

    def last(chunk: int) -> list[Array]:
        parts = LAYERS.chunks[chunk].slices
        return [slice_of(before[LAYERS.spec.tensors[part.tensor].name], part) for part in parts]

    now = full(0.5, 0, -2)
    assert change_scores(LAYERS, now, last) == pytest.approx([0.5, 0.0, 2.0])
    before = now
    assert change_scores(LAYERS, now, last) == [0.0, 0.0, 0.0]


def test_bfloat16_is_scored_by_its_values_not_its_bits() -> None:
    layout = layout_of(("a", (4,)), ("b", (4,)), chunks=2, dtype="BF16")
    arrays: dict[str, Array] = {
        name: float32_to_bfloat16(np.full(4, value, np.float32))
        for name, value in (("a", 4.0), ("b", -0.5))
    }
    scores = l2_norm_scores(layout, arrays, depth_boost=0, normalize_by_size=True)
    assert scores == pytest.approx([4.0, 0.5])


def test_large_float16_values_do_not_overflow_to_infinity() -> None:
    layout = layout_of(("a", (4,)), chunks=1, dtype="F16")
    arrays: dict[str, Array] = {"a": np.full(4, 60_000, np.float16)}
    [score] = l2_norm_scores(layout, arrays, depth_boost=0, normalize_by_size=True)
    assert score == pytest.approx(60_000, rel=1e-3)


def test_empty_tensors_score_nothing() -> None:
    layout = layout_of(("a", (0, 3)), ("b", (3,)), chunks=1)
    arrays: dict[str, Array] = {"a": np.zeros((0, 3), np.float32), "b": np.ones(3, np.float32)}
    scores = l2_norm_scores(layout, arrays, depth_boost=0, normalize_by_size=True)
    assert all(np.isfinite(scores))


def test_chance_is_the_callers() -> None:
    first = random_scores(LAYERS, random.Random(1))
    assert first == random_scores(LAYERS, random.Random(1))
    assert first != random_scores(LAYERS, random.Random(2))


def test_a_large_chunk_is_scored_a_tile_at_a_time() -> None:
    layout = layout_of(("a", (1 << 11, 1 << 11)), chunks=1)
    now, before = np.ones((1 << 11, 1 << 11), np.float32), np.zeros((1 << 11, 1 << 11), np.float32)
    tracemalloc.start()
    try:
        scores = change_scores(layout, {"a": now}, lambda _: [before])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert scores == [1.0]
    assert peak < 4 * TILE * 8


def test_delta_is_the_change_relative_to_the_start() -> None:
    scores = delta_scores(LAYERS, full(3, -2, 1), full(2, -2, 4))
    assert scores == pytest.approx([0.5, 0.0, 0.75])


def test_delta_of_zeros_that_changed_is_above_all_others() -> None:
    scores = delta_scores(LAYERS, full(1e-3, 0, 900), full(0, 0, 1))
    assert rank(scores) == [2, 0, 1]
    assert scores[1] == 0


@given(st.lists(st.lists(st.floats(-8, 8), min_size=1, max_size=9), min_size=1, max_size=5))
def test_magnitude_pools_the_rounds(rounds: list[list[float]]) -> None:
    history = []
    for values in rounds:
        g = np.array(values)
        history.append([Moments(g.size, abs(g).sum(), g.sum(), (g * g).sum())])
    pooled = np.concatenate([np.array(values) for values in rounds])
    [plain] = magnitude_scores(history, chunks=1, use_variance=False)
    assert plain == pytest.approx(np.abs(pooled).mean(), abs=1e-12)
    [score] = magnitude_scores(history, chunks=1, use_variance=True)
    assert score == pytest.approx(np.abs(pooled).mean() * (1 + pooled.var()), abs=1e-9)


def test_a_chunk_without_gradients_has_no_magnitude() -> None:
    history = [[Moments(0, 0, 0, 0), Moments(2, 3, 1, 5)]]
    assert magnitude_scores(history, chunks=2, use_variance=False) == [0.0, 1.5]
    assert magnitude_scores([], chunks=2, use_variance=True) == [0.0, 0.0]
