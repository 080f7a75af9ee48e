"""Data, calibrations, scores and fronts in the shell: the options reach the library, and mistakes are one line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import lamina
from lamina.answers import change

from ..machine import Machine

MINE = """
import torch
import small_nets

def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 4, 6, 6, generator=generator) for _ in range(5)]

def empty():
    return []

def closeness(model):
    right = small_nets.net().eval()
    return -sum(float((model(x) - right(x)).square().mean()) for x in images())

def nan(model):
    return float("nan")

def moved():
    model = small_nets.net()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-6
    return model

answer = 42
"""
INPUT = ("--input", "2,4,6,6")
NET = "small_nets:net"


@pytest.fixture(autouse=True)
def mine(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Machine.instead(monkeypatch)
    (here / "mine.py").write_text(MINE)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("mine", None)


def module(name: str) -> nn.Module:
    return lamina.load_model(name)


def test_a_plan_by_data_is_applied_with_the_same_data_and_with_no_other(run, here: Path) -> None:
    assert run("plan", NET, *INPUT, "--speedup", "1.3", "--data", "mine:images", "-o", "plan.json").code == 0
    plan = lamina.Plan.load(here / "plan.json")
    assert plan.factors.calibration and plan.nats is not None and plan.decomposed
    applied = run("apply", NET, "plan.json", "--data", "mine:images", "-o", "out")
    assert applied.code == 0
    (foretold,) = plan.accuracy()
    timed = run("bench", NET, "out", *INPUT, "--seconds", "0.001")
    assert f"{plan.nats:.2g} nats" in foretold and all(f"when planned: {foretold}" in ran.out for ran in (applied, timed))
    images = importlib.import_module("mine").images()
    small, again = lamina.decompose(module(NET), plan, images), lamina.load(module(NET), here / "out")
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    complaint = run("apply", NET, "plan.json", "-o", "out").complaint(1)
    assert "this plan's factors are fitted to a calibration" in complaint


def test_data_tell_by_how_much_the_outputs_change(run, here: Path) -> None:
    assert run("plan", NET, *INPUT, "--speedup", "1.3", "--data", "mine:images", "-o", "plan.json").code == 0
    applied = run("apply", NET, "plan.json", "--data", "mine:images", *INPUT, "-o", "out", "--json").json
    images = importlib.import_module("mine").images()
    small = lamina.decompose(module(NET), lamina.Plan.load(here / "plan.json"), images)
    expected = change(module(NET), small, [lamina.Workload(batch) for batch in images[:4]])
    assert applied["change"] == pytest.approx(expected, rel=1e-4) and applied["on"] == "the first of the data"


def test_a_saved_calibration_stands_for_its_data(run, here: Path) -> None:
    sys.path.append(str(here))
    images = importlib.import_module("mine").images()
    found = lamina.calibrate(module(NET).eval(), images, outputs=lamina.Categorical())
    found.save(here / "seen")
    assert run("plan", NET, *INPUT, "--speedup", "1.3", "--calibration", "seen", "-o", "plan.json").code == 0
    assert lamina.Plan.load(here / "plan.json").factors.calibration == found.identity
    assert run("apply", NET, "plan.json", "--calibration", "seen", "-o", "out").code == 0
    assert run("apply", NET, "plan.json", "--calibration", "seen", "--sequential", "mine:images", "-o", "fitted").code == 0
    fit = lamina.Plan.load(here / "fitted" / "plan.json").factors.sequential
    assert fit is not None and fit.after <= fit.before
    complaint = run("apply", NET, "fitted/plan.json", "--calibration", "seen", "-o", "again").complaint(1)
    assert complaint.endswith("this plan's layers were fitted in sequence: pass what they were fitted on as sequential=")


@pytest.mark.parametrize("words", [("plan", "--speedup", "1.3", "-o", "new.json"), ("pareto", "-o", "new"), ("sensitivities",)])
@pytest.mark.parametrize(
    ("net", "says"),
    [("small_nets:wider", "is of another network: "), ("mine:moved", "is of other weights: 0.weight is not what it was then")],
)
def test_a_calibration_of_another_network_or_of_other_weights_is_refused_and_nothing_is_written(
    run, here: Path, net: str, says: str, words: tuple[str, ...]
) -> None:
    sys.path.append(str(here))
    lamina.calibrate(module(NET).eval(), importlib.import_module("mine").images()).save(here / "seen")
    command, *rest = words
    assert f"this calibration {says}" in run(command, net, *INPUT, "--calibration", "seen", *rest).complaint(1)
    assert not [*here.glob("new*")]


def test_a_calibration_of_other_weights_is_not_applied(run, here: Path) -> None:
    sys.path.append(str(here))
    lamina.calibrate(module(NET).eval(), importlib.import_module("mine").images()).save(here / "seen")
    assert run("plan", NET, *INPUT, "--speedup", "1.3", "--calibration", "seen", "-o", "plan.json").code == 0
    words = ("apply", "mine:moved", "plan.json", "--calibration", "seen", "-o", "out")
    assert "this calibration is of other weights: 0.weight" in run(*words).complaint(1)
    assert not (here / "out").exists()


def test_a_drop_is_planned_by_the_score(run, here: Path) -> None:
    words = ("--drop", "0.001", "--score", "mine:closeness", "--data", "mine:images", "-o", "plan.json")
    ran = run("plan", NET, *INPUT, *words)
    assert ran.code == 0, ran.err
    plan = lamina.Plan.load(here / "plan.json")
    assert plan.goal == lamina.Drop(0.001) and plan.scores and plan.scores.drop <= 0.001
    assert f"score: {plan.scores}" in ran.out


def test_a_front_is_printed_saved_and_drawn(run, here: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ("--data", "mine:images", "--score", "mine:closeness", "--seconds", "0.01", "-o", "front", "--plot", "front.png")
    ran = run("pareto", NET, *INPUT, *words)
    assert ran.code == 0, ran.err
    front = lamina.Front.load(here / "front")
    assert ran.out == f"{front}\n" and front.by == "score" and front.points
    assert (here / "front.png").stat().st_size > 0
    assert lamina.Plan.load(here / "front" / "plan-1.json") == front.plans[0]


def test_speeds_of_a_front_are_those_asked_for_and_json_is_the_front(run) -> None:
    words = ("--speedup", "1.2", "--speedup", "1.4", "--seconds", "0.01", "--json")
    front = lamina.Front.model_validate(run("pareto", NET, *INPUT, *words).json)
    assert {point.asked for point in front.points} <= {1.2, 1.4} and front.points


def test_sensitivities_are_printed_and_read_as_data(run) -> None:
    words = ("--data", "mine:images", "--speedup", "1.2", "--speedup", "1.4")
    ran = run("sensitivities", NET, *INPUT, *words)
    assert ran.code == 0, ran.err
    assert "×1.2" in ran.out and "×1.4" in ran.out and "nats of divergence for each item" in ran.out
    found = run("sensitivities", NET, *INPUT, *words, "--json").json
    cuts = [cut for layer in found["layers"].values() for cut in layer["cuts"]]
    assert cuts and {cut["asked"] for cut in cuts} <= {1.2, 1.4}
    assert all(cut["nats"] >= 0 and cut["form"]["form"] for cut in cuts)


WRONG = {
    "a drop without a score": (("plan", "--drop", "0.1"), 1, "a drop 0.1 is one of a score"),
    "a drop and a ratio": (("plan", "--drop", "0.1", "--ratio", "2"), 2, "or alone --drop or --ratio"),
    "a drop and a limit": (("plan", "--drop", "0.1", "--speedup", "2"), 2, "or alone --drop or --ratio"),
    "data and a calibration": (("plan", "--speedup", "2", "--data", "mine:images", "--calibration", "seen"), 2, "not both"),
    "no such data": (("pareto", "--data", "mine:imagez"), 1, "has no imagez; did you mean images"),
    "an empty loader": (("plan", "--speedup", "2", "--data", "mine:empty"), 1, "the data hold no batch"),
    "no such calibration": (("plan", "--speedup", "2", "--calibration", "gone"), 1, "gone"),
    "no such score": (("pareto", "--score", "mine:nope"), 1, "has no nope"),
    "a score that is no function": (("pareto", "--score", "mine:answer"), 1, "mine:answer is a int; it must be a function"),
    "a score of NaN": (("plan", "--drop", "1", "--score", "mine:nan"), 1, "the score of the network itself is nan"),
    "a speed of 1": (("pareto", "--speedup", "1"), 1, "a speed-up of 1.0 is not possible"),
    "a layer's speed of 1": (("sensitivities", "--speedup", "1"), 1, "a speed-up of 1.0 is not possible"),
    "a picture in no folder": (("pareto", "--plot", "gone/front.png"), 1, "there is no folder gone"),
}


@pytest.mark.parametrize(("words", "code", "says"), WRONG.values(), ids=WRONG)
def test_what_makes_no_sense_is_refused_in_one_line(run, words: tuple[str, ...], code: int, says: str) -> None:
    command, *rest = words
    assert says in run(command, NET, *INPUT, *rest).complaint(code)
