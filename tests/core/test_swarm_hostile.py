"""A hostile neighbour loses its connection, and costs its victim neither memory nor other peers."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core import messages as m
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.swarm import MAX_OFFENDERS, MAX_PARKED, Swarm
from tests.core.swarm_world import World, exchanging

B = PeerId("b")
UNKNOWN = b"u" * 32


def drops(effects: list[ev.Effect]) -> list[PeerId]:
    return [effect.peer for effect in effects if isinstance(effect, ev.Drop)]


def open_request(world: World) -> tuple[int, int]:
    """(number, bytes) of a request that a has sent to b."""
    sent = [effect.message for effect in world["a"].sent(ev.ToHolder)]
    request = next(message for message in sent if isinstance(message, m.Request))
    known = world["a"].swarm.ledger[UpdateId(request.update)]
    return request.number, known.manifest.block_range(
        request.chunk, request.block, request.count, world.layout.block_size
    )[1]


ANSWERS: dict[str, Callable[[int, int], m.Message]] = {
    "unsolicited": lambda n, size: m.Piece(n + 1000, bytes(size)),
    "too short": lambda n, size: m.Piece(n, bytes(size - 1)),
    "too long": lambda n, size: m.Piece(n, bytes(size + 1)),
    "altered": lambda n, size: m.Piece(n, bytes(size)),
    "reject of nothing": lambda n, size: m.Reject(n + 1000, m.REJECT_MISSING),
    "short bitfield": lambda n, size: m.Availability((m.ChunksOf(UNKNOWN, 1, b"\x80"),)),
    "spare bits": lambda n, size: m.Availability((m.ChunksOf(UNKNOWN, 1, b"\x80\x01"),)),
    "chunk out of range": lambda n, size: m.Have(UNKNOWN, (9,)),
    "malformed manifest": lambda n, size: m.ManifestData(b"\x93\xc4\x00\xc4\x00\xc4\x00"),
    "empty manifest": lambda n, size: m.ManifestData(b""),
    "a question": lambda n, size: m.GetManifest(UNKNOWN),
    "a request": lambda n, size: m.Request(1, UNKNOWN, 0, 0, 1),
    "a second hello": lambda n, size: m.Hello(UNKNOWN, 1, True, b""),
    "a refusal": lambda n, size: m.Refuse(0, ""),
    "a ping": lambda n, size: m.Ping(1),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_wrong_answer_costs_the_connection(name: str) -> None:
    world = exchanging()
    world.run(0.1)
    request = open_request(world)
    swarm = world["a"].swarm
    effects = swarm.handle(ev.FromHolder(B, ANSWERS[name](*request)), world.now)
    assert drops(effects) == [B]
    assert not any(isinstance(effect, (ev.StoreBlocks, ev.ToHolder)) for effect in effects)
    swarm.picker.validate()
    assert swarm.picker.open_requests(B) == 0
    # What else it sends until its streams are closed has no effect, and costs it no more.
    for wrong in ANSWERS.values():
        assert swarm.handle(ev.FromHolder(B, wrong(*request)), world.now) == []
    assert swarm.handle(ev.FromFetcher(B, m.Ping(1)), world.now) == []


@pytest.mark.parametrize(
    "message",
    [
        m.Have(UNKNOWN, (0,)),
        m.Availability(()),
        m.ManifestData(b""),
        m.NoManifest(UNKNOWN),
        m.Reject(0, 0),
        m.Piece(0, b"x"),
        m.Pong(1),
        m.Hello(UNKNOWN, 1, True, b""),
        m.Refuse(0, ""),
    ],
    ids=lambda message: type(message).__name__,
)
def test_an_answer_where_questions_belong_costs_the_connection(message: m.Message) -> None:
    world = exchanging()
    assert drops(world["a"].swarm.handle(ev.FromFetcher(B, message), world.now)) == [B]


def test_each_offence_is_punished_for_longer() -> None:
    swarm = exchanging()["a"].swarm
    seconds = []
    for _ in range(9):
        swarm.handle(ev.HolderOpened(B), 1.0)
        effects = swarm.handle(ev.FromHolder(B, m.Ping(1)), 1.0)
        seconds += [effect.seconds for effect in effects if isinstance(effect, ev.Drop)]
    assert seconds == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]


def test_offenders_do_not_add_up_for_ever() -> None:
    swarm = exchanging()["a"].swarm
    for number in range(MAX_OFFENDERS + 10):
        if number % 1000 == 0:
            swarm.handle(ev.ManifestGossip(B, b""), 1.0)
        swarm.handle(ev.ManifestGossip(PeerId(f"stranger {number}"), b""), 1.0)
    assert len(swarm._strikes) == MAX_OFFENDERS
    (drop,) = (e for e in swarm.handle(ev.ManifestGossip(B, b""), 1.0) if isinstance(e, ev.Drop))
    assert drop.seconds == 60 * 2**5  # whoever goes on is not forgotten


def test_a_late_piece_of_a_request_given_up_is_no_offence() -> None:
    world = exchanging()
    world.run(0.1)
    number, size = open_request(world)
    world.run(250.0)  # past its patience at the rate assumed of an unknown holder
    assert m.Cancel(number) in [effect.message for effect in world["a"].sent(ev.ToHolder)]
    update = world["b"].updates[1]
    known = world["a"].swarm.ledger[update]
    data = next(
        bytes(world["b"].blocks[update, chunk])[:size]
        for chunk in range(len(known.held))
        if known.manifest.entries[chunk].size == size
    )
    effects = world["a"].swarm.handle(ev.FromHolder(B, m.Piece(number, data)), world.now)
    for drop in effects:
        assert not isinstance(drop, ev.Drop) or "altered" in drop.reason


@pytest.mark.parametrize("data", [b"", b"\x00", b"\xc1" * 100, b"\x93", bytes(20_000)], ids=len)
def test_gossip_that_is_no_gossip(data: bytes) -> None:
    world = exchanging()
    assert drops(world["a"].swarm.handle(ev.ManifestGossip(B, data), world.now)) == [B]
    world = exchanging()
    assert drops(world["a"].swarm.handle(ev.AvailabilityGossip(B, data), world.now)) == [B]


def test_an_availability_gossip_of_no_neighbour_is_ignored() -> None:
    world = exchanging()
    body = m.availability_gossip(m.Availability((m.ChunksOf(UNKNOWN, 1, b"\x80\x00"),)))
    assert world["a"].swarm.handle(ev.AvailabilityGossip(PeerId("z"), body), world.now) == []


# --- floods -----------------------------------------------------------------------------------


class Flood:
    """Offers of updates that do not exist, from b to a, and what a keeps of them."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.asked = 0
        self.rng = random.Random(1)

    def send(self, message: m.Message, now: float) -> None:
        effects = self.swarm.handle(ev.FromHolder(B, message), now)
        assert drops(effects) == []
        self.asked += sum(isinstance(effect, ev.ToHolder) for effect in effects)


def test_offers_of_what_does_not_exist_stay_small_and_block_nobody() -> None:
    world = World("abc", edges=["ab", "ac"], gossip=False)
    world.begin(1)
    flood = Flood(world["a"].swarm)
    tracemalloc.start()
    for _ in range(20_000):
        flood.send(m.Have(flood.rng.randbytes(32), (0, 8)), world.now)
    for _ in range(4):
        garbage = (m.ChunksOf(flood.rng.randbytes(32), 1, b"\xff\x80") for _ in range(4096))
        flood.send(m.Availability(tuple(garbage)), world.now)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert flood.asked <= 16
    assert kept < 3 << 20
    for name in "ac":
        world.publish(name)
    world.members("ac", dead="b")
    world.run_until(lambda: 1 in world["a"].closed)  # an honest neighbour is heard all the same
    assert {count[0] for count in world["a"].counts(1)} == {"a", "c"}


def test_offers_taken_back_do_not_add_up() -> None:
    world = exchanging()
    flood = Flood(world["a"].swarm)
    tracemalloc.start()
    for _ in range(5_000):
        update = flood.rng.randbytes(32)
        flood.send(m.Availability((m.ChunksOf(update, 1, b"\xff\x80"),)), world.now)
        flood.send(m.NoManifest(update), world.now)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1 << 18


def test_strangers_manifests_do_not_add_up() -> None:
    world = exchanging()
    swarm = world["a"].swarm
    for number in range(3 * MAX_PARKED):
        stranger = f"z{number}"
        world.add(stranger)
        manifest = world.update(stranger, 1)
        assert drops(swarm.handle(ev.ManifestGossip(B, manifest.encode()), world.now)) == []
    assert len(list(swarm.ledger)) <= 2
    world.members([f"z{number}" for number in range(3 * MAX_PARKED)])
    assert len(list(swarm.ledger)) <= 2 + MAX_PARKED


def test_requests_never_answered_tie_up_neither_blocks_nor_memory() -> None:
    world = World("abc", gossip=True)
    world["b"].killed = True  # but its streams stay up: it takes requests and is silent
    world.begin(1)
    world.publish("c")
    manifest = world.update("b", 1)
    world.feed("a", ev.FromHolder(B, m.ManifestData(manifest.encode())))
    everything = m.Availability((m.ChunksOf(world["c"].updates[1], 1, b"\xff\x80"),))
    world.feed("a", ev.FromHolder(B, everything))
    world.publish("a")
    world.members("ac", dead="b")
    world.run_until(lambda: 1 in world["a"].closed)
    counted = {str(count[0]): len(count[3]) for count in world["a"].counts(1)}
    assert counted == {"a": 9, "c": 9}
    for round in range(2, 30):
        world.run(20.0)
        sent = [e for e in world["a"].sent(ev.ToHolder) if e.peer == B]
        assert len(sent) < 400, round


def hostile() -> st.SearchStrategy[m.Message]:
    # a and b stand for the updates of those peers, whose ids the test puts in.
    updates = st.sampled_from([b"a" * 32, b"b" * 32, UNKNOWN])
    numbers = st.integers(0, 12) | st.just(0xFFFFFFFF)
    chunks = st.integers(0, 10) | st.just(0xFFFF)
    bits = st.binary(min_size=2, max_size=2) | st.just(b"\xff\x80")
    items = st.builds(m.ChunksOf, updates, st.integers(1, 5), bits, st.integers(0, 3))
    return st.one_of(
        st.builds(m.Ping, numbers),
        st.builds(m.Pong, numbers),
        st.builds(m.Have, updates, st.lists(chunks, max_size=4).map(tuple)),
        st.builds(m.Availability, st.lists(items, max_size=3).map(tuple)),
        st.builds(m.GetManifest, updates),
        st.builds(m.ManifestData, st.binary(max_size=40)),
        st.builds(m.NoManifest, updates),
        st.builds(m.Request, numbers, updates, chunks, chunks, st.integers(1, 9)),
        st.builds(m.Cancel, numbers),
        st.builds(m.Reject, numbers, st.integers(0, 3)),
        st.builds(m.Piece, numbers, st.sampled_from([1, 72, 128, 256, 328]).map(bytes)),
    )


def with_real_updates(world: World, message: m.Message) -> m.Message:
    names = {b"a" * 32: world["a"].updates[1], b"b" * 32: world["b"].updates[1]}
    if isinstance(message, m.Availability):
        items = [
            m.ChunksOf(names.get(i.update, i.update), i.round, i.chunks, i.counted_in)
            for i in message.updates
        ]
        return m.Availability(tuple(items))
    if isinstance(message, (m.Have, m.Request, m.GetManifest, m.NoManifest)):
        fields = {name: getattr(message, name) for name in message.__struct_fields__}
        return type(message)(**{**fields, "update": names.get(message.update, message.update)})
    return message


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.booleans(), hostile(), st.floats(0, 20)), max_size=40))
def test_nothing_that_a_peer_sends_raises_or_is_stored(
    script: list[tuple[bool, m.Message, float]],
) -> None:
    world = exchanging()
    world.run(0.1)
    swarm, now = world["a"].swarm, world.now
    for asks, message, pause in script:
        kind = ev.FromFetcher if asks else ev.FromHolder
        effects = swarm.handle(kind(B, with_real_updates(world, message)), now)
        if drops(effects):
            effects += swarm.handle(ev.HolderOpened(B), now)
            effects += swarm.handle(ev.FetcherOpened(B), now)
        now += pause
        effects += swarm.handle(ev.Tick(), now)
        assert not any(isinstance(effect, ev.StoreBlocks) for effect in effects)
        swarm.picker.validate()
        swarm.next_wakeup(now)
