"""Options that tell what a network's answers depend on and how good they are: data, a calibration, a score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

import typer

from ..calibration.calibration import Calibration
from ..errors import GoalError
from ..models import attribute
from .finetune import called

_DATA = typer.Option(
    "--data", metavar="FUNCTION", show_default=False, help="package.module:function that returns batches of inputs."
)
Data = Annotated[str, _DATA]
"""Unlabelled data by the name of what returns them."""


@final
@dataclass(frozen=True, slots=True)
class Evidence:
    """Unlabelled data, or what was learnt of them."""

    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FUNCTION",
            show_default=False,
            help="package.module:function that returns batches of inputs. For class scores run lamina calibrate first.",
        ),
    ] = None
    calibration: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Instead: what lamina calibrate wrote.")] = None

    @property
    def value(self) -> Any:
        """As `make_plan` and `decompose` take it.

        Raises:
            BadParameter: Both are given.
            ModelError: There is no such function, or it fails.
            ArtifactError: The calibration cannot be read.
        """
        if self.data and self.calibration:
            raise typer.BadParameter("--data or --calibration, not both: a calibration is of data")
        if self.calibration:
            return Calibration.load(self.calibration)
        return called(self.data) if self.data else None


ScoreName = Annotated[
    str | None,
    typer.Option("--score", metavar="FUNCTION", help="package.module:function from a network to a number, higher is better."),
]


def score_named(name: str | None) -> Callable[[Any], Any] | None:
    """The function of a name.

    Raises:
        ModelError: There is none.
        GoalError: It is no function.
    """
    found = attribute(name) if name else None
    if found is not None and not callable(found):
        raise GoalError(f"{name} is a {type(found).__name__}; it must be a function from a network to a number")
    return found
