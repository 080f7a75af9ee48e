"""One budget for the whole network: offer, price, measure, solve, and time the whole until it meets what was asked.

What a layer takes alone foretells only roughly what it saves in its place. So the network is timed with the forms that were
chosen, what they saved there is held against what they promised, and the budget is set anew, until the measured whole meets the
goal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, final

from ..comparison import added_up
from ..forms import Dense, Form, candidates
from ..goals import AnyLimit, Budget, Milliseconds
from ..layers.build import losses, needs_fit
from ..measure.clock import Effort, ratio
from ..measure.table import TimingTable
from ..network.copying import shadow
from ..network.walk import walk
from ..plan import PlannedLayer, cost
from ..progress import Display
from ..values import Cost, Timing
from .budget import Row, solve
from .menu import Menu, Option, undominated, worth_measuring
from .never_slower import Stopwatch
from .survey import Survey

_MOST_FORMS = 24
"""Forms of a layer that are timed, about."""
CLOSE = 0.03
"""How far the measured whole may lie from the goal, as a share of it."""
_ROUNDS = 5
"""How often the budget is set anew, at most."""
_LOSSY = 0.3
"""The share of its norm that a layer may lose before the user is told."""

Answer = Mapping[str, int]
"""Layer → the position of its option in the menu."""


@final
@dataclass(frozen=True, slots=True)
class Budgeted:
    """Layers in the forms that were chosen, and what the user should know first."""

    layers: dict[str, PlannedLayer]
    notes: tuple[str, ...]


def by_budget(
    survey: Survey,
    names: Sequence[str],
    asked: Sequence[Budget],
    table: TimingTable,
    worth: float,
    shares: Mapping[str, float],
    shown: Display,
) -> Budgeted:
    """The layers with these names, in the forms that lose least while the whole network stays within limits.

    Args:
        survey: The network.
        names: Its layers that may be decomposed.
        asked: The limits.
        table: Times of layers.
        worth: The share of the network's time that a layer must save to be decomposed.
        shares: The share of the network's time in each layer; empty where it was not timed here.
        shown: Shows how far it is.
    """
    if not names:
        return Budgeted({}, ("no layer can be decomposed",))
    prices = _Prices(survey)
    alike: dict[Any, list[str]] = {}
    for name in names:
        alike.setdefault(survey.kin(name), []).append(name)
    fronts = {name: front for kind in alike.values() for front in [prices.front(kind)] for name in kind}
    seconds: dict[str, dict[Form, tuple[float, ...]]] = {}
    for name in shown.through(names, "timing layers"):
        fitted = [form for form in candidates(survey.layers[name].geometry) if needs_fit(form)]
        coarse = worth_measuring(*fronts[name], _MOST_FORMS)
        seconds[name] = _seconds(survey, name, [*dict.fromkeys([Dense(), *coarse, *fitted])], table)
    watch = _watch(survey) if shares else None
    alone_s = sum(survey.weighted(each[Dense()]) for each in seconds.values())
    # The whole's time by what its layers take alone: when those were timed, the machine was perhaps another than now.
    whole_s = alone_s / max(sum(shares[name] for name in names if name in shares), 0.01) if shares else alone_s
    limits = _limits(survey, asked, whole_s, watch)
    for last in (False, False, True):
        menu = {name: _options(survey, name, seconds[name], whole_s * worth, prices) for name in names}
        found = None if last else solve(_lost(menu), list(_rows(survey, menu, limits, whole_s, 1.0)))
        if found is None:
            break
        # Finer around what was chosen: the coarse forms lie far apart.
        for name in shown.through(names, "timing layers more finely"):
            finer = _near(menu[name][found[name]].form, *fronts[name], seconds[name])
            seconds[name] |= _seconds(survey, name, finer, table)
    answer, notes = _settled(survey, menu, prices, shown, limits, whole_s, watch)
    chosen = {name: menu[name][answer[name]] for name in names}
    lossy = sum(option.loss**0.5 > _LOSSY for option in chosen.values())
    if lossy:
        notes.append(
            f"losses are guessed from the weights alone, and {lossy} of the layers lose more than {_LOSSY} of their norm: "
            "measure how accurate the network still is"
        )
    return Budgeted({name: _planned(survey, name, chosen[name], len(menu[name]), table) for name in names}, tuple(notes))


def _limits(survey: Survey, asked: Sequence[Budget], whole_s: float, watch: Stopwatch | None) -> list[AnyLimit]:
    """What is asked for, its times as those of a network that takes ``whole_s``."""
    before = replace(survey.before, timing=Timing(whole_s, 0.0, 1, survey.setting))
    limits = [each.absolute(before) for each in asked]
    if watch is None or not any(isinstance(each, Milliseconds) for each in asked):
        return limits
    dense_s = survey.weighted(median(dense) for dense, _ in watch.whole({}))
    return [
        Milliseconds(limit.value * whole_s / dense_s) if isinstance(each, Milliseconds) else limit
        for each, limit in zip(asked, limits, strict=True)
    ]


def _near(
    chosen: Form, sizes: Mapping[Form, int], lost: Mapping[Form, float], known: Mapping[Form, object], most: int = 3
) -> list[Form]:
    """Forms of about the size of a chosen one that were not timed yet, on the fronts of size and loss, a few a structure."""
    if chosen == Dense() or chosen not in sizes:
        return []
    near = {form: size for form, size in sizes.items() if 0.4 < size / sizes[chosen] < 2.5}
    fresh = {form: near[form] for form in worth_measuring(near, lost, len(near) ** 2) if form not in known}
    return worth_measuring(fresh, lost, most * len({form.structure for form in fresh}))


def _seconds(survey: Survey, name: str, forms: Sequence[Form], table: TimingTable) -> dict[Form, tuple[float, ...]]:
    """Form → its time in one run of each workload."""
    by_workload = [survey.times(name, uses[name], table)(forms) if uses[name] else {} for uses in survey.seen.by_workload]
    return {form: tuple(each[form].median_s if each else 0.0 for each in by_workload) for form in forms}


_HOPE = 0.9
"""By how much less a form is taken to lose than it did in another layer of the same kind, until it is fitted itself."""


@final
@dataclass(frozen=True, slots=True)
class _Prices:
    """What forms lose. A form whose loss takes a fit is fitted in one layer of each kind, and elsewhere once it was chosen."""

    survey: Survey
    known: dict[tuple[str, Form], float] = field(default_factory=dict)
    """By layer and form."""
    hoped: dict[tuple[Any, Form], float] = field(default_factory=dict)

    def of(self, name: str, forms: Iterable[Form]) -> dict[Form, float]:
        """Losses of forms in a layer, some of them only hoped for."""
        kin, found = self.survey.kin(name), dict[Form, float]()
        for form in forms:
            if (name, form) not in self.known and (kin, form) not in self.hoped:
                self.hoped[kin, form] = _HOPE * self.fitted(name, form)
            found[form] = self.known[name, form] if (name, form) in self.known else self.hoped[kin, form]
        return found

    def front(self, kind: Sequence[str]) -> tuple[dict[Form, int], dict[Form, float]]:
        """Sizes and losses of the forms of layers of one kind that need no fit, the losses added up over the layers.

        So these are offered the same forms, and share their times.
        """
        geometry, uses = self.survey.layers[kind[0]].geometry, self.survey.seen.uses[kind[0]]
        forms = [form for form in candidates(geometry) if not needs_fit(form)]
        total = dict.fromkeys(forms, 0.0)
        for name in kind:
            for form, loss in losses(self.survey.layers[name], forms).items():
                self.known[name, form] = loss
                total[form] += loss
        return {form: cost(geometry, form, uses).macs for form in forms}, total

    def fitted(self, name: str, form: Form) -> float:
        """What a form that needs a fit loses in a layer."""
        if (name, form) not in self.known:
            self.known[name, form] = losses(self.survey.layers[name], [form])[form]
        return self.known[name, form]

    def surprises(self, menu: dict[str, tuple[Option, ...]], answer: Answer) -> bool:
        """Fit what was chosen on hope alone; whether there was any. The menu is put right."""
        found = False
        for name, number in answer.items():
            form = menu[name][number].form
            if needs_fit(form) and (name, form) not in self.known:
                options = list(menu[name])
                options[number] = replace(options[number], loss=self.fitted(name, form))
                menu[name], found = tuple(options), True
        return found


def _options(
    survey: Survey, name: str, seconds: Mapping[Form, tuple[float, ...]], least_s: float, prices: _Prices
) -> tuple[Option, ...]:
    """What a layer may become: dense, or what saves enough of the network's time and is not beaten in everything."""
    layer, uses = survey.layers[name], survey.seen.uses[name]
    dense_s = survey.weighted(seconds[Dense()])
    fast = [form for form in seconds if dense_s - survey.weighted(seconds[form]) >= least_s]
    lost = prices.of(name, [Dense(), *fast])  # dense loses nothing
    costs = {form: cost(layer.geometry, form, uses) for form in lost}
    return undominated(
        Option(form, loss, costs[form].parameters, costs[form].macs, seconds[form]) for form, loss in lost.items()
    )


def _rows(survey: Survey, menu: Menu, limits: Sequence[AnyLimit], whole_s: float, kept: float) -> Iterator[Row]:
    """The limits as sums over the layers of what each option adds to the dense layer's cost.

    Args:
        survey: The network.
        menu: The options.
        limits: What the whole may cost.
        whole_s: Seconds of the dense network.
        kept: The share of the time that the layers save alone which the whole network saves.
    """
    before = replace(survey.before, timing=Timing(whole_s, 0.0, 1, survey.setting))

    def costs(option: Option, limit: AnyLimit) -> float:
        timing = Timing(survey.weighted(option.seconds), 0.0, 1, survey.setting)
        return limit.of(Cost(option.parameters, option.macs, timing))

    for limit in limits:
        room = limit.value - limit.of(before)
        yield Row(
            {name: [costs(option, limit) - costs(options[0], limit) for option in options] for name, options in menu.items()},
            room / kept if isinstance(limit, Milliseconds) else room,
        )
    for number in range(len(survey.examples)):
        yield Row(
            {name: [o.seconds[number] - options[0].seconds[number] for o in options] for name, options in menu.items()},
            0.0,
            late=True,
        )


def _settled(
    survey: Survey,
    menu: dict[str, tuple[Option, ...]],
    prices: _Prices,
    shown: Display,
    limits: Sequence[AnyLimit],
    whole_s: float,
    watch: Stopwatch | None,
) -> tuple[Answer, list[str]]:
    """The answer whose measured time meets the limits with the least loss, and what is to be said of it."""
    most_s = min((limit.value / 1e3 for limit in limits if isinstance(limit, Milliseconds)), default=None)
    tried: dict[tuple[int, ...], float] = {}
    kept = 1.0
    while True:
        rows = list(_rows(survey, menu, limits, whole_s, kept))
        found = _dense(menu) if all(row.most >= 0 for row in rows) else solve(_lost(menu), rows)
        answer = _closest(menu, rows) if found is None else found
        if prices.surprises(menu, answer):
            continue
        key = tuple(answer.values())
        if most_s is None or watch is None:
            said = f"no choice of forms is within {' and '.join(map(str, limits))}: this one comes closest"
            return answer, [] if found is not None else [said]
        if key in tried:
            break
        shown.say("timing the whole network", len(tried), _ROUNDS)
        tried[key] = _share(watch, survey, _forms(menu, answer)) * whole_s
        promised = sum(survey.weighted(menu[n][0].seconds) - survey.weighted(menu[n][i].seconds) for n, i in answer.items())
        met = (1 - CLOSE) * most_s <= tried[key] <= most_s
        if met or promised <= 0 or len(tried) == _ROUNDS or (found is None and tried[key] > most_s):
            break
        kept = min(max((whole_s - tried[key]) / promised, 0.1), 3.0)
    return _best(menu, tried, most_s)


def _best(menu: Menu, tried: Mapping[tuple[int, ...], float], most_s: float) -> tuple[Answer, list[str]]:
    """Of the answers that were timed the one that loses least within the limit, or else the fastest."""
    enough = [key for key, seconds in tried.items() if seconds <= most_s * (1 + CLOSE)]
    if enough:
        key = min(enough, key=lambda key: sum(o[i].price for o, i in zip(menu.values(), key, strict=True)))
        return dict(zip(menu, key, strict=True)), []
    key = min(tried, key=lambda key: tried[key])
    return dict(zip(menu, key, strict=True)), [
        f"the best that is reachable here: every choice of forms took {tried[key] / most_s:.2f} or more of the time asked for"
    ]


def _dense(menu: Menu) -> dict[str, int]:
    return dict.fromkeys(menu, 0)


def _lost(menu: Menu) -> dict[str, list[float]]:
    return {name: [option.price for option in options] for name, options in menu.items()}


def _forms(menu: Menu, answer: Answer) -> dict[str, Form]:
    return {name: menu[name][number].form for name, number in answer.items()}


def _closest(menu: Menu, rows: Sequence[Row]) -> Answer:
    """The answer that costs least of what is limited, where no one is within the limits."""
    broken = [row for row in rows if not row.late]
    scales = [max((abs(c) for costs in row.costs.values() for c in costs), default=0.0) or 1.0 for row in broken]
    return {
        name: min(range(len(options)), key=lambda i: sum(r.costs[name][i] / s for r, s in zip(broken, scales, strict=True)))
        for name, options in menu.items()
    }


def _watch(survey: Survey) -> Stopwatch:
    dense = shadow(survey.model, apart=survey.seen.apart)  # the network itself may be in use meanwhile
    return Stopwatch(dense, walk(dense).layers, survey.examples, survey.mode, Effort(1.0, 8, 60))


def _share(watch: Stopwatch, survey: Survey, forms: Mapping[str, Form]) -> float:
    """The share of the dense network's time that it takes with some layers in forms: the median of paired runs."""
    pairs = watch.whole({name: form for name, form in forms.items() if form != Dense()})
    return 1 / ratio(*added_up(survey.examples, pairs))


def _planned(survey: Survey, name: str, option: Option, options: int, table: TimingTable) -> PlannedLayer:
    geometry, uses = survey.layers[name].geometry, survey.seen.uses[name]
    times = survey.times(name, uses, table)([Dense(), option.form])
    before, after = (replace(cost(geometry, form, uses), timing=times[form]) for form in (Dense(), option.form))
    if option.form != Dense():
        reason = f"×{times[Dense()].median_s / times[option.form].median_s:.2f}: least loss within the budget"
    elif options > 1:
        reason = "within the budget it is better left dense"
    else:
        reason = "no form saves enough of the network's time"
    return PlannedLayer(
        geometry=geometry,
        uses=uses,
        form=option.form,  # type: ignore[arg-type]
        reason=reason,
        before=before,
        after=after,
        loss=option.loss,
    )
