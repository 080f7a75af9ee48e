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
from ..train.distill import Distillation, Teacher, taught
from ..train.distributed import rank, sharded
from ..train.finetune import Precision, finetune
from ..train.records import TrainingRecord
from ..train.run import at_least_float32
from ..train.state import of_teacher
from ..train.tracking import Tracking
from ..values import Workload, arguments
from .blueprint import Order
from .space import Configuration, key
from .supernet import Supernet


@final
@dataclass(frozen=True, slots=True)
class Recipe:
    """How a supernet is trained.

    Args:
        draws: ``"order"``: each batch meets one configuration of the supernet's nested order, `Supernet.order`: what
            `Supernet.at` then takes out, and nothing else. ``"sandwich"``: each batch meets the dearest configuration, the
            cheapest and a drawn one (Yu and Huang, 2019), one after the other, for a step three times as long. ``"uniform"``:
            each batch meets one configuration, each layer's form drawn uniformly and independently, for a search in the whole
            space.
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

    draws: Literal["order", "uniform", "sandwich"] = "sandwich"
    normalise: bool = True
    only_factors: bool = True
    norms_in_eval: bool = True
    rate: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[float, ...] = ()
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.draws not in ("order", "uniform", "sandwich"):
            raise TrainingError(f"draws is {self.draws!r}; a batch meets the nested 'order', 'uniform' draws or a 'sandwich'")
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
    epochs: int,
    loss: Callable[[Any, Any], Tensor] | None = None,
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

        >>> lamina.train_supernet(net, images, teacher=model, epochs=10)

    Terms that a batch does not meet have no gradient at all, so momentum and weight decay leave them alone. The same call
    serves many processes under ``accelerate launch`` or ``torchrun``. With checkpoints, a training that was killed goes on with
    the same draws, on a CPU to the same bits.

    Args:
        net: The supernet. Its modes, active configuration and ``requires_grad`` are afterwards as before.
        loader: As `lamina.finetune` takes it.
        epochs: How many times the data are seen.
        loss: From output and target to a scalar, the mean over the batch. None: it learns from the teacher's answers alone, and
            the data need no targets.
        feed: As `lamina.finetune` takes it.
        recipe: `Recipe()` by default, or `Recipe.faithful()`.
        teacher: The untouched original, to learn from its answers.
        distillation: How; ``Distillation()`` by default where there is a teacher, and of the answers alone without a loss.
            ``features`` are modules of the original, layers of the supernet for example.
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
    if loss is None:
        if teacher is None:
            raise TrainingError("there is nothing to learn from: give loss=, or the untouched original as teacher=, or both")
        distillation = dataclasses.replace(distillation or Distillation(), weight=1.0)
    with ExitStack() as stack:
        stack.enter_context(_as_before(net))
        # Checks the teacher, puts it into eval mode, and brings its modes back.
        together = stack.enter_context(taught(net.network, teacher, distillation))
        _prepare(net, recipe)
        drawing = _Drawing(net, recipe, seed, apart, together, loss)
        if teacher is not None:
            stack.enter_context(_beside(teacher))
        record = finetune(
            drawing,
            loader,
            loss=_as_computed,
            epochs=epochs,
            feed=lambda batch: _with_target(feed(batch)),
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
                "order": [key(config) for config in drawing.order],
                "seed": seed,
                "apart": apart,
                "distillation": None if together is None else str(together.options),
                **of_teacher(teacher),
            },
        )
    net.statistics = {}  # of the weights before
    if recipe.draws == "order":
        net.blueprint = net.blueprint.model_copy(update={"order": Order.of(drawing.order)})
    return record


@final
class _Drawing(nn.Module):
    """A supernet that meets each batch in configurations drawn for it, and answers their mean loss.

    ``drawn`` counts the batches. It is a buffer, so that checkpoints hold it.
    """

    drawn: Tensor

    def __init__(
        self,
        net: Supernet,
        recipe: Recipe,
        seed: int,
        apart: bool,
        together: Teacher | None,
        loss: Callable[[Any, Any], Tensor] | None,
    ) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self.seed = seed
        self.apart = apart
        self._loss = loss
        self._together = together
        self.register_buffer("drawn", torch.zeros((), dtype=torch.int64))
        space = net.space
        self._ends = (space.uniform(space.size), space.uniform(0))
        self.order = net.order if recipe.draws == "order" else []

    def configurations(self, number: int) -> list[Configuration]:
        """What the batch of a number meets."""
        rng = random.Random(f"{self.seed} {number}{f' {rank()}' if self.apart else ''}")
        if self.recipe.draws == "order":
            return [rng.choice(self.order)]
        drawn = self.net.sample(rng)
        return [drawn] if self.recipe.draws == "uniform" else [*self._ends, drawn]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In training, fed as `_with_target` says, the mean loss of the batch's configurations; else the active one's output.

        Of several configurations one graph stands at a time: each is gone through backward before the next one runs, and what
        is returned hands on the mean of their gradients. So a sandwich takes the memory of a single configuration.
        """
        if not self.training:
            return self.net(*args, **kwargs)
        inputs, target = kwargs["inputs"], kwargs["target"]
        wanted = self._wanted(inputs)
        configs = self.configurations(int(self.drawn))
        self.drawn += 1
        try:
            if len(configs) == 1:
                return self._loss_of(configs[0], inputs, target, wanted)
            trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
            total: Tensor | float = 0.0
            gradients: dict[int, Tensor] = {}
            for config in configs:
                loss = self._loss_of(config, inputs, target, wanted) / len(configs)
                total = total + loss.detach()
                for number, gradient in enumerate(torch.autograd.grad(loss, trained, allow_unused=True)):
                    if gradient is not None:
                        gradients[number] = gradients[number] + gradient if number in gradients else gradient
            return _Known.apply(total, list(gradients.values()), *(trained[number] for number in gradients))
        except _LossError as error:
            return error  # `_as_computed` raises it, where errors of the loss belong

    def _wanted(self, inputs: Workload) -> Any:
        if self._together is None:
            return None
        _move(self._together.teacher, self.drawn.device)
        return self._together.answers(inputs)

    def _loss_of(self, config: Configuration, inputs: Workload, target: Any, wanted: Any) -> Tensor:
        self.net.set_active(config)
        output = inputs.run(self.net)
        with torch.autocast(self.drawn.device.type, enabled=False):
            output, wanted = torch.utils._pytree.tree_map_only(Tensor, at_least_float32, (output, wanted))
            try:
                task = torch.zeros((), device=self.drawn.device) if self._loss is None else self._loss(output, target)
                return task if self._together is None else self._together.loss(output, wanted, task)
            except Exception as error:  # of the user's own code, which may raise anything
                raise _LossError(output, target) from error

    def train(self, mode: bool = True) -> _Drawing:
        """Set the mode; batch norms stay in eval mode where the recipe says so."""
        super().train(mode)
        if self.recipe.norms_in_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.training = False
        return self

    def score_of(self, score: Callable[[nn.Module], float]) -> Callable[[nn.Module], float]:
        """The mean score of the uniform configurations."""

        def mean(_: nn.Module) -> float:
            found = []
            for config in self.net.space.uniforms():
                self.net.set_active(config)
                found.append(float(score(self.net.network)))
            return sum(found) / len(found)

        return mean


class _LossError(Exception):
    """A loss that could not be computed, of an output and a target."""


class _Known(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(outer[0] * gradient for gradient in ctx.gradients)


def _with_target(read: Any) -> Any:
    """What a feed returns, as `_Drawing` takes it: input and target together, since it computes the loss itself."""
    if not (isinstance(read, tuple) and len(read) == 2):
        return read  # which the training refuses
    inputs, target = read
    return Workload({"inputs": arguments(inputs), "target": target}), target


def _as_computed(loss: Any, target: Any) -> Tensor:
    if isinstance(loss, _LossError):
        raise loss.__cause__ or loss
    return loss  # type: ignore[no-any-return]


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


def _move(teacher: nn.Module, device: torch.device) -> None:
    first = next(teacher.parameters(), None)
    if first is not None and first.device != device:
        teacher.to(device)
