"""``lamina apply``: decompose a network by a plan, and save it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

import typer

from ..answers import answers, apart, in_words
from ..artifact import save
from ..decomposition import decompose
from ..folder import size
from ..measure.count import count
from ..plan import Plan
from ..values import Cost, workloads
from .command import command
from .evidence import Evidence
from .options import Conditions, InputsIfAny, ModelName, PlanFile


@final
@dataclass(frozen=True, slots=True)
class Applied:
    """What was saved, and what the plan knew of its accuracy; with an example what it costs, by how much its answers change."""

    folder: str
    bytes: int
    decomposed: int
    layers: int
    before: Cost | None = None
    after: Cost | None = None
    change: float | None = None
    planned: tuple[str, ...] = ()

    def __str__(self) -> str:
        """``out: 2 of 4 layers decomposed, 0.9 MB``."""
        line = f"{self.folder}: {self.decomposed} of {self.layers} layers decomposed, {self.bytes / 1e6:.3g} MB"
        if self.change is not None:
            line += f"\n{in_words(self.change)}"
        line = "\n".join([line, *(f"when planned: {said}" for said in self.planned)])
        return f"{line}\nbefore: {self.before}\nafter: {self.after}" if self.before else line


@command
def apply(
    *,
    model: ModelName,
    plan: PlanFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", show_default=False, help="Where the network is saved.")
    ],
    evidence: Evidence,
    inputs: InputsIfAny = None,
    conditions: Conditions,
) -> Applied:
    """Decompose a network by a plan and save it; with an example, count what it costs and see how much its answers change."""
    chosen = Plan.load(plan)
    with conditions.applied():
        network = conditions.load(model)
        examples = conditions.examples(inputs, network) if inputs else None
        before, dense = (count(network, examples), answers(network, workloads(examples))) if examples else (None, [])
        small = decompose(network, chosen, evidence.value, inplace=True)
        after = count(small, examples) if examples else None
        change = apart(dense, answers(small, workloads(examples))) if examples else None
    save(small, output)
    planned = tuple(chosen.accuracy())
    return Applied(str(output), size(output), len(chosen.decomposed), len(chosen.layers), before, after, change, planned)
