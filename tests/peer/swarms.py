"""Swarms of real peers in one trio program, for tests: real hosts, stores, gossip and streams."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import trio
from torch import nn

from p2pfl_torrent import AsyncPeer, PeerConfig, RoundReport
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import PeerEvent
from p2pfl_torrent.overlay.identity import Identity
from p2pfl_torrent.peer.node import Node

PATIENCE = 60.0  # seconds: the machine may be busy
NUM_CHUNKS = 8
Event = TypeVar("Event")


class Member:
    """One peer of a test swarm, with all it was told.

    Attributes:
        number: from 1; the first founds the swarm.
        num_samples: another for each member.
        reports: of its exchanges so far.
        done: set when it has left the swarm in order.
    """

    def __init__(self, config: PeerConfig, number: int) -> None:
        torch.manual_seed(number)
        # 66 KB, so that blocks of 1 KiB make several chunks of several blocks.
        layers = (nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 64, bias=False))
        self.model = nn.Sequential(*layers)
        self.peer = AsyncPeer(config, self.model)
        self.number = number
        self.num_samples = 10 * number
        self.reports: list[RoundReport] = []
        self.done = trio.Event()
        self._told = self.peer.events(backlog=100_000)
        self._events: list[PeerEvent] = []

    @property
    def id(self) -> PeerId:
        return PeerId(self.peer.peer_id)

    @property
    def node(self) -> Node:
        """The parts behind the face, to put faults into."""
        return self.peer._node

    @property
    def events(self) -> list[PeerEvent]:
        """Everything it told its user so far."""
        self._events.extend(self._told.drain())
        return self._events

    def told(self, kind: type[Event]) -> list[Event]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    async def take_part(self, before_exchange: BeforeExchange) -> None:
        """Join; train and exchange every round; leave."""
        async with self.peer as peer, aclosing(peer.rounds()) as rounds:
            async for round in rounds:
                self._train(round)
                await before_exchange(self, round)
                self.reports.append(await peer.exchange(num_samples=self.num_samples))
        self.done.set()

    def _train(self, round: int) -> None:
        """Other weights for every member and round; what they learn does not matter here."""
        generator = torch.Generator().manual_seed(1000 * self.number + round)
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


BeforeExchange = Callable[[Member, int], Awaitable[None]]


async def at_once(member: Member, round: int) -> None:
    """Before an exchange that nothing delays."""


@asynccontextmanager
async def swarm(
    count: int,
    *,
    before_exchange: BeforeExchange = at_once,
    state_dirs: Path | None = None,
    **sections: dict[str, Any],
) -> AsyncIterator[list[Member]]:
    """Members that have just started, each at work in a task of its own; gone after the block.

    Args:
        before_exchange: awaited by every member in every round, after its training.
        state_dirs: where each keeps its state in a folder of its own, named 1, 2 and so on.
        sections: of the configuration, on top of what all these tests have in common.
    """
    members: list[Member] = []
    async with trio.open_nursery() as nursery:
        for number in range(1, count + 1):
            address = list(members[0].peer.addrs) if members else []
            state_dir = "" if state_dirs is None else str(state_dirs / str(number))
            members.append(Member(config(count, address, state_dir, sections), number))
            nursery.start_soon(members[-1].take_part, before_exchange)
            if number == 1:
                await until(lambda: bool(members[0].peer.addrs))
        yield members
        nursery.cancel_scope.cancel()


def identities(state_dirs: Path, count: int) -> list[PeerId]:
    """Who the members of a swarm with these state directories will be."""
    found = []
    for number in range(1, count + 1):
        folder = state_dirs / str(number)
        folder.mkdir()
        found.append(PeerId(Identity.load_or_create(folder / "identity.key").peer_id))
    return found


def config(
    count: int, bootstrap: list[str], state_dir: str, sections: dict[str, dict[str, Any]]
) -> PeerConfig:
    mapping: dict[str, dict[str, Any]] = {
        "federate": {"client_num": count, "total_round_num": 2, "join_timeout": PATIENCE},
        "bittorrent": {"timeout": PATIENCE},
        "chunk": {"num_chunks": NUM_CHUNKS, "block_size": 1024},
        "topology": {"type": "full"},
        "network": {"bootstrap": bootstrap},
        "storage": {"state_dir": state_dir},
    }
    for name, keys in sections.items():
        mapping[name] = {**mapping.get(name, {}), **keys}
    return PeerConfig.from_mapping(mapping)


async def all_done(members: list[Member]) -> None:
    """Returns when these members have finished their rounds and left."""
    with trio.fail_after(PATIENCE):
        for member in members:
            await member.done.wait()


async def until(condition: Callable[[], bool]) -> None:
    """Returns as soon as ``condition`` holds; fails after ``PATIENCE`` seconds."""
    with trio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event to offer
            await trio.sleep(0.01)
