"""A central server on the same links, over our own transport: what the swarm is compared with.

    python -m benchmarks.links_star TASK.json

is the server or a client. Every update is sent to the server, which either passes each on to all
others as soon as it has it (``spread``: what the swarm does), or sends all the average once it has
all (``fedavg``: what a central server is usually asked for, and a fraction of the bytes).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import trio

from benchmarks.fleet import Process
from benchmarks.member import next_line, tell
from benchmarks.systems.central import average, receive, send
from p2pfl_torrent.overlay.host import open_host
from p2pfl_torrent.overlay.identity import Identity
from p2pfl_torrent.overlay.stream import Stream
from testnet.netns import Place

PROTOCOL = "/p2pfl-torrent/benchmark/star/1.0.0"
PATIENCE = 60.0  # seconds to connect
MODES = ("spread", "fedavg")


@dataclass(frozen=True, slots=True)
class Task:
    """What one process does.

    Attributes:
        place: 0 serves, and has an update too.
        peers: the server among them.
        size: bytes of an update, a whole number of float32.
        listen: the server's address; empty at clients.
    """

    mode: str
    place: int
    peers: int
    size: int
    listen: str = ""

    @property
    def update(self) -> bytearray:
        """Noise."""
        rng = np.random.default_rng(self.place)
        return bytearray(rng.standard_normal(self.size // 4, dtype=np.float32).tobytes())

    @property
    def expected(self) -> int:
        """Transfers to each client."""
        return self.peers - 1 if self.mode == "spread" else 1


class Server:
    """Has everything, and sends each client what it is to have."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._updates: dict[int, bytearray] = {}
        self._queues = {
            place: trio.open_memory_channel[memoryview](task.peers)
            for place in range(1, task.peers)
        }

    def take(self, place: int, update: bytearray) -> None:
        """An update is here."""
        self._updates[place] = update
        if self._task.mode == "spread":
            self._to_all_but(place, memoryview(update))
        elif len(self._updates) == self._task.peers:
            mean = average(list(self._updates.values()))
            self._to_all_but(0, mean.data.cast("B"))

    def _to_all_but(self, place: int, data: memoryview) -> None:
        for other, (to_client, _) in self._queues.items():
            if other != place:
                to_client.send_nowait(data)

    async def serve(self, stream: Stream) -> None:
        """One client, until it has all that it expects."""
        place = (await stream.read_exactly(1))[0]

        async def take() -> None:
            self.take(place, await receive(stream, self._task.size))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            for _ in range(self._task.expected):
                data = await self._queues[place][1].receive()
                await send(stream, data, _digest(data))


def _digest(data: memoryview | bytearray) -> bytes:
    return hashlib.sha256(data).digest()


async def _client(task: Task, stream: Stream) -> None:
    update = task.update

    async def give() -> None:
        await send(stream, memoryview(update), _digest(update))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give)
        for _ in range(task.expected):
            await receive(stream, task.size)


async def main(task: Task) -> None:
    """Serve, or send and receive once, when told."""
    listen = (f"/ip4/{task.listen}/tcp/0",) if task.listen else ()
    async with open_host(Identity.ephemeral(), listen) as host:
        if task.listen:
            server = Server(task)
            host.set_handler(PROTOCOL, server.serve)
            tell({"address": host.addrs()[0]})
            await next_line()
            server.take(0, task.update)
            await next_line()
            return
        address = (await next_line()).strip()
        peer = address.rpartition("/")[2]
        await host.connect(peer, [address], PATIENCE)
        stream = await host.open_stream(peer, PROTOCOL, PATIENCE)
        await stream.write(bytes([task.place]), PATIENCE)
        tell({"ready": True})
        await next_line()
        await _client(task, stream)
        tell({"ended": time.monotonic()})
        await next_line()


def measure(mode: str, places: Sequence[Place], size: int, directory: Path) -> float:
    """Seconds until the last client has everything; the first place serves."""
    with (directory / f"star-{mode}.err").open("w+b") as errors:
        fleet: list[Process] = []
        try:
            for number, place in enumerate(places):
                listen = place.address if not number else ""
                task = Task(mode, number, len(places), size // 4 * 4, listen)
                file = directory / f"star-{mode}-{number}.json"
                file.write_text(json.dumps(asdict(task)), encoding="utf-8")
                command = ["-m", "benchmarks.links_star", str(file)]
                fleet.append(Process(f"star {number}", command, errors, within=place.enter))
            server, *clients = fleet
            address = server.hear("address")["address"]
            for client in clients:
                client.say(address)
            for client in clients:
                client.hear("ready")
            began = time.monotonic()
            for process in fleet:
                process.say("go")
            return max(float(client.hear("ended")["ended"]) for client in clients) - began
        finally:
            for process in fleet:
                process.end()


if __name__ == "__main__":
    trio.run(main, Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    sys.exit(0)
