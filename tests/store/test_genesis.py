"""Which swarm a state directory belongs to, through restarts and crashes."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pfl_torrent.core.genesis import Genesis
from p2pfl_torrent.store import StoreError, keep_genesis, load_genesis
from tests.core.swarm_world import World

GENESIS = World("a").genesis


def test_it_is_kept_and_found(tmp_path: Path) -> None:
    assert load_genesis(tmp_path) is None
    keep_genesis(tmp_path, GENESIS)
    assert load_genesis(tmp_path) == GENESIS
    assert [path.name for path in tmp_path.iterdir()] == ["genesis.json"]


def test_what_is_kept_already_is_not_written_again(tmp_path: Path) -> None:
    keep_genesis(tmp_path, GENESIS)
    before = (tmp_path / "genesis.json").stat().st_ino
    keep_genesis(tmp_path, GENESIS)
    assert (tmp_path / "genesis.json").stat().st_ino == before


def test_another_replaces_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_genesis(tmp_path, GENESIS)
    other = Genesis(GENESIS.terms, "another run", "a", GENESIS.initial_hash)

    def fail(self: Path, target: Path) -> None:
        raise OSError("the power is gone")

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="the power is gone"):
        patch.setattr(Path, "replace", fail)
        keep_genesis(tmp_path, other)
    assert load_genesis(tmp_path) == GENESIS
    keep_genesis(tmp_path, other)
    assert load_genesis(tmp_path) == other


@pytest.mark.parametrize("size", [0, 20])
def test_a_torn_one_is_told(size: int, tmp_path: Path) -> None:
    keep_genesis(tmp_path, GENESIS)
    path = tmp_path / "genesis.json"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(StoreError, match=r"genesis.json is damaged .* delete .* except identity"):
        load_genesis(tmp_path)
