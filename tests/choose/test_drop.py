"""The fastest network within a drop of the score, on the fake machine of the budget's tests, by a score that is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina import Drop, GoalError, Milliseconds, Plan, Ratio, Speedup, Workload
from lamina.choose import planner, whole
from lamina.choose.by_drop import POINTS
from lamina.choose.never_slower import Verdict
from lamina.layers.decomposed import DecomposedLayer
from lamina.measure.table import TimingTable

from ..machine import Machine, Net, X
from .test_by_budget import planned

DATA = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def answers(net: nn.Module) -> Tensor:
    y: Tensor = net(DATA)
    return y


class Closeness:
    """Minus the squared distance to the answers of one network, relative to how these vary; what it was asked about."""

    def __init__(self, original: nn.Module) -> None:
        with torch.no_grad():
            self.right = answers(original).clone()
        self.asked: list[float] = []

    def __call__(self, net: nn.Module) -> float:
        assert not torch.is_grad_enabled() and not any(module.training for module in net.modules())
        own = (self.right - self.right.mean(0)).square().sum()
        self.asked.append(-float((answers(net) - self.right).square().sum() / own))
        return self.asked[-1]


class Scripted:
    """Scores that were written down beforehand, by how many layers are decomposed."""

    def __init__(self, says: Callable[[nn.Module], Any]) -> None:
        self.says, self.calls = says, 0

    def __call__(self, net: nn.Module) -> Any:
        self.calls += 1
        return self.says(net)


def decomposed(net: nn.Module) -> int:
    return sum(isinstance(module, DecomposedLayer) for module in net.modules())


def calibrated(net: nn.Module) -> lamina.Calibration:
    return lamina.calibrate(net, DATA)


@pytest.mark.parametrize("drop", [0.0005, 0.01, 0.2])
def test_the_network_that_comes_of_the_plan_scores_as_the_plan_says_and_within_the_drop(
    model: Net, machine: Machine, drop: float
) -> None:
    score, data = Closeness(model), calibrated(model)
    plan = planned(model, Drop(drop), score=score, data=data)
    assert plan.scores is not None and plan.goal == Drop(drop)
    small = lamina.decompose(model, plan, data)
    with torch.no_grad():
        assert score(small) == pytest.approx(plan.scores.after, rel=1e-4, abs=1e-7)
    assert plan.scores.before - plan.scores.after <= drop
    assert machine.seconds(small, Workload(X)) < machine.seconds(model, Workload(X))


@pytest.mark.parametrize("drop", [0.0005, 0.01, 0.2])
def test_nothing_that_was_scored_within_the_drop_is_faster_than_the_answer(model: Net, machine: Machine, drop: float) -> None:
    plan = planned(model, Drop(drop), score=Closeness(model), data=calibrated(model))
    assert plan.scores and plan.whole and 0 < len(plan.scores.tried) <= 2 * POINTS
    within = [point for point in plan.scores.tried if point.score is not None and point.score >= plan.scores.before - drop]
    assert plan.whole.speedup == max(point.speedup or 0 for point in within)


def test_the_answer_of_a_drop_is_reported_by_times_that_did_not_make_it_the_fastest(
    model: Net, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is judged meets a moment in which the decomposed network is 1.3 times as fast as it is."""
    real = whole.Whole.verdict

    def lucky(*words: Any, **named: Any) -> Verdict:
        verdict = real(*words, **named)
        return replace(verdict, after=[each / 1.3 for each in verdict.after])

    monkeypatch.setattr(whole.Whole, "verdict", lucky)
    monkeypatch.setattr(planner, "_JUDGED", 1)  # where several are judged, each plan is already reported by such times
    plan = planned(model, Drop(0.01), score=Closeness(model), data=(data := calibrated(model)))
    assert plan.scores and len(plan.scores.tried) > 1 and plan.whole
    true = machine.seconds(model, Workload(X)) / machine.seconds(lamina.decompose(model, plan, data), Workload(X))
    assert plan.whole.speedup == pytest.approx(true) and plan.whole.interval == pytest.approx((true, true))


def test_the_faster_the_more_may_be_lost(model: Net, machine: Machine) -> None:
    score, data = Closeness(model), calibrated(model)
    plans = [planned(model, Drop(drop), score=score, data=data) for drop in (0.0005, 0.01, 0.2)]
    speeds = [plan.whole.speedup if plan.whole and plan.whole.speedup else 1.0 for plan in plans]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]


def test_the_answer_is_close_to_the_fastest_that_a_fine_search_finds(model: Net, machine: Machine) -> None:
    score, data, table = Closeness(model), calibrated(model), TimingTable(None)
    plan = lamina.make_plan(model, X, Drop(0.01), score=score, data=data, timings=table)
    best = 1.0
    for step in range(1, 30):
        other = lamina.make_plan(model, X, Speedup(1.06**step), data=data, timings=table)
        with torch.no_grad():
            if other.whole and other.whole.speedup and score(lamina.decompose(model, other, data)) >= -0.01:
                best = max(best, other.whole.speedup)
    assert plan.whole and plan.whole.speedup and plan.whole.speedup >= best / 1.06


def test_where_all_may_be_lost_the_fastest_network_that_there_is_answers_at_once(model: Net, machine: Machine) -> None:
    score = Scripted(lambda net: 0.0)
    plan = planned(model, Drop(1.0), score=score, data=calibrated(model))
    fastest = planned(model, Speedup(1e6), data=calibrated(model))
    assert {n: layer.form for n, layer in plan.layers.items()} == {n: layer.form for n, layer in fastest.layers.items()}
    assert score.calls == 2


def test_where_nothing_is_within_the_drop_all_stays_dense_and_the_plan_says_so(model: Net, machine: Machine) -> None:
    score = Scripted(lambda net: -float(decomposed(net)))
    plan = planned(model, Drop(0.5), score=score, data=calibrated(model))
    assert not plan.decomposed and plan.scores and plan.scores.drop == 0
    assert "all layers stay dense" in plan.notes[0] and plan.notes[0] in " ".join(str(plan).split())
    assert plan.whole and plan.whole.after == plan.whole.before
    assert torch.equal(lamina.decompose(model, plan, calibrated(model))(X), model(X))


def test_a_score_that_falls_and_rises_again_never_gives_what_was_not_scored_within(model: Net, machine: Machine) -> None:
    for seed in range(6):
        chance = torch.Generator().manual_seed(seed)
        score = Scripted(lambda net, chance=chance: float(torch.rand((), generator=chance)) if decomposed(net) else 1.0)
        plan = planned(model, Drop(0.4), score=score)
        assert plan.scores and plan.scores.after >= 0.6
        good = [point.speedup or 0.0 for point in plan.scores.tried if (point.score or 0.0) >= 0.6]
        assert (plan.whole and plan.whole.speedup if plan.decomposed else 1.0) == max(good, default=1.0)


def test_factors_of_the_weights_alone_answer_where_they_score_better_and_decompose_obeys(model: Net, machine: Machine) -> None:
    data = calibrated(model)
    fitted: set[float] = set()

    def says(net: nn.Module) -> float:
        """Likes none of the factors that were fitted to the calibration."""
        if not decomposed(net):
            return 1.0
        plan = lamina.decomposition.plan_of(net)
        fitted.add(float(plan.factors.calibration is not None))
        return 0.0 if plan.factors.calibration else 0.95

    for goal in (Drop(0.1), Speedup(1.4)):
        fitted.clear()
        plan = planned(model, goal, score=says, data=data)
        assert fitted == {0.0, 1.0}
        assert plan.factors.weights_alone and plan.factors.calibration is None and plan.nats is None
        assert plan.scores and plan.scores.after == 0.95 and {p.weights_alone for p in plan.scores.tried} == {True, False}
        with_data, without = lamina.decompose(model, plan, data), lamina.decompose(model, plan)
        assert all(torch.equal(a, b) for a, b in zip(with_data.parameters(), without.parameters(), strict=True))
        assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_a_budget_with_a_score_says_what_it_is_before_and_after(model: Net, machine: Machine) -> None:
    score, data = Closeness(model), calibrated(model)
    plan = planned(model, Speedup(1.5), score=score, data=data)
    assert plan.scores and plan.scores.before == 0.0 and plan.scores.after == max(score.asked[1:])
    assert f"score: {plan.scores}" in plan.summary()
    assert plan.with_form("head", lamina.Dense()).scores is None


def test_a_network_in_train_mode_with_dropout_is_scored_as_it_answers(machine: Machine) -> None:
    class Dropping(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.9, self.training))

    torch.manual_seed(0)
    net = Dropping().eval()
    score = Closeness(net)
    plan = planned(net.train(), Speedup(1.5), score=score)
    assert net.training and plan.scores and plan.scores.before == 0.0


def test_without_data_the_weights_alone_are_tried_once_each(model: Net, machine: Machine) -> None:
    plan = planned(model, Drop(0.05), score=Closeness(model))
    assert plan.scores and not any(point.weights_alone for point in plan.scores.tried)
    speeds = [point.speedup for point in plan.scores.tried]
    assert len(set(speeds)) == len(speeds) <= POINTS


def test_the_network_and_the_random_state_are_left_as_they_were(model: Net, machine: Machine) -> None:
    def rude(net: nn.Module) -> float:
        net.train()
        net.requires_grad_(False)
        net.half().float()
        net.register_buffer("mine", torch.rand(3))
        return float(torch.rand(()))

    model.train()
    model.body[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    planned(model, Drop(0.1), score=rude)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_score_of_another_kind_of_number_counts(model: Net, machine: Machine) -> None:
    numpy = pytest.importorskip("numpy")
    for kind in (lambda x: torch.tensor([[x]]), numpy.float32, int, lambda x: torch.tensor(x, dtype=torch.float16)):
        plan = planned(model, Drop(0.5), score=lambda net, kind=kind: kind(-decomposed(net)))
        assert plan.scores and plan.scores.before == 0


def test_a_network_whose_score_is_nan_is_out_and_the_search_goes_on(model: Net, machine: Machine) -> None:
    scores = itertools.chain([1.0, math.nan, math.nan], itertools.repeat(0.95))
    plan = planned(model, Drop(0.1), score=lambda net: next(scores))
    assert plan.scores and plan.scores.after == 0.95
    assert [point.score for point in plan.scores.tried[:2]] == [None, None]


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a drop without a score": (Drop(0.1), {}, "a drop 0.1 is one of a score: give score="),
    "a name": (Drop(0.1), {"score": "accuracy"}, "score is a str; give a function from a network to a number"),
    "a network": (Speedup(2), {"score": nn.ReLU()}, "score is a ReLU; give a function"),
    "NaN": (Drop(0.1), {"score": lambda net: math.nan}, "the score of the network itself is nan"),
    "infinity": (Speedup(2), {"score": lambda net: -math.inf}, "the score of the network itself is -inf"),
    "no number": (Drop(0.1), {"score": lambda net: None}, "the score is a NoneType; it must be a number"),
    "a truth": (Drop(0.1), {"score": lambda net: True}, "the score is a bool; it must be a number"),
    "many numbers": (Drop(0.1), {"score": lambda net: torch.ones(3)}, r"the score is a Tensor of shape \(3,\)"),
    "never slower waived": (Drop(0.1), {"score": lambda net: 1.0, "never_slower": False}, "it takes no never_slower=False"),
    "a rule": (Drop(0.1), {"score": lambda net: 1.0, "rule": lamina.Plateau()}, "a budget takes neither"),
    "in a list": ([Drop(0.1), Speedup(2)], {"score": lambda net: 1.0}, "is no goal"),
    "NaN after": (Speedup(2), {"score": lambda net: math.nan if decomposed(net) else 1.0}, "the decomposed network is nan"),
}


@pytest.mark.parametrize(("goal", "options", "says"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_scored_is_refused_in_one_line(
    model: Net, machine: Machine, goal: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(GoalError, match=says) as caught:
        planned(model, goal, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "much", True])
def test_a_drop_is_a_number_from_zero(value: Any) -> None:
    with pytest.raises(GoalError, match="a drop of"):
        Drop(value)


def test_what_a_score_raises_passes_through(model: Net, machine: Machine) -> None:
    class Mine(Exception):
        pass

    def fails(net: nn.Module) -> float:
        if decomposed(net):
            raise Mine("no such file")
        return 1.0

    with pytest.raises(Mine, match="no such file"):
        planned(model, Drop(0.1), score=fails)


def test_a_budget_that_is_met_already_says_so(model: Net, machine: Machine) -> None:
    plan = planned(model, Milliseconds(1e6))
    assert plan.notes == ("the network is within 1e+06 ms as it is: nothing is decomposed",)
    assert not planned(model, Ratio(1)).notes


def test_a_budget_out_of_reach_says_what_can_be_reached(model: Net, machine: Machine) -> None:
    plan = planned(model, Speedup(500))
    assert plan.whole and plan.whole.speedup
    (note,) = [note for note in plan.notes if "best that is reachable" in note]
    assert "×" not in note  # how fast it is, the rounds tell that judged it, and no others
