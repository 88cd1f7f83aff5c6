"""Files that appear whole or not at all, whatever a crash or a power cut does."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from p2pfl_torrent.store.errors import StoreError

Part = bytes | bytearray | memoryview


def replace_file(path: Path, parts: Iterable[Part]) -> None:
    """Write a file atomically and durably.

    Raises:
        StoreError: the disk is full or fails; an older file of that name is as it was.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
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
