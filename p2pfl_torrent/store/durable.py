"""Files that appear whole or not at all, whatever a crash or a power cut does."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from p2pfl_torrent.store.errors import StoreError
from p2pfl_torrent.store.mapped import write_all

Part = bytes | bytearray | memoryview


def replace_file(path: Path, parts: Iterable[Part]) -> None:
    """Write a file atomically and durably.

    Raises:
        StoreError: the disk is full or fails; an older file of that name is as it was.
    """
    with replacing(path) as file:
        place = 0
        for part in parts:
            write_all(file.fileno(), part, place)
            place += len(part)


@contextmanager
def replacing(path: Path) -> Iterator[FileIO]:
    """A file that is written in the block, and takes the place of an older one at its end.

    Raises:
        StoreError: the disk is full or fails; an older file is as it was, as it is after any other
            error in the block.
    """
    temporary = path.with_suffix(".tmp")
    try:
        try:
            with temporary.open("w+b", buffering=0) as file:
                yield file
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error}): see that its disk has space and is writable."
        ) from error


def _sync_directory(path: Path) -> None:
    """Make a rename inside a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
