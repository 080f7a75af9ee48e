"""Small networks for supernets, and a supernet that is fitted once for all tests of a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lamina.supernet.convert import make_supernet
from lamina.supernet.supernet import Supernet

# For `linears`, which the workers of the tests import too.
sys.path.insert(0, str(Path(__file__).parent))


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


@pytest.fixture
def fresh_network() -> Callable[[], nn.Module]:
    return network


@pytest.fixture
def example() -> torch.Tensor:
    return torch.randn(4, 3, 10, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net(example: torch.Tensor) -> Supernet:
    """Two series of four group sizes: sixteen configurations."""
    return make_supernet(network(), example, group_sizes=(1, 2, 4, 8))
