"""A blocking peer's thread begins and ends with its block, whatever happens in between."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from p2pfl_torrent import Peer, PeerConfig, PeerStoppedError
from p2pfl_torrent.core.reports import Left


def alone(state_dir: Path) -> Peer:
    config = PeerConfig.from_mapping(
        {
            "federate": {"client_num": 1, "total_round_num": 1},
            "bittorrent": {"enable": False},
            "storage": {"state_dir": str(state_dir)},
        }
    )
    return Peer(config, nn.Linear(4, 2))


def test_an_error_while_the_start_weights_are_loaded_leaves_nothing_running(tmp_path: Path) -> None:
    peer = alone(tmp_path)

    def fail(arrays: object, own_controls: object = None) -> None:
        raise KeyboardInterrupt

    peer._model.load = fail  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt), peer:
        raise AssertionError("must not get in")
    with alone(tmp_path):  # the state directory is free
        pass


def test_an_error_in_the_block_comes_out_as_it_is(tmp_path: Path) -> None:
    peer = alone(tmp_path)
    told = peer.events()
    with pytest.raises(ZeroDivisionError):
        with peer:
            raise ZeroDivisionError
    assert list(told)[-1] == Left("stopped before the end")
    with alone(tmp_path):
        pass


def test_outside_its_block_a_peer_says_so(tmp_path: Path) -> None:
    peer = alone(tmp_path)
    with pytest.raises(PeerStoppedError, match="use it in a with block"):
        peer.exchange(num_samples=1)
    with pytest.raises(PeerStoppedError, match="use it in a with block"):
        peer.statistics()
    assert peer.snapshot() is None
    with peer:
        peer.exchange(num_samples=1)
    with pytest.raises(PeerStoppedError, match="has stopped"):
        peer.exchange(num_samples=1)
    assert peer.snapshot() is None
