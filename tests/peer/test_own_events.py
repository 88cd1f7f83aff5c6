"""What a peer tells about itself: once, and nothing of a round that nobody trains."""

from __future__ import annotations

from torch import nn

from p2pfl_torrent import AsyncPeer, PeerConfig
from p2pfl_torrent.core.reports import Joined, Left, RoundFinished, RoundStarted


async def test_a_peer_alone_tells_its_rounds_and_nothing_of_others() -> None:
    config = PeerConfig.from_mapping(
        {
            "federate": {"client_num": 1, "total_round_num": 2},
            "bittorrent": {"enable": False},
        }
    )
    peer = AsyncPeer(config, nn.Linear(4, 2))
    told = peer.events()
    async with peer:
        async for round in peer.rounds():
            assert (peer.statistics().round, peer.statistics().phase) == (round, "training")
            await peer.exchange(num_samples=1)
        assert peer.statistics().phase == "seeding"
    # The next round begins before the aggregate is in the user's model.
    kinds = [Joined, RoundStarted, RoundStarted, RoundFinished, RoundFinished, Left]
    events = list(told)
    assert [type(event) for event in events] == kinds
    assert [event.round for event in events if isinstance(event, RoundStarted)] == [1, 2]
