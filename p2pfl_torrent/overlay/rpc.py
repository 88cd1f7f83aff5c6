"""GossipSub's packets, cut down to what a neighbour may reasonably send before it is acted on.

The bounds matter one by one: an IWANT that names one cached message 20,000 times makes the stock
router copy it 20,000 times; a PRUNE or IHAVE for an invented topic leaves an entry behind for
ever; and a packet that is not a protobuf raises out of it.
"""

from __future__ import annotations

from collections.abc import Container

from google.protobuf.message import DecodeError
from libp2p.pubsub.pb import rpc_pb2

MAX_RPC = 256 << 10
"""Bytes of one packet: a dozen of the largest messages."""

MAX_MESSAGES = 512  # the answer to an IWANT of MAX_IDS small ones
MAX_SUBSCRIPTIONS = 256
MAX_TOPIC = 256  # bytes of a topic's name
MAX_GRAFTS = 64  # and prunes: one per topic shared with a neighbour
MAX_IDS = 512  # message ids in all IHAVE, IWANT and IDONTWANT of one packet, each kind
MAX_ID = 64  # bytes: a PeerId of 38 and a sequence number of 8


class WireError(Exception):
    """A neighbour sent what no working peer sends; its gossip stream is reset."""


def bounded(packet: bytes, topics: Container[str]) -> tuple[rpc_pb2.RPC, int]:
    """The packet, without what is not for us, and how many entries beside messages it had.

    ``topics`` are those we follow. Peer records and suggested peers are cut off unread: the
    overlay learns addresses from membership, and checking one costs two signatures a packet.

    Raises:
        WireError: it is no packet, or exceeds a bound.
    """
    rpc = rpc_pb2.RPC()
    try:
        rpc.ParseFromString(packet)
    except DecodeError as error:
        raise WireError("a gossip packet that is no protobuf") from error
    rpc.ClearField("senderRecord")
    if len(rpc.publish) > MAX_MESSAGES:
        raise WireError("too many messages in one gossip packet")
    if len(rpc.subscriptions) > MAX_SUBSCRIPTIONS or any(
        len(one.topicid) > MAX_TOPIC for one in rpc.subscriptions
    ):
        raise WireError("too many or too long subscriptions in one gossip packet")
    entries = len(rpc.subscriptions)
    if rpc.HasField("control"):
        control = _bounded_control(rpc.control, topics)
        entries += len(control.graft) + len(control.prune)
        entries += sum(len(one.messageIDs) for one in control.iwant)
        rpc.control.CopyFrom(control)
    return rpc, entries


def _bounded_control(
    control: rpc_pb2.ControlMessage, topics: Container[str]
) -> rpc_pb2.ControlMessage:
    kept = rpc_pb2.ControlMessage()
    if len(control.graft) > MAX_GRAFTS or len(control.prune) > MAX_GRAFTS:
        raise WireError("too many grafts or prunes in one gossip packet")
    # A graft for a topic we left must be answered with a prune, so it is kept; it leaves no trace.
    kept.graft.extend(one for one in control.graft if len(one.topicID) <= MAX_TOPIC)
    for prune in control.prune:
        if prune.topicID in topics:
            kept.prune.add(topicID=prune.topicID, backoff=min(prune.backoff, 3600))
    for ihave in control.ihave:
        if ihave.topicID in topics:
            kept.ihave.add(topicID=ihave.topicID, messageIDs=_ids(ihave.messageIDs))
    wanted = _ids([one for iwant in control.iwant for one in iwant.messageIDs])
    if wanted:
        kept.iwant.add(messageIDs=wanted)
    unwanted = _ids([one for idontwant in control.idontwant for one in idontwant.messageIDs])
    if unwanted:
        kept.idontwant.add(messageIDs=unwanted)
    if sum(len(one.messageIDs) for one in kept.ihave) > MAX_IDS:
        raise WireError("too many message ids in one gossip packet")
    return kept


def _ids(ids: object) -> list[bytes]:
    unique = list(dict.fromkeys(ids))  # type: ignore[call-overload]
    if len(unique) > MAX_IDS or any(len(one) > MAX_ID for one in unique):
        raise WireError("too many or too long message ids in one gossip packet")
    return unique
