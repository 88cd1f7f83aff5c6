"""Chunk files written and read by each compression: bytes, GB per CPU-second, error.

    python -m benchmarks codecs --megabytes 23.5 --json -

Weights are noise, and the update is the round's start with noise of a hundredth added, so zstd has
no structure to find: trained weights hardly have more. Every compression takes its turn in every
repeat. GB are those of the float32 weights; seconds are CPU-seconds of the process. ``none`` is
what an uncompressed swarm does: encoding copies the values once, decoding makes views.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.member import Spec, model, weights
from benchmarks.output import add_json, median, write
from p2pfl_torrent.core.chunking import Layout, plan, slice_of
from p2pfl_torrent.core.compression import Compression
from p2pfl_torrent.core.encoding import decode_file, encode_file
from p2pfl_torrent.core.tensors import Array, Arrays, ModelSpec

BLOCK = 256 << 10
COMPRESSIONS = (
    Compression(),
    Compression("fp16"),
    Compression("bf16"),
    Compression("int8"),
    Compression("int8", delta=True),
    Compression("topk", topk_share=0.1),
    Compression(zstd_level=3),
    Compression("int8", zstd_level=3),
)


@dataclass(frozen=True, slots=True)
class Lap:
    """One model there and back, in CPU-seconds; the largest error."""

    encode_s: float
    decode_s: float
    bytes: int
    error: float


def lap(layout: Layout, arrays: Arrays, base: Arrays) -> Lap:
    """Write and read every chunk."""
    tensors = layout.spec.tensors
    began = time.process_time()
    files = [b"".join(encode_file(layout, c.index, arrays, base)) for c in layout.chunks]
    written = time.process_time()
    values = [decode_file(layout, c.index, files[c.index], base) for c in layout.chunks]
    read = time.process_time()
    error = max(
        float(np.abs(np.subtract(rows, slice_of(arrays[tensors[part.tensor].name], part))).max())
        for chunk, of_chunk in zip(layout.chunks, values, strict=True)
        for part, rows in zip(chunk.slices, of_chunk, strict=True)
    )
    return Lap(written - began, read - written, sum(map(len, files)), error)


def measure(megabytes: float, repeats: int) -> dict[str, object]:
    """In turns, so often."""
    shapes = model(Spec({}, 0, megabytes))
    rng = np.random.default_rng(0)
    base = weights(shapes, rng)
    arrays = _moved(base, weights(shapes, rng))
    plain = plan(shapes, num_chunks=20, block_size=BLOCK)
    laps: dict[str, list[Lap]] = {compression.name: [] for compression in COMPRESSIONS}
    for repeat in range(repeats + 1):
        for compression in COMPRESSIONS:
            done = lap(replace(plain, compression=compression), arrays, base)
            if repeat:  # the first is not counted: memory and numpy's loops get warm
                laps[compression.name].append(done)
    rows = {name: _row(shapes, of_one) for name, of_one in laps.items()}
    return {"megabytes": shapes.nbytes / 1e6, "repeats": repeats, "codecs": rows}


def _moved(base: Mapping[str, Array], noise: Mapping[str, Array]) -> dict[str, Array]:
    return {
        name: np.add(rows, np.multiply(noise[name], 0.01), dtype=np.float32)
        for name, rows in base.items()
    }


def _row(shapes: ModelSpec, laps: Sequence[Lap]) -> dict[str, float]:
    gigabytes = shapes.nbytes / 1e9
    return {
        "bytes_ratio": laps[0].bytes / shapes.nbytes,
        "encode_gb_per_s": gigabytes / median([one.encode_s for one in laps]),
        "decode_gb_per_s": gigabytes / max(1e-9, median([one.decode_s for one in laps])),
        "error_max": laps[0].error,
    }


def main(argv: Sequence[str]) -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks codecs", description="Each compression of chunk files."
    )
    parser.add_argument("--megabytes", type=float, default=23.5, metavar="M", help="of the model")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    add_json(parser)
    args = parser.parse_args(argv)
    result = measure(args.megabytes, args.repeats)
    rows = result["codecs"]
    assert isinstance(rows, dict)
    names = ("bytes_ratio", "encode_gb_per_s", "decode_gb_per_s", "error_max")
    table = [f"{'':16}" + "".join(f"{name:>18}" for name in names)]
    for codec, row in rows.items():
        table.append(f"{codec:16}" + "".join(f"{row[name]:18.4g}" for name in names))
    write(args.json, result, table)
    return 0
