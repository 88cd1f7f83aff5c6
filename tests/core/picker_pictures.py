"""A picker and its holders as text: ``picker("2213", importance="1111").take("p0", 1)``."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.chunking import ChunkLayout, Layout
from p2pfl_torrent.core.manifest import HASH_BYTES, Manifest, UpdateId, make_manifest
from p2pfl_torrent.core.messages import REJECT_CANCELLED
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.picker import BlockRequest, Picker, PickerPolicy, Received
from p2pfl_torrent.core.tensors import ModelSpec

BLOCK = 16 << 10


def layout_of(chunks: int) -> Layout:
    return Layout(ModelSpec(()), tuple(ChunkLayout(k, (), 1) for k in range(chunks)), BLOCK)


def manifest_of(owner: str, blocks: list[int], ranks: list[int]) -> Manifest:
    """An update with so many blocks in each chunk, the last of each a little short."""
    return make_manifest(
        layout=layout_of(len(blocks)),
        swarm=bytes(HASH_BYTES),
        round=1,
        owner=PeerId(owner),
        base_hash=bytes(HASH_BYTES),
        num_samples=1,
        sizes=[BLOCK * count - 10 for count in blocks],
        ranks=ranks,
        blocks=[bytes(HASH_BYTES * count) for count in blocks],
        sign=lambda _: b"",
    )


@dataclass
class Scene:
    """One picker, one clock, and holders that answer when they are told to.

    Attributes:
        waiting: per holder, the requests it was sent and did not answer.
        cancelled: those it was told to forget, which it answers all the same.
    """

    picker: Picker
    manifests: list[Manifest]
    now: float = 0.0
    waiting: dict[str, list[BlockRequest]] = field(default_factory=dict)
    cancelled: list[BlockRequest] = field(default_factory=list)

    def update(self, owner: int = 0) -> UpdateId:
        return self.manifests[owner].update

    def holder(self, name: str, has: str, owner: int = 0, rate: float | None = None) -> Scene:
        """A holder of the chunks marked ``*``, or some more of one; ``rate`` as if measured."""
        if name not in self.waiting:
            self.picker.add_holder(PeerId(name))
            self.waiting[name] = []
            if rate is not None:
                self._measure(name, rate)
        chunks = [chunk for chunk, mark in enumerate(has) if mark == "*"]
        self.picker.holder_has(PeerId(name), self.update(owner), chunks)
        self.picker.validate()
        return self

    def _measure(self, name: str, rate: float) -> None:
        """Let a holder answer at a rate, in bytes per second, with some update of its own."""
        probe = manifest_of(f"probe of {name}", [8] * 80, list(range(80)))
        self.picker.add_update(probe)
        self.picker.holder_has(PeerId(name), probe.update, range(80))
        began = self.now
        while self.now < began + 0.05:
            self.ask(name)
            request = self.waiting[name][0]
            self.answer(request, request.size / rate)
        assert 0.9 * rate < self.picker.holder_rate(PeerId(name)) < 1.1 * rate
        for request in self.picker.remove_update(probe.update):
            self.reject(request)

    def ask(self, name: str) -> list[BlockRequest]:
        """What the picker asks of a holder now."""
        requests = self.picker.next_requests(PeerId(name), self.now)
        self.waiting[name].extend(requests)
        self.picker.validate()
        return requests

    def take(self, name: str, count: int, owner: int = 0) -> str:
        """The chunks that a holder is asked for one after the other, each answered at once."""
        taken = ""
        for _ in range(count):
            requests = self.ask(name)
            if not requests:
                break
            for request in requests:
                self.answer(request)
            taken += "".join(str(r.chunk) for r in requests if r.update == self.update(owner))
        return taken

    def answer(self, request: BlockRequest, seconds: float = 0.02) -> Received | None:
        """A holder's piece; cancels that follow reach the others."""
        self.now += seconds
        self.waiting[request.peer].remove(request)
        wanted = self.picker.received(request.peer, request.number, request.size, self.now)
        outcome = self.picker.verified(wanted, True, self.now) if wanted is not None else None
        self.cancelled.extend(outcome.cancels if outcome is not None else ())
        self.picker.validate()
        return outcome

    def reject(self, request: BlockRequest, reason: int = REJECT_CANCELLED) -> None:
        self.waiting[request.peer].remove(request)
        self.picker.rejected(request.peer, request.number, self.now, reason)
        self.picker.validate()

    def expire(self, seconds: float) -> list[BlockRequest]:
        self.now += seconds
        expired = self.picker.expire(self.now)
        self.cancelled.extend(expired)
        self.picker.validate()
        return expired

    def states(self, owner: int = 0) -> str:
        return self.picker.chunk_states(self.update(owner))


def picker(
    availability: str,
    *,
    importance: str = "",
    blocks: str = "",
    ages: str = "",
    here: str = "",
    owners: int = 1,
    pressure: float = 0.0,
    seed: int = 0,
    rates: tuple[float, ...] = (),
    **policy: float | str,
) -> Scene:
    """Chunks with so many holders each: p0 has all that have any, p1 those with two, and so on.

    Args:
        importance: per chunk a digit, from which the ranks follow (equals in order).
        blocks: per chunk how many; one each by default.
        ages: per chunk, rounds since it was last merged.
        here: per chunk "#" if it is here.
        rates: of p0, p1 and so on, in bytes per second, as if measured before.
    """
    chunks = len(availability)
    made = Picker(
        layout=layout_of(chunks),
        policy=PickerPolicy(**{"random_first": 0, **policy}),  # type: ignore[arg-type]
        rng=random.Random(seed),
    )
    weight = importance or "1" * chunks
    order = sorted(range(chunks), key=lambda chunk: weight[chunk])
    ranks = [order.index(chunk) for chunk in range(chunks)]
    sizes = [int(count) for count in blocks or "1" * chunks]
    scene = Scene(made, [manifest_of(f"owner{index}", sizes, ranks) for index in range(owners)])
    for index, rate in enumerate(rates):
        scene.holder(f"p{index}", "", rate=rate)
    complete = Bitfield(chunks)
    for chunk, mark in enumerate(here):
        if mark == "#":
            complete.add(chunk)
    for index, manifest in enumerate(scene.manifests):
        made.add_update(
            manifest,
            complete=Bitfield.from_bytes(complete.to_bytes(), chunks),
            ages=[int(age) for age in ages] if ages else None,
        )
        for holder in range(max(map(int, availability))):
            has = "".join("*" if int(count) > holder else " " for count in availability)
            scene.holder(f"p{holder}", has, index)
    made.set_pressure(pressure)
    return scene
