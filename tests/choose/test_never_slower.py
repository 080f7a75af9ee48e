"""Putting back what does not pay. A fake stopwatch says what things take; no clock is looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lamina
from lamina import BlockTerm, Inference, LowRank, SequentialFreezing, Training, VanillaFreezing, Workload
from lamina.choose import never_slower as room
from lamina.choose.never_slower import Stopwatch, Verdict, never_slower
from lamina.choose.rules import Choice, Question
from lamina.forms import Form
from lamina.layers.decomposed import DecomposedLayer
from lamina.measure.clock import Effort
from lamina.measure.table import TimingTable
from lamina.network.walk import walk

ROUNDS = 9
NAMES = ("a", "b", "c", "d", "e")
CHOSEN: dict[str, Form] = {name: LowRank(2) for name in NAMES}


@dataclass
class FakeWatch:
    """Each layer gains some seconds in its place; the whole network takes 10, less the gains, plus a toll for each workload.

    The toll is what no layer shows alone: it is taken for each layer that is not dense.
    """

    gains: Mapping[str, float]
    tolls: tuple[float, ...] = (0.0,)
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def stack(self, name: str, form: Form) -> str:
        return f"{name} at {form}"

    def whole(self, stacks: Mapping[str, object]) -> list[tuple[list[float], list[float]]]:
        self.asked.append(tuple(stacks))
        saved = sum(self.gains[name] for name in stacks)
        return [([10.0] * ROUNDS, [10.0 - saved + toll * len(stacks)] * ROUNDS) for toll in self.tolls]

    def in_place(self, stacks: Mapping[str, object]) -> dict[str, tuple[float, float]]:
        return {name: (1.0, 1.0 - self.gains[name]) for name in stacks}


def judged(watch: FakeWatch, names: tuple[str, ...] = NAMES, weights: tuple[float, ...] = (1.0,)) -> Verdict:
    examples = [Workload(torch.zeros(1), weight) for weight in weights]
    return never_slower(nn.ReLU(), {}, CHOSEN, names, examples, Inference(), stopwatch=watch)  # type: ignore[arg-type]


def test_where_every_layer_loses_all_are_put_back() -> None:
    verdict = judged(FakeWatch(dict.fromkeys(NAMES, -0.1)))
    assert verdict.kept == {}
    assert set(verdict.put_back) == set(NAMES)
    assert verdict.before == verdict.after


def test_where_every_layer_gains_none_is_put_back() -> None:
    verdict = judged(FakeWatch(dict.fromkeys(NAMES, 0.1)))
    assert verdict.kept == CHOSEN
    assert verdict.put_back == {}
    assert verdict.after == [pytest.approx(9.5)] * ROUNDS


def test_only_the_losers_are_put_back_and_the_reason_says_how_much_they_lose() -> None:
    verdict = judged(FakeWatch(dict(zip(NAMES, (0.2, -0.1, 0.3, -0.25, 0.1), strict=True))))
    assert set(verdict.kept) == {"a", "c", "e"}
    assert set(verdict.put_back) == {"b", "d"}
    assert "rank 2 takes 1.10 of the dense layer's time" in verdict.put_back["b"]
    assert "1.25" in verdict.put_back["d"]


def test_what_neither_gains_nor_loses_is_put_back() -> None:
    assert set(judged(FakeWatch(dict(zip(NAMES, (0.0, 0.1, 0.1, 0.1, 0.1), strict=True)))).put_back) == {"a"}


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
    assert len(watch.asked) <= 4  # 5 layers, 2, 1, none: half at a time


def test_layers_set_by_hand_are_timed_along_but_never_put_back() -> None:
    watch = FakeWatch(dict(zip(NAMES, (-0.9, 0.1, -0.1, 0.1, -0.5), strict=True)))
    verdict = judged(watch, names=("b", "c", "d"))
    assert {"a", "e"} <= set(verdict.kept)
    assert not {"a", "e"} & set(verdict.put_back)
    assert all({"a", "e"} <= set(asked) for asked in watch.asked)


def test_a_network_that_loses_by_hand_alone_is_left_so_and_ends() -> None:
    assert judged(FakeWatch(dict.fromkeys(NAMES, -0.1)), names=()).kept == CHOSEN


def test_never_slower_holds_for_each_of_several_workloads() -> None:
    """The second workload loses what the first gains four times over: the mean alone would keep all."""
    gains = dict.fromkeys(NAMES, 0.4)
    watch = FakeWatch(gains, tolls=(0.0, 0.5))
    assert judged(watch, weights=(0.9, 0.1)).kept == {}


def test_the_reported_times_are_the_workloads_sums_by_weight() -> None:
    verdict = judged(FakeWatch(dict.fromkeys(NAMES, 0.4), tolls=(0.0, 0.2)), weights=(0.75, 0.25))
    assert verdict.kept == CHOSEN
    assert verdict.after == [pytest.approx(0.75 * 8 + 0.25 * 9)] * ROUNDS
    low, high = verdict.interval
    assert low == high == pytest.approx(10 / 8.25)


def test_a_layer_that_the_timed_runs_never_reach_is_put_back() -> None:
    class Unreached(FakeWatch):
        def in_place(self, stacks: Mapping[str, object]) -> dict[str, tuple[float, float]]:
            return super().in_place(stacks) | {"a": (0.0, 0.0)}

    verdict = judged(Unreached(dict.fromkeys(NAMES, 0.1)))
    assert verdict.put_back == {"a": "the layer is never called in inference"}


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


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_stopwatch_leaves_the_network_as_it_was(training: bool) -> None:
    model = Net().train()
    model.norm.eval()
    modules, state = dict(model.named_modules()), {name: t.clone() for name, t in model.state_dict().items()}
    watch = watch_of(model, Workload(torch.randn(8, 16)), training=training)
    stacks = {name: watch.stack(name, LowRank(2)) for name in ("body", "head")}
    random = torch.get_rng_state()
    [(before, after)] = watch.whole(stacks)
    spent = watch.in_place(stacks)
    assert len(before) == len(after) == 2
    assert set(spent) == {"body", "head"}
    assert all(t > 0 for pair in spent.values() for t in pair)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert (model.training, model.body.training, model.norm.training) == (True, True, False)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *stacks.values()])
    assert torch.equal(torch.get_rng_state(), random)


def test_the_stopwatch_leaves_the_network_as_it_was_also_after_an_error() -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.body, DecomposedLayer):
                raise RuntimeError("I want my Linear")
            return super().forward(x)

    model = Fails().eval()
    watch = watch_of(model, Workload(torch.randn(8, 16)))
    stacks = {"body": watch.stack("body", LowRank(2))}
    for measure in (watch.whole, watch.in_place):
        with pytest.raises(RuntimeError, match="I want my Linear"):
            measure(stacks)
        assert type(model.body) is nn.Linear
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *stacks.values()])


def test_the_time_in_place_is_the_sum_over_calls_added_up_over_workloads_by_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands still, but for each row that a dense layer (1 s) or a stack (3 s) reads."""
    now = 0.0
    monkeypatch.setattr(room.time, "perf_counter", lambda: now)

    def spend(module: nn.Module, args: tuple[Tensor], _: Tensor) -> None:
        nonlocal now
        now += len(args[0]) * (3 if isinstance(module, DecomposedLayer) else 1)

    model = Net().eval()
    model.body.register_forward_hook(spend)  # stacks adopt it
    watch = watch_of(model, Workload(torch.randn(8, 16), 0.75), Workload(torch.randn(2, 16), 0.25))
    spent = watch.in_place({"body": watch.stack("body", LowRank(2))})
    dense = 0.75 * (8 + 4) + 0.25 * (2 + 1)
    assert spent["body"] == (pytest.approx(dense), pytest.approx(3 * dense))


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
    monkeypatch.setattr(room.time, "perf_counter", lambda: now)

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
            found[freezing] = watch.in_place({"1": watch.stack("1", LowRank(2))})["1"]
    # Each linear layer: one product forward, one for its input's gradient, one for its weight's unless it rests.
    assert found == {None: (3.0, 6.0), VanillaFreezing(): (3.0, 5.0), SequentialFreezing(): (3.0, 5.0)}


def test_the_whole_time_under_freezing_is_the_mean_over_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(runs: Sequence[Callable[[], Any]], device: torch.device, effort: Effort) -> list[list[float]]:
        return [[10.0 * (number + 1)] * 3 for number, run in enumerate(runs) if [run()]]

    monkeypatch.setattr(room, "interleave", fake)
    model = Net()
    watch = Stopwatch(model, walk(model).layers, [Workload(torch.randn(8, 16))], Training(SequentialFreezing()), Effort())
    assert watch.whole({"head": watch.stack("head", LowRank(2))}) == [([10.0] * 3, [25.0] * 3)]


def test_a_layer_before_an_inplace_activation_is_timed_in_its_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True))
    watch = watch_of(model, Workload(torch.randn(2, 3, 8, 8)), training=True)
    spent = watch.in_place({name: watch.stack(name, BlockTerm(2, 2)) for name in ("0", "2")})
    assert all(seconds > 0 for pair in spent.values() for seconds in pair)
