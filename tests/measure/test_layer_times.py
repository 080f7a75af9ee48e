"""Layer times: measured once, kept, and added up over a layer's uses. The clock is a fake one."""

from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lamina import (
    BlockTerm,
    Dense,
    Inference,
    LowRank,
    Separable,
    SequentialFreezing,
    Setting,
    Timing,
    Training,
    VanillaFreezing,
)
from lamina.forms import Form
from lamina.layers.build import skeleton
from lamina.measure import layer_times
from lamina.measure.clock import Effort
from lamina.measure.conditions import setting_of
from lamina.measure.layer_times import LayerTimes, measure_forms
from lamina.measure.pool import Pool, moving, pool_of
from lamina.measure.table import TimingTable
from lamina.network.trial import observed
from lamina.network.walk import Layer, walk
from lamina.runtimes.runtime import Prepared, Runtime
from lamina.schedules import Group, Schedule
from lamina.values import Mode, Use, Workload

from .conftest import CPU, Clock

CONV = nn.Conv2d(8, 12, 3, padding=1)
USE = Use((2, 8, 6, 5), (2, 12, 6, 5))


TAKES_AS_THEN = LayerTimes._takes_as_then  # before the tests' own, steady one takes its place


def layer_of(module: nn.Module) -> Layer:
    return walk(module).layers[""]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Form]]:
    """Times follow from MACs, 1 ns each, while the machine is as fast as ``speed`` says; each batch of forms is noted."""
    batches: list[list[Form]] = []

    def measure(
        layer: Layer,
        forms: Sequence[Form],
        use: Use,
        last: bool,
        mode: Mode,
        setting: Setting,
        effort: Effort,
        resting: Group | None,
        *_: object,
    ) -> dict[Form, Timing]:
        batches.append(list(forms))
        slowness = 1e-9 * (1 + 0.5 * (len(batches) - 1))  # the machine slows down from batch to batch
        macs = {form: form.macs(layer.geometry, Use(use.input_shape, use.output_shape)) for form in forms}
        return {form: Timing(slowness * n, slowness * n / 100, 7, setting) for form, n in macs.items()}

    monkeypatch.setattr(layer_times, "measure_forms", measure)
    return batches


def times_of(table: TimingTable, *uses: Use, module: nn.Module = CONV) -> LayerTimes:
    setting = setting_of(module, "inference", channels_last=False)
    return LayerTimes(layer_of(module), uses or (USE,), False, Inference(), setting, table)


def test_what_the_table_holds_is_not_measured_again(asked: list[list[Form]]) -> None:
    forms = [Dense(), BlockTerm(4, 6), BlockTerm(4, None)]
    with TimingTable(None) as table:
        first = times_of(table)(forms)
        assert times_of(table)(forms) == first
    assert asked == [forms]


def test_only_what_is_missing_is_measured_beside_the_dense_layer(asked: list[list[Form]]) -> None:
    with TimingTable(None) as table:
        times = times_of(table)
        times([Dense(), BlockTerm(4, 6)])
        times([BlockTerm(4, 6), BlockTerm(3, 3), Dense()])
    assert asked == [[Dense(), BlockTerm(4, 6)], [Dense(), BlockTerm(3, 3)]]


def test_a_machine_that_slows_down_between_two_batches_does_not_change_the_ratio_of_times(asked: list[list[Form]]) -> None:
    with TimingTable(None) as table:
        times = times_of(table)
        times([Dense()])
        found = times([BlockTerm(4, 6)]) | times([BlockTerm(3, 3)]) | times([Dense()])
    geometry = layer_of(CONV).geometry
    for form in (BlockTerm(4, 6), BlockTerm(3, 3)):
        expected = form.macs(geometry, USE) / Dense().macs(geometry, USE)
        assert found[form].median_s / found[Dense()].median_s == pytest.approx(expected)
    assert len(asked) == 3


def test_a_dense_time_once_known_stays_as_it_is(asked: list[list[Form]]) -> None:
    with TimingTable(None) as table:
        times = times_of(table)
        before = times([Dense()])
        times([BlockTerm(4, 6)])
        assert times([Dense()]) == before


@pytest.mark.parametrize("real", [False, True], ids=["by chance", "again and again"])
def test_what_is_faster_than_its_macs_explain_is_measured_again_and_the_slower_time_kept(
    real: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forms, batches = [Dense(), BlockTerm(4, 6), BlockTerm(3, 3), BlockTerm(2, 2)], list[list[Form]]()
    geometry = layer_of(CONV).geometry
    one = Use(USE.input_shape, USE.output_shape)

    def fewer(form: Form) -> float:
        return Dense().macs(geometry, one) / form.macs(geometry, one)

    def measure(layer: Layer, batch: Sequence[Form], use: Use, *words: Any) -> dict[Form, Timing]:
        """The second batch is taken while the machine is twice as slow; one form is too fast for its MACs, one just not."""
        batches.append(list(batch))
        first = len(batches) == 1
        gains = {BlockTerm(3, 3): 3.5 if first else 3.3 if real else 0.9, BlockTerm(2, 2): 2.9}
        slowness = 1.0 if first else 2.0
        return {form: Timing(slowness / fewer(form) / gains.get(form, 1.0), 0.01 * slowness, 7, words[2]) for form in batch}

    monkeypatch.setattr(layer_times, "measure_forms", measure)
    with TimingTable(tmp_path / "t.sqlite") as table:
        found = times_of(table)(forms)
    assert batches == [forms, [Dense(), BlockTerm(3, 3)]]
    ratios = {form: found[Dense()].median_s / found[form].median_s / fewer(form) for form in forms[1:]}
    assert ratios == pytest.approx({BlockTerm(4, 6): 1.0, BlockTerm(3, 3): 3.3 if real else 0.9, BlockTerm(2, 2): 2.9})
    with TimingTable(tmp_path / "t.sqlite") as table:
        assert times_of(table)(forms) == found and len(batches) == 2


class Looks:
    """What looks at the dense layer see in turn, as multiples of its time by the fake clock; the last one again and again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *seen: float) -> None:
        self.seen, self.efforts = list(seen), list[Effort]()
        monkeypatch.setattr(LayerTimes, "_takes_as_then", TAKES_AS_THEN)
        monkeypatch.setattr(layer_times, "sampled", self)

    def __call__(
        self, layer: Layer, forms: Sequence[Form], use: Use, last: bool, mode: Mode, effort: Effort, **_: object
    ) -> Any:
        assert forms == [Dense()]
        self.efforts.append(effort)
        takes = 1e-9 * Dense().macs(layer.geometry, use) * (self.seen.pop(0) if len(self.seen) > 1 else self.seen[0])
        return {Dense(): [takes * 3, takes, takes * 9]}  # only the fastest counts


FORMS = [Dense(), BlockTerm(4, 6)]


def test_what_was_taken_while_the_layer_ran_slower_is_measured_anew_once(
    asked: list[list[Form]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        first = times_of(table)(FORMS)
    looks = Looks(monkeypatch, 0.5)  # the machine was busy then
    with TimingTable(tmp_path / "t.sqlite") as table:
        found = times_of(table)(FORMS)
        assert (len(asked), len(looks.efforts)) == (2, 2)
        assert times_of(table)(FORMS) == found != first
        assert (len(asked), len(looks.efforts)) == (2, 2), "what this run took answers without another look"


def test_a_layer_is_looked_at_once_and_longer_only_before_it_is_denied(
    asked: list[list[Form]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        first = times_of(table)(FORMS)
    for seen, looked in (([1.3], 1), ([5.0, 1.1], 2)):
        looks = Looks(monkeypatch, *seen)
        with TimingTable(tmp_path / "t.sqlite") as table:
            assert times_of(table)(FORMS) == times_of(table)(FORMS) == first
        assert looks.efforts == list(layer_times._LOOKS[:looked])
    assert len(asked) == 1


def test_an_empty_table_costs_no_look(asked: list[list[Form]], monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch, 1.0)
    with TimingTable(None) as table:
        times_of(table)(FORMS)
    assert not looks.efforts and len(asked) == 1


def test_a_look_at_a_real_layer_finds_its_own_time_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    monkeypatch.setattr(LayerTimes, "_takes_as_then", TAKES_AS_THEN)
    monkeypatch.setattr(layer_times, "alike", lambda then_s, now_s: bool(seen.append((then_s, now_s))) or True)
    module = nn.Conv2d(16, 16, 3, padding=1)
    use = Use((4, 16, 40, 40), (4, 16, 40, 40))
    for mode in (Inference(), Training()):
        for _ in range(2):
            with TimingTable(tmp_path / f"{mode.name}.sqlite") as table:
                setting = setting_of(module, mode.name, channels_last=False)
                times = LayerTimes(layer_of(module), (use,), False, mode, setting, table)
                taken = times([Dense()])[Dense()].median_s
        then_s, now_s = seen.pop()
        assert then_s == taken and 0 < now_s < 100 * then_s


def test_what_slows_down_whole_rounds_does_not_change_the_ratio_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [1.0, 1.3, 1.0, 1.2, 7.0]
    times = [[2.0 * s for s in slow], [0.5 * s for s in slow]]
    monkeypatch.setattr(layer_times, "interleave", lambda runs, *_: times)
    setting = setting_of(CONV, "inference", channels_last=False)
    found = measure_forms(layer_of(CONV), [Dense(), BlockTerm(4, 6)], USE, False, Inference(), setting, Effort())
    assert (found[Dense()].median_s, found[Dense()].mad_s) == (2.4, pytest.approx(0.4))
    assert (found[BlockTerm(4, 6)].median_s, found[BlockTerm(4, 6)].mad_s) == pytest.approx((0.6, 0.0))


def test_where_something_interrupts_most_rounds_the_fastest_runs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, form = [2.0, 30.0, 25.0, 2.2, 40.0, 30.0], [0.5, 0.6, 25.0, 0.5, 0.5, 0.5]
    monkeypatch.setattr(layer_times, "interleave", lambda runs, *_: [dense, form])
    setting = setting_of(CONV, "inference", channels_last=False)
    found = measure_forms(layer_of(CONV), [Dense(), BlockTerm(4, 6)], USE, False, Inference(), setting, Effort())
    assert (found[Dense()].median_s, found[BlockTerm(4, 6)].median_s) == (2.0, 0.5)
    assert (found[Dense()].mad_s, found[BlockTerm(4, 6)].mad_s) == (pytest.approx(0.1), 0.0)


@pytest.mark.parametrize(("unsteady", "rounds"), [(0.0, 5), (0.2, 20)], ids=["steady", "unsteady"])
def test_layers_are_timed_until_their_ratios_to_the_dense_one_are_known_and_each_call_finds_its_weights_elsewhere(
    unsteady: float, rounds: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(CPU, torch.float32)
    pool.reserve(100)
    weights = [[nn.Parameter(pool.view(torch.empty(100)))] for _ in range(2)]
    places: list[list[int]] = [[], []]
    noisy = (40e-6 * (1 + unsteady * (n % 7)) for n in itertools.count())

    def step(number: int, seconds: Iterator[float]) -> Callable[[], None]:
        def run() -> None:
            places[number].append(weights[number][0].storage_offset())
            clock.spend(next(seconds))

        return run

    steps = [step(0, itertools.repeat(80e-6)), step(1, noisy)]
    moves = [moving(pool, each) for each in weights]

    def moved(move: Callable[[], None]) -> None:
        move()
        clock.spend(random.random())  # what takes no part in any time

    monkeypatch.setattr(layer_times, "moving", lambda pool, each: partial(moved, moves[0 if each is weights[0] else 1]))
    dense, form = layer_times._interleaved(pool, weights, steps, Effort(1e9, 5, 20))
    assert len(dense) == len(form) == rounds
    assert dense == pytest.approx([80e-6] * rounds)
    for each in places:
        assert all(one != other for one, other in itertools.pairwise(each))


def test_the_time_of_a_layer_is_the_sum_over_its_uses_by_calls_and_weight(asked: list[list[Form]]) -> None:
    large, small = Use((8, 8, 6, 5), (8, 12, 6, 5), calls=2, weight=0.25), Use((1, 8, 6, 5), (1, 12, 6, 5), weight=0.75)
    with TimingTable(None) as table:
        both = times_of(table, large, small)([Dense()])[Dense()]
        one = [times_of(table, Use(u.input_shape, u.output_shape))([Dense()])[Dense()].median_s for u in (large, small)]
    assert both.median_s == pytest.approx(2 * 0.25 * one[0] + 0.75 * one[1])


def test_every_form_is_timed_on_the_layers_input_and_counted_in_the_order_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []

    def fake(runs: Sequence[Callable[[], Any]], *_: Any) -> list[list[float]]:
        seen.extend(run().shape for run in runs)
        return [[1.9 + i, 2.0 + i, 2.1 + i] for i in range(len(runs))]

    monkeypatch.setattr(layer_times, "interleave", fake)
    forms = [Dense(), BlockTerm(4, 6), BlockTerm(None, 6)]
    setting = setting_of(CONV, "inference", channels_last=False)
    found = measure_forms(layer_of(CONV), forms, USE, False, Inference(), setting, Effort())
    assert seen == [torch.Size(USE.output_shape)] * 3
    assert [found[form].median_s for form in forms] == [2.0, 3.0, 4.0]


class Fed:
    """Stands for the clock: runs everything once, and notes the dtypes of what each layer is fed and answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dtypes: set[tuple[torch.dtype, torch.dtype]] = set()
        self.rounds = 0
        monkeypatch.setattr(layer_times, "interleave", self)
        for kind in ("_forward", "_training_step"):
            monkeypatch.setattr(layer_times, kind, self.noting(getattr(layer_times, kind)))

    def noting(self, step: Any) -> Any:
        def make(module: nn.Module, x: torch.Tensor, *others: Any) -> Any:
            module.register_forward_hook(lambda _, args, out: self.dtypes.add((args[0].dtype, out.dtype)))
            return step(module, x, *others)

        return make

    def __call__(self, runs: Sequence[Callable[[], Any]], *_: Any) -> list[list[float]]:
        self.rounds += 1
        for run in runs:
            run()
        return [[1.0]] * len(runs)


@pytest.mark.parametrize("mode", [Inference(), Training()], ids=["inference", "training"])
def test_a_layer_is_timed_on_what_reaches_it_under_autocast_and_kept_apart(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    fed, forms = Fed(monkeypatch), [Dense(), LowRank(2)]
    network, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    layers = walk(network).layers
    with TimingTable(None) as table:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            setting = setting_of(network, mode.name, channels_last=False)
            seen = observed(network, layers.values(), Workload(x))[0]
            for name, dtype in (("0", torch.float32), ("1", torch.bfloat16)):
                fed.dtypes.clear()
                LayerTimes(layers[name], seen[name].as_uses(), False, mode, setting, table)(forms)
                assert fed.dtypes == {(dtype, torch.bfloat16)}
        # Both layers are of one geometry and one shape: only what they are fed tells their rows apart.
        assert len(table) == 2 * len(forms) and fed.rounds == 2
        fed.dtypes.clear()
        plain = observed(network, layers.values(), Workload(x))[0]["1"].as_uses()
        LayerTimes(layers["1"], plain, False, mode, replace(setting, autocast="off"), table)(forms)
        assert fed.dtypes == {(torch.float32, torch.float32)}
        assert len(table) == 3 * len(forms)


def test_a_layer_in_an_autocast_of_the_networks_own_is_timed_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fed, use = Fed(monkeypatch), Use((4, 8), (4, 8), input_dtype="bfloat16", autocast="bfloat16")
    module = nn.Linear(8, 8)
    with TimingTable(None) as table:
        times_of(table, use, module=module)([Dense(), LowRank(2)])
        assert fed.dtypes == {(torch.bfloat16, torch.bfloat16)}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            times_of(table, use, module=module)([Dense(), LowRank(2)])
        assert fed.rounds == 1, "it is the same autocast, whoever turned it on"


def test_a_layer_outside_of_the_autocast_around_its_network_is_timed_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = Fed(monkeypatch)
    with TimingTable(None) as table, torch.autocast("cpu", dtype=torch.bfloat16):
        times_of(table, Use((4, 8), (4, 8)), module=nn.Linear(8, 8))([Dense(), LowRank(2)])
    assert fed.dtypes == {(torch.float32, torch.float32)}


LAYERS = {
    "linear": (nn.Linear(6, 9), Use((2, 3, 6), (2, 3, 9)), LowRank(2)),
    "1×1": (nn.Conv2d(6, 9, 1, stride=2), Use((2, 6, 5, 5), (2, 9, 3, 3)), LowRank(2)),
    "Conv1d": (nn.Conv1d(6, 9, 3), Use((2, 6, 8), (2, 9, 6)), BlockTerm(2, 3)),
    "Conv3d": (nn.Conv3d(6, 9, 3), Use((1, 6, 4, 4, 4), (1, 9, 2, 2, 2)), BlockTerm(2, 3)),
    "separable": (nn.Conv2d(6, 9, 3, stride=2), Use((2, 6, 7, 7), (2, 9, 3, 3)), Separable(4)),
    "bfloat16": (nn.Linear(6, 9).to(torch.bfloat16), Use((4, 6), (4, 9)), LowRank(2)),
    "frozen": (nn.Linear(6, 9).requires_grad_(False), Use((4, 6), (4, 9)), LowRank(2)),
    "an empty batch": (nn.Linear(6, 9), Use((0, 6), (0, 9)), LowRank(2)),
}


@pytest.mark.parametrize("mode", [Inference(), Training()], ids=["inference", "training"])
@pytest.mark.parametrize(("module", "use", "form"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_every_kind_of_layer_can_be_timed_and_is_left_as_it_was(
    module: nn.Module, use: Use, form: Form, mode: Mode, channels_last: bool
) -> None:
    channels_last &= len(use.input_shape) in (4, 5)  # a layout of maps and volumes only
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    wanted = [p.requires_grad for p in module.parameters()]
    setting = setting_of(module, mode.name, channels_last=channels_last)
    found = measure_forms(layer_of(module), [Dense(), form], use, channels_last, mode, setting, Effort(0.0, 2, 2))
    assert list(found) == [Dense(), form]
    assert all(one.repeats == 2 and one.setting == setting for one in found.values())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in module.named_parameters())
    assert [p.requires_grad for p in module.parameters()] == wanted


def test_what_was_timed_in_inference_mode_does_not_stand_in_the_way_of_a_training() -> None:
    layer, form = layer_of(CONV), BlockTerm(4, 6)
    held = pool_of(layer.parameter)
    with torch.inference_mode():
        setting = setting_of(CONV, "inference", channels_last=False)
        measure_forms(layer, [Dense(), form], USE, False, Inference(), setting, Effort(0.0, 2, 2))
    found = measure_forms(layer, [Dense(), form], USE, False, Training(), setting, Effort(0.0, 2, 2))
    assert len(found) == 2 and pool_of(layer.parameter) is held


class ByPhase:
    """A dense step takes 3 s; a decomposed one 2 s, 1.5 s with its outer factors at rest, 1 s with its inner ones."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Form], Group | None]] = []

    def __call__(
        self,
        layer: Layer,
        forms: Sequence[Form],
        use: Use,
        last: bool,
        mode: Mode,
        setting: Setting,
        effort: Effort,
        resting: Group | None,
        *_: object,
    ) -> dict[Form, Timing]:
        self.asked.append((list(forms), resting))
        lean = {None: 2.0, 0: 1.5, 1: 1.0}[resting]
        return {form: Timing(3.0 if form == Dense() else lean, 0.1, 7, setting) for form in forms}


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> ByPhase:
    fake = ByPhase()
    monkeypatch.setattr(layer_times, "measure_forms", fake)
    return fake


def training_times(table: TimingTable, schedule: Schedule | None) -> LayerTimes:
    setting = setting_of(CONV, "training", channels_last=False)
    if schedule:
        setting = replace(setting, freezing=str(schedule))
    return LayerTimes(layer_of(CONV), (USE,), False, Training(freezing=schedule), setting, table)


def test_under_freezing_a_time_is_the_mean_over_the_phases_and_a_dense_layer_never_rests(phases: ByPhase) -> None:
    form = BlockTerm(4, 6)
    expected = {None: 2.0, VanillaFreezing(): 1.5, SequentialFreezing(): 1.25, SequentialFreezing(first="inner"): 1.25}
    with TimingTable(None) as table:
        for schedule, lean in expected.items():
            found = training_times(table, schedule)([Dense(), form])
            assert {form: one.median_s for form, one in found.items()} == {Dense(): pytest.approx(3), form: pytest.approx(lean)}
            assert found[form].setting.freezing == (str(schedule) if schedule else "off")
    # Each phase is measured once, whatever the schedule that asks.
    assert [resting for _, resting in phases.asked] == [None, 0, 1]
    assert len(table_keys(phases)) == 4


def table_keys(phases: ByPhase) -> set[tuple[Form, Group | None]]:
    return {(form, None if form == Dense() else resting) for forms, resting in phases.asked for form in forms}


@pytest.mark.parametrize(("module", "use", "form"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("resting", [None, 0, 1])
def test_a_resting_group_needs_no_gradient_in_the_timed_step_but_the_input_does(
    module: nn.Module, use: Use, form: Form, resting: Group | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[list[torch.Size]] = []

    def fake(runs: Sequence[Callable[[], Any]], *_: Any) -> list[list[float]]:
        wanted.extend([gradient.shape for gradient in run()] for run in runs)
        return [[1.0]] * len(runs)

    monkeypatch.setattr(layer_times, "interleave", fake)
    layer = layer_of(module)
    setting = setting_of(module, "training", channels_last=False)
    measure_forms(layer, [Dense(), form], use, False, Training(), setting, Effort(), resting)
    dense, lean = wanted
    assert dense == [torch.Size(use.input_shape), *(p.shape for p in module.parameters())]
    stack = skeleton(layer.geometry, form)
    still = [] if resting is None else [factor.weight for factor in stack.factor_groups()[resting]]
    trained = [p.shape for p in stack.parameters() if not any(p is weight for weight in still)]
    assert lean == [torch.Size(use.input_shape), *trained]


class Holding(Runtime):
    """A runtime that keeps weights of its own, as long as what it prepared lives, and counts their bytes."""

    label = "holding"

    def __init__(self) -> None:
        self.held = self.most = self.ever = 0

    def prepare(self, model: nn.Module, workload: Workload) -> Prepared:
        own = [p.detach().clone() for p in model.parameters()]
        size = sum(p.nbytes for p in own)
        self.held, self.ever = self.held + size, self.ever + size
        self.most = max(self.most, self.held)

        def run() -> list[torch.Tensor]:
            return own

        weakref.finalize(run, self._let_go, size)
        return Prepared(run, run)

    def _let_go(self, size: int) -> None:
        self.held -= size


def nbytes(form: Form, layer: Layer) -> int:
    return form.parameters(layer.geometry) * layer.parameter.element_size()


@pytest.mark.parametrize("room", [1, 3, 10**9], ids=["less than a form", "a few forms", "all of them"])
def test_another_runtime_holds_the_weights_of_few_forms_at_a_time_and_all_are_timed_beside_the_dense_layer(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    def interleave(runs: list[Callable[[], Any]], *_: Any, **__: Any) -> list[list[float]]:
        batches.append(len(runs))
        return [[float(1 + at)] * 5 for at in range(len(runs))]

    monkeypatch.setattr(layer_times, "interleave", interleave)
    module, runtime = nn.Linear(64, 64), Holding()
    layer, forms = layer_of(module), [LowRank(rank) for rank in range(1, 25)]
    dense, largest = nbytes(Dense(), layer), nbytes(forms[-1], layer)
    monkeypatch.setattr(layer_times, "_MOST_BYTES", most := 2000 if room == 1 else room * largest)
    setting = setting_of(module, "inference", channels_last=False)
    times = LayerTimes(layer, (Use((2, 64), (2, 64)),), False, Inference(), setting, TimingTable(None), runtime=runtime)
    assert times([Dense(), *forms]).keys() == {Dense(), *forms}
    assert sum(batches) == len(forms) + len(batches)  # in each the dense layer once
    assert runtime.most <= dense + max(most, largest) and runtime.held == 0
    assert runtime.ever == len(batches) * dense + sum(nbytes(form, layer) for form in forms)
    assert (len(batches) == 1) == (room > 3)


class Between(Runtime):
    """A runtime in which convolutions are timed between neighbours."""

    label = "between"

    def prepare(self, model: nn.Module, workload: Workload) -> Prepared:
        return Prepared(lambda: workload.run(model), lambda: [])

    def neighbours(self, x: torch.Tensor) -> Prepared:
        return Prepared(lambda: tuple(x.shape), lambda: [])


@pytest.mark.parametrize(("module", "forms", "use", "expected"), [
    (nn.Conv2d(8, 12, 3, padding=1), [Dense(), BlockTerm(4, 4)], USE, [[5.8, 7.25], [0.8, 0.1]]),
    (nn.Linear(8, 12), [Dense(), LowRank(4)], Use((2, 8), (2, 12)), [[8.0, 10.0], [3.0, 2.0]]),
], ids=["a convolution", "a linear layer"])  # fmt: skip
def test_what_neighbours_take_is_taken_off(
    module: nn.Module, forms: list[Form], use: Use, expected: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interleave(runs: list[Callable[[], Any]], *_: Any, **__: Any) -> list[list[float]]:
        around = [run() for run in runs[2:]]
        assert around in ([], [use.input_shape, use.output_shape])
        return [[8.0, 10.0], [3.0, 2.0], [1.0, 2.0], [3.0, 4.0]][: len(runs)]

    monkeypatch.setattr(layer_times, "interleave", interleave)
    found = layer_times.sampled(layer_of(module), forms, use, False, Inference(), Effort(), runtime=Between())
    # The median of the neighbours' shares of the dense graph, in each round; of a time a twentieth at least is left.
    assert list(found.values()) == [pytest.approx(each) for each in expected]


def test_what_neighbours_differ_by_from_round_to_round_is_no_difference_between_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of both graphs' time; the form always saves a fifth of the dense layer's own."""
    around, drift = torch.tensor([2.0, 9.0, 3.0, 7.0, 4.0]), torch.tensor([1.0, 1.5, 1.0, 2.0, 1.2])
    rounds = [drift * 5.0, drift * 4.8, drift * around, drift * around]
    monkeypatch.setattr(layer_times, "interleave", lambda runs, *_, **__: [each.tolist() for each in rounds])
    forms = [Dense(), BlockTerm(4, 4)]
    layer = layer_of(nn.Conv2d(8, 12, 3, padding=1))
    found = measure_forms(layer, forms, USE, False, Inference(), CPU, Effort(), runtime=Between())
    assert found[forms[1]].median_s / found[Dense()].median_s == pytest.approx(0.8)
    assert found[forms[1]].mad_s == pytest.approx(0.0, abs=1e-6)
