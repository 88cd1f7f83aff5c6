"""SCAFFOLD's local part against the paper's algorithm, computed by itself in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from p2pfl_torrent import Scaffold
from p2pfl_torrent.core.controls import controls_of, with_controls
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.tensors import Array, ModelSpec, TensorSpec
from p2pfl_torrent.learning.state import describe

Vector = npt.NDArray[np.float64]

SIZE, LR = 5, 0.05
STEPS = (2, 5, 9)  # of each peer in a round: what makes FedAvg drift
CURVATURES = (1.0, 3.0, 0.5)
RNG = np.random.default_rng(4)
TARGETS = [RNG.standard_normal(SIZE) for _ in STEPS]


class Bowl(nn.Module):
    """a / 2 |w - b|^2, whose gradient is a (w - b)."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float32))
        self.a, self.b = CURVATURES[place], torch.from_numpy(TARGETS[place])

    def forward(self) -> torch.Tensor:
        return self.a / 2 * (self.w - self.b).pow(2).sum()


def by_the_paper(rounds: int, *, corrected: bool = True) -> Vector:
    """Algorithm 1, option II, all peers in every round, a global step of 1."""
    x, c = np.zeros(SIZE), np.zeros(SIZE)
    own = [np.zeros(SIZE) for _ in STEPS]
    for _ in range(rounds):
        trained, fresh = [], []
        for place, steps in enumerate(STEPS):
            y = x.copy()
            for _ in range(steps):
                gradient = CURVATURES[place] * (y - TARGETS[place])
                y -= LR * (gradient - own[place] + c if corrected else gradient)
            trained.append(y)
            fresh.append(own[place] - c + (x - y) / (steps * LR))
        c = c + np.mean([new - old for new, old in zip(fresh, own, strict=True)], axis=0)
        x = x + np.mean([y - x for y in trained], axis=0)
        own = fresh
    return x


def by_scaffold(rounds: int) -> Vector:
    models = [Bowl(place) for place in range(len(STEPS))]
    optimizers = [torch.optim.SGD(model.parameters(), lr=LR) for model in models]
    locals_ = [Scaffold(m, o) for m, o in zip(models, optimizers, strict=True)]
    state: dict[str, Array] = {
        "w": np.zeros(SIZE),
        "w:c": np.zeros(SIZE),
        "seen:c": np.zeros(2, np.float32),
    }
    own: list[dict[str, Array] | None] = [None] * len(STEPS)
    for _ in range(rounds):
        trained = []
        for place, (model, optimizer, scaffold) in enumerate(
            zip(models, optimizers, locals_, strict=True)
        ):
            with torch.no_grad():
                model.w.copy_(torch.from_numpy(np.array(state["w"])))
            scaffold.begin(state, own[place])
            for _ in range(STEPS[place]):
                optimizer.zero_grad()
                model().backward()
                optimizer.step()
            own[place] = dict(scaffold.controls())
            trained.append({"w": model.w.detach().numpy().copy(), **scaffold.controls()})
        state = {
            name: np.asarray(np.mean([update[name] for update in trained], axis=0, dtype=a.dtype))
            for name, a in state.items()
        }
    assert not state["seen:c"].any()  # what is not trained has no control
    return np.asarray(state["w"], np.float64)


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_rounds_go_as_in_the_paper(rounds: int) -> None:
    np.testing.assert_allclose(by_scaffold(rounds), by_the_paper(rounds), rtol=1e-12)


def test_it_comes_to_the_common_optimum_where_drift_keeps_averaging_from_it() -> None:
    weighted = [a * b for a, b in zip(CURVATURES, TARGETS, strict=True)]
    optimum = np.sum(weighted, axis=0) / sum(CURVATURES)
    assert np.abs(by_scaffold(150) - optimum).max() < 1e-6
    assert np.abs(by_the_paper(150, corrected=False) - optimum).max() > 0.05


def test_a_changing_rate_counts_step_by_step() -> None:
    model = Bowl(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaffold = Scaffold(model, optimizer)
    scaffold.begin({"w": np.zeros(SIZE), "w:c": np.zeros(SIZE)}, None)
    gradients = []
    for rate in (0.1, 0.02):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        model().backward()
        assert model.w.grad is not None
        gradients.append(rate * model.w.grad.numpy().copy())
        optimizer.step()
    expected = np.sum(gradients, axis=0) / 0.12
    got = np.asarray(scaffold.controls()["w:c"], np.float64)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_without_a_step_a_control_stays() -> None:
    model = Bowl(1)
    scaffold = Scaffold(model, torch.optim.SGD(model.parameters(), lr=0.1))
    own: dict[str, Array] = {"w:c": np.arange(5.0)}
    scaffold.begin({"w": np.zeros(SIZE), "w:c": np.ones(SIZE)}, own)
    np.testing.assert_array_equal(scaffold.controls()["w:c"], own["w:c"])


def test_a_single_number_is_a_parameter_too() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaffold = Scaffold(model, optimizer)
    scaffold.begin({"w:c": np.zeros((), np.float32)}, None)
    model.w.grad = torch.full((), 2.0, dtype=torch.bfloat16)
    optimizer.step()
    control = scaffold.controls()["w:c"]
    assert isinstance(control, np.ndarray)
    assert control.shape == ()
    assert control.dtype == np.float32
    assert control == 2.0


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_steps_that_are_no_gradients_are_refused(name: str) -> None:
    model = Bowl(0)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if name == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"give it torch\.optim\.SGD with momentum=0"):
        Scaffold(model, optimizer)


def test_every_float_has_a_control() -> None:
    spec = with_controls(describe(Bowl(0)))
    assert controls_of(spec) == ModelSpec(
        (TensorSpec("w:c", "F64", (SIZE,)), TensorSpec("seen:c", "F32", (2,)))
    )
