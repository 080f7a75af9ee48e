"""The fake machine of the budget's tests, by which whole networks are compared too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn

from lamina import comparison
from lamina.values import Workload

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
    seen: list[nn.Module] = []

    def times(models: Sequence[nn.Module], examples: Sequence[Workload], *_: Any) -> list[list[list[float]]]:
        seen.append(models[1])
        return [[[machine.seconds(each, workload)] * 9 for each in models] for workload in examples]

    monkeypatch.setattr(comparison, "time_each", times)
    return seen
