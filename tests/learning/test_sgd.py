"""The recipes' own optimizer takes the very steps of torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from p2pfl_torrent.learning.models import build
from p2pfl_torrent.learning.sgd import SGD


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_its_steps_are_those_of_torch_bit_for_bit(momentum: float) -> None:
    ours = build("small_cnn_batch_norm", (1, 8, 8), 10, seed=1)
    theirs = copy.deepcopy(ours)
    mine = SGD(ours.parameters(), lr=0.1, momentum=momentum)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum, foreach=False)
    generator = torch.Generator().manual_seed(2)
    for step in range(6):
        if step == 3:
            mine.reset()
            reference.state.clear()
        x, y = torch.randn((8, 1, 8, 8), generator=generator), torch.arange(8)
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_a_parameter_without_a_gradient_stays() -> None:
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = SGD([used, unused], lr=0.5, momentum=0.9)
    used.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert used.tolist() == [0.5, 0.5]
    assert unused.tolist() == [1.0, 1.0]


def test_a_hook_is_called_before_every_step_as_by_torch() -> None:
    told: list[tuple[int, float, float]] = []
    for kind in (SGD, torch.optim.SGD):
        weight = torch.ones(1, requires_grad=True)
        optimizer = kind([weight], lr=0.5, momentum=0.0)

        def look(*arguments: object, weight: torch.Tensor = weight) -> None:
            assert weight.grad is not None
            told.append((len(arguments), weight.grad.item(), weight.item()))

        optimizer.register_step_pre_hook(look)
        for _ in range(2):
            optimizer.zero_grad()
            weight.square().sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert told[:2] == told[2:] == [(3, 2.0, 1.0), (3, 0.0, 0.0)]
