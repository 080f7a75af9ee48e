"""The calls of a budget and of a calibration as the design draws them, one after the other, on the fake machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lamina

from ..machine import Machine, Net, X

DATA = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(1, 5)]


def answer(net: nn.Module, x: Tensor = X) -> Tensor:
    y: Tensor = net(x)
    return y


@pytest.mark.parametrize("share", [None, 0.8], ids=["a speed-up", "sizes"])
def test_a_budget(model: Net, machine: Machine, share: float | None) -> None:
    cost = lamina.count(model, X)
    if share is None:
        goals: list[lamina.goals.Budget] = [lamina.Speedup(1.05)]
    else:
        goals = [lamina.Macs(share * cost.macs), lamina.Parameters(share * cost.parameters)]
    for goal in goals:
        plan = lamina.make_plan(model, X, goal)
        small = lamina.decompose(model, plan)
        assert plan.decomposed and answer(small).shape == (4, 10)
        if share is not None:
            after, limit = lamina.count(small, X), goal.value  # type: ignore[union-attr]
            assert (after.macs if isinstance(goal, lamina.Macs) else after.parameters) <= limit


def test_several_workloads_and_a_side_left_whole(model: Net, machine: Machine) -> None:
    assert lamina.make_plan(model, [lamina.Workload(X, 0.5), lamina.Workload(X[:1], 0.5)], lamina.Ratio(2.0)).decomposed
    plan = lamina.make_plan(model, X, lamina.Ratio(1.0), rule=lamina.AtRatio())
    plan = plan.with_form("body.1", lamina.BlockTerm(16, None, 1))
    assert answer(lamina.decompose(model, plan)).shape == (4, 10)


def test_a_calibration(model: Net, machine: Machine) -> None:
    def score(net: nn.Module) -> float:
        return -sum(float((answer(net, x) - answer(model, x)).square().mean()) for x in DATA)

    found = lamina.calibrate(model, DATA, outputs=lamina.Categorical())
    assert isinstance(found, lamina.Calibration) and found.samples == 32
    assert lamina.calibrate(model, DATA, outputs=lamina.Gaussian()).outputs == lamina.Gaussian()
    plan = lamina.make_plan(model, X, lamina.Speedup(1.05), data=found)
    small = lamina.decompose(model, plan, data=found)
    assert plan.decomposed and plan.nats is not None and answer(small).shape == (4, 10)
    by_macs = lamina.make_plan(model, X, lamina.Macs(0.7 * lamina.count(model, X).macs), data=DATA)
    assert by_macs.decomposed and answer(lamina.decompose(model, by_macs, data=DATA)).shape == (4, 10)
    by_score = lamina.make_plan(model, X, lamina.Drop(0.5), score=score, data=found)
    assert by_score.decomposed and by_score.scores and by_score.scores.drop <= 0.5
    for rule in (lamina.Energy(0.9), lamina.Evbmf()):
        assert set(lamina.make_plan(model, X, lamina.Ratio(2.0), rule=rule).layers) == set(plan.layers)
    front = lamina.pareto(model, X, data=found, score=score)
    assert front.plans and all(each.decomposed for each in front.plans)
    separable = lamina.decompose(model, plan.with_form("body.1", lamina.Separable(16)), data=found)
    assert answer(separable).shape == (4, 10)


def test_in_one_call(model: Net, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    result = lamina.faster(model, X, lamina.Speedup(2), data=DATA, score=lambda net: -float(answer(net).var()))
    assert capsys.readouterr().out.count("\n") == 5
    assert result.model is not model and result.plan.decomposed and result.comparison.speedup > 1 and result.scores
