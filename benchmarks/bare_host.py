"""A process with nothing but a py-libp2p host that listens: what a peer's memory is compared with.

    python -m benchmarks.bare_host

It tells its anonymous memory and ends when its stdin does.
"""

from __future__ import annotations

import json
import sys

import trio
from libp2p import new_host
from multiaddr import Multiaddr


def anonymous_bytes() -> int:
    """As the members'; theirs would bring numpy and our package along."""
    with open("/proc/self/status", encoding="ascii") as status:
        [line] = [line for line in status if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10


async def main() -> None:
    """Listen, tell, wait."""
    async with new_host().run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        await trio.sleep(1.0)  # its services have started
        sys.stdout.write(json.dumps({"anonymous": anonymous_bytes()}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    trio.run(main)
