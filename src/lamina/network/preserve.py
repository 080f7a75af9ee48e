"""Running somebody's network has effects: running statistics, caches, random states, the training flag. All are put back.

What lamina tries, it tries on a `shadow`; these are for what must be the network itself, such as a timing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..errors import LayerError
from .memory import devices_of


@contextmanager
def repeatable(*models: nn.Module) -> Iterator[None]:
    """Put the random states back afterwards: what follows draws the same numbers again.

    They are Python's, NumPy's and PyTorch's, and those of every accelerator on which a tensor of the networks lies.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with ExitStack() as undo:  # which goes on where one step fails
        undo.callback(random.setstate, python_state)
        undo.callback(np.random.set_state, numpy_state)
        undo.enter_context(torch.random.fork_rng(devices=[]))  # the CPU's
        for device in devices_of(*models):
            if hasattr(getattr(torch, device.type, None), "get_rng_state"):
                undo.enter_context(torch.random.fork_rng([device], device_type=device.type))
        yield


@contextmanager
def preserved(*models: nn.Module) -> Iterator[None]:
    """Put back what a run may change, also after an error: training flags, buffers, attributes, and the random states.

    Attributes and buffers are put back as the objects that they were, and what was not there is taken away: a cache made in
    inference mode would stop autograd for good. The contents of other attributes are not looked into.

    Raises:
        LayerError: A layer is lazy: its first run makes its weights, which cannot be undone.
    """
    modules = list(dict.fromkeys(module for model in models for module in model.modules()))
    for model in models:
        forbid_lazy(model)
    training = [(module, module.training) for module in modules]
    attributes = [(table, dict(table)) for module in modules for table in _tables(module)]
    contents = [(buffer, buffer.detach().clone()) for model in models for buffer in model.buffers() if not buffer.is_meta]
    with repeatable(*models), ExitStack() as undo:  # which goes on where one step fails
        for buffer, content in contents:
            undo.callback(_put_back, buffer, content)
        for module, flag in training:
            undo.callback(setattr, module, "training", flag)
        for table, entries in attributes:
            undo.callback(_refill, table, entries)
        yield


def _refill(table: dict[str, Any], entries: dict[str, Any]) -> None:
    table.clear()
    table.update(entries)


def _put_back(buffer: Tensor, content: Tensor) -> None:
    # One that is a view of itself (expanded) takes no values; whoever writes into such a one meets the same.
    with torch.no_grad(), torch.inference_mode(buffer.is_inference()), suppress(RuntimeError):
        buffer.copy_(content)


def _tables(module: nn.Module) -> list[dict[str, Any]]:
    """A module's attributes, and its parameters, buffers and children by name, as far as Python keeps them."""
    own = vars(module)
    return [own, *(own[name] for name in ("_parameters", "_buffers", "_modules") if isinstance(own.get(name), dict))]


def forbid_lazy(model: nn.Module) -> None:
    """Refuse a network of which a layer is lazy.

    Raises:
        LayerError: The message names it.
    """
    for name, module in model.named_modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if isinstance(tensor, UninitializedBuffer | UninitializedParameter):
                raise LayerError(f"{name or 'the network'}: {type(module).__name__} is lazy: run the network once before")
