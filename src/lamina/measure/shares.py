"""Where a network's time goes, module by module: a first look, from which one sees what decomposing could gain at best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, final

import torch
from torch import nn

from ..network.memory import devices_of
from ..network.preserve import repeatable
from ..network.running import set_mode
from ..values import Workload
from .clock import between, mark, waiter

_RUNS = 5


def time_shares(model: nn.Module, examples: Sequence[Workload]) -> dict[str, float]:
    """The share of a forward pass that each module spends itself, not in the modules that it calls.

    Args:
        model: The network, or a shadow of it; it is run in eval mode.
        examples: What it is fed; shares are of the sum of their times by their weights.

    Returns:
        Name of a module → its share; they sum to 1. Modules that are never called are left out, and scripted ones, which count
        as part of their callers; where nothing is left, there are none. Hooks take some microseconds a call, so that very small
        modules look larger than they are.
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


@final
@dataclass(slots=True)
class _Call:
    """One call of a module: its name, when it began and ended, and the call from within which it was made."""

    name: str
    caller: _Call | None
    begin: Any
    end: Any = None
    inner_s: float = 0.0


def _self_times(model: nn.Module, workload: Workload) -> dict[str, float]:
    """Seconds of one run, by module, without those of the modules called from within."""
    devices = devices_of(model) or [torch.device("cpu")]
    calls: list[_Call] = []
    under_way: list[_Call] = []
    handles: list[Any] = []

    def watch(name: str, module: nn.Module) -> None:
        device = next((p.device for p in module.parameters()), devices[0])

        def start(*_: Any) -> None:
            under_way.append(_Call(name, under_way[-1] if under_way else None, mark(device)))
            calls.append(under_way[-1])

        def stop(*_: Any) -> None:
            under_way.pop().end = mark(device)

        handles.append(module.register_forward_pre_hook(start, prepend=True))
        handles.append(module.register_forward_hook(stop, always_call=True))  # its caller may go on

    try:
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                watch(name, module)
        workload.run(model)
    finally:
        for handle in handles:
            handle.remove()
    waiter(devices)()
    spent = dict.fromkeys((call.name for call in calls), 0.0)
    for call in reversed(calls):  # a call stands before those from within it
        took = between(call.begin, call.end)
        spent[call.name] += max(took - call.inner_s, 0.0)
        if call.caller:
            call.caller.inner_s += took
    return spent
