"""Versions that are made rather than mapped: decoded, recycled; and the bits of every arrival."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl_torrent.core.aggregation import AggregateResult, aggregate
from p2pfl_torrent.core.aggregators import FEDAVG, AggregationTerms, Aggregator, make_aggregator
from p2pfl_torrent.core.chunking import Layout, TensorSlice, encode_chunk, plan, slice_of
from p2pfl_torrent.core.closing import counts
from p2pfl_torrent.core.compression import Compression, widen
from p2pfl_torrent.core.contributions import contributions, recycled
from p2pfl_torrent.core.encoding import encode_file
from p2pfl_torrent.core.events import CloseRound
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import Array, Arrays, ModelSpec, TensorSpec
from p2pfl_torrent.core.versions import Source
from tests.core.small_ledgers import WORLD, ledger, update
from tests.core.small_models import finite_arrays, same_bits, specs

FLOATS = ["F64", "F32", "F16", "BF16"]
RULES = [
    *("fedavg", "fedprox", "fedmedian", "trimmed_mean", "krum", "multi_krum"),
    *("fedadam", "fedyogi", "fedadagrad"),
]
MANIFESTS = [update(round, owner) for owner in "abcd" for round in (1, 2)]
FILES = {
    (manifest.update, chunk): encode_chunk(WORLD.layout, chunk, arrays)
    for place, manifest in enumerate(MANIFESTS)
    for arrays in [finite_arrays(WORLD.layout.spec, place)]
    for chunk in range(len(WORLD.layout.chunks))
}


def packed(spec: ModelSpec, chunks: int = 3) -> tuple[Layout, Layout]:
    """One layout with plain files, and one whose files hold the same values, to be decoded."""
    plain = plan(spec, num_chunks=chunks, block_size=64)
    return plain, replace(plain, compression=Compression(zstd_level=1))


def merge(
    layout: Layout,
    updates: Sequence[Arrays],
    sources: Mapping[int, Sequence[Source]],
    start: Arrays,
    aggregator: Aggregator = FEDAVG,
    bases: Mapping[UpdateId, Arrays] | None = None,
    changes: Sequence[UpdateId] = (),
) -> tuple[dict[str, Array], AggregateResult]:
    tensors = aggregator.state_spec(layout.spec).tensors
    out = {name: np.empty_like(array) for name, array in start.items()}

    def keep(part: TensorSlice, rows: Array) -> None:
        slice_of(out[tensors[part.tensor].name], part)[...] = rows

    def read(update: UpdateId, chunk: int) -> bytes:
        return b"".join(encode_file(layout, chunk, updates[update[0]]))

    found = bases or {}
    return out, aggregate(layout, sources, read, start, keep, found.get, aggregator, changes)


def sources_of(mask: Sequence[Sequence[bool]], weights: Sequence[float]) -> dict[int, list[Source]]:
    return {
        chunk: [
            (PeerId(f"p{k}"), UpdateId(bytes([k])), weights[k])
            for k in range(len(weights))
            if mask[k][chunk % len(mask[k])]
        ]
        for chunk in range(64)
    }


@given(
    specs,
    st.lists(st.floats(0.001, 2.0**40), min_size=1, max_size=4),
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=4, max_size=4),
    st.sampled_from([None, 0.0, -0.0, np.nan, np.inf, -np.inf]),
    st.data(),
)
@settings(max_examples=40)
def test_owner_by_owner_gives_the_bits_of_tile_by_tile(
    spec: ModelSpec,
    weights: list[float],
    mask: list[list[bool]],
    odd: float | None,
    data: st.DataObject,
) -> None:
    updates = [finite_arrays(spec, seed) for seed in range(len(weights))]
    for arrays in updates:
        name = data.draw(st.sampled_from([tensor.name for tensor in spec.tensors]))
        if odd is not None and arrays[name].dtype.kind == "f" and arrays[name].size:
            arrays[name].reshape(-1)[0] = odd
    start, sources = finite_arrays(spec, 99), sources_of(mask, weights)
    plain, decoded = packed(spec)
    first, refused = merge(plain, updates, sources, start)
    second, also = merge(decoded, updates, sources, start)
    assert all(same_bits(first[name], second[name]) for name in first)
    assert {(r.owner, r.chunk) for r in refused.refused} == {
        (r.owner, r.chunk) for r in also.refused
    }
    assert refused.untouched == also.untouched


def test_doubles_whose_sum_overflows_are_averaged_all_the_same() -> None:
    spec = ModelSpec((TensorSpec("w", "F64", (4,)),))
    huge: list[Arrays] = [{"w": np.full(4, s * np.finfo(np.float64).max)} for s in (1, 1, -0.5)]
    sources = sources_of([[True]] * 3, [3.0, 2.0, 1.0])
    plain, decoded = packed(spec, 1)
    first, _ = merge(plain, huge, sources, huge[0])
    second, result = merge(decoded, huge, sources, huge[0])
    assert same_bits(first["w"], second["w"])
    assert np.isfinite(first["w"].astype(np.float64)).all()
    assert not result.refused


def test_one_decoded_version_is_held_at_a_time() -> None:
    spec = ModelSpec((TensorSpec("w", "F32", (512, 512)),))
    owners = 24
    _, layout = packed(spec, 1)
    arrays: Arrays = {"w": np.zeros((512, 512), np.float32)}
    file = b"".join(encode_file(layout, 0, arrays))
    sources: dict[int, list[Source]] = {
        0: [(PeerId(f"p{k:02}"), UpdateId(bytes([k])), 1.0) for k in range(owners)]
    }
    tracemalloc.start()
    try:
        aggregate(layout, sources, lambda update, chunk: file, arrays, lambda part, rows: None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * spec.nbytes  # of which sums and tiles are six


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_recycled_chunk_is_its_change_added_to_the_start(dtype: str) -> None:
    spec = ModelSpec((TensorSpec("w", dtype, (6, 8)), TensorSpec("n", "I64", (2,))))
    old, base, start = (finite_arrays(spec, seed) for seed in (1, 2, 3))
    layout, _ = packed(spec, 1)
    update = UpdateId(bytes([0]))
    sources: dict[int, list[Source]] = {0: [(PeerId("a"), update, 2.0)]}
    merged, result = merge(layout, [old], sources, start, FEDAVG, {update: base}, [update])
    was, before, now = (widen(dtype, a["w"]).astype(np.float64) for a in (old, base, start))
    exact = now + (was - before)
    got = widen(dtype, merged["w"]).astype(np.float64)
    np.testing.assert_allclose(got, exact, rtol={"F64": 1e-15, "F32": 1e-7}.get(dtype, 1e-2))
    assert not np.allclose(got, was, rtol=0.1)
    assert same_bits(merged["n"], old["n"])
    assert result.untouched == 0


@pytest.mark.parametrize("name", RULES)
@given(fill=st.sampled_from(["last", "recycle", "renormalise", "round_start"]), data=st.data())
@settings(max_examples=12)
def test_every_rule_gives_the_same_bits_in_whatever_order_updates_came(
    name: str, fill: str, data: st.DataObject
) -> None:
    chunks = st.lists(st.sampled_from("#."), min_size=9, max_size=9).map("".join)
    held = [(manifest, data.draw(chunks)) for manifest in MANIFESTS]
    terms = msgspec.structs.replace(
        WORLD.genesis.terms,
        rounds=msgspec.structs.replace(WORLD.genesis.terms.rounds, fill=fill, fill_decay=0.5),
        aggregation=AggregationTerms(trim_share=0.3),
    )
    aggregator = make_aggregator(name, terms.aggregation)
    start = aggregator.first_state(WORLD.layout.spec, finite_arrays(WORLD.layout.spec, 99))
    base = finite_arrays(WORLD.layout.spec, 98)

    def merged(arrived: Sequence[int]) -> dict[str, Array]:
        made = ledger(*(held[k] for k in arrived))
        for manifest, text in held:
            if manifest.round == 1:
                made.count(manifest.update, [k for k in range(9) if text[k] == "#"], 1)
        found = counts(local=PeerId("a"), round=2, terms=terms.rounds, ledger=made, dead=set())
        close = CloseRound(2, "deadline", 4, found, (), (), 1.0, False, False, True)
        tensors = aggregator.state_spec(WORLD.layout.spec).tensors
        out = {key: np.empty_like(array) for key, array in start.items()}

        def keep(part: TensorSlice, rows: Array) -> None:
            slice_of(out[tensors[part.tensor].name], part)[...] = rows

        aggregate(
            WORLD.layout,
            contributions(WORLD.layout, close, terms),
            lambda update, chunk: FILES[update, chunk],
            start,
            keep,
            lambda _: base,
            aggregator,
            recycled(close, terms),
        )
        return out

    first = merged(range(len(held)))
    second = merged(data.draw(st.permutations(range(len(held)))))
    assert all(same_bits(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["fedmedian", "trimmed_mean"])
def test_which_owner_has_the_negative_zero_does_not_matter(name: str) -> None:
    """Zeros of both signs compare equal, so a sort may put either first."""
    spec = ModelSpec((TensorSpec("w", "F32", (1,)),))
    layout, _ = packed(spec, 1)
    sources = sources_of([[True]] * 3, [1.0] * 3)
    rule = make_aggregator(name, AggregationTerms(trim_share=0.4))
    found = set()
    for order in permutations([-0.0, -0.0, 0.0]):
        updates: list[Arrays] = [{"w": np.full(1, value, np.float32)} for value in order]
        merged, _ = merge(layout, updates, sources, updates[0], rule)
        found.add(merged["w"].tobytes())
    assert len(found) == 1
