"""The user's own code that scores the model, and what fails in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import pytest
import trio
from torch import nn

from p2pfl_torrent import AsyncPeer, Peer, PeerConfig, RoundReport
from p2pfl_torrent.core.reports import PeerEvent, RoundFinished
from p2pfl_torrent.learning.state import Module


def config(bootstrap: list[str]) -> PeerConfig:
    return PeerConfig.from_mapping(
        {
            "federate": {"client_num": 2, "total_round_num": 1, "join_timeout": 60.0},
            "bittorrent": {"timeout": 30.0},
            "network": {"bootstrap": bootstrap},
        }
    )


class FailsAfterTheMerge:
    """Scores once, and then no more."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Module) -> Mapping[str, float]:
        self.calls += 1
        if self.calls == 2:
            raise ZeroDivisionError("the user's own")
        return {"loss": 3.0, "accuracy": 0.5}


def finished(events: Iterator[PeerEvent]) -> list[RoundReport]:
    return [event.report for event in events if isinstance(event, RoundFinished)]


def assert_told(reports: list[RoundReport]) -> None:
    [report] = reports
    assert (report.round, report.closed_by) == (1, "complete")
    assert (report.loss_before, report.loss_after) == (3.0, None)


async def test_the_round_is_told_although_scoring_it_failed() -> None:
    first = AsyncPeer(config([]), nn.Linear(4, 2), evaluate=FailsAfterTheMerge())
    told = first.events()

    async def fail() -> None:
        async with first:
            with pytest.raises(ZeroDivisionError):
                await first.exchange(num_samples=1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        while not first.addrs:
            await trio.lowlevel.checkpoint()
        async with AsyncPeer(config([first.addrs[0]]), nn.Linear(4, 2)) as second:
            await second.exchange(num_samples=1)
    assert_told(finished(told))


def test_the_same_in_a_blocking_peer() -> None:
    addresses: list[str] = []
    there = threading.Event()

    def note(address: str) -> None:
        addresses.append(address)
        there.set()

    first = Peer(config([]), nn.Linear(4, 2), evaluate=FailsAfterTheMerge(), on_address=note)
    told = first.events()

    def second() -> None:
        assert there.wait(60.0)
        with Peer(config(addresses[:1]), nn.Linear(4, 2)) as peer:
            peer.exchange(num_samples=1)

    thread = threading.Thread(target=second)
    thread.start()
    with first, pytest.raises(ZeroDivisionError):
        first.exchange(num_samples=1)
    thread.join()
    assert_told(finished(told))
