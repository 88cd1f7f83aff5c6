"""What the shells need from the rooms above them, as structural types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.manifest import Manifest, UpdateId
from p2pfl_torrent.core.messages import Message
from p2pfl_torrent.core.peers import PeerId


class EdgeClosedError(Exception):
    """The other side of a channel or stream is gone, or the dial failed; the text says why."""


class ByteStream(Protocol):
    """A bidirectional libp2p stream; every failure is an EdgeClosedError."""

    @property
    def remote(self) -> PeerId:
        """The authenticated peer at the other end."""
        ...

    async def read_exactly(self, count: int, timeout: float | None = None) -> bytearray:
        """``count`` bytes; EdgeClosedError at the end of the stream or past ``timeout`` seconds."""
        ...

    async def write(
        self, data: bytes | bytearray | memoryview, timeout: float | None = None
    ) -> None:
        """Hand all of ``data`` to the transport; without ``timeout``, while it takes any."""
        ...

    async def close(self) -> None:
        """End the writing side."""
        ...

    async def reset(self) -> None:
        """Abort both sides; never raises."""
        ...


class FrameStream(ByteStream, Protocol):
    """A stream whose messages have a head of fixed size that says how much follows."""

    @property
    def begun(self) -> int:
        """Bytes that are here of the frame that is coming."""
        ...

    async def read_frame(
        self, head_bytes: int, body_bytes: Callable[[bytearray], int]
    ) -> tuple[bytearray, memoryview]:
        """The next frame, as head and body; once called, only frames can be read.

        A body is there until the next call: then its memory is used again.

        Args:
            body_bytes: from a head, the size of its body; may raise RemoteProtocolError.

        Raises:
            EdgeClosedError: the stream ended, or a body came too slowly; a head is waited for as
                long as nothing comes.
            RemoteProtocolError: ``body_bytes`` refused the frame.
        """
        ...

    async def write_frame(
        self, head: bytes, body: bytes | bytearray | memoryview, timeout: float | None = None
    ) -> None:
        """Hand both to the transport as one message, without joining them."""
        ...


class Channel(Protocol):
    """A stream of chunk exchange messages to one peer."""

    @property
    def remote(self) -> PeerId:
        """The authenticated peer at the other end."""
        ...

    @property
    def begun(self) -> int:
        """Bytes that are here of the message that is coming: where it changes, some came."""
        ...

    async def send(self, message: Message) -> int:
        """Send one message; returns the bytes it took on the stream."""
        ...

    async def send_together(self, messages: Sequence[Message]) -> list[int]:
        """Send messages in this order, small ones in one write; returns the bytes each took."""
        ...

    async def receive(self) -> tuple[Message, int]:
        """The next message and its bytes on the stream.

        A Piece's data is there until the next call: then its memory is used again.

        Raises:
            EdgeClosedError: the stream ended.
            RemoteProtocolError: what came is not a message.
        """
        ...

    async def aclose(self) -> None:
        """Abort the stream; never raises."""
        ...


class Dialer(Protocol):
    """Opens the chunk stream of an edge."""

    async def open_channel(self, peer: PeerId, addrs: Sequence[str]) -> Channel:
        """Connect where needed and open a chunk stream; EdgeClosedError when that fails."""
        ...


class UpdateStore(Protocol):
    """Updates on disk: manifests and chunk bytes. All calls are short and synchronous."""

    layout: Layout

    def put_manifest(self, manifest: Manifest) -> None:
        """Remember a manifest durably; must be called before anything else about the update."""
        ...

    def manifests(self) -> list[Manifest]:
        """Every manifest kept, oldest round first."""
        ...

    def verified_blocks(self, update: UpdateId, chunk: int) -> Bitfield:
        """Blocks of a chunk that are here and match their hashes (re-hashed, so: not cheap)."""
        ...

    def write(
        self, update: UpdateId, chunk: int, offset: int, data: bytes | bytearray | memoryview
    ) -> None:
        """Write verified bytes at an offset inside a chunk's file."""
        ...

    def read(self, update: UpdateId, chunk: int, offset: int, into: memoryview) -> None:
        """Fill ``into`` with bytes of a chunk's file from ``offset``."""
        ...

    def complete_chunk(self, update: UpdateId, chunk: int, source: PeerId) -> None:
        """Record that every block of a chunk is here and verified."""
        ...

    def chunk(self, update: UpdateId, chunk: int) -> memoryview:
        """A complete chunk's file, read-only, mapped rather than read."""
        ...

    def counted(self) -> dict[UpdateId, int]:
        """Updates that went into an aggregate, and into which round's."""
        ...

    def prune(self, round: int) -> list[UpdateId]:
        """Forget updates too old to serve or to fill with, now that ``round`` begins."""
        ...
