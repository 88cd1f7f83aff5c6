"""The Noise session: the library's handshake and wire format, without its copies and awaits.

The library turns every 64 KiB into half a dozen copies, three awaits and a task switch. Here what
the socket has is decrypted straight to where it belongs, and what is to be sent is encrypted
straight into the buffer that the socket reads.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol, cast

import trio
from cryptography.exceptions import InvalidTag
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.security.base_session import BaseSession
from libp2p.security.noise.transport import Transport as StockNoiseTransport

from p2pfl_torrent.overlay.limits import FRAME_STALL
from p2pfl_torrent.overlay.transport import ExactTcpStream

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from libp2p.abc import IRawConnection, ISecureConn
    from libp2p.connection_types import ConnectionType
    from libp2p.peer.id import ID
    from libp2p.security.secure_session import SecureSession
    from multiaddr import Multiaddr

TAG = 16
PREFIX = 2  # bytes of a message's length before it
MAX_MESSAGE = 0xFFFF
MAX_PLAINTEXT = MAX_MESSAGE - TAG
MAX_NONCE = 2**64 - 1  # Noise reserves the last one

RECEIVE_BUFFER = 512 << 10
"""Bytes taken from a socket at a time: eight messages, so that a system call pays. Other sizes have
not been compared."""

SEND_BUFFER = 512 << 10
"""Ciphertext made before it is handed to the socket."""

TURN = 1 << 20
"""Bytes read from one connection before the other tasks have their turn."""

PROGRESS = 64 << 10
"""Bytes that must leave within FRAME_STALL."""

SPARE_BUFFERS = 4  # kept for the next sender; more are in use only while more sockets are full


class SessionBroken(ConnectionClosedError):
    """The connection is of no more use; the text says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, transport="tcp")


class Sink(Protocol):
    """Who takes the plaintext."""

    def room(self) -> memoryview:
        """Where the next bytes go, if the sink knows already; a message is decrypted there when
        it fits whole."""
        ...

    def filled(self, count: int) -> None:
        """So many bytes have been written to the start of ``room()``."""
        ...

    def feed(self, data: memoryview) -> None:
        """The next bytes; the view is of no use after the call."""
        ...


class Buffers:
    """Memory that the sessions of one host share, so that an idle connection holds none.

    Attributes:
        receive: used by one session at a time, between two of its awaits.
        plain: a message's plaintext, likewise.
    """

    def __init__(self) -> None:
        self.receive = memoryview(bytearray(RECEIVE_BUFFER))
        self.plain = memoryview(bytearray(MAX_PLAINTEXT))
        self._spare: list[memoryview] = []

    def borrow(self) -> memoryview:
        """A send buffer, until ``give_back``."""
        return self._spare.pop() if self._spare else memoryview(bytearray(SEND_BUFFER))

    def give_back(self, buffer: memoryview) -> None:
        if len(self._spare) < SPARE_BUFFERS:
            self._spare.append(buffer)


class NoiseSession(BaseSession):
    """An authenticated, encrypted connection, taken over from the library after its handshake.

    One task may receive and one send; any error leaves the connection of no use.
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
        self._seal: ChaCha20Poly1305 = sending.cipher.cipher
        self._open: ChaCha20Poly1305 = receiving.cipher.cipher
        self._sent: int = sending.n
        self._received: int = receiving.n
        self._raw = raw
        self._tcp = cast(ExactTcpStream, raw.stream)
        self._socket = self._tcp.stream.socket
        self._buffers = buffers
        self._rest = self._tcp.take_ahead()  # what came and is no whole message
        self._unread = bytearray()  # plaintext for read()

    # Receiving

    async def pump(self, sink: Sink) -> None:
        """Hands all that arrives to ``sink``, until the other side ends the connection in order.

        Raises:
            SessionBroken: it ended in mid-message, or what came is not from the other side.
        """
        if self._unread:
            unread, self._unread = self._unread, bytearray()
            sink.feed(memoryview(unread))
        taken = 0
        while await self._fill():
            taken += self._decrypt(sink)
            if taken >= TURN:
                taken = 0
                await trio.lowlevel.checkpoint()

    async def _fill(self) -> int:
        """Bytes in the receive buffer, at least one more than before; 0 at the end.

        What is in the buffer must be used before the next await: it is shared.
        """
        rest = len(self._rest)
        if rest > PREFIX and rest >= PREFIX + int.from_bytes(self._rest[:PREFIX], "big"):
            return self._restore()  # read ahead during the handshake
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

    def _restore(self) -> int:
        rest = len(self._rest)
        self._buffers.receive[:rest] = self._rest
        self._rest.clear()
        self._end = rest
        return rest

    def _decrypt(self, sink: Sink) -> int:
        """Every whole message in the receive buffer; keeps what is left over; the bytes used."""
        wire, plain, end = self._buffers.receive, self._buffers.plain, self._end
        decrypt_into, number, start = self._open.decrypt_into, self._received, 0
        while end - start >= PREFIX:
            size = (wire[start] << 8) | wire[start + 1]
            if size < TAG:
                raise SessionBroken("a message shorter than its tag")
            body = start + PREFIX
            if end - body < size:
                break
            if number >= MAX_NONCE:
                raise SessionBroken("the nonces of the other side are used up")
            count = size - TAG
            room = sink.room()
            direct = 0 < count <= len(room)
            try:
                decrypt_into(
                    _nonce(number), wire[body : body + size], None,
                    room[:count] if direct else plain[:count],
                )  # fmt: skip
            except InvalidTag as error:
                raise SessionBroken("a message that does not verify") from error
            number += 1
            start = body + size
            if direct:
                sink.filled(count)
            elif count:
                sink.feed(plain[:count])
        self._received = number
        self._rest += wire[start:end]
        return start

    async def read(self, n: int | None = None) -> bytes:
        """``n`` bytes, fewer only at the end (none given: what there is); before the muxer runs.

        Raises:
            SessionBroken: the connection ended before the first byte, or broke.
        """
        want = 1 if n is None else n
        collector = _Collector(self._unread)
        while len(self._unread) < want:
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
        await self.send(data)

    async def send(self, *parts: bytes | bytearray | memoryview) -> None:
        """Sends the parts, each beginning a message: returns when the kernel has all of it.

        Raises:
            SessionBroken: the connection broke, or stands still.
        """
        buffer = self._buffers.borrow()
        used = 0
        try:
            for part in parts:
                view = memoryview(part)
                for start in range(0, len(view), MAX_PLAINTEXT):
                    piece = view[start : start + MAX_PLAINTEXT]
                    if used + PREFIX + len(piece) + TAG > SEND_BUFFER:
                        await self._send_all(buffer[:used])
                        used = 0
                    used += self._encrypt(piece, buffer[used:])
            await self._send_all(buffer[:used])
        finally:
            self._buffers.give_back(buffer)

    def _encrypt(self, piece: memoryview, out: memoryview) -> int:
        if self._sent >= MAX_NONCE:
            raise SessionBroken("our nonces are used up")
        size = len(piece) + TAG
        out[0], out[1] = size >> 8, size & 0xFF
        self._seal.encrypt_into(_nonce(self._sent), piece, None, out[PREFIX : PREFIX + size])
        self._sent += 1
        return PREFIX + size

    async def _send_all(self, data: memoryview) -> None:
        stall = trio.CancelScope()
        mark = 0
        sent = 0
        while sent < len(data):
            try:
                sent += os.write(self._socket.fileno(), data[sent:])
                continue
            except BlockingIOError:
                pass
            except OSError as error:
                raise SessionBroken(f"the connection broke ({error.strerror})") from error
            if stall.deadline == float("inf") or sent - mark >= PROGRESS:
                stall = trio.CancelScope(deadline=trio.current_time() + FRAME_STALL)
                mark = sent
            else:
                stall = trio.CancelScope(deadline=stall.deadline)
            with stall:
                try:
                    await trio.lowlevel.wait_writable(self._socket.fileno())
                except (trio.ClosedResourceError, OSError, ValueError) as error:
                    raise SessionBroken("the connection was closed") from error
            if stall.cancelled_caught:
                raise SessionBroken(f"the other side took nothing for {FRAME_STALL:g} s")

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


def _nonce(number: int) -> bytes:
    return b"\0\0\0\0" + number.to_bytes(8, "little")
