"""Puts a module in the place of another, under all its names; hooks and the training flag go along.

Two ways: `cloned` makes a new network and leaves the old one alone, `put` changes a network in place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LaminaError, LayerError
from .walk import Layer

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def adopt(new: nn.Module, old: nn.Module) -> nn.Module:
    """Give a new module the hooks and the training flag of the one whose place it takes."""
    for name in _HOOKS:
        if name in old.__dict__:
            value = old.__dict__[name]
            new.__dict__[name] = copy.copy(value)
    new.train(old.training)
    return new


def hand_over_hooks(new: nn.Module, old: nn.Module) -> None:
    """Let a new module have the very hooks of the one that is gone from its place: handles that remove them still do."""
    for name in _HOOKS:
        if name in old.__dict__:
            new.__dict__[name] = old.__dict__[name]


def put(model: nn.Module, layer: Layer, new: nn.Module) -> nn.Module:
    """Set ``new`` under every name of a layer and return the network: ``new`` itself where the layer was the whole network."""
    return put_under(model, layer.names, new)


def put_under(model: nn.Module, names: tuple[str, ...], new: nn.Module) -> nn.Module:
    """The same by names alone."""
    for name in names:
        if not name:
            return new
        parent, _, child = name.rpartition(".")
        # Not setattr: a parent's __setattr__ may refuse, and a ModuleList has no such attribute.
        model.get_submodule(parent)._modules[child] = new
    return model


def cloned(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A copy of a network with modules exchanged on the way; what is exchanged is not copied.

    Tensors are copied by value, also those that `copy.deepcopy` refuses (results of autograd, as old ``weight_norm`` leaves
    them), and stay shared where they were shared. The new modules' hooks, which `adopt` gave them, are copied too.

    Raises:
        LaminaError: The network holds something that cannot be copied; the message says to work in place.
    """
    memo: dict[int, Any] = {id(old): new for old, new in replacements.items()}
    exchanged = set(memo)

    def visit(module: nn.Module) -> None:
        if id(module) in exchanged:
            return
        for value in [*module._buffers.values(), *module.__dict__.values()]:
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        for child in module._modules.values():
            if child is not None:
                visit(child)

    visit(model)
    try:
        result: nn.Module = copy.deepcopy(model, memo)
        for new in replacements.values():
            # A hook may be a method of the network: the copy's layers call the copy.
            for hooks in _HOOKS:
                new.__dict__[hooks] = copy.deepcopy(new.__dict__[hooks], memo)
    except Exception as error:
        raise LaminaError(
            f"the network cannot be copied ({type(error).__name__}: {error}); pass inplace=True to change it where it is"
        ) from error
    return result


def forbid_nonfinite(layer: Layer) -> None:
    """Refuse a weight with NaN or infinite entries, or without any.

    Raises:
        LayerError: The message names the layer and says how many.
    """
    weight = layer.reader.weight(layer.module)
    if weight.is_meta:
        raise LayerError(f"{layer.title}: its weight is on the meta device and has no values; it cannot be decomposed")
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise LayerError(f"{layer.title}: {bad} of its {weight.numel()} weights are NaN or infinite; it cannot be decomposed")
