"""Times things fairly: interleaved, warmed up, synchronised, as medians with their spread and their conditions."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import zip_longest
from math import ceil, comb
from statistics import median
from typing import Any, final

import torch
from torch import nn

from ..values import Setting, Timing

ALIKE = 1.4
"""Times of the same that differ by less are of one machine: from process to process ResNet-50 took 119 to 155 ms."""
_WIDE = 1.3
"""What comparisons of whole networks are known to on a quiet machine is some hundredths."""
_KEPT = 2**25 - 2**16
"""Bytes of the largest block from which glibc's malloc still learns, with room for what it puts around it."""
_MOST_CALLS = 4096
"""Of what takes next to nothing, a sample is so many calls."""


@final
@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: until ratios are known to ``precision``, and no longer than ``seconds``.

    Attributes:
        seconds: The most to spend, whatever is known by then; only ``least`` rounds are made in any case.
        least, most: How many rounds.
        precision: The relative half width of the 95 % interval of a run's ratio to the first run that is enough. 0: as many
            rounds as ``seconds`` and ``most`` allow.
        sample: A sample takes so many seconds at least: what is quicker runs several times for it, since the clock itself and
            an interrupt take microseconds. 0: a sample is one run.
    """

    seconds: float = 0.5
    least: int = 5
    most: int = 20
    precision: float = 0.005
    sample: float = 200e-6


def interleave(
    runs: Sequence[Callable[[], Any]],
    devices: torch.device | Iterable[torch.device],
    effort: Effort,
    before: Sequence[Callable[[], Any]] = (),
) -> list[list[float]]:
    """Time several things in turn, round after round, so that a drift of the machine meets all of them alike.

    A round goes there and back, and a time is the mean of both ways: what stands behind a heavy neighbour on the one stands
    before it on the other, and what finds its own data in the caches at the turn does so in every round. Where there is no time
    for that, every other round goes backwards. Accelerators are waited for at the end of each sample and nowhere else.

    When to stop is decided by how much time has gone and by how wide the intervals are, never by where they lie: to stop at a
    ratio that pleases would favour lucky ones. Widths are looked at a few times only, each time after half as many rounds more,
    since one that is looked at all the time is narrow by chance at some time.

    Args:
        runs: What is timed.
        devices: Every device on which a run computes.
        effort: How long to measure.
        before: What is done before each call of each run, outside its time. Calls are then timed one by one, each of them
            until it returns: for processors, which have done it by then.

    Returns:
        For each run its times in seconds, one a round; times of the same round stand at the same place.
    """
    synchronise = waiter([devices] if isinstance(devices, torch.device) else devices)
    keep_memory()
    timers = [partial(timed, *each, synchronise=synchronise) for each in zip_longest(runs, before)]
    calls, samples = zip(*(_warmed_up(timer, effort.sample) for timer in timers), strict=True)
    ways = 2 if 2 * effort.least * sum(samples) <= effort.seconds else 1
    times: list[list[float]] = [[] for _ in timers]
    look, forward = effort.least, True
    collecting = gc.isenabled()
    gc.disable()
    try:
        begun = time.perf_counter()
        for rounds in range(max(effort.most, effort.least)):
            # Another round would end after the time is up.
            if rounds >= effort.least and (time.perf_counter() - begun) * (rounds + 1) / rounds > effort.seconds:
                break
            if rounds == look:
                if _known(times, effort.precision):
                    break
                look = ceil(1.5 * look)
            spent = [0.0] * len(timers)
            for _ in range(ways):
                for index in range(len(timers)) if forward else reversed(range(len(timers))):
                    spent[index] += timers[index](calls=calls[index]) / ways
                forward = not forward
            for each, one in zip(times, spent, strict=True):
                each.append(one)
    finally:
        if collecting:
            gc.enable()
    return times


def keep_memory() -> None:
    """Let the process keep memory that is freed, as one does that has freed a large block before.

    glibc's malloc gives memory back to the system, and takes it anew page by page, unless it has learnt from a large block that
    was freed to keep as much. One convolution takes 22 ms before and 7 ms after that, and which of the two a process is in
    depends on all that it did before: so it is taught at once. Elsewhere this does nothing.
    """
    torch.empty(_KEPT, dtype=torch.uint8, device="cpu")


def waiter(devices: Iterable[torch.device]) -> Callable[[], None]:
    """What waits until the accelerators among some devices have done all that was asked of them."""
    accelerators = [device for device in devices if device.type not in ("cpu", "meta")]

    def wait() -> None:
        for device in accelerators:
            torch.accelerator.synchronize(device)

    return wait


def launching(run: Callable[[], Any], accelerators: Iterable[torch.device]) -> float:
    """The share of a run's time in which the processor is still launching it.

    Near 1 the accelerators wait for launches: fewer operations in a kernel then make nothing faster.
    """
    synchronise, shares = waiter(accelerators), []
    synchronise()
    for _ in range(5):
        start = time.perf_counter()
        run()
        launched = time.perf_counter()
        synchronise()
        shares.append((launched - start) / (time.perf_counter() - start))
    return median(shares)


def mark(device: torch.device) -> Any:
    """This moment on a device, for `between`.

    On an accelerator it is an event in its stream, which stops nothing: to wait for it inside a network would time another one,
    in which no kernel is queued behind another.
    """
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    # Its own stream: else it is the current device's, which may be another.
    event.record(torch.accelerator.current_stream(device))
    return event


def between(begin: Any, end: Any) -> float:
    """The seconds between two marks of one device, after an accelerator was waited for."""
    return float(end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3)


def alike(first_s: float, second_s: float, factor: float = ALIKE) -> bool:
    """Whether two times of the same thing are of a machine that was about as fast, and about as busy, at both."""
    return max(first_s, second_s) <= factor * min(first_s, second_s)


def timing(times: Sequence[float], setting: Setting) -> Timing:
    """Median and median absolute deviation of some times in seconds."""
    middle = median(times)
    return Timing(middle, median(abs(t - middle) for t in times), len(times), setting)


def ratio(before: Sequence[float], after: Sequence[float]) -> float:
    """The median of the paired ratios before / after; it lies in every `ratio_interval` of the same times.

    The ratio of the two medians does not, and errs further where the machine drifts.
    """
    return median(b / a for b, a in zip(before, after, strict=True))


def ratio_interval(before: Sequence[float], after: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """A confidence interval of the median of the paired ratios before / after, from their order statistics.

    It assumes nothing of the distribution: the number of ratios below the true median is binomial. Below 6 rounds, 8 at a level
    of 0.99, it is the range of the ratios, which is less sure than the level.
    """
    ratios = sorted(b / a for b, a in zip(before, after, strict=True))
    low = _left_out(len(ratios), level)
    return ratios[low], ratios[len(ratios) - 1 - low]


def disturbed(interval: tuple[float, float]) -> bool:
    """Whether the interval of a ratio is so wide that something else must have run meanwhile, and the ratio tells nothing."""
    low, high = interval
    return high > _WIDE * low


@lru_cache
def _left_out(number: int, level: float) -> int:
    """How many of so many sorted values an interval of the median leaves out at either end."""
    left, below = 0, 1 / 2**number
    while below <= (1 - level) / 2:
        left += 1
        below += comb(number, left) / 2**number
    return max(left - 1, 0)


def denormals(model: nn.Module) -> int:
    """How many weights are denormal: too small for the exponent, and on many CPUs ten times slower to compute with."""
    total = 0
    for parameter in model.parameters():
        if parameter.is_floating_point():
            tiny = torch.finfo(parameter.dtype).tiny
            size = parameter.detach().abs()
            total += int(((size > 0) & (size < tiny)).sum())
    return total


def _known(times: Sequence[Sequence[float]], precision: float) -> bool:
    """Whether every run's ratio to the first one is known so precisely; of a single run, its time."""
    first, *others = times
    pairs = [(first, other) for other in others] or [(first, [1.0] * len(first))]
    intervals = (ratio_interval(*pair) for pair in pairs)
    return precision > 0 and all(high - low <= precision * (high + low) for low, high in intervals)


def _warmed_up(timer: Callable[..., float], sample: float) -> tuple[int, float]:
    """How many calls make a sample, and its seconds; calls are doubled until two samples in a row take long enough."""
    calls = 1
    while True:
        one = min(timer(calls=calls) for _ in range(2))
        if one * calls >= sample or calls >= _MOST_CALLS:
            needed = min(max(ceil(sample / one), 1), calls) if one else calls
            return needed, one * needed
        calls *= 2


def timed(
    run: Callable[[], Any], before: Callable[[], Any] | None = None, *, calls: int = 1, synchronise: Callable[[], None]
) -> float:
    """The seconds of one of some calls in a row, until `waiter` has waited for the last.

    With something to do before each call, outside its time, calls are timed one by one.
    """
    start = time.perf_counter()
    if before is None:
        for _ in range(calls):
            run()
        synchronise()
        return (time.perf_counter() - start) / calls
    spent = 0.0
    for _ in range(calls):
        before()
        start = time.perf_counter()
        run()
        synchronise()
        spent += time.perf_counter() - start
    return spent / calls
