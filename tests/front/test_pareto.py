"""`lamina.pareto`: every point is a measured and scored network, and the front is what no other point beats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina import Front, GoalError, PlanError, Point, Speedup, Workload
from lamina.calibration import calibrate as calibrating
from lamina.choose.survey import Survey
from lamina.measure.table import TimingTable

from ..choose.test_drop import DATA, Closeness, calibrated, decomposed
from ..machine import Machine, Net, X
from .test_faster import Deaf


def front_of(model: nn.Module, **options: Any) -> Front:
    return lamina.pareto(model, options.pop("example", X), timings=options.pop("timings", TimingTable(None)), **options)


def test_every_point_is_the_network_that_its_plan_leads_to_measured_and_scored(model: Net, machine: Machine) -> None:
    score, data = Closeness(model), calibrated(model)
    front = front_of(model, data=data, score=score)
    assert len(front.points) >= 4 and front.before == 0
    for point in front.points:
        small = lamina.decompose(model, point.plan, data)
        with torch.no_grad():
            assert score(small) == pytest.approx(point.score, rel=1e-4, abs=1e-7)
            change = float((small(X) - model(X)).norm() / model(X).norm())
        assert point.speedup == pytest.approx(machine.seconds(model, Workload(X)) / machine.seconds(small, Workload(X)))
        assert point.interval == (point.speedup, point.speedup)
        assert point.plan.scores and point.plan.scores.after == point.score
        assert point.nats == point.plan.nats
        assert point.change == pytest.approx(change, rel=1e-3)


def test_points_reach_from_little_to_the_fastest_and_none_stands_there_twice(model: Net, machine: Machine) -> None:
    front = front_of(model, data=calibrated(model))
    speeds = [point.speedup for point in front.points]
    assert speeds == sorted(speeds)
    fastest = lamina.make_plan(model, X, Speedup(1e6), data=calibrated(model), timings=TimingTable(None))
    assert front.points[-1].asked is None and front.points[-1].plan.decomposed.keys() == fastest.decomposed.keys()
    assert speeds[0] < speeds[-1] ** 0.4
    forms = [tuple((name, layer.form) for name, layer in plan.layers.items()) for plan in front.plans]
    assert len(set(forms)) == len(forms)


def test_speeds_that_are_asked_for_are_those_that_are_looked_at(model: Net, machine: Machine) -> None:
    front = front_of(model, data=calibrated(model), speedups=[1.5, 1.2, 900])
    assert [point.asked for point in front.points] == [1.2, 1.5, 900]
    assert all(point.speedup >= 0.97 * (point.asked or 0) for point in front.points[:2])
    assert [note.rpartition(":")[0] for note in front.notes] == ["speed-up 900: the best that is reachable here"]
    assert "1 of 2 led to no other forms" in front_of(model, data=calibrated(model), speedups=[900, 901]).notes[-1]


def called(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str) -> list[str]:
    """The names of functions of the library as they are called from here on, each still doing its work."""
    calls: list[str] = []
    function = getattr(holder, name)

    def noted(*words: Any, **named: Any) -> Any:
        calls.append(name)
        return function(*words, **named)

    monkeypatch.setattr(holder, name, noted)
    return calls


def test_all_points_share_one_survey_and_one_calibration_and_the_layers_are_timed_once(
    model: Net, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    surveys, calibrations = called(monkeypatch, Survey, "of"), called(monkeypatch, calibrating, "calibrate")
    front = front_of(model, data=DATA, score=Closeness(model))
    assert len(front.points) > 1 and len(surveys) == len(calibrations) == 1
    by_layer = [form for form in machine.measured if form != lamina.Dense()]
    # One geometry may be timed in two layers of other weights' spectra only: the stem, the body, the 1×1, the head.
    assert max(by_layer.count(form) for form in by_layer) <= 4


def test_the_same_ratios_go_by_the_calibration_of_the_points(
    model: Net, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrations = called(monkeypatch, calibrating, "calibrate")
    front = front_of(model, data=iter(DATA.split(4)), speedups=[1.2], ratios=[2.0])  # data that can be read once
    assert len(calibrations) == 1
    assert {plan.factors.calibration for plan in (*front.plans, front.uniform[0].plan)} == {front.plans[0].factors.calibration}


def test_both_kinds_of_factors_compete_at_every_point(model: Net, machine: Machine) -> None:
    def says(net: nn.Module) -> float:
        if not decomposed(net):
            return 1.0
        return 0.5 if lamina.decomposition.plan_of(net).factors.calibration else 0.9

    front = front_of(model, data=calibrated(model), score=says, speedups=[1.2, 1.5])
    assert all(plan.factors.weights_alone and plan.scores and len(plan.scores.tried) == 2 for plan in front.plans)
    assert [point.nats for point in front.points] == [None, None] and [point.score for point in front.points] == [0.9, 0.9]


def test_without_a_score_points_go_by_predicted_loss_and_without_data_by_what_changes(model: Net, machine: Machine) -> None:
    predicted, seen = front_of(model, data=calibrated(model)), front_of(model)
    assert predicted.by == "predicted loss" and "compared by predicted loss" in str(predicted)
    assert seen.by == "change of the outputs" and "compared by change of the outputs" in str(seen)
    for front in (predicted, seen):
        assert front.before is None and {point.score for point in front.points} == {None}
        with pytest.raises(GoalError, match="this front has no scores"):
            front.best(0.1)
    nats = [point.nats or 0.0 for point in predicted.points]
    assert nats == sorted(nats)


def test_by_a_calibration_without_gradients_points_have_no_nats_and_go_by_what_changes(model: Net, machine: Machine) -> None:
    front = front_of(model, data=lamina.calibrate(model, DATA, outputs=None), speedups=[1.2, 1.5])
    assert front.points and {point.nats for point in front.points} == {None}
    assert front.by == "change of the outputs" and "nats" not in str(front)


def test_a_layer_that_no_gradient_reaches_is_dense_at_every_point_and_all_have_nats(machine: Machine) -> None:
    net = Deaf().eval()
    with pytest.warns(UserWarning, match="stem is reached by no gradient"):
        found = lamina.calibrate(net, DATA)
    front = front_of(net, data=found, speedups=[1.2, 1.5])
    assert front.points and all(point.nats is not None for point in front.points) and front.by == "predicted loss"
    assert not any("stem" in plan.decomposed for plan in front.plans)


def points(*given: tuple[float, float | None], plan: Any) -> tuple[Point, ...]:
    return tuple(Point(asked=None, speedup=s, interval=(s, s), score=score, plan=plan) for s, score in given)


@pytest.fixture
def front(model: Net, planned: Any) -> Front:
    given = points((1.2, 0.9), (1.5, 0.92), (1.6, 0.7), (2.0, 0.7), (2.0, 0.7), (2.1, None), plan=planned(model, X))
    return Front(before=0.93, points=given, example="4×3×8×8", conditions="here")


def test_a_point_is_dominated_where_another_is_no_worse_in_both_and_better_in_one(front: Front) -> None:
    numbers = [number for number, point in enumerate(front.points) if any(point is each for each in front.dominated)]
    assert numbers == [0, 2]  # of equals neither; the fastest has no score, and nothing is as fast


def test_the_best_is_the_fastest_within_the_drop(front: Front) -> None:
    assert front.best(0.02) is front.points[1]
    found = front.best(0.5)
    assert found and found.speedup == 2.0
    assert front.best(0.0) is None
    with pytest.raises(GoalError, match="a drop of -1"):
        front.best(-1)


def test_a_front_prints_in_80_columns_and_marks_what_is_dominated(front: Front, model: Net, machine: Machine) -> None:
    wide = [
        point.model_copy(update={"asked": 12.34, "speedup": 12.345, "interval": (12.3, 12.4), "score": -1.2345678e-5})
        for point in front_of(model, data=calibrated(model), score=Closeness(model)).points
    ]
    for each in (front, front.model_copy(update={"points": tuple(wide)})):
        assert max(map(len, str(each).splitlines())) <= 80
    lines = str(front).splitlines()
    assert [line.split()[0] for line in lines[1:7]] == ["1*", "2", "3*", "4", "5", "6"]


def test_beside_the_front_stand_the_same_ratios_in_all_layers_but_the_first_and_the_last(model: Net, machine: Machine) -> None:
    score, data = Closeness(model), calibrated(model)
    front = front_of(model, data=data, score=score, speedups=[1.2], ratios=[2.0, 4.0])
    assert {point.plan.goal for point in front.uniform} == {lamina.Ratio(2.0), lamina.Ratio(4.0)}
    for point in front.uniform:
        first, *inner, last = point.plan.layers.values()
        assert not first.decomposed and not last.decomposed and any(layer.decomposed for layer in inner)
        small = lamina.decompose(model, point.plan, data)
        with torch.no_grad():
            assert score(small) == pytest.approx(point.score, rel=1e-4, abs=1e-7)
        assert point.speedup == pytest.approx(machine.seconds(model, Workload(X)) / machine.seconds(small, Workload(X)))
        assert str(point.plan.goal) in str(front)
    assert front.plans == front_of(model, data=data, score=score, speedups=[1.2]).plans
    with pytest.raises(GoalError, match="a ratio of"):
        front_of(model, data=data, ratios=[0.5])


def test_a_saved_front_is_the_same_and_each_plan_lies_beside_it(front: Front, tmp_path: Path) -> None:
    front.save(tmp_path / "front")
    assert Front.load(tmp_path / "front") == front
    assert [lamina.Plan.load(tmp_path / "front" / f"plan-{n}.json") for n in range(1, 7)] == list(front.plans)
    fewer = front.model_copy(update={"points": front.points[:2]})
    (tmp_path / "front" / "plan-7.json").write_text("somebody's own")
    fewer.save(tmp_path / "front")
    names = ["front.json", "plan-1.json", "plan-2.json", "plan-7.json"]
    assert sorted(path.name for path in (tmp_path / "front").iterdir()) == names
    assert Front.load(tmp_path / "front") == fewer


def test_what_is_no_front_is_refused_in_one_line(front: Front, tmp_path: Path) -> None:
    front.save(tmp_path)
    path = tmp_path / "front.json"
    text = path.read_text()
    wrong = {
        text[:50]: "not a readable front",
        '{"format": 1}': "not a front",
        text.replace('"format": 1', '"format": 9', 1): "newer lamina",
        text.replace('"speedup": 1.2', '"speedup": -1.2', 1): "speedup",
    }
    for content, says in wrong.items():
        path.write_text(content)
        with pytest.raises(PlanError, match=says) as caught:
            Front.load(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(PlanError, match="not a readable front"):
        Front.load(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match="cannot be written"):
        front.save(tmp_path / "file")


def test_a_plot_shows_every_scored_point_and_the_network_itself(front: Front, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (axes,) = front.plot(tmp_path / "plot.png").axes
    shown = sorted(map(tuple, axes.collections[0].get_offsets()))
    assert shown == [(1.2, 0.9), (1.5, 0.92), (1.6, 0.7), (2.0, 0.7), (2.0, 0.7)]
    line = [tuple(place) for place in axes.lines[0].get_xydata()]
    assert line == [(1.0, 0.93), (1.5, 0.92), (2.0, 0.7), (2.0, 0.7)]
    assert axes.get_ylabel() == "score" and (tmp_path / "plot.png").stat().st_size > 0


def test_a_network_of_which_nothing_gets_faster_has_an_empty_front(model: Net, machine: Machine) -> None:
    front = front_of(model, skip=["*"])
    assert front.points == () and str(front) == "note: no faster network was found"
    assert front.plot().axes


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a speed of 1": ({"speedups": [1.0]}, "a speed-up of 1.0 is not possible"),
    "no speed": ({"speedups": []}, "speedups is empty: give numbers above 1"),
    "no function": ({"score": 1.0}, "score is a float"),
    "NaN": ({"score": lambda net: math.nan}, "the score of the network itself is nan"),
}


@pytest.mark.parametrize(("options", "says"), WRONG.values(), ids=WRONG)
def test_what_makes_no_sense_is_refused(model: Net, machine: Machine, options: dict[str, Any], says: str) -> None:
    with pytest.raises(GoalError, match=says):
        front_of(model, **options)
