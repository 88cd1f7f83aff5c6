from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import training
from benchmarks.member import model
from benchmarks.training_loop import Ballast
from benchmarks.training_node import Window
from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import ChunkReceived, ManifestSeen
from p2pfl_torrent.peer.model import LocalModel

HERE, THERE = PeerId("here"), PeerId("there")


def test_the_end_with_torch_and_the_one_without_cut_alike(tmp_path: Path) -> None:
    spec = training.Bench(150.0, 50.0, 1, tmp_path)._spec(0, [])
    config = PeerConfig.from_mapping(spec.config)
    with_torch = LocalModel(config, Ballast(spec), evaluate=None, optimizer=None, calibration=None)
    shapes = model(spec)
    assert with_torch.spec == shapes
    theirs = config.plan_layout(with_torch.spec, with_torch.architecture)
    assert theirs.digest == config.plan_layout(shapes).digest


def batches(*times: float) -> list[tuple[float, float]]:
    """Done at these times, by a loop that never waits for a core."""
    return [(time, 0.0) for time in times]


def test_a_rate_counts_what_was_done_inside_the_windows() -> None:
    done = batches(0.5, 1.0, 1.5, 2.0, 4.0, 5.0, 9.0)
    assert training.rates(done, [(0.9, 3.0)]) == (2.0, 2.0)
    assert training.rates(done, [(0.0, 2.0), (3.5, 6.0)]) == (1.6, 1.6)


def test_time_without_a_core_is_left_out_where_it_is_to_be() -> None:
    done = [(0.0, 5.0), (1.0, 5.5), (2.0, 6.0), (3.0, 7.0)]
    assert training.rates(done, [(0.0, 2.5)]) == (1.0, 2.0)


def test_a_window_without_batches_is_an_error() -> None:
    with pytest.raises(ValueError, match="the update is too small"):
        training.rates(batches(1.0, 2.5), [(2.0, 3.0)])


def test_training_is_compared_with_the_seconds_around_the_window_alone() -> None:
    done = batches(
        *(0.0, 0.5, 1.0, 1.5, 2.0),  # two a second; the sender is told to share at 2
        *(2.4, 2.5, 2.6),  # it hashes: neither alone nor beside
        *(3.5, 4.5, 5.5, 6.5),  # one a second, while the update comes from 3 to 7
        *(7.5, 8.0, 8.5, 9.0),
    )
    quiet = training.Transfer((0.0, 2.0), 0.5, (), 0.0)
    figures = training.sharing(100.0, quiet, training.Transfer((3.0, 7.0), 0.7, done, 2.0))
    assert figures.batches_alone == 2.0
    assert figures.batches_beside == 1.0
    assert figures.training_ratio == figures.training_ratio_on_core == 0.5
    assert figures.exchange_ratio == 2.0
    assert figures.megabytes_alone == 50.0


def test_the_result_is_the_median_of_the_repeats_ratios() -> None:
    runs = [
        training.Sharing(a, b, 2 * a, b, 1.0, 1.0, 1.0, 1.0) for a, b in ((1, 1), (2, 1), (10, 7))
    ]
    result = training.summary(runs)
    assert result["training_ratio"] == 0.7
    assert result["training_ratio_on_core"] == 0.35
    assert result["batches_alone"] == 2


def test_an_updates_window_runs_from_its_manifest_to_its_last_chunk() -> None:
    window = Window()
    own = ChunkReceived(HERE, 1, 0, 100, 0, HERE)
    chunks = [ChunkReceived(THERE, 1, k, 50, k, THERE) for k in range(2)]
    assert not window.over(own, HERE)
    assert not window.over(ManifestSeen(THERE, 1, THERE, 10, 100), HERE)
    began = window.began
    assert not window.over(own, HERE)
    assert not window.over(chunks[0], HERE)
    assert window.over(chunks[1], HERE)
    assert window.began == began > 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_both_networks_share_with_a_training_loop(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = "--megabytes 20 --pace 20 --repeats 1 --json"
    assert training.main([*command.split(), str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    for network in ("thread", "process"):
        figures = result[network]
        assert figures["training_ratio"] > 0
        assert figures["batches_alone"] > 0
        # The kernel's pace holds: a burst at the start apart, nothing is faster.
        assert 0 < figures["megabytes_alone"] < 30
