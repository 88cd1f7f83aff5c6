"""One end of one path of ``benchmarks transport``, as a process of its own.

    python -m benchmarks.transport_end PATH              # sends; tells its address first
    python -m benchmarks.transport_end PATH ADDRESS      # receives

Led by lines ``COUNT SIZE`` on stdin, one a transfer; answers each with its CPU seconds. The
receiver says when it is ready. What is sent lies in memory, what comes is not looked at.
"""

from __future__ import annotations

import os
import sys
import time

import trio

from benchmarks.member import cpu_seconds, next_line, tell
from benchmarks.paths import DIAL, LISTEN


async def send(path: str) -> None:
    """Listen, and send what is asked for; the seconds run until the other end has it all."""
    async with LISTEN[path](lambda address: tell({"address": address})) as link:
        tell({"open": True})
        while line := await next_line():
            count, size = map(int, line.split())
            piece = memoryview(os.urandom(size))
            cpu, began = cpu_seconds(), time.perf_counter()
            for _ in range(count):
                await link.send(piece)
            await link.acknowledged()
            tell({"seconds": time.perf_counter() - began, "cpu": cpu_seconds() - cpu})


async def receive(path: str, address: str) -> None:
    """Dial, and take what comes."""
    async with DIAL[path](address) as link:
        tell({"open": True})
        while line := await next_line():
            count, size = map(int, line.split())
            cpu = cpu_seconds()
            tell({"ready": True})
            await link.receive(count, size)
            await link.acknowledge()
            tell({"cpu": cpu_seconds() - cpu})


if __name__ == "__main__":
    if len(sys.argv) == 2:
        trio.run(send, sys.argv[1])
    else:
        trio.run(receive, *sys.argv[1:3])
    sys.exit(0)
