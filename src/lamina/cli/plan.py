"""``lamina plan``: choose a form for every layer of a network."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

import typer

from ..choose.make_plan import make_plan
from ..comparison import whole_setting
from ..goals import Drop, Goal, Ratio, within
from ..measure.table import TimingTable
from .command import Told, command
from .evidence import Evidence, ScoreName, score_named
from .options import (
    Autocast,
    Budgets,
    Conditions,
    Inputs,
    Layers,
    ModelName,
    Output,
    Reasons,
    RuleIfAny,
    RuntimeName,
    RuntimeOption,
    Timed,
    told,
)


@final
@dataclass(frozen=True, slots=True)
class Goals(Budgets):
    """What is asked for: limits on the whole network, a drop of its score, or a ratio for each layer."""

    drop: Annotated[float | None, typer.Option(help="Or: as fast as it can be while --score falls by no more than this.")] = (
        None
    )
    ratio: Annotated[
        float | None, typer.Option(help="Or make each layer's weight this many times smaller, where that is faster.")
    ] = None

    @property
    def goal(self) -> Goal:
        """As `make_plan` takes it."""
        limits = self.limits
        alone: list[Goal] = [kind(value) for kind, value in ((Drop, self.drop), (Ratio, self.ratio)) if value is not None]
        if bool(limits) + len(alone) != 1:
            raise typer.BadParameter(
                "say what is wanted: --speedup, --milliseconds, --macs, --parameters, or alone --drop or --ratio"
            )
        return within(limits) if limits else alone[0]


@command("lamina plan nets:network --input 8,3,32,32 --speedup 1.5 --calibration seen/ -o plan.json")
def plan(
    *,
    model: ModelName,
    inputs: Inputs,
    goals: Goals,
    evidence: Evidence,
    score: ScoreName = None,
    output: Output = None,
    reasons: Reasons = False,
    rule: RuleIfAny = None,
    timed: Timed,
    layers: Layers,
    never_slower: Annotated[bool, typer.Option(help="Time the whole network and put back what does not pay.")] = True,
    beta: Annotated[float | None, typer.Option(help="Rank out / rank in of Tucker-2; by default max(0.8 O / I, 1).")] = None,
    timings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Choose by the times in this file of lamina measure, taken elsewhere.")
    ] = None,
    runtime: RuntimeOption = RuntimeName.eager,
    conditions: Conditions,
    autocast: Autocast = False,
) -> Told:
    """Choose a form for every layer of a network, by measured time."""
    goal = goals.goal
    function = score_named(score)
    # Exports alone: a table is of this machine, and the name of another file may be a slip.
    taken = TimingTable.imported(timings) if timings else None
    with conditions.applied(autocast):
        network = conditions.load(model)
        examples = conditions.examples(inputs, network)
        here = whole_setting(network, examples[0], timed.value, runtime.value_of) if taken else None
        made = make_plan(
            network,
            examples,
            goal,
            rule=rule,
            mode=timed.value,
            beta=beta,
            **layers.patterns,
            never_slower=never_slower,
            data=evidence.value,
            score=function,
            timings=taken,
            progress=True,
            runtime=runtime.value_of,
        )
    if output:
        made.save(output)
    if taken and made.setting and made.setting != here:
        print("note: by times taken elsewhere; the whole network was not timed, lamina bench does so there", file=sys.stderr)
    return told(made, reasons)
