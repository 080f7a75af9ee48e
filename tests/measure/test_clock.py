"""The clock: order, numbers and conditions. What time it is by the wall is never asked here."""

from __future__ import annotations

import gc
import platform
import random
import subprocess
import sys
from statistics import median
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import nn

from lamina import Setting
from lamina.measure.clock import Effort, between, denormals, interleave, mark, ratio, ratio_interval, timing

from .conftest import CPU, Clock

SETTING = Setting("cpu", "a CPU", "float32", "contiguous", 1, "inference")


def test_runs_take_turns_and_every_other_round_goes_backwards() -> None:
    calls: list[int] = []
    runs = [lambda i=i: calls.append(i) for i in range(3)]  # type: ignore[misc]
    interleave(runs, CPU, Effort(0.0, least=4, most=4, sample=0.0))
    warm, rounds = calls[:6], calls[6:]
    assert warm == [0, 0, 1, 1, 2, 2]
    assert rounds == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0]


def test_every_run_has_a_time_for_every_round() -> None:
    """With the real clock, shortly."""
    times = interleave([lambda: None] * 3, CPU, Effort(0.0, least=5, most=9))
    assert [len(each) for each in times] == [5, 5, 5]
    assert all(t >= 0 for each in times for t in each)


def test_rounds_are_made_until_another_would_end_too_late_but_never_fewer_than_the_least_nor_more_than_the_most(
    clock: Clock,
) -> None:
    def rounds(seconds: float) -> int:
        return len(clock.interleaved(1.0, 3.0, effort=Effort(seconds, least=3, most=20, precision=0.0))[0])

    # A round takes four seconds; from 24 on, when three rounds there and back are in time, eight.
    assert [rounds(seconds) for seconds in (0.0, 20.0, 23.0, 24.0, 40.0, 47.0, 1e6)] == [3, 5, 5, 3, 5, 5, 20]


def test_where_there_is_time_a_round_goes_there_and_back_and_its_times_are_means_of_both_ways(clock: Clock) -> None:
    """What runs twice in a row is quicker the second time; so who stands at the turn must do so in every round."""
    log: list[int] = []

    def run(number: int) -> None:
        clock.spend(1.0 if log[-1:] == [number] else 2.0)
        log.append(number)

    effort = Effort(60.0, least=3, most=4, precision=0.0, sample=0.0)
    times = interleave([lambda: run(0), lambda: run(1)], CPU, effort)
    assert log == [0, 0, 1, 1, *[0, 1, 1, 0] * 4]
    assert times == [[2.0, 1.5, 1.5, 1.5], [1.5] * 4]


def test_the_times_are_the_clocks_between_start_and_end_of_each_run(clock: Clock) -> None:
    assert clock.interleaved(1.0, 3.0, effort=Effort(0.0, least=2, most=2)) == [[1.0, 1.0], [3.0, 3.0]]


def test_what_is_quicker_than_a_sample_runs_several_times_for_it_and_its_time_is_that_of_one_run(clock: Clock) -> None:
    runs = [0, 0]

    def run(number: int, seconds: float) -> None:
        runs[number] += 1
        clock.spend(seconds)

    effort = Effort(0.0, least=10, most=10, sample=1.0)
    quick, slow = interleave([lambda: run(0, 0.18), lambda: run(1, 5.0)], CPU, effort)
    assert quick == [pytest.approx(0.18)] * 10 and slow == [pytest.approx(5.0)] * 10
    assert runs == [2 * (1 + 2 + 4 + 8) + 10 * 6, 2 + 10]  # warmed up, then ten samples of 6 runs and of one


def test_a_sluggish_first_run_does_not_pass_for_a_long_one(clock: Clock) -> None:
    seconds = iter([100.0])
    runs = 0

    def run() -> None:
        nonlocal runs
        runs += 1
        clock.spend(next(seconds, 0.25))

    interleave([run], CPU, Effort(0.0, least=1, most=1, sample=1.0))
    assert runs == 2 * (1 + 2 + 4) + 4


def test_the_clock_of_what_takes_nothing_ends(clock: Clock) -> None:
    assert clock.interleaved(0.0, effort=Effort(0.0, least=1, most=1)) == [[0.0]]


def test_what_is_known_precisely_enough_is_not_measured_on(clock: Clock) -> None:
    def rounds(spread: float, precision: float) -> int:
        draw = random.Random(0)
        run = lambda: clock.spend(draw.uniform(1 - spread, 1 + spread))  # noqa: E731
        return len(interleave([run, run], CPU, Effort(1e9, least=7, most=300, precision=precision, sample=0.0))[0])

    assert rounds(0.001, 0.01) == 7
    assert 7 < rounds(0.1, 0.02) < rounds(0.1, 0.01) < 300
    assert rounds(0.1, 0.0) == 300


def test_stopping_at_a_width_does_not_favour_ratios_and_leaves_the_interval_its_level(clock: Clock) -> None:
    draw = random.Random(2)
    found, covered, counts = [], 0, set()
    for _ in range(400):
        runs = [lambda t=t: clock.spend(t * draw.lognormvariate(0, 0.05)) for t in (1.7, 1.0)]  # type: ignore[misc]
        before, after = interleave(runs, CPU, Effort(1e9, least=7, most=200, precision=0.02, sample=0.0))
        low, high = ratio_interval(before, after)
        covered += low <= 1.7 <= high
        counts.add(len(before))
        found.append(ratio(before, after))
    assert len(counts) > 2
    assert covered >= 367  # 380 expected; three standard deviations of a count of 400 below
    assert median(found) == pytest.approx(1.7, rel=0.002)


def test_an_accelerator_is_waited_for_once_a_sample_after_all_its_calls(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Kernels are queued at once and take their time when they are waited for."""
    queued, log = 0, list[str]()

    def run() -> None:
        nonlocal queued
        queued += 1
        log.append("run")

    def wait(device: torch.device) -> None:
        nonlocal queued
        assert device.type == "cuda"
        clock.spend(0.3 * queued)
        queued = 0
        log.append("wait")

    monkeypatch.setattr(torch.accelerator, "synchronize", wait)
    [times] = interleave([run], torch.device("cuda"), Effort(0.0, least=2, most=2, sample=1.0))
    assert times == [pytest.approx(0.3)] * 2
    assert log[-10:] == [*["run"] * 4, "wait"] * 2


def test_of_several_devices_every_accelerator_is_waited_for_and_the_cpu_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    devices = [CPU, torch.device("cuda:0"), torch.device("cuda:1"), torch.device("meta")]
    interleave([lambda: None], devices, Effort(0.0, least=1, most=1, sample=0.0))
    assert waited == [torch.device("cuda:0"), torch.device("cuda:1")] * 3  # two samples warm up


class Event:
    """An event of an accelerator: each is recorded half a second after the last, in a stream of its own device."""

    recorded: ClassVar[list[Event]] = []

    def __init__(self, device: torch.device, enable_timing: bool) -> None:
        assert enable_timing
        self.device, self.at = device, -1

    def record(self, stream: torch.device) -> None:
        assert stream == self.device  # the current device may be another
        self.at = len(self.recorded)
        self.recorded.append(self)

    def elapsed_time(self, end: Event) -> float:
        return 500.0 * (end.at - self.at)


def test_a_mark_on_an_accelerator_is_an_event_in_the_stream_of_that_device_and_nothing_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(device: torch.device) -> None:
        raise AssertionError("it waited")

    monkeypatch.setattr(Event, "recorded", [])
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "synchronize", never)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: device)
    begin, *_, end = (mark(torch.device("cuda:1")) for _ in range(4))
    assert between(begin, end) == 1.5


def test_a_mark_on_the_cpu_is_a_moment_of_the_clock(clock: Clock) -> None:
    begin = mark(CPU)
    clock.spend(2.0)
    assert between(begin, mark(CPU)) == 2.0


def test_the_garbage_collector_rests_while_measuring_and_is_put_back_after_an_error() -> None:
    enabled: list[bool] = []
    interleave([lambda: enabled.append(gc.isenabled())], CPU, Effort(0.0, 2, 2, sample=0.0))
    assert enabled[2:] == [False, False]
    assert gc.isenabled()

    def fail() -> None:
        enabled.append(True)
        if len(enabled) > 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave([fail], CPU, Effort(0.0, 9, 9, sample=0.0))
    assert gc.isenabled()


def test_a_timing_is_median_and_median_absolute_deviation() -> None:
    found = timing([1.0, 2.0, 3.0, 4.0, 100.0], SETTING)
    assert (found.median_s, found.mad_s, found.repeats, found.setting) == (3.0, 1.0, 5, SETTING)
    assert timing([1.0, 2.0], SETTING).median_s == 1.5


@st.composite
def drifting(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """Times of two runs on a machine that drifts, and on which bursts slow down some rounds, or one run of them."""
    rounds = draw(st.integers(1, 60))
    several = st.lists(st.floats(0.1, 10), min_size=rounds, max_size=rounds)
    drift, step = draw(st.floats(0.9, 1.1)), draw(st.floats(0.9, 1.1))
    bursts, one = draw(several), draw(several)
    before = [drift**n * burst for n, burst in enumerate(bursts)]
    return before, [b * step * o for b, o in zip(before, one, strict=True)]


@settings(max_examples=200, deadline=None)
@given(drifting(), st.floats(0.5, 0.999))
def test_a_speed_up_lies_in_its_interval_and_both_in_the_range_of_the_paired_ratios(
    times: tuple[list[float], list[float]], level: float
) -> None:
    ratios = [b / a for b, a in zip(*times, strict=True)]
    low, high = ratio_interval(*times, level)
    assert min(ratios) <= low <= ratio(*times) <= high <= max(ratios)


@pytest.mark.parametrize("level", [0.95, 0.99])
@pytest.mark.parametrize("rounds", [6, 8, 9, 31, 60, 400])
def test_an_interval_leaves_out_as_many_as_the_binomial_distribution_says(rounds: int, level: float) -> None:
    ratios = [float(n) for n in range(1, rounds + 1)]
    quantile = int(binom.ppf((1 - level) / 2, rounds, 0.5))
    assert ratio_interval(ratios, [1.0] * rounds, level) == (max(quantile, 1), rounds + 1 - max(quantile, 1))


@pytest.mark.parametrize("rounds", [7, 9, 20, 61])
def test_the_interval_covers_the_true_ratio_at_least_95_times_in_100(rounds: int) -> None:
    draw = random.Random(rounds)
    covered = 0
    for _ in range(1000):
        after = [draw.lognormvariate(0, 0.3) for _ in range(rounds)]
        before = [1.7 * a * draw.lognormvariate(0, 0.2) for a in after]
        low, high = ratio_interval(before, after)
        covered += low <= 1.7 <= high
    assert covered >= 935  # 950 expected at the least; two standard deviations of a count of 1000 below


def test_a_drift_of_the_machine_does_not_widen_the_interval() -> None:
    drift = [1.1**n for n in range(20)]
    low, high = ratio_interval([2 * d for d in drift], drift)
    assert low == pytest.approx(2)
    assert high == pytest.approx(2)


def test_denormal_weights_are_counted_and_zeros_and_normal_ones_are_not() -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 1e-40, -1e-44, 1e-30]]))
    assert denormals(model) == 2


KEPT = """
import resource
import torch
from lamina.measure.clock import Effort, interleave

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        several = [torch.ones(2**21) for _ in range(5)]  # 8 MB each, and all of them freed
        del several
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

interleave([lambda: None], torch.device("cpu"), Effort(0.01, 1, 1))
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_what_is_timed_does_not_take_its_memory_from_the_system_in_every_run() -> None:
    """Without it most processes ask the system 50 times; not one in which a large block was freed on its way, by an import."""
    faults = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True).stdout
    once = 5 * 2**23 // 4096
    assert int(faults) < once
