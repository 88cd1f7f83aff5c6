"""The Noise session: the library's handshake and wire format, without its copies and awaits.

The library turns every 64 KiB into half a dozen copies, three awaits and a task switch. Here what
the socket has is decrypted straight to where it belongs, and what is to be sent is encrypted
straight into the buffer that the socket reads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from socket import IPPROTO_TCP, TCP_NOTSENT_LOWAT
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
"""Bytes taken from a socket at a time: eight messages, so that a system call pays."""

SMALL_BUFFER = PREFIX + MAX_MESSAGE  # one message
SEND_BUFFER = 8 * SMALL_BUFFER
"""Ciphertext made before it is handed to the socket."""

BIG_BUFFERS = 16
"""Senders that may hold a SEND_BUFFER at a time. Peers that read nothing keep theirs for
FRAME_STALL, so the rest of 512 connections get a SMALL_BUFFER: 40 MiB in all instead of 256."""

SPARE_BUFFERS = 4  # of each size, kept for the next sender

TURN = 0.002
"""Seconds that one connection is read before the other tasks have their turn. In seconds, since
a message of 12 byte frames costs a hundred times the CPU of one with a piece in it."""

PROGRESS = 64 << 10
"""Bytes that must leave within FRAME_STALL."""


class SessionBroken(ConnectionClosedError):
    """The connection is of no more use; the text says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, transport="tcp")


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


class Buffers:
    """Memory that the sessions of one host share, so that an idle connection holds none.

    Attributes:
        receive: used by one session at a time, between two of its awaits.
        plain: a message's plaintext, likewise.
    """

    def __init__(self) -> None:
        self.receive = memoryview(bytearray(RECEIVE_BUFFER))
        self.plain = memoryview(bytearray(MAX_PLAINTEXT))
        self._spare: dict[int, list[memoryview]] = {SMALL_BUFFER: [], SEND_BUFFER: []}
        self._big = 0

    def borrow(self, size: int) -> memoryview:
        """Until ``give_back``, a buffer to send ``size`` bytes from, all or a part at a time."""
        big = size > MAX_PLAINTEXT // 2 and self._big < BIG_BUFFERS
        self._big += big
        spare = self._spare[length := SEND_BUFFER if big else SMALL_BUFFER]
        return spare.pop() if spare else memoryview(bytearray(length))

    def give_back(self, buffer: memoryview) -> None:
        self._big -= len(buffer) == SEND_BUFFER
        spare = self._spare[len(buffer)]
        if len(spare) < SPARE_BUFFERS:
            spare.append(buffer)


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
        self._seal: ChaCha20Poly1305 = sending.cipher.cipher
        self._open: ChaCha20Poly1305 = receiving.cipher.cipher
        self._sent: int = sending.n
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
                decrypt_into(_nonce(number), wire[body:start], None, room[used : used + count])
                used += count
            else:
                if used:
                    sink.filled(used)
                decrypt_into(_nonce(number), wire[body:start], None, plain[:count])
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
        await self.send(cut(data), len(data))

    async def send(self, messages: Iterable[memoryview], size: int) -> None:
        """Sends ``messages``, ``size`` bytes in all: returns when the kernel has them.

        Args:
            messages: each at most MAX_PLAINTEXT; taken one at a time, when it can be encrypted.

        Raises:
            SessionBroken: the connection broke, or stands still.
        """
        self._usable()
        buffer = self._buffers.borrow(size)
        used = 0
        try:
            for message in messages:
                with message:
                    used += self._encrypt(message, buffer[used:])
                if len(buffer) - used < SMALL_BUFFER:
                    await self._send_all(buffer[:used])
                    used = 0
            await self._send_all(buffer[:used])
        except BaseException as error:
            # Part of a message may be out, and what was numbered cannot be numbered again.
            self._break(str(error) or type(error).__name__)
            raise
        finally:
            self._buffers.give_back(buffer)

    def _encrypt(self, message: memoryview, out: memoryview) -> int:
        if self._sent >= MAX_NONCE:
            raise SessionBroken("our nonces are used up")
        size = len(message) + TAG
        out[0], out[1] = size >> 8, size & 0xFF
        self._seal.encrypt_into(_nonce(self._sent), message, None, out[PREFIX : PREFIX + size])
        self._sent += 1
        return PREFIX + size

    async def _send_all(self, data: memoryview) -> None:
        mark, since = 0, trio.current_time()
        sent = 0
        while sent < len(data):
            try:
                sent += os.write(self._socket.fileno(), data[sent:])
                continue
            except BlockingIOError:
                pass
            except OSError as error:
                raise SessionBroken(f"the connection broke ({error.strerror})") from error
            if sent - mark >= PROGRESS:
                mark, since = sent, trio.current_time()
            with trio.move_on_at(since + FRAME_STALL) as stall:
                try:
                    await trio.lowlevel.wait_writable(self._socket.fileno())
                except (trio.ClosedResourceError, OSError, ValueError) as error:
                    raise SessionBroken("the connection was closed") from error
            if stall.cancelled_caught:
                raise SessionBroken(f"the other side took too little for {FRAME_STALL:g} s")

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


def cut(data: bytes | bytearray | memoryview) -> Iterator[memoryview]:
    """``data`` in pieces of one message each."""
    view = memoryview(data)
    for start in range(0, len(view), MAX_PLAINTEXT):
        yield view[start : start + MAX_PLAINTEXT]


def _nonce(number: int) -> bytes:
    return b"\0\0\0\0" + number.to_bytes(8, "little")
