"""By how much answers change: exact where they are equal, relative to their size, said aloud where it is much."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.answers import apart, change, in_words
from lamina.values import workloads

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    def __init__(self, scale: float = 1.0, width: int = 4) -> None:
        super().__init__()
        self.scale, self.width = scale, width

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"same": x[:, : self.width], "scaled": self.scale * x[:, : self.width]}


def test_it_is_relative_to_the_outputs_size_and_of_several_the_most() -> None:
    assert change(Pair(), Pair(), workloads(X)) == 0
    assert change(Pair(2.0), Pair(1.5), workloads(X)) == pytest.approx(0.25)


def test_what_cannot_be_held_against_each_other_has_no_change() -> None:
    assert change(Pair(), Pair(width=2), workloads(X)) is None
    assert change(Pair(), nn.Linear(5, 4), workloads(X)) is None


def test_numbers_that_are_no_longer_finite_change_without_end_and_equal_infinities_not() -> None:
    infinite = torch.tensor([1.0, math.inf])
    assert apart([infinite], [infinite]) == 0
    assert apart([torch.ones(2)], [torch.tensor([1.0, math.nan])]) == math.inf


def test_much_is_a_warning_in_the_first_words() -> None:
    assert in_words(0.1).startswith("outputs change by 0.1 of their size")
    assert in_words(0.31).startswith("WARNING: outputs change by 0.31")


def test_a_comparison_and_a_verification_say_it_and_leave_the_networks_alone() -> None:
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Linear(4, 4), nn.Dropout()) for _ in range(2))
    found = lamina.compare(model, other, X, seconds=0.01)
    assert found.change is not None and found.change > 0.3
    assert str(found).splitlines()[1] == in_words(found.change)
    assert str(lamina.verify(model, other, X)).splitlines()[0] == in_words(found.change)
    assert model.training and other.training
