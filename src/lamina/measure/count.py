"""Counts a network's parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from ..errors import ExampleError
from ..network.readers import parent_of
from ..network.running import observed_in, unfused
from ..network.trial import tried
from ..network.wrappers import unwrapped
from ..values import Cost, Inference, Mode, workloads


class _Untracked(ModuleTracker):
    """Attributes nothing to modules: the hooks for that break networks that take gradients within their forward."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def count(model: nn.Module, example: Any, *, mode: Mode | None = None) -> Cost:
    """Parameters and MACs of a whole network on an example.

    MACs are those of PyTorch's own counter (two FLOPs each; matrix products, convolutions, attention), plus one for each bias
    added by a linear or convolution layer, which that counter leaves out. Shared parameters count once, repeated calls each
    time.

    Args:
        model: Any network; a shadow of it is run once.
        example: A tensor, a tuple of arguments, a mapping of keyword arguments, or a list of `Workload`: then the weighted
            mean.
        mode: `Inference()` by default. With `Training()` it is run in train mode, and its forward is counted.

    Raises:
        ExampleError: The network does not run on the example.
        LaminaError: It is no network.
    """
    model, biases, counter = unwrapped(model), 0, FlopCounterMode(display=False)

    def add_bias(layer: nn.Module, _: Any, output: Any) -> None:
        nonlocal biases
        if getattr(layer, "bias", None) is not None and isinstance(output, Tensor):
            biases += output.numel()

    def look(twin: nn.Module) -> None:
        for module in twin.modules():
            if parent_of(module):
                module.register_forward_hook(add_bias)

    @contextmanager
    def counting() -> Iterator[None]:
        nonlocal biases, counter
        biases, counter = 0, FlopCounterMode(display=False)
        counter.mod_tracker = _Untracked()
        with unfused(), counter:  # the counter knows no fused encoder
            yield

    way, total = observed_in(mode or Inference()), 0.0
    for workload in workloads(example):
        complaint = tried(model, workload, modes=[way], prepare=look, within=counting).complaints[way]
        if complaint:
            raise ExampleError(f"the network does not run on the example ({workload}): {complaint}")
        total += workload.weight * (counter.get_total_flops() // 2 + biases)
    return Cost(sum(p.numel() for p in model.parameters()), round(total))
