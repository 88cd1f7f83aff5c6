"""Checkpoints: ``<state>/checkpoints/round-N.safetensors``, the weights after round N.

``round-0`` holds the start weights of the swarm. Each file appears whole or not at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import numpy as np

from p2pfl_torrent.core.chunking import Layout, TensorSlice, checkpoint_layout, decode_chunk
from p2pfl_torrent.core.errors import LocalProtocolError, RemoteProtocolError
from p2pfl_torrent.core.tensors import (
    NUMPY_DTYPES,
    Array,
    Arrays,
    ModelHasher,
    ModelSpec,
    array_bytes,
    model_hash,
)
from p2pfl_torrent.store.durable import replacing
from p2pfl_torrent.store.errors import StoreError
from p2pfl_torrent.store.mapped import map_file, write_all

READ_AT_A_TIME = 1 << 20  # bytes: stays in the cache between the read and the hash

_NAME = re.compile(r"round-(\d+)\.safetensors")


class Draft:
    """A checkpoint file that is being written."""

    def __init__(self, layout: Layout, file: FileIO) -> None:
        self._spec = layout.spec
        self._file = file
        header, ordered = layout.head(0)
        write_all(file.fileno(), header, 0)
        self._offsets: dict[int, int] = {}
        offset = len(header)
        for part in ordered:
            self._offsets[part.tensor] = offset
            offset += layout.spec.tensors[part.tensor].nbytes
        self._missing = layout.spec.nbytes
        self._hasher = ModelHasher(layout.spec)
        self._advance(0, 0)

    def put(self, part: TensorSlice, rows: Array) -> None:
        """Write the rows of one slice; each row of the model is to be written once.

        Raises:
            LocalProtocolError: values of another type or shape.
        """
        tensor = self._spec.tensors[part.tensor]
        shape = (part.stop - part.start, *tensor.shape[1:]) if tensor.shape else ()
        if rows.shape != shape or rows.dtype != NUMPY_DTYPES[tensor.dtype]:
            raise LocalProtocolError(
                f"{tensor.name!r} is {rows.dtype}{rows.shape}, not {tensor.dtype}{shape}"
            )
        row_bytes = tensor.nbytes // tensor.shape[0] if tensor.shape and tensor.nbytes else 0
        begin = part.start * row_bytes
        write_all(self._file.fileno(), array_bytes(rows), self._offsets[part.tensor] + begin)
        self._missing -= rows.nbytes
        if (part.tensor, begin) == self._hashed:  # while it is in the cache, if it comes in order
            self._hasher.add(rows)
            self._advance(part.tensor, begin + rows.nbytes)

    def model_hash(self) -> bytes:
        """The hash of what was written.

        What came in the order of the tensors was hashed as it came, which a layout need not keep;
        the rest is read back.

        Raises:
            LocalProtocolError: a row is missing.
        """
        self.check_complete()
        while self._hashed[0] < len(self._spec.tensors):
            index, done = self._hashed
            count = min(READ_AT_A_TIME, self._spec.tensors[index].nbytes - done)
            read = os.pread(self._file.fileno(), count, self._offsets[index] + done)
            if not read:
                raise OSError(f"{self._file.name} ends early")
            self._hasher.add(np.frombuffer(read, np.uint8))
            self._advance(index, done + len(read))
        return self._hasher.digest()

    def _advance(self, index: int, done: int) -> None:
        """Note that so many bytes of a tensor have been hashed, and all of those before it."""
        tensors = self._spec.tensors
        while index < len(tensors) and done == tensors[index].nbytes:
            index, done = index + 1, 0
        self._hashed = index, done

    def check_complete(self) -> None:
        """LocalProtocolError unless every row was written."""
        if self._missing:
            raise LocalProtocolError(f"{self._missing} bytes of the checkpoint were not written")


class Checkpoints:
    """The checkpoints of one state directory.

    Raises:
        StoreError: it cannot be written.
    """

    def __init__(self, state_dir: Path, spec: ModelSpec) -> None:
        self._dir = state_dir / "checkpoints"
        self._layout = checkpoint_layout(spec)
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            for leftover in self._dir.glob("*.tmp"):  # of a write that a crash cut short
                leftover.unlink()
        except OSError as error:
            raise StoreError(
                f"{self._dir} cannot be written ({error}): choose another storage.state_dir."
            ) from error

    def path(self, round: int) -> Path:
        """Where the weights after a round are, or would be."""
        return self._dir / f"round-{round}.safetensors"

    def rounds(self) -> list[int]:
        """Rounds with a checkpoint, oldest first."""
        matches = (_NAME.fullmatch(entry.name) for entry in self._dir.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, round: int, arrays: Arrays) -> Path:
        """Write atomically and durably, without a second copy of the model in memory.

        Raises:
            StoreError: the disk is full or fails; an older file of that round is as it was.
        """
        with self.draft(round) as draft:
            for part in self._layout.chunks[0].slices:
                draft.put(part, arrays[self._layout.spec.tensors[part.tensor].name])
        return self.path(round)

    @contextmanager
    def draft(self, round: int) -> Iterator[Draft]:
        """A checkpoint that is written slice by slice; it appears, durably, at the block's end.

        Raises:
            StoreError: the disk is full or fails; an older file of that round is as it was, as it
                is after any other error in the block.
        """
        with replacing(self.path(round)) as file:
            draft = Draft(self._layout, file)
            yield draft
            draft.check_complete()

    def load(self, round: int, expected: bytes | None = None) -> dict[str, Array]:
        """The weights after a round, as read-only views of the mapped file.

        Args:
            expected: their model_hash, to be checked; costs one pass over them.

        Raises:
            StoreError: there is none, or it is damaged.
        """
        path = self.path(round)
        try:
            values = decode_chunk(self._layout, 0, map_file(path))
        except (OSError, ValueError, RemoteProtocolError) as error:
            raise StoreError(
                f"{path} cannot be read ({error}): delete it, and the peer takes the current "
                "model from its neighbours."
            ) from error
        tensors = self._layout.spec.tensors
        slices = self._layout.chunks[0].slices
        arrays = {
            tensors[part.tensor].name: array for part, array in zip(slices, values, strict=True)
        }
        if expected is not None and model_hash(self._layout.spec, arrays) != expected:
            raise StoreError(
                f"{path} holds other weights than were saved: delete it, and the peer takes the "
                "current model from its neighbours."
            )
        return arrays

    def prune(self, keep: int, *, spare: Callable[[int], bool] = lambda _: False) -> None:
        """Delete all but the newest ``keep``, and those to spare."""
        rounds = self.rounds()
        for round in rounds[: max(0, len(rounds) - keep)]:
            if not spare(round):
                self.path(round).unlink(missing_ok=True)
