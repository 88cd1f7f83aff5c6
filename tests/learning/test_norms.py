"""Norm policies: what stays at home, and running statistics recomputed after a merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.learning.norms import NormPolicy, is_norm, recalibrate
from p2pfl_torrent.learning.state import describe


class LlamaRMSNorm(nn.Module):
    """As another library brings its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


class MyNorm(nn.LayerNorm):
    """A subclass under a name of its own."""


class PreLayerNormBlock(nn.Module):
    """A block is no norm, whatever its name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2)
        self.linear = nn.Linear(2, 2)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def layer(model: nn.Module, name: str) -> Any:
    """A part of the model, free of torch's union of module and tensor."""
    return model.get_submodule(name)


def names(model: nn.Module, policy: NormPolicy) -> list[str]:
    return [tensor.name for tensor in describe(model, norm_policy=policy).tensors]


@pytest.mark.parametrize(
    ("module", "norm"),
    [
        (nn.BatchNorm2d(2), True),
        (nn.SyncBatchNorm(2), True),
        (nn.LayerNorm(2), True),
        (nn.GroupNorm(1, 2), True),
        (nn.InstanceNorm1d(2), True),
        (LlamaRMSNorm(), True),
        (MyNorm(2), True),
        (PreLayerNormBlock(), False),
        (nn.Linear(2, 2), False),
        (nn.LocalResponseNorm(2), False),
    ],
)
def test_norms_are_known_by_their_type(module: nn.Module, norm: bool) -> None:
    assert is_norm(module) is norm


def test_policies_choose_what_leaves() -> None:
    linear = ["0.weight", "0.bias", "3.weight", "3.bias"]
    weights = ["1.weight", "1.bias"]
    statistics = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert names(network(), "average") == linear[:2] + weights + statistics + linear[2:]
    assert names(network(), "recalibrate") == linear[:2] + weights + linear[2:]
    assert names(network(), "local") == linear


def test_local_keeps_other_norms_and_shared_ones_home() -> None:
    shared = nn.LayerNorm(2)
    model = nn.ModuleDict(
        {
            "first": shared,
            "second": shared,
            "llama": LlamaRMSNorm(),
            "block": PreLayerNormBlock(),
        }
    )
    assert names(model, "local") == ["block.linear.weight", "block.linear.bias"]
    with pytest.raises(ConfigError, match="no tensor to exchange"):
        describe(nn.LayerNorm(2), norm_policy="local")


def test_an_unknown_policy_is_an_error() -> None:
    with pytest.raises(ConfigError, match="choose average, local or recalibrate"):
        describe(network(), norm_policy="fedbn")  # type: ignore[arg-type]


def test_recalibrate_gives_the_mean_over_batches() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.1))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, generator=generator) * (k + 1) + k for k in range(4)]
    assert recalibrate(model, batches) == 4
    norm = layer(model, "0")
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert norm.num_batches_tracked.item() == 4


def test_recalibrate_serves_instance_norm_with_statistics() -> None:
    model = nn.Sequential(nn.InstanceNorm1d(2, track_running_stats=True, momentum=0.3))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(5, 2, 7, generator=generator) + k for k in range(3)]
    recalibrate(model, batches)
    expected = torch.stack([batch.mean(dim=(0, 2)) for batch in batches]).mean(0)
    torch.testing.assert_close(layer(model, "0").running_mean, expected)
    assert layer(model, "0").momentum == 0.3


def test_recalibrate_leaves_everything_else_as_it_was() -> None:
    model = network()
    layer(model, "0").eval()  # a user may have frozen a part
    modes = [module.training for module in model.modules()]
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    state = torch.get_rng_state()
    batch = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    recalibrate(model, [(batch, torch.zeros(6)), [batch]])
    assert [module.training for module in model.modules()] == modes
    assert layer(model, "1").momentum == 0.1
    for name, value in model.named_parameters():
        assert value.grad is None
        assert torch.equal(value, weights[name])
    assert torch.equal(torch.get_rng_state(), state)  # dropout was off
    expected = (batch @ layer(model, "0").weight.t() + layer(model, "0").bias).mean(0).detach()
    torch.testing.assert_close(layer(model, "1").running_mean, expected)


def test_recalibrate_without_statistics_takes_no_batch() -> None:
    def never() -> torch.Tensor:
        raise AssertionError("no batch is needed")

    assert recalibrate(nn.Linear(2, 2), (never() for _ in range(1))) == 0


@pytest.mark.parametrize("batches", [[], [torch.ones(4, 3), torch.ones(4, 9)]])
def test_a_failed_recalibration_keeps_the_old_statistics(batches: list[torch.Tensor]) -> None:
    model = network()
    model(torch.randn(8, 3, generator=torch.Generator().manual_seed(2)))
    mean, tracked = (
        layer(model, "1").running_mean.clone(),
        layer(model, "1").num_batches_tracked.item(),
    )
    with pytest.raises((ConfigError, RuntimeError)):
        recalibrate(model, batches)
    assert torch.equal(layer(model, "1").running_mean, mean)
    assert layer(model, "1").num_batches_tracked.item() == tracked
    assert layer(model, "1").momentum == 0.1
    assert model.training


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        ([{"x": torch.ones(4, 3)}], "a tuple with the input first, not dict"),
        ([(["text"], torch.ones(1))], "a tuple with the input first, not list"),
        ([()], "a tuple with the input first, not tuple"),
        ([torch.ones(1, 3)], r"A batch \[1, 3\] .* more than 1 value per channel"),
    ],
)
def test_batches_that_cannot_be_used_are_told_and_change_nothing(
    batches: list[Any], told: str
) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ConfigError, match=told):
        recalibrate(model, [torch.ones(4, 3), *batches])
    assert model.state_dict()["0.num_batches_tracked"] == 0
    assert model.training


def test_a_generator_of_batches_lasts_one_round_only() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    batches = (torch.ones(4, 3) for _ in range(2))
    assert recalibrate(model, batches) == 2
    with pytest.raises(ConfigError, match="gone through again each round"):
        recalibrate(model, batches)
