"""Which block next, and from whom: pictures of a swarm."""

from __future__ import annotations

import random

import pytest

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.chunking import ChunkLayout, Layout
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.manifest import HASH_BYTES, make_manifest
from p2pfl_torrent.core.messages import MAX_REQUEST_BYTES, REJECT_BUSY, REJECT_MISSING
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.picker import Picker, PickerPolicy
from p2pfl_torrent.core.tensors import ModelSpec
from tests.core.picker_pictures import BLOCK, Scene, layout_of, manifest_of, picker

P0, P1, P2 = PeerId("p0"), PeerId("p1"), PeerId("p2")

# --- which chunk ---------------------------------------------------------------------------------


def test_the_rarest_chunk_first() -> None:
    assert picker("2213", active_requests=1).take("p0", 1) == "2"
    assert picker("33132", active_requests=1).take("p0", 2) == "24"


def test_rarity_is_exact_among_many_chunks() -> None:
    availability = "3" * 700 + "1" + "3" * 300
    scene = picker(availability, active_requests=1)
    assert [request.chunk for request in scene.ask("p0")] == [700]


def test_what_became_common_sinks_and_what_became_rare_rises() -> None:
    scene = picker("1122", active_requests=1)
    scene.holder("p2", "*   ").holder("p3", "*   ")
    assert scene.take("p0", 1) == "1"
    scene = picker("1122", active_requests=1)
    scene.holder("p2", "**  ")
    scene.picker.remove_holder(P1)  # now "2211"
    scene.picker.validate()
    assert scene.take("p0", 1) in "23"


def test_under_pressure_the_most_important_first() -> None:
    scene = picker("1111", importance="1423", pressure=1.0, noise=0.0, active_requests=1)
    assert scene.take("p0", 4) == "1320"


def test_importance_counts_times_age() -> None:
    scene = picker(
        "1111", importance="1423", ages="9111", pressure=1.0, noise=0.0, active_requests=1
    )
    assert scene.take("p0", 1) == "0"


def test_pressure_turns_rarity_into_importance() -> None:
    def first(pressure: float) -> str:
        scene = picker("1222", importance="1239", pressure=pressure, noise=0.0, active_requests=1)
        return scene.take("p0", 1)

    assert (first(0.0), first(0.25), first(0.75), first(1.0)) == ("0", "0", "3", "3")


def test_a_change_of_pressure_orders_what_was_ordered_before_anew() -> None:
    scene = picker("1222", importance="1239", noise=0.0, active_requests=1)
    assert scene.take("p0", 1) == "0"
    scene.picker.set_pressure(1.0)
    assert scene.take("p0", 1) == "3"


def test_selection_importance_ignores_rarity_and_random_both() -> None:
    by_importance = picker(
        "1222", importance="1239", noise=0.0, selection="importance", active_requests=1
    )
    assert by_importance.take("p0", 1) == "3"
    drawn = {
        picker("1222", importance="1239", selection="random", seed=s, active_requests=1).take(
            "p0", 1
        )
        for s in range(40)
    }
    assert drawn == set("0123")


def test_peers_with_equal_views_take_different_chunks() -> None:
    first = [picker("1" * 9, seed=seed, active_requests=1).take("p0", 1) for seed in range(60)]
    assert len(set(first)) == 9


@pytest.mark.parametrize(("pressure", "owners_of_ten"), [(0.0, 9), (0.5, 6), (1.0, 6)])
def test_owners_take_turns(pressure: float, owners_of_ten: int) -> None:
    scene = picker("1" * 20, owners=10, pressure=pressure, active_requests=1)
    owners = [scene.ask("p0")[0]]
    for _ in range(9):
        scene.answer(scene.waiting["p0"][0])
        owners.extend(scene.ask("p0"))
    assert len({request.update for request in owners}) >= owners_of_ten


def test_the_first_chunks_are_random() -> None:
    first = {
        picker("2221222", seed=seed, random_first=1, active_requests=1).take("p0", 2)[0]
        for seed in range(80)
    }
    assert first == set("0123456")
    second = {
        picker("2221222", seed=seed, random_first=1, active_requests=1).take("p0", 2)
        for seed in range(40)
    }
    assert all("3" in taken for taken in second)


# --- begun chunks --------------------------------------------------------------------------------


def test_begun_chunks_are_finished_first() -> None:
    scene = picker("222", blocks="444", active_requests=1)
    chunk = scene.ask("p0")[0].chunk
    for _ in range(3):
        scene.answer(scene.waiting["p0"][0], 1.0)
        assert scene.ask("p0")[0].chunk == chunk
    assert scene.states().count("+") == 1


def test_a_second_holder_helps_to_finish() -> None:
    scene = picker("222", blocks="444", active_requests=1)
    first, second = scene.ask("p0")[0], scene.ask("p1")[0]
    assert first.chunk == second.chunk
    assert not set(first.blocks) & set(second.blocks)


def test_the_pending_pool_is_bounded_but_lets_no_holder_idle() -> None:
    scene = picker("1" * 9, blocks="1" * 9, pending_chunks=2)
    assert len(scene.ask("p0")) == 2
    scene.holder("q", "*" * 9)
    assert len(scene.ask("q")) == 1


def test_what_nobody_has_any_more_blocks_no_pool() -> None:
    scene = picker("0" * 8, blocks="9" * 8, pending_chunks=2, active_requests=4)
    scene.holder("gone", "**      ")
    for request in scene.ask("gone"):
        if request.block % 2:
            scene.answer(request)
    scene.picker.remove_holder(PeerId("gone"))
    scene.holder("p0", "  ******", rate=1e6)
    begun = {request.chunk for request in scene.ask("p0")}
    assert begun
    assert begun <= {2, 3, 4, 5, 6, 7}


def test_restored_blocks_are_not_asked_for() -> None:
    made = Picker(layout=layout_of(2), policy=PickerPolicy(), rng=random.Random(0))
    manifest = manifest_of("owner", [3, 2], [0, 1])
    some, done = Bitfield(3), Bitfield(2)
    some.add(1)
    done.add(1)
    made.add_update(manifest, verified={0: some}, complete=done)
    scene = Scene(made, [manifest])
    scene.holder("p0", "**")
    assert scene.states() == "+#"
    asked = [(request.chunk, request.block) for request in scene.ask("p0")]
    assert asked == [(0, 0), (0, 2)]
    assert made.bytes_verified(manifest.update) == 3 * BLOCK - 10
    for request in list(scene.waiting["p0"]):
        scene.answer(request)
    assert made.held(manifest.update).complete


# --- how much ------------------------------------------------------------------------------------


def test_at_most_active_requests_are_open() -> None:
    scene = picker("1" * 30, first_bytes=1 << 20)
    assert len(scene.ask("p0")) == 10
    assert scene.ask("p0") == []


def test_chunks_smaller_than_a_block_count_with_their_size() -> None:
    """Counted as whole blocks, those of a small model came one by one, a round trip each."""
    layout = Layout(ModelSpec(()), tuple(ChunkLayout(k, (), 1) for k in range(30)), 64 << 10)
    manifest = make_manifest(
        layout=layout, swarm=bytes(HASH_BYTES), round=1, owner=P0, base_hash=bytes(HASH_BYTES),
        num_samples=1, sizes=[1300] * 30, ranks=list(range(30)), blocks=[bytes(HASH_BYTES)] * 30,
        sign=lambda _: b"",
    )  # fmt: skip
    picker = Picker(layout=layout, policy=PickerPolicy(), rng=random.Random(0))
    picker.add_holder(P0)
    picker.add_update(manifest)
    picker.holder_has(P0, manifest.update, range(30))
    requests = picker.next_requests(P0, 0.0)
    assert len(requests) == PickerPolicy().active_requests
    for request in requests:  # a rate is known then
        received = picker.received(P0, request.number, request.size, 0.1)
        assert received is not None
        picker.verified(received, True, 0.1)
    assert len(picker.next_requests(P0, 0.1)) > 1


def test_before_a_rate_is_known_little_is_in_flight() -> None:
    scene = picker("1" * 30)
    assert sum(request.size for request in scene.ask("p0")) <= 64 << 10


@pytest.mark.parametrize("rate", [1e3, 16e3, 250e3, 12.5e6, 125e6])
def test_in_flight_is_at_most_a_second_of_the_rate_and_a_block_at_least(rate: float) -> None:
    scene = picker("1" * 40, blocks="9" * 40, rates=(rate,))
    requests = scene.ask("p0")
    flying = sum(request.size for request in requests)
    assert flying <= max(rate, 4 * BLOCK / 4, BLOCK)
    assert flying >= min(rate / 4, 10 * 9 * BLOCK - 100)
    assert all(request.size <= MAX_REQUEST_BYTES for request in requests)
    limit = max(BLOCK, rate / 2)
    assert all(request.size <= limit for request in requests)


def test_a_request_grows_with_the_rate() -> None:
    slow = picker("1", blocks="9", rates=(16e3,)).ask("p0")[0]
    fast = picker("1", blocks="9", rates=(12.5e6,)).ask("p0")[0]
    assert (slow.count, fast.count) == (1, 9)


def test_pieces_read_in_one_go_do_not_look_as_fast_as_memory() -> None:
    scene = picker("1" * 40, first_bytes=10 * BLOCK)
    requests = scene.ask("p0")
    scene.answer(requests[0], 1.0)
    for request in requests[1:]:
        scene.answer(request, 1e-6)
    assert scene.picker.holder_rate(P0) < 11 * BLOCK


def test_the_piece_of_a_cancelled_request_takes_its_time_on_the_link() -> None:
    scene = picker("12", first_bytes=BLOCK)
    first = scene.ask("p0")[0]
    scene.picker.remove_update(scene.update())
    other = manifest_of("other", [1], [0])
    scene.picker.add_update(other)
    scene.picker.holder_has(P0, other.update, [0])
    scene.now = 1.0
    assert len(scene.ask("p0")) == 1
    assert scene.answer(first, 0.01) is None  # a second under way, not a hundredth
    assert scene.picker.holder_rate(P0) < 1.1 * BLOCK


# --- from whom -----------------------------------------------------------------------------------


def test_a_slow_holder_keeps_off_what_a_fast_one_brings_much_sooner() -> None:
    scene = picker(
        "2" * 8,
        blocks="9" * 8,
        rates=(
            40e3,
            5e6,
        ),
    )
    assert len(scene.ask("p0")) <= 1
    assert scene.ask("p1")


def test_a_slow_holder_is_asked_where_all_else_takes_longer() -> None:
    scene = picker(
        "2" * 40,
        blocks="9" * 40,
        rates=(
            40e3,
            200e3,
        ),
    )
    assert len(scene.ask("p0")) >= 1


def test_a_slow_holder_gives_what_only_it_has() -> None:
    scene = picker("2" * 8 + "1", blocks="1" * 9, rates=(20e3, 50e6))
    assert [request.chunk for request in scene.ask("p0")] == [8]


def test_a_slow_holder_is_asked_when_the_fast_one_is_gone() -> None:
    scene = picker(
        "22",
        rates=(
            20e3,
            50e6,
        ),
    )
    assert scene.ask("p0") == []
    scene.picker.remove_holder(P1)
    assert len(scene.ask("p0")) == 1


def test_a_slow_holder_is_asked_when_the_fast_one_stalls() -> None:
    scene = picker(
        "22",
        rates=(
            200e3,
            50e6,
        ),
    )
    scene.ask("p1")
    assert scene.ask("p0") == []
    scene.now += 5.0
    assert scene.ask("p0")


def test_equal_holders_share() -> None:
    scene = picker(
        "2" * 40,
        blocks="4" * 40,
        rates=(
            1e6,
            1e6,
        ),
    )
    one, other = scene.ask("p0"), scene.ask("p1")
    assert min(len(one), len(other)) >= 4
    assert not {request.key for request in one} & {request.key for request in other}


# --- endgame -------------------------------------------------------------------------------------


def test_in_endgame_the_first_answer_cancels_the_other() -> None:
    scene = picker("11", here=" #", rates=(8e3,))
    slow = scene.ask("p0")[0]
    scene.holder("p1", "* ", rate=50e6)
    fast = scene.ask("p1")[0]
    assert (fast.chunk, fast.block) == (slow.chunk, slow.block)
    outcome = scene.answer(fast)
    assert outcome is not None
    assert outcome.chunk_complete
    assert outcome.cancels == (slow,)
    scene.reject(slow)
    assert scene.picker.open_requests(P0) == 0


def test_a_piece_that_crosses_its_cancel_is_a_duplicate_and_no_fault() -> None:
    scene = picker("1", rates=(8e3,))
    slow = scene.ask("p0")[0]
    scene.holder("p1", "*", rate=50e6)
    scene.answer(scene.ask("p1")[0])
    assert scene.answer(slow) is None
    with pytest.raises(RemoteProtocolError):  # but once only
        scene.picker.received(P0, slow.number, slow.size, scene.now)


def test_while_something_is_unasked_nothing_is_asked_twice_unless_it_is_late() -> None:
    # p0 has both chunks and is asked for one; p1, much faster, has that one only.
    scene = picker("11", rates=(8e3,))
    slow = scene.ask("p0")
    assert len(slow) == 1
    scene.holder("p1", "".join("*" if k == slow[0].chunk else " " for k in range(2)), rate=50e6)
    assert scene.ask("p1") == []
    scene.now = slow[0].due + 2.0
    assert [request.key for request in scene.ask("p1")] == [slow[0].key]


def test_a_rate_is_that_of_the_time_and_not_of_the_pieces() -> None:
    # A holder that stands still for most of the time brings little, however fast it is between.
    scene = picker("1" * 40, blocks="9" * 40, rates=(1e6,))
    bytes_before = scene.picker.bytes_verified(scene.update())
    began = scene.now
    for _ in range(4):
        for seconds in (1.0, 0.011, 0.011, 0.011):
            if not scene.waiting["p0"]:
                scene.ask("p0")
            scene.answer(scene.waiting["p0"][0], seconds)
    true = (scene.picker.bytes_verified(scene.update()) - bytes_before) / (scene.now - began)
    assert 0.5 * true < scene.picker.holder_rate(P0) < 2.0 * true


def test_no_more_than_endgame_holders_are_asked() -> None:
    scene = picker("1", rates=(2e3,))
    scene.ask("p0")
    scene.holder("p1", "*", rate=20e3).holder("p2", "*", rate=50e6)
    assert len(scene.ask("p1")) == 1
    assert scene.ask("p2") == []


def test_a_holder_is_not_asked_twice_for_the_same() -> None:
    scene = picker("1", rates=(2e3,), endgame_holders=3)
    scene.ask("p0")
    scene.holder("p1", "*", rate=50e6)
    assert len(scene.ask("p1")) == 1
    assert scene.ask("p1") == []


def test_equal_holders_do_not_fetch_twice() -> None:
    scene = picker(
        "2",
        rates=(
            100e3,
            100e3,
        ),
    )
    assert scene.ask("p0")
    assert scene.ask("p1") == []


def test_an_unmeasured_holder_is_not_overtaken_before_it_is_late() -> None:
    scene = picker("1")
    scene.ask("p0")
    scene.holder("p1", "*", rate=50e6)
    scene.now = 0.2
    assert scene.ask("p1") == []
    wakeup = scene.picker.next_timeout(scene.now)
    assert wakeup is not None
    assert wakeup < 0.5  # not when 128 kbit/s would be late
    scene.now = wakeup + 0.1
    assert len(scene.ask("p1")) == 1


def test_a_piece_that_others_had_in_part_counts_its_duplicates() -> None:
    scene = picker("1", blocks="4", rates=(300e3,))
    whole = scene.ask("p0")[0]
    assert whole.count == 4
    scene.holder("p1", "*")
    scene.now += 4.0
    part = scene.ask("p1")
    assert part
    outcome = scene.answer(part[0])
    assert outcome is not None
    fresh = outcome.blocks
    rest = scene.answer(whole)
    assert rest is not None
    assert rest.duplicate_bytes == sum(BLOCK for _ in fresh)
    assert sorted(fresh + rest.blocks) == [0, 1, 2, 3]
    assert rest.chunk_complete


# --- answers -------------------------------------------------------------------------------------


def test_what_was_never_asked_for_is_the_holders_fault() -> None:
    scene = picker("1")
    request = scene.ask("p0")[0]
    for number, size in ((request.number + 1, request.size), (request.number, request.size - 1)):
        with pytest.raises(RemoteProtocolError) as blamed:
            scene.picker.received(P0, number, size, 0.1)
        assert blamed.value.peer == P0
    with pytest.raises(RemoteProtocolError):
        scene.picker.rejected(P0, request.number + 1, 0.1)
    scene.answer(request)
    with pytest.raises(RemoteProtocolError):
        scene.picker.received(P0, request.number, request.size, 0.2)


def test_a_bad_piece_is_asked_for_again() -> None:
    scene = picker("2", active_requests=1)
    request = scene.ask("p0")[0]
    scene.waiting["p0"].clear()
    assert scene.picker.received(P0, request.number, request.size, 0.1) == request
    outcome = scene.picker.verified(request, False, 0.1)
    assert (outcome.blocks, outcome.chunk_complete) == ((), False)
    scene.picker.remove_holder(P0)
    scene.picker.validate()
    again = scene.ask("p1")[0]
    assert (again.chunk, again.block) == (request.chunk, request.block)
    assert scene.picker.bytes_verified(scene.update()) == 0


def test_a_holder_that_lacks_a_chunk_is_not_asked_for_it_again() -> None:
    scene = picker("11", active_requests=1)
    request = scene.ask("p0")[0]
    scene.reject(request, REJECT_MISSING)
    assert scene.picker.availability(scene.update())[request.chunk] == 0
    assert [other.chunk for other in scene.ask("p0")] == [1 - request.chunk]
    scene.holder("p0", "".join("*" if k == request.chunk else " " for k in range(2)))
    scene.answer(scene.waiting["p0"][0])
    assert [again.chunk for again in scene.ask("p0")] == [request.chunk]


def test_a_busy_holder_still_has_what_it_has() -> None:
    scene = picker("1" * 5)
    requests = scene.ask("p0")
    assert len(requests) > 1
    scene.reject(requests[-1], REJECT_BUSY)
    assert scene.picker.availability(scene.update()) == [1] * 5


def test_a_removed_update_is_cancelled_and_its_answers_are_harmless() -> None:
    scene = picker("1" * 4, owners=2)
    requests = scene.ask("p0")
    cancels = scene.picker.remove_update(scene.update())
    assert cancels == [request for request in requests if request.update == scene.update()]
    assert cancels
    scene.picker.validate()
    for request in cancels:
        assert scene.answer(request) is None
    assert scene.picker.remove_update(scene.update()) == []


def test_a_removed_holders_requests_return_to_the_pool() -> None:
    scene = picker("22", blocks="22")
    first = scene.ask("p0")
    scene.picker.remove_holder(P0)
    scene.picker.validate()
    again = scene.ask("p1")
    assert {(r.chunk, b) for r in first for b in r.blocks} <= {
        (r.chunk, b) for r in again for b in r.blocks
    }


# --- time ----------------------------------------------------------------------------------------


def test_patience_follows_the_rate() -> None:
    """A megabyte at 128 kbit/s takes 62 s, and a holder that is at it is not given up."""
    scene = picker("1" * 9, blocks="9" * 9, rates=(16e3,))
    request = scene.ask("p0")[0]
    assert scene.expire(request.size / 16e3 * 5) == []
    quick = picker("1" * 9, rates=(10e6,))
    quick.ask("p0")
    assert quick.expire(4.0) == []
    assert quick.expire(2.0) != []


def test_a_holder_that_answers_in_order_is_not_late_with_the_last() -> None:
    scene = picker("1" * 9, first_bytes=9 * BLOCK)
    for request in scene.ask("p0")[:-1]:
        scene.answer(request, 3.0)
        assert scene.expire(0.0) == []


def test_a_round_trip_is_expected_and_not_late() -> None:
    scene = picker("1" * 40, rates=(1e6,))
    for _ in range(3):
        first, *others = scene.ask("p0")
        scene.answer(first, 0.4)
        for request in others:
            scene.answer(request, request.size / 1e6)
    following = scene.ask("p0")[0]
    assert following.expected > 3 * following.size / scene.picker.holder_rate(P0)


def test_a_silent_holder_is_given_up_whole_and_asked_nothing_until_it_answers() -> None:
    scene = picker("2" * 9, rates=(1e6,))
    requests = scene.ask("p0")
    assert scene.picker.next_timeout(scene.now) is not None
    assert scene.expire(60.0) == requests
    assert scene.ask("p0") == []
    assert scene.ask("p1")  # what it was asked for is asked of another
    for request in requests[:-1]:
        scene.reject(request)
        assert scene.ask("p0") == []
    scene.reject(requests[-1])
    assert scene.ask("p0")


def test_the_late_piece_of_an_expired_request_is_welcome() -> None:
    scene = picker("1")
    request = scene.ask("p0")[0]
    assert scene.expire(600.0) == [request]
    outcome = scene.answer(request)
    assert outcome is not None
    assert outcome.chunk_complete
    assert scene.states() == "#"


def test_patience_doubles_with_each_silence() -> None:
    scene = picker("1" * 3, first_bytes=BLOCK, rates=(1e4,))
    waits = []
    for _ in range(3):
        request = scene.ask("p0")[0]
        waits.append(request.expected)
        scene.expire(10_000.0)
        scene.reject(request)
    assert waits[2] > 1.9 * waits[1] > 3.6 * waits[0]


def test_with_nothing_open_there_is_no_timeout() -> None:
    assert picker("1").picker.next_timeout(0.0) is None


# --- questions -----------------------------------------------------------------------------------


def test_progress_is_told_as_it_is() -> None:
    scene = picker("2110", blocks="1311", active_requests=1)
    update = scene.update()
    assert scene.states() == "...."
    assert scene.picker.availability(update) == [2, 1, 1, 0]
    assert scene.picker.missing_available(update)
    for _ in range(9):
        for request in scene.ask("p0"):
            scene.answer(request)
    assert scene.states() == "###."
    assert not scene.picker.missing_available(update)
    assert repr(scene.picker.held(update)) == "Bitfield('1110')"
    assert scene.picker.bytes_verified(update) == 5 * BLOCK - 30
    assert scene.picker.delay(P0, BLOCK, scene.now) > 0
    assert scene.picker.delay(P2, BLOCK, scene.now) == float("inf")


def test_unknown_updates_and_holders_are_answered_too() -> None:
    scene = picker("1")
    stranger = manifest_of("stranger", [1], [0]).update
    scene.picker.holder_has(P0, stranger, [0])
    assert scene.picker.chunk_states(stranger) == ""
    assert len(scene.picker.held(stranger)) == 0
    assert scene.picker.availability(stranger) == []
    assert not scene.picker.missing_available(stranger)
    assert scene.picker.next_requests(P2, 0.0) == []
    assert scene.picker.received(P2, 0, 1, 0.0) is None
    assert scene.picker.holder_rate(P2) == 0.0
    assert scene.picker.open_requests(P2) == 0


def test_the_same_seed_asks_the_same() -> None:
    def history(seed: int) -> list[tuple[str, int, int]]:
        scene = picker("3" * 30, blocks="3" * 30, owners=3, seed=seed, random_first=2)
        asked = []
        for step in range(40):
            for request in scene.ask(f"p{step % 3}"):
                asked.append((request.update.hex(), request.chunk, request.block))
                scene.answer(request)
        return asked

    assert history(1) == history(1)
    assert history(1) != history(2)
