from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from p2pfl_torrent.cli.demo_result import Baselines, PeerRecord, conclude, failure, result
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import Joined, Left, RoundFinished, RoundReport

REPORT = RoundReport(
    round=1, next_round=2, closed_by="complete", members=2, owners=(), completeness=1.0,
    viable=True, bytes_payload=1000, bytes_duplicate=10, bytes_uploaded=900, seconds=0.5,
    exchange_seconds=0.4, aggregate_seconds=0.1, model_hash="ab" * 32,
    accuracy_before=0.5, accuracy_after=0.75,
    metrics={"loss": 0.1, "train_seconds": 2.0},
)  # fmt: skip


def record(label: str, *reports: RoundReport) -> PeerRecord:
    made = PeerRecord(label)
    made.note(Joined("ff" * 32, PeerId(f"id of {label}"), 0, 2))
    for report in reports:
        made.note(RoundFinished(report))
    made.note(Left("finished"))
    return made


def second(**values: object) -> RoundReport:
    return replace(REPORT, round=2, next_round=3, **values)  # type: ignore[arg-type]


BASELINES = Baselines(alone=(0.6, 0.7), central=0.9)


def test_the_json_has_the_promised_keys() -> None:
    records = [
        record("peer-1", REPORT, second()),
        record(
            "peer-2",
            replace(REPORT, completeness=0.5, seconds=1.5),
            second(model_hash="cd" * 32, accuracy_after=0.8),
        ),
    ]
    made = result(records, BASELINES, 12.5)
    assert (made["peers"], made["seconds"]) == (2, 12.5)
    assert (made["accuracy_central"], made["accuracy_alone"]) == (0.9, (0.6, 0.7))
    first, last = made["rounds"]
    assert first["round"] == 1
    assert first["seconds"] == 3.5  # of the slowest peer: 2.0 of training and 1.5 of exchange
    assert first["completeness"] == 0.75
    assert (first["bytes_payload"], first["bytes_duplicate"]) == (2000, 20)
    assert first["hashes_equal"]
    assert first["peers"][0] == {
        "peer_id": "id of peer-1",
        "accuracy_local": 0.5,
        "accuracy_merged": 0.75,
        "model_hash": "ab" * 32,
        "completeness": 1.0,
        "viable": True,
        "closed_by": "complete",
        "late": False,
    }
    assert not last["hashes_equal"]
    assert [peer["accuracy_merged"] for peer in last["peers"]] == [0.75, 0.8]


def test_a_round_lists_only_who_finished_it() -> None:
    made = result([record("peer-1", REPORT, second()), record("peer-2", REPORT)], BASELINES, 1.0)
    assert [len(round["peers"]) for round in made["rounds"]] == [2, 1]


def test_a_repeated_solo_round_counts_once() -> None:
    solo = replace(REPORT, closed_by="solo", next_round=1)
    made = record("peer-1", solo, solo, REPORT)
    assert made.reports == {1: REPORT}


CAUGHT_UP = replace(REPORT, closed_by="late", late=True, next_round=3, model_hash="cd" * 32)


@pytest.mark.parametrize(
    ("reports", "sentence"),
    [
        ([REPORT, second()], None),
        ([second()], None),  # it came while round 1 was on
        ([REPORT, second(late=True, closed_by="late")], None),
        ([replace(REPORT, late=True, next_round=3)], None),
        ([], "peer-1 did not finish round 1."),
        ([REPORT], "peer-1 did not finish round 2."),
        ([REPORT, second(closed_by="solo")], "peer-1 was alone in round 2."),
    ],
)
def test_who_finished_or_caught_up_holds_the_swarms_model(
    reports: list[RoundReport], sentence: str | None
) -> None:
    assert record("peer-1", *reports).shortfall(2) == sentence


def test_a_late_round_is_no_failure_and_another_model_is() -> None:
    one, late = record("peer-1", REPORT, second(model_hash="cd" * 32)), record("peer-2", CAUGHT_UP)
    assert failure([one, late], 2) is None
    assert failure([one, record("peer-2", REPORT)], 2) == "peer-2 did not finish round 2."
    assert failure([one, record("peer-2", REPORT, second()), late], 2) == (
        "The peers did not end with one model: cdcdcdcd on 2, abababab on 1."
    )


def test_who_was_late_is_told_and_written() -> None:
    records = [record("peer-1", REPORT, second()), record("peer-2", CAUGHT_UP)]
    console = Console(width=80, record=True, file=io.StringIO())
    conclude(console, records, BASELINES)
    told = "peer-2 was too slow for round 1 and caught up with the others."
    assert told in console.export_text().splitlines()
    [first, _] = result(records, BASELINES, 1.0)["rounds"]
    assert [peer["late"] for peer in first["peers"]] == [False, True]


def test_the_closing_tables_compare() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    conclude(console, [record("peer-1", REPORT), record("peer-2", REPORT)], BASELINES)
    text = console.export_text()
    assert "abababab equal on 2" in text
    assert "0.600" in text
    assert "0.900" in text


def test_a_peer_without_a_round_still_has_its_row() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    conclude(console, [record("peer-1", REPORT), record("peer-2")], BASELINES)
    assert "peer-2" in console.export_text()
