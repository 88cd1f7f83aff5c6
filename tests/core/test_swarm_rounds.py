"""Whole rounds of swarm machines in a simulated world."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.aggregation import discount
from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.pipeline import PickerPolicy
from p2pfl_torrent.core.reports import BlockRefused, DeadlineSet, PeerDropped
from p2pfl_torrent.core.swarm import SwarmPolicy
from p2pfl_torrent.core.tensors import ModelSpec, TensorSpec
from p2pfl_torrent.simulation import EqualLinks
from tests.core.swarm_world import World, terms

RING = ["ab", "bc", "cd", "de", "ef", "fa"]
STAR = ["ab", "ac", "ad", "ae", "af"]


def closings(world: World, names: str, round: int = 1) -> set[str]:
    return {world[name].closed[round].closed_by for name in names}


def agree(world: World, names: str, round: int = 1) -> bool:
    """Whether these peers counted the same and averaged to the same bits."""
    counts = {world[name].counts(round) for name in names}
    return len(counts) == 1 and len({world.aggregate(name, round) for name in names}) == 1


def finish(world: World, names: str, round: int) -> None:
    world.run_until(lambda: all(round in world[name].closed for name in names))


def test_two_peers_exchange_and_close_complete() -> None:
    world = World("ab")
    world.play()
    assert closings(world, "ab") == {"complete"}
    assert world.picture("a") == {"a": "#########", "b": "#########"}
    assert [count[0] for count in world["a"].counts(1)] == ["a", "b"]
    assert agree(world, "ab")
    assert world["a"].closed[1].completeness == 1.0
    assert world["a"].closed[1].missing == ()


@pytest.mark.parametrize("gossip", [True, False], ids=["gossip", "no gossip"])
@pytest.mark.parametrize("edges", [None, RING, STAR], ids=["full", "ring", "star"])
def test_six_peers_end_with_the_same_chunks(edges: list[str] | None, gossip: bool) -> None:
    world = World("abcdef", edges=edges, gossip=gossip)
    world.play()
    assert closings(world, "abcdef") == {"complete"}
    assert all(len(node.counts(1)) == 6 for node in world.peers)
    assert agree(world, "abcdef")
    world.run(5.0)
    assert world.unanswered() == 0


def test_chunks_are_relayed_before_their_update_is_whole() -> None:
    world = World("abcd", edges=["ab", "bc", "cd"], rate=5_000.0)
    world.begin(1)
    world.publish("a")
    world.run_until(lambda: "#" in world.picture("a")["d"])
    assert "." in world.picture("a")["b"]
    assert "." in world.picture("a")["c"]


def test_ten_rounds_run_one_after_the_other() -> None:
    world = World("abcd", edges=["ab", "bc", "cd"])
    for round in range(1, 11):
        world.play(round)
        assert closings(world, "abcd", round) == {"complete"}
        assert agree(world, "abcd", round)
        assert {count[1] for count in world["a"].counts(round)} == {round}


def test_the_same_seed_makes_the_same_history() -> None:
    def history() -> list[str]:
        world = World("abcd", seed=7)
        world.play()
        return [_text(effect) for node in world.peers for effect in node.effects]

    assert history() == history()


def _text(effect: ev.Effect) -> str:
    if isinstance(effect, ev.StoreBlocks):
        return repr(replace(effect, data=bytes(effect.data)))
    return repr(effect)


def test_a_peer_that_dies_in_mid_exchange_is_not_waited_for() -> None:
    world = World("abcde", rate=5_000.0)
    world.begin(1)
    for name in "abcde":
        world.publish(name)
    world.run_until(lambda: any("#" in line for line in list(world.picture("e").values())[:4]))
    world.kill("e")
    world.members("abcd", dead="e")
    died = world.now
    finish(world, "abcd", 1)
    assert closings(world, "abcd") <= {"settled", "complete"}
    assert world.now < died + 10.0  # the deadline is 30 s after the quorum
    assert agree(world, "abcd")
    status = {str(c.manifest.owner): c.status for c in world["a"].closed[1].counts}
    assert status == {**dict.fromkeys("abcd", "complete"), "e": "dead"}


@pytest.mark.parametrize("gossip", [True, False])
def test_the_update_of_who_left_meanwhile_is_learned_from_the_others(gossip: bool) -> None:
    world = World("abc", edges=["bc"], gossip=False)
    world.begin(1)
    world.publish("c")
    world.run(1.0)  # it has all it came for, and goes
    world.unlink("b", "c")
    world.members("ab")
    world.gossip = gossip
    world.link("a", "b")
    if gossip:  # by way of others
        world.feed("a", ev.ManifestGossip(PeerId("c"), world.update("c", 1).encode()))
    for name in "ab":
        world.publish(name)
    finish(world, "ab", 1)
    assert {count[0] for count in world["b"].counts(1)} == {"a", "b", "c"}
    assert agree(world, "ab")


def test_a_silent_member_costs_no_more_than_the_deadline() -> None:
    world = World("abc")
    world.begin(1)
    world.publish("a")
    world.publish("b")
    finish(world, "ab", 1)
    assert closings(world, "ab") == {"deadline"}
    assert world["a"].closed[1].missing == ("c",)
    assert 30.0 <= world.now < 31.0
    assert agree(world, "ab")


def test_an_altered_block_is_refused_and_fetched_elsewhere() -> None:
    world = World("abc")
    world["b"].corrupts = True
    world.play(names="abc")
    for name in "ac":
        assert {event.sender for event in world[name].told(BlockRefused)} == {"b"}
        assert [event.peer for event in world[name].told(PeerDropped)] == ["b"]
        drops = world[name].sent(ev.Drop)
        assert [drop.peer for drop in drops] == ["b"]  # what it had under way is not looked at
    # a's and c's own are everywhere; of b's nobody could get a byte.
    assert {count[0] for count in world["a"].counts(1)} == {"a", "c"}
    assert agree(world, "ac")


def test_a_straggler_is_counted_late_once_by_all_with_a_discount() -> None:
    world = World("abcd")
    world.begin(1)
    for name in "abc":
        world.publish(name, samples=10)
    finish(world, "abc", 1)
    world.begin(2, "abc")
    world.run(1.0)
    world.publish("d", 1, samples=40)  # past the deadline here, too
    assert world["d"].missed == [1]
    world.begin(2, "d", caught_up=True)
    world.run(1.0)
    for name in "abcd":
        world.publish(name, 2, samples=10)
    finish(world, "abcd", 2)
    assert agree(world, "abcd", 2)
    late = [c for c in world["a"].closed[2].counts if c.status == "late"]
    assert [(c.manifest.owner, c.manifest.round) for c in late] == [("d", 1)]
    assert late[0].weight == 40 * discount(1)
    world.play(3)
    assert {count[1] for count in world["b"].counts(3)} == {3}


def test_stragglers_that_are_late_again_and_again_count_what_the_others_count() -> None:
    world = World("abcde", terms=terms(max_staleness=3, exchange_timeout=5.0))
    world.begin(1)
    for round in (1, 2):  # d misses each of them and catches up, c is in the first all the time
        for name in "abe":
            world.publish(name, round)
        finish(world, "abe", round)
        world.begin(round + 1, "abe")
        world.publish("d", round, samples=40)
        world.begin(round + 1, "d", caught_up=True)
        world.run(1.0)
    world.publish("c", 1, samples=90)
    world.begin(3, "c", caught_up=True)
    assert (world["c"].missed, world["d"].missed) == ([1], [1, 2])
    world.run(1.0)
    for name in "abcde":
        world.publish(name, 3)
    finish(world, "abcde", 3)
    late = [c.manifest.header for c in world["d"].closed[3].counts if c.status == "late"]
    assert [(header.owner, header.round) for header in late] == [("c", 1), ("d", 2)]
    assert agree(world, "abcde", 3)


def test_a_joiner_does_not_count_again_what_its_state_holds() -> None:
    world = World("abc", edges=["ab", "bc"])
    world.play(1)
    world.play(2)
    world.add("j")
    world.begin(3, "abc")
    world.link("j", "b")  # before it has taken the state, as a peer may
    world.members("abcj")
    world.run(1.0)
    world.begin(3, "j", caught_up=True)
    world.run(1.0)
    for name in "abcj":
        world.publish(name, 3)
    finish(world, "abcj", 3)
    assert {count[1] for count in world["j"].counts(3)} == {3}
    assert agree(world, "abcj", 3)


def test_a_joiner_counts_a_late_update_that_the_state_does_not_hold() -> None:
    world = World("abcd", edges=["ab", "bc", "cd"])
    world.begin(1)
    for name in "abc":
        world.publish(name)
    finish(world, "abc", 1)
    world.begin(2, "abc")
    world.run(1.0)
    world.publish("d", 1)
    world.begin(2, "d", caught_up=True)
    world.run(1.0)
    world.add("j")
    world.link("j", "a")
    world.members("abcdj")
    world.begin(2, "j", caught_up=True)
    world.run(1.0)
    for name in "abcdj":
        world.publish(name, 2)
    finish(world, "abcdj", 2)
    late = [(count[0], count[1]) for count in world["j"].counts(2) if count[1] == 1]
    assert late == [("d", 1)]
    assert agree(world, "abcdj", 2)


def test_what_was_announced_too_early_is_fetched_in_its_round() -> None:
    world = World("abc", edges=["ab", "bc"], gossip=False)
    world.play(1)
    world.begin(2)
    world.members("ab")  # c sleeps: it stays in round 2, and nobody waits for it
    for round in (2, 3):
        world.begin(round, "ab")
        for name in "ab":
            world.publish(name, round)
        finish(world, "ab", round)
    world.begin(4, "ab")
    world.publish("a", 4)
    world.publish("b", 4)
    world.members("abc", since=5)
    world.run(1.0)
    world.begin(4, "c", caught_up=True)
    world.run(5.0)
    assert world.picture("a", 4)["c"] == world.picture("b", 4)["c"] == "#########"
    world.publish("c", 4)
    finish(world, "c", 4)
    assert {count[1] for count in world["c"].counts(4)} == {4}


def test_equivocation_excludes_its_owner_for_that_round() -> None:
    world = World("abcd", edges=["ab", "bc", "cd"], gossip=False)
    world.begin(1)
    first, second = world.update("d", 1), world.update("d", 1, salt="other")
    world.feed("d", ev.UpdateReady(first))
    world.run(0.5)
    # Only a hears of the second; whoever sees both shows both to its neighbours.
    world.feed("a", ev.ManifestGossip(world["d"].name, second.encode()))
    for name in "abc":
        world.publish(name)
    finish(world, "abc", 1)
    assert {count[0] for count in world["a"].counts(1)} == {"a", "b", "c"}
    assert agree(world, "abc")
    dropped = world["c"].told(PeerDropped)
    assert [(event.peer, event.seconds) for event in dropped] == [("d", 0.0)]
    assert world["c"].sent(ev.Drop) == []


def test_the_next_round_of_an_equivocator_counts() -> None:
    world = World("abc")
    world.begin(1)
    second = world.update("c", 1, salt="other")
    for name in "abc":
        world.publish(name)
    for name in "ab":
        world.feed(name, ev.ManifestGossip(world["c"].name, second.encode()))
    finish(world, "ab", 1)
    assert {count[0] for count in world["a"].counts(1)} == {"a", "b"}
    world.play(2)
    assert {count[0] for count in world["a"].counts(2)} == {"a", "b", "c"}


def test_manifests_beyond_the_next_round_are_dropped() -> None:
    world = World("ab")
    world.begin(1)
    for round, known in ((2, True), (3, False), (1000, False)):
        manifest = world.update("b", round)
        world.feed("a", ev.ManifestGossip(world["b"].name, manifest.encode()))
        assert (manifest.update in world["a"].swarm.ledger) is known


def test_one_early_manifest_starts_no_clock() -> None:
    world = World("abcd")
    world.begin(1)
    world.publish("a")
    world.run(50.0)
    assert all(node.told(DeadlineSet) == [] for node in world.peers)
    world.publish("b")
    world.run(1.0)
    for node in world.peers:
        (deadline,) = node.told(DeadlineSet)
        assert deadline.why == "quorum"
    assert 1 not in world["a"].closed


def test_the_train_deadline_starts_the_clock_without_a_quorum() -> None:
    world = World("abcd")
    world.begin(1)
    world.publish("a")
    finish(world, "a", 1)
    assert [event.why for event in world["a"].told(DeadlineSet)] == ["train_timeout"]
    assert 130.0 <= world.now < 131.0


def slow_world(rate: float, critical_share: float = 1.0, selection: str = "rarest_first") -> World:
    """Two peers whose link needs ``2768 / rate`` seconds for an update, with 10 s of window."""
    setup = terms(exchange_timeout=10.0, min_completion_ratio=0.9, critical_share=critical_share)
    policy = SwarmPolicy(picker=PickerPolicy(selection=selection))
    return World("ab", rate=rate, terms=setup, policy=policy)


def test_below_min_completion_the_window_is_extended_once_if_that_helps() -> None:
    world = slow_world(200.0)
    world.play()
    assert [event.why for event in world["a"].told(DeadlineSet)] == ["quorum", "extension"]
    close = world["a"].closed[1]
    assert close.extended
    assert not close.below_min_completion
    assert close.completeness >= 0.9


def test_a_viable_round_is_not_extended() -> None:
    """The same link as above, where an extension would reach what is wanted."""
    world = slow_world(200.0, critical_share=0.3, selection="importance")
    world.play()
    for node in world.peers:
        assert [event.why for event in node.told(DeadlineSet)] == ["quorum"]
        close = node.closed[1]
        assert close.viable
        assert close.below_min_completion
        assert 10.0 <= node.closed_at[1] < 10.5
        for count in close.counts:
            assert count.critical == 1.0


def test_a_round_without_its_critical_chunks_is_not_viable() -> None:
    world = slow_world(100.0)
    world.play()
    for node in world.peers:
        assert not node.closed[1].viable
        (other,) = [c for c in node.closed[1].counts if c.manifest.owner != node.name]
        assert other.critical == len(other.chunks) / len(world.layout.chunks)


def test_the_window_is_not_extended_where_that_cannot_help() -> None:
    world = slow_world(100.0)
    world.play()
    assert [event.why for event in world["a"].told(DeadlineSet)] == ["quorum"]
    close = world["a"].closed[1]
    assert close.closed_by == "deadline"
    assert not close.extended
    assert close.below_min_completion
    assert 0.0 < close.completeness < 0.9
    assert 10.0 <= world["a"].closed_at[1] < 10.5


def hopeless_world(names: str) -> World:
    """Chunks of 128 KiB at 1 kB/s, and a window of 30 s: after a block of 16 KiB that is plain."""
    model = ModelSpec((TensorSpec("a", "F32", (64, 4096)),))
    setup = terms(exchange_timeout=30.0)
    return World(names, rate=1000.0, model=model, block_size=16 << 10, terms=setup)


def test_nobody_waits_for_chunks_that_cannot_come_by_the_deadline() -> None:
    world = hopeless_world("ab")
    world.play()
    assert closings(world, "ab") == {"deadline"}
    assert world["a"].closed_at[1] < 20.0
    world.begin(2)  # what is late is fetched all the same, for this round or the next
    world.run(1100.0)
    assert world.picture("a", 1)["b"] == "########"


def test_several_slow_holders_together_may_bring_a_chunk_in_time() -> None:
    """a hears of b's only chunk when seven others have it, each too slow for the whole of it."""
    model = ModelSpec((TensorSpec("a", "F32", (8192,)),))  # 32 KiB; 2 kB/s a link
    setup = terms(exchange_timeout=100.0)
    world = World("abcdefghi", rate=2e3, model=model, chunks=1, block_size=1024, terms=setup)
    world.play(1)
    world.begin(2)
    for name in "acdefghi":
        world.publish(name, 2)
    world.run(1.0)
    clock = world["a"].swarm.clock
    assert clock is not None
    assert clock.deadline is not None
    world.run(clock.deadline - 4.0 - world.now)
    manifest = world.update("b", 2)
    for name in "cdefghi":
        swarm = world[name].swarm
        swarm.ledger.see(manifest.signed)
        known = swarm.ledger.add(manifest, Bitfield.full(1))
        world[name].blocks[manifest.update, 0] = world["b"].blocks[manifest.update, 0]
        for effect in swarm.serving.announce_update(known, with_manifest=True):
            if isinstance(effect, ev.ToFetcher) and effect.peer == "a":
                world.tell(name, effect)
    world.run_until(lambda: 2 in world["a"].closed)
    [count] = [c for c in world["a"].closed[2].counts if c.manifest.owner == "b"]
    assert count.status == "complete"


def test_a_member_that_may_still_publish_is_waited_for_all_the_same() -> None:
    world = hopeless_world("abc")
    world.begin(1)
    world.publish("a")
    world.publish("b")
    finish(world, "ab", 1)
    assert closings(world, "ab") == {"deadline"}
    assert 30.0 <= world["a"].closed_at[1] < 30.5


def test_a_partial_update_is_filled_with_the_owners_last() -> None:
    world = World("ab", terms=terms(exchange_timeout=10.0))
    world.play(1)
    world.links = EqualLinks(0.01, 150.0)
    world.play(2)
    count = next(c for c in world["a"].closed[2].counts if c.manifest.owner == "b")
    assert count.status == "partial"
    assert 0 < len(count.chunks) < 9
    assert set(count.fills) == set(range(9)) - set(count.chunks)
    assert {fill.update for fill in count.fills.values()} == {world["b"].updates[1]}


def test_an_update_too_old_to_count_is_reported_dropped_once() -> None:
    world = World("abc", edges=["ab"], terms=terms(max_staleness=1))
    world.begin(1)
    world.publish("c")  # nobody has an edge to it, only its manifest arrives
    world.run(5.1)
    world.members("ab")
    for round in range(1, 6):
        if round > 1:
            world.begin(round, "ab")
        for name in "ab":
            world.publish(name, round)
        finish(world, "ab", round)
    dropped = [world["a"].closed[round].dropped for round in range(1, 6)]
    assert dropped == [(), (), (("c", 1),), (), ()]


@pytest.mark.parametrize("gossip", [True, False])
def test_an_update_too_late_even_to_be_fetched_is_reported_dropped_once(gossip: bool) -> None:
    world = World("abc", gossip=gossip, terms=terms(max_staleness=1, exchange_timeout=5.0))
    world.begin(1)
    for round in (1, 2, 3):
        for name in "ab":
            world.publish(name, round)
        finish(world, "ab", round)
        world.begin(round + 1, "ab")
    old = world.update("c", 1)
    world.publish("c", 1)  # a and b train for round 4 by now
    assert world["c"].missed == [1]
    world.begin(4, "c", caught_up=True)
    world.feed("a", ev.ManifestGossip(PeerId("b"), world.update("b", 1).encode()))
    for round in (4, 5):
        for name in "abc":
            world.publish(name, round)
        finish(world, "abc", round)
        world.feed("a", ev.ManifestGossip(PeerId("c"), old.encode()))  # said again
        world.begin(round + 1)
    for name in "abc":
        dropped = [world[name].closed[round].dropped for round in (4, 5)]
        assert dropped == [(("c", 1),), ()]
    assert world["a"].closed[3].missing == ("c",)
    assert agree(world, "abc", 4)


@pytest.mark.parametrize("waited_from", [1, 6])
def test_the_too_late_update_of_a_member_that_was_given_up_is_reported_dropped_once(
    waited_from: int,
) -> None:
    world = World("abc", terms=terms(max_staleness=1, exchange_timeout=5.0))
    world.play(1)
    world.members("ab", dead="c")
    for round in (2, 3, 4):
        world.play(round, "ab")
    world.begin(5, "ab")
    live = {PeerId("a"): 1, PeerId("b"): 1, PeerId("c"): waited_from}
    for name in "abc":
        world.feed(name, ev.MembersNow(live, frozenset()))
    old = world.update("c", 2).encode()
    for name in "ab":
        world.feed(name, ev.ManifestGossip(PeerId("c"), old))
        world.feed(name, ev.ManifestGossip(PeerId("b"), world.update("c", 1).encode()))
    world.begin(5, "c", caught_up=True)
    for round in (5, 6):
        for name in "abc":
            world.publish(name, round)
        finish(world, "abc", round)
        world.begin(round + 1)
        for name in "ab":
            world.feed(name, ev.ManifestGossip(PeerId("c"), old))  # said again
    for name in "ab":
        assert [world[name].closed[round].dropped for round in (5, 6)] == [(("c", 2),), ()]


def test_an_update_that_left_the_store_uncounted_is_reported_dropped() -> None:
    world = World("abc", edges=["ab"], terms=terms(max_staleness=1))
    world.begin(1)
    world.publish("c")  # nobody has an edge to it, only its manifest arrives
    world.run(5.1)
    world.members("ab")
    update = world["c"].updates[1]
    for round in range(1, 5):
        if round > 1:
            gone = (update,) if round == 3 else ()  # before the round that reports it
            for name in "ab":
                world.feed(name, ev.RoundBegun(round, gone))
        for name in "ab":
            world.publish(name, round)
        finish(world, "ab", round)
    dropped = [world["a"].closed[round].dropped for round in range(1, 5)]
    assert dropped == [(), (), (("c", 1),), ()]


def test_a_lost_edge_and_a_new_one_in_mid_exchange() -> None:
    world = World("abcd", edges=["ab", "bc", "cd"], rate=5_000.0)
    world.begin(1)
    for name in "abcd":
        world.publish(name)
    world.run(0.4)
    world.unlink("b", "c")
    world.run(0.4)
    world.link("a", "d")
    finish(world, "abcd", 1)
    assert closings(world, "abcd") == {"complete"}
    assert agree(world, "abcd")


def test_what_was_restored_is_not_fetched_again() -> None:
    world = World("ab", rate=3_000.0)
    world.begin(1)
    for name in "ab":
        world.publish(name)
    world.run_until(lambda: world.picture("b")["a"].count("#") >= 4)
    before = world["a"]
    known = before.swarm.ledger[world["b"].updates[1]]
    own = before.swarm.ledger[world["a"].updates[1]]
    world.kill("a")
    reborn = world.add("a")
    reborn.blocks, reborn.updates = before.blocks, before.updates
    for update in (known, own):
        world.feed("a", ev.Restored(update.manifest, update.held, {}, None))
    held = known.held.count
    world.members("ab")
    world.link("a", "b")
    world.feed("a", ev.RoundBegun(1))
    world.feed("a", ev.UpdateReady(own.manifest))
    finish(world, "ab", 1)
    stored = {(effect.update, effect.chunk) for effect in reborn.sent(ev.StoreComplete)}
    assert len(stored) == 9 - held
    assert agree(world, "ab")
