"""``lamina sensitivities``: which layers of a network cost what, in time and in loss."""

from __future__ import annotations

from typing import Annotated

import typer

from ..choose.sensitivities import SPEEDUPS, Sensitivities
from ..choose.sensitivities import sensitivities as look
from .command import command
from .evidence import Evidence
from .options import Autocast, Conditions, Inputs, Layers, ModelName, RuntimeName, RuntimeOption


@command("lamina sensitivities nets:network --input 8,3,32,32 --calibration seen/")
def sensitivities(
    *,
    model: ModelName,
    inputs: Inputs,
    evidence: Evidence,
    speedup: Annotated[
        list[float] | None, typer.Option(help="How many times as fast each layer is to be; may be repeated. 1.5, 2 and 3.")
    ] = None,
    layers: Layers,
    runtime: RuntimeOption = RuntimeName.eager,
    conditions: Conditions,
    autocast: Autocast = False,
) -> Sensitivities:
    """See which layers of a network cost what, in time and in loss, each alone made faster."""
    with conditions.applied(autocast):
        network = conditions.load(model)
        return look(
            network,
            conditions.examples(inputs, network),
            data=evidence.value,
            speedups=speedup or SPEEDUPS,
            progress=True,
            runtime=runtime.value_of,
            **layers.patterns,
        )
