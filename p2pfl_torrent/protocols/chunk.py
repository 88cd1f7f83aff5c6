"""The chunk exchange on a libp2p stream: framing, and nothing that decides (docs/specs)."""

from __future__ import annotations

from collections.abc import Sequence

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
from p2pfl_torrent.exchange.ports import FrameStream

JOINED_BYTES = 16 << 10  # in one write; above, joining costs more than a frame

__all__ = ["PROTOCOL_ID", "ChunkChannel"]


class ChunkChannel:
    """Messages over one stream; ``max_control`` bounds a control frame by the swarm's layout."""

    def __init__(self, stream: FrameStream, max_control: int) -> None:
        self._stream = stream
        self._max_control = max_control

    @property
    def remote(self) -> PeerId:
        """The authenticated peer at the other end."""
        return self._stream.remote

    @property
    def begun(self) -> int:
        """Bytes that are here of the message that is coming."""
        return self._stream.begun

    async def send(self, message: Message) -> int:
        """Send one message; bytes it took. The payload of a piece is written as it is."""
        head, payload = encode_message(message)
        await self._stream.write_frame(head, payload)
        return len(head) + len(payload)

    async def send_together(self, messages: Sequence[Message]) -> list[int]:
        """Send messages; small ones share a write, a frame of the muxer and one of Noise."""
        sizes: list[int] = []
        joined = bytearray()
        for message in messages:
            head, payload = encode_message(message)
            sizes.append(len(head) + len(payload))
            if joined and len(joined) + sizes[-1] > JOINED_BYTES:
                await self._stream.write(bytes(joined))
                joined.clear()
            if sizes[-1] > JOINED_BYTES:
                await self._stream.write_frame(head, payload)
            else:
                joined += head
                joined += payload
        if joined:
            await self._stream.write(bytes(joined))
        return sizes

    async def receive(self) -> tuple[Message, int]:
        """The next message and the bytes it took; waits as long as nothing comes."""
        try:
            head, body = await self._stream.read_frame(FRAME_HEADER.size, self._body_bytes)
            kind, size = frame_body_bytes(head, self._max_control)
            return decode_body(kind, body), FRAME_HEADER.size + size
        except RemoteProtocolError as error:
            raise error.by(self.remote) from error

    def _body_bytes(self, head: bytearray) -> int:
        return frame_body_bytes(head, self._max_control)[1]

    async def aclose(self) -> None:
        """Abort the stream; never raises."""
        await self._stream.reset()
