"""``lamina finetune``: train a saved network, in one process, or in many under ``accelerate launch -m lamina finetune …``."""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, final

import numpy as np
import torch
import typer
from torch import nn

from ..artifact import PLAN, load, save
from ..errors import ModelError
from ..folder import forbid_unwritable, size
from ..models import attribute
from ..network.running import first_line
from ..train.checkpoint import Checkpoints
from ..train.distill import Distillation
from ..train.distributed import rank
from ..train.finetune import finetune as tune
from ..train.records import TrainingRecord
from ..train.tracking import Tracking
from .command import command
from .options import Conditions, FreezingName, ModelName, SavedFolder, destination

LoaderName = Annotated[
    str,
    typer.Option(
        "--data", metavar="FUNCTION", show_default=False, help="package.module:function that returns a loader of batches."
    ),
]
"""What a network is trained on, by the name of what returns it."""


class OptimizerName(StrEnum):
    """Optimizers at their usual settings."""

    sgd = "sgd"
    adamw = "adamw"

    def factory(self, rate: float, weight_decay: float) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
        """What makes one from parameters."""
        if self is OptimizerName.adamw:
            return partial(torch.optim.AdamW, lr=rate, weight_decay=weight_decay)
        return partial(torch.optim.SGD, lr=rate, momentum=0.9, weight_decay=weight_decay)


class PrecisionName(StrEnum):
    """What the network computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@final
@dataclass(frozen=True, slots=True)
class Teaching:
    """Learning from the original's answers."""

    teacher: Annotated[bool, typer.Option("--teacher", help="Learn from MODEL, with --weights, as well.")] = False
    distill_weight: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of its answers in the loss, 0.5 by default.")
    ] = None
    temperature: Annotated[float | None, typer.Option(help="Of its answers, 2 by default.")] = None
    features: Annotated[
        list[str] | None, typer.Option("--feature", metavar="MODULE", help="Compare this module's output too; may be repeated.")
    ] = None

    @property
    def distillation(self) -> Distillation | None:
        """As `finetune` takes it."""
        features = tuple(self.features or ()) or None
        return distillation_of(self.teacher, weight=self.distill_weight, temperature=self.temperature, features=features)


def distillation_of(teacher: bool, **given: Any) -> Distillation | None:
    """A distillation of the options that were given; none without a teacher, and then none of them has an effect."""
    options = {name: value for name, value in given.items() if value is not None}
    if options and not teacher:
        raise typer.BadParameter("how to learn from the original's answers goes with --teacher.")
    return Distillation(**options) if teacher else None


@final
@dataclass(frozen=True, slots=True)
class Steps:
    """How steps are made."""

    epochs: Annotated[int, typer.Option(min=1, help="How many times the data are seen.")] = 3
    optimizer: Annotated[OptimizerName, typer.Option(help="sgd has momentum 0.9.")] = OptimizerName.sgd
    rate: Annotated[float, typer.Option(help="Learning rate at the beginning; a cosine leads to 0.")] = 0.01
    weight_decay: Annotated[float, typer.Option(help="Of everything that trains.")] = 1e-4
    accumulate: Annotated[int, typer.Option(min=1, metavar="N", help="Batches that make a step.")] = 1
    clip: Annotated[float | None, typer.Option(metavar="NORM", help="Largest norm of the gradients.")] = None
    precision: Annotated[PrecisionName | None, typer.Option(help="By default as accelerate launch says, else float32.")] = None
    seed: Annotated[int, typer.Option(help="Of the data's order and of what the network draws.")] = 0


@final
@dataclass(frozen=True, slots=True)
class Keeping:
    """What is kept on the way."""

    checkpoints: Annotated[
        Path | None, destination("Keep checkpoints there, and go on from the last one.", "FOLDER", "--checkpoints")
    ] = None
    every: Annotated[int | None, typer.Option(min=1, metavar="STEPS", help="Also between the ends of epochs.")] = None
    track: Annotated[Path | None, destination("Write TensorBoard's files there.", "FOLDER", "--track")] = None

    @property
    def as_checkpoints(self) -> Checkpoints | None:
        """As `finetune` takes them."""
        if self.checkpoints is None and self.every is not None:
            raise typer.BadParameter("--every says how often a checkpoint is written; it goes with --checkpoints.")
        return None if self.checkpoints is None else Checkpoints(self.checkpoints, self.every)


@final
@dataclass(frozen=True, slots=True)
class Tuned:
    """What was saved, and how the training went."""

    folder: str
    bytes: int
    epoch: int
    """As after which epoch, from 0: with a score the best, else the last."""
    training: TrainingRecord

    def __str__(self) -> str:
        """A line an epoch, and where the network is."""
        return f"{self.training}\n{self.folder}: {self.bytes / 1e6:.3g} MB, the network as after epoch {self.epoch + 1}"


@final
class Best:
    """A score that keeps the weights it was highest for.

    Attributes:
        asked: How often it was asked.
        weights: The state of the network then.
    """

    def __init__(self, score: Callable[[nn.Module], float]) -> None:
        self.asked = 0
        self.weights: dict[str, Any] = {}
        self._score, self._highest = score, -math.inf

    def __call__(self, model: nn.Module) -> float:
        """What the score says; of equals the first is kept."""
        value = float(self._score(model))
        self.asked += 1
        if value > self._highest:
            self._highest, self.weights = value, copy.deepcopy(model.state_dict())
        return value


@command("lamina finetune nets:network out/ --data nets:labelled --loss torch.nn.functional:cross_entropy --epochs 1 -o tuned/")
def finetune(
    *,
    model: ModelName,
    folder: SavedFolder,
    output: Annotated[Path, destination("Where the tuned network is saved.", "FOLDER")],
    data: LoaderName,
    loss: Annotated[
        str, typer.Option(metavar="FUNCTION", help="From output and target to a scalar.")
    ] = "torch.nn.functional:cross_entropy",
    score: Annotated[
        str | None, typer.Option(metavar="FUNCTION", help="From the network to a number; the best epoch's network is saved.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, metavar="EPOCHS", help="Stop after so many without a better score.")
    ] = None,
    freezing: Annotated[FreezingName, typer.Option(help="Which factors rest while others train.")] = FreezingName.sequential,
    period: Annotated[
        int | None, typer.Option(min=1, metavar="EPOCHS", help="How long each group rests (sequential), 1 by default.")
    ] = None,
    unfrozen_last: Annotated[
        int | None, typer.Option(min=0, metavar="EPOCHS", help="Train everything at the end (sequential), 0 by default.")
    ] = None,
    steps: Steps,
    teaching: Teaching,
    keeping: Keeping,
    conditions: Conditions,
) -> Tuned:
    """Train a saved network with freezing, and save it again."""
    if freezing is not FreezingName.sequential and (period, unfrozen_last) != (None, None):
        raise typer.BadParameter("--period and --unfrozen-last go with --freezing sequential.")
    distillation, checkpoints = teaching.distillation, keeping.as_checkpoints
    if os.environ.get("RANK", "0") == "0":
        forbid_unwritable(output, PLAN)
    with conditions.applied():
        small = load(conditions.load(model), folder)
        random.seed(steps.seed)
        np.random.seed(steps.seed % 2**32)  # all it takes
        torch.manual_seed(steps.seed)
        best = Best(attribute(score)) if score else None
        training = tune(
            small,
            called(data),
            loss=attribute(loss),
            epochs=steps.epochs,
            freezing=freezing.schedule(period or 1, unfrozen_last or 0),
            teacher=conditions.load(model) if teaching.teacher else None,
            distillation=distillation,
            score=best,
            patience=patience,
            optimizer=steps.optimizer.factory(steps.rate, steps.weight_decay),
            precision=None if steps.precision is None else steps.precision.value,
            accumulate=steps.accumulate,
            clip=steps.clip,
            checkpoints=checkpoints,
            tracking=None if keeping.track is None else Tracking(keeping.track),
            progress=True,
        )
        if rank() != 0:
            raise typer.Exit
        epoch = training.epochs[-1].number
        if best is not None:
            epoch = training.best.number
            if epoch >= len(training.epochs) - best.asked:
                small.load_state_dict(best.weights)
            elif checkpoints is not None:  # it was before this run went on
                small = load(conditions.load(model), Path(checkpoints.folder) / "best")
    save(small, output)
    return Tuned(str(output), size(output), epoch, training)


def called(name: str) -> Any:
    """What a function of the user's returns.

    Raises:
        ModelError: There is no such function, or it fails.
    """
    function = attribute(name)
    if not callable(function):
        raise ModelError(f"{name} is a {type(function).__name__}; it must be a function that returns a loader of batches")
    try:
        return function()
    except Exception as error:  # somebody's own code may raise anything
        raise ModelError(f"{name}: {type(error).__name__}: {first_line(error)}") from error
