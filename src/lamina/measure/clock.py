"""Times things fairly: interleaved, warmed up, synchronised, as medians with their spread and their conditions."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, final

import torch
from torch import nn

from ..values import Setting, Timing


@final
@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: rounds until ``seconds`` are spent, but at least and at most so many."""

    seconds: float = 0.5
    least: int = 7
    most: int = 60


def interleave(runs: Sequence[Callable[[], Any]], device: torch.device, effort: Effort) -> list[list[float]]:
    """Time several things in turn, round after round, so that a drift of the machine meets all of them alike.

    Every other round runs backwards: what stands after a heavy neighbour in one stands before it in the next.

    Returns:
        For each run its times in seconds, one a round; times of the same round stand at the same place.
    """
    synchronise = _synchroniser(device)
    for run in runs:
        run()
    synchronise()
    estimate = sum(_timed(run, synchronise) for run in runs)  # warms up a second time
    rounds = int(min(max(effort.seconds / max(estimate, 1e-9), effort.least), effort.most))
    times: list[list[float]] = [[0.0] * rounds for _ in runs]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            order = range(len(runs)) if number % 2 == 0 else reversed(range(len(runs)))
            for index in order:
                times[index][number] = _timed(runs[index], synchronise)
    finally:
        if collecting:
            gc.enable()
    return times


def timing(times: Sequence[float], setting: Setting) -> Timing:
    """Median and median absolute deviation of some times in seconds."""
    middle = median(times)
    return Timing(middle, median(abs(t - middle) for t in times), len(times), setting)


def ratio_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the median of the paired ratios before / after, from their order statistics.

    It assumes nothing of the distribution: the number of ratios below the true median is binomial.
    """
    from scipy.stats import binom

    ratios = sorted(b / a for b, a in zip(before, after, strict=True))
    low = max(int(binom.ppf(0.025, len(ratios), 0.5)) - 1, 0)
    return ratios[low], ratios[len(ratios) - 1 - low]


def denormals(model: nn.Module) -> int:
    """How many weights are denormal: too small for the exponent, and on many CPUs ten times slower to compute with."""
    total = 0
    for parameter in model.parameters():
        if parameter.is_floating_point():
            tiny = torch.finfo(parameter.dtype).tiny
            size = parameter.detach().abs()
            total += int(((size > 0) & (size < tiny)).sum())
    return total


def _timed(run: Callable[[], Any], synchronise: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def _synchroniser(device: torch.device) -> Callable[[], None]:
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)
