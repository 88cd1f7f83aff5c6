from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import (
    BlockRefused,
    ChunkReceived,
    DeadlineSet,
    EdgeChanged,
    ImportanceSwitched,
    Joined,
    Left,
    ManifestSeen,
    MemberChanged,
    NeighbourStatistics,
    OwnerReport,
    PeerDropped,
    PeerEvent,
    PeerStatistics,
    RoundClosed,
    RoundFinished,
    RoundReport,
    RoundStarted,
    TrainingProgress,
    UpdateProgress,
)
from p2pfl_torrent.runlog import (
    CONNECTIONS,
    EVENTS,
    EXCHANGE,
    METRICS,
    EventTail,
    Recorder,
    RunLog,
    RunLogError,
    decode_event,
    encode_event,
    read_events,
    read_statistics,
)

A, B = PeerId("12D3KooWA"), PeerId("12D3KooWB")


def report(round: int = 1) -> RoundReport:
    return RoundReport(
        round=round,
        next_round=round + 1,
        closed_by="complete",
        members=2,
        owners=(OwnerReport(A, round, 10, 10.0, 4, 0, 4, "complete", 1.0),),
        completeness=1.0,
        bytes_payload=1000,
        bytes_duplicate=10,
        bytes_uploaded=900,
        seconds=0.5,
        exchange_seconds=0.4,
        aggregate_seconds=0.1,
        model_hash="ab" * 32,
        accuracy_before=0.5,
        accuracy_after=0.75,
        metrics={"loss": 0.25},
    )


EVERY_KIND: tuple[PeerEvent, ...] = (
    Joined("swarm", A, 1, 2),
    MemberChanged(B, "dead", (A,)),
    EdgeChanged(B, "open", seconds=0.25, address="/ip4/127.0.0.1/tcp/1"),
    RoundStarted(1, "ab" * 32, 2),
    TrainingProgress(1, 3, 10, 0.5),
    ImportanceSwitched(2, "fisher", "the loss fell by less than 2.0% a round, 3 times in a row"),
    ManifestSeen(B, 1, B, 10, 1000),
    ChunkReceived(B, 1, 3, 250, 2, B),
    BlockRefused(B, A, 1, 3, 0),
    PeerDropped(B, "bad block", 60.0),
    DeadlineSet(1, 30.0, "quorum"),
    RoundClosed(1, "complete", 1.0),
    RoundFinished(report()),
    Left("finished"),
)


def snapshot() -> PeerStatistics:
    neighbour = NeighbourStatistics(B, True, True, 1, 10.0, 5.0, 1000, 900, 2, 1, 0.01)
    update = UpdateProgress(B, 1, "##+.", (1, 1, 0, 0), 500, 1000)
    return PeerStatistics(
        A, "ff", 1, 8, "exchanging", 12.5, (A, B), (), "mesh", (neighbour,), (update,),
        0.5, 1000, 900, 10, 100, 90, 7, 0,
    )  # fmt: skip


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_every_kind_of_event_is_tested_here() -> None:
    from typing import get_args

    assert {type(event) for event in EVERY_KIND} == set(get_args(PeerEvent))


@pytest.mark.parametrize("event", EVERY_KIND, ids=lambda event: type(event).__name__)
def test_an_event_survives_its_line(event: PeerEvent) -> None:
    line = encode_event(12.5, event)
    assert b"\n" not in line
    logged = decode_event(line)
    assert logged is not None
    assert (logged.t, logged.event) == (12.5, event)


def test_the_line_has_the_documented_shape() -> None:
    line = json.loads(encode_event(1.0, DeadlineSet(2, 30.0, "quorum")))
    assert line == {
        "t": 1.0, "event": "DeadlineSet", "round": 2, "in_seconds": 30.0, "why": "quorum"
    }  # fmt: skip


@given(st.text(max_size=200), st.text(max_size=200))
def test_no_text_breaks_out_of_its_line(reason: str, peer: str) -> None:
    line = encode_event(0.0, PeerDropped(PeerId(peer), reason, 1.0))
    assert b"\n" not in line
    logged = decode_event(line)
    assert logged is not None
    assert logged.event == PeerDropped(PeerId(peer), reason, 1.0)


def test_events_of_a_newer_version_are_passed_over() -> None:
    assert decode_event(b'{"t": 1, "event": "ReputationChanged", "peer": "x"}') is None


@pytest.mark.parametrize(
    "line", [b"", b"[]", b"{", b'{"t": "now", "event": "Left", "reason": ""}', b"\xff",
             b'{"t": 1, "event": "Left"}', b'{"event": "Left", "reason": ""}',
             b'{"t": 1, "event": [], "reason": ""}']
)  # fmt: skip
def test_what_is_no_event_is_refused(line: bytes) -> None:
    with pytest.raises(RunLogError):
        decode_event(line)


@given(st.binary(max_size=300))
def test_any_bytes_are_an_event_or_refused(line: bytes) -> None:
    try:
        decode_event(line)
    except RunLogError:
        pass


def test_each_event_goes_where_it_belongs(tmp_path: Path) -> None:
    with RunLog(tmp_path, clock=lambda: 0.0) as log:
        for event in EVERY_KIND:
            log.write(event)
    assert [logged.event for logged in read_events(tmp_path)] == list(EVERY_KIND)
    connections = [json.loads(line)["event"] for line in lines(tmp_path / CONNECTIONS)]
    assert connections == ["Joined", "MemberChanged", "EdgeChanged", "PeerDropped", "Left"]
    exchange = lines(tmp_path / EXCHANGE)
    words = [line.split()[1] for line in exchange]
    assert words == ["manifest", "chunk", "refused", "deadline", "closed", "finished"]
    assert exchange[1] == (
        "1970-01-01T00:00:00.000+00:00 chunk round=1 owner=12D3KooWB chunk=3 bytes=250 rank=2 "
        "from=12D3KooWB"
    )
    metrics = json.loads((tmp_path / METRICS).read_text())
    assert (metrics["peer"], metrics["swarm"]) == (A, "swarm")
    assert (metrics["edges_opened"], metrics["edge_seconds_mean"]) == (1, 0.25)
    assert metrics["rounds"][0]["accuracy_after"] == 0.75
    assert metrics["rounds"][0]["updates"] == 1
    assert "owners" not in metrics["rounds"][0]


def test_another_reader_sees_a_line_at_once_and_never_half_of_one(tmp_path: Path) -> None:
    tail = EventTail(tmp_path)
    assert tail.poll() == []
    with RunLog(tmp_path, clock=lambda: 1.0) as log:
        log.write(EVERY_KIND[0])
        assert [logged.event for logged in tail.poll()] == [EVERY_KIND[0]]
        assert tail.poll() == []
        whole = encode_event(2.0, EVERY_KIND[1]) + b"\n"
        with (tmp_path / EVENTS).open("ab") as file:
            file.write(whole[:20])
            file.flush()
            assert tail.poll() == []
            file.write(whole[20:])
        assert [logged.event for logged in tail.poll()] == [EVERY_KIND[1]]


def test_a_restart_goes_on_where_a_kill_tore_the_log(tmp_path: Path) -> None:
    tail = EventTail(tmp_path)
    with RunLog(tmp_path) as log:
        log.write(RoundFinished(report(1)))
    with (tmp_path / EVENTS).open("ab") as file:
        file.write(b'{"t": 1, "event": "Le')
    assert len(tail.poll()) == 1
    with RunLog(tmp_path) as log:
        log.write(RoundFinished(report(2)))
    rounds = [e.event.report.round for e in tail.poll() if isinstance(e.event, RoundFinished)]
    assert rounds == [2]
    assert len(list(read_events(tmp_path))) == 2
    metrics = json.loads((tmp_path / METRICS).read_text())
    assert [entry["round"] for entry in metrics["rounds"]] == [1, 2]


def test_errors_name_the_file_and_the_line(tmp_path: Path) -> None:
    (tmp_path / EVENTS).write_bytes(encode_event(0, Left("finished")) + b"\nnonsense\n")
    with pytest.raises(RunLogError, match=r"events\.jsonl, line 2"):
        list(read_events(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunLogError, match="cannot be written"):
        RunLog(tmp_path / "file")
    (tmp_path / METRICS).write_text("[1]")
    with pytest.raises(RunLogError, match=r"metrics\.json"):
        RunLog(tmp_path)


def test_the_snapshot_survives(tmp_path: Path) -> None:
    assert read_statistics(tmp_path) is None
    with RunLog(tmp_path) as log:
        log.write_statistics(snapshot())
    assert read_statistics(tmp_path) == snapshot()
    (tmp_path / "statistics.json").write_text("{}")
    with pytest.raises(RunLogError, match=r"statistics\.json"):
        read_statistics(tmp_path)


class Feed:
    def __init__(self, events: tuple[PeerEvent, ...]) -> None:
        self.events = list(events)

    def drain(self) -> list[PeerEvent]:
        drained, self.events = self.events, []
        return drained


def test_a_recorder_leaves_nothing_unwritten(tmp_path: Path) -> None:
    feed = Feed(EVERY_KIND[:2])
    recorder = Recorder(tmp_path, feed, snapshot)
    recorder.start()
    feed.events.extend(EVERY_KIND[2:])
    recorder.stop()
    assert [logged.event for logged in read_events(tmp_path)] == list(EVERY_KIND)
    assert read_statistics(tmp_path) == snapshot()


def test_a_recorder_says_that_it_could_not_write(tmp_path: Path) -> None:
    def full() -> PeerStatistics:
        raise OSError(28, "No space left on device")

    recorder = Recorder(tmp_path, Feed(()), full)
    recorder.start()
    with pytest.raises(RunLogError, match="No space left"):
        recorder.stop()
