"""A planner: a network that was surveyed and calibrated once, and plans of it for as many goals as are asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from ..calibration.calibrate import calibration_on
from ..calibration.calibration import Calibration
from ..comparison import checked
from ..curve import Curve
from ..errors import GoalError
from ..examples import example_shape
from ..forms import Dense
from ..goals import Budget, Goal, Milliseconds, Ratio, limits_in
from ..measure.clock import disturbed, timing
from ..measure.table import TimingTable, opened
from ..network.fingerprint import fingerprint
from ..network.patterns import matches
from ..network.preserve import repeatable
from ..plan import FactorMethod, Plan, PlannedLayer, WholeModel, cost, listed
from ..progress import Display, display
from ..runtimes.eager import EAGER
from ..runtimes.runtime import Runtime, checked_runtime
from ..values import Cost, Mode, Setting
from .by_budget import CLOSE, Budgeted, by_budget
from .by_rule import by_rule
from .never_slower import Verdict
from .prices import Prices
from .rules import Plateau, Rule
from .survey import Survey
from .whole import Whole

_METHOD = 2
"""Counts up when a budget is answered in another way, so that answers of before are not given again."""


@final
@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and what is to be said first where it is the answer to the goal that it was made for."""

    plan: Plan
    beside: tuple[str, ...]

    @property
    def told(self) -> Plan:
        """The plan with all of it in its notes."""
        return self.plan.model_copy(update={"notes": (*self.beside, *self.plan.notes)})


@final
@dataclass(frozen=True, slots=True)
class Planner:
    """Plans a network for one goal after another. Made by `of`.

    Attributes:
        survey: The network.
        calibration: What losses are of; None: of the weights alone.
        whole: Times the whole network; None where layers' times are not of this machine.
        shown: Shows how far it is.
        prices: What forms lose.
    """

    survey: Survey
    calibration: Calibration | None
    whole: Whole | None
    shown: Display
    prices: Prices
    _table: TimingTable
    _taken: Setting
    _rule: Rule
    _beta: float | None
    _worth: float
    _never_slower: bool
    _include: Sequence[str]
    _skip: Sequence[str]

    @classmethod
    @contextmanager
    def of(
        cls,
        model: nn.Module,
        example: Any,
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
        runtime: Runtime | None = None,
    ) -> Iterator[Planner]:
        """Look at a network; for the arguments see `make_plan`. Random states are put back at the end."""
        if not (0 <= worth < 1):
            raise GoalError(f"worth is {worth!r}; it is a share of the network's time, from 0 to below 1")
        if not (rule is None or hasattr(rule, "choose")) or isinstance(rule, type):
            raise GoalError(f"rule is {rule!r}; give lamina.Plateau(), LargestStep(), AtRatio(), Energy(0.9) or Evbmf()")
        survey = Survey.of(model, example, checked(mode), include, skip, checked_runtime(runtime) or EAGER)
        calibration = calibration_on(survey.model, data, progress)
        # Timed layers get random weights, and drawing them must not show in the caller's random state.
        with repeatable(survey.model), opened(timings) as table, display(progress) as shown:
            taken = table.conditions(survey.setting)
            # What is chosen by another machine's times cannot be judged by this one's.
            whole = Whole(survey, table) if taken == survey.setting else None
            prices = Prices(survey, table, calibration)
            rule = rule or Plateau()
            yield cls(survey, calibration, whole, shown, prices, table, taken, rule, beta, worth, never_slower, include, skip)

    def plan(self, goal: Goal) -> Planned:
        """Choose a form for every layer, by a ratio or by a budget."""
        survey, table, shown = self.survey, self._table, self.shown
        names = survey.considered
        whole = self.whole if self._rule.timed or not isinstance(goal, Ratio) else None
        shares = whole.shares if whole else {}
        if isinstance(goal, Ratio):
            budgeted = Budgeted(by_rule(survey, names, goal, self._beta, self._rule, table, shown))
        else:
            budgeted = self._by_budget(limits_in(goal))
        unwanted = {name: self._left_dense(name) for name in survey.layers if name not in survey.refused}
        planned = {name: budgeted.layers.get(name, layer) for name, layer in unwanted.items()}
        chosen = {name: layer.form for name, layer in planned.items() if layer.decomposed}
        verdict = None
        if whole and self._never_slower and chosen:
            verdict = whole.verdict(chosen, shown.say)
            for name, why in verdict.put_back.items():
                planned[name] = planned[name].with_form(Dense(), f"put back: {why}", "never_slower")
        priced = shown.through(list(planned.items()), "pricing layers")
        planned = {name: self.prices.of_planned(name, layer) for name, layer in priced}
        shapes = [example_shape(workload) for workload in survey.examples]
        calibration = self.calibration
        plan = Plan(
            goal=goal,
            rule=str(self._rule) if isinstance(goal, Ratio) else "one budget",
            mode=survey.mode.name,
            freezing=survey.mode.freezing,  # type: ignore[arg-type]
            layers=planned,
            refused=survey.refused,
            fingerprint=fingerprint(survey.model),
            setting=self._taken if shares or any(layer.before.timing for layer in planned.values()) else None,
            whole=_whole(survey.before, planned, verdict, survey.setting),
            put_back=verdict.put_back if verdict else {},
            examples=tuple(shape for shape in shapes if shape) or None,
            factors=FactorMethod(calibration=calibration.identity if calibration else None),
            together=calibration.together if calibration else Curve(),
            notes=(*budgeted.notes, *_known_less(calibration, [name for name, layer in planned.items() if layer.decomposed])),
            shares=shares,
        )
        beside = budgeted.missed or (() if isinstance(goal, Ratio) else _beside_the_goal(plan))
        return Planned(plan, (*_disturbed(plan), *beside))

    def _by_budget(self, asked: Sequence[Budget]) -> Budgeted:
        """The answer to a budget; where the same was asked before of the network as it is, the same answer."""
        names = self.survey.considered

        def find() -> Budgeted:
            return by_budget(self.survey, names, asked, self.prices, self._worth, self.whole, self.shown)

        if self.whole is None:
            return find()
        limits = [[type(each).__name__, each.value] for each in asked]
        by = [_METHOD, limits, names, self._worth, self.prices.identity()]
        seconds = any(isinstance(each, Milliseconds) for each in asked)
        return self.whole.kept("answers", Budgeted, find, by, lambda found: found.sure, seconds=seconds)

    def _left_dense(self, name: str) -> PlannedLayer:
        geometry, uses = self.survey.layers[name].geometry, self.survey.seen.uses[name]
        same = cost(geometry, Dense(), uses)
        reason = "matches no include pattern" if self._include and not matches(name, self._skip) else "skipped"
        return PlannedLayer(geometry=geometry, uses=uses, form=Dense(), reason=reason, before=same, after=same)


def _beside_the_goal(plan: Plan) -> tuple[str, ...]:
    """What is to be said where the network that was judged takes clearly more, or less, than was asked for."""
    if not (plan.decomposed or plan.put_back):
        return (f"the network is within {plan.goal} as it is: nothing is decomposed",)
    whole = plan.whole
    if whole is None or whole.before.timing is None or whole.after.timing is None:
        return ()
    limits = [limit for each in limits_in(plan.goal) if isinstance(limit := each.absolute(whole.before), Milliseconds)]
    if not limits:
        return ()
    least, after = min(limits, key=lambda limit: limit.value), Milliseconds(whole.after.timing.median_ms)
    if after.value > least.value * (1 + CLOSE):
        why = ": see what was put back" if plan.put_back else ""
        return (f"the whole network takes {after}, above the {least} asked for{why}",)
    if after.value < least.value * (1 - CLOSE) and len(limits) == len(limits_in(plan.goal)):
        return (f"faster than asked for ({after}, not {least}): of what is fast enough it loses least",)
    return ()


def _disturbed(plan: Plan) -> tuple[str, ...]:
    """What is to be said where the whole network's rounds differ so much that the forms were perhaps chosen by noise."""
    if plan.whole is None or plan.whole.interval is None:
        return ()
    low, high = plan.whole.interval
    if not disturbed(plan.whole.interval):
        return ()
    return (
        f"the machine was too busy to tell: 95 % between ×{low:.2f} and ×{high:.2f}, and the forms were chosen by such times: "
        "plan again when nothing else runs",
    )


def _known_less(calibration: Calibration | None, decomposed: list[str]) -> tuple[str, ...]:
    """What is to be said of a calibration where it knows less of layers that are decomposed than it might."""
    if calibration is None or not decomposed:
        return ()
    records = {name: calibration.layers[name].record for name in decomposed if name in calibration.layers}
    blind = [name for name, record in records.items() if not record.gradients]
    coarse = [name for name, record in records.items() if record.taps < record.geometry.taps]
    said = {
        "nothing of {}: fitted to the weights alone": [name for name in decomposed if name not in records],
        "the inputs alone of {}, and no gradients: what the answers lose by them is not known": blind,
        "channels and not patches of {}: more memory would give these, or data that can be iterated more than once": coarse,
    }
    notes = [f"the calibration knows {told.format(_titled(names))}" for told, names in said.items() if names]
    if not calibration.held_out:
        notes.append("nothing is held out in the calibration, to choose a damping by: give it more data")
    return tuple(notes)


def _titled(names: list[str]) -> str:
    return listed([name or "the network" for name in names])


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
