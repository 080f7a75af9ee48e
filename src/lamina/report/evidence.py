"""What a report is made of: a plan, and what else was measured of the same network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

from ..artifact import PLAN
from ..comparison import Comparison
from ..errors import PlanError
from ..front.front import Front
from ..measure.staircase import Staircase
from ..measure.table import TimingTable, opened
from ..plan import Plan
from ..values import Geometry, Use


@final
@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a network and what it became.

    Attributes:
        plan: Its plan.
        model: The network's name, where it is known.
        source: Where the plan was read from.
        front: The same network at several speeds.
        comparisons: Whole networks that were timed against each other, in one runtime or several.
        staircases: By layer, times of the forms that were tried for it.
    """

    plan: Plan
    model: str = ""
    source: str = ""
    front: Front | None = None
    comparisons: tuple[Comparison, ...] = ()
    staircases: Mapping[str, Staircase] = field(default_factory=dict)


def gathered(
    source: Plan | str | os.PathLike[str],
    *,
    model: str = "",
    front: Front | str | os.PathLike[str] | None = None,
    comparisons: Sequence[Comparison | str | os.PathLike[str]] = (),
    timings: TimingTable | str | os.PathLike[str] | None = None,
) -> Evidence:
    """The evidence from the files in which it lies.

    Args:
        source: A plan, the file of one, or the folder of a saved network.
        model: The network's name, as the command line has it.
        front: What `pareto` made, or the folder that it was saved in.
        comparisons: What `compare` made, or files that `Comparison.save` or ``lamina bench -o`` wrote.
        timings: The table in which the layers' times are; the default one where there is none.

    Raises:
        PlanError: The plan or the front cannot be read, or the front is of another network.
        LaminaError: A comparison or the table cannot be read.
    """
    if isinstance(source, Plan):
        plan, where = source, ""
    else:
        path = Path(source)
        path = path / PLAN if path.is_dir() else path
        plan, where = Plan.load(path), str(source)
    if front is not None and not isinstance(front, Front):
        front = Front.load(front)
    if front and any(point.plan.fingerprint != plan.fingerprint for point in [*front.points, *front.uniform]):
        raise PlanError("the front is of another network than the plan: their fingerprints differ")
    compared = tuple(each if isinstance(each, Comparison) else Comparison.load(each) for each in comparisons)
    return Evidence(plan, model, where, front, compared, _staircases(plan, timings))


def _staircases(plan: Plan, timings: Any) -> dict[str, Staircase]:
    """By layer, on the input on which it computes most: those that are alike share theirs."""
    if plan.setting is None:
        return {}
    with opened(timings) as table:
        known = table.staircases(plan.setting)
    heaviest = {name: max(layer.uses, key=partial(_work, layer.geometry)) for name, layer in plan.layers.items() if layer.uses}
    found = {name: known.get((plan.layers[name].geometry, use.input_shape)) for name, use in heaviest.items()}
    return {name: staircase for name, staircase in found.items() if staircase}


def _work(layer: Geometry, use: Use) -> float:
    return use.calls * use.weight * use.laid_on(layer)
