"""From a network to a plan. Times are computed from MACs by a fake clock, so that every answer is known."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina import (
    AtRatio,
    BlockTerm,
    Dense,
    Energy,
    Evbmf,
    ExampleError,
    GoalError,
    LargestStep,
    LayerError,
    LowRank,
    Parameters,
    Plan,
    PlanError,
    Plateau,
    Ratio,
    SequentialFreezing,
    Setting,
    Speedup,
    Timing,
    Training,
    Workload,
)
from lamina.choose import never_slower as judge
from lamina.choose import whole
from lamina.choose.ratio import form_at, path
from lamina.forms import Form
from lamina.measure import layer_times
from lamina.measure.clock import Effort
from lamina.measure.shares import time_shares
from lamina.measure.table import TimingTable
from lamina.network.walk import Layer
from lamina.progress import Display
from lamina.schedules import Group
from lamina.values import Mode, Use


class Net(nn.Module):
    """Every kind of thing: a stem, twins of one geometry, a 1×1, a grouped layer, one never called, norms, dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.twins = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1))
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.pointwise = nn.Conv2d(32, 64, 1)
        self.drop = nn.Dropout(0.3)
        self.unused = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pointwise(self.grouped(self.twins(self.stem(x)))).mean((2, 3))
        out: Tensor = self.head(self.drop(y))
        return out


SHARES = {"head": 0.25, "grouped": 0.25, "drop": 0.125, "": 0.375}
LAYERS = ["stem", "twins.0", "twins.2", "pointwise", "head"]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Clock:
    """A fake clock: each form takes 1 ns a MAC; a table of what was measured; it can be told to break."""

    def __init__(self) -> None:
        self.batches: list[tuple[Layer, list[Form], Use, Mode]] = []
        self.resting: list[Group | None] = []
        self.breaks_after: int | None = None

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
        if self.breaks_after is not None and len(self.batches) >= self.breaks_after:
            raise KeyboardInterrupt
        self.batches.append((layer, list(forms), use, mode))
        self.resting.append(resting)
        one = Use(use.input_shape, use.output_shape)
        return {form: Timing(1e-9 * form.macs(layer.geometry, one), 0.0, 7, setting) for form in forms}

    @property
    def measured(self) -> list[tuple[str, Form, Use]]:
        return [(str(layer.geometry), form, use) for layer, forms, use, _ in self.batches for form in forms if form != Dense()]


class Content:
    """A stopwatch to which every form gains."""

    def __init__(self, model: nn.Module, layers: object, examples: Sequence[Workload], *_: object) -> None:
        self.examples = examples

    def whole(self, forms: dict[str, Form]) -> list[tuple[list[float], list[float]]]:
        return [([2.0] * 9, [1.0] * 9) for _ in self.examples]

    def in_place(self, forms: dict[str, Form]) -> dict[str, list[tuple[list[float], list[float]]]]:
        return {name: [([1.0] * 9, [0.5] * 9) for _ in self.examples] for name in forms}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(layer_times, "measure_forms", fake)
    monkeypatch.setattr(judge, "Stopwatch", Content)
    monkeypatch.setattr(whole, "time_shares", lambda twin, _: {n: SHARES[n] for n, _ in twin.named_modules() if n in SHARES})
    return fake


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def planned(model: nn.Module, table: TimingTable | None = None, **options: object) -> Plan:
    example, goal = options.pop("example", X), options.pop("goal", Ratio(2))
    table = TimingTable(None) if table is None else table
    return lamina.make_plan(model, example, goal, timings=table, **options)  # type: ignore[arg-type]


def test_every_layer_is_planned_or_refused_with_a_reason(model: Net, clock: Clock) -> None:
    plan = planned(model)
    assert list(plan.layers) == LAYERS
    assert set(plan.refused) == {"grouped", "unused"}
    assert "depthwise" in plan.refused["grouped"]
    assert "never called" in plan.refused["unused"]


def test_where_time_follows_macs_every_layer_is_decomposed_within_its_window(model: Net, clock: Clock) -> None:
    for name, layer in planned(model).layers.items():
        assert layer.decomposed, name
        window = path(layer.geometry, 2)
        assert window[-1].parameters(layer.geometry) <= layer.after.parameters <= window[0].parameters(layer.geometry)
        assert layer.decided_by == "rule"
        assert layer.before.timing
        assert layer.after.timing
        assert layer.after.timing.median_s < layer.before.timing.median_s


@pytest.mark.parametrize("rule", [Plateau(), LargestStep()], ids=["plateau", "largest step"])
def test_a_warm_table_takes_no_new_timing_and_gives_the_same_plan(
    rule: Plateau | LargestStep, model: Net, clock: Clock
) -> None:
    with TimingTable(None) as table:
        cold = planned(model, table, rule=rule)
        taken = len(clock.batches)
        assert taken > 0
        assert planned(model, table, rule=rule) == cold
        assert len(clock.batches) == taken


def test_twins_are_measured_once(model: Net, clock: Clock) -> None:
    plan = planned(model)
    assert len(clock.measured) == len(set(clock.measured))
    assert plan.layers["twins.0"].form == plan.layers["twins.2"].form
    assert len({id(layer.module) for layer, *_ in clock.batches}) == len(LAYERS) - 1


def test_each_batch_of_forms_is_measured_beside_the_dense_layer(model: Net, clock: Clock) -> None:
    planned(model)
    assert all(forms[0] == Dense() for _, forms, _, _ in clock.batches)


@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_an_interrupted_measurement_goes_on_where_it_stopped(
    killed_after: int, model: Net, clock: Clock, tmp_path: Path
) -> None:
    whole = planned(model)
    needed = clock.measured
    clock.batches.clear()
    clock.breaks_after = killed_after
    with pytest.raises(KeyboardInterrupt):
        lamina.make_plan(model, X, Ratio(2), timings=tmp_path / "t.sqlite")
    clock.breaks_after = None
    again = lamina.make_plan(model, X, Ratio(2), timings=tmp_path / "t.sqlite")
    assert sorted(map(str, clock.measured)) == sorted(map(str, needed))  # nothing twice, nothing left out
    assert again == whole


def cut(module: nn.Module, rank: int) -> None:
    """Leave a weight a rank on each of its sides, and next to nothing beyond."""
    with torch.no_grad():
        W: Tensor = module.weight  # type: ignore[assignment]
        for side in (0, 1):
            M = W.movedim(side, 0)
            U = torch.linalg.svd(M.flatten(1), full_matrices=False).U[:, :rank]
            W.copy_((U @ (U.T @ M.flatten(1))).view(M.shape).movedim(0, side))
        W.add_(1e-4 * W.abs().max() * torch.randn_like(W))


@pytest.mark.parametrize("rule", [Energy(0.99), Evbmf(0.01)], ids=str)
def test_by_the_spectrum_twins_of_other_weights_get_other_ranks_and_what_holds_too_much_stays_dense(
    rule: Energy | Evbmf, model: Net, clock: Clock
) -> None:
    cut(model.twins[0], 5)
    cut(model.twins[2], 9)
    cut(model.pointwise, 4)
    plan = planned(model, rule=rule, include=["twins.*", "pointwise"])
    assert {name: layer.form for name, layer in plan.decomposed.items()} == {
        "twins.0": BlockTerm(5, 5),
        "twins.2": BlockTerm(9, 9),
        "pointwise": LowRank(4),
    }
    assert all(layer.before.timing and layer.after.timing for layer in plan.decomposed.values())
    assert plan.rule == str(rule) and plan.whole and plan.whole.speedup
    assert not planned(model, rule=rule, include=["twins.*"], goal=Ratio(30)).decomposed


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "a rule of the spectrum": lambda model: planned(model, rule=Energy()),
    "a rule of timings": planned,
    "the form at a ratio": lambda model: planned(model, rule=AtRatio()),
    "a budget of time": lambda model: planned(model, goal=Speedup(1.5)),
    "a budget of parameters": lambda model: planned(model, goal=Parameters(2000)),
    "a calibration": lambda model: lamina.calibrate(model, X),
}


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("work", WAYS.values(), ids=WAYS)
def test_a_weight_that_is_not_finite_is_named_whatever_is_to_be_done_with_it(
    work: Callable[[nn.Module], object], bad: float, model: Net, clock: Clock
) -> None:
    with torch.no_grad():
        model.twins[0].weight[0, 0, 0, 0] = bad
    with pytest.raises(LayerError, match=r"^twins\.0: 1 of its 9216 weights are NaN or infinite"):
        work(model)
    assert clock.batches == []


def test_a_layer_that_is_skipped_or_never_called_may_hold_anything(model: Net, clock: Clock) -> None:
    with torch.no_grad():
        model.unused.weight[0, 0] = model.twins[0].weight[0, 0, 0, 0] = math.nan
    plan = planned(model, goal=Parameters(20_000), skip=["twins.0"])
    assert "never called" in plan.refused["unused"] and plan.decomposed


def test_at_ratio_takes_the_form_at_the_ratio_and_no_timing(model: Net, clock: Clock) -> None:
    plan = planned(model, rule=AtRatio())
    assert clock.batches == []
    assert plan.setting is None
    assert plan.put_back == {}
    for layer in plan.layers.values():
        assert layer.form == form_at(layer.geometry, 2)
        assert layer.before.timing is layer.after.timing is None
        assert "not timed" in layer.reason


def test_the_achieved_ratio_of_every_layer_is_at_least_the_one_asked_for(model: Net, clock: Clock) -> None:
    for ratio in (1.0, 1.5, 2.0, 4.0):
        for layer in planned(model, goal=Ratio(ratio), rule=AtRatio()).decomposed.values():
            bias = layer.geometry.bias_parameters
            assert (layer.before.parameters - bias) / (layer.after.parameters - bias) >= ratio


def test_a_layer_too_small_for_the_ratio_stays_dense_and_says_so(clock: Clock) -> None:
    plan = planned(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), example=torch.zeros(4, 64), goal=Ratio(4))
    assert plan.layers["1"].form == Dense()
    assert plan.layers["1"].reason == "no rank makes this layer 4 times smaller"


def test_beta_sets_the_proportion_of_the_ranks(model: Net, clock: Clock) -> None:
    form = planned(model, rule=AtRatio(), beta=2.0, include=["twins.0"]).layers["twins.0"].form
    assert isinstance(form, BlockTerm)
    assert form.rank_in
    assert form.rank_out
    assert form.rank_out in (2 * form.rank_in, 2 * form.rank_in + 1)


@pytest.mark.parametrize("include", [(), ("twins.*",), ("head", "stem"), ("*",)], ids=str)
@pytest.mark.parametrize("skip", [(), ("twins.0",), ("*.2", "head")], ids=str)
def test_only_what_is_included_and_not_skipped_is_decomposed(
    include: tuple[str, ...], skip: tuple[str, ...], model: Net, clock: Clock
) -> None:
    plan = planned(model, include=include, skip=skip)
    assert list(plan.layers) == LAYERS
    for name, layer in plan.layers.items():
        included = not include or any(fnmatch.fnmatch(name, p) for p in include)
        skipped = any(fnmatch.fnmatch(name, p) for p in skip)
        assert layer.decomposed == (included and not skipped)
        if skipped:
            assert layer.reason == "skipped"
        elif not included:
            assert layer.reason == "matches no include pattern"


@pytest.mark.parametrize("option", ["include", "skip"])
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names(option: str, model: Net, clock: Clock) -> None:
    with pytest.raises(PlanError, match=r"'twin\.0' matches no layer; did you mean twins\.0"):
        planned(model, **{option: ["twin.0"]})
    assert clock.batches == []


def test_what_is_no_goal_is_refused(model: Net, clock: Clock) -> None:
    with pytest.raises(GoalError, match="2"):
        planned(model, goal=2.0)
    with pytest.raises(GoalError):
        planned(model, goal=Ratio(0.5))


@pytest.mark.parametrize(
    "example",
    [torch.zeros(2, 5, 8, 8), torch.zeros(3), (X, X), {"y": X}],
    ids=["channels", "dimensions", "too many", "by a wrong name"],
)
def test_an_example_that_does_not_run_is_refused_in_one_line(example: object, model: Net, clock: Clock) -> None:
    with pytest.raises(ExampleError, match="does not run on the example") as caught:
        planned(model, example=example)
    assert "\n" not in str(caught.value)


def test_an_example_that_calls_no_layer_is_refused(clock: Clock) -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ExampleError, match="no layer of the network is called"):
        planned(Deaf(), example=X)


def test_a_decomposed_network_is_refused(model: Net, clock: Clock) -> None:
    small = lamina.decompose(model, planned(model))
    with pytest.raises(PlanError, match=r"stem is decomposed already; lamina\.merge"):
        planned(small)


@pytest.mark.parametrize("rule", [Plateau(), AtRatio()], ids=["plateau", "at ratio"])
def test_planning_leaves_the_network_and_the_random_state_as_they_were(rule: Plateau | AtRatio, model: Net) -> None:
    """With the real clock: shortly, on a small network."""
    model.train()
    model.drop.eval()
    modules, state = dict(model.named_modules()), {name: t.clone() for name, t in model.state_dict().items()}
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    training = {name: module.training for name, module in model.named_modules()}
    random = torch.get_rng_state()
    planned(model, rule=rule, include=["head", "pointwise"])
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert {name: module.training for name, module in model.named_modules()} == training
    assert torch.equal(model.stem.weight.grad, torch.ones_like(model.stem.weight))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_training_steps_are_timed_where_the_mode_says_so(model: Net, clock: Clock) -> None:
    with TimingTable(None) as table:
        planned(model, table)
        before = len(clock.batches)
        plan = planned(model, table, mode=Training())
        assert len(clock.batches) == 2 * before  # the times of forward passes are not reused
    assert plan.mode == "training"
    assert plan.setting
    assert plan.setting.mode == "training"
    assert all(isinstance(mode, Training) for *_, mode in clock.batches[before:])


def test_a_training_step_is_planned_with_the_real_clock(model: Net) -> None:
    plan = planned(model, mode=Training(), include=["head"])
    assert plan.layers["head"].before.timing
    assert all(p.grad is None for p in model.parameters())


def test_several_workloads_are_planned_together_by_their_weights(model: Net, clock: Clock) -> None:
    one, many = torch.zeros(1, 3, 8, 8), torch.zeros(8, 3, 8, 8)
    plan = planned(model, example=[Workload(one, 3), Workload(many, 1)])
    layer = plan.layers["head"]
    assert [(use.input_shape, use.weight) for use in layer.uses] == [((1, 64), 0.75), ((8, 64), 0.25)]
    dense = 64 * 10 + 10
    assert layer.before.macs == round(dense * (0.75 * 1 + 0.25 * 8))
    assert layer.before.timing
    assert layer.before.timing.median_s == pytest.approx(1e-9 * dense * (0.75 * 1 + 0.25 * 8))
    assert plan.examples
    assert [e.weight for e in plan.examples] == [0.75, 0.25]


def test_a_layer_called_twice_is_planned_once_and_costs_twice(clock: Clock) -> None:
    layer = nn.Linear(32, 32)
    plan = planned(nn.Sequential(layer, nn.ReLU(), layer), example=torch.zeros(4, 32))
    assert list(plan.layers) == ["0"]
    assert plan.layers["0"].before.macs == 2 * 4 * (32 * 32 + 32)
    assert plan.layers["0"].before.parameters == 32 * 32 + 32


def test_a_network_that_is_itself_one_layer_is_planned(clock: Clock) -> None:
    plan = planned(nn.Linear(64, 64), example=torch.zeros(4, 64))
    assert list(plan.layers) == [""]
    assert isinstance(plan.layers[""].form, LowRank)


def test_a_network_without_layers_has_an_empty_plan(clock: Clock) -> None:
    plan = planned(nn.Sequential(nn.ReLU()), example=torch.zeros(4, 64))
    assert plan.layers == {}
    assert "0 of 0 layers" in str(plan)


def test_the_whole_networks_cost_is_counted_measured_and_predicted(model: Net, clock: Clock) -> None:
    plan = planned(model)
    small = lamina.decompose(model, plan)
    assert plan.whole
    for cost, network in ((plan.whole.before, model), (plan.whole.after, small)):
        counted = lamina.count(network, X)
        assert (cost.parameters, cost.macs) == (counted.parameters, counted.macs)
    assert plan.whole.speedup == 2.0
    assert plan.whole.interval == (2.0, 2.0)
    gains = sum(
        layer.before.timing.median_s - layer.after.timing.median_s  # type: ignore[union-attr]
        for layer in plan.layers.values()
    )
    assert plan.whole.predicted_s == pytest.approx(2.0 - gains)


def test_layers_that_take_longer_alone_than_the_network_does_save_as_much_less(
    model: Net, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where each is a graph of its own, at whose ends data are converted: no network is foretold to take no time at all."""
    alone = planned(model)
    timed = [(layer.before.timing, layer.after.timing) for layer in alone.layers.values()]
    before, after = (sum(each.median_s for each in column if each) for column in zip(*timed, strict=True))
    whole_s = before / 3

    class Fast(Content):
        def whole(self, forms: dict[str, Form]) -> list[tuple[list[float], list[float]]]:
            return [([whole_s] * 9, [whole_s / 2] * 9) for _ in self.examples]

    monkeypatch.setattr(judge, "Stopwatch", Fast)
    plan = planned(model)
    assert plan.whole and plan.whole.predicted_s == pytest.approx(whole_s * after / before)


def test_without_never_slower_the_whole_is_not_timed(model: Net, clock: Clock) -> None:
    plan = planned(model, never_slower=False)
    assert plan.decomposed
    assert plan.whole
    assert plan.whole.speedup is None


def test_a_plan_is_saved_with_all_that_was_found(model: Net, clock: Clock, tmp_path: Path) -> None:
    plan = planned(model)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_layers_alike_but_for_the_dtype_that_reaches_them_are_timed_apart(clock: Clock) -> None:
    network = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = planned(network, example=torch.randn(4, 16), never_slower=False)  # type: ignore[arg-type]
    assert [use.input_dtype for layer in plan.layers.values() for use in layer.uses] == [None, "bfloat16", "bfloat16"]
    timed = [use.input_dtype for _, _, use, _ in clock.batches]
    assert list(dict.fromkeys(timed)) == [None, "bfloat16"]


def test_a_progress_bar_changes_nothing(model: Net, clock: Clock) -> None:
    assert planned(model, progress=True) == planned(model)


def test_the_default_table_lies_in_the_users_cache(
    model: Net, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))
    lamina.make_plan(model, X, Ratio(2))
    with TimingTable(tmp_path / "cache" / "timings.sqlite") as table:
        assert len(table) > 0


def test_an_unwritable_cache_warns_and_the_plan_is_made(model: Net, clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot be used"):
        plan = lamina.make_plan(model, X, Ratio(2), timings=tmp_path / "file" / "t.sqlite")
    assert plan == planned(model)


def test_a_plan_for_freezing_records_the_schedule_and_takes_the_mean_over_its_phases(model: Net, clock: Clock) -> None:
    schedule = SequentialFreezing(exclude=("head",))
    with TimingTable(None) as table:
        plan = planned(model, table, mode=Training(freezing=schedule))
        asked = {(str(layer.geometry), resting) for (layer, *_), resting in zip(clock.batches, clock.resting, strict=True)}
    assert plan.mode == "training" and plan.freezing == schedule
    assert plan.setting and plan.setting.freezing == str(schedule)
    assert "for a training step under sequential freezing every epoch, outer first, without head" in " ".join(plan.summary())
    head = str(plan.layers["head"].geometry)
    assert {resting for name, resting in asked if name == head} == {None}
    assert {resting for name, resting in asked if name != head} == {0, 1}
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_a_freezing_pattern_that_matches_no_layer_is_an_error(model: Net, clock: Clock) -> None:
    with pytest.raises(PlanError, match="freezing's exclude pattern 'haed' matches no layer; did you mean head"):
        planned(model, mode=Training(freezing=SequentialFreezing(exclude=("haed",))))
    assert not clock.batches


def test_a_plan_for_freezing_is_made_with_the_real_clock(model: Net) -> None:
    plan = planned(model, mode=Training(freezing=SequentialFreezing()), include=["head", "pointwise"])
    assert plan.layers["head"].before.timing
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_plan_says_where_the_time_goes_and_what_could_be_gained_at_best(model: Net, clock: Clock) -> None:
    plan = planned(model)
    assert plan.shares == {"head": 0.25, "grouped": 0.25, "(Dropout)": 0.125, "(operations between modules)": 0.375}
    told = " ".join(str(plan).split())
    assert "its time: 25% in the layers decomposed, 25% in what is refused (grouped), 38% operations between" in told
    assert "between modules, 12% Dropout; at best" in told
    assert "at best ×1.3, if its layers took no time" in told
    assert not planned(model, rule=AtRatio()).shares


class Speech(nn.Module):
    """Recurrent layers between linear ones: one inside another module, one of the user's own class, and a single step."""

    class Backwards(nn.GRU):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.front, self.head = nn.Linear(16, 64), nn.Linear(32, 64)
        layer = nn.LSTM(64, 48, 2, batch_first=True, bidirectional=True, proj_size=16)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([layer])})
        self.own, self.step = self.Backwards(32, 32, batch_first=True), nn.RNNCell(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder["layers"][0](self.front(x))[0]  # type: ignore[index]
        y, h = self.own(y)
        out: Tensor = self.head(self.step(y[:, -1], h[0]))
        return out


def test_the_time_in_recurrent_layers_is_told_by_their_names_and_why_they_are_refused(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "time_shares", time_shares)  # the real one
    plan = planned(Speech().eval(), example=torch.randn(2, 30, 16))
    recurrent = ["encoder.layers.0", "own", "step"]
    assert list(plan.refused) == recurrent and list(plan.layers) == ["front", "head"]
    assert all(plan.shares[name] > 0 for name in recurrent)
    most = max(recurrent, key=lambda name: plan.shares[name])
    told = " ".join(str(plan).split())
    assert f"{sum(plan.shares[name] for name in recurrent):.0%} in what is refused, most of it in {most}" in told
    assert "refused: encoder.layers.0: LSTM 64→48, 2 layers, both ways, projected to 16: a recurrent layer, whose" in told
    assert "refused: own: Backwards 32→32, a subclass of GRU: a recurrent layer, whose" in told
    assert "refused: step: RNNCell 32→32: a recurrent layer, whose" in told


def test_a_plan_in_which_nothing_is_decomposed_claims_no_speed_up(
    model: Net, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Restless(Content):
        """To which every form loses, and the same network seems faster than itself."""

        def whole(self, forms: dict[str, Form]) -> list[tuple[list[float], list[float]]]:
            return [([2.0] * 9, [1.9] * 9) for _ in self.examples]

        def in_place(self, forms: dict[str, Form]) -> dict[str, list[tuple[list[float], list[float]]]]:
            return {name: [([1.0] * 9, [1.5] * 9) for _ in self.examples] for name in forms}

    monkeypatch.setattr(judge, "Stopwatch", Restless)
    plan = planned(model)
    assert plan.put_back and not plan.decomposed
    assert plan.whole and plan.whole.speedup is None and plan.whole.interval is None
    assert plan.whole.after == plan.whole.before
    assert "×" not in next(line for line in str(plan).splitlines() if "layers decomposed" in line)
    assert "whole network" not in str(plan)


def test_the_progress_shown_names_every_stage_that_takes_long(
    model: Net, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    bar = SimpleNamespace(
        add_task=lambda what, **_: told.append(what), update=lambda *_, **__: None, remove_task=lambda _: None
    )
    monkeypatch.setattr("lamina.choose.planner.display", lambda shown: nullcontext(Display(bar)))
    planned(model)
    stages = ["timing layers", "timing layers in their places", "timing the whole network", "pricing layers"]
    assert list(dict.fromkeys(told)) == stages
