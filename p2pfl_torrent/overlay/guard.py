"""A libp2p network that strangers cannot crash, fill up or make dial.

What a stock ``Swarm`` does and this one does not: count every inbound connection it ever had
against its limit and keep a task for each; dial by itself, or because somebody asked for a
stream; prune connections at its own discretion; let an exception of a stream handler end the
process.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.transport.upgrader import TransportUpgrader

from p2pfl_torrent.overlay.identity import Identity
from p2pfl_torrent.overlay.limits import HostLimits, TokenBuckets
from p2pfl_torrent.overlay.muxer import YamuxOnly
from p2pfl_torrent.overlay.negotiation import BoundedSelector
from p2pfl_torrent.overlay.noise import NoiseTransport
from p2pfl_torrent.overlay.transport import BoundedTcp, ExactTcpStream
from p2pfl_torrent.overlay.yamux import YamuxConn

if TYPE_CHECKING:
    from libp2p.abc import IMuxedConn, INetConn
    from libp2p.network.connection.swarm_connection import SwarmConn
    from multiaddr import Multiaddr

log = logging.getLogger(__name__)

NO_LIMIT = 10**9  # where the library's own limits are wrong; ours stand in HostLimits
GRACE = 1.0
"""Seconds for telling a peer that we close; a frozen one is not waited for any longer."""


class GuardedSwarm(Swarm):
    """The library's network with the bounds of :class:`HostLimits`."""

    def __init__(self, identity: Identity, limits: HostLimits) -> None:
        keys = create_new_key_pair(identity.seed)
        peer_id = ID.from_pubkey(keys.public_key)
        peerstore = PeerStore()
        peerstore.add_key_pair(peer_id, keys)
        noise = NoiseTransport(keys, noise_privkey=create_new_x25519_key_pair().private_key)
        upgrader = TransportUpgrader({NOISE_ID: noise}, {})
        upgrader.security_multistream._selector = BoundedSelector({NOISE_ID: noise})
        upgrader.muxer_multistream = YamuxOnly(self._admits_stream)
        self._tcp = BoundedTcp()
        super().__init__(
            peer_id,
            peerstore,
            upgrader,
            [self._tcp],
            retry_config=RetryConfig(max_retries=0),
            connection_config=ConnectionConfig(
                max_connections=NO_LIMIT,
                min_connections=0,
                low_watermark=0,
                high_watermark=NO_LIMIT,
                max_connections_per_peer=NO_LIMIT,
                inbound_upgrade_timeout=limits.handshake_timeout,
                outbound_upgrade_timeout=limits.handshake_timeout,
                inbound_stream_protocol_negotiation_timeout=limits.negotiation_timeout,
            ),
        )
        self.auto_connector = _NoAutoConnector(self)
        self.limits = limits
        self._handshaking = 0
        self._inbound_by_ip: dict[str, int] = {}
        self._accepts = TokenBuckets(limits.accepts_per_second, limits.accept_burst)
        self._stream_opens = TokenBuckets(limits.stream_opens_per_second, limits.stream_burst)

    # Connections

    def open_connections(self, peer_id: ID) -> list[SwarmConn]:
        """The usable connections to a peer, oldest first."""
        found = cast("list[SwarmConn]", self.connections.get(peer_id, []))
        return [conn for conn in found if not conn.is_closed]

    def full(self) -> bool:
        """Whether one more connection would be one too many."""
        return len(self.get_connections()) + self._handshaking >= self.limits.connections

    def abandon(self) -> None:
        """Closes all sockets that are still open."""
        for stream in list(self._tcp.open_sockets):
            stream.close_now()

    async def serve(self, socket: trio.SocketStream, maddr: Multiaddr) -> None:
        """Owns one accepted socket from its first byte to its last; never raises."""
        stream = ExactTcpStream(socket, self._tcp.open_sockets)
        address = stream.get_remote_address()
        ip = address[0] if address else "?"
        if not self._admits_address(ip):
            log.debug("refused a connection from %s", ip)
            await stream.close()
            return
        self._inbound_by_ip[ip] = self._inbound_by_ip.get(ip, 0) + 1
        raw = RawConnection(stream, False)
        try:
            self._handshaking += 1
            try:
                muxed = await self.upgrade_inbound_raw_conn(raw, maddr)
            finally:
                self._handshaking -= 1
            await cast(YamuxConn, muxed).event_closed.wait()
        except Exception:
            # Whatever a stranger's bytes made the library raise (it has no common error), the
            # answer is the same: this socket is closed and the others live on.
            log.debug("dropped a connection from %s", ip, exc_info=True)
        finally:
            left = self._inbound_by_ip.pop(ip) - 1
            if left:
                self._inbound_by_ip[ip] = left
            with trio.CancelScope(shield=True):
                await stream.close()

    def _admits_address(self, ip: str) -> bool:
        return (
            not self.full()
            and self._inbound_by_ip.get(ip, 0) < self.limits.connections_per_ip
            and self._accepts.take(ip, trio.current_time())
        )

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> SwarmConn:
        peer_id = muxed_conn.peer_id
        if peer_id == self.self_id:
            await muxed_conn.close()
            raise SwarmException("that address is our own")
        conn = await super().add_conn(muxed_conn, direction)
        for oldest in self.open_connections(peer_id)[: -self.limits.connections_per_peer]:
            self.manager.run_task(self.drop, oldest)
        return conn

    async def drop(self, conn: INetConn) -> None:
        """Closes one connection: in order if the peer listens, else without it."""
        with trio.move_on_after(GRACE) as grace:
            await conn.close()
        if grace.cancelled_caught:
            await cast(YamuxConn, conn.muxed_conn).abort()
            with trio.move_on_after(GRACE):  # the stock close() is idempotent by its own flag
                await cast(YamuxConn, conn.muxed_conn).event_closed.wait()

    # Streams

    def _admits_stream(self, peer_id: ID) -> bool:
        open_now = sum(
            cast(YamuxConn, conn.muxed_conn).inbound_streams()
            for conn in self.open_connections(peer_id)
        )
        return open_now <= self.limits.streams_per_peer and self._stream_opens.take(
            peer_id, trio.current_time()
        )

    # What the library would do by itself

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """Refuses: the overlay decides whom to dial, not whoever wants to open a stream."""
        raise SwarmException(f"not connected to {peer_id}")

    def _schedule_auto_connect(self) -> None:
        pass

    def _schedule_prune(self) -> None:
        pass


class _NoAutoConnector(AutoConnector):
    """Never starts: the stock one dials whom it finds in the peerstore."""

    async def start(self) -> None:
        pass
