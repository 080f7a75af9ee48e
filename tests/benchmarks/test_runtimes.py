"""The benchmarks of runtimes, on a tiny network: what they change of factors keeps the function, and rows are told apart."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.forms import BlockTerm, LowRank
from lamina.layers.decomposed import DecomposedLayer

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    """The scripts as modules; they find each other on the path."""
    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path[:] = path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.fixture
def small(planned: Callable[..., lamina.Plan]) -> nn.Module:
    """A convolution of plain factors, one with groups in the middle, and a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip
    forms = {"2": BlockTerm(8, 8), "4": BlockTerm(8, 8, 2), "8": LowRank(4)}
    return lamina.decompose(model, planned(model, X, forms))


def weights_of(model: nn.Module) -> list[Tensor]:
    stacks = (module for module in model.modules() if isinstance(module, DecomposedLayer))
    return [factor.weight.detach().clone() for stack in stacks for factor in stack.factors()]


@pytest.mark.parametrize("way", ["scales", "rotations"])
def test_other_factors_of_the_same_layers_keep_the_function(load: Any, small: nn.Module, way: str) -> None:
    gauge = load("gauge")
    with torch.no_grad():
        expected, before = small(X), weights_of(small)
        if way == "scales":
            gauge.balance(small, [lambda network: network(X)], share=0.5)
        else:
            gauge.rotate(small)
        torch.testing.assert_close(small(X), expected, rtol=1e-4, atol=1e-5)
    changed = [not torch.equal(old, new) for old, new in zip(before, weights_of(small), strict=True)]
    # The middle factor of "4" has groups: its channels can be scaled, and no rotation goes through it.
    assert changed == ([True] * 8 if way == "scales" else [True] * 3 + [False] * 3 + [True] * 2)


def test_a_served_network_answers_batch_by_batch_what_the_network_answers(load: Any, small: nn.Module) -> None:
    runtimes = load("runtimes")
    run = runtimes.served(runtimes.in_runtime(lamina.Eager()), small, X)
    with torch.inference_mode():
        for batch in (X.flip(0), X[1:3]):
            torch.testing.assert_close(run(batch), small(batch))
