from __future__ import annotations

import msgspec
import pytest

from p2pfl_torrent.config import PeerConfig, explain
from p2pfl_torrent.config.differences import MAX_OUTLINE, model_term
from p2pfl_torrent.core.architecture import Architecture, Group, Part
from p2pfl_torrent.core.genesis import MAX_GENESIS_BYTES, Terms, decode_terms, encode_terms
from p2pfl_torrent.core.tensors import ModelSpec, TensorSpec


def model(*tensors: str, aliases: tuple[tuple[str, str], ...] = ()) -> ModelSpec:
    """``"a 2 3"`` is tensor a of two by three floats."""
    split = [text.split() for text in tensors]
    return ModelSpec(
        tuple(TensorSpec(name, "F32", tuple(map(int, sides))) for name, *sides in split), aliases
    )


LINEAR = model("w 2 3", "b 3")
LARGE = model("w 200 300", "b 300")  # worth several chunks


def terms(spec: ModelSpec = LINEAR, **values: object) -> Terms:
    config = PeerConfig().with_values(**values)
    return config.terms(spec, config.plan_layout(spec))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"federate__total_round_num": 4}, "federate.total_round_num is 10 here and 4 there"),
        ({"federate__client_num": 4}, "federate.client_num is 2 here and 4 there"),
        ({"federate__quorum": 1.0}, "federate.quorum is 0.5 here and 1.0 there"),
        ({"bittorrent__timeout": 4.0}, "bittorrent.timeout is 600.0 here and 4.0 there"),
        (
            {"bittorrent__critical_share": 1.0},
            "bittorrent.critical_share is 0.3 here and 1.0 there",
        ),
        ({"bittorrent__fill_max_age": 4}, "bittorrent.fill_max_age is 5 here and 4 there"),
        ({"bittorrent__fill_decay": 0.5}, "bittorrent.fill_decay is 0.7 here and 0.5 there"),
        ({"federate__overlap": True}, "federate.overlap is False here and True there"),
        ({"topology__type": "ring"}, "topology.type is mesh here and ring there"),
        ({"chunk__architecture": "cnn"}, "chunk.architecture is auto here and cnn there"),
        ({"chunk__compression": "int8"}, "chunk.compression is none here and int8 there"),
        (
            {"swarm__seed": 7, "federate__max_staleness": 0},
            "federate.max_staleness is 2 here and 0 there; swarm.seed is 0 here and 7 there",
        ),
    ],
)
def test_a_difference_is_told_by_its_key(values: dict[str, object], told: str) -> None:
    assert explain(terms(LARGE), terms(LARGE, **values)) == told


CUT_OTHERWISE = "chunk.num_chunks or chunk.block_size is another one there"


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        ("uniform", CUT_OTHERWISE),
        ("auto", f"{CUT_OTHERWISE}, or chunk.architecture: auto reads the model's layers"),
        ("large", f"{CUT_OTHERWISE}, or chunk.architecture: large reads the model's layers"),
    ],
)
def test_another_layout_of_the_same_model_is_told(architecture: str, told: str) -> None:
    ours = terms(LARGE, chunk__architecture=architecture)
    theirs = terms(LARGE, chunk__architecture=architecture, chunk__num_chunks=1)
    text = explain(ours, theirs)
    assert text.startswith(told)
    assert ("uniform at every peer" in text) == (architecture != "uniform")


def test_another_architecture_explains_another_layout() -> None:
    layers = Architecture("large", (Group("linear", (Part("b"),)), Group("linear", (Part("w"),))))
    uniform = PeerConfig().with_values(chunk__architecture="uniform")
    ours = PeerConfig().terms(LARGE, PeerConfig().plan_layout(LARGE, layers))
    theirs = uniform.terms(LARGE, uniform.plan_layout(LARGE, layers))
    assert ours.layout != theirs.layout
    assert explain(ours, theirs) == "chunk.architecture is auto here and uniform there"


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        (model("w 2 4", "b 3"), "the model's tensor 'w' is F32[2, 3] here and F32[2, 4] there"),
        (model("w 2 3"), "the model has 2 tensors here and 1 there: 'b' F32[3] is only here"),
        (
            model("w 2 3", "b 3", "c"),
            "the model has 2 tensors here and 3 there: 'c' F32[] is only there",
        ),
        (
            model("b 3", "w 2 3"),
            "where the model has tensor 'w' F32[2, 3] here, it has 'b' F32[3] there",
        ),
        (
            model("w 2 3", "b 3", aliases=(("v", "w"),)),
            "the models differ in tensors after 'b', or in which weights are tied",
        ),
    ],
)
def test_another_model_is_told_by_its_first_tensor(theirs: ModelSpec, told: str) -> None:
    assert explain(terms(), terms(theirs)) == told


def test_the_term_of_a_large_model_is_bounded() -> None:
    many = [f"layers.{number}.attention.weight 64 64" for number in range(1000)]
    large, larger = model(*many), model(*many, "head 64 10")
    assert len(model_term(large)) <= MAX_OUTLINE + 100
    assert len(encode_terms(terms(large))) < MAX_GENESIS_BYTES / 2
    assert explain(terms(large), terms(larger)) == "the model has 1000 tensors here and 1001 there"
    other = model(*many[:-1], "layers.999.attention.weight 64 65")
    assert "the models differ in tensors after 'layers." in explain(terms(large), terms(other))


@pytest.mark.parametrize("written", ["", "ab" * 32, '["",0,[]]', "[" * 5000, '["",1,[["","",[]]]]'])
def test_whatever_another_peer_writes_for_its_model_is_told(written: str) -> None:
    ours = terms()
    theirs = decode_terms(encode_terms(msgspec.structs.replace(ours, model=written)))
    assert explain(ours, theirs) == "the model is another one there"


def test_names_cannot_command_a_terminal() -> None:
    hostile = ModelSpec((TensorSpec("\x1b[2J", "F32", (2,)),))
    assert "\x1b" not in explain(terms(), terms(hostile))
