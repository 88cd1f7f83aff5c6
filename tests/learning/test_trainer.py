"""Training is deterministic and leaves the process as it was; evaluation counts right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from p2pfl_torrent.core.chunking import plan
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.learning.datasets import Dataset
from p2pfl_torrent.learning.models import build
from p2pfl_torrent.learning.norms import recalibrate
from p2pfl_torrent.learning.state import describe
from p2pfl_torrent.learning.trainer import Evaluation, Trainer, TrainResult, evaluate


def blobs(samples: int = 50, seed: int = 0) -> Dataset:
    """Two classes of 1x4x4 images that a linear model tells apart."""
    rng = np.random.default_rng(seed)
    y = np.arange(samples, dtype=np.int64) % 2
    x = rng.random((samples, 1, 4, 4), dtype=np.float32) * np.float32(0.5)
    x[:, 0, :2] += y[:, np.newaxis, np.newaxis].astype(np.float32) / 2
    return Dataset(x, y, 2)


def layer(model: nn.Module, name: str) -> Any:
    """A part of the model, free of torch's union of module and tensor."""
    return model.get_submodule(name)


def trainer(
    name: str = "logistic",
    data: Dataset | None = None,
    seed: int = 3,
    batch_size: int = 8,
    momentum: float = 0.9,
    **options: Any,
) -> Trainer:
    data = blobs() if data is None else data
    return Trainer(
        build(name, data.in_shape, data.classes, seed=1),
        data,
        batch_size=batch_size,
        lr=0.1,
        momentum=momentum,
        seed=seed,
        **options,
    )


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def test_training_learns_and_reports() -> None:
    ours = trainer()
    before = ours.evaluate(blobs(seed=9))
    result = ours.train(6)
    after = ours.evaluate(blobs(seed=9))
    assert isinstance(result, TrainResult)
    assert (result.samples, result.batches) == (50, 6 * 7)
    assert 0 < result.loss < before.loss
    assert result.seconds > 0
    assert after.accuracy == 1.0


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    def trained(seed: int) -> torch.Tensor:
        ours = trainer("small_cnn_batch_norm", seed=seed)
        ours.train(2)
        ours.train(1)
        return weights(ours.model)

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def with_dropout(seed: int) -> Trainer:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 2))
    with torch.no_grad():
        layer(model, "2").weight.zero_()
        layer(model, "2").bias.zero_()
    return Trainer(model, blobs(), batch_size=50, lr=0.1, seed=seed)


def test_dropout_follows_the_seed_and_global_randomness_rests() -> None:
    results = []
    for global_seed, seed in ((1, 7), (2, 7), (1, 8)):
        ours = with_dropout(seed)
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        ours.train(1)
        assert torch.equal(torch.get_rng_state(), state)
        ours.train(1)
        results.append(weights(ours.model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_one_epoch_sees_each_sample_once_in_nearly_equal_batches() -> None:
    seen: list[torch.Tensor] = []

    class Spy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.detach())
            return super().forward(x.flatten(1))

    data = blobs(33)
    Trainer(Spy(16, 2), data, batch_size=16, lr=0.1, seed=0).train(1)
    assert [len(batch) for batch in seen] == [11, 11, 11]
    rows = {tuple(row.flatten().tolist()) for batch in seen for row in batch}
    assert rows == {tuple(image.flatten().tolist()) for image in data.x}
    assert not torch.equal(torch.cat(seen), torch.from_numpy(data.x))


def test_on_batch_is_told_the_progress_and_may_stop_it() -> None:
    told: list[tuple[int, int, float]] = []
    ours = trainer()
    result = ours.train(2, on_batch=lambda *progress: told.append(progress))
    assert [(done, total) for done, total, _ in told] == [(k + 1, 14) for k in range(14)]
    last_epoch = [loss for _, _, loss in told[7:]]
    sizes = [8] + [7] * 6  # 50 in 7 batches
    assert result.loss == pytest.approx(np.average(last_epoch, weights=sizes), rel=1e-6)

    class Enough(Exception):
        pass

    def stop(done: int, total: int, loss: float) -> None:
        raise Enough

    before = torch.get_rng_state()
    with pytest.raises(Enough):
        ours.train(1, on_batch=stop)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_proximal_term_adds_its_gradient() -> None:
    """Full batches, no momentum, two steps: at the second the pull is mu (w1 - w0)."""
    mu, lr = 0.7, 0.1
    data = blobs()
    ours = trainer(data=data, batch_size=50, momentum=0.0, proximal=mu)
    ours.train(2)
    model = build("logistic", data.in_shape, 2, seed=1)
    parameters = list(model.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(x), y)
        for parameter, w0 in zip(parameters, start, strict=True):
            loss = loss + mu / 2 * (parameter - w0).square().sum()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(lr * gradient)
    torch.testing.assert_close(weights(ours.model), weights(model))


def test_proximal_anchors_are_the_weights_of_this_round() -> None:
    ours = trainer(proximal=50.0, batch_size=50, momentum=0.0)
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter.fill_(0.25)  # as a merge would
    ours.train(1)
    assert (weights(ours.model) - 0.25).abs().max() < 0.1


@pytest.mark.parametrize(("on_merge", "kept"), [("keep", True), ("reset", False)])
def test_merged_keeps_or_resets_the_momentum(on_merge: str, kept: bool) -> None:
    def step_after_merge(warm: bool) -> torch.Tensor:
        ours = trainer(on_merge=on_merge, batch_size=50)
        fresh = {name: value.clone() for name, value in ours.model.state_dict().items()}
        if warm:
            ours.train(3)
            ours.model.load_state_dict(fresh)
            ours.merged()
        ours.train(1)
        return weights(ours.model)

    same = torch.allclose(step_after_merge(warm=True), step_after_merge(warm=False))
    assert same is not kept


def test_evaluate_counts_by_hand_and_in_pieces() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        layer(model, "1").weight.copy_(torch.tensor([[0.0], [1.0]]))
    x = np.array([1, 1, -1, 2], np.float32).reshape(4, 1, 1, 1)
    data = Dataset(x, np.array([1, 0, 0, 1]), 2)
    score = evaluate(model, data, batch_size=3)
    losses = [math.log1p(math.exp(-1)), math.log1p(math.e)]
    expected = (2 * losses[0] + losses[1] + math.log1p(math.exp(-2))) / 4
    assert score == Evaluation(score.loss, 0.75, 4)
    assert score.loss == pytest.approx(expected, rel=1e-6)


def test_evaluate_leaves_modes_and_statistics_alone() -> None:
    model = build("small_cnn_batch_norm", (1, 4, 4), 2, seed=0)
    model.train()
    layer(model, "norm1").eval()  # frozen by its user
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, blobs())
    assert model.training
    assert not layer(model, "norm1").training
    assert layer(model, "norm2").training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_batches_feed_recalibration() -> None:
    ours = trainer("small_cnn_batch_norm")
    ours.train(1)
    assert torch.equal(torch.cat([y for _, y in ours.batches()]), torch.from_numpy(blobs().y))
    assert recalibrate(ours.model, ours.batches()) == ours.batches_per_epoch


def test_divergence_is_reported_and_not_hidden() -> None:
    data = blobs()
    model = build("logistic", data.in_shape, 2, seed=0)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    assert math.isnan(Trainer(model, data, batch_size=8, lr=0.1).train(1).loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trainer(data=blobs().subset([])), "empty"),
        (lambda: trainer(batch_size=0), "batch_size"),
        (lambda: trainer(momentum=1.0), "momentum"),
        (lambda: trainer(proximal=-1.0), "proximal"),
        (lambda: trainer(on_merge="forget"), "keep or reset"),
        (lambda: Trainer(nn.Linear(1, 1), blobs(), batch_size=1, lr=float("nan")), "lr"),
        (lambda: trainer().train(0), "epochs"),
        (lambda: evaluate(nn.Linear(1, 1), blobs().subset([])), "empty"),
    ],
)
def test_wrong_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("device", ["cuda:99", "mps:9", "meat"])
def test_a_device_that_is_not_there_is_told(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"^Device '{device}' cannot be used here \(.+\): use"):
        trainer(device=device)


def test_pixels_as_bytes_train_as_their_values_do() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 1, 4, 4), np.uint8)
    labels = np.arange(20, dtype=np.int64) % 2
    as_bytes = Dataset(pixels, labels, 2)
    as_values = Dataset(pixels.astype(np.float32) / np.float32(255), labels, 2)
    ours, theirs = trainer(data=as_bytes), trainer(data=as_values)
    assert ours.train(2).loss == theirs.train(2).loss
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert ours.evaluate(as_bytes) == theirs.evaluate(as_values)
    assert next(ours.batches())[0].dtype == torch.float32


@pytest.mark.parametrize("with_samples", [False, True])
def test_its_gradient_statistics_change_nothing_and_see_its_steps(with_samples: bool) -> None:
    ours, plain = trainer(), trainer()
    stats = ours.gradient_stats(with_samples=with_samples)
    assert stats.has_samples == with_samples
    layout = plan(describe(ours.model), num_chunks=1, block_size=4096)
    stats.watch(layout, "snip", history_window=1, max_steps=1, from_samples=with_samples)
    for each in (ours, plain):
        each.train(1)
    [score] = stats.snip(1, batch_size=8, use_cached=not with_samples)
    assert score > 0
    for each in (ours, plain):
        each.train(1)
    assert torch.equal(weights(ours.model), weights(plain.model))
