"""A small network with convolutions, and its supernet of two series of four group sizes: sixteen configurations."""

from __future__ import annotations

import torch
from torch import nn

from lamina.supernet.convert import make_supernet
from lamina.supernet.supernet import Supernet


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()


def example() -> torch.Tensor:
    return torch.randn(4, 3, 10, 12, generator=torch.Generator().manual_seed(1))


def supernet() -> Supernet:
    return make_supernet(network(), example(), group_sizes=(1, 2, 4, 8))
