"""What a holder tells its fetchers of new chunks: soon, and together."""

from __future__ import annotations

import random

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.ledger import Ledger
from p2pfl_torrent.core.manifest import Manifest
from p2pfl_torrent.core.messages import Availability, Have
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.serving import MAX_SPACING, Serving
from p2pfl_torrent.core.uploads import UploadPolicy, UploadQueue
from tests.core.swarm_world import World


class Scene:
    """A holder that learns chunks of updates."""

    def __init__(self, *fetchers: str) -> None:
        self.world = World("abc")
        self.chunks = len(self.world.layout.chunks)
        self.ledger = Ledger(self.chunks, 0.3)
        queue = UploadQueue(UploadPolicy(), random.Random(0))
        self.serving = Serving(self.ledger, queue, self.world.layout.block_size)
        for name in fetchers:
            self.serving.opened(PeerId(name), 1)

    def update(self, owner: str) -> Manifest:
        manifest = self.world.update(owner, 1)
        self.ledger.add(manifest, Bitfield(self.chunks))
        return manifest

    def have(self, manifest: Manifest, *chunks: int) -> None:
        for chunk in chunks:
            self.ledger.hold(manifest.update, chunk)
            self.serving.have(manifest.update, chunk)

    def told(self, now: float) -> dict[str, Have | Availability]:
        """Whom it tells what at that time; at most one message each."""
        messages: dict[str, Have | Availability] = {}
        for effect in self.serving.announce(now):
            assert isinstance(effect, ev.ToFetcher)
            assert isinstance(effect.message, (Have, Availability))
            assert effect.peer not in messages
            messages[effect.peer] = effect.message
        return messages


def test_after_a_quiet_while_a_chunk_is_announced_at_once() -> None:
    scene = Scene("x", "y")
    update = scene.update("a")
    scene.have(update, 1)
    assert scene.told(5.0) == dict.fromkeys("xy", Have(update.update, (1,)))
    assert scene.told(9.0) == {}


def test_the_next_ones_wait_for_each_other() -> None:
    scene = Scene("x", "y")
    first, second = scene.update("a"), scene.update("b")
    scene.have(first, 0)
    assert scene.told(5.0)
    scene.have(first, 1)
    assert scene.told(5.01) == {}
    scene.have(first, 2)
    scene.have(second, 0)
    wakeup = scene.serving.next_wakeup()
    assert wakeup is not None
    assert 5.01 < wakeup <= 5.0 + MAX_SPACING
    message = scene.told(wakeup)["x"]
    assert isinstance(message, Availability)
    said = {item.update: Bitfield.from_bytes(item.chunks, scene.chunks) for item in message.updates}
    assert {update: list(chunks) for update, chunks in said.items()} == {
        first.update: [1, 2],
        second.update: [0],
    }
    assert scene.serving.next_wakeup() is None


def test_more_fetchers_are_told_less_often_but_soon_all_the_same() -> None:
    wakeups = []
    for number in (1, 4, 100):
        scene = Scene(*(f"f{k}" for k in range(number)))
        update = scene.update("a")
        scene.have(update, 0)
        assert len(scene.told(1.0)) == number
        scene.have(update, 1)
        wakeup = scene.serving.next_wakeup()
        assert wakeup is not None
        wakeups.append(wakeup - 1.0)
    assert wakeups == sorted(wakeups)
    assert wakeups[0] < wakeups[1] < wakeups[2] <= MAX_SPACING


def test_what_was_forgotten_meanwhile_is_not_announced() -> None:
    scene = Scene("x")
    kept, lost, gone = scene.update("a"), scene.update("b"), scene.update("c")
    scene.have(lost, 0)
    scene.ledger.forget(lost.update)
    assert scene.told(1.0) == {}
    scene.have(kept, 1)
    scene.have(gone, 0)
    scene.ledger.forget(gone.update)
    message = scene.told(2.0)["x"]
    assert isinstance(message, Availability)
    assert [item.update for item in message.updates] == [kept.update]


def test_each_peer_learns_of_every_chunk_of_its_neighbours() -> None:
    world = World("abcd", gossip=False)
    world.play()
    world.run(1.0)
    assert all(node.swarm.others_have_all() for node in world.peers)
