"""What the closing of a round means for the report: pure functions."""

from __future__ import annotations

from collections.abc import Container

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import OwnerReport


def owner_reports(
    close: ev.CloseRound, layout: Layout, refused: set[PeerId], baseless: Container[UpdateId]
) -> tuple[OwnerReport, ...]:
    """What became of each owner's update; ``refused`` those that could not be averaged.

    Args:
        baseless: updates that change weights which are not here.
    """
    total = len(layout.chunks)
    reports = [
        OwnerReport(
            owner=count.manifest.owner,
            trained_round=count.manifest.round,
            num_samples=count.manifest.header.num_samples,
            weight=count.weight,
            chunks=len(count.chunks),
            filled=len(count.fills),
            total=total,
            status=_status(count, refused, baseless),
            critical=count.critical,
        )
        for count in close.counts
    ]
    reports += [
        OwnerReport(member, close.round, 0, 0.0, 0, 0, total, "missing", 0.0)
        for member in close.missing
    ]
    reports += [
        OwnerReport(owner, round, 0, 0.0, 0, 0, total, "dropped", 0.0)
        for owner, round in close.dropped
    ]
    return tuple(sorted(reports, key=lambda report: (report.owner, report.trained_round)))


def _status(count: ev.Count, refused: set[PeerId], baseless: Container[UpdateId]) -> str:
    if count.manifest.update in baseless:
        return "another base"
    return "refused" if count.manifest.owner in refused else count.status
