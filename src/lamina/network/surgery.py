"""Puts a module in the place of another, under all its names; hooks and the training flag go along.

Two ways: `cloned` makes a new network and leaves the old one alone, `put` changes a network in place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import LayerError, LaminaError
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


def put(model: nn.Module, layer: Layer, new: nn.Module) -> nn.Module:
    """Set ``new`` under every name of a layer and return the network: ``new`` itself where the layer was the whole network."""
    for name in layer.names:
        if not name:
            return new
        parent, _, child = name.rpartition(".")
        # Not setattr: a parent's __setattr__ may refuse, and a ModuleList has no such attribute.
        model.get_submodule(parent)._modules[child] = new
    return model


def cloned(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A copy of a network with modules exchanged on the way; what is exchanged is not copied.

    Tensors are copied by value, also those that `copy.deepcopy` refuses (results of autograd, as old ``weight_norm`` leaves
    them), and stay shared where they were shared.

    Raises:
        LaminaError: The network holds something that cannot be copied; the message says to work in place.
    """
    memo: dict[int, object] = {id(old): new for old, new in replacements.items()}
    exchanged = set(memo)
    kept: list[object] = []  # ids in a memo must not be reused while it lives

    def note(tensor: object) -> None:
        if isinstance(tensor, Tensor) and id(tensor) not in memo and type(tensor) in (Tensor, nn.Parameter):
            fresh = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                copied: Tensor = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
            else:
                copied = fresh.requires_grad_(tensor.requires_grad) if tensor.is_leaf else fresh
            copied.__dict__.update(copy.copy(tensor.__dict__))
            memo[id(tensor)] = copied
            kept.append(tensor)

    def visit(module: nn.Module) -> None:
        if id(module) in exchanged:
            return
        for table in (module._parameters, module._buffers, module.__dict__):
            for value in table.values():
                note(value)
        for child in module._modules.values():
            if child is not None:
                visit(child)

    with torch.no_grad():
        visit(model)
    try:
        result: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        raise LaminaError(
            f"the network cannot be copied ({type(error).__name__}: {error}); pass inplace=True to change it where it is"
        ) from error
    return result


def forbid_nonfinite(layer: Layer) -> None:
    """Refuse a weight with NaN or infinite entries.

    Raises:
        LayerError: The message names the layer and says how many.
    """
    weight = layer.reader.weight(layer.module)
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise LayerError(f"{layer.name}: {bad} of its {weight.numel()} weights are NaN or infinite; it cannot be decomposed")
