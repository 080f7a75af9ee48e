"""`lamina.faster`: the whole way in one call; what it returns is what it says, and no more is lost than is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina import Drop, ExampleError, FasterResult, GoalError, Milliseconds, Speedup, Workload
from lamina.measure.table import TimingTable

from ..choose.test_drop import DATA, Closeness, calibrated, decomposed
from ..machine import Machine, Net, X


def faster(model: nn.Module, goal: Any = Speedup(1.5), **options: Any) -> FasterResult:  # noqa: B008 - a frozen value
    return lamina.faster(model, options.pop("example", X), goal, timings=TimingTable(None), **options)


class Normed(nn.Module):
    """A network with batch norm, whose statistics are those of some data."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x).mean((2, 3)))
        return y


@pytest.fixture
def normed() -> Normed:
    torch.manual_seed(0)
    net = Normed().eval()
    lamina.recalibrate(net, [DATA])
    return net


def test_what_comes_back_is_measured_scored_and_printed_in_five_lines(
    model: Net, machine: Machine, compared: list[nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    score = Closeness(model)
    result = faster(model, data=DATA, score=score)
    assert capsys.readouterr().out == f"{result}\n" and len(str(result).splitlines()) == 5
    assert compared == [result.model] and lamina.decomposition.plan_of(result.model) == result.plan
    assert result.comparison.speedup == pytest.approx(
        machine.seconds(model, Workload(X)) / machine.seconds(result.model, Workload(X))
    )
    assert result.comparison.speedup >= 1.5 * 0.97
    with torch.no_grad():
        assert result.scores and score(result.model) == pytest.approx(result.scores.after, rel=1e-4, abs=1e-7)
    asked, measured, lost, predicted, then = str(result).splitlines()
    assert asked.startswith("asked: speed-up 1.5") and f"×{result.comparison.speedup:.2f}" in measured
    assert lost == f"score: {result.scores}" and "nats of divergence" in predicted and "lamina.save" in then


def test_without_a_score_it_says_by_how_much_the_outputs_change_on_the_data(model: Net, machine: Machine) -> None:
    result = faster(model, data=DATA)
    with torch.no_grad():
        change = float((result.model(DATA) - model(DATA)).norm() / model(DATA).norm())
    assert result.scores is None and result.plan.scores is None
    assert result.change == pytest.approx(change, rel=1e-3) and result.on == "the data"
    assert "there is no score" in str(result).splitlines()[2] and "measure how accurate" in str(result).splitlines()[4]


def test_without_data_factors_are_of_the_weights_and_the_change_is_on_the_example(model: Net, machine: Machine) -> None:
    result = faster(model)
    with torch.no_grad():
        change = float((result.model(X) - model(X)).norm() / model(X).norm())
    assert result.change == pytest.approx(change, rel=1e-3) and result.on == "the example"
    assert str(result).splitlines()[3] == "predicted loss: none without data"


def test_by_a_calibration_without_gradients_no_nats_are_told(model: Net, machine: Machine) -> None:
    result = faster(model, data=lamina.calibrate(model, DATA, outputs=None))
    told = str(result).splitlines()[3]
    assert result.plan.decomposed and result.plan.nats is None
    assert told.startswith("predicted loss: not known, as the calibration has no gradients of ") and "nats" not in str(result)


def test_a_layer_that_no_gradient_reaches_stays_dense(machine: Machine) -> None:
    net = Deaf().eval()
    with pytest.warns(UserWarning, match="stem is reached by no gradient"):
        result = faster(net, Speedup(1.3), data=DATA)
    assert result.plan.decomposed and "stem" not in result.plan.decomposed and result.plan.nats is not None


class Deaf(Net):
    """A network that cuts its stem off."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.pointwise(self.body(self.stem(x).detach())).mean((2, 3)))
        return y


def test_a_large_change_is_a_warning(model: Net, machine: Machine) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    result = faster(model, Speedup(8))
    assert result.change and result.change > 0.3
    assert str(result).splitlines()[2].startswith("WARNING: outputs change by")


@pytest.mark.parametrize("at_most", [0.0005, 0.01])
def test_no_more_is_lost_than_at_most_and_the_first_line_says_that_the_goal_was_given_up(
    model: Net, machine: Machine, at_most: float
) -> None:
    goal = Speedup(12)
    free, bound = faster(model, goal, data=DATA, score=Closeness(model)), faster(
        model, goal, data=DATA, score=Closeness(model), at_most=at_most
    )  # fmt: skip
    assert free.scores and free.scores.drop > at_most
    assert bound.scores and bound.scores.drop <= at_most
    assert f"that loses more than {at_most:g} of the score" in str(bound).splitlines()[0]
    assert 1 < bound.comparison.speedup < free.comparison.speedup
    assert bound.asked == goal and bound.plan.goal == Drop(at_most)


def test_where_the_goal_loses_less_than_at_most_it_is_the_answer(model: Net, machine: Machine) -> None:
    score = Closeness(model)
    result = faster(model, Speedup(1.5), data=DATA, score=score, at_most=0.5)
    free = faster(model, Speedup(1.5), data=DATA, score=score)
    assert result.plan.goal == Speedup(1.5) and "loses more" not in str(result)
    assert {n: layer.form for n, layer in result.plan.layers.items()} == {n: p.form for n, p in free.plan.layers.items()}


def test_where_everything_loses_more_than_at_most_the_network_itself_comes_back(model: Net, machine: Machine) -> None:
    result = faster(model, data=DATA, score=lambda net: -float(decomposed(net)), at_most=0.5)
    assert not result.plan.decomposed and result.comparison.speedup == 1.0
    assert "nothing is decomposed" in str(result).splitlines()[0] and "allow more to be lost" in str(result).splitlines()[4]
    assert result.model is not model and torch.equal(result.model(X), model(X))


def test_a_drop_is_a_goal_here_too(model: Net, machine: Machine) -> None:
    result = faster(model, Drop(0.01), data=DATA, score=Closeness(model))
    assert result.scores and result.scores.drop <= 0.01 and result.comparison.speedup > 1


def test_batch_norm_is_recalibrated_on_the_data_where_that_scores_better(normed: Normed, machine: Machine) -> None:
    """Judged by statistics of the data alone, the new ones are better; judged by the old ones, they are put back."""

    def off(net: nn.Module) -> float:
        """How far the statistics of a norm are from those of its inputs on the data."""
        seen: dict[str, Tensor] = {}
        norm = net.get_submodule("body.4")
        handle = norm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].transpose(0, 1).flatten(1)))
        net(DATA)
        handle.remove()
        return -float((seen["x"].mean(1) - norm.running_mean).norm())  # type: ignore[operator]

    old = normed.body[4].running_mean.clone()  # type: ignore[operator]
    result = faster(normed, data=[DATA], score=off)
    assert result.plan.decomposed and result.recalibrated and result.scores and result.scores.recalibrated
    assert "batch norm recalibrated" in str(result)
    again = lamina.decompose(normed, result.plan, [DATA])
    with torch.no_grad():
        assert off(again) < result.scores.after
        lamina.recalibrate(again, [DATA])
        assert off(again) == pytest.approx(result.scores.after, rel=1e-3)
    assert torch.equal(normed.body[4].running_mean, old)  # type: ignore[arg-type]

    def kept(net: nn.Module) -> float:
        return -float((net.get_submodule("body.4").running_mean - old).norm())  # type: ignore[operator]

    result = faster(normed, data=[DATA], score=kept)
    assert not result.recalibrated and result.scores and result.scores.after == 0
    assert torch.equal(result.model.get_submodule("body.4").running_mean, old)  # type: ignore[arg-type]


def test_a_calibration_will_do_for_the_data_and_nothing_is_recalibrated_then(normed: Normed, machine: Machine) -> None:
    result = faster(normed, data=calibrated(normed))
    assert result.plan.nats is not None and not result.recalibrated and result.on == "the example"


def test_data_that_can_be_iterated_once_serve_everything(normed: Normed, machine: Machine) -> None:
    batches = list(DATA.split(4))
    once, again = faster(normed, data=iter(batches)), faster(normed, data=batches)
    assert once.change == again.change and once.plan.layers == again.plan.layers


def test_batches_that_batch_norm_cannot_do_with_leave_it_as_it_was_and_that_is_said(machine: Machine) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 48), nn.BatchNorm1d(48), nn.Linear(48, 4)).eval()
    x = torch.randn(8, 48)
    result = faster(net, Speedup(1.2), example=x, data=[row[None] for row in torch.randn(8, 48)])
    assert result.plan.decomposed and not result.recalibrated
    assert "batch norm is as it was: the network does not run" in str(result).splitlines()[0]


def test_a_goal_that_is_missed_is_said_first(model: Net, machine: Machine) -> None:
    assert "the best that is reachable here" in str(faster(model, Speedup(900))).splitlines()[0]
    assert "is within 1e+06 ms as it is" in str(faster(model, Milliseconds(1e6))).splitlines()[0]


WRONG: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no goal": (1.5, {}, GoalError, "is no goal"),
    "at most without a score": (Speedup(2), {"at_most": 0.1}, GoalError, "a drop 0.1 is one of a score"),
    "a drop without a score": (Drop(0.1), {}, GoalError, "a drop 0.1 is one of a score"),
    "a drop and at most": (Drop(0.1), {"at_most": 0.1, "score": len}, GoalError, "leave at_most out"),
    "at most below zero": (Speedup(2), {"at_most": -1.0, "score": len}, GoalError, "a drop of -1.0"),
    "no data in the loader": (Speedup(2), {"data": []}, ExampleError, "the data hold no batch"),
    "an empty iterator": (Speedup(2), {"data": iter(())}, ExampleError, "the data hold no batch"),
    "an empty tensor": (Speedup(2), {"data": DATA[:0]}, ExampleError, "a tensor without items"),
    "a score of NaN": (Speedup(2), {"score": lambda net: math.nan}, GoalError, "the score of the network itself is nan"),
}


@pytest.mark.parametrize(("goal", "options", "error", "says"), WRONG.values(), ids=WRONG)
def test_what_makes_no_sense_is_refused_in_one_line(
    model: Net, machine: Machine, goal: Any, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        faster(model, goal, **options)
    assert "\n" not in str(caught.value)
