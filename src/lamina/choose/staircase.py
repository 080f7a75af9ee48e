"""The staircase of one layer of a network: its time in each form, taken on the shapes that it really sees."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import GoalError, PlanError, RankError
from ..forms import Dense, Form, candidates
from ..measure.staircase import Staircase
from ..measure.table import TimingTable
from ..network.running import outside_inference_mode
from ..runtimes.runtime import Runtime
from ..values import Mode, closest
from .menu import worth_measuring
from .planner import Planner

_MOST = 96
"""Forms that are timed where none are named, about."""


@outside_inference_mode
def staircase(
    model: nn.Module,
    example: Any,
    layer: str,
    *,
    forms: Sequence[Form] | None = None,
    mode: Mode | None = None,
    timings: TimingTable | str | os.PathLike[str] | None = None,
    progress: bool = False,
    runtime: Runtime | None = None,
) -> Staircase:
    """Time one layer of a network in many forms: where its time falls in steps, and where a smaller form is no faster.

        >>> print(lamina.staircase(model, example, "layer3.0.conv2"))

    Args:
        model: A network; it is only read. A time needs shapes only, so its weights may be any.
        example: What it is fed; see `make_plan`.
        layer: The layer's name.
        forms: What to time; by default about 96 of the forms that a budget may choose among, of all sizes and kinds.
        mode: See `make_plan`.
        timings: See `make_plan`; times must be of this machine.
        progress: Show a progress bar.
        runtime: What will run it where it is served; see `make_plan`.

    Raises:
        PlanError: There is no such layer, or it is refused.
        RankError: A form does not fit it.
        GoalError: Times are of another machine.
        LaminaError: As `make_plan`.
    """
    with Planner.of(model, example, mode=mode, timings=timings, progress=progress, runtime=runtime) as planner:
        survey, table = planner.survey, planner.prices.table
        if planner.whole is None:
            raise GoalError("a staircase is measured, and these times are another machine's")
        if layer in survey.refused:
            raise PlanError(f"{layer}: cannot be decomposed: {survey.refused[layer]}")
        if layer not in survey.layers:
            raise PlanError(f"{layer}: no such layer in this network{closest(layer, list(survey.layers))}")
        geometry = survey.layers[layer].geometry
        if forms is None:
            sizes = {form: form.parameters(geometry) for form in candidates(geometry) if form != Dense()}
            forms = worth_measuring(sizes, {form: -size for form, size in sizes.items()}, _MOST)
        for form in forms:
            try:
                form.check(geometry)
            except RankError as error:
                raise RankError(f"{layer}: {error}") from error
        asked = [form for form in dict.fromkeys(forms) if form != Dense()]
        found = survey.times(layer, survey.seen.uses[layer], table)([Dense(), *asked])
        dense_s = found[Dense()].median_s
        return Staircase(geometry, dense_s, {form: found[form].median_s / dense_s for form in asked})
