"""Every speed out of one supernet: the nested order, budgets solved for, times that whole networks correct, losses measured."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import lamina
from lamina.comparison import whole_setting
from lamina.decomposition import plan_of
from lamina.errors import ArtifactError, CalibrationError, SearchError, TrainingError
from lamina.forms import BlockTerm, Dense, Form, LowRank
from lamina.goals import Limit, Macs, Milliseconds, Parameters, Speedup
from lamina.supernet.order import nested_order
from lamina.supernet.space import Losses, Row, Space
from lamina.supernet.supernet import Supernet
from lamina.values import Inference

from ..supernets import network
from .test_space import small


def losses_of(space: Space, seed: int, spread: float = 1.0) -> dict[str, dict[Form, float]]:
    rng = random.Random(seed)
    return {name: {form: rng.uniform(0, spread) for form in forms} for name, forms in space.forms.items()}


def lost(space: Space, losses: Losses, row: Row) -> float:
    return sum(losses[name][form] for name, form in space.configuration(row).items())


def rows_of(space: Space) -> list[Row]:
    return list(itertools.product(*(range(len(forms)) for forms in space.forms.values())))


PRICES: list[Limit] = [Macs(1), Parameters(1), Milliseconds(1)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(PRICES))
def test_the_order_goes_down_in_cost_step_by_step_from_what_loses_least(seed: int, price: Limit) -> None:
    space = small(4, seed, timed=True)
    losses = losses_of(space, seed)
    order = nested_order(space, losses, price)
    costs = [price.of(space.cost_of_row(row)) for row in order]
    assert all(a > b for a, b in itertools.pairwise(costs))
    assert all(sum(x != y for x, y in zip(a, b, strict=True)) == 1 for a, b in itertools.pairwise(order))
    everything = rows_of(space)
    assert lost(space, losses, order[0]) == pytest.approx(min(lost(space, losses, row) for row in everything))
    assert costs[-1] == pytest.approx(min(price.of(space.cost_of_row(row)) for row in everything))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(PRICES))
def test_what_a_prefix_of_the_order_ends_at_is_the_best_answer_to_its_own_cost(seed: int, price: Limit) -> None:
    """The relaxed knapsack's answers with one form a layer are exact ones."""
    space = small(3, seed, timed=True)
    losses = losses_of(space, seed)
    everything = [(price.of(space.cost_of_row(row)), lost(space, losses, row)) for row in rows_of(space)]
    for row in nested_order(space, losses, price):
        cost = price.of(space.cost_of_row(row)) * (1 + 1e-9)
        assert lost(space, losses, row) <= min(loss for own, loss in everything if own <= cost) + 1e-9


def test_a_form_that_loses_beyond_all_measure_is_no_step_and_one_without_a_loss_is_named() -> None:
    space = small(2)
    losses = losses_of(space, 0)
    first = space.names[0]
    never = space.forms[first][0]
    losses[first][never] = float("inf")
    assert all(space.configuration(row)[first] != never for row in nested_order(space, losses, Macs(1)))
    del losses[first][never]
    with pytest.raises(SearchError, match=f"{first}: there is no loss of"):
        nested_order(space, losses, Macs(1))
    with pytest.raises(SearchError, match=f"{first}: none of its forms has a finite loss"):
        nested_order(space, losses | {first: dict.fromkeys(space.forms[first], float("nan"))}, Macs(1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_what_is_solved_for_is_the_least_of_all_within_limits_and_the_next_best_follow(seed: int, a: float, b: float) -> None:
    space = small(3, seed, timed=True)
    losses = losses_of(space, seed)
    everything = rows_of(space)
    limits = []
    for price, share in ((Milliseconds(1), a), (Macs(1), b)):
        costs = sorted(price.of(space.cost_of_row(row)) for row in everything)
        limits.append(type(price)(costs[int(share * (len(costs) - 1))] * 1.0000001))
    allowed = sorted(lost(space, losses, row) for row in everything if space.allows(row, limits))
    found: list[Row] = []
    for _ in range(5):
        row = space.solved(losses, limits, without=found)
        if row is None:
            break
        found.append(row)
    assert len(found) == min(5, len(allowed)) == len(set(found))
    assert [lost(space, losses, row) for row in found] == pytest.approx(allowed[: len(found)], rel=1e-5)


# ---- times ----


def test_a_line_through_whole_networks_corrects_what_layers_add_up_to() -> None:
    space = small(5, 3, timed=True)

    def truly(config: dict[str, Form]) -> float:
        (timing,) = [space.cost(config).timing]
        assert timing is not None and space.whole.timing is not None
        # Whole networks gain only 0.8 of what their layers gain: the original, where nothing is gained, is as it was.
        return space.whole.timing.median_s - 0.8 * (space.whole.timing.median_s - timing.median_s)

    anchored = space.anchored([(config, truly(config)) for config in space.spread(6)])
    assert anchored.whole == space.whole and anchored.fingerprint() == space.fingerprint()
    for config in itertools.islice(space, 50):
        assert Milliseconds(1).of(anchored.cost(config)) == pytest.approx(1e3 * truly(config), rel=1e-6)
        assert anchored.cost(config).macs == space.cost(config).macs
    times = anchored.times()
    assert times is not None
    again = space.with_times(times)
    config = space.uniform(1)
    assert Milliseconds(1).of(again.cost(config)) == pytest.approx(Milliseconds(1).of(anchored.cost(config)))


def test_a_line_that_would_fall_is_taken_for_noise() -> None:
    space = small(5, 3, timed=True)
    configs = space.spread(6)
    costs = [Milliseconds(1).of(space.cost(config)) / 1e3 for config in configs]
    anchored = space.anchored(list(zip(configs, reversed(costs), strict=True)))
    slow, fast = (
        Milliseconds(1).of(anchored.cost(space.configuration(row))) for row in (rows_of(space)[-1], rows_of(space)[0])
    )
    before = [Milliseconds(1).of(space.cost(space.configuration(row))) for row in (rows_of(space)[-1], rows_of(space)[0])]
    assert (slow > fast) == (before[0] > before[1])


def test_whole_networks_to_be_timed_lie_from_the_fastest_to_the_slowest() -> None:
    space = small(6, 2, timed=True)
    costs = [Milliseconds(1).of(space.cost(config)) for config in space.spread(6)]
    everything = [Milliseconds(1).of(space.cost(config)) for config in space]
    low, high = min(everything), max(everything)
    assert len(costs) == 6
    assert min(costs) < low + 0.3 * (high - low) and max(costs) > high - 0.3 * (high - low)
    with pytest.raises(SearchError, match=r"call \.time\(\)"):
        small(2).spread(3)


# ---- budgets ----


def known(net: Supernet) -> Supernet:
    """A supernet whose table knows times: 20 ms for the original, a form 1, 2, 3 or 4 ms from the cheapest on."""
    setting = dataclasses.asdict(whole_setting(net.network, net.example[0], Inference()))
    layers = {
        n: [[4e-3, 0.0, 9], *([1e-3 * (i + 1), 0.0, 9] for i in range(len(c.forms)))] for n, c in net.space.choices.items()
    }
    net.adopt(net.space.with_times({"setting": setting, "whole": [20e-3, 0.0, 9], "layers": layers}))
    return net


def test_a_budget_is_answered_by_what_loses_least_within_it(net: Supernet, example: Tensor) -> None:
    net = known(net)
    for goal, limit in ((Speedup(1.2), 20 / 1.2), (Milliseconds(15.0), 15.0), (Speedup(1.0001), 20 / 1.0001)):
        config = net.within(goal)
        allowed = [c for c in net.space if Milliseconds(1).of(net.space.cost(c)) <= limit * (1 + 1e-9)]
        losses = [lost(net.space, net.losses, net.space.row(c)) for c in allowed]
        assert lost(net.space, net.losses, net.space.row(config)) == pytest.approx(min(losses))
        small_ = net.at(goal)
        net.set_active(config)
        assert torch.equal(small_.eval()(example), net.eval()(example))
        plan = plan_of(small_)
        assert plan.goal == goal and {n: p.form for n, p in plan.layers.items() if n in config} == config


def test_a_budget_below_the_cheapest_says_which_that_is_and_time_needs_times(net: Supernet) -> None:
    with pytest.raises(SearchError, match=r"call \.time\(\) on the supernet"):
        net.at(Speedup(2))
    with pytest.raises(SearchError, match="no configuration is within 1 MACs: the cheapest takes"):
        net.at(Macs(1))
    with pytest.raises(SearchError, match=r"no configuration is within .* ms: the cheapest takes"):
        known(net).at(Speedup(50))


def test_trained_along_an_order_it_answers_out_of_that_order_and_saves_it(
    net: Supernet, example: Tensor, tmp_path: Path
) -> None:
    net = known(net)
    order = net.order
    lamina.train_supernet(net, [example], teacher=network(), epochs=2, recipe=lamina.Recipe("order", rate=1e-3))
    assert net.order == order and net.blueprint.order is not None
    lamina.measure_losses(net, network(), [example], outputs=lamina.Categorical())
    assert net.order == order
    for speedup in (1.01, 1.1, 1.2):
        config = net.within(Speedup(speedup))
        number = order.index(config)
        assert net.space.allows(net.space.row(config), [Milliseconds(20 / speedup)])
        assert number == 0 or not net.space.allows(net.space.row(order[number - 1]), [Milliseconds(20 / speedup)])
    with pytest.raises(SearchError, match=r"nothing of the order is within .*: its cheapest takes"):
        net.within(Speedup(50))
    lamina.save(net, tmp_path / "elastic")
    back = lamina.load_supernet(network(), tmp_path / "elastic")
    assert back.order == order and back.losses == net.losses and back.space.times() == net.space.times()
    taken = lamina.load(network(), tmp_path / "elastic", at=Speedup(1.2))
    assert torch.equal(taken.eval()(example), net.at(Speedup(1.2)).eval()(example))
    lamina.save(taken, tmp_path / "one")  # it is a network like any other
    assert torch.equal(lamina.load(network(), tmp_path / "one").eval()(example), taken(example))


def normed() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


def test_each_step_of_the_order_has_batch_norm_statistics_of_its_own(example: Tensor, tmp_path: Path) -> None:
    net = lamina.make_supernet(normed(), example, group_sizes=(1, 2, 4, 8))
    images = [example, example.flip(3) * 2]
    with pytest.raises(SearchError, match="was not trained along its order"):
        net.recalibrate(images)
    recipe = lamina.Recipe("order", rate=1e-3)
    lamina.train_supernet(net, [example], teacher=normed(), epochs=1, recipe=recipe)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    active = net.get_active()
    net.recalibrate(iter(images))
    assert net.get_active() == active and all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    budgets = [Macs(net.space.cost(config).macs) for config in net.order]
    wanted = [net.at(budget, recalibration=images).eval()(example) for budget in budgets]
    assert all(torch.equal(net.at(budget).eval()(example), want) for budget, want in zip(budgets, wanted, strict=True))
    own = [net.extract(config).eval()(example) for config in net.order]
    assert not any(torch.equal(a, b) for a, b in zip(wanted, own, strict=True))

    lamina.save(net, tmp_path / "elastic")
    back = lamina.load_supernet(normed(), tmp_path / "elastic")
    for budget, want in zip(budgets, wanted, strict=True):
        assert torch.equal(back.at(budget).eval()(example), want)
        assert torch.equal(lamina.load(normed(), tmp_path / "elastic", at=budget).eval()(example), want)
    assert torch.equal(copy.deepcopy(net).at(budgets[0]).eval()(example), wanted[0])
    net.statistics[next(iter(net.statistics))]["1.running_mean"] = torch.zeros(3)
    lamina.save(net, tmp_path / "elastic")
    with pytest.raises(ArtifactError, match=r"1\.running_mean of a batch norm does not fit this network"):
        lamina.load_supernet(normed(), tmp_path / "elastic")
    lamina.train_supernet(net, [example], teacher=normed(), epochs=1, recipe=recipe)
    assert not net.statistics


def test_where_statistics_cannot_be_estimated_none_are_kept_and_nothing_changes(example: Tensor) -> None:
    net = lamina.make_supernet(normed(), example, group_sizes=(1, 2, 4, 8))
    lamina.train_supernet(net, [example], teacher=normed(), epochs=1, recipe=lamina.Recipe("order", rate=1e-3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    active = net.get_active()
    with pytest.raises(lamina.LayerError, match="holds NaN or infinities in batch 1"):
        net.recalibrate([example, example * float("nan")])
    assert not net.statistics and net.get_active() == active
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_what_is_met_in_training_are_the_configurations_of_the_order(net: Supernet, example: Tensor) -> None:
    met = []
    handle = net.register_forward_pre_hook(lambda module, args: met.append(net.get_active()) if module.training else None)
    lamina.train_supernet(net, [example] * 40, teacher=network(), epochs=1, recipe=lamina.Recipe("order", rate=1e-4), seed=3)
    handle.remove()
    assert all(config in net.order for config in met) and len(met) == 40
    assert len({lamina.supernet.space.key(config) for config in met}) > len(net.order) // 2


def test_times_of_other_conditions_are_not_taken_over_from_a_folder(net: Supernet, tmp_path: Path) -> None:
    lamina.save(known(net), tmp_path / "elastic")
    torch.set_num_threads(2)
    try:
        assert not lamina.load_supernet(network(), tmp_path / "elastic").space.timed
    finally:
        torch.set_num_threads(1)


def test_what_is_loaded_at_a_budget_must_be_elastic_and_what_is_elastic_wants_one(net: Supernet, tmp_path: Path) -> None:
    lamina.save(net, tmp_path / "elastic")
    lamina.save(net.at(Macs(1e9)), tmp_path / "plain")
    with pytest.raises(ArtifactError, match="holds a supernet: say what to take out, as in at="):
        lamina.load(network(), tmp_path / "elastic")
    with pytest.raises(ArtifactError, match="holds no supernet, so at= has nothing to choose among"):
        lamina.load(network(), tmp_path / "plain", at=Macs(1e9))
    with pytest.raises(ArtifactError, match="holds no supernet"):
        lamina.load(network(), tmp_path / "nowhere", at=Macs(1e9))


# ---- losses ----


def test_losses_are_what_the_answers_move_by_when_one_layer_changes(net: Supernet, example: Tensor) -> None:
    model, outputs = network(), lamina.Categorical()
    batches = [example, example + 1]
    before = copy.deepcopy(net.state_dict())
    start = net.order[0]
    lamina.measure_losses(net, model, batches, outputs=outputs)
    assert net.blueprint.lost == "answers"
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())

    def apart(config: dict[str, Form]) -> float:
        small_ = net.extract(config).eval()
        with torch.no_grad():
            return float(torch.cat([outputs.divergence(model(x), small_(x)) for x in batches]).mean())

    base = apart(start)
    for name, losses in net.losses.items():
        for form, loss in losses.items():
            assert loss == pytest.approx(max(apart(start | {name: form}) - base, 0.0), rel=1e-6, abs=1e-12)
    with pytest.raises(SearchError, match="the data hold no batch"):
        lamina.measure_losses(net, model, [])
    with pytest.raises(CalibrationError):
        lamina.measure_losses(net, model, batches, outputs=lamina.Categorical(dim=7))


def test_a_supernet_of_before_losses_were_kept_goes_by_its_weight_errors(net: Supernet) -> None:
    layers = {name: layer.model_copy(update={"losses": ()}) for name, layer in net.blueprint.layers.items()}
    old = Supernet(net.network, net.blueprint.model_copy(update={"layers": layers}), net.example[0].example)
    assert old.losses == lamina.weight_errors(net)
    assert old.within(Macs(1e12)) == {name: min(losses, key=losses.__getitem__) for name, losses in old.losses.items()}


# ---- forms by measured time, fits by what the network cares about ----


class Skewed(nn.Module):
    """Two of eight channels carry nearly all that the input holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


FORMS: list[Form] = [BlockTerm(4, 4), BlockTerm(8, 8, 4), BlockTerm(8, 8, 2), BlockTerm(8, 8), BlockTerm(None, 4), Dense()]


def skewed_images() -> list[Tensor]:
    scale = torch.tensor([8.0, 8.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])[:, None, None]
    return [scale * torch.randn(16, 8, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(6)]


def test_series_fitted_to_the_data_lose_less_of_what_the_data_show() -> None:
    model, images = Skewed().eval(), skewed_images()
    calibration = lamina.calibrate(model, images, outputs=lamina.Categorical())
    blind = lamina.make_supernet(model, images[0], forms={"conv": FORMS})
    seeing = lamina.make_supernet(model, images[0], forms={"conv": FORMS}, data=calibration)
    assert (blind.blueprint.lost, seeing.blueprint.lost) == ("weights", "calibration")
    apart: dict[Form, list[float]] = {}
    with torch.no_grad():
        for form in FORMS:
            for net in (blind, seeing):
                net.set_active({"conv": form})
                each = [lamina.Categorical().divergence(model(x), net.eval()(x)) for x in images]
                apart.setdefault(form, []).append(float(torch.cat(each).mean()))
    for form in (BlockTerm(8, 8), Dense()):
        assert max(apart.pop(form)) < 1e-6
    assert all(weighted < unweighted for unweighted, weighted in apart.values()), apart
    assert sum(weighted for _, weighted in apart.values()) < 0.7 * sum(unweighted for unweighted, _ in apart.values()), apart
    nats = seeing.losses["conv"]
    assert nats[Dense()] == 0 and nats[BlockTerm(8, 8)] < 1e-6 < nats[BlockTerm(4, 4)]


def test_without_forms_each_layer_gets_those_that_pay_here() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(96, 96, 3, padding=1), nn.ReLU(), nn.Conv2d(96, 96, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 5)).eval()
    net = lamina.make_supernet(model, torch.randn(4, 96, 16, 16), most_forms=4)
    assert net.space.timed
    for name, forms in net.space.forms.items():
        assert Dense() in forms and 2 <= len(forms) <= 4
        times = {form: cost.timing.median_s for form, cost in zip(forms, net.space.choices[name].costs, strict=True)}  # type: ignore[union-attr]
        losses = net.losses[name]
        ordered = sorted(forms, key=times.__getitem__)
        assert ordered[-1] == Dense()  # nothing slower than it loses less
        assert losses[Dense()] == 0
    for name, why in net.left_dense.items():
        assert why == "no form of it is faster", name


# ---- learning from the original alone ----


def test_it_learns_from_the_original_alone_with_no_labels(example: Tensor) -> None:
    model = network()
    with torch.no_grad():
        model[-1].weight.mul_(30)  # type: ignore[index, union-attr, operator]
    net = lamina.make_supernet(model, example, group_sizes=(1, 2, 4, 8))
    images = [example + 0.1 * i for i in range(4)]

    def apart() -> float:
        with torch.no_grad():
            found = []
            for config in net.space:
                net.set_active(config)
                found += [float(lamina.Categorical().divergence(model(x), net.eval()(x)).mean()) for x in images]
        return sum(found) / len(found)

    before = apart()
    lamina.train_supernet(net, images, teacher=model, epochs=10, recipe=lamina.Recipe("uniform", rate=0.05))
    assert apart() < 0.7 * before
    with pytest.raises(TrainingError, match="there is nothing to learn from: give loss=, or the untouched original"):
        lamina.train_supernet(net, images, epochs=1)


def test_a_sandwich_holds_one_graph_at_a_time_and_has_the_gradients_of_all(net: Supernet, example: Tensor) -> None:
    """Peak of what autograd saves, and what the optimizer is handed, against the three losses added up at once."""
    kept: list[int] = []
    alive = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive
            self.tensor, self.size = tensor, tensor.numel()
            alive += self.size
            kept.append(alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.size

    target = torch.tensor([0, 1, 2, 3])
    handed: dict[str, Tensor] = {}

    class Looking(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            handed.update({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})

    def peak(recipe: lamina.Recipe) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            lamina.train_supernet(
                net,
                [(example, target)],
                loss=nn.functional.cross_entropy,
                epochs=1,
                recipe=recipe,
                optimizer=lambda parameters: Looking(parameters, lr=0.1),
                clip=1e9,
            )
        return max(kept)

    alone = max(peak(lamina.Recipe("uniform", norms_in_eval=True, normalise=False)) for _ in range(1))
    sandwich = peak(lamina.Recipe("sandwich", norms_in_eval=True, normalise=False))
    assert sandwich < 2.2 * alone
    drawn = net.sample(random.Random("0 0"))
    wanted: dict[str, Tensor] = {}
    twin = copy.deepcopy(net).train()
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for layer in twin.series.values():
        layer.normalise = False
    for config in (net.space.uniform(net.space.size), net.space.uniform(0), drawn):
        twin.set_active(config)
        (nn.functional.cross_entropy(twin(example), target) / 3).backward()
    wanted = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None and n in handed}
    assert wanted and set(handed) == set(wanted)
    for name, gradient in handed.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7)


def test_a_loss_that_cannot_be_computed_is_said_to_be_the_loss(net: Supernet, example: Tensor) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        raise ValueError("no such class")

    with pytest.raises(TrainingError, match=r"the loss cannot be computed .*: ValueError: no such class"):
        lamina.train_supernet(net, [(example, torch.zeros(4))], loss=loss, epochs=1)


def test_a_layer_in_ranks_is_exact_at_full_rank_with_data_too() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    data = [torch.randn(32, 6) * torch.tensor([5.0, 1, 1, 1, 1, 0.01]) for _ in range(4)]
    net = lamina.make_supernet(model, data[0], forms={"0": [LowRank(2), LowRank(6)]}, data=data)
    net.set_active({"0": LowRank(6)})
    torch.testing.assert_close(net.eval()(data[0]), model(data[0]), rtol=1e-4, atol=1e-5)
