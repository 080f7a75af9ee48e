"""The way from a network to a Plan: survey it, plan it for the goal, and where there is a score, ask that too."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..errors import GoalError
from ..goals import Budget, Drop, Goal, Ratio, goal_of
from ..measure.table import TimingTable
from ..network.running import outside_inference_mode
from ..plan import Plan
from ..runtimes.runtime import Runtime
from ..values import Mode
from .by_drop import FASTEST, by_drop
from .planner import Planner
from .rules import Rule
from .scoring import Candidate, Jury, checked_score, unscored


@outside_inference_mode
def make_plan(
    model: nn.Module,
    example: Any,
    goal: Goal | Sequence[Budget],
    *,
    rule: Rule | None = None,
    mode: Mode | None = None,
    beta: float | None = None,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    never_slower: bool = True,
    worth: float = 0.005,
    data: Any = None,
    score: Callable[[nn.Module], Any] | None = None,
    timings: TimingTable | str | os.PathLike[str] | None = None,
    progress: bool = False,
    runtime: Runtime | None = None,
) -> Plan:
    """Choose a form for every layer of a network. It is run and timed on a shadow of it; the network itself is only read.

    Args:
        model: A trained network, on the device, in the dtype and in the memory format in which it will be used.
        example: What it will be fed, batch included: a tensor, a tuple of arguments, a mapping of keyword arguments, or a list
            of `Workload` where one network serves several.
        goal: `Speedup(1.5)`: the whole network that much faster, its weights changed as little as possible. So too
            `Milliseconds(4)`, `Macs(1e9)`, `Parameters(5e6)`, or a list of such limits. Or `Drop(0.005)`: the fastest whose
            ``score`` is at most that much lower, of up to 8 that are tried. Or `Ratio(2.0)`: each layer's weight at least that
            many times smaller, where this is faster.
        rule: How ranks follow from a ratio and timings: `Plateau()` by default, `LargestStep()` (paper A), or `AtRatio()` (no
            timings); or from the weight itself, where that makes a layer as small as the ratio asks: `Energy(0.9)`, `Evbmf()`.
        mode: `Inference()` by default, or `Training()` to time forward and backward; `Training(freezing=SequentialFreezing())`
            for the mean over the phases of the freezing under which the network will be trained.
        beta: Rank out / rank in of Tucker-2; by default max(0.8 O / I, 1).
        include: Patterns as in the shell; only layers matching one of them are decomposed. Empty: all.
        skip: Patterns; layers matching one stay dense.
        never_slower: Time the whole network and put back what does not pay; only for rules that look at timings.
        worth: With a budget: the share of the network's time that a layer must save to be decomposed.
        data: What `calibrate` returned for this network with these weights, or unlabelled data, which are then calibrated on
            with `Gaussian`; class scores want `calibrate` with `Categorical` first.
            Losses are then of the network's answers, not of its weights, and `decompose` wants the same calibration.
        score: From a network to a number, higher is better. It is asked in eval mode without gradients, of a shadow of the
            network and of what `decompose` makes of the plan with the same ``data``. Where there are data, factors of the
            weights alone compete with those fitted to them, and the plan says which scored better. What it raises passes
            through.
        timings: The table of layer times, or its file; by default one in the user's cache folder. A ``.json`` file is one that
            ``lamina measure`` wrote: if on another machine, ranks follow from that machine's times, the plan bears its setting,
            and the whole network is not timed.
        progress: Show a progress bar.
        runtime: What will run it where it is served: ranks are chosen, and the whole network is judged, by the times that it
            takes there. Eager PyTorch by default. A layer is timed in it as a graph of its own. For inference.

    Returns:
        The plan; nothing has been decomposed yet.

    Raises:
        ExampleError: The network does not run on the example.
        GoalError: The goal makes no sense, such as a ratio below 1, or a drop without a score. Or the score is no number.
        PlanError: A pattern matches no layer (also one of the freezing's), or the network is decomposed already.
        LayerError: A weight is not finite.
        CalibrationError: The calibration is of another network or of other weights.
        LaminaError: Times were taken on another machine and do not suffice. Or the network does not run in the runtime.
        MissingExtra: The runtime is not installed.
    """
    goal = goal_of(goal)
    if not isinstance(goal, Ratio) and (rule is not None or beta is not None):
        raise GoalError("rule and beta say how ranks follow from a lamina.Ratio; a budget takes neither")
    score = checked_score(score)
    if isinstance(goal, Drop) and score is None:
        raise GoalError(unscored(goal))
    if isinstance(goal, Drop) and not never_slower:
        raise GoalError(f"a {goal} is the fastest network by its measured time: it takes no never_slower=False")
    options: dict[str, Any] = {"rule": rule, "mode": mode, "beta": beta, "include": include, "skip": skip}
    options |= {"never_slower": never_slower, "worth": worth, "data": data, "timings": timings, "progress": progress}
    options |= {"runtime": runtime}
    with Planner.of(model, example, **options) as planner:
        if score is None:
            return planner.plan(goal).told
        jury = Jury.of(planner.survey, planner.calibration, score)
        if isinstance(goal, Drop):
            return fastest_within(goal, planner, jury).plan
        return jury.best(planner.plan(goal).told).plan


def fastest_within(drop: Drop, planner: Planner, jury: Jury, top: Plan | None = None) -> Candidate:
    """The fastest network within a drop of the score.

    Args:
        drop: The drop.
        planner: Plans the network.
        jury: Scores what comes of it.
        top: The fastest plan that is looked at; by default the fastest that there is.

    Raises:
        GoalError: Times are of another machine.
    """
    if planner.whole is None:
        raise GoalError(f"a {drop} is the fastest network by its measured time, and these times are another machine's")
    top = planner.plan(FASTEST).plan if top is None else top
    return by_drop(drop, jury, lambda goal: planner.plan(goal).plan, top, planner.shown, planner.afresh)
