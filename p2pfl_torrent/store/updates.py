"""The updates of a swarm on disk: ``chunks.sqlite`` (WAL) and one file of chunk bytes per update.

An update's chunks lie one after the other in ``<state>/updates/<update id>``, each a valid
safetensors file at its offset. SQLite says what should be there; after a restart bytes are
trusted only when their hashes match again, so a kill at any instant costs nothing verified. A
power cut may cost the last moments, but never leaves a state that cannot be opened.

A pruned update's file is written over by the next round's: fresh pages cost the kernel more than
the bytes, on virtual machines several times as much.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import IO

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.errors import LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.manifest import Manifest, UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.retention import forgettable
from p2pfl_torrent.store.errors import StoreError
from p2pfl_torrent.store.mapped import map_file, write_all

SCHEMA_VERSION = 1
RECORD_TOGETHER = 64  # chunks; what a kill makes a restart hash again
MAX_OPEN_FILES = 64  # updates that are written or served at a time; the rest reopens in 20 us
_SCHEMA = (
    "CREATE TABLE swarm (id BLOB PRIMARY KEY)",
    "CREATE TABLE manifests (id BLOB PRIMARY KEY, round INTEGER NOT NULL, owner TEXT NOT NULL,"
    " encoded BLOB NOT NULL)",
    "CREATE TABLE chunks (manifest BLOB NOT NULL REFERENCES manifests ON DELETE CASCADE,"
    " chunk INTEGER NOT NULL, size INTEGER NOT NULL, source TEXT NOT NULL,"
    " PRIMARY KEY (manifest, chunk))",
    "CREATE TABLE counted (manifest BLOB PRIMARY KEY, round INTEGER NOT NULL)",
    "CREATE TABLE rounds (round INTEGER PRIMARY KEY, closed_by TEXT NOT NULL,"
    " model_hash BLOB NOT NULL, report BLOB NOT NULL)",
)

Decode = Callable[[bytes], Manifest]
"""Checks a stored manifest's bytes again; RemoteProtocolError if they do not hold."""


class Store:
    """A peer's updates and finished rounds; one process at a time, one thread at a time.

    Args:
        keep_rounds: finished rounds whose updates are kept for others to fetch; at least
            max_staleness, or a late update is gone before it can be counted.
        fill_max_age: rounds for which an owner's last received chunk may fill a missing one.

    Raises:
        StoreError: another process uses the directory, or it is another swarm's.
    """

    def __init__(
        self,
        state_dir: Path,
        layout: Layout,
        *,
        swarm: bytes,
        keep_rounds: int,
        fill_max_age: int,
        decode: Decode,
    ) -> None:
        self.layout = layout
        self._dir = state_dir
        self._updates_dir = state_dir / "updates"
        self._keep_rounds = max(1, keep_rounds)
        self._fill_max_age = fill_max_age
        try:
            self._updates_dir.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(state_dir)
        except OSError as error:
            raise StoreError(
                f"{state_dir} cannot be written ({error}): choose another storage.state_dir."
            ) from error
        self._manifests: dict[UpdateId, Manifest] = {}
        self._offsets: dict[UpdateId, list[int]] = {}
        self._complete: dict[UpdateId, Bitfield] = {}
        self._files: OrderedDict[UpdateId, IO[bytes]] = OrderedDict()
        self._unrecorded: list[tuple[UpdateId, int, int, PeerId]] = []
        self._mappings: defaultdict[UpdateId, list[weakref.ref[object]]] = defaultdict(list)
        self._spare_files: list[Path] = []  # of updates that were pruned
        self._spared = 0  # ever: the next one's name
        try:
            self._db = _open_database(state_dir, swarm)
            try:
                with self._recording():
                    self._load(decode)
            except BaseException:
                self._db.close()
                raise
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; another process may use the directory then."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        try:
            self._drop_spare_files()
            if self._unrecorded:
                with self._recording():
                    pass
        finally:
            self._db.close()
            self._lock.close()

    def _load(self, decode: Decode) -> None:
        rows = self._db.execute(
            "SELECT id, encoded FROM manifests ORDER BY round, owner"
        ).fetchall()
        for identity, encoded in rows:
            try:
                manifest = decode(encoded)
                if manifest.update != identity:
                    raise RemoteProtocolError("the row of another manifest")
            except RemoteProtocolError:  # a damaged row: fetched again like anything unknown
                self._db.execute("DELETE FROM manifests WHERE id = ?", (identity,))
                continue
            self._know(manifest)
            for (chunk,) in self._db.execute(
                "SELECT chunk FROM chunks WHERE manifest = ?", (identity,)
            ):
                self._complete[manifest.update].add(chunk)
        known = {update.hex() for update in self._manifests}
        for path in self._updates_dir.iterdir():
            if path.name not in known:  # a kill came between the two halves of a prune
                path.unlink()

    def _know(self, manifest: Manifest) -> None:
        sizes = [entry.size for entry in manifest.entries]
        self._manifests[manifest.update] = manifest
        self._offsets[manifest.update] = [0, *accumulate(sizes)]
        self._complete[manifest.update] = Bitfield(len(sizes))

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """One transaction; what goes wrong with it or with a file is a StoreError."""
        try:
            self._db.execute("BEGIN")
            try:
                self._db.executemany(
                    "INSERT OR REPLACE INTO chunks VALUES (?, ?, ?, ?)", self._unrecorded
                )
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a disk that is full may have ended it
                    self._db.execute("ROLLBACK")
                raise
            self._unrecorded.clear()
        except (sqlite3.Error, OSError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> StoreError:
        return StoreError(
            f"{self._dir} cannot be written ({error}): see that its disk has space and is "
            "writable, and start the peer again; nothing verified is lost."
        )

    # --- manifests ---------------------------------------------------------------------------

    def put_manifest(self, manifest: Manifest) -> None:
        """Remember a manifest durably; must be called before anything else about the update."""
        if manifest.update in self._manifests:
            return
        with self._recording():
            self._db.execute(
                "INSERT INTO manifests VALUES (?, ?, ?, ?)",
                (manifest.update, manifest.round, manifest.owner, manifest.encode()),
            )
        self._know(manifest)

    def manifests(self) -> list[Manifest]:
        """Every manifest kept, oldest round first."""
        return sorted(self._manifests.values(), key=lambda m: (m.round, m.owner))

    # --- chunk bytes -------------------------------------------------------------------------

    def write(
        self, update: UpdateId, chunk: int, offset: int, data: bytes | bytearray | memoryview
    ) -> None:
        """Write verified bytes at an offset inside a chunk's file.

        Raises:
            StoreError: the disk is full or fails.
        """
        place = self._place(update, chunk, offset, len(data))
        try:
            write_all(self._file(update).fileno(), data, place)
        except OSError as error:
            raise self._failed(error) from error

    def read(self, update: UpdateId, chunk: int, offset: int, into: memoryview) -> None:
        """Fill ``into`` with bytes of a chunk's file from ``offset``.

        Raises:
            StoreError: the file is shorter than it should be.
        """
        place = self._place(update, chunk, offset, len(into))
        if os.preadv(self._file(update).fileno(), [into], place) != len(into):
            raise StoreError(
                f"{self._path(update)} has lost bytes: delete it and start the peer again; "
                "what is missing is fetched anew."
            )

    def chunk(self, update: UpdateId, chunk: int) -> memoryview:
        """A complete chunk's file, read-only, mapped rather than read."""
        offset = self._offsets[update][chunk]
        size = self._manifests[update].entries[chunk].size
        try:
            view = map_file(self._path(update), offset, size)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self._path(update)} cannot be read ({error}): delete it and start again."
            ) from error
        self._mappings[update].append(weakref.ref(view.obj))
        return view

    def verified_blocks(self, update: UpdateId, chunk: int) -> Bitfield:
        """Blocks of a chunk that are here and match their hashes (re-hashed, so: not cheap).

        What is found is recorded: a chunk said to be complete that is damaged no longer is.
        """
        entry = self._manifests[update].entries[chunk]
        found = Bitfield(entry.num_blocks)
        if not self._path(update).exists():
            return found
        descriptor = self._file(update).fileno()
        step = self.layout.block_size
        for block in range(entry.num_blocks):
            size = min(step, entry.size - block * step)
            data = os.pread(descriptor, size, self._offsets[update][chunk] + block * step)
            if hashlib.sha256(data).digest() == entry.block_hash(block):
                found.add(block)
        if found.complete and chunk not in self._complete[update]:
            self.complete_chunk(update, chunk, PeerId(""))  # killed before its source was recorded
        elif not found.complete and chunk in self._complete[update]:
            with self._recording():
                self._db.execute(
                    "DELETE FROM chunks WHERE manifest = ? AND chunk = ?", (update, chunk)
                )
            self._complete[update].discard(chunk)
        return found

    def complete_chunk(self, update: UpdateId, chunk: int, source: PeerId) -> None:
        """Record that every block of a chunk is here and verified.

        On disk with the next transaction, or together with a few others: a transaction takes half a
        millisecond, and a chunk that a kill leaves unrecorded is found by its hashes.
        """
        size = self._manifests[update].entries[chunk].size
        self._unrecorded.append((update, chunk, size, source))
        self._complete[update].add(chunk)
        if len(self._unrecorded) >= RECORD_TOGETHER:
            with self._recording():
                pass

    def _place(self, update: UpdateId, chunk: int, offset: int, size: int) -> int:
        """Where in the update's file those bytes of a chunk are."""
        if offset < 0 or size < 0 or offset + size > self._manifests[update].entries[chunk].size:
            raise LocalProtocolError(f"{size} bytes at {offset} are beyond chunk {chunk}")
        return self._offsets[update][chunk] + offset

    def _path(self, update: UpdateId) -> Path:
        return self._updates_dir / update.hex()

    def _file(self, update: UpdateId) -> IO[bytes]:
        file = self._files.get(update)
        if file is None:
            self._reuse_a_file(update)
            descriptor = os.open(self._path(update), os.O_RDWR | os.O_CREAT, 0o644)
            file = self._files[update] = os.fdopen(descriptor, "r+b", buffering=0)
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(update)
        return file

    def _drop_spare_files(self) -> None:
        for spare in self._spare_files:
            spare.unlink(missing_ok=True)
        self._spare_files.clear()

    def _reuse_a_file(self, update: UpdateId) -> None:
        """Write a new update over one that was pruned; what stays of that matches no hash."""
        path = self._path(update)
        if not self._spare_files or path.exists():
            return
        spare, size = self._spare_files.pop(), self._offsets[update][-1]
        with suppress(FileNotFoundError):  # somebody tidied up: a new one is made
            if spare.stat().st_size > size:
                os.truncate(spare, size)
            spare.rename(path)

    # --- rounds ------------------------------------------------------------------------------

    def counted(self) -> dict[UpdateId, int]:
        """Updates that went into an aggregate, and into which round's."""
        return dict(self._db.execute("SELECT manifest, round FROM counted").fetchall())

    def finish_round(
        self,
        round: int,
        closed_by: str,
        model_hash: bytes,
        report: bytes,
        counted: Iterable[UpdateId],
    ) -> None:
        """Record a round whose checkpoint is written: it will not be done again."""
        with self._recording():
            self._db.execute(
                "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?)",
                (round, closed_by, model_hash, report),
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO counted VALUES (?, ?)",
                [(update, round) for update in counted],
            )

    def note_counted(self, counted: Mapping[UpdateId, int]) -> None:
        """Record updates that a state taken from another peer holds, by the round of each."""
        with self._recording():
            self._db.executemany("INSERT OR REPLACE INTO counted VALUES (?, ?)", counted.items())

    def closed_by(self, round: int) -> str | None:
        """How a finished round ended, as ``finish_round`` was told; None if it is not finished."""
        row: tuple[str] | None = self._db.execute(
            "SELECT closed_by FROM rounds WHERE round = ?", (round,)
        ).fetchone()
        return row[0] if row is not None else None

    def last_round(self) -> tuple[int, bytes] | None:
        """(round, model hash) of the last finished round."""
        row: tuple[int, bytes] | None = self._db.execute(
            "SELECT round, model_hash FROM rounds ORDER BY round DESC LIMIT 1"
        ).fetchone()
        return row

    def round_of(self, model_hash: bytes) -> int | None:
        """The last finished round that ended with these weights; None if none did here."""
        row: tuple[int] | None = self._db.execute(
            "SELECT round FROM rounds WHERE model_hash = ? ORDER BY round DESC LIMIT 1",
            (model_hash,),
        ).fetchone()
        return row[0] if row is not None else None

    def prune(self, round: int) -> list[UpdateId]:
        """Forget updates too old to serve or to fill with, now that ``round`` begins."""
        held = ((manifest, self._complete[u]) for u, manifest in self._manifests.items())
        forgotten = forgettable(held, round, self._keep_rounds, self._fill_max_age)
        self._drop_spare_files()  # a whole round had no use for them
        self._forget(forgotten, self._spare)
        return forgotten

    def forget(self, updates: Iterable[UpdateId]) -> None:
        """Forget updates and their bytes, for instance one of our own that was never published."""
        self._forget(updates, self._delete)

    def _forget(self, updates: Iterable[UpdateId], release: Callable[[UpdateId], None]) -> None:
        known = [update for update in updates if update in self._manifests]
        with self._recording():
            for update in known:
                self._db.execute("DELETE FROM manifests WHERE id = ?", (update,))
                self._db.execute("DELETE FROM counted WHERE manifest = ?", (update,))
        for update in known:
            file = self._files.pop(update, None)
            if file is not None:
                file.close()
            release(update)
            self._mappings.pop(update, None)
            del self._manifests[update], self._offsets[update], self._complete[update]

    def _delete(self, update: UpdateId) -> None:
        self._path(update).unlink(missing_ok=True)  # a chunk still mapped stays readable

    def _spare(self, update: UpdateId) -> None:
        """Keep the file for the next update, unless a chunk of it is still mapped."""
        path = self._path(update)
        is_mapped = any(mapping() is not None for mapping in self._mappings[update])
        if is_mapped or not path.exists():
            self._delete(update)
            return
        spare = path.with_name(f"spare-{self._spared}")
        self._spared += 1
        path.rename(spare)
        self._spare_files.append(spare)


def _lock(state_dir: Path) -> IO[bytes]:
    file = (state_dir / "lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StoreError(
            f"{state_dir} is in use by another peer: stop it, or give this one its own "
            "storage.state_dir."
        ) from None
    return file


def _open_database(state_dir: Path, swarm: bytes) -> sqlite3.Connection:
    path = state_dir / "chunks.sqlite"
    # isolation_level: transactions are begun and ended here, never by the module.
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA foreign_keys = ON")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            db.execute("BEGIN")
            for statement in (*_SCHEMA, f"PRAGMA user_version = {SCHEMA_VERSION}"):
                db.execute(statement)
            db.execute("INSERT INTO swarm VALUES (?)", (swarm,))
            db.execute("COMMIT")
        elif version != SCHEMA_VERSION:
            raise StoreError(
                f"{path} was written by another version of this library: give this peer a new "
                "storage.state_dir."
            )
        row = db.execute("SELECT id FROM swarm").fetchone()
        if row is None or row[0] != swarm:
            raise StoreError(
                f"{state_dir} holds the state of another swarm or an earlier run: give this peer a "
                "new storage.state_dir, or delete that one."
            )
    except sqlite3.DatabaseError as error:
        db.close()
        raise StoreError(
            f"{path} is damaged ({error}): delete {state_dir} except identity.key, and the peer "
            "takes the current model from its neighbours."
        ) from error
    except BaseException:
        db.close()
        raise
    return db
