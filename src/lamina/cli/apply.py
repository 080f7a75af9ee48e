"""``lamina apply``: decompose a network by a plan, and save it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, final

import torch
import typer
from torch import Tensor, nn

from ..answers import answers, in_words, moved
from ..artifact import save
from ..calibration.batches import Batches
from ..calibration.calibration import Calibration
from ..decomposition import decompose
from ..errors import LaminaError
from ..examples import example_from
from ..folder import size
from ..measure.count import count
from ..network.memory import devices_of
from ..plan import MUCH, Plan
from ..streaming import decompose_checkpoint
from ..values import Cost, Workload, workloads
from ..weights import in_parts
from .command import command
from .evidence import Evidence
from .finetune import called
from .options import Conditions, Input, InputsIfAny, ModelName, PlanFile, destination

_BATCHES = 4
"""Of the data, on which it is seen by how much the answers change: those before are held in memory."""
_DATA = "the first of the data"


@final
@dataclass(frozen=True, slots=True)
class Applied:
    """What was saved, what it costs where there is an example, by how much its answers change, and what the plan knew of that.

    ``change`` is ‖after − before‖ / ‖before‖ of the outputs ``on`` something, None where that cannot be told. ``warning`` is
    said first: that the outputs change much, or what the plan warns of, unless data say otherwise. Random inputs may not.
    ``resumed`` parts had been made by a call that was cut off.
    """

    folder: str
    bytes: int
    decomposed: int
    layers: int
    before: Cost | None = None
    after: Cost | None = None
    change: float | None = None
    on: str = ""
    warning: str = ""
    planned: tuple[str, ...] = ()
    resumed: int = 0

    def __str__(self) -> str:
        """``out: 2 of 4 layers decomposed, 0.9 MB``."""
        lines = [f"{self.folder}: {self.decomposed} of {self.layers} layers decomposed, {self.bytes / 1e6:.3g} MB"]
        if self.warning:
            lines.insert(0, self.warning)
        if self.change is not None and self.change <= MUCH:
            lines.append(in_words(self.change, self.on))
        if self.resumed:
            lines.append(f"{self.resumed} parts of it had been made before")
        lines += [f"when planned: {said}" for said in self.planned]
        if self.before:
            lines += [f"before: {self.before}", f"after: {self.after}"]
        return "\n".join(lines)


@command("lamina apply nets:network plan.json --calibration seen/ -o out/")
def apply(
    *,
    model: ModelName,
    plan: PlanFile,
    output: Annotated[Path, destination("Where the network is saved.", "FOLDER")],
    evidence: Evidence,
    sequential: Annotated[
        str | None,
        typer.Option(
            metavar="FUNCTION",
            show_default=False,
            help="package.module:function that returns batches: layers are fitted in sequence, each on what it then gets.",
        ),
    ] = None,
    inputs: InputsIfAny = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            show_default=False,
            help="Whether --weights are read layer by layer, for a network larger than memory, which is then not run; killed, "
            "the same command goes on. By default where they are in many files.",
        ),
    ] = None,
    conditions: Conditions,
) -> Applied:
    """Decompose a network by a plan, save it, and see how much its answers change; with an example, count what it costs."""
    if stream or (stream is None and conditions.weights is not None and in_parts(conditions.weights)):
        return _streamed(model, Plan.load(plan), output, evidence, sequential, inputs, conditions)
    chosen, data = Plan.load(plan), evidence.value
    data = list(data) if isinstance(data, Iterator) else data
    with conditions.applied():
        network = conditions.load(model)
        examples = conditions.examples(inputs, network) if inputs else None
        before = count(network, examples) if examples else None
        fed, on = _fed(network, chosen, data, examples)
        dense = _answers(network, fed)
        in_sequence = called(sequential) if sequential else None
        small = decompose(network, chosen, data, sequential=in_sequence, inplace=in_sequence is None)
        after = count(small, examples) if examples else None
        change = moved(zip(dense, _answers(small, fed), strict=False))
    save(small, output)
    warning = "" if on == _DATA and change is not None else chosen.warning
    if change is not None and change > MUCH:
        warning = in_words(change, on)
    decomposed, planned = len(chosen.decomposed), tuple(chosen.accuracy())
    return Applied(str(output), size(output), decomposed, len(chosen.layers), before, after, change, on, warning, planned)


def _streamed(
    model: str,
    plan: Plan,
    output: Path,
    evidence: Evidence,
    sequential: str | None,
    inputs: list[Input] | None,
    conditions: Conditions,
) -> Applied:
    """The same layer by layer, with the network never in memory."""
    if conditions.weights is None:
        raise typer.BadParameter("--stream reads the weights layer by layer: name their files with --weights")
    given = {
        "--input": inputs,
        "--data": evidence.data,
        "--calibration": evidence.calibration,
        "--sequential": sequential,
        "--channels-last": conditions.channels_last,
    }
    if runs := [option for option, value in given.items() if value]:
        raise typer.BadParameter(f"{runs[0]} is for a network in memory: leave it out, or say --no-stream")
    with conditions.applied():
        made = decompose_checkpoint(
            conditions.without_values(model),
            plan,
            conditions.weights,
            output=output,
            dtype=getattr(torch, conditions.dtype) if conditions.dtype else None,
            device=conditions.usable_device,
            progress=True,
        )
    accuracy = tuple(plan.accuracy())
    return Applied(
        str(output), size(output), len(plan.decomposed), len(plan.layers), warning=plan.warning, planned=accuracy, resumed=made
    )


def _fed(network: nn.Module, plan: Plan, data: Any, examples: list[Workload] | None) -> tuple[list[Workload], str]:
    """What the answers are looked at on, and what that is: the first data, else the example, or what the plan knows of it."""
    if data is not None and not isinstance(data, Calibration):
        batches = islice(Batches(data, devices_of(network)[0]), _BATCHES)
        return [batch.workload for batch in batches], _DATA
    if examples:
        return workloads(examples), "the example"
    return [example_from(shape, network) for shape in plan.examples or ()], "inputs made like the plan's example"


def _answers(network: nn.Module, fed: list[Workload]) -> list[list[Tensor]]:
    """What a network answers, batch by batch; nothing where it does not run."""
    try:
        return [answers(network, [each]) for each in fed]
    except LaminaError:
        return []
