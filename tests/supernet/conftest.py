"""The small network and its supernet, made for each test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lamina.supernet.supernet import Supernet

from .. import supernets


@pytest.fixture
def fresh_network() -> Callable[[], nn.Module]:
    return supernets.network


@pytest.fixture
def example() -> torch.Tensor:
    return supernets.example()


@pytest.fixture
def net() -> Supernet:
    return supernets.supernet()
