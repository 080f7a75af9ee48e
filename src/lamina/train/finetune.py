"""Fine-tuning: trains a decomposed network, in one process or many, and goes on where it was stopped.

Processes, devices and trackers are Accelerate's; the steps are plain PyTorch (`run`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import MissingExtra, TrainingError
from ..network.wrappers import unwrapped
from ..progress import display
from ..schedules import Schedule
from .checkpoint import Checkpoints
from .data import Feed, batches, expect_one_source, pair
from .distill import Distillation, taught
from .distributed import in_touch, processes, rank, sharded, together
from .freezing import Freezing, freeze, wake
from .records import TrainingRecord
from .run import Run
from .state import Settings, expect_alike, of_groups, of_network, of_schedule, of_teacher, tensors_of
from .tracking import Tracking, tracked
from .trial import wants_argument

Precision = Literal["float32", "bfloat16"]


def finetune(
    model: nn.Module,
    loader: Any,
    *,
    loss: Callable[[Any, Any], Tensor],
    epochs: int,
    feed: Feed = pair,
    freezing: Schedule | None = None,
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    score: Callable[[nn.Module], float] | None = None,
    patience: int | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | torch.optim.Optimizer | None = None,
    schedule: Callable[[torch.optim.Optimizer, int], Any] | None = None,
    precision: Precision | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    checkpoints: Checkpoints | None = None,
    tracking: Tracking | None = None,
    eval_mode: bool = False,
    find_unused_parameters: bool = False,
    progress: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> TrainingRecord:
    """Train a decomposed network, in place; the same call serves one process, and many under ``accelerate launch`` or torchrun.

        >>> record = lamina.finetune(
        ...     small, loader, loss=F.cross_entropy, epochs=3, freezing=lamina.SequentialFreezing(), teacher=model
        ... )

    Training happens on the device that Accelerate chooses, a GPU where there is one; the network comes back to where it was,
    with its modes and ``requires_grad`` as they were; only what an earlier freezing left at rest wakes. With many processes the
    loader's batch is divided among them, and gradients are averaged by DDP; a network that ``fully_shard`` spread before stays
    spread. What fails in one process ends all, with the same words. With checkpoints, a training that was killed goes on from
    the last one as if nothing had happened: to the same bits on a CPU with the same number of threads and processes, where the
    loader is a `DataLoader` over a data set with an index, or a list, and everything that changes is in buffers, in the
    generators of Python, NumPy and torch, or in a loader, data set, sampler, loss or score that has ``state_dict`` and
    ``load_state_dict``.

    Args:
        model: The network; one that is not decomposed can be trained too, without freezing.
        loader: A DataLoader, a list of batches, or anything with a length that can be iterated again and again; whatever of it
            has ``set_epoch`` is told of every epoch. A batch that is a tuple or list of two is an (input, target) pair, where
            the input is a tensor, a tuple or list of positional arguments or a mapping of keyword arguments; a tensor or a
            mapping is the input, and its own target.
        loss: From output and target to a scalar, the mean over the batch. For a network that computes its loss itself:
            ``lambda output, batch: output.loss``. What trains belongs to the network, not to the loss.
        epochs: How many times the data are seen.
        feed: For batches of any other kind: from a batch to such a pair. In several processes from a process's part of one.
        freezing: Which factors rest when; None lets all train.
        teacher: The untouched original, to learn from its answers.
        distillation: How; ``Distillation()`` by default where there is a teacher.
        score: From the network, in eval mode and on the device of the training, to a number: higher is better. Asked at every
            epoch's end, in every process; what process 0 gets counts.
        patience: Stop after so many epochs without a better score (without ``score``: a lower loss).
        optimizer: From the list of parameters to an optimizer, or an optimizer that is made already, whose rates are put back
            afterwards. By default SGD with learning rate 0.01, momentum 0.9 and weight decay 1e-4.
        schedule: From the optimizer and the number of steps to a learning rate scheduler, which is told of every step;
            ``ReduceLROnPlateau`` of every epoch's loss, and where its mode is ``"max"``, of its score. By default a cosine from
            the optimizer's rate to 0.
        precision: ``"bfloat16"`` runs the network under autocast; its weights stay what they are. By default as
            ``accelerate launch`` says, else float32.
        accumulate: Batches that make a step.
        clip: Largest norm of the gradients of what trains in the phase at hand; None does not limit it.
        checkpoints: Where to keep checkpoints, and whether to go on from them.
        tracking: Where numbers are sent.
        eval_mode: Train in eval mode: batch norms normalise by their running statistics and keep them, dropout does nothing.
        find_unused_parameters: For DDP: not every parameter takes part in every step.
        progress: Show a progress bar, in the main process.
        settings: Plain values of the caller's that, like the options above, must be the same when a training goes on.

    Raises:
        TrainingError: The loader yields nothing, shapes do not fit, the loss or a gradient is NaN or infinite (weights and
            statistics are those of the last good step), an option makes no sense, a checkpoint is of another training, or the
            processes were given different things.
        FreezingError: Nothing in the network is decomposed, or the optimizer holds parameters of another network or does not
            leave alone what rests.
        MissingExtra: Accelerate or a tracker is not installed.
    """
    accelerator = _accelerator(tracking)
    with in_touch(), ExitStack() as stack:
        with together():
            _check_numbers(epochs=epochs, accumulate=accumulate, patience=patience)
            if clip is not None and not clip > 0:
                raise TrainingError(f"clip is {clip!r}; the largest norm of the gradients is a positive number")
            if isinstance(loss, nn.Module) and (own := [name for name, p in loss.named_parameters() if p.requires_grad]):
                raise TrainingError(f"the loss holds {own[0]}, which nobody would train: make it a part of the network")
            chosen = _precision(precision, accelerator)
            spread = sharded(model)
            if checkpoints is not None:
                tensors_of(unwrapped(model))
                if spread and torch.__version__ < "2.9":
                    raise TrainingError(
                        "the parts of a sharded network are written by PyTorch 2.9 or newer: no checkpoints here"
                    )
            device = stack.enter_context(_at_work(model, accelerator.device, spread))
            pupil = stack.enter_context(taught(model, teacher, distillation))
            if teacher is not None:
                stack.enter_context(_on(teacher, device, spread))
            data = batches(loader)
            if freezing is None:
                wake(model)
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            rests = None
            if freezing is not None:
                rests = freeze(model, freezing, epochs=epochs)
                stack.callback(rests.release)
                trainable = [p for group in rests.parameter_groups() for p in group["params"]]
            if not trainable:
                raise TrainingError("no parameter of the network requires a gradient, so there is nothing to train")
            steps = epochs * math.ceil(len(data) / accumulate)
            made = _optimizer(optimizer, trainable)
            _forbid_stale(model, made, rests)
            stack.enter_context(_rates_kept(made))
            plain: Settings = {
                "freezing": "none" if freezing is None else str(freezing),
                **of_groups(made),
                "epochs": epochs,
                **data.settings,
                "accumulate": accumulate,
                "eval_mode": eval_mode,
                "clip": clip,
                "precision": chosen,
                "teacher": None if pupil is None else str(pupil.options),
                "score": score is not None,
                "patience": patience,
            }
            scheduler = _scheduler(schedule, made, steps, scored=score is not None)
            plain |= of_schedule(scheduler)
            told = {**(settings or {}), **of_network(unwrapped(model)), **plain}
            if checkpoints is not None or processes() > 1:
                told |= of_teacher(teacher)
        if processes() > 1:
            expect_alike(told | {"device": device.type, "checkpoints": checkpoints is not None})
            expect_one_source(data)
        log = stack.enter_context(tracked(accelerator, tracking, plain))
        shown = stack.enter_context(display(progress and rank() == 0))
        run = Run(
            model=model,
            data=data,
            feed=feed,
            loss=loss,
            epochs=epochs,
            rests=rests,
            pupil=pupil,
            score=score,
            patience=patience,
            optimizer=made,
            scheduler=scheduler,
            device=device,
            autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=chosen == "bfloat16"),
            accumulate=accumulate,
            clip=clip,
            checkpoints=checkpoints,
            log=log,
            log_every=1 if tracking is None else tracking.every,
            eval_mode=eval_mode,
            find_unused_parameters=find_unused_parameters,
            shown=shown,
            settings=told,
        )
        return run.all()


def _check_numbers(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise TrainingError(f"{name} is {number!r}; it must be a whole number of 1 or more")


def _accelerator(tracking: Tracking | None) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtra("accelerate", "train", "fine-tuning") from error
    if tracking is None:
        return Accelerator()
    return Accelerator(log_with=list(tracking.log_with), project_dir=str(tracking.folder))


def _precision(asked: Precision | None, accelerator: Any) -> str:
    launched = {"no": "float32", "bf16": "bfloat16"}
    chosen = asked or launched.get(accelerator.mixed_precision, "")
    if chosen not in launched.values():
        raise TrainingError(
            f"precision {asked or accelerator.mixed_precision!r} is not supported: 'float32' or 'bfloat16' "
            "(bf16 for accelerate launch), which needs no loss scaling"
        )
    return chosen


@contextmanager
def _at_work(model: nn.Module, device: torch.device, spread: bool) -> Iterator[torch.device]:
    """A network on the device of its training; afterwards back where it was, its modes as they were, without gradients."""
    modes = [(module, module.training) for module in model.modules()]
    with _on(model, device, spread) as where:
        try:
            yield where
        finally:
            model.zero_grad(set_to_none=True)
            for module, training in modes:
                module.training = training


@contextmanager
def _on(model: nn.Module, device: torch.device, spread: bool) -> Iterator[torch.device]:
    """A network on a device, and afterwards back; one that is spread over several stays where it is."""
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(places) != 1 or spread:
        yield next(iter(places), device)
        return
    model.to(device)
    try:
        yield device
    finally:
        model.to(places.pop())


def _optimizer(given: Any, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if given is None:
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)
    made = given if hasattr(given, "param_groups") else given(parameters)
    if not hasattr(made, "param_groups"):
        raise TrainingError(f"optimizer is {given!r}; it must be an optimizer, or a function from parameters to one")
    if wants_argument(made):
        raise TrainingError(f"{type(made).__name__} computes the loss itself, by a closure: take an optimizer that does not")
    return made  # type: ignore[no-any-return]


def _scheduler(given: Callable[..., Any] | None, optimizer: torch.optim.Optimizer, steps: int, *, scored: bool) -> Any:
    if given is None:
        if all(group["lr"] == 0 for group in optimizer.param_groups):
            raise TrainingError("the optimizer's learning rate is 0, where an earlier schedule ended perhaps: set it first")
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    made = given(optimizer, steps)
    if not hasattr(made, "step"):
        raise TrainingError(f"schedule returns {made!r}; it must return a learning rate scheduler")
    if isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau):
        if made.mode == "max" and not scored:
            raise TrainingError("ReduceLROnPlateau of mode 'max' follows the score: pass score=, or mode='min' for the loss")
    elif wants_argument(made):
        raise TrainingError(f"{type(made).__name__} wants more than to be told of a step: take a schedule that counts steps")
    return made


@contextmanager
def _rates_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put back afterwards what schedules set: they end at a rate of 0, say, where the next training would go nowhere."""
    keys = ("lr", "initial_lr", "momentum", "betas")
    before = [
        {key: (group[key], copy.deepcopy(group[key])) for key in keys if key in group} for group in optimizer.param_groups
    ]
    try:
        yield
    finally:
        for group, kept in zip(optimizer.param_groups, before, strict=True):
            for key in keys:
                group.pop(key, None)
            for key, (own, value) in kept.items():
                group[key] = own.copy_(value) if isinstance(own, Tensor) else value


def _forbid_stale(model: nn.Module, optimizer: torch.optim.Optimizer, rests: Freezing | None) -> None:
    if rests is not None:
        rests.check(optimizer)
        return
    known = {id(parameter) for parameter in model.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            if id(parameter) not in known:
                raise TrainingError(
                    f"the optimizer holds a parameter that is not of this network (number {i} of group {number}, of shape "
                    f"{tuple(parameter.shape)}): make the optimizer from this network's parameters"
                )
