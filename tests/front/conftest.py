"""The fake machine of the budget's tests, by which whole networks are compared too."""

from __future__ import annotations

import pytest
from torch import nn

from ..machine import Machine, Net, decaying


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine.instead(monkeypatch)


@pytest.fixture
def model() -> Net:
    return decaying()


@pytest.fixture(autouse=True)
def compared(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Networks that were compared, second ones; their times follow from their multiply-accumulates."""
    return machine.compares(monkeypatch)
