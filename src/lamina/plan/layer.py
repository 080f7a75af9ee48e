"""One layer of a plan: what it was, what it becomes, what that costs and what it loses."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, final

from pydantic import Field

from ..files import FileValue
from ..forms import AnyForm, Dense, Form
from ..values import Cost, Geometry, Use


@final
class PlannedLayer(FileValue):
    """One layer: what it was, what it becomes, and why.

    ``before`` and ``after`` count all calls of the example; their times are those of the calls on the machine in the plan's
    setting, None where nothing was timed. ``decided_by`` says whose choice it is: ``rule``, ``hand`` (obeyed as it stands) or
    ``never_slower`` (put back because the whole network was not faster with it). ``loss`` is the share of the weight that the
    form leaves out, where it was estimated. ``loss_of`` says what it is a share of: the weight's squared norm; by a calibration
    what it would cost the answers to lose all of it; or, where no gradient reaches the layer, its squared output. ``nats`` is
    what it costs the answers alone, nats of divergence for each item; None where nothing tells that.
    """

    geometry: Geometry
    uses: tuple[Use, ...]
    form: Annotated[AnyForm, Field(discriminator="form")]
    reason: str
    before: Cost
    after: Cost
    decided_by: Literal["rule", "hand", "never_slower"] = "rule"
    loss: float | None = Field(default=None, ge=0)
    loss_of: Literal["weight", "output", "answers"] = "weight"
    nats: float | None = Field(default=None, ge=0)

    @property
    def decomposed(self) -> bool:
        """Whether the layer does not stay dense."""
        return self.form != Dense()

    @property
    def lost(self) -> str:
        """``loses 0.0012 nats``, or without a calibration ``loses 23% of its norm``; empty where that is none or not known."""
        if not self.decomposed or self.loss is None:
            return ""
        if self.nats is not None:
            return f"loses {self.nats:.2g} nats"
        return f"loses {self.loss**0.5:.0%} of its {'output' if self.loss_of == 'output' else 'norm'}"

    def with_form(self, form: Form, reason: str, decided_by: Literal["rule", "hand", "never_slower"]) -> PlannedLayer:
        """The layer in another form; its time is then not known, unless it is dense again.

        Raises:
            RankError: The form does not fit.
        """
        form.check(self.geometry)
        timing = self.before.timing if form == Dense() else None
        after = dataclasses.replace(cost(self.geometry, form, self.uses), timing=timing)
        unpriced = {"loss": None, "loss_of": "weight", "nats": None}
        return self.model_copy(update={"form": form, "reason": reason, "after": after, "decided_by": decided_by, **unpriced})


def cost(layer: Geometry, form: Form, uses: tuple[Use, ...]) -> Cost:
    """Parameters and MACs of a layer in a form, over all its uses by their weights."""
    return Cost(form.parameters(layer), round(sum(use.weight * form.macs(layer, use) for use in uses)))
