"""``lamina train``: train a supernet, in one process, or in many under ``accelerate launch -m lamina train …``."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, final

import torch
import typer

from ..models import attribute
from ..supernet.files import forbid_unwritable_supernet, save_supernet
from ..supernet.train import Recipe, train_supernet
from ..train.distributed import rank
from ..train.records import TrainingRecord
from ..train.tracking import Tracking
from .command import command
from .finetune import Keeping, LoaderName, PrecisionName, called, distillation_of
from .options import Conditions, destination
from .supernet import BaseName, NetFolder, loaded


class RecipeName(StrEnum):
    """How a supernet is trained."""

    default = "default"
    order = "order"
    uniform = "uniform"
    faithful = "faithful"

    def recipe(self, rate: float | None) -> Recipe:
        """The recipe of this name."""
        recipe = {
            RecipeName.default: Recipe(),
            RecipeName.order: Recipe(draws="order"),
            RecipeName.uniform: Recipe(draws="uniform"),
            RecipeName.faithful: Recipe.faithful(),
        }[self]
        return recipe if rate is None else dataclasses.replace(recipe, rate=rate)


@final
@dataclass(frozen=True, slots=True)
class Trained:
    """Where the trained supernet is, and how the training went."""

    folder: str
    training: TrainingRecord

    def __str__(self) -> str:
        """A line an epoch, and the folder."""
        return f"{self.training}\n{self.folder}"


@command("lamina train net/ --data nets:labelled --loss torch.nn.functional:cross_entropy --epochs 1")
def train(
    *,
    net: NetFolder,
    data: LoaderName,
    output: Annotated[
        Path | None,
        destination("Where it is saved; by default NET itself.", "FOLDER"),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="FUNCTION",
            help="From output and target to a scalar; without it the original teaches alone, with --teacher.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="How many times the data are seen.")] = 10,
    recipe: Annotated[
        RecipeName,
        typer.Option(
            help="order: along one list that every budget is a prefix of; uniform: a drawn configuration; faithful: GroSS."
        ),
    ] = RecipeName.default,
    rate: Annotated[float | None, typer.Option(help="Learning rate at the beginning; by default the recipe's.")] = None,
    teacher: Annotated[bool, typer.Option("--teacher", help="Learn from the original's answers, with --weights.")] = False,
    distill_weight: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of its answers in the loss, 0.5 by default.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of its answers, 2 by default.")] = None,
    accumulate: Annotated[int, typer.Option(min=1, metavar="N", help="Batches that make a step.")] = 1,
    clip: Annotated[float | None, typer.Option(metavar="NORM", help="Largest norm of the gradients.")] = None,
    precision: Annotated[PrecisionName | None, typer.Option(help="By default as accelerate launch says, else float32.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws and of the data's order.")] = 0,
    apart: Annotated[bool, typer.Option("--apart", help="Each process draws for itself.")] = False,
    recalibrate: Annotated[
        str | None,
        typer.Option(
            metavar="FUNCTION",
            help="package.module:function that returns batches, on which batch norms are estimated for each step of the order.",
        ),
    ] = None,
    keeping: Keeping,
    model: BaseName = None,
    conditions: Conditions,
) -> Trained:
    """Train a supernet: every batch meets another configuration."""
    target = output or net
    distillation, checkpoints = distillation_of(teacher, weight=distill_weight, temperature=temperature), keeping.as_checkpoints
    if os.environ.get("RANK", "0") == "0":
        forbid_unwritable_supernet(target)
    with conditions.applied():
        supernet, name = loaded(net, model, conditions)
        torch.manual_seed(seed)
        record = train_supernet(
            supernet,
            called(data),
            loss=None if loss is None else attribute(loss),
            epochs=epochs,
            recipe=recipe.recipe(rate),
            teacher=conditions.load(name) if teacher else None,
            distillation=distillation,
            seed=seed,
            apart=apart,
            precision=None if precision is None else precision.value,
            accumulate=accumulate,
            clip=clip,
            checkpoints=checkpoints,
            tracking=None if keeping.track is None else Tracking(keeping.track),
            progress=True,
        )
        if rank() == 0 and recalibrate:
            supernet.recalibrate(called(recalibrate))
    if rank() != 0:
        raise typer.Exit
    save_supernet(supernet, target)
    return Trained(str(target), record)
