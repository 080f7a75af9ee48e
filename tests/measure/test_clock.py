"""The clock: order, numbers and conditions. What time it is by the wall is never asked here."""

from __future__ import annotations

import gc
import random
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lamina import Setting
from lamina.measure.clock import Effort, denormals, interleave, ratio_interval, timing

CPU = torch.device("cpu")
SETTING = Setting("cpu", "a CPU", "float32", "contiguous", 1, "inference")


def interleaved(number: int, effort: Effort) -> tuple[list[int], list[list[float]]]:
    calls: list[int] = []
    times = interleave([lambda i=i: calls.append(i) for i in range(number)], CPU, effort)  # type: ignore[misc]
    return calls, times


def test_runs_take_turns_and_every_other_round_goes_backwards() -> None:
    calls, _ = interleaved(3, Effort(0.0, least=4, most=4))
    warm, rounds = calls[:6], calls[6:]
    assert warm == [0, 1, 2, 0, 1, 2]
    assert rounds == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0]


def test_every_run_has_a_time_for_every_round() -> None:
    _, times = interleaved(3, Effort(0.0, least=5, most=9))
    assert [len(each) for each in times] == [5, 5, 5]
    assert all(t >= 0 for each in times for t in each)


def test_never_fewer_rounds_than_the_least_nor_more_than_the_most() -> None:
    assert len(interleaved(1, Effort(1e-12, least=3, most=8))[1][0]) == 3
    assert len(interleaved(1, Effort(1e6, least=3, most=8))[1][0]) == 8


def test_the_times_are_the_clocks_between_start_and_end_of_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("lamina.measure.clock.time.perf_counter", lambda: now)

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    quick, slow = interleave([lambda: spend(1.0), lambda: spend(3.0)], CPU, Effort(40.0, least=2, most=60))
    assert quick == [1.0] * 10  # 40 seconds hold ten rounds of four
    assert slow == [3.0] * 10


def test_the_garbage_collector_rests_while_measuring_and_is_put_back_after_an_error() -> None:
    enabled: list[bool] = []
    interleave([lambda: enabled.append(gc.isenabled())], CPU, Effort(0.0, 2, 2))
    assert enabled[2:] == [False, False]
    assert gc.isenabled()

    def fail() -> None:
        enabled.append(True)
        if len(enabled) > 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave([fail], CPU, Effort(0.0, 9, 9))
    assert gc.isenabled()


def test_a_timing_is_median_and_median_absolute_deviation() -> None:
    found = timing([1.0, 2.0, 3.0, 4.0, 100.0], SETTING)
    assert (found.median_s, found.mad_s, found.repeats, found.setting) == (3.0, 1.0, 5, SETTING)
    assert timing([1.0, 2.0], SETTING).median_s == 1.5


PAIRS = st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(PAIRS)
def test_the_interval_holds_the_median_of_the_paired_ratios_and_lies_inside_their_range(
    pairs: list[tuple[float, float]],
) -> None:
    ratios = [b / a for b, a in pairs]
    low, high = ratio_interval([b for b, _ in pairs], [a for _, a in pairs])
    assert min(ratios) <= low <= median(ratios) <= high <= max(ratios)


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
