"""Prices: what each form of a layer loses, from its weight alone or by what a calibration knows of it; remembered by both.

A loss is a share of the layer's weight: of its squared norm, or, as the moments of its calibration tell, of what it would cost
the answers to lose all of it. Where no gradient reaches the layer, these tell of its own output instead: a loss is then a share
of that. Losses of several layers add up by their prices, which are in nats or all of them shares: the two do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from statistics import median
from typing import Annotated, Any, final

import torch
from pydantic import Field, TypeAdapter

from ..calibration.calibration import Calibration
from ..factorize.metric import Metric
from ..forms import Form, candidates
from ..layers.build import losses, needs_fit, size_of
from ..measure.table import TimingTable
from ..network.walk import Layer
from ..plan import PlannedLayer, cost
from ..values import Geometry
from .remembered import digest, remembered
from .survey import Survey

_LEAST = 1e-6
"""A loss below which ratios of losses mean nothing."""
_METHOD = 2
"""Counts up when losses are found in another way, so that those found before do not answer."""
_LOSSES = TypeAdapter(list[Annotated[float, Field(ge=0, allow_inf_nan=False)]])


@final
@dataclass(frozen=True, slots=True)
class Prices:
    """What forms lose. A form whose loss takes a fit is guessed until it is chosen: a fit of a wide layer takes a minute.

    Ranks cost a spectrum, and are known of every layer. So a guess is what ranks of the same size lose in that layer, times
    what forms of the same structure lost compared with ranks where they were fitted: in layers of the same geometry, or else in
    all, the narrowest one to begin with. Each fit betters the guesses that are left.
    """

    survey: Survey
    table: TimingTable
    """Remembers losses beside times."""
    calibration: Calibration | None = None
    """None: losses are of the weights alone."""
    known: dict[tuple[str, Form], float] = field(default_factory=dict)
    """By layer and form."""
    sizes: dict[str, float] = field(default_factory=dict)
    """By layer: what the moments tell of losing all of its weight, in nats."""
    learnt: dict[Hashable, dict[Geometry, list[float]]] = field(default_factory=dict)
    """By structure and geometry of layers: what fitted forms lost, as multiples of what ranks of their size lose."""

    def identity(self) -> str:
        """What tells these prices from others: their calibration, or the weights that they are of."""
        if self.calibration is not None:
            return digest([_METHOD, _identity(self.calibration)])
        return digest([_METHOD, [_key(self.survey.layers[name], []) for name in self.survey.considered]])

    def of(self, name: str, forms: Iterable[Form]) -> dict[Form, float]:
        """Losses of forms in a layer, some of them guessed."""
        forms = list(forms)
        self._know(name, forms)
        return {form: self._guessed(name, form) if self.guesses(name, form) else self.fitted(name, form) for form in forms}

    def guesses(self, name: str, form: Form) -> bool:
        """Whether a form's loss in a layer would be a guess: it takes a fit, and was not fitted."""
        return needs_fit(form) and (name, form) not in self.known

    def knows(self, name: str) -> bool:
        """Whether it can be told what a layer loses: not where the calibration's data never called it."""
        return self.calibration is None or name in self.calibration.layers

    def in_nats(self, name: str) -> bool:
        """Whether a layer's prices are nats: a calibration has gradients of it."""
        return self.calibration is not None and self.knows(name) and self.calibration.layers[name].record.gradients

    def adds_up(self, name: str) -> bool:
        """Whether a layer's prices add up with others': not where no gradient reaches it, while others are reached."""
        return self.in_nats(name) or not any(map(self.in_nats, self.calibration.layers if self.calibration else ()))

    def of_planned(self, name: str, planned: PlannedLayer) -> PlannedLayer:
        """A planned layer with what it loses, if that is not in it yet."""
        if not planned.decomposed or planned.loss is not None or not self.knows(name):
            return planned
        loss = self.fitted(name, planned.form)
        of = "weight" if self.calibration is None else "answers" if self.in_nats(name) else "output"
        nats = self.price(name, loss) if self.in_nats(name) else None
        return planned.model_copy(update={"loss": loss, "loss_of": of, "nats": nats})

    def price(self, name: str, loss: float) -> float:
        """What the losses of several layers add up by: nats of divergence from the network's own answers, for each item.

        It goes along the layer's curve: a deep cut costs what was measured of one. Without a calibration, and where it has no
        gradients, it is `of_weights`.
        """
        if self.calibration is None or not self.in_nats(name):
            return of_weights(loss)
        return self.calibration.layers[name].curve.at(loss * self._size(name))

    def front(self, kind: Sequence[str]) -> tuple[dict[Form, int], dict[Form, float]]:
        """Sizes and prices of the forms of layers of one kind that need no fit, the prices added up over the layers.

        So these are offered the same forms, and share their times.
        """
        geometry, uses = self.survey.layers[kind[0]].geometry, self.survey.seen.uses[kind[0]]
        forms = [form for form in candidates(geometry) if not needs_fit(form)]
        total = dict.fromkeys(forms, 0.0)
        for name in kind:
            self._know(name, forms)
            for form in forms:
                total[form] += self.price(name, self.known[name, form])
        return {form: cost(geometry, form, uses).macs for form in forms}, total

    def fitted(self, name: str, form: Form) -> float:
        """What one form loses in a layer, fitted where it needs a fit."""
        if (name, form) not in self.known:
            (self.known[name, form],) = self._found(name, [form])
            if needs_fit(form):
                ratio = max(self.known[name, form], _LEAST) / max(self._of_ranks(name, form), _LEAST)
                by_geometry = self.learnt.setdefault(form.structure, {})
                by_geometry.setdefault(self.survey.layers[name].geometry, []).append(ratio)
        return self.known[name, form]

    def _guessed(self, name: str, form: Form) -> float:
        if form.structure not in self.learnt:
            self.fitted(*self._narrowest(name, form))
        by_geometry = self.learnt[form.structure]
        every = [ratio for each in by_geometry.values() for ratio in each]
        ratios = by_geometry.get(self.survey.layers[name].geometry, every)
        return min(median(ratios) * max(self._of_ranks(name, form), _LEAST), 1.0)

    def _narrowest(self, name: str, form: Form) -> tuple[str, Form]:
        """The smallest layer with a form of this structure, that layer and form themselves where there is no smaller one."""
        survey = self.survey
        offered = [n for n in survey.layers if n in survey.wanted and n not in survey.refused and self.knows(n)]
        alike = [
            (other, own)
            for other in [name, *offered]
            for own in candidates(survey.layers[other].geometry)
            if own.structure == form.structure
        ]
        return min(alike, key=lambda each: survey.layers[each[0]].geometry.parameters, default=(name, form))

    def _of_ranks(self, name: str, form: Form) -> float:
        """What the best ranks lose in a layer that take no more weights than a form; all of it where none are so small."""
        geometry = self.survey.layers[name].geometry
        ranks = [each for each in candidates(geometry) if not needs_fit(each)]
        self._know(name, ranks)
        size = form.parameters(geometry)
        return min((self.known[name, each] for each in ranks if each.parameters(geometry) <= size), default=1.0)

    def _know(self, name: str, forms: Sequence[Form]) -> None:
        """What forms lose that need no fit, where it is not known yet: one spectrum tells them all."""
        ranks = [form for form in forms if not needs_fit(form) and (name, form) not in self.known]
        if ranks:
            self.known.update({(name, form): loss for form, loss in zip(ranks, self._found(name, ranks), strict=True)})

    def _found(self, name: str, forms: Sequence[Form]) -> list[float]:
        layer = self.survey.layers[name]

        def find() -> list[float]:
            by_form = losses(layer, forms, self.metric(name))
            return [by_form[form] for form in forms]

        key = (
            _key(layer, forms) if self.calibration is None else digest([_METHOD, _identity(self.calibration), name, _as(forms)])
        )
        return remembered(self.table, "losses", key, _LOSSES, find, lambda known: len(known) == len(forms))

    def metric(self, name: str) -> Metric | None:
        """What changes of a layer cost, by its channels; None where nothing is known but its weight."""
        return _channels(self.calibration, name) if self.calibration is not None and self.knows(name) else None

    def _size(self, name: str) -> float:
        """What the moments tell of losing all of a layer's weight, in nats."""
        assert self.calibration is not None

        def find() -> list[float]:
            metric = self.metric(name)
            assert metric is not None
            return [size_of(self.survey.layers[name], metric) / 2]

        if name not in self.sizes:
            key = digest([_METHOD, _identity(self.calibration), name])
            self.sizes[name] = remembered(self.table, "sizes", key, _LOSSES, find, lambda known: len(known) == 1)[0]
        return self.sizes[name]


def of_weights(loss: float) -> float:
    """What losses of weights add up by: ``−log(1 − loss)``, so that what is kept multiplies.

    Half of a layer may go as well as a tenth of five; all of a layer may not.
    """
    return -math.log1p(-min(loss, 1 - 1e-9))


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
