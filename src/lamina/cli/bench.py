"""``lamina bench``: time a network against its saved decomposition."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..artifact import load
from ..comparison import Comparison, compare
from .command import command
from .options import (
    Autocast,
    Conditions,
    Inputs,
    ModelName,
    RuntimeName,
    RuntimeOption,
    SavedFolder,
    Seconds,
    Timed,
    destination,
)


@command("lamina bench nets:network out/ --input 8,3,32,32 -o eager.json")
def bench(
    *,
    model: ModelName,
    folder: SavedFolder,
    inputs: Inputs,
    timed: Timed,
    seconds: Seconds = 2.0,
    runtime: RuntimeOption = RuntimeName.eager,
    output: Annotated[Path | None, destination("Write the result too, as JSON, for lamina report.")] = None,
    conditions: Conditions,
    autocast: Autocast = False,
) -> Comparison:
    """Load a saved network onto a fresh one and time both, interleaved."""
    small = load(conditions.load(model), folder).eval()
    network = conditions.load(model)
    with conditions.applied(autocast):
        examples = conditions.examples(inputs, network)
        result = compare(network, small, examples, mode=timed.value, seconds=seconds, runtime=runtime.value_of)
    if output:
        result.save(output)
    return result
