"""Prices: what each form of a layer loses; remembered by the digest of its weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, final

import torch
from pydantic import Field, TypeAdapter

from ..forms import Form, candidates
from ..layers.build import losses, needs_fit
from ..measure.table import TimingTable
from ..network.walk import Layer
from ..plan import cost
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
            for form, loss in zip(forms, self._found(name, forms), strict=True):
                self.known[name, form] = loss
                total[form] += loss
        return {form: cost(geometry, form, uses).macs for form in forms}, total

    def fitted(self, name: str, form: Form) -> float:
        """What a form that needs a fit loses in a layer."""
        if (name, form) not in self.known:
            (self.known[name, form],) = self._found(name, [form])
        return self.known[name, form]

    def _found(self, name: str, forms: Sequence[Form]) -> list[float]:
        layer = self.survey.layers[name]

        def find() -> list[float]:
            by_form = losses(layer, forms)
            return [by_form[form] for form in forms]

        return remembered(self.table, "losses", _key(layer, forms), _LOSSES, find, lambda known: len(known) == len(forms))


def _key(layer: Layer, forms: Sequence[Form]) -> str:
    """Of a weight's values and of what is asked about them."""
    weight = layer.weight.detach().cpu().contiguous()
    asked = [_METHOD, str(weight.dtype), asdict(layer.geometry), [asdict(form) for form in forms]]  # type: ignore[call-overload]
    return digest(asked, weight.flatten().view(torch.uint8).numpy().data)
