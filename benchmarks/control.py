"""What a peer's announcements and membership cost as the swarm grows, its degree staying the same.

    python -m benchmarks control --peers 10,20,50 --json -

All peers of a swarm run in one process here, which fifty would not fit on a small machine
otherwise; they talk over real sockets. Bytes are those that a peer sends beside payload. CPU is the
process's, shared out by what the interpreter was found doing; it includes the payload, which grows
with the swarm as the updates do.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any
from unittest.mock import patch

import numpy as np
import trio
from libp2p.pubsub.pb import rpc_pb2

from benchmarks.exchange import specs
from benchmarks.member import Spec, model, weights
from benchmarks.output import add_json, write
from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.messages import Message, Piece
from p2pfl_torrent.overlay.gossip import _GuardedPubsub
from p2pfl_torrent.peer.node import Node
from p2pfl_torrent.peer.running import open_node
from p2pfl_torrent.protocols import members as members_protocol
from p2pfl_torrent.protocols.chunk import ChunkChannel

SAMPLE_SECONDS = 0.005

STREAM_KINDS = {
    "Have": "availability",
    "Availability": "availability",
    "ManifestData": "manifests",
    "GetManifest": "manifests",
    "NoManifest": "manifests",
    "Request": "requests",
    "Cancel": "requests",
    "Reject": "requests",
}
"""What the messages of the chunk streams are for; the others keep the edges alive."""

CODE = (
    ("overlay/gossip.py", "", "gossip"),
    ("overlay/mesh.py", "", "gossip"),
    ("pubsub/", "", "gossip"),
    ("core/membership.py", "", "membership"),
    ("core/census.py", "", "membership"),
    ("exchange/membership.py", "", "membership"),
    ("protocols/members.py", "", "membership"),
    ("core/swarm.py", "_announced", "availability"),
    ("core/serving.py", "announce", "availability"),
    ("core/swarm.py", "_manifest", "manifests"),
    ("core/swarm.py", "_learn", "manifests"),
    ("peer/rounds.py", "", "updates"),
    ("core/", "", "requests and pieces"),
    ("exchange/", "", "requests and pieces"),
    ("store/", "", "requests and pieces"),
    ("overlay/", "", "transport"),
)
"""(end of a file's folder and name, function, what for) of the innermost frame that matches; the
first line that does counts."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one peer in one round.

    Attributes:
        bytes_by: sent, by what for; gossip is what came by it, second copies too.
        cpu_by: seconds of CPU, likewise.
    """

    peers: int
    bytes_per_peer_round: float
    cpu_s_per_peer_round: float
    bytes_by: dict[str, float]
    cpu_by: dict[str, float]
    gossip_deliveries_per_peer_round: float
    seconds_per_round: float
    hashes_equal: bool


class Tally:
    """Bytes beside payload, by what they are for."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()

    def message(self, message: Message, size: int) -> None:
        """A message of the chunk streams was sent."""
        if isinstance(message, Piece):
            self.bytes["requests"] += size - len(message.data)
        else:
            self.bytes[STREAM_KINDS.get(type(message).__name__, "edges")] += size

    def packet(self, packet: bytes) -> None:
        """A gossip packet came."""
        rpc = rpc_pb2.RPC()
        rpc.ParseFromString(packet)
        rest = len(packet)
        for message in rpc.publish:
            *_, before, last = ("", "", *"/".join(message.topicIDs).split("/"))
            kind = "availability" if before == "have" else last
            size = message.ByteSize()
            self.bytes[f"gossip of {kind}"] += size
            rest -= size
        self.bytes["gossip's own"] += rest


@contextmanager
def tallied() -> Iterator[Tally]:
    """Count what every peer of this process says inside the block."""
    tally = Tally()
    send, together = ChunkChannel.send, ChunkChannel.send_together
    receive, write_members = _GuardedPubsub._receive, members_protocol._write

    async def one(self: ChunkChannel, message: Message) -> int:
        size = await send(self, message)
        tally.message(message, size)
        return size

    async def several(self: ChunkChannel, messages: Sequence[Message]) -> list[int]:
        sizes = await together(self, messages)
        for message, size in zip(messages, sizes, strict=True):
            tally.message(message, size)
        return sizes

    async def gossip(self: _GuardedPubsub, peer: Any, packet: bytes) -> None:
        tally.packet(packet)
        await receive(self, peer, packet)

    async def members(stream: Any, body: bytes) -> None:
        tally.bytes["membership"] += len(body)
        await write_members(stream, body)

    with (
        patch.object(ChunkChannel, "send", one),
        patch.object(ChunkChannel, "send_together", several),
        patch.object(_GuardedPubsub, "_receive", gossip),
        patch.object(members_protocol, "_write", members),
    ):
        yield tally


class Sampler:
    """What the main thread is found doing."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._thread = threading.main_thread().ident
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            assert self._thread is not None
            self.found[what_for(sys._current_frames().get(self._thread))] += 1

    def end(self) -> None:
        self._over.set()


def what_for(frame: FrameType | None) -> str:
    """What the code in a frame and those around it does."""
    found = "the event loop"
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        for part, name, purpose in CODE:
            if part in file and (not name or function == name):
                if purpose not in ("transport", "requests and pieces"):
                    return purpose
                if found == "the event loop":
                    found = purpose
                break
        frame = frame.f_back
    return found


class _Swarm:
    """All its peers, in this process."""

    def __init__(self, swarm: Sequence[Spec]) -> None:
        self.nodes: list[Node] = []
        self._specs = swarm
        self._entry: list[str] = []
        self._has_entry = trio.Event()
        self._ready = 0
        self._all_ready = trio.Event()

    @property
    def deliveries(self) -> int:
        return sum(
            node.gossip_counters.delivered + node.gossip_counters.duplicates for node in self.nodes
        )

    async def join(self, nursery: trio.Nursery) -> None:
        for spec in self._specs:
            network: dict[str, object] = {"bootstrap": list(self._entry)}
            config = PeerConfig.from_mapping({**spec.config, "network": network})
            start = weights(model(spec), np.random.default_rng(0))
            node = Node(config, model(spec), start, on_address=self._found)
            self.nodes.append(node)
            nursery.start_soon(self._live, node)
            await self._has_entry.wait()
        await self._all_ready.wait()

    def _found(self, address: str) -> None:
        if not self._entry:
            self._entry.append(address)
            self._has_entry.set()

    async def _live(self, node: Node) -> None:
        async with open_node(node):
            self._ready += 1
            if self._ready == len(self._specs):
                self._all_ready.set()
            await trio.sleep_forever()

    async def one_round(self) -> set[str]:
        """All exchange; the hashes of what they made of it."""
        hashes: set[str] = set()

        async def exchange(node: Node, spec: Spec) -> None:
            rng = np.random.default_rng([spec.place, node.round])
            merged = await node.exchange(weights(model(spec), rng), 100, {})
            hashes.add(merged.report.model_hash)

        async with trio.open_nursery() as nursery:
            for node, spec in zip(self.nodes, self._specs, strict=True):
                nursery.start_soon(exchange, node, spec)
        return hashes


async def _measure(swarm: _Swarm, rounds: int) -> Cost:
    peers = len(swarm._specs)
    async with trio.open_nursery() as nursery:
        await swarm.join(nursery)
        await swarm.one_round()
        equal = True
        sampler = Sampler()
        thread = threading.Thread(target=sampler.run)
        with tallied() as tally:
            before, cpu, began = swarm.deliveries, time.process_time(), time.monotonic()
            thread.start()
            for _ in range(rounds):
                equal &= len(await swarm.one_round()) == 1
            sampler.end()
            thread.join()
        cpu, seconds = time.process_time() - cpu, time.monotonic() - began
        shares = peers * rounds
        samples = sum(sampler.found.values())
        found = sorted(sampler.found.items())
        cost = Cost(
            peers=peers,
            bytes_per_peer_round=sum(tally.bytes.values()) / shares,
            cpu_s_per_peer_round=cpu / shares,
            bytes_by={name: count / shares for name, count in sorted(tally.bytes.items())},
            cpu_by={name: cpu * count / samples / shares for name, count in found},
            gossip_deliveries_per_peer_round=(swarm.deliveries - before) / shares,
            seconds_per_round=seconds / rounds,
            hashes_equal=equal,
        )
        nursery.cancel_scope.cancel()
    return cost


def measure(peers: int, degree: int, kilobytes: float, rounds: int) -> Cost:
    """One swarm, after one round that is not counted."""
    topology: dict[str, object] = {"type": "mesh", "connections": degree}
    return trio.run(_measure, _Swarm(specs(peers, kilobytes / 1e3, topology, rounds + 1)), rounds)


def main(argv: Sequence[str]) -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks control", description="Cost of announcements and membership."
    )
    parser.add_argument("--peers", default="10,20,50", metavar="N,N", help="sizes of the swarm")
    parser.add_argument("--degree", type=int, default=4, metavar="N", help="neighbours of each")
    parser.add_argument("--kilobytes", type=float, default=200.0, metavar="K", help="of an update")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    add_json(parser)
    args = parser.parse_args(argv)
    sizes = [int(text) for text in args.peers.split(",")]
    costs = [measure(size, args.degree, args.kilobytes, args.rounds) for size in sizes]
    result = {
        "degree": args.degree,
        "kilobytes": args.kilobytes,
        "runs": [asdict(cost) for cost in costs],
    }
    write(args.json, result, table(costs))
    return 0 if all(cost.hashes_equal for cost in costs) else 1


def table(costs: Sequence[Cost]) -> list[str]:
    """For people: a column a swarm."""
    lines = [f"{'peers':32}" + "".join(f"{cost.peers:12}" for cost in costs)]
    for what, unit in (("bytes", "B"), ("cpu", "ms")):
        total = "bytes_per_peer_round" if what == "bytes" else "cpu_s_per_peer_round"
        scale = 1.0 if what == "bytes" else 1e3
        rows = [(f"{what} a peer and round, {unit}", [getattr(cost, total) for cost in costs])]
        parts: list[dict[str, float]] = [getattr(cost, f"{what}_by") for cost in costs]
        names = sorted({name for part in parts for name in part})
        rows += [(f"  {name}", [part.get(name, 0.0) for part in parts]) for name in names]
        lines += [
            f"{name:32}" + "".join(f"{scale * value:12.1f}" for value in values)
            for name, values in rows
        ]
    return lines
