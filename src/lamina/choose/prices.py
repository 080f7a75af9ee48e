"""Prices: what each form of a layer loses, from its weight alone or by what a calibration knows of it; remembered by both.

A loss is a share of the layer's weight: of its squared norm, or of what it would cost the answers to lose all of it, in nats.
Losses of several layers add up by their prices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Annotated, Any, final

import torch
from pydantic import Field, TypeAdapter

from ..calibration.calibration import Calibration
from ..factorize.metric import Metric
from ..forms import Form, candidates
from ..layers.build import losses, needs_fit
from ..measure.table import TimingTable
from ..network.walk import Layer
from ..plan import PlannedLayer, cost
from .remembered import digest, remembered
from .survey import Survey

_HOPE = 0.9
"""By how much less a form is taken to lose than it did in another layer of the same kind, until it is fitted itself."""
_METHOD = 1
"""Counts up when losses are found in another way, so that those found before do not answer."""
_LOSSES = TypeAdapter(list[Annotated[float, Field(ge=0, allow_inf_nan=False)]])


@final
@dataclass(frozen=True, slots=True)
class Prices:
    """What forms lose. A form whose loss takes a fit is fitted in one layer of each kind, and elsewhere once it was chosen."""

    survey: Survey
    table: TimingTable
    """Remembers losses beside times."""
    calibration: Calibration | None = None
    """None: losses are of the weights alone."""
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

    def knows(self, name: str) -> bool:
        """Whether it can be told what a layer loses: not where the calibration's data never called it."""
        return self.calibration is None or name in self.calibration.layers

    def of_planned(self, name: str, planned: PlannedLayer) -> PlannedLayer:
        """A planned layer with what it loses."""
        if not planned.decomposed or not self.knows(name):
            return planned
        loss = self.fitted(name, planned.form)
        nats = None if self.calibration is None else self.price(name, loss)
        return planned.model_copy(update={"loss": loss, "nats": nats})

    def price(self, name: str, loss: float) -> float:
        """What the losses of several layers add up by: nats of divergence from the network's own answers, for each item.

        Without a calibration ``−log(1 − loss)``, so that what is kept multiplies: half of a layer may go as well as a tenth of
        five; all of a layer may not.
        """
        if self.calibration is None:
            return -math.log1p(-min(loss, 1 - 1e-9))
        return loss * self._size(name)

    def front(self, kind: Sequence[str]) -> tuple[dict[Form, int], dict[Form, float]]:
        """Sizes and losses of the forms of layers of one kind that need no fit, the losses added up over the layers.

        So these are offered the same forms, and share their times.
        """
        geometry, uses = self.survey.layers[kind[0]].geometry, self.survey.seen.uses[kind[0]]
        forms = [form for form in candidates(geometry) if not needs_fit(form)]
        total = dict.fromkeys(forms, 0.0)
        for name in kind:
            size = self._size(name)
            for form, loss in zip(forms, self._found(name, forms), strict=True):
                self.known[name, form] = loss
                total[form] += loss * size
        return {form: cost(geometry, form, uses).macs for form in forms}, total

    def fitted(self, name: str, form: Form) -> float:
        """What one form loses in a layer, fitted where it needs a fit."""
        if (name, form) not in self.known:
            (self.known[name, form],) = self._found(name, [form])
        return self.known[name, form]

    def _found(self, name: str, forms: Sequence[Form]) -> list[float]:
        layer = self.survey.layers[name]

        def find() -> list[float]:
            by_form = losses(layer, forms, self._metric(name))
            return [by_form[form] for form in forms]

        key = (
            _key(layer, forms) if self.calibration is None else digest([_METHOD, _identity(self.calibration), name, _as(forms)])
        )
        return remembered(self.table, "losses", key, _LOSSES, find, lambda known: len(known) == len(forms))

    def _metric(self, name: str) -> Metric | None:
        return None if self.calibration is None else _channels(self.calibration, name)

    def _size(self, name: str) -> float:
        """What it would cost to lose all of a layer's weight; without a calibration they all count alike."""
        if self.calibration is None:
            return 1.0

        def find() -> list[float]:
            metric = self._metric(name)
            assert metric is not None
            return [metric.error(self.survey.layers[name].weight.detach()) / 2]

        key = digest([_METHOD, _identity(self.calibration), name])
        return remembered(self.table, "sizes", key, _LOSSES, find, lambda known: len(known) == 1)[0]


@lru_cache(maxsize=1)
def _identity(calibration: Calibration) -> str:
    return calibration.identity


@lru_cache(maxsize=1)
def _channels(calibration: Calibration, name: str) -> Metric:
    return calibration.layers[name].metric(patches=False)


def _key(layer: Layer, forms: Sequence[Form]) -> str:
    """Of a weight's values and of what is asked about them."""
    weight = layer.weight.detach().cpu().contiguous()
    asked = [_METHOD, str(weight.dtype), asdict(layer.geometry), _as(forms)]
    return digest(asked, weight.flatten().view(torch.uint8).numpy().data)


def _as(forms: Sequence[Form]) -> list[dict[str, Any]]:
    return [asdict(form) for form in forms]  # type: ignore[call-overload]
