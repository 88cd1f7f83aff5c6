"""Architectures take the shapes they promise; start weights come from the seed alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.learning.models import MODELS, build, small_cnn


def weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("in_shape", [(1, 8, 8), (3, 32, 32), (1, 1, 1), (2, 3, 11)])
def test_every_model_takes_every_shape(name: str, in_shape: tuple[int, int, int]) -> None:
    model = build(name, in_shape, 7, seed=1)
    assert model(torch.rand(5, *in_shape)).shape == (5, 7)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_the_documented_sizes() -> None:
    assert weights(small_cnn((1, 8, 8), 10)) == 13_706
    assert weights(small_cnn((1, 28, 28), 10)) == 105_866


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_seed_alone_decides_and_global_randomness_rests(name: str) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = build(name, (1, 8, 8), 10, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second = build(name, (1, 8, 8), 10, seed=1).state_dict()
    other = build(name, (1, 8, 8), 10, seed=2).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_start_weights_have_the_promised_variance() -> None:
    model = build("small_cnn", (1, 28, 28), 10, seed=0)
    assert isinstance(model, nn.Sequential)
    state = model.state_dict()
    for key, gain in (("conv2.weight", 2), ("linear1.weight", 2), ("linear2.weight", 1)):
        fan_in = state[key][0].numel()
        assert state[key].std().item() == pytest.approx(math.sqrt(gain / fan_in), rel=0.1)
    assert not state["linear1.bias"].any()


def test_wrong_names_are_explained() -> None:
    with pytest.raises(ConfigError, match="did you mean 'small_cnn'"):
        build("smal_cnn", (1, 8, 8), 10, seed=0)
    with pytest.raises(ConfigError, match="choose from small_cnn,"):
        build("transformer", (1, 8, 8), 10, seed=0)
    with pytest.raises(ConfigError, match="choose none, batch or group"):
        small_cnn((1, 8, 8), 10, "layer")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="multiple of 4"):
        small_cnn((1, 8, 8), 10, width=6)
