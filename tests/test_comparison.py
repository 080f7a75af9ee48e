"""Two networks against each other. What the clock says is given; what is asked is what is made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lamina
from lamina import (
    Comparison,
    ExampleError,
    LaminaError,
    LowRank,
    SequentialFreezing,
    Setting,
    Timing,
    Training,
    VanillaFreezing,
    Workload,
    comparison,
)
from lamina.comparison import step, time_each, whole_setting
from lamina.decomposition import attach_plan, plan_of
from lamina.measure.clock import Effort
from lamina.values import Inference


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.norm(self.body(x)))
        return y


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two takes 2, 4, 6 … seconds, the second half of it; every run is run once."""

    def fake(runs: Sequence[Callable[[], Any]], device: torch.device, effort: Effort) -> list[list[float]]:
        for run in runs:
            run()
        return [[2.0 * n / (1 + i) for n in range(1, 10)] for i in range(len(runs))]

    monkeypatch.setattr(comparison, "interleave", fake)


def test_the_speedup_is_the_median_of_the_paired_ratios(clock: None) -> None:
    found = lamina.compare(Net(), Net(), X)
    assert found.speedup == 2.0
    assert found.interval == (2.0, 2.0)
    assert (found.before.median_s, found.after.median_s, found.before.repeats) == (10.0, 5.0, 9)


def test_several_workloads_are_added_up_by_their_weights_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in the same rounds: what slows one round down, slows all of them down."""

    def fake(runs: Sequence[Callable[[], Any]], device: torch.device, effort: Effort) -> list[list[float]]:
        first, second = [[burst * 1.0 for burst in BURSTS], [burst * 5.0 for burst in BURSTS]]
        return [first, BURSTS, second, BURSTS]

    monkeypatch.setattr(comparison, "interleave", fake)
    found = lamina.compare(Net(), Net(), [Workload(torch.zeros(1, 4), 1), Workload(torch.zeros(5, 4), 3)])
    assert found.speedup == pytest.approx(0.25 * 1 + 0.75 * 5)
    assert found.interval == (pytest.approx(found.speedup), pytest.approx(found.speedup))
    assert found.before.repeats == len(BURSTS)
    assert found.example == "1×4 and 5×4"


BURSTS = [1.0, 1.0, 3.0, 1.0, 7.0, 2.0, 1.0]
SAMPLES = st.lists(st.lists(st.floats(0.1, 10), min_size=4, max_size=4), min_size=1, max_size=40)


@settings(max_examples=50, deadline=None)
@given(SAMPLES)
def test_the_speedup_of_several_workloads_lies_in_its_interval_however_noisy_the_machine(samples: list[list[float]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "interleave", lambda *_: [list(run) for run in zip(*samples, strict=True)])
        found = lamina.compare(Net(), Net(), [Workload(X, 1), Workload(X, 3)])
    assert found.interval[0] <= found.speedup <= found.interval[1]


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"seconds": float("nan")}, "seconds is nan; it must be a positive number"),
        ({"seconds": 0}, "seconds is 0; it must be a positive number"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"seconds": float("inf")}, "seconds is inf"),
        ({"seconds": "2"}, "seconds is '2'"),
        ({"seconds": True}, "seconds is True"),
        ({"mode": "training"}, r"mode is 'training'; give lamina.Inference\(\) or lamina.Training\(\)"),
        ({"mode": Training}, "mode is <class 'lamina.values.Training'>; give"),
        ({"model": X}, "a Tensor is no network: give two of torch.nn.Module"),
        ({"small": None}, "a NoneType is no network"),
    ],
)
def test_an_argument_that_is_none_of_its_kind_is_refused_in_one_line(wrong: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"model": Net(), "small": Net(), "example": X} | wrong
    with pytest.raises(LaminaError, match=said) as caught:
        lamina.compare(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", [None, Training()], ids=["inference", "training"])
def test_comparing_leaves_both_networks_and_the_random_state_as_they_were(mode: Training | None) -> None:
    """With the real clock, shortly."""
    models = [Net().train(), Net().eval()]
    states = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    random = torch.get_rng_state()
    found = lamina.compare(*models, X, mode=mode, seconds=1e-9)
    assert found.before.repeats == 6
    assert found.setting.mode == ("training" if mode else "inference")
    for model, state in zip(models, states, strict=True):
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    assert [model.drop.training for model in models] == [True, False]
    assert torch.equal(torch.get_rng_state(), random)


def test_inference_is_in_eval_mode_without_gradients_and_training_the_contrary(
    clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamina.comparison.change", lambda *_: None)  # answers are always those of eval mode
    seen: list[tuple[bool, bool]] = []
    model = Net()
    model.body.register_forward_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())))
    lamina.compare(model, Net(), X)
    assert set(seen) == {(False, False)}
    seen.clear()
    lamina.compare(model, Net(), X, mode=Training())
    assert set(seen) == {(True, True)}


def test_a_training_step_runs_backward_through_every_output_whatever_holds_it() -> None:
    class Many(Net):
        def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
            return {"y": super().forward(x), "more": (self.body(x), 3, None)}

    gradients = step(Many(), Workload(X), Training())()
    assert len(gradients) == 4
    assert all(g is not None for g in gradients)


def test_a_network_without_trainable_parameters_has_no_training_step() -> None:
    with pytest.raises(ExampleError, match="no parameter of the network requires a gradient"):
        lamina.compare(Net().requires_grad_(False), Net(), X, mode=Training())


def test_a_network_whose_output_has_no_gradient_has_no_training_step() -> None:
    class Detached(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(ExampleError, match="no tensor with a gradient"):
        lamina.compare(Detached(), Net(), X, mode=Training())


def test_a_network_that_does_not_run_on_the_example_is_refused_and_left_as_it_was() -> None:
    model = Net().train()
    with pytest.raises(ExampleError, match="6×5") as caught:
        lamina.compare(model, Net(), torch.zeros(6, 5))
    assert "\n" not in str(caught.value)
    assert model.training


def test_the_whole_setting_says_channels_last_where_weights_or_inputs_are() -> None:
    conv, x = nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 6, 6)
    assert whole_setting(conv, Workload(x), Inference()).memory_format == "contiguous"
    assert whole_setting(conv, Workload(x.to(memory_format=torch.channels_last)), Inference()).memory_format == "channels_last"
    assert whole_setting(conv.to(memory_format=torch.channels_last), Workload(x), Inference()).memory_format == "channels_last"


def test_whole_networks_are_timed_each_as_often_on_each_workload() -> None:
    times = time_each([Net(), Net(), Net()], [Workload(X), Workload(X[:2])], Inference(), Effort(0.0, 3, 3))
    assert [[len(each) for each in of_one] for of_one in times] == [[3, 3, 3]] * 2


def a_comparison(denormals: tuple[int, int]) -> Comparison:
    setting = Setting("cpu", "a CPU", "float32", "contiguous", 2, "inference")
    return Comparison(
        1.5, (1.4, 1.6), Timing(0.003, 1e-5, 9, setting), Timing(0.002, 1e-5, 9, setting), setting, "8×3×32×32", denormals
    )


def test_a_comparison_prints_the_result_and_its_conditions() -> None:
    first, second = str(a_comparison((0, 0))).splitlines()
    assert first == "×1.50 (95 % between 1.40 and 1.60): 3 ms ± 0.01 (9 runs) → 2 ms ± 0.01 (9 runs)"
    assert "8×3×32×32" in second
    assert "2 threads" in second


def test_a_comparison_warns_first_where_the_outputs_change_much_and_else_says_it_below() -> None:
    much, little = (dataclasses.replace(a_comparison((0, 0)), change=change) for change in (0.42, 0.1))
    first, then, *_ = str(much).splitlines()
    assert first == f"WARNING: outputs change by 0.42 of their size on the example; {much.timed}"
    assert then.startswith("measure how accurate the network still is")
    assert str(little).splitlines()[:2] == [little.timed, "outputs change by 0.1 of their size on the example"]


def test_a_comparison_whose_interval_is_wide_says_that_the_machine_is_too_busy_to_tell() -> None:
    told = dataclasses.replace(a_comparison((0, 0)), interval=(1.18, 2.08))
    assert str(told).startswith("×1.50 (95 % between 1.18 and 2.08, so the machine is too busy to tell): ")


def test_a_comparison_prints_denormal_weights_where_there_are_any() -> None:
    assert "denormal weights: 0 → 7" in str(a_comparison((0, 7)))


def test_denormal_weights_are_counted(clock: None) -> None:
    model = Net()
    with torch.no_grad():
        model.body.weight[0, 0] = 1e-40
    assert lamina.compare(model, Net(), X).denormals == (1, 0)


def small_net(planned: Callable[..., lamina.Plan]) -> nn.Module:
    model = Net()
    return lamina.decompose(model, planned(model, X, {"body": LowRank(2)}))


def test_a_comparison_repeats_what_the_second_networks_plan_knew_of_its_accuracy(
    planned: Callable[..., lamina.Plan], clock: None
) -> None:
    small = small_net(planned)
    plan = plan_of(small).model_copy(update={"scores": lamina.Scores(before=0.9, after=0.8)})
    found = lamina.compare(Net(), attach_plan(small, plan), X)
    assert found.planned == ("score: 0.9 → 0.8, a drop of 0.1",)
    assert str(found).splitlines()[-1] == "when planned: score: 0.9 → 0.8, a drop of 0.1"
    assert lamina.compare(small, Net(), X).planned == ()


def test_under_freezing_the_second_network_takes_the_mean_over_its_phases_and_the_first_trains_whole(
    planned: Callable[..., lamina.Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run takes two seconds, and one more for each factor that gets a gradient."""
    small = small_net(planned)
    seen: list[set[str]] = []
    asked: list[nn.Parameter] = []
    monkeypatch.setattr(torch.autograd, "grad", lambda total, wanted, **_: asked.extend(wanted))
    rests = {id(p): name for name, p in small.named_parameters() if name.endswith("weight") and "body" in name}

    def fake(runs: Sequence[Callable[[], Any]], device: torch.device, effort: Effort) -> list[list[float]]:
        times = []
        for run in runs:
            asked.clear()
            run()
            seen.append({rests[id(p)] for p in asked if id(p) in rests})
            times.append([2.0 + len(seen[-1])] * 3)
        return times

    monkeypatch.setattr(comparison, "interleave", fake)
    found = lamina.compare(small, small, X, mode=Training(freezing=SequentialFreezing()))
    first, second = "body.first.weight", "body.second.weight"
    assert seen == [{first, second}, {second}, {first}]
    assert (found.before.median_s, found.after.median_s) == (4.0, 3.0)
    assert found.setting.freezing == str(SequentialFreezing()) and str(SequentialFreezing()) in str(found)
    assert all(p.requires_grad for p in small.parameters())


def test_comparing_under_freezing_leaves_both_networks_as_they_were(planned: Callable[..., lamina.Plan]) -> None:
    """With the real clock, shortly; also in the middle of a training under freezing."""
    small = small_net(planned)
    lamina.freeze(small, VanillaFreezing())
    small.body.second.weight.grad = torch.ones_like(small.body.second.weight)
    before = {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in small.named_parameters()}
    lamina.compare(Net(), small, X, mode=Training(freezing=SequentialFreezing()), seconds=1e-9)
    for name, p in small.named_parameters():
        value, trains, grad = before[name]
        assert torch.equal(p, value) and p.requires_grad == trains and p.grad is grad


def test_a_step_that_fails_under_freezing_wakes_what_rested(planned: Callable[..., lamina.Plan]) -> None:
    small = small_net(planned)
    run = step(small, Workload(torch.zeros(6, 5)), Training(freezing=VanillaFreezing()), 0)
    with pytest.raises(RuntimeError):
        run()
    assert all(p.requires_grad for p in small.parameters())
