"""What becomes of every kind of tensor when two real peers exchange a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from p2pfl_torrent import Peer, PeerConfig, RoundReport
from p2pfl_torrent.core.errors import ConfigError

PATIENCE = 60.0  # seconds: the machine may be busy
SAMPLES = (1, 3)  # so that an average is a quarter of the first and three of the second

Train = Callable[[int, nn.Module], None]
"""Called with the peer's place, 0 or 1, and its model, before each exchange."""


def exchanged(
    models: Sequence[nn.Module],
    train: Train,
    *,
    rounds: int = 1,
    norm_policy: str = "average",
    architecture: str = "auto",
    calibration: Sequence[Any] = (None, None),
) -> list[list[RoundReport]]:
    """Let two blocking peers train and exchange; the reports of both."""
    listening = threading.Event()
    addresses: list[str] = []
    reports: list[list[RoundReport]] = [[], []]
    errors: list[BaseException] = []

    def heard(address: str) -> None:
        addresses.append(address)
        listening.set()

    def member(place: int) -> None:
        config = PeerConfig.from_mapping(
            {
                "federate": {
                    "client_num": 2, "total_round_num": rounds, "join_timeout": PATIENCE,
                },
                "bittorrent": {"timeout": PATIENCE},
                "chunk": {"norm_policy": norm_policy, "architecture": architecture},
                "network": {"bootstrap": list(addresses)},
            }
        )  # fmt: skip
        peer = Peer(config, models[place], on_address=heard, calibration=calibration[place])
        with peer:
            for _ in peer.rounds():
                train(place, models[place])
                reports[place].append(peer.exchange(num_samples=SAMPLES[place]))

    def guarded(place: int) -> None:
        try:
            member(place)
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            errors.append(error)
            listening.set()

    founder = threading.Thread(target=guarded, args=(0,))
    founder.start()
    assert listening.wait(PATIENCE)
    if not errors:
        guarded(1)
    founder.join(PATIENCE)
    if errors:
        raise errors[0]
    assert not founder.is_alive()
    assert all(report.completeness == 1.0 for both in reports for report in both)
    return reports


class Every(nn.Module):
    """Every dtype that is averaged, a tied weight, 0-d tensors, integer and bool buffers."""

    count: torch.Tensor
    small: torch.Tensor
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.tokens.weight
        self.temperature = nn.Parameter(torch.tensor(0.0))
        self.narrow = nn.Parameter(torch.zeros(3, dtype=torch.float16))
        self.brain = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16), requires_grad=False)
        self.exact = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.turned = nn.Parameter(torch.zeros(2, 3).t())
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("small", torch.zeros(2, dtype=torch.int8))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("none", None)


def fill(place: int, model: nn.Module) -> None:
    """Values whose weighted average every dtype can hold: 0 at the first peer, 4 at the second."""
    assert isinstance(model, Every)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(4.0 * place)
        model.count.fill_(7 - place)
        model.small.copy_(torch.tensor([-5, 100]) if place else torch.tensor([-6, 101]))
        model.seen.copy_(torch.tensor([bool(place), False]))


def test_every_kind_of_tensor_is_merged_by_its_rule() -> None:
    torch.manual_seed(0)
    models = [Every(), Every()]
    kept = [list(map(id, model.parameters())) for model in models]
    reports = exchanged(models, fill)
    assert reports[0][0].model_hash == reports[1][0].model_hash
    for model, ids in zip(models, kept, strict=True):
        for parameter in model.parameters():
            assert torch.all(parameter == 3.0)  # (1 * 0 + 3 * 4) / 4
        assert model.count.item() == 7
        assert model.small.tolist() == [-5, 101]
        assert model.seen.tolist() == [True, False]
        assert list(map(id, model.parameters())) == ids
        assert model.head.weight is model.tokens.weight
        assert not model.brain.requires_grad
        assert model.turned.stride() == (1, 3)


def with_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))


def differ(place: int, model: nn.Module) -> None:
    """Other weights and statistics on each peer."""
    state = model.state_dict()
    with torch.no_grad():
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor.fill_(1.0 + 4.0 * place)
        state["1.num_batches_tracked"].fill_(10 * (place + 1))


BATCHES = [[torch.full((4, 2), 1.0 + place), torch.full((4, 2), 3.0 + place)] for place in (0, 1)]


@pytest.mark.parametrize("policy", ["average", "local", "recalibrate"])
def test_norm_layers_by_each_policy(policy: str) -> None:
    torch.manual_seed(0)
    models = [with_norm(), with_norm()]
    calibration = BATCHES if policy == "recalibrate" else (None, None)
    exchanged(models, differ, rounds=2, norm_policy=policy, calibration=calibration)
    for place, model in enumerate(models):
        state = model.state_dict()
        own = 1.0 + 4.0 * place
        merged = (1 * 1.0 + 3 * 5.0) / 4
        assert torch.all(state["0.weight"] == merged)
        affine = own if policy == "local" else merged
        assert torch.all(state["1.weight"] == affine)
        assert torch.all(state["1.bias"] == affine)
        mean, count = state["1.running_mean"], state["1.num_batches_tracked"].item()
        if policy == "average":
            assert torch.all(mean == merged)
            assert torch.all(state["1.running_var"] == merged)
            assert count == 20  # an integer buffer: the maximum
        elif policy == "local":
            assert torch.all(mean == own)
            assert torch.all(state["1.running_var"] == own)
            assert count == 10 * (place + 1)
        else:
            # The merged layer before it gives x1*4 + x2*4 + 4 of its own batches, 1 and 3 on the
            # first peer, 2 and 4 on the second.
            assert torch.all(mean == merged * (2 * (2 + place)) + merged)
            assert torch.all(state["1.running_var"] == 0)
            assert count == 2
        assert model.training


def test_a_peer_with_several_accelerators_learns_with_one_that_has_none() -> None:
    plain = [nn.Linear(2, 1), nn.Linear(2, 1)]
    wrapped: list[nn.Module] = [nn.DataParallel(plain[0]), plain[1]]

    def one_or_five(place: int, model: nn.Module) -> None:
        for parameter in model.parameters():
            nn.init.constant_(parameter, 1.0 + 4.0 * place)

    exchanged(wrapped, one_or_five)
    assert [model.weight.tolist() for model in plain] == [[[4, 4]], [[4, 4]]]


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.ReLU(), "no tensor to exchange"),
        (nn.LazyLinear(2), "has no shape yet .run one forward pass first"),
        (nn.Linear(2, 2, dtype=torch.complex64), "dtype complex64, which cannot be exchanged"),
    ],
)
def test_a_model_that_cannot_be_exchanged_is_told_before_joining(
    model: nn.Module, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        Peer(PeerConfig(), model)
