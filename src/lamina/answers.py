"""By how much two networks' answers differ on an example."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import ExampleError
from .network.copying import Exchanged
from .network.running import ANSWERING
from .network.trial import tried
from .values import Workload

MUCH = 0.3
"""Outputs that change by more, relative to their size, are seldom those of the same network for who uses them."""


def answers(model: nn.Module, examples: list[Workload], exchanged: Exchanged | None = None) -> list[Tensor]:
    """The tensors that a network answers in eval mode: each time a shadow of it as it is now, from the same random state.

    Raises:
        ExampleError: It does not run.
    """
    found: list[Tensor] = []
    for workload in examples:
        outcome = tried(model, workload, exchanged, modes=(), answering=True)
        if complaint := outcome.complaints[ANSWERING]:
            raise ExampleError(f"it does not run: {complaint}")
        found += outcome.answer
    return found


def apart(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest change of a tensor, relative to its size, in the Frobenius norm; infinite where numbers are no longer finite.

    Raises:
        ValueError: There are more tensors on one side.
    """
    return max((_apart(a, b) for a, b in zip(before, after, strict=True)), default=0.0)


def change(model: nn.Module, small: nn.Module, examples: list[Workload]) -> float | None:
    """By how much the outputs change, see `apart`; None where they cannot be held against each other."""
    try:
        before, after = answers(model, examples), answers(small, examples)
    except ExampleError:
        return None
    if [each.shape for each in before] != [each.shape for each in after]:
        return None
    return apart(before, after)


def in_words(change: float) -> str:
    """``outputs change by 0.12 of their size``, with a warning where that is much."""
    told = f"outputs change by {change:.2g} of their size on the example"
    if change <= MUCH:
        return told
    return f"WARNING: {told}: measure how accurate the network still is, or choose with data= (lamina.calibrate)"


def _apart(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    difference = torch.where(a == b, 0.0, a - b).norm()  # equal infinities are no difference
    return float((difference / a[a.isfinite()].norm().clamp_min(1e-300)).nan_to_num(torch.inf))
