"""``lamina calibrate``: what a network's layers are fed and what its answers depend on, saved in a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, final

import typer

from ..calibration.calibrate import calibrate as look
from ..calibration.calibration import Record
from ..calibration.outputs import Categorical, Gaussian, Outputs
from ..folder import size
from ..models import attribute
from .command import command
from .evidence import Data
from .finetune import called
from .options import Autocast, Conditions, Layers, ModelName, destination

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)b?", re.IGNORECASE)


def parse_size(text: str) -> float:
    """Read ``2GB``, ``500 MB`` or ``2000000000``.

    Raises:
        BadParameter: It says something else.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r}: write a number of bytes, such as 2GB or 500MB.")
    return float(found[1]) * _UNITS[found[2].lower()]


class OutputsName(StrEnum):
    """How outputs are read."""

    categorical = "categorical"
    gaussian = "gaussian"
    none = "none"

    def kind(self, dim: int | None) -> Outputs | None:
        """The value of this name.

        Raises:
            BadParameter: A dimension of classes goes with something else.
        """
        if dim is not None and self is not OutputsName.categorical:
            raise typer.BadParameter("--dim says where the classes are; it goes with --outputs categorical.")
        return {"categorical": Categorical(dim), "gaussian": Gaussian(), "none": None}[self.value]


@final
@dataclass(frozen=True, slots=True)
class Answers:
    """How the network's answers are read."""

    outputs: Annotated[
        OutputsName, typer.Option(help="categorical: class scores; gaussian: anything else; none: no gradients.")
    ] = OutputsName.gaussian
    dim: Annotated[
        int | None, typer.Option(metavar="N", help="Dimension of the classes: 1 for maps, -1 for sequences; (B, C) needs none.")
    ] = None
    loss: Annotated[
        str | None, typer.Option(metavar="FUNCTION", help="Instead: package.module:function from output to a scalar, a sum.")
    ] = None

    @property
    def value(self) -> Any:
        """As `calibrate` takes it."""
        return self.outputs.kind(self.dim) if self.loss is None else attribute(self.loss)


@final
@dataclass(frozen=True, slots=True)
class Calibrated:
    """What was saved."""

    folder: str
    bytes: int
    calibration: Record

    def __str__(self) -> str:
        """What is known, and where it is."""
        return f"{self.calibration}\n{self.folder}: {self.bytes / 1e6:.3g} MB"


@command("lamina calibrate nets:network --data nets:images --outputs categorical -o seen/")
def calibrate(
    *,
    model: ModelName,
    data: Data,
    output: Annotated[Path, destination("Where the calibration is saved.", "FOLDER")],
    answers: Answers,
    memory: Annotated[float, typer.Option(parser=parse_size, metavar="SIZE", help="What the sums may take.")] = "2GB",  # type: ignore[assignment]
    tolerance: Annotated[
        float, typer.Option(min=0, metavar="ERROR", help="Stop once each moment is known to it; 0: all data.")
    ] = 0.02,
    mask: Annotated[str | None, typer.Option(metavar="NAME", help="Keyword argument that says which positions count.")] = None,
    seed: Annotated[int, typer.Option(help="Of the answers that are drawn.")] = 0,
    autocast: Autocast = False,
    layers: Layers,
    conditions: Conditions,
) -> Calibrated:
    """See on unlabelled data what each layer of a network is fed and what its answers depend on."""
    network = conditions.load(model)
    with conditions.applied(autocast):
        found = look(
            network,
            called(data),
            outputs=answers.value,
            memory=memory,
            tolerance=tolerance or None,
            mask=mask,
            seed=seed,
            progress=True,
            **layers.patterns,
        )
    found.save(output)
    return Calibrated(str(output), size(output), found.record)
