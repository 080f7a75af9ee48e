"""Layer by layer: each distinct layer asks the rule for its form, from a ratio and its own times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from ..forms import Dense, Form
from ..goals import Ratio
from ..measure.layer_times import LayerTimes
from ..measure.table import TimingTable
from ..plan import PlannedLayer, cost
from ..progress import Display
from ..values import Geometry, Timing, Use
from .ratio import aligned, path
from .rules import Choice, Rule
from .survey import Survey


def by_rule(
    survey: Survey,
    names: Sequence[str],
    goal: Ratio,
    beta: float | None,
    rule: Rule,
    table: TimingTable,
    shown: Display,
) -> dict[str, PlannedLayer]:
    """The layers with these names, each in the form that the rule takes."""
    planned: dict[str, PlannedLayer] = {}
    asked: dict[tuple[Any, ...], _Asked] = {}
    for name in shown.through(names, "timing layers"):
        uses, geometry = survey.seen.uses[name], survey.layers[name].geometry
        key = survey.kin(name)
        if key not in asked:
            asked[key] = _ask(geometry, goal, beta, rule, survey.times(name, uses, table))
        planned[name] = asked[key].planned(geometry, uses)
    return planned


@final
@dataclass(slots=True)
class _LayerQuestion:
    """A layer's question to a rule, answered from its times."""

    geometry: Geometry
    path: tuple[Form, ...]
    aligned: tuple[Form, ...]
    layer_times: LayerTimes
    seen: dict[Form, Timing] = field(default_factory=dict)

    def times(self, forms: Sequence[Form]) -> dict[Form, Timing]:
        found = self.layer_times(forms)
        self.seen |= found
        return found


@final
@dataclass(frozen=True, slots=True)
class _Asked:
    """A rule's choice for one distinct layer, with the times it was based on."""

    choice: Choice
    times: dict[Form, Timing]

    def planned(self, geometry: Geometry, uses: tuple[Use, ...]) -> PlannedLayer:
        before, after = (
            replace(cost(geometry, form, uses), timing=self.times.get(form)) for form in (Dense(), self.choice.form)
        )
        return PlannedLayer(
            geometry=geometry,
            uses=uses,
            form=self.choice.form,  # type: ignore[arg-type]
            reason=self.choice.reason,
            before=before,
            after=after,
        )


def _ask(geometry: Geometry, goal: Ratio, beta: float | None, rule: Rule, times: LayerTimes) -> _Asked:
    steps = path(geometry, goal.value, beta)
    if not steps:
        return _Asked(Choice(Dense(), f"no rank makes this layer {goal.value:g} times smaller"), {})
    question = _LayerQuestion(geometry, steps, aligned(geometry, steps), times)
    return _Asked(rule.choose(question), question.seen)
