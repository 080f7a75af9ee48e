"""An optimizer on trial: toys that rest in turn tell whether it leaves alone what rests. Its name tells nothing."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import TrainingWarning
from ..network.running import first_line

_SLOPES = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

_Toys = list[tuple[int, nn.Parameter]]
"""Toys, each with the number of the side that it stands for."""


def wants_argument(thing: Any) -> bool:
    """Whether ``step`` of an optimizer or a schedule cannot be called alone, as where it needs a closure or a metric."""
    _, *parameters = inspect.signature(type(thing).step).parameters.values()
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.default is p.empty and p.kind in named for p in parameters)


def complaint(optimizer: Any, sides: Sequence[Collection[int]]) -> str | None:
    """What goes wrong where two sets of parameters rest in turn, found by a second optimizer that trains toys.

    It has the class and the settings of the first and as many parameter groups, each with one toy for every set that has a
    parameter there, and one for all others.

    Args:
        optimizer: Anything with ``param_groups``.
        sides: The two sets, as ids of parameters.

    Returns:
        What goes wrong; None where nothing does, or where no second one can be made, of which a warning tells.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):  # Accelerate's wrapper, Lightning's
        optimizer = optimizer.optimizer
    name = type(optimizer).__name__
    try:
        _train(*_twin(optimizer, sides), [None])
    except Exception as error:  # somebody else's optimizer may raise anything
        warnings.warn(
            f"{name} could not be tried on toys ({type(error).__name__}: {first_line(error)}): see for yourself that it "
            "leaves parameters without a gradient alone",
            TrainingWarning,
            stacklevel=3,
        )
        return None
    try:
        moves = _train(*_twin(optimizer, sides), [0, 0, 1, 1, 0])
    except Exception as error:
        return f"{name} fails where a part of its parameters rests ({type(error).__name__}: {first_line(error)})"
    return f"{name} moves parameters that have no gradient, so nothing would rest" if moves else None


def _twin(optimizer: Any, sides: Sequence[Collection[int]]) -> tuple[Any, _Toys]:
    toys: _Toys = []
    groups = []
    for group in optimizer.param_groups:
        options = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
        if options.get("lr") is not None:
            options["lr"] = options["lr"] + 0.1  # a schedule may begin at 0, where nothing moves
        kinds = {next((n for n, side in enumerate(sides) if id(p) in side), len(sides)): p for p in group["params"]}
        mine = [(kind, nn.Parameter(torch.ones(2, 2, dtype=p.dtype, device=p.device))) for kind, p in kinds.items()]
        groups.append(options | {"params": [toy for _, toy in mine]})
        toys += mine
    taken = inspect.signature(type(optimizer)).parameters
    return type(optimizer)(groups, **{key: value for key, value in optimizer.defaults.items() if key in taken}), toys


@torch.enable_grad()
def _train(optimizer: Any, toys: _Toys, phases: Sequence[int | None]) -> bool:
    """Train toys, a step a phase; whether one moved that rested."""
    moved = False
    for step, resting in enumerate(phases):
        for kind, toy in toys:
            toy.requires_grad_(kind != resting)
        before = [toy.detach().clone() for _, toy in toys]

        def closure(goal: int = step + 2) -> Any:
            for _, toy in toys:
                toy.grad = None
            # Bounded gradients, whatever the rate; no two entries alike, or a quasi-Newton method sees a sphere.
            loss = sum(
                ((kind + 1) * _SLOPES.to(toy) * (1 + (toy - goal).square()).sqrt()).sum()
                for kind, toy in toys
                if toy.requires_grad
            )
            if isinstance(loss, torch.Tensor):
                loss.backward()  # type: ignore[no-untyped-call]
            return loss

        if wants_argument(optimizer):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        moved |= any(kind == resting and not torch.equal(toy, old) for (kind, toy), old in zip(toys, before, strict=True))
    return moved
