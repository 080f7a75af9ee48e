"""Lets one module take the place of another; hooks, attributes and the training flag go along.

In a copy the new module stands wherever the old one stood (`copying`). In place, the old module *becomes* the new one
(`become`): it stays the same object, so whoever holds it, in a table, a list, a helper or a closure, holds the new layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..errors import LayerError
from .walk import Layer

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def adopt(new: nn.Module, old: nn.Module, plain: nn.Module | None = None) -> nn.Module:
    """Give a new module the hooks and the training flag of the one whose place it takes.

    With ``plain``, a freshly made module like the old one, the attributes go along that the old one has beyond it.
    """
    for name in HOOKS:
        if name in old.__dict__:
            new.__dict__[name] = copy.copy(old.__dict__[name])
    if plain is not None:
        beyond = vars(old).keys() - vars(plain).keys() - vars(new).keys() - plain._parameters.keys() - {"_compiled_call_impl"}
        vars(new).update({name: vars(old)[name] for name in beyond})
    new.train(old.training)
    return new


def become(module: nn.Module, new: nn.Module) -> None:
    """Turn a module into another one where it stands: the same object, of another class and with other contents.

    Its hooks stay the very same, so that handles which remove them still do. ``new`` is used up.
    """
    hooks = {name: vars(module)[name] for name in HOOKS if name in vars(module)}
    _turn(module, new.__class__, vars(new) | hooks)


def way_back(module: nn.Module) -> Callable[[], None]:
    """What turns a module back into what it is now."""
    kind, contents = module.__class__, dict(vars(module))
    return lambda: _turn(module, kind, contents)


def _turn(module: nn.Module, kind: type[nn.Module], contents: dict[str, Any]) -> None:
    vars(module).clear()
    vars(module).update(contents)
    module.__class__ = kind


def forbid_nonfinite_values(layers: Iterable[Layer]) -> None:
    """Refuse NaN and infinite weights before work begins on them. Those on the meta device are passed by: they have no values.

    Raises:
        LayerError: The message names the first such layer and says how many.
    """
    for layer in layers:
        if not layer.parameter.is_meta:
            forbid_nonfinite(layer)


def forbid_nonfinite(layer: Layer) -> None:
    """Refuse a weight with NaN or infinite entries, or without any.

    Raises:
        LayerError: The message names the layer and says how many.
    """
    weight = layer.weight
    if weight.is_meta:
        raise LayerError(f"{layer.title}: its weight is on the meta device and has no values; it cannot be decomposed")
    with torch.no_grad():
        bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise LayerError(f"{layer.title}: {bad} of its {weight.numel()} weights are NaN or infinite; it cannot be decomposed")
