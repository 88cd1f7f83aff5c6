"""FedProx's term against its formula, its gradient, and its pull in a real step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.learning.proximal import proximal_term


def moved() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
    return model, start


def test_value_and_gradient_are_those_of_the_formula() -> None:
    model, start = moved()
    term = proximal_term(model, start, 0.3)
    want = sum(
        0.15 * float(((weight.detach() - start[name]) ** 2).sum())
        for name, weight in model.named_parameters()
    )
    assert float(term.detach()) == pytest.approx(want, rel=1e-12)
    gradients = torch.autograd.grad(term, list(model.parameters()))
    for gradient, (name, weight) in zip(gradients, model.named_parameters(), strict=True):
        torch.testing.assert_close(gradient, 0.3 * (weight.detach() - start[name]))


def test_what_is_frozen_does_not_count_and_may_be_left_out() -> None:
    model, start = moved()
    for name, weight in model.named_parameters():
        weight.requires_grad_(name == "1.bias")
    term = proximal_term(model, {"1.bias": start["1.bias"]}, 2.0)
    bias = dict(model.named_parameters())["1.bias"]
    assert float(term.detach()) == pytest.approx(
        float(((bias.detach() - start["1.bias"]) ** 2).sum())
    )


def test_mistakes_are_named() -> None:
    model, start = moved()
    with pytest.raises(ConfigError, match="mu is -1"):
        proximal_term(model, start, -1)
    del start["0.weight"]
    with pytest.raises(ConfigError, match=r"'0\.weight' is not in start"):
        proximal_term(model, start, 1.0)
    for weight in model.parameters():
        weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter"):
        proximal_term(model, start, 1.0)
