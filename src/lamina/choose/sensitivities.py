"""Sensitivities: which layers cost what, in time and in loss, each looked at alone, by the times and prices of a budget."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from ..errors import GoalError
from ..forms import Dense, Form
from ..goals import Speedup
from ..measure.table import TimingTable
from ..network.running import outside_inference_mode
from ..plan import listed
from ..runtimes.runtime import Runtime
from ..shown import Shown
from .by_budget import MOST_FORMS
from .menu import worth_measuring
from .planner import Planner
from .prices import Prices

SPEEDUPS = (1.5, 2.0, 3.0)
"""Of each layer, where none is named."""
_MOST_SPEEDS = 4
"""Of which a table of 80 columns has room."""
_COLUMNS, _GAP = 80, "  "


@final
@dataclass(frozen=True, slots=True)
class Cut:
    """One layer made faster: the form that loses least of those that are so fast.

    Attributes:
        asked: How many times as fast the layer is to be, alone.
        form: The form.
        seconds: All its calls in one run of the example.
        saved: The share of the dense network's time that this saves.
        loss: The share of the weight that the form leaves out: of its squared norm, or with a calibration of what it would cost
            the answers to lose all of it, or where that has no gradients, of the layer's squared output.
        nats: What it is predicted to cost the answers, nats of divergence for each item; None without gradients.
    """

    asked: float
    form: Form
    seconds: float
    saved: float
    loss: float
    nats: float | None

    def __str__(self) -> str:
        """What it loses: nats, or where they are not known the share of the weight's, or of the output's, norm."""
        return f"{self.loss**0.5:.0%}" if self.nats is None else f"{self.nats:.2g}"


@final
@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """One layer: how much of the network's time it takes, and what it costs to make it faster.

    Attributes:
        share: The share of the dense network's time.
        seconds: All its calls in one run of the example, alone.
        cuts: One for each speed that some form reaches, the slowest first.
    """

    share: float
    seconds: float
    cuts: tuple[Cut, ...]


@final
@dataclass(frozen=True, slots=True, repr=False)
class Sensitivities(Shown):
    """What `sensitivities` found.

    Attributes:
        layers: By name, in the network's order.
        speedups: What was asked for, of each layer alone.
        refused: Every weighted module that cannot be decomposed, and why.
        unknown: Layers that the calibration's data never called, of which nothing can be told.
        blind: Layers that no gradient reaches, while others are reached: what they lose does not compare with those.
        calibration: The identity of the calibration that losses are of; None: of the weights alone.
        example: What the network was fed.
        conditions: Under which times were taken.
    """

    layers: Mapping[str, LayerSensitivity]
    speedups: tuple[float, ...]
    refused: Mapping[str, str]
    unknown: tuple[str, ...]
    blind: tuple[str, ...]
    calibration: str | None
    example: str
    conditions: str

    def at(self, speedup: float) -> dict[str, Cut]:
        """Layer name → what it costs to make it so much faster; layers that no form makes so fast are left out.

        Raises:
            GoalError: This was not asked for.
        """
        if speedup not in self.speedups:
            raise GoalError(f"a speed-up of {speedup!r} was not looked at, only {', '.join(map(_named, self.speedups))}")
        return {name: cut for name, layer in self.layers.items() for cut in layer.cuts if cut.asked == speedup}

    def __str__(self) -> str:
        """A table of at most 80 columns, a row a layer, and what its numbers mean."""
        rows = [
            ("", "", *(part for speedup in self.speedups for part in (_named(speedup), ""))),
            ("layer", "time", *("saves", "loses") * len(self.speedups)),
            *((name or "(the network)", f"{layer.share:.1%}", *self._cells(layer)) for name, layer in self.layers.items()),
        ]
        if self.calibration is None:
            lost = "a share of its weight's norm; what that does to the answers is not known"
        elif all(cut.nats is None for layer in self.layers.values() for cut in layer.cuts):
            lost = f"a share of its output, by calibration {self.calibration[:8]}; what that does to the answers is not known"
        else:
            lost = f"nats of divergence for each item, as calibration {self.calibration[:8]} predicts"
        told = [
            "time, saves: shares of the dense network's time",
            f"loses: {lost}",
            "–: no form makes the layer so fast",
            f"measured on {self.example}; {self.conditions}",
        ]
        if self.refused:
            told.append(f"refused, see lamina.make_plan: {listed([name or 'the network' for name in self.refused])}")
        if self.unknown:
            told.append(f"not told, as the calibration knows nothing of them: {listed(list(self.unknown))}")
        if self.blind:
            told.append(f"not told, as no gradient reaches them: {listed(list(self.blind))}")
        wrapped = [part for line in told for part in textwrap.wrap(line, _COLUMNS, subsequent_indent=_GAP)]
        return "\n".join([*_table(rows), "", *wrapped])

    def _cells(self, layer: LayerSensitivity) -> list[str]:
        cuts = {cut.asked: cut for cut in layer.cuts}
        each = [(f"{cuts[s].saved:.1%}", str(cuts[s])) if s in cuts else ("–", "–") for s in self.speedups]
        return [cell for pair in each for cell in pair]


@outside_inference_mode
def sensitivities(
    model: nn.Module,
    example: Any,
    *,
    data: Any = None,
    speedups: Sequence[float] = SPEEDUPS,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    timings: TimingTable | str | os.PathLike[str] | None = None,
    progress: bool = False,
    runtime: Runtime | None = None,
) -> Sensitivities:
    """Which layers of a network cost what, in time and in loss: each alone, made faster by the form that loses least.

        >>> print(lamina.sensitivities(model, example, data=calibration))

    The forms are those that a budget times first, but for groups, whose loss takes a fit; times and losses are the budget's own
    too, so a plan that follows takes them from the table. Nothing is decomposed, the network is only read.

    Args:
        model: A trained network, as it will be used.
        example: What it is fed; see `make_plan`.
        data: What `calibrate` returned for this network, or unlabelled data, calibrated on with `Gaussian`. Losses are then
            nats of divergence from the network's own answers; without, shares of each layer's weight, which do not compare
            between layers as well. A calibration without gradients gives shares of each layer's output.
        speedups: How many times as fast a layer is to be, alone: up to four numbers above 1.
        include: Patterns as in the shell; only layers matching one of them are looked at. Empty: all.
        skip: Patterns; layers matching one are left out.
        timings: See `make_plan`; times must be of this machine.
        progress: Show a progress bar.
        runtime: What will run it where it is served; see `make_plan`.

    Raises:
        GoalError: A speed-up makes no sense, there are too many, or times are of another machine.
        LaminaError: As `make_plan`.
    """
    asked = tuple(sorted({Speedup(each).value for each in speedups}))
    if not 1 <= len(asked) <= _MOST_SPEEDS:
        raise GoalError(f"speedups holds {len(asked)} numbers; give one to {_MOST_SPEEDS}")
    options: dict[str, Any] = {"data": data, "include": include, "skip": skip, "timings": timings}
    with Planner.of(model, example, **options, progress=progress, runtime=runtime) as planner:
        survey, prices = planner.survey, planner.prices
        if planner.whole is None:
            raise GoalError("shares of the network's time are measured, and these times are another machine's")
        shares, seen = planner.whole.shares, [name for name in survey.considered if prices.knows(name)]
        known = [name for name in seen if prices.adds_up(name)]
        found: dict[str, LayerSensitivity] = {}
        for kind in planner.shown.through(list(survey.kinds(known).values()), "timing layers"):
            forms = list(dict.fromkeys([Dense(), *worth_measuring(*prices.front(kind), MOST_FORMS)]))
            for name in kind:
                times = survey.times(name, survey.seen.uses[name], prices.table)(forms)
                seconds = {form: times[form].median_s for form in forms}
                found[name] = _looked_at(name, shares.get(name, 0.0), seconds, prices, asked)
        return Sensitivities(
            layers={name: found[name] for name in known},
            speedups=asked,
            refused=survey.refused,
            unknown=tuple(name for name in survey.considered if name not in seen),
            blind=tuple(name for name in seen if name not in known),
            calibration=planner.calibration.identity if planner.calibration else None,
            example=" and ".join(map(str, survey.examples)),
            conditions=str(survey.setting),
        )


def _looked_at(
    name: str, share: float, seconds: Mapping[Form, float], prices: Prices, asked: Sequence[float]
) -> LayerSensitivity:
    """A layer by the times and the losses of its forms."""
    dense_s, losses = seconds[Dense()], prices.of(name, seconds)

    def cut(speedup: float) -> Cut | None:
        fast = [form for form in seconds if form != Dense() and seconds[form] * speedup <= dense_s]
        if not fast:
            return None
        form = min(fast, key=lambda each: (losses[each], seconds[each]))
        nats = prices.price(name, losses[form]) if prices.in_nats(name) else None
        return Cut(speedup, form, seconds[form], share * (1 - seconds[form] / dense_s), losses[form], nats)

    return LayerSensitivity(share, dense_s, tuple(found for speedup in asked if (found := cut(speedup))))


def _named(speedup: float) -> str:
    return f"×{speedup:g}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns, numbers to the right; where names are too long for that, they stand in lines of their own."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    wide = sum(widths) + len(_GAP) * (len(widths) - 1) > _COLUMNS
    lines: list[str] = []
    for name, *cells in rows:
        right = _GAP.join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines += [name, _GAP + right] if wide and name else [_GAP + right] if wide else [f"{name:<{widths[0]}}{_GAP}{right}"]
    return [line.rstrip() for line in lines]
