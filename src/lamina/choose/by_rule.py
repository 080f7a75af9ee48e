"""Layer by layer: each distinct layer asks the rule for its form, from a ratio, its own times, and its weight perhaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, final

from ..factorize.metric import Metric
from ..forms import Dense, Form
from ..goals import Ratio
from ..measure.layer_times import LayerTimes
from ..measure.table import TimingTable
from ..network.walk import Layer
from ..plan import PlannedLayer, cost
from ..progress import Display
from ..values import Geometry, Timing, Use
from .ratio import aligned, path
from .rules import Choice, Rule
from .spectra import Spectrum, spectra
from .survey import Survey


def by_rule(
    survey: Survey,
    names: Sequence[str],
    goal: Ratio,
    beta: float | None,
    rule: Rule,
    metric: Callable[[str], Metric | None],
    table: TimingTable,
    shown: Display,
) -> tuple[dict[str, PlannedLayer], dict[str, PlannedLayer]]:
    """The layers with these names, each in the form that the rule takes; ``metric`` says what changes of a layer cost.

    The second are those that stay dense for their time alone, in the best form that the rule doubted.
    """
    planned: dict[str, PlannedLayer] = {}
    doubted: dict[str, PlannedLayer] = {}
    asked: dict[tuple[Any, ...], _Asked] = {}
    for name in shown.through(names, "timing layers"):
        uses, geometry = survey.seen.uses[name], survey.layers[name].geometry
        key = survey.kin(name)
        answer = asked.get(key)
        if answer is None:
            times = survey.times(name, uses, table)
            answer = _ask(survey.layers[name], goal, beta, rule, partial(metric, name), times)
        if not answer.of_its_weight:
            asked[key] = answer
        planned[name] = answer.planned(geometry, uses, answer.choice.form)
        if answer.choice.doubted is not None:
            doubted[name] = answer.planned(geometry, uses, answer.choice.doubted)
    return planned, doubted


@final
@dataclass(slots=True)
class _LayerQuestion:
    """A layer's question to a rule, answered from its times and its weight."""

    layer: Layer
    path: tuple[Form, ...]
    aligned: tuple[Form, ...]
    ratio: float
    metric: Callable[[], Metric | None]
    layer_times: LayerTimes
    seen: dict[Form, Timing] = field(default_factory=dict)
    weighed: bool = False

    @property
    def geometry(self) -> Geometry:
        return self.layer.geometry

    def spectra(self) -> tuple[Spectrum, ...]:
        self.weighed = True
        return spectra(self.layer, self.metric())

    def times(self, forms: Sequence[Form]) -> dict[Form, Timing]:
        found = self.layer_times(forms)
        self.seen |= found
        return found


@final
@dataclass(frozen=True, slots=True)
class _Asked:
    """A rule's choice for one distinct layer, the times it was based on, and whether the layer's own weight decided too."""

    choice: Choice
    times: dict[Form, Timing]
    of_its_weight: bool = False

    def planned(self, geometry: Geometry, uses: tuple[Use, ...], form: Form) -> PlannedLayer:
        before, after = (replace(cost(geometry, each, uses), timing=self.times.get(each)) for each in (Dense(), form))
        return PlannedLayer(
            geometry=geometry,
            uses=uses,
            form=form,  # type: ignore[arg-type]
            reason=self.choice.reason,
            before=before,
            after=after,
        )


def _ask(
    layer: Layer, goal: Ratio, beta: float | None, rule: Rule, metric: Callable[[], Metric | None], times: LayerTimes
) -> _Asked:
    steps = path(layer.geometry, goal.value, beta)
    if not steps:
        return _Asked(Choice(Dense(), f"no rank makes this layer {goal.value:g} times smaller"), {})
    question = _LayerQuestion(layer, steps, aligned(layer.geometry, steps), goal.value, metric, times)
    choice = rule.choose(question)
    return _Asked(choice, question.seen, question.weighed)
