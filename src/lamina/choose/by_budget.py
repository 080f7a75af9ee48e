"""One budget for the whole network: offer, price, measure, solve, and time the whole until it meets what was asked.

What a layer takes alone foretells only roughly what it saves in its place. So the network is timed with the forms that were
chosen, what they saved there is held against what they promised, structure by structure, and the budget is solved anew, until
the measured whole meets the goal.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean
from typing import Any, final

from ..forms import Dense, Form, candidates
from ..goals import AnyLimit, Budget, Milliseconds
from ..layers.build import needs_fit
from ..measure.clock import disturbed, ratio, ratio_interval
from ..measure.table import TimingTable
from ..plan import PlannedLayer, cost, listed
from ..progress import Display
from ..values import Cost, Timing
from .budget import Row, Solution, solution, solve
from .in_place import InPlace, Trial, in_place
from .menu import Menu, Option, undominated, worth_measuring
from .prices import Prices
from .survey import Survey
from .whole import Whole

_LOG = logging.getLogger("lamina")
MOST_FORMS = 24
"""Forms of a layer that are timed, about."""
CLOSE = 0.03
"""How far the measured whole may lie from the goal, as a share of it."""
_SPARED = 0.25
"""Of what the cheapest forms save, so much is given up at most to lose less."""
_FINER = 2
"""How often forms are timed more finely around what would be chosen."""
_NOISE = 0.01
"""Of the dense network's time: what a trial of a whole network is not surer than."""
_ROUNDS = 8
"""How often the budget is set anew, at most."""
_ROUGHLY, _GAP = 1e-2, 1e-3
"""How far above the least loss an answer may lie: where it only tells what to look at, and where it is the answer. Losses and
times are known no better."""
_ROUNDING = 1e-6
"""Of the dense network's cost: so much more than a limit is none."""
SLOWER = "the best that is reachable here: every choice of forms was slower than asked"
"""What is said where no trial of the whole network met the time asked for."""
Seconds = dict[Form, tuple[float, ...]]
"""Form → its time in one run of each workload."""
Answer = Mapping[str, int]
"""Layer → the position of its option in the menu."""
Denied = tuple[str, Form | None]
"""A layer, and a form that it may not become; None: any but dense."""


@final
@dataclass(frozen=True, slots=True)
class Budgeted:
    """The answer to a budget.

    Attributes:
        layers: In the forms that were chosen.
        notes: What the user should know first of them.
        missed: What is to be said of limits that are not met.
        sure: Whether nothing disturbed the time of the whole network by which they were taken.
        speedup: Of the trial by which they were taken; None where the whole network was not timed.
    """

    layers: dict[str, PlannedLayer]
    notes: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    sure: bool = True
    speedup: float | None = None


@final
@dataclass(frozen=True, slots=True)
class Judgement:
    """What was judged of a network that a search answered with.

    Attributes:
        forms: Of its decomposed layers.
        trial: The speed-up in the trial by which they were taken.
        speedup: As it was judged.
        interval: In which that lies, at 95 %.
    """

    forms: Mapping[str, Form]
    trial: float
    speedup: float
    interval: tuple[float, float]


def known(speedup: float, interval: tuple[float, float], wanted: float) -> float:
    """A speed-up as far as it is known: where something disturbed it, what is nearest to the one wanted in its interval."""
    low, high = interval
    return min(max(wanted, low), high) if disturbed(interval) else speedup


def lucky(judged: Sequence[Judgement]) -> float:
    """How many times as fast as they were judged networks were in their trials, in the geometric mean; 1 where none was."""
    return geometric_mean(each.trial / each.speedup for each in judged) if judged else 1.0


@final
@dataclass(frozen=True, slots=True)
class _Settled:
    """What a search ends with.

    Attributes:
        answer: The answer.
        missed: What is to be said of limits that it does not meet.
        sure: Whether nothing disturbed its time.
        gap: The share of its losses that another answer may lose less, as far as is proved.
        speedup: In its trial; None where there was none.
    """

    answer: Answer
    missed: list[str]
    sure: bool
    gap: float
    speedup: float | None = None


def by_budget(
    survey: Survey,
    names: Sequence[str],
    asked: Sequence[Budget],
    prices: Prices,
    worth: float,
    whole: Whole | None,
    shown: Display,
    denied: Collection[Denied] = (),
    judged: Sequence[Judgement] = (),
) -> Budgeted:
    """The layers with these names, in the forms that lose least while the whole network stays within limits.

    Args:
        survey: The network.
        names: Its layers that may be decomposed.
        asked: The limits.
        prices: What forms lose. Layers that its calibration does not know stay dense, and those that no gradient reaches while
            others are reached: what they cost the answers is not known.
        worth: The share of the network's time that a layer must save to be decomposed.
        whole: Times the whole network; None where layers' times are not of this machine.
        shown: Shows how far it is.
        denied: What layers may not become.
        judged: What was judged of answers of before: these count as judged, trials of others as so much too fast or slow.
    """
    table = prices.table
    unknown = [name for name in names if not prices.knows(name)]
    blind = [name for name in names if name not in unknown and not prices.adds_up(name)]
    left = {"as the calibration knows nothing of them": unknown, "as no gradient reaches them": blind}
    dense = tuple(f"left dense, {why}: {listed([n or 'the network' for n in those])}" for why, those in left.items() if those)
    names = [name for name in names if name not in unknown and name not in blind]
    if not names:
        return Budgeted({}, dense, missed=("no layer can be decomposed",))
    kinds = survey.kinds(names)
    fronts = {kin: prices.front(kind) for kin, kind in kinds.items()}
    seconds: dict[Any, Seconds] = {}
    for kin, (name, *_) in shown.through(list(kinds.items()), "timing layers"):
        fitted = [form for form in candidates(survey.layers[name].geometry) if needs_fit(form)]
        coarse = worth_measuring(*fronts[kin], MOST_FORMS)
        seconds[kin] = _seconds(survey, name, [*dict.fromkeys([Dense(), *coarse, *fitted])], table)
    shares = whole.shares if whole else {}
    alone_s = sum(len(kind) * survey.weighted(seconds[kin][Dense()]) for kin, kind in kinds.items())
    # The whole's time by what its layers take alone: when those were timed, the machine was perhaps another than now.
    whole_s = alone_s / max(sum(shares.get(name, 0.0) for name in names), 0.01) if shares else alone_s
    limits = _limits(survey, asked, whole_s, whole)
    search = _Search(survey, kinds, fronts, seconds, prices, limits, whole_s, whole, shown, denied, judged)
    # Where the network is made of many small layers, no single one counts, and together they do.
    notes: list[str] = []
    sure = True
    answers: list[tuple[dict[str, tuple[Option, ...]], _Settled]] = []
    for least in dict.fromkeys((worth, 0.0)):
        answers.append((menu := search.refined(least), search.settled(menu)))
        sure = sure and answers[-1][1].sure
        if not answers[-1][1].missed:
            if least < worth:
                notes = [f"layers that save less than {worth:.1%} of the time each are decomposed too: the goal needs them"]
            break
    # Of two that miss the goal the faster one; the later one where neither was timed.
    menu, found = max(reversed(answers), key=lambda each: (not each[1].missed, each[1].speedup or 0.0))
    if found.gap > _GAP + _ROUNDING:
        notes.append(f"the solver's time was up: another choice within the budget may lose up to {found.gap:.1%} less")
    options = {name: menu[name][found.answer[name]] for name in names}
    planned = {name: _planned(survey, name, options[name], len(menu[name]), table) for name in names}
    layers = {name: prices.of_planned(name, layer) for name, layer in planned.items()}
    return Budgeted(layers, (*notes, *dense), tuple(found.missed), sure, found.speedup)


@final
@dataclass(frozen=True, slots=True)
class _Search:
    """For the forms of a network within limits.

    Attributes:
        survey: The network.
        kinds: Layers whose times are the same, by what they share.
        fronts: By kind the sizes and losses of the forms that may be timed.
        seconds: By kind what was timed; more as the search goes on.
        prices: What forms lose.
        limits: What the whole may cost.
        whole_s: Seconds of the dense network.
        whole: Times the whole network; None where it cannot be timed here.
        shown: Shows how far it is.
        denied: What layers may not become.
        judged: What was judged of answers of before.
    """

    survey: Survey
    kinds: Mapping[Any, Sequence[str]]
    fronts: Mapping[Any, tuple[dict[Form, int], dict[Form, float]]]
    seconds: dict[Any, Seconds]
    prices: Prices
    limits: Sequence[AnyLimit]
    whole_s: float
    whole: Whole | None
    shown: Display
    denied: Collection[Denied]
    judged: Sequence[Judgement]

    def refined(self, worth: float) -> dict[str, tuple[Option, ...]]:
        """What each layer may become, timed more finely around what would be chosen: the coarse forms lie far apart."""
        for _ in range(_FINER):
            menu = self._menu(worth)
            found = solve(_lost(menu, self.prices), list(self._rows(menu)), gap=_ROUGHLY)
            if found is None:
                return menu
            for kin, kind in self.shown.through(list(self.kinds.items()), "timing layers more finely"):
                chosen = dict.fromkeys(menu[name][found[name]].form for name in kind)
                finer = dict.fromkeys(form for each in chosen for form in _near(each, *self.fronts[kin], self.seconds[kin]))
                self.seconds[kin] |= _seconds(self.survey, kind[0], list(finer), self.prices.table)
        return self._menu(worth)

    def settled(self, menu: dict[str, tuple[Option, ...]]) -> _Settled:
        """The answer that meets the limits by measured time and loses least.

        Of a time that something else disturbed, only its interval counts: the budget is set anew where all of it lies beyond
        the goal, and then by the end that is nearer. Else it would follow the noise.
        """
        weighted = self.survey.weighted
        most_s = min((limit.value / 1e3 for limit in self.limits if isinstance(limit, Milliseconds)), default=None)
        tried: dict[tuple[int, ...], float] = {}
        speeds: dict[tuple[int, ...], float] = {}
        gaps: dict[tuple[int, ...], float] = {}
        unsure: set[tuple[int, ...]] = set()
        trials: list[Trial] = []
        while True:
            rows = list(self._rows(menu, in_place(trials)))
            solved, within = self._solved(menu, rows)
            answer, key = solved.options, tuple(solved.options.values())
            gaps.setdefault(key, solved.gap)
            if most_s is None or self.whole is None:
                asked = " and ".join(map(str, self.limits))
                slower = f"no choice of forms is within {asked} and makes no workload slower"
                return _Settled(answer, [] if within else self._beyond(menu, answer, self.limits) or [slower], True, solved.gap)
            if key in tried:
                break
            self.shown.say("timing the whole network", len(tried), _ROUNDS)
            trial = self.whole.trial(_forms(menu, answer))
            speeds[key] = ratio(*trial)
            speed, interval = self._as_judged(_forms(menu, answer), speeds[key], ratio_interval(*trial))
            if disturbed(interval):
                unsure.add(key)
            speed, (low, high) = known(speed, interval, self.whole_s / most_s), interval
            tried[key] = self.whole_s / speed
            decomposed = sum(map(bool, answer.values()))
            _LOG.info("the whole network, %d layers decomposed: ×%.3f", decomposed, speed)
            promised: dict[Hashable, float] = {}
            for name, number in answer.items():
                saved = weighted(menu[name][0].seconds) - weighted(menu[name][number].seconds)
                structure = menu[name][number].form.structure
                promised[structure] = promised.get(structure, 0.0) + saved
            met = (1 - CLOSE) * most_s <= tried[key] <= most_s
            if met or sum(promised.values()) <= 0 or len(tried) == _ROUNDS:
                break
            if not within and most_s < tried[key] > min(tried.values()):
                break  # out of reach, and what was learnt of the trials makes it no faster
            noise = max(tried[key] * (high - low) / speed / 4, _NOISE * self.whole_s)
            trials.append(Trial(promised, decomposed, self.whole_s - tried[key], noise))
        sizes = [limit for limit in self.limits if not isinstance(limit, Milliseconds)]
        within_sizes = {
            key: seconds for key, seconds in tried.items() if not self._beyond(menu, dict(zip(menu, key, strict=True)), sizes)
        }
        best, missed = _best(menu, within_sizes or tried, most_s, self.prices)
        key = tuple(best.values())
        return _Settled(best, [*missed, *self._beyond(menu, best, sizes)], key not in unsure, gaps[key], speeds[key])

    def _as_judged(
        self, forms: Mapping[str, Form], speed: float, interval: tuple[float, float]
    ) -> tuple[float, tuple[float, float]]:
        """The speed-up of a network, and its interval: as it was judged, or as a trial has it, put right by what was judged."""
        kept = {name: form for name, form in forms.items() if form != Dense()}
        for each in self.judged:
            if each.forms == kept:
                return each.speedup, each.interval
        low, high = interval
        return speed / lucky(self.judged), (low / lucky(self.judged), high / lucky(self.judged))

    def _beyond(self, menu: Menu, answer: Answer, limits: Sequence[AnyLimit]) -> list[str]:
        """What is to be said of those of some limits that an answer does not meet: what it comes to, and the least there is."""
        before = _taking(self.survey, self.whole_s)
        missed = []
        rows = self._rows(menu) if limits else ()
        for limit, row in zip(self.limits, rows, strict=False):  # what is late stands behind
            taken = limit.of(before) + row.of(answer)
            if limit in limits and taken > limit.value + _ROUNDING * limit.of(before):
                least = limit.of(before) + sum(map(min, row.costs.values()))
                missed.append((limit, type(limit)(least), type(limit)(taken)))
        if not missed:
            return []
        asked, best, found = (" and ".join(map(str, each)) for each in zip(*missed, strict=True))
        return [f"no choice of forms is within {asked}: the best that is reachable here is {best}; this one comes to {found}"]

    def _solved(self, menu: dict[str, tuple[Option, ...]], rows: Sequence[Row]) -> tuple[Solution, bool]:
        """The answer of least loss, and whether it is within the limits; else the one of least loss near the least cost.

        Forms in it whose loss was only guessed are fitted, and the menu is put right.
        """
        if all(row.most >= 0 for row in rows):
            return Solution(_dense(menu), 0.0), True
        for gap in (_ROUGHLY, _GAP):  # most surprises need no exact answer
            while True:
                lost = _lost(menu, self.prices)
                found = solution(lost, rows, gap=gap)
                eased = solution(lost, self._eased(menu, rows), gap=gap) if found is None else None
                answer = found or eased or Solution(_closest(menu, rows), 0.0)
                if not _surprised(self.prices, menu, answer.options):
                    break
        return answer, found is not None

    def _eased(self, menu: Menu, rows: Sequence[Row]) -> list[Row]:
        """Limits that can be met, somewhat above what the cheapest forms cost: the last of a speed-up costs most accuracy.

        It is `CLOSE` of what is left, but no more than `_SPARED` of what is saved: of 5 % that is all, 3 % is most.
        """
        cheapest = _closest(menu, rows)
        before = _taking(self.survey, self.whole_s)
        eased = []
        for row, limit in zip(rows, self.limits, strict=False):  # what is late stands behind
            reached = row.of(cheapest)
            spared = min(CLOSE * (limit.of(before) + reached), _SPARED * max(-reached, 0.0))
            eased.append(replace(row, most=max(row.most, reached + spared)))
        return [*eased, *rows[len(eased) :]]

    def _menu(self, worth: float) -> dict[str, tuple[Option, ...]]:
        least_s = self.whole_s * worth
        return {
            name: _options(self.survey, name, self._allowed(name, self.seconds[kin]), least_s, self.prices)
            for kin, kind in self.kinds.items()
            for name in kind
        }

    def _allowed(self, name: str, seconds: Seconds) -> Seconds:
        if (name, None) in self.denied:
            return {Dense(): seconds[Dense()]}
        return {form: each for form, each in seconds.items() if (name, form) not in self.denied}

    def _rows(self, menu: Menu, found: InPlace | None = None) -> Iterator[Row]:
        """The limits as sums over the layers of what each option adds to the dense layer's cost.

        Args:
            menu: The options.
            found: What layers save in their places of the time that they save alone.
        """
        survey, found = self.survey, found or InPlace()
        before = _taking(survey, self.whole_s)

        def costs(option: Option, limit: AnyLimit) -> float:
            timing = Timing(survey.weighted(option.seconds), 0.0, 1, survey.setting)
            return limit.of(Cost(option.parameters, option.macs, timing))

        def added(option: Option, dense: Option, limit: AnyLimit) -> float:
            if isinstance(limit, Milliseconds) and option.form != Dense():
                alone_s = survey.weighted(dense.seconds) - survey.weighted(option.seconds)
                return -1e3 * found.saved_s(option.form.structure, alone_s)
            return costs(option, limit) - costs(dense, limit)

        for limit in self.limits:
            yield Row(
                {name: [added(option, options[0], limit) for option in options] for name, options in menu.items()},
                limit.value - limit.of(before),
            )
        for number in range(len(survey.examples)):
            yield Row(
                {name: [o.seconds[number] - options[0].seconds[number] for o in options] for name, options in menu.items()},
                0.0,
                late=True,
            )


def _taking(survey: Survey, whole_s: float) -> Cost:
    """The cost of the dense network if it took so many seconds."""
    return replace(survey.before, timing=Timing(whole_s, 0.0, 1, survey.setting))


def _limits(survey: Survey, asked: Sequence[Budget], whole_s: float, whole: Whole | None) -> list[AnyLimit]:
    """What is asked for, its times as those of a network that takes ``whole_s``."""
    before = _taking(survey, whole_s)
    limits = [each.absolute(before) for each in asked]
    if whole is None or not any(isinstance(each, Milliseconds) for each in asked):
        return limits
    return [
        Milliseconds(limit.value * whole_s / whole.seconds()) if isinstance(each, Milliseconds) else limit
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


def _seconds(survey: Survey, name: str, forms: Sequence[Form], table: TimingTable) -> Seconds:
    by_workload = [survey.times(name, uses[name], table)(forms) if uses[name] else {} for uses in survey.seen.by_workload]
    return {form: tuple(each[form].median_s if each else 0.0 for each in by_workload) for form in forms}


def _options(
    survey: Survey, name: str, seconds: Mapping[Form, tuple[float, ...]], least_s: float, prices: Prices
) -> tuple[Option, ...]:
    """What a layer may become: dense, or what saves enough of the network's time and is not beaten in everything."""
    layer, uses = survey.layers[name], survey.seen.uses[name]
    dense_s = survey.weighted(seconds[Dense()])
    fast = [form for form in seconds if dense_s - survey.weighted(seconds[form]) >= least_s]
    lost = prices.of(name, [Dense(), *fast])  # dense loses nothing
    costs = {form: cost(layer.geometry, form, uses) for form in lost}
    options = [Option(form, loss, costs[form].parameters, costs[form].macs, seconds[form]) for form, loss in lost.items()]
    # What is only guessed beats nothing, and is beaten by nothing.
    guessed = [option for option in options if prices.guesses(name, option.form)]
    return (*undominated(option for option in options if option not in guessed), *guessed)


def _surprised(prices: Prices, menu: dict[str, tuple[Option, ...]], answer: Answer) -> bool:
    """Fit what was chosen on a guess; whether there was any. The menu is put right, guesses too: a fit betters those left."""
    chosen = [(name, form) for name, number in answer.items() if prices.guesses(name, form := menu[name][number].form)]
    for name, form in chosen:
        prices.fitted(name, form)
    if chosen:
        for name, options in menu.items():
            lost = prices.of(name, [option.form for option in options])
            menu[name] = tuple(replace(option, loss=lost[option.form]) for option in options)
    return bool(chosen)


def _best(menu: Menu, tried: Mapping[tuple[int, ...], float], most_s: float, prices: Prices) -> tuple[Answer, list[str]]:
    """Of the answers that were timed the one that loses least within the limit, or else the fastest."""
    enough = [key for key, seconds in tried.items() if seconds <= most_s * (1 + CLOSE)]
    if enough:
        lost = _lost(menu, prices)
        key = min(enough, key=lambda key: sum(each[i] for each, i in zip(lost.values(), key, strict=True)))
        return dict(zip(menu, key, strict=True)), []
    key = min(tried, key=lambda key: tried[key])
    # How fast it is, the rounds tell that judge it: these chose, and differ from those on a busy machine.
    return dict(zip(menu, key, strict=True)), [SLOWER]


def _dense(menu: Menu) -> dict[str, int]:
    return dict.fromkeys(menu, 0)


def _lost(menu: Menu, prices: Prices) -> dict[str, list[float]]:
    return {name: [prices.price(name, option.loss) for option in options] for name, options in menu.items()}


def _forms(menu: Menu, answer: Answer) -> dict[str, Form]:
    return {name: menu[name][number].form for name, number in answer.items()}


def _closest(menu: Menu, rows: Sequence[Row]) -> dict[str, int]:
    """The answer that costs least of what is limited, where no one is within the limits."""
    broken = [row for row in rows if not row.late]
    scales = [max((abs(c) for costs in row.costs.values() for c in costs), default=0.0) or 1.0 for row in broken]
    return {
        name: min(range(len(options)), key=lambda i: sum(r.costs[name][i] / s for r, s in zip(broken, scales, strict=True)))
        for name, options in menu.items()
    }


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
    )
