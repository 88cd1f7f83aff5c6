"""Raw trio sockets, all to all: what Python takes to move the bytes and nothing else.

    python -m benchmarks.systems.sockets TASK.json tcp|ssl

No hashes and no files, and links are open before the clock starts: a floor. On a ring everyone
passes on to the right what comes from the left.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TypeAlias

import trio

from benchmarks.member import next_line
from benchmarks.systems.child import Task, cpu_seconds, digest_of, read_task, tell
from benchmarks.tls import NAME, client_context, server_context

PIECE = 1 << 20

Link: TypeAlias = trio.SocketStream | trio.SSLStream


async def fill(link: Link, view: memoryview) -> None:
    """Receive as many bytes as the view has, where the link can into it directly."""
    while view:
        if isinstance(link, trio.SocketStream):
            count = await link.socket.recv_into(view[:PIECE])
        else:
            data = await link.receive_some(min(PIECE, len(view)))
            count = len(data)
            view[:count] = data
        if not count:
            raise OSError("the other end closed the link")
        view = view[count:]


async def send(link: Link, view: memoryview) -> None:
    for start in range(0, len(view), PIECE):
        await link.send_all(view[start : start + PIECE])


class Gathering:
    """One process: its links by place, and everybody's update, its own and those that come."""

    def __init__(self, task: Task, encrypted: bool) -> None:
        self._task = task
        self._encrypted = encrypted
        self._links: dict[int, Link] = {}
        self._linked = trio.Event()
        own = task.update(task.place).read_bytes()
        self.updates = [bytearray(b"\1" * len(own)) for _ in range(task.peers)]  # touched: there
        self.updates[task.place][:] = own
        self._here = [trio.Event() for _ in range(task.peers)]
        self._here[task.place].set()

    async def accept(self, link: Link) -> None:
        """A neighbour dialled: its first byte is its place."""
        place = bytearray(1)
        await fill(link, memoryview(place))
        self._add(place[0], link)
        await trio.sleep_forever()

    async def dial(self, ports: list[int]) -> None:
        """Open the links to the neighbours that do not dial themselves."""
        for place in self._task.neighbours():
            if place > self._task.place:
                link: Link = await trio.open_tcp_stream("127.0.0.1", ports[place])
                if self._encrypted:
                    link = trio.SSLStream(link, client_context(), server_hostname=NAME)
                await link.send_all(bytes([self._task.place]))
                self._add(place, link)
        await self._linked.wait()

    def _add(self, place: int, link: Link) -> None:
        self._links[place] = link
        if len(self._links) == len(self._task.neighbours()):
            self._linked.set()

    async def gather(self) -> None:
        """Send, and return when everything is here and sent on."""
        async with trio.open_nursery() as nursery:
            if self._task.topology == "ring":
                nursery.start_soon(self._pass_on)
                nursery.start_soon(self._take_over)
            else:
                own = memoryview(self.updates[self._task.place])
                for place, link in self._links.items():
                    nursery.start_soon(send, link, own)
                    nursery.start_soon(fill, link, memoryview(self.updates[place]))

    async def _pass_on(self) -> None:
        place, peers = self._task.place, self._task.peers
        right = self._links[(place + 1) % peers]
        for owner in ((place - step) % peers for step in range(peers - 1)):
            await self._here[owner].wait()
            await send(right, memoryview(self.updates[owner]))

    async def _take_over(self) -> None:
        place, peers = self._task.place, self._task.peers
        left = self._links[(place - 1) % peers]
        for owner in ((place - step) % peers for step in range(1, peers)):
            await fill(left, memoryview(self.updates[owner]))
            self._here[owner].set()


async def main(task: Task, encrypted: bool) -> None:
    gathering = Gathering(task, encrypted)
    async with trio.open_nursery() as nursery:
        listeners: list[trio.abc.Listener[Link]] = []
        for plain in await trio.open_tcp_listeners(0, host="127.0.0.1"):
            port = plain.socket.getsockname()[1]
            context = server_context(Path(task.scratch)) if encrypted else None
            listeners.append(trio.SSLListener(plain, context) if context else plain)
        nursery.start_soon(trio.serve_listeners, gathering.accept, listeners)
        tell(address=port)
        await gathering.dial(json.loads(await next_line()))
        tell(ready=True)
        await next_line()
        tell(prepared=True)
        await next_line()
        used = cpu_seconds()
        await gathering.gather()
        tell(ended=time.monotonic())
        await next_line()
        tell(cpu_seconds=cpu_seconds() - used, digest=digest_of(gathering.updates))
        await next_line()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, read_task(), sys.argv[2] == "ssl")
