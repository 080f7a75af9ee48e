"""Which factors rest while a group does, by the network's own names, and only as long as a timing wants it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import lamina
from lamina import BlockTerm, LowRank, SequentialFreezing, VanillaFreezing
from lamina.layers.resting import at_rest, decomposed_layers, resting_factors, resting_weights
from lamina.network.wrappers import plain, unwrapped


@pytest.fixture
def net(planned: Callable[..., lamina.Plan]) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
    return lamina.decompose(model, planned(model, torch.randn(1, 3, 6, 6), {"0": BlockTerm(None, 4), "1": LowRank(3)}))


def test_each_group_holds_its_factors(net: nn.Module) -> None:
    schedule = SequentialFreezing()
    assert list(decomposed_layers(net)) == ["0", "1"]
    assert [list(resting_factors(net, schedule, group)) for group in (0, 1, None)] == [
        ["0.expand", "1.first"],
        ["0.core", "1.second"],
        [],
    ]
    assert list(resting_factors(net, VanillaFreezing(exclude=("0",)), 0)) == ["1.first"]


def test_a_layer_under_two_names_counts_once(net: nn.Module) -> None:
    net.again = net[1]
    assert list(resting_factors(net, SequentialFreezing(), 0)) == ["0.expand", "1.first"]


def test_weights_that_do_not_train_are_not_counted_as_resting(net: nn.Module) -> None:
    net[0].expand.weight.requires_grad_(False)
    assert [id(w) for w in resting_weights(net, SequentialFreezing(), 0)] == [id(net[1].first.weight)]
    assert resting_weights(net, None, 0) == []


def test_weights_are_at_rest_until_an_error_ends_it_and_keep_their_gradients(net: nn.Module) -> None:
    weights = resting_weights(net, SequentialFreezing(), 1)
    gradient = weights[0].grad = torch.ones_like(weights[0])
    with pytest.raises(KeyError), at_rest(weights):
        assert not any(weight.requires_grad for weight in weights)
        raise KeyError
    assert all(weight.requires_grad for weight in weights) and weights[0].grad is gradient


def test_names_are_plain_inside_wrappers(net: nn.Module) -> None:
    wrapped = nn.DataParallel(torch.compile(net, backend="eager"))
    assert unwrapped(wrapped) is net
    assert list(decomposed_layers(wrapped)) == ["0", "1"]
    assert plain("a._orig_mod.b._fsdp_wrapped_module.weight") == "a.b.weight"
    assert plain("module.weight") == "module.weight"  # a name that the network gave
