"""By how much answers differ, whatever they are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina import Workload
from lamina.front.outputs import batches_of, relative_change

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


def change(before: Any, after: Any, *batches: Tensor) -> float | None:
    return relative_change(Says(before), Says(after), [Workload(x) for x in batches or (X,)])


def test_it_is_the_norm_of_the_difference_over_the_norm_of_the_answers_of_all_batches_and_tensors() -> None:
    other = torch.randn(3, 4)
    found = change(lambda x: {"a": x, "b": (2 * x, 7)}, lambda x: {"a": x + 1, "b": (2 * x, 7)}, X, other)
    everything = torch.cat([X, other])
    assert found == pytest.approx(float(torch.ones_like(everything).norm() / (5**0.5 * everything.norm())))


def test_numbers_that_are_counts_do_not_matter_and_complex_ones_do() -> None:
    assert change(lambda x: (x, torch.ones(3, dtype=torch.int64)), lambda x: (x, torch.zeros(3, dtype=torch.int64))) == 0
    assert change(lambda x: torch.complex(x, x), lambda x: torch.complex(x, 0 * x)) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda x: x, lambda x: x[:2]),
        (lambda x: 0 * x, lambda x: x),
        (lambda x: x, lambda x: x / 0),
        (lambda x: 3, lambda x: 3),
    ],
    ids=["other shapes", "nothing to compare with", "not finite", "no tensor"],
)
def test_what_cannot_be_told_is_none(before: Any, after: Any) -> None:
    assert change(before, after) is None


def test_both_networks_are_left_as_they_were() -> None:
    first, second = Says(lambda x: x), Says(lambda x: x).eval()
    relative_change(first, second, [Workload(X)])
    assert (first.training, second.training) == (True, False) and first.calls == second.calls == 0


def test_a_tensor_is_divided_evenly_so_that_no_batch_is_a_rest() -> None:
    sizes = [len(batch.args[0]) for batch in batches_of(torch.zeros(65, 2), torch.device("cpu"))]
    assert sum(sizes) == 65 and min(sizes) >= 32


def test_batches_are_those_of_the_data_without_their_targets() -> None:
    given = [(X, torch.zeros(5)), {"x": X}, Workload(X)]
    found = list(batches_of(given, torch.device("cpu")))
    assert torch.equal(found[0].args[0], X) and len(found[0].args) == 1
    assert torch.equal(found[1].kwargs["x"], X) and torch.equal(found[2].args[0], X)
    assert len(list(batches_of({"x": X}, torch.device("cpu")))) == 1
