"""A peer without torch of the benchmark `training`: it shares updates, or only receives them.

    python -m benchmarks.training_node SPEC.json SHARED_PER_SECOND

What it sends is paced by the kernel to so many bytes a second on each connection, as a link would;
0 leaves it unpaced. It is led by lines: ``share`` publishes an update and tells when the round is
over; ``take`` tells the window in which the other's update arrives, and then shares its own.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np
import trio

from benchmarks.member import Spec, cpu_seconds, model, next_line, tell, weights
from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.reports import ChunkReceived, ManifestSeen, PeerEvent
from p2pfl_torrent.peer.feed import Subscription
from p2pfl_torrent.peer.node import Node
from p2pfl_torrent.peer.running import open_node

SO_MAX_PACING_RATE = 47  # Linux; Python has no name for it


class Window:
    """When another's update began to arrive, and when it was whole; by time.monotonic."""

    def __init__(self) -> None:
        self.began = 0.0
        self._missing = 0

    def over(self, event: PeerEvent, local: str) -> bool:
        """Look at a new event; whether all is here with it."""
        if isinstance(event, ManifestSeen) and event.owner != local:
            self.began, self._missing = time.monotonic(), event.payload_bytes
        elif isinstance(event, ChunkReceived) and event.owner != local:
            self._missing -= event.size
        return self.began > 0 and self._missing <= 0


def pace(bytes_per_second: int) -> None:
    """Let the kernel pace every TCP connection of this process that there is now."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6):
                    one.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, bytes_per_second)
        except FileNotFoundError:
            pass  # the descriptor of the listing itself


def arrival(events: Subscription, local: str) -> tuple[float, float]:
    """The window of the other's update, when it is over; for a thread."""
    window = Window()
    for event in events:
        if window.over(event, local):
            break
    return window.began, time.monotonic()


async def main(spec: Spec, bytes_per_second: int) -> None:
    shapes = model(spec)
    rng = np.random.default_rng(spec.place + 1)
    config = PeerConfig.from_mapping(spec.config)
    start = weights(shapes, np.random.default_rng(0))
    node = Node(config, shapes, start, on_address=lambda address: tell({"address": address}))
    events = node.feed.subscribe()
    async with open_node(node):
        tell({"ready": node.peer_id})
        while line := (await next_line()).strip():
            if line == "take":
                used = cpu_seconds()
                events.drain()
                tell({"taking": True})
                window = await trio.to_thread.run_sync(arrival, events, node.peer_id)
                tell({"window": window, "cpu_seconds": cpu_seconds() - used})
                await next_line()
            elif bytes_per_second:
                pace(bytes_per_second)
            await node.exchange(weights(shapes, rng), 100, {})
            tell({"shared": True})


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    task = Spec(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    trio.run(main, task, int(sys.argv[2]))
