"""One configuration has one swarm id; what differs is said by its key."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl_torrent.core.aggregators import AggregationTerms
from p2pfl_torrent.core.errors import LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.genesis import (
    MAX_GENESIS_BYTES,
    Genesis,
    RoundTerms,
    Terms,
    TopologyTerms,
    decode_genesis,
    decode_terms,
    difference,
    encode_terms,
)

TOPOLOGY = TopologyTerms("mesh", 3, 2, (), ())
ROUNDS = RoundTerms(
    total=8,
    client_num=4,
    min_members=2,
    join_timeout=60.0,
    train_timeout=600.0,
    exchange_timeout=30.0,
    quorum=0.5,
    min_completion_ratio=0.8,
    max_staleness=2,
    fill_max_age=5,
    max_num_samples=10_000,
)
TERMS = Terms("digits", "swarm", "fedavg", 7, "f" * 64, "e" * 64, TOPOLOGY, ROUNDS)
GENESIS = Genesis(TERMS, "nonce", "peer", "0" * 64)


def test_terms_and_genesis_come_back_as_they_were() -> None:
    assert decode_terms(encode_terms(TERMS)) == TERMS
    assert decode_genesis(GENESIS.encode()) == GENESIS
    assert decode_genesis(GENESIS.encode()).swarm_id == GENESIS.swarm_id


def test_a_whole_number_of_seconds_makes_the_same_swarm() -> None:
    rounds = msgspec.structs.replace(ROUNDS, join_timeout=60, quorum=0.5)
    same = msgspec.structs.replace(GENESIS, terms=msgspec.structs.replace(TERMS, rounds=rounds))
    assert same.swarm_id == GENESIS.swarm_id


def test_what_is_usual_is_not_encoded_whatever_made_it() -> None:
    """Or a number read from a file made another swarm than the same one left out."""
    rounds = msgspec.structs.replace(ROUNDS, fill="".join(["la", "st"]), fill_decay=float("1"))
    aggregation = AggregationTerms(trim_share=float("0.2"))
    read = msgspec.structs.replace(
        TERMS, rounds=rounds, aggregation=aggregation, fragment_share=float("1")
    )
    assert encode_terms(read) == encode_terms(TERMS)


def test_the_order_of_keys_and_spaces_make_no_other_swarm() -> None:
    shuffled = json.dumps(dict(reversed(json.loads(GENESIS.encode()).items())), indent=2).encode()
    assert decode_genesis(shuffled).swarm_id == GENESIS.swarm_id


@pytest.mark.parametrize(
    ("path", "value"),
    [("run_id", "other"), ("creator", "other"), ("initial_hash", "1" * 64)],
)
def test_every_field_of_a_genesis_makes_another_swarm(path: str, value: str) -> None:
    assert msgspec.structs.replace(GENESIS, **{path: value}).swarm_id != GENESIS.swarm_id


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_noise_is_its_senders_fault(noise: bytes) -> None:
    for decode in (decode_terms, decode_genesis):
        with pytest.raises(RemoteProtocolError):
            decode(noise)


@given(st.data())
@settings(max_examples=300)
def test_a_changed_byte_is_refused_or_another_swarm(data: st.DataObject) -> None:
    changed = bytearray(GENESIS.encode())
    place = data.draw(st.integers(0, len(changed) - 1))
    changed[place] ^= data.draw(st.integers(1, 255))
    try:
        other = decode_genesis(bytes(changed))
    except RemoteProtocolError:
        return
    assert other == GENESIS or other.swarm_id != GENESIS.swarm_id
    assert decode_genesis(other.encode()) == other


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 10_000,
        b'{"terms":' * 3000,
        b" " * MAX_GENESIS_BYTES + b"{}",
        GENESIS.encode()[:-1] + b',"extra":1}',
        GENESIS.encode().replace(b'"total":8', b'"total":0'),
        GENESIS.encode().replace(b'"total":8', b'"total":1e400'),
        GENESIS.encode().replace(b'"quorum":0.5', b'"quorum":NaN'),
        GENESIS.encode().replace(b'"nonce"', b'"\xff"'),
        GENESIS.encode().replace(b'"nonce"', b'"\\ud800"'),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_a_genesis_outside_the_schema_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_genesis(data)


def test_a_value_that_no_peer_would_accept_is_our_own_fault() -> None:
    rounds = msgspec.structs.replace(ROUNDS, total=0)
    with pytest.raises(LocalProtocolError, match="Terms out of bounds"):
        encode_terms(msgspec.structs.replace(TERMS, rounds=rounds))


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    return [path]


@pytest.mark.parametrize("path", leaves(msgspec.to_builtins(TERMS)), ids=".".join)
def test_whatever_differs_is_named_by_its_key(path: tuple[str, ...]) -> None:
    raw = msgspec.to_builtins(TERMS)
    place = raw
    for key in path[:-1]:
        place = place[key]
    old = place[path[-1]]
    if isinstance(old, str):
        place[path[-1]] = old[::-1] + "z"
    elif isinstance(old, (list, tuple)):
        place[path[-1]] = [[1, [2]]] if path[-1] == "custom_graph" else ["someone"]
    else:
        place[path[-1]] = old + 1 if isinstance(old, int) else old / 2
    theirs = msgspec.convert(raw, Terms)
    said = difference(TERMS, theirs)
    assert said.startswith(f"{'.'.join(path)} is ")
    assert ";" not in said
    assert encode_terms(theirs) != encode_terms(TERMS)


def test_terms_that_agree_differ_in_nothing() -> None:
    assert difference(TERMS, decode_terms(encode_terms(TERMS))) == ""
