"""The small network and its supernet, made for each test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lamina.supernet.supernet import Supernet

from .. import supernets

# For `training`, which runs in processes of its own too.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def fresh_network() -> Callable[[], nn.Module]:
    return supernets.network


@pytest.fixture
def example() -> torch.Tensor:
    return supernets.example()


@pytest.fixture
def net() -> Supernet:
    return supernets.supernet()
