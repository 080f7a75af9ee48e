"""What a supernet is, without its weights: its layers, their forms, and what stays dense."""

from __future__ import annotations

from typing import Annotated, Literal, final

from pydantic import Field

from ..examples import ExampleShape
from ..files import FileValue
from ..folder import Saved
from ..forms import AnyForm
from ..layers.series import Method
from ..schedules import AnySchedule
from ..values import Cost, Geometry, Inference, Mode, Training, Use


@final
class SeriesPlan(FileValue):
    """A layer of a supernet: what it was, how the example uses it, its forms as offered, and how well each fits its weight.

    ``errors`` are the squared distances ``‖W − Ŵ‖²`` of the forms' fits before any training, in the order of the forms.
    """

    names: tuple[str, ...]
    geometry: Geometry
    uses: tuple[Use, ...]
    forms: tuple[Annotated[AnyForm, Field(discriminator="form")], ...]
    errors: tuple[float, ...] = ()


@final
class DensePlan(FileValue):
    """A layer that stays dense in every configuration, and why."""

    geometry: Geometry
    uses: tuple[Use, ...]
    reason: str


@final
class Blueprint(FileValue):
    """Everything about a supernet but its weights: what is written beside them.

    Attributes:
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
        saved: In a saved supernet, the weights that belong to it.
    """

    format: Literal[1] = 1
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
    saved: Saved | None = None

    @property
    def timing_mode(self) -> Mode:
        """The mode as a value."""
        return Training(freezing=self.freezing) if self.mode == "training" else Inference()
