"""Distillation: a decomposed network learns from the answers of the untouched original.

Hinton, Vinyals and Dean, arXiv 1503.02531 (answers); Romero et al., arXiv 1412.6550 (features). The original is run in eval
mode without gradients and is left as it was.

    s, t   scores of the student, of the teacher      T   temperature
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TrainingError
from ..network.running import set_mode
from ..values import Workload, closest


@final
@dataclass(frozen=True, slots=True)
class Distillation:
    """How much a network learns from its teacher, and from what.

    The loss of a step is ``(1 − weight) · task + weight · answers + feature_weight · Σ features``.

    Args:
        weight: Share of the answers in the loss, between 0 and 1; the task has the rest.
        temperature: Both networks' scores are divided by it; above 1, more is learnt from the unlikely classes.
        features: Names of modules whose outputs are compared as well, by their mean squared difference. Both networks must have
            them, with outputs of equal shapes: a decomposed layer and the layer it replaced, or what stands around it. Of a
            module that is called several times the last call counts.
        feature_weight: Weight of each of them.
        relative: Divide each difference by the teacher's mean square, so that features of all sizes count alike.
        class_dim: The dimension of the scores that counts the classes. Need not be said for ``(N, C)`` scores; say 1 for images
            ``(N, C, H, W)``, −1 for texts ``(N, T, C)``.

    Raises:
        TrainingError: A number makes no sense.
    """

    weight: float = 0.5
    temperature: float = 2.0
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0
    relative: bool = False
    class_dim: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise TrainingError(f"weight is {self.weight}; the answers' share in the loss lies between 0 and 1")
        if not self.temperature > 0:
            raise TrainingError(f"temperature is {self.temperature}; it must be a positive number")
        if not self.feature_weight >= 0:
            raise TrainingError(f"feature_weight is {self.feature_weight}; it must not be negative")
        if isinstance(self.features, str):
            raise TrainingError(f"features is {self.features!r}; give a tuple of module names, such as ({self.features!r},)")

    def loss(self, output: Any, wanted: Any, task: Tensor) -> Tensor:
        """``(1 − weight) · task + weight · answers``: the loss of a step but for its features.

        Args:
            output: What the network answers.
            wanted: What the teacher answers on the same input.
            task: The loss of the task.

        Raises:
            TrainingError: There are no scores, their shapes differ, or nobody can tell the classes.
        """
        if not self.weight:
            return task
        s, t = scores(output), scores(wanted)
        if s.shape != t.shape:
            raise TrainingError(f"the network's scores are {tuple(s.shape)} and the teacher's {tuple(t.shape)}")
        if self.class_dim is None and s.ndim != 2:
            raise TrainingError(
                f"scores of shape {tuple(s.shape)}: say which dimension counts the classes, Distillation(class_dim=…)"
            )
        answers = answer_loss(s, t, temperature=self.temperature, class_dim=1 if self.class_dim is None else self.class_dim)
        return (1 - self.weight) * task + self.weight * answers


def answer_loss(s: Tensor, t: Tensor, *, temperature: float = 1.0, class_dim: int = 1) -> Tensor:
    """``T² · KL(softmax(t / T) ‖ softmax(s / T))``, summed over the classes, meant over everything else.

    Hinton et al., arXiv 1503.02531: the factor T² keeps its gradients as large as the task's. It is 0 where both agree, and its
    gradient is that of the cross-entropy with the teacher's probabilities.

    Args:
        s: Scores of the student.
        t: Scores of the teacher, of the same shape.
        temperature: T.
        class_dim: Which dimension counts the classes.
    """
    T = temperature
    student, teacher = (F.log_softmax(x.to(torch.promote_types(x.dtype, torch.float32)) / T, class_dim) for x in (s, t))
    return T**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(class_dim).mean()


@final
class Teacher:
    """The original beside the network that learns from it, made by `taught`."""

    def __init__(self, student: nn.Module, teacher: nn.Module, options: Distillation) -> None:
        self.teacher = teacher
        self.options = options
        self._seen: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        watched = [
            (_module(model, name, role), _recorder(seen, name))
            for model, seen, role in zip((student, teacher), self._seen, ("network", "teacher"), strict=True)
            for name in options.features
        ]
        self._handles = [module.register_forward_hook(recorder) for module, recorder in watched]

    def close(self) -> None:
        """Take the hooks off both networks."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def answers(self, inputs: Workload) -> Any:
        """The teacher's output; its features of these inputs are kept until the next ones."""
        self._seen[1].clear()
        return inputs.run(self.teacher)

    def loss(self, output: Any, wanted: Any, task: Tensor) -> Tensor:
        """The loss of a step, from both outputs on the same input and the loss of the task.

        Raises:
            TrainingError: Shapes differ, or nobody can tell the classes.
        """
        total = self.options.loss(output, wanted, task)
        for name in self.options.features:
            here, there = self._seen[0].pop(name, None), self._seen[1].get(name)
            if not (isinstance(here, Tensor) and isinstance(there, Tensor)):
                raise TrainingError(f"{name} cannot be compared: it was not called, or its output is no tensor")
            if here.shape != there.shape:
                raise TrainingError(
                    f"{name}: output {tuple(here.shape)} cannot be compared with the teacher's {tuple(there.shape)}"
                )
            here, there = here.float(), there.float()
            # A feature of zeros has no size: whatever differs from it is far off.
            size = there.square().mean().clamp_min(torch.finfo(there.dtype).tiny) if self.options.relative else 1.0
            total = total + self.options.feature_weight * F.mse_loss(here, there) / size
        return total


@contextmanager
def taught(student: nn.Module, teacher: nn.Module | None, options: Distillation | None) -> Iterator[Teacher | None]:
    """A teacher for a training, in eval mode; afterwards its modes are as they were, and the hooks are gone.

    Raises:
        TrainingError: The teacher is the network itself or shares weights with it, or lacks a module named in ``features``.
    """
    if teacher is None:
        if options is not None:
            raise TrainingError("distillation needs somebody to learn from: pass the untouched original as teacher=")
        yield None
        return
    mine = {id(parameter) for parameter in student.parameters()}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in mine]
    if shared:
        raise TrainingError(
            f"the teacher shares {shared[0]} with the network, so it would be trained too: pass the untouched original, "
            "of which lamina.decompose(…, inplace=False) makes a copy"
        )
    modes = [(module, module.training) for module in teacher.modules()]
    together = Teacher(student, teacher, options or Distillation())
    try:
        set_mode(teacher, False)
        yield together
    finally:
        together.close()
        for module, training in modes:
            module.training = training


def scores(output: Any) -> Tensor:
    """The scores in an output: itself, its ``logits``, or the first of several.

    Raises:
        TrainingError: None of these is a tensor.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise TrainingError(f"the output is a {type(output).__name__} without scores to learn from (a tensor, or .logits)")
    return found


def _module(model: nn.Module, name: str, role: str) -> nn.Module:
    known: dict[str, nn.Module] = dict(model.named_modules())
    if name not in known:
        raise TrainingError(f"features names {name!r}, which the {role} does not have{closest(name, list(known))}")
    return known[name]


def _recorder(seen: dict[str, Any], name: str) -> Any:
    def record(_: nn.Module, args: Any, output: Any) -> None:
        seen[name] = output

    return record
