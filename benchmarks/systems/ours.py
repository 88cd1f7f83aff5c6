"""One member of our swarm: the real protocol, store and aggregation, without torch.

The clock contains all of ``exchange`` until the last update is here: cutting, hashing, scoring and
storing the own update too. In a round that is dialled, no peer has a connection to another when
the clock starts: the edges are dialled by the exchange itself, as when a swarm comes up.
"""

from __future__ import annotations

import json
import os
import time

import numpy as np
import trio

from benchmarks.member import Spec, model, next_line, weights
from benchmarks.systems.child import DIALLED, SAMPLES, Task, cpu_seconds, read_task, tell
from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.tensors import Array, ModelSpec
from p2pfl_torrent.peer.node import Node
from p2pfl_torrent.peer.running import open_node

ROUNDS = 3  # more than are measured, so that no peer says goodbye after the last


def configuration(task: Task, bootstrap: list[str]) -> PeerConfig:
    """Everything as a user has it by default, but for how long rounds may take."""
    return PeerConfig.from_mapping(
        {
            "federate": {
                "client_num": task.peers,
                "total_round_num": ROUNDS,
                "join_timeout": 300.0,
            },
            "topology": {"type": task.topology},
            "bittorrent": {"timeout": 600.0},
            "network": {"bootstrap": bootstrap},
        }
    )


def shapes_of(task: Task) -> ModelSpec:
    """A model of just the bytes that the others share."""
    size = task.update(task.place).stat().st_size
    return model(Spec({}, task.place, size / 1e6))


class Links:
    """Closes and reopens all that connects a node to others.

    Membership goes on meanwhile, but asks nobody: a probe would dial.
    """

    def __init__(self, node: Node) -> None:
        self._exchange = node._exchange
        self._membership = node._driver
        self._host = node._host
        self._wanted = dict(self._exchange.wanted)

    async def close(self) -> int:
        """Hang up; how many peers are still connected, since they dialled meanwhile."""
        self._membership.watch(())
        self._exchange.set_neighbours({})
        for peer in self._wanted:
            self._exchange.forget_peer(peer)  # else the edge would stay until the round closes
        async with trio.open_nursery() as nursery:
            for connected in self._host.connected():
                nursery.start_soon(self._host.disconnect, connected)
        return len(self._host.connected())

    def reopen(self) -> None:
        """Begin to dial; returns at once."""
        self._exchange.set_neighbours(self._wanted)
        self._membership.watch(self._wanted)


async def one_round(node: Node, update: dict[str, Array]) -> bool:
    """Prepare, exchange and be checked; False when the leader wants no more."""
    line = await next_line()
    if not line:
        return False
    links = Links(node) if line.split()[1] == DIALLED else None
    tell(prepared=True, links=await links.close() if links else 0)
    while (await next_line()).strip() == "part":
        tell(prepared=True, links=await links.close() if links else 0)
    used = cpu_seconds()
    if links:
        links.reopen()
    began = time.monotonic()
    report = (await node.exchange(update, SAMPLES, {})).report
    merged = time.monotonic()
    tell(ended=began + report.exchange_seconds, merged=merged)
    await next_line()
    used = cpu_seconds() - used
    tell(
        cpu_seconds=used,
        digest=report.model_hash,
        complete=report.closed_by == "complete",
        payload=report.bytes_payload,
        duplicate=report.bytes_duplicate,
    )
    return True


async def main(task: Task) -> None:
    shapes = shapes_of(task)
    rng = np.random.default_rng(task.place + 1)
    start = weights(shapes, np.random.default_rng(0))
    bootstrap: list[str] = []
    if task.place:  # the founder is met by the others, and so begins before them
        tell(address=None)
        bootstrap = [json.loads(await next_line())[0]]
    config = configuration(task, bootstrap)
    node = Node(config, shapes, start, on_address=None if task.place else tell_address)
    async with open_node(node):
        if not task.place:
            await next_line()  # the addresses: all came to the one it told
        tell(ready=True)
        while await one_round(node, weights(shapes, rng)):
            pass


def tell_address(address: str) -> None:
    tell(address=address)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    trio.run(main, read_task())
