"""What belongs together stays in one chunk, and chunks keep to their family's range."""

from __future__ import annotations

from collections import defaultdict
from random import Random
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl_torrent.core import architecture
from p2pfl_torrent.core.architecture import (
    MB,
    RANGES,
    Architecture,
    Family,
    Group,
    Kind,
    Part,
    plan_by_architecture,
)
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.tensors import ModelSpec, TensorSpec
from tests.core.small_models import specs

CUT = ("cnn", "transformer", "hybrid", "large")
families = st.sampled_from(get_args(Family))


@st.composite
def groups(draw: st.DrawFn, names: list[str]) -> tuple[Group, ...]:
    """Some of the names, and one that no spec has, in nested groups."""
    listed = draw(st.lists(st.sampled_from([*names, "[none]"]), max_size=12))
    stacks, kinds = st.sampled_from([0, 0, 1, 3]), st.sampled_from(get_args(Kind))
    made: list[Group] = []
    for name in listed:
        member: Part | Group = Part(name, draw(stacks))
        if draw(st.integers(0, 1)) and made:
            member = Group(draw(kinds), (member, made.pop()), draw(st.integers(1, 4)))
        made.append(Group(draw(kinds), (member,), draw(st.integers(1, 4))))
    return tuple(made)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[ModelSpec, Architecture, int]:
    spec = draw(specs)
    found = draw(groups([tensor.name for tensor in spec.tensors]))
    return spec, Architecture(draw(families), found), draw(st.integers(1, 40))


def planned(spec: ModelSpec, made_of: Architecture, chunks: int = 20) -> Layout:
    return plan_by_architecture(spec, made_of, num_chunks=chunks, block_size=64)


def picture(layout: Layout) -> list[str]:
    return [" ".join(map(layout.slice_name, chunk.slices)) for chunk in layout.chunks]


def matrices(text: str) -> ModelSpec:
    """``q 8 2``: a tensor of 8 rows of 2 bytes."""
    split = (line.split() for line in text.split(","))
    return ModelSpec(
        tuple(TensorSpec(name, "U8", tuple(map(int, sides))) for name, *sides in split)
    )


@given(cuts())
def test_every_row_is_in_exactly_one_chunk(cut: tuple[ModelSpec, Architecture, int]) -> None:
    spec = cut[0]
    layout = planned(*cut)
    rows: dict[int, list[int]] = defaultdict(list)
    for chunk in layout.chunks:
        assert chunk.slices
        for part in chunk.slices:
            rows[part.tensor] += range(part.start, part.stop)
    for index, tensor in enumerate(spec.tensors):
        assert sorted(rows[index]) == list(range(tensor.shape[0] if tensor.shape else 1))
    assert sum(chunk.payload_bytes for chunk in layout.chunks) == spec.nbytes
    assert len({part.tensor for chunk in layout.chunks for part in chunk.slices}) == len(
        spec.tensors
    )


@given(cuts(), st.randoms(use_true_random=False))
def test_the_order_of_the_tensors_does_not_matter_where_groups_name_them(
    cut: tuple[ModelSpec, Architecture, int], chance: Random
) -> None:
    spec, made_of, chunks = cut
    if made_of.family == "small":
        return  # uniform: in the order of the tensors
    everything = Group("other", tuple(Part(tensor.name) for tensor in spec.tensors))
    made_of = Architecture(made_of.family, (*made_of.groups, everything))
    shuffled = list(spec.tensors)
    chance.shuffle(shuffled)
    layout = planned(spec, made_of, chunks)
    assert picture(planned(ModelSpec(tuple(shuffled)), made_of, chunks)) == picture(layout)
    assert planned(spec, made_of, chunks).digest == layout.digest


@given(
    st.sampled_from(CUT),
    st.lists(st.tuples(st.integers(1, 30_000), st.integers(1, 3000)), min_size=1, max_size=12),
    st.integers(1, 3000),
    st.integers(2, 5),
)
@settings(max_examples=300)
def test_chunks_keep_to_the_range(
    family: Family, sides: list[tuple[int, int]], chunks: int, together: int
) -> None:
    spec = ModelSpec(
        tuple(TensorSpec(f"t{number}", "F32", shape) for number, shape in enumerate(sides))
    )
    names = [Part(tensor.name) for tensor in spec.tensors]
    found = tuple(
        Group("linear", tuple(names[place : place + together]))
        for place in range(0, len(names), together)
    )
    layout = planned(spec, Architecture(family, found), chunks)
    low, high = RANGES[family]
    low = min(low, spec.nbytes // min(chunks, architecture.ALWAYS_GRANTED) // 2)
    sizes = [chunk.payload_bytes for chunk in layout.chunks]
    assert max(sizes) <= high
    assert all(size >= low for size in sizes[:-1])


@given(
    heads=st.integers(2, 12),
    width=st.integers(1, 64),
    inputs=st.integers(1, 500),
    chunks=st.integers(1, 60),
    fused=st.booleans(),
)
@settings(max_examples=300)
def test_a_heads_rows_of_q_k_and_v_are_in_one_chunk(
    heads: int, width: int, inputs: int, chunks: int, fused: bool
) -> None:
    rows = heads * width
    names = ["qkv"] if fused else ["q", "k", "v"]
    stacks = 3 if fused else 1
    projections = [TensorSpec(name, "F32", (rows * stacks, inputs)) for name in names]
    spec = ModelSpec((*projections, TensorSpec("out", "F32", (rows, rows))))
    members = (*(Part(name, stacks) for name in names), Part("out"))
    layout = planned(spec, Architecture("cnn", (Group("attention", members, heads),)), chunks)
    where: dict[int, set[int]] = defaultdict(set)
    pieces: dict[int, int] = defaultdict(int)
    for chunk in layout.chunks:
        for part in chunk.slices:
            if layout.spec.tensors[part.tensor].name != "out":
                for row in range(part.start, part.stop):
                    where[row % rows // width].add(chunk.index)
                    pieces[row % rows // width] += 1
    target = spec.nbytes // chunks
    if 3 * width * inputs * 4 <= target:
        assert all(len(found) == 1 for found in where.values())
    assert all(count == 3 * width for count in pieces.values())


ATTENTION = Group("attention", (Part("in", 3), Part("bias", 3), Part("out")), heads=4)


@pytest.mark.parametrize(
    ("chunks", "wanted"),
    [
        (1, ["in bias out"]),
        (
            4,
            [
                "in[0:2] in[8:10] in[16:18] bias[0:2] bias[8:10] bias[16:18]",
                "in[2:4] in[10:12] in[18:20] bias[2:4] bias[10:12] bias[18:20]",
                "in[4:6] in[12:14] in[20:22] bias[4:6] bias[12:14] bias[20:22]",
                "in[6:8] in[14:16] in[22:24] bias[6:8] bias[14:16] bias[22:24]",
                "out",
            ],
        ),
    ],
)
def test_attention_falls_apart_into_heads(chunks: int, wanted: list[str]) -> None:
    spec = matrices("in 24 8,bias 24,out 8 8")
    assert picture(planned(spec, Architecture("cnn", (ATTENTION,)), chunks)) == wanted


def test_embeddings_named_first_come_first_and_what_nobody_names_last() -> None:
    spec = matrices("w 4 4,stray 4 4,tokens 4 4,places 4 4")
    groups = (
        Group("position", (Part("places"),)),
        Group("embedding", (Part("tokens"),)),
        Group("linear", (Part("w"),)),
    )
    cut = planned(spec, Architecture("transformer", groups), 4)
    assert picture(cut) == ["places", "tokens", "w", "stray"]


def test_a_block_stays_whole_where_it_fits_and_falls_apart_where_not() -> None:
    spec = matrices("a 4 2,an 4,b 4 2,bn 4")
    block = Group(
        "other",
        (
            Group("conv", (Part("a"),)),
            Group("norm", (Part("an"),)),
            Group("conv", (Part("b"),)),
            Group("norm", (Part("bn"),)),
        ),
    )
    assert picture(planned(spec, Architecture("cnn", (block,)), 1)) == ["a an b bn"]
    assert picture(planned(spec, Architecture("cnn", (block,)), 2)) == ["a an", "b bn"]
    # A norm layer is not cut even where its values alone are above the target.
    assert picture(planned(spec, Architecture("cnn", (block,)), 12)) == [
        "a[0:1]", "a[1:2]", "a[2:3]", "a[3:4]", "an", "b[0:1]", "b[1:2]", "b[2:3]", "b[3:4]", "bn",
    ]  # fmt: skip


def test_a_tied_weight_is_cut_once_under_whichever_name() -> None:
    spec = ModelSpec(matrices("tokens 4 4,w 4 4").tensors, (("head", "tokens"),))
    groups = (Group("head", (Part("head"),)), Group("embedding", (Part("tokens"),)))
    assert picture(planned(spec, Architecture("large", groups), 2)) == ["tokens", "w"]


@pytest.mark.parametrize(
    ("family", "megabytes", "chunks", "count"),
    [
        ("cnn", 46.8, 20, 20),  # 2.3 MB each: as wished
        ("cnn", 46.8, 1000, 24),  # no less than 1 MB, which two pieces just below it make
        ("cnn", 46.8, 1, 12),  # no more than 5 MB; pieces leave room, so about 4
        ("small", 23.5, 20, 20),
        ("small", 39.0, 4, 20),  # no more than 2 MB
        ("small", 0.1, 20, 20),  # a small model may have small chunks
        ("cnn", 0.1, 20, 20),
        ("cnn", 0.1, 200, 20),
    ],
)
def test_num_chunks_is_a_target_that_the_range_bounds(
    family: Family, megabytes: float, chunks: int, count: int
) -> None:
    rows = int(megabytes * MB) // 100
    spec = ModelSpec((TensorSpec("w", "U8", (rows, 100)),))
    found = len(planned(spec, Architecture(family, ()), chunks).chunks)
    assert abs(found - count) <= max(1, count // 10)
