"""The chunk exchange on a libp2p stream: framing, and nothing that decides (docs/specs)."""

from __future__ import annotations

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.messages import (
    FRAME_HEADER,
    PROTOCOL_ID,
    Message,
    decode_body,
    encode_message,
    frame_body_bytes,
)
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.exchange.ports import ByteStream

WRITE_PATIENCE = 120.0  # seconds for one frame: 1 MiB at 128 kbit/s takes 66
BODY_PATIENCE = 120.0  # seconds from a frame's header to its end, likewise

__all__ = ["PROTOCOL_ID", "ChunkChannel"]


class ChunkChannel:
    """Messages over one stream; ``max_control`` bounds a control frame by the swarm's layout."""

    def __init__(self, stream: ByteStream, max_control: int) -> None:
        self._stream = stream
        self._max_control = max_control

    @property
    def remote(self) -> PeerId:
        """The authenticated peer at the other end."""
        return self._stream.remote

    async def send(self, message: Message) -> int:
        """Send one message; bytes it took. The payload of a piece is written as it is."""
        head, payload = encode_message(message)
        # Small frames in one write: each write becomes a frame of the muxer and of Noise.
        if len(payload) <= 1 << 14:
            await self._stream.write(head + bytes(payload), WRITE_PATIENCE)
        else:
            await self._stream.write(head, WRITE_PATIENCE)
            await self._stream.write(payload, WRITE_PATIENCE)
        return len(head) + len(payload)

    async def receive(self) -> tuple[Message, int]:
        """The next message and the bytes it took; waits as long as nothing comes."""
        head = await self._stream.read_exactly(FRAME_HEADER.size)
        try:
            kind, size = frame_body_bytes(head, self._max_control)
            body = await self._stream.read_exactly(size, BODY_PATIENCE)
            return decode_body(kind, body), FRAME_HEADER.size + size
        except RemoteProtocolError as error:
            raise error.by(self.remote) from error

    async def aclose(self) -> None:
        """Abort the stream; never raises."""
        await self._stream.reset()
