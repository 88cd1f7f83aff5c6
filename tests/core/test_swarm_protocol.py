"""What a swarm machine answers to single messages, right and wrong ones."""

from __future__ import annotations

import pytest

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core import messages as m
from p2pfl_torrent.core.errors import LocalProtocolError
from p2pfl_torrent.core.manifest import UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.serving import Upload
from p2pfl_torrent.core.swarm import SwarmPolicy
from p2pfl_torrent.core.uploads import UploadPolicy
from tests.core.swarm_world import World, exchanging

B = PeerId("b")
UNKNOWN = UpdateId(b"u" * 32)


def ask(
    world: World,
    number: int,
    *,
    chunk: int = 0,
    block: int = 0,
    count: int = 1,
    update: UpdateId | None = None,
) -> list[ev.Effect]:
    """What a answers to a request of b."""
    update = update if update is not None else world["a"].updates[1]
    request = m.Request(number, update, chunk, block, count)
    return world["a"].swarm.handle(ev.FromFetcher(B, request), world.now)


def reject(number: int, reason: int) -> list[ev.Effect]:
    return [ev.ToFetcher(B, m.Reject(number, reason))]


def drops(effects: list[ev.Effect]) -> list[PeerId]:
    return [effect.peer for effect in effects if isinstance(effect, ev.Drop)]


def test_a_request_is_answered_by_its_blocks() -> None:
    world = exchanging()
    assert ask(world, 5, chunk=1, block=1, count=2) == []
    upload = world["a"].swarm.next_upload(B, world.now)
    size = world["a"].swarm.ledger[world["a"].updates[1]].manifest.entries[1].size
    assert upload == Upload(B, 5, world["a"].updates[1], 1, 128, size - 128)


def test_what_is_not_known_is_rejected() -> None:
    assert ask(exchanging(), 5, update=UNKNOWN) == reject(5, m.REJECT_GONE)


def test_a_chunk_that_is_not_held_is_rejected() -> None:
    world = exchanging()
    world.run(0.1)
    assert ask(world, 5, update=world["b"].updates[1]) == reject(5, m.REJECT_MISSING)


def test_too_many_requests_are_rejected_as_busy_and_the_fetcher_copes() -> None:
    policy = SwarmPolicy(uploads=UploadPolicy(max_queued=2))
    world = exchanging(policy=policy)
    answers = [ask(world, number) for number in range(4)]
    assert answers == [[], [], reject(2, m.REJECT_BUSY), reject(3, m.REJECT_BUSY)]
    world = World("ab", policy=policy)
    world.play()
    assert {node.closed[1].closed_by for node in world.peers} == {"complete"}
    world.run(5.0)
    assert world.unanswered() == 0


def test_a_cancelled_request_is_rejected_unless_its_piece_is_under_way() -> None:
    world = exchanging()
    for number in (5, 6):
        ask(world, number)
    swarm = world["a"].swarm
    assert isinstance(swarm.next_upload(B, world.now), Upload)
    assert swarm.handle(ev.FromFetcher(B, m.Cancel(5)), world.now) == []
    cancel = ev.FromFetcher(B, m.Cancel(6))
    assert swarm.handle(cancel, world.now) == reject(6, m.REJECT_CANCELLED)
    assert swarm.handle(cancel, world.now) == []  # answered once
    swarm.serving.uploaded(B, 128, world.now)
    assert swarm.next_upload(B, world.now) is None


def test_an_update_pruned_while_its_request_waits_blocks_no_slot() -> None:
    world = exchanging()
    swarm = world["a"].swarm
    own = swarm.ledger[world["a"].updates[1]]
    ask(world, 5)
    swarm.ledger.forget(own.manifest.update)
    assert swarm.next_upload(B, world.now) == m.Reject(5, m.REJECT_GONE)
    swarm.ledger.add(own.manifest, own.held)
    ask(world, 6)
    assert isinstance(swarm.next_upload(B, world.now), Upload)


def test_a_new_stream_owes_nothing_of_the_one_it_replaces() -> None:
    world = exchanging()
    ask(world, 5)
    ask(world, 6)
    assert isinstance(world["a"].swarm.next_upload(B, world.now), Upload)
    world["a"].swarm.handle(ev.FetcherOpened(B), world.now)
    assert world["a"].swarm.next_upload(B, world.now) is None
    ask(world, 5)
    assert isinstance(world["a"].swarm.next_upload(B, world.now), Upload)


@pytest.mark.parametrize(
    "where",
    [(9, 0, 1), (0, 3, 1), (0, 1, 3), (0, 0, 0xFFFF), (0xFFFF, 0, 1)],
    ids=str,
)
def test_a_request_outside_the_update_costs_the_connection(where: tuple[int, int, int]) -> None:
    chunk, block, count = where
    assert drops(ask(exchanging(), 5, chunk=chunk, block=block, count=count)) == [B]


def test_a_number_that_is_open_may_not_be_used_again() -> None:
    world = exchanging()
    ask(world, 5)
    assert drops(ask(world, 5)) == [B]


@pytest.mark.parametrize("gossip", [True, False], ids=["gossip", "no gossip"])
@pytest.mark.parametrize("seed", range(4))
def test_every_request_gets_exactly_one_answer(seed: int, gossip: bool) -> None:
    """The world asserts that no request is answered twice; here, that none is forgotten."""
    world = World("abcde", seed=seed, rate=4_000.0, gossip=gossip)
    world.begin(1)
    for name in "abcde":
        world.publish(name)
    world.run(0.3 + seed / 10)
    world.unlink("a", "b")
    world.run(0.2)
    world.link("b", "a")
    world.run(30.0)
    assert all(1 in node.closed for node in world.peers)
    assert world.unanswered() == 0


def test_an_update_is_taken_only_in_its_round_and_while_training() -> None:
    world = World("ab")
    manifest = world.update("a", 2)
    with pytest.raises(LocalProtocolError, match="round 2"):
        world.feed("a", ev.UpdateReady(manifest))
    world.begin(2)
    world.feed("a", ev.UpdateReady(manifest))
    with pytest.raises(LocalProtocolError, match="exchanging"):
        world.feed("a", ev.UpdateReady(manifest))


def test_a_large_manifest_is_gossiped_by_its_header_and_pulled() -> None:
    slow = SwarmPolicy(gossip_interval=0.0)  # before an edge can have brought a chunk
    world = World("abc", edges=["ab", "bc"], block_size=4, policy=slow)
    world.play()
    for node in world.peers:
        (published,) = node.sent(ev.PublishManifest)
        assert len(published.data) < 512
    assert len({node.counts(1) for node in world.peers}) == 1
    assert len(world["a"].counts(1)) == 3


def test_a_machine_sleeps_until_something_is_due() -> None:
    """No timer in the past, which would spin a shell."""
    world = World("ab", rate=50.0)
    world.begin(1)
    for name in "ab":
        world.publish(name)
    world.run(3.0)
    fed = world.fed
    world.run(20.0)
    assert world.fed - fed < 300


def test_a_newcomer_known_by_its_manifest_first_counts_once_it_is_a_member() -> None:
    world = exchanging()
    world.add("z")
    manifest = world.update("z", 1)
    world.feed("a", ev.ManifestGossip(B, manifest.encode()))
    assert manifest.update not in world["a"].swarm.ledger
    world.members("abz")
    assert manifest.update in world["a"].swarm.ledger
