"""The members protocol: bounds on a scripted stream, then real hosts and real signatures."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.joining import (
    MAX_MESSAGE,
    PROTOCOL_ID,
    Alive,
    Answer,
    Join,
    Probe,
    Question,
    Refused,
    Statements,
    Sync,
    answer_sync,
    encode,
    first_sync,
    second_sync,
)
from p2pfl_torrent.core.membership import Membership
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.exchange.ports import EdgeClosedError
from p2pfl_torrent.overlay.host import Host, open_host
from p2pfl_torrent.overlay.identity import Identity, verify
from p2pfl_torrent.overlay.stream import Stream
from p2pfl_torrent.peer.adapters import StreamPort
from p2pfl_torrent.protocols.members import (
    IDLE_SECONDS,
    LENGTH,
    MAX_PER_SECOND,
    ask,
    serve_members,
)
from tests.exchange.member_drivers import genesis
from tests.overlay.hosts import LOOPBACK, PATIENCE

QUESTION = Probe(bytes(32), b"")


class ScriptedStream:
    """A ByteStream whose other side has said all it will say; then silence, or the end."""

    remote = PeerId("remote")

    def __init__(self, said: bytes, *, ends: bool = True) -> None:
        self._said = bytearray(said)
        self._ends = ends
        self.written = bytearray()
        self.was_reset = False

    async def read_exactly(self, count: int, timeout: float | None = None) -> bytearray:
        await trio.lowlevel.checkpoint()
        if len(self._said) < count:
            if not self._ends:
                await trio.sleep(math.inf if timeout is None else timeout)
            raise EdgeClosedError("end of stream")
        data, self._said = self._said[:count], self._said[count:]
        return data

    async def write(
        self, data: bytes | bytearray | memoryview, timeout: float | None = None
    ) -> None:
        await trio.lowlevel.checkpoint()
        self.written += data

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        self.was_reset = True


def frame(body: bytes) -> bytes:
    return LENGTH.pack(len(body)) + body


def no(question: Question, sender: PeerId) -> Answer:
    return Refused(f"no, {sender}")


async def test_each_question_gets_one_answer(autojump_clock: MockClock) -> None:
    stream = ScriptedStream(3 * frame(encode(QUESTION)))
    await serve_members(stream, no)
    assert stream.written == 3 * frame(encode(Refused("no, remote")))
    assert stream.was_reset


async def test_who_asks_too_fast_waits(autojump_clock: MockClock) -> None:
    stream = ScriptedStream(100 * frame(encode(QUESTION)))
    began = trio.current_time()
    await serve_members(stream, no)
    assert trio.current_time() - began == pytest.approx(100 / MAX_PER_SECOND)


async def test_an_idle_stream_is_closed(autojump_clock: MockClock) -> None:
    stream = ScriptedStream(b"", ends=False)
    began = trio.current_time()
    await serve_members(stream, no)
    assert trio.current_time() - began == pytest.approx(IDLE_SECONDS)
    assert stream.was_reset


@pytest.mark.parametrize(
    "said",
    [
        LENGTH.pack(MAX_MESSAGE + 1),
        LENGTH.pack(0),
        frame(b"\xc1"),
        frame(encode(Refused("an answer is no question"))),
        frame(encode(QUESTION)) + frame(b"\x00"),
    ],
)
async def test_nonsense_resets_the_stream_and_names_its_author(
    said: bytes, autojump_clock: MockClock
) -> None:
    stream = ScriptedStream(said)
    with pytest.raises(RemoteProtocolError) as caught:
        await serve_members(stream, no)
    assert caught.value.peer == "remote"
    assert stream.was_reset


async def test_a_question_that_blames_its_sender(autojump_clock: MockClock) -> None:
    def offended(question: Question, sender: PeerId) -> Answer:
        raise RemoteProtocolError("statement of another swarm")

    with pytest.raises(RemoteProtocolError, match="remote: statement of another"):
        await serve_members(ScriptedStream(frame(encode(QUESTION))), offended)


async def test_an_answer_that_does_not_come_or_is_none(autojump_clock: MockClock) -> None:
    with pytest.raises(EdgeClosedError):
        await ask(ScriptedStream(b""), QUESTION, 3.0)
    with pytest.raises(EdgeClosedError):
        await ask(ScriptedStream(b"", ends=False), QUESTION, 3.0)
    with pytest.raises(RemoteProtocolError):
        await ask(ScriptedStream(frame(encode(QUESTION))), QUESTION, 3.0)
    assert await ask(ScriptedStream(frame(encode(Refused("no")))), QUESTION, 3.0) == Refused("no")


# --- on real hosts ---------------------------------------------------------------------------


@asynccontextmanager
async def a_member(seed: int) -> AsyncIterator[tuple[Host, Membership]]:
    """A host that answers for a membership machine with its own key."""
    identity = Identity.ephemeral()
    async with open_host(identity, LOOPBACK) as host:
        machine = Membership(
            local=PeerId(host.peer_id),
            addrs=host.addrs(),
            swarm=genesis().swarm_id,
            seed=1,
            sign=identity.sign,
            verify=verify,
            rng=random.Random(seed),
            now=trio.current_time(),
        )
        machine.set_ready(1)

        def answer(question: Question, sender: PeerId) -> Answer:
            assert not isinstance(question, Join)
            machine.received(question.news, sender, trio.current_time())
            if isinstance(question, Sync):
                return answer_sync(machine.census, question)
            return Alive(machine.record())

        async def serve(stream: Stream) -> None:
            await serve_members(StreamPort(stream), answer)

        host.set_handler(PROTOCOL_ID, serve)
        yield host, machine


async def test_two_real_members_learn_of_each_other_on_one_stream() -> None:
    async with a_member(1) as (host, ours), a_member(2) as (other, theirs):
        await host.connect(other.peer_id, other.addrs(), PATIENCE)
        stream = StreamPort(await host.open_stream(other.peer_id, PROTOCOL_ID, PATIENCE))
        swarm = ours.census.swarm
        answer = await ask(stream, first_sync(swarm, ours.census, b""), PATIENCE)
        assert isinstance(answer, Statements)
        question = second_sync(swarm, ours.census, answer)
        assert question is not None
        answer = await ask(stream, question, PATIENCE)
        assert isinstance(answer, Statements)
        ours.received(answer.news, PeerId(other.peer_id), trio.current_time())
        assert ours.digest() == theirs.digest()
        assert ours.roster() == theirs.roster()
        assert {member.addrs for member in ours.roster()} == {host.addrs(), other.addrs()}

        alive = await ask(stream, Probe(swarm, b""), PATIENCE)
        assert alive == Alive(theirs.record())
        await stream.reset()
