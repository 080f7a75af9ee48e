"""``lamina pareto``: what each speed costs, measured and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..front.front import Front
from ..front.pareto import pareto as front_of
from .command import command
from .evidence import Evidence, ScoreName, score_named
from .options import Autocast, Conditions, Inputs, Layers, ModelName, RuntimeName, RuntimeOption, Seconds, Timed, destination


@command("lamina pareto nets:network --input 8,3,32,32 --calibration seen/ --ratio 2 -o front/")
def pareto(
    *,
    model: ModelName,
    inputs: Inputs,
    evidence: Evidence,
    score: ScoreName = None,
    speedup: Annotated[
        list[float] | None, typer.Option(help="A speed to look at; may be repeated. By default six, up to the fastest.")
    ] = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="The same ratio for every layer but the first and the last, beside the front; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None,
        destination("Where front.json and the plans are saved.", "FOLDER"),
    ] = None,
    plot: Annotated[Path | None, destination("Write score against speed as a picture.", "FILE", "--plot")] = None,
    timed: Timed,
    layers: Layers,
    seconds: Seconds = 2.0,
    runtime: RuntimeOption = RuntimeName.eager,
    conditions: Conditions,
    autocast: Autocast = False,
) -> Front:
    """Plan a network at several speeds, and measure and score what comes of each."""
    function = score_named(score)
    with conditions.applied(autocast):
        network = conditions.load(model)
        front = front_of(
            network,
            conditions.examples(inputs, network),
            data=evidence.value,
            score=function,
            speedups=speedup or None,
            ratios=ratio or (),
            mode=timed.value,
            seconds=seconds,
            progress=True,
            runtime=runtime.value_of,
            **layers.patterns,
        )
    if output:
        front.save(output)
    if plot:
        front.plot(plot)
    return front
