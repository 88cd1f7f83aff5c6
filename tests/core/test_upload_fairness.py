"""The upload queue: bounded, fair, and nobody waits for ever."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from p2pfl_torrent.core.messages import Request
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.uploads import UploadPolicy, UploadQueue


def request(number: int) -> Request:
    return Request(number, bytes(32), 0, number, 1)


def queue(waiting: str, *, slots: int = 4, optimistic: int = 1, max_queued: int = 64) -> Uploads:
    """A queue in which each letter, a peer, has asked as often as it stands there."""
    return Uploads(UploadPolicy(slots, optimistic, max_queued), waiting)


class Uploads:
    """An upload queue and what it was made to send, as text."""

    def __init__(self, policy: UploadPolicy, waiting: str) -> None:
        self.queue = UploadQueue(policy, random.Random(0))
        self.now = 0.0
        self._numbers = 0
        self.ask(waiting)

    def ask(self, peers: str) -> str:
        """Letters whose request was taken."""
        taken = ""
        for name in peers:
            self._numbers += 1
            taken += name if self.queue.add(PeerId(name), request(self._numbers)) else ""
        return taken

    @property
    def runnable(self) -> str:
        return "".join(sorted(self.queue.runnable(self.now)))

    def start(self, peers: str | None = None) -> str:
        """Letters that got a piece under way, of these or of all that are runnable."""
        started = ""
        for name in self.runnable if peers is None else peers:
            started += name if self.queue.next(PeerId(name), self.now) else ""
        return started

    def finish(self, peers: str, nbytes: int = 1000) -> None:
        for name in peers:
            self.queue.sent(PeerId(name), nbytes, self.now)


def test_slots_and_an_optimistic_place_are_served_at_once() -> None:
    uploads = queue("abcdefgh")
    assert len(uploads.start()) == 5
    assert uploads.start("abcdefgh") == ""
    assert uploads.runnable == ""


def test_whoever_is_runnable_is_let_in_and_nobody_else() -> None:
    uploads = queue("abcdefgh", slots=2)
    woken = uploads.runnable
    assert len(woken) == 3
    assert uploads.runnable == woken
    assert uploads.start("".join(set("abcdefgh") - set(woken))) == ""
    assert uploads.start(woken) == woken


def test_requests_of_one_peer_are_answered_in_order_one_at_a_time() -> None:
    uploads = queue("aaa")
    numbers = []
    for _ in range(3):
        answer = uploads.queue.next(PeerId("a"), 0.0)
        assert answer is not None
        numbers.append(answer.number)
        assert uploads.start("a") == ""
        uploads.finish("a")
    assert numbers == [1, 2, 3]
    assert uploads.runnable == ""


def test_a_freed_slot_goes_to_whoever_was_sent_least() -> None:
    uploads = queue("aaaaabbbbbcc", slots=1, optimistic=0)
    order = ""
    while uploads.runnable:
        name = uploads.start()
        order += name
        uploads.finish(name, {"a": 3000, "b": 1000, "c": 1000}[name])
    assert order[:7].count("a") == 1
    assert order[:7].count("b") > order[:7].count("a")
    assert order.count("a") == order.count("b") == 5


def test_bytes_count_while_every_place_is_taken() -> None:
    uploads = queue("a" * 40 + "b" * 40 + "c" * 40 + "d" * 40, slots=2, optimistic=0)
    pieces = dict.fromkeys("abcd", 0)
    under_way = list(uploads.start())
    for _ in range(60):
        name = under_way.pop(0)
        uploads.finish(name, 4000 if name == "a" else 1000)
        pieces[name] += 1
        under_way.extend(uploads.start())
    assert pieces["a"] * 3 <= min(pieces["b"], pieces["c"], pieces["d"])


def test_the_optimistic_place_goes_to_who_has_waited_longest() -> None:
    uploads = queue("a", slots=1)
    uploads.finish(uploads.start(), 1_000_000)
    uploads.ask("a")  # was sent most, and waits longest
    uploads.ask("bbbb")
    assert uploads.start() == "ab"
    uploads.finish("b", 1)
    uploads.ask("cccc")
    assert uploads.start() == "c"


def test_a_peer_without_requests_holds_no_place() -> None:
    uploads = queue("abc", slots=1, optimistic=0)
    first = uploads.start()
    uploads.finish(first)
    assert uploads.runnable not in ("", first)


def test_a_piece_that_takes_too_long_blocks_nobody_and_wakes_once() -> None:
    uploads = queue("ab", slots=1, optimistic=0)
    slow = uploads.start()
    assert uploads.queue.next_wakeup() == 2.0
    uploads.now = 2.0
    fast = uploads.start()
    assert {slow, fast} == {"a", "b"}
    uploads.ask("c")
    assert uploads.queue.next_wakeup() == 4.0  # of the second; the first is past and done with
    uploads.ask(slow)
    assert uploads.start(slow) == ""  # its piece is still under way
    uploads.finish(slow)
    uploads.finish(fast)
    assert uploads.start() in {"c", slow}


def test_nobody_waiting_needs_no_wakeup() -> None:
    uploads = queue("a")
    uploads.start()
    assert uploads.queue.next_wakeup() is None


def test_cancel_takes_back_what_waits_only() -> None:
    uploads = queue("aa")
    uploads.start()
    assert not uploads.queue.cancel(PeerId("a"), 1)
    assert uploads.queue.waits(PeerId("a"), 2)
    assert uploads.queue.cancel(PeerId("a"), 2)
    assert not uploads.queue.cancel(PeerId("a"), 2)
    assert not uploads.queue.cancel(PeerId("z"), 2)
    uploads.finish("a")
    assert uploads.runnable == ""


def test_too_many_requests_of_one_peer_are_refused() -> None:
    uploads = queue("", max_queued=3)
    assert uploads.ask("aaaab") == "aaab"
    assert uploads.queue.queued(PeerId("a")) == 3


def test_the_same_peers_are_not_first_everywhere() -> None:
    first = set()
    for seed in range(20):
        chosen = UploadQueue(UploadPolicy(1, 0), random.Random(seed))
        for number, name in enumerate("abcd"):
            chosen.add(PeerId(name), request(number))
        first.update(chosen.runnable(0.0))
    assert first == set("abcd")


NAMES = "abcdefgh"
peers = st.sampled_from(NAMES)
BOUND = (
    60  # pieces after which everybody that waits must have been served: peers x places, and room
)


class Fairness(RuleBasedStateMachine):
    """Peers come, ask, cancel and go; pieces finish, or stay under way for long."""

    @initialize(slots=st.integers(1, 4), optimistic=st.integers(1, 2), seed=st.integers(0, 99))
    def begin(self, slots: int, optimistic: int, seed: int) -> None:
        self.policy = UploadPolicy(slots, optimistic, 5)
        self.queue = UploadQueue(self.policy, random.Random(seed))
        self.now = 0.0
        self.number = 0
        self.asked: dict[str, list[int]] = {}
        self.under_way: dict[str, float] = {}
        self.waited: dict[str, int] = {}

    @rule(name=peers, times=st.integers(1, 4))
    def ask(self, name: str, times: int) -> None:
        for _ in range(times):
            self.number += 1
            waiting = self.asked.setdefault(name, [])
            taken = self.queue.add(PeerId(name), request(self.number))
            assert taken == (len(waiting) < 5)
            if taken:
                waiting.append(self.number)

    @rule(name=peers, which=st.integers(0, 4))
    def cancel(self, name: str, which: int) -> None:
        waiting = self.asked.get(name, [])
        number = waiting[which] if which < len(waiting) else -1
        assert self.queue.cancel(PeerId(name), number) == (number in waiting)
        if number in waiting:
            waiting.remove(number)

    @rule(name=peers)
    def leave(self, name: str) -> None:
        self.queue.remove_peer(PeerId(name))
        self.asked.pop(name, None)
        self.under_way.pop(name, None)
        self.waited.pop(name, None)

    @rule()
    def start(self) -> None:
        runnable = self.queue.runnable(self.now)
        for name in NAMES:
            before = self.asked.get(name, [])
            answer = self.queue.next(PeerId(name), self.now)
            if answer is not None:
                assert answer.number == before.pop(0)
                self.under_way[name] = self.now
                self.waited.pop(name, None)
            assert (answer is not None) == (name in runnable)
        places = self.policy.upload_slots + self.policy.optimistic
        fresh = [name for name, since in self.under_way.items() if self.now < since + 2.0]
        assert len(fresh) <= places
        idle = [name for name in NAMES if self.asked.get(name) and name not in self.under_way]
        assert not idle or len(fresh) == places

    @rule(nbytes=st.sampled_from([0, 1000, 1 << 20, 80 << 20]), data=st.data())
    def finish(self, nbytes: int, data: st.DataObject) -> None:
        if self.under_way:
            self._finish(data.draw(st.sampled_from(sorted(self.under_way))), nbytes)

    def _finish(self, name: str, nbytes: int) -> None:
        del self.under_way[name]
        self.queue.sent(PeerId(name), nbytes, self.now)
        for other in NAMES:
            if self.asked.get(other) and other not in self.under_way:
                self.waited[other] = self.waited.get(other, 0) + 1

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def keep_going(self) -> None:
        """However the bytes are spread, pieces that finish serve everybody that waits."""
        waiting = {name for name in NAMES if self.asked.get(name) and name not in self.under_way}
        for _ in range(BOUND):
            self.start()
            waiting -= set(self.under_way)
            if not waiting or not self.under_way:
                break
            oldest = min(self.under_way, key=lambda name: (self.under_way[name], name))
            self._finish(oldest, 1)
            self.ask(oldest, 1)  # it never stops asking
            self.now += 0.01
        assert not waiting

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "queue"):
            self.queue.validate()
            for name in NAMES:
                assert self.queue.queued(PeerId(name)) == len(self.asked.get(name, []))


TestFairness = Fairness.TestCase
TestFairness.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
