"""A member of a swarm as a process of its own, led line by line: what the kill tests are made of.

    python member.py CONFIG SEED MEGABYTES

It prints one JSON object a line: its events, and after each exchange its statistics. Before each
round it waits for a line on stdin, so that a test says when anything happens.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import msgspec
import torch
from torch import nn

from p2pfl_torrent import P2PFLError, Peer, PeerConfig

SIDE = 256  # a Linear layer of this side holds a quarter of a megabyte


def own_model(megabytes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(4 * megabytes)))


def tell(kind: str, value: Any) -> None:
    sys.stdout.write(json.dumps({"kind": kind, "value": msgspec.to_builtins(value)}) + "\n")
    sys.stdout.flush()


def main(path: str, seed: int, megabytes: int) -> None:
    torch.set_num_threads(1)
    model = own_model(megabytes)
    generator = torch.Generator().manual_seed(seed)
    peer = Peer(PeerConfig.load(path), model)
    events = peer.events(backlog=100_000)

    def follow() -> None:
        for event in events:
            tell(type(event).__name__, event)

    threading.Thread(target=follow, daemon=True).start()
    with peer:
        tell("addrs", peer.addrs)
        for _ in peer.rounds():
            sys.stdin.readline()
            with torch.no_grad():
                for weights in model.parameters():
                    weights.add_(torch.randn(weights.shape, generator=generator), alpha=0.01)
            tell("report", peer.exchange(num_samples=10 + seed))
            tell("statistics", peer.statistics())


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    except P2PFLError as error:
        sys.exit(str(error))
