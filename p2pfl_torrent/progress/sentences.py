"""Events in words, for the ticker and for plain output; and numbers as people read them."""

from __future__ import annotations

from collections.abc import Callable

from p2pfl_torrent.statistics import (
    BlockRefused,
    DeadlineSet,
    EdgeChanged,
    ImportanceSwitched,
    Joined,
    Left,
    MemberChanged,
    PeerDropped,
    PeerEvent,
    RoundFinished,
    RoundReport,
    RoundStarted,
)

NameOf = Callable[[str], str]
"""PeerId -> what the view calls that peer."""


def sentence(event: PeerEvent, name_of: NameOf) -> str | None:
    """An event in one line; None for those that come by the hundred."""
    if isinstance(event, Joined):
        return f"joined swarm {event.swarm[:8]} with {event.members} members as {event.peer}"
    if isinstance(event, MemberChanged):
        witnesses = f" (seen by {len(event.witnesses)})" if event.witnesses else ""
        return f"member {name_of(event.member)} {event.change}{witnesses}"
    if isinstance(event, EdgeChanged):
        took = f" in {milliseconds(event.seconds)}" if event.seconds is not None else ""
        reason = f" ({event.reason})" if event.reason else ""
        return f"edge to {name_of(event.neighbour)} {event.change}{took}{reason}"
    if isinstance(event, RoundStarted):
        start = event.model_hash[:8]
        return f"round {event.round} started from model {start} with {event.members} members"
    if isinstance(event, ImportanceSwitched):
        return f"importance is scored by {event.method} from round {event.round} on: {event.why}"
    if isinstance(event, BlockRefused):
        return (
            f"refused a block of {name_of(event.owner)}'s chunk {event.chunk} "
            f"from {name_of(event.sender)}"
        )
    if isinstance(event, PeerDropped):
        return f"dropped {name_of(event.peer)} for {event.seconds:.0f} s: {event.reason}"
    if isinstance(event, DeadlineSet):
        return f"round {event.round} closes in {event.in_seconds:.0f} s at the latest ({event.why})"
    if isinstance(event, RoundFinished):
        return finished(event.report)
    if isinstance(event, Left):
        return f"left: {event.reason}"
    return None


def finished(report: RoundReport) -> str:
    """What an exchange did, in one line."""
    if report.solo:
        return f"round {report.round} was solo: too few members, nothing merged"
    parts = [f"round {report.round} finished ({report.closed_by})"]
    if report.accuracy_after is not None:
        parts.append(f"accuracy {change(report.accuracy_before, report.accuracy_after)}")
    parts.append(f"{report.completeness:.0%} complete{_viability(report)}")
    parts.append(f"{size(report.bytes_payload)} in {report.seconds:.1f} s")
    parts.append(f"model {report.model_hash[:8]}")
    return ", ".join(parts)


def _viability(report: RoundReport) -> str:
    """Whether the critical chunks of a round that was cut short had come."""
    if report.completeness == 1 or report.late:
        return ""
    return " and viable" if report.viable else " and not viable"


def change(before: float | None, after: float | None) -> str:
    """``0.812 -> 0.954``; a dash for what is not known."""
    return f"{number(before)} -> {number(after)}"


def number(value: float | None) -> str:
    """Three decimals."""
    return "-" if value is None else f"{value:.3f}"


def size(count: float) -> str:
    """Bytes with a decimal unit, at most 7 characters."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def rate(per_second: float) -> str:
    """Bytes per second; a dash for none."""
    return "-" if per_second < 1 else f"{size(per_second)}/s"


def milliseconds(seconds: float) -> str:
    """A short time."""
    return f"{seconds * 1000:.0f} ms" if seconds < 9.9995 else f"{seconds:.0f} s"
