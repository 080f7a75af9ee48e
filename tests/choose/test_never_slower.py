"""Putting back what does not pay. A fake stopwatch says what things take; no clock is looked at."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lamina
from lamina import (
    BlockTerm,
    ExampleError,
    Inference,
    LowRank,
    SequentialFreezing,
    Training,
    VanillaFreezing,
    Workload,
    comparison,
)
from lamina.choose import never_slower as room
from lamina.choose.never_slower import LOOKS, TWINS, Forms, Pair, Stopwatch, Verdict, Watch, never_slower
from lamina.choose.rules import Choice, Question
from lamina.forms import Form
from lamina.layers.decomposed import DecomposedLayer
from lamina.measure.clock import Effort
from lamina.measure.table import TimingTable
from lamina.network.walk import walk

specification = importlib.util.spec_from_file_location("verdicts", Path(__file__).parents[2] / "benchmarks" / "verdicts.py")
assert specification is not None and specification.loader is not None
verdicts = sys.modules[specification.name] = importlib.util.module_from_spec(specification)
specification.loader.exec_module(verdicts)
simulated = verdicts.simulated

ROUNDS = 9
NAMES = ("a", "b", "c", "d", "e")
CHOSEN: dict[str, Form] = {name: LowRank(2) for name in NAMES}


@dataclass
class FakeWatch:
    """Each layer gains some seconds in its place; the whole network takes 10, less the gains, plus a toll.

    The toll is what no layer shows alone: it is taken for each layer that is not dense. Gains and tolls are by workload.
    """

    gains: Mapping[str, float | tuple[float, ...]]
    tolls: tuple[float, ...] = (0.0,)
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def gain(self, name: str, workload: int) -> float:
        gain = self.gains[name]
        return gain[workload] if isinstance(gain, tuple) else gain

    def whole(self, forms: Forms) -> list[Pair]:
        self.asked.append(tuple(forms))
        saved = [sum(self.gain(name, at) - toll for name in forms) for at, toll in enumerate(self.tolls)]
        return [([10.0] * ROUNDS, [10.0 - each] * ROUNDS) for each in saved]

    def in_place(self, forms: Forms) -> dict[str, list[Pair]]:
        return {
            name: [([1.0] * ROUNDS, [1.0 - self.gain(name, at)] * ROUNDS) for at in range(len(self.tolls))] for name in forms
        }


def judged(watch: Watch, names: Sequence[str] = NAMES, weights: tuple[float, ...] = (1.0,), **options: Any) -> Verdict:
    examples = [Workload(torch.zeros(at + 1), weight) for at, weight in enumerate(weights)]
    chosen = dict.fromkeys(names, LowRank(2))
    return never_slower(nn.ReLU(), {}, chosen, examples, Inference(), stopwatch=watch, **options)


def test_where_every_layer_loses_all_are_put_back() -> None:
    verdict = judged(FakeWatch(dict.fromkeys(NAMES, -0.1)))
    assert verdict.kept == {}
    assert set(verdict.put_back) == set(NAMES)
    assert verdict.before == verdict.after


def test_where_nothing_is_decomposed_no_speed_up_is_claimed() -> None:
    """The rounds of two equal networks differ by their noise alone."""

    class Noise(FakeWatch):
        def whole(self, forms: Forms) -> list[Pair]:
            return [([1.0 + n / 100 for n in range(ROUNDS)], [1.0] * ROUNDS)]

    verdict = judged(Noise(dict.fromkeys(NAMES, -0.1)))
    assert (verdict.speedup, verdict.interval) == (None, None)
    assert verdict.after == verdict.before


def test_where_every_layer_gains_none_is_put_back() -> None:
    verdict = judged(FakeWatch(dict.fromkeys(NAMES, 0.1)))
    assert verdict.kept == CHOSEN
    assert verdict.put_back == {}
    assert verdict.after == [pytest.approx(9.5)] * ROUNDS
    assert verdict.speedup == pytest.approx(10 / 9.5)


def test_reported_rounds_that_something_disturbed_are_timed_on() -> None:
    """The first look judges; in the one that is reported two rounds of nine take three times as long."""

    class Busy(FakeWatch):
        def whole(self, forms: Forms) -> list[Pair]:
            ((before, after),) = super().whole(forms)
            return [(before, [3 * each if len(self.asked) == 2 and n < 2 else each for n, each in enumerate(after)])]

    watch = Busy(dict.fromkeys(NAMES, 0.1))
    verdict = judged(watch)
    assert len(watch.asked) == 3 and len(verdict.before) == len(verdict.after) == 2 * ROUNDS
    assert verdict.interval == pytest.approx((10 / 9.5, 10 / 9.5))
    calm = FakeWatch(dict.fromkeys(NAMES, 0.1))
    assert len(judged(calm).before) == ROUNDS and len(calm.asked) == 2


def test_only_the_losers_are_put_back_and_the_reason_says_how_much_they_lose() -> None:
    verdict = judged(FakeWatch(dict(zip(NAMES, (0.2, -0.1, 0.3, -0.25, 0.1), strict=True))))
    assert set(verdict.kept) == {"a", "c", "e"}
    assert set(verdict.put_back) == {"b", "d"}
    assert "rank 2 takes 1.10 of the dense layer's time" in verdict.put_back["b"]
    assert "1.25" in verdict.put_back["d"]


@pytest.mark.parametrize("gain", [0.0, 0.009])
def test_what_gains_less_than_the_margin_is_put_back(gain: float) -> None:
    assert set(judged(FakeWatch(dict(zip(NAMES, (gain, 0.1, 0.1, 0.1, 0.1), strict=True)))).put_back) == {"a"}


def test_where_the_whole_gains_less_than_the_margin_nothing_is_kept() -> None:
    assert judged(FakeWatch(dict.fromkeys(NAMES, 0.015))).kept == {}


def test_where_the_whole_is_slower_though_every_layer_gains_the_least_gains_go_first() -> None:
    verdict = judged(FakeWatch(dict(zip(NAMES, (0.05, 0.4, 0.06, 0.5, 0.07), strict=True)), tolls=(0.3,)))
    assert set(verdict.kept) == {"b", "d"}
    assert all("whole network ran at ×" in why for why in verdict.put_back.values())
    assert verdict.after[0] < verdict.before[0]


def test_a_network_that_is_slower_whatever_is_kept_ends_as_it_was() -> None:
    watch = FakeWatch(dict.fromkeys(NAMES, 0.1), tolls=(5.0,))
    verdict = judged(watch)
    assert verdict.kept == {}
    assert set(verdict.put_back) == set(NAMES)
    assert list(dict.fromkeys(map(len, watch.asked))) == [5, 4, 2, 0]  # twice as many each time


def test_never_slower_holds_for_each_of_several_workloads() -> None:
    """The second workload loses what the first gains four times over: the mean alone would keep all."""
    watch = FakeWatch(dict.fromkeys(NAMES, 0.4), tolls=(0.0, 0.6))
    verdict = judged(watch, weights=(0.9, 0.1))
    assert verdict.kept == {}
    assert all(why.endswith("with it on 2") for why in verdict.put_back.values())


def test_a_workload_that_a_plan_leaves_alone_puts_nothing_back() -> None:
    verdict = judged(FakeWatch(dict.fromkeys(NAMES, (0.4, 0.0)), tolls=(0.0, 0.0)), weights=(0.5, 0.5))
    assert verdict.kept == CHOSEN


def test_of_several_workloads_what_loses_on_the_one_that_loses_is_put_back_alone() -> None:
    """It gains most in the mean, and the others gain on both workloads."""
    names = [f"layer {n}" for n in range(16)] + ["culprit"]
    watch = FakeWatch(dict.fromkeys(names, (0.05, 0.05)) | {"culprit": (0.5, -1.0)}, tolls=(0.0, 0.0))
    verdict = judged(watch, names, (0.75, 0.25))
    assert set(verdict.put_back) == {"culprit"}
    assert verdict.speedup == pytest.approx(10 / 9.2)


def test_the_reported_times_are_the_workloads_sums_by_weight() -> None:
    verdict = judged(FakeWatch(dict.fromkeys(NAMES, 0.4), tolls=(0.0, 0.2)), weights=(0.75, 0.25))
    assert verdict.kept == CHOSEN
    assert verdict.after == [pytest.approx(0.75 * 8 + 0.25 * 9)] * ROUNDS
    assert verdict.interval == (pytest.approx(10 / 8.25), pytest.approx(10 / 8.25))


def test_the_reported_times_are_fresh() -> None:
    """Rounds that decided are lucky ones."""

    class Lucky(FakeWatch):
        def whole(self, forms: Forms) -> list[Pair]:
            self.asked.append(tuple(forms))
            return [([10.0] * ROUNDS, [9.0 + len(self.asked) / 10] * ROUNDS)]

    watch = Lucky(dict.fromkeys(NAMES, 0.1))
    verdict = judged(watch)
    assert verdict.after == [9.0 + len(watch.asked) / 10] * ROUNDS
    assert len(watch.asked) == 2


def test_a_layer_that_the_timed_runs_never_reach_is_put_back() -> None:
    class Unreached(FakeWatch):
        def in_place(self, forms: Forms) -> dict[str, list[Pair]]:
            return super().in_place(forms) | {"a": [([0.0] * ROUNDS, [0.0] * ROUNDS)]}

    verdict = judged(Unreached(dict.fromkeys(NAMES, 0.1)))
    assert verdict.put_back == {"a": "the layer is never called in inference"}
    assert set(verdict.kept) == {"b", "c", "d", "e"}


def test_one_bad_moment_puts_nothing_back() -> None:
    """In each stage the first look meets a neighbour who slows down the decomposed network by half."""

    class Disturbed(FakeWatch):
        def whole(self, forms: Forms) -> list[Pair]:
            [(before, after)] = super().whole(forms)
            return [(before, [1.5 * t for t in after] if len(self.asked) == 1 else after)]

        looks = 0

        def in_place(self, forms: Forms) -> dict[str, list[Pair]]:
            self.looks += 1
            found = super().in_place(forms)
            return {name: [(b, [1.5 * t for t in a] if self.looks == 1 else a)] for name, [(b, a)] in found.items()}

    assert judged(Disturbed(dict.fromkeys(NAMES, 0.46))).put_back == {}


def test_it_is_told_how_the_judging_goes_on() -> None:
    told: list[tuple[str, int, int]] = []
    judged(FakeWatch(dict(zip(NAMES, (0.2, -0.1, 0.3, 0.2, 0.1), strict=True))), advance=lambda *step: told.append(step))
    assert {what for what, _, _ in told} == {"timing layers in their places", "timing the whole network"}
    assert all(0 <= done < of for _, done, of in told)
    assert told[:2] == [("timing layers in their places", 0, LOOKS), ("timing layers in their places", 1, LOOKS)]


@pytest.mark.parametrize("placement", [0.0, 0.01])
@pytest.mark.parametrize("share", [0.99, 1.0, 1.01])
def test_forms_that_take_as_long_as_the_dense_layer_are_never_kept(share: float, placement: float) -> None:
    assert simulated([share], placement=placement).kept == {share: 0.0}


@pytest.mark.parametrize("placement", [0.0, 0.01])
def test_forms_that_gain_a_tenth_are_always_kept_and_the_report_is_right(placement: float) -> None:
    found = simulated([0.9], placement=placement)
    assert found.kept == {0.9: 1.0}
    assert abs(found.bias) < (0.002 if placement == 0 else 0.005)
    if not placement:
        assert found.covered >= 0.85  # 95 % expected; three standard deviations of 40 below


def test_small_gains_are_kept_where_there_is_time_to_see_them() -> None:
    assert simulated([0.96]).kept[0.96] >= 0.9


@pytest.mark.parametrize("bursts", [0.1, 0.2])
def test_a_neighbour_who_comes_and_goes_puts_no_great_gain_back(bursts: float) -> None:
    """A tenth or a fifth of the runs of both networks take up to twice as long; the network gains ×1.3."""
    assert simulated([0.67], bursts=bursts).kept == {0.67: 1.0}


def test_idle_forms_are_found_out_among_forms_that_gain() -> None:
    found = simulated([0.8, 1.0])
    assert found.kept[0.8] == 1.0
    assert found.kept[1.0] <= 0.005


@pytest.mark.parametrize("share, toll", [(0.96, 0.03), (0.97, 0.02), (0.9, 0.08)])
@pytest.mark.parametrize("placement", [0.0, 0.01])
def test_no_network_is_accepted_that_is_truly_slower(share: float, toll: float, placement: float) -> None:
    found = simulated([share], toll, placement)
    assert sum(each < 1 for each in found.true) <= 0.025 * 40


@pytest.mark.parametrize("rounds", [30, 120])
@pytest.mark.parametrize("share, toll", [(0.96, 0.03), (0.9, 0.08), (0.9, 0.09)])
def test_nor_where_all_rounds_of_a_look_are_at_one_pair_and_its_place_is_in_each_of_them(
    share: float, toll: float, rounds: int
) -> None:
    """Networks that run for more than 20 ms; where a twin lies makes it one per cent faster or slower."""
    found = simulated([share], toll, 0.01, trials=40, rounds=rounds, pairs=1)
    assert sum(each < 1 for each in found.true) <= 0.025 * 40


def test_what_gains_is_kept_at_one_pair_too() -> None:
    found = simulated([0.9], placement=0.01, rounds=60, pairs=1)
    assert found.kept == {0.9: 1.0} and abs(found.bias) < 0.01


def test_at_one_pair_the_whole_is_accepted_where_two_looks_say_so_each_for_itself() -> None:
    """The first look is lucky by more than the second one can make up for together with it."""

    class Lucky(FakeWatch):
        at_one_pair = True

        def whole(self, forms: Forms) -> list[Pair]:
            self.asked.append(tuple(forms))
            after = 8.0 if len(self.asked) == 1 else 10.0 - 0.5 * bool(forms) * self.right
            return [([10.0] * ROUNDS, [after] * ROUNDS)]

        right = False

    watch = Lucky(dict.fromkeys(NAMES, 0.1))
    assert judged(watch).kept == {}
    watch = Lucky(dict.fromkeys(NAMES, 0.1))
    watch.right = True
    assert judged(watch).kept == CHOSEN and len(watch.asked) == 3  # two decide, one is reported


def test_at_one_pair_every_other_pair_is_made_in_the_other_order() -> None:
    model = Net().eval()
    watch = Stopwatch(model, walk(model).layers, [Workload(torch.randn(8, 16))], Inference(), Effort(1e-9, 8, 8))
    numbers: list[int] = []

    def measure(dense: nn.Module, small: nn.Module, forms: Forms, effort: Effort, number: int) -> list[Pair]:
        assert isinstance(dense.body, nn.Linear) and isinstance(small.body, DecomposedLayer)
        numbers.append(number)
        return [([1.0], [1.0])]

    for _ in range(4):
        watch._look(of_forms("body"), measure, watch._as_it_is)
    assert numbers == [0, 1, 0, 1] and watch.at_one_pair


class Net(nn.Module):
    """Two layers, one of them called twice at two sizes, a norm with statistics and a dropout with random state."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.drop, self.head = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.drop(self.norm(self.body(self.body(x)[: len(x) // 2]))))
        return y


def watch_of(model: nn.Module, *examples: Workload, training: bool = False) -> Stopwatch:
    return Stopwatch(model, walk(model).layers, examples, Training() if training else Inference(), Effort(0.0, 2, 2))


def of_forms(*names: str, form: Form = LowRank(2)) -> dict[str, Form]:  # noqa: B008, forms are frozen
    return dict.fromkeys(names, form)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_stopwatch_leaves_the_network_as_it_was(training: bool) -> None:
    model = Net().train()
    model.norm.eval()
    modules, state = dict(model.named_modules()), {name: t.clone() for name, t in model.state_dict().items()}
    watch = watch_of(model, Workload(torch.randn(8, 16)), training=training)
    generator = torch.get_rng_state()
    [(before, after)] = watch.whole(of_forms("body", "head"))
    spent = watch.in_place(of_forms("body", "head"))
    assert len(before) == len(after) == 2
    assert set(spent) == {"body", "head"}
    assert all(len(side) == 2 and min(side) > 0 for [pair] in spent.values() for side in pair)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert (model.training, model.body.training, model.norm.training) == (True, True, False)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_stopwatch_leaves_the_network_as_it_was_also_after_an_error() -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.body, DecomposedLayer):
                raise RuntimeError("I want my Linear")
            return super().forward(x)

    model = Fails().eval()
    watch = watch_of(model, Workload(torch.randn(8, 16)))
    for measure in (watch.whole, watch.in_place):
        with pytest.raises((RuntimeError, ExampleError), match="I want my Linear"):
            measure(of_forms("body"))
        assert type(model.body) is nn.Linear
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_look_is_at_several_twins_whose_layers_in_question_lie_elsewhere_and_the_rest_in_the_networks_memory() -> None:
    model = Net().eval()
    watch = Stopwatch(model, walk(model).layers, [Workload(torch.randn(8, 16))], Inference(), Effort(60.0, most=8))
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def measure(dense: nn.Module, small: nn.Module, *_: object) -> list[Pair]:
        pairs.append((dense, small))
        return [([2.0, 2.0, 9.0], [2.0, 1.0, 1.0])]

    assert watch._look(of_forms("body"), measure, watch._as_it_is) == [
        ([2.0] * TWINS, [1.0] * TWINS)
    ]  # of each pair the middle
    twins = [twin for pair in pairs for twin in pair]
    assert {twin.head.weight.data_ptr() for twin in twins} == {model.head.weight.data_ptr()}  # type: ignore[union-attr, operator]
    dense = {dense.body.weight.data_ptr() for dense, _ in pairs}  # type: ignore[union-attr, operator]
    assert len(dense) == TWINS and model.body.weight.data_ptr() not in dense
    assert len({small.body.first.weight.data_ptr() for _, small in pairs}) == TWINS  # type: ignore[union-attr]
    assert all(torch.equal(dense.body.weight, model.body.weight) for dense, _ in pairs)  # type: ignore[union-attr, arg-type]


def test_of_a_slow_network_a_look_is_at_one_pair_of_twins_for_several_rounds() -> None:
    model = Net().eval()
    watch = Stopwatch(model, walk(model).layers, [Workload(torch.randn(8, 16))], Inference(), Effort(1e-9, 8, 8))
    assert [len(side) for pair in watch.whole(of_forms("body")) for side in pair] == [8, 8]


def test_a_quick_and_a_slow_workload_are_timed_in_place_for_rounds_of_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_MANY", float("inf"))  # as a network that is slow
    rounds = iter((9, 5, 7, 6))
    real = room.interleave

    def unlike(runs: Any, device: Any, effort: Effort) -> Any:
        number = next(rounds)
        return real(runs, device, Effort(0.0, number, number, sample=0.0))

    monkeypatch.setattr(room, "interleave", unlike)
    watch = watch_of(Net().eval(), Workload(torch.randn(2, 16), 0.5), Workload(torch.randn(6, 16), 0.5))
    names = [name for name in watch.layers][:2]
    found = watch.in_place(of_forms(*names))
    assert {len(side) for pairs in found.values() for pair in pairs for side in pair} == {5}


def test_the_time_in_place_is_the_sum_over_calls_by_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands still, but for each row that a dense layer (1 s) or a form (3 s) reads."""
    now = 0.0
    monkeypatch.setattr("lamina.measure.clock.time.perf_counter", lambda: now)

    def spend(module: nn.Module, args: tuple[Tensor], _: Tensor) -> None:
        nonlocal now
        now += len(args[0]) * (3 if isinstance(module, DecomposedLayer) else 1)

    model = Net().eval()
    model.body.register_forward_hook(spend)  # what takes its place adopts it
    watch = watch_of(model, Workload(torch.randn(8, 16), 0.75), Workload(torch.randn(2, 16), 0.25))
    dense, smaller = [12.0] * 2, [3.0] * 2
    assert watch.in_place(of_forms("body")) == {"body": [(dense, [36.0] * 2), (smaller, [9.0] * 2)]}


@pytest.mark.parametrize("number", [0, 1])
def test_the_time_in_place_of_a_round_is_the_mean_of_both_its_ways_and_leaves_warming_up_out(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every run of the layer takes a second more than the last, whichever network is first in a round."""
    now, last = 0.0, 0.0
    monkeypatch.setattr("lamina.measure.clock.time.perf_counter", lambda: now)

    def spend(*_: object) -> None:
        nonlocal now, last
        last += 1.0
        now += last

    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(spend)
    watch = Stopwatch(model, walk(model).layers, [Workload(torch.randn(2, 4))], Inference(), Effort(1e6, 3, 3))
    [(dense, form)] = watch._in_place(*watch._pair(of_forms("0"), number, watch._called), of_forms("0"), watch.effort, number)
    # Four runs warm up; then a round is first, second, second, first.
    assert (dense, form) == ([6.5, 10.5, 14.5], [6.5, 10.5, 14.5])


def test_on_accelerators_layers_are_timed_by_marks_on_their_own_device_and_never_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two devices: each mark is a second later than the last; who reads one before both were waited for, fails."""
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    marks, waited, log = 0, 0, list[str]()

    def mark(device: torch.device) -> tuple[torch.device, float]:
        nonlocal marks
        marks += 1
        return device, marks

    def between(begin: tuple[torch.device, float], end: tuple[torch.device, float]) -> float:
        assert begin[0] == end[0] in (first, second) and end[1] <= waited
        return end[1] - begin[1]

    def wait(device: torch.device) -> None:
        nonlocal waited
        waited = marks
        log.append(str(device))

    def watch(module: nn.Module, keep: Callable[[Any], None]) -> None:
        device = second if isinstance(module, nn.Linear) and module.out_features == 4 else first
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(module), "parameters", lambda self: iter([SimpleNamespace(device=device)]))
            real(module, keep)

    real = room._watch
    monkeypatch.setattr(room, "_watch", watch)
    monkeypatch.setattr(room, "mark", mark)
    monkeypatch.setattr(room, "between", between)
    monkeypatch.setattr(room, "devices_of", lambda *models: [first, second])
    monkeypatch.setattr(torch.accelerator, "synchronize", wait)
    model = Net().eval()
    model.register_forward_hook(lambda *_: log.append("run"))
    spent = watch_of(model, Workload(torch.randn(8, 16))).in_place(of_forms("body", "head"))
    assert spent == {"body": [([2.0] * 2, [2.0] * 2)], "head": [([1.0] * 2, [1.0] * 2)]}
    assert log[-12:] == ["run", "cuda:0", "cuda:1"] * 4


class FirstOfPath:
    """A rule that claims to have looked at the clock."""

    timed = True

    def choose(self, question: Question) -> Choice:
        return Choice(question.path[0], "for the test")


def test_a_plan_of_a_network_whose_every_layer_loses_is_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(FakeWatch):
        def __init__(self, *_: object) -> None:
            super().__init__({"body": -0.5, "head": -0.1})

    monkeypatch.setattr(room, "Stopwatch", Slow)
    model = Net().eval()
    x = torch.randn(8, 16)
    plan = lamina.make_plan(model, x, lamina.Ratio(2), rule=FirstOfPath(), timings=TimingTable(None))
    assert plan.decomposed == {}
    assert set(plan.put_back) == {"body", "head"}
    assert all(layer.decided_by == "never_slower" and layer.reason.startswith("put back: ") for layer in plan.layers.values())
    same = lamina.decompose(model, plan)
    assert [type(m) for m in same.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(same(x), model(x))


def test_in_training_the_time_in_place_is_that_of_forward_and_backward_over_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by 1 s in each matrix product of autograd's forward or backward, wherever it happens."""
    now = 0.0
    monkeypatch.setattr("lamina.measure.clock.time.perf_counter", lambda: now)

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal now
            now += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
            return function(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    watches = {
        freezing: Stopwatch(model, walk(model).layers, [Workload(torch.randn(8, 8))], Training(freezing), Effort(0.0, 2, 2))
        for freezing in (None, VanillaFreezing(), SequentialFreezing())
    }
    found = {}
    with Products():
        for freezing, watch in watches.items():
            found[freezing] = watch.in_place(of_forms("1"))["1"]
    # Each linear layer: one product forward, one for its input's gradient, one for its weight's unless it rests.
    expected = {None: 6.0, VanillaFreezing(): 5.0, SequentialFreezing(): 5.0}
    assert found == {freezing: [([3.0] * 2, [seconds] * 2)] for freezing, seconds in expected.items()}


def test_the_whole_time_under_freezing_is_the_mean_over_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(runs: Sequence[Callable[[], Any]], device: torch.device, effort: Effort) -> list[list[float]]:
        return [[10.0 * (number + 1)] * 3 for number, run in enumerate(runs) if [run()]]

    monkeypatch.setattr(comparison, "interleave", fake)
    model = Net()
    watch = Stopwatch(model, walk(model).layers, [Workload(torch.randn(8, 16))], Training(SequentialFreezing()), Effort(0.0))
    assert watch.whole(of_forms("head")) == [([10.0] * 3, [25.0] * 3)]


def test_a_layer_before_an_inplace_activation_is_timed_in_its_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True))
    watch = watch_of(model, Workload(torch.randn(2, 3, 8, 8)), training=True)
    spent = watch.in_place(of_forms("0", "2", form=BlockTerm(2, 2)))
    assert all(min(side) > 0 for [pair] in spent.values() for side in pair)


@pytest.mark.parametrize("slow", [False, True], ids=["of several twins", "of one pair"])
def test_the_making_of_twins_is_no_part_of_any_time(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which a dense layer or a form takes a second, and each making of a network or a form a hundred."""
    now = 0.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    def dear(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (spend(100.0), make(*given))[1]

    monkeypatch.setattr("lamina.measure.clock.time.perf_counter", lambda: now)
    monkeypatch.setattr(room, "_MANY", float("inf") if slow else 0.0)
    for name in ("shadow", "random", "adopt"):
        monkeypatch.setattr(room, name, dear(getattr(room, name)))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    for layer in model:
        layer.register_forward_hook(lambda *_: spend(1.0))  # what takes its place adopts it
    watch = watch_of(model, Workload(torch.randn(4, 8)))
    [(dense, small)] = watch.whole(of_forms("0", "1"))
    assert set(dense) == set(small) == {2.0} and now > 400
    assert {name: {*dense, *small} for name, [(dense, small)] in watch.in_place(of_forms("0", "1")).items()} == {
        "0": {1.0},
        "1": {1.0},
    }
