"""``lamina plan``: choose a form for every layer of a network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..choose.make_plan import make_plan
from ..comparison import whole_setting
from ..goals import Ratio
from ..measure.table import TimingTable
from ..plan import Plan
from .command import command
from .options import (
    Autocast,
    Conditions,
    Inputs,
    Layers,
    ModelName,
    ModeName,
    Modes,
    Output,
    RuleName,
    Rules,
    watched,
    writable,
)


@command
def plan(
    *,
    model: ModelName,
    inputs: Inputs,
    ratio: Annotated[float, typer.Option(help="Make each layer's weight this many times smaller, where that is faster.")],
    output: Output = None,
    rule: Rules = RuleName.plateau,
    mode: Modes = ModeName.inference,
    layers: Layers,
    never_slower: Annotated[bool, typer.Option(help="Time the whole network and put back what does not pay.")] = True,
    beta: Annotated[float | None, typer.Option(help="Rank out / rank in of Tucker-2; by default max(0.8 O / I, 1).")] = None,
    timings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Choose by the times in this file of lamina measure, taken elsewhere.")
    ] = None,
    conditions: Conditions,
    autocast: Autocast = False,
) -> Plan:
    """Choose a form for every layer of a network, by measured time."""
    goal = Ratio(ratio)
    if output:
        writable(output)
    # Exports alone: a table is of this machine, and the name of another file may be a slip.
    taken = TimingTable.imported(timings) if timings else None
    with conditions.applied(autocast):
        network = conditions.load(model)
        examples = conditions.examples(inputs, network)
        here = whole_setting(network, examples[0], mode.mode) if taken else None
        made = make_plan(
            network,
            examples,
            goal,
            rule=rule.rule,
            mode=mode.mode,
            beta=beta,
            **layers.patterns,
            never_slower=never_slower,
            timings=taken,
            progress=watched(),
        )
    if output:
        made.save(output)
    if taken and made.setting and made.setting != here:
        print("note: by times taken elsewhere; the whole network was not timed, lamina bench does so there", file=sys.stderr)
    return made
