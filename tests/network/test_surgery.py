"""Putting modules in place of others: hooks, attributes and the training flag go along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from holders import snapshot
from torch import nn

from lamina import LayerError
from lamina.network.surgery import HOOKS, adopt, become, forbid_nonfinite, way_back
from lamina.network.walk import walk


class Broken(nn.Module):
    """Raises where the layer would answer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError


# Kind of hook → how it is put on a layer that notes each call in a list.
KINDS: dict[str, Callable[[nn.Module, list[Any]], Any]] = {
    "forward": lambda layer, seen: layer.register_forward_hook(lambda *a: seen.append(len(a))),
    "forward with kwargs": lambda layer, seen: layer.register_forward_hook(lambda *a: seen.append(len(a)), with_kwargs=True),
    "forward, always called": lambda layer, seen: layer.register_forward_hook(lambda *a: seen.append(len(a)), always_call=True),
    "pre": lambda layer, seen: layer.register_forward_pre_hook(lambda *a: seen.append(len(a))),
    "pre with kwargs": lambda layer, seen: layer.register_forward_pre_hook(lambda *a: seen.append(len(a)), with_kwargs=True),
    "backward": lambda layer, seen: layer.register_full_backward_hook(lambda *a: seen.append(len(a))),
    "backward pre": lambda layer, seen: layer.register_full_backward_pre_hook(lambda *a: seen.append(len(a))),
}
ARGUMENTS = {"forward with kwargs": 4, "pre with kwargs": 3, "pre": 2, "backward pre": 2}


def becomes(old: nn.Module, new: nn.Module) -> nn.Module:
    become(old, adopt(new, old))
    return old


TAKES: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "by another module": lambda old, new: adopt(new, old),
    "where it is": becomes,
}
takes = pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
kinds = pytest.mark.parametrize("kind", KINDS)


@takes
@kinds
def test_hooks_of_every_kind_are_called_on_whoever_takes_the_place(take: Callable[..., nn.Module], kind: str) -> None:
    old, seen = nn.Linear(4, 4), []
    KINDS[kind](old, seen)
    take(old, nn.Linear(4, 4))(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == [ARGUMENTS.get(kind, 3)]


@takes
def test_hooks_that_are_always_called_are_so_after_errors_too(take: Callable[..., nn.Module]) -> None:
    always: list[Any] = []
    sometimes: list[Any] = []
    old = nn.Linear(4, 4)
    KINDS["forward, always called"](old, always)
    KINDS["forward"](old, sometimes)
    with pytest.raises(ValueError):
        take(old, Broken())(torch.randn(2, 4))
    assert len(always) == 1 and not sometimes


@kinds
def test_hooks_of_a_copy_are_not_those_of_the_original(kind: str) -> None:
    old = nn.Linear(4, 4)
    new = adopt(nn.Linear(4, 4), old)
    KINDS[kind](new, [])
    assert not any(vars(old)[table] for table in HOOKS)


@kinds
def test_a_handle_removes_its_hook_from_a_module_that_became_another(kind: str) -> None:
    old, seen = nn.Linear(4, 4), []
    handle = KINDS[kind](old, seen)
    becomes(old, nn.Linear(4, 4))
    handle.remove()
    old(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert not seen and not any(vars(old)[table] for table in HOOKS if table != "_is_full_backward_hook")


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_goes_along_to_all_that_is_inside(training: bool) -> None:
    new = adopt(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4).train(training))
    assert [m.training for m in new.modules()] == [training, training]


def test_attributes_of_the_users_go_along_and_those_of_the_kind_do_not() -> None:
    old, new = nn.Linear(4, 6), nn.Conv1d(4, 6, 1)
    old.scale, old.stride, old.tags = 3.0, "mine", ["a"]
    adopt(new, old, nn.Linear(4, 6))
    assert new.scale == 3.0 and new.tags is old.tags
    assert new.stride == (1,), "what the new one says of itself counts"
    assert not hasattr(new, "in_features") and "weight" not in vars(new)


def test_without_a_plain_layer_to_compare_with_attributes_stay_behind() -> None:
    old = nn.Linear(4, 4)
    old.scale = 3.0
    assert not hasattr(adopt(nn.Identity(), old), "scale")


def test_what_was_compiled_stays_behind() -> None:
    """It would call the old layer for ever."""
    old = nn.Linear(4, 4)
    old._compiled_call_impl = lambda x: x * 0
    new = adopt(nn.Linear(4, 4), old, nn.Linear(4, 4))
    assert new._compiled_call_impl is None


def test_a_weight_computed_by_a_hook_does_not_cover_that_of_the_new_module() -> None:
    """A plain attribute of a parameter's name would be found before the parameter."""
    old = nn.Linear(4, 4)
    vars(old)["weight"] = torch.zeros(4, 4)
    new = adopt(nn.Linear(4, 4), old, nn.Linear(4, 4))
    assert isinstance(new.weight, nn.Parameter)


def test_whoever_holds_a_module_that_becomes_another_holds_the_other() -> None:
    # traps: one module under two names, in a list, in a closure
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    holders = [layer, lambda x: layer(x)]
    become(layer, nn.Conv1d(4, 4, 1))
    assert model["a"] is model["b"][0] is holders[0] is layer and type(layer) is nn.Conv1d
    assert holders[1](torch.randn(1, 4, 3)).shape == (1, 4, 3)
    assert "in_features" not in vars(layer), "nothing is left of what it was"


def test_a_module_that_turns_back_is_what_it_was_to_the_last_object() -> None:
    layer, calls = nn.Linear(4, 4).eval(), []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    layer.mine = [1]
    layer(torch.randn(1, 4)).sum().backward()
    before, back = snapshot(layer), way_back(layer)
    become(layer, adopt(nn.Conv1d(4, 4, 1), layer))
    layer.more = 1
    back()
    assert snapshot(layer) == before
    handle.remove()
    layer(torch.randn(1, 4))
    assert calls == [1]


def test_a_way_back_leads_back_more_than_once() -> None:
    layer = nn.Linear(4, 4)
    before, back = snapshot(layer), way_back(layer)
    for _ in range(2):
        become(layer, nn.Identity())
        back()
        layer.more = 1
        back()
        assert snapshot(layer) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name_and_number(value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, :2] = value
    layers = walk(model).layers
    forbid_nonfinite(layers["0"])
    with pytest.raises(LayerError, match=r"^1: 2 of its 16 weights are NaN or infinite"):
        forbid_nonfinite(layers["1"])


def test_a_weight_made_in_inference_mode_is_looked_at() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4))
    forbid_nonfinite(walk(model).layers["0"])


def test_a_weight_without_values_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(LayerError, match=r"^0: .*meta"):
        forbid_nonfinite(walk(model).layers["0"])
    with pytest.raises(LayerError, match=r"^the network: .*meta"):
        forbid_nonfinite(walk(model[0]).layers[""])
