"""``lamina verify``: check every promise on a saved network."""

from __future__ import annotations

from typing import Annotated

import typer

from ..artifact import load
from ..verification import TARGETS, Verification
from ..verification import verify as check
from .command import Failure, command
from .options import Conditions, Inputs, ModelName, SavedFolder


@command("lamina verify nets:network out/ --input 8,3,32,32")
def verify(
    *,
    model: ModelName,
    folder: SavedFolder,
    inputs: Inputs,
    exports: Annotated[
        list[str] | None,
        typer.Option("--export", metavar="TARGET", help=f"Also take it there: {', '.join(TARGETS)}; may be repeated."),
    ] = None,
    conditions: Conditions,
) -> Verification | Failure:
    """Load a saved network onto a fresh one and check every promise; 1 where one does not hold."""
    with conditions.applied():
        small = load(conditions.load(model), folder).eval()
        network = conditions.load(model)
        found = check(network, small, conditions.examples(inputs, network), exports=tuple(exports or ()))
    broken = [one.promise for one in found.checks if not one.passed]
    if broken:
        return Failure(found, f"{len(broken)} of {len(found.checks)} promises do not hold: {', '.join(broken)}")
    return found
