"""The upload queue: bounded, fair, nobody starves, a slow piece does not hold the others up."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pfl_torrent.core.messages import Request
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.uploads import FADE_BYTES, UploadPolicy, UploadQueue

PEERS = [PeerId(name) for name in "abcdefgh"]


def request(number: int) -> Request:
    return Request(number, b"u" * 32, 0, 0, 1)


def queue(**about: float) -> UploadQueue:
    return UploadQueue(UploadPolicy(**about), random.Random(1))  # type: ignore[arg-type]


def serve(uploads: UploadQueue, peer: PeerId, nbytes: int = 1000, now: float = 0.0) -> int:
    """Give out and send a peer's next piece; the request's number."""
    found = uploads.next(peer, now)
    assert found is not None
    uploads.sent(peer, nbytes, now)
    return found.number


def test_one_peer_is_answered_in_order_one_piece_at_a_time() -> None:
    uploads = queue()
    for number in range(3):
        assert uploads.add(PEERS[0], request(number))
    first = uploads.next(PEERS[0], 0.0)
    assert first is not None
    assert uploads.next(PEERS[0], 0.0) is None
    uploads.sent(PEERS[0], 1000, 0.0)
    assert [serve(uploads, PEERS[0]) for _ in range(2)] == [1, 2]
    assert uploads.next(PEERS[0], 0.0) is None
    assert uploads.runnable(0.0) == []


def test_no_more_peers_are_served_at_once_than_there_are_places() -> None:
    uploads = queue(upload_slots=2, optimistic=1)
    for peer in PEERS:
        uploads.add(peer, request(0))
    begun = [peer for peer in PEERS if uploads.next(peer, 0.0) is not None]
    assert len(begun) == 3
    assert uploads.runnable(0.0) == []
    uploads.sent(begun[0], 1000, 0.0)
    (woken,) = uploads.runnable(0.0)
    assert uploads.next(woken, 0.0) is not None


@pytest.mark.parametrize("slots", [(1, 0), (0, 1), (1, 1), (4, 1), (0, 3)], ids=str)
def test_whoever_is_woken_is_let_in(slots: tuple[int, int]) -> None:
    uploads = queue(upload_slots=slots[0], optimistic=slots[1])
    for peer in PEERS:
        for number in range(5):
            uploads.add(peer, request(number))
    served = 0
    while runnable := uploads.runnable(0.0):
        for peer in runnable:
            serve(uploads, peer)
            served += 1
    assert served == 5 * len(PEERS)


def test_who_was_sent_least_goes_first() -> None:
    uploads = queue(upload_slots=1, optimistic=0)
    for peer in PEERS[:3]:
        for number in range(10):
            uploads.add(peer, request(number))
    sent = dict.fromkeys(PEERS[:3], 0)
    for _ in range(12):
        (peer,) = uploads.runnable(0.0)
        serve(uploads, peer, {"a": 1000, "b": 2000, "c": 3000}[peer])
        sent[peer] += {"a": 1000, "b": 2000, "c": 3000}[peer]
    assert max(sent.values()) - min(sent.values()) <= 3000


def test_the_past_fades() -> None:
    uploads = queue(upload_slots=1, optimistic=0)
    uploads.add(PEERS[0], request(0))
    serve(uploads, PEERS[0], FADE_BYTES)
    uploads.add(PEERS[1], request(0))
    serve(uploads, PEERS[1], FADE_BYTES * 3 // 4)  # more than the half that is left of the other's
    for peer in PEERS[:2]:
        uploads.add(peer, request(1))
    assert uploads.runnable(0.0) == [PEERS[0]]


def test_a_slow_piece_frees_its_place_after_a_while() -> None:
    uploads = queue(upload_slots=1, optimistic=0, slot_seconds=2.0)
    for peer in PEERS[:2]:
        uploads.add(peer, request(0))
    assert uploads.next(PEERS[0], 10.0) is not None
    assert uploads.next(PEERS[1], 11.9) is None
    assert uploads.next_wakeup() == 12.0
    assert uploads.next(PEERS[1], 12.0) is not None
    assert uploads.next_wakeup() is None


def test_who_takes_nothing_holds_no_place() -> None:
    uploads = queue()
    *deaf, honest = PEERS
    for peer in deaf:  # what was said to them stands in their streams, and they ask for more
        uploads.writing(peer, True)
        uploads.add(peer, request(0))
    uploads.add(honest, request(0))
    uploads.sent(honest, 10**9, 0.0)
    assert uploads.runnable(0.0) == [honest]
    assert serve(uploads, honest) == 0
    uploads.writing(deaf[0], False)
    assert uploads.runnable(0.0) == [deaf[0]]


def test_a_peer_may_queue_only_so_much() -> None:
    uploads = queue(max_queued=2)
    assert [uploads.add(PEERS[0], request(number)) for number in range(3)] == [True, True, False]
    assert uploads.queued(PEERS[0]) == 2
    assert uploads.cancel(PEERS[0], 0)
    assert not uploads.cancel(PEERS[0], 0)
    assert uploads.add(PEERS[0], request(3))
    uploads.remove_peer(PEERS[0])
    assert uploads.queued(PEERS[0]) == 0


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(0, 2))
def test_nobody_starves_behind_greedy_peers(seed: int, slots: int, optimistic: int) -> None:
    """Seven peers always have more to ask; whoever asks for one piece gets it within two turns."""
    policy = UploadPolicy(upload_slots=slots, optimistic=optimistic)
    uploads = UploadQueue(policy, random.Random(seed))
    number = 0
    for _ in range(30):
        number = _turn(uploads, PEERS[1:], number)
    uploads.add(PEERS[0], request(0))
    for _ in range(3 * len(PEERS)):
        number = _turn(uploads, PEERS[1:], number)
        if not uploads.queued(PEERS[0]):
            return
    raise AssertionError("never served")


def _turn(uploads: UploadQueue, greedy: list[PeerId], number: int) -> int:
    for peer in greedy:
        while uploads.queued(peer) < 3:
            number += 1
            uploads.add(peer, request(number))
    for peer in uploads.runnable(0.0):
        serve(uploads, peer)
    return number


class UploadMachine(RuleBasedStateMachine):
    """Any order of requests, cancels, pieces and departures."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = UploadPolicy(upload_slots=2, optimistic=1, max_queued=4, slot_seconds=2.0)
        self.uploads = UploadQueue(self.policy, random.Random(0))
        self.now = 0.0
        self.number = 0
        self.waiting: dict[PeerId, list[int]] = {}
        self.sending: dict[PeerId, float] = {}

    @rule(peer=st.sampled_from(PEERS[:6]))
    def ask(self, peer: PeerId) -> None:
        self.number += 1
        accepted = self.uploads.add(peer, request(self.number))
        mine = self.waiting.setdefault(peer, [])
        assert accepted == (len(mine) < self.policy.max_queued)
        if accepted:
            mine.append(self.number)

    @rule(peer=st.sampled_from(PEERS[:6]))
    def cancel(self, peer: PeerId) -> None:
        mine = self.waiting.get(peer, [])
        number = mine[-1] if mine else 0
        assert self.uploads.cancel(peer, number) == bool(mine)
        if mine:
            mine.pop()

    @rule(peer=st.sampled_from(PEERS[:6]))
    def take(self, peer: PeerId) -> None:
        runnable = peer in self.uploads.runnable(self.now)
        found = self.uploads.next(peer, self.now)
        assert (found is not None) == runnable
        if found is not None:
            assert found.number == self.waiting[peer].pop(0)
            assert peer not in self.sending
            self.sending[peer] = self.now

    @precondition(lambda self: self.sending)
    @rule(data=st.data(), nbytes=st.integers(0, 1 << 27))
    def finish(self, data: st.DataObject, nbytes: int) -> None:
        peer = data.draw(st.sampled_from(sorted(self.sending)))
        del self.sending[peer]
        self.uploads.sent(peer, nbytes, self.now)

    @rule(peer=st.sampled_from(PEERS[:6]))
    def leave(self, peer: PeerId) -> None:
        self.uploads.remove_peer(peer)
        self.waiting.pop(peer, None)
        self.sending.pop(peer, None)

    @rule(seconds=st.floats(0.1, 3.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def holds(self) -> None:
        self.uploads.validate()
        for peer in PEERS:
            assert self.uploads.queued(peer) == len(self.waiting.get(peer, []))
        busy = sum(self.now - since < self.policy.slot_seconds for since in self.sending.values())
        runnable = self.uploads.runnable(self.now)
        idle = [peer for peer, mine in self.waiting.items() if mine and peer not in self.sending]
        assert len(runnable) == min(len(idle), max(0, 3 - busy))
        assert set(runnable) <= set(idle)


TestUploadMachine = UploadMachine.TestCase
