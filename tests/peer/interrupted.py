"""A program that is interrupted by Ctrl-C: ``interrupted.py STYLE PLACE STATE_DIR``.

It says "now" when it has come to PLACE, and "released" when, after KeyboardInterrupt, nothing of
the peer runs any more and another one could take over its state directory.
"""

from __future__ import annotations

import sys
import threading
import time

import trio
from torch import nn

from p2pfl_torrent import AsyncPeer, Peer, PeerConfig
from p2pfl_torrent.core.events import CloseRound, MissedRound
from p2pfl_torrent.core.reports import Joined

FOREVER = 3600.0


def config(state_dir: str, bootstrap: list[str], **bittorrent: object) -> PeerConfig:
    return PeerConfig.from_mapping(
        {
            "federate": {"client_num": 2, "join_timeout": FOREVER},
            "bittorrent": bittorrent,
            "network": {"bootstrap": bootstrap},
            "storage": {"state_dir": state_dir},
        }
    )


def say_when_joined(peer: Peer | AsyncPeer) -> None:
    told = peer.events()

    def wait() -> None:
        if any(isinstance(event, Joined) for event in told):
            print("now", flush=True)

    threading.Thread(target=wait, daemon=True).start()


def say_when_exchanging(peer: Peer | AsyncPeer) -> None:
    exchange = peer._node._exchange
    outcome = exchange.outcome

    async def waiting() -> CloseRound | MissedRound:
        print("now", flush=True)
        return await outcome()

    exchange.outcome = waiting  # type: ignore[method-assign]


class Second:
    """Another member, which trains for ever, in threads of its own."""

    def __init__(self) -> None:
        self.address = ""
        self._listens = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        self._listens.wait()

    def _run(self) -> None:
        with Peer(config("", []), nn.Linear(4, 2), on_address=self._note):
            time.sleep(FOREVER)

    def _note(self, address: str) -> None:
        self.address = address
        self._listens.set()


async def sleep_in_order() -> None:
    print("now", flush=True)
    await trio.sleep_forever()


def blocking(place: str, state_dir: str) -> None:
    bootstrap = [] if place == "enter" else [Second().address]
    peer = Peer(config(state_dir, bootstrap), nn.Linear(4, 2))
    if place == "enter":
        say_when_joined(peer)
    try:
        with peer:
            if place == "exchange":
                say_when_exchanging(peer)
                peer.exchange(num_samples=1)
            elif place == "training":
                print("now", flush=True)
                time.sleep(FOREVER)
            elif place == "error":
                raise KeyboardInterrupt
            peer._node.finish = sleep_in_order  # type: ignore[method-assign]
    finally:
        assert not peer._thread.is_alive()


def sleep() -> None:
    time.sleep(FOREVER)


async def in_trio(place: str, state_dir: str) -> None:
    bootstrap = [] if place == "enter" else [Second().address]
    peer = AsyncPeer(config(state_dir, bootstrap), nn.Linear(4, 2))
    if place == "enter":
        say_when_joined(peer)
    async with peer:
        if place == "exchange":
            say_when_exchanging(peer)
            await peer.exchange(num_samples=1)
        elif place == "training":
            print("now", flush=True)
            in_thread = trio.to_thread.run_sync
            await in_thread(sleep, abandon_on_cancel=True)  # type: ignore[call-arg]  # mypy's fault
        elif place == "error":
            raise KeyboardInterrupt
        peer._node.finish = sleep_in_order  # type: ignore[method-assign]


def main() -> None:
    style, place, state_dir = sys.argv[1:]
    try:
        if style == "blocking":
            blocking(place, state_dir)
        else:
            trio.run(in_trio, place, state_dir, restrict_keyboard_interrupt_to_checkpoints=True)
    except KeyboardInterrupt:
        with Peer(config(state_dir, [], enable=False), nn.Linear(4, 2)):
            print("released", flush=True)
            raise


if __name__ == "__main__":
    main()
