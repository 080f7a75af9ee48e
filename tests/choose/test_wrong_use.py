"""What is asked in an odd place or with an odd value is answered rightly, or refused in one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina import AtRatio, ExampleError, GoalError, Ratio, Training, Workload
from lamina.measure.table import TimingTable

X = torch.randn(4, 32)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


@torch.inference_mode()
def test_a_training_is_planned_and_compared_wherever_that_is_called() -> None:
    with torch.inference_mode(False):
        model, x = net(), X.clone()
    plan = lamina.make_plan(model, x, Ratio(2), mode=Training(), timings=TimingTable(None))
    assert plan.layers["0"].before.timing
    assert lamina.compare(model, model, x, mode=Training(), seconds=0.01).speedup > 0


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf, "1", True, None], ids=str)
def test_a_workloads_weight_is_a_positive_number(weight: Any) -> None:
    with pytest.raises(ExampleError, match=f"a workload's weight is {weight!r}; it must be a positive number"):
        Workload(X, weight)


@pytest.mark.parametrize("beta", [0, -1.0, math.nan, math.inf, "1", True], ids=str)
def test_beta_is_a_positive_number(beta: Any) -> None:
    with pytest.raises(GoalError, match=f"β is {beta!r}; it is rank out / rank in, a positive number"):
        lamina.make_plan(nn.Conv2d(8, 8, 3), torch.zeros(1, 8, 9, 9), Ratio(2), beta=beta, rule=AtRatio())


def test_a_plan_for_which_nothing_was_timed_names_no_conditions(tmp_path: Path) -> None:
    with TimingTable(tmp_path / "table") as table:
        plan = lamina.make_plan(net(), X, Ratio(2), timings=table)
        assert plan.setting
        table.export(tmp_path / "times.json", plan.setting)
    torch.set_flush_denormal(True)  # other conditions, so that what the file holds is of another machine
    try:
        plan = lamina.make_plan(net(), X, Ratio(2), skip=["*"], timings=tmp_path / "times.json")
        with pytest.raises(
            GoalError, match=r"^a budget \(speed-up 1\.5\) is held to the whole network's measured time, and these"
        ):
            lamina.make_plan(net(), X, lamina.Speedup(1.5), timings=tmp_path / "times.json")
    finally:
        torch.set_flush_denormal(False)
    assert plan.setting is None and "measured on" not in str(plan)


@pytest.mark.slow
def test_a_comparison_says_which_network_was_compiled() -> None:
    model = net()
    compiled = torch.compile(net(), backend="eager")
    inplace = net()
    inplace.compile(backend="eager")
    for before, after, runtime in (
        (model, model, "eager"),
        (compiled, model, "torch.compile → eager"),
        (model, inplace, "eager → torch.compile"),
        (compiled, inplace, "torch.compile"),
    ):
        assert lamina.compare(before, after, X, seconds=0.01).setting.runtime == runtime
