"""Counts a network's parameters and multiply-accumulates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..network.observe import preserved, run, set_mode
from ..network.readers import known_types
from ..values import Cost, workloads


def count(model: nn.Module, example: Any) -> Cost:
    """Parameters and MACs of a whole network on an example.

    MACs are those of PyTorch's own counter (two FLOPs each; matrix products, convolutions, attention), plus one for each bias
    added by a linear or convolution layer, which that counter leaves out. Shared parameters count once, repeated calls each
    time.

    Args:
        model: Any network; it is run once in eval mode and left as it was.
        example: A tensor, a tuple of arguments, a mapping of keyword arguments, or a list of `Workload`: then the weighted
            mean.

    Raises:
        ExampleError: The network does not run on the example.
    """
    biases = 0

    def add_bias(layer: nn.Module, _: Any, output: Any) -> None:
        nonlocal biases
        if getattr(layer, "bias", None) is not None and isinstance(output, Tensor):
            biases += output.numel()

    total = 0.0
    for workload in workloads(example):
        biases = 0
        handles = [m.register_forward_hook(add_bias) for m in model.modules() if type(m).__name__ in known_types()]
        try:
            with preserved(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
                set_mode(model, False)
                run(model, workload)
        finally:
            for handle in handles:
                handle.remove()
        total += workload.weight * (counter.get_total_flops() // 2 + biases)
    return Cost(sum(p.numel() for p in model.parameters()), round(total))
