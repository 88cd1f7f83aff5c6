from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.fleet import FleetError
from benchmarks.systems.catalogue import SYSTEMS, System
from benchmarks.systems.child import DIALLED, OPEN, Task, digest_of
from benchmarks.systems.environments import Environment, PreparationError, prepare
from benchmarks.systems.runs import Lap, Work, lap


def a_lap(seconds: float, merged: float | None = None, cpu: float = 1.0) -> Lap:
    return Lap(seconds, seconds, merged, cpu, 0, None, equal=True)


def ours(dialled: float, open_: float, merged: float) -> compare.Laps:
    return {DIALLED: a_lap(dialled), OPEN: a_lap(open_, merged)}


OURS = [ours(4.0, 3.0, 3.5), ours(6.0, 5.0, 5.5), ours(5.0, 4.0, 4.5)]


def test_a_ratio_is_the_median_of_the_repeats_own_ratios_and_not_of_the_medians() -> None:
    theirs: list[compare.Laps] = [{DIALLED: a_lap(s)} for s in (1.0, 2.0, 10.0)]
    # 4, 3 and 0.5, where the medians' ratio is 2.5
    assert compare.ratios({"ours": OURS, "libtorrent": theirs}) == {"ours_over_libtorrent": 3.0}


def test_each_system_is_compared_with_what_has_the_same_in_its_clock() -> None:
    one: list[compare.Laps] = [{OPEN: a_lap(1.0)}]
    over = compare.ratios({"ours": OURS[:1], "gloo": one, "central": one, "p2pfl": one})
    assert over == {"ours_over_gloo": 3.0, "ours_over_central": 3.5, "ours_over_p2pfl": 3.5}
    with_dialling = compare.ratios({"ours": OURS[:1], "libtorrent": [{DIALLED: a_lap(1.0)}]})
    assert with_dialling == {"ours_over_libtorrent": 4.0}


def test_a_system_with_fewer_repeats_is_paired_with_the_first_of_ours() -> None:
    assert compare.ratios({"ours": OURS, "p2pfl": [{OPEN: a_lap(7.0)}]}) == {"ours_over_p2pfl": 0.5}


def test_without_ours_there_is_no_ratio() -> None:
    assert compare.ratios({"gloo": [{OPEN: a_lap(1.0)}]}) == {}


def test_a_lap_runs_from_the_word_to_the_last_and_sums_the_cpu() -> None:
    ends = [{"ended": 12.0, "merged": 12.5}, {"ended": 13.0, "merged": 13.25}]
    checks = [{"cpu_seconds": 1.5, "digest": "a"}, {"cpu_seconds": 2.0, "digest": "a"}]
    assert lap(10.0, ends, checks, 0, None) == Lap(3.0, 3.0, 3.25, 3.5, 0, None, equal=True)


def test_duplicates_are_those_of_all_over_the_payload_of_all() -> None:
    checks = [
        {"cpu_seconds": 1.0, "digest": "a", "payload": 300, "duplicate": 1},
        {"cpu_seconds": 1.0, "digest": "a", "payload": 100, "duplicate": 3},
    ]
    assert lap(0.0, [{"ended": 1.0}], checks, 0, None).duplicate_ratio == 0.01


def test_who_begins_later_by_its_own_doing_is_timed_from_there() -> None:
    ends = [{"ended": 20.0, "began": 14.0}, {"ended": 19.0, "began": 15.0}]
    checks = [{"cpu_seconds": 1.0, "digest": "a"}] * 2
    measured = lap(10.0, ends, checks, 0, None)
    assert (measured.seconds, measured.seconds_from_start) == (5.0, 10.0)


@pytest.mark.parametrize(
    ("digests", "complete", "expected"),
    [(("a", "b"), True, None), (("a", "a"), False, None), (("a", "a"), True, "b")],
)
def test_a_lap_is_not_equal_when_anyone_holds_something_else(
    digests: tuple[str, str], complete: bool, expected: str | None
) -> None:
    checks = [{"cpu_seconds": 1.0, "digest": each, "complete": complete} for each in digests]
    assert not lap(0.0, [{"ended": 1.0}], checks, 0, expected).equal


def test_a_digest_tells_who_has_which_update() -> None:
    assert digest_of([b"one", b"two"]) == digest_of([b"one", bytearray(b"two")])
    assert digest_of([b"one", b"two"]) != digest_of([b"two", b"one"])
    assert digest_of([b"one", b"two"]) != digest_of([b"onet", b"wo"])


def test_neighbours_of_a_ring_and_of_a_full_mesh() -> None:
    assert Task(0, 4, "ring", "", "").neighbours() == [1, 3]
    assert Task(0, 2, "ring", "", "").neighbours() == [1]
    assert Task(1, 4, "full", "", "").neighbours() == [0, 2, 3]


def test_an_unknown_system_is_named_with_those_there_are() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no system is called bittornado: take"):
        compare.chosen("ours,bittornado")
    assert [system.name for system in compare.chosen("tcp, ours,tcp")] == ["tcp", "ours"]


def test_a_failed_process_is_told_in_a_sentence_without_its_traceback() -> None:
    error = FleetError("gloo 3 ended with 1: Traceback\n  File x\nRuntimeError: no\n\n")
    assert compare.sentence(error) == "gloo 3 ended with 1: RuntimeError: no"
    assert compare.sentence(FleetError("gloo did not finish")) == "gloo did not finish"


def test_a_python_that_is_not_here_is_told(tmp_path: Path) -> None:
    with pytest.raises(PreparationError, match=r"old needs Python 3\.1: none is here\."):
        prepare(Environment("old", ("x==1",), (1,)), tmp_path)


@pytest.mark.slow
def test_what_cannot_be_installed_is_missing_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    nothing = Environment("nothing", ("p2pfl-torrent-no-such-package==1",), (10, 11, 12, 13))
    system = System("libtorrent", "libtorrent_session", environment=nothing)
    results = compare.Results()
    assert compare.prepared([system, SYSTEMS["tcp"]], tmp_path, results).keys() == {"tcp"}
    assert results.missing["libtorrent"].startswith("nothing could not be installed (ERROR: No ")
    # a half-made environment is not taken for one
    again = compare.Results()
    assert not compare.prepared([system], tmp_path, again)
    assert again.missing == results.missing


@pytest.mark.slow
def test_a_system_that_fails_is_missing(tmp_path: Path) -> None:
    work = Work(peers=2, topology="full", directory=tmp_path)  # no updates are there
    results = compare.Results()
    compare.measure_once(SYSTEMS["tcp"], sys.executable, work, results)
    assert results.laps == {}
    assert "FileNotFoundError" in results.missing["tcp"]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("topology", ["full", "ring"])
def test_ours_and_raw_sockets_share_the_same(tmp_path: Path, topology: str) -> None:
    file = tmp_path / "result.json"
    command = "--peers 3 --megabytes 1 --repeats 1 --systems ours,tcp --topology"
    assert compare.main([*command.split(), topology, "--json", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["missing"] == {}
    assert result["systems"]["ours"]["hashes_equal"]
    assert result["systems"]["ours"]["links_before_dialling"] == 0
    assert len(result["systems"]["tcp"]["seconds"]) == 1
    seconds = result["systems"]["ours"]["seconds_open"][0] / result["systems"]["tcp"]["seconds"][0]
    assert result["ratios"] == {"ours_over_tcp": seconds}
