"""The demo's network: a small ResNet for 28×28 grey images.

Its 3×3 convolutions have 128 to 256 channels on 14×14 and 7×7 maps: wide enough that a thinner stack of layers is also a faster
one. (A network of 64-channel layers only gets smaller.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut (He et al., 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class FashionNet(nn.Module):
    """``(N, 1, 28, 28)`` images in [0, 1] → ``(N, 10)`` class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2))
        self.stage1 = nn.Sequential(Block(64, 128, 1), Block(128, 128, 1))
        self.stage2 = nn.Sequential(Block(128, 256, 2), Block(256, 256, 1))
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        # Mean and deviation of the training pixels; a fixed part of the network, so that every user feeds plain images.
        x = (x - 0.2860) / 0.3530
        x = self.stage2(self.stage1(self.stem(x)))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def fashion_net() -> FashionNet:
    """A freshly initialised network, channels last: ``lamina plan network:fashion_net …`` finds it here."""
    return FashionNet().to(memory_format=torch.channels_last)
