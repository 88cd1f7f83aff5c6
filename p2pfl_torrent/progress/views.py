"""Rich renderables over a ``SwarmState``: header, one row per peer, ticker, closing tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from p2pfl_torrent.progress.sentences import change, number, rate, size
from p2pfl_torrent.progress.state import PeerState, SwarmState, short_id
from p2pfl_torrent.statistics import PeerStatistics, RoundReport, UpdateProgress

MEDIUM = 110  # columns from which loss and a bar each for training and chunks fit
WIDE = 150  # columns from which ids, neighbours and totals fit

SHADES = "·░▒▓█"
ASCII_SHADES = ".:-=#"
BAR = ("━", "╺")
ASCII_BAR = ("=", "-")

PHASE_STYLES: Mapping[str, str] = {
    "training": "cyan", "exchanging": "yellow", "aggregating": "magenta", "seeding": "blue",
    "left": "green", "failed": "bold red",
}  # fmt: skip


def bar(done: float, total: float, width: int, *, ascii_only: bool = False) -> str:
    """A progress bar of exactly ``width`` characters."""
    full, rest = ASCII_BAR if ascii_only else BAR
    filled = int(width * min(1.0, max(0.0, done / total))) if total > 0 else 0
    return full * filled + rest * (width - filled)


def chunk_map(updates: Iterable[UpdateProgress], width: int, *, ascii_only: bool = False) -> str:
    """The chunks of all updates, side by side, in exactly ``width`` characters.

    The darker the more is held: nobody near has it, a neighbour has it, begun, (in between), held.
    """
    shades = ASCII_SHADES if ascii_only else SHADES
    levels = [
        {"#": 4, "+": 2}.get(state, 1 if available else 0)
        for update in updates
        for state, available in zip(update.chunks, update.available, strict=True)
    ]
    if not levels:
        return shades[0] * width
    cells = []
    for cell in range(width):
        start = cell * len(levels) // width
        stop = max(start + 1, (cell + 1) * len(levels) // width)
        share = levels[start:stop]
        cells.append(shades[sum(share) // len(share)])
    return "".join(cells)


def header(swarm: SwarmState) -> Text:
    """Swarm, round, phase, deadline, members."""
    snapshots = [peer.snapshot for peer in swarm.peers.values() if peer.snapshot is not None]
    phases = Counter(peer.phase for peer in swarm.peers.values())
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(swarm.name, style="bold")
    text.append(f"  {swarm.topology}" if swarm.topology else "")
    text.append(f"  round {swarm.round}/{swarm.total_rounds}", style="bold")
    for phase, count in phases.most_common(2):
        text.append("  ")
        text.append(phase if count == len(swarm.peers) else f"{count} {phase}", _style(phase))
    deadlines = [s.deadline_in for s in snapshots if s.deadline_in is not None]
    if deadlines:
        text.append(f"  closes in {min(deadlines):.0f} s")
    if snapshots:
        text.append(f"  members {max(len(s.members) for s in snapshots)}")
        dead = {peer for s in snapshots for peer in s.dead}
        if dead:
            text.append(f"  dead {len(dead)}", style="red")
    return text


def peers_table(
    swarm: SwarmState, width: int, *, max_rows: int = 1000, ascii_only: bool = False
) -> Table:
    """One row a peer; more columns the wider the terminal."""
    table = Table(box=None, padding=(0, 1, 0, 0), expand=False, header_style="dim")
    table.add_column("peer", no_wrap=True)
    if width >= WIDE:
        table.add_column("id", no_wrap=True)
    table.add_column("phase", no_wrap=True)
    table.add_column("rnd", justify="right", no_wrap=True)
    if width >= MEDIUM:
        table.add_column("training", no_wrap=True)
    table.add_column("chunks", no_wrap=True)
    table.add_column("have", justify="right", no_wrap=True)
    table.add_column("down", justify="right", no_wrap=True)
    table.add_column("up", justify="right", no_wrap=True)
    if width >= WIDE:
        table.add_column("edges", justify="right", no_wrap=True)
        table.add_column("received", justify="right", no_wrap=True)
        table.add_column("twice", justify="right", no_wrap=True)
    if width >= MEDIUM:
        table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("accuracy", no_wrap=True)
    peers = list(swarm.peers.values())
    for peer in peers[:max_rows]:
        table.add_row(*_cells(peer, width, ascii_only))
    if len(peers) > max_rows:
        table.add_row(f"and {len(peers) - max_rows} more", style="dim")
    return table


def _cells(peer: PeerState, width: int, ascii_only: bool) -> list[RenderableType]:
    shown = peer.snapshot
    done, total = peer.training
    training = bar(done, total, 10, ascii_only=ascii_only)
    places = 24 if width >= MEDIUM else 12
    chunks = chunk_map(_others(shown), places, ascii_only=ascii_only)
    if peer.phase in ("seeding", "left") and not _others(shown):  # no round is under way any more
        chunks = (ASCII_SHADES if ascii_only else SHADES)[-1] * places
    if width < MEDIUM and peer.phase in ("training", "joining", "starting"):
        chunks = bar(done, total, 12, ascii_only=ascii_only)
    neighbours = shown.neighbours if shown is not None else ()
    cells: list[RenderableType] = [peer.label]
    if width >= WIDE:
        cells.append(short_id(peer.peer))
    cells += [Text(peer.phase, _style(peer.phase)), str(peer.round)]
    if width >= MEDIUM:
        cells.append(training)
    cells += [
        chunks,
        "-" if shown is None else f"{shown.completeness:.0%}",
        rate(sum(n.rate_down for n in neighbours)),
        rate(sum(n.rate_up for n in neighbours)),
    ]
    if width >= WIDE:
        cells.append("-" if shown is None else str(sum(n.connected for n in neighbours)))
        cells.append("-" if shown is None else size(shown.bytes_down))
        cells.append("-" if shown is None else size(shown.bytes_duplicate))
    if width >= MEDIUM:
        cells.append(_loss(peer))
    cells.append(_accuracy(peer))
    return cells


def _others(snapshot: PeerStatistics | None) -> list[UpdateProgress]:
    """What others published; one's own update is always complete."""
    if snapshot is None:
        return []
    return [update for update in snapshot.progress if update.owner != snapshot.peer]


def _loss(peer: PeerState) -> str:
    last = peer.last
    if last is not None and last.loss_after is not None:
        return change(last.loss_before, last.loss_after)
    return number(peer.loss)


def _accuracy(peer: PeerState) -> Text:
    if peer.phase == "failed":
        return Text(peer.problem, style="red", no_wrap=True, overflow="ellipsis")
    last = peer.last
    if last is None or last.accuracy_after is None:
        return Text("-")
    return Text(change(last.accuracy_before, last.accuracy_after))


def _style(phase: str) -> str:
    return PHASE_STYLES.get(phase, "")


def ticker(swarm: SwarmState, lines: int) -> Text:
    """The latest events, oldest first."""
    latest = list(swarm.ticker)[-lines:] if lines > 0 else []
    return Text("\n".join(latest), style="dim", no_wrap=True, overflow="ellipsis")


def live(swarm: SwarmState, width: int, height: int, *, ascii_only: bool = False) -> Group:
    """The whole view in at most ``height`` lines."""
    room = max(1, height - 5)  # header, blank, column names, blank, and a line to spare
    rows = min(len(swarm.peers), max(1, room - min(4, room // 3)))
    table = peers_table(swarm, width, max_rows=rows, ascii_only=ascii_only)
    left = room - rows - (1 if rows < len(swarm.peers) else 0)
    return Group(header(swarm), "", table, "", ticker(swarm, min(8, left)))


def rounds_table(rounds: Sequence[tuple[int, Sequence[RoundReport]]]) -> Table:
    """One row a round: how complete, how much, how accurate, and whether all hold one model.

    Where one was cut short, a column says at how many peers each was viable.

    Args:
        rounds: the number of a round with its reports, one a peer.
    """
    cut_short = any(report.completeness < 1 for _, reports in rounds for report in reports)
    viable = ("viable",) if cut_short else ()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("round", "seconds", "complete", *viable, "received", "twice"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("accuracy", no_wrap=True)
    table.add_column("model", overflow="fold")
    for number_, reports in rounds:
        before = [r.accuracy_before for r in reports if r.accuracy_before is not None]
        after = [r.accuracy_after for r in reports if r.accuracy_after is not None]
        table.add_row(
            str(number_),
            f"{max((r.seconds for r in reports), default=0):.1f}",
            f"{_mean([r.completeness for r in reports]) or 0:.0%}",
            *(f"{sum(r.viable for r in reports)}/{len(reports)}" for _ in viable),
            size(sum(r.bytes_payload for r in reports)),
            size(sum(r.bytes_duplicate for r in reports)),
            change(_mean(before), _mean(after)),
            models(reports),
        )
    return table


def models(reports: Sequence[RoundReport]) -> Text:
    """The hash that all hold after a round, or each hash with how many hold it."""
    counts = Counter(report.model_hash[:8] for report in reports)
    if len(counts) == 1:
        return Text(f"{next(iter(counts))} equal on {len(reports)}", style="green")
    return Text(", ".join(f"{value} x{count}" for value, count in counts.most_common()), "yellow")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One peer's accuracies: trained alone, before the last merge, and after it."""

    label: str
    alone: float | None
    local: float | None
    merged: float | None


def comparison_table(peers: Sequence[Comparison], central: float | None) -> Table:
    """What learning together was worth: each peer alone, merged, and all data in one place."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("accuracy on all test data", no_wrap=True)
    for name in ("alone", "before last merge", "together"):
        table.add_column(name, justify="right", no_wrap=True)
    for peer in peers:
        table.add_row(peer.label, number(peer.alone), number(peer.local), number(peer.merged))
    table.add_row(
        "mean",
        number(_mean([p.alone for p in peers])),
        number(_mean([p.local for p in peers])),
        number(_mean([p.merged for p in peers])),
        style="bold",
    )
    table.add_row("all data in one place", "", "", number(central))
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
