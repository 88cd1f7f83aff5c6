"""What takes long with a large model is not done in the thread that runs the network."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from p2pfl_torrent.peer.model import LocalModel
from p2pfl_torrent.peer.running import open_node
from p2pfl_torrent.store import Checkpoints, Store
from tests.peer.test_restart import again, one_round

Threads = dict[str, set[int]]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    """Method -> the threads it ran in."""
    seen: Threads = {}

    def watch(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def called(*args: Any, **named: Any) -> Any:
            seen.setdefault(name, set()).add(threading.get_ident())
            return original(*args, **named)

        monkeypatch.setattr(owner, name, called)

    for name in ("arrays", "load", "score"):
        watch(LocalModel, name)
    for name in ("prune", "save"):
        watch(Checkpoints, name)
    watch(Store, "verified_blocks")
    return seen


async def test_a_trio_peer_scores_loads_and_saves_elsewhere(
    threads: Threads, tmp_path: Path
) -> None:
    await one_round(tmp_path)
    assert sorted(threads) == ["arrays", "load", "prune", "save", "score"]
    for where in threads.values():
        assert threading.get_ident() not in where


async def test_a_restart_hashes_its_store_elsewhere(threads: Threads, tmp_path: Path) -> None:
    await one_round(tmp_path)
    threads.clear()
    async with open_node(again(tmp_path)) as node:
        assert {known.counted_in for known in node._exchange.swarm.ledger} == {1}
    assert threads.keys() == {"verified_blocks"}
    assert threading.get_ident() not in threads["verified_blocks"]
