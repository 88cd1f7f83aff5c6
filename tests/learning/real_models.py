"""Published architectures at their real size, with random weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


class Block(nn.Module):
    """Two convolutions around which the input is added (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride > 1:
            narrowing = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(narrowing, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added = x if self.downsample is None else self.downsample(x)
        inner = self.relu(self.bn1(self.conv1(x)))
        out: torch.Tensor = self.relu(self.bn2(self.conv2(inner)) + added)
        return out


class ResNet18(nn.Module):
    """The layers and names of torchvision's resnet18.

    Made here, since torchvision's wheels on PyPI are for CUDA: beside a CPU build of torch, as in
    CI, their import fails with "operator torchvision::nms does not exist".
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = nn.Sequential(Block(64, 64, 1), Block(64, 64, 1))
        self.layer2 = nn.Sequential(Block(64, 128, 2), Block(128, 128, 1))
        self.layer3 = nn.Sequential(Block(128, 256, 2), Block(256, 256, 1))
        self.layer4 = nn.Sequential(Block(256, 512, 2), Block(512, 512, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        out: torch.Tensor = self.fc(self.avgpool(x).flatten(1))
        return out


def torchvision_resnet18() -> nn.Module:
    """torchvision's own; the test is skipped where it does not load."""
    try:
        from torchvision import models
    except ImportError:
        pytest.skip("torchvision is not installed")
    except RuntimeError as error:
        pytest.skip(f"torchvision was built for another torch than this one: {error}")
    model: nn.Module = models.resnet18()
    return model


def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed")


def bert() -> nn.Module:
    """BERT-base: 12 layers, 110 million values."""
    library = transformers()
    model: nn.Module = library.BertModel(library.BertConfig())
    return model


def gpt2() -> nn.Module:
    """GPT-2 small: 12 layers, 124 million values, the head tied to the embedding."""
    library = transformers()
    model: nn.Module = library.GPT2LMHeadModel(library.GPT2Config())
    return model
