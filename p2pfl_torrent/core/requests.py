"""Requests under way: per holder those that wait for their answer, per chunk who was asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.rates import RateMeter

Key = tuple[UpdateId, int]
"""An update's chunk."""

MAX_NUMBER = 0xFFFFFFFF  # a request's number is 32 bits on the wire


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """Blocks asked of one holder.

    Attributes:
        number: unique among the requests of its holder.
        size: bytes of the ``count`` blocks from ``block`` on.
        sent_at: when it was handed to the caller, seconds.
        expected: seconds after which its answer was expected then.
    """

    peer: PeerId
    number: int
    update: UpdateId
    chunk: int
    block: int
    count: int
    size: int
    sent_at: float
    expected: float

    @property
    def key(self) -> Key:
        """The chunk it is part of."""
        return self.update, self.chunk

    @property
    def blocks(self) -> range:
        """The blocks it asks for."""
        return range(self.block, self.block + self.count)

    @property
    def due(self) -> float:
        """When its answer was expected."""
        return self.sent_at + self.expected


class Begun:
    """A chunk of which a block is here or was asked for, but not all are here.

    One byte a block (free, HERE, or the number of open requests that cover it), so that the next
    free block is found in C.
    """

    __slots__ = ("_blocks", "_left", "requests")

    HERE = 0xFF

    def __init__(self, num_blocks: int, here: Iterable[int] = ()) -> None:
        self._blocks = bytearray(num_blocks)
        self._left = num_blocks
        self.requests: dict[tuple[PeerId, int], BlockRequest] = {}
        for block in here:
            self.verified(block)

    def is_here(self, block: int) -> bool:
        """Whether a block is verified."""
        return self._blocks[block] == self.HERE

    @property
    def complete(self) -> bool:
        """Whether every block is verified."""
        return self._left == 0

    @property
    def has_free(self) -> bool:
        """Whether a block is neither here nor asked for."""
        return 0 in self._blocks

    def free(self, limit: int) -> tuple[int, int]:
        """(first, number) of the first run of at most ``limit`` free blocks; number 0 if none."""
        start = self._blocks.find(0)
        if start < 0:
            return 0, 0
        stop = start + 1
        while stop < len(self._blocks) and stop - start < limit and not self._blocks[stop]:
            stop += 1
        return start, stop - start

    def missing(self, blocks: range, limit: int, askers: int) -> tuple[int, int]:
        """As ``free``, within ``blocks``, of those not here with fewer than ``askers`` requests."""
        start = count = 0
        for block in blocks:
            if self._blocks[block] < askers:
                start = block if not count else start
                count += 1
                if count == limit:
                    break
            elif count:
                break
        return start, count

    def asked(self, request: BlockRequest) -> None:
        """A request for some of its blocks was sent."""
        self.requests[request.peer, request.number] = request
        for block in request.blocks:
            if not self.is_here(block):
                self._blocks[block] += 1

    def closed(self, request: BlockRequest) -> None:
        """A request was answered or given up."""
        del self.requests[request.peer, request.number]
        for block in request.blocks:
            if not self.is_here(block):
                self._blocks[block] -= 1

    def verified(self, block: int) -> bool:
        """A block is here; False if it was before."""
        if self.is_here(block):
            return False
        self._blocks[block] = self.HERE
        self._left -= 1
        return True

    def superfluous(self) -> list[BlockRequest]:
        """Open requests of which every block is here."""
        return [r for r in self.requests.values() if all(map(self.is_here, r.blocks))]

    def validate(self) -> None:
        """Check the invariants; for tests."""
        assert not self.complete
        covering = bytearray(len(self._blocks))
        for request in self.requests.values():
            assert not all(map(self.is_here, request.blocks))
            for block in request.blocks:
                covering[block] += 1
        here = 0
        for block, askers in enumerate(self._blocks):
            here += askers == self.HERE
            assert askers in (self.HERE, covering[block])
        assert here == len(self._blocks) - self._left


class Pipeline:
    """Requests to one holder, in the order in which it answers.

    A request ends by its piece or reject. One that was given up (cancelled, or expired) is no
    longer counted on, but its answer is still to come.

    Attributes:
        open: requests that are counted on, oldest first, by number.
        given_up: requests whose answer no longer matters but is still to come, by number.
        in_flight: bytes of the open ones.
        resting_until: a holder that said it is busy is left alone until then, seconds.
    """

    __slots__ = (
        "_answering_since",
        "_expired",
        "_next_number",
        "given_up",
        "in_flight",
        "meter",
        "open",
        "resting_until",
    )

    def __init__(self) -> None:
        self.open: dict[int, BlockRequest] = {}
        self.given_up: dict[int, BlockRequest] = {}
        self.in_flight = 0
        self.meter = RateMeter()
        self.resting_until = 0.0
        self._answering_since = 0.0
        self._expired: set[int] = set()
        self._next_number = 0

    @property
    def silent(self) -> bool:
        """Whether it owes an answer to a request that expired: it is asked nothing until then."""
        return bool(self._expired)

    def delay(self, nbytes: int, now: float) -> float:
        """Seconds until ``nbytes`` asked for now are expected, behind all that is in flight."""
        queue = (self.in_flight + nbytes) / self.meter.rate
        return self.meter.lag + queue + self.overdue(now)

    def overdue(self, now: float) -> float:
        """Seconds by which its oldest answer is late."""
        for request in self.open.values():
            return max(0.0, now - request.due)
        return 0.0

    def remaining(self, request: BlockRequest, now: float) -> float:
        """Seconds until an open request is expected; late ones are expected to be as late again."""
        return max(0.0, request.due - now) + self.overdue(now)

    def ask(self, peer: PeerId, key: Key, blocks: range, nbytes: int, now: float) -> BlockRequest:
        """A new request to this holder."""
        if not self.open and not self.given_up:
            self._answering_since = now
        expected = self.meter.lag + (self.in_flight + nbytes) / self.meter.rate
        request = BlockRequest(
            peer, self._next_number, *key, blocks.start, len(blocks), nbytes, now, expected
        )
        self._next_number = (self._next_number + 1) & MAX_NUMBER
        self.open[request.number] = request
        self.in_flight += nbytes
        return request

    def find(self, number: int) -> BlockRequest | None:
        """The request that an answer belongs to, counted on or given up."""
        return self.open.get(number) or self.given_up.get(number)

    def piece(self, request: BlockRequest, now: float) -> bool:
        """The piece of a request came; whether the request was still counted on."""
        since = max(request.sent_at, self._answering_since)
        late = now - request.due + self.meter.lag
        self.meter.arrived(request.size, now - since, late)
        self._answering_since = now
        return self.answered(request)

    def answered(self, request: BlockRequest) -> bool:
        """A request's one answer came; whether the request was still counted on."""
        self._expired.discard(request.number)
        if self.given_up.pop(request.number, None) is not None:
            return False
        del self.open[request.number]
        self.in_flight -= request.size
        return True

    def give_up(self, request: BlockRequest, *, expired: bool) -> None:
        """Count no longer on a request."""
        del self.open[request.number]
        self.in_flight -= request.size
        self.given_up[request.number] = request
        if expired:
            self._expired.add(request.number)

    def gives_up_at(self, patience: float, floor: float) -> float:
        """When the oldest request has waited for too long; infinite with none open."""
        for request in self.open.values():
            # A holder that is answering earlier ones of ours is not late with this one.
            since = max(request.sent_at, self._answering_since)
            return since + max(floor, patience * request.expected)
        return float("inf")

    def validate(self) -> None:
        """Check the invariants; for tests."""
        assert self.in_flight == sum(request.size for request in self.open.values())
        assert self._expired <= self.given_up.keys()
        assert not self.open.keys() & self.given_up.keys()
