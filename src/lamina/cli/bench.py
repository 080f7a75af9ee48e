"""``lamina bench``: time a network against its saved decomposition."""

from __future__ import annotations

from ..artifact import load
from ..comparison import Comparison, compare
from .command import command
from .options import Autocast, Conditions, Inputs, ModelName, SavedFolder, Seconds, Timed


@command
def bench(
    *,
    model: ModelName,
    folder: SavedFolder,
    inputs: Inputs,
    timed: Timed,
    seconds: Seconds = 2.0,
    conditions: Conditions,
    autocast: Autocast = False,
) -> Comparison:
    """Load a saved network onto a fresh one and time both, interleaved."""
    small = load(conditions.load(model), folder).eval()
    network = conditions.load(model)
    with conditions.applied(autocast):
        return compare(network, small, conditions.examples(inputs, network), mode=timed.value, seconds=seconds)
