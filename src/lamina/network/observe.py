"""Runs the example: which shapes reach each layer, how often, and in which modes the network runs at all.

Running somebody's network has effects: running statistics, caches, random states, the training flag. All are put back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..errors import ExampleError, LayerError
from ..values import Use, Workload
from .walk import Layer

MODES: dict[str, tuple[bool, Callable[[], AbstractContextManager[Any]]]] = {
    "train": (True, torch.enable_grad),
    "eval": (False, torch.enable_grad),
    "eval + no_grad": (False, torch.no_grad),
    "inference_mode": (False, torch.inference_mode),
}


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
        _forbid_lazy(model)
    training = [(module, module.training) for module in modules]
    attributes = [(table, dict(table)) for module in modules for table in _tables(module)]
    contents = [(buffer, buffer.clone()) for model in models for buffer in model.buffers() if not buffer.is_meta]
    devices = sorted({t.device.index for m in models for t in m.parameters() if t.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            for table, entries in attributes:
                table.clear()
                table.update(entries)
            for module, flag in training:
                module.training = flag
            with torch.no_grad():
                for buffer, content in contents:
                    if not torch.equal(buffer, content):
                        buffer.copy_(content)


def _tables(module: nn.Module) -> list[dict[str, Any]]:
    """A module's attributes, and its parameters, buffers and children by name, as far as Python keeps them."""
    own = vars(module)
    return [own, *(own[name] for name in ("_parameters", "_buffers", "_modules") if isinstance(own.get(name), dict))]


def _forbid_lazy(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
                raise LayerError(f"{name or 'the network'}: {type(module).__name__} is lazy: run the network once before")


def set_mode(model: nn.Module, training: bool) -> None:
    """Put every module into train or eval mode by its flag alone: no override of ``train`` in the model is called."""
    for module in model.modules():
        module.training = training


@final
@dataclass(slots=True)
class Observation:
    """What a layer's calls looked like: the distinct shapes with their number of calls, and the input's memory format."""

    uses: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = field(default_factory=dict)
    channels_last: bool = False

    def record(self, inputs: Tensor, output: Tensor) -> None:
        """Count one call."""
        key = _shape(inputs), _shape(output)
        self.uses[key] = self.uses.get(key, 0) + 1
        self.channels_last = is_channels_last(inputs)

    def as_uses(self, weight: float = 1.0) -> tuple[Use, ...]:
        """The distinct uses, most frequent first."""
        return tuple(Use(i, o, n, weight) for (i, o), n in sorted(self.uses.items(), key=lambda item: -item[1]))


def _shape(tensor: Tensor) -> tuple[int, ...]:
    if not tensor.is_nested:
        return tuple(tensor.shape)
    # Samples of unequal length, as `nn.TransformerEncoder` makes them from a padding mask: their rows, one below the other.
    width = tensor.size(-1)
    return tensor.numel() // width, width


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a 4- or 5-dimensional tensor lies channels last and not also contiguous."""
    if tensor.ndim not in (4, 5) or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)


def observe(model: nn.Module, layers: dict[str, Layer], workload: Workload) -> dict[str, Observation]:
    """Run a workload once in eval mode without gradients and record how each layer is called.

    Raises:
        ExampleError: The network does not run on the example; the message carries the network's own complaint.
    """
    seen: dict[str, Observation] = {name: Observation() for name in layers}
    handles = []
    for name, layer in layers.items():

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str = name) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(inputs, Tensor) and isinstance(output, Tensor):
                seen[name].record(inputs, output)

        handles.append(layer.module.register_forward_hook(record, with_kwargs=True))
    try:
        with preserved(model), torch.no_grad():
            set_mode(model, False)
            run(model, workload)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def run(model: nn.Module, workload: Workload) -> Any:
    """The output on a workload.

    Raises:
        ExampleError: The network raised; its first line is quoted beside the example's shapes.
    """
    try:
        return workload.run(model)
    except Exception as error:
        raise ExampleError(
            f"the network does not run on the example ({workload}): {type(error).__name__}: {first_line(error)}"
        ) from error


def modes_that_run(model: nn.Module, workload: Workload) -> dict[str, str | None]:
    """For each of train, eval, eval + no_grad and inference_mode: None where the network runs, else what it said."""
    outcome: dict[str, str | None] = {}
    for mode, (training, context) in MODES.items():
        with preserved(model):
            set_mode(model, training)
            try:
                with context():
                    workload.run(model)
                outcome[mode] = None
            except Exception as error:  # whatever the user's forward raises is the answer here
                outcome[mode] = f"{type(error).__name__}: {first_line(error)}"
    return outcome


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a message of our own."""
    return str(error).strip().splitlines()[0] if str(error).strip() else "no message"
