"""The Noise session: the library's handshake and wire format, without its copies and awaits.

The library turns every 64 KiB into half a dozen copies, three awaits and a task switch. Here what
the socket has is decrypted straight to where it belongs, and what is to be sent is encrypted
straight into the buffer that the socket reads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from socket import IPPROTO_TCP, TCP_NOTSENT_LOWAT
from typing import TYPE_CHECKING, Any, Protocol, cast

import trio
from cryptography.exceptions import InvalidTag
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.security.base_session import BaseSession
from libp2p.security.noise.transport import Transport as StockNoiseTransport

from p2pfl_torrent.overlay.limits import FRAME_PROGRESS, FRAME_STALL
from p2pfl_torrent.overlay.sending import (
    MAX_NONCE,
    PREFIX,
    TAG,
    Buffers,
    Sealer,
    Sending,
    SessionBroken,
    cut,
    nonce,
)
from p2pfl_torrent.overlay.transport import ExactTcpStream

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from libp2p.abc import IRawConnection, ISecureConn
    from libp2p.connection_types import ConnectionType
    from libp2p.peer.id import ID
    from libp2p.security.secure_session import SecureSession
    from multiaddr import Multiaddr

TURN = 0.002
"""Seconds that one connection is read before the other tasks have their turn. In seconds, since
a message of 12 byte frames costs a hundred times the CPU of one with a piece in it."""


class Sink(Protocol):
    """Who takes the plaintext."""

    def room(self) -> memoryview:
        """Where the next bytes go, if the sink knows already.

        A message that fits whole is decrypted there, and verified only then: bytes count as
        arrived once ``filled`` was called."""
        ...

    def filled(self, count: int) -> None:
        """So many bytes, of one message or more, have been written to the start of ``room()``."""
        ...

    def feed(self, data: memoryview) -> None:
        """The next bytes, none for an empty message; the view is of no use after the call."""
        ...


class NoiseSession(BaseSession):
    """An authenticated, encrypted connection, taken over from the library after its handshake.

    One task may receive and one send. An error closes the connection, as does cancelling what is
    being sent; what is asked of it afterwards is refused. Receiving may be cancelled and go on.
    """

    def __init__(self, stock: SecureSession, raw: RawConnection, buffers: Buffers) -> None:
        super().__init__(
            local_peer=stock.local_peer,
            local_private_key=stock.local_private_key,
            remote_peer=stock.remote_peer,
            remote_permanent_pubkey=stock.remote_permanent_pubkey,
            is_initiator=stock.is_initiator,
        )
        protocol = cast(Any, stock.conn).noise_state.noise_protocol
        sending, receiving = protocol.cipher_state_encrypt, protocol.cipher_state_decrypt
        self._sealer = Sealer(sending.cipher.cipher, sending.n)
        self._open: ChaCha20Poly1305 = receiving.cipher.cipher
        self._received: int = receiving.n
        self._raw = raw
        self._tcp = cast(ExactTcpStream, raw.stream)
        self._socket = self._tcp.stream.socket
        self._buffers = buffers
        self._rest = self._tcp.take_ahead()  # what came and is not decrypted
        self._end = 0  # of what is in the receive buffer
        self._turn = 0.0  # when this connection's turn is over
        self._unread = bytearray()  # plaintext for read()
        self._broken: str | None = None

    def _usable(self) -> None:
        if self._broken is not None:
            raise SessionBroken(self._broken)

    def _break(self, reason: str) -> None:
        """Nothing may be sent, received or verified with this state any more: the numbers of the
        messages on the wire and of those counted here may differ."""
        self._broken = self._broken or reason
        self.close_now()

    # Receiving

    async def pump(self, sink: Sink) -> None:
        """Hands all that arrives to ``sink``, until the other side ends the connection in order.

        Raises:
            SessionBroken: it ended in mid-message, or what came is not from the other side.
        """
        self._usable()
        if self._unread:
            unread, self._unread = self._unread, bytearray()
            sink.feed(memoryview(unread))
        self._turn = time.monotonic() + TURN
        while await self._fill():
            self._decrypt(sink)
            if time.monotonic() >= self._turn:
                await trio.lowlevel.checkpoint()
                self._turn = time.monotonic() + TURN

    async def _fill(self) -> int:
        """Bytes in the receive buffer, enough for some progress; 0 at the end.

        What is in the buffer must be used before the next await: it is shared.
        """
        rest = len(self._rest)
        if rest >= PREFIX and rest >= PREFIX + int.from_bytes(self._rest[:PREFIX], "big"):
            return self._restore()  # read during the handshake, or left when the turn was over
        while True:
            room = self._buffers.receive[rest:]
            try:
                count = os.readv(self._socket.fileno(), (room,))
            except BlockingIOError:
                await self._wait_readable()
                continue
            except OSError as error:
                raise SessionBroken(f"the connection broke ({error.strerror})") from error
            if count:
                self._end = self._restore() + count
                return self._end
            if rest:
                raise SessionBroken("the connection ended in mid-message")
            return 0

    async def _wait_readable(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self._socket.fileno())
        except (trio.ClosedResourceError, OSError, ValueError) as error:
            raise SessionBroken("the connection was closed") from error
        self._turn = time.monotonic() + TURN

    def _restore(self) -> int:
        rest = len(self._rest)
        self._buffers.receive[:rest] = self._rest
        self._rest.clear()
        self._end = rest
        return rest

    def _decrypt(self, sink: Sink) -> None:
        """The whole messages in the receive buffer, or as many as the turn allows; keeps the rest.

        Any error, the sink's too, breaks the session: some of the messages have been handed out.
        """
        try:
            self._hand_out(sink)
        except InvalidTag as error:
            self._break("a message that does not verify")
            raise SessionBroken("a message that does not verify") from error
        except BaseException as error:
            self._break(str(error) or type(error).__name__)
            raise

    def _hand_out(self, sink: Sink) -> None:
        wire, plain, end = self._buffers.receive, self._buffers.plain, self._end
        decrypt_into, number, start = self._open.decrypt_into, self._received, 0
        room, used = sink.room(), 0  # what was decrypted to its place is told at once, afterwards
        while end - start >= PREFIX:
            size = (wire[start] << 8) | wire[start + 1]
            body = start + PREFIX
            count = size - TAG
            if count < 0:
                raise SessionBroken("a message shorter than its tag")
            if end - body < size:
                break
            if number >= MAX_NONCE:
                raise SessionBroken("the nonces of the other side are used up")
            start = body + size
            if 0 < count <= len(room) - used:
                decrypt_into(nonce(number), wire[body:start], None, room[used : used + count])
                used += count
            else:
                if used:
                    sink.filled(used)
                decrypt_into(nonce(number), wire[body:start], None, plain[:count])
                sink.feed(plain[:count])
                room, used = sink.room(), 0
                if time.monotonic() >= self._turn:
                    number += 1
                    break
            number += 1
        if used:
            sink.filled(used)
        self._received = number
        self._rest += wire[start:end]

    async def read(self, n: int | None = None) -> bytes:
        """``n`` bytes, fewer only at the end (none given: what there is); before the muxer runs.

        Raises:
            SessionBroken: the connection ended before the first byte, or broke.
        """
        self._usable()
        want = 1 if n is None else n
        collector = _Collector(self._unread)
        while len(self._unread) < want:
            await trio.lowlevel.checkpoint()  # empty messages must not keep the loop for themselves
            if not await self._fill():
                break
            self._decrypt(collector)
        if want and not self._unread:
            raise SessionBroken("the connection ended")
        taken = bytes(self._unread[:n])
        del self._unread[: len(taken)]
        return taken

    # Sending

    async def write(self, data: bytes) -> None:
        await self.finish(self.begin(cut(data), len(data)))

    def begin(self, messages: Iterable[memoryview], size: int) -> Sending:
        """Messages to be sent now, of at most MAX_PLAINTEXT each and ``size`` bytes in all."""
        self._usable()
        return Sending(messages, size, self._sealer, self._socket, self._buffers)

    def advance(self, sending: Sending) -> bool:
        """Hands over what the kernel takes at once; whether that was all.

        Raises:
            SessionBroken: the connection broke.
        """
        try:
            all_taken = sending.step()
        except BaseException as error:  # as in finish()
            sending.end()
            self._break(str(error) or type(error).__name__)
            raise
        if all_taken:
            sending.end()
        return all_taken

    async def finish(self, sending: Sending) -> None:
        """Returns when the kernel has all of it.

        Raises:
            SessionBroken: the connection broke, or stands still.
        """
        mark, since = sending.taken, trio.current_time()
        try:
            while not self.advance(sending):
                if sending.taken - mark >= FRAME_PROGRESS:
                    mark, since = sending.taken, trio.current_time()
                with trio.move_on_at(since + FRAME_STALL) as stall:
                    await self._wait_writable()
                if stall.cancelled_caught:
                    raise SessionBroken(f"the other side took too little for {FRAME_STALL:g} s")
        except BaseException as error:
            # Part of a message may be out, and what was numbered cannot be numbered again.
            sending.end()
            self._break(str(error) or type(error).__name__)
            raise

    async def _wait_writable(self) -> None:
        try:
            await trio.lowlevel.wait_writable(self._socket.fileno())
        except (trio.ClosedResourceError, OSError, ValueError) as error:
            raise SessionBroken("the connection was closed") from error

    def keep_unsent(self, size: int) -> None:
        """Let the kernel take that much more than the network has room for, and no more: what is
        in there is before everything that is said afterwards."""
        try:
            self._socket.setsockopt(IPPROTO_TCP, TCP_NOTSENT_LOWAT, size)
        except OSError:
            pass  # a kernel that does not know it keeps what it likes

    # What the library asks of a session

    def close_now(self) -> None:
        """Closes the socket, without a word and without an await."""
        self._tcp.close_now()

    async def close(self) -> None:
        self.close_now()
        await trio.lowlevel.checkpoint()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._raw.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self._raw.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self._raw.get_connection_type()


class NoiseTransport(StockNoiseTransport):
    """The library's handshake, then our session."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._buffers = Buffers()

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        return self._ours(await super().secure_inbound(conn), conn)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        return self._ours(await super().secure_outbound(conn, peer_id), conn)

    def _ours(self, stock: ISecureConn, conn: IRawConnection) -> ISecureConn:
        return NoiseSession(cast("SecureSession", stock), cast(RawConnection, conn), self._buffers)


class _Collector:
    """Appends to a buffer."""

    def __init__(self, into: bytearray) -> None:
        self._into = into

    def room(self) -> memoryview:
        return _NOTHING

    def filled(self, count: int) -> None:
        raise AssertionError("it has no room")

    def feed(self, data: memoryview) -> None:
        self._into += data


_NOTHING = memoryview(b"")
