"""A network's program of operations: one way to it, also from an example of one item."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lamina.network.program import one_more, program_of
from lamina.values import Workload


def test_it_answers_what_the_network_answers() -> None:
    net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(program_of(net, Workload(x)).module()(x), net(x))


def test_within_inference_mode_too() -> None:
    net, x = nn.Linear(4, 3).eval(), torch.randn(2, 4)
    with torch.inference_mode():
        torch.testing.assert_close(program_of(net, Workload(x)).module()(x), net(x))


@pytest.mark.parametrize("number", [1, 2, 5])
def test_an_example_of_any_number_of_items_is_one_for_any_number(number: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    module = program_of(net, Workload(torch.randn(number, 3, 8, 8)), dynamic_batch=True).module()
    for other in (1, 2, 7):
        x = torch.randn(other, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(module(x), net(x))


def test_what_goes_by_the_number_of_items_is_refused_for_any_number() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if len(x) == 4 else x.relu()

    workload = Workload(torch.randn(4, 3))
    with pytest.raises(Exception, match=r"(?i)constant|specializ"):
        program_of(Fixed(), workload, dynamic_batch=True)
    program_of(Fixed(), workload)  # the exporter's marks are not left on the example


def test_one_item_more_is_the_first_once_more() -> None:
    x, scale = torch.randn(2, 3), torch.tensor(2.0)
    (more, same) = one_more(Workload((x, scale))).args
    assert torch.equal(more, torch.cat([x, x[:1]])) and same is scale
    named = one_more(Workload({"x": x, "scale": scale, "steps": 3})).kwargs
    assert named["x"].shape == (3, 3) and named["steps"] == 3
