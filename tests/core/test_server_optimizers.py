"""Adaptive server optimizers against the paper's formulas, over rounds with missing chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl_torrent.core.aggregation import aggregate
from p2pfl_torrent.core.aggregators import AggregationTerms, make_aggregator
from p2pfl_torrent.core.chunking import TensorSlice, encode_chunk, plan, slice_of
from p2pfl_torrent.core.compression import Compression
from p2pfl_torrent.core.encoding import encode_file
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.server_optimizers import ServerOptimizer, step_slice
from p2pfl_torrent.core.tensors import Array, ModelSpec, TensorSpec
from p2pfl_torrent.core.versions import Source
from tests.core.small_models import same_bits

SPEC = ModelSpec((TensorSpec("w", "F32", (8, 2)), TensorSpec("n", "I64", (3,))))
LAYOUT = plan(SPEC, num_chunks=4, block_size=64)
TERMS = AggregationTerms(server_lr=0.1, server_beta1=0.8, server_beta2=0.9, server_tau=0.01)
KINDS = ["fedadam", "fedyogi", "fedadagrad"]
Wide = npt.NDArray[np.float64]


def one_round(
    kind: str, state: dict[str, Array], updates: list[dict[str, Array]], mask: list[list[bool]]
) -> dict[str, Array]:
    aggregator = make_aggregator(kind, TERMS)
    tensors = aggregator.state_spec(SPEC).tensors
    out = {name: np.empty_like(array) for name, array in state.items()}

    def keep(part: TensorSlice, rows: Array) -> None:
        slice_of(out[tensors[part.tensor].name], part)[...] = rows

    sources: dict[int, list[Source]] = {
        k: [
            (PeerId(f"p{i}"), UpdateId(bytes([i])), 1.0 + i)
            for i in range(len(updates))
            if mask[i][k]
        ]
        for k in range(len(LAYOUT.chunks))
    }
    aggregate(
        LAYOUT,
        sources,
        lambda update, chunk: encode_chunk(LAYOUT, chunk, updates[update[0]]),
        state,
        keep,
        aggregator=aggregator,
    )
    return out


def made(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "w": rng.standard_normal((8, 2)).astype(np.float32),
        "n": rng.integers(0, 9, 3, np.int64),
    }


masks = st.lists(
    st.lists(st.booleans(), min_size=len(LAYOUT.chunks), max_size=len(LAYOUT.chunks)),
    min_size=3,
    max_size=3,
)


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(masks, min_size=1, max_size=3), st.integers(0, 99))
@settings(max_examples=25)
def test_rounds_go_as_in_the_paper(kind: str, rounds: list[list[list[bool]]], seed: int) -> None:
    state = make_aggregator(kind, TERMS).first_state(SPEC, made(seed))
    x = state["w"].astype(np.float64)
    m, v = np.zeros_like(x), np.zeros_like(x)
    for number, mask in enumerate(rounds):
        updates = [made(1000 * number + seed + 100 + i) for i in range(3)]
        state = one_round(kind, state, updates, mask)
        for chunk in LAYOUT.chunks:
            for part in chunk.slices:
                here = [i for i in range(3) if mask[i][chunk.index]]
                if SPEC.tensors[part.tensor].name == "w" and here:
                    cut = slice(part.start, part.stop)
                    parts = [updates[i]["w"][cut].astype(np.float64) for i in here]
                    mean = np.average(parts, axis=0, weights=[1.0 + i for i in here])
                    x[cut], m[cut], v[cut] = _step(kind, x[cut], mean, m[cut], v[cut])
        for name, want in (("w", x), ("w:m", m), ("w:v", v)):
            np.testing.assert_allclose(state[name].astype(np.float64), want, rtol=1e-4, atol=1e-5)


def _step(kind: str, x: Wide, mean: Wide, m: Wide, v: Wide) -> tuple[Wide, Wide, Wide]:
    d = mean - x
    m = 0.8 * m + 0.2 * d
    v = {
        "fedadam": 0.9 * v + 0.1 * d**2,
        "fedyogi": v - 0.1 * d**2 * np.sign(v - d**2),
        "fedadagrad": v + d**2,
    }[kind]
    return x + 0.1 * m / (np.sqrt(v) + 0.01), m, v


@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_delivered_keeps_its_weights_and_moments(kind: str) -> None:
    whole = [[True] * len(LAYOUT.chunks)]
    first = make_aggregator(kind, TERMS).first_state(SPEC, made(1))
    state = one_round(kind, first, [made(2)], whole)
    again = one_round(kind, state, [made(3)], [[False] * len(LAYOUT.chunks)])
    assert np.abs(state["w:v"].astype(np.float64)).min() > 0
    assert all(same_bits(again[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", KINDS)
def test_an_absurd_update_leaves_no_infinite_moment(kind: str) -> None:
    absurd = made(2)
    absurd["w"] = np.full((8, 2), np.finfo(np.float32).max, np.float32)
    first = make_aggregator(kind, TERMS).first_state(SPEC, made(1))
    state = one_round(kind, first, [absurd], [[True] * len(LAYOUT.chunks)])
    assert all(np.isfinite(state[name].astype(np.float64)).all() for name in state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_after_an_absurd_mean_the_weights_stay_within_the_steps(
    kind: Literal["fedadam", "fedyogi", "fedadagrad"], dtype: str, beta1: float
) -> None:
    rate = 100.0
    optimizer = ServerOptimizer(kind, rate, beta1, 0.99, 1e-3)
    of = np.float64 if dtype == "F64" else np.float32
    w: Array = np.array([1.0, -1.0], of)
    moments: tuple[Array, Array] = (np.zeros(2, of), np.zeros(2, of))
    largest = np.finfo(of).max
    for number in range(10):
        mean = np.array([-largest, largest] if number == 0 else [0.5, -0.5], of)
        moments = step_slice(optimizer, dtype, w, mean, moments, mean)
        w = mean
        # A step is at most lr |m| / sqrt(v), and that at most (1 - b1) / sqrt(1 - b2) < 10.
        assert np.abs(w.astype(np.float64)).max() <= 1.0 + 10 * rate * (number + 1)
        assert all(np.isfinite(moment.astype(np.float64)).all() for moment in moments)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("zstd_level", [0, 1])
@pytest.mark.parametrize(("owners", "change"), [("ab", 0.5), ("b", 1.0)])
def test_the_mean_of_half_floats_is_not_rounded_before_the_step(
    dtype: str, zstd_level: int, owners: str, change: float
) -> None:
    """1 and the value after it: their mean is halfway, and rounded it would be 1, no change."""
    spec = ModelSpec((TensorSpec("w", dtype, (4,)),))
    layout = replace(
        plan(spec, num_chunks=1, block_size=64), compression=Compression(zstd_level=zstd_level)
    )
    one, ulp = (0x3F80, 2.0**-7) if dtype == "BF16" else (0x3C00, 2.0**-10)
    bits = {name: np.full(4, one + more, np.uint16) for name, more in (("a", 0), ("b", 1))}
    updates = {n: {"w": a if dtype == "BF16" else a.view(np.float16)} for n, a in bits.items()}
    aggregator = make_aggregator("fedadam", TERMS)
    found: list[Array] = []
    aggregate(
        layout,
        {0: [(PeerId(n), UpdateId(n.encode()), 1.0) for n in owners]},
        lambda update, chunk: b"".join(encode_file(layout, chunk, updates[update.decode()])),
        aggregator.first_state(spec, updates["a"]),
        lambda part, rows: found.append(np.array(rows)),
        aggregator=aggregator,
    )
    moment = next(rows for rows in found if rows.dtype == np.float32)
    np.testing.assert_allclose(moment.astype(np.float64), 0.2 * ulp * change, rtol=1e-6)
