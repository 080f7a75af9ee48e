"""``lamina staircase``: what one layer takes in each of its forms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..choose.staircase import staircase as staircase_of
from ..measure.staircase import Staircase
from .command import command
from .options import Autocast, Conditions, Inputs, ModelName, RuntimeName, RuntimeOption, Timed, destination


@command("lamina staircase nets:network 2 --input 8,3,32,32 --plot staircase.png")
def staircase(
    *,
    model: ModelName,
    layer: Annotated[str, typer.Argument(metavar="LAYER", help="The layer's name.")],
    inputs: Inputs,
    plot: Annotated[Path | None, destination("Write time against weights as a picture.", "FILE", "--plot")] = None,
    timed: Timed,
    runtime: RuntimeOption = RuntimeName.eager,
    conditions: Conditions,
    autocast: Autocast = False,
) -> Staircase:
    """See where the time of one layer falls in steps, and where a smaller form is no faster."""
    with conditions.applied(autocast):
        network = conditions.load(model)
        examples = conditions.examples(inputs, network)
        found = staircase_of(network, examples, layer, mode=timed.value, progress=True, runtime=runtime.value_of)
    if plot:
        found.plot(plot)
    return found
