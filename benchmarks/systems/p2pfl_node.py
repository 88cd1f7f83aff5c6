"""One p2pfl node, whose learner trains nothing: its update is there at once.

Settings that a user would have to find out, and one patch: p2pfl's server has two threads, with
which ten nodes never finish; here it has 32. The clock starts when the last node has its update (in
p2pfl's favour) and stops when all have the average: its votes and the spreading of the start
weights lie before it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

from benchmarks.systems.child import (
    SAMPLES,
    Task,
    cpu_seconds,
    keep_stdout,
    read_task,
    tell,
    told,
)

TASK = read_task()
keep_stdout()  # before p2pfl's logger takes it
os.chdir(TASK.scratch)  # where its logger makes a directory

from p2pfl.settings import Settings  # noqa: E402

Settings.general.DISABLE_RAY = True  # before the logger is imported, which would start Ray

import numpy as np  # noqa: E402
import p2pfl.communication.protocols.protobuff.grpc.server as grpc_server  # noqa: E402
from p2pfl.communication.protocols.protobuff.grpc import GrpcCommunicationProtocol  # noqa: E402
from p2pfl.learning.frameworks.learner import Learner  # noqa: E402
from p2pfl.learning.frameworks.p2pfl_model import P2PFLModel  # noqa: E402
from p2pfl.management.logger import logger  # noqa: E402
from p2pfl.node import Node  # noqa: E402

SERVER_THREADS = 32
PATIENCE = 120
TOLERANCE = 1e-5  # p2pfl sums in float32 and in the order of arrival


def tune(peers: int) -> None:
    """Long time-outs, no pause between two models, no busy loop; and the patch."""
    Settings.general.GRPC_TIMEOUT = PATIENCE
    Settings.general.RESOURCE_MONITOR_PERIOD = 1000
    Settings.heartbeat.PERIOD = 4
    Settings.heartbeat.TIMEOUT = PATIENCE
    Settings.heartbeat.WAIT_CONVERGENCE = 2
    Settings.gossip.PERIOD = 0.05
    Settings.gossip.TTL = max(10, peers)
    Settings.gossip.MESSAGES_PER_PERIOD = 10**9
    Settings.gossip.AMOUNT_LAST_MESSAGES_SAVED = 10_000
    Settings.gossip.MODELS_PERIOD = 0.1
    Settings.gossip.MODELS_PER_ROUND = 4
    Settings.gossip.EXIT_ON_X_EQUAL_ROUNDS = 300
    Settings.training.VOTE_TIMEOUT = PATIENCE
    logger.set_level("WARNING")
    pool = grpc_server.futures.ThreadPoolExecutor
    grpc_server.futures = types.SimpleNamespace(
        ThreadPoolExecutor=lambda max_workers: pool(max_workers=SERVER_THREADS)
    )


class Noise(P2PFLModel):  # type: ignore[misc]  # not installed here
    """A model that is one array."""

    def get_parameters(self) -> list[Any]:
        arrays: list[Any] = self.model
        return arrays

    def set_parameters(self, params: list[Any] | bytes) -> None:
        if isinstance(params, bytes):
            self.model, self.additional_info = self.decode_parameters(params)
        else:
            self.model = params

    def get_framework(self) -> str:
        return "pytorch"


class Instant(Learner):  # type: ignore[misc]  # likewise
    """Trains nothing; sees when the node has everybody's average."""

    def __init__(self, update: Path, peers: int) -> None:
        super().__init__()
        self._update = update
        self._peers = peers
        self.began: float | None = None
        self.cpu_began = 0.0
        self.ended = threading.Event()

    def fit(self) -> P2PFLModel:
        model = self.get_model()
        model.set_parameters([np.fromfile(self._update, np.float32)])
        model.set_contribution([self.addr], SAMPLES)
        self.cpu_began, self.began = cpu_seconds(), time.monotonic()
        return model

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        if self.began is not None and len(self.get_model().contributors) == self._peers:
            self.ended.set()

    def interrupt_fit(self) -> None:
        pass

    def evaluate(self) -> dict[str, float]:
        return {}

    def get_framework(self) -> str:
        return "pytorch"


def mean_is_right(task: Task, values: Any) -> bool:
    """Whether a node's model is the average of all updates."""
    mean = np.zeros(values.size, np.float64)
    for place in range(task.peers):
        mean += np.fromfile(task.update(place), np.float32)
    return bool(np.abs(values - mean / task.peers).max() < TOLERANCE)


def main(task: Task) -> None:
    tune(task.peers)
    start = np.zeros(task.update(task.place).stat().st_size // 4, np.float32)
    learner = Instant(task.update(task.place), task.peers)
    data = types.SimpleNamespace(dataset_name="noise", batch_size=1)
    node = Node(Noise([start]), data, learner=learner, protocol=GrpcCommunicationProtocol())
    node.start()
    tell(address=node.addr)
    addresses = json.loads(told())
    for neighbour in task.neighbours():
        if neighbour > task.place:
            node.connect(addresses[neighbour])
    while len(node.get_neighbors(only_direct=False)) < task.peers - 1:
        time.sleep(0.1)
    tell(ready=True)
    told()
    tell(prepared=True)
    told()
    if task.place == 0:
        node.set_start_learning(rounds=1, epochs=1, trainset_size=task.peers)
    learner.ended.wait()
    tell(ended=time.monotonic(), began=learner.began)
    told()
    used = cpu_seconds() - learner.cpu_began
    right = mean_is_right(task, node.get_model().get_parameters()[0])
    tell(cpu_seconds=used, digest="mean", complete=right)
    told()


if __name__ == "__main__":
    main(TASK)
    sys.stdout.flush()
    os._exit(0)  # its threads would not end
