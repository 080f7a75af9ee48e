"""Recalibrated statistics are the mean and variance of all activations, pooled; nothing else of the network changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamina import ExampleError, LayerError, Workload, recalibrate

KINDS = {
    "BatchNorm1d": (nn.BatchNorm1d, (5,)),
    "BatchNorm1d over time": (nn.BatchNorm1d, (5, 7)),
    "BatchNorm2d": (nn.BatchNorm2d, (5, 4, 3)),
    "BatchNorm3d": (nn.BatchNorm3d, (5, 4, 3, 2)),
    "SyncBatchNorm": (nn.SyncBatchNorm, (5, 4, 3)),
}
SIZES = (6, 6, 3)  # the last batch is a smaller one, as it often is


def pooled(batches: list[Tensor]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """From the definition: all values of a channel in one row."""
    rows = np.concatenate([np.moveaxis(b.double().numpy(), 1, 0).reshape(b.shape[1], -1) for b in batches], axis=1)
    return rows.mean(1), rows.var(1, ddof=1)


@pytest.mark.parametrize(("kind", "shape"), KINDS.values(), ids=KINDS)
def test_statistics_are_those_of_the_pooled_batches(kind: type[Any], shape: tuple[int, ...]) -> None:
    norm = kind(5)
    batches = [3 * torch.randn(n, *shape) + 100 for n in SIZES]  # far from zero: naive sums of squares would cancel
    assert recalibrate(nn.Sequential(norm), batches) == ("0",)
    mean, variance = pooled(batches)
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-6)
    np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=1e-5)
    assert norm.num_batches_tracked == 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5)
        self.second, self.last = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.last(self.second(self.drop(self.norm(self.first(x)))))
        return y


def test_a_deeper_norm_sees_what_the_one_before_hands_it_in_training_without_dropout() -> None:
    model = Net().eval()
    batches = [torch.randn(n, 3, 9, 8) for n in SIZES]
    recalibrate(model, batches)
    with torch.no_grad():
        inner = [nn.functional.batch_norm(y, None, None, training=True) for y in map(model.first, batches)]
        mean, variance = pooled([model.second(y) for y in inner])
    np.testing.assert_allclose(model.last.running_mean.numpy(), mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.last.running_var.numpy(), variance, rtol=1e-4)


def test_after_it_a_norm_in_eval_mode_gives_zero_mean_and_unit_variance() -> None:
    norm = nn.BatchNorm2d(4)
    x = 5 * torch.randn(50, 4, 6, 6) - 2
    recalibrate(norm, [x])
    y = norm.eval()(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("training", [True, False])
def test_all_but_the_statistics_is_as_it_was(training: bool) -> None:
    model = Net().train(training)
    model.drop.train(not training)
    before, random = state(model), torch.get_rng_state()
    assert recalibrate(model, [torch.randn(4, 3, 9, 8)]) == ("norm", "last")
    kept = ("running_mean", "running_var", "num_batches_tracked")
    statistics = {f"{norm}.{name}" for norm in ("norm", "last") for name in kept}
    assert {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])} == statistics
    assert (model.training, model.norm.training, model.drop.training) == (training, training, not training)
    assert (model.norm.momentum, model.last.momentum) == (0.3, 0.1)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    torch.randn(4, 3, 9, 8)
    assert not torch.equal(torch.get_rng_state(), random)  # only the example above drew


X = torch.randn(4, 3, 9, 8, generator=torch.Generator().manual_seed(0))
ITEMS = {
    "tensor": X,
    "pair": (X, torch.zeros(4)),
    "pair as loaders give it": [X, torch.zeros(4)],
    "arguments": (X,),
    "arguments and a target": ((X,), torch.zeros(4)),
    "mapping": {"x": X},
    "workload": Workload(X),
    "workload and a target": (Workload(X), torch.zeros(4)),
}


@pytest.mark.parametrize("item", ITEMS.values(), ids=ITEMS)
def test_an_item_is_an_example_or_a_pair(item: Any) -> None:
    plain, other = Net(), Net()
    other.load_state_dict(plain.state_dict())
    recalibrate(plain, [X])
    recalibrate(other, iter([item]))
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in plain.state_dict().items())


def broken() -> Iterator[Tensor]:
    yield X
    raise OSError("the disk is gone")


def with_nan() -> list[Tensor]:
    bad = X.clone()
    bad[0, 0, 0, 0] = float("nan")
    return [X, bad]


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing": ([], ExampleError, "hold no batch"),
    "NaN": (with_nan(), LayerError, "norm: its input holds NaN or infinities in batch 1"),
    "infinity": ([X * float("inf")], LayerError, "norm: .* batch 0"),
    "a shape that does not fit": ([X, torch.zeros(4, 2, 9, 8)], ExampleError, "does not run on the example"),
    "a list that is no pair": ([[X, X, X]], ExampleError, "a list of 3"),
    "one value a channel": ([X, torch.randn(1, 3, 5, 5)], ExampleError, "more than 1 value per channel"),
    "data that break off": (broken(), OSError, "the disk is gone"),
}


@pytest.mark.parametrize(("data", "error", "message"), BAD.values(), ids=BAD)
def test_bad_data_is_an_error_and_the_network_stays(data: Any, error: type[Exception], message: str) -> None:
    model = Net().train()
    before = state(model)
    with pytest.raises(error, match=message):
        recalibrate(model, data)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


def test_a_network_without_batch_norm_is_told_so() -> None:
    for model in (nn.Linear(3, 2), nn.BatchNorm1d(3, track_running_stats=False)):
        with pytest.warns(UserWarning, match="nothing to recalibrate"):
            assert recalibrate(model, [torch.randn(4, 3)]) == ()


def test_a_norm_that_the_data_never_reach_keeps_its_statistics() -> None:
    model = Net()
    model.extra = nn.BatchNorm2d(4)
    model.extra.running_mean.fill_(7)
    assert recalibrate(model, [X]) == ("norm", "last")
    assert (model.extra.running_mean == 7).all()
    lonely = nn.Sequential(nn.Conv2d(3, 3, 1))
    lonely[0].never = nn.BatchNorm2d(4)
    with pytest.raises(ExampleError, match="no batch norm of the network is reached"):
        recalibrate(lonely, [X])
