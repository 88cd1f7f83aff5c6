"""Averaging alone: many updates on disk into one checkpoint, as a peer does it at a round's end.

    python -m benchmarks aggregate --updates 10 --megabytes 23.5 --json -

Beside it, in turns, the same job as one would write it with numpy: every update read as a whole,
float64 sums over whole tensors, then hash and file. GB are those of the updates that are read, from
the page cache; seconds are CPU-seconds of the process, so that other work on the machine does not
count. With ``--aggregator`` another rule is timed against the same FedAvg in numpy; bits are
compared by FedAvg's in any case. ``ratio_sums`` compares FedAvg's sums alone, all updates being in
memory. ``rss_peak_mb`` is the anonymous memory that our merging takes beyond what was there
before.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.member import Spec, anonymous_bytes, model, peak_memory, weights
from benchmarks.output import add_json, median, write
from p2pfl_torrent.core.aggregation import aggregate
from p2pfl_torrent.core.aggregators import FEDAVG, Aggregator, make_aggregator
from p2pfl_torrent.core.chunking import Layout, decode_chunk, encode_chunk, plan
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import Array, Arrays, ModelSpec, model_hash
from p2pfl_torrent.store import Checkpoints
from p2pfl_torrent.store.mapped import map_file

WEIGHTS = (100.0, 217.0, 58.0)  # num_samples of the owners, in turn
BLOCK = 256 << 10


@dataclass(frozen=True, slots=True)
class Files:
    """Updates as chunk files."""

    layout: Layout
    directory: Path
    updates: int

    def read(self, update: UpdateId, chunk: int) -> memoryview:
        """A chunk's file, mapped."""
        return map_file(self.directory / f"{update.hex()}-{chunk}")

    def sources(self) -> dict[int, list[tuple[PeerId, UpdateId, float]]]:
        """All chunks of all updates, with their weights."""
        listed = [
            (PeerId(f"peer{k:05}"), UpdateId(k.to_bytes(4, "big")), WEIGHTS[k % len(WEIGHTS)])
            for k in range(self.updates)
        ]
        return {chunk.index: listed for chunk in self.layout.chunks}

    def load(self, update: UpdateId) -> dict[str, Array]:
        """A whole update in memory."""
        tensors = self.layout.spec.tensors
        whole: dict[str, Array] = {
            tensor.name: np.empty(tensor.shape, np.float32) for tensor in tensors
        }
        for chunk in self.layout.chunks:
            values = decode_chunk(self.layout, chunk.index, self.read(update, chunk.index))
            for part, rows in zip(chunk.slices, values, strict=True):
                whole[tensors[part.tensor].name][part.start : part.stop] = rows
        return whole

    def loaded(self) -> list[tuple[float, Arrays]]:
        """Every update in memory, with its weight."""
        return [(weight, self.load(update)) for _, update, weight in self.sources()[0]]


def made(shapes: ModelSpec, updates: int, directory: Path) -> Files:
    """Noise, written as chunk files."""
    layout = plan(shapes, num_chunks=20, block_size=BLOCK)
    rng = np.random.default_rng(0)
    for k in range(updates):
        arrays = weights(shapes, rng)
        for chunk in layout.chunks:
            name = f"{UpdateId(k.to_bytes(4, 'big')).hex()}-{chunk.index}"
            (directory / name).write_bytes(encode_chunk(layout, chunk.index, arrays))
    return Files(layout, directory, updates)


def ours(files: Files, checkpoints: Checkpoints, aggregator: Aggregator = FEDAVG) -> bytes:
    """From chunk files to a checkpoint; the aggregate's hash.

    A server optimizer's moments are read from the checkpoint of round 0.
    """
    start = checkpoints.load(0) if aggregator.optimizer is not None else {}
    with checkpoints.draft(1) as draft:
        sources = files.sources()
        aggregate(files.layout, sources, files.read, start, draft.put, aggregator=aggregator)
        return draft.model_hash()


def by_numpy(files: Files, checkpoints: Checkpoints) -> bytes:
    """The same, whole models at a time and unchecked."""
    merged = summed_by_numpy(files.loaded())
    checkpoints.save(2, merged)
    return model_hash(files.layout.spec, merged)


def summed(files: Files, chunks: Mapping[tuple[UpdateId, int], bytes]) -> None:
    """Our sums, the chunk files being in memory."""

    def read(update: UpdateId, chunk: int) -> bytes:
        return chunks[update, chunk]

    aggregate(files.layout, files.sources(), read, {}, lambda part, rows: None)


def summed_by_numpy(loaded: Sequence[tuple[float, Arrays]]) -> dict[str, Array]:
    """FedAvg in float64."""
    total = sum(weight for weight, _ in loaded)
    merged: dict[str, Array] = {}
    for name in loaded[0][1]:
        sums = loaded[0][0] * loaded[0][1][name].astype(np.float64)
        for weight, arrays in loaded[1:]:
            sums += weight * arrays[name].astype(np.float64)
        merged[name] = (sums / total).astype(np.float32)
    return merged


@dataclass(frozen=True, slots=True)
class Row:
    """CPU-seconds of a pair."""

    cpu_s: float
    numpy_cpu_s: float

    @property
    def ratio(self) -> float:
        """How many times faster than numpy."""
        return self.numpy_cpu_s / self.cpu_s


def timed(function: Callable[[], object]) -> float:
    """CPU-seconds of a call."""
    began = time.process_time()
    function()
    return time.process_time() - began


def measure(
    updates: int, megabytes: float, repeats: int, aggregator: Aggregator = FEDAVG
) -> dict[str, object]:
    """In turns, so often."""
    shapes = model(Spec({}, 0, megabytes))
    before = anonymous_bytes()  # here: malloc keeps what the making of files took, and gives it on
    with tempfile.TemporaryDirectory(prefix="p2pfl-benchmark-") as place:
        directory = Path(place)
        files = made(shapes, updates, directory)
        store = Checkpoints(directory, shapes)
        own = Checkpoints(directory / "own", aggregator.state_spec(shapes))
        own.save(0, aggregator.first_state(shapes, files.load(files.sources()[0][0][1])))
        with peak_memory() as peak:
            ours(files, own, aggregator)  # not timed: the page cache and numpy's loops get warm
        rows = [
            Row(timed(lambda: ours(files, own, aggregator)), timed(lambda: by_numpy(files, store)))
            for _ in range(repeats)
        ]
        sums = _sums(files, repeats)
        equal = ours(files, store) == by_numpy(files, store)
    gigabytes = updates * shapes.nbytes / 1e9
    return {
        "updates": updates,
        "aggregator": aggregator.name,
        "megabytes": shapes.nbytes / 1e6,
        "gb_per_s": gigabytes / median([row.cpu_s for row in rows]),
        "numpy_gb_per_s": gigabytes / median([row.numpy_cpu_s for row in rows]),
        "ratio": median([row.ratio for row in rows]),
        "ratio_sums": median([row.ratio for row in sums]),
        "rss_peak_mb": (peak.bytes - before) / 1e6,
        "hashes_equal": equal,
        "runs": [asdict(row) for row in rows],
    }


def _sums(files: Files, repeats: int) -> list[Row]:
    loaded = files.loaded()
    chunks = {
        (update, chunk): bytes(files.read(update, chunk))
        for chunk, listed in files.sources().items()
        for _, update, _ in listed
    }
    return [
        Row(timed(lambda: summed(files, chunks)), timed(lambda: summed_by_numpy(loaded)))
        for _ in range(repeats)
    ]


def main(argv: Sequence[str]) -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks aggregate", description="Averaging updates that are on disk."
    )
    parser.add_argument("--updates", type=int, default=10, metavar="N")
    parser.add_argument("--megabytes", type=float, default=23.5, metavar="M", help="of an update")
    parser.add_argument("--aggregator", default="fedavg", metavar="NAME")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    add_json(parser)
    args = parser.parse_args(argv)
    aggregator = make_aggregator(args.aggregator)
    result = measure(args.updates, args.megabytes, args.repeats, aggregator)
    names = ("gb_per_s", "numpy_gb_per_s", "ratio", "ratio_sums", "rss_peak_mb")
    rows = ["".join(f"{name:>16}" for name in names)]
    rows.append("".join(f"{result[name]:16.2f}" for name in names))
    write(args.json, result, [*rows, f"bits equal to numpy's: {result['hashes_equal']}"])
    return 0 if result["hashes_equal"] else 1
