"""Probes: few items stand for many, and what they tell is right on average."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.calibration.calibrate import _layers
from lamina.calibration.outputs import Outputs
from lamina.calibration.probes import Probes, joined
from lamina.values import Workload

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(96, 6, generator=GENERATOR) * torch.linspace(0.1, 4, 96)[:, None]


def model() -> nn.Sequential:
    """It is sure of most of its answers, as trained networks are."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        net[2].weight.mul_(20)
    return net


def probes(net: nn.Module, seed: int = 0, outputs: Outputs = lamina.Categorical()) -> Probes:  # noqa: B008 - a frozen value
    return Probes(net, _layers(net, (), ()), outputs, [Workload((x,)) for x in X.split(10)], seed)


def cut(net: nn.Module) -> dict[str, Tensor]:
    return {"0": 0.9 * net.get_submodule("0").weight.detach()}


def truth(net: nn.Module, outputs: Outputs = lamina.Categorical()) -> Tensor:  # noqa: B008 - a frozen value
    other = model()
    with torch.no_grad():
        other[0].weight.mul_(0.9)
        return outputs.divergence(net(X), other(X))


def test_of_all_items_it_is_the_mean_divergence() -> None:
    net = model()
    for items in (len(X), 10 * len(X)):
        assert probes(net).drawn(items).lost(cut(net)) == pytest.approx(float(truth(net).mean()), rel=1e-5)
    assert probes(net).drawn(16).lost({}) == 0


def test_of_few_items_it_is_right_on_average_and_nearer_than_of_any_that_are_drawn_alike() -> None:
    net, each = model(), truth(model())
    told = [probes(net, seed).drawn(16).lost(cut(net)) for seed in range(200)]
    assert statistics.mean(told) == pytest.approx(float(each.mean()), rel=0.05)
    alike = [float(each[torch.randperm(len(each), generator=GENERATOR)[:16]].mean()) for _ in range(200)]
    assert statistics.stdev(told) < 0.8 * statistics.stdev(alike)


def test_items_with_equal_stakes_count_alike() -> None:
    draw = probes(model(), outputs=lamina.Gaussian()).drawn(16)
    assert draw.counts is not None
    torch.testing.assert_close(draw.counts, torch.full((16,), 1 / 16, dtype=torch.float64))


def test_the_same_seed_draws_the_same_items() -> None:
    first, second, other = (probes(model(), seed).drawn(16).parts[0].args[0] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_the_network_is_only_read() -> None:
    net = model().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    probes(net).drawn(4).lost(cut(net))
    assert net.training and all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_answers_that_are_not_one_an_item_are_measured_on_the_first_batch() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).mean(0, keepdim=True)

    net = Pooled().eval()
    weight = {"fc": 0.5 * net.fc.weight.detach()}
    with torch.no_grad():
        there = nn.functional.linear(X[:10], weight["fc"], net.fc.bias).mean(0, keepdim=True)
        expected = float(lamina.Categorical().divergence(net(X[:10]), there))
    assert probes(net).drawn(4).lost(weight) == pytest.approx(expected, rel=1e-5)


def test_batches_become_one_where_all_their_tensors_are_items_of_one_shape() -> None:
    a, b = (Workload((torch.full((n, 3), float(n)),)) for n in (2, 1))
    a.kwargs["mask"], b.kwargs["mask"] = torch.ones(2, 3), torch.zeros(1, 3)
    (both,) = joined([a, b])
    assert both.args[0][:, 0].tolist() == [2.0, 2.0, 1.0] and both.kwargs["mask"].shape == (3, 3)
    longer, listed, shared = Workload((torch.ones(1, 4),)), Workload(([torch.ones(3)],)), Workload((torch.ones(2, 3), 1.0))
    for apart in ([a, longer], [listed, listed], [shared, shared]):
        assert joined(apart) == apart
