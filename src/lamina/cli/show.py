"""``lamina show``: print a plan, or what differs between two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

import typer

from ..plan import Plan
from .command import Told, command
from .options import PlanFile, Reasons, told


@final
@dataclass(frozen=True, slots=True)
class Differences:
    """Layer → its form in the first plan and in the second."""

    layers: dict[str, tuple[str, str]]

    def __str__(self) -> str:
        """A line a layer."""
        if not self.layers:
            return "no layer differs"
        return "\n".join(f"{name or '(the network)'}: {here} | {there}" for name, (here, there) in self.layers.items())


@command("lamina show plan.json --reasons")
def show(
    *,
    plan: PlanFile,
    other: Annotated[Path | None, typer.Argument(metavar="OTHER", help="A second plan: what differs is shown.")] = None,
    reasons: Reasons = False,
) -> Told | Differences:
    """Print a plan; of two, the layers whose forms differ."""
    first = Plan.load(plan)
    return Differences(first.differences(Plan.load(other))) if other else told(first, reasons)
