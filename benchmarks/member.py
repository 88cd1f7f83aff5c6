"""One peer of a benchmark's swarm, as a process without torch: its update is made of noise.

    python -m benchmarks.member SPEC.json

It is led by lines on stdin, one a round, and answers each with one JSON line; it also tells its
memory. Weights are new in
each round, as after training, so that nothing can be saved by their being equal.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import trio

from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.reports import EdgeChanged
from p2pfl_torrent.core.tensors import Array, ModelSpec, TensorSpec
from p2pfl_torrent.peer.feed import Subscription
from p2pfl_torrent.peer.node import Node
from p2pfl_torrent.peer.running import open_node

ROWS = 1000
SAMPLE_SECONDS = 0.02  # between two looks at the memory


@dataclass(frozen=True, slots=True)
class Spec:
    """What a member is to do.

    Attributes:
        config: sections of its configuration.
        place: from 0.
        megabytes: size of the model, 10^6 bytes each.
        tensors: how many the model is made of.
        network: of the configuration, beside the bootstrap peers.
        waits: it listens, but neither serves nor dials before the leader says a first line.
    """

    config: dict[str, object]
    place: int
    megabytes: float
    tensors: int = 20
    waits: bool = False
    network: dict[str, object] = field(default_factory=dict)


def model(spec: Spec) -> ModelSpec:
    """Float32 matrices of equal size, as many as asked for."""
    columns = max(1, round(spec.megabytes * 1e6 / spec.tensors / ROWS / 4))
    return ModelSpec(
        tuple(TensorSpec(f"layer{k}.weight", "F32", (ROWS, columns)) for k in range(spec.tensors))
    )


def weights(shapes: ModelSpec, rng: np.random.Generator) -> dict[str, Array]:
    """Noise of that shape, in memory of its own: malloc would keep it when it is let go."""
    arrays: dict[str, Array] = {}
    for tensor in shapes.tensors:
        memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        noise = np.frombuffer(memory, np.float32)
        rng.standard_normal(out=noise, dtype=np.float32)
        arrays[tensor.name] = noise.reshape(tensor.shape)
    return arrays


def anonymous_bytes() -> int:
    """Resident memory that is not backed by files: what this process really takes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise OSError("this kernel does not tell RssAnon")


class Peak:
    """Samples the memory while open."""

    def __init__(self) -> None:
        self.bytes = anonymous_bytes()
        self._over = threading.Event()

    def sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, anonymous_bytes())

    def end(self) -> int:
        self._over.set()
        return max(self.bytes, anonymous_bytes())


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Watch the memory inside the block."""
    peak = Peak()
    thread = threading.Thread(target=peak.sample)
    thread.start()
    try:
        yield peak
    finally:
        peak.end()
        thread.join()


def cpu_seconds() -> float:
    """CPU of this process so far, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def tell(value: object) -> None:
    """One JSON line for whoever leads."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


async def next_line() -> str:
    """The leader's next line; empty at the end."""

    def read() -> str:
        return sys.stdin.readline()

    # libp2p brings stubs of an older trio along, and mypy prefers them.
    return await trio.to_thread.run_sync(read, abandon_on_cancel=True)  # type: ignore[call-arg]


async def member(spec: Spec) -> None:
    """Take part until the leader has nothing more to say."""
    shapes = model(spec)
    start = weights(shapes, np.random.default_rng(0))
    rng = np.random.default_rng(spec.place + 1)
    config = PeerConfig.from_mapping(spec.config)
    used = 0.0

    def listening(address: str) -> None:
        nonlocal used
        tell({"address": address})
        if spec.waits:
            sys.stdin.readline()  # in place: nothing shall run meanwhile
        used = cpu_seconds()

    node = Node(config, shapes, start, on_address=listening)
    events = node.feed.subscribe() if spec.waits else None
    del start
    async with open_node(node):
        at = {"at": time.monotonic(), "cpu_seconds": cpu_seconds() - used}
        near = [neighbour.peer for neighbour in node.statistics().neighbours]
        seconds = link_seconds(events) if events else {}
        tell({"ready": node.peer_id, **at, "links": seconds, "neighbours": near})
        while line := (await next_line()).strip():
            if line == "memory":
                tell({"anonymous": anonymous_bytes()})
                continue
            update = weights(shapes, rng)
            tell({"trained": True, "idle": anonymous_bytes()})
            await next_line()
            with peak_memory() as peak:
                row = await _exchange(node, update)
            del update
            tell({**row, "peak": peak.bytes})


def link_seconds(events: Subscription) -> dict[str, float]:
    """Until our stream to each peer was open, the first time, from when the link was wanted."""
    links: dict[str, float] = {}
    for event in events.drain():
        if isinstance(event, EdgeChanged) and event.change == "open":
            links.setdefault(event.neighbour, event.seconds or 0.0)
    return links


async def _exchange(node: Node, update: dict[str, Array]) -> dict[str, object]:
    before, cpu = node.statistics(), cpu_seconds()
    began = trio.current_time()
    merged = await node.exchange(update, 100, {})
    report, after, gossip = merged.report, node.statistics(), node.gossip_counters
    return {
        "seconds": trio.current_time() - began,
        "exchange_seconds": report.exchange_seconds,
        "cpu_seconds": cpu_seconds() - cpu,
        "closed_by": report.closed_by,
        "payload": report.bytes_payload,
        "duplicate": report.bytes_duplicate,
        "owners": {owner.owner: owner.completeness for owner in report.owners},
        "downloaded": after.bytes_down - before.bytes_down,
        "control_down": after.bytes_control_down - before.bytes_control_down,
        "uploaded": after.bytes_up - before.bytes_up,
        "control": after.bytes_control_up - before.bytes_control_up,
        "gossip_delivered": gossip.delivered,
        "gossip_twice": gossip.duplicates,
        "hash": report.model_hash,
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    trio.run(member, Spec(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    sys.exit(0)
