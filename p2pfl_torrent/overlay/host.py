"""A libp2p host as this library uses it: Noise and Yamux over TCP, bounded, and never crashing.

async with open_host(Identity.load_or_create(path), ["/ip4/0.0.0.0/tcp/4001"]) as host:
    host.set_handler("/flt/echo/1", handler)
    await host.connect(peer_id, addresses, timeout=10)
    stream = await host.open_stream(peer_id, "/flt/echo/1", timeout=10)
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import trio
from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.basic_host import BasicHost
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.tools.anyio_service import background_trio_service
from libp2p.utils.address_validation import expand_wildcard_address
from multiaddr import Multiaddr
from multiaddr.exceptions import MultiaddrError

from p2pfl_torrent.core.errors import P2PFLError
from p2pfl_torrent.overlay.dialing import DialError, address_of, first_to_answer, why
from p2pfl_torrent.overlay.guard import GRACE, GuardedSwarm
from p2pfl_torrent.overlay.identity import Identity, is_peer_id
from p2pfl_torrent.overlay.limits import HostLimits
from p2pfl_torrent.overlay.negotiation import NEGOTIATION_ERRORS, BoundedCommunicator, propose
from p2pfl_torrent.overlay.stream import Stream, StreamBroken, StreamPipe
from p2pfl_torrent.overlay.transport import Listener

if TYPE_CHECKING:
    from libp2p.network.connection.swarm_connection import SwarmConn

log = logging.getLogger(__name__)

Handler = Callable[[Stream], Awaitable[None]]
PeerCallback = Callable[[str], None]


class HostError(P2PFLError):
    """The host cannot listen as asked; the text says what to change."""


class Host:
    """One peer's end of the network. Made by :func:`open_host`.

    Attributes:
        peer_id: ours.
        limits: what strangers may take from us.
        swarm: the library's network below, for the other parts of this room.
        libp2p: the library's host, likewise.
    """

    def __init__(self, identity: Identity, limits: HostLimits) -> None:
        self.peer_id = identity.peer_id
        self.limits = limits
        self.swarm = GuardedSwarm(identity, limits)
        self.libp2p = _Libp2pHost(self.swarm, disable_identify_address_discovery=True)
        self.swarm.set_stream_handler(self._serve_stream)
        self._links = _Links(self.swarm)
        self.swarm.register_notifee(self._links)
        self._dialling: dict[str, trio.Lock] = {}

    # Who and where

    def addrs(self) -> tuple[str, ...]:
        """The addresses others can dial, each with ``/p2p/`` and our id; wildcards expanded."""
        bound = [addr for one in self.swarm.listeners.values() for addr in one.get_addrs()]
        usable = [str(addr) for wild in bound for addr in _expanded(wild)]
        return tuple(f"{addr}/p2p/{self.peer_id}" for addr in dict.fromkeys(usable))

    def connected(self) -> set[str]:
        """Ids of the peers with an open connection. A frozen peer stays among them: the library
        has no keep-alive, so liveness is decided above."""
        return {str(peer) for peer in self.swarm.connections if self.swarm.open_connections(peer)}

    def on_connect(self, callback: PeerCallback) -> None:
        """Calls ``callback(peer_id)`` when the first connection to a peer opens."""
        self._links.connect_callbacks.append(callback)

    def on_disconnect(self, callback: PeerCallback) -> None:
        """Calls ``callback(peer_id)`` when the last connection to a peer is gone (some 0.2 s)."""
        self._links.disconnect_callbacks.append(callback)

    # Connections

    async def connect(self, peer_id: str, addrs: Sequence[str], timeout: float) -> None:
        """Connects to a peer at the first of its addresses that answers; at once if connected.

        Raises:
            DialError: no address answered within ``timeout`` seconds, or another peer did.
        """
        if not is_peer_id(peer_id):
            raise DialError(f"{peer_id[:80]!r} is not the id of an Ed25519 peer")
        if peer_id == self.peer_id:
            raise DialError(f"{peer_id} is this peer itself")
        lock = self._dialling.setdefault(peer_id, trio.Lock())
        try:
            with trio.fail_after(timeout):
                async with lock:
                    await self._connect(ID.from_base58(peer_id), addrs)
        except trio.TooSlowError:
            raise DialError(f"{peer_id} did not answer within {timeout:g} s") from None
        finally:
            if not lock.locked():
                self._dialling.pop(peer_id, None)

    async def _connect(self, peer: ID, addrs: Sequence[str]) -> None:
        if self.swarm.open_connections(peer):
            return
        if self.swarm.full():
            raise DialError(f"there are {self.limits.connections} connections already")
        if not addrs:
            raise DialError(f"no address of {peer} is known")
        self.swarm.unblock_peer(peer)  # one failed dial blocks a peer for 60 s in the library
        failures = await first_to_answer(addrs, partial(self._dial, peer))
        if failures is not None:
            raise DialError("; ".join(failures))

    async def _dial(self, peer: ID, address: str) -> None:
        maddr = address_of(str(peer), address)
        try:
            await self.swarm.dial_addr(maddr, peer)
        except (BaseLibp2pError, OSError, ValueError) as error:
            whole = address if maddr.get_peer_id() else f"{address}/p2p/{peer}"
            raise DialError(f"{whole}: {why(error)}") from error

    async def disconnect(self, peer_id: str) -> None:
        """Closes every connection to a peer; takes at most about two seconds."""
        async with trio.open_nursery() as nursery:
            for conn in self.swarm.open_connections(ID.from_base58(peer_id)):
                nursery.start_soon(self.swarm.drop, conn)

    # Streams

    def set_handler(self, protocol: str, handler: Handler) -> None:
        """Runs ``handler(stream)`` for every stream a peer opens for ``protocol``.

        The handler owns the stream while it runs: returning closes it, raising resets it. An
        exception is logged and goes no further.
        """

        async def serve(net: INetStream) -> None:
            stream = Stream(cast(NetStream, net), protocol)
            try:
                await handler(stream)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await stream.reset()
                raise
            await stream.close()

        self.libp2p.set_stream_handler(TProtocol(protocol), serve)

    def remove_handler(self, protocol: str) -> None:
        """Refuses ``protocol`` from now on; streams that are open go on."""
        self.libp2p.remove_stream_handler(TProtocol(protocol))

    async def open_stream(self, peer_id: str, protocol: str, timeout: float) -> Stream:
        """A new stream to a connected peer, over its newest connection: one round trip.

        Raises:
            StreamBroken: not connected, or the peer refused, broke off, or did not answer within
                ``timeout`` seconds.
        """
        conns = self.swarm.open_connections(ID.from_base58(peer_id)) if peer_id else []
        if not conns:
            raise StreamBroken(f"not connected to {peer_id}")
        try:
            with trio.fail_after(timeout):
                return await self._open_on(conns[-1], protocol)
        except trio.TooSlowError:
            raise StreamBroken(
                f"{peer_id} did not answer for {protocol} within {timeout:g} s"
            ) from None
        except BaseLibp2pError as error:
            raise StreamBroken(f"{peer_id} broke off the stream for {protocol}") from error

    async def _open_on(self, conn: SwarmConn, protocol: str) -> Stream:
        net = await conn.new_stream()
        agreed = False
        try:
            agreed = await propose(StreamPipe(net), protocol)
        finally:
            if not agreed:
                with trio.CancelScope(shield=True), trio.move_on_after(GRACE):
                    await net.reset()
        if not agreed:
            raise StreamBroken(f"{conn.muxed_conn.peer_id} does not speak {protocol}")
        net.set_protocol(TProtocol(protocol))
        return Stream(net, protocol)

    async def _serve_stream(self, net: INetStream) -> None:
        """Every inbound stream passes here: the border no exception crosses."""
        remote = net.muxed_conn.peer_id
        try:
            protocol, handler = await self.libp2p.multiselect.negotiate(
                BoundedCommunicator(StreamPipe(cast(NetStream, net))),
                int(self.limits.negotiation_timeout),
            )
            if protocol is None or handler is None:
                raise StreamBroken("no protocol")
            net.set_protocol(protocol)
            await handler(net)
        except NEGOTIATION_ERRORS as error:
            log.debug("no protocol agreed with %s: %s", remote, error)
            await _reset(net)
        except (StreamBroken, BaseLibp2pError) as error:
            log.debug("a stream with %s broke: %s", remote, error)
            await _reset(net)
        except Exception:
            # A handler's bug, or bytes the library chokes on: what escapes from here ends the
            # whole process, so it costs this stream instead.
            log.exception("the handler of a stream with %s failed", remote)
            await _reset(net)

    # Life

    async def _bind(self, listen: Sequence[str]) -> list[tuple[Listener, Multiaddr]]:
        bound: list[tuple[Listener, Multiaddr]] = []
        try:
            for text in listen:
                maddr, host, port = _parse_listen(text)
                try:
                    listener = await Listener.bind(host, port)
                except OSError as error:
                    raise _listen_error(host, port, error) from error
                bound.append((listener, maddr))
        except HostError:
            for listener, _ in bound:
                await listener.close()
            raise
        return bound

    async def _close(self) -> None:
        """Says goodbye to all peers at once, and leaves nothing open, in about two seconds."""
        async with trio.open_nursery() as nursery:
            for conn in self.swarm.get_connections():
                nursery.start_soon(self.swarm.drop, conn)
        with trio.move_on_after(GRACE):
            await self.libp2p.close()


@asynccontextmanager
async def open_host(
    identity: Identity, listen: Sequence[str], limits: HostLimits | None = None
) -> AsyncIterator[Host]:
    """A running host, listening on the multiaddresses ``listen`` (none: it only dials).

    Raises:
        HostError: an address is malformed, not ours, or taken; nothing is left behind.
    """
    _quiet_the_library()
    host = Host(identity, limits or HostLimits())
    swarm = host.swarm
    bound = await host._bind(listen)
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            async with background_trio_service(swarm):
                await swarm.event_background_nursery_created.wait()
                for listener, maddr in bound:
                    swarm.listeners[str(maddr)] = listener
                    nursery.start_soon(listener.serve, partial(swarm.serve, maddr=maddr))
                try:
                    yield host
                except BaseException as error:  # noqa: BLE001 - raised again below,
                    failure = error  # outside the nurseries that would wrap it in a group
                finally:
                    with trio.CancelScope(shield=True):
                        await host._close()
        finally:
            nursery.cancel_scope.cancel()
            for listener, _ in bound:
                await listener.close()
            swarm.abandon()  # when cancelled, the tasks that would have closed them are gone
    if failure is not None:
        raise failure


def _quiet_the_library() -> None:
    """py-libp2p logs other peers' faults as errors, and Python prints errors nobody handles: any
    stranger could fill a terminal. Handlers of the program (or ``LIBP2P_DEBUG``) get them all."""
    logger = logging.getLogger("libp2p")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())


class _Libp2pHost(BasicHost):
    """Answers identify, and asks nobody for it: a stream each way on every new connection, for
    addresses and protocols that nothing here reads, was two fifths of what a link cost."""

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        pass


class _Links(INotifee):
    """Turns the library's notices about connections into ours about peers."""

    def __init__(self, swarm: GuardedSwarm) -> None:
        self.swarm = swarm
        self._peers: set[ID] = set()
        self.connect_callbacks: list[PeerCallback] = []
        self.disconnect_callbacks: list[PeerCallback] = []

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        peer = conn.muxed_conn.peer_id
        if peer not in self._peers:
            self._peers.add(peer)
            _tell(self.connect_callbacks, str(peer))

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        peer = conn.muxed_conn.peer_id
        if peer in self._peers and not self.swarm.open_connections(peer):
            self._peers.discard(peer)
            if peer in self.swarm.peerstore.peer_ids():  # else it grows with every stranger
                self.swarm.peerstore.clear_peerdata(peer)
            _tell(self.disconnect_callbacks, str(peer))

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass


def _tell(callbacks: Sequence[PeerCallback], peer_id: str) -> None:
    for callback in callbacks:
        try:
            callback(peer_id)
        except Exception:  # a caller's bug must not keep the next one from hearing of it
            log.exception("a connection callback failed for %s", peer_id)


async def _reset(net: INetStream) -> None:
    with trio.CancelScope(shield=True), trio.move_on_after(GRACE):
        await net.reset()


def _expanded(maddr: Multiaddr) -> list[Multiaddr]:
    """The addresses behind a wildcard, those of the network first, loopback last."""
    for wildcard, loopback in (("/ip4/0.0.0.0/", "/ip4/127.0.0.1/"), ("/ip6/::/", "/ip6/::1/")):
        if str(maddr).startswith(wildcard):
            local = Multiaddr(str(maddr).replace(wildcard, loopback, 1))
            outside = [one for one in expand_wildcard_address(maddr) if one not in (maddr, local)]
            return [*outside, local]
    return [maddr]


def _parse_listen(text: str) -> tuple[Multiaddr, str, int]:
    hint = "write it like /ip4/0.0.0.0/tcp/4001"
    try:
        maddr = Multiaddr(text)
        names = [protocol.name for protocol in maddr.protocols()]
        if len(names) != 2 or names[0] not in ("ip4", "ip6") or names[1] != "tcp":
            raise HostError(
                f"network.listen: {text!r} is not an IP address and a TCP port: {hint}."
            )
        host, port = maddr.value_for_protocol(names[0]), maddr.value_for_protocol("tcp")
    except (MultiaddrError, ValueError) as error:
        raise HostError(f"network.listen: {text!r} is not a multiaddress: {hint}.") from error
    assert host is not None  # both protocols carry a value
    assert port is not None
    return maddr, host, int(port)


def _listen_error(host: str, port: int, error: OSError) -> HostError:
    if error.errno == errno.EADDRINUSE:
        return HostError(
            f"Port {port} on {host} is taken: listen on another (network.listen or --listen), or "
            "on 0 for any that is free."
        )
    return HostError(
        f"Cannot listen on {host} port {port} ({error.strerror or error}): choose an address of "
        "this machine (network.listen or --listen)."
    )
