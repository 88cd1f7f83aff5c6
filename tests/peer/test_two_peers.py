"""A user's own module and loop, two real peers on this machine: identical models afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import trio
from torch import nn

from p2pfl_torrent import AsyncPeer, P2PFLError, Peer, PeerConfig, RoundReport

ROUNDS = 2


def config(bootstrap: list[str], **sections: object) -> PeerConfig:
    return PeerConfig.from_mapping(
        {
            "federate": {"client_num": 2, "total_round_num": ROUNDS, "join_timeout": 60.0},
            "bittorrent": {"timeout": 30.0},
            "network": {"bootstrap": bootstrap},
            **sections,
        }
    )


def own_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Linear(64, 3))


def train(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(16, 8, generator=generator)
        y = torch.randint(0, 3, (16,), generator=generator)
        optimizer.zero_grad()
        loss: torch.Tensor = nn.functional.cross_entropy(model(x), y)
        torch.autograd.backward(loss)
        optimizer.step()


def in_threads(*jobs: Callable[[], None]) -> None:
    """Run jobs side by side; the first error is raised here."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    if errors:
        raise errors[0]


def addresses_of(peer: Peer, there: threading.Event, into: list[str]) -> None:
    for event in peer.events():
        if type(event).__name__ == "Joined":
            into.extend(peer.addrs)
            there.set()
            return


def test_blocking_peers_end_with_identical_models() -> None:
    models = [own_model(1), own_model(2)]
    reports: list[list[RoundReport]] = [[], []]
    address: list[str] = []
    there = threading.Event()

    def founder() -> None:
        peer = Peer(config([]), models[0])
        watcher = threading.Thread(target=addresses_of, args=(peer, there, address))
        watcher.start()
        with peer:
            for round in peer.rounds():
                train(models[0], round)
                reports[0].append(peer.exchange(num_samples=10))
        watcher.join()

    def joiner() -> None:
        assert there.wait(60)
        with Peer(config(address), models[1]) as peer:
            for round in peer.rounds():
                train(models[1], 100 + round)
                reports[1].append(peer.exchange(num_samples=30))

    in_threads(founder, joiner)
    for ours, theirs in zip(*reports, strict=True):
        assert ours.model_hash == theirs.model_hash
        assert ours.closed_by == "complete"
        assert ours.completeness == 1.0
        assert [owner.num_samples for owner in ours.owners].count(30) == 1
    assert len(reports[0]) == ROUNDS
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name])


async def test_trio_peers_end_with_identical_models() -> None:
    models = [own_model(1), own_model(2)]
    hashes: list[list[str]] = [[], []]

    async def member(place: int, bootstrap: list[str]) -> None:
        async with AsyncPeer(config(bootstrap), models[place]) as peer:
            async for round in peer.rounds():
                await trio.to_thread.run_sync(train, models[place], 10 * place + round)
                report = await peer.exchange(num_samples=5 + place)
                hashes[place].append(report.model_hash)

    founder = AsyncPeer(config([]), models[0])
    async with trio.open_nursery() as nursery:

        async def found() -> None:
            async with founder as peer:
                async for round in peer.rounds():
                    await trio.to_thread.run_sync(train, models[0], round)
                    hashes[0].append((await peer.exchange(num_samples=5)).model_hash)

        nursery.start_soon(found)
        while not founder.addrs:
            await trio.lowlevel.checkpoint()
        await member(1, [founder.addrs[0]])
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == ROUNDS


def test_other_terms_are_refused_with_the_difference() -> None:
    async def main() -> None:
        founder = AsyncPeer(config([]), own_model(1))
        async with trio.open_nursery() as nursery:

            async def found() -> None:
                async with founder:
                    raise AssertionError("the second member never comes")

            nursery.start_soon(found)
            while not founder.addrs:
                await trio.lowlevel.checkpoint()
            other = AsyncPeer(
                config([founder.addrs[0]], swarm={"seed": 7}),
                own_model(2),
            )
            with pytest.raises(P2PFLError, match="seed is 7 here and 0 there"):
                async with other:
                    raise AssertionError("must not get in")
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_an_unreachable_bootstrap_is_one_sentence() -> None:
    nobody = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWGQmdpzHXCqLno4mMxWXKNFQHASBeF99gTm2JR8Vu5Bdc"
    peer = Peer(config([nobody], topology={"max_connection_attempts": 1}), own_model(1))
    with pytest.raises(P2PFLError, match="No bootstrap peer could be reached"), peer:
        raise AssertionError("must not get in")


@pytest.mark.parametrize("policy", ["average", "local"])
def test_a_plain_loop_with_overlap_ends_at_the_final_aggregate(policy: str) -> None:
    sections = {
        "federate": {
            "client_num": 2,
            "total_round_num": 3,
            "join_timeout": 60.0,
            "overlap": True,
        },
        "chunk": {"norm_policy": policy},
    }
    models = [own_model(1), own_model(2)]
    reports: list[list[RoundReport]] = [[], []]
    address: list[str] = []
    there = threading.Event()

    def member(place: int) -> None:
        if place:
            assert there.wait(60)
        peer = Peer(config(address if place else [], **sections), models[place])
        watcher = threading.Thread(target=addresses_of, args=(peer, there, address))
        if not place:
            watcher.start()
        with peer:
            for round in peer.rounds():
                train(models[place], 100 * place + round)
                reports[place].append(peer.exchange(num_samples=10 + place))
        if not place:
            watcher.join()

    in_threads(lambda: member(0), lambda: member(1))
    told = [[(report.round, report.closed_by) for report in each] for each in reports]
    assert told == [[(1, "underway"), (1, "complete"), (3, "complete")]] * 2
    kept_home = {name for name in models[0].state_dict() if policy == "local" and name[0] == "2"}
    for name, tensor in models[0].state_dict().items():
        if not name.endswith("num_batches_tracked"):  # a count, of as many steps at both
            assert torch.equal(tensor, models[1].state_dict()[name]) != (name in kept_home), name
    assert bool((models[0].state_dict()["2.running_var"] > 0).all())
