"""Partitions are disjoint covers, as deterministic as their generator."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.learning import partition
from p2pfl_torrent.learning.partition import Indices, dirichlet, iid, label_skew

Labels = npt.NDArray[np.int64]

labelled = st.lists(st.integers(0, 9), min_size=40, max_size=300).map(
    lambda labels: np.array(labels, dtype=np.int64)
)
seeds = st.integers(0, 2**32 - 1)


def assert_cover(parts: list[Indices], samples: int) -> None:
    """Disjoint and complete at once: together they are 0..n-1, each index once."""
    assert sorted(np.concatenate(parts).tolist()) == list(range(samples))
    for part in parts:
        assert part.dtype == np.int64
        assert np.all(np.diff(part) > 0)


def assert_equal(first: list[Indices], second: list[Indices]) -> None:
    assert [part.tolist() for part in first] == [part.tolist() for part in second]


def skewed(seed: int) -> Labels:
    """Ten labels with 20 to 60 samples each, shuffled."""
    rng = np.random.default_rng(seed)
    return rng.permutation(np.repeat(np.arange(10), rng.integers(20, 60, 10)))


@given(samples=st.integers(1, 500), parts=st.integers(1, 20), seed=seeds)
def test_iid_covers_in_equal_parts(samples: int, parts: int, seed: int) -> None:
    split = iid(samples, parts, np.random.default_rng(seed))
    assert_cover(split, samples)
    sizes = [part.size for part in split]
    assert max(sizes) - min(sizes) <= 1
    assert_equal(split, iid(samples, parts, np.random.default_rng(seed)))


@given(
    labels=labelled,
    parts=st.integers(1, 8),
    alpha=st.floats(1e-3, 100),
    min_samples=st.integers(0, 5),
    seed=seeds,
)
def test_dirichlet_covers_with_min_samples(
    labels: Labels, parts: int, alpha: float, min_samples: int, seed: int
) -> None:
    split = dirichlet(labels, parts, alpha, np.random.default_rng(seed), min_samples)
    assert len(split) == parts
    assert_cover(split, labels.size)
    assert min(part.size for part in split) >= min_samples
    assert_equal(split, dirichlet(labels, parts, alpha, np.random.default_rng(seed), min_samples))


def test_dirichlet_tops_up_where_redrawing_cannot_help() -> None:
    labels = np.zeros(40, dtype=np.int64)  # one label, tiny alpha: one part draws nearly all of it
    split = dirichlet(labels, 8, 1e-3, np.random.default_rng(0), min_samples=5)
    assert [part.size for part in split] == [5] * 8
    assert_cover(split, 40)


def label_share(labels: Labels, alpha: float) -> float:
    """Mean share of a part's commonest label."""
    parts = dirichlet(labels, 6, alpha, np.random.default_rng(1))
    return float(np.mean([np.bincount(labels[part]).max() / part.size for part in parts]))


def test_dirichlet_is_more_skewed_for_a_smaller_alpha() -> None:
    labels = np.tile(np.arange(10), 200)
    assert label_share(labels, 1000) < 0.13  # 0.1 would be even
    assert label_share(labels, 0.1) > 0.4


def test_other_seeds_give_other_partitions() -> None:
    for scheme in ("iid", "dirichlet(0.5)", "label_skew(3)"):
        first, second = (
            partition.partition(scheme, skewed(0), 5, np.random.default_rng(seed))
            for seed in (1, 2)
        )
        assert [part.tolist() for part in first] != [part.tolist() for part in second]


@given(parts=st.integers(5, 15), labels_per_part=st.integers(2, 10), seed=seeds)
def test_label_skew_gives_every_part_its_number_of_labels(
    parts: int, labels_per_part: int, seed: int
) -> None:
    labels = skewed(seed)
    split = label_skew(labels, parts, labels_per_part, np.random.default_rng(seed))
    assert len(split) == parts
    assert_cover(split, labels.size)
    held = [np.unique(labels[part]) for part in split]
    assert all(own.size == labels_per_part for own in held)
    holders = np.bincount(np.concatenate(held), minlength=10)
    assert holders.max() - holders.min() <= 1
    assert_equal(split, label_skew(labels, parts, labels_per_part, np.random.default_rng(seed)))


@pytest.mark.parametrize(
    ("labels", "parts", "labels_per_part", "message"),
    [
        (np.arange(10).repeat(5), 4, 2, "holds 8 of 10 labels"),
        (np.arange(10).repeat(5), 4, 11, "between 1 and 10 labels"),
        (np.arange(10).repeat(5), 4, 0, "between 1 and 10 labels"),
        (np.arange(2).repeat([3, 40]), 8, 1, "label 0 among 4 parts, but it has only 3"),
    ],
)
def test_label_skew_says_why_it_cannot(
    labels: Labels, parts: int, labels_per_part: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        label_skew(labels, parts, labels_per_part, np.random.default_rng(0))


def test_too_few_samples_is_an_error() -> None:
    with pytest.raises(ConfigError, match="9 samples cannot give each of 5 parts at least 2"):
        dirichlet(np.zeros(9, np.int64), 5, 0.5, np.random.default_rng(0), min_samples=2)
    with pytest.raises(ConfigError, match="at least 1 part"):
        iid(9, 0, np.random.default_rng(0))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_alpha_must_be_above_zero(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha above 0"):
        dirichlet(skewed(0), 3, alpha, np.random.default_rng(0))


def test_a_written_scheme_is_that_scheme() -> None:
    labels = skewed(3)
    rng = np.random.default_rng
    assert_equal(partition.partition("iid", labels, 4, rng(1)), iid(labels.size, 4, rng(1)))
    assert_equal(
        partition.partition(" dirichlet( 0.5 ) ", labels, 4, rng(1)),
        dirichlet(labels, 4, 0.5, rng(1)),
    )
    assert_equal(
        partition.partition("label_skew(3)", labels, 4, rng(1)), label_skew(labels, 4, 3, rng(1))
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "write one of iid, dirichlet"),
        ("diriclet(0.5)", "write one of iid, dirichlet"),
        ("dirichlet(0.5", "write one of iid"),
        ("dirichlet", r"needs one number: write dirichlet\(0.5\)"),
        ("dirichlet(1e)", "needs one number"),
        ("dirichlet(0)", "alpha above 0"),
        ("label_skew(1.5)", "whole number of labels"),
        ("iid(3)", "takes no number"),
    ],
)
def test_a_wrong_scheme_is_explained(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        partition.partition(spec, skewed(0), 4, np.random.default_rng(0))


def test_data_without_torch() -> None:
    code = (
        "import sys, p2pfl_torrent.learning.partition, p2pfl_torrent.learning.datasets, "
        "p2pfl_torrent.learning.recipes; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("scheme", ["iid", "dirichlet(0.5)", "label_skew(1)"])
def test_no_written_scheme_leaves_a_part_empty(scheme: str) -> None:
    nine = np.zeros(9, np.int64)
    with pytest.raises(ConfigError, match="9 samples cannot give each of 10 parts at least 1"):
        partition.partition(scheme, nine, 10, np.random.default_rng(0), min_samples=0)


def test_a_large_alpha_is_even_and_a_larger_one_is_refused() -> None:
    labels = np.arange(1000) % 10
    even = dirichlet(labels, 5, 1e6, np.random.default_rng(0))
    assert all(abs(part.size - 200) <= 10 for part in even)
    for alpha in (1e308, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="above 0 and at most 1e\\+06"):
            dirichlet(labels, 5, alpha, np.random.default_rng(0))
