"""What the store promises about updates: bytes, memory of rounds, pruning, one user at a time."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from p2pfl_torrent.core.chunking import decode_chunk, encode_chunk, plan
from p2pfl_torrent.core.errors import LocalProtocolError
from p2pfl_torrent.core.manifest import (
    Manifest,
    UpdateId,
    block_hashes,
    decode_manifest,
    make_manifest,
)
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import ModelSpec, TensorSpec
from p2pfl_torrent.store import Store, StoreError
from p2pfl_torrent.store import updates as updates_module
from p2pfl_torrent.store.updates import RECORD_TOGETHER
from tests.core.small_models import finite_arrays, same_bits

SWARM = b"\x01" * 32
LAYOUT = plan(
    ModelSpec((TensorSpec("w", "F32", (12, 3)), TensorSpec("b", "U8", (7,)))),
    num_chunks=4,
    block_size=64,
)
CHUNKS = len(LAYOUT.chunks)
SOURCE = PeerId("source")


def decode(data: bytes) -> Manifest:
    return decode_manifest(
        data,
        layout=LAYOUT,
        swarm=SWARM,
        verify=lambda peer, message, signature: signature == b"signed by " + peer.encode(),
        max_num_samples=100,
    )


class Update:
    """An owner's update of a round: manifest and chunk files."""

    def __init__(self, owner: str, round: int) -> None:
        arrays = finite_arrays(LAYOUT.spec, hash((len(owner), ord(owner[-1]), round)) % 1000)
        self.files = [encode_chunk(LAYOUT, index, arrays) for index in range(CHUNKS)]
        self.manifest = make_manifest(
            layout=LAYOUT,
            swarm=SWARM,
            round=round,
            owner=PeerId(owner),
            base_hash=b"\x02" * 32,
            num_samples=10,
            sizes=[len(file) for file in self.files],
            ranks=list(range(CHUNKS)),
            blocks=[block_hashes(file, LAYOUT.block_size) for file in self.files],
            sign=lambda message: b"signed by " + owner.encode(),
        )
        self.id = self.manifest.update

    def put(self, store: Store, chunks: str = "#" * CHUNKS) -> Update:
        """Chunks as text: "#" is written and complete, "+" half written, "." not there."""
        store.put_manifest(self.manifest)
        for index, state in enumerate(chunks):
            if state == "#":
                store.write(self.id, index, 0, self.files[index])
                store.complete_chunk(self.id, index, SOURCE)
            elif state == "+":
                store.write(self.id, index, 0, self.files[index][: LAYOUT.block_size])
        return self


def opened(path: Path, *, keep_rounds: int = 2, fill_max_age: int = 5) -> Store:
    return Store(
        path,
        LAYOUT,
        swarm=SWARM,
        keep_rounds=keep_rounds,
        fill_max_age=fill_max_age,
        decode=decode,
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with opened(tmp_path) as store:
        yield store


def read(store: Store, update: UpdateId, chunk: int, offset: int, size: int) -> bytes:
    into = bytearray(size)
    store.read(update, chunk, offset, memoryview(into))
    return bytes(into)


def files_in(path: Path) -> set[str]:
    return {file.name for file in (path / "updates").iterdir()}


# --- bytes -----------------------------------------------------------------------------------


def test_chunks_come_back_as_files_that_the_library_reads(store: Store, tmp_path: Path) -> None:
    update = Update("a", 1).put(store)
    for index, file in enumerate(update.files):
        view = store.chunk(update.id, index)
        assert view.readonly
        assert view == file
        deserialize(bytes(view))  # type: ignore[no-untyped-call]  # it has no types
        assert read(store, update.id, index, 3, 20) == file[3:23]
    on_disk = (tmp_path / "updates" / update.id.hex()).read_bytes()
    assert on_disk == b"".join(update.files)


def test_which_chunks_are_here_is_recorded_some_together_and_at_the_end(tmp_path: Path) -> None:
    def recorded() -> int:
        with contextlib.closing(sqlite3.connect(tmp_path / "chunks.sqlite")) as database:
            (count,) = database.execute("SELECT COUNT(*) FROM chunks").fetchone()
        return int(count)

    owners = -(-RECORD_TOGETHER // CHUNKS)
    with opened(tmp_path) as store:
        for number in range(owners):
            update = Update(f"owner {number}", 1)
            store.put_manifest(update.manifest)
        for number in range(owners):
            for chunk in range(CHUNKS):
                before = number * CHUNKS + chunk
                assert recorded() == before // RECORD_TOGETHER * RECORD_TOGETHER
                update = Update(f"owner {number}", 1)
                store.write(update.id, chunk, 0, update.files[chunk])
                store.complete_chunk(update.id, chunk, SOURCE)
    assert recorded() == owners * CHUNKS


def test_a_mapped_chunk_outlives_its_file(store: Store) -> None:
    update = Update("a", 1).put(store)
    arrays = decode_chunk(LAYOUT, 0, store.chunk(update.id, 0))
    before = [array.copy() for array in arrays]
    assert store.prune(99) == [update.id]
    assert all(same_bits(a, b) for a, b in zip(arrays, before, strict=True))


@given(st.data())
@settings(max_examples=25)
def test_blocks_in_any_order_make_the_chunk(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    update = Update("a", 1)
    blocks = [(c, b) for c in range(CHUNKS) for b in range(update.manifest.entries[c].num_blocks)]
    written: set[tuple[int, int]] = set()
    with opened(tmp_path_factory.mktemp("store")) as store:
        store.put_manifest(update.manifest)
        for chunk, block in data.draw(st.lists(st.sampled_from(blocks), unique=True)):
            offset, size = update.manifest.block_range(chunk, block, 1, LAYOUT.block_size)
            store.write(update.id, chunk, offset, update.files[chunk][offset : offset + size])
            written.add((chunk, block))
        for chunk in range(CHUNKS):
            found = set(store.verified_blocks(update.id, chunk))
            assert found == {block for c, block in written if c == chunk}


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, 10_000), (10_000, 1), (1, None)])
def test_nothing_is_written_beyond_a_chunk(store: Store, offset: int, size: int | None) -> None:
    update = Update("a", 1).put(store)
    length = len(update.files[0]) if size is None else size
    with pytest.raises(LocalProtocolError):
        store.write(update.id, 0, offset, bytes(length))
    with pytest.raises(LocalProtocolError):
        read(store, update.id, 0, offset, length)
    assert store.chunk(update.id, 1) == update.files[1]


def test_more_updates_than_open_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates_module, "MAX_OPEN_FILES", 2)
    updates = [Update(owner, 1).put(store) for owner in "abcde"]
    for update in updates:
        for index, file in enumerate(update.files):
            assert read(store, update.id, index, 0, len(file)) == file


def test_lost_bytes_are_said_in_a_sentence(store: Store, tmp_path: Path) -> None:
    update = Update("a", 1).put(store)
    path = tmp_path / "updates" / update.id.hex()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match="lost bytes"):
        read(store, update.id, CHUNKS - 1, 0, 10)
    with pytest.raises(StoreError, match="cannot be read"):
        store.chunk(update.id, CHUNKS - 1)


def test_a_full_disk_is_said_in_a_sentence(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Update("a", 1).put(store, "")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(StoreError, match="No space left"):
            store.write(update.id, 0, 0, b"x")
    update.put(store)
    assert store.verified_blocks(update.id, 0).complete


# --- after a restart -------------------------------------------------------------------------


def test_all_of_it_is_there_again(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        late, full = Update("b", 1).put(store, "#+.#"[:CHUNKS]), Update("a", 2).put(store)
        store.finish_round(1, "complete", b"h" * 32, b"{}", [late.id])
        store.finish_round(2, "deadline", b"i" * 32, b"{}", [])
    with opened(tmp_path) as store:
        assert store.manifests() == [late.manifest, full.manifest]
        assert store.counted() == {late.id: 1}
        assert store.last_round() == (2, b"i" * 32)
        for index, state in enumerate("#+.#"[:CHUNKS]):
            found = store.verified_blocks(late.id, index)
            assert (found.complete, found.count > 0) == (state == "#", state != ".")
        assert store.chunk(full.id, 0) == full.files[0]


def test_a_new_directory_has_no_rounds(store: Store) -> None:
    assert store.last_round() is None
    assert (store.counted(), store.manifests()) == ({}, [])


def test_a_damaged_chunk_no_longer_counts_as_received(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        old, new = Update("a", 1).put(store), Update("a", 4).put(store)
    path = tmp_path / "updates" / new.id.hex()
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with opened(tmp_path) as store:
        assert not store.verified_blocks(new.id, 0).complete
        assert store.prune(4) == []  # the old one holds the last good version of chunk 0
    with opened(tmp_path) as store:
        new.put(store, "#")
        assert store.prune(4) == [old.id]


def test_a_chunk_whose_completion_was_lost_is_complete_when_it_verifies(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        old, new = Update("a", 1).put(store), Update("a", 4).put(store, "")
        for index, file in enumerate(new.files):
            store.write(new.id, index, 0, file)
        assert store.prune(4) == []
    with opened(tmp_path) as store:
        assert all(store.verified_blocks(new.id, index).complete for index in range(CHUNKS))
        assert store.prune(4) == [old.id]


def test_files_that_belong_to_nothing_and_damaged_manifests_go(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        good, bad = Update("a", 1).put(store), Update("b", 1).put(store)
    (tmp_path / "updates" / ("ab" * 32)).write_bytes(b"from an update that is forgotten")
    with contextlib.closing(sqlite3.connect(tmp_path / "chunks.sqlite")) as db, db:
        db.execute("UPDATE manifests SET encoded = x'00' WHERE id = ?", (bad.id,))
    with opened(tmp_path) as store:
        assert [manifest.update for manifest in store.manifests()] == [good.id]
        assert files_in(tmp_path) == {good.id.hex()}
        bad.put(store)  # fetched again
        assert store.chunk(bad.id, 0) == bad.files[0]


def test_a_manifest_put_twice_is_kept_once(store: Store) -> None:
    update = Update("a", 1).put(store)
    store.put_manifest(update.manifest)
    assert store.manifests() == [update.manifest]
    assert store.chunk(update.id, 0) == update.files[0]


# --- pruning ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "round", "kept"),
    [
        # "1####" is the update of round 1 with all chunks here
        ("1#### 2#### 3####", 3, "1 2 3"),  # the two finished rounds and the present one
        ("1#### 2#### 3####", 4, "2 3"),
        ("1#### 2#### 3####", 99, ""),
        ("1#### 3##.# 4##.#", 5, "1 3 4"),  # chunk 2 was last received in round 1
        ("1#### 3##.# 4##.#", 7, "4 1"),  # ... and fills until it is too old
        ("1#### 3##.# 4##.#", 8, "4"),
        ("1#### 2.... 3....", 5, "1 3"),
        ("1....", 4, ""),  # nothing of it was received: nothing to fill with
        ("1++++ 2####", 4, "2"),
    ],
)
def test_old_updates_stay_while_they_fill(
    tmp_path: Path, history: str, round: int, kept: str
) -> None:
    with opened(tmp_path, keep_rounds=2, fill_max_age=6) as store:
        updates = {}
        for text in history.split():
            updates[text[0]] = Update("a", int(text[0])).put(store, text[1 : 1 + CHUNKS])
        forgotten = store.prune(round)
        stay = {updates[number].id for number in kept.split()}
        assert set(forgotten) == {update.id for update in updates.values()} - stay
        assert {manifest.update for manifest in store.manifests()} == stay
    with opened(tmp_path) as store:
        assert {manifest.update for manifest in store.manifests()} == stay
        assert files_in(tmp_path) <= {update.hex() for update in stay}


def test_another_owners_chunks_fill_nothing(store: Store) -> None:
    old = Update("a", 1).put(store)
    Update("b", 4).put(store)
    assert store.prune(4) == []
    Update("a", 4).put(store)
    assert store.prune(4) == [old.id]


def test_what_is_forgotten_may_come_again(store: Store) -> None:
    update = Update("a", 1).put(store)
    store.finish_round(1, "complete", b"h" * 32, b"{}", [update.id])
    assert store.prune(99) == [update.id]
    assert store.counted() == {}
    update.put(store)
    assert store.chunk(update.id, 0) == update.files[0]


def test_a_pruned_updates_file_is_written_over(tmp_path: Path) -> None:
    with opened(tmp_path, keep_rounds=1, fill_max_age=0) as store:
        old = Update("anna", 1).put(store)
        inode = (tmp_path / "updates" / old.id.hex()).stat().st_ino
        assert store.prune(3) == [old.id]
        new = Update("berta", 3)
        store.put_manifest(new.manifest)
        store.write(new.id, 0, 0, new.files[0])
        store.complete_chunk(new.id, 0, SOURCE)
        path = tmp_path / "updates" / new.id.hex()
        assert path.stat().st_ino == inode
        assert store.chunk(new.id, 0) == new.files[0]
        assert not store.verified_blocks(new.id, 1).complete  # the old bytes are nobody's
    assert files_in(tmp_path) == {new.id.hex()}


def test_a_file_that_is_longer_than_the_next_update_is_cut(tmp_path: Path) -> None:
    with opened(tmp_path, keep_rounds=1, fill_max_age=0) as store:
        old = Update("anna", 1).put(store)
        path = tmp_path / "updates" / old.id.hex()
        whole = path.stat().st_size
        with path.open("ab") as file:
            file.write(bytes(100))
        store.prune(3)
        new = Update("berta", 3).put(store)
        assert (tmp_path / "updates" / new.id.hex()).stat().st_size == whole


def test_a_file_that_is_still_mapped_is_not_written_over(tmp_path: Path) -> None:
    with opened(tmp_path, keep_rounds=1, fill_max_age=0) as store:
        old = Update("anna", 1).put(store)
        mapped = store.chunk(old.id, 0)
        store.prune(3)
        assert files_in(tmp_path) == set()
        Update("berta", 3).put(store)
        assert mapped == old.files[0]


def test_spare_files_go_after_a_round_without_use_and_at_the_end(tmp_path: Path) -> None:
    updates = tmp_path / "updates"
    with opened(tmp_path, keep_rounds=1, fill_max_age=0) as store:
        Update("anna", 1).put(store)
        store.prune(3)
        assert len(files_in(tmp_path)) == 1
        store.prune(4)
        assert files_in(tmp_path) == set()
        Update("anna", 4).put(store)
        store.prune(6)
        (spare,) = files_in(tmp_path)
        (updates / spare).unlink()  # by somebody's hand: a new one is made
        Update("anna", 6).put(store)
        store.prune(8)
        assert len(files_in(tmp_path)) == 1
    assert files_in(tmp_path) == set()


def test_one_of_our_own_that_was_never_published_is_forgotten(store: Store, tmp_path: Path) -> None:
    mine, other = Update("a", 3).put(store, "#+.."), Update("b", 3).put(store)
    store.forget([mine.id, mine.id, UpdateId(b"\0" * 32)][::2])
    assert store.manifests() == [other.manifest]
    assert files_in(tmp_path) == {other.id.hex()}
    mine.put(store)
    assert store.verified_blocks(mine.id, 0).complete


# --- whose directory -------------------------------------------------------------------------


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(StoreError, match="in use by another peer"):
        opened(tmp_path)
    opened(tmp_path).close()


def test_another_swarms_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        update = Update("a", 1).put(store)
    with pytest.raises(StoreError, match=f"{tmp_path} holds the state of another swarm"):
        Store(tmp_path, LAYOUT, swarm=b"\x09" * 32, keep_rounds=2, fill_max_age=5, decode=decode)
    with opened(tmp_path) as store:
        assert store.chunk(update.id, 0) == update.files[0]


def test_a_directory_of_another_version_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "chunks.sqlite")) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="another version"):
        opened(tmp_path)


def test_a_damaged_database_is_refused_and_the_lock_is_free_again(tmp_path: Path) -> None:
    (tmp_path / "chunks.sqlite").write_bytes(b"this is no database" * 100)
    for _ in range(2):
        with pytest.raises(StoreError, match="damaged"):
            opened(tmp_path)


def test_a_directory_that_cannot_be_made_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(StoreError, match=r"choose another storage\.state_dir"):
        opened(tmp_path / "file")


def test_an_unknown_update_is_an_error(store: Store) -> None:
    with pytest.raises(KeyError):
        store.write(UpdateId(b"\0" * 32), 0, 0, b"x")
