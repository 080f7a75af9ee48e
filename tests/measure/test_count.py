"""Counting agrees with PyTorch's own counter, biases aside, and leaves the network as it was."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lamina
from lamina import BlockTerm, Cost, ExampleError, LowRank, Ratio, Separable, Workload


class Twice(nn.Module):
    """One layer that is called twice, at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.conv(x)[:, :, ::2, ::2])
        return y


def flops(model: nn.Module, x: Tensor) -> int:
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops())


def test_a_resnet_counts_as_pytorch_counts_it_plus_the_biases_of_its_head() -> None:
    model = torchvision.models.resnet18(weights=None)
    x = torch.zeros(1, 3, 64, 64)
    assert lamina.count(model, x) == Cost(11_689_512, flops(model, x) // 2 + 1000)


def test_a_layer_called_twice_counts_twice_and_its_parameters_once() -> None:
    x = torch.zeros(2, 4, 8, 8)
    positions = 2 * 64 + 2 * 16
    assert lamina.count(Twice(), x) == Cost(4 * 4 * 9 + 4, positions * (4 * 4 * 9 + 4))


def test_a_layer_under_two_names_counts_once() -> None:
    layer = nn.Linear(5, 5)
    assert lamina.count(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(3, 5)) == Cost(30, 2 * 3 * 30)


def test_a_plans_sum_over_layers_is_the_count_of_the_network_that_it_makes() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 24, 3, stride=2),
        nn.Conv2d(24, 32, 1),
        nn.Flatten(),
        nn.Linear(32 * 9, 10),
    )
    x = torch.randn(2, 3, 8, 8)
    plan = lamina.make_plan(model, x, Ratio(2), rule=lamina.AtRatio())
    plan = plan.with_form("0", Separable(9)).with_form("1", BlockTerm(5, 7)).with_form("4", LowRank(4))
    small = lamina.decompose(model, plan)
    assert lamina.count(small, x) == Cost(
        sum(layer.after.parameters for layer in plan.layers.values()), sum(layer.after.macs for layer in plan.layers.values())
    )
    assert lamina.count(model, x) == Cost(
        sum(layer.before.parameters for layer in plan.layers.values()), sum(layer.before.macs for layer in plan.layers.values())
    )


def test_several_workloads_count_as_their_weighted_mean() -> None:
    model = nn.Linear(4, 4, bias=False)
    examples = [Workload(torch.zeros(8, 4), 1), Workload(torch.zeros(2, 4), 3)]
    assert lamina.count(model, examples).macs == (8 + 3 * 2) / 4 * 16


def test_counting_leaves_buffers_modes_hooks_and_random_state_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    lamina.count(model, torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True]
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_wrong_example_is_refused_in_one_line_with_its_shape() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ExampleError, match="2×5") as caught:
        lamina.count(model, torch.zeros(2, 5))
    assert "\n" not in str(caught.value)
    assert not any(m._forward_hooks for m in model.modules())
