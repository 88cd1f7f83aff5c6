"""Negotiating the multiplexer: the standard id, our class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from libp2p.custom_types import TProtocol
from libp2p.protocol_muxer.generic_selector import GenericMultistreamSelector
from libp2p.protocol_muxer.multiselect import DEFAULT_NEGOTIATE_TIMEOUT
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID

from p2pfl_torrent.exchange.spares import Spares
from p2pfl_torrent.overlay.negotiation import BoundedSelector
from p2pfl_torrent.overlay.yamux import StreamGate, YamuxConn

if TYPE_CHECKING:
    from libp2p.abc import IMuxedConn, ISecureConn
    from libp2p.peer.id import ID


class YamuxOnly(MuxerMultistream):
    """Negotiates yamux, and gives a :class:`YamuxConn`; the stock class would give its own."""

    def __init__(self, gate: StreamGate) -> None:
        super().__init__({TProtocol(PROTOCOL_ID): YamuxConn})
        self._gate = gate
        self._spares = Spares()
        self._selector = cast(
            "GenericMultistreamSelector[Any]", BoundedSelector({TProtocol(PROTOCOL_ID): YamuxConn})
        )

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        protocol, _ = await self._selector.select(
            conn, conn.is_initiator, DEFAULT_NEGOTIATE_TIMEOUT
        )
        return self._annotate_connection(
            YamuxConn(conn, peer_id, self._gate, self._spares), conn, protocol
        )
