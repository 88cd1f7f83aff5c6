"""What links really carry: TCP's payload, measured from the inside.

    python -m benchmarks.links_meter ADDRESS

is one end. It tells where it listens; then each line on stdin makes it ``take`` or ``give HOST
PORT`` a stream for so many seconds. Only the standard library: it starts at once.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fleet import Process
from benchmarks.links_bound import Goodput
from testnet.netns import Place

SETTLE_SECONDS = 1.0  # at first, bursts and TCP's start
PIECE = 64 << 10


def measure(places: Sequence[Place], hub: Place, directory: Path, seconds: float) -> list[Goodput]:
    """The goodput of each place's link; all uplinks are measured at once, then all downlinks.

    Args:
        hub: a place whose own link is not limited.
    """
    with (directory / "meter.err").open("w+b") as errors:

        def meter(place: Place) -> Process:
            command = ["-m", "benchmarks.links_meter", place.address]
            return Process(f"meter of {place.name}", command, errors, within=place.enter)

        far = [meter(place) for place in places]
        near = [meter(hub) for _ in places]
        try:
            up, down = _flows(far, near, seconds), _flows(near, far, seconds)
        finally:
            for process in (*far, *near):
                process.end()
    return [Goodput(*both) for both in zip(up, down, strict=True)]


def _flows(givers: Sequence[Process], takers: Sequence[Process], seconds: float) -> list[float]:
    for taker in takers:
        taker.say(f"take {seconds}")
    for giver, taker in zip(givers, takers, strict=True):
        host, port = taker.hear("address")["address"]
        giver.say(f"give {host} {port} {seconds}")
    return [float(taker.hear("rate")["rate"]) for taker in takers]


def take(address: str, seconds: float) -> None:
    """Accept one stream and tell its rate after it has settled."""
    with socket.create_server((address, 0)) as server:
        tell({"address": server.getsockname()[:2]})
        stream, _ = server.accept()
    with stream:
        buffer = bytearray(PIECE)
        began = None
        count = 0
        now = stop = float("inf")
        while (got := stream.recv_into(buffer)) and (now := time.monotonic()) < stop:
            if began is None:
                began, stop = now + SETTLE_SECONDS, now + seconds
            elif now >= began:
                count += got
        stream.shutdown(socket.SHUT_RDWR)
    if began is None or now <= began:
        raise RuntimeError("nothing came for as long as it takes to settle")
    tell({"rate": count / (min(now, stop) - began)})


def give(host: str, port: int, seconds: float) -> None:
    """Send until the other end has enough."""
    data = bytes(PIECE)
    with socket.create_connection((host, port)) as stream:
        stop = time.monotonic() + 2 * seconds
        try:
            while time.monotonic() < stop:
                stream.sendall(data)
        except OSError:
            pass  # it has enough


def tell(value: object) -> None:
    """One JSON line for whoever leads."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main(address: str) -> None:
    """Do what is said until nothing more is."""
    for line in sys.stdin:
        what, *rest = line.split()
        if what == "take":
            take(address, float(rest[0]))
        else:
            give(rest[0], int(rest[1]), float(rest[2]))


if __name__ == "__main__":
    main(sys.argv[1])
