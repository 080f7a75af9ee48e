"""By how much two networks' answers differ on an example."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .errors import ExampleError
from .network.copying import Exchanged
from .network.running import ANSWERING
from .network.trial import tried
from .plan import MUCH
from .values import Workload

TO_DO = "measure how accurate the network still is, or choose with data= (lamina.calibrate)"
"""Where outputs change by much."""


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


def change(
    model: nn.Module,
    small: nn.Module,
    batches: Iterable[Workload],
    answered: Callable[[nn.Module, Workload], list[Tensor]] | None = None,
) -> float | None:
    """By how much the second network's answers differ from the first's, ‖after − before‖ / ‖before‖ over all numbers in them.

    As `answers` runs them, so nothing of them is changed; the second one by ``answered``, where somebody else runs it.

    Returns:
        Infinity where numbers are no longer finite. None where it cannot be told: one of them does not run, there are no
        numbers, or other shapes.
    """

    def both(workload: Workload) -> tuple[list[Tensor], list[Tensor]]:
        before = answers(model, [workload])
        return before, answers(small, [workload]) if answered is None else answered(small, workload)

    try:
        return moved(map(both, batches))
    except ExampleError:
        return None


def moved(pairs: Iterable[tuple[list[Tensor], list[Tensor]]]) -> float | None:
    """The same of answers that are there: those of each batch, before and after."""
    difference = size = 0.0
    for before, after in pairs:
        if [each.shape for each in before] != [each.shape for each in after]:
            return None
        for old, new in zip(before, after, strict=True):
            if old.is_floating_point() or old.is_complex():
                # Equal infinities are no difference.
                difference += float(torch.where(old == new, 0.0, new - old).abs().double().square().sum())
                size += float(old[old.isfinite()].abs().double().square().sum())
    if not size:
        return None
    return math.sqrt(difference / size) if math.isfinite(difference) else math.inf


def in_words(change: float, on: str = "the example") -> str:
    """``outputs change by 0.12 of their size``, with a warning where that is much."""
    told = headline(change, on)
    return told if change <= MUCH else f"{told}: {TO_DO}"


def headline(change: float, on: str = "the example") -> str:
    """The same without what to do."""
    return f"{'' if change <= MUCH else 'WARNING: '}outputs change by {change:.2g} of their size on {on}"


def _apart(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    difference = torch.where(a == b, 0.0, a - b).norm()  # equal infinities are no difference
    return float((difference / a[a.isfinite()].norm().clamp_min(1e-300)).nan_to_num(torch.inf))
