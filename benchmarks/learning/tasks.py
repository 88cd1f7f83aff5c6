"""What is learned: MNIST by a small CNN, characters of English text by a small Transformer."""

from __future__ import annotations

import pydoc_data.topics
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from p2pfl_torrent.core.chunking import Layout, plan
from p2pfl_torrent.core.tensors import Arrays
from p2pfl_torrent.learning.datasets import load
from p2pfl_torrent.learning.models import Conv2d, Linear, initialise
from p2pfl_torrent.learning.partition import partition
from p2pfl_torrent.learning.sgd import SGD
from p2pfl_torrent.learning.state import describe, load_arrays, snapshot

Tensor = torch.Tensor

CONTEXT = 32  # characters that the Transformer sees
WIDTH = 32
HEADS = 4
BLOCKS = 2


class Optimizer(Protocol):
    """What the local training asks of one."""

    def zero_grad(self) -> None: ...

    def step(self) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Inputs and targets, the first side counts samples."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Data cut among peers, and how to learn from it.

    Attributes:
        build: a model with start weights by the seed.
        loss: of (model's output, targets), mean over them.
        epochs, batch_size: of the local training in one round.
        optimizer: made anew for each round, so that no state is carried past a merge.
    """

    name: str
    build: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    parts: Sequence[Samples]
    test: Samples
    epochs: int
    batch_size: int
    optimizer: Callable[[Iterable[Tensor]], Optimizer]

    def layout(self, model: nn.Module, chunks: int) -> Layout:
        """The model in about so many chunks of about equal size, each of few blocks."""
        return plan(describe(model), num_chunks=chunks, block_size=4096)

    def start(self, model: nn.Module) -> Arrays:
        """Its weights as they are now."""
        return snapshot(model, describe(model))

    def accuracy(self, model: nn.Module, arrays: Arrays) -> float:
        """Share of right answers on the test set with these weights."""
        load_arrays(model, describe(model), arrays)
        model.eval()
        with torch.no_grad():
            right = (model(self.test.x).argmax(dim=-1) == self.test.y).double()
        model.train()
        return float(right.mean())


def mnist(peers: int, seed: int, scheme: str, samples: int = 6000, tested: int = 1000) -> Task:
    """Digits by a CNN of 19,258 weights.

    Args:
        scheme: of ``learning.partition``: dirichlet(0.3) leaves most peers few labels.
    """
    train, test = load("mnist")
    rng = np.random.default_rng(seed)
    chosen = train.subset(rng.choice(len(train), samples, replace=False))
    parts = partition(scheme, chosen.y, peers, rng)
    held_out = test.subset(np.arange(tested))
    return Task(
        name="mnist",
        build=lambda number: _drawn(_cnn(), number),
        loss=functional.cross_entropy,
        parts=[_images(chosen.x[part], chosen.y[part]) for part in parts],
        test=_images(held_out.x, held_out.y),
        epochs=2,
        batch_size=32,
        optimizer=lambda parameters: SGD(parameters, lr=0.1, momentum=0.5),
    )


def text(peers: int, seed: int, scheme: str, samples: int = 4000, tested: int = 500) -> Task:
    """The next character of Python's own language reference, as its help system holds it.

    Each peer has sections of its own, which differ in what they are about; ``scheme`` iid deals
    all sections' samples to all.
    """
    sections = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    alphabet = {letter: place for place, letter in enumerate(sorted(set("".join(sections))))}
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(sections))
    codes = np.array([alphabet[c] for k in order for c in sections[k]], np.int64)
    whole = len(codes) // (CONTEXT + 1)
    windows = codes[: whole * (CONTEXT + 1)].reshape(whole, CONTEXT + 1)
    held_out = windows[rng.choice(whole, tested, replace=False)]
    step = (samples + peers - 1) // peers
    places = np.linspace(0, whole - step, peers).astype(int)  # a stretch of sections for each
    parts = [windows[place : place + step] for place in places]
    if scheme == "iid":
        dealt = rng.permutation(np.concatenate(parts))
        parts = list(np.array_split(dealt, peers))
    return Task(
        name="text",
        build=lambda number: _drawn(Characters(len(alphabet)), number),
        loss=lambda output, y: functional.cross_entropy(output.flatten(0, 1), y.flatten()),
        parts=[_sequences(part) for part in parts],
        test=_sequences(held_out),
        epochs=1,
        batch_size=16,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    )


def _images(x: np.ndarray, y: np.ndarray) -> Samples:
    return Samples(torch.from_numpy(x).float() / 255.0, torch.from_numpy(y))


def _sequences(windows: np.ndarray) -> Samples:
    codes = torch.from_numpy(np.ascontiguousarray(windows))
    return Samples(codes[:, :-1].contiguous(), codes[:, 1:].contiguous())


def _drawn(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    initialise(model, generator)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 0.1, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
    return model


def _cnn() -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 1
    for number, out, padding in ((1, 12, 1), (2, 24, 1), (3, 32, 0)):  # 14, 7 and 3 a side
        layers[f"conv{number}"] = Conv2d(channels, out, 3, stride=2, padding=padding)
        layers[f"relu{number}"] = nn.ReLU()
        channels = out
    layers["flatten"] = nn.Flatten()
    layers["linear1"] = Linear(channels * 9, 32)
    layers["relu4"] = nn.ReLU()
    layers["linear2"] = Linear(32, 10)
    return nn.Sequential(layers)


class Characters(nn.Module):
    """A decoder of two blocks, pre-norm, learned positions; logits for every place."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = Linear(WIDTH, letters)

    def forward(self, codes: Tensor) -> Tensor:
        """int64 [n, CONTEXT] -> float32 [n, CONTEXT, letters]."""
        x = self.letters(codes) + self.places.weight[: codes.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Causal self-attention and a feed-forward of four times the width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = Linear(WIDTH, 3 * WIDTH), Linear(WIDTH, WIDTH)
        self.up, self.down = Linear(WIDTH, 4 * WIDTH), Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [n, places, WIDTH], the same out."""
        n, places, _ = x.shape
        shaped = self.qkv(self.norm1(x)).view(n, places, 3, HEADS, WIDTH // HEADS)
        query, key, value = shaped.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, places, WIDTH))
        return x + self.down(functional.relu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


TASKS: dict[str, Callable[[int, int, str], Task]] = {"mnist": mnist, "text": text}
TARGETS = {"mnist": 0.9, "text": 0.33}
"""Accuracy that counts as reached."""
