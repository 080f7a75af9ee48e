"""From a network to a supernet and back: what is converted, what stays, and that a configuration is the same inside and out."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina.errors import LayerError, PlanError, RankError, SearchError
from lamina.forms import BlockTerm, Dense, Form, LowRank, Separable
from lamina.measure import layer_times
from lamina.measure.table import TimingTable
from lamina.network.walk import Layer
from lamina.supernet.convert import make_supernet
from lamina.supernet.supernet import Supernet
from lamina.values import Timing, Use

from ..supernets import network

MIXED = {
    "9": [LowRank(1), LowRank(3), Dense()],
    "3": [Dense(), BlockTerm(8, 8, 4), BlockTerm(4, 4), BlockTerm(6, 6), Separable(5)],
}


def union(example: torch.Tensor, **options: Any) -> Supernet:
    """Group sizes, ranks and dense layers in one supernet."""
    return make_supernet(network(), example, group_sizes=(2, 8), forms=MIXED, **options)


def test_a_configuration_taken_out_is_the_same_to_the_bit(example: torch.Tensor) -> None:
    net = union(example)
    with torch.no_grad():  # no longer what was fitted
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    for config in net.space:
        net.set_active(config)
        assert net.get_active() == config
        small = net.extract(config)
        assert torch.equal(small(example), net(example))
        with torch.inference_mode():
            assert torch.equal(small(example), net(example))
        assert [layer.form for layer in small.modules() if hasattr(layer, "form")] == [
            form for form in config.values() if form != Dense()
        ]


def test_costs_are_those_of_the_network_taken_out(example: torch.Tensor) -> None:
    net = union(example)
    for config in net.space:
        cost, counted = net.space.cost(config), lamina.count(net.extract(config), example)
        assert (cost.parameters, cost.macs) == (counted.parameters, counted.macs)


def test_a_supernet_shares_nothing_with_its_network_and_leaves_it_as_it_was(example: torch.Tensor) -> None:
    model = network()
    before, state = model(example), copy.deepcopy(model.state_dict())
    net = make_supernet(model, example, group_sizes=(2, 8))
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.zero_()
    assert torch.equal(model(example), before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_names_modes_hooks_dtype_and_what_trains_are_kept(example: torch.Tensor) -> None:
    model = network().double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model[5].weight.requires_grad_(False)
    model[3].train()
    called = []
    model[3].register_forward_hook(lambda *_: called.append("3"))
    net = make_supernet(model, example.double(), group_sizes=(2, 8))
    called.clear()
    net(example.double())
    assert called == ["3"]
    assert set(net.series) == {"3", "5"}
    assert net.series["3"].training
    assert not net.series["5"].training
    assert all(p.dtype == torch.float64 for p in net.parameters())
    assert not any(term.requires_grad for term in net.series["5"].terms())
    assert all(term.requires_grad for term in net.series["3"].terms())
    small = net.extract(net.get_active())
    assert [n for n, _ in small.named_modules() if "." not in n] == [n for n, _ in model.named_modules() if "." not in n]
    assert small.get_submodule("3.core").weight.is_contiguous(memory_format=torch.channels_last)


def test_a_module_under_two_names_is_one_series(example: torch.Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 4, 3, padding=1)
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    x = torch.randn(1, 4, 6, 7)
    net = make_supernet(Twice(), x, group_sizes=(1, 4))
    assert net.network.a is net.network.b
    assert list(net.series) == ["a"]
    small = net.extract(net.get_active())
    assert small.a is small.b
    assert torch.equal(small(x), net(x))
    assert net.space.cost(net.get_active()).macs == lamina.count(small, x).macs


def test_a_network_that_is_one_layer_becomes_a_series_too() -> None:
    x = torch.randn(2, 8)
    net = make_supernet(nn.Linear(8, 6), x, forms={"*": [LowRank(2), Dense()]})
    config = {"": LowRank(2)}
    net.set_active(config)
    assert torch.equal(net.extract(config)(x), net(x))


def test_layers_that_the_sizes_do_not_suit_stay_dense_and_say_why(net: Supernet) -> None:
    assert set(net.space.names) == {"3", "5"}
    assert net.left_dense == {
        "0": "of the group sizes 1, 2, 4, 8 too few divide its 3 channels",
        "9": "group sizes are for convolutions with a spatial kernel",
    }


def test_every_refusal_of_a_plan_is_one_of_a_supernet() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8))  # narrow, depthwise
    x = torch.randn(1, 4, 9, 9)
    net = make_supernet(model, x, group_sizes=(1, 2))
    assert net.refused == lamina.make_plan(model, x, lamina.Ratio(2), rule=lamina.AtRatio()).refused
    assert set(net.refused) == {"0", "2"}


def test_a_convolution_that_has_groups_stays_dense() -> None:
    model = nn.Sequential(nn.Conv2d(4, 32, 3), nn.Conv2d(32, 32, 3, groups=2))
    net = make_supernet(model, torch.randn(1, 4, 9, 9), group_sizes=(1, 2))
    assert net.left_dense == {"1": "a convolution that has groups is in no series"} and set(net.space.names) == {"0"}


def test_a_transposed_convolution_stays_dense() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 8, 3, 2))
    net = make_supernet(model, torch.randn(1, 4, 9, 9), forms={"*": [BlockTerm(4, 4), BlockTerm(4, 4, 4)]})
    assert net.left_dense == {"1": "a transposed convolution is in no series"} and set(net.space.names) == {"0"}


def test_a_layer_takes_the_sizes_that_divide_its_width(example: torch.Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 12, 3), nn.Conv2d(12, 12, 3))
    net = make_supernet(model, example, group_sizes=(1, 2, 4))
    assert {name: [form.groups for form in forms] for name, forms in net.space.forms.items()} == {"1": [6, 3], "2": [12, 6, 3]}  # type: ignore[attr-defined]


def test_narrower_widths_are_rounded_to_what_the_sizes_divide(example: torch.Tensor) -> None:
    net = make_supernet(network(), example, group_sizes=(1, 4), widths=0.7)
    assert net.space.forms["5"] == (BlockTerm(4, 4, 4), BlockTerm(4, 4, 1))


def test_dense_may_be_one_of_the_forms(example: torch.Tensor) -> None:
    net = make_supernet(network(), example, group_sizes=(2, 8), dense=True)
    config = dict.fromkeys(net.space.names, Dense())
    net.set_active(config)
    assert torch.equal(net(example), network()(example))
    assert set(map(type, net.extract(config).children())) == set(map(type, network().children()))


def test_weight_errors_are_the_squared_distances_of_the_fits(example: torch.Tensor) -> None:
    net = union(example)
    model = network()
    for name, errors in lamina.weight_errors(net).items():
        for form, error in errors.items():
            layer = net.extract(net.get_active() | {name: form}).get_submodule(name)
            apart = (layer.weight - model.get_submodule(name).weight).square().sum()  # type: ignore[operator, union-attr]
            assert error == pytest.approx(float(apart.detach()), rel=1e-4, abs=1e-9)


def test_times_of_a_configuration_are_those_of_the_layers_and_the_rest(net: Supernet) -> None:
    before = net.state_dict()
    space = net.time()
    assert net.space is space
    assert space.timed
    for config in space:
        cost = space.cost(config)
        assert cost.timing and space.whole.timing
        parts = [(c.dense.timing, c.costs[c.forms.index(config[n])].timing) for n, c in space.choices.items()]
        first = space.cost(space.uniform(0))
        rest = first.timing.median_s - sum(c.costs[0].timing.median_s for c in space.choices.values())  # type: ignore[union-attr]
        assert cost.timing.median_s == pytest.approx(rest + sum(form.median_s for _, form in parts if form))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    plan = net.plan(config)
    assert plan.setting == space.setting
    assert plan.layers["3"].after.timing is not None


@pytest.mark.parametrize("casting", [False, True], ids=["plain", "autocast"])
def test_layers_are_timed_as_the_network_feeds_them_when_it_is_timed(
    net: Supernet, casting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[tuple[str | None, str, bool]] = []

    def measure(layer: Layer, forms: Sequence[Form], use: Use, last: bool, *others: Any) -> dict[Form, Timing]:
        fed.append((use.input_dtype, use.autocast, last))
        return dict.fromkeys(forms, Timing(1.0, 0.0, 7, others[1]))

    monkeypatch.setattr(layer_times, "measure_forms", measure)
    if casting:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.autocast("cpu", torch.bfloat16, enabled=casting), TimingTable(None) as table:
        net.time(table)
    assert fed == [("bfloat16", "bfloat16", True) if casting else (None, "off", False)] * 2


def test_a_supernet_whose_example_reaches_not_every_series_is_not_timed() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.deep(x) if len(x) > 1 else x

    net = make_supernet(nn.Sequential(nn.Conv2d(4, 4, 3), Branching()), torch.randn(2, 4, 8, 8), group_sizes=(1, 2))
    other = Supernet(net.network, net.blueprint, torch.randn(1, 4, 8, 8))
    with TimingTable(None) as table, pytest.raises(lamina.ExampleError, match=r"1\.deep: it is never called on this example"):
        other.time(table)
    assert not other.space.timed


def test_timing_draws_nothing_from_the_callers_random_state(net: Supernet) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    net.time()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_plan_of_a_configuration_saves_loads_compares_and_verifies(
    net: Supernet, example: torch.Tensor, tmp_path: Path
) -> None:
    config = net.sample(random.Random(1))
    small = net.extract(config)
    lamina.save(small, tmp_path / "out")
    back = lamina.load(network(), tmp_path / "out")
    assert torch.equal(back(example), small(example))
    plan = lamina.Plan.load(tmp_path / "out" / "plan.json")
    assert {name: layer.form for name, layer in plan.decomposed.items()} == config
    assert plan.factors.series == "nested"
    assert str(plan.goal) == "no limit"
    assert lamina.compare(network(), small, example, seconds=0.01).speedup > 0


def test_a_copy_of_a_supernet_is_one(net: Supernet, example: torch.Tensor) -> None:
    twin = copy.deepcopy(net)
    twin.set_active(twin.space.uniform(0))
    assert net.get_active() != twin.get_active()
    assert torch.equal(twin.extract(twin.get_active())(example), twin(example))


def test_a_configuration_that_does_not_fit_changes_nothing(net: Supernet) -> None:
    before = net.get_active()
    for config in ({}, {"3": Dense(), "5": Dense()}, net.space.uniform(0) | {"7": Dense()}):
        with pytest.raises(SearchError):
            net.set_active(config)
        with pytest.raises(SearchError):
            net.extract(config)
    assert net.get_active() == before


class ReadsWeight(nn.Module):
    """Its code calls the layer's weight's own storage, which no series has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.conv.weight, nn.Parameter), "a weight must be a parameter"
        return self.other(self.conv(x))


def nan(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan  # type: ignore[index, operator]
    return model


BAD: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "nothing": (network, {"forms": {}}, SearchError, "the space is empty: forms names no pattern"),
    "one form": (network, {"most_forms": 1}, SearchError, "most_forms is 1; a layer has a choice among 2 or more"),
    "no size": (network, {"group_sizes": ()}, SearchError, r"group_sizes is \(\); give several"),
    "a number": (network, {"group_sizes": 4}, SearchError, "group_sizes is 4; give several"),
    "size of zero": (network, {"group_sizes": (0, 4)}, SearchError, "group size 0 is not a positive whole number"),
    "sizes do not nest": (
        network,
        {"group_sizes": (4, 6)},
        RankError,
        "group sizes 4 and 6 do not nest: each must divide the next",
    ),
    "no size divides": (
        network,
        {"group_sizes": (5, 25)},
        SearchError,
        "the space is empty: no layer.*too few divide its 3 channels",
    ),
    "groups do not divide": (
        network,
        {"forms": {"3": [BlockTerm(None, 8, 8), BlockTerm(None, 9)]}},
        RankError,
        "3: rank out 9 is not between",
    ),
    "groups do not nest": (network, {"forms": {"5": [BlockTerm(6, 6, 2), BlockTerm(6, 6, 3)]}}, RankError, "5: .*do not nest"),
    "kind does not fit": (network, {"forms": {"3": [LowRank(2)]}}, RankError, "3: LowRank is for linear"),
    "no form": (network, {"forms": {"3": []}}, SearchError, "3: the space is empty: its list of forms is"),
    "no list": (network, {"forms": {"3": Dense()}}, SearchError, "3: its forms are .*; give a list"),
    "pattern": (network, {"forms": {"conv9": [Dense()]}}, PlanError, "pattern 'conv9' matches no layer"),
    "include": (network, {"group_sizes": (1, 8), "include": ["x*"]}, PlanError, r"pattern 'x\*' matches no layer"),
    "all skipped": (network, {"group_sizes": (1, 8), "skip": ["*"]}, SearchError, "the space is empty: .*it was not wanted"),
    "widths": (network, {"group_sizes": (1, 8), "widths": 0.0}, SearchError, "widths is 0.0; it is a share"),
    "nan": (lambda: nan(network()), {"group_sizes": (1, 8)}, LayerError, "3: 9 of its 576 weights are NaN"),
}


@pytest.mark.parametrize(("make", "options", "error", "says"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused_in_one_line_that_names_the_culprit(
    make: Callable[[], nn.Module], options: dict[str, Any], error: type[Exception], says: str
) -> None:
    model = make()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(error, match=says) as caught:
        make_supernet(model, torch.randn(1, 3, 10, 12), **options)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == kinds


def test_a_layer_that_the_network_does_not_get_on_without_is_refused_by_name_and_the_rest_become_series() -> None:
    net = make_supernet(ReadsWeight(), torch.randn(1, 4, 10, 12), group_sizes=(1, 4))
    assert "a weight must be a parameter" in net.blueprint.refused["conv"] and list(net.blueprint.layers) == ["other"]


def test_a_conversion_that_was_stopped_goes_on_with_the_next_layer(
    example: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lamina.supernet import fitted as room

    fitted: list[str] = []
    real = room.series

    def series(layer: Any, *args: Any, **options: Any) -> Any:
        if len(fitted) == 1:
            raise KeyboardInterrupt
        fitted.append(layer.name)
        return real(layer, *args, **options)

    monkeypatch.setattr(room, "series", series)
    with pytest.raises(KeyboardInterrupt):
        make_supernet(network(), example, group_sizes=(2, 8), resume=tmp_path / "fits")
    monkeypatch.setattr(room, "series", lambda layer, *a, **o: fitted.append(layer.name) or real(layer, *a, **o))
    net = make_supernet(network(), example, group_sizes=(2, 8), resume=tmp_path / "fits")
    assert fitted == ["3", "5"]
    whole = make_supernet(network(), example, group_sizes=(2, 8))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), whole.parameters(), strict=True))
    for path in (tmp_path / "fits").iterdir():  # what is kept but damaged is fitted anew
        path.write_bytes(path.read_bytes()[:-9])
    again = make_supernet(network(), example, group_sizes=(2, 8), resume=tmp_path / "fits")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_a_supernet_and_a_decomposed_network_are_refused(net: Supernet, example: torch.Tensor) -> None:
    with pytest.raises(PlanError, match=r"network\.3 is a series already"):
        make_supernet(net, example, group_sizes=(1, 8))
    with pytest.raises(PlanError, match="3 is decomposed already"):
        make_supernet(net.extract(net.get_active()), example, group_sizes=(1, 8))
