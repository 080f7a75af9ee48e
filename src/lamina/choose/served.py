"""The watch of another runtime than eager PyTorch: whole networks as it runs them, layers as graphs of their own.

A runtime compiles a network as a whole. So the times that a layer takes in its place are those of its own graph: they put
nothing back, and the whole network has the last word, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

from torch import nn

from ..comparison import time_each
from ..forms import Dense, Form
from ..measure.clock import Effort
from ..measure.layer_times import sampled
from ..network.copying import shadow
from ..network.placing import placed
from ..network.preserve import repeatable
from ..network.walk import Layer
from ..runtimes.runtime import Once
from .never_slower import Forms, Pair, drawn
from .survey import Survey


@final
@dataclass(slots=True)
class ServedWatch:
    """Takes the times that `never_slower` judges by. A network is prepared once for all looks at it."""

    survey: Survey
    dense: nn.Module
    layers: Mapping[str, Layer]
    effort: Effort
    once: Once
    alone: ClassVar[bool] = True
    _small: tuple[Any, nn.Module] | None = field(default=None, init=False)

    def whole(self, forms: Forms) -> list[Pair]:
        """For each workload the times of the whole network, dense and with the forms, interleaved."""
        examples, both = self.survey.examples, [self.dense, self._with(forms)]
        effort = replace(self.effort, seconds=self.effort.seconds * len(examples))
        return [(before, after) for before, after in time_each(both, examples, self.survey.mode, effort, self.once)]

    def in_place(self, forms: Forms) -> dict[str, list[Pair]]:
        """For each layer and workload the seconds of its graph over all calls of one run, dense and in its form."""
        survey = self.survey
        known: dict[Any, list[Pair]] = {}
        for name, form in forms.items():
            key = survey.kin(name), form
            if key not in known:
                known[key] = [self._alone(name, form, uses.get(name, ())) for uses in survey.seen.by_workload]
        # What is added up over workloads must stand in rounds of one number.
        rounds = min((len(dense) for pairs in known.values() for dense, _ in pairs if dense), default=0)
        never = [0.0] * rounds
        found = {key: [(a[:rounds] or never, b[:rounds] or never) for a, b in pairs] for key, pairs in known.items()}
        return {name: found[survey.kin(name), form] for name, form in forms.items()}

    def _alone(self, name: str, form: Form, uses: Any) -> Pair:
        survey, layer = self.survey, self.layers[name]
        calls: list[list[list[float]]] = []
        for use in uses:
            times = sampled(
                layer,
                [Dense(), form],
                use,
                survey.seen.channels_last[name],
                survey.mode,
                Effort(0.3, 8, 40, precision=0.01),
                runtime=survey.runtime,
            )
            calls.append([[use.calls * seconds for seconds in times[each]] for each in (Dense(), form)])
        rounds = min((len(dense) for dense, _ in calls), default=0)
        dense, small = ([sum(each[at][number] for each in calls) for number in range(rounds)] for at in range(2))
        return dense, small

    def _with(self, forms: Forms) -> nn.Module:
        """The network with some layers in forms; the last one made is kept, and so is what was prepared of it."""
        if not forms:
            return self.dense
        key = frozenset(forms.items())
        if self._small is None or self._small[0] != key:
            if self._small is not None:
                self.once.forget(self._small[1])
            with repeatable(self.dense):
                self._small = key, shadow(self.dense, placed(drawn(self.layers[name], form) for name, form in forms.items()))
        return self._small[1]
