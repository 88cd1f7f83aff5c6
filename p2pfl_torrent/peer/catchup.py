"""Taking over the swarm's state: for joiners, returners, and peers that missed a round.

Claims are collected from several members at once; the state is fetched from one of those that
claim what most claim, and kept only if its hash is the claimed one.
"""

from __future__ import annotations

import io
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from p2pfl_torrent.core.chunking import checkpoint_layout, decode_chunk
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import Array, ModelSpec, model_hash
from p2pfl_torrent.exchange.ports import ByteStream, EdgeClosedError
from p2pfl_torrent.protocols.state import State, ask_state, fetch_state

MAX_ASKED = 8  # members asked at once: a majority of these is a fair sample of any swarm
ASK_PATIENCE = 10.0  # seconds for a claim
FIRST_PAUSE = 0.2  # seconds between two looks at whether the others have moved on
MAX_PAUSE = 5.0  # seconds; it doubles, as each look is a stream to each of those asked

OpenState = Callable[[PeerId], Awaitable[ByteStream]]
"""Opens a state stream to a member; EdgeClosedError when that fails."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A state that was taken over; ``attested`` if a quorum of the members claimed it."""

    round: int
    base_hash: bytes
    arrays: dict[str, Array]
    attested: bool


class CatchUp:
    """Asks members what round the swarm is in, and takes its start weights from one of them."""

    def __init__(
        self,
        spec: ModelSpec,
        swarm: bytes,
        quorum: float,
        open_state: OpenState,
        rng: random.Random,
    ) -> None:
        self._layout = checkpoint_layout(spec)
        self._swarm = swarm
        self._quorum = quorum
        self._open = open_state
        self._rng = rng

    async def claims(self, members: Sequence[PeerId]) -> dict[PeerId, State]:
        """What some of the members say, drawn at random; those that answer in time."""
        result: dict[PeerId, State] = {}

        async def ask(peer: PeerId) -> None:
            with trio.move_on_after(ASK_PATIENCE):
                try:
                    stream = await self._open(peer)
                    try:
                        claim = await ask_state(stream, self._swarm)
                    finally:
                        await stream.reset()
                except (EdgeClosedError, RemoteProtocolError):
                    return  # it says nothing, and so does not count
                if claim is not None:
                    result[peer] = claim

        async with trio.open_nursery() as nursery:
            for peer in self._rng.sample(members, min(MAX_ASKED, len(members))):
                nursery.start_soon(ask, peer)
        return result

    async def take(
        self, members: Callable[[], Sequence[PeerId]], at_least: int, patience: float
    ) -> Taken | None:
        """The swarm's state of round ``at_least`` or later; None if none came in ``patience`` s.

        Args:
            members: those to ask, looked up anew each time.
        """
        pause = FIRST_PAUSE
        deadline = trio.current_time() + patience
        with trio.move_on_at(deadline):
            while trio.current_time() < deadline:
                asked = members()
                claims = await self.claims(asked)
                for round, base_hash, attested in self._ranked(claims, at_least, asked):
                    for peer, claim in claims.items():
                        if (claim.round, claim.base_hash) == (round, base_hash):
                            arrays = await self.fetch(peer, base_hash)
                            if arrays is not None:
                                return Taken(round, base_hash, arrays, attested)
                await trio.sleep(pause)
                pause = min(MAX_PAUSE, 2 * pause)
        return None

    def reached(self, claims: Mapping[PeerId, State]) -> int:
        """The round that a quorum of those who answered say they have reached; 0 if nobody did.

        One member's word moves nothing, however far it claims to be.
        """
        rounds = sorted((claim.round for claim in claims.values() if claim.round), reverse=True)
        return rounds[max(0, math.ceil(self._quorum * len(rounds)) - 1)] if rounds else 0

    def _ranked(
        self, claims: Mapping[PeerId, State], at_least: int, asked: Sequence[PeerId]
    ) -> list[tuple[int, bytes, bool]]:
        """Claimed states to take: attested ones, then, of rounds that a quorum has reached, others.

        The latest first; among equals what more claim, then whom ``asked`` names first. Where
        every peer has a model of its own nothing is ever attested.
        """
        votes = Counter((claim.round, claim.base_hash) for claim in claims.values())
        need = max(1, math.ceil(self._quorum * min(len(asked), MAX_ASKED)))
        first: dict[tuple[int, bytes], int] = {}
        for place, peer in enumerate(asked):
            if peer in claims:
                first.setdefault((claims[peer].round, claims[peer].base_hash), -place)
        furthest = self.reached(claims)
        ranked = sorted(
            (
                (count >= need, state[0], count, first.get(state, -len(asked)), state[1])
                for state, count in votes.items()
                if state[0] >= at_least and (count >= need or state[0] <= furthest)
            ),
            reverse=True,
        )
        return [(round, h, attested) for attested, round, _, _, h in ranked]

    async def fetch(self, peer: PeerId, base_hash: bytes) -> dict[str, Array] | None:
        """The weights with that hash from a member, None if it has no such thing."""
        buffer = io.BytesIO()
        bound = self._layout.chunks[0].max_file_bytes
        try:
            stream = await self._open(peer)
            try:
                async for part in fetch_state(stream, self._swarm, base_hash, bound):
                    buffer.write(part)
            finally:
                await stream.reset()
            if not buffer.tell():
                return None
            values = decode_chunk(self._layout, 0, buffer.getbuffer())
        except (EdgeClosedError, RemoteProtocolError):
            return None
        slices = self._layout.chunks[0].slices
        spec = self._layout.spec
        arrays = {
            spec.tensors[part.tensor].name: array
            for part, array in zip(slices, values, strict=True)
        }
        matches = await trio.to_thread.run_sync(model_hash, spec, arrays)
        return arrays if matches == base_hash else None
