"""Copies that share nothing, and shadows that share what costs memory; both follow every way to a module but closures."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from holders import Calls, Helper, snapshot
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from lamina import LaminaError
from lamina.network.copying import alias, cloned, shadow
from lamina.network.memory import Place, overlapping, tensors_of, whole_place
from lamina.network.surgery import HOOKS, adopt

COPIES = {"cloned": cloned, "shadow": shadow}
both = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


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


class Slotted(nn.Module):
    """Keeps an attribute of its own where `nn.Module` does not look."""

    __slots__ = ("layers", "never")

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        object.__setattr__(self, "layers", [self.fc])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](x)
        return y


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(nn.Linear(4, 4))


def fused() -> nn.Module:
    """Three weights that are rows of one tensor, which a fourth module holds as a buffer."""
    model = nn.Module()
    whole = torch.randn(12, 4)
    model.q, model.k, model.v = (nn.Linear(4, 4, bias=False) for _ in range(3))
    for number, layer in enumerate((model.q, model.k, model.v)):
        layer.weight = nn.Parameter(whole[4 * number : 4 * number + 4])
    model.register_buffer("whole", whole)
    return model


def storages(model: nn.Module) -> set[Place]:
    return {at for module in model.modules() for t in tensors_of(module) if (at := whole_place(t))}


def with_tensors(*, of_numpy: bool = False) -> nn.Module:
    """Tensors of every kind in every place."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), old_weight_norm())
    model.register_buffer("computed", (torch.ones(4, requires_grad=True) * 2))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("conjugated", torch.randn(3, dtype=torch.complex64).conj())
    model.register_buffer("negated", torch.randn(3, dtype=torch.complex64).conj().imag)
    model.register_buffer("expanded", torch.randn(1, 4).expand(3, 4))
    model.register_buffer("meta", torch.empty(3, device="meta"))
    with torch.inference_mode():
        model.register_buffer("of_inference", torch.randn(3))
    model.plain = torch.randn(4, 6)[:, 1:4].T
    model.learnt = torch.randn(3, requires_grad=True)
    if of_numpy:
        model.array = np.zeros(4, dtype=np.float32)
        model.register_buffer("of_numpy", torch.from_numpy(model.array))
    return model


def values(tensor: Tensor) -> Any:
    return None if tensor.is_meta else tensor.detach().to_dense().resolve_conj().resolve_neg().numpy()


@both
def test_every_tensor_has_its_values_its_layout_and_its_demand_for_gradients(copied: Callable[..., nn.Module]) -> None:
    model = with_tensors()
    copy = copied(model)
    for module, twin in zip(model.modules(), copy.modules(), strict=True):
        for name in [*module._parameters, *module._buffers, *("plain", "learnt")]:
            tensor = getattr(module, name, None)
            if not isinstance(tensor, Tensor):
                continue
            new = getattr(twin, name)
            assert new is not tensor or tensor.is_meta, name
            assert type(new) is type(tensor), name
            assert (new.dtype, new.layout, new.shape, new.device) == (tensor.dtype, tensor.layout, tensor.shape, tensor.device)
            np.testing.assert_array_equal(values(new), values(tensor), err_msg=name)
            if tensor.layout == torch.strided and tensor.is_leaf:
                assert new.stride() == tensor.stride() or tensor.is_neg(), name
                assert new.requires_grad == tensor.requires_grad, name


def test_a_copy_shares_no_memory_with_the_network() -> None:
    model = with_tensors(of_numpy=True)
    assert not storages(model) & storages(cloned(model))
    assert not storages(fused()) & storages(cloned(fused()))
    copy = cloned(model)
    copy.sparse.values().zero_()
    copy.of_numpy.fill_(1.0)
    assert model.sparse.values().tolist() == [1.0, 1.0, 1.0] and not model.array.any() and not copy.array.any()


def test_writing_into_a_copy_of_a_result_of_autograd_leaves_the_network_alone() -> None:
    """Plain attributes and buffers alike; none of them is a leaf, so `copy.deepcopy` refuses them."""
    model = with_tensors()
    wanted = model.computed.detach().clone(), model[2].weight.detach().clone()
    copy = cloned(model)
    with torch.no_grad():
        copy.computed.zero_()
        copy[2].weight.zero_()
    assert torch.equal(model.computed, wanted[0]) and torch.equal(model[2].weight, wanted[1])


def test_a_shadow_lies_on_the_parameters_and_not_on_the_rest() -> None:
    model = with_tensors()
    twin = shadow(model)
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert other is not parameter and other.data_ptr() == parameter.data_ptr(), name
        assert isinstance(other, nn.Parameter)
    lent = {whole_place(p) for p in model.parameters()}
    assert (storages(model) & storages(twin)) == lent


def test_a_buffer_or_attribute_that_shares_memory_with_a_parameter_does_so_in_the_shadow() -> None:
    model = fused()
    model.head = model.whole[:1]
    twin = shadow(model)
    assert twin.whole.data_ptr() == model.whole.data_ptr() == twin.q.weight.data_ptr() == twin.head.data_ptr()


def test_storages_that_are_to_lie_apart_are_copied_with_all_their_ties() -> None:
    model = fused()
    model.other = nn.Linear(4, 4)
    at = whole_place(model.whole)
    assert at
    twin = shadow(model, apart=frozenset({at}))
    assert not {at} & storages(twin)
    assert twin.other.weight.data_ptr() == model.other.weight.data_ptr()
    with torch.no_grad():
        twin.k.weight.fill_(7.0)
    assert (twin.whole[4:8] == 7.0).all() and (twin.whole[:4] != 7.0).all() and (model.whole != 7.0).all()


@both
def test_weights_that_are_parts_of_one_tensor_are_so_in_the_copy(copied: Callable[..., nn.Module]) -> None:
    model = fused()
    copy = copied(model)
    (group,) = overlapping(t for m in copy.modules() for t in tensors_of(m))
    assert len(group) == 4
    assert copy.v.weight.data_ptr() - copy.whole.data_ptr() == model.v.weight.data_ptr() - model.whole.data_ptr()


@both
def test_buffers_that_view_one_storage_do_so_in_the_copy(copied: Callable[..., nn.Module]) -> None:
    model = nn.Module()
    flat = torch.zeros(6)
    model.register_buffer("flat", flat)
    model.register_buffer("head", flat[:2])
    copy = copied(model)
    copy.flat.fill_(1.0)
    assert copy.head.tolist() == [1.0, 1.0] and model.head.tolist() == [0.0, 0.0]


@both
def test_what_was_one_object_is_one_object_in_the_copy(copied: Callable[..., nn.Module]) -> None:
    model = nn.ModuleDict({"a": nn.Embedding(5, 4), "b": nn.Linear(4, 5, bias=False), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    model["d"] = model["c"]
    model.weights = [model["c"].weight]
    copy = copied(model)
    assert copy["b"].weight is copy["a"].weight and copy["d"] is copy["c"] and copy.weights[0] is copy["c"].weight


@both
def test_attributes_of_a_parameter_are_copied(copied: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.no_decay, model[0].weight.axes = True, ["out", "in"]
    weight = copied(model)[0].weight
    assert weight.no_decay is True and weight.axes == ["out", "in"]


def test_attributes_of_a_parameter_of_a_copy_are_not_those_of_the_network() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.axes = ["out", "in"]
    cloned(model)[0].weight.axes.append("more")
    assert model[0].weight.axes == ["out", "in"]


@both
def test_frozen_parameters_stay_frozen(copied: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    assert [p.requires_grad for p in copied(model).parameters()] == [False, True, True, True]


@both
def test_modes_are_copied_module_by_module(copied: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].eval()
    assert [m.training for m in copied(model).modules()] == [True, True, False]


def test_a_shadow_keeps_no_gradient_and_gives_none() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model(torch.randn(2, 4)).sum().backward()
    grad = model[0].weight.grad.clone()
    twin = shadow(model)
    twin(torch.randn(2, 4)).sum().backward()
    assert torch.equal(model[0].weight.grad, grad)


HOLD: dict[str, Callable[[nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "a list": lambda model: setattr(model, "held", [model.fc]) or (lambda s, x: s.held[0](x)),  # type: ignore[func-returns-value]
    "a dict in a list": lambda model: setattr(model, "held", [{"fc": model.fc}]) or (lambda s, x: s.held[0]["fc"](x)),  # type: ignore[func-returns-value]
    "a helper object": lambda model: setattr(model, "held", Helper(model.fc)) or (lambda s, x: s.held(x)),  # type: ignore[func-returns-value]
    "a bound method": lambda model: setattr(model, "held", model.fc.forward) or (lambda s, x: s.held(x)),  # type: ignore[func-returns-value]
    "a hidden entry of its dict": lambda model: vars(model).update(held=model.fc) or (lambda s, x: s.held(x)),  # type: ignore[func-returns-value]
}


@both
@pytest.mark.parametrize("hold", HOLD.values(), ids=HOLD)
@pytest.mark.parametrize("locked", [False, True], ids=["", "beside a lock"])
def test_whoever_holds_a_layer_holds_the_copys_own(
    copied: Callable[..., nn.Module], hold: Callable[[nn.Module], Any], locked: bool
) -> None:
    model = Calls(lambda s, x: x)
    model.run = hold(model)
    if locked:
        if copied is cloned:
            return
        model.lock = threading.Lock()
    copy = copied(model)
    x = torch.randn(2, 4)
    assert torch.equal(copy(x), model(x))
    seen: list[nn.Module] = []
    copy.fc.register_forward_hook(lambda *_: seen.append(copy))
    model.fc.register_forward_hook(lambda *_: seen.append(model))
    if hold is not HOLD["a bound method"]:
        copy(x)
        assert seen == [copy]
    else:
        assert copy.held.__self__ is copy.fc


@both
def test_an_exchanged_module_stands_wherever_the_old_one_stood(copied: Callable[..., nn.Module]) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    model.order, model.helper = [model["a"]], Helper(model["a"])
    new = nn.Linear(4, 4)
    copy = copied(model, {model["a"]: new})
    assert copy["a"] is copy["b"] is copy.order[0] is copy.helper.layer is new
    assert model["a"] is not new


@both
def test_slots_of_a_module_are_copied(copied: Callable[..., nn.Module]) -> None:
    model = Slotted()
    copy = copied(model)
    assert copy.layers[0] is copy.fc is not model.fc and copy.layers is not model.layers
    assert not hasattr(copy, "never")
    new = nn.Identity()
    assert copied(model, {model.fc: new}).layers[0] is new


def test_a_module_that_takes_the_place_of_one_with_slots_needs_none() -> None:
    model = nn.Sequential(Slotted())
    copy = cloned(model, {model[0]: nn.Identity()})
    assert type(copy[0]) is nn.Identity and not hasattr(copy[0], "layers")


@both
def test_a_hook_that_is_a_method_of_the_network_belongs_to_the_copy_after_copying(copied: Callable[..., nn.Module]) -> None:
    model = Hooked()
    copied(model)(torch.randn(2, 4))
    exchanged = copied(model, {model.fc: adopt(nn.Linear(4, 4), model.fc)})
    exchanged(torch.randn(2, 4))
    assert (exchanged.seen, model.seen) == (1, 0)


@pytest.mark.parametrize("table", [name for name in HOOKS if name not in ("_backward_hooks", "_is_full_backward_hook")])
def test_hooks_of_every_table_belong_to_the_copy(table: str) -> None:
    model = Hooked()
    vars(model.fc)[table][-1] = model.note
    copy = cloned(model, {model.fc: adopt(nn.Linear(4, 4), model.fc)})
    assert vars(copy.fc)[table][-1].__self__ is copy


def test_what_cannot_be_copied_is_a_clear_error() -> None:
    # traps: deepcopy-hostile networks
    model = nn.Sequential(nn.Linear(4, 4))
    model.lock = threading.Lock()
    with pytest.raises(LaminaError, match=r"cannot be copied \(TypeError.*lock.*; move it out of the network first$"):
        cloned(model)
    with pytest.raises(LaminaError, match=r"; wait a while$"):
        cloned(model, otherwise="wait a while")


def test_a_shadow_shares_what_cannot_be_copied_and_copies_the_rest() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.lock, model.seen, model.order = threading.Lock(), [], [model[1]]
    model[0].mixed = [threading.Lock(), model[1]]
    twin = shadow(model, {model[0]: (new := nn.Linear(4, 4))})
    assert twin.lock is model.lock and twin.seen is not model.seen and twin.order[0] is twin[1] is not model[1]
    assert twin[0] is new and twin[1].running_mean.data_ptr() != model[1].running_mean.data_ptr()
    assert twin[1].weight.data_ptr() == model[1].weight.data_ptr()


def test_a_shadow_of_a_network_that_cannot_be_copied_has_tables_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.lock = threading.Lock()
    before = snapshot(model)
    twin = shadow(model)
    twin.append(nn.Linear(4, 4))
    twin[0].register_buffer("more", torch.zeros(1))
    twin[0].register_forward_hook(lambda *_: None)
    twin[0].weight.note = 1
    del twin[0].bias
    assert snapshot(model) == before and not model[0]._forward_hooks


def test_a_failed_attribute_leaves_no_half_made_copies_behind() -> None:
    """The list is half copied when the lock is met: what holds the same helper must not get its half."""

    class Node:
        def __init__(self) -> None:
            self.first, self.lock = [1, 2], threading.Lock()
            self.last = "whole"

    model = nn.Sequential(nn.Linear(4, 4))
    node = Node()
    model.one, model.two = [node], [node]
    twin = shadow(model)
    assert twin.one[0].last == twin.two[0].last == "whole"


def train(model: nn.Module, x: Tensor) -> None:
    model.train()
    model(x)


def test_running_a_shadow_in_train_mode_leaves_the_network_bit_for_bit() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(27, 4)).eval()
    before = snapshot(model)
    train(shadow(model), torch.randn(4, 2, 5, 5))
    assert snapshot(model) == before


def test_whoever_serves_with_the_network_meanwhile_sees_right_answers_alone() -> None:
    """The shadow learns, forgets and loses its layers; the network answers as ever."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval()
    x = torch.randn(3, 4)
    wanted, wrong, stop, started = model(x).detach(), [], threading.Event(), threading.Event()

    def serve() -> None:
        with torch.no_grad():
            while not stop.is_set():
                if not torch.equal(model(x), wanted):
                    wrong.append(1)
                started.set()

    thread = threading.Thread(target=serve)
    thread.start()
    started.wait()
    for _ in range(20):
        train(shadow(model, {model[0]: nn.Linear(4, 8)}), x)
    stop.set()
    thread.join()
    assert not wrong


def test_an_alias_is_of_the_same_kind_at_the_same_place() -> None:
    base = torch.randn(4, 6, dtype=torch.complex64)
    for tensor in (base[1:3, ::2].T, base.conj()[1:], base.conj().imag[:, 2:]):
        new = alias(tensor, tensor.untyped_storage())
        assert new is not tensor and new.data_ptr() == tensor.data_ptr() and new.stride() == tensor.stride()
        assert torch.equal(new, tensor) and new.dtype == tensor.dtype
    learnt = torch.randn(3, requires_grad=True)
    assert alias(learnt, learnt.untyped_storage()).requires_grad
    assert not alias(learnt.detach(), learnt.untyped_storage()).requires_grad


def test_an_alias_of_a_tensor_of_a_class_of_its_own_keeps_the_class() -> None:
    class Odd(torch.Tensor):
        pass

    tensor = torch.randn(3).as_subclass(Odd)
    shared = alias(tensor, tensor.untyped_storage())
    assert type(shared) is Odd and shared.data_ptr() == tensor.data_ptr() and shared is not tensor
    apart = alias(tensor, tensor.untyped_storage().clone())
    assert type(apart) is Odd and apart.data_ptr() != tensor.data_ptr() and torch.equal(apart, tensor)


def test_gradients_and_memory_formats_are_as_deepcopy_leaves_them() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    copy = cloned(model, {})
    assert copy[0].weight.stride() == model[0].weight.stride() and copy[0].weight.is_leaf and copy[0].weight.requires_grad


def test_a_copy_of_a_network_with_results_of_autograd_runs_and_trains_alone() -> None:
    # traps: no reliance on copy.deepcopy: old weight_norm leaves a non-leaf tensor as an attribute
    model = nn.Sequential(old_weight_norm(), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    wanted = model(x)
    copy = cloned(model, {})
    assert torch.equal(copy(x), wanted)
    copy(x).sum().backward()
    assert copy[0].weight_g.grad is not None and model[0].weight_g.grad is None


@both
def test_the_network_is_only_read(copied: Callable[..., nn.Module]) -> None:
    model = Hooked()
    before = snapshot(model)
    copied(model, {model.fc: nn.Linear(4, 4)})
    assert snapshot(model) == before


@pytest.mark.parametrize("copied", [cloned, shadow], ids=["cloned", "shadow"])
def test_whoever_holds_the_bias_of_an_exchanged_layer_holds_that_of_the_new_one(copied: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.aside = [model[0].bias]
    twin = copied(model, {model[0]: nn.Linear(4, 4)})
    assert twin.aside[0] is twin[0].bias and twin.aside[0] is not model.aside[0]
    without = copied(model, {model[0]: nn.Linear(4, 4, bias=False)})
    assert without.aside[0] is not None and torch.equal(without.aside[0], model.aside[0])


def test_a_list_with_a_part_of_a_weight_that_is_held_is_a_list_of_its_own_on_the_same_bytes() -> None:
    model, weight = nn.Sequential(nn.ReLU()), torch.randn(4, 4)
    model.aside = [weight[1]]
    twin = shadow(model, held=[weight])
    assert twin.aside is not model.aside and twin.aside[0].data_ptr() == model.aside[0].data_ptr()


def test_a_parameter_without_bytes_of_its_own_is_the_very_one_in_the_shadow_and_a_buffer_is_not() -> None:
    model = nn.Module()
    model.sparse = nn.Parameter(torch.eye(3).to_sparse())
    model.empty = nn.Parameter(torch.empty(0, 3))
    model.meta = nn.Parameter(torch.empty(3, device="meta"))
    model.register_buffer("table", torch.eye(3).to_sparse())
    twin = shadow(model)
    assert all(twin._parameters[name] is parameter for name, parameter in model._parameters.items())
    assert twin.table is not model.table and torch.equal(twin.table.to_dense(), torch.eye(3))


@both
def test_what_overlaps_from_storages_of_its_own_has_its_values_in_the_copy(copied: Callable[..., nn.Module]) -> None:
    values = np.arange(8, dtype=np.float32)
    model = nn.Module()
    model.register_buffer("a", torch.from_numpy(values[:6]))
    model.register_buffer("b", torch.from_numpy(values[2:]))
    twin = copied(model)
    assert torch.equal(twin.a, model.a) and torch.equal(twin.b, model.b)
