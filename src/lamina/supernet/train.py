"""Training a supernet: every step another configuration, so that the whole space learns at once.

The steps, checkpoints and processes are those of `lamina.finetune`. What stands here is what is drawn: the configurations of
a batch follow from the seed and the number of the batch alone, and that number is part of every checkpoint. So a training that
was killed goes on with the same draws, and all processes draw alike.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import TrainingError
from ..train.checkpoint import Checkpoints
from ..train.data import Feed, pair
from ..train.distill import Distillation, taught
from ..train.distributed import rank, sharded
from ..train.finetune import Precision, finetune
from ..train.records import TrainingRecord
from ..train.state import of_teacher
from ..train.tracking import Tracking
from .space import Configuration
from .supernet import Supernet


@final
@dataclass(frozen=True, slots=True)
class Recipe:
    """How a supernet is trained.

    Args:
        draws: ``"sandwich"``: each batch meets the dearest configuration, the cheapest and a drawn one (Yu and Huang, 2019).
            ``"uniform"``: each batch meets one configuration, each layer's form drawn uniformly and independently; a third of
            the time, for scores that rank less well.
        normalise: Divide the gradient of an entry that several terms share by their number, so that a step moves the composed
            weight as far as it would move a plain one.
        only_factors: Train the terms of the series alone; biases, norms and all other layers stay what they are.
        norms_in_eval: Batch norms keep their running statistics, and normalise with them, while the network trains.
        rate: Learning rate at the beginning.
        momentum: Of SGD.
        weight_decay: Of SGD.
        milestones: Shares of the training after which the rate is divided by ten; none for a cosine to 0.
        clip: Largest norm of the gradients; None does not limit it.

    Raises:
        TrainingError: A number or a word makes no sense.
    """

    draws: Literal["uniform", "sandwich"] = "sandwich"
    normalise: bool = True
    only_factors: bool = True
    norms_in_eval: bool = True
    rate: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[float, ...] = ()
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.draws not in ("uniform", "sandwich"):
            raise TrainingError(f"draws is {self.draws!r}; a batch meets 'uniform' draws or a 'sandwich'")
        for name, number in (("rate", self.rate), ("momentum", self.momentum), ("weight_decay", self.weight_decay)):
            if not (math.isfinite(number) and number >= 0) or (name == "rate" and number == 0):
                raise TrainingError(f"{name} is {number!r}; it must be a positive number")
        if self.clip is not None and not self.clip > 0:
            raise TrainingError(f"clip is {self.clip!r}; the largest norm of the gradients is a positive number")
        if not all(0 < share < 1 for share in self.milestones):
            raise TrainingError(f"milestones is {self.milestones!r}; they are shares of the training, between 0 and 1")

    @classmethod
    def faithful(cls, rate: float = 1e-4, milestones: tuple[float, ...] = (0.5, 0.75)) -> Recipe:
        """The recipe of GroSS, arXiv 1912.00673: SGD with momentum 0.9 and weight decay 1e-3, ×0.1 at the milestones.

        Only the factors train, batch norms are in eval mode, and gradients are not normalised. Its networks were trained for
        150 epochs with milestones at 80 and 120 (4 layers), 200 with 100 and 150 (VGG-16), both at 1e-4, and 8 with 4 and 6 at
        5e-5 (ResNet-18).
        """
        return cls("uniform", normalise=False, rate=rate, weight_decay=1e-3, milestones=milestones, clip=None)

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(parameters, lr=self.rate, momentum=self.momentum, weight_decay=self.weight_decay)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        """Steps at the milestones, or a cosine to 0."""
        if not self.milestones:
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(share * steps) for share in self.milestones])


def train_supernet(
    net: Supernet,
    loader: Any,
    *,
    loss: Callable[[Any, Any], Tensor],
    epochs: int,
    feed: Feed = pair,
    recipe: Recipe | None = None,
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    seed: int = 0,
    apart: bool = False,
    score: Callable[[nn.Module], float] | None = None,
    patience: int | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    schedule: Callable[[torch.optim.Optimizer, int], Any] | None = None,
    precision: Precision | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    checkpoints: Checkpoints | None = None,
    tracking: Tracking | None = None,
    progress: bool = False,
) -> TrainingRecord:
    """Train a supernet, in place: every batch meets another configuration, whose terms alone it changes.

        >>> lamina.train_supernet(net, loader, loss=F.cross_entropy, epochs=10, teacher=model)

    Terms that a batch does not meet have no gradient at all, so momentum and weight decay leave them alone. The same call
    serves many processes under ``accelerate launch`` or ``torchrun``. With checkpoints, a training that was killed goes on with
    the same draws, on a CPU to the same bits.

    Args:
        net: The supernet. Its modes, active configuration and ``requires_grad`` are afterwards as before.
        loader: As `lamina.finetune` takes it.
        loss: From output and target to a scalar, the mean over the batch.
        epochs: How many times the data are seen.
        feed: As `lamina.finetune` takes it.
        recipe: `Recipe()` by default, or `Recipe.faithful()`.
        teacher: The untouched original, to learn from its answers.
        distillation: How; ``Distillation()`` by default where there is a teacher.
        seed: Of the draws.
        apart: Whether processes draw each for itself. By default all draw the same, so that a step's gradient is that of one
            network.
        score: Asked at every epoch's end for each uniform configuration; the mean counts. Higher is better.
        patience: Stop after so many epochs without a better score (without ``score``: a lower loss).
        optimizer: In place of the recipe's: from the list of parameters to an optimizer.
        schedule: In place of the recipe's: from the optimizer and the number of steps to a learning rate scheduler.
        precision: ``"bfloat16"`` runs the network under autocast.
        accumulate: Batches that make a step; each meets a configuration of its own.
        clip: In place of the recipe's largest norm of the gradients.
        checkpoints: Where to keep checkpoints, and whether to go on from them.
        tracking: Where numbers are sent.
        progress: Show a progress bar.

    Raises:
        TrainingError: As `lamina.finetune`; or the checkpoints are of another recipe or seed.
        MissingExtra: Accelerate or a tracker is not installed.
    """
    recipe = recipe or Recipe()
    if sharded(net):
        raise TrainingError("a supernet that is spread by fully_shard cannot be trained: its terms are added up whole")
    if distillation is not None and distillation.features:
        raise TrainingError("a supernet learns from its teacher's answers; Distillation(features=…) is for lamina.finetune")
    with ExitStack() as stack:
        stack.enter_context(_as_before(net))
        # Checks the teacher, puts it into eval mode, and brings its modes back.
        stack.enter_context(taught(net, teacher, distillation))
        _prepare(net, recipe)
        drawing = _Drawing(net, recipe, seed, apart, teacher, distillation or Distillation())
        if teacher is not None:
            stack.enter_context(_beside(teacher))
        return finetune(
            drawing,
            loader,
            loss=drawing.loss_of(loss),
            epochs=epochs,
            feed=feed,
            score=None if score is None else drawing.score_of(score),
            patience=patience,
            optimizer=optimizer or recipe.optimizer,
            schedule=schedule or recipe.schedule,
            precision=precision,
            accumulate=accumulate,
            clip=recipe.clip if clip is None else clip,
            checkpoints=checkpoints,
            tracking=tracking,
            find_unused_parameters=True,
            progress=progress,
            # A teacher is run beside the network, so this room's own do not say how it teaches.
            settings={
                **dataclasses.asdict(recipe),
                "seed": seed,
                "apart": apart,
                "distillation": None if teacher is None else str(drawing.distillation),
                **of_teacher(teacher),
            },
        )


@final
class _Drawing(nn.Module):
    """A supernet that meets each batch in configurations drawn for it; the outputs come together, with the teacher's answers.

    ``drawn`` counts the batches. It is a buffer, so that checkpoints hold it.
    """

    drawn: Tensor

    def __init__(
        self, net: Supernet, recipe: Recipe, seed: int, apart: bool, teacher: nn.Module | None, distillation: Distillation
    ) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self.seed = seed
        self.apart = apart
        self.distillation = distillation
        self._teacher = (teacher,)  # in a tuple, so that it is no module of this one
        self.register_buffer("drawn", torch.zeros((), dtype=torch.int64))
        space = net.space
        self._ends = (space.uniform(space.size), space.uniform(0))

    def configurations(self, number: int) -> list[Configuration]:
        """What the batch of a number meets."""
        own = f" {rank()}" if self.apart else ""
        drawn = self.net.sample(random.Random(f"{self.seed} {number}{own}"))
        return [drawn] if self.recipe.draws == "uniform" else [*self._ends, drawn]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In training the outputs of all configurations of the batch and the teacher's; otherwise the active one's."""
        if not self.training:
            return self.net(*args, **kwargs)
        outputs = []
        for config in self.configurations(int(self.drawn)):
            self.net.set_active(config)
            outputs.append(self.net(*args, **kwargs))
        self.drawn += 1
        (teacher,) = self._teacher
        if teacher is None:
            return outputs, None
        with torch.no_grad():
            return outputs, _moved(teacher, self.drawn.device)(*args, **kwargs)

    def train(self, mode: bool = True) -> _Drawing:
        """Set the mode; batch norms stay in eval mode where the recipe says so."""
        super().train(mode)
        if self.recipe.norms_in_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.training = False
        return self

    def loss_of(self, loss: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        """The loss of a batch: the mean over its configurations, learning from the teacher where there is one."""

        def one(output: Any, wanted: Any, target: Any) -> Tensor:
            task = loss(output, target)
            return task if wanted is None else self.distillation.loss(output, wanted, task)

        def all_of(output: Any, target: Any) -> Tensor:
            outputs, wanted = output
            return torch.stack([one(each, wanted, target) for each in outputs]).mean()

        return all_of

    def score_of(self, score: Callable[[nn.Module], float]) -> Callable[[nn.Module], float]:
        """The mean score of the uniform configurations."""

        def mean(_: nn.Module) -> float:
            found = []
            for config in self.net.space.uniforms():
                self.net.set_active(config)
                found.append(float(score(self.net.network)))
            return sum(found) / len(found)

        return mean


@contextmanager
def _as_before(net: Supernet) -> Iterator[None]:
    """Put back what a training sets: the active configuration, what trains, whether gradients are normalised."""
    active = net.get_active()
    trains = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
    normalises = [(layer, layer.normalise) for layer in net.series.values()]
    try:
        yield
    finally:
        net.set_active(active)
        for parameter, flag in trains:
            parameter.requires_grad_(flag)
        for layer, flag in normalises:
            layer.normalise = flag


def _prepare(net: Supernet, recipe: Recipe) -> None:
    terms = {id(term) for layer in net.series.values() for form in layer.forms for term in layer.terms(form)}
    for parameter in net.parameters():
        if recipe.only_factors or id(parameter) in terms:
            parameter.requires_grad_(id(parameter) in terms)
    for layer in net.series.values():
        layer.normalise = recipe.normalise


@contextmanager
def _beside(teacher: nn.Module) -> Iterator[None]:
    """A teacher that may be moved to the training's device; afterwards it is back on its own."""
    device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
    try:
        yield
    finally:
        teacher.to(device)


def _moved(teacher: nn.Module, device: torch.device) -> nn.Module:
    first = next(teacher.parameters(), None)
    return teacher if first is None or first.device == device else teacher.to(device)
