"""A second look at forms that are no faster alone, in a runtime that compiles networks as a whole.

There a layer's time alone is that of a graph of its own, at whose ends maps lie as they would not between its neighbours. So a
rule that goes by it may leave a layer dense whose form would pay in its place: the whole network tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..forms import Form
from ..measure.clock import ratio, ratio_interval
from ..plan import PlannedLayer
from .never_slower import MARGIN, Pair


class Trials(Protocol):
    """What times whole networks, see `Whole`."""

    def trial(self, forms: Mapping[str, Form]) -> Pair:
        """Seconds dense and with some layers in forms, round by round."""


def with_doubted(
    whole: Trials, planned: Mapping[str, PlannedLayer], doubted: Mapping[str, PlannedLayer]
) -> dict[str, PlannedLayer]:
    """The layers as planned, and some in forms that were doubted where the whole network is faster with them beyond doubt.

    Tried are all of them, and where they do not pay half of them, those that took the least time alone, and again half.

    Args:
        whole: Times whole networks.
        planned: The layers, as a rule chose by times alone.
        doubted: Those that it left dense, in the best form that it looked at.
    """
    order = sorted(doubted, key=lambda name: _alone(doubted[name]))
    chosen: dict[str, Form] = {name: layer.form for name, layer in planned.items() if layer.decomposed}
    without = ratio(*whole.trial(chosen)) if order and chosen else 1.0
    while order:
        rounds = whole.trial(chosen | {name: doubted[name].form for name in order})
        if ratio_interval(*rounds)[0] > without * (1 + MARGIN):
            told = f"such layers make the whole network ×{ratio(*rounds):.2f}, without them it is ×{without:.2f}"
            return {**planned, **{name: _in_its_place(doubted[name], told) for name in order}}
        order = order[: len(order) // 2]
    return dict(planned)


def _alone(layer: PlannedLayer) -> float:
    """The share of the dense layer's time that it takes in its form, alone."""
    assert layer.before.timing and layer.after.timing, "a rule doubts what it timed"
    return layer.after.timing.median_s / layer.before.timing.median_s


def _in_its_place(layer: PlannedLayer, told: str) -> PlannedLayer:
    reason = f"{layer.form} takes {_alone(layer):.2f} of the dense time alone, and pays in its place: {told}"
    return layer.model_copy(update={"reason": reason})
