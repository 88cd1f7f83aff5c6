"""``python -m benchmarks NAME``: runs one benchmark; each prints a table and can write JSON."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "aggregate": "averaging updates on disk: GB per CPU-second beside plain numpy, memory",
    "codecs": "each compression of chunk files: bytes, GB per CPU-second, largest error",
    "compare": "our round beside libtorrent's, gloo's, p2pfl's and a central server's",
    "connect": "a full mesh of processes coming up: seconds, and milliseconds a link",
    "control": "bytes and CPU of announcements and membership as the swarm grows",
    "exchange": "one swarm of processes: seconds, CPU, duplicates, control bytes, memory",
    "learning": "what cut rounds, methods and faults cost in learning: real data, virtual time",
    "links": "a swarm on slow and unequal links, beside their bound and a central server",
    "memory": "a peer idle beside a bare py-libp2p host, and its peak in exchanges",
    "training": "a training loop beside an exchange, with the network in a thread or process",
    "picker": "the picker alone on virtual time: CPU per block, closeness to the links' bound",
    "rounds": "protocol time of a round with next to nothing to send, and its gossip deliveries",
    "scoring": "importance of chunks by each method, as a share of training time",
    "transport": "bytes from one process to another: ours, py-libp2p's own, trio's SSL and TCP",
}


def main(argv: list[str]) -> int:
    """Run the benchmark that the first argument names."""
    if not argv or argv[0] not in BENCHMARKS:
        print("usage: python -m benchmarks NAME [--help] [--json FILE]\n")
        for name, what in BENCHMARKS.items():
            print(f"  {name:10} {what}")
        return 0 if argv in (["--help"], ["-h"]) else 2
    module = importlib.import_module(f"benchmarks.{argv[0]}")
    return int(module.main(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
