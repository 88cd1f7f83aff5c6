"""A run directory: a peer's events and snapshots as files that others can follow while it runs.

    events.jsonl                               every event, one a line
    statistics.json                            the latest snapshot, replaced whole
    topology_logs/connection_messages.jsonl    the events about members and edges
    bittorrent_logs/chunk_exchange.log         the exchange in greppable lines
    metrics.json                               one entry per finished round, replaced whole

Lines are written whole and handed to the system at once, so that another process can follow them
and a kill loses none that was written.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, get_args

import msgspec

from p2pfl_torrent.core.errors import P2PFLError
from p2pfl_torrent.core.reports import (
    BlockRefused,
    ChunkReceived,
    DeadlineSet,
    EdgeChanged,
    Joined,
    Left,
    ManifestSeen,
    MemberChanged,
    PeerDropped,
    PeerEvent,
    PeerStatistics,
    RoundClosed,
    RoundFinished,
    RoundReport,
)

EVENTS = "events.jsonl"
STATISTICS = "statistics.json"
CONNECTIONS = "topology_logs/connection_messages.jsonl"
EXCHANGE = "bittorrent_logs/chunk_exchange.log"
METRICS = "metrics.json"

MAX_LINE = 16 << 20  # a round report with 50,000 owners
RECORD_INTERVAL = 0.25  # seconds: a live view refreshes about as often

_KINDS: Mapping[str, type[Any]] = {kind.__name__: kind for kind in get_args(PeerEvent)}
_ABOUT_CONNECTIONS = (Joined, MemberChanged, EdgeChanged, PeerDropped, Left)


class RunLogError(P2PFLError):
    """A run directory cannot be written or read; the text names the file."""


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """An event and when it was logged (seconds since 1970, this machine's clock)."""

    t: float
    event: PeerEvent


def encode_event(t: float, event: PeerEvent) -> bytes:
    """One line of ``events.jsonl``, without its end."""
    fields = msgspec.to_builtins(event)
    return msgspec.json.encode({"t": round(t, 3), "event": type(event).__name__, **fields})


def decode_event(line: bytes) -> LoggedEvent | None:
    """A line of ``events.jsonl``; None for an event that this version does not know.

    Raises:
        RunLogError: the line is no event.
    """
    try:
        fields = msgspec.json.decode(line, type=dict[str, Any])
        t = msgspec.convert(fields.pop("t", None), float)
        kind = _KINDS.get(fields.pop("event", ""))
        return None if kind is None else LoggedEvent(t, msgspec.convert(fields, kind))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError) as error:
        raise RunLogError(f"Not an event: {error}.") from error


def read_events(run_dir: Path) -> Iterator[LoggedEvent]:
    """Every event of a run directory so far."""
    yield from EventTail(run_dir).poll()


def read_statistics(run_dir: Path) -> PeerStatistics | None:
    """The latest snapshot; None while there is none.

    Raises:
        RunLogError: the file holds something else.
    """
    path = run_dir / STATISTICS
    try:
        return msgspec.json.decode(path.read_bytes(), type=PeerStatistics)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise RunLogError(f"{path} cannot be read: {error}.") from error


class EventTail:
    """Reads a growing ``events.jsonl``: each ``poll`` gives what has come since the last."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / EVENTS
        self._offset = 0  # of the first line that has not been read whole
        self._line = 0

    def poll(self) -> list[LoggedEvent]:
        """New events; none while the file is not there, or its last line has not ended.

        Raises:
            RunLogError: a line is no event; the text names it.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunLogError(f"{self._path} cannot be read: {error.strerror}.") from error
        *lines, rest = data.split(b"\n")
        if len(rest) > MAX_LINE:
            raise RunLogError(f"{self._path} is no event log: it has a line without end.")
        # What has not ended is read again: a restart may cut it off.
        self._offset += len(data) - len(rest)
        found = []
        for line in lines:
            self._line += 1
            try:
                event = decode_event(line)
            except RunLogError as error:
                raise RunLogError(f"{self._path}, line {self._line}: {error}") from error
            if event is not None:
                found.append(event)
        return found


class RunLog:
    """Writes a run directory. A directory that exists is gone on with: files are appended to.

    Args:
        clock: seconds since 1970.

    Raises:
        RunLogError: the directory cannot be made or written.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.time) -> None:
        self._dir = run_dir
        self._clock = clock
        self._stack = ExitStack()
        self._peer = self._swarm = ""
        self._edge_seconds: list[float] = []
        self._rounds: list[dict[str, Any]] = []
        try:
            self._load_metrics()
            self._events = self._open(EVENTS)
            self._connections = self._open(CONNECTIONS)
            self._exchange = self._open(EXCHANGE)
        except OSError as error:
            self._stack.close()
            raise RunLogError(
                f"The run directory {run_dir} cannot be written: {error.strerror}."
            ) from error

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, event: PeerEvent) -> None:
        """Log an event in every file that it belongs to."""
        t = self._clock()
        line = encode_event(t, event) + b"\n"
        self._events.write(line)
        if isinstance(event, _ABOUT_CONNECTIONS):
            self._connections.write(line)
            self._note_connection(event)
        text = exchange_line(event)
        if text is not None:
            stamp = datetime.fromtimestamp(t, timezone.utc).isoformat(timespec="milliseconds")
            self._exchange.write(f"{stamp} {text}\n".encode())
        if isinstance(event, RoundFinished):
            self._rounds.append(round_metrics(event.report))
            self._write_metrics()

    def write_statistics(self, snapshot: PeerStatistics) -> None:
        """Replace the snapshot."""
        self._replace(STATISTICS, msgspec.json.encode(snapshot))

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def _open(self, name: str) -> IO[bytes]:
        path = self._dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        return self._stack.enter_context(path.open("ab", buffering=0))

    def _replace(self, name: str, data: bytes) -> None:
        """Write a file so that readers see the old or the new one, never a part."""
        path = self._dir / name
        fresh = path.with_suffix(".new")
        fresh.write_bytes(data)
        os.replace(fresh, path)

    def _note_connection(self, event: PeerEvent) -> None:
        if isinstance(event, Joined):
            self._peer, self._swarm = event.peer, event.swarm
        elif isinstance(event, EdgeChanged) and event.seconds is not None:
            self._edge_seconds.append(event.seconds)

    def _write_metrics(self) -> None:
        seconds = self._edge_seconds
        metrics = {
            "peer": self._peer,
            "swarm": self._swarm,
            "edges_opened": len(seconds),
            "edge_seconds_mean": sum(seconds) / len(seconds) if seconds else None,
            "rounds": self._rounds,
        }
        self._replace(METRICS, msgspec.json.format(msgspec.json.encode(metrics)))

    def _load_metrics(self) -> None:
        """Rounds that were finished before a restart."""
        try:
            before = msgspec.json.decode((self._dir / METRICS).read_bytes(), type=dict[str, Any])
            self._rounds = msgspec.convert(before.get("rounds", []), list[dict[str, Any]])
        except FileNotFoundError:
            pass
        except msgspec.MsgspecError as error:
            raise RunLogError(
                f"{self._dir / METRICS} is not a peer's metrics: give another run directory."
            ) from error


def _cut_torn_line(path: Path) -> None:
    """After a kill the last line may be cut short: take it away, so that the log stays readable."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        whole = data.rfind(b"\n") + 1
    os.truncate(path, whole)


def round_metrics(report: RoundReport) -> dict[str, Any]:
    """What ``metrics.json`` keeps of a round: the report without its list of owners."""
    kept: dict[str, Any] = msgspec.to_builtins(report)
    owners = kept.pop("owners")
    return {**kept, "updates": sum(1 for owner in owners if owner["weight"] > 0)}


def exchange_line(event: PeerEvent) -> str | None:
    """The line of ``chunk_exchange.log`` for an event: a word, then ``name=value`` pairs."""
    if isinstance(event, ManifestSeen):
        return (
            f"manifest round={event.round} owner={event.owner} samples={event.num_samples} "
            f"bytes={event.payload_bytes} via={event.via}"
        )
    if isinstance(event, ChunkReceived):
        return (
            f"chunk round={event.round} owner={event.owner} chunk={event.chunk} bytes={event.size} "
            f"rank={event.rank} from={event.source}"
        )
    if isinstance(event, BlockRefused):
        return (
            f"refused round={event.round} owner={event.owner} chunk={event.chunk} "
            f"block={event.block} from={event.sender}"
        )
    if isinstance(event, DeadlineSet):
        return f"deadline round={event.round} in={event.in_seconds:.1f}s why={event.why}"
    if isinstance(event, RoundClosed):
        return (
            f"closed round={event.round} by={event.closed_by} completeness={event.completeness:.3f}"
        )
    if isinstance(event, RoundFinished):
        report = event.report
        return (
            f"finished round={report.round} by={report.closed_by} "
            f"completeness={report.completeness:.3f} viable={'yes' if report.viable else 'no'} "
            f"bytes={report.bytes_payload} "
            f"duplicate={report.bytes_duplicate} uploaded={report.bytes_uploaded} "
            f"seconds={report.seconds:.3f} model={report.model_hash[:16]}"
        )
    return None


class EventSource(Protocol):
    """Where a recorder takes events from; ``Peer.events()`` gives one."""

    def drain(self) -> Iterable[PeerEvent]:
        """What has come since the last call, without waiting."""
        ...


class Recorder:
    """Copies a running peer's events and snapshots to a run directory, in a thread of its own.

    Args:
        snapshot: gives the peer's statistics, or None while there are none; called every
            ``RECORD_INTERVAL`` seconds.
    """

    def __init__(
        self, run_dir: Path, events: EventSource, snapshot: Callable[[], PeerStatistics | None]
    ) -> None:
        self._log = RunLog(run_dir)
        self._events = events
        self._snapshot = snapshot
        self._stop = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="run-log", daemon=True)

    def start(self) -> None:
        """Begin; ``stop`` must follow."""
        self._thread.start()

    def stop(self) -> None:
        """Write what is left, and close the files.

        Raises:
            RunLogError: something could not be written.
        """
        self._stop.set()
        self._thread.join()
        self._log.close()
        if self._error is not None:
            raise RunLogError(f"The run directory could not be written: {self._error}.")

    def _run(self) -> None:
        try:
            while not self._stop.wait(RECORD_INTERVAL):
                self._record()
            self._record()
        except OSError as error:  # a full disk must not stop the training
            self._error = error

    def _record(self) -> None:
        for event in self._events.drain():
            self._log.write(event)
        snapshot = self._snapshot()
        if snapshot is not None:
            self._log.write_statistics(snapshot)
