"""A FedAvg server and its clients over our own transport: what a central server would need.

The process whose place is the number of peers is the server. Each client has one stream to it, open
before the clock starts; it sends its update and its hash, and gets the average and its hash back.
The server sends when it has everything, to all at once.
"""

from __future__ import annotations

import hashlib
import json
import time

import numpy as np
import numpy.typing as npt
import trio

from benchmarks.member import next_line
from benchmarks.systems.child import SAMPLES, Task, cpu_seconds, read_task, tell
from p2pfl_torrent.core.averaging import average_slice
from p2pfl_torrent.overlay.host import Host, open_host
from p2pfl_torrent.overlay.identity import Identity
from p2pfl_torrent.overlay.stream import Stream

PROTOCOL = "/p2pfl-torrent/benchmark/fedavg/1.0.0"
LISTEN = ("/ip4/127.0.0.1/tcp/0",)
PIECE = 1 << 20  # as the chunk exchange's
PATIENCE = 120.0
HASH_BYTES = 32


async def send(stream: Stream, data: memoryview, digest: bytes) -> None:
    """Everything in pieces, then its hash."""
    for start in range(0, len(data), PIECE):
        await stream.write(data[start : start + PIECE], PATIENCE)
    await stream.write(digest, PATIENCE)


async def receive(stream: Stream, size: int) -> bytearray:
    """So many bytes; ValueError if they do not match the hash after them."""
    data = bytearray(size)
    digest = hashlib.sha256()
    for start in range(0, size, PIECE):
        piece = await stream.read_exactly(min(PIECE, size - start), PATIENCE)
        digest.update(piece)
        data[start : start + len(piece)] = piece
    if bytes(await stream.read_exactly(HASH_BYTES, PATIENCE)) != digest.digest():
        raise ValueError(f"what {stream.remote} sent does not match its hash")
    return data


def average(updates: list[bytearray]) -> npt.NDArray[np.float32]:
    """FedAvg, all with the same number of samples."""
    parts = [(float(SAMPLES), np.frombuffer(update, np.float32)) for update in updates]
    mean = np.empty_like(parts[0][1])
    average_slice("F32", parts, mean)
    return mean


class Server:
    """Takes an update from each, and gives the average to all."""

    def __init__(self, task: Task) -> None:
        self._updates = [bytearray() for _ in range(task.peers)]
        self._size = task.update(0).stat().st_size
        self._missing = task.peers
        self._averaged = trio.Event()
        self._mean = memoryview(b"")
        self.digest = b""

    async def serve(self, stream: Stream) -> None:
        place = (await stream.read_exactly(1))[0]
        self._updates[place] = await receive(stream, self._size)
        self._missing -= 1
        if not self._missing:
            await self._average()
        await self._averaged.wait()
        await send(stream, self._mean, self.digest)

    async def _average(self) -> None:
        mean = await trio.to_thread.run_sync(average, self._updates)
        self._mean = mean.data.cast("B")
        self.digest = hashlib.sha256(self._mean).digest()
        self._averaged.set()

    async def round(self) -> None:
        await self._averaged.wait()


class Client:
    """Sends its update, and takes the average."""

    def __init__(self, task: Task, stream: Stream) -> None:
        self._stream = stream
        self._update = memoryview(task.update(task.place).read_bytes())
        self.digest = b""

    async def round(self) -> None:
        await send(self._stream, self._update, hashlib.sha256(self._update).digest())
        mean = await receive(self._stream, len(self._update))
        self.digest = hashlib.sha256(mean).digest()


async def dial(host: Host, task: Task, address: str) -> Client:
    """Open the stream to the server and say who it is."""
    peer = address.rpartition("/")[2]
    await host.connect(peer, [address], PATIENCE)
    stream = await host.open_stream(peer, PROTOCOL, PATIENCE)
    await stream.write(bytes([task.place]), PATIENCE)
    return Client(task, stream)


async def main(task: Task) -> None:
    serves = task.place == task.peers
    async with open_host(Identity.ephemeral(), LISTEN if serves else ()) as host:
        side: Server | Client
        if serves:
            side = Server(task)
            host.set_handler(PROTOCOL, side.serve)
            tell(address=host.addrs()[0])
            await next_line()
        else:
            tell(address=None)
            side = await dial(host, task, json.loads(await next_line())[-1])
        tell(ready=True)
        await next_line()
        tell(prepared=True)
        await next_line()
        used = cpu_seconds()
        await side.round()
        tell(ended=time.monotonic())
        await next_line()
        tell(cpu_seconds=cpu_seconds() - used, digest=side.digest.hex())
        await next_line()


if __name__ == "__main__":
    trio.run(main, read_task())
