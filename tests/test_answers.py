"""By how much answers differ, whatever they are made of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina import Workload
from lamina.answers import answers, apart, change, in_words, moved

X = torch.randn(5, 4)


class Says(nn.Module):
    """Answers with a function of its input, and counts how often."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        assert not self.training and not torch.is_grad_enabled()
        self.calls += 1
        return self.answer(x)


def changed(before: Any, after: Any, *batches: Tensor) -> float | None:
    return change(Says(before), Says(after), [Workload(x) for x in batches or (X,)])


def test_it_is_the_norm_of_the_difference_over_the_norm_of_the_answers_of_all_batches_and_tensors() -> None:
    other = torch.randn(3, 4)
    found = changed(lambda x: {"a": x, "b": (2 * x, 7)}, lambda x: {"a": x + 1, "b": (2 * x, 7)}, X, other)
    everything = torch.cat([X, other])
    assert found == pytest.approx(float(torch.ones_like(everything).norm() / (5**0.5 * everything.norm())))


def test_numbers_that_are_counts_do_not_matter_and_complex_ones_do() -> None:
    assert changed(lambda x: (x, torch.ones(3, dtype=torch.int64)), lambda x: (x, torch.zeros(3, dtype=torch.int64))) == 0
    assert changed(lambda x: torch.complex(x, x), lambda x: torch.complex(x, 0 * x)) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda x: x, lambda x: x[:2]),
        (lambda x: 0 * x, lambda x: x),
        (lambda x: 3, lambda x: 3),
    ],
    ids=["other shapes", "nothing to compare with", "no tensor"],
)
def test_what_cannot_be_told_is_none(before: Any, after: Any) -> None:
    assert changed(before, after) is None


def test_of_answers_that_are_there_already_it_is_the_same_number() -> None:
    first, second, batches = nn.Linear(4, 3), nn.Linear(4, 3), [Workload(X), Workload(torch.randn(3, 4))]
    pairs = [(answers(first, [each]), answers(second, [each])) for each in batches]
    assert moved(pairs) == change(first, second, batches) is not None
    assert moved([]) is None and moved([([X], [X[:2]])]) is None


def test_both_networks_are_left_as_they_were() -> None:
    first, second = Says(lambda x: x), Says(lambda x: x).eval()
    change(first, second, [Workload(X)])
    assert (first.training, second.training) == (True, False) and first.calls == second.calls == 0


def test_a_network_that_does_not_run_changes_nobody_knows_how() -> None:
    assert change(Says(lambda x: x), nn.Linear(5, 4), [Workload(X)]) is None


def test_numbers_that_are_no_longer_finite_change_without_end_and_equal_infinities_not() -> None:
    assert changed(lambda x: x, lambda x: x / 0) == math.inf
    infinite = torch.tensor([1.0, math.inf])
    assert changed(lambda x: infinite, lambda x: infinite) == 0
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
    first, second = str(found).splitlines()[:2]
    assert f"{first.partition(';')[0]}: {second}" == in_words(found.change) and first.endswith(f"; {found.timed}")
    assert str(lamina.verify(model, other, X)).splitlines()[0] == in_words(found.change)
    assert model.training and other.training
