"""The batches of a ``data`` argument."""

from __future__ import annotations

import torch

from lamina import Workload
from lamina.front.batches import batches_of

X = torch.randn(5, 4)


def test_a_tensor_is_divided_evenly_so_that_no_batch_is_a_rest() -> None:
    sizes = [len(batch.args[0]) for batch in batches_of(torch.zeros(65, 2), torch.device("cpu"))]
    assert sum(sizes) == 65 and min(sizes) >= 32


def test_batches_are_those_of_the_data_without_their_targets() -> None:
    given = [(X, torch.zeros(5)), {"x": X}, Workload(X)]
    found = list(batches_of(given, torch.device("cpu")))
    assert torch.equal(found[0].args[0], X) and len(found[0].args) == 1
    assert torch.equal(found[1].kwargs["x"], X) and torch.equal(found[2].args[0], X)
    assert len(list(batches_of({"x": X}, torch.device("cpu")))) == 1
