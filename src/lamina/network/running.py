"""Runs a network on a workload, in the modes in which it will be used."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ExampleError
from ..values import Mode, Training, Workload

MODES: dict[str, tuple[bool, Callable[[], AbstractContextManager[Any]]]] = {
    "train": (True, torch.enable_grad),
    "eval": (False, torch.enable_grad),
    "eval + no_grad": (False, torch.no_grad),
    "inference_mode": (False, torch.inference_mode),
}
"""Each with its training flag, and what it does about gradients."""

ANSWERING = "eval + no_grad"
"""The mode in which a network is asked for its answers."""


def observed_in(mode: Mode) -> str:
    """The key of `MODES` in which a network is looked at, for times of a mode."""
    return "train" if isinstance(mode, Training) else ANSWERING


_P = ParamSpec("_P")
_R = TypeVar("_R")


def outside_inference_mode(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function make ordinary tensors wherever it is called: those of inference mode can never be trained."""

    @wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return called


class Looking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at every operation of this thread."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to say so would load the compiler


@contextmanager
def unfused() -> Iterator[None]:
    """While PyTorch's encoders call their layers one by one. Fused, they read weights past them, and use nested tensors."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def set_mode(model: nn.Module, training: bool) -> None:
    """Put every module into train or eval mode by its flag alone: no override of ``train`` in the model is called."""
    for module in model.modules():
        module.training = training


def run(model: nn.Module, workload: Workload) -> Any:
    """The output on a workload.

    Raises:
        ExampleError: The network raised; its first line is quoted beside the example's shapes.
    """
    try:
        return workload.run(model)
    except Exception as error:
        raise ExampleError(
            f"the network does not run on the example ({workload}): {complaint(error, model, workload)}"
        ) from error


def said(error: BaseException) -> str:
    """An error's type and first line."""
    return f"{type(error).__name__}: {first_line(error)}"


def complaint(error: BaseException, model: nn.Module, workload: Workload) -> str:
    """The same of a call of a network; where arguments may be what it lacks, also which were not given, and how they are."""
    line = said(error)
    if isinstance(error, TypeError | ValueError | AttributeError) and (absent := _not_given(model, workload)):
        names = ", ".join(absent[:_SHOWN]) + (f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else "")
        line += f"; not given: {names} (a tuple gives arguments in their order, a mapping by name)"
    return line


_SHOWN = 8


def _not_given(model: nn.Module, workload: Workload) -> list[str]:
    """Arguments of a forward that a workload does not give: those that it must have, or if it has these, all others."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # it is not written in Python
        return []
    named = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    named = named[len(workload.args) :] + [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    absent = [each for each in named if each.name not in workload.kwargs]
    return [each.name for each in absent if each.default is each.empty] or [each.name for each in absent]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a message of our own."""
    return str(error).strip().splitlines()[0] if str(error).strip() else "no message"
