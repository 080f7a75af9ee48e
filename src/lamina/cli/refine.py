"""``lamina refine``: train a saved network to the original's answers, without labels, and save it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

import typer

from ..artifact import load, save
from ..folder import size
from ..train.distributed import rank
from ..train.refine import Refinement
from ..train.refine import refine as tune
from .calibrate import Answers
from .command import command
from .finetune import called
from .options import Conditions, ModelName, SavedFolder, destination


@final
@dataclass(frozen=True, slots=True)
class Refined:
    """What was saved, and how the refinement went."""

    folder: str
    bytes: int
    refinement: Refinement

    def __str__(self) -> str:
        """How it went, and where the network is."""
        return f"{self.refinement}\n{self.folder}: {self.bytes / 1e6:.3g} MB"


@command("lamina refine nets:network out/ --data nets:images --outputs categorical --minutes 0.1 -o refined/")
def refine(
    *,
    model: ModelName,
    folder: SavedFolder,
    output: Annotated[Path, destination("Where the refined network is saved.", "FOLDER")],
    data: Annotated[
        str,
        typer.Option(metavar="FUNCTION", show_default=False, help="package.module:function that returns batches of inputs."),
    ],
    answers: Answers,
    minutes: Annotated[float, typer.Option(min=0, help="About how long it may take.")] = 2.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead: how many steps, rounded up to a multiple of ten.")] = None,
    rate: Annotated[float, typer.Option(help="Learning rate at the beginning; a cosine leads to 0.")] = 3e-4,
    seed: Annotated[int, typer.Option(help="Of the order of the items.")] = 0,
    conditions: Conditions,
) -> Refined:
    """Train a saved network to the original's answers on unlabelled inputs, for some minutes."""
    with conditions.applied():
        small = load(conditions.load(model), folder)
        refinement = tune(
            small,
            conditions.load(model),
            called(data),
            minutes=minutes,
            steps=steps,
            outputs=answers.value,
            rate=rate,
            seed=seed,
            progress=True,
        )
    if rank() != 0:
        raise typer.Exit
    save(small, output)
    return Refined(str(output), size(output), refinement)
