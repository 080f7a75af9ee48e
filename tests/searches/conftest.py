"""A supernet of convolutions, made for each test; `linears` has one of linear layers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lamina.supernet.supernet import Supernet

from .. import supernets

# For `linears`, which the workers of the tests import too.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def net() -> Supernet:
    return supernets.supernet()
