"""Refining brings a network nearer to its original, or leaves it as it is; it touches nothing else, and the plan remembers."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.decomposition import attach_plan, plan_of
from lamina.train.refine import _Batch, _Drawn
from lamina.values import Workload

CLASSES = 4


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, CLASSES),
    ).eval()  # fmt: skip


def images(count: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def decomposed(model: nn.Module) -> nn.Module:
    plan = lamina.make_plan(model, images(1), lamina.Ratio(2.0), rule=lamina.AtRatio())
    forms = {"0": lamina.Dense(), "3": lamina.BlockTerm(4, 4), "8": lamina.LowRank(2)}
    for name, form in forms.items():
        plan = plan.with_form(name, form)
    return lamina.decompose(model, plan, check=False)


@pytest.fixture
def model() -> nn.Module:
    return network()


@pytest.fixture
def small(model: nn.Module) -> nn.Module:
    return decomposed(model)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def held_out(model: nn.Module, small: nn.Module, outputs: Any = lamina.Categorical()) -> float:  # noqa: B008
    """What is held out of 32 items in batches of eight, by its definition."""
    chosen = images()[24:]
    with torch.no_grad():
        return float(outputs.divergence(model.eval()(chosen), small.eval()(chosen)).mean())


BATCHES = list(images().split(8))
QUICK: dict[str, Any] = {"steps": 20, "outputs": lamina.Categorical(), "rate": 3e-3}


@pytest.mark.parametrize("outputs", [lamina.Categorical(), lamina.Gaussian()], ids=lambda o: o.kind)
def test_answers_come_nearer_to_the_originals_on_what_was_held_out(model: nn.Module, small: nn.Module, outputs: Any) -> None:
    before = held_out(model, small, outputs)
    found = lamina.refine(small, model, BATCHES, **QUICK | {"outputs": outputs})
    assert found.kept and found.before == pytest.approx(before, rel=1e-6)
    assert found.after == pytest.approx(held_out(model, small, outputs), rel=1e-6)
    assert found.after < before
    assert (found.items, found.held_out, found.steps, len(found.looks)) == (24, 8, 20, 10)


@pytest.mark.parametrize("rate", [3e-3, 30.0], ids=["usual", "far too high"])
def test_what_comes_out_is_never_further_from_the_original_than_what_came_in(model: nn.Module, rate: float) -> None:
    for seed in range(3):
        small = decomposed(model)
        before = held_out(model, small)
        found = lamina.refine(small, model, BATCHES, **QUICK | {"rate": rate, "seed": seed})
        assert held_out(model, small) <= before * (1 + 1e-6)
        assert found.after == min(found.before, found.after, *found.looks)


def test_where_no_look_is_better_nothing_changes_and_the_plan_says_nothing(model: nn.Module, small: nn.Module) -> None:
    lamina.refine(small, model, BATCHES, **QUICK)  # now its batch norm holds the statistics of these data, or they are worse
    before, plan = state(small), plan_of(small)
    found = lamina.refine(small, model, BATCHES, **QUICK | {"rate": 30.0})
    assert not found.kept and found.after == found.before and "as they were" in str(found)
    assert changed(before, state(small)) == set() and plan_of(small) is plan


def test_it_is_made_again_from_its_steps_and_seed_to_the_same_bits(model: nn.Module) -> None:
    runs = []
    for seed in (5, 5, 6):
        small = decomposed(model)
        torch.manual_seed(seed * len(runs))  # the state outside does not matter
        lamina.refine(small, model, BATCHES, **QUICK | {"seed": seed})
        runs.append(state(small))
    assert changed(runs[0], runs[1]) == set()
    assert changed(runs[0], runs[2])


def test_only_decomposed_layers_and_batch_norms_change(model: nn.Module, small: nn.Module) -> None:
    before = state(small)
    lamina.refine(small, model, BATCHES, **QUICK)
    names = changed(before, state(small))
    assert {"3.core.weight", "8.first.weight"} <= names
    assert all(name.startswith(("3.", "8.", "1.running", "1.num_batches")) for name in names)


def test_modes_gradients_random_states_and_the_original_are_as_before(model: nn.Module, small: nn.Module) -> None:
    small.train()
    small[3].core.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    model[0].train()  # type: ignore[index]
    kept, modes = state(model), [module.training for net in (small, model) for module in net.modules()]
    flags = [p.requires_grad for p in small.parameters()]
    drawn = torch.get_rng_state()
    lamina.refine(small, model, BATCHES, **QUICK)
    assert changed(kept, state(model)) == set()
    assert [module.training for net in (small, model) for module in net.modules()] == modes
    assert [p.requires_grad for p in small.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(p.grad is None for net in (small, model) for p in net.parameters())


def test_the_plan_remembers_it_and_cannot_be_decomposed_anew(model: nn.Module, small: nn.Module, tmp_path: Path) -> None:
    found = lamina.refine(small, model, BATCHES, **QUICK)
    lamina.refine(small, model, BATCHES, **QUICK | {"seed": 1, "steps": 30})
    lamina.save(small, tmp_path / "out")
    plan = lamina.Plan.load(tmp_path / "out" / "plan.json")
    first, *_ = plan.factors.refined
    assert (first.steps, first.seed, first.before, first.after) == (20, 0, found.before, found.after)
    assert f"refined: 20 steps, {found.before:.2g} → {found.after:.2g} nats" in str(plan)
    with pytest.raises(lamina.PlanError, match=r"were refined, and new ones would be others: load the saved network"):
        lamina.decompose(model, plan, check=False)
    again = lamina.load(network(), tmp_path / "out")
    assert changed(state(small), state(again)) == set()
    other = plan.with_form("8", lamina.LowRank(3))  # whose factors nobody has refined
    assert plan_of(lamina.decompose(model, other, check=False)).factors.refined == ()


def test_a_score_of_the_network_before_is_taken_out_of_its_plan(model: nn.Module, small: nn.Module) -> None:
    attach_plan(small, plan_of(small).model_copy(update={"scores": lamina.Scores(before=0.9, after=0.8)}))
    lamina.refine(small, model, BATCHES, **QUICK)
    assert plan_of(small).scores is None


def test_minutes_become_steps_of_which_as_many_are_made_again(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.train.refine._PILOT_S", 0.01)
    runs = []
    steps = None
    for _ in range(2):
        small = decomposed(model)
        found = lamina.refine(small, model, BATCHES, minutes=0.02, steps=steps, outputs=lamina.Categorical())
        steps = found.steps
        runs.append(state(small))
    assert steps is not None and steps >= 1
    assert changed(*runs) == set()


class Told(nn.Module):
    """Answers in a dict, from keyword arguments, with an argument that is the same for all items."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        return {"logits": self.last(torch.relu(self.first(x + shift))), "count": torch.tensor(1)}


def test_inputs_and_answers_may_be_of_any_shape(planned: Callable[..., lamina.Plan]) -> None:
    model = Told().eval()
    data = [{"x": x, "shift": torch.ones(6)} for x in torch.randn(8, 5, 6)]
    plan = planned(model, data[0], {"first": lamina.LowRank(2)})
    small = lamina.decompose(model, plan, check=False)
    found = lamina.refine(small, model, data, **QUICK)
    assert found.kept and (found.items, found.held_out) == (30, 10)


class Optional(nn.Module):
    """Calls one of its layers only on inputs that are large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.seldom, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.always(x))
        return self.last(self.seldom(h) if float(x.max()) > 2.2 else h)


def test_a_layer_that_some_batches_do_not_reach_is_not_compared(planned: Callable[..., lamina.Plan]) -> None:
    model, inputs = Optional().eval(), torch.randn(8, 8, 6)
    assert 0 < sum(float(x.max()) > 2.2 for x in inputs) < 8
    plan = planned(model, torch.full((2, 6), 3.0), {"always": lamina.LowRank(2), "seldom": lamina.LowRank(2)})
    small = lamina.decompose(model, plan, check=False)
    found = lamina.refine(small, model, list(inputs), **QUICK)
    assert found.after < found.before


def test_each_decomposed_layer_learns_what_its_layer_gives_in_the_original(model: nn.Module, small: nn.Module) -> None:
    def apart(name: str) -> float:
        seen: list[Tensor] = []
        for net in (model, small):
            handle = net.get_submodule(name).register_forward_hook(lambda _, args, output: seen.append(output.detach()))
            net.eval()(images())
            handle.remove()
        return float((seen[1] - seen[0]).square().sum() / seen[0].square().sum())

    before = apart("3")
    lamina.refine(small, model, BATCHES, **QUICK)
    assert apart("3") < before


def test_all_items_are_drawn_before_one_is_drawn_again_and_may_meet_others() -> None:
    batches = [_Batch(Workload(torch.arange(4.0) + 4 * n), torch.arange(4.0) + 4 * n, 4) for n in range(3)]
    drawn = _Drawn(batches, 2, seed=0)
    pairs = [pair for _ in range(3) for pair in drawn]
    for (inputs,), answers in pairs:
        assert torch.equal(inputs, answers)
    for turn in (pairs[:3], pairs[3:]):
        assert sorted(torch.cat([answers for _, answers in turn]).tolist()) == list(range(12))
    assert len({tuple(answers.tolist()) for _, answers in pairs}) == 6
    uneven = [dataclasses.replace(batches[0], workload=Workload(torch.ones(4, 2))), *batches[1:]]
    drawn = _Drawn(uneven, 1, seed=0)
    whole = [answers.tolist() for _ in range(3) for _, answers in drawn]
    assert sorted(whole) == [batch.answer.tolist() for batch in batches]


def dense(model: nn.Module) -> lamina.Plan:
    plan = lamina.make_plan(model, images(1), lamina.Ratio(2.0), rule=lamina.AtRatio())
    for name in plan.layers:
        plan = plan.with_form(name, lamina.Dense())
    return plan


def other() -> nn.Module:
    return nn.Sequential(*network(), nn.Identity())


def nan_of(model: nn.Module) -> nn.Module:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[8].bias[0] = torch.nan  # type: ignore[index]
    return broken


WRONG: dict[str, tuple[Callable[[nn.Module, nn.Module], Any], type[Exception], str]] = {
    "a calibration": (
        lambda small, model: lamina.refine(small, model, lamina.calibrate(model, BATCHES)),
        lamina.TrainingError,
        "a calibration keeps no inputs",
    ),
    "no data": (lambda small, model: lamina.refine(small, model, None), lamina.TrainingError, "pass the batches as data="),
    "an empty list": (lambda small, model: lamina.refine(small, model, []), lamina.ExampleError, "the data hold no batch"),
    "three items": (
        lambda small, model: lamina.refine(small, model, images(3)),
        lamina.TrainingError,
        "fewer than 4 items",
    ),
    "other shapes": (
        lambda small, model: lamina.refine(small, model, torch.ones(8, 3, 6, 6)),
        lamina.ExampleError,
        "does not run on the example",
    ),
    "not decomposed": (lambda small, model: lamina.refine(model, model, BATCHES), lamina.PlanError, "carries no plan"),
    "nothing decomposed": (
        lambda small, model: lamina.refine(lamina.decompose(model, dense(model)), model, BATCHES),
        lamina.TrainingError,
        "nothing in this network is decomposed",
    ),
    "itself": (
        lambda small, model: lamina.refine(small, small, BATCHES),
        lamina.PlanError,
        "the original is decomposed itself",
    ),
    "another network": (lambda small, model: lamina.refine(small, other(), BATCHES), lamina.PlanError, "is another network"),
    "answers that are NaN": (
        lambda small, model: lamina.refine(small, nan_of(model), BATCHES),
        lamina.TrainingError,
        "the original's answers hold NaN or infinities in batch 0",
    ),
    "a network that answers NaN": (
        lambda small, model: lamina.refine(_spoiled(small), model, BATCHES),
        lamina.TrainingError,
        "there is nothing to begin from",
    ),
    "half precision": (
        lambda small, model: lamina.refine(small.bfloat16(), model.bfloat16(), [x.bfloat16() for x in BATCHES]),
        lamina.TrainingError,
        "weights in bfloat16 are too coarse",
    ),
    "a function as outputs": (
        lambda small, model: lamina.refine(small, model, BATCHES, outputs=torch.sum),
        lamina.TrainingError,
        "tell how far two answers lie apart",
    ),
    "no minutes": (lambda small, model: lamina.refine(small, model, BATCHES, minutes=0), lamina.TrainingError, "minutes is 0"),
    "no steps": (lambda small, model: lamina.refine(small, model, BATCHES, steps=0), lamina.TrainingError, "steps is 0"),
    "a rate of NaN": (
        lambda small, model: lamina.refine(small, model, BATCHES, rate=float("nan")),
        lamina.TrainingError,
        "rate is nan",
    ),
}


def _spoiled(small: nn.Module) -> nn.Module:
    with torch.no_grad():
        small[8].second.bias[0] = torch.nan  # type: ignore[index]
    return small


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line_and_the_network_is_as_it_was(model: nn.Module, small: nn.Module, case: str) -> None:
    call, error, message = WRONG[case]
    before = state(small)
    with pytest.raises(error, match=re.escape(message)) as caught:
        call(small, model)
    assert "\n" not in str(caught.value)
    if case not in ("half precision", "a network that answers NaN"):  # which these changed themselves
        assert changed(before, state(small)) == set()


def test_a_training_that_fails_on_its_way_leaves_the_network_as_it_was(
    model: nn.Module, small: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, plan = state(small), plan_of(small)

    class Failing(torch.optim.Adam):
        made = 0

        def step(self, *args: Any) -> Any:
            type(self).made += 1
            if self.made == 15:
                raise KeyboardInterrupt
            return super().step(*args)

    monkeypatch.setattr(torch.optim, "Adam", Failing)
    with pytest.raises(KeyboardInterrupt):
        lamina.refine(small, model, BATCHES, **QUICK)
    assert changed(before, state(small)) == set() and plan_of(small) is plan
