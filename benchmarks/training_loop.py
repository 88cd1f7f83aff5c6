"""A training program of the benchmark `training`: a small CNN on one thread of torch.

    python -m benchmarks.training_loop SPEC.json

It is led by lines. ``join`` makes it a peer, with the network in a thread of this process: then
``take train`` and ``take wait`` take the other's update, beside training or not, and then share the
own. Without, ``train`` trains until a next line. It tells of each batch when it was done (by
time.monotonic), and how long the training thread had until then waited for a core.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.member import Spec, cpu_seconds, model, tell
from benchmarks.training_node import arrival
from p2pfl_torrent import Peer, PeerConfig
from p2pfl_torrent.learning.models import small_cnn

LEAD = 2.0  # seconds of training before and after an update comes, to compare with
SHAPE = (1, 28, 28)  # MNIST's
BATCH = 32
MALLOC_KEEPS = 28 << 20  # glibc learns from blocks of up to 32 MiB


Batch = tuple[float, float]  # when it was done, and seconds waited for a core until then


def waited_for_core() -> float:
    """Seconds that this thread has been ready to run and had no core, so far."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


class Ballast(nn.Module):
    """A small CNN to train, and tensors that are exchanged and never trained.

    So the update has any size, and a batch takes the same time.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.cnn = small_cnn(SHAPE, 10)
        for tensor in model(spec).tensors:
            name, _, leaf = tensor.name.partition(".")
            layer = nn.Module()
            layer.register_buffer(leaf, torch.zeros(tensor.shape))
            self.add_module(name, layer)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.cnn(images)
        return result


class Training:
    """Batches of noise, one after the other."""

    def __init__(self, network: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        self._images = torch.rand((BATCH, *SHAPE), generator=generator)
        self._labels = torch.randint(10, (BATCH,), generator=generator)
        self._network = network
        self._optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

    def batches(self, over: Callable[[], bool]) -> list[Batch]:
        """Train until it is over."""
        times: list[Batch] = []
        while not over():
            self._optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self._network(self._images), self._labels)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            self._optimizer.step()
            times.append((time.monotonic(), waited_for_core()))
        return times


def timed(seconds: float) -> Callable[[], bool]:
    """True from so many seconds on."""
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


def told() -> str:
    return sys.stdin.readline().strip()


def take(peer: Peer, training: Training | None) -> None:
    """Take the other's update, beside training if there is any; then share ours."""
    events = peer.events()
    arrived = threading.Event()
    window: list[float] = []

    def watch() -> None:
        window.extend(arrival(events, peer.peer_id))
        arrived.set()

    watching = threading.Thread(target=watch)
    watching.start()
    times = training.batches(timed(LEAD)) if training else []
    used = cpu_seconds()
    tell({"taking": True})
    times += training.batches(arrived.is_set) if training else []
    watching.join()
    used = cpu_seconds() - used
    times += training.batches(timed(LEAD)) if training else []
    tell({"window": window, "batches": times, "cpu_seconds": used})
    told()
    peer.exchange(num_samples=100)
    tell({"shared": True})


def until_told() -> Callable[[], bool]:
    """True when the leader has said another line."""
    over = threading.Event()

    def wait() -> None:
        told()
        over.set()

    threading.Thread(target=wait).start()
    return over.is_set


def train(training: Training) -> bool:
    """Answer the leader's lines that need no peer; whether it then wants one."""
    while (line := told()) == "train":
        over = until_told()
        tell({"training": True})
        tell({"batches": training.batches(over)})
    return line == "join"


def main(spec: Spec) -> None:
    torch.set_num_threads(1)
    # malloc returns what a batch needs to the system, batch by batch, until it has let go something
    # larger once. Programs that load data have; here one would, when updates come, and one not.
    torch.empty(MALLOC_KEEPS, dtype=torch.uint8)
    network = Ballast(spec)
    training = Training(network.cnn)
    training.batches(timed(0.5))  # what the first batches allocate
    tell({"up": True})
    if not train(training):
        return
    with Peer(PeerConfig.from_mapping(spec.config), network) as peer:
        tell({"ready": peer.peer_id})
        while line := told():
            take(peer, training if line == "take train" else None)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Spec(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
