"""What all peers of a swarm agree on, and its hash, the swarm id.

``Terms`` come from each peer's own configuration and model; a ``Genesis`` is the terms with what
the swarm's first peer adds: a nonce that makes this run unique, and the start weights' hash.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, TypeVar

import msgspec

from p2pfl_torrent.core.aggregators import USUAL, AggregationTerms
from p2pfl_torrent.core.errors import LocalProtocolError, RemoteProtocolError

MAX_GENESIS_BYTES = 32768
CRITICAL_SHARE = 0.3  # see config.schema, which has the reason

_T = TypeVar("_T")
_S = TypeVar("_S", bound=msgspec.Struct)

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=7 * 86400)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class TopologyTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Who is whose neighbour.

    Attributes:
        type: star, ring, mesh, tree, full or custom.
        connections: neighbours per peer of a mesh.
        arity: children per node of a tree.
        custom_graph: pairs of a 1-based position in ``members`` (or in the roster where that is
            empty) and its neighbours' positions, sorted.
        members: PeerIds that the custom graph's integers stand for, in order.
        redraw: rounds after which the overlay is drawn anew; 0, which is not encoded, for never.
    """

    type: str
    connections: Count
    arity: Count
    custom_graph: tuple[tuple[int, tuple[int, ...]], ...]
    members: tuple[str, ...]
    redraw: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] = 0


class RoundTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The clock and the completion rule.

    Attributes:
        total: number of rounds of the run.
        client_num: members that round 1 waits for.
        min_members: fewer than these and a round is solo.
        join_timeout: seconds after which round 1 starts with at least min_members.
        train_timeout: seconds of training before the exchange clock starts regardless.
        exchange_timeout: seconds from the quorum's publication to the deadline.
        quorum: share of the live members that must have published to start the exchange clock.
        min_completion_ratio: below it the window is extended once, if that can help.
        max_staleness: rounds by which an update may be late and still count, discounted.
        fill_max_age: rounds for which an owner's last received chunk may fill a missing one.
        max_num_samples: bound on any owner's weight.
        fill: what stands in for a missing chunk: "last", "recycle", "renormalise" or
            "round_start"; not encoded where it is "last".
        fill_decay: factor on such a chunk's weight per round of its age; not encoded where 1.
        critical_share: share of an update's chunks, those ranked highest, with which it is viable;
            not encoded where it is ``CRITICAL_SHARE``.
    """

    total: Count
    client_num: Count
    min_members: Count
    join_timeout: Seconds
    train_timeout: Seconds
    exchange_timeout: Seconds
    quorum: Share
    min_completion_ratio: Share
    max_staleness: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    fill_max_age: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    max_num_samples: Count
    fill: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] = "last"
    fill_decay: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    critical_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = CRITICAL_SHARE


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What each peer brings and all must share.

    Attributes:
        name: the swarm's name.
        mode: who gets whose update, one of ``scope.MODES``.
        aggregator: how updates become one model, by its registered name.
        seed: of everything that all peers must draw alike (the overlay).
        model: the model spec's fingerprint, in a text of the peers' own making.
        layout: digest of the chunk layout.
        compression: ``Compression.name`` of the chunk files; not encoded where it is ``none``.
        aggregation: the aggregator's settings; not encoded where they are the usual ones.
        architecture: what the model is cut along; not encoded where it is ``auto``.
        fragment_share: of the mode ``fragment``, see ``scope.ScopeTerms``; not encoded where 1.
        overlap: whether a round is exchanged while the next is trained, from weights that are one
            round old; not encoded where it is not.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    mode: str
    aggregator: str
    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 53))]
    model: str
    layout: str
    topology: TopologyTerms
    rounds: RoundTerms
    compression: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] = "none"
    aggregation: AggregationTerms = USUAL
    architecture: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] = "auto"
    fragment_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    overlap: bool = False


class Genesis(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A swarm.

    Attributes:
        run_id: a nonce, so that the same configuration run twice makes two swarms.
        creator: the peer that drew it.
        initial_hash: hex model_hash of the start weights.
    """

    terms: Terms
    run_id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    creator: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    initial_hash: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]

    def encode(self) -> bytes:
        """Canonical bytes, as ``encode_terms``."""
        return _canonical(self)

    @property
    def swarm_id(self) -> bytes:
        """SHA-256 of the canonical bytes (32 bytes)."""
        return hashlib.sha256(self.encode()).digest()


def encode_terms(terms: Terms) -> bytes:
    """Canonical bytes: JSON with sorted keys and no spaces, every number in its declared type.

    Raises:
        LocalProtocolError: a value is out of its bounds, so that no peer would accept it.
    """
    return _canonical(terms)


def decode_terms(data: bytes) -> Terms:
    """Terms sent by another peer, bounded and typed; RemoteProtocolError otherwise."""
    return _decode(data, Terms)


def decode_genesis(data: bytes) -> Genesis:
    """A genesis sent by another peer, bounded and typed; RemoteProtocolError otherwise."""
    return _decode(data, Genesis)


def _canonical(value: Terms | Genesis) -> bytes:
    # A struct takes what it is given: 60 for 60.0 would make two swarms of one configuration.
    try:
        checked = msgspec.convert(msgspec.to_builtins(value), type(value))
        return msgspec.json.encode(_usual(checked), order="deterministic")
    except (msgspec.MsgspecError, UnicodeEncodeError) as error:
        raise LocalProtocolError(f"{type(value).__name__} out of bounds ({error})") from error


def _usual(value: _S) -> _S:
    """With the very default wherever it equals it: only so ``omit_defaults`` leaves it out."""
    values = {name: getattr(value, name) for name in value.__struct_fields__}
    same = {
        field.name: field.default
        for field in msgspec.structs.fields(value)
        if values[field.name] == field.default
    }
    inner = {
        name: _usual(part)
        for name, part in values.items()
        if isinstance(part, msgspec.Struct) and name not in same
    }
    return msgspec.structs.replace(value, **inner, **same)


def _decode(data: bytes, kind: type[_T]) -> _T:
    if len(data) > MAX_GENESIS_BYTES:
        raise RemoteProtocolError(f"{kind.__name__} of {len(data)} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"malformed {kind.__name__} ({error})") from error


def difference(ours: Terms, theirs: Terms) -> str:
    """Every key in which two terms differ, as ``rounds.total is 8 here and 10 there``."""
    lines: list[str] = []

    def compare(path: str, a: Any, b: Any) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(a.keys() | b.keys(), key=str):
                compare(f"{path}.{key}" if path else str(key), a.get(key), b.get(key))
        elif a != b:
            lines.append(f"{path} is {_short(a)} here and {_short(b)} there")

    compare("", _whole(ours), _whole(theirs))
    return "; ".join(lines)


def _whole(value: object) -> Any:
    """With what is not encoded, being the default."""
    if isinstance(value, msgspec.Struct):
        return {name: _whole(getattr(value, name)) for name in value.__struct_fields__}
    return msgspec.to_builtins(value)


def _short(value: object) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else text[:24] + "..." + text[-8:]
