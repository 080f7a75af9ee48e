"""``lamina measure``: time a network's layers here, for plans that are made elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

import typer

from ..choose.make_plan import make_plan
from ..errors import LaminaError
from ..goals import Ratio
from ..measure.table import TimingTable, default_path
from ..values import Setting
from .command import command
from .options import Autocast, Conditions, Inputs, Layers, ModelName, RuleIfAny, RuntimeName, RuntimeOption, Timed, destination


@final
@dataclass(frozen=True, slots=True)
class Measured:
    """What was written: the file, the number of times in it, and the conditions."""

    file: str
    times: int
    setting: Setting

    def __str__(self) -> str:
        """Two lines."""
        return f"{self.file}: {self.times} times\nmeasured on {self.setting}"


@command("lamina measure nets:network --input 8,3,32,32 --ratio 2 -o times.json")
def measure(
    *,
    model: ModelName,
    inputs: Inputs,
    output: Annotated[Path, destination("Where the times go.")],
    ratio: Annotated[list[float] | None, typer.Option(help="Of the plans to be made; 2 by default; may be repeated.")] = None,
    rule: RuleIfAny = None,
    timed: Timed,
    layers: Layers,
    runtime: RuntimeOption = RuntimeName.eager,
    conditions: Conditions,
    autocast: Autocast = False,
) -> Measured:
    """Time here the forms that lamina plan would ask for, and write the times to a file for its --timings elsewhere."""
    if rule and not rule.timed:
        raise typer.BadParameter(f"{rule} times nothing: there is nothing to measure for its plans")
    goals = [Ratio(value) for value in ratio or [2.0]]
    with conditions.applied(autocast), TimingTable(default_path()) as table:
        network = conditions.load(model)
        examples = conditions.examples(inputs, network)
        setting: Setting | None = None
        found = False
        for goal in goals:
            plan = make_plan(
                network,
                examples,
                goal,
                rule=rule,
                mode=timed.value,
                **layers.patterns,
                never_slower=False,
                timings=table,
                progress=True,
                runtime=runtime.value_of,
            )
            setting = plan.setting
            found |= any(layer.before.timing for layer in plan.layers.values())
        if setting is None or not found:
            raise LaminaError("nothing was timed: no layer is left to decompose; see --include, --skip and --ratio")
        return Measured(str(output), table.export(output, setting), setting)
