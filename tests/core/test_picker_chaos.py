"""Whatever holders do: no block is lost or fetched for nothing, and what somebody has is got."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.manifest import Manifest, UpdateId
from p2pfl_torrent.core.messages import REJECT_BUSY, REJECT_CANCELLED, REJECT_MISSING
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.picker import BlockRequest, Picker, PickerPolicy, Received
from tests.core.picker_pictures import BLOCK, layout_of, manifest_of

NAMES = ("p0", "p1", "p2", "p3")
BLOCKS = [1, 4, 2, 9, 3, 1]
CHUNKS = len(BLOCKS)
Block = tuple[UpdateId, int, int]
holders = st.sampled_from(NAMES)


class Chaos(RuleBasedStateMachine):
    """A picker beside a plain account of what was asked, answered, cancelled and verified."""

    @initialize(
        seed=st.integers(0, 999),
        endgame=st.integers(1, 3),
        active=st.sampled_from([1, 3, 10]),
        pending=st.sampled_from([1, 20]),
        selection=st.sampled_from(["rarest_first", "importance", "random"]),
    )
    def begin(self, seed: int, endgame: int, active: int, pending: int, selection: str) -> None:
        self.policy = PickerPolicy(
            selection=selection,
            active_requests=active,
            pending_chunks=pending,
            endgame_holders=endgame,
        )
        self.picker = Picker(layout=layout_of(CHUNKS), policy=self.policy, rng=random.Random(seed))
        self.seed = seed
        self.now = 0.0
        self.updates: dict[UpdateId, Manifest] = {}
        self.has: dict[str, set[tuple[UpdateId, int]]] = {}
        self.waiting: dict[str, list[BlockRequest]] = {}  # asked and not answered, oldest first
        self.given_up: dict[str, list[BlockRequest]] = {}  # those of them that were cancelled
        self.here: set[Block] = set()
        self.made = 0

    def _blocks(self, request: BlockRequest) -> set[Block]:
        return {(request.update, request.chunk, block) for block in request.blocks}

    def _open(self, name: str) -> list[BlockRequest]:
        return [r for r in self.waiting.get(name, []) if r not in self.given_up[name]]

    def _covered(self) -> dict[Block, set[str]]:
        """Who has an open request for each block."""
        covered: dict[Block, set[str]] = {}
        for name in self.waiting:
            for request in self._open(name):
                for block in self._blocks(request):
                    covered.setdefault(block, set()).add(name)
        return covered

    # --- what happens ------------------------------------------------------------------------

    @rule()
    def an_update_appears(self) -> None:
        if len(self.updates) == 3:
            return
        self.made += 1
        ranks = random.Random(self.made).sample(range(CHUNKS), CHUNKS)
        manifest = manifest_of(f"owner{self.made}", BLOCKS, ranks)
        self.updates[manifest.update] = manifest
        self.picker.add_update(manifest, ages=[1 + self.made % 3] * CHUNKS)

    @precondition(lambda self: bool(getattr(self, "updates", None)))
    @rule(which=st.integers(0, 2))
    def an_update_is_dropped(self, which: int) -> None:
        update = list(self.updates)[which % len(self.updates)]
        expected = [r for name in self.waiting for r in self._open(name) if r.update == update]
        cancels = self.picker.remove_update(update)
        assert sorted(cancels, key=repr) == sorted(expected, key=repr)
        self._cancelled(cancels)
        del self.updates[update]
        self.here = {block for block in self.here if block[0] != update}
        for has in self.has.values():
            has -= {key for key in has if key[0] == update}

    @rule(name=holders)
    def a_holder_comes_or_comes_back(self, name: str) -> None:
        self.picker.add_holder(PeerId(name))
        self.has[name], self.waiting[name], self.given_up[name] = set(), [], []

    @rule(name=holders)
    def a_holder_goes(self, name: str) -> None:
        self.picker.remove_holder(PeerId(name))
        for kept in (self.has, self.waiting, self.given_up):
            kept.pop(name, None)

    @rule(name=holders, which=st.integers(0, 2), chunks=st.sets(st.integers(0, CHUNKS - 1)))
    def a_holder_announces(self, name: str, which: int, chunks: set[int]) -> None:
        if self.updates:
            update = list(self.updates)[which % len(self.updates)]
            self.picker.holder_has(PeerId(name), update, sorted(chunks))
            if name in self.has:
                self.has[name] |= {(update, chunk) for chunk in chunks}

    @rule(share=st.floats(0, 1))
    def the_pressure_changes(self, share: float) -> None:
        self.picker.set_pressure(share)

    @rule(name=holders)
    def a_holder_is_asked(self, name: str) -> None:
        covered = self._covered()
        unmeasured = self.picker.holder_rate(PeerId(name)) == 0.0
        silent = name in self.waiting and self.expired(name)
        requests = self.picker.next_requests(PeerId(name), self.now)
        assert not (silent and requests)
        for request in requests:
            blocks = self._blocks(request)
            assert request.key in self.has[name]
            assert not blocks & self.here
            assert request.size == self._size(request)
            for block in blocks:
                others = covered.setdefault(block, set())
                assert name not in others
                others.add(name)
                assert len(others) <= self.policy.endgame_holders
                if len(others) > 1 and unmeasured and self.policy.pending_chunks > CHUNKS:
                    assert not self._free(name, covered)  # else this was no endgame
            self.waiting[name].append(request)
        self._in_flight(name)

    def expired(self, name: str) -> bool:
        return any(r in self.late for r in self.given_up[name])

    @property
    def late(self) -> list[BlockRequest]:
        return self.__dict__.setdefault("_late", [])  # type: ignore[no-any-return]

    def _free(self, name: str, covered: dict[Block, set[str]]) -> set[Block]:
        """Blocks that a holder has, that nobody was asked for and that are not here."""
        held = {(u, c, b) for u, c in self.has[name] for b in range(BLOCKS[c])}
        return held - self.here - {block for block, names in covered.items() if names}

    def _size(self, request: BlockRequest) -> int:
        last = request.blocks[-1] == BLOCKS[request.chunk] - 1
        return request.count * BLOCK - (10 if last else 0)

    def _in_flight(self, name: str) -> None:
        flying = self._open(name)
        assert len(flying) <= self.policy.active_requests
        rate = self.picker.holder_rate(PeerId(name))
        if len(flying) > 1 and flying[-1].sent_at == self.now:
            bound = rate * self.policy.target_seconds if rate else self.policy.first_bytes
            assert sum(r.size for r in flying) <= max(bound, self.policy.first_bytes / 4)

    @rule(name=holders, seconds=st.sampled_from([0.0, 0.001, 0.05, 1.0, 8.0]), good=st.booleans())
    def a_piece_comes(self, name: str, seconds: float, good: bool) -> None:
        if self.waiting.get(name):
            self.now += seconds
            self._piece(name, self.waiting[name][0], good=good)

    def _piece(self, name: str, request: BlockRequest, *, good: bool) -> None:
        self._answered(name, request)
        wanted = self.picker.received(PeerId(name), request.number, request.size, self.now)
        useful = request.update in self.updates and not self._blocks(request) <= self.here
        assert (wanted == request) if useful else wanted is None
        if wanted is not None:
            self._verified(wanted, self.picker.verified(wanted, good, self.now), good=good)
        self._ended(name, request)

    def _verified(self, request: BlockRequest, outcome: Received, *, good: bool) -> None:
        fresh = self._blocks(request) - self.here if good else set()
        assert {(request.update, request.chunk, block) for block in outcome.blocks} == fresh
        assert (outcome.duplicate_bytes > 0) == (good and len(fresh) < request.count)
        self.here |= fresh
        whole = {(request.update, request.chunk, b) for b in range(BLOCKS[request.chunk])}
        assert outcome.chunk_complete == (good and whole <= self.here)
        superseded = [
            other
            for name in self.waiting
            for other in self._open(name)
            if good and other.key == request.key and self._blocks(other) <= self.here
        ]
        assert sorted(outcome.cancels, key=repr) == sorted(superseded, key=repr)
        self._cancelled(outcome.cancels)

    def _cancelled(self, requests: tuple[BlockRequest, ...] | list[BlockRequest]) -> None:
        for request in requests:
            assert request in self.waiting[request.peer]
            assert request not in self.given_up[request.peer]
            self.given_up[request.peer].append(request)

    def _answered(self, name: str, request: BlockRequest) -> None:
        self.waiting[name].remove(request)
        if request in self.given_up[name]:
            self.given_up[name].remove(request)

    def _ended(self, name: str, request: BlockRequest) -> None:
        """A request that ended once does not end again."""
        if all(other.number != request.number for other in self.waiting[name]):
            with pytest.raises(RemoteProtocolError):
                self.picker.received(PeerId(name), request.number, request.size, self.now)
            with pytest.raises(RemoteProtocolError):
                self.picker.rejected(PeerId(name), request.number, self.now)

    @rule(name=holders, which=st.integers(0, 9), busy=st.booleans())
    def a_holder_rejects(self, name: str, which: int, busy: bool) -> None:
        if not self.waiting.get(name):
            return
        request = self.waiting[name][which % len(self.waiting[name])]
        counted_on = request in self._open(name)
        alone = len(self._open(name)) == 1
        self._answered(name, request)
        reason = REJECT_BUSY if busy else REJECT_MISSING
        self.picker.rejected(PeerId(name), request.number, self.now, reason)
        if counted_on and (not busy or alone):
            self.has[name].discard(request.key)
        self._ended(name, request)

    @rule(name=holders)
    def cancels_reach_a_holder(self, name: str) -> None:
        for request in list(self.given_up.get(name, [])):
            self._answered(name, request)
            self.picker.rejected(PeerId(name), request.number, self.now, REJECT_CANCELLED)

    @rule(seconds=st.sampled_from([0.3, 3.0, 30.0, 300.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._expire()

    def _expire(self) -> None:
        before = {name: self._open(name) for name in self.waiting}
        expired = self.picker.expire(self.now)
        for name in {str(request.peer) for request in expired}:
            assert [r for r in expired if r.peer == name] == before[name]
        self.late.extend(expired)
        self._cancelled(expired)

    # --- what holds --------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "picker"):
            return
        self.picker.validate()
        for update, manifest in self.updates.items():
            counts = [
                sum((update, chunk) in has for has in self.has.values()) for chunk in range(CHUNKS)
            ]
            assert self.picker.availability(update) == counts
            here = [
                {(update, chunk, block) for block in range(BLOCKS[chunk])} <= self.here
                for chunk in range(CHUNKS)
            ]
            assert list(self.picker.held(update)) == [k for k in range(CHUNKS) if here[k]]
            verified = sum(1 for block in self.here if block[0] == update) * BLOCK
            verified -= sum(
                10 for chunk in range(CHUNKS) if (update, chunk, BLOCKS[chunk] - 1) in self.here
            )
            assert self.picker.bytes_verified(update) == verified
            assert verified <= manifest.header.payload_bytes
            missing = any(counts[k] and not here[k] for k in range(CHUNKS))
            assert self.picker.missing_available(update) == missing
        for name in self.waiting:
            assert self.picker.open_requests(PeerId(name)) == len(self._open(name))

    def teardown(self) -> None:
        """Left in peace, with holders that answer, everything that somebody has arrives."""
        if not hasattr(self, "picker"):
            return
        for name in list(self.waiting):
            self.cancels_reach_a_holder(name)
        for _ in range(400):
            if not any(map(self.picker.missing_available, self.updates)):
                break
            for name in self.waiting:
                self.a_holder_is_asked(name)
            if not any(self.waiting.values()):
                timeout = self.picker.next_timeout(self.now)
                assert timeout is not None, "something is missing, nothing asked, and no timer"
                self.now = max(self.now, timeout)
                self._expire()
            for name in self.waiting:
                if self.waiting[name]:
                    self.now += 0.02
                    self._piece(name, self.waiting[name][0], good=True)
                self.cancels_reach_a_holder(name)
            self.holds()
        assert not any(map(self.picker.missing_available, self.updates))


TestChaos = Chaos.TestCase
TestChaos.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
