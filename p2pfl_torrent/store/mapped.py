"""Files mapped into memory: served by the page cache, which the kernel takes back when it must.

Mapped for reading only: a write into a mapping kills the process where the disk is full.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path


def map_file(path: Path, offset: int = 0, size: int | None = None) -> memoryview:
    """A read-only view of ``size`` bytes of a file from ``offset``; it keeps its mapping alive.

    Raises:
        OSError: the file is not there or cannot be read.
        ValueError: it is shorter than that, or empty.
    """
    with path.open("rb") as file:
        length = file.seek(0, 2)
        if size is None:
            size = length - offset
        if size <= 0 or offset + size > length:
            raise ValueError(f"{length} bytes long, {offset + size} wanted")
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        mapping = mmap.mmap(
            file.fileno(), size + offset - start, access=mmap.ACCESS_READ, offset=start
        )
    return memoryview(mapping)[offset - start :]


def write_all(descriptor: int, data: bytes | bytearray | memoryview, place: int) -> None:
    """Write all of ``data`` at ``place`` in a file.

    Raises:
        OSError: the disk is full or fails.
    """
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written
