"""What the picker costs: seconds of CPU to pick, receive and verify every block of many updates.

    python -m benchmarks.picker --updates 10 --chunks 2000 --json -

No network and no hashing: holders of 100, 10 and 1 Mbit/s answer in virtual time. In `all` every
holder has every chunk from the start; in `grows` each update has one holder, and the others
announce its chunks one by one, as in a swarm; `starved` is `grows` with most of the update expected
to miss the deadline, so that importance decides.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from p2pfl_torrent.core.chunking import ChunkLayout, Layout
from p2pfl_torrent.core.manifest import HASH_BYTES, Manifest, make_manifest
from p2pfl_torrent.core.messages import REJECT_CANCELLED
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.picker import BlockRequest, Picker, PickerPolicy
from p2pfl_torrent.core.tensors import ModelSpec

BLOCK = 64 << 10
RATES = (12.5e6, 1.25e6, 125e3)  # bytes per second: 100, 10 and 1 Mbit/s, in turn
SCENARIOS = ("all", "grows", "starved")


@dataclass(frozen=True, slots=True)
class Row:
    """One scenario's cost.

    Attributes:
        cpu_seconds: of the picker and of the harness around it.
        events: calls of the picker that a swarm would make.
        duplicate_ratio: bytes received twice over all bytes received.
        virtual_seconds: until everything was here, and
        bound_seconds: what the holders' rates allow at best.
    """

    scenario: str
    holders: int
    blocks: int
    cpu_seconds: float
    blocks_per_cpu_second: float
    events: int
    duplicate_ratio: float
    virtual_seconds: float
    bound_seconds: float


@dataclass(slots=True)
class _Link:
    """A holder that answers in order at its rate."""

    rate: float
    queue: deque[BlockRequest] = field(default_factory=deque)
    busy: bool = False


@dataclass(frozen=True, slots=True)
class _Have:
    at: float
    peer: PeerId
    manifest: Manifest
    chunks: range


def updates(count: int, chunks: int, blocks: int) -> tuple[Layout, list[Manifest]]:
    """A layout and updates of it; nothing but sizes and ranks matters to the picker."""
    layout = Layout(
        ModelSpec(()), tuple(ChunkLayout(k, (), 1) for k in range(chunks)), block_size=BLOCK
    )
    manifests = [
        make_manifest(
            layout=layout,
            swarm=bytes(HASH_BYTES),
            round=1,
            owner=PeerId(f"owner{owner}"),
            base_hash=bytes(HASH_BYTES),
            num_samples=1,
            sizes=[BLOCK * blocks - 100] * chunks,
            ranks=random.Random(owner).sample(range(chunks), chunks),
            blocks=[bytes(HASH_BYTES * blocks)] * chunks,
            sign=lambda _: b"",
        )
        for owner in range(count)
    ]
    return layout, manifests


class _Exchange:
    """One fetcher and its holders in virtual time."""

    def __init__(self, scenario: str, layout: Layout, manifests: list[Manifest], holders: int):
        self.picker = Picker(layout=layout, policy=PickerPolicy(), rng=random.Random(1))
        self.links = {
            PeerId(f"holder{index}"): _Link(RATES[index % len(RATES)]) for index in range(holders)
        }
        self.events: list[tuple[float, int, PeerId, BlockRequest]] = []
        self.serial = self.calls = self.duplicates = self.total = 0
        self.now = 0.0
        self.manifests = manifests
        payload = sum(manifest.header.payload_bytes for manifest in manifests)
        self.bound = payload / sum(link.rate for link in self.links.values())
        self.haves = sorted(self._haves(scenario, len(layout.chunks)), key=lambda have: -have.at)
        for peer in self.links:
            self.picker.add_holder(peer)
        for manifest in manifests:
            self.picker.add_update(manifest)
        if scenario == "starved":
            self.picker.set_pressure(0.8)

    def _haves(self, scenario: str, chunks: int) -> Iterator[_Have]:
        """Announcements: all at once, or spread evenly over half of the exchange."""
        peers, rng = list(self.links), random.Random(2)
        for index, manifest in enumerate(self.manifests):
            owner = peers[index % len(peers)]
            for peer in peers:
                if scenario == "all" or peer == owner:
                    yield _Have(0.0, peer, manifest, range(chunks))
                    continue
                for chunk in range(chunks):
                    at = rng.uniform(0.0, self.bound / 2)
                    yield _Have(at, peer, manifest, range(chunk, chunk + 1))

    def announce(self) -> None:
        """Announcements that are due; each is followed by a question to its holder."""
        while self.haves and self.haves[-1].at <= self.now:
            have = self.haves.pop()
            self.picker.holder_has(have.peer, have.manifest.update, have.chunks)
            self.calls += 1
            self.ask([have.peer])

    def ask(self, peers: Sequence[PeerId]) -> None:
        for peer in peers:
            self.calls += 1
            for request in self.picker.next_requests(peer, self.now):
                self.links[peer].queue.append(request)
            self._serve(peer)

    def _serve(self, peer: PeerId) -> None:
        link = self.links[peer]
        if link.queue and not link.busy:
            request = link.queue.popleft()
            link.busy = True
            self._at(self.now + request.size / link.rate, peer, request)

    def _at(self, when: float, peer: PeerId, request: BlockRequest) -> None:
        self.serial += 1
        heapq.heappush(self.events, (when, self.serial, peer, request))

    def step(self) -> bool:
        """The next announcements or piece; whether there was any."""
        if self.haves and (not self.events or self.haves[-1].at < self.events[0][0]):
            self.now = self.haves[-1].at
            self.announce()
            return True
        if not self.events:
            return False
        self.now, _, peer, request = heapq.heappop(self.events)
        self.calls += 1
        link = self.links[peer]
        link.busy = False
        self.total += request.size
        wanted = self.picker.received(peer, request.number, request.size, self.now)
        outcome = self.picker.verified(wanted, True, self.now) if wanted else None
        self.duplicates += outcome.duplicate_bytes if outcome else request.size
        for cancelled in outcome.cancels if outcome else ():
            self._cancel(cancelled)
        self.picker.next_timeout(self.now)
        self.ask([peer])
        return True

    def _cancel(self, request: BlockRequest) -> None:
        link = self.links[request.peer]
        if request in link.queue:
            link.queue.remove(request)
            self.picker.rejected(request.peer, request.number, self.now, REJECT_CANCELLED)
            self.ask([request.peer])

    def missing(self) -> bool:
        return any(not self.picker.held(m.update).complete for m in self.manifests)


def measure(scenario: str, *, count: int, chunks: int, blocks: int, holders: int) -> Row:
    """One scenario from the first announcement to the last block."""
    layout, manifests = updates(count, chunks, blocks)
    began = time.process_time()
    exchange = _Exchange(scenario, layout, manifests, holders)
    while exchange.step():
        pass
    if exchange.missing():
        raise AssertionError(f"{scenario} stopped before everything was here")
    cpu = time.process_time() - began
    number = count * chunks * blocks
    return Row(
        scenario,
        holders,
        number,
        cpu,
        number / cpu,
        exchange.calls,
        exchange.duplicates / exchange.total,
        exchange.now,
        exchange.bound,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks picker",
        description="CPU that the picker takes, holders of 100, 10 and 1 Mbit/s in turn.",
        epilog="example: python -m benchmarks picker --updates 10 --chunks 2000 --json -",
    )
    parser.add_argument("--updates", type=int, default=10, metavar="N")
    parser.add_argument("--chunks", type=int, default=2000, metavar="N", help="per update")
    parser.add_argument("--blocks", type=int, default=4, metavar="N", help="of 64 KiB, per chunk")
    parser.add_argument("--holders", type=int, default=9, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the rows; - for standard output")
    args = parser.parse_args(argv)
    rows = [
        measure(
            scenario,
            count=args.updates,
            chunks=args.chunks,
            blocks=args.blocks,
            holders=args.holders,
        )
        for scenario in SCENARIOS
    ]
    if args.json != "-":
        print(
            f"{'scenario':10}{'blocks':>9}{'cpu s':>8}{'blocks/s':>10}{'twice':>8}{'of bound':>10}"
        )
        for row in rows:
            print(
                f"{row.scenario:10}{row.blocks:9}{row.cpu_seconds:8.2f}"
                f"{row.blocks_per_cpu_second:10.0f}{row.duplicate_ratio:8.2%}"
                f"{row.virtual_seconds / row.bound_seconds:10.2f}"
            )
    if args.json:
        text = json.dumps({"runs": [asdict(row) for row in rows]}, indent=2)
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
