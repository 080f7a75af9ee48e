"""What a supernet is, without its weights: its layers, their forms, and what stays dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, final

from pydantic import Field

from ..examples import ExampleShape
from ..files import FileValue
from ..folder import Saved
from ..forms import AnyForm, Form
from ..layers.series import Method
from ..schedules import AnySchedule
from ..values import Cost, Geometry, Inference, Mode, Training, Use


@final
class SeriesPlan(FileValue):
    """A layer of a supernet: what it was, how the example uses it, its forms as offered, and how well each fits its weight.

    Attributes:
        errors: The squared distances ``‖W − Ŵ‖²`` of the forms' fits before any training, in the order of the forms.
        losses: What the network loses by each form alone, in the same order, as `Blueprint.lost` says.
    """

    names: tuple[str, ...]
    geometry: Geometry
    uses: tuple[Use, ...]
    forms: tuple[Annotated[AnyForm, Field(discriminator="form")], ...]
    errors: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()


@final
class DensePlan(FileValue):
    """A layer that stays dense in every configuration, and why."""

    geometry: Geometry
    uses: tuple[Use, ...]
    reason: str


@final
class Step(FileValue):
    """A step of a nested order: a layer takes a cheaper form."""

    layer: str
    form: Annotated[AnyForm, Field(discriminator="form")]


@final
class Order(FileValue):
    """A nested order: where it starts, and its steps. Every prefix is a configuration."""

    start: dict[str, Annotated[AnyForm, Field(discriminator="form")]]
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, configs: Sequence[Mapping[str, Form]]) -> Order:
        """The order of configurations, each one step away from the one before."""
        steps = [
            Step(layer=name, form=after[name])  # type: ignore[arg-type]
            for before, after in pairwise(configs)
            for name in after
            if before[name] != after[name]
        ]
        return cls(start=dict(configs[0]), steps=tuple(steps))  # type: ignore[arg-type]

    @property
    def configurations(self) -> list[dict[str, Form]]:
        """Every configuration of the order, the one that loses least first."""
        found: list[dict[str, Form]] = [dict(self.start)]
        for step in self.steps:
            found.append(found[-1] | {step.layer: step.form})
        return found


@final
class Blueprint(FileValue):
    """Everything about a supernet but its weights: what is written beside them.

    Attributes:
        format: 1 where a lamina before losses, orders and times were kept has written it.
        base: The name of the network it was made from, as the command line takes it; None where it was made in Python.
        method: How group counts follow one another in a series.
        normalise: Whether gradients of shared entries are divided by the number of terms that share them.
        mode: Whether times are those of inference or of a training step.
        freezing: The schedule over whose phases a training step is timed.
        fingerprint: Structure of the network it was made from.
        layers: The layers that became series.
        dense: The layers that stay dense.
        refused: Every weighted module that cannot be decomposed, and why.
        whole: Cost of the network it was made from.
        examples: Shapes of the example or workloads.
        lost: What the layers' losses are of: ``"weights"``, ``−log(1 − share of the squared norm)``; ``"calibration"``, nats of
            divergence from the original's answers, predicted for the fits; ``"answers"``, the same measured in the supernet.
        order: The nested order that it was trained along, if any.
        times: In a saved supernet, what `Space.times` says, and under which conditions.
        saved: In a saved supernet, the weights that belong to it.
    """

    format: Literal[1, 2] = 2
    base: str | None = None
    method: Method = "nested"
    normalise: bool = True
    mode: Literal["inference", "training"] = "inference"
    freezing: Annotated[AnySchedule, Field(discriminator="freezing")] | None = None
    fingerprint: str
    layers: dict[str, SeriesPlan]
    dense: dict[str, DensePlan] = Field(default={})
    refused: dict[str, str] = Field(default={})
    whole: Cost
    examples: tuple[ExampleShape, ...] = ()
    lost: Literal["weights", "calibration", "answers"] = "weights"
    order: Order | None = None
    times: dict[str, Any] | None = None
    saved: Saved | None = None

    @property
    def timing_mode(self) -> Mode:
        """The mode as a value."""
        return Training(freezing=self.freezing) if self.mode == "training" else Inference()
