"""Takes ``PeerStatistics`` from the running parts of a peer, for user interfaces and logs."""

from __future__ import annotations

from collections.abc import Sequence

from p2pfl_torrent.core.ledger import KnownUpdate
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import NeighbourStatistics, PeerStatistics, UpdateProgress
from p2pfl_torrent.core.swarm import Swarm
from p2pfl_torrent.exchange.driver import Exchange
from p2pfl_torrent.exchange.edges import Edge


def take_statistics(
    exchange: Exchange,
    *,
    swarm_id: bytes,
    round: int,
    total_rounds: int,
    phase: str,
    topology: str,
    members: Sequence[PeerId],
    now: float,
) -> PeerStatistics:
    """A snapshot at trio's time ``now``."""
    swarm = exchange.swarm
    state = swarm.standing()
    deadline = swarm.clock.deadline if swarm.clock is not None else None
    edges = [edge for _, edge in sorted(exchange.edges.items())]
    counted = [*edges, exchange.forgotten]
    return PeerStatistics(
        peer=swarm.local,
        swarm=swarm_id.hex(),
        round=round,
        total_rounds=total_rounds,
        phase=phase,
        deadline_in=None if deadline is None else max(0.0, deadline - now),
        members=tuple(members),
        dead=tuple(sorted(swarm.dead)),
        topology=topology,
        neighbours=tuple(_neighbour(edge, swarm, now) for edge in edges if edge.open),
        progress=tuple(
            _progress(known, swarm)
            for known in swarm.ledger.countable(swarm.round, swarm.terms.max_staleness)
        ),
        completeness=state.completeness,
        bytes_down=sum(edge.down.payload for edge in counted),
        bytes_up=sum(edge.up.payload for edge in counted),
        bytes_duplicate=swarm.fetching.bytes_duplicate,
        bytes_control_down=sum(edge.down.control for edge in counted),
        bytes_control_up=sum(edge.up.control for edge in counted),
        requests_sent=swarm.fetching.requests_sent,
        blocks_refused=swarm.fetching.blocks_refused,
    )


def _neighbour(edge: Edge, swarm: Swarm, now: float) -> NeighbourStatistics:
    return NeighbourStatistics(
        peer=edge.peer,
        connected=edge.open,
        alive=edge.peer in swarm.live,
        round=edge.round,
        rate_down=edge.down.rate(now),
        rate_up=edge.up.rate(now),
        bytes_down=edge.down.payload,
        bytes_up=edge.up.payload,
        requests_open=swarm.picker.open_requests(edge.peer),
        uploads_queued=swarm.serving.queued(edge.peer),
        round_trip=edge.round_trip,
    )


def _progress(known: KnownUpdate, swarm: Swarm) -> UpdateProgress:
    manifest = known.manifest
    total = manifest.header.payload_bytes
    if known.held.complete:
        states, verified = "#" * len(known.held), total
    else:
        states = swarm.picker.chunk_states(manifest.update)
        verified = swarm.picker.bytes_verified(manifest.update)
    return UpdateProgress(
        owner=manifest.owner,
        round=manifest.round,
        chunks=states,
        available=tuple(swarm.fetching.available(manifest.update)),
        bytes_verified=verified,
        bytes_total=total,
    )
