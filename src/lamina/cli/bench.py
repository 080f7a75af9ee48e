"""``lamina bench``: time a network against its saved decomposition."""

from __future__ import annotations

from ..artifact import load
from ..comparison import Comparison, compare
from .command import command
from .options import Autocast, Conditions, Inputs, ModelName, RuntimeName, RuntimeOption, SavedFolder, Seconds, Timed


@command
def bench(
    *,
    model: ModelName,
    folder: SavedFolder,
    inputs: Inputs,
    timed: Timed,
    seconds: Seconds = 2.0,
    runtime: RuntimeOption = RuntimeName.eager,
    conditions: Conditions,
    autocast: Autocast = False,
) -> Comparison:
    """Load a saved network onto a fresh one and time both, interleaved."""
    small = load(conditions.load(model), folder).eval()
    network = conditions.load(model)
    with conditions.applied(autocast):
        examples = conditions.examples(inputs, network)
        return compare(network, small, examples, mode=timed.value, seconds=seconds, runtime=runtime.value_of)
