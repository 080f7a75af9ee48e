"""Putting modules in place of others, in a copy or where they are."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from lamina import LaminaError, LayerError
from lamina.network.copying import cloned
from lamina.network.surgery import adopt, become, forbid_nonfinite, way_back
from lamina.network.walk import walk


class Hooked(nn.Module):
    """Hooks one of its layers with a method of its own, as Grad-CAM and feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.seen = 0
        self.fc.register_forward_hook(self.note)

    def note(self, *_: object) -> None:
        self.seen += 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


def test_a_copy_leaves_out_what_is_exchanged_and_shares_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    new = nn.Linear(4, 4)
    copy = cloned(model, {model[0]: new})
    assert copy[0] is new and model[0] is not new
    assert not {p.data_ptr() for p in model[1].parameters()} & {p.data_ptr() for p in copy[1].parameters()}
    assert not {b.data_ptr() for b in model[1].buffers()} & {b.data_ptr() for b in copy[1].buffers()}


def test_what_was_shared_is_shared_in_the_copy() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(5, 4), "b": nn.Linear(4, 5, bias=False), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    model["d"] = model["c"]
    copy = cloned(model, {})
    assert copy["b"].weight is copy["a"].weight and copy["d"] is copy["c"]


def test_an_exchanged_module_stands_under_all_its_names_also_in_plain_lists() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    model.order = [model["a"]]
    new = nn.Linear(4, 4)
    copy = cloned(model, {model["a"]: new})
    assert copy["a"] is new and copy["b"] is new and copy.order[0] is new


def test_buffers_that_view_one_storage_do_so_in_the_copy() -> None:
    model = nn.Module()
    flat = torch.zeros(6)
    model.register_buffer("flat", flat)
    model.register_buffer("head", flat[:2])
    copy = cloned(model, {})
    copy.flat.fill_(1.0)
    assert copy.head.tolist() == [1.0, 1.0] and model.head.tolist() == [0.0, 0.0]


def test_results_of_autograd_in_a_module_do_not_stop_the_copy() -> None:
    # traps: no reliance on copy.deepcopy: old weight_norm leaves a non-leaf tensor as an attribute
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    wanted = model(x)
    copy = cloned(model, {})
    assert torch.equal(copy(x), wanted)
    copy(x).sum().backward()
    assert copy[0].weight_g.grad is not None and model[0].weight_g.grad is None


def test_what_cannot_be_copied_is_a_clear_error() -> None:
    # traps: deepcopy-hostile networks
    model = nn.Sequential(nn.Linear(4, 4))
    model.lock = threading.Lock()
    with pytest.raises(LaminaError, match=r"cannot be copied \(TypeError.*lock.*; move it out of the network first"):
        cloned(model, {})


def test_gradients_and_memory_formats_are_as_deepcopy_leaves_them() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    copy = cloned(model, {})
    assert copy[0].weight.stride() == model[0].weight.stride() and copy[0].weight.is_leaf and copy[0].weight.requires_grad


def test_a_hook_that_is_a_method_of_the_network_belongs_to_the_copy_after_copying() -> None:
    model = Hooked()
    copy = cloned(model, {model.fc: adopt(nn.Linear(4, 4), model.fc)})
    copy(torch.randn(2, 4))
    assert (copy.seen, model.seen) == (1, 0)


def test_hooks_of_a_copy_are_not_those_of_the_original() -> None:
    model = Hooked()
    new = adopt(nn.Linear(4, 4), model.fc)
    new.register_forward_hook(lambda *_: None)
    assert len(model.fc._forward_hooks) == 1


def test_whoever_holds_a_module_that_becomes_another_holds_the_other() -> None:
    # traps: one module under two names, in a list, in a closure
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    holders = [layer, lambda x: layer(x)]
    become(layer, nn.Conv1d(4, 4, 1))
    assert model["a"] is model["b"][0] is holders[0] is layer and type(layer) is nn.Conv1d
    assert holders[1](torch.randn(1, 4, 3)).shape == (1, 4, 3)


def test_a_module_that_became_another_keeps_its_very_hooks_and_turns_back_into_what_it_was() -> None:
    layer, calls = nn.Linear(4, 4), []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    weight, back = layer.weight, way_back(layer)
    become(layer, adopt(nn.Identity(), layer))
    layer(torch.randn(1, 4))
    handle.remove()
    layer(torch.randn(1, 4))
    assert calls == [1]
    back()
    assert type(layer) is nn.Linear and layer.weight is weight and not hasattr(layer, "unused")
    assert layer(torch.randn(1, 4)).shape == (1, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name_and_number(value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, :2] = value
    layers = walk(model).layers
    forbid_nonfinite(layers["0"])
    with pytest.raises(LayerError, match=r"^1: 2 of its 16 weights are NaN or infinite"):
        forbid_nonfinite(layers["1"])


def test_a_weight_without_values_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(LayerError, match=r"^0: .*meta"):
        forbid_nonfinite(walk(model).layers["0"])
