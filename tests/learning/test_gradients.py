from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from p2pfl_torrent.core.chunking import Layout, plan
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.importance import magnitude_scores
from p2pfl_torrent.learning.gradients import EVERY, GradientStats
from p2pfl_torrent.learning.state import describe


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    return nn.Sequential(*layers).double()


def data(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (count,), generator=generator)


def layout_of(model: nn.Module, chunks: int = 6, exclude: tuple[str, ...] = ()) -> Layout:
    return plan(describe(model, exclude=exclude), num_chunks=chunks, block_size=4096)


def watching(
    model: nn.Module, method: str, *, hooked: bool = True, window: int = 10, steps: int = 100,
    **given: object,
) -> tuple[GradientStats, torch.optim.Optimizer]:  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    stats = GradientStats(model, optimizer, **given)  # type: ignore[arg-type]
    stats.watch(
        layout_of(model), method, history_window=window, max_steps=steps, from_samples=not hooked
    )
    return stats, optimizer


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1
) -> list[dict[str, np.ndarray]]:
    """The gradients and the weights (under ``w:name``) before every step."""
    seen = []
    for step in range(steps):
        inputs, targets = data(10, seed + 1000 * step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        found = {}
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                found[name] = weight.grad.to(torch.float64).numpy().copy()
                found["w:" + name] = weight.detach().to(torch.float64).numpy().copy()
        seen.append(found)
        optimizer.step()
    return seen


def per_chunk(layout: Layout, values: dict[str, np.ndarray]) -> list[float]:
    """Mean over the elements of each chunk that are there; 0 for none."""
    means = []
    for chunk in layout.chunks:
        parts = []
        for part in chunk.slices:
            name = layout.spec.tensors[part.tensor].name
            if name in values:
                parts.append(np.atleast_1d(values[name])[part.start : part.stop].reshape(-1))
        joined = np.concatenate([*parts, np.zeros(0)])
        means.append(float(joined.mean()) if joined.size else 0.0)
    return means


def test_magnitude_pools_what_was_seen_of_the_last_rounds() -> None:
    model = network()
    stats, optimizer = watching(model, "magnitude", window=2)
    layout, seen = layout_of(model), []
    for round in (1, 2, 3):
        steps = train(model, optimizer, EVERY["magnitude"] + 1, seed=round)
        seen.append([steps[0], steps[-1]])
        history = stats.moments(round)
    scores = magnitude_scores(history, chunks=len(layout.chunks), use_variance=True)
    looked_at = seen[1] + seen[2]  # the first round is forgotten
    names = [name for name, _ in model.named_parameters()]
    absolute, plain, square = (
        per_chunk(layout, {n: np.mean([f(s[n]) for s in looked_at], axis=0) for n in names})
        for f in (np.abs, np.asarray, np.square)
    )
    expected = [a * (1 + s - p * p) for a, p, s in zip(absolute, plain, square, strict=True)]
    assert scores == pytest.approx(expected, rel=1e-9)


def test_snip_of_training_is_the_last_step_that_was_looked_at() -> None:
    model = network()
    stats, optimizer = watching(model, "snip")
    seen = train(model, optimizer, EVERY["snip"] + 3)[EVERY["snip"]]
    products = {n: np.abs(g * seen["w:" + n]) for n, g in seen.items() if not n.startswith("w:")}
    scores = stats.snip(1, batch_size=1, use_cached=True)
    assert scores == pytest.approx(per_chunk(layout_of(model), products), rel=1e-9)


def test_fisher_of_training_is_the_rms_of_mini_batch_gradients() -> None:
    model = network()
    stats, optimizer = watching(model, "fisher", steps=2)
    seen = train(model, optimizer, 3 * EVERY["fisher"])
    looked_at = [seen[0], seen[EVERY["fisher"]]]  # no more than two
    means = {
        name: np.mean([step[name] ** 2 for step in looked_at], axis=0)
        for name, _ in model.named_parameters()
    }
    damp = 0.01 * np.concatenate([each.reshape(-1) for each in means.values()]).mean()
    roots = {name: np.sqrt(each + damp) for name, each in means.items()}
    scores = stats.fisher(1, num_samples=2, damping=0.01)
    assert scores == pytest.approx(per_chunk(layout_of(model), roots), rel=1e-9)


def test_fisher_of_samples_squares_the_gradient_of_each() -> None:
    model = network()
    inputs, targets = data(21)
    stats, _ = watching(
        model, "fisher", loss=nn.functional.cross_entropy, samples=(inputs, targets)
    )
    before = copy.deepcopy(model.state_dict())
    scores = stats.fisher(1, num_samples=20, damping=0.0)
    reference = copy.deepcopy(model).eval()
    squares: dict[str, np.ndarray] = {}
    for index in range(20):
        reference.zero_grad()
        loss = nn.functional.cross_entropy(reference(inputs[index : index + 1]), targets[[index]])
        loss.backward()  # type: ignore[no-untyped-call]
        for name, weight in reference.named_parameters():
            assert weight.grad is not None
            squares[name] = squares.get(name, 0) + weight.grad.numpy() ** 2 / 20
    roots = {name: np.sqrt(square) for name, square in squares.items()}
    assert scores == pytest.approx(per_chunk(layout_of(model), roots), rel=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("steps", "samples"), [(4, 8), (72, 12), (400, 20)])
def test_a_short_round_affords_fewer_samples(steps: int, samples: int) -> None:
    model = network()
    given: dict[str, Any] = {"loss": nn.functional.cross_entropy, "samples": data(30)}
    seen, _ = watching(model, "fisher", **given)
    exact, _ = watching(model, "fisher", **given)
    for _ in range(steps):
        seen.on_before_step()
    scores = seen.fisher(1, num_samples=20, damping=0.0)
    assert scores == pytest.approx(exact.fisher(1, num_samples=samples, damping=0.0))


def test_snip_of_samples_is_one_batch_whose_next_ones_come_in_the_next_round() -> None:
    model = network()
    inputs, targets = data(8)
    stats, optimizer = watching(
        model, "snip", hooked=False, loss=nn.functional.cross_entropy, samples=(inputs, targets)
    )
    for round, some in ((1, slice(0, 4)), (2, slice(4, 8))):
        train(model, optimizer, 1)
        reference = copy.deepcopy(model).eval()
        reference.zero_grad()
        nn.functional.cross_entropy(reference(inputs[some]), targets[some]).backward()  # type: ignore[no-untyped-call]
        products = {}
        for name, weight in reference.named_parameters():
            assert weight.grad is not None
            products[name] = (weight.grad * weight).abs().detach().numpy()
        scores = stats.snip(round, batch_size=4, use_cached=False)
        assert scores == pytest.approx(per_chunk(layout_of(model), products), rel=1e-9)
        assert scores == stats.snip(round, batch_size=4, use_cached=False)  # asked again


@pytest.mark.parametrize("method", ["snip", "fisher"])
def test_other_data_scores_otherwise(method: str) -> None:
    scores = []
    for seed in (1, 2):
        model = network()
        stats, optimizer = watching(model, method)
        train(model, optimizer, 1, seed=seed)
        if method == "snip":
            scores.append(stats.snip(1, batch_size=1, use_cached=True))
        else:
            scores.append(stats.fisher(1, num_samples=1, damping=0.0))
    assert scores[0] != pytest.approx(scores[1], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["magnitude", "snip", "fisher"])
def test_gradients_of_all_float_dtypes_are_summed_without_overflow(
    dtype: torch.dtype, method: str
) -> None:
    model = nn.Linear(40, 40, bias=False).to(dtype)
    nn.init.constant_(model.weight, 2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stats = GradientStats(model, optimizer)
    layout = layout_of(model, chunks=1)
    stats.watch(layout, method, history_window=1, max_steps=1, from_samples=False)
    model.weight.grad = torch.full_like(model.weight, 1024.0)  # its square is above float16's range
    optimizer.step()
    if method == "magnitude":
        [score] = magnitude_scores(stats.moments(1), chunks=1, use_variance=False)
    elif method == "snip":
        [score] = stats.snip(1, batch_size=1, use_cached=True)
    else:
        [score] = stats.fisher(1, num_samples=1, damping=0.0)
    assert score == pytest.approx(2048 if method == "snip" else 1024, rel=1e-3)


class Odd(nn.Module):
    """Frozen, unused, tied, sparse and buffered, each in a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4, sparse=True)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.unused = nn.Linear(4, 4, bias=False)
        self.used = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.used.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("counter", torch.ones(16))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        hidden = self.tied(self.used(self.frozen(self.embed(indices))))
        result: torch.Tensor = hidden * self.scale
        return result


@pytest.mark.parametrize("method", ["magnitude", "snip", "fisher"])
def test_what_has_no_gradient_scores_nothing_and_hides_nothing(method: str) -> None:
    torch.manual_seed(0)
    model = Odd()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    stats = GradientStats(model, optimizer)
    layout = layout_of(model, chunks=99)
    stats.watch(layout, method, history_window=1, max_steps=9, from_samples=False)
    model(torch.tensor([0, 2])).square().sum().backward()
    optimizer.step()
    if method == "magnitude":
        moments = stats.moments(1)
        scores = magnitude_scores(moments, chunks=len(layout.chunks), use_variance=False)
    elif method == "snip":
        scores = stats.snip(1, batch_size=1, use_cached=True)
    else:
        scores = stats.fisher(1, num_samples=1, damping=0.0)
    values: dict[str, np.ndarray] = {}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            g, w = weight.grad.to_dense().double(), weight.detach().double()
            values[name] = (g * w if method == "snip" else g).abs().numpy()
    assert set(values) == {"embed.weight", "used.weight", "scale"}
    assert scores == pytest.approx(per_chunk(layout, values), rel=1e-5)
    assert sorted(score > 0 for score in scores).count(True) >= 3


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    ("method", "expected"), [("magnitude", 3.0), ("snip", 4.0), ("fisher", 10.0**0.5)]
)
def test_a_gradient_with_a_value_that_is_not_finite_is_left_out_in_all_its_chunks(
    method: str, expected: float, place: int, bad: float
) -> None:
    model = nn.Linear(40, 40, bias=False)
    nn.init.constant_(model.weight, 1.0)
    stats = GradientStats(model)
    layout = layout_of(model, 2)
    assert len(layout.chunks) == 2
    stats.watch(layout, method, history_window=1, max_steps=3, from_samples=False)
    gradients = [torch.full_like(model.weight, value) for value in (2.0, 4.0)]
    odd = torch.full_like(model.weight, 100.0)
    odd[0, 0] = bad
    gradients.insert(place, odd)
    for gradient in gradients:
        model.weight.grad = gradient
        for _ in range(EVERY[method]):
            stats.on_before_step()
    assert scores_of(stats, method, 1, chunks=2) == pytest.approx([expected, expected])


def scores_of(stats: GradientStats, method: str, round: int, chunks: int) -> list[float]:
    if method == "magnitude":
        return magnitude_scores(stats.moments(round), chunks=chunks, use_variance=False)
    if method == "snip":
        return stats.snip(round, batch_size=1, use_cached=True)
    return stats.fisher(round, num_samples=1, damping=0.0)


@pytest.mark.parametrize("method", ["magnitude", "snip", "fisher"])
def test_statistics_that_never_saw_a_gradient_say_what_to_do(method: str) -> None:
    for trained in (network(1), None):  # another model's optimizer; or no step at all
        model = network()
        stats, optimizer = watching(model, method)
        if trained is not None:
            train(trained, optimizer, 2)  # whose steps move this model, which has no gradient
        with pytest.raises(ConfigError, match="saw none of the weights"):
            scores_of(stats, method, 1, chunks=6)
        train(model, optimizer, 1)
        assert any(scores_of(stats, method, 1, chunks=6))


@pytest.mark.parametrize("method", ["magnitude", "snip", "fisher"])
def test_after_a_round_without_a_step_the_scores_are_those_before(method: str) -> None:
    model = network()
    stats, optimizer = watching(model, method, window=3)
    train(model, optimizer, 1)
    first = scores_of(stats, method, 1, chunks=6)
    assert scores_of(stats, method, 2, chunks=6) == first
    train(model, optimizer, 1, seed=7)
    assert scores_of(stats, method, 3, chunks=6) != first


def test_a_callback_does_what_the_hook_does() -> None:
    hooked, called = network(), network()
    stats, optimizer = watching(hooked, "snip")
    train(hooked, optimizer, 1)
    by_callback = GradientStats(called)
    by_callback.watch(layout_of(called), "snip", history_window=1, max_steps=1, from_samples=False)
    train(called, torch.optim.SGD(called.parameters(), lr=0.0), 1)
    by_callback.on_before_step("trainer", called)
    scores = by_callback.snip(1, batch_size=1, use_cached=True)
    expected = stats.snip(1, batch_size=1, use_cached=True)
    assert scores == pytest.approx(expected)


def test_excluded_tensors_have_no_part() -> None:
    model = network()
    layout = layout_of(model, exclude=("0.*",))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stats = GradientStats(model, optimizer)
    stats.watch(layout, "snip", history_window=1, max_steps=1, from_samples=False)
    [seen] = train(model, optimizer, 1)
    products = {n: np.abs(g * seen["w:" + n]) for n, g in seen.items() if not n.startswith("w:")}
    scores = stats.snip(1, batch_size=1, use_cached=True)
    assert scores == pytest.approx(per_chunk(layout, products))


def test_half_of_what_samples_need_is_refused() -> None:
    with pytest.raises(ConfigError, match="loss= and samples= together"):
        GradientStats(network(), loss=nn.functional.cross_entropy)
    with pytest.raises(ConfigError, match="as many inputs as targets"):
        GradientStats(network(), loss=nn.functional.cross_entropy, samples=(data(3)[0], data(2)[1]))


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "LBFGS"])
def test_a_step_with_a_closure_is_looked_at_once_after_it(kind: str, by_name: bool) -> None:
    model = network()
    optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
    stats = GradientStats(model, optimizer)
    layout = layout_of(model)
    stats.watch(layout, "snip", history_window=1, max_steps=9, from_samples=False)
    inputs, targets = data(10)
    products: list[dict[str, np.ndarray]] = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        named = model.named_parameters()
        products.append({n: (w.grad * w).abs().detach().numpy() for n, w in named})  # type: ignore[operator]
        return loss  # type: ignore[return-value]  # as torch's own examples do

    if by_name:
        optimizer.step(closure=closure)
    else:
        optimizer.step(closure)
    optimizer.zero_grad()
    assert len(products) > 1 if kind == "LBFGS" else len(products) == 1
    scores = stats.snip(1, batch_size=1, use_cached=True)
    assert scores == pytest.approx(per_chunk(layout, products[0]), rel=1e-9)


def test_of_a_closure_that_is_called_many_times_only_the_first_is_looked_at() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=20)
    stats = GradientStats(model, optimizer)
    layout = layout_of(model)
    stats.watch(layout, "fisher", history_window=1, max_steps=9, from_samples=False)
    inputs, targets = data(10)
    absolute: list[dict[str, np.ndarray]] = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        named = model.named_parameters()
        absolute.append({n: w.grad.abs().numpy() for n, w in named})  # type: ignore[union-attr]
        return loss.item()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert len(absolute) > EVERY["fisher"]
    scores = stats.fisher(1, num_samples=9, damping=0.0)
    assert scores == pytest.approx(per_chunk(layout, absolute[0]), rel=1e-9)


def test_a_step_without_any_gradient_leaves_its_turn_to_the_next() -> None:
    model = network()
    stats, optimizer = watching(model, "snip")
    optimizer.step()
    [seen] = train(model, optimizer, 1)
    products = {n: np.abs(g * seen["w:" + n]) for n, g in seen.items() if not n.startswith("w:")}
    scores = stats.snip(1, batch_size=1, use_cached=True)
    assert scores == pytest.approx(per_chunk(layout_of(model), products), rel=1e-9)


def test_another_method_that_saw_no_gradient_says_so_too() -> None:
    model = network()
    stats, optimizer = watching(model, "snip")
    train(model, optimizer, 1)
    stats.snip(1, batch_size=1, use_cached=True)
    stats.watch(layout_of(model), "fisher", history_window=1, max_steps=9, from_samples=False)
    with pytest.raises(ConfigError, match="saw none of the weights"):
        stats.fisher(2, num_samples=1, damping=0.0)


def of_samples(model: nn.Module, method: str) -> list[float]:
    loss = nn.functional.cross_entropy
    stats = GradientStats(model, loss=loss, samples=data(9))
    stats.try_samples(method)
    from_samples = method == "snip"
    stats.watch(layout_of(model), method, history_window=1, max_steps=9, from_samples=from_samples)
    if method == "snip":
        return stats.snip(1, batch_size=9, use_cached=False)
    return stats.fisher(1, num_samples=9, damping=0.0)


class Branching(nn.Linear):
    """Looks at values in forward, which torch.func.vmap does not allow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum().item() > 0 else -x)


class Recomputed(nn.Linear):
    """Under activation checkpointing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return result


class Stubborn(nn.BatchNorm1d):
    """In training whatever it is told."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.training = True
        return super().forward(x)


class Counting(nn.Linear):
    """Moves a buffer at every call."""

    calls: torch.Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("model", [Branching(6, 3), Recomputed(6, 3), Stubborn(6)])
def test_a_model_that_vmap_cannot_take_says_what_to_do(model: nn.Module) -> None:
    stats = GradientStats(model.double(), loss=nn.functional.cross_entropy, samples=data(9))
    with pytest.raises(ConfigError, match="leave out its loss= and samples=") as caught:
        stats.try_samples("fisher")
    assert "\n" not in str(caught.value)


def test_samples_that_do_not_fit_the_model_say_what_to_do() -> None:
    stats = GradientStats(nn.Linear(7, 3), loss=nn.functional.cross_entropy, samples=data(9))
    with pytest.raises(ConfigError, match=r"snip\.use_cached true"):
        stats.try_samples("snip")


@pytest.mark.parametrize("method", ["snip", "fisher"])
def test_samples_go_around_wrappers_and_move_no_buffer(method: str) -> None:
    model = Counting(6, 3).double()
    expected = of_samples(copy.deepcopy(model), method)
    assert any(expected)
    assert of_samples(nn.DataParallel(model), method) == expected
    assert model.calls == 0


def test_no_wrapped_model_is_called_for_samples() -> None:
    class DataParallel(nn.Module):  # goes by this name
        def __init__(self) -> None:
            super().__init__()
            self.module = network()

    for method in ("snip", "fisher"):
        assert of_samples(DataParallel(), method) == of_samples(network(), method)


@pytest.mark.parametrize("method", ["snip", "fisher"])
def test_a_frozen_model_scores_nothing(method: str) -> None:
    model = network().requires_grad_(False)
    assert not any(of_samples(model, method))
