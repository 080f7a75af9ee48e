"""Ranks are chosen and judged by the clock of the runtime that serves, and by no other: any other raises here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina import LowRank, Ratio, Speedup
from lamina.layers.decomposed import DecomposedLayer
from lamina.measure.table import TimingTable
from lamina.values import Timing

from ..told import Told, by_weights, instead_of_the_clock

X = torch.randn(2, 256)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of_the_clock(monkeypatch)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()


def plan_of(model: nn.Module, goal: lamina.Goal, runtime: Told, **options: Any) -> lamina.Plan:
    return lamina.make_plan(model, X, goal, timings=TimingTable(None), runtime=runtime, **options)


def fast_up_to(edge: int) -> Callable[[nn.Module], float]:
    """A factor of five is gained at this rank and below it, and next to nothing above it."""

    def takes(layer: nn.Module) -> float:
        if not isinstance(layer, DecomposedLayer):
            return 1e-3
        return 2e-4 if layer.factors()[0].out_features <= edge else 9e-4

    return takes


def timings_in(plan: lamina.Plan) -> list[Timing]:
    assert plan.whole is not None
    costs = [cost for layer in [*plan.layers.values(), plan.whole] for cost in (layer.before, layer.after)]
    return [cost.timing for cost in costs if cost.timing is not None]


GOALS = [Ratio(2.0), Speedup(1.8)]


@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_what_is_faster_there_is_kept_and_the_gain_is_the_one_measured_there(model: nn.Module, goal: lamina.Goal) -> None:
    runtime = Told()
    plan = plan_of(model, goal, runtime)
    assert plan.decomposed and not plan.put_back and plan.whole is not None
    small = lamina.decompose(model, plan)
    gain = runtime.seconds(model) / runtime.seconds(small)
    assert plan.whole.speedup == pytest.approx(gain) and gain >= 1.75
    assert {each.setting.runtime for each in timings_in(plan)} == {"told"} and len(timings_in(plan)) == 6


@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_what_is_slower_there_as_a_whole_is_put_back_however_fast_its_layers_are(model: nn.Module, goal: lamina.Goal) -> None:
    plan = plan_of(model, goal, Told(penalty=1.0))
    assert not plan.decomposed
    if isinstance(goal, Ratio):  # a budget that times whole networks itself chooses none of these
        assert set(plan.put_back) == {"0", "2"} and all(
            "the whole network ran at ×0.00" in why for why in plan.put_back.values()
        )


@pytest.mark.parametrize("edge", [60, 53, 47])
def test_the_rank_is_the_one_that_is_fast_there(model: nn.Module, edge: int) -> None:
    plan = plan_of(model, Ratio(2.0), Told(fast_up_to(edge)))
    assert {layer.form for layer in plan.layers.values()} == {LowRank(edge)} and not plan.put_back
    assert plan.whole is not None and plan.whole.speedup == pytest.approx(5)


@pytest.mark.parametrize("edge", [90, 40])
def test_a_budget_takes_no_rank_that_is_slow_there(model: nn.Module, edge: int) -> None:
    plan = plan_of(model, Speedup(3.0), Told(fast_up_to(edge)))
    ranks = {layer.form.rank for layer in plan.layers.values() if isinstance(layer.form, LowRank)}
    assert ranks and max(ranks) <= edge
    assert plan.whole is not None and plan.whole.speedup is not None and plan.whole.speedup >= 3


def test_what_gains_in_the_whole_network_alone_is_taken(model: nn.Module) -> None:
    """As where a layer's graph turns its maps at both ends, and the network does not."""

    def takes(layer: nn.Module) -> float:
        return 1.05e-3 if isinstance(layer, DecomposedLayer) else 1e-3

    plan = plan_of(model, Ratio(2.0), Told(takes, penalty=-0.55e-3))
    assert set(plan.decomposed) == {"0", "2"} and not plan.put_back
    assert all("of the dense time alone, and pays in its place" in layer.reason for layer in plan.layers.values())
    assert plan.whole is not None and plan.whole.speedup == pytest.approx(2)


def test_in_place_a_layer_takes_what_its_graph_takes(model: nn.Module) -> None:
    """A layer of which the forms gain nothing stays dense, or is put back, while the other is kept."""

    def takes(layer: nn.Module) -> float:
        bias = layer.factors()[-1].bias if isinstance(layer, DecomposedLayer) else layer.bias
        return by_weights(layer) if bias is None else 1e-3

    model[0] = nn.Linear(256, 256, bias=False)
    plan = plan_of(model, Ratio(2.0), Told(takes))
    assert set(plan.decomposed) == {"0"}


CALLS: dict[str, Callable[[nn.Module, Told], str]] = {
    "make_plan": lambda model, told: str(plan_of(model, Speedup(1.5), told).setting),
    "faster": lambda model, told: str(
        lamina.faster(model, X, Speedup(1.5), runtime=told, timings=TimingTable(None), seconds=0.02).comparison.setting
    ),
    "faster with data": lambda model, told: str(
        lamina.faster(
            model, X, Speedup(1.5), data=[X] * 4, score=lambda net: -float(net(X).detach().norm()), runtime=told,
            timings=TimingTable(None), seconds=0.02,
        ).comparison.setting
    ),
    "pareto": lambda model, told: lamina.pareto(
        model, X, speedups=[1.5], runtime=told, timings=TimingTable(None), seconds=0.02
    ).conditions,
    "sensitivities": lambda model, told: lamina.sensitivities(
        model, X, speedups=[1.5], runtime=told, timings=TimingTable(None)
    ).conditions,
    "compare": lambda model, told: str(lamina.compare(model, model, X, runtime=told, seconds=0.02).setting),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_all_who_take_times_take_them_there_and_nowhere_else(model: nn.Module, name: str) -> None:
    assert ", told, " in CALLS[name](model, Told())


def test_a_front_is_measured_there(model: nn.Module) -> None:
    told = Told()
    front = lamina.pareto(model, X, speedups=[1.5, 2.5], runtime=told, timings=TimingTable(None), seconds=0.02)
    assert len(front.points) == 2
    for point in front.points:
        small = lamina.decompose(model, point.plan)
        assert point.speedup == pytest.approx(told.seconds(model) / told.seconds(small))


def test_sensitivities_are_of_its_times(model: nn.Module) -> None:
    found = lamina.sensitivities(model, X, speedups=[3.0], runtime=Told(fast_up_to(40)), timings=TimingTable(None))
    for layer in found.layers.values():
        assert layer.seconds == pytest.approx(1e-3) and layer.share == pytest.approx(0.5)
        (cut,) = layer.cuts
        assert isinstance(cut.form, LowRank) and cut.form.rank <= 40 and cut.seconds == pytest.approx(2e-4)


def test_with_eager_times_the_same_is_an_error(model: nn.Module) -> None:
    """That the clock of these tests notices."""
    with pytest.raises(AssertionError, match="eager PyTorch"):
        lamina.make_plan(model, X, Ratio(2.0), timings=TimingTable(None))


@pytest.mark.slow
def test_compiled_layers_and_networks_are_chosen_and_judged_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    prepare, judged = lamina.Compiled.prepare, list[nn.Module]()

    def noted(self: lamina.Compiled, network: nn.Module, workload: lamina.Workload) -> Any:
        if isinstance(network, nn.Sequential):
            judged.append(network)
        return prepare(self, network, workload)

    monkeypatch.setattr(lamina.Compiled, "prepare", noted)
    x, runtime = torch.randn(64, 512), lamina.Compiled()
    plan = lamina.make_plan(model, x, Ratio(2.0), runtime=runtime, timings=TimingTable(None))
    assert plan.decomposed or plan.put_back
    assert {each.setting.runtime for each in timings_in(plan)} == {runtime.label}
    found = [sum(isinstance(layer, DecomposedLayer) for layer in network) for network in judged]
    assert 0 in found and max(found) == len({*plan.decomposed, *plan.put_back})
