"""Checkpoints are safetensors files that are whole or not there."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import load_file

from p2pfl_torrent.core.chunking import TensorSlice, slice_of
from p2pfl_torrent.core.errors import LocalProtocolError
from p2pfl_torrent.core.tensors import Array, ModelSpec, TensorSpec, model_hash
from p2pfl_torrent.store import Checkpoints, StoreError
from tests.core.small_models import finite_arrays, same_bits, specs

SPEC = ModelSpec((TensorSpec("w", "F32", (40, 10)), TensorSpec("n", "I64", ())))


@given(specs, st.integers(0, 9))
@settings(max_examples=30)
def test_weights_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec, seed: int
) -> None:
    arrays = finite_arrays(spec, seed)
    checkpoints = Checkpoints(tmp_path_factory.mktemp("state"), spec)
    path = checkpoints.save(seed, arrays)
    loaded = checkpoints.load(seed, model_hash(spec, arrays))
    assert loaded.keys() == arrays.keys()
    assert all(same_bits(loaded[name], arrays[name]) for name in arrays)
    by_library = dict(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    for tensor in spec.tensors:
        assert by_library[tensor.name]["dtype"] == tensor.dtype
        assert bytes(by_library[tensor.name]["data"]) == arrays[tensor.name].tobytes()


def test_the_library_loads_the_file(tmp_path: Path) -> None:
    arrays = finite_arrays(SPEC, 1)
    loaded = load_file(Checkpoints(tmp_path, SPEC).save(7, arrays))
    assert all(same_bits(loaded[name], arrays[name]) for name in arrays)


def test_rounds_are_listed_and_pruned_oldest_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, SPEC)
    assert checkpoints.rounds() == []
    for round in (10, 2, 0, 9):
        checkpoints.save(round, finite_arrays(SPEC, round))
    (tmp_path / "checkpoints" / "notes.txt").write_text("not ours")
    assert checkpoints.rounds() == [0, 2, 9, 10]
    checkpoints.prune(9)
    assert checkpoints.rounds() == [0, 2, 9, 10]
    checkpoints.prune(2, spare=lambda round: round == 0)
    assert checkpoints.rounds() == [0, 9, 10]
    checkpoints.prune(0)
    assert checkpoints.rounds() == []
    assert (tmp_path / "checkpoints" / "notes.txt").exists()


def test_what_is_loaded_stays_when_the_round_is_saved_again_or_pruned(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, SPEC)
    first, second = finite_arrays(SPEC, 1), finite_arrays(SPEC, 2)
    checkpoints.save(1, first)
    loaded = checkpoints.load(1)
    checkpoints.save(1, second)
    assert same_bits(loaded["w"], first["w"])
    assert same_bits(checkpoints.load(1)["w"], second["w"])
    checkpoints.prune(0)
    assert same_bits(loaded["w"], first["w"])
    with pytest.raises(ValueError, match="read-only"):
        loaded["w"][0, 0] = 1


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer", "header", "other model"])
def test_a_damaged_file_is_said_in_a_sentence(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, SPEC)
    path = checkpoints.save(3, finite_arrays(SPEC, 1))
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "other model":
        checkpoints = Checkpoints(tmp_path, ModelSpec(SPEC.tensors[:1]))
    else:
        path.write_bytes(
            {
                "empty": b"",
                "cut": data[:-1],
                "longer": data + b"\0",
                "header": data[:20] + b"?" + data[21:],
            }[damage]
        )
    with pytest.raises(StoreError, match="round-3"):
        checkpoints.load(3)


def test_a_flipped_weight_is_found_by_its_hash(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, SPEC)
    arrays = finite_arrays(SPEC, 1)
    path = checkpoints.save(3, arrays)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    checkpoints.load(3)
    with pytest.raises(StoreError, match="other weights"):
        checkpoints.load(3, model_hash(SPEC, arrays))


def test_a_write_that_fails_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, SPEC)
    arrays = finite_arrays(SPEC, 1)
    checkpoints.save(1, arrays)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left"):
            checkpoints.save(1, finite_arrays(SPEC, 2))
    assert same_bits(checkpoints.load(1)["w"], arrays["w"])
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["round-1.safetensors"]


def test_the_leftover_of_a_crash_is_cleared_away(tmp_path: Path) -> None:
    Checkpoints(tmp_path, SPEC)
    (tmp_path / "checkpoints" / "round-4.tmp").write_bytes(b"half")
    assert Checkpoints(tmp_path, SPEC).rounds() == []
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_saving_and_loading_hold_no_second_model_in_memory(tmp_path: Path) -> None:
    spec = ModelSpec((TensorSpec("w", "F32", (1024, 1024)), TensorSpec("v", "BF16", (1 << 20,))))
    arrays: dict[str, Array] = {
        "w": np.ones((1024, 1024), np.float32),
        "v": np.ones(1 << 20, np.uint16),
    }
    checkpoints = Checkpoints(tmp_path, spec)
    tracemalloc.start()
    try:
        checkpoints.save(1, arrays)
        loaded = checkpoints.load(1)
        assert tracemalloc.get_traced_memory()[1] < spec.nbytes // 10
    finally:
        tracemalloc.stop()
    assert same_bits(loaded["w"], arrays["w"])


W_TOP, W_REST, N = TensorSlice(0, 0, 15), TensorSlice(0, 15, 40), TensorSlice(1, 0, 1)


def test_a_draft_of_slices_in_any_order_is_the_same_file(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, SPEC)
    arrays = finite_arrays(SPEC, 1)
    whole = checkpoints.save(1, arrays).read_bytes()
    with checkpoints.draft(2) as draft:
        draft.put(W_REST, arrays["w"][15:])
        draft.put(N, arrays["n"])
        draft.put(W_TOP, arrays["w"][:15])
        assert checkpoints.rounds() == [1]  # not there before it is whole
    assert checkpoints.path(2).read_bytes() == whole


@given(specs, st.integers(0, 9), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_a_draft_has_the_models_hash_in_whatever_order_it_is_written(
    tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec, seed: int, random: Random
) -> None:
    arrays = finite_arrays(spec, seed)
    rows = [
        TensorSlice(index, start, start + 1)
        for index, tensor in enumerate(spec.tensors)
        for start in range(tensor.shape[0] if tensor.shape else 1)
    ]
    kept = random.randrange(len(rows) + 1)  # in order: all, some or none are hashed as they come
    rest = rows[kept:]
    random.shuffle(rest)
    checkpoints = Checkpoints(tmp_path_factory.mktemp("state"), spec)
    with checkpoints.draft(1) as draft:
        for part in rows[:kept] + rest:
            draft.put(part, slice_of(arrays[spec.tensors[part.tensor].name], part))
        assert draft.model_hash() == model_hash(spec, arrays)


def test_what_is_written_in_order_is_not_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = finite_arrays(SPEC, 1)
    read: list[int] = []
    pread = os.pread

    def counted(descriptor: int, count: int, place: int) -> bytes:
        read.append(count)
        return pread(descriptor, count, place)

    monkeypatch.setattr(os, "pread", counted)
    hashes = []
    for order in ((W_TOP, W_REST, N), (W_TOP, N, W_REST), (N, W_REST, W_TOP)):
        with Checkpoints(tmp_path, SPEC).draft(2) as draft:
            for part in order:
                draft.put(part, slice_of(arrays[SPEC.tensors[part.tensor].name], part))
            hashes.append(draft.model_hash())
        read.append(-1)
    assert read == [-1, 8, -1, 25 * 40, 8, -1]  # bytes of N; of W_REST and N
    assert set(hashes) == {model_hash(SPEC, arrays)}


@pytest.mark.parametrize("rows", [np.zeros((14, 10), np.float32), np.zeros((15, 10))])
def test_a_draft_takes_no_rows_of_another_kind(tmp_path: Path, rows: Array) -> None:
    checkpoints = Checkpoints(tmp_path, SPEC)
    with pytest.raises(LocalProtocolError, match="'w' is"), checkpoints.draft(1) as draft:
        draft.put(W_TOP, rows)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_draft_with_rows_missing_leaves_the_older_file(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, SPEC)
    arrays = finite_arrays(SPEC, 1)
    checkpoints.save(1, arrays)
    with pytest.raises(LocalProtocolError, match="not written"), checkpoints.draft(1) as draft:
        draft.put(W_TOP, np.zeros((15, 10), np.float32))
    assert same_bits(checkpoints.load(1)["w"], arrays["w"])
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["round-1.safetensors"]
