"""What a run leaves behind is put back; what a run draws is drawn again."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from holders import snapshot
from torch import Tensor, nn

from lamina import LayerError
from lamina.network import preserve
from lamina.network.preserve import forbid_lazy, preserved, repeatable


class Restless(nn.Module):
    """Everything that a forward may leave behind: running statistics, random numbers, counts, caches, new modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()
        self.register_buffer("replaced", torch.zeros(1))
        self.register_buffer("removed", torch.zeros(1))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        self._buffers.pop("removed", None)
        if not hasattr(self, "cache"):
            self.cache = torch.ones(1)
            self.register_buffer("table", torch.ones(1), persistent=False)
            self.late = nn.Identity()
            self.bias = nn.Parameter(torch.zeros(1))
        random.random()
        np.random.random()
        y: Tensor = self.drop(self.norm(self.conv(x))) * self.cache * self.table + torch.rand(1)
        return y


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(1))


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_attributes_flags_and_random_states_are_put_back(fails: bool) -> None:
    # traps: modes restored even on error
    model = Restless().train()
    model.norm.eval()
    before = snapshot(model)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    try:
        with preserved(model):
            model.train()
            model(torch.randn(2, 3, 5, 5))
            assert snapshot(model) != before
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and np.random.get_state()[1].tolist() == states[2]


def test_several_networks_are_put_back_together() -> None:
    models = [nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval()]
    models[1].inner = models[0]
    before = [snapshot(model) for model in models]
    with preserved(*models):
        for model in models:
            model.train()(torch.randn(4, 3))
    assert [snapshot(model) for model in models] == before


def test_no_override_of_train_is_called_when_the_flags_are_put_back() -> None:
    class Stubborn(nn.Module):
        def train(self, mode: bool = True) -> nn.Module:
            raise RuntimeError("not me")

    model = Stubborn()
    with preserved(model):
        model.training = False
    assert model.training


def test_a_network_run_in_inference_mode_can_be_trained_afterwards() -> None:
    """A cache made in inference mode would stop autograd for good."""
    model = Restless()
    with preserved(model), torch.inference_mode():
        model(torch.randn(2, 3, 5, 5))
    model(torch.randn(2, 3, 5, 5)).sum().backward()


BUFFERS: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Any]]] = {
    "NaN": (lambda: torch.full((3,), float("nan")), Tensor.zero_),
    "sparse": (lambda: torch.eye(3).to_sparse(), Tensor.zero_),
    "complex": (lambda: torch.randn(3, dtype=torch.complex128), Tensor.zero_),
    "conjugated": (lambda: torch.randn(3, dtype=torch.complex64).conj(), Tensor.zero_),
    "of integers": (lambda: torch.arange(3), Tensor.zero_),
    "a column": (lambda: torch.randn(3, 2)[:, 1], Tensor.zero_),
    "a result of autograd": (lambda: torch.ones(3, requires_grad=True) * 2, lambda b: b.data.zero_()),
}


@pytest.mark.parametrize(("make", "change"), BUFFERS.values(), ids=BUFFERS)
def test_the_contents_of_every_kind_of_buffer_are_put_back(make: Callable[[], Tensor], change: Callable[..., Any]) -> None:
    model = nn.Module()
    model.register_buffer("odd", make())
    buffer, before = model.odd, make_dense(model.odd)
    with preserved(model):
        change(model.odd)
        assert not np.array_equal(make_dense(model.odd), before, equal_nan=True)
    assert model.odd is buffer
    np.testing.assert_array_equal(make_dense(model.odd), before)


def make_dense(tensor: Tensor) -> Any:
    return tensor.detach().to_dense().resolve_conj().numpy().copy()


def test_a_buffer_made_in_inference_mode_is_put_back() -> None:
    with torch.inference_mode():
        model = nn.BatchNorm1d(3)
    with preserved(model), torch.inference_mode():
        model(torch.randn(4, 3) + 5)
        assert model.running_mean.abs().sum() > 0
    assert not model.running_mean.any() and model.num_batches_tracked == 0


def test_a_buffer_that_cannot_be_put_back_does_not_stop_the_others() -> None:
    """One that is a view of itself takes no values."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Identity(), nn.BatchNorm1d(3))
    model[1].register_buffer("expanded", torch.zeros(1).expand(3))
    model[1].register_buffer("meta", torch.zeros(3, device="meta"))
    before = snapshot(nn.ModuleList([model[0], model[2]]))["tensors"]
    with preserved(model):
        model(torch.randn(4, 3))
    assert snapshot(nn.ModuleList([model[0], model[2]]))["tensors"] == before


def test_a_script_can_be_preserved() -> None:
    """Its tables are no dicts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(nn.BatchNorm1d(3))
    before = model.running_mean.clone()
    with preserved(model):
        model(torch.randn(4, 3) + 5)
    assert torch.equal(model.running_mean, before) and model.num_batches_tracked == 0


@pytest.mark.parametrize("fails", [False, True])
def test_what_follows_draws_the_same_numbers_again(fails: bool) -> None:
    drawn, model = [], nn.Linear(1, 1)
    for _ in range(2):
        try:
            with repeatable(model):
                drawn.append(draws())
                if fails:
                    raise KeyError
        except KeyError:
            pass
    assert drawn[0] == drawn[1] == draws()


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_random_states_of_every_accelerator_that_a_network_lies_on_are_put_back(
    kind: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerators that are not there: their states are numbers."""
    here = [torch.device("cpu"), torch.device(kind, 0), torch.device(kind, 1)]
    states = {torch.device(kind, number): torch.tensor(number) for number in range(3)}
    module = torch.get_device_module(kind)
    monkeypatch.setattr(preserve, "devices_of", lambda *models: here)
    monkeypatch.setattr(module, "get_rng_state", lambda device: states[device].clone())
    monkeypatch.setattr(module, "set_rng_state", lambda state, device: states[device].copy_(state))
    drawn, model = torch.get_rng_state(), nn.Identity()
    try:
        with repeatable(model):
            draws()
            for state in states.values():
                state += 10
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [int(state) for state in states.values()] == [0, 1, 12]  # on the last one nothing of the network lies


def test_the_seeds_of_the_user_count() -> None:
    with repeatable():
        first = draws()
    draws()
    with repeatable():
        assert draws() != first


LAZY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a layer": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4)),
        "^1: LazyLinear is lazy: run the network once before$",
    ),
    "a norm's buffers": (lambda: nn.Sequential(nn.LazyBatchNorm1d(affine=False)), "^0: LazyBatchNorm1d is lazy"),
    "the root": (lambda: nn.LazyLinear(4), "^the network: LazyLinear is lazy"),
}


@pytest.mark.parametrize(("make", "message"), LAZY.values(), ids=LAZY)
def test_a_lazy_network_is_refused_before_it_is_run(make: Callable[[], nn.Module], message: str) -> None:
    """Its first run makes its weights, which cannot be undone."""
    model, ran = make(), []
    with pytest.raises(LayerError, match=message), preserved(model):
        ran.append(1)
    with pytest.raises(LayerError, match=message):
        forbid_lazy(model)
    assert not ran


def test_the_second_of_two_networks_may_be_the_lazy_one() -> None:
    with pytest.raises(LayerError, match="lazy"), preserved(nn.Linear(3, 3), nn.LazyLinear(4)):
        pass
