"""Pareto: one network surveyed once and planned at several speeds; each plan's network measured whole, and scored."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..answers import change
from ..choose.by_budget import CLOSE
from ..choose.by_drop import FASTEST
from ..choose.planner import Planner
from ..choose.rules import AtRatio
from ..choose.scoring import Jury, checked_score, speedup_of
from ..comparison import compare
from ..decomposition import decompose
from ..errors import GoalError
from ..goals import Ratio, Speedup
from ..measure.table import TimingTable
from ..network.running import outside_inference_mode
from ..plan import Plan
from ..runtimes.runtime import Runtime
from ..values import Mode
from .front import Front, Point

_STEPS = 6
"""Points that are looked at by default, the fastest among them."""


@outside_inference_mode
def pareto(
    model: nn.Module,
    example: Any,
    *,
    data: Any = None,
    score: Callable[[nn.Module], Any] | None = None,
    speedups: Sequence[float] | None = None,
    ratios: Sequence[float] = (),
    mode: Mode | None = None,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    worth: float = 0.005,
    seconds: float = 2.0,
    timings: TimingTable | str | os.PathLike[str] | None = None,
    progress: bool = False,
    runtime: Runtime | None = None,
) -> Front:
    """Plan a network at several speeds, and measure and score what comes of each plan: what a speed costs, and where it ends.

    Every point is the network that ``decompose(model, point.plan, data=data)`` makes. Layers are timed and calibrated once for
    all of them. Points that lead to the same forms are one point.

    Args:
        model: A trained network; it is only read.
        example: What it is fed; see `make_plan`.
        data: What `calibrate` returned for this network, or unlabelled data, which are then calibrated on with `Gaussian`.
        score: From a network to a number, higher is better; see `make_plan`. Without one, points are compared by their
            predicted loss, and without data by how much the outputs on the example change.
        speedups: What is asked for, each above 1; where one is out of reach, a note says so. By default six, evenly spaced in
            their logarithm, up to the fastest network that there is.
        ratios: What stands beside the front to compare with: networks with the same `Ratio` in every layer but the first and
            the last, with the same data, measured and scored as the points are. Each 1 or more.
        mode: See `make_plan`.
        include: Patterns; only layers matching one of them are decomposed. Empty: all.
        skip: Patterns; layers matching one stay dense.
        worth: See `make_plan`.
        seconds: The most to spend on measuring each point; see `compare`.
        timings: See `make_plan`; times must be of this machine.
        progress: Show a progress bar.
        runtime: What will run it where it is served; see `make_plan`.

    Raises:
        GoalError: A speed-up or a ratio makes no sense, a score is no finite number, or times are of another machine.
        LaminaError: As `make_plan` and `compare`. What the score raises passes through.
    """
    wanted, score = None if speedups is None else [Speedup(each) for each in speedups], checked_score(score)
    if wanted == []:
        raise GoalError("speedups is empty: give numbers above 1, such as [1.5, 2], or leave it out for six up to the fastest")
    same, points, uniform = [Ratio(each) for each in ratios], list[Point](), list[Point]()
    options: dict[str, Any] = {"mode": mode, "include": include, "skip": skip, "worth": worth}
    options |= {"data": data, "timings": timings, "progress": progress, "runtime": runtime}
    with Planner.of(model, example, **options) as planner:
        if planner.whole is None:
            raise GoalError("a front is measured, and these times are another machine's")
        jury = Jury.of(planner.survey, planner.calibration, score) if score else None
        asked, notes = _plans(planner, wanted)
        beside = _uniform(planner, example, same, options) if same else []
        twin, examples = planner.survey.twin(), planner.survey.examples
        for number, (goal, plan) in enumerate([*asked, *beside]):
            planner.shown.say("measuring networks", number, len(asked) + len(beside))
            if jury:
                candidate = jury.best(plan)
                small, plan = candidate.model, candidate.plan
            else:
                small = decompose(planner.survey.model, plan, planner.calibration)
            measured = compare(planner.survey.model, small, example, mode=mode, seconds=seconds, runtime=runtime)
            (points if number < len(asked) else uniform).append(
                Point(
                    asked=goal and goal.value,
                    speedup=measured.speedup,
                    interval=measured.interval,
                    score=plan.scores and plan.scores.after,
                    nats=plan.nats,
                    change=change(twin, small, examples),
                    plan=plan,
                )
            )
    return Front(
        before=jury.before if jury else None,
        points=tuple(sorted(points, key=lambda point: point.speedup)),
        uniform=tuple(sorted(uniform, key=lambda point: point.speedup)),
        example=" and ".join(map(str, examples)),
        conditions=str(planner.survey.setting),
        notes=notes,
    )


def _uniform(planner: Planner, example: Any, ratios: Sequence[Ratio], options: dict[str, Any]) -> list[tuple[None, Plan]]:
    """Plans with the same ratio in every layer but the first and the last, which most networks mind most."""
    names = planner.survey.considered
    inner = [glob.escape(name) for name in names[1:-1] or names]
    options = options | {"include": inner, "data": planner.calibration}
    with Planner.of(planner.survey.model, example, rule=AtRatio(), **options) as same:
        return [(None, plan) for ratio in ratios if (plan := same.plan(ratio).plan).decomposed]


def _plans(planner: Planner, wanted: Sequence[Speedup] | None) -> tuple[list[tuple[Speedup | None, Plan]], tuple[str, ...]]:
    """Plans of different forms with what was asked for, and what is to be said of them."""
    found: list[tuple[Speedup | None, Plan]] = []
    if wanted is None:
        top = planner.plan(FASTEST).plan
        reach = speedup_of(top) or 1.0
        notes = [f"the fastest network that was found is about ×{reach:.2f}"]
        steps = [reach ** (step / _STEPS) for step in range(1, _STEPS)] if top.decomposed else []
        found += [(goal, planner.plan(goal).plan) for goal in map(Speedup, (each for each in steps if each > 1))]
        found.append((None, top))
    else:
        planned = [(goal, planner.plan(goal)) for goal in wanted]
        found += [(goal, each.plan) for goal, each in planned]
        short = [(goal, each) for goal, each in planned if (speedup_of(each.plan) or 1.0) < goal.value * (1 - CLOSE)]
        notes = [f"{goal}: {said}" for goal, each in short for said in each.beside]
    by_forms = {tuple((n, str(layer.form)) for n, layer in plan.decomposed.items()): (goal, plan) for goal, plan in found[::-1]}
    faster = [(goal, plan) for goal, plan in reversed(by_forms.values()) if plan.decomposed]
    if not faster:
        return [], ("no faster network was found",)
    if len(faster) < len(found):
        notes.append(f"{len(found) - len(faster)} of {len(found)} led to no other forms")
    return faster, tuple(notes)
