"""A plan with all that a report can show, made on the fake machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lamina
from lamina.measure.table import TimingTable

from ..choose.test_drop import Closeness, calibrated
from ..machine import Machine, Net, X, decaying


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    fake = Machine.instead(monkeypatch)
    fake.compares(monkeypatch)
    return fake


@pytest.fixture
def model() -> Net:
    return decaying()


@pytest.fixture
def told(model: nn.Module, machine: Machine, tmp_path: Path) -> dict[str, Any]:
    """What `lamina.report` is given: a saved network, a front in a folder, a comparison, and the table of times."""
    data, timings = calibrated(model), TimingTable(None)
    front = lamina.pareto(model, X, data=data, score=Closeness(model), ratios=(2.0,), timings=timings)
    front.save(tmp_path / "front")
    small = lamina.decompose(model, front.plans[-1], data)
    lamina.save(small, tmp_path / "out")
    return {
        "source": tmp_path / "out",
        "model": "nets:network",
        "front": tmp_path / "front",
        "comparisons": [lamina.compare(model, small, X)],
        "timings": timings,
    }
