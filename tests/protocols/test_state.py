"""The state protocol: its vectors, claims and transfers between two ends of a memory stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.exchange.ports import EdgeClosedError
from p2pfl_torrent.protocols.state import (
    PART_BYTES,
    GetState,
    NoState,
    State,
    ask_state,
    fetch_state,
    serve_state,
)

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "state.json").read_text(encoding="utf-8")
)
SWARM, HASH, OTHER = bytes(range(32)), bytes(range(32, 64)), bytes(32)
KEPT = b"\x01" * 32  # of an earlier round


class MemoryStream:
    """One end of a ByteStream in memory."""

    def __init__(self, stream: trio.testing.MemoryReceiveStream, out: Any, remote: str) -> None:
        self._in, self._out = stream, out
        self.remote = PeerId(remote)
        self.was_reset = False

    async def read_exactly(self, count: int, timeout: float | None = None) -> bytearray:
        data = bytearray()
        try:
            while len(data) < count:
                part = await self._in.receive_some(count - len(data))
                if not part:
                    raise EdgeClosedError("end of stream")
                data += part
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise EdgeClosedError("reset") from error
        return data

    async def write(
        self, data: bytes | bytearray | memoryview, timeout: float | None = None
    ) -> None:
        try:
            await self._out.send_all(bytes(data))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise EdgeClosedError("reset") from error

    async def close(self) -> None:
        await self._out.aclose()

    async def reset(self) -> None:
        self.was_reset = True
        await self._out.aclose()
        await self._in.aclose()


def pair() -> tuple[MemoryStream, MemoryStream]:
    to_member, at_member = trio.testing.memory_stream_one_way_pair()
    to_asker, at_asker = trio.testing.memory_stream_one_way_pair()
    return MemoryStream(at_asker, to_member, "member"), MemoryStream(at_member, to_asker, "asker")


class Member:
    """A StateSource; ``parts`` reads later its checkpoint is gone."""

    def __init__(
        self, state: tuple[int, bytes, int] | None, data: bytes = b"", parts: int = 1 << 30
    ) -> None:
        self._state, self._data, self._parts = state, data, parts

    def current_state(self) -> tuple[int, bytes, int] | None:
        return self._state

    def kept_state(self, base_hash: bytes) -> tuple[int, int] | None:
        return (2, len(self._data)) if base_hash == KEPT else None

    def read_state(self, round: int, offset: int, size: int) -> bytes:
        if self._parts == 0:
            raise FileNotFoundError(f"round-{round - 1}.safetensors")
        self._parts -= 1
        return self._data[offset : offset + size]


async def claim_of(member: Member, swarm: bytes = SWARM) -> State | None:
    asker, answerer = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_state, answerer, SWARM, member)
        return await ask_state(asker, swarm)
    raise AssertionError


async def fetched(member: Member, expected: bytes = HASH, bound: int = 1 << 30) -> bytes:
    asker, answerer = pair()
    data = bytearray()
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_state, answerer, SWARM, member)
        try:
            async for part in fetch_state(asker, SWARM, expected, bound):
                data += part
        except (EdgeClosedError, RemoteProtocolError) as error:
            failure = error  # raised below: a nursery would wrap it
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return bytes(data)


def frame(message: dict[str, Any]) -> bytes:
    return bytes.fromhex(message["frame"])


def described(message: GetState | State | NoState) -> dict[str, Any]:
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return {n: value.hex() if isinstance(value, bytes) else value for n, value in fields.items()}


async def test_a_members_claim() -> None:
    assert await claim_of(Member((3, HASH, 1000))) == State(3, HASH, 1000, follows=False)
    assert await claim_of(Member(None)) is None
    assert await claim_of(Member((3, HASH, 1000)), swarm=OTHER) is None


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES + 7])
async def test_a_checkpoint_comes_whole(size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    assert await fetched(Member((3, HASH, size), data)) == data[:size]


async def test_a_member_that_moved_on_sends_nothing() -> None:
    assert await fetched(Member((4, OTHER, 1000), bytes(1000))) == b""
    assert await fetched(Member(None)) == b""


async def test_an_earlier_rounds_start_is_sent_where_it_is_kept() -> None:
    data = bytes(range(256)) * 3000
    assert await fetched(Member((3, HASH, 10), data), KEPT) == data
    assert await claim_of(Member((3, HASH, 10), data)) == State(3, HASH, 10, follows=False)


async def test_a_checkpoint_that_is_gone_in_mid_transfer_ends_the_stream() -> None:
    member = Member((3, HASH, 3 * PART_BYTES), bytes(3 * PART_BYTES), parts=1)
    with pytest.raises(EdgeClosedError):
        await fetched(member)


async def test_a_checkpoint_shorter_than_claimed_ends_the_stream() -> None:
    with pytest.raises(EdgeClosedError):
        await fetched(Member((3, HASH, 1000), bytes(999)))


async def test_more_than_the_model_can_have_is_not_read() -> None:
    with pytest.raises(RemoteProtocolError, match="1001 bytes"):
        await fetched(Member((3, HASH, 1001), bytes(1001)), bound=1000)


@pytest.mark.parametrize("vector", VECTORS["messages"], ids=lambda v: v["name"])
async def test_vectors_are_read_and_written(vector: dict[str, Any]) -> None:
    asker, other = pair()
    fields = vector["fields"]
    if vector["name"] == "GetState":
        member = Member((0, HASH, 0))
        await asker.write(frame(vector))
        await serve_state(other, SWARM, member)
        written: MemoryStream = other
        expected = bytes.fromhex(fields["expected"])
        sent, received = pair()
        async with trio.open_nursery() as nursery:
            if fields["send"]:
                nursery.start_soon(_drain, fetch_state(sent, SWARM, expected, 0))
            else:
                nursery.start_soon(_ignore, ask_state, sent)
            assert bytes(await received.read_exactly(len(frame(vector)))) == frame(vector)
            nursery.cancel_scope.cancel()
        assert not written.was_reset
    else:
        await other.write(frame(vector))
        claim = await ask_state(asker, SWARM)
        assert claim is None if vector["name"] == "NoState" else described(claim) == fields  # type: ignore[arg-type]
        states = {"State": Member((fields.get("round", 0), HASH, fields.get("size", 0)), b"")}
        asker, other = pair()
        await asker.write(frame(_question(send=fields.get("follows", False))))
        async with trio.open_nursery() as nursery:
            member = states.get(vector["name"], Member(None))
            nursery.start_soon(serve_state, other, SWARM, member)
            assert bytes(await asker.read_exactly(len(frame(vector)))) == frame(vector)
            nursery.cancel_scope.cancel()


def _question(*, send: bool) -> dict[str, Any]:
    return next(
        v for v in VECTORS["messages"] if v["name"] == "GetState" and v["fields"]["send"] == send
    )


async def _drain(parts: Any) -> None:
    async for _ in parts:
        pass


async def _ignore(ask: Any, stream: MemoryStream) -> None:
    await ask(stream, SWARM)


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=lambda v: v["why"])
async def test_what_is_no_question_or_claim_is_its_senders_fault(vector: dict[str, Any]) -> None:
    asker, other = pair()
    await asker.write(frame(vector))
    with pytest.raises(RemoteProtocolError) as refused:
        await serve_state(other, SWARM, Member((3, HASH, 0)))
    assert refused.value.peer == "asker"
    asker, other = pair()
    await other.write(frame(vector))
    with pytest.raises(RemoteProtocolError) as refused:
        await ask_state(asker, SWARM)
    assert refused.value.peer == "member"


async def test_an_asker_that_leaves() -> None:
    asker, other = pair()
    await asker.reset()
    with pytest.raises(EdgeClosedError):
        await serve_state(other, SWARM, Member((3, HASH, 0)))
