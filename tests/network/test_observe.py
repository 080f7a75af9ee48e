"""Running the example: what is seen, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from lamina import ExampleError, LayerError
from lamina.network.observe import Observation, is_channels_last
from lamina.network.preserve import preserved
from lamina.network.running import MODES, run
from lamina.network.trial import modes_that_run, observed
from lamina.network.walk import Layer, walk
from lamina.values import Workload


class Restless(nn.Module):
    """Everything that a forward may leave behind: running statistics, random numbers, counts, caches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()
        self.register_buffer("replaced", torch.zeros(1))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        if not hasattr(self, "cache"):
            self.cache = torch.ones(1)
            self.register_buffer("table", torch.ones(1), persistent=False)
        random.random()
        np.random.random()
        y: Tensor = self.drop(self.norm(self.conv(x))) * self.cache * self.table + torch.rand(1)
        return y


def state(model: nn.Module) -> dict[str, Any]:
    tensors = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    own = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    return {"tensors": tensors, "own": own, "flags": [m.training for m in model.modules()]}


def observe(model: nn.Module, layers: dict[str, Layer], workload: Workload) -> dict[str, Observation]:
    return observed(model, layers.values(), workload)[0]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    alike = a["tensors"].keys() == b["tensors"].keys() and all(
        torch.equal(a["tensors"][n], b["tensors"][n]) for n in a["tensors"]
    )
    return alike and a["own"] == b["own"] and a["flags"] == b["flags"]


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_attributes_flags_and_random_states_are_put_back(fails: bool) -> None:
    # traps: modes restored even on error
    model = Restless().train()
    model.norm.eval()
    before, buffer = state(model), model.replaced
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    try:
        with preserved(model):
            model.train()
            model(torch.randn(2, 3, 5, 5))
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert same(state(model), before)
    assert model.replaced is buffer
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and np.random.get_state()[1].tolist() == states[2]


def test_a_network_run_in_inference_mode_can_be_trained_afterwards() -> None:
    """A cache made in inference mode would stop autograd for good."""
    model = Restless()
    modes_that_run(model, Workload(torch.randn(2, 3, 5, 5)))
    with preserved(model), torch.inference_mode():
        model(torch.randn(2, 3, 5, 5))
    model(torch.randn(2, 3, 5, 5)).sum().backward()


def test_a_weight_computed_by_a_hook_is_put_back() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = weight_norm(nn.Linear(4, 4))
    weight = model.weight
    modes_that_run(model, Workload(torch.randn(2, 4)))
    assert model.weight is weight and not weight.is_inference()


def test_a_lazy_network_is_refused_before_it_is_run() -> None:
    """Its first run makes its weights, which cannot be undone."""
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4))
    with pytest.raises(LayerError, match=r"^1: .*lazy.*run the network once"), preserved(model):
        model(torch.randn(2, 3))
    assert walk(model).refused.keys() == {"1"}


def test_nan_in_a_buffer_is_put_back_too() -> None:
    model = nn.BatchNorm1d(3)
    model.running_mean.fill_(float("nan"))
    with preserved(model):
        model.running_mean.zero_()
    assert model.running_mean.isnan().all()


def test_each_distinct_shape_is_seen_with_its_number_of_calls() -> None:
    # traps: one module called twice: latency counts per call
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(self.fc(x)[:1])
            return y

    model = Twice()
    seen = observe(model, walk(model).layers, Workload(torch.randn(3, 4)))
    assert seen["fc"].uses == {((3, 4), (3, 4)): 1, ((1, 4), (1, 4)): 1}
    assert seen["idle"].uses == {} and seen["idle"].as_uses() == ()
    twice = observe(model, walk(model).layers, Workload(torch.randn(1, 4)))["fc"].as_uses(0.5)
    assert len(twice) == 1 and (twice[0].calls, twice[0].weight) == (2, 0.5)


def test_a_module_under_two_names_is_seen_once_with_both_calls() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    seen = observe(model, walk(model).layers, Workload(torch.randn(3, 4)))
    assert list(seen) == ["0"] and seen["0"].as_uses()[0].calls == 2


def test_an_input_given_by_keyword_is_seen() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(input=x)
            return y

    model = ByKeyword()
    assert observe(model, walk(model).layers, Workload({"x": torch.randn(3, 4)}))["fc"].uses == {((3, 4), (3, 2)): 1}


def test_samples_of_unequal_length_count_by_their_rows() -> None:
    """`nn.TransformerEncoder` makes a nested tensor of a padding mask."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    model = nn.Sequential(nn.Linear(4, 6))
    assert observe(model, walk(model).layers, Workload(nested))["0"].uses == {((5, 4), (5, 6)): 1}


def test_the_layout_of_a_layers_input_is_seen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    layers = walk(model).layers
    x = torch.randn(2, 3, 5, 5)
    assert not observe(model, layers, Workload(x))["0"].channels_last
    assert observe(model, layers, Workload(x.contiguous(memory_format=torch.channels_last)))["0"].channels_last


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 5, 7, 4)], ids=str)
def test_channels_last_is_told_from_contiguous(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert not is_channels_last(x)
    assert is_channels_last(x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d))
    assert not is_channels_last(torch.randn(4, 4))


def test_no_hook_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    for x in (torch.randn(2, 3), torch.randn(2, 5)):
        with contextlib.suppress(ExampleError):
            observe(model, walk(model).layers, Workload(x))
    assert not model[0]._forward_hooks and not model[0]._forward_hooks_with_kwargs


def test_an_example_that_does_not_fit_is_named_with_the_networks_complaint() -> None:
    with pytest.raises(ExampleError, match=r"does not run on the example \(2×5\): RuntimeError: mat1 and mat2") as caught:
        run(nn.Linear(3, 3), Workload(torch.randn(2, 5)))
    assert "\n" not in str(caught.value)


def test_the_modes_in_which_a_network_runs_are_told_apart() -> None:
    class NeedsGradients(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise RuntimeError("I want gradients\nsecond line")
            return x

    found = modes_that_run(NeedsGradients(), Workload(torch.randn(2)))
    assert list(found) == list(MODES) == ["train", "eval", "eval + no_grad", "inference_mode"]
    assert found["train"] is None and found["eval"] is None
    assert found["eval + no_grad"] == found["inference_mode"] == "RuntimeError: I want gradients"


def test_one_sample_in_train_mode_is_no_surprise() -> None:
    found = modes_that_run(nn.BatchNorm1d(3), Workload(torch.randn(1, 3)))
    assert found["train"] is not None and found["eval"] is None
