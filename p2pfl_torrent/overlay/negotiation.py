"""multistream-select with bounded messages: agreeing on what is spoken on a stream.

The library reads whatever length a message announces and as many messages as come, and lets a
name that is not UTF-8 escape as ``UnicodeDecodeError``, which on a muxed stream ends the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from libp2p.abc import IMultiselectCommunicator
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.protocol_muxer.exceptions import (
    MultiselectClientError,
    MultiselectCommunicatorError,
    MultiselectError,
)
from libp2p.protocol_muxer.generic_selector import GenericMultistreamSelector
from libp2p.protocol_muxer.multiselect import (
    DEFAULT_NEGOTIATE_TIMEOUT,
    MULTISELECT_PROTOCOL_ID,
    PROTOCOL_NOT_FOUND_MSG,
)
from libp2p.utils import encode_delim

from p2pfl_torrent.overlay.limits import MAX_NEGOTIATION_MESSAGES, MAX_PROTOCOL_NAME

T = TypeVar("T")


class Pipe(Protocol):
    """What is negotiated over: ``read`` gives up to ``n`` bytes, none only at the end."""

    async def read(self, n: int | None = None, /) -> bytes: ...

    async def write(self, data: bytes, /) -> None: ...


class BoundedCommunicator(IMultiselectCommunicator):
    """Reads and writes multistream-select messages; every fault of the other side is one error."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._messages = 0

    async def write(self, msg_str: str) -> None:
        await self.write_all(msg_str)

    async def write_all(self, *messages: str) -> None:
        """Sends several messages at once, which saves their round trips."""
        try:
            await self._pipe.write(b"".join(encode_delim(text.encode()) for text in messages))
        except IOException as error:
            raise MultiselectCommunicatorError("cannot send while negotiating") from error

    async def read(self) -> str:
        self._messages += 1
        if self._messages > MAX_NEGOTIATION_MESSAGES:
            raise MultiselectCommunicatorError("too many messages while negotiating")
        size = 0
        for shift in (0, 7):  # two bytes of varint reach 16 KiB, far above the bound
            byte = (await self._exactly(1))[0]
            size |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
        else:
            size = MAX_PROTOCOL_NAME + 1
        if not 1 <= size <= MAX_PROTOCOL_NAME:
            raise MultiselectCommunicatorError("a message of a forbidden length while negotiating")
        line = await self._exactly(size)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise MultiselectCommunicatorError("a protocol name that is not UTF-8") from error
        if not text.endswith("\n"):
            raise MultiselectCommunicatorError("a message without its newline while negotiating")
        return text[:-1]

    async def _exactly(self, n: int) -> bytes:
        got = b""
        while len(got) < n:
            try:
                more = await self._pipe.read(n - len(got))
            except IOException as error:
                raise MultiselectCommunicatorError("the stream broke while negotiating") from error
            if not more:
                raise MultiselectCommunicatorError("the stream ended while negotiating")
            got += more
        return got


class BoundedSelector(GenericMultistreamSelector[Any]):
    """The library's choice of security and muxer, over bounded messages."""

    def __init__(self, handlers: Mapping[TProtocol, Any]) -> None:
        super().__init__()
        for protocol, handler in handlers.items():
            self.add_handler(protocol, handler)

    async def select(
        self,
        conn: Pipe,
        is_initiator: bool,
        negotiate_timeout: int = DEFAULT_NEGOTIATE_TIMEOUT,
    ) -> tuple[TProtocol, Any]:
        communicator = BoundedCommunicator(conn)
        protocol: TProtocol | None
        if is_initiator:
            protocol = await self.multiselect_client.select_one_of(
                tuple(self.handlers), communicator, negotiate_timeout
            )
        else:
            protocol, _ = await self.multiselect.negotiate(communicator, negotiate_timeout)
        if protocol is None:
            raise MultiselectError("no protocol selected")
        return protocol, self.handlers[protocol]


async def propose(pipe: Pipe, protocol: str) -> bool:
    """Whether the other side agrees to speak ``protocol``: one round trip.

    Raises:
        MultiselectCommunicatorError: it did not speak multistream-select.
    """
    communicator = BoundedCommunicator(pipe)
    await communicator.write_all(MULTISELECT_PROTOCOL_ID, protocol)
    if await communicator.read() != MULTISELECT_PROTOCOL_ID:
        raise MultiselectCommunicatorError("the other side does not speak multistream-select")
    answer = await communicator.read()
    if answer == protocol:
        return True
    if answer == PROTOCOL_NOT_FOUND_MSG:
        return False
    raise MultiselectCommunicatorError("an answer that is neither yes nor no")


NEGOTIATION_ERRORS = (MultiselectError, MultiselectClientError, MultiselectCommunicatorError)
"""All that the library and this module raise when a negotiation fails."""
