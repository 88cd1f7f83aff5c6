from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import (
    ImportanceSwitched,
    Joined,
    Left,
    NeighbourStatistics,
    PeerStatistics,
    RoundClosed,
    RoundFinished,
    RoundReport,
    RoundStarted,
    TrainingProgress,
    UpdateProgress,
)
from p2pfl_torrent.progress import views
from p2pfl_torrent.progress.display import Display
from p2pfl_torrent.progress.sentences import finished, rate, sentence, size
from p2pfl_torrent.progress.state import SwarmState, short_id

IDS = [PeerId(f"12D3KooW{letter * 44}") for letter in "ABCDEF"]


def report(round: int, model: str = "ab", **values: object) -> RoundReport:
    base = RoundReport(
        round=round, next_round=round + 1, closed_by="complete", members=6, owners=(),
        completeness=1.0, bytes_payload=1_200_000, bytes_duplicate=0, bytes_uploaded=1_000_000,
        seconds=1.25, exchange_seconds=1.0, aggregate_seconds=0.1, model_hash=model * 32,
        loss_before=0.9, loss_after=0.4, accuracy_before=0.712, accuracy_after=0.935,
    )  # fmt: skip
    return replace(base, **values)  # type: ignore[arg-type]


def snapshot(index: int, phase: str = "exchanging") -> PeerStatistics:
    others = [peer for peer in IDS if peer != IDS[index]]
    neighbours = tuple(
        NeighbourStatistics(p, True, True, 2, 1_250_000, 640_000, 10, 10, 1, 0, 0.02)
        for p in others[:3]
    )
    progress = tuple(
        UpdateProgress(p, 2, "####++..", (3, 3, 3, 3, 2, 2, 1, 0), 500, 1000) for p in others
    )
    return PeerStatistics(
        IDS[index], "f" * 64, 2, 8, phase, 42.4, tuple(IDS), (), "mesh", neighbours, progress,
        0.5, 5_000_000, 4_000_000, 1000, 100, 100, 10, 0,
    )  # fmt: skip


def a_swarm() -> SwarmState:
    swarm = SwarmState("digits", "mesh of 3", 8, [f"peer {n}" for n in range(1, 7)])
    for index, label in enumerate(swarm.peers):
        swarm.apply(label, Joined("f" * 64, IDS[index], 1, 6))
        swarm.apply(label, RoundStarted(2, "cd" * 32, 6))
        swarm.apply(label, TrainingProgress(2, 5, 10, 0.5))
        swarm.apply(label, RoundFinished(report(1)))
        swarm.observe(label, snapshot(index))
    return swarm


def drawn(renderable: RenderableType, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO(), legacy_windows=False)
    console.print(renderable)
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_view_fits_and_says_it_all(width: int) -> None:
    lines = drawn(views.live(a_swarm(), width, 40), width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    assert len(lines) <= 40
    assert lines[0].startswith(
        "digits  mesh of 3  round 2/8  exchanging  closes in 42 s  members 6"
    )
    row = next(line for line in lines if line.startswith("peer 3"))
    for shown in ("exchanging", "50%", "3.8 MB/s", "1.9 MB/s", "0.712 -> 0.935"):
        assert shown in row, (shown, row)
    assert "…" not in text.split("\n\n")[1], "no cell of the table is cut"
    assert ("0.900 -> 0.400" in row) == (width >= 110)
    assert ("..CCCCCC" in row) == (width >= 150)
    assert "peer 6: round 1 finished (complete), accuracy 0.712 -> 0.935" in text


def test_a_low_terminal_shows_what_it_can() -> None:
    lines = drawn(views.live(a_swarm(), 80, 10), 80)
    assert len(lines) <= 10
    assert any("more" in line for line in lines)


def test_while_training_a_narrow_row_shows_the_training() -> None:
    swarm = a_swarm()
    swarm.observe("peer 1", snapshot(0, "training"))
    row = next(line for line in drawn(views.peers_table(swarm, 80), 80) if "peer 1" in line)
    assert "━━━━━━╺╺╺╺╺╺" in row


def test_a_failed_peer_says_why_and_does_not_hold_the_round_back() -> None:
    swarm = a_swarm()
    swarm.fail("peer 1", "No bootstrap peer could be reached.")
    swarm.apply("peer 2", RoundStarted(3, "ee" * 32, 5))
    assert swarm.round == 2
    text = "\n".join(drawn(views.live(swarm, 200, 40), 200))
    assert "failed" in text
    assert "peer 1: failed: No bootstrap peer could be reached." in text
    swarm.observe("peer 1", snapshot(0))
    assert swarm.peers["peer 1"].phase == "failed", "an old snapshot does not raise the dead"


@pytest.mark.parametrize(
    ("chunks", "available", "width", "expected"),
    [
        ("####", (1, 1, 1, 1), 4, "████"),
        ("....", (0, 0, 0, 0), 4, "····"),
        ("#+..", (1, 1, 1, 0), 4, "█▒░·"),
        ("########", (1,) * 8, 4, "████"),
        ("#.", (1, 0), 6, "███···"),
        ("##..", (1, 1, 0, 0), 1, "▒"),
        ("#######.", (1,) * 8, 1, "▓"),
    ],
)
def test_chunk_maps(chunks: str, available: tuple[int, ...], width: int, expected: str) -> None:
    update = UpdateProgress(IDS[0], 1, chunks, available, 0, 1)
    assert views.chunk_map([update], width) == expected


def test_a_map_is_full_only_when_every_chunk_is_held() -> None:
    update = UpdateProgress(IDS[0], 1, "#" * 99 + ".", (1,) * 100, 0, 1)
    assert "█" * 12 != views.chunk_map([update], 12)
    assert views.chunk_map([], 3) == "···"


@pytest.mark.parametrize(
    ("done", "total", "expected"),
    [(0, 10, "----"), (5, 10, "==--"), (10, 10, "===="), (99, 100, "===-"), (3, 0, "----"),
     (20, 10, "====")],
)  # fmt: skip
def test_bars(done: int, total: int, expected: str) -> None:
    assert views.bar(done, total, 4, ascii_only=True) == expected


def test_the_rounds_table_shows_whether_all_hold_one_model() -> None:
    rows = [(1, [report(1), report(1)]), (2, [report(2), report(2, "cd"), report(2)])]
    lines = drawn(views.rounds_table(rows), 100)
    assert "abababab equal on 2" in lines[1]
    assert "abababab x2, cdcdcdcd x1" in lines[2]
    assert "equal" not in lines[2]


def test_the_rounds_table_counts_the_peers_whose_round_was_viable() -> None:
    short = report(1, completeness=0.5)
    rows = [(1, [report(1, viable=True), short, replace(short, viable=True)])]
    header, line = (text.split() for text in drawn(views.rounds_table(rows), 100)[:2])
    assert line[header.index("viable")] == "2/3"


def test_a_switch_of_the_importance_method_is_told() -> None:
    told = sentence(ImportanceSwitched(4, "fisher", "the loss hardly falls"), short_id)
    assert told == "importance is scored by fisher from round 4 on: the loss hardly falls"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"completeness": 0.5, "viable": True}, "50% complete and viable, "),
        ({"completeness": 0.5}, "50% complete and not viable, "),
        ({"completeness": 1.0, "viable": True}, "100% complete, "),
        ({"completeness": 0.0, "late": True}, "0% complete, "),
    ],
)
def test_a_round_that_was_cut_short_is_told_viable_or_not(
    values: dict[str, Any], told: str
) -> None:
    assert told in finished(report(1, **values))


def test_the_comparison_has_means_and_the_central_training() -> None:
    peers = [views.Comparison("peer 1", 0.6, 0.9, 0.95), views.Comparison("peer 2", 0.8, 0.9, 0.95)]
    lines = drawn(views.comparison_table(peers, 0.97), 80)
    assert lines[-2].split() == ["mean", "0.700", "0.900", "0.950"]
    assert lines[-1].split() == ["all", "data", "in", "one", "place", "0.970"]


def test_a_peers_state_follows_its_events() -> None:
    swarm = a_swarm()
    peer = swarm.peers["peer 1"]
    swarm.apply("peer 1", RoundClosed(2, "deadline", 0.9))
    assert peer.phase == "aggregating"
    swarm.apply("peer 1", RoundFinished(report(2, accuracy_after=0.99)))
    assert peer.last is not None
    assert peer.last.accuracy_after == 0.99
    swarm.apply("peer 1", Left("finished"))
    swarm.observe("peer 1", snapshot(0))
    assert peer.phase == "left"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_949, "99.9 kB"), (99_960, "100 kB"),
     (999_600, "1.0 MB"), (23_500_000, "23.5 MB"), (5e12, "5.0 TB")],
)  # fmt: skip
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_a_rate_of_nothing_is_a_dash() -> None:
    assert rate(0.0) == "-"
    assert rate(2_000_000) == "2.0 MB/s"


def test_without_a_terminal_every_event_is_a_plain_line_of_its_own() -> None:
    out = io.StringIO()
    display = Display(SwarmState("s", "", 8, ["peer 1"]), Console(file=out, width=40))
    with display:
        display.event("peer 1", Joined("f" * 64, IDS[0], 1, 6))
        display.event("peer 1", TrainingProgress(1, 1, 2))
        display.event("peer 1", RoundFinished(report(1)))
        display.observe("peer 1", snapshot(0))
        display.refresh()
        display.fail("peer 1", "It [broke].")
    assert out.getvalue().splitlines() == [
        f"peer 1: joined swarm ffffffff with 6 members as {IDS[0]}",
        "peer 1: round 1 finished (complete), accuracy 0.712 -> 0.935, 100% complete, "
        "1.2 MB in 1.2 s, model abababab",
        "peer 1: failed: It [broke].",
    ]


def test_on_a_terminal_frames_are_drawn_in_place_and_without_colour_if_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=24, color_system="standard")
    with Display(a_swarm(), console) as display:
        display.refresh()
        display.event("peer 1", RoundFinished(report(2)))
    written = out.getvalue()
    assert "\x1b[1A" in written or "\x1b[2K" in written, "the frame replaces the one before"
    for colour in range(30, 38):
        assert f"\x1b[{colour}m" not in written
    assert "peer 1: round 2 finished" in written


@pytest.mark.parametrize("phase", ["seeding", "left"])
def test_the_chunks_of_a_peer_that_has_all_are_all_there(phase: str) -> None:
    swarm = a_swarm()
    shown = replace(snapshot(0), round=9, progress=(), completeness=1.0, phase="seeding")
    swarm.observe("peer 1", shown)
    swarm.peers["peer 1"].phase = phase
    row, *_ = [line for line in drawn(views.live(swarm, 120, 40), 120) if "peer 1" in line]
    assert views.SHADES[-1] * 24 in row
    assert views.chunk_map([], 24) not in row
