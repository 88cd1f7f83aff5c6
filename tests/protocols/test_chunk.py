"""Messages on a stream: what shares a write, and what does not."""

from __future__ import annotations

from collections.abc import Callable

import trio

from p2pfl_torrent.core import messages as m
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.protocols.chunk import JOINED_BYTES, ChunkChannel

UPDATE = b"u" * 32


class Loop:
    """A stream that reads what it wrote.

    Attributes:
        writes: bytes of each.
    """

    remote = PeerId("me")
    begun = 0

    def __init__(self) -> None:
        self.writes: list[int] = []
        self._bytes = bytearray()

    async def write(
        self, data: bytes | bytearray | memoryview, timeout: float | None = None
    ) -> None:
        await self.write_frame(b"", data, timeout)

    async def write_frame(
        self, head: bytes, body: bytes | bytearray | memoryview, timeout: float | None = None
    ) -> None:
        await trio.lowlevel.checkpoint()
        self._bytes += head + bytes(body)
        self.writes.append(len(head) + len(body))

    async def read_exactly(self, count: int, timeout: float | None = None) -> bytearray:
        await trio.lowlevel.checkpoint()
        taken = self._bytes[:count]
        del self._bytes[:count]
        return taken

    async def read_frame(
        self, head_bytes: int, body_bytes: Callable[[bytearray], int]
    ) -> tuple[bytearray, memoryview]:
        head = await self.read_exactly(head_bytes)
        return head, memoryview(await self.read_exactly(body_bytes(head)))

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_small_messages_share_a_write() -> None:
    loop = Loop()
    channel = ChunkChannel(loop, 1 << 20)
    said: list[m.Message] = [m.Request(k, UPDATE, k, 0, 1) for k in range(10)]
    said.append(m.Piece(3, b"small"))
    sizes = await channel.send_together(said)
    assert loop.writes == [sum(sizes)]
    heard = [await channel.receive() for _ in said]
    assert [size for _, size in heard] == sizes
    assert heard[:10] == list(zip(said, sizes, strict=True))[:10]
    last = heard[10][0]
    assert isinstance(last, m.Piece)
    assert (last.number, bytes(last.data)) == (3, b"small")


async def test_large_messages_are_not_joined_and_the_order_stays() -> None:
    loop = Loop()
    channel = ChunkChannel(loop, 1 << 20)
    large = m.Piece(1, bytes(JOINED_BYTES + 1))
    sizes = await channel.send_together([m.Ping(0), large, m.Ping(2), m.Piece(3, bytes(9000))])
    assert loop.writes == [sizes[0], sizes[1], sizes[2] + sizes[3]]
    numbers = []
    for _ in sizes:
        message, _ = await channel.receive()
        assert isinstance(message, m.Ping | m.Piece)
        numbers.append(message.number)
    assert numbers == [0, 1, 2, 3]


async def test_no_write_is_larger_than_is_worth_joining() -> None:
    loop = Loop()
    channel = ChunkChannel(loop, 1 << 20)
    sizes = await channel.send_together([m.Piece(k, bytes(4000)) for k in range(20)])
    assert sum(loop.writes) == sum(sizes)
    assert max(loop.writes) <= JOINED_BYTES
    assert len(loop.writes) == 5
