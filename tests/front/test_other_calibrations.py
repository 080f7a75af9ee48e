"""A calibration of another network or of other weights is refused wherever one goes in, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina import AtRatio, Calibration, CalibrationError, Drop, Ratio, Speedup
from lamina.measure.table import TimingTable

from ..choose.test_drop import DATA, Closeness, calibrated
from ..machine import Machine, Net, X, decaying


def wider() -> nn.Module:
    other = decaying()
    other.head = nn.Linear(64, 11)
    return other


def moved() -> nn.Module:
    other = decaying()
    with torch.no_grad():
        other.body[1].weight[0, 0, 0, 0] += 1e-6  # type: ignore[index, operator]
    return other


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another network": (wider, "^this calibration is of another network: "),
    "other weights": (moved, "^this calibration is of other weights: body.1.weight is not what it was then; calibrate again$"),
}
USES: dict[str, Callable[[nn.Module, Any, TimingTable], Any]] = {
    "a plan by a budget": lambda m, data, t: lamina.make_plan(m, X, Speedup(1.3), data=data, timings=t),
    "a plan by a ratio": lambda m, data, t: lamina.make_plan(m, X, Ratio(2), rule=AtRatio(), data=data, timings=t),
    "a plan by a drop": lambda m, data, t: lamina.make_plan(m, X, Drop(0.1), score=Closeness(m), data=data, timings=t),
    "pareto": lambda m, data, t: lamina.pareto(m, X, data=data, timings=t),
    "faster": lambda m, data, t: lamina.faster(m, X, Speedup(1.3), data=data, timings=t),
    "sensitivities": lambda m, data, t: lamina.sensitivities(m, X, data=data, timings=t),
    "decompose": lambda m, data, t: lamina.decompose(m, lamina.make_plan(m, X, Ratio(2), rule=AtRatio()), data=data),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Calibration]:
    return {name: calibrated(other()) for name, (other, _) in OTHERS.items()}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("name", OTHERS)
def test_it_is_refused_in_one_line_and_the_network_is_as_it_was(
    found: dict[str, Calibration], name: str, use: Callable[..., Any], model: Net, machine: Machine
) -> None:
    model.train()
    before, random = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(CalibrationError, match=OTHERS[name][1]) as caught:
        use(model, found[name], TimingTable(None))
    assert "\n" not in str(caught.value)
    assert machine.measured == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules()) and torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        assert model(DATA).shape == (len(DATA), 10)
