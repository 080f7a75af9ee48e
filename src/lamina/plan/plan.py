"""Plan: for every layer the chosen form, why, and its cost before and after; and the layers refused, each with its reason.

A plan is a value. It is read, printed, edited, saved as JSON, loaded, and compared with another; no network is needed for that.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, final

from pydantic import Field

from ..curve import Curve, together
from ..errors import PlanError, RankError
from ..examples import ExampleShape
from ..files import FileValue, one_line, read_model, write_value
from ..folder import Saved
from ..forms import Form
from ..goals import Goal
from ..schedules import AnySchedule
from ..shown import Shown
from ..values import Setting, closest
from . import text
from .layer import PlannedLayer
from .record import FactorMethod, Scores, WholeModel

FORMAT = 2
"""2 is that of a saved network whose weights lie in several files; whatever else a plan holds is 1."""
MUCH = 0.3
"""Outputs that change by more, relative to their size, are seldom those of the same network for who uses them."""
MUCH_NATS = MUCH**2 / 2
"""The same in nats an item: of `Gaussian` answers the divergence is half of the squared relative change."""


@final
class Plan(Shown, FileValue):
    """Layer name → chosen form, with its evidence.

    Attributes:
        format: 2 in the ``plan.json`` of a saved network whose weights lie in several files, else 1.
        goal: What was asked for.
        rule: How ranks were chosen, as it prints.
        mode: Whether times are those of inference or of a training step.
        freezing: The freezing schedule over whose phases a training step was timed; None where all train.
        layers: Every layer that can be decomposed, dense ones included.
        refused: Every weighted module that cannot be, and why.
        fingerprint: Structure of the network that the plan is for; any weights of that network will do.
        setting: Conditions of all times in the plan; None where nothing was timed.
        whole: The whole network's cost, None where nothing was timed.
        put_back: Layers that `never_slower` made dense again, and why.
        examples: Shapes of the example or workloads.
        factors: How the factors are found.
        together: The calibration's curve, by which layers lose more at once than each alone (`lamina.curve.together`).
        scores: What the user's score says of the network that `decompose` makes of it, where there is one.
        notes: What the user should know first.
        shares: The share of a dense forward's time in each layer, refused module, and ``(type of other module)``; empty where
            the network was not timed here.
        saved: In the ``plan.json`` of a saved network, the weights that belong to it; `load` leaves it out.
    """

    format: Literal[1, 2] = 1
    goal: Annotated[Goal, Field(discriminator="goal")]
    rule: str
    mode: Literal["inference", "training"] = "inference"
    freezing: Annotated[AnySchedule, Field(discriminator="freezing")] | None = None
    layers: dict[str, PlannedLayer]
    refused: dict[str, str] = Field(default={})
    fingerprint: str
    setting: Setting | None = None
    whole: WholeModel | None = None
    put_back: dict[str, str] = Field(default={})
    examples: tuple[ExampleShape, ...] | None = None
    factors: FactorMethod = FactorMethod()
    together: Curve = Curve()
    scores: Scores | None = None
    notes: tuple[str, ...] = ()
    shares: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default={})
    saved: Saved | None = None

    def with_form(self, name: str, form: Form) -> Plan:
        """The plan with one layer in a form set by hand, which is then obeyed without asking the clock.

        Raises:
            PlanError: The layer is not in the plan, or is refused.
            RankError: The form does not fit the layer.
        """
        if name in self.refused:
            raise PlanError(f"{name}: cannot be decomposed: {self.refused[name]}")
        if name not in self.layers:
            raise PlanError(f"{name}: no such layer in this plan{closest(name, list(self.layers))}")
        try:
            changed = self.layers[name].with_form(form, "set by hand, not timed", "hand")
        except RankError as error:
            raise RankError(f"{name}: {error}") from error
        # Factors of the new plan are found anew: what was refined or fitted in sequence was another network.
        factors = self.factors.model_copy(update={"refined": (), "sequential": None})
        return self.model_copy(
            update={"layers": self.layers | {name: changed}, "whole": None, "scores": None, "factors": factors}
        )

    @property
    def decomposed(self) -> dict[str, PlannedLayer]:
        """The layers that do not stay dense."""
        return {name: layer for name, layer in self.layers.items() if layer.decomposed}

    @property
    def nats(self) -> float | None:
        """What the plan is predicted to cost the network's answers, nats of divergence for each item; None: not known.

        Layers lose more at once than each alone: more than the sum of theirs, by the curve ``together``.
        """
        each = [layer.nats for layer in self.decomposed.values()]
        return None if self.factors.calibration is None or None in each else self._known_nats

    @property
    def _known_nats(self) -> float:
        """What those layers cost the answers together of which it is known."""
        each = [layer.nats for layer in self.decomposed.values()]
        return together((nats for nats in each if nats is not None), self.together)

    @property
    def warning(self) -> str:
        """That the answers are likely to be others than the network's, which is said first; empty where nothing says so.

        It goes by what refining or a fit in sequence measured, or else by the predicted loss. Where none is known, and no score
        either, by the layers that lose more than `MUCH` of their weights, or of their outputs.
        """
        measured = self.factors.refined[-1] if self.factors.refined else self.factors.sequential
        nats = measured.after if measured else self._known_nats
        if nats > MUCH_NATS:
            told = f"{'lose' if measured else 'are predicted to lose'} {nats:.2g} nats an item"
            rest = "" if measured or self.nats is not None else " and more"
            return f"WARNING: the answers {told}{rest}, and {MUCH_NATS:.2g} is much: measure how accurate the network still is"
        lossy = [layer for layer in self.decomposed.values() if layer.nats is None and (layer.loss or 0.0) ** 0.5 > MUCH]
        if not lossy or self.scores or measured:
            return ""
        told = f"{len(lossy)} of {len(self.decomposed)} layers decomposed lose more than {MUCH} of their "
        told += "outputs" if lossy[0].loss_of == "output" else "norm"
        cure = "" if self.factors.calibration else ", or choose with data= (lamina.calibrate)"
        return (
            f"WARNING: {told}, and what that does to the answers is not known: measure how accurate the network still is{cure}"
        )

    def differences(self, other: Plan) -> dict[str, tuple[str, str]]:
        """What differs between two plans: layer → its form here and there, as printed; ``absent`` where it is not planned."""
        names = dict.fromkeys([*self.layers, *other.layers])
        forms = {
            name: tuple(str(p.layers[name].form) if name in p.layers else "absent" for p in (self, other)) for name in names
        }
        return {name: (here, there) for name, (here, there) in forms.items() if here != there}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file is there whole or not at all.

        Raises:
            PlanError: It cannot be written there.
        """
        write_value(path, (self.model_dump_json(indent=1) + "\n").encode(), PlanError, "the plan")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan, also that of a saved network.

        Raises:
            PlanError: No such file, cut short, of a newer format, or with a field that makes no sense; the message names it.
        """
        return cls.read(path).alone()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """The same, with what the file says of weights beside it."""
        plan = read_model(
            Path(path),
            cls,
            FORMAT,
            PlanError,
            unreadable=f"{path}: not a readable plan",
            foreign=f"{path}: not a plan: it has no format number",
        )
        plan.check(str(path))
        return plan

    def alone(self) -> Plan:
        """The plan without what it says of weights beside it."""
        return self.model_copy(update={"saved": None, "format": 1})

    def check(self, where: str = "plan") -> None:
        """Raise `PlanError` where a form does not fit the geometry beside it, or a freezing schedule not the mode."""
        if self.freezing and self.mode != "training":
            raise PlanError(f"{where}: freezing: a schedule belongs to a plan for training, and this one is for {self.mode}")
        for name, layer in self.layers.items():
            try:
                layer.form.check(layer.geometry)
            except RankError as error:
                raise PlanError(one_line(f"{where}: {name}: {error}")) from error

    def text(self, width: int = 80, *, reasons: bool = False) -> str:
        """The plan as it prints: what was achieved, a line for each kind of decomposed layer, and what else is to be known.

        Args:
            width: Columns that it takes at most, from 60 on, where no word is longer. Names of layers are shortened for it.
            reasons: Every layer by itself instead, with its whole name, what it was and why it is what it is.
        """
        return text.printed(self, width, reasons)

    def __str__(self) -> str:
        """The plan in 80 columns, without reasons; see `text`."""
        return self.text()

    def headline(self) -> str:
        """``speed-up 2, 8 of 12 layers decomposed, ×1.98``."""
        whole = self.whole
        timed = f", ×{whole.speedup:.2f}" if whole and whole.speedup else ""
        return f"{self.goal}, {len(self.decomposed)} of {len(self.layers)} layers decomposed{timed}"

    def summary(self) -> list[str]:
        """The lines beside the table: a warning, if there is one; totals, conditions, what was refused and put back."""
        return [*text.achieved(self), *text.conditions(self)]

    def accuracy(self) -> list[str]:
        """What is known of the accuracy, a line each: the score, what was predicted to be lost, and what refining won back."""
        return text.accuracy(self)

    def where(self) -> str:
        """Where the dense network's time goes, and what could be gained at best."""
        return text.where(self)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a plan file."""
    return Plan.model_json_schema()
