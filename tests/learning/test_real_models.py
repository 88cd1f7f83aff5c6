"""Published architectures at their real size, through chunk files and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.architecture import RANGES
from p2pfl_torrent.core.chunking import decode_chunk, encode_chunk, slice_of
from p2pfl_torrent.learning.architecture import architecture_of, describe_layout
from p2pfl_torrent.learning.state import describe, to_arrays
from tests.core.small_models import same_bits
from tests.learning.real_models import ResNet18, bert, gpt2, torchvision_resnet18


@pytest.mark.parametrize(
    ("make", "family", "first"),
    [
        (ResNet18, "cnn", "conv"),
        (bert, "large", "position"),
        (gpt2, "large", "position"),
    ],
)
def test_it_comes_back_bit_for_bit_in_chunks_of_its_range(
    make: Callable[[], nn.Module], family: str, first: str
) -> None:
    torch.manual_seed(0)
    model = make()
    spec = describe(model)
    made_of = architecture_of(model, spec)
    assert made_of.family == family
    layout = PeerConfig().plan_layout(spec, made_of)
    assert first in describe_layout(layout, made_of).splitlines()[0]
    low, high = RANGES[made_of.family]
    sizes = [chunk.payload_bytes for chunk in layout.chunks]
    assert max(sizes) <= high
    assert min(sizes[:-1]) >= low  # the last one alone may be smaller
    arrays = to_arrays(model, spec)
    for chunk in layout.chunks:
        values = decode_chunk(layout, chunk.index, encode_chunk(layout, chunk.index, arrays))
        for part, array in zip(chunk.slices, values, strict=True):
            assert same_bits(array, slice_of(arrays[spec.tensors[part.tensor].name], part))


def test_our_resnet18_is_cut_like_torchvisions() -> None:
    ours, theirs = ResNet18(), torchvision_resnet18()
    layouts = []
    for model in (ours, theirs):
        spec = describe(model)
        layouts.append(PeerConfig().plan_layout(spec, architecture_of(model, spec)))
    assert layouts[0].digest == layouts[1].digest


def test_our_resnet18_has_the_values_of_the_published_one() -> None:
    model = ResNet18()
    assert sum(weight.numel() for weight in model.parameters()) == 11_689_512
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
