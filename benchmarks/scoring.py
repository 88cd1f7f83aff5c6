"""What scoring by each importance method costs, as a share of the training that it goes with.

    python -m benchmarks scoring --steps 64 --json -

A CNN and a small Transformer train on noise, on the CPU. Each method takes its turn in every repeat
for a round of so many steps. The share is the CPU-seconds spent in looking at gradients and in
scoring at the round's end, over those of the same round's training; medians over the repeats. Short
rounds make it larger: the first step is always looked at, and a round is scored once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks.output import add_json, median, write
from p2pfl_torrent.core.chunking import Layout, plan
from p2pfl_torrent.core.importance import l2_norm_scores, magnitude_scores
from p2pfl_torrent.learning.gradients import GradientStats
from p2pfl_torrent.learning.state import describe, to_arrays

METHODS = ("l2_norm", "magnitude", "snip", "fisher", "fisher_samples")
BATCH = 32
SAMPLES = 100  # of fisher, the configuration's default


def cnn() -> tuple[nn.Module, torch.Tensor]:
    """A network of convolutions, and a batch of images for it."""
    layers = (nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(),
              nn.Flatten(), nn.Linear(64 * 36, 128), nn.ReLU(), nn.Linear(128, 10))  # fmt: skip
    return nn.Sequential(*layers), torch.randn(128, 3, 16, 16)


class Transformer(nn.Module):
    """Two blocks of attention over a sequence of vectors."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        scores: torch.Tensor = self.head(self.blocks(inputs).mean(1))
        return scores


def transformer() -> tuple[nn.Module, torch.Tensor]:
    """A small Transformer, and a batch of sequences for it."""
    return Transformer(), torch.randn(128, 24, 64)


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "cnn": cnn,
    "transformer": transformer,
}


def share(name: str, method: str, steps: int) -> float:
    """CPU-seconds of scoring one round over those of training it."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    targets = torch.randint(0, 10, (len(inputs),))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = nn.functional.cross_entropy
    samples = (inputs, targets) if method == "fisher_samples" else None
    stats = GradientStats(model, loss=loss if samples else None, samples=samples)
    layout = plan(describe(model), num_chunks=20, block_size=65536)
    if method != "l2_norm":
        watched = method.removesuffix("_samples")
        stats.watch(layout, watched, history_window=10, max_steps=SAMPLES, from_samples=False)
    scoring, began = 0.0, time.process_time()
    for step in range(steps):
        some = slice(step * BATCH % len(inputs), step * BATCH % len(inputs) + BATCH)
        optimizer.zero_grad()
        loss(model(inputs[some]), targets[some]).backward()  # type: ignore[no-untyped-call]
        looked = time.process_time()
        stats.on_before_step()
        scoring += time.process_time() - looked
        optimizer.step()
    ended = time.process_time()
    training = ended - began - scoring
    score(stats, layout, model, method)
    return (scoring + time.process_time() - ended) / training


def score(stats: GradientStats, layout: Layout, model: nn.Module, method: str) -> list[float]:
    """A round's scores, as a peer takes them."""
    if method == "l2_norm":
        arrays = to_arrays(model, layout.spec)
        return l2_norm_scores(layout, arrays, depth_boost=0.3, normalize_by_size=True)
    if method == "magnitude":
        return magnitude_scores(stats.moments(1), chunks=len(layout.chunks), use_variance=True)
    if method == "snip":
        return stats.snip(1, batch_size=128, use_cached=True)
    return stats.fisher(1, num_samples=SAMPLES, damping=0.001)


def main(argv: Sequence[str]) -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks scoring", description="Scoring as a share of training time."
    )
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="of a round")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    add_json(parser)
    args = parser.parse_args(argv)
    laps: dict[str, dict[str, list[float]]] = {name: {m: [] for m in METHODS} for name in MODELS}
    for repeat in range(args.repeats + 1):
        for name, of_model in laps.items():
            for method in METHODS:
                measured = share(name, method, args.steps)
                if repeat:  # the first is not counted: torch gets warm
                    of_model[method].append(measured)
    shares = {name: {m: median(taken) for m, taken in rows.items()} for name, rows in laps.items()}
    table = [f"{'share of training':18}" + "".join(f"{method:>16}" for method in METHODS)]
    for name, row in shares.items():
        table.append(f"{name:18}" + "".join(f"{row[method]:16.2%}" for method in METHODS))
    write(args.json, {"steps": args.steps, "repeats": args.repeats, "shares": shares}, table)
    return 0
