"""What a Noise session sends: its messages, encrypted straight into the buffer the socket reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from libp2p.io.exceptions import ConnectionClosedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from trio.socket import SocketType

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


class SessionBroken(ConnectionClosedError):
    """The connection is of no more use; the text says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, transport="tcp")


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


class Sealer:
    """Encrypts messages, each with the next number.

    Attributes:
        number: of the next one.
    """

    def __init__(self, cipher: ChaCha20Poly1305, number: int) -> None:
        self._encrypt_into = cipher.encrypt_into
        self.number = number

    def seal(self, message: memoryview, out: memoryview) -> int:
        """The message as it goes on the wire, to the start of ``out``; its bytes there.

        Raises:
            SessionBroken: the numbers are used up.
        """
        if self.number >= MAX_NONCE:
            raise SessionBroken("our nonces are used up")
        size = len(message) + TAG
        out[0], out[1] = size >> 8, size & 0xFF
        self._encrypt_into(nonce(self.number), message, None, out[PREFIX : PREFIX + size])
        self.number += 1
        return PREFIX + size


class Sending:
    """Messages on their way to the kernel, as far as it has room for them.

    Attributes:
        taken: bytes that the kernel has.
    """

    __slots__ = (
        "_buffer",
        "_buffers",
        "_messages",
        "_sealer",
        "_socket",
        "_start",
        "_used",
        "taken",
    )

    def __init__(
        self,
        messages: Iterable[memoryview],
        size: int,
        sealer: Sealer,
        socket: SocketType,
        buffers: Buffers,
    ) -> None:
        """``messages`` are taken one at a time, when they can be encrypted; ``size`` in all."""
        self._messages = iter(messages)
        self._sealer = sealer
        self._socket = socket
        self._buffers = buffers
        self._buffer: memoryview | None = buffers.borrow(size)
        self._start = self._used = 0  # what is encrypted and not taken
        self.taken = 0

    def step(self) -> bool:
        """Hands over what the kernel takes; whether that was all.

        Raises:
            SessionBroken: it takes nothing any more.
        """
        assert self._buffer is not None  # not over yet
        while self._start < self._used or self._encrypt(self._buffer):
            try:
                count = os.write(self._socket.fileno(), self._buffer[self._start : self._used])
            except BlockingIOError:
                return False
            except OSError as error:
                raise SessionBroken(f"the connection broke ({error.strerror})") from error
            self._start += count
            self.taken += count
        return True

    def _encrypt(self, buffer: memoryview) -> bool:
        self._start = self._used = 0
        for message in self._messages:
            with message:
                self._used += self._sealer.seal(message, buffer[self._used :])
            if len(buffer) - self._used < SMALL_BUFFER:
                break
        return self._used > 0

    def end(self) -> None:
        """Give the buffer back."""
        if self._buffer is not None:
            self._buffers.give_back(self._buffer)
            self._buffer = None


def cut(data: bytes | bytearray | memoryview) -> Iterator[memoryview]:
    """``data`` in pieces of one message each."""
    view = memoryview(data)
    for start in range(0, len(view), MAX_PLAINTEXT):
        yield view[start : start + MAX_PLAINTEXT]


def nonce(number: int) -> bytes:
    """Of a message with this number."""
    return b"\0\0\0\0" + number.to_bytes(8, "little")
