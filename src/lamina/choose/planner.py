"""A planner: a network that was surveyed and calibrated once, and plans of it for as many goals as are asked for."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
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
from ..forms import Dense, Form
from ..goals import AnyLimit, Budget, Goal, Milliseconds, Ratio, Speedup, in_time, limits_in
from ..measure.clock import disturbed, timing
from ..measure.table import TimingTable, opened
from ..network.fingerprint import fingerprint
from ..network.patterns import matches
from ..network.preserve import repeatable
from ..plan import FactorMethod, Plan, PlannedLayer, WholeModel, cost, listed
from ..progress import Display, display
from ..runtimes.eager import EAGER
from ..runtimes.runtime import Runtime, checked_runtime
from ..values import Cost, Mode, Setting, as_number, quoted
from .by_budget import CLOSE, SLOWER, Budgeted, Denied, Judgement, by_budget, known, lucky
from .by_rule import by_rule
from .never_slower import Verdict
from .prices import Prices
from .rules import Plateau, Rule
from .second_look import with_doubted
from .survey import Survey
from .whole import Whole

_LOG = logging.getLogger("lamina")
_METHOD = 7
"""Counts up when a budget is answered in another way, so that answers of before are not given again."""
_JUDGED = 3
"""How many choices are judged at most: the next one without the forms that were put back, or by what the judge measured."""
_FOUND = "the best that was found: every choice of forms was slower than asked; see what was put back"
"""Said in the place of `SLOWER` where what was put back might have been faster otherwise."""


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
class _Judged:
    """What was chosen, and what is left of it once the network was timed with it."""

    budgeted: Budgeted
    chosen: dict[str, Form]
    planned: dict[str, PlannedLayer]
    put_back: dict[str, str]
    whole: WholeModel


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
        if not 0 <= as_number(worth) < 1:
            raise GoalError(f"worth is {quoted(worth)}; it is a share of the network's time, from 0 to below 1")
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
        survey, calibration = self.survey, self.calibration
        judged = self._settled(goal)
        priced = self.shown.through(list(judged.planned.items()), "pricing layers")
        planned = {name: self.prices.of_planned(name, layer) for name, layer in priced}
        shapes = [example_shape(workload) for workload in survey.examples]
        whole = self._timing_whole(goal)
        shares = whole.shares if whole else {}
        plan = Plan(
            goal=goal,
            rule=str(self._rule) if isinstance(goal, Ratio) else "one budget",
            mode=survey.mode.name,
            freezing=survey.mode.freezing,  # type: ignore[arg-type]
            layers=planned,
            refused=survey.refused,
            fingerprint=fingerprint(survey.model),
            setting=self._taken if shares or any(layer.before.timing for layer in planned.values()) else None,
            whole=judged.whole,
            put_back=judged.put_back,
            examples=tuple(shape for shape in shapes if shape) or None,
            factors=FactorMethod(calibration=calibration.identity if calibration else None),
            together=calibration.together if calibration else Curve(),
            notes=(
                *survey.notes,
                *judged.budgeted.notes,
                *_known_less(calibration, [name for name, layer in planned.items() if layer.decomposed]),
            ),
            shares=shares,
        )
        beside = _missed(plan, judged.budgeted.missed) or _beside_the_goal(plan)
        return Planned(plan, (*_disturbed(plan), *beside))

    def _timing_whole(self, goal: Goal) -> Whole | None:
        return self.whole if self._rule.timed or not isinstance(goal, Ratio) else None

    def _settled(self, goal: Goal) -> _Judged:
        """What is left of the best choice, once it was judged in the network.

        Where layers were put back and a limit is exceeded for it, the rest is chosen anew without those forms in those layers;
        what was put back twice stays dense. Where none was, and the judged time misses a goal that the trials met, all are
        chosen anew by what was judged. Where several were judged, the best of them is timed once more, for the report.
        """
        denied: frozenset[Denied] = frozenset()
        told: tuple[Judgement, ...] = ()
        found = [self._judged(goal, denied, told)]
        while len(found) < _JUDGED:
            last = found[-1]
            if last.put_back and _beyond(goal, last.whole):
                again = {name for name in last.put_back if any(name in each.put_back for each in found[:-1])}
                denied |= {(name, None if name in again else last.chosen[name]) for name in last.put_back}
            elif judgement := _otherwise(goal, last, told):
                told = (*told, judgement)
            else:
                break
            found.append(self._judged(goal, denied, told))
            if any(found[-1].chosen == each.chosen for each in found[:-1]):
                break  # it would be told the same
        best = min(found, key=lambda each: (_excess(goal, each.whole), self._lost(each)))
        for before in found[: found.index(best)]:
            for name, why in before.put_back.items():
                if not best.planned[name].decomposed and name not in best.put_back:
                    best.planned[name], best.put_back[name] = before.planned[name], why
        if len(found) > 1 and (whole := self._reported(best.planned, seconds=_in_seconds(limits_in(goal)))):
            return dataclasses.replace(best, whole=whole)
        return best

    def afresh(self, plan: Plan) -> Plan:
        """A plan that was chosen by its speed, with times of rounds that did not choose it: who is fastest is lucky, too."""
        whole = self._reported(plan.layers, seconds=False)
        return plan.model_copy(update={"whole": whole}) if whole else plan

    def _reported(self, planned: dict[str, PlannedLayer], *, seconds: bool) -> WholeModel | None:
        """What the network costs by such rounds; None where nothing is decomposed, or nothing was to be judged."""
        kept: dict[str, Form] = {name: layer.form for name, layer in planned.items() if layer.decomposed}
        if self.whole is None or not self._never_slower or not kept:
            return None
        verdict = Verdict(kept, {}, *self.whole.afresh(kept, seconds=seconds))
        return _whole(self.survey.before, planned, verdict, self.survey.setting)

    def _lost(self, judged: _Judged) -> float:
        """What the layers lose, by what a budget adds up."""
        return sum(self.prices.price(name, each.loss) for name, each in judged.planned.items() if each.loss is not None)

    def _judged(self, goal: Goal, denied: frozenset[Denied], told: Sequence[Judgement]) -> _Judged:
        survey, whole = self.survey, self._timing_whole(goal)
        if isinstance(goal, Ratio):
            names, metric = survey.considered, self.prices.metric
            layers, doubted = by_rule(survey, names, goal, self._beta, self._rule, metric, self._table, self.shown)
            if whole and self._never_slower and not survey.runtime.eager:
                self.shown.say("timing the whole network", 0, None)
                layers = with_doubted(whole, layers, doubted)
            budgeted = Budgeted(layers)
        else:
            budgeted = self._by_budget(limits_in(goal), denied, told)
        unwanted = {name: self._left_dense(name) for name in survey.layers if name not in survey.refused}
        planned = {name: budgeted.layers.get(name, layer) for name, layer in unwanted.items()}
        chosen: dict[str, Form] = {name: layer.form for name, layer in planned.items() if layer.decomposed}
        verdict = None
        if whole and self._never_slower and chosen:
            seconds = _in_seconds(limits_in(goal))
            verdict = whole.verdict(chosen, self.shown.say, seconds=seconds)
            for name, why in verdict.put_back.items():
                _LOG.info("put back %s: %s", name, why)
                planned[name] = planned[name].with_form(Dense(), f"put back: {why}", "never_slower")
        elif whole and not chosen and not isinstance(goal, Ratio) and in_time(limits_in(goal)):
            dense = [whole.seconds()]  # a limit on time holds for what stays dense, too
            verdict = Verdict({}, {}, dense, dense)
        put_back = dict(verdict.put_back) if verdict else {}
        return _Judged(budgeted, chosen, planned, put_back, _whole(survey.before, planned, verdict, survey.setting))

    def _by_budget(self, asked: Sequence[Budget], denied: frozenset[Denied], told: Sequence[Judgement]) -> Budgeted:
        """The answer to a budget; where the same was asked before of the network as it is, the same answer."""
        names = self.survey.considered

        def find() -> Budgeted:
            return by_budget(self.survey, names, asked, self.prices, self._worth, self.whole, self.shown, denied, told)

        if self.whole is None:
            limited = " and ".join(map(str, asked))
            raise GoalError(
                f"a budget ({limited}) is held to the whole network's measured time, and these times are another machine's: "
                "plan on that machine, or ask here for a lamina.Ratio"
            )
        limits = [[type(each).__name__, each.value] for each in asked]
        by = [_METHOD, limits, names, self._worth, self.prices.identity(), sorted((name, str(form)) for name, form in denied)]
        by += [[_named(each.forms), each.trial, each.speedup, each.interval] for each in told]
        seconds = _in_seconds(asked)
        return self.whole.kept("answers", Budgeted, find, by, lambda found: found.sure, seconds=seconds)

    def _left_dense(self, name: str) -> PlannedLayer:
        geometry, uses = self.survey.layers[name].geometry, self.survey.seen.uses[name]
        same = cost(geometry, Dense(), uses)
        reason = "matches no include pattern" if self._include and not matches(name, self._skip) else "skipped"
        return PlannedLayer(geometry=geometry, uses=uses, form=Dense(), reason=reason, before=same, after=same)


def _in_seconds(asked: Sequence[object]) -> bool:
    """Whether what is asked hangs on seconds, and not only on ratios."""
    return any(isinstance(each, Milliseconds) for each in asked)


def _named(forms: Mapping[str, Form]) -> list[tuple[str, str]]:
    return sorted((name, str(form)) for name, form in forms.items())


def _otherwise(goal: Goal, judged: _Judged, told: Sequence[Judgement]) -> Judgement | None:
    """What the search is to be told where the judged time misses a goal on either side that the trial met; None where not.

    What was judged to be faster than asked for must be so by all of its interval: to give up speed for a lucky judgement would
    miss the limit.
    """
    trial, whole = judged.budgeted.speedup, judged.whole
    wanted = _wanted(goal, whole)
    if judged.put_back or None in (trial, wanted, whole.speedup, whole.interval):
        return None
    assert trial and wanted and whole.speedup and whole.interval
    speedup = known(whole.speedup, whole.interval, wanted)
    if speedup > wanted:
        speedup = max(whole.interval[0], wanted)
    if _near(speedup, wanted) or not _near(trial / lucky(told), wanted):
        return None
    return Judgement(judged.chosen, trial, whole.speedup, whole.interval)


def _near(speedup: float, wanted: float) -> bool:
    return abs(wanted / speedup - 1) <= CLOSE


def _wanted(goal: Goal, whole: WholeModel) -> float | None:
    """The speed-up that the limits on time ask for; None where there are none."""
    limits = [limit for limit, _ in _held(goal, whole) if isinstance(limit, Milliseconds)]
    before = whole.before.timing
    return max((1e3 * before.median_s / limit.value for limit in limits), default=None) if before else None


def _excess(goal: Goal, whole: WholeModel) -> float:
    return max((excess for *_, excess in _beyond(goal, whole)), default=0.0)


def _beyond(goal: Goal, whole: WholeModel) -> list[tuple[AnyLimit, AnyLimit, float]]:
    """Limits that the network as it was judged exceeds: the limit, what it comes to, and by what share that is more."""
    found = ((limit, came, came.value / limit.value - 1) for limit, came in _held(goal, whole))
    return [each for each in found if each[2] > (CLOSE if isinstance(each[0], Milliseconds) else 0.0)]


def _held(goal: Goal, whole: WholeModel) -> list[tuple[AnyLimit, AnyLimit]]:
    """Each limit beside what the network comes to; times by the paired ratios, and none where it was not timed."""
    if isinstance(goal, Ratio):
        return []
    before, after = whole.before, whole.after
    if before.timing and whole.speedup:
        median_s = before.timing.median_s / whole.speedup
        after = dataclasses.replace(after, timing=dataclasses.replace(before.timing, median_s=median_s))
    timed = before.timing is not None and after.timing is not None
    limits = [each.absolute(before) for each in limits_in(goal) if timed or not isinstance(each, Speedup | Milliseconds)]
    return [(limit, limit.at(after)) for limit in limits]


def _missed(plan: Plan, said: Sequence[str]) -> tuple[str, ...]:
    """What the search said of limits that it missed, as far as the network that was judged bears it out."""
    assert plan.whole is not None
    beyond = _beyond(plan.goal, plan.whole)
    if plan.put_back:  # the search spoke of another network, or of a choice without what was put back before
        return tuple(
            _FOUND if SLOWER in said and isinstance(limit, Milliseconds) else _above(plan, limit, came)
            for limit, came, _ in beyond
        )
    timed = any(isinstance(limit, Milliseconds) for limit, _ in _held(plan.goal, plan.whole))
    in_time = timed and not any(isinstance(limit, Milliseconds) for limit, *_ in beyond)
    return tuple(each for each in said if not (in_time and each == SLOWER))


def _above(plan: Plan, limit: AnyLimit, came: AnyLimit) -> str:
    takes = "takes" if isinstance(limit, Milliseconds) else "has"
    return f"the whole network {takes} {came}, above the {limit} asked for{': see what was put back' if plan.put_back else ''}"


def _beside_the_goal(plan: Plan) -> tuple[str, ...]:
    """What is to be said where the network that was judged comes to clearly more, or less, than was asked for."""
    if isinstance(plan.goal, Ratio):
        return ()
    if not (plan.decomposed or plan.put_back):
        return (f"the network is within {plan.goal} as it is: nothing is decomposed",)
    assert plan.whole is not None
    if beyond := _beyond(plan.goal, plan.whole):
        limit, came, _ = max(beyond, key=lambda each: each[2])
        return (_above(plan, limit, came),)
    times = [(limit, came) for limit, came in _held(plan.goal, plan.whole) if isinstance(limit, Milliseconds)]
    if times and len(times) == len(limits_in(plan.goal)):
        limit, came = min(times, key=lambda each: each[0].value)
        if came.value < limit.value * (1 - CLOSE):
            return (f"faster than asked for ({came}, not {limit}): of what is fast enough it loses least",)
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
    coarse = [
        name for name, record in records.items() if record.geometry.patchable and record.taps == 1 and not record.directions
    ]
    along = [name for name, record in records.items() if record.directions]
    said = {
        "nothing of {}: fitted to the weights alone": [name for name in decomposed if name not in records],
        "the inputs alone of {}, and no gradients: what the answers lose by them is not known": blind,
        "channels and not patches of {}: more memory would give these, or data that can be iterated more than once": coarse,
        "patches of {} along some directions of the channels alone: more memory would give whole ones": along,
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
    timed = [
        (layer.before.timing.median_s, layer.after.timing.median_s)
        for layer in planned.values()
        if layer.before.timing and layer.after.timing
    ]
    alone_s, saved_s = sum(was for was, _ in timed), sum(was - now for was, now in timed)
    # Alone, layers may take longer than the network does with all of them: what they save then counts for as much less.
    share = saved_s / max(alone_s, dense.median_s)
    return WholeModel(
        before=dataclasses.replace(before, timing=dense),
        after=dataclasses.replace(after, timing=small),
        predicted_s=dense.median_s * (1 - share),
        speedup=verdict.speedup,
        interval=verdict.interval,
    )
