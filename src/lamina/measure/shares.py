"""Where a network's time goes, module by module: a first look, from which one sees what decomposing could gain at best."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from ..network.preserve import repeatable
from ..network.running import set_mode
from ..values import Workload

_RUNS = 5


def time_shares(model: nn.Module, examples: Sequence[Workload]) -> dict[str, float]:
    """The share of a forward pass that each module spends itself, not in the modules that it calls.

    Args:
        model: The network, or a shadow of it; it is run in eval mode.
        examples: What it is fed; shares are of the sum of their times by their weights.

    Returns:
        Name of a module → its share; they sum to 1. Modules that are never called are left out. Hooks take some microseconds a
        call, so that very small modules look larger than they are.
    """
    set_mode(model, training=False)
    total: dict[str, float] = {}
    with repeatable(model), torch.inference_mode():
        for workload in examples:
            runs = [_self_times(model, workload) for _ in range(_RUNS + 1)][1:]  # the first one warms up
            for name in runs[0]:
                total[name] = total.get(name, 0.0) + workload.weight * median(run.get(name, 0.0) for run in runs)
    whole = sum(total.values())
    return {name: seconds / whole for name, seconds in total.items()} if whole else {}


def _self_times(model: nn.Module, workload: Workload) -> dict[str, float]:
    """Seconds of one run, by module, without those of the modules called from within."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    wait: Callable[[], None] = (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))
    spent: dict[str, float] = {}
    within: list[tuple[float, float]] = []
    """For each call that is under way when it began, and the seconds of the calls from within it."""

    def start(*_: Any) -> None:
        wait()
        within.append((time.perf_counter(), 0.0))

    def stop(name: str) -> Callable[..., None]:
        def stopped(*_: Any) -> None:
            wait()
            began, inner = within.pop()
            took = time.perf_counter() - began
            spent[name] = spent.get(name, 0.0) + max(took - inner, 0.0)
            if within:
                within[-1] = within[-1][0], within[-1][1] + took

        return stopped

    handles: list[Any] = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(start, prepend=True))
            handles.append(module.register_forward_hook(stop(name)))
        workload.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return spent
