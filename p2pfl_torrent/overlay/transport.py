"""TCP under libp2p: listening that notices a taken port, and reads that are exact and bounded."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import trio
from libp2p.abc import IListener, IRawConnection
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

MAX_READ = 128 << 10  # two Noise messages; before the handshake a peer may announce any length
READ_AHEAD = 256 << 10


class ExactTcpStream(TrioTCPStream):
    """A socket whose ``read(n)`` waits for ``n`` bytes (at most ``MAX_READ``) or the end.

    The library reads a Noise message in at most 101 pieces and then drops the connection, which
    64 KiB in segments of less than 650 bytes would reach. Reading ahead also saves it a system
    call and a turn of the event loop for each 2 byte length.
    """

    def __init__(self, stream: trio.SocketStream, open_sockets: set[ExactTcpStream]) -> None:
        super().__init__(stream)
        self._ahead = bytearray()
        self._open_sockets = open_sockets
        open_sockets.add(self)

    async def read(self, n: int | None = None) -> bytes:
        want = MAX_READ if n is None else min(n, MAX_READ)
        enough = 1 if n is None else want
        async with self.read_lock:
            while len(self._ahead) < enough:
                try:
                    data = await self.stream.receive_some(READ_AHEAD)
                except trio.BrokenResourceError as error:
                    raise ConnectionClosedError(
                        "the other side reset the connection", transport="tcp"
                    ) from error
                except trio.ClosedResourceError:  # closed here: the end, as the library has it
                    data = b""
                if not data:
                    break
                self._ahead += data
            taken = bytes(self._ahead[:want])
            del self._ahead[:want]
            return taken

    def take_ahead(self) -> bytearray:
        """What has been read ahead: for who reads the socket itself from now on."""
        ahead, self._ahead = self._ahead, bytearray()
        return ahead

    async def close(self) -> None:
        self._open_sockets.discard(self)
        await super().close()

    def close_now(self) -> None:
        """Closes the socket without a checkpoint: for when everything has been cancelled."""
        self._open_sockets.discard(self)
        self.stream.socket.close()

    async def write(self, data: bytes) -> None:
        async with self.write_lock:
            try:
                await self.stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise ConnectionClosedError("the connection is closed", transport="tcp") from error


class BoundedTcp(TCP):
    """Dials with :class:`ExactTcpStream`; listening is done by :class:`Listener`.

    Attributes:
        open_sockets: every connection's, dialled or accepted, so that none outlives the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open_sockets: set[ExactTcpStream] = set()

    async def _dial_resolved(
        self, maddr: Multiaddr, source: tuple[str, int] | None = None
    ) -> IRawConnection:
        host = maddr.value_for_protocol("ip6" if "/ip6/" in str(maddr) else "ip4")
        port = maddr.value_for_protocol("tcp")
        if host is None or port is None:
            raise OpenConnectionError(f"{maddr} has no TCP address")
        try:
            stream = await trio.open_tcp_stream(host, int(port))
        except OSError as error:
            raise OpenConnectionError(_plain_reason(error)) from error
        return RawConnection(ExactTcpStream(stream, self.open_sockets), True)


def _plain_reason(error: OSError) -> str:
    """trio hides the reason behind "Error connecting to", with a list of one error per address."""
    causes = getattr(error.__cause__, "exceptions", ()) or (error,)
    return "; ".join(
        os.strerror(cause.errno) if cause.errno else cause.strerror or str(cause)
        for cause in causes
        if isinstance(cause, OSError)
    )


class Listener(IListener):
    """Listening sockets of one address. Unlike the library's, without ``SO_REUSEPORT``: with it
    a second process of the same user takes half of the first one's connections, silently."""

    def __init__(self, sockets: list[trio.SocketListener]) -> None:
        self._sockets = sockets
        self._serving = trio.CancelScope()

    @classmethod
    async def bind(cls, host: str, port: int) -> Listener:
        """Raises ``OSError`` when the address cannot be had."""
        return cls(list(await trio.open_tcp_listeners(port, host=host)))

    async def serve(self, handler: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
        """Runs ``handler`` for every connection, until closed. It must not raise."""
        with self._serving:
            await trio.serve_listeners(handler, self._sockets)

    async def listen(self, maddr: Multiaddr) -> None:
        raise NotImplementedError("a Listener is made listening by bind()")

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        return tuple(_multiaddr(one.socket.getsockname()) for one in self._sockets)

    async def close(self) -> None:
        self._serving.cancel()
        for one in self._sockets:
            one.socket.close()


def _multiaddr(address: tuple[str, int]) -> Multiaddr:
    host, port = address[:2]
    return Multiaddr(f"/ip{6 if ':' in host else 4}/{host}/tcp/{port}")
