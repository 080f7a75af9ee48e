"""The way from a network to a Plan: walk, observe, ask the rule for each distinct layer, judge the whole."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..calibration.calibrate import calibration_on
from ..calibration.calibration import DAMPING
from ..comparison import checked
from ..errors import GoalError
from ..examples import example_shape
from ..forms import Dense
from ..goals import Budget, Goal, Milliseconds, Ratio, goal_of, limits_in
from ..measure.clock import timing
from ..measure.table import TimingTable, opened
from ..network.fingerprint import fingerprint
from ..network.patterns import matches
from ..network.preserve import repeatable
from ..network.running import outside_inference_mode
from ..plan import FactorMethod, Plan, PlannedLayer, WholeModel, cost
from ..progress import display
from ..values import Cost, Mode, Setting
from .by_budget import CLOSE, by_budget
from .by_rule import by_rule
from .never_slower import Verdict
from .prices import Prices
from .rules import Plateau, Rule
from .survey import Survey
from .whole import Whole


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
    timings: TimingTable | str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Plan:
    """Choose a form for every layer of a network. It is run and timed on a shadow of it; the network itself is only read.

    Args:
        model: A trained network, on the device, in the dtype and in the memory format in which it will be used.
        example: What it will be fed, batch included: a tensor, a tuple of arguments, a mapping of keyword arguments, or a list
            of `Workload` where one network serves several.
        goal: `Speedup(1.5)`: the whole network that much faster, its weights changed as little as possible. So too
            `Milliseconds(4)`, `Macs(1e9)`, `Parameters(5e6)`, or a list of such limits. Or `Ratio(2.0)`: each layer's weight at
            least that many times smaller, where this is faster.
        rule: How ranks follow from a ratio and timings: `Plateau()` by default, `LargestStep()` (paper A), or `AtRatio()` (no
            timings); or from the weight itself, where that makes a layer as small as the ratio asks: `Energy(0.9)`, `Evbmf()`.
        mode: `Inference()` by default, or `Training()` to time forward and backward; `Training(freezing=SequentialFreezing())`
            for the mean over the phases of the freezing under which the network will be trained.
        beta: Rank out / rank in of Tucker-2; by default max(0.8 O / I, 1).
        include: Patterns as in the shell; only layers matching one of them are decomposed. Empty: all.
        skip: Patterns; layers matching one stay dense.
        never_slower: Time the whole network and put back what does not pay; only for rules that look at timings.
        worth: With a budget: the share of the network's time that a layer must save to be decomposed.
        data: What `calibrate` returned for this network with these weights, or unlabelled data, which are then calibrated on.
            Losses are then of the network's answers, not of its weights, and `decompose` wants the same calibration.
        timings: The table of layer times, or its file; by default one in the user's cache folder. A ``.json`` file is one that
            ``lamina measure`` wrote: if on another machine, ranks follow from that machine's times, the plan bears its setting,
            and the whole network is not timed.
        progress: Show a progress bar.

    Returns:
        The plan; nothing has been decomposed yet.

    Raises:
        ExampleError: The network does not run on the example.
        GoalError: The goal makes no sense, such as a ratio below 1.
        PlanError: A pattern matches no layer (also one of the freezing's), or the network is decomposed already.
        CalibrationError: The calibration is of another network or of other weights.
        LaminaError: Times were taken on another machine and do not suffice.
    """
    goal = goal_of(goal)
    if not (0 <= worth < 1):
        raise GoalError(f"worth is {worth!r}; it is a share of the network's time, from 0 to below 1")
    if not isinstance(goal, Ratio) and (rule is not None or beta is not None):
        raise GoalError("rule and beta say how ranks follow from a lamina.Ratio; a budget takes neither")
    if not (rule is None or hasattr(rule, "choose")) or isinstance(rule, type):
        raise GoalError(f"rule is {rule!r}; give lamina.Plateau(), LargestStep(), AtRatio(), Energy(0.9) or Evbmf()")
    rule, mode = rule or Plateau(), checked(mode)
    survey = Survey.of(model, example, mode, include, skip)
    calibration = calibration_on(survey.model, data, progress)
    model, examples, setting = survey.model, survey.examples, survey.setting
    names = [name for name in survey.layers if name in survey.wanted and name not in survey.refused]

    notes, reached = tuple[str, ...](), True
    verdict = None
    with repeatable(model), opened(timings) as table, display(progress) as shown:
        taken = table.conditions(setting)
        timed = rule.timed or not isinstance(goal, Ratio)
        # What is chosen by another machine's times cannot be judged by this one's.
        whole = Whole(survey, table) if timed and taken == setting else None
        shares = whole.shares if whole else {}
        prices = Prices(survey, table, calibration)
        if isinstance(goal, Ratio):
            found = by_rule(survey, names, goal, beta, rule, table, shown)
        else:
            budgeted = by_budget(survey, names, limits_in(goal), prices, worth, whole, shown)
            found, notes, reached = budgeted.layers, budgeted.notes, budgeted.reached
        unwanted = {name: _left_dense(survey, name, include, skip) for name in survey.layers if name not in survey.refused}
        planned = {name: found.get(name, layer) for name, layer in unwanted.items()}
        chosen = {name: layer.form for name, layer in planned.items() if layer.decomposed}
        if whole and never_slower and chosen:
            verdict = whole.verdict(chosen, shown.say)
            for name, why in verdict.put_back.items():
                planned[name] = planned[name].with_form(Dense(), f"put back: {why}", "never_slower")
        priced = shown.through(list(planned.items()), "pricing layers")
        planned = {name: prices.of_planned(name, layer) for name, layer in priced}
    shapes = [example_shape(workload) for workload in examples]
    result = _whole(survey.before, planned, verdict, setting)
    if reached:
        notes = (*_beside_the_goal(goal, result, bool(verdict and verdict.put_back)), *notes)
    return Plan(
        goal=goal,
        rule=str(rule) if isinstance(goal, Ratio) else "one budget",
        mode=mode.name,
        freezing=mode.freezing,  # type: ignore[arg-type]
        layers=planned,
        refused=survey.refused,
        fingerprint=fingerprint(model),
        setting=taken if shares or any(layer.before.timing for layer in planned.values()) else None,
        whole=result,
        put_back=verdict.put_back if verdict else {},
        examples=tuple(shape for shape in shapes if shape) or None,
        factors=FactorMethod(calibration=calibration.identity, damping=DAMPING) if calibration else FactorMethod(),
        notes=notes,
        shares=shares,
    )


def _beside_the_goal(goal: Goal, whole: WholeModel, put_back: bool) -> tuple[str, ...]:
    """What is to be said where the network that was judged takes clearly more, or less, than was asked for."""
    if isinstance(goal, Ratio) or whole.before.timing is None or whole.after.timing is None:
        return ()
    limits = [limit for each in limits_in(goal) if isinstance(limit := each.absolute(whole.before), Milliseconds)]
    if not limits:
        return ()
    least, after = min(limits, key=lambda limit: limit.value), Milliseconds(whole.after.timing.median_ms)
    if after.value > least.value * (1 + CLOSE):
        return (f"the whole network takes {after}, above the {least} asked for{': see what was put back' * put_back}",)
    if after.value < least.value * (1 - CLOSE) and len(limits) == len(limits_in(goal)):
        return (f"faster than asked for ({after}, not {least}): of what is fast enough it loses least",)
    return ()


def _left_dense(survey: Survey, name: str, include: Sequence[str], skip: Sequence[str]) -> PlannedLayer:
    geometry, uses = survey.layers[name].geometry, survey.seen.uses[name]
    same = cost(geometry, Dense(), uses)
    reason = "matches no include pattern" if include and not matches(name, skip) else "skipped"
    return PlannedLayer(geometry=geometry, uses=uses, form=Dense(), reason=reason, before=same, after=same)


def _whole(before: Cost, planned: dict[str, PlannedLayer], verdict: Verdict | None, setting: Setting) -> WholeModel:
    """The network's cost: what the layers save is taken off what was counted and measured of the whole."""
    saved = [
        (layer.before.parameters - layer.after.parameters, layer.before.macs - layer.after.macs) for layer in planned.values()
    ]
    after = Cost(before.parameters - sum(p for p, _ in saved), before.macs - sum(m for _, m in saved))
    if verdict is None:
        return WholeModel(before=before, after=after)
    dense, small = timing(verdict.before, setting), timing(verdict.after, setting)
    gains = [
        layer.before.timing.median_s - layer.after.timing.median_s
        for layer in planned.values()
        if layer.before.timing and layer.after.timing
    ]
    return WholeModel(
        before=dataclasses.replace(before, timing=dense),
        after=dataclasses.replace(after, timing=small),
        predicted_s=dense.median_s - sum(gains),
        speedup=verdict.speedup,
        interval=verdict.interval,
    )
