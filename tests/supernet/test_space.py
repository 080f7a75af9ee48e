"""The space: what a configuration costs, and the ways through it; the paper's MACs to the digit."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lamina.errors import SearchError
from lamina.forms import BlockTerm, Dense, Form, LowRank, Separable
from lamina.goals import Limit, Macs, Milliseconds, Parameters
from lamina.measure.count import count
from lamina.network.trial import observed
from lamina.network.walk import walk
from lamina.supernet.offer import grouped
from lamina.supernet.space import Choice, Configuration, Space, as_json, described, from_json, key
from lamina.values import Cost, Geometry, Setting, Timing, Use, Workload

SETTING = Setting("cpu", "somebody's", "float32", "contiguous", 1, "inference")


def small(layers: int = 3, seed: int = 0, timed: bool = False) -> Space:
    """A space of convolutions of different widths; made-up times that do not follow the MACs."""
    rng, clock = random.Random(seed), random.Random(seed)
    choices = {}
    total = Cost(1000, 50_000)
    for number in range(layers):
        width = rng.choice([16, 32])
        geometry = Geometry("Conv2d", width, width, True, (3, 3), (1, 1), (1, 1), (1, 1))
        forms: list[Form] = [grouped(geometry, size) for size in (1, 4, 16)] + [Dense()]
        times: dict[Form, Timing] = {form: Timing(clock.uniform(1e-4, 2e-3), 1e-6, 9, SETTING) for form in forms}
        uses = (Use((2, width, 8, 8), (2, width, 8, 8), rng.choice([1, 2])),)
        choices[f"layer{number}"] = choice = Choice.of(geometry, uses, rng.sample(forms, 4), Dense(), times if timed else None)
        total = Cost(total.parameters + choice.dense.parameters, total.macs + choice.dense.macs)
    if not timed:
        return Space(choices, total)
    whole = sum(c.dense.timing.median_s for c in choices.values() if c.dense.timing) + 3e-3
    return Space(choices, Cost(total.parameters, total.macs, Timing(whole, 1e-5, 9, SETTING)), SETTING)


def four_layers() -> nn.Module:
    blocks = [
        module
        for i, o in itertools.pairwise([3, 32, 32, 64, 64])
        for module in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def vgg_16() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def resnet_18() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18()


STEMS = {"0"}  # the first convolution stays dense


def space_of(model: nn.Module, x: torch.Tensor, sizes: tuple[int, ...]) -> Space:
    """Every 3×3 but a stem in some group sizes, the widths of the core those of the layer's input, as in arXiv 1912.00673."""
    layers = {
        n: layer for n, layer in walk(model).layers.items() if layer.geometry.taps == 9 and layer.geometry.in_channels > 3
    }
    seen, _ = observed(model, layers.values(), Workload(x))
    choices = {
        name: Choice.of(
            layer.geometry,
            seen[name].as_uses(),
            [grouped(layer.geometry, size) for size in sizes if size <= layer.geometry.in_channels],
            Dense(),
        )
        for name, layer in layers.items()
    }
    return Space(choices, count(model, x))


PUBLISHED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float, str, dict[int, str]]] = {
    "4 layers": (
        four_layers,
        (1, 3, 32, 32),
        1e6,
        "5.128",
        {32: "5.095", 16: "3.473", 8: "2.662", 4: "2.256", 1: "1.952"},
    ),
    "VGG-16": (vgg_16, (1, 3, 32, 32), 1e6, "313.7", {32: "120.9", 16: "94.6", 4: "74.9", 1: "70.0"}),
    "ResNet-18": (resnet_18, (1, 3, 224, 224), 1e9, "1.814", {32: "0.938", 16: "0.734", 4: "0.581", 1: "0.542"}),
}


# By the number of layers that are decomposed.
LINEAR_BIASES = {3: 256 + 10, 12: 512 + 10, 16: 1000}


def as_published(space: Space, macs: int, unit: float, digits: int) -> str:
    """The paper counts biases of convolutions and none of linear layers; ours counts both, and only the digits tell."""
    return f"{(macs - LINEAR_BIASES[len(space)]) / unit:.{digits}f}"


@pytest.mark.parametrize(("make", "shape", "unit", "original", "uniform"), PUBLISHED.values(), ids=PUBLISHED)
def test_macs_are_those_that_the_paper_prints(
    make: Callable[[], nn.Module], shape: tuple[int, ...], unit: float, original: str, uniform: dict[int, str]
) -> None:
    space = space_of(make(), torch.zeros(shape), tuple(sorted(uniform)))
    digits = len(original.partition(".")[2])
    assert as_published(space, space.whole.macs, unit, digits) == original
    found = {size: space.cost(space.uniform(lambda g, size=size: grouped(g, size))).macs for size in uniform}
    assert {size: as_published(space, macs, unit, digits) for size, macs in found.items()} == uniform


@pytest.mark.parametrize(("sizes", "macs"), [((8, 16, 64), "3.325"), ((2, 16, 32), "2.588"), ((1, 8, 16), "2.220")])
def test_macs_of_the_papers_found_configurations(sizes: tuple[int, ...], macs: str) -> None:
    space = space_of(four_layers(), torch.zeros(1, 3, 32, 32), (1, 2, 4, 8, 16, 32, 64))
    assert space.size == 252
    config = {name: grouped(choice.geometry, size) for (name, choice), size in zip(space.choices.items(), sizes, strict=True)}
    assert as_published(space, space.cost(config).macs, 1e6, 3) == macs


def test_one_configuration_of_sixteen_layers_is_priced_in_microseconds() -> None:
    # No time is asserted: that the work is sixteen additions is, by counting what is looked up.
    space = small(16, timed=True)
    config = space.sample(random.Random(0))
    looked_up = [0]

    class Counting(dict[str, Form]):
        def __getitem__(self, name: str) -> Form:
            looked_up[0] += 1
            return super().__getitem__(name)

    space.cost(Counting(config))
    assert looked_up[0] <= 2 * len(space)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.booleans())
def test_a_cost_is_the_rest_of_the_network_and_what_each_layer_costs(seed: int, layers: int, timed: bool) -> None:
    space = small(layers, seed, timed)
    config = space.sample(random.Random(seed))
    cost = space.cost(config)
    parts = [(choice.dense, choice.costs[choice.forms.index(config[name])]) for name, choice in space.choices.items()]
    assert cost.parameters == space.whole.parameters + sum(after.parameters - before.parameters for before, after in parts)
    assert cost.macs == space.whole.macs + sum(after.macs - before.macs for before, after in parts)
    if timed:
        assert cost.timing and space.whole.timing
        gained = sum(
            before.timing.median_s - after.timing.median_s for before, after in parts if before.timing and after.timing
        )
        assert cost.timing.median_s == pytest.approx(space.whole.timing.median_s - gained)
        assert cost.timing.setting == SETTING


@pytest.mark.parametrize("limit", [Macs(1), Parameters(1), Milliseconds(1)], ids=str)
def test_many_rows_are_priced_as_each_alone(limit: Limit) -> None:
    space = small(3, timed=True)
    rows = np.array(list(itertools.product(range(4), repeat=3)))
    alone = [limit.of(space.cost(space.configuration(row))) for row in rows.tolist()]
    np.testing.assert_allclose(space.measures(rows, limit), alone)


def test_every_configuration_comes_once_and_is_in_the_space() -> None:
    space = small(3)
    keys = [space.key(config) for config in space]
    assert len(keys) == len(set(keys)) == space.size == 64
    assert all(config in space for config in space)


def test_forms_stand_from_the_cheapest_to_the_dearest() -> None:
    for choice in small(4).choices.values():
        macs = [cost.macs for cost in choice.costs]
        assert macs == sorted(macs)


def test_a_key_does_not_depend_on_the_order_of_layers_and_differs_where_a_form_does() -> None:
    config: Configuration = {"a": Dense(), "b": BlockTerm(4, 4, 2)}
    assert key(config) == key(dict(reversed(config.items())))
    assert key(config) != key(config | {"a": LowRank(2)})
    assert key(config) != key({"a": BlockTerm(4, 4, 2), "b": Dense()})


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([Macs, Parameters, Milliseconds]))
def test_within_a_limit_are_exactly_the_configurations_that_it_allows(seed: int, share: float, kind: type[Any]) -> None:
    space = small(3, seed, timed=True)
    prices = sorted(kind(1).of(space.cost(config)) for config in space)
    limit = kind(prices[int(share * (len(prices) - 1))] * 1.0000001)
    found = {tuple(row) for rows in space.within([limit]) for row in rows.tolist()}
    assert found == {space.row(config) for config in space if limit.allows(space.cost(config))}
    for number in range(5):
        assert limit.allows(space.cost(space.sample_within(random.Random(number), [limit])))


def test_the_cheapest_of_a_limit_is_the_cheapest_of_all() -> None:
    space = small(3, 5, timed=True)
    for limit in (Macs(1), Parameters(1), Milliseconds(1)):
        assert limit.of(space.cost(space.cheapest(limit))) == pytest.approx(min(limit.of(space.cost(c)) for c in space))


def test_a_limit_below_the_cheapest_says_which_that_is() -> None:
    space = small(2)
    cheapest = space.cheapest(Macs(1))
    with pytest.raises(SearchError, match="no configuration is within 1 MACs: the cheapest takes") as caught:
        space.check([Macs(1)])
    assert described(cheapest) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_time_is_limited_only_where_it_was_measured() -> None:
    with pytest.raises(SearchError, match=r"10 ms: time is limited.*call \.time\(\)"):
        small(2).check([Milliseconds(10)])


def test_limits_that_allow_nothing_together_are_refused_though_each_allows_some() -> None:
    space = small(3, 1, timed=True)
    limits = [limit(limit(1).of(space.cost(space.cheapest(limit(1)))) * 1.01) for limit in (Macs, Milliseconds)]
    assert not any(space.allows(space.row(config), limits) for config in space)
    with pytest.raises(SearchError, match="though there are some within each"):
        space.sample_within(random.Random(0), limits)


def test_uniform_takes_the_same_place_or_the_same_form_everywhere() -> None:
    space = small(3)
    assert space.row(space.uniform(0)) == (0, 0, 0)
    assert space.row(space.uniform(99)) == (3, 3, 3)
    by_form = space.uniform(lambda geometry: grouped(geometry, 4))
    assert all(form == grouped(space.choices[name].geometry, 4) for name, form in by_form.items())
    with pytest.raises(SearchError, match="layer0: rank 3 is none of its forms"):
        space.uniform(lambda geometry: LowRank(3))


def test_times_travel_as_json() -> None:
    timed, untimed = small(3, 2, timed=True), small(3, 2)
    content = json.loads(json.dumps(timed.times()))
    other = small(3, 2, timed=True).with_times(content)
    assert [other.cost(c) for c in timed] == [timed.cost(c) for c in timed]
    assert untimed.times() is None
    assert timed.fingerprint() == untimed.fingerprint() != small(3, 3).fingerprint()


BROKEN = {
    "missing": (lambda c: {n: f for n, f in c.items() if n != "layer1"}, "layer1: the configuration names no form"),
    "unknown": (lambda c: c | {"layer9": Dense()}, "layer9: no such layer in this space; did you mean"),
    "foreign": (lambda c: c | {"layer0": LowRank(3)}, "layer0: rank 3 is none of its forms: "),
}


@pytest.mark.parametrize(("change", "says"), BROKEN.values(), ids=BROKEN)
def test_a_configuration_of_another_space_is_refused_by_the_layers_name(change: Callable[..., Any], says: str) -> None:
    space = small(3)
    config = change(space.sample(random.Random(0)))
    assert config not in space
    with pytest.raises(SearchError, match=says):
        space.cost(config)


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(SearchError, match="the space is empty: no layer"):
        Space({}, Cost(1, 1))
    choice = next(iter(small(1).choices.values()))
    with pytest.raises(SearchError, match="the space is empty: a has no form"):
        Space({"a": Choice(choice.geometry, (), (), choice.dense)}, Cost(1, 1))


def test_a_configuration_comes_back_from_json() -> None:
    config: Configuration = {"a": Dense(), "b": BlockTerm(None, 4, 2), "c": LowRank(3), "d": Separable(5)}
    assert from_json(as_json(config)) == config


@pytest.mark.parametrize("content", [[], {"a": 3}, {"a": {"form": "shrunk"}}, {"a": {"form": "low_rank", "rank": 0}}], ids=str)
def test_what_is_no_configuration_is_refused_in_one_line(content: Any) -> None:
    with pytest.raises(SearchError, match="this is no configuration") as caught:
        from_json(content)
    assert "\n" not in str(caught.value)
