"""Small networks for the demo, the benchmarks and the tests, built from a seed."""

from __future__ import annotations

import difflib
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from p2pfl_torrent.core.errors import ConfigError

Norm = Literal["none", "batch", "group"]

GROUPS = 4  # groups of channels that GroupNorm normalises together; divides every width used here
MIN_SIDE = 2  # pooling stops here: a 1 x 1 map has no place left to tell apart


class Conv2d(nn.Conv2d):
    """A convolution whose weights are not drawn when it is made: `initialise` does that."""

    def reset_parameters(self) -> None:
        """Draw nothing, and so leave torch's global random state alone."""


class Linear(nn.Linear):
    """A linear layer, likewise."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


def small_cnn(
    in_shape: tuple[int, int, int],
    classes: int,
    norm: Norm = "none",
    width: int = 16,
    hidden: int = 64,
) -> nn.Sequential:
    """Two 3x3 convolutions, each pooled by two, and two linear layers.

    For digits (1 x 8 x 8, 10 classes) 13,706 weights, for MNIST (1 x 28 x 28) 105,866.

    Args:
        in_shape: (channels, height, width) of one image.
        classes: number of labels; the output is [n, classes] logits.
        norm: what follows each convolution.
        width: channels of the first convolution, a multiple of 4; the second has twice as many.
        hidden: units between the two linear layers.
    """
    if width % GROUPS:
        raise ConfigError(f"small_cnn needs a width that is a multiple of {GROUPS}, got {width}.")
    channels, height, breadth = in_shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, out in ((1, width), (2, 2 * width)):
        layers[f"conv{number}"] = Conv2d(channels, out, 3, padding=1)
        if norm != "none":
            layers[f"norm{number}"] = _norm(norm, out)
        layers[f"relu{number}"] = nn.ReLU()
        if min(height, breadth) >= 2 * MIN_SIDE:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
            height, breadth = height // 2, breadth // 2
        channels = out
    layers["flatten"] = nn.Flatten()
    layers["linear1"] = Linear(channels * height * breadth, hidden)
    layers["relu3"] = nn.ReLU()
    layers["linear2"] = Linear(hidden, classes)
    return nn.Sequential(layers)


def logistic(in_shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """Multinomial logistic regression: convex, so that averaging has one right answer."""
    linear = Linear(math.prod(in_shape), classes)
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=linear))


MODELS: dict[str, Callable[[tuple[int, int, int], int], nn.Module]] = {
    "small_cnn": small_cnn,
    "small_cnn_batch_norm": lambda in_shape, classes: small_cnn(in_shape, classes, "batch"),
    "small_cnn_group_norm": lambda in_shape, classes: small_cnn(in_shape, classes, "group"),
    "logistic": logistic,
}
"""Name in a configuration -> architecture; its weights are for `initialise` to draw."""


def build(name: str, in_shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """A model of `MODELS` on the CPU whose start weights depend on the seed alone.

    torch's global random state is neither read nor advanced, so a model may be built in a thread
    while the user's own code trains.

    Raises:
        ConfigError: there is no model of this name.
    """
    architecture = MODELS.get(name)
    if architecture is None:
        close = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(MODELS)}."
        raise ConfigError(f"Unknown model {name!r}: {hint}")
    # Not on the meta device, which would do for any layer: it loads sympy (0.4 CPU-s, 34 MB).
    model = architecture(in_shape, classes)
    initialise(model, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw start weights from this generator: uniform, variance 2/fan_in (He et al., ICCV 2015).

    The last linear layer, which no ReLU follows, gets 1/fan_in; biases are zero. Against torch's
    own defaults (1/3 of 1/fan_in) six peers on digits gain 20 to 50 points in the first round
    and 4 to 6 in the eighth.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for layer in layers:
        variance = (1 if layer is layers[-1] else 2) / layer.weight[0].numel()
        bound = math.sqrt(3 * variance)
        layer.weight.uniform_(-bound, bound, generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            module.reset_parameters()


def _norm(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(GROUPS, channels)
    raise ConfigError(f"Unknown norm {norm!r}: choose none, batch or group.")
